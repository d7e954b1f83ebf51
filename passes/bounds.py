"""Where buckets end, by the cost model: how much travels together follows from what hides it.

Each collective has a latency, so larger buckets spend less time on links. But the first bucket's gather and the last
gradients' reduction hide behind nothing, and a bucket is held as a whole: larger ones take longer there, and more
memory. What is computed with a bucket's parameters hides the collectives of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

MOST_ENDS = 256
"""Where buckets may end: of more parameters, neighbours that are small beside all of them stay together."""


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
    _seconds: dict[tuple[str, int], float] = field(default_factory=dict, init=False, compare=False, repr=False)

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
        parts = _parts(members)
        costs = [list(self._costs(members, parts, times, end)) for end in range(len(parts))]
        found = [_best(costs, limit) for limit in LIMITS]
        enough = min(exposed for exposed, _ in found) + GAIN * times.step_s
        ends = next(ends for exposed, ends in found if exposed <= enough)
        return [
            list(range(parts[start].start, parts[end - 1].stop)) for start, end in zip([0, *ends], ends, strict=False)
        ]

    def _costs(
        self, members: Sequence[ParamSpec], parts: Sequence[range], times: Times, end: int
    ) -> Iterator[tuple[int, int, float]]:
        """Of buckets that end with a part: which is the first, how many bytes there are, exposed seconds."""
        num_bytes = travelling = 0
        behind = times.of(members[parts[end].stop].name) if end + 1 < len(parts) else times.turn
        for start in range(end, -1, -1):
            for spec in (members[i] for i in parts[start]):
                num_bytes += _num_bytes(spec)
                travelling += spec.room * times.of(spec.name).itemsize
            if start < end and num_bytes > LIMITS[-1]:
                return
            here = times.of(members[parts[start].start].name)
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
        if (kind, num_bytes) not in self._seconds:
            axis, size = self.mesh.shard_axis, self.mesh.shard_size
            together = ranks_together(self.mesh, axis, self.hardware.devices_per_node)
            work = Work("collective", LINK, read_bytes=num_bytes, collective=kind, world=size, together=together)
            self._seconds[kind, num_bytes] = float(seconds(work, self.hardware))
        return self._seconds[kind, num_bytes]


def _num_bytes(spec: ParamSpec) -> int:
    return spec.room * spec.dtype.itemsize


def _parts(members: Sequence[ParamSpec]) -> list[range]:
    """What a bucket holds all or nothing of: single members, or neighbours where there are more than ``MOST_ENDS``.

    Neighbours go together up to an even share of all bytes, or of the largest limit if that is less. So of two parts
    that follow each other, together, there is more than a share, and a bucket that ends with a part begins with one of
    at most 2 * ``MOST_ENDS``.
    """
    if len(members) <= MOST_ENDS:
        return [range(i, i + 1) for i in range(len(members))]
    share = min(sum(map(_num_bytes, members)) // MOST_ENDS, LIMITS[-1] // MOST_ENDS)
    found, start, held = [], 0, 0
    for i, spec in enumerate(members):
        if i > start and held + _num_bytes(spec) > share:
            found.append(range(start, i))
            start, held = i, 0
        held += _num_bytes(spec)
    return [*found, range(start, len(members))]


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
