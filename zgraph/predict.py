"""What a lowered step will take: seconds and bytes, by the timeline and the footprint of its programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

from zgraph.allocator import reserved_bytes
from zgraph.cost import Costs
from zgraph.footprint import Footprint, held_by, placed, with_state
from zgraph.hardware import Hardware
from zgraph.lower import Lowered
from zgraph.placement import Placement
from zgraph.program import Program
from zgraph.timeline import TRANSFER_LANES, Timeline, play


def compiled_bytes(num_nodes: int) -> int:
    """What is resident on a CPU beside tensors once a step is compiled: modules imported for it and holes in the heap.

    46 KB for each node beyond 520, and 40 MB at most: fitted to 17 pairs of GPTs and options, each measured twice
    (``benchmarks/here.py``). Graphs had 720 to 2,380 nodes, and left from 3 to 56 MB: what is still needed of compiling
    lies scattered over all that was needed meanwhile, of which Python gives back only whole MiB. They were measured
    without the collections of garbage in the middle of compiling (``zgraph.collector``), with which 8 to 17 MB less
    stay. And 2 MB at least, for one of 521 nodes left 0.4 MB, and smaller ones 1.0 (``benchmarks/budget.py --quick``).

    Args:
        num_nodes: of the step's largest graph.
    """
    return min(max(46_000 * (num_nodes - 520), 2 * 10**6), 40 * 10**6)


@dataclass(frozen=True)
class Prediction:
    """A step of one rank.

    Attributes:
        timelines: of the programs that a step runs, each as often as ``repeats`` says.
        footprints: of the same programs.
        repeats: how many micro-batches each program runs on.
        device_type: where it runs.
    """

    timelines: tuple[Timeline, ...]
    footprints: tuple[Footprint, ...]
    repeats: tuple[int, ...]
    device_type: str

    @property
    def step_s(self) -> float:
        """Seconds of a step, all micro-batches together."""
        return sum(t.step_s * times for t, times in zip(self.timelines, self.repeats, strict=True))

    @property
    def exposed_s(self) -> float:
        """Seconds of a step in which computing waits for communication or a lower tier."""
        return sum(t.exposed_s * times for t, times in zip(self.timelines, self.repeats, strict=True))

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes of a step that this rank moves from and to lower tiers, by lane."""
        found = dict.fromkeys(sorted(TRANSFER_LANES), 0)
        for timeline, times in zip(self.timelines, self.repeats, strict=True):
            for event in timeline.events:
                if event.lane in found:
                    found[event.lane] += int(event.cost.num_bytes) * times
        return found

    @property
    def flops(self) -> int:
        """Floating-point operations of a step's matrix products and attention."""
        return sum(t.matrix_flops * times for t, times in zip(self.timelines, self.repeats, strict=True))

    @property
    def peak(self) -> Footprint:
        """That of the program which holds most."""
        return max(self.footprints, key=lambda f: f.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that tensors hold at once: ``torch.cuda.max_memory_allocated``, but for rounding.

        On a CPU the arena counts as a whole, which holds it from step to step.
        """
        return self.peak.peak_bytes

    def away_bytes(self, tier: str) -> int:
        """What lies on a lower tier: state, and room for what the program that spills most of them spills."""
        return max(footprint.away_bytes(tier) for footprint in self.footprints)

    @property
    def num_nodes(self) -> int:
        """Of the largest program."""
        return max(footprint.num_positions for footprint in self.footprints)

    @cached_property
    def reserved_bytes(self) -> int:
        """What the allocator takes from the device: ``torch.cuda.max_memory_reserved``.

        On a CPU, resident memory: what is live, for nearly all that comes and goes does so within the arena, and what
        compiling leaves (``compiled_bytes``).
        """
        if self.device_type == "cpu":
            return self.peak_bytes + compiled_bytes(self.num_nodes)
        return reserved_bytes(*(f.holdings for f in self.footprints))

    @property
    def unknown(self) -> Counter[str]:
        """Operators that were costed by their bytes alone, and how many calls of a step they are."""
        found: Counter[str] = Counter()
        for timeline, times in zip(self.timelines, self.repeats, strict=True):
            found.update({name: count * times for name, count in timeline.unknown.items()})
        return found


def predict(lowered: Lowered, hardware: Hardware, accumulate: int = 1) -> Prediction:
    """Play the programs of a step on a machine.

    Args:
        lowered: the programs after all passes.
        hardware: the machine.
        accumulate: how many micro-batches a step has.
    """
    placements = [placed(program, hardware) for program in lowered.programs]
    timelines = tuple(
        play(program, hardware, cost_of=costs_of(program, hardware, placement).of)
        for program, placement in zip(lowered.programs, placements, strict=True)
    )
    *before, last = map(held_by, lowered.programs, repeat(hardware), placements)
    footprints = in_one_arena([*(with_state(each, last) for each in before), last])
    return Prediction(timelines, footprints, (accumulate - 1, 1)[-len(timelines) :], hardware.device_type)


def costs_of(program: Program, hardware: Hardware, placement: Placement | None = None) -> Costs:
    """What a program's calls cost on a machine, where what they make lies as it does there.

    Args:
        program: after all passes, or at any stage as if no other followed.
        hardware: the machine.
        placement: what ``placed`` gives, which is worked out if None.
    """
    placement = placed(program, hardware) if placement is None else placement
    return Costs(program, hardware, copied=placement.copied)


def in_one_arena(footprints: Sequence[Footprint]) -> tuple[Footprint, ...]:
    """The footprints of a step's programs, which share one arena."""
    num_bytes = max(each.arena_bytes for each in footprints)
    return tuple(replace(each, arena_bytes=num_bytes) for each in footprints)
