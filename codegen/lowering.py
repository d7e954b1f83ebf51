"""Write a region's operators in the words of loops (``zgraph.codegen.ir``).

Elementwise operators are themselves. Norms, softmax, losses and activations are written with them and with sums over
rows, in the dtype that ATen computes them in. What is not known here, and whatever cuts its tensors elsewhere than at
rows of one length, is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen import ir
from zgraph.codegen.elementwise import COMPARISONS, FORM, OPMATH, Writer
from zgraph.codegen.ir import CannotWriteError, Level, Loops, Sizes, Store, along, form, level_of, refined
from zgraph.program import copy_graph

aten = torch.ops.aten


def lower(body: fx.Graph, writer: type[Writer]) -> Loops:
    """A region in loops.

    Args:
        body: calls of ATen on tensors; the output's argument is the list of results, none of them a view.
        writer: of the language that it will be printed in, which knows what it has.

    Raises:
        CannotWriteError: with what there are no words for.
    """
    return _Lowering(_as_it_lies(body), writer).run()


def _as_it_lies(body: fx.Graph) -> fx.Graph:
    """A body whose results lie row by row, if need be with dimensions in the order in which they lie in memory.

    Elementwise operators on one shape compute the same in any order: an operator on a transposed tensor gives one that
    lies as its argument does.
    """
    results: Any = body.output_node().args[0]
    val = results[0].meta["val"]
    if not isinstance(val, torch.Tensor) or val.is_contiguous():
        return body
    calls = [node for node in body.nodes if node.op == "call_function"]
    if not all(ops.is_elementwise(node.target) and _shapes(node) == [tuple(val.shape)] for node in calls):
        return body
    order = sorted(range(val.dim()), key=val.stride().__getitem__, reverse=True)
    turned = copy_graph(body)
    for node in turned.nodes:
        own = node.meta.get("val")
        if isinstance(own, torch.Tensor) and own.dim():
            node.meta["val"] = own.expand(val.shape).permute(order)
    return turned


@dataclass(frozen=True)
class _Columns:
    """The sum over all rows of what each element is: one number for each column."""

    value: fx.Node


_EXACT = 2**24
"""Integers up to this have a value in float32, as which constants are written."""


class _Lowering:
    def __init__(self, body: fx.Graph, writer: type[Writer]) -> None:
        self.body, self.writer = body, writer
        calls = [node for node in body.nodes if node.op == "call_function"]
        shapes = [shape for node in calls for each in (node, *node.all_input_nodes) for shape in _shapes(each)]
        self.numel = max(map(math.prod, shapes), default=0)
        lengths = {length for node in calls if (length := _row_length(node)) is not None}
        if len(lengths) > 1:
            raise CannotWriteError(f"it has rows of {' and of '.join(map(str, sorted(lengths)))} elements")
        self.columns = next(iter(lengths), None)
        self.rows = self.numel // (self.columns or self.numel or 1)
        if self.numel < 2 or self.columns == 1 or (self.columns is not None and self.rows < 2):
            raise CannotWriteError("it has no rows of several elements")
        cut = [shape for shape in shapes if math.prod(shape) == self.numel]
        if self.columns is not None:
            cut.append((self.rows, self.columns))
            cut += [(*shape, self.columns) for shape in shapes if math.prod(shape) == self.rows]
        self.loops = Loops(refined(cut, self.numel), self.columns is not None)
        self.column_dims = 0  # how many of the loops are over the columns of a row
        while self.columns is not None and math.prod(self.loops.sizes[-1 - self.column_dims :]) <= self.columns:
            self.column_dims += 1
        results: Any = body.output_node().args[0]
        self.device = results[0].meta["val"].device
        self.values: dict[fx.Node, Any] = {}
        self.exponentials: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # of a log-softmax, and what they add up to
        self.spread: dict[fx.Node, fx.Node] = {}  # rows of zeros but for one value, and that value
        self._made: dict[Any, fx.Node] = {}
        self._index = {node: index for index, node in enumerate(body.find_nodes(op="placeholder"))}

    def run(self) -> Loops:
        for node in self.body.nodes:
            if node.op == "call_function":
                self.values[node] = self.lowered(node)
        results: Any = self.body.output_node().args[0]
        for place, result in enumerate(results):
            self.store(result, place)
        kept = set(ir.computed_of(store.value for store in self.loops.stores))
        while summed := set(ir.computed_of(n for t in kept if t.target is ir.total for n in t.all_input_nodes)) - kept:
            kept |= summed
        for node in reversed(self.loops.body.nodes):
            if node not in kept:
                self.loops.body.erase_node(node)
                self.loops.strides.pop(node, None)
                self.loops.inputs.pop(node, None)
        for node, strides in self.loops.strides.items():
            if level_of(node) is Level.ELEMENT and strides[-1] not in (0, 1):
                raise CannotWriteError("it reads along a row what lies apart")
        self.loops.merge()
        if self.column_dims and self.loops.num_columns != self.columns:
            raise CannotWriteError("a row of what it reads lies in several places")
        return self.loops

    def lowered(self, node: fx.Node) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if ops.is_view(target):
            return self.view(node)
        known = _KNOWN.get(target)
        if known is not None:
            return known(self, node)
        if ops.creates(target):
            return self.filled(node)
        if not ops.is_elementwise(target) or not isinstance(node.meta["val"], torch.Tensor):
            raise CannotWriteError(f"there is no {target}")
        shape = tuple(node.meta["val"].shape)
        args = [self.read(arg, shape) for arg in node.args]
        read = {arg.meta["val"].dtype for arg in args if isinstance(arg, fx.Node)}
        if target.overloadpacket in COMPARISONS and len(read) > 1:
            raise CannotWriteError("it compares dtypes that differ")
        kwargs = {k: self.read(v, shape) for k, v in node.kwargs.items() if k not in FORM}
        return self.call(target, *args, dtype=node.meta["val"].dtype, **kwargs)

    # -- values ---------------------------------------------------------------------------------------------

    def read(self, arg: Any, shape: Sequence[int]) -> Any:
        """An argument of what has a shape, to which it is broadcast."""
        if not isinstance(arg, fx.Node):
            return arg
        val = arg.meta["val"]
        if arg in self.values:
            value = self.values[arg]
            if not isinstance(value, fx.Node):
                raise CannotWriteError("a sum over all rows is read again")
            own = tuple(val.shape)
            if level_of(value) and own != tuple(shape) and not self.is_broadcast(own, shape):
                raise CannotWriteError("a value is broadcast other than over the columns of rows")
            return value
        if not isinstance(val, torch.Tensor) or val.dim() == 0:
            return self.load(arg, Level.NUMBER, ())
        numel, strides = math.prod(shape), _broadcast(val, shape)
        if numel == self.numel:
            found = along(self.loops.sizes, shape, strides)
            if self.column_dims and not any(found[-self.column_dims :]):
                return self.load(arg, Level.ROW, found)
            return self.load(arg, Level.ELEMENT, found)
        if numel == self.rows and self.columns is not None:
            return self.load(arg, Level.ROW, along(self.loops.sizes, (*shape, self.columns), (*strides, 0)))
        raise CannotWriteError("it reads what is neither of elements nor of rows")

    def is_broadcast(self, own: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether numbers of rows are broadcast along all of their columns."""
        padded = (1,) * (len(shape) - len(own)) + tuple(own)
        if math.prod(own) != self.rows or math.prod(shape) != self.numel:
            return False
        border = next((i for i in range(len(shape) + 1) if math.prod(shape[i:]) == self.columns), None)
        return border is not None and padded[:border] == tuple(shape[:border]) and math.prod(padded[border:]) == 1

    def load(self, arg: fx.Node, level: Level, strides: Sizes) -> fx.Node:
        key = (arg, level, strides)
        if key not in self._made:
            val = arg.meta["val"]
            node = self.loops.body.placeholder(f"load{len(self._made)}")
            is_tensor = isinstance(val, torch.Tensor)
            node.meta["val"] = form(val.dtype if is_tensor else torch.float64, 1 if level else 0)
            node.meta["level"] = level
            if is_tensor and val.device == self.device:
                self.loops.in_memory.add(node)
            self.loops.inputs[node] = self._index[arg]
            if level:
                if val.dtype not in self.writer.dtypes:
                    raise CannotWriteError(f"it reads {val.dtype}")
                self.loops.strides[node] = strides
            self._made[key] = node
        return self._made[key]

    def call(self, target: Any, *args: Any, dtype: torch.dtype, level: Level | None = None, **kwargs: Any) -> fx.Node:
        """A call on single values."""
        given = tuple(repr(arg) if isinstance(arg, float) else arg for arg in args)  # 0.0 == -0.0
        key = (target, given, dtype, level, tuple(sorted(kwargs.items())))
        try:
            known = self._made.get(key)
        except TypeError:  # an argument is a list
            known = None
        if known is not None:
            return known
        node = self.loops.body.call_function(target, args, kwargs)
        levels = [level_of(source) for source in node.all_input_nodes]
        node.meta["level"] = max(levels, default=Level.NUMBER) if level is None else level
        node.meta["val"] = form(dtype)
        if dtype not in self.writer.dtypes or (isinstance(target, torch._ops.OpOverload) and not self.can_call(node)):
            raise CannotWriteError(f"there is no {target} of {dtype}")
        if all(not isinstance(arg, list) for arg in args):
            self._made[key] = node
        return node

    def can_call(self, node: fx.Node) -> bool:
        return self.writer.can_call(node)

    def cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(aten._to_copy.default, value, dtype=dtype)

    def wide(self, value: fx.Node) -> fx.Node:
        """A value in the dtype that ATen computes with."""
        dtype = value.meta["val"].dtype
        return self.cast(value, OPMATH.get(dtype, dtype))

    def math(self, packet: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """An operator on values of one dtype, which its result has, too."""
        dtype = next(arg.meta["val"].dtype for arg in args if isinstance(arg, fx.Node))
        both = sum(isinstance(arg, fx.Node) for arg in args) > 1
        overload = next(name for name in (("Tensor", "default") if both else _ALONE) if name in packet.overloads())
        return self.call(getattr(packet, overload), *args, dtype=dtype, **kwargs)

    def as_value(self, number: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A number that is read, as a tensor of a dtype."""
        return self.call(aten._to_copy.default, number, dtype=dtype) if number.op == "placeholder" else number

    def reduced(self, target: Any, value: fx.Node) -> fx.Node:
        if value in self.spread and target is ir.row_sum:
            return self.spread[value]
        if level_of(value) is not Level.ELEMENT:
            raise CannotWriteError("a row is one number already")
        return self.call(target, value, dtype=value.meta["val"].dtype, level=Level.ROW)

    def mean(self, value: fx.Node) -> fx.Node:
        return self.math(aten.div, self.reduced(ir.row_sum, value), float(self.columns or 1))

    def total(self, value: fx.Node) -> fx.Node:
        if level_of(value) is Level.ELEMENT:
            value = self.reduced(ir.row_sum, value)
        return self.call(ir.total, value, dtype=value.meta["val"].dtype, level=Level.NUMBER)

    # -- operators ------------------------------------------------------------------------------------------

    def view(self, node: fx.Node) -> Any:
        source = ops.view_of(node)
        if source not in self.values or node.target not in _RESHAPES:
            raise CannotWriteError(f"it has {node.target} of what is not in memory")
        value, shape, own = self.values[source], tuple(node.meta["val"].shape), tuple(source.meta["val"].shape)
        is_same = math.prod(shape) == math.prod(own)
        if not is_same and isinstance(value, fx.Node) and level_of(value) and not self.is_broadcast(own, shape):
            raise CannotWriteError("a value is broadcast other than over the columns of rows")
        return value

    def filled(self, node: fx.Node) -> fx.Node:
        val, given = node.meta["val"], list(node.args)
        at = 2 if node.target is aten.new_full.default else 1
        value: Any = given[at] if node.target in _FULL else 1.0 if "ones" in str(node.target) else 0.0
        is_exact = val.dtype.is_floating_point or isinstance(value, fx.Node) or abs(value) <= _EXACT
        if isinstance(value, fx.Node) or val.dtype is torch.bool or not is_exact:
            raise CannotWriteError(f"there is no {node.target}")
        levels = {self.numel: Level.ELEMENT, 1: Level.NUMBER}
        if self.columns is not None:
            levels[self.rows] = Level.ROW
        if val.numel() not in levels:
            raise CannotWriteError("it fills what is neither of elements nor of rows")
        return self.call(aten.full.default, 0, value, dtype=val.dtype, level=levels[val.numel()])

    def store(self, result: fx.Node, place: int) -> None:
        value, val = self.values[result], result.meta["val"]
        if not val.is_contiguous():
            raise CannotWriteError("its result does not lie row by row")
        if val.dtype not in self.writer.dtypes:
            raise CannotWriteError(f"it gives {val.dtype}")
        if isinstance(value, _Columns):
            if level_of(value.value) is not Level.ELEMENT:
                raise CannotWriteError("it adds up over all rows what is not of elements")
            self.loops.stores.append(Store(value.value, place, val.dtype, over_rows=True))
            return
        sizes = {Level.ELEMENT: self.numel, Level.ROW: self.rows, Level.NUMBER: 1}
        if sizes[level_of(value)] != val.numel() or value.meta["val"].dtype != val.dtype:
            raise CannotWriteError("its result is broadcast")
        self.loops.stores.append(Store(value, place, val.dtype))

    def elements(self, node: fx.Node, index: int = 0) -> fx.Node:
        """An argument that is of elements, of its own shape."""
        arg: Any = node.args[index]
        value = self.read(arg, tuple(arg.meta["val"].shape))
        assert isinstance(value, fx.Node)
        return value


_ALONE = ("default", "Scalar", "Tensor_Scalar", "Tensor")
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)
_RESHAPES = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.alias.default,
        aten.detach.default, aten.contiguous.default,
    }
)  # fmt: skip
"""Views of the same elements in the same order, or of each of them several times."""


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    val = node.meta["val"]
    return [tuple(v.shape) for v in (val if isinstance(val, (tuple, list)) else (val,)) if isinstance(v, torch.Tensor)]


def _broadcast(val: torch.Tensor, shape: Sequence[int]) -> list[int]:
    """The strides of a tensor as if it had a shape that it is broadcast to."""
    missing = len(shape) - val.dim()
    strides = [0] * missing
    for size, stride, wanted in zip(val.shape, val.stride(), shape[missing:], strict=True):
        if size not in (1, wanted):
            raise CannotWriteError("it reads what has another shape")
        strides.append(0 if size == 1 else stride)
    return strides


# -- what a row is -----------------------------------------------------------------------------------------------


def _row_length(node: fx.Node) -> int | None:
    """How many elements a row has that a call works on; None if it does not work on rows."""
    if node.target in _NORMS:
        return math.prod(node.args[_NORMS[node.target]])  # type: ignore[arg-type]
    source: Any = node.all_input_nodes[0].meta["val"] if node.all_input_nodes else None
    if node.target in _BY_DIM:
        dim: Any = node.args[_BY_DIM[node.target]]
        if not source.dim() or dim % source.dim() != source.dim() - 1:
            raise CannotWriteError("its rows are not those of the last dimension")
        return int(source.shape[-1])
    if node.target in _LOSSES:
        scores: Any = node.args[_LOSSES[node.target]]
        return int(scores.meta["val"].shape[-1])
    if node.target in _SUMS:
        dims, num_dims = _dims(node), source.dim()
        if dims == list(range(num_dims - len(dims), num_dims)) and len(dims) < num_dims:
            return int(math.prod(source.shape[num_dims - len(dims) :]))
        if dims == list(range(len(dims))) and 0 < len(dims) < num_dims:
            return int(math.prod(source.shape[len(dims) :]))
        raise CannotWriteError("it adds up neither rows nor columns")
    return None


def _dims(node: fx.Node) -> list[int]:
    """The dimensions that a sum is over, in order."""
    num_dims = node.all_input_nodes[0].meta["val"].dim()
    if not num_dims:
        raise CannotWriteError("it adds up a single number")
    given: Any = node.args[1] if len(node.args) > 1 else None
    return sorted(dim % num_dims for dim in given) if given else list(range(num_dims))


# -- operators that are made of others ---------------------------------------------------------------------------


def _sum(lo: _Lowering, node: fx.Node) -> Any:
    source: Any = node.args[0]
    value = lo.elements(node)
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point or not value.meta["val"].dtype.is_floating_point:
        raise CannotWriteError(f"it adds up {value.meta['val'].dtype}")
    if lo.wide(value).meta["val"].dtype.itemsize < dtype.itemsize:
        raise CannotWriteError(f"it adds up in {dtype}")
    dims, num_dims = _dims(node), source.meta["val"].dim()
    is_mean = node.target is aten.mean.dim
    if dims[0] == 0:
        if is_mean or source.meta["val"].numel() != lo.numel:
            raise CannotWriteError("it adds up what is not of elements")
        return _Columns(value)
    if math.prod(source.meta["val"].shape[num_dims - len(dims) :]) != lo.columns:
        raise CannotWriteError("it adds up parts of rows")
    wide = lo.wide(value)
    return lo.cast(lo.mean(wide) if is_mean else lo.reduced(ir.row_sum, wide), dtype)


def _layer_norm(lo: _Lowering, node: fx.Node) -> Any:
    source, _, weight, bias, eps = node.args
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    x = lo.wide(lo.elements(node))
    mean = lo.mean(x)
    centred = lo.math(aten.sub, x, mean)
    variance = lo.mean(lo.math(aten.mul, centred, centred))
    scale = lo.math(aten.rsqrt, lo.math(aten.add, variance, eps))
    y = lo.math(aten.mul, centred, scale)
    if weight is not None:
        y = lo.math(aten.mul, y, lo.wide(lo.read(weight, shape)))
    if bias is not None:
        y = lo.math(aten.add, y, lo.wide(lo.read(bias, shape)))
    return tuple(lo.cast(v, val.dtype) for v, val in zip((y, mean, scale), node.meta["val"], strict=True))


def _layer_norm_backward(lo: _Lowering, node: fx.Node) -> Any:
    source, mean, scale, weight = (node.args[i] for i in (1, 3, 4, 5))
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    gradient = lo.wide(lo.elements(node))
    x, mean, scale = (lo.wide(lo.read(each, shape)) for each in (source, mean, scale))
    normal = lo.math(aten.mul, lo.math(aten.sub, x, mean), scale)
    of_normal = gradient if weight is None else lo.math(aten.mul, gradient, lo.wide(lo.read(weight, shape)))
    both = lo.mean(lo.math(aten.mul, of_normal, normal))
    rest = lo.math(aten.sub, lo.math(aten.sub, of_normal, lo.mean(of_normal)), lo.math(aten.mul, normal, both))
    val = next(v for v in node.meta["val"] if v is not None)
    of_x = lo.cast(lo.math(aten.mul, rest, scale), val.dtype)
    return of_x, _Columns(lo.math(aten.mul, gradient, normal)), _Columns(gradient)


def _rms_norm(lo: _Lowering, node: fx.Node) -> Any:
    source, _, weight, eps = (*node.args, None, None)[:4]
    val = source.meta["val"]  # type: ignore[union-attr]
    x = lo.wide(lo.elements(node))
    mean = lo.mean(lo.math(aten.mul, x, x))
    # As torch does: what is added is that of the dtype which is computed with (ATen/native/layer_norm.cpp).
    least = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    scale = lo.math(aten.rsqrt, lo.math(aten.add, mean, least))
    y = lo.math(aten.mul, x, scale)
    if weight is not None:
        y = lo.math(aten.mul, y, lo.wide(lo.read(weight, val.shape)))
    return tuple(lo.cast(v, each.dtype) for v, each in zip((y, scale), node.meta["val"], strict=True))


def _rms_norm_backward(lo: _Lowering, node: fx.Node) -> Any:
    source, scale, weight = (node.args[i] for i in (1, 3, 4))
    val = source.meta["val"]  # type: ignore[union-attr]
    gradient = lo.wide(lo.elements(node))
    x, scale = (lo.wide(lo.read(each, val.shape)) for each in (source, scale))
    normal = lo.math(aten.mul, x, scale)
    of_normal = gradient if weight is None else lo.math(aten.mul, gradient, lo.wide(lo.read(weight, val.shape)))
    both = lo.mean(lo.math(aten.mul, of_normal, normal))
    rest = lo.math(aten.sub, of_normal, lo.math(aten.mul, normal, both))
    return lo.cast(lo.math(aten.mul, rest, scale), val.dtype), _Columns(lo.math(aten.mul, gradient, normal))


def _exponentials(lo: _Lowering, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """What is left of each element once its row's maximum is taken off, the exponential of that, and their sum."""
    x = lo.wide(lo.elements(node))
    left = lo.math(aten.sub, x, lo.reduced(ir.row_max, x))
    exponential = lo.math(aten.exp, left)
    return left, exponential, lo.reduced(ir.row_sum, exponential)


def _softmax(lo: _Lowering, node: fx.Node) -> fx.Node:
    _, exponential, added = _exponentials(lo, node)
    return lo.cast(_times_reciprocal(lo, exponential, added), node.meta["val"].dtype)


def _log_softmax(lo: _Lowering, node: fx.Node) -> fx.Node:
    left, exponential, added = _exponentials(lo, node)
    result = lo.cast(lo.math(aten.sub, left, lo.math(aten.log, added)), node.meta["val"].dtype)
    self_dtype = left.meta["val"].dtype
    if result.meta["val"].dtype == self_dtype:
        lo.exponentials[result] = exponential, added
    return result


def _times_reciprocal(lo: _Lowering, value: fx.Node, divisor: fx.Node) -> fx.Node:
    return lo.math(aten.mul, value, lo.math(aten.reciprocal, divisor))


def _softmax_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    gradient, y = lo.wide(lo.elements(node)), lo.wide(lo.elements(node, 1))
    added = lo.reduced(ir.row_sum, lo.math(aten.mul, gradient, y))
    return lo.cast(lo.math(aten.mul, lo.math(aten.sub, gradient, added), y), node.meta["val"].dtype)


def _log_softmax_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    given = lo.elements(node, 1)
    gradient, y = lo.wide(lo.elements(node)), lo.wide(given)
    if given in lo.exponentials:
        of_row = _times_reciprocal(lo, lo.reduced(ir.row_sum, gradient), lo.exponentials[given][1])
        taken = lo.math(aten.mul, lo.exponentials[given][0], of_row)
    else:
        taken = lo.math(aten.mul, lo.math(aten.exp, y), lo.reduced(ir.row_sum, gradient))
    return lo.cast(lo.math(aten.sub, gradient, taken), node.meta["val"].dtype)


def _targets(lo: _Lowering, node: fx.Node, index: int) -> tuple[fx.Node, fx.Node, bool]:
    """The targets, whether each is one, and whether the mean is meant.

    Raises:
        CannotWriteError: classes have weights, or every row has a loss of its own.
    """
    given: Any = node.args[index : index + 4]
    target, weight, reduction, ignored = given
    if weight is not None or reduction not in (1, 2) or target.meta["val"].dim() != 1:
        raise CannotWriteError("it has a loss other than the mean, or the sum, of rows alike")
    targets = lo.read(target, tuple(target.meta["val"].shape))
    is_one = lo.call(ir.is_not, targets, ignored, dtype=torch.bool)
    return targets, is_one, reduction == 1


def _loss(lo: _Lowering, node: fx.Node) -> Any:
    scores = lo.wide(lo.elements(node))
    dtype = scores.meta["val"].dtype
    targets, is_one, is_mean = _targets(lo, node, 1)
    picked = lo.call(ir.pick, scores, targets, is_one, dtype=dtype, level=Level.ROW)
    loss, count = lo.math(aten.neg, lo.total(picked)), lo.total(lo.cast(is_one, dtype))
    if is_mean:
        loss = lo.math(aten.div, loss, count)
    return tuple(lo.cast(v, val.dtype) for v, val in zip((loss, count), node.meta["val"], strict=True))


def _loss_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype
    targets, is_one, is_mean = _targets(lo, node, 2)
    gradient, count = (lo.read(node.args[i], ()) for i in (0, 6))
    if not isinstance(gradient, fx.Node) or dtype in OPMATH:
        raise CannotWriteError("it has a loss whose gradient is a number of the host")
    taken = lo.call(aten.neg.default, lo.as_value(gradient, dtype), dtype=dtype)
    if is_mean:
        taken = lo.math(aten.div, taken, lo.as_value(count, dtype))
    value = lo.call(aten.where.ScalarOther, is_one, taken, 0.0, dtype=dtype)
    spread = lo.call(ir.spread, value, targets, lo.columns, dtype=dtype, level=Level.ELEMENT)
    lo.spread[spread] = value
    return spread


def _gelu(lo: _Lowering, node: fx.Node) -> fx.Node:
    x = lo.wide(lo.elements(node))
    below = _gelu_below(lo, node, x)[0]
    return lo.cast(lo.math(aten.mul, x, below), node.meta["val"].dtype)


def _gelu_below(lo: _Lowering, node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """By what GELU multiplies a number, and the derivative of that times the number."""
    how = node.kwargs.get("approximate", "none")
    if how == "none":
        if x.meta["val"].dtype is not torch.float32:
            raise CannotWriteError(f"there is no {node.target} of {x.meta['val'].dtype}")
        below = lo.call(ir.normal_below, x, dtype=torch.float32)
        density = lo.math(aten.exp, lo.math(aten.mul, lo.math(aten.mul, x, x), -0.5))
        return below, lo.math(aten.mul, lo.math(aten.mul, x, density), 1 / math.sqrt(2 * math.pi))
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = lo.math(aten.mul, x, x)
    inner = lo.math(aten.mul, lo.math(aten.mul, x, lo.math(aten.add, lo.math(aten.mul, square, cubic), 1.0)), scale)
    tangent = lo.math(aten.tanh, inner)
    below = lo.math(aten.mul, lo.math(aten.add, tangent, 1.0), 0.5)
    steep = lo.math(aten.rsub, lo.math(aten.mul, tangent, tangent), 1.0)
    slope = lo.math(aten.mul, lo.math(aten.add, lo.math(aten.mul, square, 3 * cubic), 1.0), scale)
    return below, lo.math(aten.mul, lo.math(aten.mul, lo.math(aten.mul, x, steep), slope), 0.5)


def _gelu_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    gradient, x = lo.wide(lo.elements(node)), lo.wide(lo.elements(node, 1))
    below, steeper = _gelu_below(lo, node, x)
    return lo.cast(lo.math(aten.mul, gradient, lo.math(aten.add, below, steeper)), node.meta["val"].dtype)


def _sigmoid_of(lo: _Lowering, x: fx.Node) -> fx.Node:
    return lo.math(aten.reciprocal, lo.math(aten.add, lo.math(aten.exp, lo.math(aten.neg, x)), 1.0))


def _sigmoid(lo: _Lowering, node: fx.Node) -> fx.Node:
    return lo.cast(_sigmoid_of(lo, lo.wide(lo.elements(node))), node.meta["val"].dtype)


def _silu(lo: _Lowering, node: fx.Node) -> fx.Node:
    x = lo.wide(lo.elements(node))
    below = lo.math(aten.add, lo.math(aten.exp, lo.math(aten.neg, x)), 1.0)
    return lo.cast(lo.math(aten.div, x, below), node.meta["val"].dtype)


def _silu_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    gradient, x = lo.wide(lo.elements(node)), lo.wide(lo.elements(node, 1))
    below = _sigmoid_of(lo, x)
    inner = lo.math(aten.add, lo.math(aten.mul, x, lo.math(aten.rsub, below, 1.0)), 1.0)
    return lo.cast(lo.math(aten.mul, gradient, lo.math(aten.mul, below, inner)), node.meta["val"].dtype)


def _sigmoid_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    gradient, y = lo.wide(lo.elements(node)), lo.wide(lo.elements(node, 1))
    left = lo.math(aten.mul, gradient, lo.math(aten.rsub, y, 1.0))
    return lo.cast(lo.math(aten.mul, left, y), node.meta["val"].dtype)


def _tanh_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    gradient, y = lo.wide(lo.elements(node)), lo.wide(lo.elements(node, 1))
    left = lo.math(aten.rsub, lo.math(aten.mul, y, y), 1.0)
    return lo.cast(lo.math(aten.mul, gradient, left), node.meta["val"].dtype)


def _relu(lo: _Lowering, node: fx.Node) -> fx.Node:
    return lo.call(aten.clamp_min.default, lo.elements(node), 0.0, dtype=node.meta["val"].dtype)


def _threshold_backward(lo: _Lowering, node: fx.Node) -> fx.Node:
    gradient, x = lo.elements(node), lo.elements(node, 1)
    is_below = lo.call(aten.le.Scalar, lo.wide(x), node.args[2], dtype=torch.bool)  # not rounded, as ATen has it
    return lo.call(aten.where.ScalarSelf, is_below, 0.0, gradient, dtype=node.meta["val"].dtype)


def _square(lo: _Lowering, node: fx.Node) -> fx.Node:
    x = lo.elements(node)
    exponent = node.args[1] if len(node.args) > 1 else 2
    if exponent not in (2, 3):
        return lo.call(aten.pow.Tensor_Scalar, x, exponent, dtype=node.meta["val"].dtype)
    wide = lo.wide(x)
    square = lo.math(aten.mul, wide, wide)
    return lo.cast(square if exponent == 2 else lo.math(aten.mul, square, wide), node.meta["val"].dtype)


_Known = Callable[[_Lowering, fx.Node], Any]

_KNOWN: dict[Any, _Known] = {
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _sum,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _loss,
    aten.nll_loss_backward.default: _loss_backward,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.sigmoid.default: _sigmoid,
    aten.sigmoid_backward.default: _sigmoid_backward,
    aten.silu.default: _silu,
    aten.silu_backward.default: _silu_backward,
    aten.tanh_backward.default: _tanh_backward,
    aten.relu.default: _relu,
    aten.threshold_backward.default: _threshold_backward,
    aten.pow.Tensor_Scalar: _square,
}
"""Operators that are made of others."""

_NORMS = {
    aten.native_layer_norm.default: 1, aten.native_layer_norm_backward.default: 2,
    aten._fused_rms_norm.default: 1, aten._fused_rms_norm_backward.default: 2,
}  # fmt: skip
"""Operators that are given the shape of a row, and the position of that argument."""

_BY_DIM = {
    aten._softmax.default: 1, aten._log_softmax.default: 1,
    aten._softmax_backward_data.default: 2, aten._log_softmax_backward_data.default: 2,
}  # fmt: skip
"""Operators that are given the dimension of rows."""

_LOSSES = {aten.nll_loss_forward.default: 0, aten.nll_loss_backward.default: 1}
_SUMS = (aten.sum.dim_IntList, aten.mean.dim)

REDUCING = frozenset({*_NORMS, *_BY_DIM, *_LOSSES, *_SUMS})
"""Operators that are not elementwise, of those that are known here."""


def may_lower(node: fx.Node) -> bool:
    """Whether a call is of an operator that loops may have, whatever it is given."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or ops.is_random(target) or ops.is_view(target):
        return False
    return target in _KNOWN or ops.is_elementwise(target) or target in (aten.clone.default, aten._to_copy.default)
