"""Which things to take along where only so many bytes may be held: the most valuable of those that fit.

By the list of choices that no other one dominates (Nemhauser and Ullmann, 1969): there are few of them where many
things are equally large, as buckets are, and never more than there are numbers of bytes to tell apart.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

FEW = 16
"""So many items are always chosen from exactly."""

MOST_UNITS = 4096
"""Numbers of bytes that are told apart where there are more items."""

Value = tuple[int, ...]
"""What is compared first comes first; values of several things add up, number by number."""

Choice = tuple[int, Value, int]
"""Units of bytes, the value, and a bit for each item."""


@dataclass(frozen=True)
class Item:
    """Something to take along.

    Attributes:
        num_bytes: that it holds, at least 1.
        value: of as many numbers as any other's.
    """

    num_bytes: int
    value: Value


def best(items: Sequence[Item], capacity_bytes: int) -> list[int]:
    """Which items to take, in order: together they fit, and no others that fit are worth more.

    More bytes are never worth less. Of equally large items those with the highest values are taken, so that more bytes
    take what fewer do.

    It is exact for up to ``FEW`` items, and where all sizes are multiples of a unit of which all items together have at
    most ``MOST_UNITS``. Else sizes are rounded up to the ``MOST_UNITS``-th part of their sum: what is taken is worth at
    least the best of what fits with one such part less for each item.
    """
    total = sum(item.num_bytes for item in items)
    unit = math.gcd(*(item.num_bytes for item in items)) or 1
    if len(items) > FEW and total > unit * MOST_UNITS:
        unit = -(-total // MOST_UNITS)
    nothing: Choice = (0, (0,) * max((len(item.value) for item in items), default=0), 0)
    choices = [nothing]  # units and values ascending
    for index, item in enumerate(items):
        size = -(-item.num_bytes // unit)
        taken = [(units + size, _sum(value, item.value), which | 1 << index) for units, value, which in choices]
        fitting = [choice for choice in taken if choice[0] * unit <= capacity_bytes]
        merged = heapq.merge(choices, fitting, key=_smallest_first)
        choices = []
        for choice in merged:
            if not choices or choice[1] > choices[-1][1]:
                choices.append(choice)
    which = choices[-1][2]
    return [index for index in range(len(items)) if which >> index & 1]


def _smallest_first(choice: Choice) -> tuple[int, Value]:
    """Of equally large choices the most valuable first."""
    return choice[0], tuple(-number for number in choice[1])


def _sum(one: Value, other: Value) -> Value:
    return tuple(map(sum, zip(one, other, strict=True)))
