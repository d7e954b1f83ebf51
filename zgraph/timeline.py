"""A program played on a machine: when each call runs, and what is exposed.

Each lane does one thing after another: ``issue`` (the host, which starts operators), ``compute``, and one for each
process group. Node order is issue order. A collective starts when it has been issued, what was computed before it is
there, and its lane is free; a wait holds up the computing that is issued after it.

Of the compute lane, from the start to the end of the last call on it, every second is one of three: its own work
(``busy_s["compute"]``), waiting for communication (``exposed_s``), and waiting for the host (``starved_s``). Before a
GPU the host runs ahead and issues to a queue, so computing waits for it only where calls are shorter than issuing them;
until a wait has been issued it holds up nothing, so that a second in which the host is late is not exposed as well. A
CPU issues and computes in turns, so there ``starved_s`` is all the time that issuing takes. Its cores move what
travels, too: what is sent early takes as much from what is computed meanwhile, so all communication is exposed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.cost import Cost, Costs
from zgraph.hardware import Hardware
from zgraph.program import Program, operand, target_name
from zgraph.work import ATTENTION, MATRIX

COMPUTE = "compute"
ISSUE = "issue"


@dataclass(frozen=True)
class Event:
    """When one call runs, in seconds from the start of the step.

    Attributes:
        node: the call.
        lane: ``compute``, or the axis of the mesh whose links it uses.
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
        exposed_s: seconds in which computing waits for communication.
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
        lane: where it runs: ``compute``, or an axis of the mesh.
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
        lane = str(program.mesh.axis) if node.target in ops.STARTS else COMPUTE
        waits_for = index[operand(node)] if node.target is ops.wait else None
        found.append(Issued(node, cost_of(node), lane, waits_for))
    return found


def play(program: Program, hardware: Hardware, *, cost_of: Callable[[fx.Node], Cost] | None = None) -> Timeline:
    """Run a program's calls, in order, on the lanes of a machine.

    Args:
        program: at any stage; its mesh says how many ranks there are.
        hardware: the machine.
        cost_of: what a call costs; ``zgraph.cost.Costs`` of this program and machine if None.
    """
    return play_issued(issued(program, cost_of or Costs(program, hardware).of), hardware)


def play_issued(calls: Sequence[Issued], hardware: Hardware) -> Timeline:
    """Run calls, in order, on the lanes of a machine."""
    is_ahead = hardware.device_type != "cpu"  # the host issues to a queue
    issued, computed = 0.0, 0.0  # when each lane is free
    links: dict[str, float] = {}
    busy: dict[str, float] = defaultdict(float)
    ends: list[float] = []
    unknown: Counter[str] = Counter()
    events: list[Event] = []
    exposed, starved, flops = 0.0, 0.0, 0
    for call in calls:
        cost = call.cost
        if call.waits_for is not None:
            start = max(computed, issued)
            starved += start - computed
            meanwhile = 0.0 if is_ahead else calls[call.waits_for].cost.seconds
            computed = max(start + meanwhile, ends[call.waits_for])
            exposed += computed - start
            events.append(Event(call.node, COMPUTE, start, computed, cost))
            ends.append(computed)
            continue
        if not cost.num_calls and call.lane == COMPUTE:
            ends.append(computed)
            continue
        if not cost.is_known:
            unknown[target_name(call.node.target)] += 1
        flops += sum(work.flops for work in cost.works if work.unit in (MATRIX, ATTENTION))
        launching = hardware.launch_s * cost.num_calls
        busy[ISSUE] += launching
        issued = issued + launching if is_ahead else computed + launching
        if not is_ahead or call.lane == COMPUTE:
            starved += max(issued - computed, 0.0)
            computed = max(issued, computed)
        if call.lane != COMPUTE:
            start = max(issued, computed, links.get(call.lane, 0.0))  # what is sent has been computed
            links[call.lane] = start + cost.seconds
        else:
            start = computed
            computed += cost.seconds
        busy[call.lane] += cost.seconds
        ends.append(start + cost.seconds)
        events.append(Event(call.node, call.lane, start, start + cost.seconds, cost))
    step = max(issued, computed, *links.values())
    return Timeline(tuple(events), step, dict(busy), exposed, starved, flops, unknown)
