"""Terms of parts of matrices have the elements that they are said to have, and equal parts are one term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph.matrices import Range, beside, columns, product, rows
from zgraph.terms import Form, Term, Terms
from zgraph.tiling import columns_of

aten = torch.ops.aten
F32 = torch.float32


def matrix(terms: Terms, name: str, *shape: int) -> Term:
    return terms.input(name, shape, F32, varies=False)


def flat(terms: Terms, x: Term) -> Term:
    return terms.reshape(x, (x.numel,))


def turned(terms: Terms, x: Term) -> Term:
    return terms.permute(x, (1, 0))


def value_of(term: Term, known: Mapping[Term, torch.Tensor], rank: int = 0) -> torch.Tensor:
    """A term's elements on a rank; -1 where it has none."""
    if term in known:
        return known[term]
    assert term.shape is not None
    if term.target is Form.FLAT:
        pieces = [value_of(base, known, rank).flatten()[start : start + n] for base, start, n in term.args]
        return torch.cat(pieces)
    if term.target is Form.BESIDE:
        made = torch.full(term.shape, -1)
        for start, length, base, source in term.args:
            made[:, start : start + length] = value_of(base, known, rank)[:, source : source + length]
        return made
    x = value_of(term.args[0], known, rank)
    if term.target is Form.RESHAPE:
        return x.reshape(term.shape)
    if term.target is Form.PERMUTE:
        return x.permute(term.args[1])
    if term.target is Form.COLUMNS:
        return x[:, _places(term.args[1])]
    if term.target is Form.SHARD:
        return x.flatten()[rank * term.numel : (rank + 1) * term.numel].view(term.shape)
    assert term.target is aten.mm.default
    return x @ value_of(term.args[1], known, rank)


def _places(ranges: Sequence[Range]) -> list[int]:
    return [place for start, length in ranges for place in range(start, start + length)]


def numbers(*shape: int) -> torch.Tensor:
    """Small, so that products are exact, and no two alike."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


@st.composite
def some_ranges(draw: st.DrawFn, size: int, total: int | None = None) -> list[Range]:
    """Ranges of columns that do not meet, in any order; ``total`` columns if given."""
    kept = draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True) if total is None else st.just([]))
    if total is not None:
        kept = draw(st.permutations(range(size)))[:total]
    ordered: list[Range] = []
    for place in sorted(kept):
        if ordered and sum(ordered[-1]) == place and draw(st.booleans()):
            ordered[-1] = (ordered[-1][0], ordered[-1][1] + 1)
        else:
            ordered.append((place, 1))
    return list(draw(st.permutations(ordered)))


def test_tiles_of_a_product_beside_each_other_are_the_product() -> None:
    """Of four columns on each of two ranks, two tiles have two of each."""
    terms = Terms()
    x, w = matrix(terms, "x", 3, 5), matrix(terms, "w", 8, 5)
    part = terms.shard(flat(terms, w), (20,))
    made = None
    for first in (0, 2):
        gathered = terms.whole(terms.slice(part, first * 5, first * 5 + 10), (20,))
        assert gathered is not None
        tile = turned(terms, terms.reshape(gathered, (4, 5)))
        made = beside(terms, made, product(terms, x, tile), columns_of(8, 2, first, 2), 8)
    assert made is product(terms, x, turned(terms, w))


def test_of_many_ranks_what_is_beside_is_found_in_one_walk() -> None:
    """Each tile looks at what is there once, not once for each of its own columns."""
    terms, looked_at = Terms(), 0

    class Counted(tuple[Any, ...]):
        def __iter__(self) -> Any:
            nonlocal looked_at
            looked_at += 1
            return super().__iter__()

        def __getitem__(self, index: Any) -> Any:
            nonlocal looked_at
            looked_at += 1
            return super().__getitem__(index)

    a, b = matrix(terms, "a", 1, 2000), matrix(terms, "b", 1, 1000)
    rest = beside(terms, None, a, [(2 * i, 1) for i in range(2000)], 4000)
    rest.args = tuple(map(Counted, rest.args))
    made = beside(terms, rest, b, [Counted((4 * i, 1)) for i in range(1000)], 4000)
    assert len(made.args) == 2000
    assert looked_at < 20_000


@given(st.data())
@few_examples(200)
def test_a_matrix_has_the_columns_that_were_put_in_last(data: st.DataObject) -> None:
    terms, width = Terms(), data.draw(st.integers(1, 9))
    sizes = {"a": width, "b": width, "wide": width + 1}
    names = {matrix(terms, name, 2, n): 100 * i + numbers(2, n) for i, (name, n) in enumerate(sizes.items())}
    made, expected = None, torch.full((2, width), -1)
    for _ in range(data.draw(st.integers(1, 4))):
        source = data.draw(st.sampled_from(list(names)))
        at = data.draw(st.just([(0, width)]) | some_ranges(width))
        given = data.draw(some_ranges(names[source].shape[1], len(_places(at))))
        made = beside(terms, made, columns(terms, source, given), at, width)
        expected[:, _places(at)] = names[source][:, _places(given)]
    assert made is not None
    torch.testing.assert_close(value_of(made, names), expected, rtol=0, atol=0)
    same = [name for name, value in names.items() if torch.equal(value, expected)]
    assert [made] == same or not same, "all columns of a matrix in their order are that matrix"


@given(st.data())
@few_examples(200)
def test_a_product_of_parts_is_that_part_of_the_product(data: st.DataObject) -> None:
    terms = Terms()
    num_rows, depth, width = (data.draw(st.integers(1, 5)) for _ in range(3))
    x, y = matrix(terms, "x", num_rows, depth), matrix(terms, "y", depth, width)
    known = {x: numbers(num_rows, depth), y: numbers(depth, width)}
    of_rows, of_columns = data.draw(some_ranges(num_rows)), data.draw(some_ranges(width))
    some_x = data.draw(st.sampled_from([x, rows(terms, x, of_rows)]))
    some_y = data.draw(st.sampled_from([y, columns(terms, y, of_columns)]))
    made = product(terms, some_x, some_y)
    expected = known[x] @ known[y]
    expected = expected if some_x is x else expected[_places(of_rows)]
    expected = expected if some_y is y else expected[:, _places(of_columns)]
    torch.testing.assert_close(value_of(made, known), expected, rtol=0, atol=0)
    if (some_x is x) != (some_y is y):
        whole = product(terms, x, y)
        assert made is (columns(terms, whole, of_columns) if some_x is x else rows(terms, whole, of_rows))


@given(st.data())
@few_examples(200)
def test_columns_of_ranks_parts_are_what_each_rank_has_of_them(data: st.DataObject) -> None:
    """And so are pieces of parts, one after the other."""
    terms, world = Terms(), data.draw(st.integers(1, 4))
    each, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    w = matrix(terms, "w", world * each, width)
    known = {w: numbers(world * each, width)}
    part = terms.shard(flat(terms, w), (each * width,))
    ranges = data.draw(some_ranges(width))
    made = columns(terms, terms.reshape(part, (each, width)), ranges)
    cuts = data.draw(st.lists(st.tuples(st.integers(0, each * width), st.integers(0, each * width)), min_size=1))
    cut = terms.cat([terms.slice(part, min(pair), max(pair)) for pair in cuts])
    for rank in range(world):
        mine = known[w][rank * each : (rank + 1) * each]
        torch.testing.assert_close(value_of(made, known, rank), mine[:, _places(ranges)], rtol=0, atol=0)
        expected = torch.cat([mine.flatten()[min(pair) : max(pair)] for pair in cuts])
        torch.testing.assert_close(value_of(cut, known, rank) if cut.numel else expected[:0], expected, rtol=0, atol=0)


def test_all_columns_of_a_matrix_are_the_matrix_and_a_splat_has_as_many() -> None:
    terms = Terms()
    w = matrix(terms, "w", 2, 3)
    assert columns(terms, w, [(0, 1), (1, 2)]) is w
    ones = terms.fill(1, (2, 3), F32)
    assert columns(terms, ones, [(2, 1)]) is terms.fill(1, (2, 1), F32)


@pytest.mark.parametrize("size", [2, 3])
def test_rows_that_do_not_end_where_a_row_ends_are_no_part(size: int) -> None:
    terms = Terms()
    x, w = matrix(terms, "x", 2, size), matrix(terms, "w", 6, size)
    cut = terms.reshape(terms.slice(flat(terms, w), 1, 1 + 2 * size), (2, size))
    made = product(terms, x, turned(terms, cut))
    assert made.target is aten.mm.default
