"""A program played on a machine: when each call runs, and what is exposed.

Each lane does one thing after another: ``issue`` (the host, which starts operators), ``compute``, and one for each
process group. Node order is issue order. A collective starts when it has been issued and its lane is free; a wait
holds up the lane that issued it. On a CPU, issuing and computing are one lane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from zgraph import ops
from zgraph.cost import ATTENTION, MATRIX, Cost, Costs
from zgraph.hardware import Hardware
from zgraph.program import Program, operand, target_name

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
        events: of all calls that take time, in order of issue.
        step_s: from the first call to the end of the last.
        busy_s: seconds of work by lane.
        exposed_s: seconds in which computing waits for communication.
        matrix_flops: floating-point operations of matrix products and attention.
        unknown: operators of no family, which were costed by their bytes, by name.
    """

    events: tuple[Event, ...]
    step_s: float
    busy_s: dict[str, float]
    exposed_s: float
    matrix_flops: int
    unknown: Counter[str]


def play(program: Program, hardware: Hardware, *, cost_of: Callable[[fx.Node], Cost] | None = None) -> Timeline:
    """Run a program's calls, in order, on the lanes of a machine.

    Args:
        program: at any stage; its mesh says how many ranks there are.
        hardware: the machine.
        cost_of: what a call costs; ``zgraph.cost.Costs`` of this program and machine if None.
    """
    cost_of = cost_of or Costs(program, hardware).of
    is_ahead = hardware.device_type != "cpu"  # the host issues to a queue
    free: dict[str, float] = {ISSUE: 0.0, COMPUTE: 0.0}
    busy: Counter[str] = Counter()
    ends: dict[fx.Node, float] = {}
    unknown: Counter[str] = Counter()
    events: list[Event] = []
    exposed, flops = 0.0, 0
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is ops.wait:
            before = free[COMPUTE]
            free[COMPUTE] = max(before, ends[operand(node)])
            exposed += free[COMPUTE] - before
            events.append(Event(node, COMPUTE, before, free[COMPUTE], cost_of(node)))
            continue
        cost = cost_of(node)
        if not cost.num_calls:
            continue
        if not cost.is_known:
            unknown[target_name(node.target)] += 1
        flops += sum(work.flops for work in cost.works if work.unit in (MATRIX, ATTENTION))
        free[ISSUE] += hardware.launch_s * cost.num_calls
        lane = COMPUTE
        ready = free[ISSUE] if is_ahead else free[COMPUTE] + hardware.launch_s * cost.num_calls
        if node.target in ops.STARTS:
            lane = str(program.mesh.axis)
            if not is_ahead:
                free[COMPUTE] = ready
            ready = max(ready, free[COMPUTE])  # what is sent has been computed
        start = max(ready, free.get(lane, 0.0))
        free[lane] = ends[node] = start + cost.seconds
        busy[lane] += cost.seconds
        events.append(Event(node, lane, start, free[lane], cost))
    return Timeline(tuple(events), max(free.values()), dict(busy), exposed, flops, unknown)
