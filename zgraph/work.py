"""What a call of a program does on any machine: operations, bytes read and bytes written, by family of operators.

One function per family says it; ``zgraph.cost`` says how long a machine takes for it. Where shapes are symbolic
(``torch.SymInt``), so are the answers: sympy expressions in the same symbols.

An operator of no family is known by the bytes of its arguments and results alone, and marked as not known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.host_kernel import HostKernel
from zgraph.codegen.inductor import InductorRegion
from zgraph.codegen.kernel import SLICE, Kernel
from zgraph.codegen.owned import OwnedUpdate
from zgraph.codegen.region import Region
from zgraph.curves import ceiling_of, minimum
from zgraph.liveness import shares_memory
from zgraph.program import operand

aten = torch.ops.aten

Size = Any
"""A number of elements, bytes or operations: an int, or a sympy expression."""

MATRIX, ATTENTION, VECTOR, LOOKUP, LINK, NOTHING = "matrix", "attention", "vector", "lookup", "link", "nothing"
HOST, DISK = "host", "disk"
PROCESSORS = "processors"
"""What does the work: matrix units, a fused attention, the rest of a device, its memory row by row, links between
ranks, what moves to and from a lower tier, named as that is, and the processors of a device's host."""


@dataclass(frozen=True)
class Work:
    """What one call does, on any machine.

    Attributes:
        family: of operators, in a word.
        unit: one of MATRIX, ATTENTION, VECTOR, LOOKUP, LINK, HOST, DISK, PROCESSORS and NOTHING.
        flops: floating-point operations, but for ``transcendentals``.
        transcendentals: exponentials, logarithms, sines and the like.
        read_bytes, written_bytes: memory traffic, each argument read once; of a lower tier, from it and to it.
        in_place: whether all that is written lies in memory that is in use already, as a rule what is read.
        in_arena: whether it lies in other memory that a CPU keeps in use, from step to step.
        dtype: that the operations are done in.
        shape: batch, m, n and k of a matrix product.
        collective: one of ``zgraph.hardware.KINDS``, whose ``read_bytes`` are those of the whole.
        world: ranks that a collective is among.
        together: how many of them share a node; as many as fit if None.
        is_known: whether a family claims the operator.
        num_operators: that are started; of a kernel, those of its body, for each slice of it.
        sliced_numel: elements that a kernel goes over slice by slice; 0 of all else.
        slice_numel: elements of a slice.
        in_loops: whether loops of a compiler on a CPU do it, of which ``flops`` and ``transcendentals`` are counted.
    """

    family: str
    unit: str = VECTOR
    flops: Size = 0
    transcendentals: Size = 0
    read_bytes: Size = 0
    written_bytes: Size = 0
    in_place: bool = False
    in_arena: bool = False
    dtype: torch.dtype = torch.float32
    shape: tuple[Size, ...] = ()
    collective: str = ""
    world: Size = 1
    together: int | None = None
    is_known: bool = True
    num_operators: int = 1
    sliced_numel: Size = 0
    slice_numel: int = SLICE
    in_loops: bool = False

    @property
    def num_calls(self) -> Size:
        """Calls that the host makes."""
        if self.unit == NOTHING:
            return 0
        return self.num_operators * (ceiling_of(self.sliced_numel / self.slice_numel) if self.sliced_numel != 0 else 1)

    @property
    def num_bytes(self) -> Size:
        """Memory traffic, both ways."""
        return self.read_bytes + self.written_bytes


FREE = Work("view", NOTHING)


def works(node: fx.Node, world: Size) -> tuple[Work, ...]:
    """What a call does; several works where it stands for several operators."""
    target = node.target
    if isinstance(target, Kernel):
        return (_kernel(node, target),)
    if isinstance(target, OwnedUpdate):
        return tuple(_owned(node, target, world))
    if target in ops.STARTS:
        return (_collective(node, world),)
    if (shares_memory(node) and not ops.may_write(target)) or ops.is_scalar_op(target) or target in _NOTHING:
        return (FREE,)
    target = ops.allocating(target)
    if target is ops.load:
        return (Work("load", ops.tier_of(node), read_bytes=num_bytes_of(node.meta["val"])),)
    if target in (ops.store, ops.spill):
        return (Work("store", ops.tier_of(node), written_bytes=num_bytes_of(operand(node).meta["val"])),)
    family = _FAMILIES.get(target)
    if family is not None:
        return tuple(family(node))
    if ops.is_elementwise(target) or ops.creates(target):
        return (_elementwise(node),)
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.reduction in target.tags:
        return (_reduction(node),)
    return (replace(_moving("unknown", node), is_known=False),)


# -- sizes ------------------------------------------------------------------------------------------------------


def size_of(number: Any) -> Size:
    """A dimension as an int, or as the expression that it stands for."""
    return number.node.expr if isinstance(number, torch.SymInt) else number


def numel(val: torch.Tensor) -> Size:
    """Elements of a tensor."""
    return _product(map(size_of, val.shape))


def num_bytes_of(val: Any) -> Size:
    """Bytes that reading a value touches: a dimension over which a tensor is expanded lies in memory once."""
    if isinstance(val, (tuple, list)):
        return sum(map(num_bytes_of, val))
    if not isinstance(val, torch.Tensor):
        return 0
    sizes = [(size_of(size), size_of(stride)) for size, stride in zip(val.shape, val.stride(), strict=True)]
    lies = [size for size, stride in sizes if stride != 0 or size == 0]
    return _product(lies) * val.dtype.itemsize


def _product(sizes: Iterable[Size]) -> Size:
    product: Size = 1
    for size in sizes:
        product = product * size
    return product


def _sources(node: fx.Node) -> Iterator[torch.Tensor]:
    """Values of the tensors that a call reads, each once; what it only writes over is none of them."""
    over = _outs(node)
    for source in node.all_input_nodes:
        if source not in over:
            yield from (val for val in _all(source.meta["val"]) if isinstance(val, torch.Tensor))


def _outs(node: fx.Node) -> set[Any]:
    """Arguments ``out`` that are there to be filled, and are not read elsewhere in the call."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return set()
    names = {argument.name for argument in node.target._schema.arguments if argument.is_out}
    if not names & node.kwargs.keys():
        return set()
    others: list[fx.Node] = []
    fx.map_arg((node.args, {k: v for k, v in node.kwargs.items() if k not in names}), others.append)
    return {node.kwargs[name] for name in names & node.kwargs.keys()} - set(others)


def _largest(node: fx.Node) -> Size:
    """Elements of the largest of a call's arguments and results that are tensors."""
    results = (val for val in _all(node.meta["val"]) if isinstance(val, torch.Tensor))
    return max(map(numel, (*results, *_sources(node))), default=0, key=_rank_of_size)


def _result(node: fx.Node) -> torch.Tensor:
    """The value of a call, or the first of several that is a tensor."""
    val = node.meta["val"]
    found: torch.Tensor = val if isinstance(val, torch.Tensor) else next(v for v in val if isinstance(v, torch.Tensor))
    return found


def _read_bytes(node: fx.Node) -> Size:
    return sum(map(num_bytes_of, _sources(node)))


def _moving(family: str, node: fx.Node) -> Work:
    """Reads all arguments and writes all results."""
    dtype = next((v.dtype for v in (_all(node.meta["val"])) if isinstance(v, torch.Tensor)), torch.float32)
    written, in_place = num_bytes_of(node.meta["val"]), ops.may_write(node.target)
    return Work(family, read_bytes=_read_bytes(node), written_bytes=written, in_place=in_place, dtype=dtype)


def _all(val: Any) -> Sequence[Any]:
    return val if isinstance(val, (tuple, list)) else (val,)


# -- families ---------------------------------------------------------------------------------------------------

_FAMILIES: dict[Any, Callable[[fx.Node], Iterable[Work]]] = {}


def _family(*targets: str) -> Callable[[Callable[[fx.Node], Iterable[Work]]], Callable[[fx.Node], Iterable[Work]]]:
    """Cost operators of ATen with a function: ``mm`` or ``mm.default`` for one overload, all of them if not said."""

    def register(function: Callable[[fx.Node], Iterable[Work]]) -> Callable[[fx.Node], Iterable[Work]]:
        for name in targets:
            packet, _, overload = name.partition(".")
            operators = getattr(aten, packet)
            for each in [overload] if overload else operators.overloads():
                _FAMILIES[getattr(operators, each)] = function
        return function

    return register


_NOTHING = frozenset({ops.wait, operator.getitem, aten.detach.default, aten.alias.default, aten.sym_size.int})

_OPERATIONS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("div", "reciprocal", "addcdiv", "remainder", "fmod"), (3, 0)),
    **dict.fromkeys(("sqrt", "rsqrt"), (8, 0)),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "erf", "erfc"), (0, 1)),
    **dict.fromkeys(("tanh", "atan2", "asin", "acos", "sinh", "cosh", "lgamma", "digamma", "erfinv", "pow"), (4, 1)),
    **dict.fromkeys(("sigmoid", "silu", "softplus", "gelu", "elu", "mish", "logit", "log_sigmoid_forward"), (5, 1)),
    **dict.fromkeys(("silu_backward", "softplus_backward", "elu_backward", "mish_backward"), (9, 1)),
    **dict.fromkeys(("gelu_backward",), (9, 2)),
    **dict.fromkeys(("sigmoid_backward", "tanh_backward", "addcmul", "lerp"), (2, 0)),
    **dict.fromkeys(("native_dropout", "bernoulli", "rand", "rand_like", "randint", "randperm", "uniform"), (10, 0)),
    **dict.fromkeys(("randn", "randn_like", "normal", "normal_functional", "exponential"), (10, 2)),
}
"""Additions and transcendental functions that an operator computes for each element; one addition if not said.

Divisions take about three additions on vector units, and roots about eight (Fog, instruction tables). A random number
from a counter-based generator takes ten rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
"""


def _operations(target: Any) -> tuple[int, int]:
    return (
        _OPERATIONS.get(target._opname.removesuffix("_"), (1, 0))
        if isinstance(target, torch._ops.OpOverload)
        else (1, 0)
    )


def _computing(work: Work, target: Any, count: Size) -> Work:
    """With what the operator computes for each of ``count`` elements."""
    flops, transcendentals = _operations(target)
    return replace(
        work, flops=work.flops + flops * count, transcendentals=work.transcendentals + transcendentals * count
    )


def _elementwise(node: fx.Node) -> Work:
    family = "fill" if ops.creates(node.target) else "elementwise"
    work = _moving(family, node)
    if family == "fill":
        return replace(work, read_bytes=0)  # of what it is created like, only the shape is read
    return _computing(work, node.target, numel(_result(node)))


def _reduction(node: fx.Node) -> Work:
    work = _moving("reduction", node)
    return replace(work, flops=sum(map(numel, _sources(node))))


def _kernel(node: fx.Node, target: Kernel) -> Work:
    """A fused kernel reads and writes each of its arguments once, and computes every operator of its body."""
    length = max((numel(val) for val in _sources(node)), default=0, key=_rank_of_size)
    work = replace(_moving("kernel", node), in_place=None not in target.writes)
    if isinstance(target, Region):
        return _region(work, node, target)
    if isinstance(target, HostKernel):
        return replace(work, unit=PROCESSORS)
    inner = [node for node in target.body.nodes if node.op == "call_function" and _is_vector(node.meta["val"])]
    for one in inner:
        flops, transcendentals = _operations(one.target)
        more = max(flops, _LEAST_IN_CACHE) * length
        work = replace(work, flops=work.flops + more, transcendentals=work.transcendentals + transcendentals * length)
    return replace(work, num_operators=len(inner), sliced_numel=length)


def _region(work: Work, node: fx.Node, target: Region) -> Work:
    """What its calls compute, without what they move; on a CPU, what its loops do.

    It is in place where all but small results are.
    """
    new = [val for val, write in zip(node.meta["val"], target.writes, strict=True) if write is None]
    work = replace(work, in_place=num_bytes_of(new) * _MANY < work.written_bytes)
    inner = [each for n in target.body.nodes if n.op == "call_function" for each in works(n, 1)]
    inner = [each for each in inner if each.unit != NOTHING]
    work = replace(work, is_known=all(each.is_known for each in inner), num_operators=len(inner))
    if target.operations is not None:
        operations, functions = target.operations
        return replace(work, flops=operations, transcendentals=functions, in_loops=True)
    return replace(
        work,
        flops=sum(each.flops for each in inner),
        transcendentals=sum(each.transcendentals for each in inner),
        in_loops=isinstance(target, InductorRegion),  # which are taken to be as fast as zgraph's own
    )


_MANY = 16
"""Times as much as what is small."""

_LEAST_IN_CACHE = 2
"""Additions that take a CPU as long as it takes to go over a slice that lies in its cache."""


def _is_vector(val: Any) -> bool:
    return isinstance(val, torch.Tensor) and val.dim() > 0


def _owned(node: fx.Node, target: OwnedUpdate, world: Size) -> Iterator[Work]:
    """The updates of the rank that has most to do; of all of them, where every rank computes all.

    A part's results are copied to their places. A result that has no memory yet is filled with zeros before.
    """
    is_divided = target.is_divided(tuple(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args))
    by_owner: dict[int, list[Work]] = {}
    for part in target.parts:
        mine = by_owner.setdefault(part.owner if is_divided else 0, [])
        for inner in part.body.nodes:
            if inner.op == "call_function":
                mine += [work for work in works(inner, world) if work.unit != NOTHING]
        for place, dtype in zip(part.gives, target.dtypes, strict=True):
            moved = _product(place.shape) * dtype.itemsize
            mine.append(Work("copy", read_bytes=moved, written_bytes=moved, in_place=True, dtype=dtype))
    for val, write in zip(node.meta["val"], target.writes, strict=True):
        if write is None:
            yield Work("fill", written_bytes=num_bytes_of(val), dtype=val.dtype)
    yield from max(by_owner.values(), key=lambda done: sum(work.num_bytes + work.flops / 100 for work in done))


def _collective(node: fx.Node, world: Size) -> Work:
    sent = operand(node).meta["val"]
    whole = num_bytes_of(sent)
    if node.target is ops.share:
        return Work("collective", LINK, collective="all_gather", world=world)  # a message, and no copy
    if node.target in (ops.all_gather, ops.all_gather_into):
        return Work("collective", LINK, read_bytes=whole * world, collective="all_gather", world=world)
    kinds: dict[Any, str] = {ops.reduce_scatter: "reduce_scatter", ops.all_to_all: "all_to_all"}
    kind = kinds.get(node.target, "all_reduce")
    return Work("collective", LINK, read_bytes=whole, collective=kind, world=world)


@_family("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "vdot", "addbmm", "addmv", "_scaled_mm", "_int_mm")
def _matmul(node: fx.Node) -> Iterable[Work]:
    """(batch, m, k) by (batch, k, n): 2 * batch * m * n * k operations; four times as many if complex."""
    first = int(node.target._opname.startswith(("add", "badd")))  # type: ignore[union-attr]
    left, right = (operand(node, index).meta["val"] for index in (first, first + 1))
    k = size_of(left.shape[-1])
    n = size_of(right.shape[-1]) if right.dim() > 1 else 1
    m = size_of(left.shape[-2]) if left.dim() > 1 else 1
    batch = size_of(left.shape[0]) if left.dim() == 3 else 1
    if left.dtype.is_complex:
        batch = 4 * batch
    yield _product_of_matrices("matmul", left.dtype, (batch, m, n, k), _read_bytes(node), num_bytes_of(_result(node)))


def _product_of_matrices(
    family: str, dtype: torch.dtype, shape: tuple[Size, ...], read_bytes: Size, written_bytes: Size
) -> Work:
    flops = 2 * _product(shape)
    return Work(family, MATRIX, flops, 0, read_bytes, written_bytes, dtype=dtype, shape=shape)


def _product_columns(node: fx.Node) -> Iterable[Work]:
    """A product; what it gives is copied to its columns where these do not follow each other. Others stay."""
    x, tile = operand(node, 1).meta["val"], operand(node, 2).meta["val"]
    shape = (1, size_of(x.shape[0]), size_of(tile.shape[1]), size_of(x.shape[1]))
    made = _product(shape[1:3]) * x.dtype.itemsize
    yield _product_of_matrices("matmul", x.dtype, shape, num_bytes_of(x) + num_bytes_of(tile), made)
    if node.args[3] != 1:
        yield Work("copy", read_bytes=made, written_bytes=made, dtype=x.dtype)


_FAMILIES[ops.product_columns] = _product_columns


@_family(
    "_scaled_dot_product_flash_attention.default",
    "_scaled_dot_product_flash_attention_for_cpu.default",
    "_scaled_dot_product_efficient_attention.default",
    "_scaled_dot_product_cudnn_attention.default",
    "_scaled_dot_product_fused_attention_overrideable.default",
)
def _attention(node: fx.Node) -> Iterable[Work]:
    """Two products over (queries, keys): 4 * batch * heads * queries * keys * width operations, half of it if causal.

    The scores have the width of queries and keys, and what they are multiplied with that of values.

    FlashAttention, Dao et al. 2022, section 3.1; the causal half as in FlashAttention-2's benchmarks.
    """
    yield _attends("attention", node, of_keys=1, of_values=1)


@_family(
    "_scaled_dot_product_flash_attention_backward.default",
    "_scaled_dot_product_flash_attention_for_cpu_backward.default",
    "_scaled_dot_product_efficient_attention_backward.default",
    "_scaled_dot_product_cudnn_attention_backward.default",
    "_scaled_dot_product_fused_attention_overrideable_backward.default",
)
def _attention_backward(node: fx.Node) -> Iterable[Work]:
    """Five products: the scores again, and one for each of the gradients of scores, query, key and value."""
    yield _attends("attention backward", node, of_keys=3, of_values=2)


def _attends(family: str, node: fx.Node, of_keys: int, of_values: int) -> Work:
    """So many products as wide as keys, and as values."""
    query, key, value = (ops.argument(node, name).meta["val"] for name in ("query", "key", "value"))
    *outer, queries, width = map(size_of, query.shape)
    each = 1 if ops.argument(node, "is_causal", default=False) else 2
    widths = of_keys * width + of_values * size_of(value.shape[-1])
    flops = each * _product(outer) * queries * size_of(key.shape[-2]) * widths
    return replace(_moving(family, node), unit=ATTENTION, flops=flops, dtype=query.dtype)


@_family("convolution.default")
def _convolution(node: fx.Node) -> Iterable[Work]:
    """As the product of unfolded patches and weights: 2 * out.numel * (channels in / groups) * kernel operations.

    Of a transposed one, every element of the input, not of the result, meets the kernel.
    """
    weight = ops.argument(node, "weight").meta["val"]
    many = operand(node).meta["val"] if ops.argument(node, "transposed") else _result(node)
    groups, pixels, n, inner = _convolves(many, weight, ops.argument(node, "groups", 1))
    moved = _moving("convolution", node)
    shape = (groups, pixels, n, inner)
    yield _product_of_matrices("convolution", weight.dtype, shape, moved.read_bytes, moved.written_bytes)


@_family("convolution_backward.default")
def _convolution_backward(node: fx.Node) -> Iterable[Work]:
    """As much as forward for each gradient that is asked for, of the input and of the weight; a sum for the bias.

    Each reads the gradient of the result; the input's reads the weight, too, and the weight's the input.
    """
    grad, inputs, weight = (ops.argument(node, name).meta["val"] for name in ("grad_output", "input", "weight"))
    many = inputs if ops.argument(node, "transposed") else grad
    groups, pixels, n, inner = _convolves(many, weight, ops.argument(node, "groups"))
    asked = ops.argument(node, "output_mask")
    read = num_bytes_of(grad)
    if asked[0]:
        size = (read + num_bytes_of(weight), num_bytes_of(inputs))
        yield _product_of_matrices("convolution", weight.dtype, (groups, pixels, inner, n), *size)
    if asked[1]:
        size = (read + num_bytes_of(inputs), num_bytes_of(weight))
        yield _product_of_matrices("convolution", weight.dtype, (groups, n, inner, pixels), *size)
    if asked[2]:
        written = size_of(grad.shape[1]) * grad.dtype.itemsize
        yield Work("reduction", flops=numel(grad), read_bytes=read, written_bytes=written, dtype=grad.dtype)


def _convolves(many: torch.Tensor, weight: torch.Tensor, groups: int) -> tuple[Size, Size, Size, Size]:
    """Groups, and of each the pixels that meet the kernel, its rows, and its columns, patches' sizes."""
    pixels = size_of(many.shape[0]) * _product(map(size_of, many.shape[2:]))
    return groups, pixels, size_of(weight.shape[0]) // groups, _product(map(size_of, weight.shape[1:]))


@_family("embedding.default", "index_select", "index.Tensor", "_unsafe_index.Tensor", "gather", "take")
def _lookup(node: fx.Node) -> Iterable[Work]:
    """Reads the indices, and of the table what it gives."""
    table = operand(node)
    indices = sum(num_bytes_of(source.meta["val"]) for source in node.all_input_nodes if source is not table)
    indices -= sum(num_bytes_of(out.meta["val"]) for out in _outs(node) if out is not table)
    written = num_bytes_of(node.meta["val"])
    yield Work("lookup", LOOKUP, read_bytes=written + indices, written_bytes=written, dtype=_result(node).dtype)


@_family("_embedding_bag.default", "_embedding_bag_forward_only.default")
def _bags(node: fx.Node) -> Iterable[Work]:
    """Reads a row of the table for every index, and adds up those of a bag."""
    table, indices = operand(node).meta["val"], operand(node, 1).meta["val"]
    count = numel(indices) * size_of(table.shape[1])
    read = _read_bytes(node) - num_bytes_of(table) + count * table.dtype.itemsize
    written = num_bytes_of(node.meta["val"])
    yield Work("lookup", LOOKUP, count, read_bytes=read, written_bytes=written, dtype=table.dtype)


@_family("_embedding_bag_backward.default", "_embedding_bag_dense_backward.default")
def _bags_backward(node: fx.Node) -> Iterable[Work]:
    """Fills the table's gradient with zeros, and adds to a row for every index."""
    table, indices = _result(node), operand(node, 1).meta["val"]
    count = numel(indices) * size_of(table.shape[1])
    rows, read = count * table.dtype.itemsize, _read_bytes(node)
    written = num_bytes_of(table) + rows
    yield Work("lookup backward", flops=count, read_bytes=read + rows, written_bytes=written, dtype=table.dtype)


@_family("embedding_dense_backward.default")
def _lookup_backward(node: fx.Node) -> Iterable[Work]:
    """Fills the table's gradient with zeros, and adds every row that was read to it."""
    grad, table = operand(node).meta["val"], _result(node)
    rows = numel(grad) * table.dtype.itemsize
    read, written = _read_bytes(node) + rows, num_bytes_of(table) + rows
    yield Work("lookup backward", flops=numel(grad), read_bytes=read, written_bytes=written, dtype=table.dtype)


_FAMILIES[ops.embedding_rows_backward] = _lookup_backward


@_family("index_put", "_unsafe_index_put", "index_add", "index_copy", "index_fill", "scatter", "scatter_add")
@_family("scatter_reduce", "slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter")
@_family("masked_scatter")
def _scattering(node: fx.Node) -> Iterable[Work]:
    """Copies what it writes into, and then writes the rest of its arguments over some of it, or adds them there."""
    work, into = _moving("scatter", node), operand(node)
    values = [ops.argument(node, name) for name in ("values", "src", "source")]
    placed = next((value for value in values if isinstance(value, fx.Node)), None)
    index = next((i for i in (ops.argument(node, "index"), ops.argument(node, "mask")) if isinstance(i, fx.Node)), None)
    if placed is not None:
        over = num_bytes_of(placed.meta["val"])
    elif index is not None:  # one number at every place, which may be a row
        rows = node.target._opname == "index_fill"  # type: ignore[union-attr]
        of_row = [
            size for dim, size in enumerate(into.meta["val"].shape) if dim != node.args[1] % into.meta["val"].dim()
        ]
        over = numel(index.meta["val"]) * into.meta["val"].dtype.itemsize
        over = over * _product(map(size_of, of_row)) if rows else over
    else:
        over = 0
    adds = "add" in node.target._opname or "reduce" in node.target._opname  # type: ignore[union-attr]
    adds = adds or bool(ops.argument(node, "accumulate")) or isinstance(ops.argument(node, "reduce"), str)
    read = work.read_bytes + over if adds else work.read_bytes
    yield replace(work, read_bytes=read, written_bytes=work.written_bytes + over)


@_family("slice_backward.default", "select_backward.default", "unfold_backward", "diagonal_backward.default")
def _spreading(node: fx.Node) -> Iterable[Work]:
    """Fills what it gives with zeros, and then writes its argument over some of it."""
    work = _moving("scatter", node)
    yield replace(work, written_bytes=work.written_bytes + work.read_bytes)


@_family("clone", "contiguous.default", "_to_copy", "cat", "stack", "reshape.default", "constant_pad_nd", "repeat")
@_family("roll", "flip", "tril", "triu", "lift_fresh_copy", "repeat_interleave", "masked_select", "diag_embed")
@_family("split_with_sizes_copy", "view_copy", "permute_copy", "transpose_copy", "expand_copy", "_reshape_copy.default")
def _copying(node: fx.Node) -> Iterable[Work]:
    """Reads what it copies and writes the copy."""
    yield _moving("copy", node)


@_family("as_strided_copy", "slice_copy", "select_copy", "narrow_copy", "unfold_copy", "diagonal_copy")
def _copying_a_part(node: fx.Node) -> Iterable[Work]:
    """Reads of a tensor no more than what it gives."""
    work = _moving("copy", node)
    yield replace(work, read_bytes=minimum(work.read_bytes, work.written_bytes))


@_family("copy")
def _copying_over(node: fx.Node) -> Iterable[Work]:
    """Gives its second argument in the shape and dtype of the first, of which it reads nothing."""
    read = num_bytes_of(operand(node, 1).meta["val"])
    yield replace(_moving("copy", node), read_bytes=read)


@_family("fill")
def _filling_with(node: fx.Node) -> Iterable[Work]:
    """Reads at most the number that it fills a tensor with."""
    value = node.args[1]
    read = num_bytes_of(value.meta["val"]) if isinstance(value, fx.Node) else 0
    yield replace(_moving("fill", node), read_bytes=read)


@_family(
    "arange", "linspace", "full", "zeros", "ones", "empty", "eye", "new_zeros", "new_ones", "new_full", "new_empty"
)
@_family("empty_like", "zeros_like", "ones_like", "full_like", "scalar_tensor", "tril_indices", "triu_indices", "zero")
@_family("empty_strided", "empty_permuted", "new_empty_strided", "logspace")
def _filling(node: fx.Node) -> Iterable[Work]:
    if "empty" in node.target._opname:  # type: ignore[union-attr]
        return (replace(FREE, family="fill"),)
    return (replace(_moving("fill", node), read_bytes=0),)


@_family("_softmax.default", "_log_softmax.default", "_safe_softmax.default", "_softmax_backward_data.default")
@_family("_log_softmax_backward_data.default", "logsumexp", "logcumsumexp")
def _softmax(node: fx.Node) -> Iterable[Work]:
    """An exponential, a maximum and a sum of each element; backward has an exponential only of a logarithm."""
    count = _largest(node)
    has_none = ops.allocating(node.target) is aten._softmax_backward_data.default
    yield replace(_moving("softmax", node), flops=4 * count, transcendentals=0 if has_none else count)


def _cross_entropy_backward(node: fx.Node) -> Iterable[Work]:
    """What its two operators do, of which the second reads from a cache what the first has written there."""
    logs = operand(node, 1).meta["val"]
    count = numel(logs)
    num_parts = ceiling_of(size_of(logs.shape[0]) / (ops.rows_at_once(logs) or 1))
    yield replace(_moving("softmax", node), flops=8 * count, transcendentals=count, num_operators=2 * num_parts)


_FAMILIES[ops.cross_entropy_backward] = _cross_entropy_backward


@_family("nll_loss_forward.default", "nll_loss2d_forward.default")
def _picking(node: fx.Node) -> Iterable[Work]:
    """Reads one element of each row, and which one."""
    source, target = operand(node).meta["val"], ops.argument(node, "target").meta["val"]
    read = num_bytes_of(target) + numel(target) * source.dtype.itemsize
    written = num_bytes_of(node.meta["val"])
    yield Work("loss", flops=numel(target), read_bytes=read, written_bytes=written, dtype=source.dtype)


@_family("nll_loss_backward.default", "nll_loss2d_backward.default", "mse_loss_backward.default", "mse_loss.default")
@_family("binary_cross_entropy", "binary_cross_entropy_backward", "smooth_l1_loss", "smooth_l1_loss_backward")
@_family("huber_loss", "huber_loss_backward", "binary_cross_entropy_with_logits", "soft_margin_loss")
def _loss(node: fx.Node) -> Iterable[Work]:
    """A few operations of each element.

    The gradient of a picked element needs no more than which one it was, and fills all of the result.
    """
    work, name = _moving("loss", node), node.target._opname  # type: ignore[union-attr]
    count = _largest(node)
    if "nll" in name:
        picked = (operand(node), ops.argument(node, "target"))
        work = replace(work, read_bytes=sum(num_bytes_of(each.meta["val"]) for each in picked))
    entropies = 2 * count if "entropy" in name and "backward" not in name else 0
    yield replace(work, flops=4 * count, transcendentals=entropies)


@_family(
    "native_layer_norm.default", "native_group_norm.default", "native_batch_norm.default", "_fused_rms_norm.default"
)
@_family("_native_batch_norm_legit", "_native_batch_norm_legit_functional.default", "cudnn_batch_norm.default")
@_family("_batch_norm_with_update_functional.default")
def _norm(node: fx.Node) -> Iterable[Work]:
    """A sum, a sum of squares, a difference, a product and an addition of each element."""
    yield replace(_moving("norm", node), flops=6 * numel(_result(node)))


@_family("native_layer_norm_backward.default", "native_group_norm_backward.default", "batch_norm_backward.default")
@_family("native_batch_norm_backward.default", "cudnn_batch_norm_backward.default", "_fused_rms_norm_backward.default")
def _norm_backward(node: fx.Node) -> Iterable[Work]:
    """Two sums over a row, two over its column, and six operations of each element."""
    yield replace(_moving("norm backward", node), flops=12 * numel(operand(node).meta["val"]))


@_family("native_dropout.default", "bernoulli", "rand", "randn", "randint", "rand_like", "randn_like", "randint_like")
@_family("native_dropout_backward.default", "normal", "uniform", "randperm", "multinomial.default", "normal_functional")
def _random(node: fx.Node) -> Iterable[Work]:
    """Numbers of a generator; of what they are to be like, only the shape is read."""
    work = _moving("random", node)
    name, overload = node.target._opname, node.target._overloadname  # type: ignore[union-attr]
    if name.endswith(("_like", "_functional")) or name == "uniform" or (name, overload) == ("bernoulli", "p"):
        work = replace(work, read_bytes=0)
    yield _computing(work, node.target, numel(_result(node)))


@_family("mkldnn_rnn_layer.default")
def _recurrent(node: fx.Node) -> Iterable[Work]:
    """A product with all inputs, and one after another with what each step gives to the next."""
    yield from _recurs(node, operand(node, 1), operand(node, 2), times=1)


@_family("mkldnn_rnn_layer_backward.default")
def _recurrent_backward(node: fx.Node) -> Iterable[Work]:
    """As much as forward for the gradients of inputs, and of weights."""
    yield from _recurs(node, operand(node, 1), operand(node, 2), times=2)


def _recurs(node: fx.Node, of_inputs: fx.Node, of_steps: fx.Node, times: int) -> Iterable[Work]:
    steps, batch, width = map(size_of, operand(node).meta["val"].shape)
    moved, dtype = _moving("recurrent", node), operand(node).meta["val"].dtype
    (gates, _), (_, hidden) = (map(size_of, weight.meta["val"].shape) for weight in (of_inputs, of_steps))
    yield _product_of_matrices(
        "recurrent", dtype, (times, steps * batch, gates, width), moved.read_bytes, moved.written_bytes
    )
    yield _product_of_matrices("recurrent", dtype, (times * steps, batch, gates, hidden), 0, 0)


@_family("topk.default", "sort", "argsort", "kthvalue.default", "median.dim")
def _sorting(node: fx.Node) -> Iterable[Work]:
    """A few passes over the rows, by radix."""
    yield replace(_moving("sort", node), flops=32 * sum(map(numel, _sources(node))))


@_family("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward")
@_family("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward")
@_family("upsample_bilinear2d", "upsample_bilinear2d_backward", "cumsum", "cumprod", "mean", "var_mean", "std_mean")
@_family("sum", "amax", "amin", "argmax", "argmin", "linalg_vector_norm", "norm", "var", "std", "any", "all", "prod")
@_family("max.dim", "min.dim", "max.default", "min.default", "_foreach_norm.Scalar")
def _reducing(node: fx.Node) -> Iterable[Work]:
    yield _reduction(node)


for _target in (ops.square_sum, ops.add_up, ops.max_over_ranks):
    _FAMILIES[_target] = _reducing


def _packing(node: fx.Node) -> Iterable[Work]:
    """A maximum, a scale and a rounding of each element (``zgraph.packed``, ``zgraph.quantized``)."""
    yield replace(_moving("pack", node), flops=12 * sum(map(numel, _sources(node))))


_QUANTIZING = (ops.quantize, ops.dequantize, ops.mean_of_quantized)

for _target in (ops.pack_state, ops.unpack_state, ops.elements, *_QUANTIZING):
    _FAMILIES[_target] = _packing


def _rank_of_size(size: Size) -> float:
    return float(size) if not isinstance(size, sympy.Basic) or size.is_number else float("inf")
