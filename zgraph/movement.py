"""What operators that move data, create it or reduce it over the ranks do to terms.

Each rule is one equation of the proof. What has no rule here stands for itself: its name and its arguments are all that
is known of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zgraph import ops
from zgraph.matrices import MOST_RANGES, beside, columns, product, rows
from zgraph.program import Mesh
from zgraph.terms import REPEATED, Form, Piece, Shape, Term, Terms, literal
from zgraph.tiling import columns_of

aten = torch.ops.aten

Value = Any
"""A ``Term``, a literal, a tuple of these, or a collective or transfer that has been ``Started``."""


@dataclass(frozen=True)
class Started:
    """A collective or transfer under way, and the value that waiting for it gives."""

    arrives: Term


@dataclass(slots=True)
class Call:
    """A call whose arguments have been evaluated.

    Attributes:
        val: the recorded value, for its shape and dtype.
        mesh: the ranks.
    """

    terms: Terms
    val: Any
    args: tuple[Value, ...]
    kwargs: dict[str, Value]
    mesh: Mesh

    @property
    def axis(self) -> str | None:
        """The axis that a collective names; None for all ranks."""
        return axis_in_terms(self.mesh, self.args[-1])

    @property
    def shape(self) -> Shape:
        return tuple(self.val.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.val.dtype
        return dtype


def axis_in_terms(mesh: Mesh, axis: str) -> str | None:
    """An axis of a mesh as terms name it: not at all if it is that of all ranks."""
    return None if axis == mesh.axis else axis


Rule = Callable[[Call], "Value | None"]
"""The value of a call; None where the rule does not apply, and the call stands for itself."""


def _same(call: Call) -> Value:
    return call.args[0]


def _reshape(call: Call) -> Value:
    return call.terms.reshape(call.args[0], call.shape)


def _expand(call: Call) -> Value | None:
    x = call.args[0]
    if x.target is Form.SPLAT or not x.shape:
        return call.terms.splat(x.args[0] if x.shape else x, call.shape)
    return call.terms.reshape(x, call.shape) if call.val.numel() == x.numel else None


def _transpose(call: Call) -> Value | None:
    x = call.args[0]
    if call.kwargs:
        return None
    dims = list(range(len(x.shape)))
    first, second = call.args[1:3] if len(call.args) > 1 else (0, len(dims) - 1)
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return call.terms.permute(x, dims)


def _permute(call: Call) -> Value | None:
    return None if call.kwargs else call.terms.permute(call.args[0], call.args[1])


def _slice(call: Call) -> Value | None:
    if call.kwargs or any(isinstance(arg, Term) for arg in call.args[1:]):
        return None
    x, *given = call.args
    defaults: list[Any] = [0, None, None, 1]
    dim, start, stop, step = given + defaults[len(given) :]
    dim %= len(x.shape)
    size = x.shape[dim]
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    if len(x.shape) == 1 and step == 1:
        return call.terms.slice(x, start, stop)
    middle = math.prod(x.shape[1:dim])
    if step != 1 or dim == 0 or middle > MOST_RANGES:
        return None
    inner = math.prod(x.shape[dim + 1 :])
    matrix = call.terms.reshape(x, (x.shape[0], math.prod(x.shape[1:])))
    ranges = (((each * size + start) * inner, (stop - start) * inner) for each in range(middle))
    return call.terms.reshape(columns(call.terms, matrix, ranges), call.shape)


def _mm(call: Call) -> Value | None:
    return None if call.kwargs else product(call.terms, *call.args)


def _product_columns(call: Call) -> Value:
    rest, x, tile, num_blocks, start, num_columns = call.args
    at = columns_of(num_columns, num_blocks, start, tile.shape[1] // num_blocks)
    return beside(call.terms, rest, product(call.terms, x, tile), at, num_columns)


def _embedding_rows_backward(call: Call) -> Value:
    gradient, indices, num_weights, num_blocks, start, width = call.args
    args = (gradient, indices, num_weights, -1, literal(False))
    whole = call.terms.make(aten.embedding_dense_backward.default, args, (num_weights, call.shape[1]), call.dtype)
    return rows(call.terms, whole, columns_of(num_weights, num_blocks, start, width))


def _cat(call: Call) -> Value | None:
    parts = [part for part in call.args[0] if part.target is not Form.EMPTY]
    if call.kwargs or len(call.shape) != 1 or any(len(part.shape) != 1 for part in parts):
        return None
    return call.terms.cat(parts) if {part.dtype for part in parts} == {call.dtype} else None


def _copy(call: Call) -> Value | None:
    """``copy(x, new)``: the new values, with the dtype and shape of x."""
    x, new = call.args[:2]
    if not isinstance(new, Term) or new.shape not in ((), x.shape):
        return None
    cast = call.terms.cast(new, x.dtype)
    return cast if new.shape == x.shape else call.terms.splat(cast, x.shape)


def _to_copy(call: Call) -> Value:
    return call.terms.cast(call.args[0], call.dtype)


def _fill(position: int | None, value: int) -> Rule:
    """A new tensor of one value: the argument at ``position``, or ``value``."""

    def rule(call: Call) -> Value | None:
        if position is not None and position >= len(call.args):
            return None  # it is given by name
        number = value if position is None else call.args[position]
        return call.terms.fill(_stored(number, call.dtype), call.shape, call.dtype)

    return rule


def _stored(number: Any, dtype: torch.dtype) -> Any:
    """A literal as a tensor of ``dtype`` stores it: ``full(0)`` is ``full(0.0)``."""
    return literal(float(number)) if isinstance(number, int) and dtype.is_floating_point else number


def _getitem(call: Call) -> Value | None:
    values, index = call.args
    return values[index] if isinstance(values, tuple) else None


def _shard(call: Call) -> Value:
    return call.terms.shard(call.args[0], call.shape, call.axis)


def _all_gather(call: Call) -> Value:
    part, axis = call.args[0], call.axis
    whole = call.terms.whole(part, call.shape, axis)
    if whole is None:
        whole = call.terms.make(Form.GATHER, (part,) if axis is None else (part, axis), call.shape, call.dtype)
    return Started(whole)


def _all_reduce(call: Call) -> Value:
    return Started(_over_ranks(call))


def _reduce_scatter(call: Call) -> Value:
    return Started(call.terms.shard(_over_ranks(call), call.shape, call.axis))


def _all_to_all(call: Call) -> Value:
    sent, axis = call.args[0], call.axis
    args = (sent,) if axis is None else (sent, axis)
    return Started(call.terms.make(Form.EXCHANGE, args, call.shape, call.dtype, varies=True))


def _transfer(call: Call) -> Value:
    """What lies on a lower tier is what was stored there."""
    return Started(call.args[0])


def _over_ranks(call: Call) -> Term:
    x, operation, axis = call.args[0], call.args[1], call.args[-1]
    if operation == "avg":
        return call.terms.mean(x, call.axis)
    return call.terms.sum(x, call.mesh.axes[axis], call.axis, of_shares=axis == call.mesh.shard_axis)


def _amax(call: Call) -> Value | None:
    """Of what all ranks have, row by row, the maximum over the ranks; of one number repeated, that."""
    x, *dims = call.args
    if x.target is Form.SPLAT:
        return call.terms.splat(x.args[0], call.shape)
    gathered = x.args[0] if x.target is Form.RESHAPE else x
    if call.kwargs or gathered.target is not Form.GATHER or dims != [(0,)] or x.shape[0] != call.mesh.size:
        return None
    part = gathered.args[0]
    return call.terms.max(part) if part.shape == x.shape[1:] else None


def _max_over_ranks(call: Call) -> Value:
    return call.terms.max(call.args[0])


def _square_sum(call: Call) -> Value | None:
    return call.terms.square_sum(call.args[0], axis_in_terms(call.mesh, call.mesh.shard_axis))


def _add_up(call: Call) -> Value | None:
    return call.terms.add_squares(call.args[0], call.mesh.shard_size)


def _elements(call: Call) -> Value:
    inside, between = (call.terms.fill(literal(value), (), call.dtype) for value in (True, False))
    pieces: list[Piece] = []
    end = 0
    for start, stop in zip(*call.args[:2], strict=True):
        pieces += [(between, REPEATED, start - end), (inside, REPEATED, stop - start)]
        end = stop
    return call.terms.flat([*pieces, (between, REPEATED, call.args[2] - end)], call.dtype)


def _cross_entropy_backward(call: Call) -> Value:
    """What the two operators give that it is made of."""
    *of_loss, dim = call.args
    picked = call.terms.make(aten.nll_loss_backward.default, tuple(of_loss), call.shape, call.dtype)
    given = (picked, call.args[1], dim, literal(call.dtype))
    return call.terms.make(aten._log_softmax_backward_data.default, given, call.shape, call.dtype)


def _pack_state(call: Call) -> Value:
    return call.terms.make(ops.pack_state, (call.args[0],), call.shape, call.dtype)


def _wait(call: Call) -> Value:
    return call.args[0].arrives


def without_defaults(
    target: Any, args: tuple[Value, ...], kwargs: dict[str, Value]
) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """Arguments in one form: what can be is given by position, and what is the schema's default is left out."""
    if not isinstance(target, torch._ops.OpOverload) or not (kwargs or len(args) > _num_required(target)):
        return args, kwargs
    given, named = list(args), dict(kwargs)
    defaults = _defaults(target)
    for name, by_name_only, _ in defaults[len(given) :]:
        if by_name_only or name not in named:
            break
        given.append(named.pop(name))
    while given and len(given) <= len(defaults):
        _, _, default = defaults[len(given) - 1]
        if default is _NONE or given[-1] != default or any(not only for n, only, _ in defaults if n in named):
            break
        given.pop()
    for name, _, default in defaults:
        if default is not _NONE and name in named and named[name] == default:
            del named[name]
    return tuple(given), named


_NONE = object()


@cache
def _defaults(target: torch._ops.OpOverload) -> list[tuple[str, bool, Any]]:
    """Name, whether it is by name only, and default, of each argument."""
    return [
        (a.name, a.kwarg_only, literal(a.default_value) if a.has_default_value() else _NONE)
        for a in target._schema.arguments
    ]


@cache
def _num_required(target: torch._ops.OpOverload) -> int:
    return sum(default is _NONE and not only for _, only, default in _defaults(target))


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
            aten.lift_fresh.default, aten.lift_fresh_copy.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
            aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
            aten.flatten.using_ints, aten.unflatten.int,
        ),
        _reshape,
    ),
    aten.expand.default: _expand,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.copy.default: _copy,
    aten._to_copy.default: _to_copy,
    **dict.fromkeys((aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default), _fill(None, 0)),
    **dict.fromkeys((aten.ones_like.default, aten.ones.default), _fill(None, 1)),
    **dict.fromkeys((aten.full_like.default, aten.full.default), _fill(1, 0)),
    aten.new_full.default: _fill(2, 0),
    aten.scalar_tensor.default: _fill(0, 0),
    operator.getitem: _getitem,
    ops.shard: _shard,
    ops.all_gather: _all_gather,
    ops.all_gather_into: _all_gather,
    ops.share: _all_gather,
    ops.all_reduce: _all_reduce,
    ops.reduce_scatter: _reduce_scatter,
    ops.all_to_all: _all_to_all,
    ops.square_sum: _square_sum,
    ops.add_up: _add_up,
    aten.amax.default: _amax,
    ops.elements: _elements,
    ops.max_over_ranks: _max_over_ranks,
    ops.cross_entropy_backward: _cross_entropy_backward,
    aten.mm.default: _mm,
    ops.product_columns: _product_columns,
    ops.embedding_rows_backward: _embedding_rows_backward,
    ops.pack_state: _pack_state,
    ops.load: _transfer,
    ops.store: _transfer,
    ops.spill: _transfer,
    ops.wait: _wait,
}  # fmt: skip
