"""Buckets hold what is updated alike; a flat update does, bit for bit, what the separate ones did."""

from __future__ import annotations

import operator
import sys
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import zgraph
from tests.programs import Builder, assert_same_step, few_examples, param, state, two_layers
from tests.recipes import Recipe, Reshuffle, build, recipes
from zgraph.errors import OptimizerError
from zgraph.layout import Layout
from zgraph.passes import FormBuckets
from zgraph.pipeline import run
from zgraph.program import Guard, Input, Phase, Program, Role, Stage, StateInit

aten = torch.ops.aten


def test_parameters_become_views_of_a_flat_buffer_that_is_updated_as_one() -> None:
    b = Builder()
    w, c = b.input(Role.PARAM, "w", shape=[2, 3]), b.input(Role.PARAM, "c", shape=[3])
    x, lr = b.input(Role.BATCH, "0", shape=[4, 2]), b.input(Role.HYPER, "group0.lr")
    y = b.forward(aten.addmm.default, c, x, w)
    gy = b.backward(aten.ones_like.default, y)
    gc = b.backward(aten.sum.dim_IntList, gy, [0])
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), gy)
    results: dict[Input | None, fx.Node] = {None: b.forward(aten.sum.default, y)}
    for name, p, g in (("w", w, gw), ("c", c, gc)):
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, p, g, alpha=lr, module=name)
    program = FormBuckets(world=2, bucket_bytes=1024)(b.finish(results))
    assert_expected_inline(
        program.text(),
        """\
%0: f64[32] = input param:bucket0
%1: f64[4, 2] = input batch:0
%2: float = input hyper:group0.lr
%3: f64[6] = aten.slice.Tensor(%0, 0, 0, 6)
%4: f64[2, 3] = aten.view.default(%3, [2, 3])
%5: f64[3] = aten.slice.Tensor(%0, 0, 16, 19)
%6: f64[3] = aten.view.default(%5, [3])
%7: f64[4, 3] = aten.addmm.default(%6, %1, %4)
%8: f64[4, 3] = aten.ones_like.default(%7)
%9: f64[3] = aten.sum.dim_IntList(%8, [0])
%10: f64[2, 4] = aten.t.default(%1)
%11: f64[2, 3] = aten.mm.default(%10, %8)
%12: f64[6] = aten.reshape.default(%11, [-1])
%13: f64[10] = aten.full.default([10], 0, device=cpu, dtype=torch.float64)
%14: f64[3] = aten.reshape.default(%9, [-1])
%15: f64[13] = aten.full.default([13], 0, device=cpu, dtype=torch.float64)
%16: f64[32] = aten.cat.default([%12, %13, %14, %15])
%17: f64[32] = aten.add.Tensor(%0, %16, alpha=%2)
%18: f64[] = aten.sum.default(%7)
return [%18, %17]  # loss, param:bucket0""",
    )


@few_examples(15)
@given(recipes(), st.integers(1, 4), st.sampled_from([1, 200, 10**6]))
def test_any_step_in_buckets_is_the_captured_one(recipe: Recipe, world: int, bucket_bytes: int) -> None:
    captured = build(recipe)
    assert_same_step(FormBuckets(world, bucket_bytes)(captured), captured)


@few_examples(15)
@given(recipes(), st.integers(1, 4), st.sampled_from([1, 200, 10**6]))
def test_buckets_hold_every_parameter_and_mix_nothing(recipe: Recipe, world: int, bucket_bytes: int) -> None:
    program = FormBuckets(world, bucket_bytes)(build(recipe))
    assert program.layout is not None
    by_name = {f"p{i}": p for i, p in enumerate(recipe.params)}
    held = [segment.name for bucket in program.layout.buckets for segment in bucket.segments]
    assert sorted(held) == sorted(by_name)
    inputs = {what.name for _, what in program.placeholders() if what.role is Role.PARAM}
    assert inputs == {bucket.name for bucket in program.layout.buckets}
    for bucket in program.layout.buckets:
        members = [by_name[segment.name] for segment in bucket.segments]
        assert bucket.trainable == (members[0].use == "trained")
        assert len({(p.use == "trained", p.low, p.group if p.use == "trained" else None) for p in members}) == 1


def step_of(
    num_params: int = 2, shapes: list[list[int]] | None = None
) -> tuple[Builder, list[fx.Node], list[fx.Node], dict[Input | None, Any]]:
    """A builder with parameters p0, p1, ..., each with a gradient and one learning rate, without updates."""
    b = Builder()
    shapes = shapes or [[3]] * num_params
    params = [b.input(Role.PARAM, f"p{i}", shape=shape) for i, shape in enumerate(shapes)]
    losses = [b.forward(aten.sum.default, p) for p in params]
    gradients = [b.backward(aten.cos.default, p) for p in params]
    return b, params, gradients, {None: losses[0]}


def update(b: Builder, i: int, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return b.call(Phase.UPDATE, target, *args, module=f"p{i}", **kwargs)


def buckets_of(program: Program) -> list[list[str]]:
    layout = FormBuckets(1, 10**6)(program).layout
    assert layout is not None
    return [[segment.name for segment in bucket.segments] for bucket in layout.buckets]


def test_parameters_share_a_bucket_only_if_their_updates_are_the_same() -> None:
    b, params, gradients, results = step_of(7)
    one, other = b.input(Role.HYPER, "group0.lr"), b.input(Role.HYPER, "group1.lr")
    alphas = [one, other, one, 2.0, 2, one]
    for i, alpha in enumerate(alphas):
        results[param(f"p{i}")] = update(b, i, aten.add.Tensor, params[i], gradients[i], alpha=alpha)
    swapped = update(b, 6, aten.add.Tensor, gradients[6], params[6], alpha=one)
    results[param("p6")] = swapped
    assert buckets_of(b.finish(results)) == [["p0", "p2", "p5"], ["p1"], ["p3"], ["p4"], ["p6"]]


def with_state(numbers: list[int] | None = None, fills: list[float] | None = None) -> Program:
    b, params, gradients, results = step_of(2)
    for i in range(2):
        m = b.input(Role.OPT_STATE, f"p{i}", "m", shape=[3])
        results[state(f"p{i}", "m")] = update(b, i, aten.add.Tensor, m, gradients[i])
        results[param(f"p{i}")] = update(b, i, aten.add.Tensor, params[i], m)
        if numbers is not None:
            count = b.input(Role.OPT_STATE, f"p{i}", "count")
            results[state(f"p{i}", "count")] = update(b, i, operator.add, count, 1)
    program = b.finish(results)
    for i in range(2):
        if numbers is not None:
            program.given[f"p{i}"] = (("count", "None", numbers[i]),)
        if fills is not None:
            program.init[state(f"p{i}", "m")] = StateInit(fills[i], torch.float64)
    return program


def test_parameters_share_a_bucket_only_if_their_counts_and_initial_state_are_equal() -> None:
    assert buckets_of(with_state(numbers=[3, 3], fills=[0.1, 0.1])) == [["p0", "p1"]]
    assert buckets_of(with_state(numbers=[3, 4])) == [["p0"], ["p1"]]
    assert buckets_of(with_state(fills=[0.1, 0.2])) == [["p0"], ["p1"]]


def test_initial_values_and_conditions_follow_the_state_into_its_bucket() -> None:
    program = with_state(numbers=[3, 3], fills=[0.1, 0.1])
    program.guards = (
        Guard((state("p0", "count"), Input(Role.HYPER, "group0.lr")), operator.lt, "x0 < x1"),
        Guard((state("p1", "count"), Input(Role.HYPER, "group0.lr")), operator.lt, "x0 < x1"),
        Guard((state("p1", "count"),), bool, "Ne(x0, 0)"),
    )
    bucketed = FormBuckets(1, 10**6)(program)
    assert bucketed.init == {state("bucket0", "m"): StateInit(0.1, torch.float64)}
    assert [guard.inputs for guard in bucketed.guards] == [
        (state("bucket0", "count"), Input(Role.HYPER, "group0.lr")),
        (state("bucket0", "count"),),
    ]


def test_state_that_another_name_or_the_gradient_holds_gets_memory_of_its_own() -> None:
    b, params, gradients, results = step_of(1)
    last = b.input(Role.OPT_STATE, "p0", "last", shape=[3])
    new = update(b, 0, aten.add.Tensor, params[0], gradients[0])
    results.update({param("p0"): new, state("p0", "last"): gradients[0], state("p0", "older"): last})
    results[state("p0", "same")] = new
    program = FormBuckets(1, 1)(b.finish(results))
    made = program.results()[1:]
    assert len(set(made)) == 4
    assert [node.target for node in made] == [aten.add.Tensor, *[aten.clone.default] * 3]


def test_state_per_element_of_a_0_dim_parameter_is_flat_where_other_parameters_show_that_it_is() -> None:
    b, params, gradients, results = step_of(shapes=[[], [], [3]])
    for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
        anchor = b.input(Role.OPT_STATE, f"p{i}", "anchor", shape=p.meta["val"].shape)
        count = b.input(Role.OPT_STATE, f"p{i}", "count", shape=[])
        results[param(f"p{i}")] = update(b, i, aten.addcmul.default, p, g, anchor)
        results[state(f"p{i}", "anchor")] = anchor
        results[state(f"p{i}", "count")] = update(b, i, aten.add.Tensor, count, 1)
    captured = b.finish(results)
    program = FormBuckets(1, 10**6)(captured)
    shapes = {what.key: list(n.meta["val"].shape) for n, what in program.placeholders() if what.role is Role.OPT_STATE}
    assert shapes == {"anchor": [48], "count": []}
    assert_same_step(program, captured)


@pytest.mark.parametrize("what", ["parameter", "gradient", "state", "result"])
def test_an_update_that_reads_another_parameters_values_is_refused(what: str) -> None:
    b, params, gradients, results = step_of()
    others = {"parameter": params[0], "gradient": gradients[0], "state": b.input(Role.OPT_STATE, "p0", "m", shape=[3])}
    others["result"] = results[param("p0")] = update(b, 0, aten.add.Tensor, params[0], gradients[0])
    if what == "state":
        results[state("p0", "m")] = update(b, 0, aten.add.Tensor, others["state"], gradients[0])
    change = update(b, 1, aten.add.Tensor, gradients[1], others[what])
    results[param("p1")] = update(b, 1, aten.add.Tensor, params[1], change)
    with pytest.raises(OptimizerError, match="update of p1 reads another parameter's"):
        FormBuckets(1, 1)(b.finish(results))


def test_an_update_without_its_gradient_is_refused() -> None:
    b, params, _, results = step_of()
    results[param("p0")] = update(b, 0, aten.add.Tensor, params[0], params[0])
    with pytest.raises(OptimizerError, match="update of p0 does not read its gradient"):
        FormBuckets(1, 1)(b.finish(results))


def test_two_parameters_may_have_one_gradient() -> None:
    b, params, gradients, results = step_of()
    for i in range(2):
        results[param(f"p{i}")] = update(b, i, aten.add.Tensor, params[i], gradients[0])
    assert buckets_of(b.finish(results)) == [["p0", "p1"]]


def test_existing_buckets_are_kept_if_the_update_allows_it() -> None:
    first = FormBuckets(2, 1)(with_state()).layout
    assert first is not None
    assert len(first.buckets) == 2
    again = FormBuckets(2, 10**6, layout=first)(with_state()).layout
    assert again is not None
    assert again.buckets == first.buckets
    joined = FormBuckets(2, 10**6)(with_state()).layout
    assert joined is not None
    assert len(joined.buckets) == 1
    split = FormBuckets(2, 10**6, layout=joined)(with_state(numbers=[3, 4])).layout
    assert split is not None
    assert len(split.buckets) == 2, "counts that differ cannot share a bucket"


def test_existing_buckets_of_another_model_are_not_kept() -> None:
    other = FormBuckets(2, 10**6)(two_layers()).layout
    assert other is not None
    layout = FormBuckets(2, 10**6, layout=other)(with_state()).layout
    assert layout == FormBuckets(2, 10**6)(with_state()).layout
    first = layout.buckets[0]
    for bad in (
        replace(first, trainable=False),
        replace(first, segments=(replace(first.segments[0], shape=(1, 3)), *first.segments[1:])),
    ):
        found = FormBuckets(2, 10**6, layout=Layout((bad, *layout.buckets[1:]), 2))(with_state()).layout
        assert found == layout


@few_examples(15)
@given(recipes(), st.integers(0, 99))
def test_any_order_will_do_to_start_from(recipe: Recipe, seed: int) -> None:
    captured = build(recipe)
    passes = [Reshuffle(Stage.CAPTURED, Stage.CAPTURED, seed), FormBuckets(2, 200)]
    assert_same_step(run(passes, captured).program, captured)


def test_arithmetic_on_hyperparameters_may_come_first() -> None:
    b = Builder()
    w, lr = b.input(Role.PARAM, "w", shape=[2]), b.input(Role.HYPER, "lr")
    size = b.call(Phase.UPDATE, operator.mul, b.call(Phase.UPDATE, operator.neg, lr), lr)
    loss, g = b.forward(aten.sum.default, w), b.backward(aten.sin.default, w)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, g, alpha=size, module="w")
    captured = b.finish({None: loss, param("w"): new})
    assert_same_step(FormBuckets(2, 1)(captured), captured)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_a_0_dim_parameter_copies_into_a_new_number_is_copied_into_a_vector(dtype: torch.dtype) -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", shape=[], dtype=dtype)
    room = b.call(Phase.UPDATE, aten.zeros.default, [], dtype=torch.float32, module="w")
    old = b.call(Phase.UPDATE, aten.copy.default, room, w, module="w")
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, b.backward(aten.sin.default, w), module="w")
    captured = b.finish({None: b.forward(aten.cos.default, w), param("w"): new, state("w", "old"): old})
    assert_same_step(FormBuckets(2, 1)(captured), captured)


def instructions_run(num_params: int) -> int:
    """Instructions of this pass's own file that run for as many buckets as parameters."""
    b = Builder()
    results: dict[Input | None, Any] = {}
    for i in range(num_params):
        w, m = b.input(Role.PARAM, f"w{i}", shape=[2]), b.input(Role.OPT_STATE, f"w{i}", "m", shape=[2])
        moment = b.call(Phase.UPDATE, aten.add.Tensor, m, b.call(Phase.BACKWARD, aten.mul.Tensor, w, 2), module=f"w{i}")
        results[Input(Role.OPT_STATE, f"w{i}", "m")] = moment
        results[param(f"w{i}")] = b.call(Phase.UPDATE, aten.sub.Tensor, w, moment, module=f"w{i}")
    program = b.finish({None: b.forward(aten.sum.default, w), **results})
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        frame.f_trace_opcodes = True
        return trace if frame.f_code.co_filename == sys.modules[FormBuckets.__module__].__file__ else None

    sys.settrace(trace)
    try:
        FormBuckets(1, 1).rewrite(program)
    finally:
        sys.settrace(None)
    return count


def test_work_is_proportional_to_the_number_of_buckets() -> None:
    few, many = instructions_run(10), instructions_run(40)
    assert many < 4.1 * few


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).sum()


def test_a_single_number_that_computes_in_another_dtype_than_a_vector_would_is_refused() -> None:
    """RAdam's step count, in float64, makes it compute in float64."""
    model = Scaled()
    ranks = zgraph.simulate_ranks(model, torch.optim.RAdam(model.parameters()), world_size=1)
    with pytest.raises(OptimizerError, match=r"the update of scale, a single number, computes .* in torch\.float64"):
        ranks.train_step([(torch.ones(2),)])
