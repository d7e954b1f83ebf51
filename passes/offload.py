"""Keep what belongs to parameters on a lower tier, and stream it through memory bucket by bucket as it is needed."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, zip_longest

from torch import fx

from zgraph import ops
from zgraph.codegen.host_kernel import HostKernel
from zgraph.cost import Costs
from zgraph.errors import OptionError
from zgraph.hardware import Hardware
from zgraph.layout import Away
from zgraph.liveness import held_bytes, lifetimes
from zgraph.passes.copies import Copies, erase_unread, readers_of
from zgraph.passes.host_updates import update_on_host
from zgraph.passes.offload_gradients import offload_gradients
from zgraph.pipeline import Pass
from zgraph.program import Origin, Phase, Program, Role, Stage, operand

AHEAD = 1
"""How many buckets ahead of its use a bucket is loaded."""

IN_MEMORY = 3
"""How many buckets are in memory at once: one comes, one is used, one goes."""

KEPT = 3
"""How many buckets of parameters that were read may stay in memory until they are read again, where forward turns into
backward and backward into updates."""

MARGIN = 1.25
"""Of what loading the first buckets is predicted to take, how much they are given to be there in time."""


@dataclass(frozen=True)
class Offload(Pass):
    """Load each bucket before it is used, and store it behind its update.

        p, m' = update(p, g, m)             s = load(m)                       # while the bucket before is updated
                                            p, m' = update(p, g, wait(s))
                                     ->     t = store(m', out=m)
                                            wait(t)                           # before the third bucket from here loads

    Parameters are loaded before forward reads them, before backward does and before their update, where they have not
    stayed since (``KEPT``):

        w = wait(all_gather(p))      ->     w = wait(all_gather(wait(load(p))))

    The order of what computes stays. Loads of the first buckets start so early that they are there in time, as far as
    the machine is known, or else with the step.

    Where it is told to, optimizer state on the host comes further ahead than one bucket, and goes later, as far as no
    more is live at the peak: buckets are of unlike sizes, and the link is not to rest while one of them comes or goes.

    Or it does not come at all, nor parameters for their update: the host's processors update both where they lie
    (``zgraph.passes.host_updates``; ZeRO-Offload, Ren et al., 2021, section 4).

    Args:
        what: any of ``"optimizer"``, ``"parameters"`` and ``"gradients"``, their sums over micro-batches and what waits
            for the norm of them all; each with the tier that it lies on, ``"host"`` or ``"disk"``.
        hardware: the machine, as each rank finds it; all ranks are given the same.
        far: whether optimizer state comes further ahead.
        host_updates: whether the host's processors make the updates that they can.
    """

    what: tuple[tuple[str, str], ...] = (("optimizer", "disk"),)
    hardware: Hardware | None = field(default=None, repr=False)
    far: bool = False
    host_updates: bool = False

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        layout = program.layout
        assert layout is not None
        away = []
        for what, tier in self.what:
            check_tier(tier, program, self.hardware)
            moved = [bucket.name for bucket in layout.buckets if bucket.trainable or what == "parameters"]
            away.append(Away(what, tier, tuple(moved)))
        program.layout = replace(layout, away=tuple(away))
        if self.host_updates:
            self._update_on_host(program)
        if program.layout.on_tiers("parameters"):
            _wait_before_others_come(program)
        self._stream(program, Role.PARAM)
        self._stream(program, Role.GRADIENT)
        if "gradients" in dict(self.what):
            offload_gradients(program, dict(self.what)["gradients"])
        self._stream(program, Role.OPT_STATE)  # last: how far ahead it comes depends on what else is held

    def _update_on_host(self, program: Program) -> None:
        num = update_on_host(program)
        assert program.layout is not None
        updated = sum(bucket.trainable for bucket in program.layout.buckets)
        if any(what is not None and what.role is Role.PARAM for what in program.outputs):
            program.notes += (f"the host's processors update {num} of {updated} buckets",)

    def _stream(self, program: Program, role: Role) -> None:
        """Let all of one role come before it is used, bucket by bucket, and go behind."""
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        stays = _of_parameters(program, order) if role is Role.PARAM else _of_state(role, program, order)
        if not stays:
            return
        is_far = self.far and role is Role.OPT_STATE and all(each.tier == "host" for each in stays)
        load = self._load_far if is_far else self._load
        # What is still there may be everything, where updates wait for a norm: it goes while others are updated, but
        # for so many as are in memory otherwise, too, and the last one.
        left = sorted(load(program, stays, order), key=lambda each: order[each.last])
        for each, later in zip_longest(left, left[IN_MEMORY:-1]):
            each.finish(program, program.output_node if later is None else later.last)
        for flat in {state: None for each in stays for state in each.readers}:
            erase_unread(flat)

    def _load_far(self, program: Program, stays: list[_Stay], order: Mapping[fx.Node, int]) -> list[_Stay]:
        """Load as many ahead of a use as there is room for, and wait for what goes where there is no other room.

        Returns:
            What is still in memory then.
        """
        room = _Room(program, stays, order)
        start, gates, loaded = self._early(program, stays[: AHEAD + 1]), dict[fx.Node, fx.Node](), 0
        staying = deque[int]()

        def load(to: int, at: fx.Node) -> None:
            nonlocal loaded
            for i in range(loaded, to):
                gates.setdefault(stays[i].first, stays[i].load(program, gates.get(at, at)))
            staying.extend(range(loaded, to))
            loaded = to

        for each in stays:
            each.store(program)
        load(min(AHEAD + 1, len(stays)), start)
        for use, each in enumerate(stays):
            to = loaded
            while to < len(stays) and (to <= use + AHEAD or room.is_for(use, to)):
                to += 1
            here = gates.get(each.first, each.first)
            while staying and order[stays[staying[0]].last] < order[each.first] and staying[0] < use - 1:
                if not room.is_short(use, staying[0], to):
                    break
                stays[staying.popleft()].finish(program, here)
            load(to, each.first)
        return [stays[i] for i in staying]

    def _load(self, program: Program, stays: list[_Stay], order: Mapping[fx.Node, int]) -> Iterable[_Stay]:
        """Load each where the one before is first used, when what was used some before has gone.

        Returns:
            What is still in memory then.
        """
        staying, gates = list[_Stay](), dict[fx.Node, fx.Node]()
        start = self._early(program, stays[: AHEAD + 1])
        for each in stays:
            each.store(program)
        for i, each in enumerate(stays):
            at = start if i <= AHEAD else each.ahead or stays[i - AHEAD].first
            before = gates.get(at, at)
            gone = [old for old in staying[: 1 - IN_MEMORY] if order[old.last] < order[at]]
            for old in gone:
                old.finish(program, before)
            staying = [*(old for old in staying if old not in gone), each]
            gates.setdefault(each.first, each.load(program, before))
        return staying

    def _early(self, program: Program, first: list[_Stay]) -> fx.Node:
        """The call before which the first loads start."""
        calls: list[fx.Node] = [node for node in program.graph.nodes if node.op == "call_function"]
        if self.hardware is None:
            return calls[0]
        at, costs = calls.index(first[0].first), Costs(program, self.hardware)
        num_bytes = sum(state.meta["val"].nbytes for each in first for state in each.readers)
        left = MARGIN * self.hardware.transfer_s(first[0].tier, "device", num_bytes)
        while at > 0 and left > 0:
            at -= 1
            left -= costs.of(calls[at]).seconds
        return calls[at]


def check_tier(tier: str, program: Program, hardware: Hardware | None) -> None:
    """Refuse a tier that a machine does not have.

    A program that is planned for GPUs is on CPUs until it runs there, so what it would have there is simulated.

    Raises:
        OptionError: it is the host's memory, and the program is on CPUs.
    """
    assert program.layout is not None
    on_cpu = all(bucket.device.type == "cpu" for bucket in program.layout.buckets)
    if tier == "host" and on_cpu and (hardware is None or hardware.device_type == "cpu"):
        raise OptionError(
            "offload to the host on a CPU, where what lies in memory lies in the host's already", fix="say 'disk'"
        )


class _Stay:
    """What a bucket has in memory for a while.

    Attributes:
        tier: where it lies otherwise.
        readers: inputs that are read in memory, and the calls that read them or views of them.
        written: inputs that have a new value, and what that is.
        first, last: the calls between which they are needed in memory.
        ahead: the call before which it is loaded; where the stay before begins if None.
        num_bytes: of what comes or goes.
    """

    def __init__(
        self,
        tier: str,
        bucket: str,
        readers: Mapping[fx.Node, list[fx.Node]],
        written: Mapping[fx.Node, fx.Node],
        order: Mapping[fx.Node, int],
        ahead: fx.Node | None = None,
    ) -> None:
        self.tier, self.readers, self.written, self.ahead = tier, readers, written, ahead
        needed = sorted([*(r for mine in readers.values() for r in mine), *written.values()], key=order.__getitem__)
        self.first, self.last = needed[0], needed[-1]
        origin = self.first.meta["origin"]
        self._origin = Origin(origin.phase, bucket, origin.source)
        self.num_bytes: int = sum(state.meta["val"].nbytes for state in {*readers, *written})
        self._stores: dict[fx.Node, fx.Node] = {}

    def store(self, program: Program) -> None:
        """Start to store each new value as soon as it is there."""
        for state, new in self.written.items():
            origin = replace(self._origin, phase=Phase.UPDATE)
            self._stores[state] = program.call(ops.store, new, self.tier, out=state, origin=origin, before=new.next)

    def finish(self, program: Program, before: fx.Node) -> None:
        """Wait until all is stored."""
        results = program.results()
        for state, store in self._stores.items():
            stored = program.call(ops.wait, store, origin=store.meta["origin"], before=before)
            results[program.outputs.index(state.meta["input"])] = stored
        program.set_results(results, program.outputs)

    def load(self, program: Program, before: fx.Node) -> fx.Node:
        """Start to load before a call, and wait before the first call that reads it; the first call that waits."""
        waits = []
        for state, readers in self.readers.items():
            start = program.call(ops.load, state, self.tier, origin=self._origin, before=before)
            loaded = program.call(ops.wait, start, origin=self._origin, before=self.first)
            waits.append(loaded)
            copies = Copies(program, state, loaded)
            for reader in readers:
                copies.give(reader)
        return waits[0] if waits else self.first


class _Room:
    """What optimizer state may take while it comes and goes: no more at the peak than three buckets at a time do.

    Args:
        program: before any state comes or goes.
        stays: in order of their uses.
        order: the positions of calls.
    """

    def __init__(self, program: Program, stays: list[_Stay], order: Mapping[fx.Node, int]) -> None:
        self._until = [0, *accumulate(each.num_bytes for each in stays)]
        alive = held_bytes(lifetimes(program, staged=False), len(program.graph.nodes))
        uses = [*(order[each.first] for each in stays), len(alive)]
        # The most that is held besides, from each use to the next one.
        self._besides = [max(alive[at : max(until, at + 1)]) for at, until in pairwise(uses)]
        together = [self._of(use - 1, use + 2) for use in range(len(stays))]
        self._most = max(together)
        self._peak: int = max(map(operator.add, self._besides, together))

    def _of(self, start: int, stop: int) -> int:
        """Bytes of buckets from one to before another."""
        return self._until[min(stop, len(self._until) - 1)] - self._until[max(start, 0)]

    def is_for(self, use: int, ahead: int) -> bool:
        """Whether a bucket may come at the use of another, until which all between them are held."""
        if self._of(use + 1, ahead + 1) > self._most:
            return False
        return all(self._besides[at] + self._of(at - 1, ahead + 1) <= self._peak for at in range(use, ahead + 1))

    def is_short(self, use: int, start: int, stop: int) -> bool:
        """Whether buckets from one to before another are too much to hold from a use on."""
        return self._besides[use] + self._of(start, stop) > self._peak


def _of_parameters(program: Program, order: Mapping[fx.Node, int]) -> list[_Stay]:
    """Of each bucket of parameters, what it is in memory for, in order.

    It stays while it is among the ``KEPT`` that are read again soonest (Belady, 1966, "A study of replacement
    algorithms for a virtual-storage computer").
    """
    results = dict(zip(program.outputs, program.results(), strict=True))
    flats = {node: program.tier_of(node) for node, what in program.placeholders() if what.role is Role.PARAM}
    tiers = {flat: tier for flat, tier in flats.items() if tier is not None}
    uses = {flat: sorted(filter(_in_memory, readers_of(flat)), key=order.__getitem__) for flat in tiers}
    kept: dict[fx.Node, list[fx.Node]] = {}
    found: list[tuple[fx.Node, list[fx.Node], fx.Node | None]] = []
    before: fx.Node | None = None  # where the last bucket but this one came into use
    here: tuple[fx.Node, fx.Node] | None = None  # the bucket in use, and since when
    following = {flat: deque(readers) for flat, readers in uses.items()}
    for flat, reader in sorted(((f, r) for f, rs in uses.items() for r in rs), key=lambda use: order[use[1]]):
        following[flat].popleft()
        if here is None or here[0] is not flat:
            before, here = here and here[1], (flat, reader)
        if flat not in kept:
            while len(kept) >= KEPT:
                last = max(kept, key=lambda each: order[following[each][0]] if following[each] else len(order))
                del kept[last]
            kept[flat] = []
            found.append((flat, kept[flat], before))
        kept[flat].append(reader)
    latest = {flat: readers for flat, readers, _ in found}
    stays = []
    for flat, readers, ahead in found:
        what = flat.meta["input"]
        new = results.get(what, flat)
        comes_back = new is not flat and program.tier_of(new) is None
        written = {flat: new} if comes_back and latest[flat] is readers else {}
        stays.append(_Stay(tiers[flat], what.name, {flat: readers}, written, order, ahead))
    return stays


def _of_state(role: Role, program: Program, order: Mapping[fx.Node, int]) -> list[_Stay]:
    """The optimizer state of each bucket that is read or written, or the sum of its gradients, in order."""
    results = dict(zip(program.outputs, program.results(), strict=True))
    states: dict[tuple[str, str], list[fx.Node]] = {}
    for node, what in program.placeholders():
        tier = program.tier_of(node)
        if what.role is role and tier is not None:
            states.setdefault((tier, what.name), []).append(node)
    stays = []
    for (tier, bucket), inputs in states.items():
        users = {node: [user for user in node.users if _in_memory(user)] for node in inputs}
        new = {node: results.get(node.meta["input"], node) for node in inputs}
        written = {node: result for node, result in new.items() if program.tier_of(result) is None}
        if written or any(users.values()):
            stays.append(_Stay(tier, bucket, {node: mine for node, mine in users.items() if mine}, written, order))
    return sorted(stays, key=lambda stay: order[stay.first])


def _in_memory(user: fx.Node) -> bool:
    """Whether a call reads what it is given in memory, and not where it lies."""
    return user.op == "call_function" and not isinstance(user.target, HostKernel)


def _wait_before_others_come(program: Program) -> None:
    """Where updated parameters are gathered, wait for one bucket before the next one is sent, not at the end."""
    gathered = [
        result
        for what, result in zip(program.outputs, program.results(), strict=True)
        if what is not None and what.role is Role.PARAM and result.target is ops.wait
    ]
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    gathered.sort(key=lambda wait: order[operand(wait)])
    for wait, following in pairwise(gathered):
        operand(following).prepend(wait)
