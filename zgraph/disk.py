"""Tensors on a disk: one file of each rank, read and written in large aligned blocks by a few threads.

The file has no name: nobody else can open it, runs that use one directory never meet, and the kernel takes its bytes
back when the process ends, however it ends. Room is reserved before it is used. Transfers go past the page cache where
the file system lets them (``O_DIRECT``). Each block has a CRC, kept in memory and checked whenever the block is read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from isal import isal_zlib

from zgraph.errors import DiskError
from zgraph.files import passing_name, remove_left_behind
from zgraph.tiers import PAGE, Stored, Tier, bytes_of, padded
from zgraph.workers import Job, Workers

BLOCK_BYTES = 2**21
"""Of one read or write, and of what has one CRC: enough for a disk to be at its fastest with a few of them at once."""

DEFAULT_PATH = "/var/tmp"
"""Where files lie if it is not said: what is there has to outlast a reboot (Filesystem Hierarchy Standard, 5.15), so
that it is not in memory, as ``/tmp`` often is."""


class Disk(Tier):
    """A file, and the room in it.

    Args:
        path: of the directory that it lies in.

    Attributes:
        num_threads: how many blocks are in flight at once.
        device: where tensors are that come and go.
        num_bytes: of the file.
        is_direct: transfers go past the page cache.

    Raises:
        DiskError: there can be no file; with the path and the reason.
    """

    name = "disk"
    num_threads: ClassVar[int] = 4
    device = torch.device("cpu")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._scratch = threading.local()
        self._failure: DiskError | None = None
        with self._explained("make a file"):
            self._fd = _open_without_name(self.path)
        self._workers = Workers(self.num_threads, "zgraph-disk")
        weakref.finalize(self, _close, self._fd, self._workers)
        if _is_in_memory(self._fd):
            raise DiskError(f"{self.path} lies in memory, not on a disk", fix="use another offload_path")
        self.is_direct = True
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError:
            self.is_direct = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Disk:
        """A file of its own, for what is copied to it."""
        memo[id(self)] = copied = Disk(self.path)
        return copied

    def tensor(self, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> DiskTensor:
        return DiskTensor(self, start, shape, strides, dtype)

    def check_room(self, num_bytes: int, ranks: int) -> None:
        """Room is taken at once or not at all: see ``reserve``."""

    def _grow(self, more: int, num_bytes: int) -> int:
        with self._explained(f"reserve {num_bytes} bytes, {more} more than there are,"):
            try:
                os.posix_fallocate(self._fd, self.num_bytes, more)
            except OSError:
                os.ftruncate(self._fd, self.num_bytes)  # a part of it may have been taken
                raise
        return self.num_bytes

    def check(self) -> None:
        """Tell what could not be written.

        Raises:
            DiskError: with the path, the bytes and the reason; once.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Wait for all that is in flight, so that memory it reads or writes may be used for something else."""
        self._workers.finish()

    # -- what tensors ask for ---------------------------------------------------------------------------------

    def submit(self, work: Callable[..., None], *args: Any) -> Job:
        """Run something in one of the threads."""
        return self._workers.start(partial(work, *args))

    def ready(self) -> Any:
        """What a transfer that is started now has to come behind: nothing, where computing is done when it is told."""

    def load(self, block: torch.Tensor, start: int, crc: int | None, ready: Any) -> None:
        """Read a block from ``start`` on, and check it; in a thread.

        Args:
            block: bytes of the device.
            ready: what it has to come behind.
        """
        self.read(block.numpy(), start, crc)

    def store(self, block: torch.Tensor, start: int, ready: Any) -> int:
        """Write a block from ``start`` on; its CRC. In a thread; see ``load``."""
        return self.write(block.numpy(), start)

    def arrived(self) -> None:
        """Let what is computed from now on find what was loaded."""

    def put_off(self, failure: DiskError) -> None:
        """Have ``check`` tell it."""
        self._failure = self._failure or failure

    def read(self, data: np.ndarray, start: int, crc: int | None) -> None:
        """Read a block, and check it."""
        if crc is None:
            if self._failure is not None:  # it was this step that could not write it
                raise self._failure
            raise DiskError(
                f"{len(data)} bytes on the disk ({self.path}) have never been written completely", fix=_RESTART
            )
        with self._explained(f"read {len(data)} bytes at {start}"):
            for piece, at in self._pieces(data):
                whole = piece if self._is_fit(piece) else self._bounce(padded(len(piece)))
                self._transfer(os.preadv, whole, start + at)
                if whole is not piece:
                    piece[:] = whole[: len(piece)]
            if not self.is_direct:
                os.posix_fadvise(self._fd, start, len(data), os.POSIX_FADV_DONTNEED)
        if isal_zlib.crc32(data.data) != crc:
            raise DiskError(
                f"the disk ({self.path}) gave back other bytes than were written: the CRC of {len(data)} bytes at "
                f"{start} differs",
                fix="do not trust that disk: use another offload_path, and load what was saved last",
            )

    def write(self, data: np.ndarray, start: int) -> int:
        """Write a block; its CRC."""
        with self._explained(f"write {len(data)} bytes at {start}"):
            for piece, at in self._pieces(data):
                whole = piece if self._is_fit(piece) else self._bounce(padded(len(piece)))
                if whole is not piece:
                    whole[: len(piece)] = piece
                    whole[len(piece) :] = 0
                self._transfer(os.pwritev, whole, start + at)
            if not self.is_direct:  # only what is on the disk can leave the page cache
                os.fdatasync(self._fd)
                os.posix_fadvise(self._fd, start, len(data), os.POSIX_FADV_DONTNEED)
        return isal_zlib.crc32(data.data)

    def _pieces(self, data: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """What is moved at once, each with its offset: all of it, but for the part of a page at the end."""
        whole = len(data) // PAGE * PAGE if self.is_direct else len(data)
        if whole:
            yield data[:whole], 0
        if whole < len(data):
            yield data[whole:], whole

    def _is_fit(self, data: np.ndarray) -> bool:
        return not self.is_direct or (data.ctypes.data % PAGE == 0 and len(data) % PAGE == 0)

    def _bounce(self, num_bytes: int) -> np.ndarray:
        """Memory of this thread that direct transfers can go to."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), dtype=np.uint8)
        found: np.ndarray = self._scratch.memory[:num_bytes]
        return found

    def _transfer(self, move: Callable[[int, list[Any], int], int], data: np.ndarray, start: int) -> None:
        """Read or write all of ``data``, in as many turns as the system takes."""
        done = 0
        while done < len(data):
            moved = move(self._fd, [data[done:]], start + done)
            if self.is_direct:
                moved -= moved % PAGE  # the next turn begins at a page
            if moved == 0:
                raise OSError(errno.EIO, f"only {done} bytes were moved")
            done += moved

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Say what could not be done where."""
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            fix = "make room there, or use another offload_path" if full else "use another offload_path"
            raise DiskError(f"cannot {action} in {self.path}: {reason}", fix=fix) from error


_RESTART = "restart from what was saved last"


class DiskTensor(Stored):
    """A tensor in a file."""

    tier: Disk

    def __init__(
        self, disk: Disk, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__(disk, start, shape, strides, dtype)
        self._crcs: list[int | None] = [None] * -(-self.nbytes // BLOCK_BYTES)
        self._writing: list[Job] = []
        self._unwritten: torch.Tensor | None = None

    def load(self, out: torch.Tensor | None = None) -> DiskTransfer:
        """Start to read it.

        Args:
            out: where to; new memory if None. Memory that begins at a multiple of ``PAGE`` needs no copy on the way.
        """
        assert all(job.is_done for job in self._writing), "it is still being written"
        disk = self.tier
        if self._unwritten is not None:
            return DiskTransfer([], self._unwritten if out is None else out.copy_(self._unwritten), disk)
        result = out
        if result is None:
            result = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=disk.device)
        disk.moved.read_bytes += self.nbytes
        ready, crcs = disk.ready(), self._crcs
        blocks = self._blocks(result)
        jobs = [disk.submit(disk.load, block, start, crcs[index], ready) for index, block, start in blocks]
        return DiskTransfer(jobs, result, disk, source=self)

    def store(self, value: torch.Tensor) -> DiskTransfer:
        """Start to write ``value``, which must stay as it is until that has been waited for.

        What fails is told by ``Disk.check``, so that a step can go on to its end, together with other ranks. What a
        room was to hold is then held in memory, so that it can be loaded as if it had been written.
        """
        value = self._as_stored(value)
        self._unwritten = None
        self.tier.moved.written_bytes += self.nbytes
        crcs = self._crcs = [None] * len(self._crcs)  # a store before this one, if it is not done, keeps its own
        ready = self.tier.ready()
        self._writing = [
            self.tier.submit(self._write_block, crcs, index, block, start, ready)
            for index, block, start in self._blocks(value)
        ]
        return DiskTransfer(self._writing, self, self.tier, value)

    def _blocks(self, tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Number, memory and place in the file of each block."""
        data = bytes_of(tensor)
        for index, at in enumerate(range(0, self.nbytes, BLOCK_BYTES)):
            yield index, data[at : at + BLOCK_BYTES], self.start + at

    def keep_unwritten(self, value: torch.Tensor) -> None:
        """Hold what could not be written, if this is part of a room: nothing but this step needs it."""
        if self._room is not None:
            self._unwritten = value.clone()

    def _write_block(self, crcs: list[int | None], index: int, block: torch.Tensor, start: int, ready: Any) -> None:
        crcs[index] = self.tier.store(block, start, ready)


@dataclass
class DiskTransfer:
    """A read or a write that has been started.

    Attributes:
        result: what is read, or the ``DiskTensor`` that is written.
        keep: what is written.
        source: the ``DiskTensor`` that is read, whose room is not another's meanwhile.
    """

    jobs: list[Job]
    result: Any
    disk: Disk = field(repr=False)
    keep: torch.Tensor | None = None
    source: DiskTensor | None = field(default=None, repr=False)

    def wait(self) -> Any:
        """What was read, or the ``DiskTensor`` that was written, once all of it has arrived.

        Raises:
            DiskError: it could not be read; of a write, see ``DiskTensor.store``.
        """
        for job in self.jobs:
            job.wait()
        if self.keep is None:
            self.disk.arrived()  # also if a block is bad: others are on their way to where that was to be
        for job in self.jobs:
            error = job.error
            if error is not None and self.keep is not None and isinstance(error, DiskError):
                self.disk.put_off(error)
                self.result.keep_unwritten(self.keep)
            elif error is not None:
                raise error
        self.keep = self.source = None
        return self.result


def _close(fd: int, workers: Workers) -> None:
    workers.end()
    os.close(fd)


def _is_in_memory(fd: int) -> bool:
    """Whether the file system of a file keeps it in memory (proc_pid_mountinfo(5))."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return any(mount[2] == number and mount[mount.index("-") + 1] in ("tmpfs", "ramfs") for mount in mounts)


def _open_without_name(directory: Path) -> int:
    """A new file that no other process can open, and that is gone when this one ends.

    Raises:
        OSError: there is no such directory, or it cannot be written to.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    # The file system knows no such files: the name is gone again before anything is written. It outlasts a process that
    # is killed just then, until the next one.
    remove_left_behind(directory)
    name = directory / passing_name()
    fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.suppress(FileNotFoundError):  # another run has removed it, which is as well
        os.unlink(name)
    return fd
