"""Keep on a lower tier what forward leaves for backward, while neither needs it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from zgraph import ops
from zgraph.hardware import Hardware
from zgraph.liveness import Lifetime, lifetimes, written
from zgraph.passes.offload import MARGIN, check_tier
from zgraph.passes.trips import Idle, Trip, done_at, families, last_value, make, readers_of
from zgraph.pipeline import Pass
from zgraph.placement import SMALLEST_BYTES
from zgraph.program import Phase, Program, Stage, phase_of
from zgraph.timeline import COMPUTE, INWARD, play

SLACK = 1e-2
"""Of the seconds of a step: so much longer it may be predicted to take where nothing is to wait for transfers. To
start a transfer takes some time in any case."""

IN_FLIGHT = 2
"""Where computing may wait for transfers, of the largest tensor that is spilled: so many times its bytes may be on
their way at once, each way."""


@dataclass(frozen=True)
class OffloadActivations(Pass):
    """Spill what forward has read for the last time, and load it before backward reads it again.

        h = mm(x, v)                            h = mm(x, v)
        y = gelu(h)                             y = gelu(h)
        z = mm(y, w)                            t = spill(h)
        ...                                     z = mm(y, w)            # while it is written
                                         ->     d = wait(t)             # h is free from here
                                                ...
                                                s = load(d)
        gy = mm(gz, t(w))                       gy = mm(gz, t(w))       # while it is read
        gh = gelu_backward(gy, h)               gh = gelu_backward(gy, wait(s))

    Those go that are needed last again, and of these the largest first, as long as each is predicted to have gone
    before it has to begin to come back, in the time in which others are computed. What does not lower the peak in the
    end stays. When one that goes is waited for, and when one begins to come, is decided by what calls cost on the
    machine; where that turns out wrong, computing waits, and no more is held than was said.

    Args:
        hardware: the machine, as each rank finds it; all ranks are given the same.
        waits: computing may wait for transfers: all goes that lowers the peak.
        smallest_bytes: of what goes.
        tier: where it goes, ``"host"`` or ``"disk"``.
    """

    hardware: Hardware
    waits: bool = False
    smallest_bytes: int = SMALLEST_BYTES
    tier: str = "disk"

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        check_tier(self.tier, program, self.hardware)
        choice = _Choice(self, program)
        ways = [[], choice.hidden(), *([choice.all()] if self.waits else [])]
        make(program, min(ways, key=choice.peak_bytes), self.tier)


class _Choice:
    """Decides what goes, and when.

    Attributes:
        held: what may go, that first which is needed last again.
    """

    def __init__(self, made: OffloadActivations, program: Program) -> None:
        self._made, self._program, self._hardware = made, program, made.hardware
        self._nodes = list(program.graph.nodes)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._step_s = self._play()
        lives = lifetimes(program, staged=self._hardware.is_staged)
        self._change = np.zeros(len(self._nodes) + 1, dtype=np.int64)  # of the bytes that are held, from call to call
        for life in lives:
            self._change[life.first] += life.num_bytes
            self._change[life.last + 1] -= life.num_bytes
        self.held = sorted(self._find(lives), key=lambda each: (-self._gap_s(each), -each.num_bytes, each.first))

    def _play(self) -> float:
        """See when each call starts and ends; how long a step takes."""
        timeline = play(self._program, self._hardware)
        events = {event.node: event for event in timeline.events if event.lane == COMPUTE}
        self._starts: list[float] = []
        self._ends: list[float] = []
        now = 0.0
        for node in self._nodes:
            event = events.get(node)
            self._starts.append(now if event is None else event.start_s)
            now = now if event is None else event.end_s
            self._ends.append(now)
        inward = INWARD[self._made.tier]
        loading_s = {event.node: event.end_s - event.start_s for event in timeline.events if event.lane == inward}
        # What comes from there in any case: until when, and how long that takes.
        self._others = [(self._starts[self._place[next(iter(load.users))]], taken) for load, taken in loading_s.items()]
        return timeline.step_s

    def _find(self, lives: Iterable[Lifetime]) -> Iterator[Idle]:
        together = families(self._program)
        changed = {memory for node in self._nodes if node.op == "call_function" for memory in written(node)}
        for life in lives:
            if life.is_beside:  # what a call works in, which is gone with it
                continue
            kept, *views = last_value(together[life.node])
            if not self._can_go(life, kept) or not changed.isdisjoint((kept, *views)):
                continue
            if any(len(node.all_input_nodes) > 1 for node in views):
                continue
            family = [kept, *views]
            readers = readers_of(family)
            early = [done_at(node, self._place) for node in readers if phase_of(node) is Phase.FORWARD]
            late = [self._place[node] for node in readers if phase_of(node) is not Phase.FORWARD]
            read, again = max(early, default=self._place[kept]), min(late, default=0)
            if read + 1 < again and self._program.output_node not in readers:
                yield Idle(tuple(self._place[node] for node in family), read, again, life.num_bytes)

    def _gap_s(self, held: Idle) -> float:
        """How long it is not needed."""
        return self._starts[held.again] - self._ends[held.read]

    def _can_go(self, life: Lifetime, kept: fx.Node) -> bool:
        """Whether memory holds one tensor of forward, large and without gaps, that no transfer and no rank gives."""
        val, target = kept.meta["val"], life.node.target
        if life.num_bytes < self._made.smallest_bytes or phase_of(kept) is not Phase.FORWARD:
            return False
        if not isinstance(val, torch.Tensor) or val.layout is not torch.strided or val.is_conj() or val.is_neg():
            return False
        return val.dim() > 0 and val.nbytes == life.num_bytes and target not in ops.ASYNCHRONOUS

    # -- what goes --------------------------------------------------------------------------------------------

    def hidden(self) -> list[Trip]:
        """What can go and come while others are computed, if it lowers the peak."""
        trips = self._trips(None)
        while trips and self._seconds(trips) > self._step_s * (1 + SLACK):
            trips = self._pruned(trips[: len(trips) * 3 // 4], None)
        return trips

    def all(self) -> list[Trip]:
        """What lowers the peak."""
        return self._trips(IN_FLIGHT * max((each.num_bytes for each in self.held), default=0))

    def _trips(self, window: int | None) -> list[Trip]:
        """What fits between its last use in forward and its first in backward, and lowers the peak.

        Args:
            window: so many bytes may be on their way at once, and computing waits where there are more. It waits for
                none if None.
        """
        chosen: list[Idle] = []
        for each in self.held:
            if self._fitted([*chosen, each], window) is not None:
                chosen.append(each)
        return self._pruned(self._fitted(chosen, window) or [], window)

    def _pruned(self, trips: list[Trip], window: int | None) -> list[Trip]:
        """Without those that do not lower the peak."""
        peak_bytes = self.peak_bytes(trips)
        for each in [trip.idle for trip in reversed(trips)]:
            fewer = self._fitted([trip.idle for trip in trips if trip.idle is not each], window)
            if fewer is not None and (found := self.peak_bytes(fewer)) <= peak_bytes:
                trips, peak_bytes = fewer, found
        return trips

    def _fitted(self, chosen: Sequence[Idle], window: int | None) -> list[Trip] | None:
        """When each goes and comes; None if one would have to come before it has gone."""
        stored, loaded = self._stored_at(chosen, window), self._load_at(chosen, window)
        trips = []
        for each in chosen:
            stored_at, load_at = stored[each], loaded[each]
            if window is not None:
                stored_at = min(stored_at, each.again - 1)
                load_at = max(load_at, stored_at + 1)
            if load_at <= stored_at:
                return None
            trips.append(Trip(each, stored_at, load_at))
        return trips

    def _stored_at(self, chosen: Sequence[Idle], window: int | None) -> dict[Idle, int]:
        """When each has gone, one after the other as forward is done with them."""
        found: dict[Idle, int] = {}
        going: deque[Idle] = deque()
        free_s = 0.0
        for each in sorted(chosen, key=lambda each: (each.read, each.first)):
            writing_s = self._hardware.transfer_s("device", self._made.tier, each.num_bytes)
            free_s = max(free_s, self._ends[each.read]) + MARGIN * float(writing_s)
            found[each] = max(bisect_left(self._starts, free_s), each.read + 1)
            going.append(each)
            while window is not None and sum(other.num_bytes for other in going) > window:
                first = going.popleft()
                found[first] = min(found[first], each.read + 1)
        return found

    def _load_at(self, chosen: Sequence[Idle], window: int | None) -> dict[Idle, int]:
        """When each has to begin to come, to be there when backward needs it."""
        found: dict[Idle, int] = {}
        jobs: list[tuple[float, float, Idle | None]] = [(until_s, taken, None) for until_s, taken in self._others]
        for each in chosen:
            reading_s = MARGIN * float(self._hardware.transfer_s(self._made.tier, "device", each.num_bytes))
            jobs.append((self._starts[each.again], reading_s, each))
        begin_s = float("inf")
        for until_s, taken, job in sorted(jobs, key=lambda job: (-job[0], job[2].again if job[2] else 0)):
            begin_s = min(begin_s, until_s) - taken
            if job is not None:
                found[job] = min(bisect_right(self._starts, begin_s) - 1, job.again)
        coming: deque[Idle] = deque()
        for each in sorted(chosen, key=lambda each: (each.again, each.first)):
            coming.append(each)
            while window is not None and sum(other.num_bytes for other in coming) > window:
                found[each] = max(found[each], coming.popleft().again)
        return found

    # -- what it brings ---------------------------------------------------------------------------------------

    def peak_bytes(self, trips: Sequence[Trip]) -> int:
        """Of temporaries, the most that is held at once."""
        change = self._change.copy()
        for trip in trips:
            change[trip.stored_at] -= trip.idle.num_bytes
            change[trip.load_at] += trip.idle.num_bytes
        return int(np.cumsum(change).max())

    def _seconds(self, trips: Sequence[Trip]) -> float:
        copy = self._program.clone()
        make(copy, trips, self._made.tier)
        return play(copy, self._hardware).step_s
