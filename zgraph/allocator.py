"""How many bytes the allocator reserves for the bytes that a step holds.

PyTorch's caching allocator takes memory from the device in segments and never gives it back while a step runs, so a
step needs as much as the segments it fills, holes included. This plays its rules (c10/cuda/CUDACachingAllocator.cpp):
sizes are rounded to 512 bytes; up to 1 MiB they come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, and
above from one of their own, rounded to 2 MiB; the smallest free block that is large enough is used, and split if at
least 512 bytes of a small one, or more than 1 MiB of a large one, are left; neighbouring free blocks are merged. Its
settings (``PYTORCH_CUDA_ALLOC_CONF``) are the defaults: any block may be split, and segments do not expand.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from zgraph.liveness import Held

_ROUND = 512
_SMALL = 2**20
_SMALL_SEGMENT = 2 * 2**20
_LARGE_SEGMENT = 20 * 2**20
_LARGE = 10 * 2**20
_ROUND_LARGE = 2 * 2**20


@dataclass(eq=False)
class _Block:
    size: int
    is_small: bool
    is_free: bool = True
    before: _Block | None = None
    after: _Block | None = None
    order: int = 0


@dataclass
class CachingAllocator:
    """The state of an allocator: reserved bytes only grow."""

    reserved_bytes: int = 0
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(default_factory=lambda: {True: [], False: []})
    _num_blocks: int = 0

    def allocate(self, num_bytes: int) -> _Block:
        """A block of at least so many bytes, of which there is one or more."""
        size = max(-(-num_bytes // _ROUND), 1) * _ROUND
        is_small = size <= _SMALL
        free = self._free[is_small]
        index = bisect_left(free, (size, -1))
        block = free.pop(index)[-1] if index < len(free) else self._segment(size, is_small)
        block.is_free = False
        left = block.size - size
        if left >= _ROUND if is_small else left > _SMALL:
            rest = self._new(left, is_small)
            rest.before, rest.after, block.size = block, block.after, size
            if rest.after is not None:
                rest.after.before = rest
            block.after = rest
            self._put(rest)
        return block

    def release(self, block: _Block) -> None:
        """Give a block back, to be used again."""
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                free = self._free[other.is_small]
                del free[bisect_left(free, (other.size, other.order))]
                block = self._merge(block, other)
        self._put(block)

    def _merge(self, block: _Block, other: _Block) -> _Block:
        low, high = (other, block) if block.before is other else (block, other)
        low.size, low.after = low.size + high.size, high.after
        if low.after is not None:
            low.after.before = low
        return low

    def _segment(self, size: int, is_small: bool) -> _Block:
        """A block that fills a new segment."""
        if is_small:
            segment = _SMALL_SEGMENT
        elif size < _LARGE:
            segment = _LARGE_SEGMENT
        else:
            segment = -(-size // _ROUND_LARGE) * _ROUND_LARGE
        self.reserved_bytes += segment
        return self._new(segment, is_small)

    def _new(self, size: int, is_small: bool) -> _Block:
        self._num_blocks += 1
        return _Block(size, is_small, order=self._num_blocks)

    def _put(self, block: _Block) -> None:
        block.is_free = True
        insort(self._free[block.is_small], (block.size, block.order, block))


def reserved_bytes(*programs: Sequence[Held], num_steps: int = 2) -> int:
    """What the caching allocator has reserved after some steps.

    Args:
        programs: what each of a step's programs holds, in order of ``first``. That which is held from the start to the
            end is state, which stays from step to step; all of it is that of the last program, which reads what those
            before it read.
        num_steps: how often the step runs: holes of the first are filled by the next.
    """
    allocator = CachingAllocator()
    state: list[Held] = []
    temporaries: list[list[Held]] = []
    for program in programs:
        held = [h for h in program if h.num_bytes]  # for no bytes the allocator is not asked
        end = max((h.last for h in held), default=0)
        state = [h for h in held if h.first == 0 and h.last == end]
        temporaries.append([h for h in held if not (h.first == 0 and h.last == end)])
    for h in state:
        allocator.allocate(h.num_bytes)
    for _ in range(num_steps):
        for temporary in temporaries:
            _play(temporary, allocator)
    return allocator.reserved_bytes


def _play(temporary: Sequence[Held], allocator: CachingAllocator) -> None:
    """Allocate and release what a program holds for a time."""
    dying: dict[int, list[int]] = {}
    for index, h in enumerate(temporary):
        dying.setdefault(h.last, []).append(index)
    blocks: dict[int, _Block] = {}
    position = 0
    for index, h in enumerate(temporary):
        while position < h.first:
            for dead in dying.get(position, ()):
                allocator.release(blocks.pop(dead))
            position += 1
        blocks[index] = allocator.allocate(h.num_bytes)
    for block in blocks.values():
        allocator.release(block)
