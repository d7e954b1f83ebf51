"""Numbers as runs of neighbours, ``[first, how many]``: how a report says which rows a program has, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers as runs of neighbours: the first of each, and how many follow one another."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


def unrolled(order: Sequence[Sequence[int]]) -> Iterator[int]:
    """The numbers that runs stand for."""
    for first, num in order:
        yield from range(first, first + num)
