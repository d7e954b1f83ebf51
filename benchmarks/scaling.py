"""How far a peer reaches: bytes per parameter as the model deepens, and the deepest model under a memory cap."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cgroups import MemoryCap
from comparison import Entry, Result, Runner, Settings, compare, note
from models import Shape

DEEPER = 3  # times the layers, at the far end of a slope
LAYERS_STEP = 4  # the resolution of a search for depth


@dataclass(frozen=True)
class Slope:
    """Bytes that one more parameter costs each rank: the difference between two depths of the same model.

    What does not grow with the model (activations of a tiny batch, the interpreter, buffers of fixed size) cancels.
    """

    name: str
    problem: str | None
    shallow: Result
    deep: Result

    def per_parameter(self, figure: str) -> float:
        """The slope of one of the byte fields of ``Result``."""
        grown_bytes: float = getattr(self.deep, figure) - getattr(self.shallow, figure)
        return grown_bytes / (self.deep.num_parameters - self.shallow.num_parameters)


def measure_slopes(entries: Sequence[Entry], base: Shape, settings: Settings) -> list[Slope]:
    """One peer after the other: the shape as it is, and several times as deep."""
    slopes = []
    for entry in entries:
        shapes = (base, replace(base, layers=base.layers * DEEPER))
        shallow, deep = (compare([entry], shape, settings)[0] for shape in shapes)
        slopes.append(Slope(entry.name, shallow.problem or deep.problem, shallow, deep))
    return slopes


@dataclass(frozen=True)
class Reach:
    """The deepest model that trained under a cap, and the shallowest that was killed for memory.

    Attributes:
        problem: what went wrong besides memory, or None.
        trained: of the deepest model that trained, or None.
        layers: of that model.
        killed: parameters of the shallowest model that was killed.
    """

    name: str
    problem: str | None
    trained: Result | None
    layers: int
    killed: int | None


def find_reach(
    entry: Entry,
    base: Shape,
    settings: Settings,
    cap_bytes: int,
    *,
    layers_step: int = LAYERS_STEP,
    first: int = 0,
    is_enough: bool = False,
) -> Reach:
    """Double the layers until a rank is killed, then bisect; each try runs in fresh ranks.

    Args:
        layers_step: the resolution.
        first: layers of the first model that is tried.
        is_enough: look for none that is deeper.
    """
    fits, best = 0, None
    too_deep, killed_parameters = None, None
    while too_deep is None or too_deep - fits > layers_step:
        middle = max(fits * 2, first) if too_deep is None else (fits + too_deep) // 2
        layers = max(middle // layers_step, 1) * layers_step
        result, killed = _train_under_cap(entry, replace(base, layers=layers), settings, cap_bytes)
        note(f"{entry.name}: {result.num_parameters / 1e6:.1f}M {'killed' if killed else 'trained'}")
        if killed:
            too_deep, killed_parameters = layers, result.num_parameters
        elif result.problem is not None:
            return Reach(entry.name, result.problem, best, fits, killed_parameters)
        else:
            fits, best = layers, result
            if is_enough and layers >= first:
                break
    return Reach(entry.name, None, best, fits, killed_parameters)


def _train_under_cap(entry: Entry, shape: Shape, settings: Settings, cap_bytes: int) -> tuple[Result, bool]:
    """Build and train for a few steps; the result, and whether a rank was killed for memory."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zgraph-bench-")))
        caps: list[MemoryCap] = []
        for rank in range(1 if entry.peer.whole_batch else settings.num_ranks):
            cap = MemoryCap(f"zgraph-bench-{os.getpid()}-{rank}", cap_bytes)
            stack.callback(cap.remove)
            caps.append(cap)
        runner = Runner(entry, shape, settings, directory / "peer", tuple(caps))
        stack.callback(runner.end)
        runner.attempt(runner.warm_up)
        for _ in range(settings.rounds):
            runner.attempt(runner.measured_step)
        runner.attempt(runner.finish)
        return runner.result, any(cap.killed for cap in caps)
