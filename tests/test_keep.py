"""Parameters that are gathered once for all micro-batches of a step: the same step, fewer bytes on the way."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import zgraph
from tests.mutants.steps import many_parameters, mixed_elements, read_in_low_precision
from tests.optimizers import OPTIMIZERS
from tests.programs import accumulated, assert_same_step, two_layers
from tests.ranks import Ranks
from tests.reference import assert_equal, world
from zgraph import ops
from zgraph.accumulation import micro_step
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Phase, Program, Role, Stage

KEPT = Config(accumulate=2, keep_gathered=True, bucket_bytes=200)


def steps() -> dict[str, Program]:
    """The last of two micro-batches, and the first of them."""
    last = {
        "many parameters": accumulated(many_parameters(), 2, limit=0.1),
        "mixed elements": accumulated(mixed_elements(), 2),
    }
    before = {f"{name}, before": micro_step(program) for name, program in last.items()}
    return {**last, **before, "read in low precision": read_in_low_precision()}


@pytest.mark.parametrize("name", steps())
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_compute_the_captured_step_and_gather_nothing(name: str, num_ranks: int) -> None:
    captured = steps()[name]
    program = run(default_passes(KEPT, Mesh(num_ranks)), captured).program
    for late in (False, True):
        assert_same_step(program, captured, late=late)
    gathers = [n for n in program.graph.nodes if n.target in (ops.all_gather, ops.all_gather_into)]
    assert not [n for n in gathers if n.meta["origin"].phase is not Phase.UPDATE]
    dtypes = {what.key for _, what in program.placeholders() if what.role is Role.GATHERED}
    low = {"float32", "float64"} if name.startswith("read in low") else dtypes
    assert dtypes == (low if num_ranks > 1 else set())


@dataclass(frozen=True)
class ReadAnotherBucket(Pass):
    """Read one gathered bucket where another was meant."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        first, second, *_ = program.inputs(Role.GATHERED).values()
        for user in list(second.users):
            user.replace_input_with(second, first)


@dataclass(frozen=True)
class TakeTheSliceForTheWhole(Pass):
    """Record a gathered bucket as large as a rank's slice of it."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for node in program.inputs(Role.GATHERED).values():
            val = node.meta["val"]
            node.meta["val"] = program.empty([len(val) // 2], val.dtype, val.device)


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        (ReadAnotherBucket(), "changed what the step computes"),
        (TakeTheSliceForTheWhole(), "is no divided bucket, whole"),
    ],
)
def test_a_mistake_with_what_was_gathered_is_refused(mistake: Pass, rule: str) -> None:
    passes = default_passes(Config(accumulate=2, keep_gathered=True, bucket_bytes=1), Mesh(2))
    (last,) = (i for i, p in enumerate(passes) if p.name == "ReadGathered")
    with pytest.raises(VerifyError, match=rule):
        run([*passes[: last + 1], mistake], accumulated(two_layers(), 2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(torch.tanh(self.first(x))))
        return y.square().mean()


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon_and_adam"])
def test_it_changes_no_bit(optimizer: str, precision: str | None) -> None:
    torch.manual_seed(0)
    model = Net()
    states = []
    for keep in (False, True):
        torch.manual_seed(1)
        mine = copy.deepcopy(model)
        ranks = zgraph.simulate_ranks(
            mine,
            OPTIMIZERS[optimizer](mine),
            world_size=2,
            accumulate=3,
            keep_gathered=keep,
            precision=precision,
            clip_norm=1.0,
            metrics={"largest": (lambda y, x: x.max(), "max")},  # noqa: ARG005 -- what metrics are called with
        )
        for _ in range(3):
            ranks.train_step([(torch.randn(6, 6),) for _ in range(2)])
        states.append(ranks.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def train(keep: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights after three steps of three micro-batches, equal to plain PyTorch's; and what has travelled."""
    rank, num_ranks = world()
    torch.manual_seed(0)
    model = Net().double()
    reference = copy.deepcopy(model)
    compiled: Any = zgraph.compile(
        model, optimizer=AdamW(model.parameters()), accumulate=3, keep_gathered=keep, check_collectives=True
    )
    optimizer = AdamW(reference.parameters())
    for _ in range(3):
        x = torch.randn(6 * num_ranks, 6, dtype=torch.float64)
        with mock.patch("zgraph.runtime.may_share", return_value=False):  # as on several hosts
            compiled.train_step(x.chunk(num_ranks)[rank])
        optimizer.zero_grad()
        reference(x).backward()
        optimizer.step()
    state = compiled.state_dict()
    assert_equal(state, reference.state_dict(), "weights")
    assert not compiled.__dict__["_zgraph"].state.gathered, "let go of behind the step"
    return state, compiled.stats()["collectives"]


def test_each_bucket_travels_once_for_a_step(ranks: Ranks) -> None:
    for kept, gathered in zip(ranks.run(train, keep=True), ranks.run(train, keep=False), strict=True):
        assert all(torch.equal(kept[0][name], value) for name, value in gathered[0].items())
        assert kept[1]["all_gather"]["count"] == 1
        assert gathered[1]["all_gather"]["count"] == 3, "each micro-batch: the only bucket stays until backward"
        assert kept[1]["reduce_scatter"] == gathered[1]["reduce_scatter"]


@pytest.mark.parametrize("options", [{"accumulate": 2, "zero": 2}, {}])
def test_where_nothing_is_gathered_more_often_than_it_must_be_it_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(zgraph.OptionError, match="keep_gathered with zero="):
        zgraph.compile(Net(), keep_gathered=True, **options)
    with pytest.raises(zgraph.OptionError, match="keep_gathered=1 is not a bool"):
        zgraph.compile(Net(), keep_gathered=1)
