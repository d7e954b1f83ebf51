"""What is worked out in a child process: what is told of it, and what is left of it here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zgraph
from zgraph.child import NO_FORK, in_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process is copied on Linux alone")


@pytest.fixture(autouse=True)
def _may_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses a GPU is not copied")
    monkeypatch.delenv(NO_FORK, raising=False)


def test_what_was_made_is_told_and_nothing_else_is_seen() -> None:
    seen: list[int] = []

    def make() -> str:
        seen.append(os.getpid())
        return f"été\r\n{os.getpid()}\n"

    first, process, rest = in_child(make).split("\n")
    assert (first, rest, seen) == ("été\r", "", [])
    assert int(process) != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_what_fails_there_fails_here_as_well() -> None:
    tries: list[int] = []

    def fail() -> str:
        tries.append(1)
        raise LookupError("nothing found")

    with pytest.raises(LookupError, match="nothing found"):
        in_child(fail)
    assert tries == [1]


@pytest.mark.parametrize("end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_child_that_ends_without_a_word_is_done_without(end: object) -> None:
    parent = os.getpid()

    def make() -> str:
        if os.getpid() != parent:
            end()  # type: ignore[operator]
        return "made here"

    assert in_child(make) == "made here"


def test_without_a_copy_of_the_process_it_is_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    assert in_child(lambda: str(os.getpid())) == str(os.getpid())


def test_it_may_be_asked_to_be_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_FORK, "1")
    assert in_child(lambda: str(os.getpid())) == str(os.getpid())


def test_nobody_need_wait_for_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert in_child(lambda: str(os.getpid())) != str(os.getpid())
    finally:
        signal.signal(signal.SIGCHLD, before)


def _run(code: str) -> str:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=buffered, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_child_that_waits_for_a_thread_that_it_has_not_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zgraph.child.STUCK_S", 0.5)
    parent, lock = os.getpid(), threading.Lock()

    def make() -> str:
        if os.getpid() != parent:
            lock.acquire()
            lock.acquire()
        return "made here"

    assert in_child(make) == "made here"


def test_what_a_handler_raises_is_raised() -> None:
    """``TimeoutError`` is an ``OSError``, as what keeps a child from being made is."""

    def stop(*_: object) -> None:
        raise TimeoutError("enough")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError, match="enough"):
            in_child(lambda: str(time.sleep(60)))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_child_does_not_outlive_its_parent() -> None:
    code = """
import os, time
from zgraph.child import in_child
in_child(lambda: [print(os.getpid(), flush=True), time.sleep(60)])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def test_an_interrupt_ends_the_child() -> None:
    told = _run("""
        import os, signal, time
        from zgraph.child import in_child

        def interrupt(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            in_child(lambda: time.sleep(100))
        except KeyboardInterrupt:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                print("interrupted, and no child left")
    """)
    assert told == "interrupted, and no child left\n"


def test_handlers_of_signals_run_once() -> None:
    """A batch system may signal all processes of a job."""
    told = _run("""
        import os, signal
        from zgraph.child import in_child

        signal.signal(signal.SIGTERM, lambda *_: print("saved", flush=True))
        parent = os.getpid()

        def make():
            if os.getpid() != parent:
                os.kill(parent, signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return "made here"

        print(in_child(make))
    """)
    assert told == "saved\nmade here\n"


def test_what_was_written_is_written_once_and_in_order() -> None:
    told = _run("""
        import sys
        from zgraph.child import in_child

        def make():
            print("in the child")
            return "after"

        class Tee:
            def write(self, text):
                sys.__stdout__.write(text)

            def flush(self):
                pass

        print("before")
        print(in_child(make))
        sys.stdout = Tee()  # which is no file, and what it is written to is flushed as well
        print("before")
        print(in_child(make))
        sys.__stdout__.flush()
    """)
    assert told == 2 * "before\nin the child\nafter\n"


def test_what_it_leaves_behind_is_not_resident_here() -> None:
    told = _run("""
        from pathlib import Path
        from zgraph.child import in_child

        kept = []

        def make():
            objects = [[i] for i in range(1_000_000)]  # some 100 MB, of which every thousandth object stays
            kept.append(objects[::1000])
            return ""

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

        for way in (in_child, lambda make: make()):
            before = resident()
            way(make)
            print((resident() - before) // 10**6)
    """)
    elsewhere, here = map(int, told.split())
    assert elsewhere < 10 < 50 < here


_CALLS: list[int] = []


class _Counts(nn.Module):
    """Counts how often it is called, or a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        _CALLS.append(len(x))
        return self.layer(x).square().mean()


def test_options_are_looked_for_elsewhere() -> None:
    """The model is called here as often as if they had been given."""

    def calls(**options: object) -> list[int]:
        _CALLS.clear()
        model = _Counts()
        compiled = zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)
        compiled.train_step(torch.ones(4, 4))
        return list(_CALLS)

    assert calls(memory="1GiB", accumulate="auto") == calls() != []
