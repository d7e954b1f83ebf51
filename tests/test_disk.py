"""What is written to a disk is what is read from it, or there is an error; and nothing stays behind."""

from __future__ import annotations

import copy
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph.disk import BLOCK_BYTES, DEFAULT_PATH, Disk, DiskTensor
from zgraph.errors import DiskError
from zgraph.tiers import PAGE, padded

REPO = Path(__file__).parents[1]


def in_memory(num_bytes: int, shift: int) -> torch.Tensor:
    """So many bytes that begin ``shift`` bytes behind a page."""
    memory = torch.empty(num_bytes + 2 * PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE + shift
    return memory[start : start + num_bytes]


def disk_at(path: str | Path, *, direct: bool = True) -> Disk:
    """A disk; where ``direct`` is False, as on a file system without direct transfers."""
    if direct:
        return Disk(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refuse)
        disk = Disk(path)
    assert not disk.is_direct
    return disk


def refuse(*_: Any) -> int:
    """What the system says to what it cannot do."""
    raise OSError(errno.EIO, "refused")


def there(disk: Disk, value: torch.Tensor) -> DiskTensor:
    tensor = disk.allocate(len(value), value.dtype)
    tensor.write(value)
    return tensor


@few_examples(60)
@given(
    st.one_of(st.integers(0, 3 * PAGE), st.integers(BLOCK_BYTES - 2, BLOCK_BYTES + PAGE + 2)),
    st.integers(0, 1),
    st.integers(0, 1),
    st.booleans(),
)
def test_any_bytes_from_anywhere_come_back_anywhere(num_bytes: int, source: int, target: int, direct: bool) -> None:
    disk = disk_at(DEFAULT_PATH, direct=direct)
    value = in_memory(num_bytes, source).copy_(torch.arange(num_bytes, dtype=torch.int64).mul_(7919).to(torch.uint8))
    tensor = there(disk, value)
    out = in_memory(num_bytes, target).fill_(255)
    assert tensor.load(out).wait() is out
    assert torch.equal(out, value)
    assert (disk.moved.read_bytes, disk.moved.written_bytes) == (num_bytes, num_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_any_dtype_comes_back(disk_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(1000).to(dtype)
    found = there(Disk(disk_path), value).read()
    assert found.dtype is dtype
    assert torch.equal(found, value)


def test_what_was_never_written_is_not_read(disk_path: Path) -> None:
    with pytest.raises(DiskError, match="never been written completely"):
        Disk(disk_path).allocate(10, torch.float32).read()


def test_room_is_used_again_in_whatever_order_tensors_go(disk_path: Path) -> None:
    disk = Disk(disk_path)
    disk.reserve(6 * PAGE)
    tensors = [disk.allocate(PAGE, torch.uint8) for _ in range(6)]
    assert disk.used_bytes == disk.num_bytes == 6 * PAGE
    starts = {tensor.start for tensor in tensors}
    assert len(starts) == 6
    del tensors[1], tensors[2], tensors[0]
    assert disk.used_bytes == 3 * PAGE
    large = disk.allocate(2 * PAGE, torch.uint8)  # two that lay side by side
    assert disk.num_bytes == 6 * PAGE
    assert large.start in starts
    more = disk.allocate(2 * PAGE, torch.uint8)  # there is one page left, which is not enough
    assert disk.num_bytes == 8 * PAGE
    assert len({tensor.start for tensor in (*tensors, large, more)}) == 5


def test_a_file_has_no_name_and_goes_with_its_last_tensor(disk_path: Path) -> None:
    disk = Disk(disk_path)
    value = torch.randn(100)
    tensor = there(disk, value)
    assert os.fstat(disk._fd).st_size == padded(400)
    assert os.fstat(disk._fd).st_mode & 0o077 == 0
    assert list(disk_path.iterdir()) == []
    fd = disk._fd
    del disk
    assert torch.equal(tensor.read(), value)
    del tensor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.fixture
def only_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system here knows files without names."""
    opened = os.open

    def refused(path: Any, flags: int, mode: int = 0o777, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no such files")
        return opened(path, flags, mode, **kwargs)

    monkeypatch.setattr(os, "open", refused)


@pytest.mark.usefixtures("only_names")
def test_files_without_names_are_made_where_the_file_system_knows_none(disk_path: Path) -> None:
    disk = Disk(disk_path)
    assert torch.equal(there(disk, torch.ones(100)).read(), torch.ones(100))
    assert list(disk_path.iterdir()) == []
    assert os.fstat(disk._fd).st_mode & 0o077 == 0


@pytest.mark.usefixtures("only_names")
def test_the_name_of_a_run_that_was_killed_before_it_lost_it_goes_with_the_next(
    disk_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink
    (disk_path / "zgraph-training").write_text("theirs")
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "unlink", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        Disk(disk_path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(disk_path.iterdir())) == 2

    def unlink_twice(path: str, **kwargs: Any) -> None:  # another run was faster
        unlink(path, **kwargs)
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink_twice)
    assert torch.equal(there(Disk(disk_path), torch.ones(100)).read(), torch.ones(100))
    assert [path.name for path in disk_path.iterdir()] == ["zgraph-training"]


def test_a_copy_has_a_file_of_its_own(disk_path: Path) -> None:
    tensors = [there(Disk(disk_path), torch.full([100], float(i))) for i in range(2)]
    tensors.append(there(tensors[0].tier, torch.full([100], 2.0)))
    copied = copy.deepcopy(tensors)
    assert copied[0].tier is copied[2].tier
    assert len({id(tensor.tier) for tensor in (*tensors, *copied)}) == 4
    for i, tensor in enumerate(tensors):
        tensor.write(torch.full([100], -1.0))
        assert torch.equal(copied[i].read(), torch.full([100], float(i)))


def cached_bytes(disk: Disk) -> int:
    """Of the file, what is in the page cache."""
    with mmap.mmap(disk._fd, disk.num_bytes, prot=mmap.PROT_READ) as memory:
        data = np.frombuffer(memory, dtype=np.uint8)
        address = data.ctypes.data
        del data
        pages = (ctypes.c_ubyte * (disk.num_bytes // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(disk.num_bytes), pages) == 0
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


@pytest.mark.parametrize("direct", [True, False])
def test_what_was_moved_does_not_stay_in_the_page_cache(disk_path: Path, direct: bool) -> None:
    disk = disk_at(disk_path, direct=direct)
    tensor = there(disk, torch.randn(2 * BLOCK_BYTES))
    assert cached_bytes(disk) <= tensor.nbytes // 2  # the kernel may not be done with what was moved last
    tensor.read()
    assert cached_bytes(disk) <= tensor.nbytes // 2


# What goes wrong


def test_the_directory_may_vanish(disk_path: Path) -> None:
    (disk_path / "folder").mkdir()
    tensor = there(Disk(disk_path / "folder"), torch.ones(5000))
    (disk_path / "folder").rmdir()
    tensor.write(torch.zeros(5000))
    assert torch.equal(tensor.read(), torch.zeros(5000))


@pytest.mark.parametrize("where", ["missing", "file"])
def test_no_directory_no_disk(disk_path: Path, where: str) -> None:
    (disk_path / "file").touch()
    with pytest.raises(DiskError, match=f"cannot make a file in {disk_path / where}: .*\n.*another offload_path"):
        Disk(disk_path / where)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="there is no file system in memory")
def test_a_disk_in_memory_is_none() -> None:
    with pytest.raises(DiskError, match="/dev/shm lies in memory, not on a disk"):
        Disk("/dev/shm")


def test_room_that_is_not_there_is_refused_and_changes_nothing(disk_path: Path) -> None:
    disk = Disk(disk_path)
    tensor = there(disk, torch.ones(100))
    with pytest.raises(DiskError, match=rf"cannot reserve {2**50} bytes, {2**50} more than there are, in {disk_path}"):
        disk.reserve(2**50)
    assert disk.num_bytes == PAGE
    assert torch.equal(tensor.read(), torch.ones(100))


def test_a_full_disk_is_refused_when_room_is_reserved(disk_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        disk = Disk(disk_path)
        disk.reserve(2**20)
        with pytest.raises(DiskError, match=r"File too large\n.*make room there"):
            disk.reserve(2**20 + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("byte", [0, PAGE, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 99])
def test_a_byte_that_has_changed_is_found(disk_path: Path, byte: int) -> None:
    disk = Disk(disk_path)
    disk.allocate(100, torch.uint8)
    tensor = there(disk, torch.zeros(BLOCK_BYTES + 100, dtype=torch.uint8))
    with open(f"/proc/self/fd/{disk._fd}", "r+b") as file:
        file.seek(tensor.start + byte)
        file.write(b"\1")
    with pytest.raises(DiskError, match=f"the disk .{disk_path}. gave back other bytes than were written"):
        tensor.read()


def test_a_write_that_fails_is_told_once_and_what_it_left_is_not_read(
    disk_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(disk_path)
    tensor = there(disk, torch.ones(BLOCK_BYTES // 4 + 10))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        assert tensor.store(torch.zeros(BLOCK_BYTES // 4 + 10)).wait() is tensor
        with pytest.raises(DiskError, match=rf"cannot write \d+ bytes at \d+ in {disk_path}: Input/output error"):
            disk.check()
        disk.check()
    with pytest.raises(DiskError, match="never been written completely"):
        tensor.read()
    tensor.write(torch.ones(BLOCK_BYTES // 4 + 10))
    assert torch.equal(tensor.read(), torch.ones(BLOCK_BYTES // 4 + 10))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("turn", [PAGE, 3 * PAGE + 5])
def test_the_system_may_take_several_turns(
    disk_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int, direct: bool
) -> None:
    disk = disk_at(disk_path, direct=direct)
    for name in ("preadv", "pwritev"):
        move: Callable[..., int] = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, move=move: min(move(*args), turn))  # the rest is done again
    value = torch.arange(50_001, dtype=torch.int32)
    assert torch.equal(there(disk, value).read(), value)


def test_a_file_that_ends_early_is_an_error_and_not_a_loop(disk_path: Path) -> None:
    disk = Disk(disk_path)
    tensor = there(disk, torch.ones(10_000))
    os.truncate(disk._fd, PAGE)
    with pytest.raises(DiskError, match="Input/output error"):
        tensor.read()


SCRIPT = """
import signal, sys, time, torch
from zgraph.disk import Disk
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
disk = Disk(sys.argv[1])
tensor = disk.allocate(2**22, torch.float32)
print("ready", flush=True)
while True:
    tensor.write(torch.ones(2**22))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_behind_however_a_process_ends(disk_path: Path, kind: signal.Signals) -> None:
    free = os.statvfs(disk_path).f_bavail
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(disk_path)], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    assert list(disk_path.iterdir()) == []
    process.send_signal(kind)
    process.communicate(timeout=60)
    assert list(disk_path.iterdir()) == []
    assert os.statvfs(disk_path).f_bavail > free - 2**30 // os.statvfs(disk_path).f_bsize


def test_blocks_are_checked_by_the_crc_of_the_whole_block() -> None:
    disk = Disk(DEFAULT_PATH)
    value = torch.randn(BLOCK_BYTES // 4 + 7)
    tensor = there(disk, value)
    data = value.view(torch.uint8).numpy()
    assert tensor._crcs == [zlib.crc32(data[:BLOCK_BYTES]), zlib.crc32(data[BLOCK_BYTES:])]
