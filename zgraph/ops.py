"""The operators a program may hold besides ATen's and Python's scalar ones, and facts about all of them.

Collectives are torch's functional ones (``_c10d_functional``): a start returns a value that may not be read until its
``wait_tensor``. Groups are named by mesh axis; the runtime binds the name to a process group. ``zgraph::shard`` is the
slice of a flat buffer that this rank has among those of an axis: the one operator whose meaning depends on the rank, so
that the program text is the same on all. ``zgraph::square_sum`` and ``zgraph::add_up`` make a norm of tensors that lie
in parts; ``zgraph::pack_state`` and ``zgraph::unpack_state`` are for tensors that are kept in 8 bits an element, and
``zgraph::quantize`` and what reads its result for those that travel so; ``zgraph::elements`` says where a flat buffer
has elements of parameters rather than padding. ``zgraph::cross_entropy_backward`` is two of ATen's, a few rows at a
time; ``zgraph::product_columns`` and ``embedding_rows_backward`` are parts of one (``zgraph.tiling``).
``zgraph::share`` starts what ``all_gather`` does where ranks share memory, so that what is waited for is no copy.
``zgraph::load``, ``zgraph::store`` and ``zgraph::spill`` start transfers from and to a lower tier, the host's memory or
a disk, which are waited for as collectives are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import fx

from zgraph import packed, quantized, tiling

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

_library = torch.library.Library("zgraph", "DEF")  # type: ignore[no-untyped-call]
_library.define("shard(Tensor(a) x, int world, str axis) -> Tensor(a)")  # type: ignore[no-untyped-call]
_library.define("square_sum(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("add_up(Tensor[] xs) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("elements(int[] starts, int[] stops, int numel, *, Device device) -> Tensor")  # type: ignore[no-untyped-call]
_OF_LOGITS = (
    "Tensor gradient, Tensor logs, Tensor target, Tensor? weight, int reduction, int ignore_index, "
    "Tensor total_weight, int dim"
)
_library.define(f"cross_entropy_backward({_OF_LOGITS}) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(f"cross_entropy_backward.out({_OF_LOGITS}, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]
_OF_TILE = "Tensor? rest, Tensor x, Tensor tile, int num_blocks, int start, int num_columns"
_library.define(f"product_columns({_OF_TILE}) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(f"product_columns.out({_OF_TILE}, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]
_OF_ROWS = "Tensor gradient, Tensor indices, int num_weights, int num_blocks, int start, int width"
_library.define(f"embedding_rows_backward({_OF_ROWS}) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("max_over_ranks(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("pack_state(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("pack_state.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]
_library.define("unpack_state(Tensor packed) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("quantize(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("dequantize(Tensor data, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("mean_of_quantized(Tensor data, int world) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("share(Tensor shard, int world, str axis) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("load(Tensor stored, str tier) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("store(Tensor x, str tier, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]
_library.define("spill(Tensor x, str tier) -> Tensor")  # type: ignore[no-untyped-call]


def _shard_shape(x: torch.Tensor, world: int, axis: str) -> torch.Tensor:  # noqa: ARG001 -- the operator's schema
    return x[: x.shape[0] // world]


_ROW = 4096


def _square_sum(x: torch.Tensor) -> torch.Tensor:
    """Row by row in the dtype of ``x``, float32 at least; what the rows give is added in float64."""
    flat, dtype = x.reshape(-1), torch.promote_types(x.dtype, torch.float32)
    whole = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=dtype)
    norms = torch.cat([rows, torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1)])
    return norms.double().square().sum()


def _add_up(xs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(xs).sum()


def _elements(starts: list[int], stops: list[int], numel: int, *, device: torch.device) -> torch.Tensor:
    found = torch.zeros(numel, dtype=torch.bool, device=device)
    for start, stop in zip(starts, stops, strict=True):
        found[start:stop] = True
    return found


AT_ONCE_BYTES = {"cpu": 2**21, "cuda": 2**26}
"""Of the gradients of logits, how many are computed at once on a kind of device: on a CPU, what stays in its caches; on
a GPU, enough that kernels take longer than starting them does."""


def rows_at_once(logs: torch.Tensor) -> int:
    """Of logits, those whose gradients are computed at once; 0 if it is not known how many should be."""
    of_row = logs.shape[1] * logs.itemsize
    return max(AT_ONCE_BYTES[logs.device.type] // max(of_row, 1), 1) if logs.device.type in AT_ONCE_BYTES else 0


def _cross_entropy_backward_into(
    gradient: torch.Tensor,
    logs: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: torch.Tensor,
    dim: int,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """Each row is for itself, and is read before it is written: ``out`` may be ``logs``."""
    num_rows = rows_at_once(logs)
    picked = torch.empty_like(logs[:num_rows])
    for start in range(0, len(logs), num_rows):
        rows = slice(start, start + num_rows)
        of_rows = gradient[rows] if gradient.dim() else gradient
        here = picked[: len(logs[rows])]
        torch.ops.aten.nll_loss_backward.grad_input(
            of_rows, logs[rows], target[rows], weight, reduction, ignore_index, total_weight, grad_input=here
        )
        torch.ops.aten._log_softmax_backward_data.out(here, logs[rows], dim, logs.dtype, out=out[rows])
    return out


def _cross_entropy_backward(gradient: torch.Tensor, logs: torch.Tensor, *others: Any) -> torch.Tensor:
    return _cross_entropy_backward_into(gradient, logs, *others, out=torch.empty_like(logs))


def _logits_shape(gradient: torch.Tensor, logs: torch.Tensor, *others: Any) -> torch.Tensor:  # noqa: ARG001 -- as above
    if logs.dim() != 2 or others[-1] not in (-1, 1):
        raise ValueError("logits must be a matrix whose rows are examples")
    return torch.empty_like(logs)


def _packed_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(packed.packed_numel(len(x)), dtype=torch.uint8)


def _unpacked_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(packed.unpacked_numel(len(x)), dtype=torch.float32)


_library.impl("share", lambda shard, world, _: shard.repeat(world), "Meta")  # type: ignore[no-untyped-call]
_library.impl("shard", _shard_shape, "Meta")  # type: ignore[no-untyped-call]
for _name in ("quantize", "dequantize", "mean_of_quantized"):
    _library.impl(_name, getattr(quantized, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("max_over_ranks", torch.clone, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("load", lambda stored, _: stored.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("spill", lambda x, _: x.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("store", lambda x, _, out: out.copy_(x), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("elements", _elements, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("square_sum", _square_sum, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("add_up", _add_up, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
for _key in ("CPU", "CUDA"):
    _library.impl("cross_entropy_backward", _cross_entropy_backward, _key)  # type: ignore[no-untyped-call]
    _library.impl("cross_entropy_backward.out", _cross_entropy_backward_into, _key)  # type: ignore[no-untyped-call]
    _library.impl("product_columns", tiling.product_columns, _key)  # type: ignore[no-untyped-call]
    _library.impl("product_columns.out", tiling.product_columns_into, _key)  # type: ignore[no-untyped-call]
    _library.impl("embedding_rows_backward", tiling.embedding_rows_backward, _key)  # type: ignore[no-untyped-call]
    _library.impl("pack_state", packed.pack, _key)  # type: ignore[no-untyped-call]
    _library.impl("pack_state.out", packed.pack_into, _key)  # type: ignore[no-untyped-call]
    _library.impl("unpack_state", packed.unpack, _key)  # type: ignore[no-untyped-call]
_library.impl("cross_entropy_backward", _logits_shape, "Meta")  # type: ignore[no-untyped-call]
_library.impl("product_columns", tiling.product_columns_shape, "Meta")  # type: ignore[no-untyped-call]
_library.impl("embedding_rows_backward", tiling.embedding_rows_shape, "Meta")  # type: ignore[no-untyped-call]
_library.impl("pack_state", _packed_shape, "Meta")  # type: ignore[no-untyped-call]
_library.impl("unpack_state", _unpacked_shape, "Meta")  # type: ignore[no-untyped-call]

shard = torch.ops.zgraph.shard.default
square_sum = torch.ops.zgraph.square_sum.default
"""The sum of the squares of all elements of a tensor: a 0-dim float64."""
add_up = torch.ops.zgraph.add_up.default
"""The sum of 0-dim tensors of one dtype."""
elements = torch.ops.zgraph.elements.default
"""Whether each of ``numel`` elements lies in one of the ranges: a bool vector."""
cross_entropy_backward = torch.ops.zgraph.cross_entropy_backward.default
"""The gradient of logits, of whose softmax ``logs`` are the logarithms: bit for bit what ``_log_softmax_backward_data``
makes of what ``nll_loss_backward`` makes of the loss's."""
product_columns = torch.ops.zgraph.product_columns.default
"""``rest`` with some of its columns replaced by a product of matrices: see ``zgraph.tiling``."""
embedding_rows_backward = torch.ops.zgraph.embedding_rows_backward.default
"""Some rows of the gradient of a table: see ``zgraph.tiling``."""
max_over_ranks = torch.ops.zgraph.max_over_ranks.default
"""Each element's largest value on any rank, where it is not implied that the mean is meant; on one rank, a copy."""
pack_state = torch.ops.zgraph.pack_state.default
"""A float32 vector in 8 bits an element: see ``zgraph.packed``."""
pack_state_into = torch.ops.zgraph.pack_state.out
"""The same, over what lies in ``out``."""
unpack_state = torch.ops.zgraph.unpack_state.default
"""The vector that was packed."""
quantize = torch.ops.zgraph.quantize.default
"""A float32 vector in 8 bits an element: see ``zgraph.quantized``."""
dequantize = torch.ops.zgraph.dequantize.default
"""The vector that was quantised, in a dtype."""
mean_of_quantized = torch.ops.zgraph.mean_of_quantized.default
"""The mean of the vectors that lie one after the other, one of each rank, in float32."""
all_gather = c10d.all_gather_into_tensor.default
all_reduce = c10d.all_reduce.default
all_gather_into = c10d.all_gather_into_tensor_out.default
reduce_scatter = c10d.reduce_scatter_tensor.default
all_to_all = c10d.all_to_all_single.default
"""Each rank receives its part of what every rank sends, in rank order: equal parts, whose sizes are given twice."""
share = torch.ops.zgraph.share.default
"""As ``all_gather``, where the parts of all ranks lie in memory that they share: the result is no copy of them."""
wait = c10d.wait_tensor.default

STARTS = frozenset({all_gather, all_gather_into, all_reduce, reduce_scatter, all_to_all, share})
"""Operators that start a collective; each value is waited for exactly once before it is read."""

load = torch.ops.zgraph.load.default
"""What lies on a lower tier, ``"host"`` or ``"disk"``, in new memory."""
store = torch.ops.zgraph.store.default
"""A vector, over what lies on a lower tier as ``out``."""
spill = torch.ops.zgraph.spill.default
"""A tensor of this step, in a place of its own on a lower tier."""

TRANSFERS = frozenset({load, store, spill})
"""Operators that start a transfer between memory and a lower tier, waited for as collectives are."""

ASYNCHRONOUS = STARTS | TRANSFERS
"""Operators whose value is there once it has been waited for."""

INTO = frozenset({all_gather_into, pack_state_into, store})
"""Operators that write over their argument ``out``, and so come with the last lowering only."""

BY_PLACE = frozenset({aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default})
"""Operators that read memory by its place, whatever tensor they are given a part of."""

_CREATES = frozenset(
    {
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
        aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_full.default,
    }
)  # fmt: skip
_ELEMENTWISE_TOO = frozenset(
    {
        aten._to_copy.default, aten.copy.default, aten.lift_fresh_copy.default, aten.detach.default,
        aten.alias.default, aten.scalar_tensor.default,
    }
)  # fmt: skip


def sym_choose(condition: int, new: Any, old: Any) -> Any:
    """One of two numbers: ``new`` if ``condition`` is not zero."""
    return new if condition else old


def _of_operators(question: Callable[[torch._ops.OpOverload], bool]) -> Callable[[Any], bool]:
    """Let a question be asked of anything: the answer is no for what is not an operator of torch.

    Answers are kept, for operators are there for good; a kernel must not be kept.
    """
    answer = cache(question)

    @wraps(question)
    def ask(target: Any) -> bool:
        return isinstance(target, torch._ops.OpOverload) and answer(target)

    return ask


def is_scalar_op(target: Any) -> bool:
    """Python arithmetic on numbers, and reading a 0-dim tensor as one."""
    if isinstance(target, torch._ops.OpOverload):
        return target is aten._local_scalar_dense.default or target._opname.startswith("sym_")
    name = getattr(target, "__name__", "")
    return getattr(target, "__module__", "") == "_operator" or name.lstrip("_").startswith("sym_")


def is_elementwise(target: Any) -> bool:
    """Whether element i of the result depends on element i of the tensor arguments only (and is not random)."""
    return _is_pointwise(target) or (is_scalar_op(target) and target is not operator.getitem)


@_of_operators
def _is_pointwise(target: torch._ops.OpOverload) -> bool:
    known = target in _CREATES or target in _ELEMENTWISE_TOO
    return known or (torch.Tag.pointwise in target.tags and not is_random(target))


def creates(target: Any) -> bool:
    """Whether the operator fills a new tensor with one value."""
    return target in _CREATES


@_of_operators
def is_random(target: torch._ops.OpOverload) -> bool:
    """Whether the operator draws from a random generator, so that it must run exactly once, in order."""
    return torch.Tag.nondeterministic_seeded in target.tags


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """What a call of an operator of torch is given for the argument that its schema calls ``name``.

    Args:
        default: where the call leaves it out, or the operator has no such argument.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [each.name for each in node.target._schema.arguments]
    index = names.index(name) if name in names else len(node.args)
    return node.args[index] if index < len(node.args) else default


def axis_of(node: fx.Node) -> str:
    """The axis of the mesh along which ranks communicate in a collective, its wait, or divide in ``shard``."""
    source = node.args[0] if node.target is wait else node
    assert isinstance(source, fx.Node)
    axis = source.args[-1]
    assert isinstance(axis, str), source
    return axis


def tier_of(node: fx.Node) -> str:
    """The tier that a transfer goes to or comes from."""
    tier = node.args[1]
    assert isinstance(tier, str), node
    return tier


def draws(node: fx.Node) -> bool:
    """Whether a call draws from a random generator: attention whose ``dropout_p`` is 0 does not, though others do."""
    if not is_random(node.target):
        return False
    if all(each.name != "dropout_p" for each in node.target._schema.arguments):  # type: ignore[union-attr]
        return True
    given = argument(node, "dropout_p", 0.0)
    return isinstance(given, fx.Node) or bool(given != 0)


def can_run_again(node: fx.Node) -> bool:
    """Whether a call gives the same when it runs once more: it draws nothing, writes nothing and waits for nobody."""
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or draws(source) or may_write(source.target):
        return False
    return source.target not in (*ASYNCHRONOUS, wait, max_over_ranks)


def may_write(target: Any) -> bool:
    """Whether a call may write over its arguments: a kernel, or an operator that torch calls mutable."""
    return hasattr(target, "writes") or _is_mutable(target)


@_of_operators
def _is_mutable(target: torch._ops.OpOverload) -> bool:
    return target._schema.is_mutable


def out_of(target: Any) -> str | None:
    """The keyword by which an operator of torch is given the memory of its only result; None if it allocates."""
    return _out(target) if isinstance(target, torch._ops.OpOverload) else None


@cache
def _out(target: torch._ops.OpOverload) -> str | None:
    names = [argument.name for argument in target._schema.arguments if argument.is_out]
    return names[0] if len(names) == len(target._schema.returns) == 1 else None


def allocating(target: Any) -> Any:
    """The operator that computes the same as one that is given memory, and allocates; else ``target`` itself."""
    return target if out_of(target) is None else _allocating(target)


@cache
def _allocating(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments if not argument.is_out]
    for name in target.overloadpacket.overloads():
        other: torch._ops.OpOverload = getattr(target.overloadpacket, name)
        if not other._schema.is_mutable and [(a.name, str(a.type)) for a in other._schema.arguments] == wanted:
            return other
    return target


def inferring(target: Any) -> Any:
    """What tells the form of a call's result by those of its arguments: the operator itself, but where it is wrong."""
    return getattr(target, "infer", _INFERRED.get(target, target))


def _batch_norm(*args: Any, **kwargs: Any) -> Any:
    """Of statistics in 16 bits torch infers float32, where the operator gives 16 bits."""
    found = aten._native_batch_norm_legit_functional.default(*args, **kwargs)
    return (*found[:3], *(new.to(old.dtype) for new, old in zip(found[3:], args[3:5], strict=True)))


_INFERRED = {aten._native_batch_norm_legit_functional.default: _batch_norm}


def may_overwrite(node: fx.Node) -> bool:
    """Whether a call may store its result in an operand's memory, of the result's form, bit for bit as elsewhere.

    An elementwise operator may: it has read what it needs of an element when it writes there. So may softmaxes and
    their derivatives, whose kernels sum up a row before they write any of it, each row for itself
    (ATen/native/cpu/SoftMaxKernel.cpp, ATen/native/cuda/PersistentSoftmax.cuh and SoftMax.cu).
    """
    target = allocating(node.target)
    if target in (cross_entropy_backward, product_columns):
        return True
    if sums_up_rows(target):
        last = len(node.args[0].meta["val"].shape) - 1  # type: ignore[union-attr]
        return argument(node, "dim") in (-1, last)
    return is_elementwise(target) and not creates(target)


_SOFTMAXES = frozenset({aten._log_softmax.default, aten._softmax.default})
_BY_ROWS = _SOFTMAXES | {aten._log_softmax_backward_data.default, aten._softmax_backward_data.default}


def is_softmax(target: Any) -> bool:
    """Whether an operator makes of each row numbers that add up to one, or their logarithms."""
    return allocating(target) in _SOFTMAXES


def sums_up_rows(target: Any) -> bool:
    """Whether an operator's kernels sum up a row, if rows are its last dimension, before they write any of it."""
    return allocating(target) in _BY_ROWS


def scratch_bytes(node: fx.Node) -> int:
    """Memory that a call works in beside its result, where that is zgraph's own."""
    target = allocating(node.target)
    if target is product_columns:
        made = node.args[1].meta["val"].shape[0] * node.args[2].meta["val"].shape[1]  # type: ignore[union-attr]
        return 0 if node.args[3] == 1 else int(made) * int(node.meta["val"].itemsize)
    if target is not cross_entropy_backward:
        return 0
    logs = node.args[1].meta["val"]  # type: ignore[union-attr]
    rows: int = min(rows_at_once(logs), len(logs))
    return rows * int(logs.shape[1]) * int(logs.itemsize)


def view_of(node: fx.Node) -> fx.Node | None:
    """The node whose memory a call's result shares: a view's source, or that of the views it unpacks."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    unpacked = node.target is operator.getitem and is_view(source.target)
    return source if unpacked or is_view(node.target) else None


def root_of(node: fx.Node) -> fx.Node:
    """The node whose memory a value shares through views, or itself."""
    while (source := view_of(node)) is not None:
        node = source
    return node


@_of_operators
def is_view(target: torch._ops.OpOverload) -> bool:
    """Whether the result, or each of several, shares memory with the first argument."""
    if target is aten._unsafe_view.default:
        return True  # its schema does not say so
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)
