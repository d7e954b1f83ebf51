"""A disk beside a device: blocks pass through a few of the host's that are page-locked.

A thread reads a block from the disk into the host's memory and gives its copy to the device's stream, or waits for the
copy from there and writes what has come. So the disk and the link work at once, and no tensor is ever whole on the
host. As with ``zgraph.host``, a copy comes behind all that computing was given before its transfer was started; where a
wait returns, all copies of a load have been given to the stream, and computing that is told of from then on comes
behind them, or all of a store is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, ClassVar

import torch

from zgraph.disk import BLOCK_BYTES, Disk
from zgraph.errors import HostError
from zgraph.host import Streams, Way, pinned


class StagedDisk(Disk):
    """A file, and the tensors of one device in it.

    Args:
        path: of the directory that it lies in.
        device: where the tensors are computed with.
        streams: the device's.

    Raises:
        DiskError: there can be no file; with the path and the reason.
        HostError: there is no memory for blocks on their way.
    """

    num_threads: ClassVar[int] = 8  # some of which wait for a copy while others read and write

    def __init__(self, path: str | os.PathLike[str], device: torch.device, streams: Streams) -> None:
        super().__init__(path)
        self.device, self.streams = device, streams
        num_bytes = self.num_threads * BLOCK_BYTES
        try:
            memory = pinned(streams, num_bytes)
        except (MemoryError, RuntimeError) as error:
            raise HostError(
                f"cannot lock {num_bytes} bytes of the host's memory, for blocks on their way to a disk: {error}",
                fix="let nothing lie there (`offload=`), or use a machine with more memory",
            ) from error
        weakref.finalize(self, streams.unpin, memory)
        self._blocks: SimpleQueue[torch.Tensor] = SimpleQueue()  # that no thread uses
        # The event of the copy that has read each block last, by its place; it stays there until the next one.
        self._last: dict[int, Any] = {}
        for start in range(0, num_bytes, BLOCK_BYTES):
            block = memory[start : start + BLOCK_BYTES]
            self._last[block.data_ptr()] = None
            self._blocks.put(block)

    def __deepcopy__(self, memo: dict[int, Any]) -> StagedDisk:
        """A file of its own, for what is copied to it."""
        memo[id(self)] = copied = StagedDisk(self.path, self.device, self.streams)
        return copied

    def ready(self) -> Any:
        return self.streams.computed()

    def load(self, block: torch.Tensor, start: int, crc: int | None, ready: Any) -> None:
        with self._staged(len(block)) as staged:
            self.read(staged.numpy(), start, crc)
            self._last[staged.data_ptr()] = self.streams.copy(Way.IN, block, staged, [ready])

    def store(self, block: torch.Tensor, start: int, ready: Any) -> int:
        with self._staged(len(block)) as staged:
            self.streams.wait(self.streams.copy(Way.OUT, staged, block, [ready]))
            return self.write(staged.numpy(), start)

    def arrived(self) -> None:
        for event in filter(None, [*self._last.values()]):
            self.streams.hold_up(event)

    def finish(self) -> None:
        super().finish()
        self.arrived()

    @contextlib.contextmanager
    def _staged(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """A block that no copy reads any more, for this thread alone."""
        block = self._blocks.get()
        try:
            last = self._last[block.data_ptr()]
            if last is not None:
                self.streams.wait(last)
            yield block[:num_bytes]
        finally:
            self._blocks.put(block)
