"""Peers side by side: all build first, then take turns step by step, then say what they held and moved.

Only one peer works at any time while the others wait, so a step has the machine to itself and the loopback counter
belongs to one peer. Rounds run the peers there and back, so a drift of the machine's speed favours nobody.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from cgroups import MemoryCap
from memory import Held
from models import Shape
from network import loopback_bytes
from peers import Collectives, OnDisk, Peer
from ranks import RankError, Ranks
from trainer import Job, StepSample, Trainer

NUM_WARMUP_STEPS = 2  # the first allocates the optimizer's state, and compilers work in it


@dataclass(frozen=True)
class Entry:
    """A peer taking part, under a name of its own."""

    name: str
    peer: Peer


@dataclass(frozen=True)
class Settings:
    """What a run has in common for all peers.

    Attributes:
        num_ranks: of the peers that communicate; also shares of the batch.
        rounds: measured steps of each peer.
        threads: that an operator may use in each rank.
        timeout_s: for one command, a first step being the longest.
        private_network: whether the loopback device carries only this run.
    """

    num_ranks: int
    rounds: int
    threads: int
    timeout_s: float
    private_network: bool


@dataclass
class Result:
    """What one peer did. Bytes are of the rank that held most, above imports and process group.

    Attributes:
        problem: what went wrong, or None; then later figures are missing.
        losses: averaged over ranks, of every step from the first.
        build_s: wrapping the model, on the slowest rank.
        first_step_s: the first of the warm-up steps.
        step_s: of each round, from the first rank's start to the last rank's end.
        cpu_s: of each round, on the busiest rank.
        live_peak_bytes: most bytes allocated at once in the rounds.
        resident_peak_bytes: most bytes resident at once in the rounds.
        warmup_live_peak_bytes: most bytes allocated at once before the rounds.
        live_bytes: allocated between steps.
        resident_bytes: resident between steps.
        baseline_resident_bytes: resident for imports and process group.
        wire_bytes: received per rank and step, headers included, or None without a private network.
        collectives: what one rank gave its communication library to move in one step.
        disk: what one rank moved from and to a disk in one step, and was predicted to take.
    """

    name: str
    what: str
    num_parameters: int
    problem: str | None = None
    losses: list[float] = field(default_factory=list)
    build_s: float = 0.0
    first_step_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    live_peak_bytes: int = 0
    resident_peak_bytes: int = 0
    warmup_live_peak_bytes: int = 0
    live_bytes: int = 0
    resident_bytes: int = 0
    baseline_resident_bytes: int = 0
    wire_bytes: float | None = None
    collectives: Collectives = field(default_factory=dict)
    disk: OnDisk = field(default_factory=OnDisk)


@dataclass(frozen=True)
class Spread:
    """Median and range of the ratios of paired rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of_pairs(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Pair by pair, so that what slowed a round slowed both of its halves."""
        ratios = [over / under for over, under in zip(numerators, denominators, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference over all steps; not a number if one of them is not."""
    differences = [abs(loss - wanted) / abs(wanted) for loss, wanted in zip(losses, reference, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def compare(entries: Sequence[Entry], shape: Shape, settings: Settings) -> list[Result]:
    """Run all peers in turns; one result each, in order. A peer that fails leaves the others running."""
    with tempfile.TemporaryDirectory(prefix="zgraph-bench-") as directory:
        runners = [Runner(entry, shape, settings, Path(directory) / str(i)) for i, entry in enumerate(entries)]
        try:
            for runner in runners:
                runner.attempt(runner.warm_up)
            for round_index in range(settings.rounds):
                for runner in runners if round_index % 2 == 0 else runners[::-1]:
                    runner.attempt(runner.measured_step)
                note(f"round {round_index + 1} of {settings.rounds}")
            for runner in runners:
                runner.attempt(runner.finish)
        finally:
            for runner in runners:
                runner.end()
    return [runner.result for runner in runners]


class Runner:
    """The ranks of one peer, and what is known of them so far."""

    def __init__(
        self, entry: Entry, shape: Shape, settings: Settings, directory: Path, caps: tuple[MemoryCap, ...] = ()
    ) -> None:
        self.result = Result(entry.name, entry.peer.what, shape.num_parameters)
        self._settings = settings
        self._wire_bytes: list[float] = []
        directory.mkdir()
        job = Job(entry.peer, shape, settings.num_ranks, settings.threads, directory / "store", caps)
        self._num_ranks = job.num_ranks
        self._ranks = Ranks(partial(Trainer, job), job.num_ranks, directory)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do one of the methods below, unless this peer has failed; a failure is noted in the result."""
        if self.result.problem is None:
            try:
                work()
            except RankError as error:
                self.result.problem = str(error)
                note(f"{self.result.name}: {error}")

    def warm_up(self) -> None:
        """Build, run the steps that are not measured, and restart the peaks."""
        self.result.baseline_resident_bytes = max(self._ask("baseline_resident_bytes"))
        self.result.build_s = max(self._ask("build"))
        self.result.first_step_s = self._step()[0]
        for _ in range(NUM_WARMUP_STEPS - 1):
            self._step()
        self.result.warmup_live_peak_bytes = self._most("restart_peaks").live_peak_bytes
        note(f"{self.result.name}: built in {self.result.build_s:.1f} s, first step {self.result.first_step_s:.1f} s")

    def measured_step(self) -> None:
        """One step of a round."""
        before = loopback_bytes()
        step_s, cpu_s = self._step()
        self._wire_bytes.append((loopback_bytes() - before) / self._num_ranks)
        self.result.step_s.append(step_s)
        self.result.cpu_s.append(cpu_s)

    def finish(self) -> None:
        """Read the memory of the rounds, then count collectives in a step of its own."""
        held = self._most("read_memory")
        self.result.live_peak_bytes = held.live_peak_bytes
        self.result.resident_peak_bytes = held.resident_peak_bytes
        self.result.live_bytes = held.live_bytes
        self.result.resident_bytes = held.resident_bytes
        if self._settings.private_network:
            self.result.wire_bytes = statistics.median(self._wire_bytes)
        self.result.collectives = self._ask("count_collectives")[0]
        self.result.disk = self._ask("disk")[0]

    def end(self) -> None:
        """Give everything back."""
        self._ranks.end()

    def _step(self) -> tuple[float, float]:
        """Seconds from the first rank's start to the last rank's end, and of the busiest rank's processor."""
        samples: list[StepSample] = self._ask("step")
        self.result.losses.append(statistics.fmean(sample.loss for sample in samples))
        elapsed_s = max(sample.end_s for sample in samples) - min(sample.start_s for sample in samples)
        return elapsed_s, max(sample.cpu_s for sample in samples)

    def _most(self, method: str) -> Held:
        """The largest of each figure over the ranks."""
        held: list[Held] = self._ask(method)
        return Held(**{item.name: max(getattr(one, item.name) for one in held) for item in fields(Held)})

    def _ask(self, method: str) -> list[Any]:
        return self._ranks.ask(method, self._settings.timeout_s)


def note(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)
