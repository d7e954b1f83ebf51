"""Parameters in memory that the ranks of one host share: each writes its part, and reads the others' where they lie.

A file in memory, without a name (``memfd_create(2)``), has a bucket's parts one after the other, as a gather would put
them, and every rank maps all of it. So nothing is copied where a bucket is read whole (``zgraph::share``), and it lies
in the host's memory once. Ranks that may read each other's memory (``zgraph.peer_memory``) may open each other's files.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from zgraph.groups import serves_cpu
from zgraph.peer_memory import find_readable_peers
from zgraph.tiers import padded

_wholes = WeakTensorKeyDictionary()
"""By this rank's part of a vector that is shared, the vector."""


def whole_of(part: torch.Tensor) -> torch.Tensor | None:
    """The parts of all ranks, of which this is one; None where it lies in memory of its own."""
    found: torch.Tensor | None = _wholes.get(part)  # type: ignore[no-untyped-call]
    return found


def shared_bytes() -> int:
    """Of what this process shares, the bytes of its own parts."""
    return sum(part.nbytes for part in _wholes)


def allocate(
    sizes: Mapping[str, tuple[int, torch.dtype]], group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor] | None:
    """This rank's part of each of some vectors, zeros; None where ranks share no memory. All ranks call it together.

    Args:
        sizes: by name, elements of a rank's part and their dtype.
        group: the ranks, in whose order parts lie; None for a single process.
    """
    if group is None or not sizes or not serves_cpu(group):
        return None
    pids = find_readable_peers(group)
    if pids is None:
        return None
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    starts, num_bytes = {}, 0
    for name, (numel, dtype) in sizes.items():
        starts[name] = num_bytes
        num_bytes += padded(world * numel * dtype.itemsize)
    memory = _mapped(num_bytes, pids, rank, group)
    if memory is None:
        return None
    found = {}
    for name, (numel, dtype) in sizes.items():
        whole = torch.frombuffer(memory, dtype=dtype, count=world * numel, offset=starts[name])
        # A tensor of its own, not a view: nobody who has the part finds the others by its storage.
        own = torch.frombuffer(memory, dtype=dtype, count=numel, offset=starts[name] + rank * numel * dtype.itemsize)
        _wholes[own], found[name] = whole, own
    return found


def _mapped(num_bytes: int, pids: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> mmap.mmap | None:
    """A new file of the first rank, as each maps it; None if one of them cannot."""
    fd = -1
    try:
        if rank == 0:
            fd = os.memfd_create("zgraph", os.MFD_CLOEXEC)
            os.ftruncate(fd, num_bytes)
    except OSError:
        fd = _closed(fd)
    number = torch.tensor([fd if rank == 0 else 0])
    dist.broadcast(number, group_src=0, group=group)
    memory = None
    try:
        if number.item() >= 0:
            if rank > 0:
                fd = os.open(f"/proc/{pids[0]}/fd/{number.item()}", os.O_RDWR | os.O_CLOEXEC)
            memory = mmap.mmap(fd, num_bytes)
    except OSError:
        pass  # all are told
    num_without = torch.tensor([memory is None], dtype=torch.int64)
    dist.all_reduce(num_without, group=group)
    _closed(fd)  # what is mapped stays
    return None if num_without.item() else memory


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
