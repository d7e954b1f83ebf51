"""What values mean: hash-consed terms, equal exactly when they are the same object.

A term is an operator on terms, as in translation validation (Pnueli, Siegel, Singerman 1998). Whatever only moves data
has a normal form, so that a parameter is the same term before and after its trip through a flat bucket, a shard, a
collective and back:

    Flat        a vector made of pieces of other tensors      cat, slice, view
    Splat       one 0-dim value, repeated                     zeros, full_like
    Reshape     the same elements in the same order           view, unsqueeze
    Permute     other order of dimensions                     t, transpose
    Shard       this rank's 1/N of a vector                   zgraph::shard, reduce_scatter
    Mean, Sum   over the ranks, or those of an axis           all_reduce, reduce_scatter
    Max         over the ranks                                all_gather and amax, zgraph::max_over_ranks
    Squares     the sum of the squares of all elements        zgraph::square_sum, add_up
    Columns     some columns of a matrix, see zgraph.matrices slice, product_columns
    Beside      columns of matrices beside each other         product_columns

An elementwise operator on such a vector is the vector of the operator on its pieces. Padding stays padding under
elementwise operators; anything else that reads it makes a term that no captured step has.

A sum of squares is a set of pieces, in whatever order they are added. Of a shard it is this rank's share, and the sum
of the shares over the ranks is that of the whole vector. Zeros add nothing, nor do zeros times a factor that other
elements have, too: where that is not finite, neither is the sum.

Ranks are all of them unless an axis of the mesh is named. A mean over the ranks inside a node is another value in every
node, and the mean over the nodes of that is the mean over all ranks; so with sums, and in the other order. As the ranks
of one place in every node have the same part of a vector, the mean over them of their parts is their part of the mean.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import accumulate
from typing import Any

import torch

from zgraph.errors import VerifyError
from zgraph.program import REPLICA, SHARD, Input, Role, target_name

Shape = tuple[int, ...]


class Form(enum.Enum):
    """Terms that are not a call of an operator."""

    __hash__ = object.__hash__  # every term is looked up by its head, and Enum's own hash is slow

    INPUT = "input"
    FLAT = "flat"
    SPLAT = "splat"
    FILL = "fill"
    PADDING = "padding"
    EMPTY = "empty"
    RESHAPE = "reshape"
    PERMUTE = "permute"
    CAST = "cast"
    SHARD = "shard"
    MEAN = "mean"
    SUM = "sum"
    MAX = "max"
    SQUARES = "squares"
    SHARE = "share"
    GATHER = "gather"
    EXCHANGE = "exchange"
    COLUMNS = "columns"
    BESIDE = "beside"


class Term:
    """A value, by what it was computed from. Made by ``Terms`` only, so that equality is identity.

    Attributes:
        target: a ``Form``, or the operator that is called.
        args: terms, literals (see ``literal``), nested tuples of them; keyword arguments as (name, value) at the end.
        shape: of a tensor; None for a number or a tuple of values.
        dtype: of a tensor.
        varies: its value may differ between the ranks.
    """

    __slots__ = ("args", "dtype", "shape", "target", "varies")

    def __init__(
        self, target: Any, args: tuple[Any, ...], shape: Shape | None, dtype: torch.dtype | None, varies: bool
    ) -> None:
        self.target, self.args, self.shape, self.dtype, self.varies = target, args, shape, dtype, varies

    @property
    def numel(self) -> int:
        assert self.shape is not None
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return show(self)


Piece = tuple[Term, int, int]
"""Elements [offset, offset + length) of a tensor in row-major order; offset ``REPEATED`` for a 0-dim term repeated."""

REPEATED = -1

EqualTo = Callable[["Terms", Term], "Term | None"]
"""Another term that a term is equal to, or None."""


@dataclass(frozen=True)
class Axiom:
    """An equation that a pass asks the verifier to take on trust, beyond those of data movement.

    Attributes:
        text: for people, e.g. ``neg(neg(a)) = a``; it is reported with the pass.
        target: the operator at the head of the left-hand side.
        equal: called with every term of that head; returns the right-hand side, or None if it is of another kind.
    """

    text: str
    target: Any
    equal: EqualTo


class Terms:
    """Makes terms, each once.

    Args:
        axioms: equations that hold besides those of data movement.
    """

    def __init__(self, axioms: Iterable[Axiom] = ()) -> None:
        self._table: dict[Any, Term] = {}
        self._lifted_before: dict[Any, Term] = {}
        self._gradients: set[Term] = set()
        self._starts: dict[Term, list[int]] = {}  # of vectors that were sliced, where each piece begins
        self._numbers: dict[Term, int] = {}  # of bases in sums of squares, in the order in which they were met
        self._axioms: dict[Any, list[EqualTo]] = {}
        for axiom in axioms:
            self._axioms.setdefault(axiom.target, []).append(axiom.equal)
        self.padding = self.make(Form.PADDING, (), (), None)

    def make(
        self,
        target: Any,
        args: tuple[Any, ...],
        shape: Shape | None,
        dtype: torch.dtype | None,
        varies: bool | None = None,
    ) -> Term:
        """The term with this head, arguments, shape and dtype; unless said otherwise, it varies if an argument does.

        Tensors without elements are all the same, whatever made them.
        """
        if shape and 0 in shape:
            target, args, dtype, varies = Form.EMPTY, (shape,), None, False
        key = (target, args, shape, dtype)
        term = self._table.get(key)
        if term is None:
            if varies is None:
                varies = any(t.varies or t.target is Form.SHARD for t in _terms(args))
            term = Term(target, args, shape, dtype, varies)
            for equal in self._axioms.get(target, ()):
                try:
                    other = equal(self, term)
                except Exception as error:
                    raise VerifyError(
                        f"an axiom for {target_name(target)} failed on {show(term)}: {type(error).__name__}: {error}",
                        fix="return None for terms that the equation does not speak of",
                    ) from error
                if other is not None:
                    term = other
                    break
            self._table[key] = term
        return term

    # -- data movement --------------------------------------------------------------------------------------

    def input(self, key: Any, shape: Shape | None, dtype: torch.dtype | None, varies: bool) -> Term:
        """A value from outside, known by ``key``."""
        return self.make(Form.INPUT, (key,), shape, dtype, varies)

    def fill(self, value: Any, shape: Shape, dtype: torch.dtype) -> Term:
        """``value``, a literal or a term of a number, in every element."""
        return self.splat(self.make(Form.FILL, (value,), (), dtype), shape)

    def splat(self, zero_dim: Term, shape: Shape) -> Term:
        if not shape:
            return zero_dim
        return self.make(Form.SPLAT, (zero_dim, shape), shape, zero_dim.dtype)

    def reshape(self, x: Term, shape: Shape) -> Term:
        """The same elements in row-major order."""
        if x.shape == shape:
            return x
        if x.target is Form.SPLAT or not x.shape:
            return self.splat(x.args[0] if x.shape else x, shape)
        base = x.args[0] if x.target is Form.RESHAPE else x
        return base if base.shape == shape else self.move(Form.RESHAPE, base, shape, shape)

    def permute(self, x: Term, order: Sequence[int]) -> Term:
        """Dimension i of the result is dimension ``order[i]`` of ``x``."""
        assert x.shape is not None
        dims = tuple(d % len(order) for d in order)
        shape = tuple(x.shape[d] for d in dims)
        if x.target is Form.SPLAT:
            return self.splat(x.args[0], shape)
        if x.target is Form.PERMUTE:
            x, inner = x.args
            dims = tuple(inner[d] for d in dims)
        return x if dims == tuple(range(len(dims))) else self.move(Form.PERMUTE, x, dims, shape)

    def cast(self, x: Term, dtype: torch.dtype) -> Term:
        """Converted elements; nothing if they have that dtype already."""
        if x.dtype == dtype:
            return x
        return self.elementwise(Form.CAST, (x, dtype), x.shape, dtype)

    def pieces(self, x: Term) -> tuple[Piece, ...]:
        """What a vector is made of."""
        if x.target is Form.FLAT:
            return x.args
        if x.target is Form.SPLAT:
            return ((x.args[0], REPEATED, x.numel),)
        return ((x.args[0] if x.target is Form.RESHAPE else x, 0, x.numel),)

    def flat(self, pieces: Iterable[Piece], dtype: torch.dtype | None) -> Term:
        """The vector made of ``pieces``, in normal form."""
        merged = _joined(
            (base, offset if base.shape else REPEATED, length) for base, offset, length in pieces if length
        )
        if len(merged) == 1:
            base, offset, length = merged[0]
            if offset == REPEATED:
                return self.splat(base, (length,))
            if length == base.numel:
                return self.reshape(base, (length,))
        total = sum(length for _, _, length in merged)
        if merged and all(base.target is Form.SHARD for base, _, _ in merged):
            of_ranks = {(base.args[0].numel // base.numel, axis_of(base)) for base, _, _ in merged}
            if len(of_ranks) == 1:
                ((world, axis),) = of_ranks
                return self.shard(self._of_all_ranks(merged, world, dtype), (total,), axis)
        return self.make(Form.FLAT, tuple(merged), (total,), dtype)

    def _of_all_ranks(self, pieces: Sequence[Piece], world: int, dtype: torch.dtype | None) -> Term:
        """The vector of which each of ``world`` ranks has pieces of its parts of others: rank by rank, these pieces."""
        found: list[Piece] = []
        for rank in range(world):
            for part, offset, length in pieces:
                start = rank * part.numel + offset
                found += self.pieces(self.slice(part.args[0], start, start + length))
        return self.flat(found, dtype)

    def slice(self, x: Term, start: int, stop: int) -> Term:
        """Elements [start, stop) of a vector."""
        pieces = self.pieces(x)
        if x not in self._starts:
            self._starts[x] = list(accumulate((length for _, _, length in pieces), initial=0))
        starts, found = self._starts[x], []
        for index in range(max(bisect_right(starts, start) - 1, 0), len(pieces)):
            (base, offset, length), position = pieces[index], starts[index]
            low, high = max(start, position), min(stop, position + length)
            if position >= stop:
                break
            if low < high:
                found.append((base, offset if offset == REPEATED else offset + low - position, high - low))
        return self.flat(found, x.dtype)

    def cat(self, xs: Iterable[Term]) -> Term:
        """Vectors one after the other."""
        parts = [x for x in xs if x.target is not Form.EMPTY]
        return self.flat((piece for x in parts for piece in self.pieces(x)), parts[0].dtype if parts else None)

    # -- elementwise ----------------------------------------------------------------------------------------

    def elementwise(self, target: Any, args: tuple[Any, ...], shape: Shape | None, dtype: torch.dtype | None) -> Term:
        """An elementwise operator, pulled inside vectors, shards and repeated values.

        Its normal form is that of vectors: the operator on the elements in row-major order, then a reshape.
        """
        computed_in = _promoted(_terms(args))
        if computed_in is not None:
            args = (*args, ("computed_in", computed_in))
        return self._lifted(target, args, shape, dtype)

    def _lifted(self, target: Any, args: tuple[Any, ...], shape: Shape | None, dtype: torch.dtype | None) -> Term:
        key = (target, args, shape, dtype)
        term = self._lifted_before.get(key)
        if term is None:
            term = self._lifted_before[key] = self._lift(target, args, shape, dtype)
        return term

    def _lift(self, target: Any, args: tuple[Any, ...], shape: Shape | None, dtype: torch.dtype | None) -> Term:
        vectors = [t for t in _terms(args) if t.shape]
        if not vectors or any(t.shape != shape for t in vectors):
            return self._apply(target, args, shape, dtype)
        assert shape is not None
        forms = {t.target for t in vectors}
        bases = {t: t.args[0] if t.target is Form.RESHAPE else t for t in vectors}
        if not forms & _MADE_OF_PARTS and not any(base.target is Form.FLAT for base in bases.values()):
            return self.reshape(self._apply(target, _replace(args, bases), (vectors[0].numel,), dtype), shape)
        if forms == {Form.SPLAT}:
            inner = _replace(args, {t: t.args[0] for t in vectors})
            return self.splat(self._apply(target, inner, (), dtype), shape)
        if Form.SHARD in forms:
            axes = {axis_of(t) for t in vectors if t.target is Form.SHARD}
            if not forms <= {Form.SHARD, Form.SPLAT} or len(axes) > 1:
                return self._apply(target, args, shape, dtype)
            whole = next(t.args[0].shape for t in vectors if t.target is Form.SHARD)
            parts = {t: t.args[0] if t.target is Form.SHARD else self.splat(t.args[0], whole) for t in vectors}
            return self.shard(self._lifted(target, _replace(args, parts), whole, dtype), shape, *axes)
        flat = {t: self.reshape(t, (t.numel,)) for t in vectors}
        return self.reshape(
            self.flat(self._on_pieces(target, _replace(args, flat), flat.values(), dtype), dtype), shape
        )

    def _on_pieces(
        self, target: Any, args: tuple[Any, ...], vectors: Iterable[Term], dtype: torch.dtype | None
    ) -> Iterator[Piece]:
        """An elementwise operator on vectors of one length, cut wherever one of them is."""
        pieces = {t: self.pieces(t) for t in vectors}
        at, used = dict.fromkeys(pieces, 0), dict.fromkeys(pieces, 0)
        while all(at[t] < len(p) for t, p in pieces.items()):
            now = {t: p[at[t]] for t, p in pieces.items()}
            length = min(now[t][2] - used[t] for t in pieces)
            bases = {t: base for t, (base, _, _) in now.items()}
            places = {(o + used[t], base.numel) for t, (base, o, _) in now.items() if o != REPEATED}
            if target is _WHERE and _holds(bases.get(args[0]), False) and _is_number(args[2], dtype):
                yield args[2], REPEATED, length
            elif self.padding in bases.values():
                yield self.padding, REPEATED, length
            elif not places:
                yield self._apply(target, _replace(args, bases), (), dtype), REPEATED, length
            elif len(places) == 1:
                ((offset, numel),) = places
                inner = {t: self.splat(b, (numel,)) if now[t][1] == REPEATED else b for t, b in bases.items()}
                applied = self._apply(target, _replace(args, inner), (numel,), dtype)
                yield applied.args[0] if applied.target is Form.RESHAPE else applied, offset, length
            else:  # unlike parts of unlike tensors: no captured operator does this
                cut = {t: self.slice(t, *_span(pieces[t], at[t], used[t], length)) for t in pieces}
                yield self.make(target, _replace(args, cut), (length,), dtype), 0, length
            for t in pieces:
                used[t] += length
                if used[t] == now[t][2]:
                    at[t], used[t] = at[t] + 1, 0

    def _apply(self, target: Any, args: tuple[Any, ...], shape: Shape | None, dtype: torch.dtype | None) -> Term:
        if target in _DIVISIONS and len(args) == 2 and isinstance(args[0], Term) and args[0].target is Form.SUM:
            total, world = args[0].args[:2]
            if args[1] in (world, literal(float(world))) and dtype == total.dtype:
                return self.mean(total, axis_of(args[0]))
        if target is _WHERE and _holds(args[0], True) and isinstance(args[1], Term) and shape is not None:
            new = args[1]
            if new.dtype == dtype and new.shape is not None and new.numel == math.prod(shape):
                return self.reshape(new, shape) if shape else new
        if target is Form.CAST and args[0].target is Form.PERMUTE and shape is not None and dtype is not None:
            inner, order = args[0].args
            return self.reshape(self.permute(self.cast(inner, dtype), order), shape)
        return self.make(target, args, shape, dtype)

    # -- ranks ----------------------------------------------------------------------------------------------

    def shard(self, x: Term, shape: Shape, axis: str | None = None) -> Term:
        """This rank's part, of ``shape``, of a vector that the ranks of an axis divide among them."""
        if x.target is Form.SPLAT:
            return self.splat(x.args[0], shape)
        how = (shape,) if axis is None else (shape, axis)
        return self.make(Form.SHARD, (x, *how), shape, x.dtype, varies=x.varies or x.target is Form.SHARD)

    def whole(self, x: Term, shape: Shape, axis: str | None = None) -> Term | None:
        """The vector of ``shape`` of which ``x`` is each rank's part; None if the parts do not make one."""
        if x.varies:
            return None
        if x.target is Form.SPLAT:
            return self.splat(x.args[0], shape)
        if x.target is Form.SHARD and x.args[0].shape == shape and axis_of(x) == axis:
            inner: Term = x.args[0]
            return inner
        return None

    def mean_gradient(self, x: Term) -> Term:
        """The mean of what a parameter's update reads of backward, which is remembered as a gradient."""
        mean = self.mean(x)
        for base, _, _ in self.pieces(self.reshape(mean, (mean.numel,))):
            while base.target in (Form.RESHAPE, Form.PERMUTE):
                base = base.args[0]
            if base.target is Form.MEAN:
                self._gradients.add(base.args[0])
        return mean

    def is_gradient(self, x: Term) -> bool:
        """Whether it is one, or zeros between them."""
        return x in self._gradients or _is_zero(x)

    def mean(self, x: Term, axis: str | None = None) -> Term:
        """Elementwise mean over the ranks of an axis."""
        return self._over_ranks(Form.MEAN, x, None, axis)

    def max(self, x: Term) -> Term:
        """Elementwise maximum over all ranks."""
        if not x.varies and x.target is not Form.SHARD:
            return x
        return self.make(Form.MAX, (x,), x.shape, x.dtype, varies=x.target is Form.SHARD)

    def sum(self, x: Term, world: int, axis: str | None = None, *, of_shares: bool = True) -> Term:
        """Elementwise sum over the ``world`` ranks of an axis; divided by their number it is the mean.

        Args:
            of_shares: state is divided along this axis, so that shares of a sum of squares make the whole.
        """
        share = self._share(x, world) if of_shares else None
        return self._over_ranks(Form.SUM, x, world, axis) if share is None else self._squares(Form.SQUARES, share.args)

    def _over_ranks(self, form: Form, x: Term, world: int | None, axis: str | None) -> Term:
        if x.target is Form.RESHAPE:
            return self.reshape(self._over_ranks(form, x.args[0], world, axis), x.args[1])
        if x.target is Form.PERMUTE:
            return self.permute(self._over_ranks(form, x.args[0], world, axis), x.args[1])
        if x.target is Form.SPLAT:
            return self.splat(self._over_ranks(form, x.args[0], world, axis), x.args[1])
        if x.target is Form.PADDING or _is_zero(x):
            return x
        if x.target is Form.FLAT:
            return self.flat([(self._over_ranks(form, b, world, axis), o, n) for b, o, n in x.args], x.dtype)
        if x.target is Form.SHARD and (axis_of(x), axis) == (SHARD, REPLICA) and x.shape is not None:
            return self.shard(self._over_ranks(form, x.args[0], world, axis), x.shape, SHARD)
        if x.target is form and {axis_of(x), axis} == {SHARD, REPLICA}:
            counts = (None, None) if world is None else (x.args[1], world)
            x, world, axis = x.args[0], None if None in counts else math.prod(counts), None
        args = (x,) if world is None else (x, world)
        varies = x.target is Form.SHARD or (axis is not None and x.varies)
        return self.make(form, args if axis is None else (*args, axis), x.shape, x.dtype, varies=varies)

    # -- sums of squares ------------------------------------------------------------------------------------

    def square_sum(self, x: Term, axis: str | None = None) -> Term | None:
        """The sum of the squares of all elements; of a shard, this rank's share of it.

        Args:
            axis: along which state is divided; None is returned for what is divided along another one.
        """
        assert x.shape is not None
        flat = self.reshape(x, (x.numel,))
        if flat.target is Form.SHARD and axis_of(flat) != axis:
            return None
        if flat.target is Form.SHARD:
            return self._squares(Form.SHARE, self.pieces(flat.args[0]))
        return self._squares(Form.SQUARES, self.pieces(flat))

    def add_squares(self, xs: Sequence[Term], world: int) -> Term | None:
        """The sum of sums of squares, all of them shares or none; None if they cannot be added."""
        if all(x.target is Form.SQUARES for x in xs):
            return self._squares(Form.SQUARES, (piece for x in xs for piece in x.args))
        shares = [share for x in xs if (share := self._share(x, world)) is not None]
        if len(shares) < len(xs):
            return None
        return self._squares(Form.SHARE, (piece for share in shares for piece in share.args))

    def _share(self, x: Term, world: int) -> Term | None:
        """``x`` as a rank's share; also where all ranks add up as many elements that are all alike.

        None if it is none, or the share of vectors of which each rank has another one.
        """
        if x.target not in (Form.SHARE, Form.SQUARES) or any(base.varies for base, _, _ in x.args):
            return None
        if x.target is Form.SHARE:
            return x
        if any(offset != REPEATED for _, offset, _ in x.args):
            return None
        return self._squares(Form.SHARE, ((base, offset, length * world) for base, offset, length in x.args))

    def _squares(self, form: Form, pieces: Iterable[Piece]) -> Term:
        """The sum over ``pieces``, in normal form: sorted, neighbours joined, without zeros."""
        given = [piece for piece in pieces if piece[2]]
        common = {factor for base, _, _ in given if zero_times(base) is None for factor in _factors(base)}
        counted = []
        for piece in self._sorted(given):
            factors = zero_times(piece[0])
            if factors is None or not factors <= common:
                counted.append(piece)
        args = self._sorted((_in_any_order(base, length), offset, length) for base, offset, length in _joined(counted))
        return self.make(form, tuple(args), (), torch.float64, varies=True if form is Form.SHARE else None)

    def _sorted(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Pieces in an order that depends only on what they are."""
        number = self._numbers
        return sorted(pieces, key=lambda piece: (number.setdefault(piece[0], len(number)), *piece[1:]))

    def move(self, form: Form, x: Term, how: Any, shape: Shape) -> Term:
        """Elements of ``x`` in another form."""
        return self.make(form, (x, how), shape, x.dtype, varies=x.varies or x.target is Form.SHARD)


_WHERE = torch.ops.aten.where.self
_MADE_OF_PARTS = frozenset({Form.FLAT, Form.SPLAT, Form.SHARD})
_MULTIPLES = frozenset({torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor})
_DIVISIONS = frozenset({torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar})


def axis_of(x: Term) -> str | None:
    """The axis along which a vector is divided, or a value reduced; None for all ranks.

    The last argument of a ``Form.SHARD``, ``GATHER``, ``EXCHANGE``, ``MEAN`` or ``SUM`` names it; others have none
    there that is a string.
    """
    axis = x.args[-1]
    return axis if isinstance(axis, str) else None


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces with those made one that follow each other in a tensor, or repeat the same number."""
    joined: list[Piece] = []
    for base, offset, length in pieces:
        if joined:
            before, start, size = joined[-1]
            if before is base and (offset == start + size if offset != REPEATED else start == REPEATED):
                joined[-1] = (base, start, size + length)
                continue
        joined.append((base, offset, length))
    return joined


def _holds(condition: Any, value: bool) -> bool:
    """Whether a condition has this value for all elements, as it stands."""
    one = condition.args[0] if isinstance(condition, Term) and condition.target is Form.SPLAT else condition
    return isinstance(one, Term) and one.target is Form.FILL and one.args[0] == literal(value)


def _is_number(x: Any, dtype: torch.dtype | None) -> bool:
    return isinstance(x, Term) and x.shape == () and x.dtype == dtype


def _is_zero(x: Term) -> bool:
    return x.target is Form.FILL and x.args[0] in (0, literal(0.0))


def is_input(x: Term, role: Role) -> bool:
    """Whether a term is an input of this role, as the step has found it."""
    what = x.args[0] if x.target is Form.INPUT else None
    return isinstance(what, Input) and what.role is role


def zero_times(x: Term) -> frozenset[Term] | None:
    """The factors by which a term is a multiple of zero: none for zero itself; None if it may be something else.

    Sums, casts and means of such terms are such terms. A number as a factor must be finite, and not 0 as a divisor.
    """
    if _is_zero(x):
        return frozenset()
    args = [arg for arg in x.args if not _is_computed_in(arg)]
    if x.target in (Form.CAST, Form.MEAN, Form.SUM):
        return zero_times(args[0])
    if x.target is torch.ops.aten.add.Tensor and len(args) == 2:
        parts = [zero_times(arg) if isinstance(arg, Term) else None for arg in args]
        return None if parts[0] is None or parts[1] is None else parts[0] | parts[1]
    if x.target in _MULTIPLES and len(args) == 2 and isinstance(args[0], Term):
        factors = zero_times(args[0])
        if factors is None or isinstance(args[1], Term):
            return None if factors is None else factors | {args[1]}
        return factors if _is_harmless(args[1], x.target) else None
    return None


def _factors(x: Term) -> Iterator[Term]:
    """By what a term is multiplied or divided at last."""
    while x.target in _MULTIPLES or x.target is Form.CAST:
        if x.target in _MULTIPLES and isinstance(x.args[1], Term):
            yield x.args[1]
        if not isinstance(x.args[0], Term):
            return
        x = x.args[0]


def _is_computed_in(arg: Any) -> bool:
    return isinstance(arg, tuple) and len(arg) == 2 and arg[0] == "computed_in"


def _is_harmless(factor: Any, target: Any) -> bool:
    """Whether zero times, or divided by, a literal number is zero."""
    number = float(factor[1]) if isinstance(factor, tuple) and factor[0] is float else factor
    is_number = isinstance(number, (int, float)) and math.isfinite(number)
    return is_number and (number != 0 or target is torch.ops.aten.mul.Tensor)


def _in_any_order(base: Term, length: int) -> Term:
    """A tensor with the same elements, if all of them are meant."""
    while base.target in (Form.RESHAPE, Form.PERMUTE) and length == base.numel:
        base = base.args[0]
    return base


def _promoted(operands: Iterable[Term]) -> torch.dtype | None:
    """What operands of unlike dtypes are computed in; None if they are alike.

    A 0-dim tensor counts for less beside one with dimensions, so an operator may differ between a number and a vector
    of one element (torch's type promotion).
    """
    return promoted((t.dtype, bool(t.shape)) for t in operands if t.dtype is not None)


def promoted(operands: Iterable[tuple[torch.dtype, bool]]) -> torch.dtype | None:
    """What tensors are computed in, of these dtypes and with dimensions or without; None if they are of one dtype.

    Conditions take no part.
    """
    tensors = tuple((dtype, is_vector) for dtype, is_vector in operands if dtype is not torch.bool)
    return _promote(tensors) if len({dtype for dtype, _ in tensors}) > 1 else None


@cache
def _promote(tensors: tuple[tuple[torch.dtype, bool], ...]) -> torch.dtype:
    examples = (torch.empty([0] if is_vector else [], dtype=dtype) for dtype, is_vector in tensors)
    return reduce(torch.add, examples).dtype


def _span(pieces: Sequence[Piece], at: int, used: int, length: int) -> tuple[int, int]:
    """Start and stop, in a vector, of what is next of its piece number ``at``."""
    start = sum(n for _, _, n in pieces[:at]) + used
    return start, start + length


def form(val: Any) -> tuple[Shape | None, torch.dtype | None]:
    """Shape and dtype of a node's recorded value; None for what is not a tensor."""
    return (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else (None, None)


def literal(value: Any) -> Any:
    """A literal as something that is equal and hashed alike only for the same literal: ``1`` is not ``1.0``."""
    kind = type(value)
    if kind is int or kind is str or value is None:
        return value
    if kind is float or kind is bool or kind is complex:
        return (kind, repr(value))
    if kind in (list, tuple) or isinstance(value, (list, tuple)):
        return tuple(map(literal, value))
    if kind is torch.device or kind is slice:
        return str(value)
    return value


def _terms(args: Iterable[Any]) -> Iterator[Term]:
    for arg in args:
        if isinstance(arg, Term):
            yield arg
        elif isinstance(arg, tuple):
            yield from _terms(arg)


def _replace(args: tuple[Any, ...], by: dict[Term, Term]) -> tuple[Any, ...]:
    return tuple(
        by.get(arg, arg) if isinstance(arg, Term) else _replace(arg, by) if isinstance(arg, tuple) else arg
        for arg in args
    )


# -- for people ---------------------------------------------------------------------------------------------


def show(term: Any, depth: int = 4) -> str:
    """A term as an expression, down to ``depth`` operators."""
    if not isinstance(term, Term):
        return _show_literal(term)
    if term.target is Form.INPUT:
        return str(term.args[0] if not isinstance(term.args[0], tuple) else " ".join(map(str, term.args[0])))
    if term.target is Form.PADDING:
        return "padding"
    if depth == 0:
        return "..."
    if term.target is Form.FLAT:
        return "[" + ", ".join(_show_piece(piece, depth) for piece in term.args) + "]"
    if term.target is Form.FILL:
        return show(term.args[0], depth)
    if term.target in (Form.SQUARES, Form.SHARE):
        return f"{term.target.value}({', '.join(_show_piece(piece, depth) for piece in term.args)})"
    if isinstance(term.target, Form):
        args = ", ".join(show(arg, depth - 1) for arg in term.args)
        return f"{term.target.value}({args})"
    shown = []
    for arg in term.args:
        if isinstance(arg, tuple) and len(arg) == 2 and isinstance(arg[0], str):
            shown.append(f"{arg[0]}={show(arg[1], depth - 1)}")
        elif isinstance(arg, tuple) and any(True for _ in _terms(arg)):
            shown.append("[" + ", ".join(show(inner, depth - 1) for inner in arg) + "]")
        else:
            shown.append(show(arg, depth - 1))
    return f"{target_name(term.target).removeprefix('aten.').removesuffix('.default')}({', '.join(shown)})"


def _show_piece(piece: Piece, depth: int) -> str:
    base, offset, length = piece
    if base.target is Form.PADDING:
        return f"padding x{length}"
    if offset == REPEATED:
        return f"{show(base, depth - 1)} x{length}"
    whole = show(base, depth - 1)
    return whole if (offset, length) == (0, base.numel) else f"{whole}[{offset}:{offset + length}]"


def _show_literal(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and value[0] in (float, bool, complex):
        return str(value[1])
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_show_literal, value)) + "]"
    return str(value)


def part(expected: Any, found: Any) -> tuple[Any, Any]:
    """The innermost places in which two terms differ: the only arguments in which their heads differ, and so on."""
    while isinstance(expected, Term) and isinstance(found, Term) and expected.target is found.target:
        mine, theirs = list(_flattened(expected.args)), list(_flattened(found.args))
        unlike = [(a, b) for a, b in zip(mine, theirs, strict=False) if a is not b and a != b]
        if len(mine) != len(theirs) or len(unlike) != 1 or not all(isinstance(t, Term) for t in unlike[0]):
            break
        expected, found = unlike[0]
    return expected, found


def _flattened(args: Iterable[Any]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _flattened(arg)
        else:
            yield arg
