"""Work in a child process, which takes with it what the work leaves behind.

Python gives memory back only where a whole MiB of it is free. Comparing a hundred programs leaves little that lives and
is spread over all that there was: 200 MB stay resident, of a small GPT that was told to take 114.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

log = logging.getLogger("zgraph")

NO_FORK = "ZGRAPH_NO_FORK"
"""A variable that is set where nothing may be done in a child."""

STUCK_S = 10.0
"""Seconds for which a child may sleep without a break."""

_PR_SET_PDEATHSIG = 1
_MADE = b"made\n"


def in_child(make: Callable[[], str]) -> str:
    """What ``make`` gives, made in a copy of this process, of which nothing else is seen here.

    On Linux, as long as no GPU is in use and ``ZGRAPH_NO_FORK`` is not set. Otherwise, and wherever the child fails, it
    is made here: so what is wrong is raised as it would have been, after twice the time. Other threads are not copied:
    a child that waits for one of them, or for a lock that it held, does nothing for ``STUCK_S`` and is ended.

    Args:
        make: computes with one thread, reads what it likes, and does not communicate.
    """
    if sys.platform != "linux" or NO_FORK in os.environ or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return make()
    try:
        told = tempfile.TemporaryFile()  # noqa: SIM115 -- closed below
    except OSError as error:
        log.debug("zgraph: a child would have no place for its answer: %s", error)
        return make()
    with told:
        _flush()  # or the child would write what waits there once more
        _run(told.fileno(), make)
        told.seek(0)
        head, text = told.read(len(_MADE)), told.read()
    if head == _MADE:
        return text.decode()
    log.debug("zgraph: a child gave no answer, so %s runs once more", make)
    return make()


def _run(told: int, make: Callable[[], str]) -> None:
    """Start the child, and wait until it has ended; it is killed if there is something else to do here."""
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # none comes before each side is ready
    process = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of other threads, as Python 3.12 gives it
            try:
                process = os.fork()
            except OSError as error:  # no memory for a copy, or no more processes
                log.debug("zgraph: there is no child: %s", error)
                return
        if not process:
            _serve(told, make, parent, mask)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _wait(process)
    except BaseException:
        if process:
            _end(process)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(process: int) -> None:
    """Until the child has ended, or does nothing."""
    seen, since = -1, time.monotonic()
    with suppress(ChildProcessError, FileNotFoundError, ProcessLookupError):  # someone else has waited for all children
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
            sleeps, used = fields[0] == "S", int(fields[11]) + int(fields[12])
            if not sleeps or used != seen:
                seen, since = used, time.monotonic()
            elif time.monotonic() - since > STUCK_S:
                log.debug("zgraph: the child waits for something that only its parent has")
                _end(process)
                return
            time.sleep(0.02)


def _end(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


def _serve(told: int, make: Callable[[], str], parent: int, mask: set[Any]) -> NoReturn:
    """Be the child: nothing returns from here, and the parent looks at what was written."""
    try:
        gc.freeze()  # nothing of the parent's is torn down twice
        for number in signal.valid_signals():  # nor does a handler of its own save anything twice
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)  # it has ended before
        torch.set_num_threads(1)  # those of OpenMP were not copied
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a display of the parent's may hold a lock
        text = make()
        with os.fdopen(os.dup(told), "wb") as file:
            file.write(_MADE + text.encode())
        _flush()
    finally:
        os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(Exception):  # it may be None, closed, or whatever a program has put there
            stream.flush()  # type: ignore[union-attr]
