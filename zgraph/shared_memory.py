"""Parameters in memory that the ranks of one host share: each writes its part, and reads the others' where they lie.

A file in memory, without a name (``memfd_create(2)``), has a bucket's parts one after the other, as a gather would put
them, and every rank maps all of it. So nothing is copied where a bucket is read whole (``zgraph::share``), and it lies
in the host's memory once. Ranks that may read each other's memory (``zgraph.peer_memory``) may open each other's files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from zgraph.errors import RankError
from zgraph.groups import serves_cpu
from zgraph.peer_memory import find_readable_peers
from zgraph.tiers import PAGE, padded

_TOKEN_BYTES = 32

_wholes = WeakTensorKeyDictionary()
"""By this rank's part of a vector that is shared, the vector."""


def whole_of(part: torch.Tensor) -> torch.Tensor | None:
    """The parts of all ranks, of which this is one; None where it lies in memory of its own."""
    found: torch.Tensor | None = _wholes.get(part)  # type: ignore[no-untyped-call]
    return found


def shared_bytes() -> tuple[int, int]:
    """Of what this process shares, the bytes of its own parts, and those of the others'."""
    mine = sum(part.nbytes for part in _wholes)
    return mine, sum(_wholes[part].nbytes for part in _wholes) - mine


def may_share(group: dist.ProcessGroup) -> bool:
    """Whether the ranks of a group can map one file, as they find out by trying. All of them call it together."""
    pids = find_readable_peers(group) if serves_cpu(group) else None
    return pids is not None and isinstance(_mapped(PAGE, pids, group), mmap.mmap)


def allocate(sizes: Mapping[str, tuple[int, torch.dtype]], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """This rank's part of each of some vectors, zeros. All ranks call it together.

    Args:
        sizes: by name, elements of a rank's part and their dtype.
        group: the ranks, in whose order parts lie, which ``may_share``.

    Raises:
        RankError: one of them cannot map so much.
    """
    pids = find_readable_peers(group)
    assert pids is not None, "ranks that may share"
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    starts, num_bytes = {}, 0
    for name, (numel, dtype) in sizes.items():
        starts[name] = num_bytes
        num_bytes += padded(world * numel * dtype.itemsize)
    memory = _mapped(num_bytes, pids, group)
    if not isinstance(memory, mmap.mmap):
        raise RankError(
            f"{memory} of {world} ranks cannot map {num_bytes} bytes of memory that all of them share",
            fix="raise the limits of their address space and of files (`ulimit -v`, `ulimit -f`), or give zero=2",
        )
    found = {}
    for name, (numel, dtype) in sizes.items():
        whole = torch.frombuffer(memory, dtype=dtype, count=world * numel, offset=starts[name])
        # A tensor of its own, not a view: nobody who has the part finds the others by its storage.
        own = torch.frombuffer(memory, dtype=dtype, count=numel, offset=starts[name] + rank * numel * dtype.itemsize)
        _wholes[own], found[name] = whole, own
    return found


def _mapped(num_bytes: int, pids: tuple[int, ...], group: dist.ProcessGroup) -> mmap.mmap | int:
    """A new file of the first rank, as each maps it; or how many cannot. All ranks call it together."""
    is_first, fd = dist.get_rank(group) == 0, -1
    # What the file is known by, behind all else: where ``/proc`` is of other processes, a number may be another file's.
    token = torch.frombuffer(bytearray(os.urandom(_TOKEN_BYTES)), dtype=torch.int64)
    with contextlib.suppress(OSError):
        if is_first:
            fd = os.memfd_create("zgraph", os.MFD_CLOEXEC)
            os.pwrite(fd, token.numpy().tobytes(), num_bytes)
    told = torch.cat([torch.tensor([fd]), token])
    dist.broadcast(told, group_src=0, group=group)
    number, *_ = told.tolist()
    memory = None
    with contextlib.suppress(OSError, ValueError):
        if number >= 0:
            if not is_first:
                fd = os.open(f"/proc/{pids[0]}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
            if os.pread(fd, _TOKEN_BYTES + 1, num_bytes) == told[1:].numpy().tobytes():
                memory = mmap.mmap(fd, num_bytes)
    num_without = torch.tensor(memory is None, dtype=torch.int64)
    dist.all_reduce(num_without, group=group)
    if fd >= 0:
        os.close(fd)  # what is mapped stays
    return memory if memory is not None and not num_without.item() else int(num_without.item())
