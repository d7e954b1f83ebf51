"""Terms of matrices of which some columns or rows are made, or read, at a time.

A product that is computed a tile at a time is the whole product, since each of its elements is the same sum:

    x @ w[:, a:b] = (x @ w)[:, a:b]        w[a:b] @ x = (w @ x)[a:b]

So a product of a part is, in its normal form, that part of the product; and parts beside each other are the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence

import torch

from zgraph.terms import REPEATED, Form, Term, Terms

aten = torch.ops.aten

Range = tuple[int, int]
"""Start and length of columns, or of rows, that follow each other."""

_Part = tuple[int, int, Term, int]
"""Columns beside others: start, length, of what, and from which column of that on."""

MOST_RANGES = 4096
"""Of how many pieces a part of a matrix may be: what is cut more finely, such as the halves of every head of every
token, stands for itself."""


def columns(terms: Terms, matrix: Term, ranges: Iterable[Range]) -> Term:
    """Some columns of a matrix, those of one range after those of the other.

    Columns of this rank's rows are this rank's part of the columns.
    """
    assert matrix.shape is not None
    num_rows, num_columns = matrix.shape
    ranges = _joined(ranges)
    if ranges == ((0, num_columns),):
        return matrix
    shape = (num_rows, sum(length for _, length in ranges))
    if matrix.target is Form.SPLAT:
        return terms.splat(matrix.args[0], shape)
    shard = matrix.args[0] if matrix.target is Form.RESHAPE else matrix
    if shard.target is Form.SHARD and shard.shape == (shard.numel,):
        whole, _, *axis = shard.args
        num_all = whole.numel // num_columns
        of_whole = columns(terms, terms.reshape(whole, (num_all, num_columns)), ranges)
        numel = num_rows * shape[1]
        flat = terms.reshape(of_whole, (num_all * shape[1],))
        return terms.reshape(terms.shard(flat, (numel,), *axis), shape)
    return terms.move(Form.COLUMNS, matrix, ranges, shape)


def rows(terms: Terms, matrix: Term, ranges: Iterable[Range]) -> Term:
    """Some rows of a matrix, those of one range after those of the other."""
    assert matrix.shape is not None
    ranges, size = tuple(ranges), matrix.shape[1]
    flat = terms.reshape(matrix, (matrix.numel,))
    parts = [terms.slice(flat, start * size, (start + length) * size) for start, length in ranges]
    return terms.reshape(terms.cat(parts), (sum(length for _, length in ranges), size))


def product(terms: Terms, x: Term, y: Term) -> Term:
    """``x @ y`` for matrices."""
    assert x.shape is not None
    assert y.shape is not None
    if (part := _columns_of(terms, y)) is not None:
        return columns(terms, product(terms, x, part[0]), part[1])
    if (part := _columns_of(terms, terms.permute(x, (1, 0)))) is not None:
        return rows(terms, product(terms, terms.permute(part[0], (1, 0)), y), part[1])
    return terms.make(aten.mm.default, (x, y), (x.shape[0], y.shape[1]), x.dtype)


def _columns_of(terms: Terms, matrix: Term) -> tuple[Term, Sequence[Range]] | None:
    """The matrix of which one is some columns, and which; None if it is none's, or all of them."""
    if matrix.target is Form.COLUMNS:
        return matrix.args
    inner = terms.permute(matrix, (1, 0))
    flat = inner.args[0] if inner.target is Form.RESHAPE else inner
    if flat.target is not Form.FLAT:
        return None
    size = inner.shape[1]  # type: ignore[index]
    bases = {base for base, _, _ in flat.args}
    if len(bases) > 1 or any(n == REPEATED or n % size for _, *numbers in flat.args for n in numbers):
        return None
    (base,) = bases
    if base.numel % size:
        return None
    whole = terms.permute(terms.reshape(base, (base.numel // size, size)), (1, 0))
    return whole, [(offset // size, length // size) for _, offset, length in flat.args]


def beside(terms: Terms, rest: Term | None, new: Term, at: Sequence[Range], num_columns: int) -> Term:
    """A matrix whose columns at some ranges are those of ``new``, and others those of ``rest``; None knows of none."""
    rows, width = new.shape  # type: ignore[misc]
    before: Sequence[_Part] = ()
    if rest is not None:
        before = rest.args if rest.target is Form.BESIDE else ((0, num_columns, rest, 0),)
    base, sources = new.args if new.target is Form.COLUMNS else (new, ((0, width),))
    assert sum(length for _, length in at) == width
    pieces = [*_outside(before, sorted(at)), *_aligned(at, base, sources)]
    joined: list[_Part] = []
    for start, length, term, source in sorted(pieces, key=operator.itemgetter(0)):
        if joined:
            begin, size, last, origin = joined[-1]
            if last is term and (start, source) == (begin + size, origin + size):
                joined[-1] = (begin, size + length, last, origin)
                continue
        joined.append((start, length, term, source))
    if len(joined) == 1:
        start, length, term, source = joined[0]
        if (start, source) == (0, 0) and length == num_columns == term.shape[1]:  # type: ignore[index]
            return term
    return terms.make(Form.BESIDE, tuple(joined), (rows, num_columns), new.dtype)


def _aligned(at: Sequence[Range], base: Term, sources: Sequence[Range]) -> Iterator[_Part]:
    """Columns of ``sources``, one after the other, in the places of ``at``."""
    given = iter(sources)
    source, left = 0, 0
    for start, room in at:
        end = start + room
        while start < end:
            if not left:
                source, left = next(given)
            size = min(end - start, left)
            yield start, size, base, source
            start, source, left = start + size, source + size, left - size


def _outside(parts: Iterable[_Part], taken: Sequence[Range]) -> Iterator[_Part]:
    """What is left of columns, in their order, where some ranges, in theirs, are replaced."""
    first = 0
    for begin, length, term, source in parts:
        end, here = begin + length, begin
        while first < len(taken) and sum(taken[first]) <= begin:
            first += 1
        index = first
        while index < len(taken) and taken[index][0] < end:
            start, size = taken[index]
            if here < start:
                yield here, start - here, term, source + here - begin
            here, index = start + size, index + 1
        if here < end:
            yield here, end - here, term, source + here - begin


def _joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for start, length in ranges:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        elif length:
            joined.append((start, length))
    return tuple(joined)
