"""Threads that do one piece of work after another, and that an interrupt of the main thread leaves as they are.

``concurrent.futures`` waits by conditions that are written in Python. A ``KeyboardInterrupt`` in the middle of one
leaves its lock taken, or free twice over, and then a process hangs when it ends, as the interpreter joins a thread that
waits for that lock. Here nothing is shared with the main thread but locks and queues that are written in C, and each
call leaves them whole wherever it is interrupted.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class Job:
    """A piece of work.

    Attributes:
        is_done: whether it has ended.
        error: that it has ended with.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self.is_done = False
        self.error: BaseException | None = None
        self._at_work = threading.Lock()
        self._at_work.acquire()

    def wait(self) -> None:
        """Return when it has ended."""
        with self._at_work:
            pass

    def run(self) -> None:
        """Do it; in a thread of its own."""
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 -- for whoever waits
            self.error = error
        self.is_done = True
        self._at_work.release()

    def forget(self) -> None:
        """Let go of what it worked on."""
        self._work = None


class Workers:
    """Some threads, which end with the process, or when they are told to.

    Args:
        num: how many.
        name: of each.
    """

    def __init__(self, num: int, name: str) -> None:
        self._num, self._process = num, os.getpid()
        self._jobs = _Jobs()
        for _ in range(num):
            threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True).start()

    def start(self, work: Callable[[], None]) -> Job:
        """Have one of them do some work.

        Raises:
            RuntimeError: this process was forked from theirs, and has no threads but the one that forked it.
        """
        if os.getpid() != self._process:
            raise RuntimeError("a forked process cannot use what its parent has on a disk or on the host")
        job = Job(work)
        self._jobs.waiting.append(job)
        self._jobs.calls.put(True)
        return job

    def finish(self) -> None:
        """Wait for all that was started, also by a call of ``start`` that was interrupted; not in a forked process."""
        if os.getpid() != self._process:
            return
        self._jobs.calls.put(True)
        for job in self._jobs.unfinished():
            job.wait()

    def end(self) -> None:
        """Wait for all that was started, and let the threads end."""
        self.finish()
        for _ in range(self._num):
            self._jobs.calls.put(False)


class _Jobs:
    """What the threads share with whoever gives them work.

    Attributes:
        waiting: to be done.
        running: being done.
        calls: to do all that waits, or (False) to end: one for each job, unless an interrupt came before it. The next
            call, of another job or of ``finish``, is for such a job as well.
    """

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.running: set[Job] = set()
        self.calls: SimpleQueue[bool] = SimpleQueue()
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        """The next one."""
        with self._lock:
            if not self.waiting:
                return None
            job = self.waiting.popleft()
            self.running.add(job)
            return job

    def put_away(self, job: Job) -> None:
        """It has been done."""
        with self._lock:
            self.running.discard(job)

    def unfinished(self) -> list[Job]:
        """Those that wait or run."""
        with self._lock:
            return [*self.waiting, *self.running]


def _serve(jobs: _Jobs) -> None:
    while jobs.calls.get():
        while (job := jobs.take()) is not None:
            job.run()
            jobs.put_away(job)
            job.forget()  # last: it may be what kept the workers' owner
            del job
