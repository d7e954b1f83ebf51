"""Buckets that stay whole from forward to backward: fewer gathers, the same step, and no more bytes than may stay."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.optim import AdamW

import zgraph
from tests.mutants.steps import many_parameters, mixed_elements, read_in_low_precision
from tests.programs import accumulated, assert_same_step, blocks, few_examples, two_layers
from tests.ranks import Ranks
from tests.recipes import Recipe, build, recipes
from tests.reference import assert_equal, world
from zgraph import ops
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.footprint import footprint
from zgraph.hardware import Hardware
from zgraph.machines import preset
from zgraph.passes import Unshard, default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Phase, Program, Stage, operand
from zgraph.timeline import play
from zgraph.which_hardware import hardware_of

GPU, CPU = preset("H100"), replace(hardware_of(torch.device("cpu"), 2), reads_peers=False)
MACHINES = {"unknown": None, "gpu": GPU, "cpu": CPU}


def lowered(captured: Program, config: Config, num_ranks: int = 2, machine: Hardware | None = None) -> Program:
    return run(default_passes(config, Mesh(num_ranks), hardware=machine), captured).program


def gathered_twice(captured: Program, config: Config, num_ranks: int = 2, machine: Hardware | None = None) -> Program:
    """As if nothing ever stayed."""
    passes = [p for p in default_passes(config, Mesh(num_ranks), hardware=machine) if not isinstance(p, Unshard)]
    return run(passes, captured).program


def gathers(program: Program) -> list[str]:
    """The buckets that are gathered, in order."""
    starts = program.graph.find_nodes(op="call_function", target=ops.all_gather)
    return [start.meta["origin"].module for start in starts if start.meta["origin"].phase is not Phase.UPDATE]


def test_the_last_bucket_of_forward_stays_for_backward() -> None:
    program = lowered(two_layers(), Config(bucket_bytes=1))
    number = {node: i for i, node in enumerate(program.graph.nodes)}
    lines = []
    for node in program.graph.nodes:
        arrives = node.target is ops.wait and operand(node).target is ops.all_gather
        if arrives or node.target in (ops.all_gather, torch.ops.aten.mm.default):
            roots = [ops.root_of(source) for source in node.all_input_nodes]
            reads = [f"%{number[root]}" for root in roots if root.target is ops.wait]
            phase, name = node.meta["origin"].phase.value, str(node.target).split(".")[1].removesuffix("_tensor")
            lines.append(f"%{number[node]} {phase} {name.removesuffix('_into')} {' '.join(reads)}".rstrip())
    assert_expected_inline(
        "\n".join(lines),
        """\
%9 forward all_gather
%10 forward wait
%13 forward mm %10
%14 forward all_gather
%15 forward wait
%18 forward mm %15
%24 backward mm %15
%26 backward mm
%32 backward mm""",
    )


@pytest.mark.parametrize("step", [two_layers, many_parameters, mixed_elements, read_in_low_precision])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ranks_compute_the_captured_step(step: Any, share: float) -> None:
    captured = accumulated(step(), 2) if step is not read_in_low_precision else step()
    for num_ranks in (2, 3):
        program = lowered(captured, Config(bucket_bytes=200, unshard=share), num_ranks, CPU)
        for late in (False, True):
            assert_same_step(program, captured, late=late)


def is_staged(machine: str) -> bool:
    """Whether collectives hold what they receive beside their result; a machine that is not known may be a CPU."""
    known = MACHINES[machine]
    return known is None or known.is_staged


@pytest.mark.slow
@few_examples(20)
@given(recipes(), st.sampled_from([1, 200, 1000]), st.integers(2, 4), st.sampled_from(sorted(MACHINES)))
def test_what_stays_by_itself_costs_no_peak_and_all_may_stay(
    recipe: Recipe, bucket_bytes: int, num_ranks: int, machine: str
) -> None:
    captured, config = build(recipe), Config(bucket_bytes=bucket_bytes)
    twice, staged = gathered_twice(captured, config, num_ranks, MACHINES[machine]), is_staged(machine)
    once = lowered(captured, config, num_ranks, MACHINES[machine])
    assert footprint(once, staged=staged).peak_bytes <= footprint(twice, staged=staged).peak_bytes
    every = lowered(captured, replace(config, unshard=1), num_ranks, MACHINES[machine])
    assert len(gathers(every)) == len(set(gathers(every))), "each bucket once"
    assert set(gathers(every)) == set(gathers(once)) == set(gathers(twice))
    assert_same_step(every, captured)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_larger_share_gathers_no_more_takes_no_longer_and_holds_what_it_may(machine: str) -> None:
    captured, config = blocks(6), Config(bucket_bytes=1)
    twice = gathered_twice(captured, config)
    (size,) = {start.meta["val"].nbytes for start in _starts(twice)}
    num_twice = len(gathers(twice)) - len(set(gathers(twice)))
    shares = (0.0, 0.25, 0.5, 0.9, 1.0)
    programs = [lowered(captured, replace(config, unshard=s), machine=MACHINES[machine]) for s in shares]
    num_free = len(gathers(twice)) - len(gathers(programs[0]))
    assert 0 < num_free < num_twice / 2
    for share, program in zip(shares, programs, strict=True):
        num_staying = len(gathers(twice)) - len(gathers(program))
        assert num_staying == max(num_free, int(share * num_twice))
        assert footprint(program).peak_bytes <= footprint(twice).peak_bytes + (num_staying - num_free) * size
    for fewer, more in itertools.pairwise(programs):
        assert not Counter(gathers(more)) - Counter(gathers(fewer)), "what a smaller share keeps, a larger one does"
        for hardware in (GPU, CPU):
            assert play(more, hardware).step_s <= play(fewer, hardware).step_s * (1 + 1e-9)


def test_what_holds_backward_up_the_longest_stays_first() -> None:
    """And no sum of what others hold it up is more: where one may stay, it is the one."""
    free = lowered(blocks(6), Config(bucket_bytes=1), machine=GPU)
    held_up = {event.node: event.end_s - event.start_s for event in play(free, GPU).events}
    waits = [start.next if start.next.target is ops.wait else next(iter(start.users)) for start in _starts(free)]
    again = {operand(wait).meta["origin"].module: held_up[wait] for wait in waits if _is_second(wait, waits)}
    assert len(again) > 3
    assert len(set(again.values())) > 1, "they do not cost alike"
    num_twice = len(set(gathers(free))) - 1
    (kept,) = Counter(gathers(free)) - Counter(gathers(Unshard((num_twice - len(again) + 1) / num_twice, GPU)(free)))
    assert again[kept] == max(again.values())


def _starts(program: Program) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=ops.all_gather))


def _is_second(wait: fx.Node, waits: list[fx.Node]) -> bool:
    return any(operand(operand(w)) is operand(operand(wait)) for w in waits[: waits.index(wait)])


@dataclass(frozen=True)
class KeepAnother(Pass):
    """Let backward read the bucket that forward gathered before."""

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        first, second, *_ = (
            node
            for node in program.graph.find_nodes(op="call_function", target=ops.wait)
            if operand(node).target is ops.all_gather
        )
        second.replace_all_uses_with(first)
        program.graph.eliminate_dead_code()


def test_a_bucket_that_stays_for_another_is_refused() -> None:
    with pytest.raises(VerifyError, match="KeepAnother changed what the step computes"):
        run(default_passes(Config(bucket_bytes=1), Mesh(2), own=[KeepAnother()]), blocks(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.square().mean()


def train(share: float) -> tuple[dict[str, Tensor], int, int]:
    """Weights after two steps of two micro-batches, equal to plain PyTorch's; gathers, and bytes received in them."""
    rank, num_ranks = world()
    torch.manual_seed(0)
    model = Net().double()
    reference = copy.deepcopy(model)
    compiled: Any = zgraph.compile(
        model, optimizer=AdamW(model.parameters()), accumulate=2, bucket_bytes=16 * 17 * 8, unshard=share
    )
    optimizer = AdamW(reference.parameters())
    for _ in range(2):
        x = torch.randn(4 * num_ranks, 16, dtype=torch.float64)
        with mock.patch("zgraph.runtime.may_share", return_value=False):  # as on several hosts
            compiled.train_step(x.chunk(num_ranks)[rank])
        optimizer.zero_grad()
        reference(x).backward()
        optimizer.step()
    collectives = compiled.stats()["collectives"]["all_gather"]
    state = compiled.state_dict()
    assert_equal(state, reference.state_dict(), "weights")
    return state, collectives["count"], collectives["bytes"]


def test_on_ranks_each_bucket_is_gathered_once_for_a_micro_batch(ranks: Ranks) -> None:
    for some, every in zip(ranks.run(train, share=0.0), ranks.run(train, share=1.0), strict=True):
        assert all(torch.equal(some[0][name], value) for name, value in every[0].items())
        assert every[1] == 2 * 4
        assert 2 * 4 <= some[1] < 2 * 2 * 4, "what costs no peak stays in any case"
        assert every[2] / every[1] == some[2] / some[1], "bytes of one"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"unshard": 2}, "unshard=2 is not a share"),
        ({"unshard": True}, "unshard=True is not a share"),
        ({"unshard": 0.5, "zero": 2}, "unshard=0.5 with zero=2"),
        ({"unshard": 0.5, "keep_gathered": True, "accumulate": 2}, "unshard=0.5 with keep_gathered"),
    ],
)
def test_a_share_of_nothing_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(zgraph.OptionError, match=reason):
        zgraph.compile(Net(), **options)
