"""What calls cost: operations as torch counts them, bytes worked out by hand, and formulas that agree with numbers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from tests.calibrations import made_up
from tests.models import CASES
from tests.programs import Builder, few_examples, one_layer, rewritten, two_layers
from zgraph import ops
from zgraph.capture import capture
from zgraph.codegen.kernel import Kernel
from zgraph.codegen.owned import OwnedUpdate, Part, Place
from zgraph.config import Config
from zgraph.cost import Cost, Costs, ranks_together, seconds
from zgraph.into import into
from zgraph.lower import lower
from zgraph.machines import preset
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.predict import predict
from zgraph.program import REPLICA, SECONDARY, SHARD, Mesh, Program, Role
from zgraph.work import ATTENTION, LINK, LOOKUP, MATRIX, NOTHING, Work, num_bytes_of, works

aten = torch.ops.aten
H100 = replace(preset("H100"), in_step={})
F32, F64, BF16, I64 = torch.float32, torch.float64, torch.bfloat16, torch.int64


class Calls(Builder):
    """Makes calls on inputs that are made as they are needed."""

    def tensor(self, *shape: int, dtype: torch.dtype = F32) -> fx.Node:
        return self.input(Role.BATCH, str(len(self.program.graph.nodes)), shape=shape, dtype=dtype)


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in which every ``Tensor`` is an input."""
    b = Calls()

    def made(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return b.tensor(*arg.shape, dtype=arg.dtype)
        return [made(each) for each in arg] if isinstance(arg, list) else arg

    return b.forward(target, *map(made, args), **{name: made(arg) for name, arg in kwargs.items()})


class Tensor:
    """A tensor to be made an argument."""

    def __init__(self, *shape: int, dtype: torch.dtype = F32) -> None:
        self.shape, self.dtype = shape, dtype


T = Tensor


def works_of(node: fx.Node) -> tuple[Work, ...]:
    return works(node, 1)


def cost_of(node: fx.Node) -> Cost:
    return Cost(0, works_of(node))


def read_and_written(target: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    found = works_of(call(target, *args, **kwargs))
    assert all(work.is_known for work in found)
    return sum(work.read_bytes for work in found), sum(work.written_bytes for work in found)


def counted(node: fx.Node) -> int:
    """Operations of a call by torch's own counter."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    mode = next(n for n in node.all_input_nodes).meta["val"].fake_mode
    with FlopCounterMode(display=False) as counter, mode:
        node.target(*args, **kwargs)  # type: ignore[operator]
    total: int = counter.get_total_flops()
    return total


# Operations


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.mm.default, [T(3, 5), T(5, 7)]),
        (aten.addmm.default, [T(7), T(3, 5), T(5, 7)]),
        (aten.bmm.default, [T(2, 3, 5), T(2, 5, 7)]),
        (aten.baddbmm.default, [T(2, 3, 7), T(2, 3, 5), T(2, 5, 7)]),
        (aten.mm.default, [T(3, 0), T(0, 7)]),
        (aten.mm.default, [T(3, 5, dtype=BF16), T(5, 7, dtype=BF16)]),
    ],
)
def test_products_do_what_torch_counts(target: Any, arguments: list[Any]) -> None:
    node = call(target, *arguments)
    (work,) = works_of(node)
    assert work.unit == MATRIX
    assert work.flops == counted(node)
    assert work.written_bytes == node.meta["val"].nbytes
    assert work.read_bytes == sum(source.meta["val"].nbytes for source in node.all_input_nodes)


@pytest.mark.parametrize(
    ("target", "arguments", "flops"),
    [
        (aten.mv.default, [T(3, 5), T(5)], 2 * 15),
        (aten.addmv.default, [T(3), T(3, 5), T(5)], 2 * 15),
        (aten.dot.default, [T(5), T(5)], 2 * 5),
        (aten.addbmm.default, [T(3, 7), T(2, 3, 5), T(2, 5, 7)], 2 * 2 * 3 * 5 * 7),
        (aten.mm.default, [T(3, 5, dtype=torch.complex64), T(5, 7, dtype=torch.complex64)], 4 * 2 * 3 * 5 * 7),
    ],
)
def test_products_that_torch_does_not_count_do_two_operations_a_pair(
    target: Any, arguments: list[Any], flops: int
) -> None:
    assert cost_of(call(target, *arguments)).flops == flops


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float16, F64])
def test_a_machine_takes_some_time_for_every_dtype(dtype: torch.dtype) -> None:
    b = Calls()
    x, y = b.tensor(4, 4, dtype=dtype), b.tensor(4, 4, dtype=dtype)
    costs = Costs(b.program, H100)
    targets = [aten.eq.Tensor, *([aten.mm.default, aten.add.Tensor, aten.mul.Tensor] if dtype != torch.bool else [])]
    for target in targets:
        assert costs.of(b.forward(target, x, y)).seconds > 0


def convolution(transposed: bool, groups: int, stride: int, dims: int = 2) -> tuple[fx.Node, fx.Node]:
    """A convolution and its backward."""
    b = Calls()
    channels, out = 4 * groups, 6 * groups
    x = b.tensor(3, channels, *[8] * dims)
    shape = (channels, out // groups) if transposed else (out, channels // groups)
    weight, bias = b.tensor(*shape, *[3] * dims), b.tensor(out)
    options = ([stride] * dims, [1] * dims, [1] * dims, transposed, [0] * dims, groups)
    forward = b.forward(aten.convolution.default, x, weight, bias, *options)
    grad = b.tensor(*forward.meta["val"].shape)
    backward = b.backward(aten.convolution_backward.default, grad, x, weight, [out], *options, [True, True, True])
    return forward, backward


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_do_what_torch_counts(transposed: bool, stride: int, dims: int) -> None:
    forward, backward = convolution(transposed, 1, stride, dims)
    assert sum(work.flops for work in works_of(forward)) == counted(forward)
    products = [work for work in works_of(backward) if work.unit == MATRIX]
    assert sum(work.flops for work in products) == counted(backward) == 2 * counted(forward)
    assert all(isinstance(work.flops, int) for work in products)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_in_groups_do_the_less_the_more_groups_there_are(transposed: bool) -> None:
    """Torch divides by the number of groups forward and, of the gradient of the weight, forgets to."""
    forward, backward = convolution(transposed, 2, 1)
    assert cost_of(forward).flops == counted(forward)
    products = [work for work in works_of(backward) if work.unit == MATRIX]
    assert [work.flops for work in products] == [counted(forward)] * 2


def test_a_convolution_backward_reads_for_each_gradient_what_it_needs() -> None:
    forward, backward = convolution(False, 1, 1)
    x, weight, _ = (source.meta["val"].nbytes for source in forward.all_input_nodes)
    out = forward.meta["val"].nbytes
    assert [(work.read_bytes, work.written_bytes) for work in works_of(backward)] == [
        (out + weight, x),
        (out + x, weight),
        (out, 6 * 4),
    ]
    backward.update_arg(10, [False, True, False])
    assert [work.written_bytes for work in works_of(backward)] == [weight]


HEADS = (2, 3)


def attention(variant: str, queries: int, keys: int, width: int, of_values: int, causal: bool) -> fx.Node:
    b = Calls()
    dtype = F32 if "cpu" in variant else BF16
    query, key = b.tensor(*HEADS, queries, width, dtype=dtype), b.tensor(*HEADS, keys, width, dtype=dtype)
    value = b.tensor(*HEADS, keys, of_values, dtype=dtype)
    target = getattr(aten, f"_scaled_dot_product_{variant}").default
    named = {"is_causal": causal}
    if variant == "efficient_attention":
        return b.forward(target, query, key, value, None, True, 0.0, **named)
    if variant == "cudnn_attention":
        return b.forward(target, query, key, value, None, True, 0.0, causal)
    return b.forward(target, query, key, value, 0.0, causal)


def attention_backward(variant: str, queries: int, keys: int, width: int, of_values: int, causal: bool) -> fx.Node:
    b = Calls()
    dtype = F32 if "cpu" in variant else BF16
    query, key = b.tensor(*HEADS, queries, width, dtype=dtype), b.tensor(*HEADS, keys, width, dtype=dtype)
    value = b.tensor(*HEADS, keys, of_values, dtype=dtype)
    out, log = b.tensor(*HEADS, queries, of_values, dtype=dtype), b.tensor(*HEADS, queries)
    seed = b.tensor(dtype=I64)
    target = getattr(aten, f"_scaled_dot_product_{variant}_backward").default
    given = {"grad_out": out, "grad_out_": out, "query": query, "key": key, "value": value, "out": out}
    given |= {"logsumexp": log, "philox_seed": seed, "philox_offset": seed, "dropout_p": 0.0, "is_causal": causal}
    given |= {"max_q": queries, "max_k": keys, "attn_bias": None, "grad_input_mask": [True, True, True, False]}
    names = [argument.name for argument in target._schema.arguments if not argument.kwarg_only]
    made = b.program.graph.call_function(target, tuple(given.get(name) for name in names))
    made.meta["val"] = tuple(node.meta["val"] for node in (query, key, value))
    return made


VARIANTS = ["flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("queries", "keys", "of_values"), [(16, 16, 8), (16, 32, 8), (16, 16, 24)])
def test_attention_does_what_torch_counts_and_half_of_it_if_causal(
    variant: str, queries: int, keys: int, of_values: int
) -> None:
    expected = 2 * 6 * queries * keys * (8 + of_values)
    backward = 2 * 6 * queries * keys * (3 * 8 + 2 * of_values)
    for make, wanted in ((attention, expected), (attention_backward, backward)):
        if make is attention and variant.startswith("flash") and of_values != 8:
            continue  # these refuse it
        (work,) = works_of(make(variant, queries, keys, 8, of_values, False))
        (half,) = works_of(make(variant, queries, keys, 8, of_values, True))
        assert work.unit == ATTENTION
        assert (work.flops, half.flops) == (wanted, wanted // 2)
        assert work.read_bytes == half.read_bytes
        if "cpu" not in variant and not (make is attention and variant == "flash_attention" and of_values != 8):
            from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

            assert getattr(aten, f"_scaled_dot_product_{variant}") in flop_registry
            shapes = ((*HEADS, queries, 8), (*HEADS, keys, 8), (*HEADS, keys, of_values))
            of_torch = sdpa_flop_count(*shapes)
            if make is attention_backward:
                of_torch = sdpa_backward_flop_count((*HEADS, queries, of_values), *shapes)
            assert work.flops == of_torch


# Bytes


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        (aten.add.Tensor, [T(3, 5), T(3, 5)], (2 * 60, 60)),
        (aten.add.Tensor, [T(3, 5), 1.5], (60, 60)),
        (aten.add.Tensor, [T(3, 5), T(5)], (60 + 20, 60)),
        (aten.gt.Scalar, [T(3, 5), 0], (60, 15)),
        (aten.bitwise_and.Tensor, [T(9, dtype=torch.bool), T(9, dtype=torch.bool)], (18, 9)),
        (aten.mul.Tensor, [T(3, dtype=torch.complex64), T(3, dtype=torch.complex64)], (48, 24)),
        (aten.exp.default, [T(0, 5)], (0, 0)),
        (aten._to_copy.default, [T(3, 5)], (60, 60)),
        (aten.clone.default, [T(3, 5)], (60, 60)),
        (aten.cat.default, [[T(2, 5), T(1, 5), T(0, 5)]], (60, 60)),
        (aten.stack.default, [[T(5), T(5), T(5)]], (60, 60)),
        (aten.copy.default, [T(3, 5), T(5)], (20, 60)),
        (aten.constant_pad_nd.default, [T(5), [0, 5]], (20, 40)),
        (aten.repeat.default, [T(5), [3, 1]], (20, 60)),
        (aten.as_strided_copy.default, [T(100), [5], [1]], (20, 20)),
        (aten.as_strided_copy.default, [T(5), [20], [0]], (20, 80)),
        (aten.zeros_like.default, [T(3, 5)], (0, 60)),
        (aten.full.default, [[3, 5], 1.0], (0, 60)),
        (aten.fill.Scalar, [T(3, 5), 1.0], (0, 60)),
        (aten.fill.Tensor, [T(3, 5), T()], (4, 60)),
        (aten.arange.start, [0, 10], (0, 80)),
        (aten.tril_indices.default, [3, 3], (0, 2 * 6 * 8)),
        (aten.sum.default, [T(3, 5)], (60, 4)),
        (aten.sum.dim_IntList, [T(3, 5), [0]], (60, 20)),
        (aten.amax.default, [T(3, 5), [1]], (60, 12)),
        (aten.var_mean.correction, [T(3, 5), [1]], (60, 24)),
        (aten.max.dim, [T(3, 5), 1], (60, 3 * (4 + 8))),
        (aten._softmax.default, [T(3, 5), 1, False], (60, 60)),
        (aten._log_softmax.default, [T(3, 5), 1, False], (60, 60)),
        (aten._softmax_backward_data.default, [T(3, 5), T(3, 5), 1, F32], (120, 60)),
        (aten.nll_loss_forward.default, [T(3, 5), T(3, dtype=I64), None, 1, -100], (3 * 8 + 3 * 4, 4 + 4)),
        (aten.nll_loss_backward.default, [T(), T(3, 5), T(3, dtype=I64), None, 1, -100, T()], (4 + 24, 60)),
        (ops.cross_entropy_backward, [T(), T(3, 5), T(3, dtype=I64), None, 1, -100, T(), 1], (4 + 60 + 24 + 4, 60)),
        # of a product, the columns that are made; where they do not follow each other, they are made elsewhere before
        (ops.product_columns, [T(3, 9), T(3, 5), T(5, 4), 1, 2, 9], (60 + 80, 48)),
        (ops.product_columns, [None, T(3, 5), T(5, 4), 2, 1, 12], (60 + 80 + 48, 48 + 48)),
        (aten.mse_loss.default, [T(3, 5), T(3, 5)], (120, 4)),
        (aten.native_layer_norm.default, [T(3, 5), [5], T(5), T(5), 1e-5], (60 + 40, 60 + 2 * 12)),
        (aten.native_dropout.default, [T(3, 5), 0.5, True], (60, 60 + 15)),
        (aten.rand_like.default, [T(3, 5)], (0, 60)),
        (aten.bernoulli.p, [T(3, 5), 0.5], (0, 60)),
        (aten.bernoulli.default, [T(3, 5)], (60, 60)),
        (aten.topk.default, [T(3, 5), 2], (60, 3 * 2 * (4 + 8))),
        (aten.sort.default, [T(3, 5)], (60, 15 * (4 + 8))),
        # of a table, the rows that are asked for
        (aten.embedding.default, [T(100, 5), T(3, dtype=I64)], (60 + 24, 60)),
        (aten.embedding_dense_backward.default, [T(3, 5), T(3, dtype=I64), 100, -1, False], (60 + 24 + 60, 2000 + 60)),
        (ops.embedding_rows_backward, [T(3, 5), T(3, dtype=I64), 100, 2, 7, 10], (60 + 24 + 60, 400 + 60)),
        (aten.index_select.default, [T(100, 5), 0, T(3, dtype=I64)], (60 + 24, 60)),
        (aten.gather.default, [T(100, 5), 0, T(3, 5, dtype=I64)], (60 + 120, 60)),
        (aten.gather.default, [T(100, 5, dtype=I64), 0, T(3, 5, dtype=I64)], (120 + 120, 120)),
        (aten.index.Tensor, [T(100, 5), [T(3, dtype=I64)]], (60 + 24, 60)),
        (aten.index.Tensor, [T(100, 5), [None, T(3, dtype=I64)]], (1200 + 24, 1200)),
        (aten.index.Tensor, [T(100, 5, dtype=I64), [T(3, dtype=I64), T(3, dtype=I64)]], (24 + 48, 24)),
        # into a copy, what is written over it
        (aten.index_put.default, [T(100, 5), [T(3, dtype=I64)], T(3, 5)], (2000 + 24 + 60, 2000 + 60)),
        (aten.index_put.default, [T(100, 5), [T(3, dtype=I64)], T(3, 5), True], (2000 + 24 + 60 + 60, 2000 + 60)),
        (aten.scatter.src, [T(9, 5), 0, T(3, 5, dtype=I64), T(3, 5)], (180 + 120 + 60, 180 + 60)),
        (aten.scatter.value, [T(9, 5), 0, T(3, 5, dtype=I64), 1.0], (180 + 120, 180 + 60)),
        (aten.scatter_add.default, [T(9, 5), 0, T(3, 5, dtype=I64), T(3, 5)], (180 + 120 + 120, 180 + 60)),
        (aten.index_fill.int_Scalar, [T(9, 5), 0, T(2, dtype=I64), 1.0], (180 + 16, 180 + 40)),
        (aten.slice_scatter.default, [T(9, 5), T(3, 5), 0, 0, 3], (180 + 60, 180 + 60)),
        (aten.select_scatter.default, [T(9, 5), T(5), 0, 1], (180 + 20, 180 + 20)),
        (aten.slice_backward.default, [T(3, 5), [9, 5], 0, 0, 3, 1], (60, 180 + 60)),
        (aten.select_backward.default, [T(5), [9, 5], 0, 1], (20, 180 + 20)),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else None,
)
def test_bytes_are_those_that_an_operator_must_move(
    target: Any, arguments: list[Any], expected: tuple[int, int]
) -> None:
    assert read_and_written(target, *arguments) == expected


def test_bags_read_a_row_for_every_index() -> None:
    indices, offsets = T(12, dtype=I64), T(3, dtype=I64)
    node = call(aten._embedding_bag.default, T(100, 5), indices, offsets)
    (work,) = works_of(node)
    assert work.unit == LOOKUP
    assert work.read_bytes == 12 * 20 + 12 * 8 + 3 * 8
    assert work.flops == 60


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.view.default, [T(4, 3), [12]]),
        (aten.t.default, [T(4, 3)]),
        (aten.expand.default, [T(1, 3), [4, 3]]),
        (aten.slice.Tensor, [T(4, 3), 0, 1, 3]),
        (aten.split.Tensor, [T(4, 3), 2]),
        (aten.detach.default, [T(4, 3)]),
        (aten.reshape.default, [T(4, 3), [12]]),
        (ops.shard, [T(4), 2, "data"]),
    ],
)
def test_views_cost_nothing(target: Any, arguments: list[Any]) -> None:
    node = call(target, *arguments)
    assert [work.unit for work in works_of(node)] == [NOTHING]
    assert cost_of(node).num_calls == 0
    assert cost_of(node).num_bytes == 0


def test_making_contiguous_what_is_not_costs_a_copy() -> None:
    b = Calls()
    turned = b.forward(aten.t.default, b.tensor(4, 3))
    assert cost_of(b.forward(aten.reshape.default, turned, [12])).num_bytes == 2 * 48
    part = b.forward(aten.slice.Tensor, b.tensor(4, 3), 1, 0, 2)
    assert cost_of(b.forward(aten.reshape.default, part, [2, 2, 2])).num_bytes == 0
    x = b.tensor(2, 3, 4, 4)
    last = {"memory_format": torch.channels_last}
    assert cost_of(b.forward(aten.contiguous.default, x, **last)).num_bytes == 2 * x.meta["val"].nbytes


def test_what_is_expanded_lies_in_memory_once() -> None:
    b = Calls()
    wide = b.forward(aten.expand.default, b.tensor(1, 5), [100, 5])
    (work,) = works_of(b.forward(aten.neg.default, wide))
    assert (work.read_bytes, work.written_bytes) == (20, 2000)
    assert num_bytes_of(torch.empty(1).expand(7)) == 4
    assert num_bytes_of(torch.empty(1)[:0].expand(0)) == 0
    assert num_bytes_of(torch.empty(1).as_strided([0], [0])) == 0


def test_what_is_read_twice_counts_once() -> None:
    b = Calls()
    x = b.tensor(5)
    (work,) = works_of(b.forward(aten.mul.Tensor, x, x))
    assert (work.read_bytes, work.written_bytes) == (20, 20)


def test_losses_compute_every_element_though_they_give_one() -> None:
    assert cost_of(call(aten.mse_loss.default, T(3, 5), T(3, 5))).flops == 4 * 15
    (work,) = works_of(call(aten.logsumexp.default, T(3, 5), [1]))
    assert (work.flops, work.transcendentals) == (60, 15)
    (work,) = works_of(call(aten._softmax_backward_data.default, T(3, 5), T(3, 5), 1, F32))
    assert work.transcendentals == 0


def test_what_is_only_written_over_is_not_read() -> None:
    b = Calls()
    x, out = b.tensor(5), b.tensor(5)
    node = b.program.graph.call_function(aten.add.out, (x, x), {"out": out})
    node.meta["val"] = out.meta["val"]
    (work,) = works_of(node)
    assert (work.read_bytes, work.written_bytes, work.in_place) == (20, 20, True)
    x, packed = b.tensor(64), b.tensor(68, dtype=torch.uint8)
    node = b.program.graph.call_function(ops.pack_state_into, (x,), {"out": packed})
    node.meta["val"] = packed.meta["val"]
    (work,) = works_of(node)
    assert (work.read_bytes, work.written_bytes, work.in_place) == (256, 68, True)


def test_an_operator_in_place_reads_and_writes_and_needs_no_new_memory() -> None:
    b = Calls()
    x = b.tensor(5)
    node = b.program.graph.call_function(aten.exp_.default, (x,))
    node.meta["val"] = x.meta["val"]
    (work,) = works_of(node)
    assert (work.read_bytes, work.written_bytes, work.in_place, work.transcendentals) == (20, 20, True, 5)


def test_python_numbers_cost_nothing() -> None:
    b = Calls()
    lr = b.input(Role.HYPER, "lr")
    assert cost_of(b.forward(operator.mul, lr, 2)).num_calls == 0
    assert cost_of(b.forward(aten.mul.Tensor, b.tensor(5), lr)).num_bytes == 40


@pytest.mark.parametrize(
    ("target", "arguments", "kind", "whole"),
    [
        (ops.all_gather, [4, "data"], "all_gather", 4 * 20),
        (ops.all_reduce, ["sum", "data"], "all_reduce", 20),
    ],
)
def test_collectives_count_bytes_of_the_whole(target: Any, arguments: list[Any], kind: str, whole: int) -> None:
    node = call(target, T(5), *arguments)
    (work,) = works(node, 4)
    assert (work.unit, work.collective, work.read_bytes, work.world) == (LINK, kind, whole, 4)
    assert seconds(work, H100) == H100.collective_s(kind, whole, 4)
    assert seconds(replace(work, world=1), H100) == 0


def test_a_reduction_counts_bytes_of_what_is_sent() -> None:
    (work,) = works(call(ops.reduce_scatter, T(8), "sum", 4, "data"), 4)
    assert (work.collective, work.read_bytes) == ("reduce_scatter", 32)


# Fused calls


def fused(program: Program, kind: type) -> list[fx.Node]:
    return [node for node in program.graph.nodes if isinstance(node.target, kind)]


def test_a_kernel_moves_each_argument_and_result_once_and_computes_all_its_operators() -> None:
    (node,) = fused(rewritten(one_layer(), 0, 1), Kernel)
    assert isinstance(node.target, Kernel)
    (work,) = works_of(node)
    sources = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    assert work.read_bytes == sum(val.nbytes for val in sources)
    assert work.written_bytes == sum(val.nbytes for val in node.meta["val"])
    assert work.in_place == (None not in node.target.writes)
    assert work.flops == 2 * 2 * max(val.numel() for val in sources)  # at least two additions each
    assert cost_of(node).num_calls == 2


def owned(numel: int, *, divided: bool, writes: tuple[int | None, ...] = (0,)) -> fx.Node:
    """p = p * p for two parameters, of 2 and of 6 rows of 4, that two ranks own."""
    b = Calls()
    parts, offset = [], 0
    for owner, rows in enumerate((2, 6)):
        body = fx.Graph()
        p = body.placeholder("p")
        p.meta["val"] = b.program.empty((rows, 4), F32, torch.device("cpu"))
        product = body.call_function(aten.mul.Tensor, (p, p))
        product.meta["val"] = p.meta["val"]
        body.output([product])
        place = Place(offset, (rows, 4), numel)
        parts.append(Part(str(owner), owner, (place,), (place,), body))
        offset = numel // 2
    update = OwnedUpdate("update", tuple(parts), 2, (F32,), writes)
    return b.forward(update, b.tensor(numel // 2 if divided else numel))


def test_of_owned_updates_those_of_the_busiest_rank_count() -> None:
    found = works_of(owned(48, divided=True))
    assert [(work.read_bytes, work.written_bytes, work.flops) for work in found] == [(96, 96, 24), (96, 96, 0)]


def test_where_every_rank_computes_all_owned_updates_all_count() -> None:
    found = works_of(owned(48, divided=False, writes=(None,)))
    assert sum(work.flops for work in found) == 8 + 24
    assert found[0] == Work("fill", written_bytes=48 * 4)
    assert sum(work.num_bytes for work in found[1:]) == 2 * 2 * (32 + 96)


# Unknown operators

_library = torch.library.Library("zgraph_test_cost", "DEF")  # type: ignore[no-untyped-call]
_library.define("mystery(Tensor x, Tensor[] ys) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("mystery", lambda x, ys: x.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # noqa: ARG005
mystery = torch.ops.zgraph_test_cost.mystery.default


def test_an_operator_of_no_family_is_costed_by_its_bytes_and_said_not_to_be_known() -> None:
    node = call(mystery, T(5), [T(3), T(4)])
    (work,) = works_of(node)
    assert (work.read_bytes, work.written_bytes, work.is_known) == (48, 20, False)
    assert not cost_of(node).is_known
    assert seconds(work, H100) == H100.memory_s(68)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("gpt", "resnet") else pytest.mark.slow) for n in CASES]
)
def test_every_operator_of_every_model_belongs_to_a_family(name: str) -> None:
    case = CASES[name]
    model = case.model()
    batch = case.batches(1)[0]
    config = Config.from_options({"zero": 3, "clip_norm": 1.0})
    rule = torch.optim.AdamW if name == "gpt" else torch.optim.SGD  # updates of all models are alike
    captured = capture(model, rule(model.parameters()), *batch, loss=case.loss, config=config)
    lowered = lower(captured, config, Mesh(2), None, ())
    assert predict(lowered, H100).unknown == Counter()


# Formulas


def test_literals_that_matter_and_strides_are_told_apart() -> None:
    b = Calls()
    costs = Costs(b.program, H100)
    q = b.tensor(2, 3, 1024, 64, dtype=BF16)
    flash = aten._scaled_dot_product_flash_attention.default
    whole, causal = (costs.of(b.forward(flash, q, q, q, 0.0, is_causal)) for is_causal in (False, True))
    assert whole.flops == 2 * causal.flops
    x, weight = b.tensor(1, 4, 8, 8), b.tensor(4, 2, 3, 3)
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)
    grouped = costs.of(b.forward(aten.convolution.default, x, weight, None, *options))
    one = b.tensor(4, 4, 3, 3)
    plain = costs.of(b.forward(aten.convolution.default, x, one, None, *options[:-1], 1))
    assert plain.flops == 2 * grouped.flops
    dense, wide = b.tensor(100, 5), b.forward(aten.expand.default, b.tensor(1, 5), [100, 5])
    assert costs.of(b.forward(aten.neg.default, dense)).num_bytes == 4000
    assert costs.of(b.forward(aten.neg.default, wide)).num_bytes == 2020


def test_equal_calls_are_worked_out_once() -> None:
    b = Calls()
    costs = Costs(b.program, H100)
    x, y = b.tensor(5), b.tensor(5)
    assert costs.of(b.forward(aten.neg.default, x)) is costs.of(b.forward(aten.neg.default, y))
    assert costs.of(b.forward(aten.exp.default, x)) is not costs.of(b.forward(aten.neg.default, x))


def transformer(program: Program, batch: Any, sequence: Any) -> list[fx.Node]:
    """Calls of every unit, on a batch of sequences."""
    b = Calls()
    b.program = program
    mode, width, heads = program.fake_mode, 32, 4

    def tensor(*shape: Any, dtype: torch.dtype = F32) -> fx.Node:
        node = b.tensor(1)
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    tokens, table = tensor(batch, sequence, dtype=I64), tensor(100, width)
    x = b.forward(aten.embedding.default, table, tokens)
    calls = [x, b.forward(aten.native_layer_norm.default, x, [width], tensor(width), tensor(width), 1e-5)]
    flat = b.forward(aten.view.default, x, [batch * sequence, width])
    calls += [flat, b.forward(aten.mm.default, flat, tensor(width, 3 * width))]
    q = tensor(batch, heads, sequence, width // heads)
    calls += [b.forward(aten._scaled_dot_product_flash_attention_for_cpu.default, q, q, q, 0.0, True)]
    calls += [b.forward(aten.bmm.default, x, tensor(batch, width, sequence))]
    calls += [b.forward(aten.gelu.default, flat), b.forward(aten.add.Tensor, x, tensor(width))]
    calls += [b.forward(aten._softmax.default, tensor(batch, sequence, sequence), 2, False)]
    calls += [b.forward(aten.cat.default, [flat, flat]), b.forward(aten.sum.default, flat)]
    calls += [b.forward(aten.neg.default, b.forward(aten.expand.default, tensor(1, width), [sequence, width]))]
    image, weight = tensor(batch, 4, sequence, sequence), tensor(6, 4, 3, 3)
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    calls += [b.forward(aten.convolution.default, image, weight, None, *options)]
    calls += [b.forward(ops.all_gather, b.forward(aten.view.default, flat, [batch * sequence * width]), 4, "data")]
    calls += [b.forward(ops.all_reduce, flat, "sum", "data"), b.forward(aten.topk.default, flat, 2)]
    return calls


def symbolic() -> tuple[Program, torch.SymInt, torch.SymInt]:
    """An empty program, and two sizes of it that are not known."""
    program = Calls().program
    environment = ShapeEnv()
    program.fake_mode = FakeTensorMode(shape_env=environment)
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    fake = program.fake_mode.from_tensor(torch.empty(5, 7), symbolic_context=context)
    return program, *fake.shape  # type: ignore[return-value]


@pytest.fixture(scope="module")
def formulas() -> tuple[list[Cost], sympy.Symbol, sympy.Symbol, sympy.Symbol]:
    program, batch, sequence = symbolic()
    world = sympy.Symbol("world", integer=True, positive=True)
    costs = Costs(program, H100, world)
    calls = transformer(program, batch, sequence)
    return [costs.of(node) for node in calls], batch.node.expr, sequence.node.expr, world


@few_examples(8)
@given(st.integers(2, 70), st.integers(3, 300), st.sampled_from([1, 2, 8, 24, 1024]))
def test_formulas_with_numbers_put_in_are_the_costs_of_these_numbers(
    formulas: tuple[list[Cost], sympy.Symbol, sympy.Symbol, sympy.Symbol], batch: int, sequence: int, world: int
) -> None:
    costs, *symbols = formulas
    put: Callable[[Any], float] = lambda value: float(  # noqa: E731
        sympy.sympify(value).subs(dict(zip(symbols, (batch, sequence, world), strict=True)))
    )
    b = Calls()
    numbers = Costs(b.program, H100, world)
    calls = transformer(b.program, batch, sequence)
    for node, formula in zip(calls, costs, strict=True):
        cost = numbers.of(node)
        assert put(formula.flops) == cost.flops, node
        assert put(formula.num_bytes) == cost.num_bytes, node
        assert put(formula.seconds) == pytest.approx(cost.seconds, rel=1e-9, abs=1e-15), node
        assert formula.num_calls == cost.num_calls


def test_a_formula_is_one_of_the_sizes_that_are_not_known(
    formulas: tuple[list[Cost], sympy.Symbol, sympy.Symbol, sympy.Symbol],
) -> None:
    costs, batch, sequence, world = formulas
    product = next(cost for cost in costs if cost.works[0].unit == MATRIX)
    assert sympy.expand(product.flops - 2 * batch * sequence * 32 * 96) == 0
    assert {batch, sequence} <= product.seconds.free_symbols
    gathers = [cost for cost in costs if cost.works[0].collective == "all_gather"]
    assert [cost.num_bytes for cost in gathers] == [batch * sequence * 32 * 4 * world]


def test_a_program_of_two_layers_costs_on_any_number_of_ranks() -> None:
    program = rewritten(two_layers(), 3, 4)
    for world in (4, 64):
        costs = Costs(program, H100, world)
        starts = [costs.of(node) for node in program.graph.nodes if node.target in ops.STARTS]
        assert starts
        assert all(cost.works[0].world == world and cost.seconds > 0 for cost in starts)


@pytest.mark.parametrize("unit", ["matrix", "attention", "vector", "lookup", "link"])
def test_what_work_takes_longer_in_a_step_is_said_by_unit(unit: str) -> None:
    work = Work("any", unit, 10**9, 0, 10**6, 10**6, shape=(1, 64, 64, 64), collective="all_gather", world=4)
    slower = replace(H100, in_step={unit: 3.0})
    assert seconds(work, slower) == 3 * seconds(work, H100)
    assert seconds(work, replace(H100, in_step={"another": 3.0})) == seconds(work, H100)


@pytest.mark.parametrize(("numel", "slices"), [(0, 1), (1, 1), (65536, 1), (65537, 2), (10**6, 16)])
def test_a_kernel_is_as_many_calls_as_operators_and_slices(numel: int, slices: int) -> None:
    work = Work("kernel", num_operators=5, sliced_numel=numel)
    assert work.num_calls == 5 * slices
    assert replace(work, slice_numel=64 * 65536).num_calls == 5


def test_on_a_cpu_only_what_is_written_needs_new_memory() -> None:
    cpu = made_up().hardware()
    reading = seconds(Work("sum", read_bytes=2**26, written_bytes=4), cpu)
    both = seconds(Work("copy", read_bytes=2**26, written_bytes=2**26), cpu)
    assert reading < both / 2
    assert both == pytest.approx(cpu.memory_s(2**27))
    assert seconds(Work("update", read_bytes=2**26, written_bytes=2**26, in_place=True), cpu) < both


def test_on_a_cpu_results_that_are_kept_in_an_arena_need_no_new_memory_but_are_fetched_before() -> None:
    cpu = made_up().hardware()
    b = Calls()
    x = b.tensor(2**20)
    arena, own = b.forward(aten.exp.default, x), b.forward(aten.flip.default, x, [0])
    assert (into(arena) is None, into(own) is None) == (False, True)
    (told,) = Costs(b.program, cpu).of(arena).works
    (alone,) = Costs(b.program, cpu).of(own).works
    assert (told.in_arena, alone.in_arena) == (True, False)
    assert not Costs(b.program, H100).of(arena).works[0].in_arena, "allocators of GPUs keep all memory"
    copied = Work("copy", read_bytes=2**26, written_bytes=2**26, in_arena=True)
    assert seconds(copied, cpu) == cpu.memory_s(3 * 2**26, in_place=True)
    assert seconds(replace(copied, in_place=True), cpu) == cpu.memory_s(2 * 2**26, in_place=True)


def test_collectives_inside_of_nodes_use_other_links_than_those_between_them() -> None:
    program = run(default_passes(Config(3, 200), Mesh(32, shard=8)), two_layers()).program
    costs = Costs(program, H100)
    found = {}
    for node in program.graph.nodes:
        if node.target in ops.STARTS:
            [work] = costs.of(node).works
            found[ops.axis_of(node), work.collective] = work
            expected = H100.collective_s(work.collective, work.read_bytes, work.world, together=work.together)
            assert costs.of(node).seconds == expected
    assert {key: (work.world, work.together) for key, work in found.items()} == {
        (SHARD, "all_gather"): (8, 8),
        (SHARD, "reduce_scatter"): (8, 8),
        (REPLICA, "all_reduce"): (4, 1),
        ("data", "all_reduce"): (32, None),
    }
    mesh = Mesh(32, secondary=8)
    assert mesh.groups(SECONDARY) == [range(8), range(8, 16), range(16, 24), range(24, 32)]
    assert ranks_together(mesh, SECONDARY, 8) == 8
    gather = found[SHARD, "all_gather"]
    assert seconds(gather, H100) == H100.collective_s("all_gather", gather.read_bytes, 8), "as on one node"


@pytest.mark.parametrize(
    ("size", "shard", "devices", "inside", "between"),
    [(32, 8, 8, 8, 1), (32, 4, 8, 4, 2), (32, 16, 8, 8, 1), (6, 3, 8, 1, 2), (24, 12, 8, 4, 1), (4, 2, 1, 1, 1)],
)
def test_ranks_of_a_group_share_a_node_as_far_as_it_has_room(
    size: int, shard: int, devices: int, inside: int, between: int
) -> None:
    """Counted rank by rank: the smallest part of any group that a node has."""
    mesh = Mesh(size, shard=shard)
    assert ranks_together(mesh, "data", devices) is None
    assert (ranks_together(mesh, SHARD, devices), ranks_together(mesh, REPLICA, devices)) == (inside, between)
    if size % devices == 0:
        for axis, expected in ((SHARD, inside), (REPLICA, between)):
            parts = [Counter(rank // devices for rank in group).values() for group in mesh.groups(axis)]
            assert min(min(part) for part in parts) == expected
