"""What a call of a program costs: operations and bytes on any machine, and seconds on a given one.

``works`` says what a call does, one function per family of operators; ``seconds`` says how long a machine takes for
it. Where shapes are symbolic (``torch.SymInt``), so are the answers: sympy expressions in the same symbols.

An operator of no family is costed by the bytes of its arguments and results, and marked as not known.
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
from zgraph.codegen.kernel import Kernel
from zgraph.codegen.owned import OwnedUpdate
from zgraph.curves import maximum
from zgraph.hardware import Hardware
from zgraph.liveness import shares_memory
from zgraph.program import Program, operand

aten = torch.ops.aten

Size = Any
"""A number of elements, bytes or operations: an int, or a sympy expression."""

MATRIX, ATTENTION, VECTOR, LOOKUP, LINK, NOTHING = "matrix", "attention", "vector", "lookup", "link", "nothing"
"""What does the work: matrix units, a fused attention, the rest of a device, its memory row by row, its links."""


@dataclass(frozen=True)
class Work:
    """What one call does, on any machine.

    Attributes:
        family: of operators, in a word.
        unit: one of MATRIX, ATTENTION, VECTOR, LOOKUP, LINK and NOTHING.
        flops: floating-point operations other than these:
        transcendentals: exponentials, logarithms, sines and the like.
        read_bytes, written_bytes: memory traffic, each argument read once.
        in_place: whether all that is written lies in memory that is in use already.
        dtype: that the operations are done in.
        shape: batch, m, n and k of a matrix product.
        collective: ``all_gather``, ``reduce_scatter`` or ``all_reduce``, whose ``read_bytes`` are those of the whole.
        world: ranks that a collective is among.
        is_known: whether a family claims the operator.
    """

    family: str
    unit: str = VECTOR
    flops: Size = 0
    transcendentals: Size = 0
    read_bytes: Size = 0
    written_bytes: Size = 0
    in_place: bool = False
    dtype: torch.dtype = torch.float32
    shape: tuple[Size, ...] = ()
    collective: str = ""
    world: Size = 1
    is_known: bool = True

    @property
    def num_bytes(self) -> Size:
        """Memory traffic, both ways."""
        return self.read_bytes + self.written_bytes


_FREE = Work("view", NOTHING)

_COUNTED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Dtypes whose arithmetic has a rate of its own; that of integers and booleans is taken to be as fast as float32's."""


@dataclass(frozen=True)
class Cost:
    """Seconds, operations and bytes of one call, and the works they come from."""

    seconds: Size
    works: tuple[Work, ...]

    @property
    def flops(self) -> Size:
        """Floating-point operations of matrix products, attention and vectors."""
        return sum(work.flops for work in self.works)

    @property
    def num_bytes(self) -> Size:
        """Memory traffic; of a collective, bytes of the whole tensor."""
        return sum(work.num_bytes for work in self.works)

    @property
    def num_calls(self) -> int:
        """Operators that are started."""
        return sum(work.unit != NOTHING for work in self.works)

    @property
    def is_known(self) -> bool:
        """Whether every operator in it belongs to a family."""
        return all(work.is_known for work in self.works)


class Costs:
    """Costs of a program's calls on a machine; equal calls are worked out once.

    Args:
        program: whose values say shapes and dtypes.
        hardware: the machine.
        world: ranks that collectives are among; those of the program's mesh if None. It may be a sympy symbol.
    """

    def __init__(self, program: Program, hardware: Hardware, world: Size | None = None) -> None:
        self._program, self._hardware = program, hardware
        self._world = program.mesh.size if world is None else world
        self._known: dict[Any, Cost] = {}

    def of(self, node: fx.Node) -> Cost:
        """What running ``node`` costs. A collective's cost is that of its start; to wait costs nothing by itself."""
        if node.op != "call_function":
            return Cost(0, (_FREE,))
        key = (self._program.form_of(node.meta["val"]), self._program.call_key(node))
        if key not in self._known:
            done = works(node, self._world)
            self._known[key] = Cost(sum(seconds(work, self._hardware) for work in done), done)
        return self._known[key]


def seconds(work: Work, hardware: Hardware) -> Size:
    """How long a machine takes for some work.

    The longer one of computing and of moving bytes (the roofline: Williams et al., CACM 52:4, 2009). The hardware's
    matrix rates include the bytes that a product moves. The overhead of starting an operator is not part of it: where
    operators are started ahead of time, only a timeline can tell what it costs.
    """
    if work.unit == NOTHING:
        return 0
    if work.unit == LINK:
        return hardware.collective_s(work.collective, work.read_bytes, work.world)
    if work.unit == MATRIX:
        return hardware.matmul_s(work.dtype, *work.shape)
    if work.unit == ATTENTION:
        return hardware.attention_s(work.dtype, work.flops, work.num_bytes)
    if work.unit == LOOKUP:
        return hardware.gather_s(work.num_bytes)
    dtype = work.dtype if work.dtype in _COUNTED else torch.float32
    computing = hardware.vector_s(dtype, work.flops) + hardware.transcendental_s(work.transcendentals)
    return maximum(hardware.memory_s(work.num_bytes, in_place=work.in_place), computing)


def works(node: fx.Node, world: Size) -> tuple[Work, ...]:
    """What a call does; several works where it stands for several operators."""
    target = node.target
    if isinstance(target, Kernel):
        return (_kernel(node, target),)
    if isinstance(target, OwnedUpdate):
        return tuple(_owned(target, world))
    if (shares_memory(node) and target is not ops.pack_state_into) or ops.is_scalar_op(target) or target in _NOTHING:
        return (_FREE,)
    if target in ops.STARTS:
        return (_collective(node, world),)
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
    lies = [size_of(size) for size, stride in zip(val.shape, val.stride(), strict=True) if size_of(stride) != 0]
    return _product(lies) * val.dtype.itemsize


def _product(sizes: Iterable[Size]) -> Size:
    product: Size = 1
    for size in sizes:
        product = product * size
    return product


def _sources(node: fx.Node) -> Iterator[torch.Tensor]:
    """Values of the tensors that a call reads, each once."""
    for source in node.all_input_nodes:
        if isinstance(source.meta["val"], torch.Tensor):
            yield source.meta["val"]


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
    return Work(family, read_bytes=_read_bytes(node), written_bytes=num_bytes_of(node.meta["val"]), dtype=dtype)


def _all(val: Any) -> Sequence[Any]:
    return val if isinstance(val, (tuple, list)) else (val,)


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the operator's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    index = names.index(name) if name in names else len(node.args)
    return node.args[index] if index < len(node.args) else default


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
    **dict.fromkeys(("div", "reciprocal", "sqrt", "rsqrt", "addcdiv", "remainder", "fmod"), (4, 0)),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "erf", "erfc"), (0, 1)),
    **dict.fromkeys(("tanh", "atan2", "asin", "acos", "sinh", "cosh", "lgamma", "digamma", "erfinv", "pow"), (4, 1)),
    **dict.fromkeys(("sigmoid", "silu", "softplus", "gelu", "elu", "mish", "logit", "log_sigmoid_forward"), (5, 1)),
    **dict.fromkeys(("silu_backward", "softplus_backward", "elu_backward", "mish_backward"), (9, 1)),
    **dict.fromkeys(("gelu_backward",), (9, 2)),
    **dict.fromkeys(("sigmoid_backward", "tanh_backward", "addcmul", "lerp"), (3, 0)),
    **dict.fromkeys(("native_dropout", "bernoulli", "rand", "rand_like", "randint", "randperm", "uniform"), (10, 0)),
    **dict.fromkeys(("randn", "randn_like", "normal", "normal_functional", "exponential"), (10, 2)),
}
"""Additions and transcendental functions that an operator computes for each element; one addition if not said.

Divisions and roots take about four additions on vector units (Fog, instruction tables). A random number from a
counter-based generator takes ten rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
"""


def _operations(target: Any) -> tuple[int, int]:
    return _OPERATIONS.get(target._opname, (1, 0)) if isinstance(target, torch._ops.OpOverload) else (1, 0)


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
    for inner in target.body.nodes:
        if inner.op == "call_function" and isinstance(inner.meta["val"], torch.Tensor) and inner.meta["val"].dim():
            work = _computing(work, inner.target, length)
    return work


def _owned(target: OwnedUpdate, world: Size) -> Iterator[Work]:
    """The updates of the rank that has most to do, where each parameter is updated by one rank."""
    by_owner: dict[int, list[Work]] = {}
    for part in target.parts:
        mine = by_owner.setdefault(part.owner, [])
        for inner in part.body.nodes:
            if inner.op == "call_function":
                mine += [work for work in works(inner, world) if work.unit != NOTHING]
    yield from max(by_owner.values(), key=lambda done: sum(work.num_bytes + work.flops / 100 for work in done))


def _collective(node: fx.Node, world: Size) -> Work:
    sent = operand(node).meta["val"]
    whole = num_bytes_of(sent)
    if node.target in (ops.all_gather, ops.all_gather_into):
        return Work("collective", LINK, read_bytes=whole * world, collective="all_gather", world=world)
    kind = "reduce_scatter" if node.target is ops.reduce_scatter else "all_reduce"
    return Work("collective", LINK, read_bytes=whole, collective=kind, world=world)


@_family(
    "mm.default", "addmm.default", "bmm.default", "baddbmm.default", "mv.default", "dot.default", "addbmm", "addmv"
)
def _matmul(node: fx.Node) -> Iterable[Work]:
    """(batch, m, k) by (batch, k, n): 2 * batch * m * n * k operations."""
    tensors = [source for source in node.args if isinstance(source, fx.Node)]
    left, right = (tensor.meta["val"] for tensor in tensors[-2:])
    out = _result(node)
    k = size_of(left.shape[-1])
    n = size_of(right.shape[-1]) if right.dim() > 1 else 1
    m = size_of(left.shape[-2]) if left.dim() > 1 else 1
    batch = size_of(left.shape[0]) if left.dim() == 3 else 1
    yield _product_of_matrices("matmul", out.dtype, (batch, m, n, k), _read_bytes(node), num_bytes_of(out))


def _product_of_matrices(
    family: str, dtype: torch.dtype, shape: tuple[Size, ...], read_bytes: Size, written_bytes: Size
) -> Work:
    flops = 2 * _product(shape)
    return Work(family, MATRIX, flops, 0, read_bytes, written_bytes, dtype=dtype, shape=shape)


@_family(
    "_scaled_dot_product_flash_attention.default",
    "_scaled_dot_product_flash_attention_for_cpu.default",
    "_scaled_dot_product_efficient_attention.default",
    "_scaled_dot_product_cudnn_attention.default",
)
def _attention(node: fx.Node) -> Iterable[Work]:
    """Two products over (queries, keys): 4 * batch * heads * queries * keys * width operations, half of it if causal.

    FlashAttention, Dao et al. 2022, section 3.1; the causal half as in FlashAttention-2's benchmarks.
    """
    yield _attends("attention", node, num_products=2)


@_family(
    "_scaled_dot_product_flash_attention_backward.default",
    "_scaled_dot_product_flash_attention_for_cpu_backward.default",
    "_scaled_dot_product_efficient_attention_backward.default",
    "_scaled_dot_product_cudnn_attention_backward.default",
)
def _attention_backward(node: fx.Node) -> Iterable[Work]:
    """Five products: the scores again, and one for each of the gradients of scores, query, key and value."""
    yield _attends("attention backward", node, num_products=5)


def _attends(family: str, node: fx.Node, num_products: int) -> Work:
    query, key = (_argument(node, name).meta["val"] for name in ("query", "key"))
    *outer, queries, width = map(size_of, query.shape)
    flops = 2 * num_products * _product(outer) * queries * size_of(key.shape[-2]) * width
    if _argument(node, "is_causal", default=False):
        flops = flops / 2 if isinstance(flops, sympy.Basic) else flops // 2
    return replace(_moving(family, node), unit=ATTENTION, flops=flops, dtype=query.dtype)


@_family("convolution.default")
def _convolution(node: fx.Node) -> Iterable[Work]:
    """As the product of unfolded patches and weights: 2 * out.numel * (channels in / groups) * kernel operations."""
    weight, out, groups = _argument(node, "weight").meta["val"], _result(node), _argument(node, "groups", 1)
    yield _convolves(node, out if not _argument(node, "transposed") else operand(node).meta["val"], weight, groups)


@_family("convolution_backward.default")
def _convolution_backward(node: fx.Node) -> Iterable[Work]:
    """As much as forward for each gradient that is asked for: of the input and of the weight."""
    grad, weight, groups = operand(node).meta["val"], _argument(node, "weight").meta["val"], _argument(node, "groups")
    source = _argument(node, "input").meta["val"] if _argument(node, "transposed") else grad
    for wanted in _argument(node, "output_mask")[:2]:
        if wanted:
            yield _convolves(node, source, weight, groups)


def _convolves(node: fx.Node, out: torch.Tensor, weight: torch.Tensor, groups: int) -> Work:
    n, inner = size_of(weight.shape[0]) // groups, _product(map(size_of, weight.shape[1:]))
    moved, shape = _moving("convolution", node), (groups, numel(out) / size_of(weight.shape[0]), n, inner)
    return _product_of_matrices("convolution", weight.dtype, shape, moved.read_bytes, moved.written_bytes)


@_family(
    "embedding.default", "index_select.default", "index.Tensor", "gather.default", "take", "_embedding_bag.default"
)
def _lookup(node: fx.Node) -> Iterable[Work]:
    """Reads the indices, and of the table what it gives."""
    written = num_bytes_of(node.meta["val"])
    indices = sum(num_bytes_of(val) for val in _sources(node) if not val.dtype.is_floating_point)
    yield Work("lookup", LOOKUP, read_bytes=written + indices, written_bytes=written)


@_family("embedding_dense_backward.default")
def _lookup_backward(node: fx.Node) -> Iterable[Work]:
    """Fills the table's gradient with zeros, and adds every row that was read to it."""
    rows, table = num_bytes_of(operand(node).meta["val"]), num_bytes_of(node.meta["val"])
    flops = numel(operand(node).meta["val"])
    yield Work(
        "lookup backward", flops=flops, read_bytes=2 * rows, written_bytes=table + rows, dtype=_result(node).dtype
    )


@_family("index_put", "index_add", "scatter", "scatter_add", "scatter_reduce", "slice_scatter", "select_scatter")
@_family("_unsafe_index_put.default", "masked_scatter", "slice_backward.default", "select_backward.default")
def _scattering(node: fx.Node) -> Iterable[Work]:
    """Copies what it writes into, and writes over some of it."""
    yield _moving("scatter", node)


@_family("clone.default", "contiguous.default", "_to_copy.default", "copy.default", "cat.default", "stack.default")
@_family(
    "reshape.default",
    "constant_pad_nd.default",
    "repeat",
    "roll",
    "flip",
    "tril",
    "triu",
    "index_copy",
    "lift_fresh_copy",
)
@_family(
    "repeat_interleave", "masked_select", "as_strided_copy", "unfold_backward", "split_with_sizes_copy", "diag_embed"
)
def _copying(node: fx.Node) -> Iterable[Work]:
    """Reads what it copies and writes the copy: where it takes a part of a tensor, as much as it writes."""
    work = _moving("copy", node)
    yield work


@_family(
    "arange", "linspace", "full", "zeros", "ones", "empty", "eye", "new_zeros", "new_ones", "new_full", "new_empty"
)
@_family("empty_like", "zeros_like", "ones_like", "full_like", "scalar_tensor")
def _filling(node: fx.Node) -> Iterable[Work]:
    if "empty" in node.target._opname:  # type: ignore[union-attr]
        return (replace(_FREE, family="fill"),)
    return (replace(_moving("fill", node), read_bytes=0),)


@_family("_softmax.default", "_log_softmax.default", "_safe_softmax.default", "_softmax_backward_data.default")
@_family("_log_softmax_backward_data.default", "logsumexp", "logcumsumexp")
def _softmax(node: fx.Node) -> Iterable[Work]:
    """An exponential, a maximum and a sum of each element."""
    count = numel(_result(node))
    yield replace(_moving("softmax", node), flops=4 * count, transcendentals=count)


@_family("nll_loss_forward.default", "nll_loss2d_forward.default")
def _picking(node: fx.Node) -> Iterable[Work]:
    """Reads one element of each row."""
    target = _argument(node, "target").meta["val"]
    yield Work("loss", read_bytes=2 * num_bytes_of(target), written_bytes=num_bytes_of(node.meta["val"]))


@_family("nll_loss_backward.default", "nll_loss2d_backward.default", "mse_loss_backward.default", "mse_loss.default")
@_family("binary_cross_entropy", "binary_cross_entropy_backward", "smooth_l1_loss", "smooth_l1_loss_backward")
@_family("huber_loss", "huber_loss_backward")
def _loss(node: fx.Node) -> Iterable[Work]:
    """Of what it writes it fills all; the gradient of a picked element needs no more than which one it was."""
    work = _moving("loss", node)
    if "nll" in node.target._opname:  # type: ignore[union-attr]
        work = replace(work, read_bytes=num_bytes_of(_argument(node, "target").meta["val"]))
    yield replace(work, flops=numel(_result(node)))


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
    yield _computing(_moving("random", node), node.target, numel(_result(node)))


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
    """A maximum, a scale and a rounding of each element (``zgraph.packed``)."""
    yield replace(_moving("pack", node), flops=12 * sum(map(numel, _sources(node))))


for _target in (ops.pack_state, ops.pack_state_into, ops.unpack_state, ops.elements):
    _FAMILIES[_target] = _packing


def _rank_of_size(size: Size) -> float:
    return float(size) if not isinstance(size, sympy.Basic) or size.is_number else float("inf")
