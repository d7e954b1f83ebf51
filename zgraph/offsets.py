"""Offsets in one block of memory for values that are held at different times: dynamic storage allocation.

Two values may share bytes if no call needs both. The least that the block can be is the most that is held at once;
whether that is enough is NP-hard to say (Garey and Johnson, 1979, SR2), so a few orders are tried, each value going to
the tightest gap that is free for as long as it is held, and the smallest block is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zgraph.liveness import Held, held_bytes

ALIGNMENT = 64
"""Bytes: what torch aligns memory on a CPU to (c10/core/alignment.h), so that results do not depend on the place."""


@dataclass(frozen=True)
class Offsets:
    """Where values lie.

    Attributes:
        starts: for each value, its first byte: a multiple of the alignment.
        num_bytes: of the block.
        least_bytes: the most that is held at once, which no block can be smaller than.
    """

    starts: tuple[int, ...]
    num_bytes: int
    least_bytes: int


def assign_offsets(held: Sequence[Held], alignment: int = ALIGNMENT) -> Offsets:
    """Offsets at which no two values overlap that are held at the same time.

    Args:
        held: how many bytes, from which position to which, both included.
        alignment: bytes of which each value begins at a multiple.
    """
    if not held:
        return Offsets((), 0, 0)
    sizes = [-(-each.num_bytes // alignment) * alignment for each in held]
    rounded = [_Rounded(size, each.first, each.last) for size, each in zip(sizes, held, strict=True)]
    least = max(held_bytes(rounded, max(each.last for each in held) + 1))
    best: tuple[int, list[int]] | None = None
    for order in _ORDERS:
        queue = sorted(range(len(held)), key=lambda i: (*order(rounded[i]), i))
        for _ in range(1 + min(_MOST_ROUNDS, _MOST_WORK // len(held))):
            starts = _fit(rounded, queue)
            num_bytes = max(start + size for start, size in zip(starts, sizes, strict=True))
            if best is None or num_bytes < best[0]:
                best = num_bytes, starts
            if num_bytes <= least * _CLOSE:
                return Offsets(tuple(starts), num_bytes, least)
            is_beyond = [start + size > least for start, size in zip(starts, sizes, strict=True)]
            queue = [i for i in queue if is_beyond[i]] + [i for i in queue if not is_beyond[i]]
    assert best is not None
    return Offsets(tuple(best[1]), best[0], least)


_CLOSE = 1.001
"""How much of the least is close enough not to look further."""

_MOST_ROUNDS, _MOST_WORK = 20, 5000
"""For each order, how often what came to lie beyond the least is put first in the next round (squeaky wheel
optimisation, Joslin and Clements, 1999), and in how many rounds of how many values together."""


@dataclass(frozen=True)
class _Rounded:
    num_bytes: int
    first: int
    last: int


_ORDERS: tuple[Callable[[Held], tuple[int, ...]], ...] = (
    lambda h: (-h.num_bytes, h.first),
    lambda h: (h.first - h.last, -h.num_bytes),
    lambda h: (-h.num_bytes * (h.last - h.first + 1), h.first),
    lambda h: (h.first, -h.num_bytes),
)
"""Large ones first; those held long; both together; and as they come."""


def _fit(held: Sequence[Held], order: Sequence[int]) -> list[int]:
    """Offsets of values that are put, one after another, into the tightest gap between those that are there."""
    starts = [0] * len(held)
    # Of what is there, by offset: first and last position, first and last byte.
    there = np.zeros((4, len(held)), dtype=np.int64)
    for count, index in enumerate(order):
        h = held[index]
        first, last, low, high = there[:, :count]
        together = np.flatnonzero((first <= h.last) & (last >= h.first))
        start = 0
        if len(together):
            begins, ends = low[together], np.maximum.accumulate(high[together])
            gaps = begins.copy()
            gaps[1:] -= ends[:-1]
            fitting = np.flatnonzero(gaps >= h.num_bytes)
            if len(fitting):
                chosen = fitting[np.argmin(gaps[fitting])]
                start = int(ends[chosen - 1]) if chosen else 0
            else:
                start = int(ends[-1])
        at = int(np.searchsorted(low, start))
        there[:, at + 1 : count + 1] = there[:, at:count].copy()
        there[:, at] = h.first, h.last, start, start + h.num_bytes
        starts[index] = start
    return starts
