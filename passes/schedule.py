"""List scheduling over the lanes of a machine: the cost model says when to send, and what is alive says when one may.

Graham (1969), "Bounds on Multiprocessing Timing Anomalies". Calls that compute keep their order; what travels is placed
between them. Each choice of how many bytes may be in flight gives an order, and the timeline says which to take.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from torch import fx

from zgraph import ops
from zgraph.config import IN_FLIGHT
from zgraph.cost import Cost, Costs
from zgraph.hardware import Hardware
from zgraph.liveness import held_bytes, lifetimes, owners
from zgraph.passes.gathers import prepares
from zgraph.passes.inplace import fused_updates
from zgraph.passes.join_loss import joinable
from zgraph.passes.order import arrange
from zgraph.passes.overlap import Overlap
from zgraph.passes.overwrite import overwriting, storing
from zgraph.pipeline import Pass
from zgraph.program import Phase, Program, Stage, operand, phase_of
from zgraph.timeline import COMPUTE, Lanes, least_s, play
from zgraph.work import FREE, Work, num_bytes_of

MARGIN = 1.25
"""Of what a gather is predicted to take, how much it is given to be there in time."""

DISTANCES = (1, 2)
"""Of gathers, how many buckets ahead are tried, too: where links are busy all the time, that may keep them busier."""

FAR = 2**62
"""Bytes of a bucket that may be gathered ahead of time: any."""

GAIN = 1e-3
"""Of a step's time, what more bytes in flight must save."""


@dataclass(frozen=True)
class Schedule(Pass):
    """Issue gathers early enough to be hidden and no earlier, reduce and update as gradients arrive, wait late.

        w1 = wait(gather(s1))              g1, g2 = gather(s1), gather(s2)
        y1 = mm(x, w1)                     w1 = wait(g1)
        w2 = wait(gather(s2))       ->     y1 = mm(x, w1)            # while g2 travels
        y2 = mm(y1, w2)                    w2 = wait(g2)
                                           y2 = mm(y1, w2)

    How far ahead a gather is issued follows from what it takes and from what is computed meanwhile. With a limit of 0
    it never raises the step's peak: it is in flight where other memory is free. Each bucket of the limit may add the
    bytes of an average one. The fewest bytes in flight are chosen with which the timeline is fastest; where
    nothing is hidden, as on a CPU, nothing is in flight. What travels along different axes of the mesh travels at
    the same time.

    Args:
        hardware: the machine, as each rank finds it; all ranks are given the same.
        in_flight: see ``zgraph.config.Config``. A smaller number is never faster.
    """

    hardware: Hardware
    in_flight: int | None

    takes, gives = Stage.SHARDED, Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        costs = _costs(program, self.hardware)
        holding = Holding(program, staged=self.hardware.is_staged)
        seen: dict[tuple[fx.Node, ...], _Order] = {}

        def now() -> _Order:
            calls = tuple(_calls(program))
            if calls not in seen:
                step_s = play(program, self.hardware, cost_of=costs.__getitem__).step_s
                seen[calls] = _Order(calls, step_s, holding.now())
            return seen[calls]

        given = now()
        step = _Step(program, self.hardware, costs)
        _put(program, step.order())
        best = least = now()
        held = step.held_by_each(program, least.held)
        if given.step_s < least.step_s and given.peak_bytes <= least.peak_bytes:
            best = given
        enough_s = least_s(program, self.hardware, cost_of=costs.__getitem__) * (1 + GAIN)
        fixed: list[_Order] = []
        for limit in _up_to(self.in_flight) if step.bucket_bytes else ():
            if best.step_s <= enough_s:
                break
            most = math.inf if limit is None else least.peak_bytes + limit * step.bucket_bytes
            _put(program, step.order(most, held))
            found = now()
            for distance in DISTANCES if not fixed else ():
                _put(program, best.calls)
                Overlap(distance, FAR).rewrite(program)
                fixed.append(now())
            for order in (found, *fixed):
                if order.peak_bytes <= most and order.step_s < best.step_s * (1 - GAIN):
                    best = order
        _put(program, best.calls)


@dataclass(frozen=True)
class _Order:
    """An order of a program's calls.

    Attributes:
        calls: in that order.
        step_s: seconds that they take.
        held: bytes of temporaries at each node.
    """

    calls: tuple[fx.Node, ...]
    step_s: float
    held: Sequence[int]

    @property
    def peak_bytes(self) -> int:
        return max(self.held)


def _up_to(in_flight: int | None) -> Iterator[int | None]:
    for limit in IN_FLIGHT:
        if in_flight is None or (limit is not None and limit <= in_flight):
            yield limit


def _calls(program: Program) -> Iterator[fx.Node]:
    return (node for node in program.graph.nodes if node.op == "call_function")


def _put(program: Program, order: Iterable[fx.Node]) -> None:
    arrange(program, {node: i for i, node in enumerate(order)})


class Holding:
    """Tells what a program holds, as far as what is written in place does not do away with it, in one order of its
    calls after another.

    Args:
        staged: see ``zgraph.liveness.lifetimes``.

    Attributes:
        owner: of the memory of each value.
    """

    def __init__(self, program: Program, *, staged: bool) -> None:
        self._program, self._staged = program, staged
        self.owner = owners(program)
        self._inside = {node for nodes in fused_updates(program).values() for node in nodes}
        self._inside.update(joinable(program).values())
        self._stores = storing(program)

    def now(self) -> list[int]:
        """Bytes of temporaries alive at each node."""
        lives = lifetimes(self._program, staged=self._staged, owner=self.owner)
        over = overwriting(self._program, lives, self.owner, self._stores)
        # What is stored over an operand that ends there begins behind it.
        held = (
            replace(life, first=life.first + 1) if life.node in over else life
            for life in lives
            if life.node not in self._inside
        )
        return held_bytes((life for life in held if life.first <= life.last), self._program.num_nodes())


def _costs(program: Program, hardware: Hardware) -> dict[fx.Node, Cost]:
    """What each call costs, where an elementwise update is one kernel that streams what it reads and writes."""
    costs = Costs(program, hardware)
    found = {node: costs.of(node) for node in _calls(program)}
    for nodes in fused_updates(program).values():
        inside = set(nodes)
        read = {source: None for node in nodes for source in node.all_input_nodes if source not in inside}
        written = [node for node in nodes if not inside.issuperset(node.users)]
        num_bytes = [sum(num_bytes_of(node.meta["val"]) for node in some) for some in (read, written)]
        work = Work("update", read_bytes=num_bytes[0], written_bytes=num_bytes[1], in_place=True)
        found.update(dict.fromkeys(nodes, Cost(0, (FREE,))))
        found[nodes[-1]] = Cost(hardware.memory_s(sum(num_bytes), in_place=True), (work,))
    return found


class _Step:
    """A program as a scheduler sees it: calls that compute, in order, and what travels beside them.

    ``gathers`` are waits for parameters, which any call may precede; ``sends`` are starts of what has been computed.
    What follows from what was sent, and all of the update, stands behind it: it is taken up as soon as it can be.
    """

    def __init__(self, program: Program, hardware: Hardware, costs: Mapping[fx.Node, Cost]) -> None:
        self.hardware, self.costs = hardware, costs
        self.calls = list(_calls(program))
        self.place = {node: i for i, node in enumerate(self.calls)}
        output = program.output_node
        self.leaving = [node for node in self.calls if node.target is ops.wait and set(node.users) == {output}]
        kept = {operand(node) for node in self.leaving}
        starts = [n for n in self.calls if n.target in ops.STARTS and n not in kept and _is_early(n)]
        gathers = {node for node in starts if node.target is ops.all_gather and prepares(node) is not None}
        self.sends = {node for node in starts if node not in gathers}
        self.wait_of = {operand(node): node for node in self.calls if node.target is ops.wait}
        waits = {self.wait_of[node] for node in starts}
        needed = _ancestors(starts)
        behind = {n for n in _descendants([self.wait_of[n] for n in self.sends]) if n not in needed}
        apart = {*gathers, *self.sends, *waits, *self.leaving, *kept}
        self.followers = {n for n in self.calls if n not in apart and (n in behind or not _is_early(n))}
        self.backbone = [node for node in self.calls if node not in apart and node not in self.followers]
        at = {node: i for i, node in enumerate(self.backbone)}
        end = len(self.backbone)
        self.first_read = {
            node: min((at.get(u, end) for u in self.wait_of[node].users), default=end) for node in gathers
        }
        self.gathers = sorted(gathers, key=lambda node: (self.first_read[node], self.place[node]))
        self.bound = _descendants([*self.backbone, *self.sends]) & self.followers
        self.bytes = {node: self._num_bytes(node) for node in starts}
        self.bucket_bytes = sum(self.bytes.values()) // max(len(starts), 1)
        spans = [max(costs[n].seconds, hardware.launch_s * costs[n].num_calls) for n in self.backbone]
        self.spans = [float(span) for span in spans]
        self.clock = [0.0, *accumulate(self.spans)]
        self.latest = self._latest(at)

    def _num_bytes(self, start: fx.Node) -> int:
        """Of memory that is held from a start to its wait."""
        sent = [source for source in start.all_input_nodes if source.op == "call_function"]
        return sum(node.meta["val"].nbytes for node in (start, *sent))

    def _latest(self, at: Mapping[fx.Node, int]) -> list[float]:
        """When each gather has to start, on the clock of what computes, if nothing is to wait for it."""
        end = len(self.backbone)
        sent: dict[str, list[float]] = {}  # by axis, seconds of what is sent behind each call
        behind: dict[fx.Node, int] = {}
        for node in sorted(self.sends, key=self.place.__getitem__):
            # What is reduced between nodes has been reduced inside of one before.
            sources = (operand(source) if source.target is ops.wait else source for source in node.all_input_nodes)
            behind[node] = max((behind.get(source, at.get(source, 0)) for source in sources), default=0)
            sent.setdefault(ops.axis_of(node), [0.0] * (end + 1))[behind[node]] += self._seconds(node)
        before = {axis: [0.0, *accumulate(each)] for axis, each in sent.items()}
        found = [0.0] * len(self.gathers)
        following: dict[str, tuple[float, int]] = {}  # by axis, when the next gather starts, and what reads it
        for i in range(len(self.gathers) - 1, -1, -1):
            gather = self.gathers[i]
            axis, mine = ops.axis_of(gather), self.first_read[gather]
            start, read = following.get(axis, (math.inf, end))
            if axis in before:
                start -= before[axis][read] - before[axis][mine]
            found[i] = min(self.clock[mine], start) - MARGIN * self._seconds(gather)
            following[axis] = found[i], mine
        return found

    def _seconds(self, node: fx.Node) -> float:
        return float(self.costs[node].seconds)

    def held_by_each(self, program: Program, held: Sequence[int]) -> list[int]:
        """Bytes held by each call that computes, in a program where nothing is in flight, and by what follows it."""
        found = [0] * len(self.backbone)
        at = {node: i for i, node in enumerate(self.backbone)}
        last = 0
        for node, num_bytes in zip(program.graph.nodes, held, strict=True):
            last = at.get(node, last)
            is_ahead = node in self.first_read or (node.target is ops.wait and operand(node) in self.first_read)
            if found and not is_ahead:  # what is gathered is held by the call that reads it, too
                found[last] = max(found[last], num_bytes)
        return found

    def order(self, most: float = 0, held: Sequence[int] | None = None) -> list[fx.Node]:
        """All calls, in an order that holds no more than ``most`` bytes at once.

        Args:
            most: bytes.
            held: see ``held_by_each``; None puts nothing in flight.
        """
        return _Listing(self, most, held).run()


class _Listing:
    """One order, made call by call while the lanes of the machine go along."""

    def __init__(self, step: _Step, most: float, held: Sequence[int] | None) -> None:
        self.step, self.most = step, most
        self.held = None if held is None else np.array(held, dtype=np.float64)
        self.lanes = Lanes(step.hardware)
        self.ends: dict[fx.Node, float] = {}  # of what has been issued, in order
        self.next_gather = 0
        self.sent: deque[fx.Node] = deque()  # and not taken up
        self.sent_bytes = 0
        self.missing = {
            node: sum(self._counts(source) for source in node.all_input_nodes) for node in (*step.bound, *step.sends)
        }

    def _counts(self, source: fx.Node) -> bool:
        """Whether what needs a value has to wait until it is there, rather than ask for it."""
        return source in self.step.place and (source not in self.step.followers or source in self.step.bound)

    def run(self) -> list[fx.Node]:
        step = self.step
        for i, node in enumerate(step.backbone):
            self._take_up_arrived()
            self._issue_gathers(i)
            while self.sent and self.held is not None and self.held[i] + self.sent_bytes > self.most:
                self._take_up(self.sent[0])
            self._demand(node)
        while self.sent:
            self._take_up(self.sent[0])
        for node in step.calls:
            if node not in step.leaving:
                self._demand(node)
        for node in step.leaving:
            self._demand(node)
        return list(self.ends)

    # -- what travels -----------------------------------------------------------------------------------------

    def _issue_gathers(self, i: int) -> None:
        """Issue the gathers that must be on their way before the ``i``-th call has computed."""
        step = self.step
        until = self.lanes.computed + step.spans[i]
        while self.held is not None and self.next_gather < len(step.gathers):
            gather = step.gathers[self.next_gather]
            read = step.first_read[gather]
            start = self.lanes.computed + step.latest[self.next_gather] - step.clock[i]
            if gather not in self.ends and read > i:
                is_due = start < until and self.lanes.links.get(ops.axis_of(gather), 0.0) < until
                if not is_due or not self._is_room(i, read, step.bytes[gather]):
                    return
                self.held[i:read] += step.bytes[gather]
                self._demand(gather)
            elif read > i:
                return
            self.next_gather += 1

    def _is_room(self, i: int, read: int, num_bytes: int) -> bool:
        assert self.held is not None
        return float(self.held[i:read].max()) + num_bytes + self.sent_bytes <= self.most

    def _take_up_arrived(self) -> None:
        """Take up what has arrived, so that nothing waits for it; each axis delivers in order."""
        while arrived := next(filter(self._has_arrived, self._next_to_arrive()), None):
            self._take_up(arrived)

    def _next_to_arrive(self) -> Iterable[fx.Node]:
        """What was sent first along each axis."""
        found: dict[str, fx.Node] = {}
        for start in self.sent:
            found.setdefault(ops.axis_of(start), start)
        return found.values()

    def _has_arrived(self, start: fx.Node) -> bool:
        late = (MARGIN - 1) * self.step._seconds(start)
        return self.held is None or self.ends[start] + late <= self.lanes.computed

    def _take_up(self, start: fx.Node) -> None:
        self._demand(self.step.wait_of[start])

    # -- issuing ----------------------------------------------------------------------------------------------

    def _demand(self, node: fx.Node) -> None:
        """Issue a call, and before it what it needs; then what it makes possible."""
        stack = [node]
        while stack:
            last = stack[-1]
            missing = [
                source for source in last.all_input_nodes if source in self.step.place and source not in self.ends
            ]
            if last in self.ends:
                stack.pop()
            elif missing:
                stack += sorted(missing, key=self.step.place.__getitem__, reverse=True)
            else:
                stack.pop()
                self._issue(last)

    def _issue(self, node: fx.Node) -> None:
        step = self.step
        if node.target is ops.wait:
            start = operand(node)
            _, self.ends[node] = self.lanes.wait(self.ends[start], step._seconds(start))
            if start in step.sends:
                self.sent.remove(start)
                self.sent_bytes -= step.bytes[start]
        else:
            lane = ops.axis_of(node) if node.target in ops.STARTS else COMPUTE
            _, self.ends[node] = self.lanes.run(step.costs[node], lane)
            if node in step.sends:
                self.sent.append(node)
                self.sent_bytes += step.bytes[node]
        if not self._counts(node):
            return
        for user in sorted((u for u in node.users if u in self.missing), key=step.place.__getitem__):
            self.missing[user] -= 1
            if not self.missing[user] and user not in self.ends:
                self._demand(user)


def _is_early(node: fx.Node) -> bool:
    """Whether a call belongs to forward or backward."""
    return phase_of(node) is not Phase.UPDATE


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they need."""
    return _closure(nodes, lambda node: node.all_input_nodes)


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that need them."""
    return _closure(nodes, lambda node: node.users)


def _closure(nodes: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found = set(nodes)
    stack = list(found)
    while stack:
        fresh = set(further(stack.pop())) - found
        found |= fresh
        stack.extend(fresh)
    return found
