"""Run a function on several ranks of this machine with torchrun's own machinery."""

from __future__ import annotations

import logging
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from zgraph.errors import RankError

Result = TypeVar("Result")

_INTERRUPT = {signal.SIGINT}

_AGENTS = ("torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.multiprocessing.api")
"""Loggers that warn of each signal and of each process that they end."""


def launch_ranks(function: Callable[..., Result], ranks: int, *args: Any) -> dict[int, Result]:
    """Call a top-level function on every rank, over this machine's loopback; what each returned, by rank.

    Raises:
        RankError: a rank failed; names it and says why.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        with _interrupted_in_one_line():
            results: dict[int, Result] = elastic_launch(config, _interruptible)(function, *args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        record: Any = failure.message  # annotated as text, but a dictionary where a function failed
        message = record["message"] if isinstance(record, dict) else record
        raise RankError(f"rank {rank} of {ranks} failed: {message}") from error
    return results


def _interruptible(function: Callable[..., Result], *args: Any) -> Result:
    """On a rank, whose modules are imported now: an interrupt is raised in what it runs, which ends it in silence."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPT)
    return function(*args)


@contextmanager
def _interrupted_in_one_line() -> Iterator[None]:
    """Ranks that are started inside, and torch's agent, print nothing of an interrupt.

    Ctrl-C reaches all processes of a terminal. Ranks are started with it blocked, as this thread has it; another thread
    takes it for this process, whose main thread then raises it.
    """
    resource_tracker.ensure_running()  # which would unblock it when the first rank is started
    over = threading.Event()
    taker = threading.Thread(target=over.wait, daemon=True)
    taker.start()
    with ExitStack() as after:
        after.callback(over.set)
        after.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPT))
        for name in _AGENTS:
            agent = logging.getLogger(name)
            after.callback(agent.setLevel, agent.level)
            agent.setLevel(logging.ERROR)
        yield
