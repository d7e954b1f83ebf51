"""Threads that do work in turn, and that no interrupt leaves waiting."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest

from zgraph.workers import Workers

REPO = Path(__file__).parents[1]


def test_jobs_are_done_and_tell_what_went_wrong() -> None:
    workers, done = Workers(3, "test"), list[int]()

    def fail() -> None:
        raise ValueError("no")

    jobs = [workers.start(partial(done.append, number)) for number in range(100)]
    wrong = workers.start(fail)
    workers.finish()
    assert sorted(done) == list(range(100))
    assert all(job.is_done and job.error is None for job in jobs)
    assert str(wrong.error) == "no"
    workers.end()


def test_threads_end_and_keep_nothing() -> None:
    class Held:
        def work(self) -> None:
            pass

    workers, held = Workers(2, "held"), Held()
    gone = threading.Event()
    weakref.finalize(held, gone.set)
    job = workers.start(held.work)
    del held
    job.wait()
    assert gone.wait(10)
    threads = [thread for thread in threading.enumerate() if thread.name == "held"]
    workers.end()
    for thread in threads:
        thread.join(10)
    assert len(threads) == 2
    assert not any(thread.is_alive() for thread in threads)


DISK = """
import random, signal, sys
import torch
from zgraph.disk import Disk

signal.signal(signal.SIGALRM, signal.default_int_handler)
tensor, value = Disk(sys.argv[1]).allocate(2**14, torch.float32), torch.arange(2.0**14)
interrupts = 0
for _ in range(1500):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-4, 2e-3))
        while True:
            tensor.write(value)
    except KeyboardInterrupt:
        interrupts += 1
tensor.write(value)
assert torch.equal(tensor.read(), value)
print(interrupts)
"""


HOST = """
import random, signal
import torch
from tests.streams import Streams
from zgraph.host import Host

signal.signal(signal.SIGALRM, signal.default_int_handler)
host = Host(torch.device("cpu"), Streams(None))
tensor = host.allocate(2**10, torch.float32)
tensor.store(torch.zeros(2**10)).wait()
interrupts = 0
for _ in range(1500):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-4, 2e-3))
        while True:
            host.run(lambda x: x.add_(1), [tensor], [tensor])
            host.settle(tensor.start, tensor.start + tensor.nbytes)
    except KeyboardInterrupt:
        interrupts += 1
host.run(lambda x: x.fill_(7), [tensor], [tensor])
host.settle(tensor.start, tensor.start + tensor.nbytes)
assert (tensor.value() == 7).all()
host.check()
print(interrupts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [DISK, HOST], ids=["disk", "host"])
def test_interrupts_leave_threads_at_work_and_a_process_that_ends(script: str, disk_path: Path) -> None:
    command = [sys.executable, "-c", script, str(disk_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "1500\n"), done.stderr


FORK = """
import os, sys
import torch
from zgraph.disk import Disk

disk = Disk(sys.argv[1])
tensor, value = disk.allocate(2**22, torch.float32), torch.ones(2**22)
storing = tensor.store(value)
if not (child := os.fork()):
    try:
        tensor.store(value)
    except RuntimeError as error:
        print(error, flush=True)
    sys.exit()
print(os.waitpid(child, 0)[1], flush=True)
storing.wait()
assert torch.equal(tensor.read(), value)
"""


def test_a_forked_process_ends_and_leaves_what_its_parent_has(disk_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(disk_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "a forked process cannot use what its parent has on a disk or on the host\n0\n", done.stderr
