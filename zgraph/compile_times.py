"""How long compiling took on this machine before, and what that says of how long it will take now.

Capture, each pass with its proof, and the kernels take about as long as they took for the compile before that was most
alike: one of as many modules and, once it is captured, of as many nodes. Seconds are scaled by these sizes, and by how
much faster or slower the parts that are done went than they should have. Before anything was compiled on a machine
nothing is known, and nothing is said.

They are kept in ``compile_times.json`` beside compiled kernels. Losing that file loses nothing but estimates.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zgraph.files import beside, user_cache

log = logging.getLogger("zgraph")

NUM_KEPT = 32
"""How many compiles are remembered, those done last."""

CAPTURE = "capture"
"""The part that goes through modules; all others go through nodes."""


@dataclass(frozen=True)
class Compile:
    """How long one compile took.

    Attributes:
        what: was done: ``compiled``, or ``options chosen``.
        is_first: of its model, whose later ones need not warm up.
        num_modules: of the model, itself included.
        num_nodes: of the captured step; 0 where nothing was captured.
        parts: what was done one after the other, and the seconds of each: capture, passes by name, kernels.
    """

    what: str
    is_first: bool
    num_modules: int
    num_nodes: int = 0
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What is left of a compile that is going on.

    Attributes:
        now: the compile as far as it has come.
        before: those that are known.
    """

    now: Compile
    before: Sequence[Compile] = ()

    def left_s(self, current_s: float) -> float | None:
        """Seconds until it is done; None if none like it is known, or if it lasts longer than that one did.

        Args:
            current_s: seconds that the part at work has taken so far.
        """
        alike = [b for b in self.before if (b.what, b.is_first) == (self.now.what, self.now.is_first)]
        if self.now.num_nodes:
            alike = [b for b in alike if b.num_nodes]
        if not alike:
            return None
        nearest = min(reversed(alike), key=lambda b: abs(math.log(self._size(b))))  # the last of those that are
        expected = [(name, seconds * self._scale(nearest, name)) for name, seconds in nearest.parts]
        next_part, took_s, should_s = 0, 0.0, 0.0
        for name, seconds in self.now.parts:
            found = [i for i, (each, _) in enumerate(expected) if each == name and i >= next_part]
            if found:
                next_part = found[0] + 1
                took_s, should_s = took_s + seconds, should_s + expected[found[0]][1]
        pace = took_s / should_s if took_s and should_s else 1.0
        left = [seconds * pace for _, seconds in expected[next_part:]]
        found_s = sum(left[1:]) + max(left[0] - current_s, 0.0) if left else 0.0
        return found_s or None

    def _size(self, before: Compile) -> float:
        """How much larger it is than another."""
        if self.now.num_nodes:
            return self.now.num_nodes / before.num_nodes
        return self.now.num_modules / before.num_modules

    def _scale(self, before: Compile, part: str) -> float:
        return self.now.num_modules / before.num_modules if part == CAPTURE else self._size(before)


def path() -> Path | None:
    """Where they are kept; None where a user has no place for that."""
    try:
        return user_cache() / "compile_times.json"
    except RuntimeError:
        return None


def known(file: Path | None) -> list[Compile]:
    """Compiles that are remembered, in order; none if there is no such file, or nothing that was written here."""
    try:
        given = json.loads(file.read_text()) if file is not None else []
        found = [
            Compile(
                str(each["what"]),
                bool(each["is_first"]),
                int(each["num_modules"]),
                int(each["num_nodes"]),
                tuple((str(name), float(seconds)) for name, seconds in each["parts"]),
            )
            for each in given
        ]
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return []
    return [each for each in found if each.num_modules > 0 and each.num_nodes >= 0 and _are_times(each.parts)]


def _are_times(parts: Iterable[tuple[str, float]]) -> bool:
    return all(math.isfinite(seconds) and seconds >= 0 for _, seconds in parts)


def remember(file: Path | None, done: Compile, before: Iterable[Compile]) -> None:
    """Keep one more; where that cannot be written, estimates are lost and nothing else."""
    if file is None:
        return
    text = json.dumps([asdict(each) for each in [*before, done][-NUM_KEPT:]])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside(file) as partial:
            partial.write_text(text)
            partial.replace(file)
    except OSError as error:
        log.debug("zgraph: how long compiling took is not kept: %s", error)
