"""Seconds and bytes of a published step, from its trace and a few constants of machines and of software.

``Constants`` are what zgraph's presets do not say: benchmarks/fit_published.py fitted them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from peers_predicted import Case
from traces import Step

from zgraph.cost import Cost, seconds
from zgraph.hardware import Hardware
from zgraph.machines import BESIDE, SUSTAINED
from zgraph.work import ATTENTION, LINK, MATRIX, VECTOR, Work

GIB = 2**30


@dataclass(frozen=True)
class Constants:
    """What whole steps show beside what single operators do. Presets have ``hopper``, ``ampere`` and ``link``, too.

    Fitted by benchmarks/fit_published.py to half of the configurations of trust A; docs/accuracy.md has the errors of
    the other half. What presets have is then written into zgraph/machines.py. ``vector`` is not: it stands for kernels
    that those trainers fuse and zgraph's steps do not yet.

    Attributes:
        hopper: how much longer products of matrices take in a step on an H100 of 700 W than alone: a device that works
            without a pause runs at the clock that its power allows, which short measurements do not see. ``ampere``
            likewise on an A100.
        flash_1: how much longer FlashAttention 1 takes than version 2.
        vector: how much longer everything takes that moves memory; below 1 since part of it is still in cache.
        link: likewise collectives, beside which compute runs.
        broadcast_s: seconds of each rank's broadcast of what it has updated, where one follows the other.
    """

    hopper: float = SUSTAINED["H100"]
    ampere: float = SUSTAINED["A100-80"]
    flash_1: float = 1.95
    vector: float = 0.764
    link: float = BESIDE
    broadcast_s: float = 2.29e-3

    def factors(self, case: Case) -> dict[str, float]:
        """By what does the work; of all else, ``vector``."""
        matrix = {"H100": self.hopper, "H200": self.hopper, "A100-40": self.ampere, "A100-80": self.ampere}
        attention = self.flash_1 if case.software.flash_1 else 1.0
        return {MATRIX: matrix.get(case.machine, 1.0), ATTENTION: attention, LINK: self.link, VECTOR: self.vector}


@dataclass(frozen=True)
class Predicted:
    """Of a step of one device."""

    step_s: float
    exposed_s: float
    tokens_s: float
    live_gib: float
    reserved_gib: float


def predicted(case: Case, step: Step, constants: Constants, *, memory: bool = True) -> Predicted:
    """Play a step on its machine; without ``memory``, its seconds alone."""
    hardware = alone(case.hardware())
    cost_of = costs_of(case, hardware, constants)
    step_s = exposed_s = 0.0
    live = reserved = 0
    for program, times in zip(step.whole, step.repeats, strict=True):
        timeline = program.play(cost_of, hardware)
        step_s += times * timeline.step_s
        exposed_s += times * timeline.exposed_s
        if memory and case.peak_gib is not None:
            live = max(live, program.footprint.peak_bytes)
            if case.peak_kind == "reserved":
                reserved = max(reserved, program.reserved_bytes())
    step_s += constants.broadcast_s * case.world if case.software.broadcasts else 0
    return Predicted(
        step_s,
        exposed_s,
        case.batch * case.seq * case.accumulate / step_s,
        live / GIB,
        reserved / GIB,
    )


def alone(hardware: Hardware) -> Hardware:
    """A machine as single operators find it: what steps show beside that is in ``Constants``."""
    return replace(hardware, in_step={})


def costs_of(case: Case, hardware: Hardware, constants: Constants) -> Callable[[tuple[Work, ...], bool], Cost]:
    """What works cost on a machine; equal ones are worked out once."""
    factors = constants.factors(case)
    known: dict[tuple[tuple[Work, ...], bool], Cost] = {}

    def cost_of(done: tuple[Work, ...], is_update: bool) -> Cost:
        key = done, is_update
        if key not in known:
            passes = case.software.optimizer_passes if is_update else 1.0
            took = sum(factors.get(work.unit, constants.vector) * seconds(work, hardware) for work in done)
            known[key] = Cost(passes * took, done)
        return known[key]

    return cost_of
