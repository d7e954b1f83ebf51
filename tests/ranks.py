"""Run a function on N ranks, many times, quickly.

Workers are processes that stay warm, so a job costs milliseconds and not an import of torch; each job gets a
process group of its own. A worker that raises, dies or hangs fails the call with its rank and its traceback or
stack, and every worker is then replaced, so one test cannot poison the next. Functions and arguments travel by
pickle: define functions at the top of their module.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

GRACE_S = 10.0
"""Once a rank has failed the others may be waiting for it forever: how long they have to say what they think."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.fx.experimental.proxy_tensor"])


class RanksError(Exception):
    """Some rank raised, died or hung; the message says for each what it did, earliest first."""


@dataclass(frozen=True)
class _Worker:
    process: ForkServerProcess
    connection: Connection
    stacks: Path


class Ranks:
    """A pool of warm ranks. Jobs of any world size share its processes; it grows as needed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._workers: list[_Worker] = []
        self._serial = itertools.count()

    def run(
        self,
        function: Callable[..., Result],
        *args: Any,
        world: int = 2,
        group: bool | None = None,
        timeout_s: float = 240.0,
        **kwargs: Any,
    ) -> list[Result]:
        """Call ``function(*args, **kwargs)`` on ranks 0 to ``world - 1`` together.

        Args:
            group: whether ``torch.distributed`` is initialised (gloo); by default only when there is company.
            timeout_s: ranks that have not returned by then are hung.

        Returns:
            What each rank returned, in order of rank.

        Raises:
            RanksError: a rank raised, died or hung.
        """
        __tracebackhide__ = True  # the ranks' tracebacks are what matters
        serial = next(self._serial)
        with_group = world > 1 if group is None else group
        rendezvous = str(Path(self._folder.name, f"rendezvous{serial}")) if with_group else None
        job = pickle.dumps((function, args, kwargs))
        try:
            while len(self._workers) < world:
                self._workers.append(self._start_worker(f"{serial}-{len(self._workers)}"))
            for rank, worker in enumerate(self._workers[:world]):
                worker.connection.send_bytes(pickle.dumps((rank, world, rendezvous, timeout_s, job)))
            return self._collect(world, timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every worker; the next ``run`` starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _start_worker(self, name: str) -> _Worker:
        stacks = Path(self._folder.name, f"stacks{name}")
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs, str(stacks)), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        return _Worker(process, ours, stacks)

    def _collect(self, world: int, timeout_s: float) -> list[Any]:
        __tracebackhide__ = True
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers[:world])}
        results: list[Any] = [None] * world
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                why = "was still running when another failed" if failures else f"had not returned after {timeout_s} s"
                failures += [f"rank {rank} {why}\n{self._stack(rank)}" for rank in waiting.values()]
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())  # noqa: S301, our own worker wrote it
                except (EOFError, ConnectionError):
                    self._workers[rank].process.join()
                    succeeded, value = False, f"died with exit code {self._workers[rank].process.exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {world} {value}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise RanksError("\n" + "\n".join(failures))
        return results

    def _stack(self, rank: int) -> str:
        worker = self._workers[rank]
        if worker.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.1)
            if worker.stacks.exists() and worker.stacks.stat().st_size:
                break
        return worker.stacks.read_text() if worker.stacks.exists() else "(it has no stack: it had not started)"


def _serve(connection: Connection, stacks: str) -> None:
    """What a worker does: jobs, until the other end of the pipe is closed."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    torch.set_num_threads(1)
    gc.freeze()  # the modules, which are here to stay: each job ends with a search for garbage
    with Path(stacks).open("w") as stacks_file:
        faulthandler.register(signal.SIGUSR1, file=stacks_file)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            try:
                reply = pickle.dumps((True, _do(*pickle.loads(message))))  # noqa: S301, our own parent wrote it
            except Exception:  # noqa: BLE001, whatever it is, the parent raises it
                reply = pickle.dumps((False, "raised\n" + traceback.format_exc()))
            connection.send_bytes(reply)


def _do(rank: int, world: int, rendezvous: str | None, timeout_s: float, job: bytes) -> Any:
    random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    if rendezvous is not None:
        # Longer than the parent waits, so that the parent's report of who hangs where comes first.
        timeout = dt.timedelta(seconds=timeout_s + 2 * GRACE_S)
        dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world, timeout=timeout)
    function, args, kwargs = pickle.loads(job)  # noqa: S301, our own parent wrote it
    result = function(*args, **kwargs)
    gc.collect()  # models wrapped by DDP hold on to the group
    if dist.is_initialized():
        dist.destroy_process_group()
    return result
