"""Training with everything on a disk that is killed again and again, and goes on from what was saved last.

    python -m tests.killing DIRECTORY NUM

Each life is ended at a moment of its own, which seeded random numbers choose: in one of ``PHASES``, the first of a kind
or a later one, after a part of the time that it took when nobody was killed. After each death the directory holds what
it should, and the checkpoint is, bit for bit, a state of the training in memory.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import zgraph
from tests.offloading import EVERYTHING, mean_square
from zgraph.disk import Disk
from zgraph.files import PASSING, beside, scratch

PHASES = ("building", "moving", "stepping", "saving")
"""What a life does: compile, take state to the disk and do a first step, do more of them, and save."""

STEPS = 3
"""From one checkpoint to the next."""

X = torch.linspace(-1, 1, 64 * 300).view(64, 300)


class Watch:
    """What a process tells another of where it is, in memory that both have."""

    def __init__(self) -> None:
        self._started = np.frombuffer(mmap.mmap(-1, 8 * len(PHASES)), dtype=np.float64)
        self._longest = np.frombuffer(mmap.mmap(-1, 8 * len(PHASES)), dtype=np.float64)
        self._times = np.frombuffer(mmap.mmap(-1, 8 * len(PHASES)), dtype=np.int64)
        self._now: int | None = None

    def enter(self, phase: str | None) -> None:
        """A phase begins, and the one before has ended."""
        now = time.monotonic()
        if self._now is not None:
            self._longest[self._now] = max(self._longest[self._now], now - self._started[self._now])
        self._now = None if phase is None else PHASES.index(phase)
        if self._now is not None:
            self._started[self._now] = now
            self._times[self._now] += 1

    def forget(self) -> None:
        """Somebody else will be watched."""
        self._times[:] = 0

    def wait_for(self, phase: str, times: int, process: BaseProcess) -> None:
        """Return as soon as the other has begun that phase so many times."""
        while self._times[PHASES.index(phase)] < times:
            assert process.is_alive(), "it ended by itself"
            time.sleep(1e-4)

    def longest_s(self, phase: str) -> float:
        """That it took a process that got to its end."""
        return float(self._longest[PHASES.index(phase)])


def build(**options: Any) -> tuple[Any, Any]:
    """A compiled model of which everything can go to a disk, and its optimizer."""
    torch.manual_seed(0)
    layers = [each for _ in range(4) for each in (nn.Linear(300, 300), nn.GELU())]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    return zgraph.compile(model, optimizer, loss=mean_square, bucket_bytes=1, **options), optimizer


def build_on_disk(path: Path) -> tuple[Any, Any]:
    return build(offload={**EVERYTHING, "activations": "disk, waited for"}, offload_path=str(path))


def state(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def restore(saved: Path, model: Any, optimizer: Any) -> int:
    """Load the checkpoint, if there is one; how many steps were done."""
    if not saved.exists():
        return 0
    held = torch.load(saved, mmap=True)
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    return int(held["steps"])


def live(path: Path, watch: Watch, num_saves: int) -> None:
    """Go on from the checkpoint, and write it so many times, as long as somebody watches."""
    opened, parent = Disk.__init__, os.getppid()

    def watched(disk: Disk, *args: Any) -> None:
        watch.enter("moving")
        opened(disk, *args)

    watch.enter("building")
    Disk.__init__ = watched  # type: ignore[method-assign]
    model, optimizer = build_on_disk(path)
    done = restore(path / "all.pt", model, optimizer)
    for _ in range(num_saves):
        if os.getppid() != parent:
            return
        for _ in range(STEPS):
            model.train_step(X)
            done += 1
            if done % STEPS == 1:
                watch.enter("stepping")
        watch.enter("saving")
        with beside(path / "all.pt") as partial:
            torch.save({"steps": done, **state(model, optimizer)}, partial)
            partial.replace(path / "all.pt")
    watch.enter(None)


def neighbour(path: Path, pipe: Any, theirs: Any) -> None:
    """A run that lives on in the same directory, and does a step whenever it is asked to: is its loss as in memory?"""
    theirs.close()  # so that an end of theirs is one of what is read here
    (model, _), (plain, _) = build_on_disk(path), build()
    with beside(path / "all.pt") as partial, scratch(path) as own:
        partial.write_text("mine")
        (own / "file").write_text("mine")
        pipe.send((partial.name, own.name))
        while pipe.recv():
            same = torch.equal(model.train_step(X), plain.train_step(X))
            pipe.send(same and partial.read_text() == (own / "file").read_text() == "mine")


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def main(path: Path, num: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and whoever was forked would wait for them
    for name in ("notes.txt", "all.pt.partial", "all.pt.1.partial.txt", ".zgraph-mine", "zgraph-training"):
        (path / name).write_text("theirs")
    fork, draw, watch = multiprocessing.get_context("fork"), random.Random(0), Watch()
    ours, theirs = fork.Pipe()
    beside_it = fork.Process(target=neighbour, args=(path, theirs, ours), daemon=True)
    beside_it.start()
    foreign = {*os.listdir(path), *ours.recv()}
    rehearsal = fork.Process(target=live, args=(path, watch, 3))
    rehearsal.start()
    rehearsal.join()
    assert rehearsal.exitcode == 0, rehearsal.exitcode

    plain, optimizer = build()
    done, left, hit = 0, 0, Counter[str]()
    for life in range(num):
        phase = PHASES[life % len(PHASES)] if life < len(PHASES) else draw.choice(PHASES)
        times = 1 if phase in PHASES[:2] else draw.randint(1, 3)
        watch.forget()
        child = fork.Process(target=live, args=(path, watch, 10**9), daemon=True)
        child.start()
        watch.wait_for(phase, times, child)
        time.sleep(draw.uniform(0, watch.longest_s(phase)))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, child.exitcode
        hit[phase] += 1

        orphans = set(os.listdir(path)) - foreign - {"all.pt"}
        assert len(orphans) <= 1, orphans
        assert all(name.startswith(PASSING) for name in orphans), orphans
        left += len(orphans)
        held = torch.load(path / "all.pt")
        steps = held.pop("steps")
        assert steps >= done, (steps, done)
        for _ in range(steps - done):
            plain.train_step(X)
        done = steps
        assert same_bits(held, state(plain, optimizer)), f"the checkpoint is not what {steps} steps lead to"
        ours.send(True)
        assert ours.recv(), "the run beside it is not as it was"
        with beside(path / "all.pt"):  # as the next run does before it writes
            pass
        differ = {*os.listdir(path)} ^ {*foreign, "all.pt"}
        assert not differ, differ

    model, last = build_on_disk(path)
    assert restore(path / "all.pt", model, last) == done
    assert all(torch.equal(model.train_step(X), plain.train_step(X)) for _ in range(STEPS))
    assert same_bits(state(model, last), state(plain, optimizer))
    ours.send(False)
    beside_it.join()
    assert beside_it.exitcode == 0, beside_it.exitcode
    assert all((path / name).read_text() == "theirs" for name in foreign if (path / name).is_file())
    print(f"killed while {dict(hit)}; {done // STEPS} checkpoints, {left} left in parts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
