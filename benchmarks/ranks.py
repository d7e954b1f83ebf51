"""The ranks of one peer: processes that wait, do one command together, and wait again.

Forking them from a process that has torch imported makes them start at once and share the imports' memory. Every peer
has ranks of its own, all alive at the same time, so steps of different peers can alternate in one run while neither
allocator, caches nor patches of one peer touch another.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class RankError(Exception):
    """A rank raised, died or did not answer in time; the message has what is known."""


class Ranks:
    """Processes that each hold one object made by ``make``, and call its methods on command.

    Args:
        make: called in each process with its rank.
        num_ranks: how many processes.
        log_directory: where each rank's output goes; its end is quoted in a failure.
    """

    def __init__(self, make: Callable[[int], object], num_ranks: int, log_directory: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._logs = [log_directory / f"rank{rank}.log" for rank in range(num_ranks)]
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._processes: list[multiprocessing.context.ForkProcess] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, rank, theirs, self._logs[rank], os.getpid()))
            process.start()
            theirs.close()  # the rank has the only copy, so its death shows as end of file
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, method: str, timeout_s: float) -> list[Any]:
        """Call ``method`` on every rank's object at once; what each returned.

        Raises:
            RankError: after ending all ranks.
        """
        replies: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout_s
        try:
            for pipe in self._pipes:
                pipe.send(method)
            while waiting:
                ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankError(f"ranks {sorted(waiting.values())} did not finish {method} in {timeout_s:.0f} s")
                for pipe in self._pipes:
                    if pipe in ready:
                        rank = waiting.pop(pipe)
                        replies[rank] = self._receive(rank, method)
        except (RankError, OSError):
            self.end()
            raise
        return [replies[rank] for rank in range(len(self._pipes))]

    def _receive(self, rank: int, method: str) -> Any:
        try:
            succeeded, reply = self._pipes[rank].recv()
        except EOFError:
            process = self._processes[rank]
            process.join()
            code = process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
            tail = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-20:])
            raise RankError(f"rank {rank} {how} during {method}\n{tail}".rstrip()) from None
        if not succeeded:
            raise RankError(f"rank {rank} failed during {method}\n{reply}")
        return reply

    def end(self) -> None:
        """End every rank, whatever it is doing, and give its memory back."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _serve(
    make: Callable[[int], object],
    rank: int,
    pipe: multiprocessing.connection.Connection,
    log: Path,
    parent: int,
) -> None:
    """A rank's main loop; its end of the pipe closes with the parent."""
    # A benchmark that is killed must not leave ranks behind that fill the machine.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        served = make(rank)
        while True:
            pipe.send((True, getattr(served, pipe.recv())()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
