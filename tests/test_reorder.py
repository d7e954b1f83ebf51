"""Memory first: another order of what computes never has a higher peak, and computes the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import zgraph
from tests.programs import Builder, assert_same_step, few_examples, network, param
from tests.recipes import Recipe, build, recipes
from tests.test_recomputation import LAYERS
from zgraph.config import Config
from zgraph.liveness import held_bytes, lifetimes
from zgraph.machines import preset
from zgraph.passes import OrderByMemory, default_passes
from zgraph.passes.schedule import Holding
from zgraph.pipeline import run
from zgraph.program import Mesh, Phase, Program, Role, Stage

aten = torch.ops.aten


def two_branches() -> Program:
    """``loss = sum(relu(x @ u)) + sum(relu(x @ v)) + sum(relu(x @ w))``, all products first."""
    b = Builder()
    x, lr = b.input(Role.BATCH, "0", shape=[4, 4]), b.input(Role.HYPER, "lr")
    params = {name: b.input(Role.PARAM, name, shape=[4, 64]) for name in "uvw"}
    products = [b.forward(aten.mm.default, x, p) for p in params.values()]
    sums = [b.forward(aten.sum.default, b.forward(aten.relu.default, y)) for y in products]
    loss = b.forward(aten.add.Tensor, b.forward(aten.add.Tensor, sums[0], sums[1]), sums[2])
    gradients = [b.backward(aten.mul.Tensor, p, loss) for p in params.values()]
    results = {None: loss}
    for (name, p), g in zip(params.items(), gradients, strict=True):
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, p, g, alpha=lr, module=name)
    return b.finish(results)


def scheduled(captured: Program, zero: int = 0, world: int = 1) -> Program:
    config = Config(zero, 200)
    passes = default_passes(config, Mesh(world), hardware=preset("H100"))
    return run(passes[: next(i for i, p in enumerate(passes) if p.gives is Stage.SCHEDULED) + 1], captured).program


def peak(program: Program) -> int:
    return max(Holding(program, staged=False).now())


def test_values_are_made_when_they_are_read() -> None:
    program = scheduled(two_branches())
    ordered = OrderByMemory(preset("H100"))(program)
    calls = (n for n in ordered.graph.nodes if n.op == "call_function" and n.meta["origin"].phase is Phase.FORWARD)
    text = "\n".join(f"{node.target._opname} of {', '.join(map(str, node.args))}" for node in calls)
    assert_expected_inline(
        text,
        """\
slice of param_3, 0, 0, 256
view of slice_tensor, [4, 64]
slice of param_4, 0, 0, 256
view of slice_tensor_1, [4, 64]
slice of param_5, 0, 0, 256
view of slice_tensor_2, [4, 64]
mm of batch, view_default_1
relu of mm_default_1
sum of relu_default_1
mm of batch, view_default
relu of mm_default
sum of relu_default
add of sum_default, sum_default_1
mm of batch, view_default_2
relu of mm_default_2
sum of relu_default_2
add of add_tensor, sum_default_2""",
    )
    assert peak(ordered) < peak(program)


@given(LAYERS, st.sampled_from([4, 64]), st.integers(0, 3), st.sampled_from([1, 2]), st.booleans())
@few_examples(20)
def test_the_peak_never_rises_and_the_step_stays(
    layers: list[tuple[str, int]], rows: int, zero: int, world: int, late: bool
) -> None:
    captured = network(layers, rows=rows)
    check(captured, zero, world, late=late)


@given(recipes(), st.integers(0, 3), st.sampled_from([1, 2, 3]), st.booleans())
@few_examples(15)
def test_any_step_is_the_same(recipe: Recipe, zero: int, world: int, late: bool) -> None:
    check(build(recipe), zero, world, late=late)


def check(captured: Program, zero: int, world: int, *, late: bool) -> None:
    hardware, found = preset("H100"), {}
    for first in (False, True):
        config = Config(zero, 200, memory_first=first)
        program = run(default_passes(config, Mesh(world), hardware=hardware), captured).program
        found[first] = max(held_bytes(lifetimes(program, staged=False), len(program.graph.nodes)))
    assert found[True] <= found[False]
    assert_same_step(program, captured, late=late)
    again = run(default_passes(config, Mesh(world), hardware=hardware), captured).program
    assert again.digest() == program.digest()


def orders(program: Program) -> Iterator[tuple[fx.Node, ...]]:
    """All legal orders of what forward computes."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["origin"].phase is Phase.FORWARD]
    for order in itertools.permutations(calls):
        at = {node: i for i, node in enumerate(order)}
        if all(at[source] < at[node] for node in calls for source in node.all_input_nodes if source in at):
            yield order


def test_of_few_calls_no_order_is_lower() -> None:
    b = Builder()
    w, x, lr = b.input(Role.PARAM, "w", shape=[8]), b.input(Role.BATCH, "0", shape=[64]), b.input(Role.HYPER, "lr")
    one, two = b.forward(aten.neg.default, x), b.forward(aten.cos.default, x)
    loss = b.forward(aten.add.Tensor, b.forward(aten.sum.default, one), b.forward(aten.sum.default, two))
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, b.backward(aten.mul.Tensor, w, loss), alpha=lr, module="w")
    program = scheduled(b.finish({None: loss, param("w"): new}))
    found = peak(OrderByMemory(preset("H100"))(program))
    lowest = []
    before = next(node for node in program.graph.nodes if node.op == "call_function").prev
    for order in orders(program):
        for node in reversed(order):
            before.append(node)
        lowest.append(peak(program))
    assert found == min(lowest) < max(lowest)


def test_it_comes_right_behind_the_scheduler_where_it_is_asked_for() -> None:
    names = [p.name for p in default_passes(Config(memory_first=True), Mesh(2))]
    assert names[names.index("Overlap") + 1] == "OrderByMemory"
    assert "OrderByMemory" not in [p.name for p in default_passes(Config(), Mesh(2))]
    with pytest.raises(zgraph.OptionError, match="memory_first='yes' is not a bool"):
        Config.from_options({"memory_first": "yes"})


class Features(torch.nn.Module):
    """A linear layer on means of three large tensors, all of which are made first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = [torch.cos(x.repeat(1, 512) * scale) for scale in (1.0, 2.0, 3.0)]
        return self.linear(torch.cat([each.mean(1, keepdim=True) for each in large], 1)).square().mean()


def test_a_budget_that_is_not_met_otherwise_is_met_memory_first() -> None:
    given = {"batch": (torch.empty(64, 64),), "world_size": 1, "hardware": "h100", "recompute": None, "accumulate": 1}
    ample = zgraph.plan(Features, torch.optim.SGD, **given)
    assert not ample.config.memory_first
    tight = zgraph.plan(Features, torch.optim.SGD, memory=ample.chosen.reserved_bytes - 1, **given)
    assert tight.fits
    assert tight.options["memory_first"] is True
    assert tight.chosen.step_s >= ample.chosen.step_s
    refused = zgraph.plan(
        Features, torch.optim.SGD, memory=ample.chosen.reserved_bytes - 1, memory_first=False, **given
    )
    assert not refused.fits
