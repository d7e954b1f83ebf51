"""What a step would hold, and how long it would take, if it computed again some of what it keeps for backward.

``Profile`` is of one program. It is made from two forms of it: as captured, where it is known what is computed from
what, and as the passes leave it, where it is known what is held when: gathered parameters, gradients on their way,
state. So the peak that it tells is that of the whole schedule, at any choice of what to drop, without running a pass
again; it tells thousands of choices in the time of one such run.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import fx

from zgraph import ops
from zgraph.cost import Costs
from zgraph.footprint import footprint
from zgraph.hardware import Hardware
from zgraph.liveness import Lifetime, lifetimes, own_bytes, owners, values_of, writers_of
from zgraph.program import Phase, Program, Role, operand, phase_of

PLACE = "captured_at"
"""The fact on a node (``meta``) that says which call of the captured program it is, by its position there."""


def marked(captured: Program) -> Program:
    """A copy of a program whose calls can be found again in what passes make of it."""
    copy = captured.clone()
    for index, node in enumerate(copy.graph.nodes):
        node.meta = {**node.meta, PLACE: index}
    return copy


@dataclass(frozen=True)
class Outcome:
    """What a step takes with some of its activations dropped.

    Attributes:
        peak_bytes: the most that is held at once.
        seconds: of what runs again, on the machine.
        alive_bytes: the most that is held while each call of the schedule runs, or what runs again before it.
    """

    peak_bytes: int
    seconds: float
    alive_bytes: NDArray[np.int64]


@dataclass(frozen=True)
class _Life:
    """Memory of forward.

    Attributes:
        num_bytes: of it.
        first, last_forward, last: positions in the schedule of the call that makes it, the last of forward that needs
            it, and the last of all.
        reads: what backward reads of it, itself or views of it, each with the position of the first call that does.
    """

    num_bytes: int
    first: int
    last_forward: int
    last: int
    reads: tuple[tuple[fx.Node, int], ...]


@dataclass(frozen=True)
class _Gather:
    """A bucket as it is gathered, as a whole, for backward.

    Attributes:
        num_bytes: of all of it.
        first, wait, last: positions in the schedule of the start, of the wait, and of the last read.
    """

    num_bytes: int
    first: int
    wait: int
    last: int


def _bucket(gather: fx.Node) -> str:
    """The bucket that is gathered, or a tile of it."""
    name: str = gather.meta["origin"].module
    return name


def _gathered_once(scheduled: Program, hardware: Hardware) -> dict[str, tuple[int, float]]:
    """By bucket, the most that is gathered of it at a time, and the seconds until all of it has been.

    A bucket that a schedule gathers several times for one of its phases, it gathers a tile at a time.
    """
    costs = Costs(scheduled, hardware)
    found: dict[str, tuple[int, float]] = {}
    phases: dict[str, Phase | None] = {}
    for node in scheduled.graph.find_nodes(op="call_function", target=ops.all_gather):
        name, phase, seconds = _bucket(node), phase_of(node), float(costs.of(node).seconds)
        most, before_s = found.get(name, (0, 0.0))
        if phases.setdefault(name, phase) is phase:
            found[name] = (max(most, node.meta["val"].nbytes), before_s + seconds)
    return found


class Profile:
    """Tells what dropping activations would do.

    Args:
        captured: before sharding.
        scheduled: what the passes make of ``marked(captured)``, with nothing dropped.
        hardware: the machine that runs it.

    Attributes:
        candidates: memory that forward makes and backward reads and that can be made again, in order; each is the call
            of ``captured`` that makes it.
    """

    def __init__(self, captured: Program, scheduled: Program, hardware: Hardware) -> None:
        self.captured, self.hardware = captured, hardware
        self.nodes = list(captured.graph.nodes)
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.owner = owners(captured)
        self._costs = Costs(captured, hardware)
        self._seconds: dict[fx.Node, float] = {}
        self._read_schedule(scheduled)
        self.candidates = [
            memory
            for memory, life in self.lives.items()
            if life.reads and life.last > life.last_forward and life.num_bytes and ops.can_run_again(memory)
        ]

    # -- the schedule -----------------------------------------------------------------------------------------

    def _read_schedule(self, scheduled: Program) -> None:
        """Divide what is held into memory of forward, gathers of backward, and all else."""
        nodes = list(scheduled.graph.nodes)
        staged = self.hardware.is_staged
        self.num_positions = len(nodes)
        held = footprint(scheduled, staged=staged).alive_bytes
        alive = np.array(held, dtype=np.int64)
        change = np.zeros(len(nodes) + 1, dtype=np.int64)
        found = {node.meta[PLACE]: (node, i) for i, node in enumerate(nodes) if PLACE in node.meta}
        there = owners(scheduled)
        written = {node for writers in writers_of(scheduled).values() for _, node in writers}
        now: dict[fx.Node, fx.Node] = {}  # by memory, the value that lies there
        touched: dict[fx.Node, list[tuple[int, fx.Node]]] = defaultdict(list)
        for position, node in enumerate(nodes):
            for source in node.all_input_nodes:
                touched[now.get(there[source], there[source])].append((position, node))
            if node in written:
                now[there[node]] = node
        self._found = {self.nodes[index] for index in found}
        self.lives: dict[fx.Node, _Life] = {}
        new = np.zeros(len(nodes), dtype=np.int64)  # of the rest, what each call allocates
        self.gathers: dict[str, _Gather] = {}
        at = {node: i for i, node in enumerate(nodes)}
        read = self._reads_of_backward(found)
        gathers = scheduled.graph.find_nodes(op="call_function", target=ops.all_gather)
        times = Counter(_bucket(node) for node in gathers if phase_of(node) is Phase.BACKWARD)

        def take(life: Lifetime) -> None:
            change[life.first] -= life.num_bytes
            change[life.last + 1] += life.num_bytes

        for life in values_of(scheduled, lifetimes(scheduled, staged=staged)):
            node = life.node
            if PLACE in node.meta and phase_of(node) is Phase.FORWARD and not life.is_beside:
                forward = [i for i, user in touched[node] if phase_of(user) is Phase.FORWARD]
                if node.target is operator.getitem:  # several results are held until all are unpacked
                    forward += [i for i, _ in touched[operand(node)]]
                last_forward = min(max(forward, default=life.first), life.last)  # what writes over it reads it last
                memory = self.nodes[node.meta[PLACE]]
                mine = tuple(read.get(memory, {}).items())
                self.lives[memory] = _Life(life.num_bytes, life.first, last_forward, life.last, mine)
                take(life)
            elif node.target is ops.all_gather and phase_of(node) is Phase.BACKWARD and times[_bucket(node)] == 1:
                wait = at[next(iter(node.users))]
                self.gathers[_bucket(node)] = _Gather(life.num_bytes, life.first, wait, life.last)
                take(life)
            else:
                new[life.first] += life.num_bytes
        self._alive = alive + np.cumsum(change)[:-1]
        self._new = new
        self._ahead = self._gathers_ahead()
        self._number = {memory: number for number, memory in enumerate(self.lives)}
        each = [(life.first, life.last, life.num_bytes) for life in self.lives.values()]
        self._first, self._last, self._sizes = np.array(each, dtype=np.int64).reshape(-1, 3).T
        self._bucket_of: dict[str, str] = {}
        self._gathered: dict[str, tuple[int, float]] = {}
        layout = scheduled.layout
        if layout is not None and layout.shard_params and scheduled.mesh.shard_size > 1:
            self._gathered = _gathered_once(scheduled, self.hardware)
            gathered = [bucket for bucket in layout.buckets if bucket.name in self._gathered]  # others are whole
            self._bucket_of = {s.name: bucket.name for bucket in gathered for s in bucket.segments}

    def _gathers_ahead(self) -> dict[str, int]:
        """By bucket, how many gathers before its own first read its gather is started."""
        order = sorted(self.gathers, key=lambda name: self.gathers[name].wait)
        ahead: dict[str, int] = {}
        for index, name in enumerate(order):
            gather = self.gathers[name]
            is_early = gather.wait - gather.first > 1
            ahead[name] = is_early + sum(gather.first <= self.gathers[other].wait for other in order[:index])
        return ahead

    def _reads_of_backward(self, found: Mapping[int, tuple[fx.Node, int]]) -> dict[fx.Node, dict[fx.Node, int]]:
        """By memory, what backward reads of it and where first; memory that others read as well is not there."""
        reads: dict[fx.Node, dict[fx.Node, int]] = defaultdict(dict)
        fixed: set[fx.Node] = set()
        position: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            if node.op == "placeholder" or phase_of(node) is Phase.FORWARD:
                continue
            index = self.index[node]
            later = [position[user] for user in node.users if user in position]
            position[node] = found[index][1] if index in found else min(later, default=self.num_positions - 1)
            for source in node.all_input_nodes:
                if phase_of(source) is not Phase.FORWARD:
                    continue
                if phase_of(node) is Phase.BACKWARD:
                    mine = reads[self.owner[source]]
                    mine[source] = min(mine.get(source, self.num_positions), position[node])
                else:
                    fixed.add(self.owner[source])
        return {memory: mine for memory, mine in reads.items() if memory not in fixed}

    # -- choices ----------------------------------------------------------------------------------------------

    @cached_property
    def kept(self) -> Outcome:
        """With nothing dropped."""
        return self.outcome(frozenset())

    def again(self, dropped: frozenset[fx.Node]) -> dict[fx.Node, int]:
        """The calls that run again, with the position in the schedule of the call of backward that each precedes."""
        wanted = sorted((at, self.index[node], node) for memory in dropped for node, at in self.lives[memory].reads)
        gone: set[fx.Node] = set()
        stack = [node for _, _, node in wanted]
        while stack:
            node = stack.pop()
            if node not in gone:
                gone.add(node)
                stack += [source for source in node.all_input_nodes if self._is_gone(source, dropped)]
        place: dict[fx.Node, int] = {}
        for position, _, node in wanted:
            stack = [node]
            while stack:
                node = stack.pop()
                if node not in place:
                    place[node] = position
                    stack += [source for source in node.all_input_nodes if source in gone]
                    stack += [user for user in node.users if user.target is operator.getitem and user in gone]
        return place

    def _is_gone(self, source: fx.Node, dropped: frozenset[fx.Node]) -> bool:
        """Whether what runs again has to have a value of forward made again, too."""
        memory = self.owner[source]
        if memory in dropped:
            return True
        life = self.lives.get(memory)
        if life is None:  # an input, or made of parameters wherever it is read
            return memory.op == "call_function" and memory in self._found
        return life.last == life.last_forward and ops.can_run_again(memory)

    def seconds_of(self, node: fx.Node) -> float:
        """How long a call takes when it runs again. A CPU issues and computes in turns, a GPU at the same time."""
        if node not in self._seconds:
            cost = self._costs.of(node)
            issuing = float(cost.num_calls) * self.hardware.launch_s
            computing = float(cost.seconds)
            on_cpu = self.hardware.device_type == "cpu"
            self._seconds[node] = computing + issuing if on_cpu else max(computing, issuing)
        return self._seconds[node]

    def outcome(self, dropped: frozenset[fx.Node]) -> Outcome:
        """What the step takes without these candidates."""
        place = self.again(dropped)
        order = sorted(place, key=lambda node: (place[node], self.index[node]))
        before = [place[node] for node in order]
        at = {node: place[node] + rank for rank, node in enumerate(order)}

        def moved(position: int) -> int:
            return position + bisect_right(before, position)

        first: dict[fx.Node, int] = {}  # of memory that is made again
        last: dict[fx.Node, int] = {}
        ends = self._last.copy()  # in the schedule; of what is read where calls run again, past that
        late: dict[int, int] = {}
        buckets: dict[str, list[int]] = {}
        seconds = 0.0
        for node in order:
            seconds += self.seconds_of(node)
            here, memory = at[node], self.owner[node]
            if memory is node:
                first[node] = at[operand(node)] if node.target is operator.getitem else here
            last[memory] = here
            for source in node.all_input_nodes:
                read = self.owner[source]
                if source in place:
                    last[read] = here
                elif read in self._number:
                    late[self._number[read]] = here
                else:
                    for bucket in self._buckets(source):
                        buckets.setdefault(bucket, []).append(here)
        for memory in dropped:
            last[memory] = max(last[memory], moved(self.lives[memory].last))
            ends[self._number[memory]] = self.lives[memory].last_forward
        starts = self._first + np.searchsorted(before, self._first, side="right")
        ends += np.searchsorted(before, ends, side="right")
        for number, here in late.items():
            ends[number] = max(ends[number], here)
        size = self.num_positions + len(order)
        change = np.zeros(size + 1, dtype=np.int64)
        np.add.at(change, starts, self._sizes)
        np.subtract.at(change, ends + 1, self._sizes)
        for node, start in first.items():
            num_bytes = self._num_bytes(node)
            change[start] += num_bytes
            change[last[node] + 1] -= num_bytes
        for name in (name for name in buckets if name not in self.gathers):  # in order: seconds are added up
            num_bytes, more = self._gathered[name]
            seconds += more
            change[buckets[name][0]] += num_bytes
            change[buckets[name][-1] + 1] -= num_bytes
        for name, start, end in self._moved_gathers(buckets, moved):
            change[start] += self.gathers[name].num_bytes
            change[end + 1] -= self.gathers[name].num_bytes
        alive = np.cumsum(change)[:-1] + self._rest(before)
        counts = self._counts(before)
        most = np.maximum.reduceat(alive, np.arange(self.num_positions) + np.cumsum(counts) - counts)
        return Outcome(int(alive.max()), seconds, most)

    def _moved_gathers(
        self, reads: Mapping[str, list[int]], moved: Callable[[int], int]
    ) -> Iterator[tuple[str, int, int]]:
        """From when to when what backward gathers is held: where it is read earlier, it is gathered earlier.

        It is started as many gathers ahead of its first read as it was.
        """
        if not reads:
            for name, gather in self.gathers.items():
                yield name, moved(gather.first), moved(gather.last)
            return
        before = sorted(self.gathers, key=lambda name: self.gathers[name].wait)
        rank = {name: i for i, name in enumerate(before)}
        first = {name: min(reads.get(name, [moved(g.wait)])[0], moved(g.wait)) for name, g in self.gathers.items()}
        order = sorted(self.gathers, key=lambda name: (first[name], rank[name]))
        for index, name in enumerate(order):
            gather, ahead = self.gathers[name], self._ahead[name]
            start = first[name]
            if ahead and index >= ahead:
                leader = order[index - ahead]
                was = before[rank[name] - ahead]
                is_as_it_was = leader == was and first[leader] == moved(self.gathers[leader].wait)
                start = moved(gather.first) if is_as_it_was else first[leader]
            elif ahead or first[name] == moved(gather.wait):
                start = min(start, moved(gather.first))
            yield name, min(start, first[name]), max(reads.get(name, [0])[-1], moved(gather.last))

    def _rest(self, before: list[int]) -> NDArray[np.int64]:
        """What is held besides memory of forward and gathers of backward, with room for the calls that run again."""
        counts = self._counts(before)
        repeated = np.repeat(self._alive - self._new, counts + 1)
        repeated[np.cumsum(counts + 1) - 1] = self._alive
        return repeated

    def _counts(self, before: list[int]) -> NDArray[np.int64]:
        """How many calls run again right before each position of the schedule."""
        return np.bincount(np.array(before, dtype=np.int64), minlength=self.num_positions)

    def _num_bytes(self, node: fx.Node) -> int:
        life = self.lives.get(node)
        return own_bytes(node.meta["val"]) if life is None else life.num_bytes

    def _buckets(self, source: fx.Node) -> set[str]:
        """The buckets that have to be gathered for what is made of parameters alone."""
        found: set[str] = set()
        stack = [source] if self._bucket_of else []
        while stack:
            node = stack.pop()
            what = node.meta.get("input")
            if what is not None and what.role is Role.PARAM and what.name in self._bucket_of:
                found.add(self._bucket_of[what.name])
            elif what is None and self.owner[node] not in self.lives:
                stack.extend(node.all_input_nodes)
        return found
