"""Where buckets end, by the cost model: how much travels together follows from what hides it.

Each collective has a latency, so larger buckets spend less time on links. But the first bucket's gather and the last
gradients' reduction hide behind nothing, and a bucket is held as a whole: larger ones take longer there, and more
memory. What is computed with a bucket's parameters hides the collectives of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx

from zgraph.cost import Costs, ranks_together, seconds
from zgraph.hardware import Hardware
from zgraph.layout import ParamSpec
from zgraph.passes.schedule import GAIN
from zgraph.program import Mesh, Phase, Program, Role, phase_of
from zgraph.work import LINK, Work

LIMITS = tuple(2**power for power in range(20, 31))
"""Bytes of the largest bucket of parameters that are smaller each; what is larger has a bucket of its own."""


@dataclass(frozen=True)
class Bounds:
    """Divides parameters into buckets.

    Args:
        hardware: the machine, as each rank finds it; all ranks are given the same.
        mesh: the ranks.
        zero: the stage, which says what travels when.
    """

    hardware: Hardware
    mesh: Mesh
    zero: int

    def divide(self, members: Sequence[ParamSpec], times: Times) -> list[list[int]]:
        """Which of some parameters share buckets, by their numbers: neighbours.

        The exposed time of a bucket is that of its collectives beyond what is computed with its parameters, as its
        neighbours are about as large; of the first bucket, whose gather nothing precedes and whose reduction nothing
        follows, all of it. The smallest limit is taken with which buckets expose no more than ``GAIN`` of the step
        above the least of all limits.

        Args:
            members: in order of first use, of one kind.
            times: when the step reads each, and when it has its gradient.
        """
        costs = [list(self._costs(members, times, end)) for end in range(len(members))]
        found = [_best(costs, limit) for limit in LIMITS]
        enough = min(exposed for exposed, _ in found) + GAIN * times.step_s
        ends = next(ends for exposed, ends in found if exposed <= enough)
        return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]

    def _costs(self, members: Sequence[ParamSpec], times: Times, end: int) -> Iterator[tuple[int, int, float]]:
        """Of buckets that end with a member: which is the first, how many bytes there are, exposed seconds."""
        num_bytes = travelling = 0
        behind = times.of(members[end + 1].name) if end + 1 < len(members) else times.turn
        for start in range(end, -1, -1):
            spec, here = members[start], times.of(members[start].name)
            num_bytes += spec.room * spec.dtype.itemsize
            travelling += spec.room * here.itemsize
            if start < end and num_bytes > LIMITS[-1]:
                return
            forward_s, backward_s = behind.read_s - here.read_s, here.gradient_s - behind.gradient_s
            yield start, num_bytes, self._exposed_s(travelling, num_bytes, forward_s, backward_s, is_first=start == 0)

    def _exposed_s(self, gathered: int, reduced: int, forward_s: float, backward_s: float, *, is_first: bool) -> float:
        """Of one bucket, whose parameters are computed with for so long."""
        gather = self._collective_s("all_gather", gathered) if self.zero else 0.0
        reduce = self._collective_s("reduce_scatter" if self.zero > 1 else "all_reduce", reduced)
        if self.hardware.device_type == "cpu":  # the cores that compute move what travels
            return (2 if self.zero == 3 else 1) * gather + reduce
        if self.zero < 3:  # parameters are gathered when all are updated
            return gather + (reduce if is_first else max(reduce - backward_s, 0.0))
        if is_first:
            return gather + max(gather - backward_s, 0.0) + reduce
        return max(gather - forward_s, 0.0) + max(gather + reduce - backward_s, 0.0)

    def _collective_s(self, kind: str, num_bytes: int) -> float:
        axis, size = self.mesh.shard_axis, self.mesh.shard_size
        together = ranks_together(self.mesh, axis, self.hardware.devices_per_node)
        work = Work("collective", LINK, read_bytes=num_bytes, collective=kind, world=size, together=together)
        return float(seconds(work, self.hardware))


def _best(costs: Sequence[Sequence[tuple[int, int, float]]], limit: int) -> tuple[float, list[int]]:
    """The least exposed seconds of buckets within a limit, and where they end."""
    best, first = [0.0], [0]
    for end, ways in enumerate(costs):
        within = ((best[start] + exposed, start) for start, size, exposed in ways if size <= limit or start == end)
        least, start = min(within)
        best.append(least)
        first.append(start)
    ends, end = [], len(costs)
    while end:
        ends.append(end)
        end = first[end]
    return best[-1], ends[::-1]


# When parameters are read


@dataclass(frozen=True)
class Time:
    """Of a parameter, on the clock of what forward and backward compute.

    Attributes:
        read_s: when forward reads it first.
        gradient_s: when its gradient is there.
        itemsize: bytes of an element as it is read.
    """

    read_s: float
    gradient_s: float
    itemsize: int


@dataclass(frozen=True)
class Times:
    """When a step reads which parameter, on a machine.

    Attributes:
        by_name: of parameters that are read.
        turn: where forward ends and backward begins, as of a parameter behind all others.
        step_s: of forward and backward.
    """

    by_name: Mapping[str, Time]
    turn: Time
    step_s: float

    def of(self, name: str) -> Time:
        """Of a parameter; one that is not read comes last."""
        return self.by_name.get(name, self.turn)


def times_of(program: Program, gradient: Mapping[str, fx.Node], hardware: Hardware) -> Times:
    """Play the calls of a captured step, one after the other.

    Args:
        gradient: by parameter.
        hardware: the machine.
    """
    costs, nodes = Costs(program, hardware), list(program.graph.nodes)
    early = [node.op == "call_function" and phase_of(node) is not Phase.UPDATE for node in nodes]
    spans = [_span(costs, node, hardware) if is_early else 0.0 for node, is_early in zip(nodes, early, strict=True)]
    clock = dict(zip(nodes, accumulate(spans), strict=True))  # when each has been computed
    backward = (clock[n] - s for n, s in zip(nodes, spans, strict=True) if _is_of(n, Phase.BACKWARD))
    turn_s = next(backward, sum(spans))
    found = {}
    for (name, _), param in program.inputs(Role.PARAM).items():
        readers = [user for user in param.users if _is_of(user, Phase.FORWARD)]
        if readers:
            read_s = min(clock[user] - _span(costs, user, hardware) for user in readers)
            made = gradient.get(name)
            dtypes = {user.meta["val"].dtype for user in readers if user.target is torch.ops.aten._to_copy.default}
            itemsize = dtypes.pop().itemsize if len(dtypes) == 1 else param.meta["val"].dtype.itemsize
            found[name] = Time(read_s, turn_s if made is None else clock.get(made, turn_s), itemsize)
    return Times(found, Time(turn_s, turn_s, 0), sum(spans))


def _span(costs: Costs, node: fx.Node, hardware: Hardware) -> float:
    """How long a call keeps the device."""
    cost = costs.of(node)
    return float(max(cost.seconds, hardware.launch_s * cost.num_calls))


def _is_of(node: fx.Node, phase: Phase) -> bool:
    return node.op == "call_function" and phase_of(node) is phase
