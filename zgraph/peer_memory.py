"""Reading the memory of the other ranks of one host, by ``process_vm_readv(2)``.

The kernel copies from one process to another in one pass, without a socket between them; MPI libraries call it cross
memory attach. It needs Linux, one PID namespace and the permission to trace (``ptrace(2)``): ranks try before they rely
on it, by reading random bytes of each other.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zgraph.errors import StoppedError

log = logging.getLogger("zgraph")

_MOST_BYTES = 2**24
"""Of one call of the kernel: between calls, the process can be interrupted."""

_TOKEN_BYTES = 32
_PR_SET_PTRACER = 0x59616D61  # <linux/prctl.h>
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _process_vm_readv() -> Any:
    """The C library's function; None where there is none."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is not None:
        vector = ctypes.POINTER(_Iovec)
        function.argtypes = [ctypes.c_int, vector, ctypes.c_ulong, vector, ctypes.c_ulong, ctypes.c_ulong]
        function.restype = ctypes.c_ssize_t
    return function


def read_memory(pid: int, address: int, out: torch.Tensor) -> None:
    """Fill ``out``, a contiguous CPU tensor, with the bytes that lie at an address of another process.

    Raises:
        OSError: there is no such process or memory, or no permission to read it.
    """
    function = _process_vm_readv()
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here, num_bytes, done = out.data_ptr(), out.nbytes, 0
    while done < num_bytes:
        length = min(num_bytes - done, _MOST_BYTES)
        to, source = _Iovec(here + done, length), _Iovec(address + done, length)
        read = function(pid, ctypes.byref(to), 1, ctypes.byref(source), 1, 0)
        if read <= 0:  # a part of the memory is read before the kernel finds the rest missing
            code = ctypes.get_errno() if read < 0 else errno.EFAULT
            raise OSError(code, os.strerror(code))
        done += read


def may_read_peers() -> bool:
    """Whether this process may read memory this way, and its siblings may do so as far as a process alone can tell."""
    token = torch.frombuffer(bytearray(os.urandom(_TOKEN_BYTES)), dtype=torch.uint8)
    return _refusal(os.getpid(), token.data_ptr(), token) is None and _yama_scope() <= 1


class PeerMemory:
    """The memory of a group's ranks.

    Args:
        pids: process ids by rank.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids

    def read(self, rank: int, address: int, out: torch.Tensor, what: str) -> None:
        """Fill ``out`` from a rank's memory.

        Args:
            what: is read, for the error.

        Raises:
            StoppedError: the rank is gone, or its memory cannot be read any more.
        """
        try:
            read_memory(self._pids[rank], address, out)
        except OSError as error:
            raise StoppedError(
                f"rank {rank} has stopped: its {out.nbytes:,} bytes of {what} cannot be read ({error.strerror})",
                fix="look for the first error among the ranks' outputs",
            ) from error


_found: WeakKeyDictionary[dist.ProcessGroup, tuple[int, ...] | None] = WeakKeyDictionary()
"""What was found out, by group and not by its name: a later group may have the name of an earlier one."""


def find_readable_peers(group: dist.ProcessGroup) -> tuple[int, ...] | None:
    """The ranks' process ids by rank if every rank can read the memory of every other; None if one cannot.

    All ranks call it together, with a group that carries CPU tensors; they exchange messages the first time.
    """
    if group not in _found:
        _found[group] = _try(group)
        if _found[group] is None:
            _forbid_siblings()
    return _found[group]


def _try(group: dist.ProcessGroup) -> tuple[int, ...] | None:
    _allow_siblings()
    token = torch.frombuffer(bytearray(os.urandom(_TOKEN_BYTES)), dtype=torch.uint8)
    mine = torch.cat([torch.tensor([os.getpid(), token.data_ptr()]), token.view(torch.int64)])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    tries = (_refusal(int(each[0]), int(each[1]), each[2:]) for each in theirs)
    refusals = [why for why in tries if why is not None]
    num_refusals = torch.tensor(len(refusals))
    dist.all_reduce(num_refusals, group=group)  # after it, nobody reads the token any more
    if num_refusals.item():
        log.debug(
            "ranks send messages, for not all can read each other's memory (%s)", ", ".join(refusals) or "elsewhere"
        )
        return None
    return tuple(int(each[0]) for each in theirs)


def _refusal(pid: int, address: int, token: torch.Tensor) -> str | None:
    """Why a process cannot be read; None if it can. On another host or namespace, the id is nobody's or another's."""
    found = torch.empty_like(token)
    try:
        read_memory(pid, address, found)
    except OSError as error:
        return str(error.strerror)
    return None if torch.equal(found, token) else "another process has its id here"


def _yama_scope() -> int:
    """0: processes of one user may trace each other; 1: their descendants and whom they name; above: no one."""
    try:
        return int(_YAMA.read_text())
    except (OSError, ValueError):  # a kernel without it
        return 0


def _allow_siblings() -> None:
    """Where only descendants may read a process, let those of its parent: the ranks that one launcher has started.

    Not if that is the system's first process, of which all are descendants.
    """
    if _yama_scope() == 1 and os.getppid() > 1:
        _set_tracer(os.getppid())


def _forbid_siblings() -> None:
    """Take the permission back if no group makes use of it."""
    if _yama_scope() == 1 and not any(_found.values()):
        _set_tracer(0)


def _set_tracer(pid: int) -> None:
    """Who may trace this process besides its ancestors, with its descendants; 0 for nobody."""
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    prctl(_PR_SET_PTRACER, pid, 0, 0, 0)  # it fails where Yama is not built in, and then nothing is refused by it
