"""A program played on a machine: when each call runs, and what is exposed.

Each lane does one thing after another: ``issue`` (the host, which starts operators), ``compute``, and one for each axis
of the mesh, whose process groups have links of their own: those inside of nodes, and those between them; besides ``disk
in`` and ``disk out``, by which tensors come from a disk and go there, and ``host in`` and ``host out``, likewise of the
host's memory, whose link moves as much each way at once; and ``host processors``, which compute what lies there. Node
order is issue order. What does not compute on the device starts when it has been issued, what was computed before it is
there, and its lane is free; a wait holds up the computing that is issued after it.

Of the compute lane, from the start to the end of the last call on it, every second is one of three: its own work
(``busy_s["compute"]``), waiting for communication or a lower tier (``exposed_s``), and waiting for the host to issue
calls (``starved_s``).
Before a GPU the host runs ahead and issues to a queue, so computing waits for it only where calls are shorter than
issuing them; until a wait has been issued it holds up nothing, so that a second in which the host is late is not
exposed as well. A CPU issues and computes in turns, so there ``starved_s`` is all the time that issuing takes. Its
cores move what travels between ranks, too: what is sent early takes as much from what is computed meanwhile, so all
communication is exposed. Disks move bytes by themselves.

``least_s`` is what no order of the same calls can be faster than.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.codegen.host_kernel import HostKernel
from zgraph.cost import Cost, Costs
from zgraph.hardware import LOWER_TIERS, Hardware
from zgraph.program import Program, operand, target_name
from zgraph.work import ATTENTION, MATRIX

COMPUTE = "compute"
ISSUE = "issue"
INWARD: dict[str, str] = {tier: f"{tier} in" for tier in LOWER_TIERS}
OUTWARD: dict[str, str] = {tier: f"{tier} out" for tier in LOWER_TIERS}
"""The lanes from each lower tier, and to it."""

PROCESSORS = "host processors"

TRANSFER_LANES = frozenset({*INWARD.values(), *OUTWARD.values()})


@dataclass(frozen=True)
class Event:
    """When one call runs, in seconds from the start of the step.

    Attributes:
        node: the call.
        lane: as ``lane_of`` has it.
        start_s, end_s: of the call; a wait lasts as long as it holds up its lane.
        cost: what it costs.
    """

    node: fx.Node
    lane: str
    start_s: float
    end_s: float
    cost: Cost


@dataclass(frozen=True)
class Timeline:
    """A step on a machine.

    Attributes:
        events: of all calls that take time, and of all waits, in order of issue.
        step_s: from the first call to the end of the last.
        busy_s: seconds of work by lane; of ``issue``, those that the host spends on starting operators.
        exposed_s: seconds in which computing waits for communication or a lower tier.
        starved_s: seconds in which computing waits for the host.
        matrix_flops: floating-point operations of matrix products and attention.
        unknown: calls of operators of no family, which were costed by their bytes, by name.
    """

    events: tuple[Event, ...]
    step_s: float
    busy_s: dict[str, float]
    exposed_s: float
    starved_s: float
    matrix_flops: int
    unknown: Counter[str]


@dataclass(frozen=True)
class Issued:
    """A call as a timeline sees it.

    Attributes:
        node: which call.
        cost: what it costs.
        lane: where it runs, as ``lane_of`` has it.
        waits_for: of a wait, which of the calls issued before it starts what it waits for.
    """

    node: Any
    cost: Cost
    lane: str = COMPUTE
    waits_for: int | None = None


def issued(program: Program, cost_of: Callable[[fx.Node], Cost]) -> list[Issued]:
    """A program's calls, in order."""
    found: list[Issued] = []
    index: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        index[node] = len(found)
        waits_for = index[operand(node)] if node.target is ops.wait else None
        found.append(Issued(node, cost_of(node), lane_of(node), waits_for))
    return found


def lane_of(node: fx.Node) -> str:
    """Where a call runs: ``compute``, an axis of the mesh, a way from or to a lower tier, or ``host processors``."""
    if isinstance(node.target, HostKernel):
        return PROCESSORS
    if node.target in ops.TRANSFERS:
        return (INWARD if node.target is ops.load else OUTWARD)[ops.tier_of(node)]
    return ops.axis_of(node) if node.target in ops.STARTS else COMPUTE


def play(program: Program, hardware: Hardware, *, cost_of: Callable[[fx.Node], Cost] | None = None) -> Timeline:
    """Run a program's calls, in order, on the lanes of a machine.

    Args:
        program: at any stage; its mesh says how many ranks there are.
        hardware: the machine.
        cost_of: what a call costs; ``zgraph.cost.Costs`` of this program and machine if None.
    """
    return play_issued(issued(program, cost_of or Costs(program, hardware).of), hardware)


class Lanes:
    """When each lane of a machine is free, while calls are issued one after the other.

    Attributes:
        issued, computed: when the host, and the compute lane, have done all that they were given.
        links: likewise of each axis.
        busy_s, exposed_s, starved_s: as of a ``Timeline``.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._launch_s = hardware.launch_s
        self._is_ahead = hardware.device_type != "cpu"  # the host issues to a queue
        self.issued, self.computed = 0.0, 0.0
        self.links: dict[str, float] = {}
        self.busy_s: dict[str, float] = defaultdict(float)
        self.exposed_s, self.starved_s = 0.0, 0.0

    def run(self, cost: Cost, lane: str) -> tuple[float, float]:
        """Issue a call; when it starts and ends."""
        if not cost.num_calls and lane == COMPUTE:
            return self.computed, self.computed
        launching = self._launch_s * cost.num_calls
        self.busy_s[ISSUE] += launching
        self.issued = self.issued + launching if self._is_ahead else self.computed + launching
        if not self._is_ahead or lane == COMPUTE:
            self.starved_s += max(self.issued - self.computed, 0.0)
            self.computed = max(self.issued, self.computed)
        start = self.computed
        if lane != COMPUTE:  # what is sent has been computed
            start = max(self.issued, self.computed, self.links.get(lane, 0.0))
            self.links[lane] = start + cost.seconds
        else:
            self.computed += cost.seconds
        self.busy_s[lane] += cost.seconds
        return start, start + cost.seconds

    def wait(self, arrival: float, seconds: float) -> tuple[float, float]:
        """Hold up the compute lane until something has arrived; from when to when.

        Args:
            arrival: when it has.
            seconds: that it travels, which a CPU's cores are busy with.
        """
        start = max(self.computed, self.issued)
        self.starved_s += start - self.computed
        self.computed = max(start if self._is_ahead else start + seconds, arrival)
        self.exposed_s += self.computed - start
        return start, self.computed

    @property
    def end(self) -> float:
        """When all is done."""
        return max(self.issued, self.computed, *self.links.values())


def play_issued(calls: Sequence[Issued], hardware: Hardware) -> Timeline:
    """Run calls, in order, on the lanes of a machine."""
    lanes = Lanes(hardware)
    ends: list[float] = []
    unknown: Counter[str] = Counter()
    events: list[Event] = []
    flops = 0
    for call in calls:
        cost = call.cost
        if call.waits_for is not None:
            started = calls[call.waits_for]
            is_apart = started.lane in TRANSFER_LANES
            start, end = lanes.wait(ends[call.waits_for], 0 if is_apart else started.cost.seconds)
            events.append(Event(call.node, COMPUTE, start, end, cost))
            ends.append(end)
            continue
        start, end = lanes.run(cost, call.lane)
        ends.append(end)
        if not cost.num_calls and call.lane == COMPUTE:
            continue
        if not cost.is_known:
            unknown[target_name(call.node.target)] += 1
        flops += sum(work.flops for work in cost.works if work.unit in (MATRIX, ATTENTION))
        events.append(Event(call.node, call.lane, start, end, cost))
    return Timeline(tuple(events), lanes.end, dict(lanes.busy_s), lanes.exposed_s, lanes.starved_s, flops, unknown)


def least_s(program: Program, hardware: Hardware, *, cost_of: Callable[[fx.Node], Cost] | None = None) -> float:
    """Seconds that a step takes in any order of its calls: a lower bound, which need not be reached.

    A lane does all its calls one after the other; before the first of them stands what that one needs, and behind the
    last what needs that. The longest chain of calls that need each other is another bound. On a CPU, where nothing
    but transfers runs beside anything else, it is the sum of all other lanes if that is more.

    Args:
        program, hardware, cost_of: as for ``play``.
    """
    calls = issued(program, cost_of or Costs(program, hardware).of)
    busy: dict[str, float] = defaultdict(float)
    for call in calls:
        busy[call.lane] += call.cost.seconds
        busy[ISSUE] += hardware.launch_s * call.cost.num_calls
    if hardware.device_type == "cpu":
        beside = [busy.pop(lane, 0.0) for lane in TRANSFER_LANES]
        return max(sum(busy.values()), *beside)
    place = {call.node: i for i, call in enumerate(calls)}
    before, behind = [0.0] * len(calls), [0.0] * len(calls)
    for i, call in enumerate(calls):
        sources = (place[source] for source in call.node.all_input_nodes if source in place)
        before[i] = max((before[j] + calls[j].cost.seconds for j in sources), default=0.0)
    for i in range(len(calls) - 1, -1, -1):
        users = (place[user] for user in calls[i].node.users if user in place)
        behind[i] = max((behind[j] + calls[j].cost.seconds for j in users), default=0.0)
    found = max((b + call.cost.seconds for b, call in zip(before, calls, strict=True)), default=0.0)
    for lane in busy:
        mine = [i for i, call in enumerate(calls) if call.lane == lane and call.cost.seconds]
        if mine:
            found = max(found, min(before[i] for i in mine) + busy[lane] + min(behind[i] for i in mine))
    return max(found, busy[ISSUE])
