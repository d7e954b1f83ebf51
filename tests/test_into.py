"""Storing a result in given memory gives, bit for bit, what the operator would have allocated."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.operators import differentiable, name_of
from tests.programs import Builder
from tests.reference import slow
from zgraph import ops
from zgraph.into import ON_GPU, can_be_told, copy, into, out_overload
from zgraph.program import Role

aten = torch.ops.aten


class Compare(TorchDispatchMode):
    """Computes every call a second time, into memory full of other bytes, where that is known to be possible."""

    def __init__(self) -> None:
        super().__init__()
        self.compared: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [x.clone() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and not result.is_complex():
            self._compare(func, args, kwargs, result, before)
        return result

    def _compare(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor, before: list[torch.Tensor]) -> None:
        graph, given = fx.Graph(), {}

        def node_of(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            node = graph.placeholder(f"in{len(given)}")
            node.meta["val"] = value
            given[node] = value
            return node

        node = graph.call_function(func, *pytree.tree_map(node_of, (args, kwargs)))
        node.meta["val"] = result
        call = into(node)
        if call is None or any(map(torch._C._overlaps, [result] * len(given), given.values())):
            return
        out = filled_otherwise(result)
        place = out.data_ptr(), out.shape, out.stride()
        args, kwargs = pytree.tree_map_only(fx.Node, given.__getitem__, (call.args, dict(call.kwargs)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = call.target(*args, **kwargs, **{call.out: out})
        assert found.data_ptr() == out.data_ptr(), func
        assert (out.data_ptr(), out.shape, out.stride()) == place, f"{func} moved what it was given"
        assert as_bytes(out) == as_bytes(result), func
        for x, old in zip(given.values(), before, strict=True):
            assert as_bytes(x.contiguous()) == as_bytes(old.contiguous()), f"{func} wrote over an argument"
        self.compared[func] += 1


def filled_otherwise(result: torch.Tensor) -> torch.Tensor:
    """A tensor of the same form with other bytes."""
    out = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
    out.untyped_storage().copy_(torch.full((out.untyped_storage().nbytes(),), 1, dtype=torch.uint8).untyped_storage())
    return out


def as_bytes(x: torch.Tensor) -> bytes:
    """The elements in order, without the gaps between them."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x).flatten().view(torch.uint8).numpy().tobytes()


def compare_operator(op: Any, compare: Compare, num_samples: int, dtype: torch.dtype = torch.float32) -> None:
    """Run an operator of torch's database forward and backward."""
    for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=True), num_samples):
        torch.manual_seed(0)
        with compare:
            results = pytree.tree_leaves(op(sample.input, *sample.args, **sample.kwargs))
            losses = [r.abs().sum() for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
            if losses:
                torch.stack([loss.float() for loss in losses]).sum().backward()


COMMON = ("nn.functional.gelu", "nn.functional.embedding", "log_softmax", "mm", "cat", "stack", "sum", "reshape")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("num_samples", [0, *slow(4)], ids=["common ones", "all"])
def test_every_operator_that_can_gives_what_it_would_have_allocated(num_samples: int, dtype: torch.dtype) -> None:
    compare = Compare()
    for op in differentiable():
        if dtype in op.supported_backward_dtypes("cpu") and (num_samples or name_of(op) in COMMON):
            compare_operator(op, compare, num_samples or 2, dtype)
    expected = {aten.mm.default, aten.cat.default, aten.stack.default, aten.gelu_backward.default}
    expected |= {aten._log_softmax_backward_data.default, aten.embedding_dense_backward.default}
    assert expected <= set(compare.compared)
    assert num_samples == 0 or len(compare.compared) > 200


def test_rows_that_are_looked_up_often_are_added_up_in_the_same_order() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 20, (4, 64), generator=generator)
    gradient = torch.randn(4, 64, 24, generator=generator) * 10 ** torch.randint(-4, 4, (4, 64, 1), generator=generator)
    with Compare() as compare:
        aten.embedding_dense_backward.default(gradient, indices, 50, -1, False)
        aten.embedding_dense_backward.default(gradient.transpose(0, 1), indices.t(), 50, -1, False)
    assert compare.compared[aten.embedding_dense_backward.default] == 2


def forms() -> Iterator[torch.Tensor]:
    """Tensors in many an order in memory."""
    x = torch.arange(24.0).view(2, 3, 4)
    yield from (x, x.permute(2, 0, 1), x.transpose(1, 2), x[:, :2], x.expand(5, 2, 3, 4))
    yield torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


def test_copies_fills_and_casts_keep_the_order_in_memory() -> None:
    with Compare() as compare:
        for x in forms():
            for target, *args in (
                (aten.clone.default,),
                (aten._to_copy.default,),
                (aten.full_like.default, 3),
                (aten.zeros_like.default,),
                (aten.ones_like.default,),
                (aten.new_full.default, [3, 2], 7),
                (aten.new_zeros.default, [3, 2]),
            ):
                target(x, *args)
            aten.clone.default(x, memory_format=torch.contiguous_format)
            aten._to_copy.default(x, dtype=torch.bfloat16)
    assert sum(compare.compared.values()) >= 9 * len(list(forms()))


def test_a_reshape_that_copies_is_a_copy() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 3])
    made = b.forward(aten.reshape.default, b.forward(aten.t.default, x), [2, 6])
    call = into(made)
    assert call is not None
    assert call.target is copy
    given = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    assert torch.equal(copy(given.t(), out=torch.empty(2, 6, dtype=torch.float64)), given.t().reshape(2, 6))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.relu.default, ()),  # an out overload there is, but one that computes and copies
        (aten.masked_fill.Scalar, (torch.ones(4, 4, dtype=torch.bool), 0.0)),
        (aten.view.default, ([16],)),  # a view has no memory
        (aten.reshape.default, ([16],)),
        (aten.bernoulli.p, (0.5,)),  # draws numbers
        (aten.exp_.default, ()),  # has its memory
        (aten.mse_loss.default, (torch.ones(4, 4, dtype=torch.float64),)),  # resizes
        (aten.max.dim, (0,)),  # two results
    ],
    ids=str,
)
def test_what_would_copy_resize_or_draw_is_left_alone(target: Any, args: tuple[Any, ...]) -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 4])
    given = []
    for i, arg in enumerate(args):
        is_tensor = isinstance(arg, torch.Tensor)
        given.append(b.input(Role.BATCH, f"in{i}", shape=arg.shape, dtype=arg.dtype) if is_tensor else arg)
    assert into(b.forward(target, x, *given)) is None


def test_only_memory_of_a_cpu_or_of_a_gpu_is_given() -> None:
    b = Builder()
    node = b.forward(aten.neg.default, b.input(Role.BATCH, "0", shape=[4]))
    assert into(node) is not None
    node.meta["val"] = b.program.empty([4], torch.float64, torch.device("cuda"))
    assert into(node) is not None
    node.meta["val"] = b.program.empty([4], torch.float64, torch.device("meta"))
    assert into(node) is None


@pytest.mark.parametrize("target", sorted(ON_GPU, key=str), ids=str)
def test_what_a_gpu_is_told_can_be_told(target: Any) -> None:
    assert can_be_told(target)


def test_gathered_parameters_can_be_given_a_place() -> None:
    b = Builder()
    shard = b.input(Role.PARAM, "p", shape=[4])
    gathered = b.forward(ops.all_gather, shard, 2, "ranks")
    call = into(gathered)
    assert call is not None
    assert (call.target, call.out) == (ops.all_gather, "out")


def test_overloads_that_torch_has_generated_are_not_used() -> None:
    generated = aten.relu.out, aten.native_layer_norm.out, aten.clone.out
    assert all(torch.Tag.generated in overload.tags for overload in generated)
    assert all(out_overload(target) is None for target in (aten.relu.default, aten.clone.default))
    assert out_overload(aten.gelu_backward.default) == (aten.gelu_backward.grad_input, "grad_input")
