"""Which activations to drop: from keeping all to the lowest peak, each time what costs least for what it brings.

A greedy search over what alike calls of repeated blocks make (a *family*), so that its time grows as the program does:
the order of families first, then each family a few members at a time. What it meets on the way and nothing beats in
both peak and seconds is the frontier, so along it the peak only falls and the seconds only grow.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import fx

from zgraph.program import operand
from zgraph.recomputation import Outcome, Profile

_SHARPNESS = 16
_MOST_PARTS = 12
_MOST_WORK = 6_000_000
"""Calls of the programs that are looked at, all together, beyond those that the search needs in any case."""


@dataclass(frozen=True)
class Choice:
    """What is dropped, and what the step takes then.

    Attributes:
        dropped: calls of the captured program whose memory is not kept for backward.
        peak_bytes: the most that is held at once.
        seconds: of what runs again.
    """

    dropped: frozenset[fx.Node]
    peak_bytes: int
    seconds: float


def frontier(profile: Profile) -> tuple[Choice, ...]:
    """Choices that no other one beats in both peak and seconds, from keeping everything to the lowest peak."""
    return pareto(_Search(profile).run())


def pareto(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Those that nothing beats: the peak falls and the seconds grow strictly from each to the next."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.seconds, choice.peak_bytes)):
        if not best or choice.peak_bytes < best[-1].peak_bytes:
            if best and choice.seconds == best[-1].seconds:
                best.pop()
            best.append(choice)
    return tuple(best)


class _Search:
    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.outcomes: dict[frozenset[fx.Node], Outcome] = {}
        floor = int(profile.kept.alive_bytes.min())
        self._floor, self._scale = floor, max(profile.kept.peak_bytes - floor, 1)

    def run(self) -> list[Choice]:
        """All choices that were looked at."""
        families = self._families()
        dropped: frozenset[fx.Node] = frozenset()
        self.outcomes[dropped] = self.profile.kept
        for family in self._ordered(families):
            for part in _parts(family):
                more = dropped | part
                if self._height(more) < self._height(dropped):
                    dropped = more
        parts = [list(_parts(family)) for family in families]
        self._polish(dropped, [part for family in parts for part in family])
        self._look_around(parts)
        return self._choices()

    def _polish(self, dropped: frozenset[fx.Node], parts: list[frozenset[fx.Node]]) -> None:
        """Keep or drop single parts otherwise where that lowers the peak: what was right before may not be now."""
        for part in parts[: self._num_left()]:
            other = dropped - part if part <= dropped else dropped | part
            if self._height(other) < self._height(dropped):
                dropped = other

    def _look_around(self, parts: list[list[frozenset[fx.Node]]]) -> None:
        """From choices that nothing beats so far, drop one part more of each family, or one less.

        The order of families is right for whole ones, and leaves a little to gain in between.
        """
        found = pareto(self._choices())
        stride = max(-(-len(found) * len(parts) * 2 // max(self._num_left(), 1)), 1)
        for choice in found[::stride]:
            for family in parts:
                more = next((part for part in family if not part <= choice.dropped), frozenset())
                less = next((part for part in reversed(family) if part <= choice.dropped), frozenset())
                self._outcome(choice.dropped | more)
                self._outcome(choice.dropped - less)

    def _num_left(self) -> int:
        """How many more choices to look at, so that a step of many calls does not take much longer than one of few."""
        return max(_MOST_WORK // len(self.profile.nodes) - len(self.outcomes), 0)

    def _choices(self) -> list[Choice]:
        return [Choice(dropped, o.peak_bytes, o.seconds) for dropped, o in self.outcomes.items()]

    def _families(self) -> list[list[frozenset[fx.Node]]]:
        """What may be dropped together: all results of a call; alike calls of repeated blocks are one family."""
        of_call: dict[fx.Node, list[fx.Node]] = {}
        for memory in self.profile.candidates:
            call = operand(memory) if memory.target is operator.getitem else memory
            of_call.setdefault(call, []).append(memory)
        found: dict[Hashable, list[frozenset[fx.Node]]] = {}
        for call, memories in of_call.items():
            program, origin = self.profile.captured, call.meta["origin"]
            form = program.form_of(call.meta["val"]), program.call_key(call)
            found.setdefault((form, re.sub(r"\d+", "*", origin.module), origin.source), []).append(frozenset(memories))
        return list(found.values())

    def _ordered(self, families: list[list[frozenset[fx.Node]]]) -> list[list[frozenset[fx.Node]]]:
        """Families in the order in which to drop them, each that which brings most per second after those before it."""
        whole = [frozenset().union(*family) for family in families]
        dropped: frozenset[fx.Node] = frozenset()
        ordered: list[list[frozenset[fx.Node]]] = []
        gains = {i: self._gain(dropped, whole[i]) for i in range(len(families))}
        while gains:
            fresh: set[int] = set()
            best = max(gains, key=lambda i: (gains[i], -i))
            while best not in fresh:  # what was found before earlier choices mostly still bounds what is found now
                gains[best] = self._gain(dropped, whole[best])
                fresh.add(best)
                best = max(gains, key=lambda i: (gains[i], -i))
            del gains[best]
            if self._height(dropped | whole[best]) < self._height(dropped):
                dropped |= whole[best]
                ordered.append(families[best])
        return ordered

    def _gain(self, dropped: frozenset[fx.Node], more: frozenset[fx.Node]) -> float:
        """How much lower the peak is per second of what runs again."""
        lower = self._height(dropped) - self._height(dropped | more)
        longer = self._outcome(dropped | more).seconds - self._outcome(dropped).seconds
        return lower / max(longer, 1e-9)

    def _outcome(self, dropped: frozenset[fx.Node]) -> Outcome:
        if dropped not in self.outcomes:
            self.outcomes[dropped] = self.profile.outcome(dropped)
        return self.outcomes[dropped]

    def _height(self, dropped: frozenset[fx.Node]) -> float:
        """The peak, as a norm that sees what lies a little below it, too: where two peaks are equal, one has to go
        down first."""
        over = (self._outcome(dropped).alive_bytes - self._floor) / self._scale
        return float(np.sum(over**_SHARPNESS) ** (1 / _SHARPNESS))


def _parts(family: list[frozenset[fx.Node]]) -> Iterable[frozenset[fx.Node]]:
    """A family in few parts, those that are held longest first."""
    size = -(-len(family) // _MOST_PARTS)
    for start in range(0, len(family), size):
        yield frozenset().union(*family[start : start + size])
