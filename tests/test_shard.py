"""Each ZeRO stage takes one more kind of state apart, and N ranks together still compute the step of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, assert_same_step, few_examples, one_layer, param, two_layers
from tests.recipes import Recipe, Reshuffle, build, recipes
from zgraph import ops
from zgraph.passes import (
    AverageGradients,
    FormBuckets,
    ReadParamsEarly,
    ShardGradients,
    ShardOptimizer,
    ShardParams,
)
from zgraph.pipeline import Pass, run
from zgraph.program import FlatGradient, Input, Mesh, Phase, Program, Role, operand, target_name

aten = torch.ops.aten

TWO = Mesh(2)


def zero_steps(mesh: Mesh) -> list[list[Pass]]:
    """The passes that each stage adds to the one before."""
    return [
        [AverageGradients(mesh)],
        [ShardOptimizer(mesh)],
        [ShardGradients(mesh)],
        [ReadParamsEarly(), ShardParams(mesh)],
    ]


def sharded(program: Program, zero: int, mesh: Mesh = TWO, bucket_bytes: int = 1) -> Program:
    program = FormBuckets(mesh.shard_size, bucket_bytes)(program)
    for step in zero_steps(mesh)[: zero + 1]:
        for p in step:
            program = p(program)
    return program


def written(program: Program) -> str:
    """What is returned, as expressions over inputs (by key or name), local gradients and the local loss."""
    names = {node: what.key or what.name for node, what in program.placeholders()}

    def show(arg: Any) -> str:
        if not isinstance(arg, fx.Node):
            return repr(arg)
        moves = arg.target in ops.STARTS or arg.target in (ops.wait, ops.shard)
        if arg not in names and not moves and arg.meta["origin"].phase is not Phase.UPDATE:
            return "g" if isinstance(arg.meta.get("holds"), FlatGradient) else "local_loss"
        if arg in names:
            return names[arg]
        args = [show(a) for a in (arg.args[:1] if moves else arg.args)]
        args += [f"{key}={show(value)}" for key, value in arg.kwargs.items()]
        name = target_name(arg.target).split(".")[1].removesuffix("_tensor").removesuffix("_into")
        return f"{name}({', '.join(args)})"

    results = zip(program.outputs, program.results(), strict=True)
    return "\n".join(f"{what or 'loss'} = {show(result)}" for what, result in results)


def test_stage_0_averages_gradients_and_the_loss() -> None:
    assert_expected_inline(
        written(sharded(one_layer(), 0)),
        """\
loss = wait(all_reduce(local_loss))
param:bucket0 = add(bucket0, add(m, wait(all_reduce(g))), alpha=neg(lr))
opt_state:bucket0:m = add(m, wait(all_reduce(g)))""",
    )


def test_stage_1_updates_a_slice_and_shares_it() -> None:
    assert_expected_inline(
        written(sharded(one_layer(), 1)),
        """\
loss = wait(all_reduce(local_loss))
param:bucket0 = wait(all_gather(add(shard(bucket0), add(m, shard(wait(all_reduce(g)))), alpha=neg(lr))))
opt_state:bucket0:m = add(m, shard(wait(all_reduce(g))))""",
    )


def test_stage_2_receives_only_a_slice_of_the_mean_gradient() -> None:
    assert_expected_inline(
        written(sharded(one_layer(), 2)),
        """\
loss = wait(all_reduce(local_loss))
param:bucket0 = wait(all_gather(add(shard(bucket0), add(m, wait(reduce_scatter(g))), alpha=neg(lr))))
opt_state:bucket0:m = add(m, wait(reduce_scatter(g)))""",
    )


def test_stage_3_keeps_only_a_slice_of_the_parameters() -> None:
    assert_expected_inline(
        written(sharded(one_layer(), 3)),
        """\
loss = wait(all_reduce(local_loss))
param:bucket0 = add(bucket0, add(m, wait(reduce_scatter(g))), alpha=neg(lr))
opt_state:bucket0:m = add(m, wait(reduce_scatter(g)))""",
    )


TWO_NODES = Mesh(4, shard=2)


def test_in_nodes_a_slice_is_averaged_inside_of_them_and_then_between_them() -> None:
    assert_expected_inline(
        written(sharded(one_layer(), 3, TWO_NODES)),
        """\
loss = wait(all_reduce(local_loss))
param:bucket0 = add(bucket0, add(m, wait(all_reduce(wait(reduce_scatter(g))))), alpha=neg(lr))
opt_state:bucket0:m = add(m, wait(all_reduce(wait(reduce_scatter(g)))))""",
    )


def test_in_nodes_collectives_say_along_which_axis_they_are_and_among_how_many() -> None:
    program = sharded(one_layer(), 3, TWO_NODES)
    starts = [node for node in program.graph.nodes if node.target in ops.STARTS]
    assert_expected_inline(
        "\n".join(f"{target_name(node.target).split('.')[1]}{list(node.args[1:])}" for node in starts),
        """\
all_gather_into_tensor[2, 'shard']
reduce_scatter_tensor['avg', 2, 'shard']
all_reduce['avg', 'replica']
all_reduce['avg', 'data']""",
    )


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_nodes_of_one_rank_divide_nothing(zero: int) -> None:
    alone, whole = sharded(one_layer(), zero, Mesh(3, shard=1)), sharded(one_layer(), 0, Mesh(3))
    assert written(alone) == written(whole)


@few_examples(20)
@given(recipes(), st.integers(1, 3), st.sampled_from([(4, 2), (6, 2), (6, 3), (3, 1)]), st.sampled_from([1, 10**6]))
def test_the_nodes_of_any_step_compute_the_step_with_mean_gradients(
    recipe: Recipe, zero: int, ranks: tuple[int, int], bucket_bytes: int
) -> None:
    captured, mesh = build(recipe), Mesh(ranks[0], shard=ranks[1])
    program = sharded(captured, zero, mesh, bucket_bytes)
    assert_same_step(program, captured)
    assert program.layout is not None
    for node, what in program.placeholders():
        val = node.meta["val"]
        if what.role in (Role.PARAM, Role.OPT_STATE) and val.dim():
            is_divided = zero >= (3 if what.role is Role.PARAM else 1)
            whole = program.layout.bucket(what.name, what.key).numel
            assert val.numel() * (mesh.shard_size if is_divided else 1) == whole


def test_stage_3_gathers_parameters_before_forward_and_backward_read_them() -> None:
    text = sharded(two_layers(), 3).text().replace("_c10d_functional.", "").replace("_tensor.default", "")
    assert_expected_inline(
        text,
        """\
%0: f64[16] = input param:bucket0
%1: f64[16] = input opt_state:bucket0:m
%2: f64[16] = input param:bucket1
%3: f64[16] = input opt_state:bucket1:m
%4: f64[4, 2] = input batch:0
%5: float = input hyper:group_of_w1.lr
%6: float = input hyper:group_of_w2.lr
%7: float = operator.neg(%5)
%8: float = operator.neg(%6)
%9: f64[32] = all_gather_into(%0, 2, 'data')
%10: f64[32] = wait(%9)
%11: f64[6] = aten.slice.Tensor(%10, 0, 0, 6)
%12: f64[2, 3] = aten.view.default(%11, [2, 3])
%13: f64[4, 3] = aten.mm.default(%4, %12)
%14: f64[32] = all_gather_into(%2, 2, 'data')
%15: f64[32] = wait(%14)
%16: f64[3] = aten.slice.Tensor(%15, 0, 0, 3)
%17: f64[3, 1] = aten.view.default(%16, [3, 1])
%18: f64[4, 1] = aten.mm.default(%13, %17)
%19: f64[] = aten.sum.default(%18)
%20: f64[4, 1] = aten.ones_like.default(%18)
%21: f64[32] = all_gather_into(%2, 2, 'data')
%22: f64[32] = wait(%21)
%23: f64[3] = aten.slice.Tensor(%22, 0, 0, 3)
%24: f64[3, 1] = aten.view.default(%23, [3, 1])
%25: f64[1, 3] = aten.t.default(%24)
%26: f64[4, 3] = aten.mm.default(%20, %25)
%27: f64[3, 4] = aten.t.default(%13)
%28: f64[3, 1] = aten.mm.default(%27, %20)
%29: f64[3] = aten.reshape.default(%28, [-1])
%30: f64[29] = aten.full.default([29], 0, device=cpu, dtype=torch.float64)
%31: f64[32] = aten.cat.default([%29, %30])
%32: f64[16] = reduce_scatter(%31, 'avg', 2, 'data')
%33: f64[16] = wait(%32)
%34: f64[16] = aten.add.Tensor(%3, %33)
%35: f64[16] = aten.add.Tensor(%2, %34, alpha=%8)
%36: f64[2, 4] = aten.t.default(%4)
%37: f64[2, 3] = aten.mm.default(%36, %26)
%38: f64[6] = aten.reshape.default(%37, [-1])
%39: f64[26] = aten.full.default([26], 0, device=cpu, dtype=torch.float64)
%40: f64[32] = aten.cat.default([%38, %39])
%41: f64[16] = reduce_scatter(%40, 'avg', 2, 'data')
%42: f64[16] = wait(%41)
%43: f64[16] = aten.add.Tensor(%1, %42)
%44: f64[16] = aten.add.Tensor(%0, %43, alpha=%7)
%45: f64[] = all_reduce.default(%19, 'avg', 'data')
%46: f64[] = wait(%45)
return [%46, %44, %43, %35, %34]  # loss, param:bucket0, opt_state:bucket0:m, param:bucket1, opt_state:bucket1:m""",
    )


def remembers_casts() -> Program:
    """Two buffers become casts of w, one made in forward, where w is read later, and one in backward."""
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[4, 4]), b.input(Role.BATCH, "0", shape=[4, 4])
    for name in ("early", "late"):
        b.input(Role.BUFFER, name, shape=[4, 4], dtype=torch.float32)
    early = b.forward(aten.t.default, b.forward(aten._to_copy.default, w, dtype=torch.float32))
    y = b.forward(aten.mm.default, x, w)
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), y)
    late = b.backward(aten._to_copy.default, b.backward(aten.t.default, w), dtype=torch.float32)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, gw, module="w")
    buffers = {Input(Role.BUFFER, "early"): early, Input(Role.BUFFER, "late"): late}
    return b.finish({None: b.forward(aten.sum.default, y), **buffers, param("w"): new})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_results_that_are_casts_of_a_parameter_are_made_of_all_of_it(zero: int) -> None:
    captured = remembers_casts()
    assert_same_step(sharded(captured, zero), captured)


def reads_of_norm() -> Program:
    """Backward divides w by a norm that forward has computed, long before it reads w together with a gradient."""
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[4, 4]), b.input(Role.BATCH, "0", shape=[4, 4])
    norm = b.forward(aten.linalg_vector_norm.default, w)
    y = b.forward(aten.mm.default, x, w)
    gy = b.backward(aten.cos.default, y)
    gw = b.backward(aten.mul.Tensor, x, gy)
    gx = b.backward(aten.mm.default, gy, b.backward(aten.t.default, w))
    gw = b.backward(aten.add.Tensor, gw, b.backward(aten.div.Tensor, w, norm))
    gw = b.backward(aten.add.Tensor, gw, gx)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, gw, module="w")
    return b.finish({None: norm, param("w"): new})


def test_backward_reads_parameters_as_soon_as_it_can_but_never_in_forward() -> None:
    program = FormBuckets(1, 1)(reads_of_norm())
    before = backward_targets(program)
    after = backward_targets(ReadParamsEarly()(AverageGradients(Mesh(1))(program)))
    assert before == ["cos", "mul", "t", "mm", "div", "add", "add", "reshape"]
    assert after == ["cos", "t", "mm", "mul", "div", "add", "add", "reshape"]


def test_a_read_moves_up_behind_what_it_needs_of_forward_too() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[2]), b.input(Role.BATCH, "0", shape=[2])
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, w, x))
    gy = b.backward(aten.neg.default, x)
    h = b.forward(aten.cos.default, x)
    g = b.backward(aten.addcmul.default, gy, w, h)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, g, module="w")
    captured = b.finish({None: loss, param("w"): new})
    assert_same_step(sharded(captured, 3), captured)


@few_examples(20)
@given(recipes(), st.integers(0, 3), st.integers(1, 3), st.integers(0, 99))
def test_any_order_will_do_to_start_from(recipe: Recipe, zero: int, world: int, seed: int) -> None:
    captured = build(recipe)
    passes: list[Pass] = [FormBuckets(world, 200)]
    for i, p in enumerate(p for step in zero_steps(Mesh(world))[: zero + 1] for p in step):
        passes += [Reshuffle(p.takes, p.takes, seed + i), p]
    assert_same_step(run(passes, captured).program, captured)


def backward_targets(program: Program) -> list[str]:
    first = next(n for n in program.graph.nodes if n.target is aten.cos.default)
    names, node = [], first
    while node.op != "output":
        if node.meta["origin"].phase is Phase.BACKWARD:
            names.append(node.target.__name__.partition(".")[0])
        node = node.next
    return names


def deep() -> st.SearchStrategy[tuple[Recipe, int, int, int]]:
    """A step, a stage, a number of ranks and a bucket size."""
    return st.tuples(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200, 10**6]))


@few_examples(20)
@given(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200, 10**6]))
def test_the_ranks_of_any_step_compute_the_step_with_mean_gradients(
    recipe: Recipe, zero: int, world: int, bucket_bytes: int
) -> None:
    captured = build(recipe)
    assert_same_step(sharded(captured, zero, Mesh(world), bucket_bytes), captured)


@few_examples(20)
@given(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200, 10**6]))
def test_each_stage_stores_and_moves_no_more_than_it_must(
    recipe: Recipe, zero: int, world: int, bucket_bytes: int
) -> None:
    program = sharded(build(recipe), zero, Mesh(world), bucket_bytes)
    assert program.layout is not None
    assert (program.layout.shard_state, program.layout.shard_params) == (zero >= 1, zero == 3)
    for node, what in program.placeholders():
        val = node.meta["val"]
        if what.role in (Role.PARAM, Role.OPT_STATE) and val.dim():
            whole = program.layout.bucket(what.name, what.key).numel
            assert val.numel() * (world if zero >= (3 if what.role is Role.PARAM else 1) else 1) == whole
    starts = [node for node in program.graph.nodes if node.target in ops.STARTS]
    num_trained = sum(bucket.trainable for bucket in program.layout.buckets)
    if world == 1:
        assert not starts
        return
    num_scattered = sum(node.target is ops.reduce_scatter for node in starts)
    num_reduced = sum(node.target is ops.all_reduce for node in starts)
    assert (num_scattered, num_reduced) == ((0, num_trained + 1) if zero < 2 else (num_trained, 1))
    gathers = [(operand(node), node.meta["origin"].phase) for node in starts if node.target is ops.all_gather]
    assert len(set(gathers)) == len(gathers), "a bucket is gathered at most once in each phase"
    num_updated = sum(phase is Phase.UPDATE for _, phase in gathers)
    assert num_updated == (num_trained if zero in (1, 2) else 0)
    assert zero == 3 or len(gathers) == num_updated
