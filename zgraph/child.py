"""Work in a child process, which takes with it what the work leaves behind.

Python gives memory back only where a whole MiB of it is free. Comparing a hundred programs leaves little that lives and
is spread over all that there was: 200 MB stay resident, of a small GPT that was told to take 114.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

_PR_SET_PDEATHSIG = 1


def in_child(make: Callable[[], str]) -> str:
    """What ``make`` gives, made in a copy of this process, of which nothing else is seen here.

    On Linux, as long as no GPU is in use. Otherwise, and wherever the child fails, it is made here: so what is wrong is
    raised as it would have been.

    Args:
        make: computes with one thread, reads what it likes, and does not communicate.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return make()
    with suppress(OSError):  # no memory for a copy, or no more processes
        _flush()  # or the child would write what waits there once more
        told = os.memfd_create("zgraph")
        try:
            _wait(_start(told, make))
            os.lseek(told, 0, os.SEEK_SET)
            with os.fdopen(os.dup(told), encoding="utf-8") as file:
                head, _, text = file.read().partition("\n")
            if head == str(len(text)):
                return text
        finally:
            os.close(told)
    return make()


def _start(told: int, make: Callable[[], str]) -> int:
    """The child's number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads, as Python 3.12 gives it
        process = os.fork()
    if process:
        return process
    try:
        gc.freeze()  # nothing of the parent's is torn down twice
        for number in signal.valid_signals():  # nor does a handler of its own save anything twice
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.set_num_threads(1)  # those of OpenMP were not copied
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a display of the parent's may hold a lock
        text = make()
        with os.fdopen(os.dup(told), "w", encoding="utf-8") as file:
            file.write(f"{len(text)}\n{text}")
        _flush()
    finally:
        os._exit(0)  # the parent looks at what was written


def _wait(process: int) -> None:
    """Until it has ended, which it does at once if there is something else to do here."""
    try:
        with suppress(ChildProcessError):  # someone else has waited for all children
            os.waitpid(process, 0)
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(process, 0)
        raise


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:  # as a daemon's may be
            stream.flush()
