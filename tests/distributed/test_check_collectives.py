"""Two collectives of one shape, exchanged on one rank: gloo says nothing, ``check_collectives`` names both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zgraph
from tests.programs import divide, two_layers, values_for
from tests.ranks import Ranks
from zgraph import ops
from zgraph.agreement import Agreement, CheckedComm
from zgraph.codegen.emit import emit
from zgraph.config import Config
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh
from zgraph.which_comm import make_comm


def step(*, swapped_on: int | None, checked: bool) -> list[Any] | str:
    """Run one step whose first two all-reduces stand in the other order on one rank."""
    captured = two_layers()
    program = run(default_passes(Config(0, 1), Mesh(2)), captured).program
    first, second, *_ = (node for node in program.graph.nodes if node.target is ops.all_reduce)
    assert first.meta["val"].shape == second.meta["val"].shape
    if dist.get_rank() == swapped_on:
        second.append(first)
    comm = make_comm(dist.group.WORLD, {"cpu"})
    if checked:
        comm = CheckedComm(comm, Agreement(dist.group.WORLD))
    values = divide(program, values_for(captured, world=2))[dist.get_rank()]
    inputs = [values[what] for _, what in program.placeholders()]
    try:
        results = emit(program, tagged=checked).function(inputs, comm)
    except zgraph.RankError as error:
        return str(error)
    return [torch.as_tensor(result).nan_to_num() for result in results]  # padding is NaN


def test_without_the_check_a_swap_gives_wrong_values_and_no_error(ranks: Ranks) -> None:
    right = ranks.run(step, swapped_on=None, checked=False)
    wrong = ranks.run(step, swapped_on=1, checked=False)
    assert not all(torch.equal(a, b) for a, b in zip(right[0], wrong[0], strict=True))


def test_the_check_stops_a_swap_on_both_ranks_and_names_both_collectives(ranks: Ranks) -> None:
    first, second = ranks.run(step, swapped_on=1, checked=True)
    assert first == second
    assert first.count("= all_reduce of f64[32]") == 2
    assert first.startswith("rank 0 has called v")


def test_the_check_changes_no_value(ranks: Ranks) -> None:
    plain, checked = (ranks.run(step, swapped_on=None, checked=checked) for checked in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain[0], checked[0], strict=True))


def train() -> str:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = zgraph.compile(model, optimizer=optimizer, loss=lambda y, _: y.sum(), check_collectives=True)
    compiled.train_step(torch.ones(2, 3))
    return compiled.source


def test_an_option_turns_the_check_on(ranks: Ranks) -> None:
    source, _ = ranks.run(train)
    assert "tag='v" in source


def test_the_option_is_a_bool() -> None:
    with pytest.raises(zgraph.OptionError, match="check_collectives=1 is not a bool"):
        zgraph.compile(nn.Linear(1, 1), check_collectives=1)
