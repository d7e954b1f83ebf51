"""Offsets: nothing that is held together overlaps, and the block is no smaller and hardly larger than it must be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph.liveness import held_bytes
from zgraph.offsets import ALIGNMENT, assign_offsets


@dataclass(frozen=True)
class Span:
    num_bytes: int
    first: int
    last: int


@st.composite
def spans(draw: st.DrawFn, most: int = 12, unit: int = 1) -> list[Span]:
    found = []
    for _ in range(draw(st.integers(0, most))):
        first = draw(st.integers(0, 12))
        found.append(Span(unit * draw(st.integers(1, 300 // unit)), first, first + draw(st.integers(0, 6))))
    return found


def test_values_that_are_never_held_together_share_their_bytes() -> None:
    found = assign_offsets([Span(64, 0, 1), Span(100, 1, 2), Span(64, 2, 3), Span(1, 4, 4)])
    assert found.starts == (128, 0, 128, 0)
    assert found.num_bytes == found.least_bytes == 192


def test_nothing_needs_no_block() -> None:
    assert assign_offsets([]).num_bytes == 0


@few_examples(80)
@given(spans())
def test_what_is_held_together_does_not_overlap_and_all_of_it_fits(held: list[Span]) -> None:
    found = assign_offsets(held)
    assert found == assign_offsets(held)
    for (a, start_a), (b, start_b) in combinations(zip(held, found.starts, strict=True), 2):
        if a.first <= b.last and b.first <= a.last:
            assert start_a + a.num_bytes <= start_b or start_b + b.num_bytes <= start_a
    assert all(start % ALIGNMENT == 0 for start in found.starts)
    assert all(start + h.num_bytes <= found.num_bytes for h, start in zip(held, found.starts, strict=True))
    assert found.num_bytes >= found.least_bytes >= max(held_bytes(held, 20))


def smallest_block(held: Sequence[Span]) -> int:
    """By trying every order, each value going to the first bytes that are free: some order gives the least there is."""
    best = sum(h.num_bytes for h in held)
    for order in permutations(held):
        there: list[tuple[int, Span]] = []
        for h in order:
            taken = sorted(
                (start, start + other.num_bytes)
                for start, other in there
                if other.first <= h.last and h.first <= other.last
            )
            start = 0
            for low, high in taken:
                if low - start >= h.num_bytes:
                    break
                start = max(start, high)
            there.append((start, h))
        best = min(best, max(start + h.num_bytes for start, h in there))
    return best


@few_examples(60)
@given(spans(most=5, unit=ALIGNMENT))
def test_a_few_values_lie_in_the_smallest_block_there_is(held: list[Span]) -> None:
    found = assign_offsets(held)
    least = smallest_block(held) if held else 0
    assert found.least_bytes <= least <= found.num_bytes <= least * 1.001


def test_thousands_of_values_take_little_more_than_the_least() -> None:
    random.seed(0)
    held = []
    for first in range(3000):
        last = first + int(random.expovariate(1 / 30)) if first % 8 else max(6000 - first, first)
        held.append(Span(random.choice([1, 2, 3, 4, 8, 16]) * 2**16, first, last))
    found = assign_offsets(held)
    assert found.num_bytes <= 1.02 * found.least_bytes
