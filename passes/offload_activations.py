"""Keep on a lower tier what forward leaves for backward, while neither needs it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from zgraph import ops
from zgraph.hardware import Hardware
from zgraph.liveness import Lifetime, lifetimes, owners, written
from zgraph.passes.offload import MARGIN, check_tier
from zgraph.pipeline import Pass
from zgraph.placement import SMALLEST_BYTES
from zgraph.program import Phase, Program, Stage, Target, operand, phase_of
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
        _spill(program, min(ways, key=choice.peak_bytes), self.tier)


@dataclass(frozen=True)
class _Held:
    """Memory that forward makes and backward reads.

    Attributes:
        first, last: positions in the graph of the call that makes it, or has written over what lay there before, and of
            the last that needs it.
        read: likewise of the last call of forward that needs it.
        again: likewise of the first one behind forward.
        num_bytes: of it.
        gap_s: from the end of ``read`` to the start of ``again``, in seconds.
    """

    first: int
    last: int
    read: int
    again: int
    num_bytes: int
    gap_s: float


@dataclass(frozen=True)
class _Trip:
    """To a lower tier and back.

    Attributes:
        held: what goes.
        stored_at, load_at: positions of the calls before which it has gone, and before which it begins to come.
    """

    held: _Held
    stored_at: int
    load_at: int


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
        self.held = sorted(self._find(lives), key=lambda each: (-each.gap_s, -each.num_bytes, each.first))

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

    def _find(self, lives: Iterable[Lifetime]) -> Iterator[_Held]:
        families: dict[fx.Node, list[fx.Node]] = {}
        for node, owner in owners(self._program).items():
            families.setdefault(owner, []).append(node)
        changed = {memory for node in self._nodes if node.op == "call_function" for memory in written(node)}
        for life in lives:
            if life.is_beside:  # what a call works in, which is gone with it
                continue
            kept, *views = _last_value(families[life.node])
            if not self._can_go(life, kept) or not changed.isdisjoint((kept, *views)):
                continue
            if any(len(node.all_input_nodes) > 1 for node in views):
                continue
            family = [kept, *views]
            readers = _readers(family)
            early = [self._done(node) for node in readers if phase_of(node) is Phase.FORWARD]
            late = [self._place[node] for node in readers if phase_of(node) is not Phase.FORWARD]
            read, again = max(early, default=self._place[kept]), min(late, default=0)
            if read + 1 < again and self._program.output_node not in readers:
                gap_s = self._starts[again] - self._ends[read]
                yield _Held(self._place[kept], life.last, read, again, life.num_bytes, gap_s)

    def _can_go(self, life: Lifetime, kept: fx.Node) -> bool:
        """Whether memory holds one tensor of forward, large and without gaps, that no transfer and no rank gives."""
        val, target = kept.meta["val"], life.node.target
        if life.num_bytes < self._made.smallest_bytes or phase_of(kept) is not Phase.FORWARD:
            return False
        if not isinstance(val, torch.Tensor) or val.layout is not torch.strided or val.is_conj() or val.is_neg():
            return False
        return val.dim() > 0 and val.nbytes == life.num_bytes and target not in ops.ASYNCHRONOUS

    def _done(self, reader: fx.Node) -> int:
        """The position from which on a call needs no more what it has read: what is sent has to have arrived."""
        waits = reader.users if reader.target in ops.ASYNCHRONOUS else ()
        return max([self._place[reader], *(self._place[wait] for wait in waits)])

    # -- what goes --------------------------------------------------------------------------------------------

    def hidden(self) -> list[_Trip]:
        """What can go and come while others are computed, if it lowers the peak."""
        trips = self._trips(None)
        while trips and self._seconds(trips) > self._step_s * (1 + SLACK):
            trips = self._pruned(trips[: len(trips) * 3 // 4], None)
        return trips

    def all(self) -> list[_Trip]:
        """What lowers the peak."""
        return self._trips(IN_FLIGHT * max((each.num_bytes for each in self.held), default=0))

    def _trips(self, window: int | None) -> list[_Trip]:
        """What fits between its last use in forward and its first in backward, and lowers the peak.

        Args:
            window: so many bytes may be on their way at once, and computing waits where there are more. It waits for
                none if None.
        """
        chosen: list[_Held] = []
        for each in self.held:
            if self._fitted([*chosen, each], window) is not None:
                chosen.append(each)
        return self._pruned(self._fitted(chosen, window) or [], window)

    def _pruned(self, trips: list[_Trip], window: int | None) -> list[_Trip]:
        """Without those that do not lower the peak."""
        peak_bytes = self.peak_bytes(trips)
        for each in [trip.held for trip in reversed(trips)]:
            fewer = self._fitted([trip.held for trip in trips if trip.held is not each], window)
            if fewer is not None and (found := self.peak_bytes(fewer)) <= peak_bytes:
                trips, peak_bytes = fewer, found
        return trips

    def _fitted(self, chosen: Sequence[_Held], window: int | None) -> list[_Trip] | None:
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
            trips.append(_Trip(each, stored_at, load_at))
        return trips

    def _stored_at(self, chosen: Sequence[_Held], window: int | None) -> dict[_Held, int]:
        """When each has gone, one after the other as forward is done with them."""
        found: dict[_Held, int] = {}
        going: deque[_Held] = deque()
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

    def _load_at(self, chosen: Sequence[_Held], window: int | None) -> dict[_Held, int]:
        """When each has to begin to come, to be there when backward needs it."""
        found: dict[_Held, int] = {}
        jobs: list[tuple[float, float, _Held | None]] = [(until_s, taken, None) for until_s, taken in self._others]
        for each in chosen:
            reading_s = MARGIN * float(self._hardware.transfer_s(self._made.tier, "device", each.num_bytes))
            jobs.append((self._starts[each.again], reading_s, each))
        begin_s = float("inf")
        for until_s, taken, job in sorted(jobs, key=lambda job: (-job[0], job[2].again if job[2] else 0)):
            begin_s = min(begin_s, until_s) - taken
            if job is not None:
                found[job] = min(bisect_right(self._starts, begin_s) - 1, job.again)
        coming: deque[_Held] = deque()
        for each in sorted(chosen, key=lambda each: (each.again, each.first)):
            coming.append(each)
            while window is not None and sum(other.num_bytes for other in coming) > window:
                found[each] = max(found[each], coming.popleft().again)
        return found

    # -- what it brings ---------------------------------------------------------------------------------------

    def peak_bytes(self, trips: Sequence[_Trip]) -> int:
        """Of temporaries, the most that is held at once."""
        change = self._change.copy()
        for trip in trips:
            change[trip.stored_at] -= trip.held.num_bytes
            change[trip.load_at] += trip.held.num_bytes
        return int(np.cumsum(change).max())

    def _seconds(self, trips: Sequence[_Trip]) -> float:
        copy = self._program.clone()
        _spill(copy, trips, self._made.tier)
        return play(copy, self._hardware).step_s


def _last_value(family: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """Of what lies in some memory, in order, what is written there last, and views of it."""
    return family[max(i for i, node in enumerate(family) if i == 0 or ops.view_of(node) is None) :]


def _readers(family: Sequence[fx.Node]) -> set[fx.Node]:
    """The calls that read memory, itself or through views of it."""
    return {user for node in family for user in node.users} - set(family)


def _spill(program: Program, trips: Sequence[_Trip], tier: str) -> None:
    """Let trips be made."""
    nodes = list(program.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    owner = owners(program)
    made: dict[_Trip, fx.Node] = {}

    def add(target: Target, trip: _Trip, at: int, *args: Any) -> None:
        origin = replace(nodes[trip.held.first].meta["origin"], phase=_phase_before(nodes[at]))
        made[trip] = program.call(target, *args, origin=origin, before=nodes[at])

    for trip in sorted(trips, key=lambda trip: trip.held.read):
        add(ops.spill, trip, trip.held.read + 1, nodes[trip.held.first], tier)
    for trip in sorted(trips, key=lambda trip: trip.stored_at):
        add(ops.wait, trip, trip.stored_at, made[trip])
    for trip in sorted(trips, key=lambda trip: (trip.load_at, trip.held.again)):
        add(ops.load, trip, trip.load_at, made[trip], tier)
    families: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        families.setdefault(owner[node], []).append(node)
    for trip in trips:
        add(ops.wait, trip, trip.held.again, made[trip])
        family = _last_value(families[owner[nodes[trip.held.first]]])
        views = {family[0]: made[trip]}
        for reader in sorted(_readers(family) & place.keys(), key=place.__getitem__):
            if place[reader] >= trip.held.again:
                for source in reader.all_input_nodes:
                    if source in family:
                        reader.replace_input_with(source, _view(program, source, views, reader))
        for node in reversed(family[1:]):
            if not node.users:
                program.graph.erase_node(node)


def _phase_before(call: fx.Node) -> Phase:
    """Forward's or backward's: what is spilled is a rank's own, and what belongs to the update is that of all."""
    return Phase.FORWARD if phase_of(call) is Phase.FORWARD else Phase.BACKWARD


def _view(program: Program, node: fx.Node, views: dict[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
    """The like of a view of memory, of what was loaded; made before a call if there is none yet."""
    if node not in views:
        source = _view(program, operand(node), views, before)
        origin = replace(node.meta["origin"], phase=_phase_before(before))
        views[node] = program.call(node.target, source, *node.args[1:], origin=origin, before=before, **node.kwargs)
    return views[node]
