"""What lower tiers have in common: room for tensors that do not lie in the memory that is computed in, and the tensors.

A step moves them by ``load`` and ``store``, which return at once; what these return is waited for. ``zgraph.disk`` has
a file, and ``zgraph.host`` memory of the host beside a device.
"""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

PAGE = 4096
"""Bytes: direct transfers begin and end at multiples of it, in memory and in the file; no disk of today needs more."""


def padded(num_bytes: int) -> int:
    """Bytes that a tensor of so many takes up on a tier: a page at least."""
    return max(-(-num_bytes // PAGE), 1) * PAGE


@dataclass
class Moved:
    """Bytes of tensors that were read and written."""

    read_bytes: int = 0
    written_bytes: int = 0


class Transfer(Protocol):
    """A load or a store that has been started."""

    def wait(self) -> Any:
        """What was loaded, or the ``Stored`` that was written, once whatever reads or writes over it may go on."""


class Tier(ABC):
    """Room for tensors.

    Attributes:
        name: one of ``zgraph.hardware.LOWER_TIERS``.
        num_bytes: what is reserved.
        moved: since it was last set anew.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.num_bytes = 0
        self.moved = Moved()
        self._free: list[tuple[int, int]] = []  # start and end of what is free, in order
        self._returned: deque[tuple[int, int]] = deque()  # what has become free since, in whichever thread

    @property
    def used_bytes(self) -> int:
        """Of what is reserved, what tensors take up."""
        return self.num_bytes - sum(end - start for start, end in self._gaps())

    def reserve(self, num_bytes: int) -> None:
        """Have room for so many bytes beside those that are used, or refuse.

        Raises:
            ZgraphError: there is no room; with what is missing.
        """
        more = self.used_bytes + num_bytes - self.num_bytes
        if more > 0:
            start = self._grow(padded(more), num_bytes)
            self.give_back(start, start + padded(more))
            self.num_bytes += padded(more)

    def allocate(self, numel: int, dtype: torch.dtype) -> Stored:
        """Room for a vector, which may not be read before it is written; it is free again when nothing refers to it."""
        size = padded(numel * dtype.itemsize)
        if all(end - start < size for start, end in self._gaps()):
            self.reserve(size + self.num_bytes - self.used_bytes)  # in one piece, and not in those that there are
        gaps = self._gaps()
        index = next(i for i, (start, end) in enumerate(gaps) if end - start >= size)
        start, end = gaps[index]
        gaps[index : index + 1] = [(start + size, end)] if end - start > size else []
        found = self.tensor(start, (numel,), (1,), dtype)
        weakref.finalize(found, self.give_back, start, start + size)
        return found

    @abstractmethod
    def tensor(self, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Stored:
        """A tensor that lies from a byte on."""

    @abstractmethod
    def check_room(self, num_bytes: int, ranks: int) -> None:
        """Refuse before anything is taken what would not fit if so many ranks of this machine each took as much.

        Raises:
            ZgraphError: it would not.
        """

    @abstractmethod
    def check(self) -> None:
        """Tell what could not be written.

        Raises:
            ZgraphError: with the reason; once.
        """

    @abstractmethod
    def finish(self) -> None:
        """Let nothing that is in flight read or write memory that is used for something else from now on."""

    @abstractmethod
    def _grow(self, more: int, num_bytes: int) -> int:
        """Have so many bytes more, in one piece; the first of them.

        Args:
            num_bytes: that were asked for.
        """

    def give_back(self, start: int, end: int) -> None:
        """What lies there is needed no more."""
        self._returned.append((start, end))

    def _gaps(self) -> list[tuple[int, int]]:
        """What is free, neighbours joined."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort()
        for i in range(len(self._free) - 1, 0, -1):
            (start, end), (then, last) = self._free[i - 1 : i + 1]
            if end == then:
                self._free[i - 1 : i + 1] = [(start, last)]
        return self._free


class Stored(ABC):
    """A tensor without gaps between its elements that lies on a lower tier.

    Attributes:
        tier: where.
        start: its first byte there.
        shape, strides, dtype, nbytes: as of a tensor in memory; strides in elements.
    """

    def __init__(
        self, tier: Tier, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.tier, self.start = tier, start
        self.shape, self.strides, self.dtype = torch.Size(shape), tuple(strides), dtype
        self.nbytes = self.shape.numel() * dtype.itemsize
        self._room: Stored | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        tier: Tier = copy.deepcopy(self.tier, memo)
        memo[id(self)] = copied = tier.allocate(self.shape[0], self.dtype)
        copied.write(self.read())
        return copied

    def part(self, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Stored:
        """A tensor in the room of this one, which keeps it; what parts share is what was written there last.

        Args:
            start: its first byte, counted from this one's: a multiple of ``PAGE``.
            shape, strides, dtype: of a tensor without gaps between its elements.
        """
        found = self.tier.tensor(self.start + start, shape, strides, dtype)
        found._room = self
        return found

    @abstractmethod
    def load(self, out: torch.Tensor | None = None) -> Transfer:
        """Start to read it.

        Args:
            out: where to; new memory if None.
        """

    @abstractmethod
    def store(self, value: torch.Tensor) -> Transfer:
        """Start to write ``value``, which must stay as it is until that has been waited for."""

    def read(self) -> torch.Tensor:
        """All of it, in memory of its own.

        Raises:
            ZgraphError: it cannot be read, or is not what was written.
        """
        return self.load().wait()  # type: ignore[no-any-return]

    def write(self, value: torch.Tensor) -> None:
        """Write all of it.

        Raises:
            ZgraphError: it cannot be written.
        """
        self.store(value).wait()
        self.tier.check()

    def _as_stored(self, value: torch.Tensor) -> torch.Tensor:
        """A value as it lies there: itself, or a copy with other strides."""
        assert value.shape == self.shape, "another shape"
        assert value.dtype == self.dtype, "another dtype"
        if _layout(value.shape, value.stride()) == _layout(self.shape, self.strides):
            return value
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=value.device).copy_(value)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor without gaps between its elements, in the order in which it lies there."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _layout(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and strides, but for dimensions of one element, whose strides say nothing."""
    return [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
