"""Deal whole parameters out to ranks, so that bytes and work are even.

An update that mixes the elements of a parameter runs on one rank, which owns that parameter. All ranks store equal
parts of a bucket, so what one has to store more than another is padding, which takes memory and travels with the rest:
bytes come first. Among owners that cost no more padding, those are taken that even out the work.

Which ranks get what is a makespan problem; the largest first, each to the rank that has least, is within 4/3 of the
best (Graham 1969, Bounds on multiprocessing timing anomalies).
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 1 / 8
"""Part of a bucket that may be padding before it takes in more parameters than it has to."""


def fill_with_whole(sizes: Sequence[int], limit: int, world: int) -> list[list[int]]:
    """Which parameters go into one bucket, by their numbers; ordered by the first of them.

    Of large ones, of which a bucket cannot hold one for each rank within the limit, as many as there are ranks go
    together if they are of one size: nothing of such a bucket is padding. For the others, see ``fill``.
    """
    large: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        if world > 1 and size * world > limit:
            large.setdefault(size, []).append(index)
    buckets = [alike[i : i + world] for alike in large.values() for i in range(0, len(alike) - world + 1, world)]
    placed = {index for bucket in buckets for index in bucket}
    rest = [index for index in range(len(sizes)) if index not in placed]
    ends = fill([sizes[index] for index in rest], limit, world)
    return sorted(buckets + [rest[start:end] for start, end in zip([0, *ends], ends, strict=False)])


def fill(sizes: Sequence[int], limit: int, world: int) -> list[int]:
    """Where buckets end.

    A bucket closes when the next parameter would take it over ``limit``. If more than ``MAX_PADDING`` of it would be
    padding then, it goes on to where least of it is, the first such place: up to ``world`` times the limit, or times
    its first parameter if that is larger.

    Args:
        sizes: of parameters, in order: elements.
        limit: elements of a bucket.
        world: how many ranks own whole parameters of it; 1 where parameters may be cut.

    Returns:
        For each bucket, the number of the parameter behind its last.
    """
    ends: list[int] = []
    start = 0
    while start < len(sizes):
        end, total = start + 1, sizes[start]
        while end < len(sizes) and total + sizes[end] <= limit:
            total += sizes[end]
            end += 1
        if world > 1:
            end = _with_least_padding(sizes, start, end, max(limit, sizes[start]) * world, world)
        ends.append(end)
        start = end
    return ends


def _with_least_padding(sizes: Sequence[int], start: int, end: int, limit: int, world: int) -> int:
    best, least = end, padding(sizes[start:end], world)
    while least > MAX_PADDING and end < len(sizes) and sum(sizes[start : end + 1]) <= limit:
        end += 1
        wasted = padding(sizes[start:end], world)
        if wasted < least:
            best, least = end, wasted
    return best


def padding(sizes: Sequence[int], world: int) -> float:
    """The part of a bucket of these parameters that would be padding."""
    stored = world * max(_loads(sizes, _largest_first(sizes, world), world))
    return 1 - sum(sizes) / stored if stored else 0.0


def deal(sizes: Sequence[int], work: Sequence[int], loads: list[int]) -> list[int]:
    """The owner of each parameter of a bucket.

    Args:
        sizes: elements.
        work: operations of its update.
        loads: operations that each rank has to do for other buckets; those of this one are added.
    """
    world = len(loads)
    by_size = _largest_first(sizes, world)
    capacity = max(_loads(sizes, by_size, world), default=0)
    owners = _by_work(sizes, work, loads, capacity) or _renamed(by_size, work, loads)
    for owner, operations in zip(owners, work, strict=True):
        loads[owner] += operations
    return owners


def _largest_first(sizes: Sequence[int], world: int) -> list[int]:
    """Owners under which the fullest rank has little: see above."""
    room = [0] * world
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = min(range(world), key=room.__getitem__)
        room[owners[index]] += sizes[index]
    return owners


def _by_work(sizes: Sequence[int], work: Sequence[int], loads: Sequence[int], capacity: int) -> list[int] | None:
    """The same by work, where no rank may store more than ``capacity``; None if that leads nowhere."""
    room, busy = [capacity] * len(loads), list(loads)
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-work[i], -sizes[i])):
        free = [rank for rank in range(len(loads)) if sizes[index] <= room[rank]]
        if not free:
            return None
        owners[index] = min(free, key=busy.__getitem__)
        room[owners[index]] -= sizes[index]
        busy[owners[index]] += work[index]
    return owners


def _renamed(owners: Sequence[int], work: Sequence[int], loads: Sequence[int]) -> list[int]:
    """The same parts, the one with most work to the rank that has least."""
    parts = _loads(work, owners, len(loads))
    ranks = sorted(range(len(loads)), key=loads.__getitem__)
    busiest = sorted(range(len(loads)), key=lambda part: -parts[part])
    rank_of = dict(zip(busiest, ranks, strict=True))
    return [rank_of[owner] for owner in owners]


def _loads(amounts: Sequence[int], owners: Sequence[int], world: int) -> list[int]:
    loads = [0] * world
    for owner, amount in zip(owners, amounts, strict=True):
        loads[owner] += amount
    return loads
