"""The caching allocator's rules, worked out by hand, and what must hold of any sequence of sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zgraph.allocator import CachingAllocator, reserved_bytes

KIB, MIB = 2**10, 2**20


class Held(NamedTuple):
    num_bytes: int
    first: int
    last: int


def reserved_by(*sizes: int) -> int:
    """What is reserved while tensors of these sizes are there together."""
    allocator = CachingAllocator()
    for size in sizes:
        allocator.allocate(size)
    return allocator.reserved_bytes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1], 2 * MIB),
        ([MIB], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([10 * MIB - 512], 20 * MIB),
        ([10 * MIB - 511], 10 * MIB),  # rounded to 512 bytes it is no longer below 10 MiB
        ([10 * MIB], 10 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([15 * MIB], 16 * MIB),
        ([100 * MIB], 100 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB, 2 * MIB], 20 * MIB),  # 2 MiB are left of the segment, which fits
        ([9 * MIB, 9 * MIB, 2 * MIB, 2 * MIB], 40 * MIB),
        ([15 * MIB, MIB], 16 * MIB + 2 * MIB),  # a small one never comes from a large segment
        ([512] * 4096, 2 * MIB),
        ([513] * 2048, 2 * MIB),
        ([513] * 2049, 4 * MIB),
    ],
)
def test_segments_are_as_large_as_the_rules_say(sizes: list[int], expected: int) -> None:
    assert reserved_by(*sizes) == expected


def test_a_large_block_is_split_only_if_more_than_a_mebibyte_is_left() -> None:
    assert reserved_by(14 * MIB, 1537 * KIB) == 14 * MIB + 20 * MIB
    for left, is_split in ((MIB, False), (MIB + 512, True)):
        allocator = CachingAllocator()
        first = allocator.allocate(20 * MIB)
        allocator.release(first)
        block = allocator.allocate(20 * MIB - left)
        assert block.size == (20 * MIB - left if is_split else 20 * MIB)
        assert allocator.reserved_bytes == 20 * MIB


def test_a_small_block_is_split_if_anything_is_left() -> None:
    allocator = CachingAllocator()
    assert [allocator.allocate(size).size for size in (1, 513, MIB)] == [512, 1024, MIB]
    assert allocator.reserved_bytes == 2 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_used() -> None:
    allocator = CachingAllocator()
    wide, narrow, other = (allocator.allocate(size * MIB) for size in (40, 24, 32))
    for block in (wide, narrow, other):
        allocator.release(block)
    assert allocator.allocate(23 * MIB + 512).size == 24 * MIB
    assert allocator.allocate(25 * MIB) is other
    assert allocator.allocate(30 * MIB) is wide
    assert allocator.reserved_bytes == 96 * MIB


def test_neighbours_that_are_free_become_one_block_in_whatever_order_they_are_given_back() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = CachingAllocator()
        allocator.release(allocator.allocate(30 * MIB))
        blocks = [allocator.allocate(10 * MIB) for _ in range(3)]
        for index in order:
            allocator.release(blocks[index])
        assert allocator.allocate(30 * MIB).size == 30 * MIB
        assert allocator.reserved_bytes == 30 * MIB


def test_blocks_of_two_segments_never_become_one() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(10 * MIB) for _ in range(2)]
    for block in blocks:
        allocator.release(block)
    allocator.allocate(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_a_hole_that_is_too_small_costs_a_segment() -> None:
    held = [Held(20 * MIB, 0, 1), Held(12 * MIB, 2, 9), Held(20 * MIB, 3, 4)]
    assert reserved_bytes(held, num_steps=1) == 20 * MIB + 20 * MIB


def test_what_dies_with_a_call_is_there_until_the_next_one() -> None:
    assert reserved_bytes([Held(20 * MIB, 0, 1), Held(20 * MIB, 1, 2), Held(0, 3, 3)]) == 40 * MIB
    assert reserved_bytes([Held(20 * MIB, 0, 1), Held(20 * MIB, 2, 3)]) == 20 * MIB


def test_state_is_allocated_once_and_stays() -> None:
    held = [Held(100 * MIB, 0, 9), Held(20 * MIB, 1, 3), Held(20 * MIB, 4, 5)]
    for num_steps in (1, 2, 5):
        assert reserved_bytes(held, num_steps=num_steps) == 120 * MIB


def test_nothing_is_reserved_for_what_has_no_bytes() -> None:
    assert reserved_bytes([]) == 0
    assert reserved_bytes([Held(0, 0, 9), Held(0, 1, 2)]) == 0


sizes = st.one_of(st.integers(1, 3000), st.integers(1, 3 * MIB), st.integers(1, 40 * MIB))


@st.composite
def steps(draw: st.DrawFn) -> list[Held]:
    """What a step holds, in order of first calls; some of it throughout."""
    num_positions = draw(st.integers(3, 30))
    held = [Held(size, 0, num_positions) for size in draw(st.lists(sizes, max_size=4))]
    starts = sorted(draw(st.lists(st.integers(1, num_positions - 1), max_size=40)))
    return [*held, *(Held(draw(sizes), first, draw(st.integers(first, num_positions))) for first in starts)]


def rounded(size: int) -> int:
    return -(-size // 512) * 512


def peak_of(held: Sequence[Held]) -> int:
    end = max((h.last for h in held), default=0)
    return max(sum(rounded(h.num_bytes) for h in held if h.first <= t <= h.last) for t in range(end + 1))


@given(steps(), st.integers(1, 3))
def test_at_least_the_peak_and_at_most_a_segment_of_its_own_for_each_tensor_is_reserved(
    held: list[Held], num_steps: int
) -> None:
    found = reserved_bytes(held, num_steps=num_steps)
    assert peak_of(held) <= found <= sum(reserved_by(h.num_bytes) for h in held)
    assert found % (2 * MIB) == 0


@given(steps())
def test_more_steps_never_give_memory_back_and_soon_need_no_more(held: list[Held]) -> None:
    found = [reserved_bytes(held, num_steps=num_steps) for num_steps in (1, 2, 3, 6, 7, 8)]
    assert found == sorted(found)
    assert found[-1] == found[-2]


def test_programs_of_a_step_use_each_others_holes_and_one_state() -> None:
    state, micro, last = Held(20 * MIB, 0, 9), Held(40 * MIB, 1, 2), Held(40 * MIB, 3, 4)
    assert reserved_bytes([state, micro], [state, last]) == 60 * MIB
    assert reserved_bytes([state, micro], [state, Held(40 * MIB, 0, 9), last]) == 100 * MIB
    unlike = Held(30 * MIB, 3, 4)  # 10 MiB of a hole are left
    assert reserved_bytes([micro], [unlike]) == reserved_bytes([micro]) == 40 * MIB
    assert reserved_bytes([unlike], [micro]) == 70 * MIB  # the first hole is too small


@given(st.lists(sizes, min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_when_all_is_given_back_whole_segments_are_left(sizes: list[int], random: object) -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size) for size in sizes]
    whole = {id(b): b for b in blocks}
    assert sum(block.size for block in whole.values()) <= allocator.reserved_bytes
    random.shuffle(blocks)  # type: ignore[attr-defined]
    for block in blocks:
        allocator.release(block)
    free = [entry[-1] for pool in allocator._free.values() for entry in pool]
    assert all(block.is_free and block.before is None and block.after is None for block in free)
    assert sum(block.size for block in free) == allocator.reserved_bytes
    before = allocator.reserved_bytes
    for size in sorted(sizes, reverse=True)[:1]:
        allocator.allocate(size)
    assert allocator.reserved_bytes == before


@given(st.lists(st.tuples(st.booleans(), sizes), max_size=80))
def test_free_and_used_blocks_cover_every_segment_without_overlap(actions: list[tuple[bool, int]]) -> None:
    allocator, used = CachingAllocator(), []
    for gives_back, size in actions:
        if gives_back and used:
            allocator.release(used.pop(size % len(used)))
        else:
            used.append(allocator.allocate(size))
            assert used[-1].size >= size
    free = [entry[-1] for pool in allocator._free.values() for entry in pool]
    assert sum(block.size for block in (*free, *used)) == allocator.reserved_bytes
    for block in (*free, *used):
        assert block.is_free == any(block is other for other in free)
        assert block.after is None or (block.after.before is block and not (block.is_free and block.after.is_free))


def test_thirty_thousand_tensors_take_less_than_two_seconds() -> None:
    """Many of them free at once, as at the end of backward: taking one off the list is a search, not a walk."""
    held = [Held(512 * (1 + i * 7919 % 3000), i, 60_000 - i) for i in range(1, 30_000)]
    start = time.process_time()
    reserved_bytes(held, num_steps=1)
    assert time.process_time() - start < 2
