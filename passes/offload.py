"""Keep optimizer state on a disk, and stream it through memory bucket by bucket as updates need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from zgraph import ops
from zgraph.cost import Costs
from zgraph.errors import OptionError
from zgraph.hardware import Hardware
from zgraph.pipeline import Pass
from zgraph.program import Origin, Phase, Program, Stage

AHEAD = 1
"""How many buckets ahead of its update a bucket's state is loaded."""

IN_MEMORY = 3
"""How many buckets have state in memory at once: one comes, one is updated, one goes."""

MARGIN = 1.25
"""Of what loading the first state is predicted to take, how much it is given to be there in time."""


@dataclass(frozen=True)
class Offload(Pass):
    """Load each bucket's optimizer state before its update, and store it behind.

        p, m' = update(p, g, m)             s = load(m)                       # while the bucket before is updated
                                            p, m' = update(p, g, wait(s))
                                     ->     t = store(m', out=m)
                                            wait(t)                           # before the third bucket from here loads

    The order of the updates stays. Loads of the first buckets start so early that they are there in time, as far as the
    machine is known, or else with the step.

    Args:
        hardware: the machine, as each rank finds it; all ranks are given the same.
    """

    hardware: Hardware | None = field(default=None, repr=False)

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        layout = program.layout
        assert layout is not None
        devices = {bucket.device.type for bucket in layout.buckets} - {"cpu"}
        if devices:
            raise OptionError(f"offload on {devices.pop()}: so far state moves on CPUs only", fix="leave offload out")
        program.layout = replace(layout, on_disk=tuple(bucket.name for bucket in layout.buckets if bucket.trainable))
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        streamed = sorted(_streamed(program, order), key=lambda each: order[each.first])
        if not streamed:
            return
        start = self._early(program, streamed[: AHEAD + 1])
        for each in streamed:
            each.store(program)
        for i, each in enumerate(streamed):
            before = streamed[i - AHEAD] if i > AHEAD else None
            at = start if before is None else before.first
            if i >= IN_MEMORY and order[streamed[i - IN_MEMORY].last] < order[at]:
                streamed[i - IN_MEMORY].finish(program, at if before is None else before.gate)
            each.load(program, at if before is None else before.gate)
        for each in streamed:
            each.finish(program, program.output_node)

    def _early(self, program: Program, first: list[_Streamed]) -> fx.Node:
        """The call before which the first loads start."""
        calls: list[fx.Node] = [node for node in program.graph.nodes if node.op == "call_function"]
        if self.hardware is None:
            return calls[0]
        at, costs = calls.index(first[0].first), Costs(program, self.hardware)
        num_bytes = sum(state.meta["val"].nbytes for each in first for state in each.read)
        left = MARGIN * self.hardware.transfer_s("disk", "device", num_bytes)
        while at > 0 and left > 0:
            at -= 1
            left -= costs.of(calls[at]).seconds
        return calls[at]


class _Streamed:
    """A bucket's state on its way.

    Attributes:
        read: inputs that are read in memory.
        written: inputs that have a new value, and what that is.
        first, last: the calls between which the state is needed in memory.
        gate: the first call that waits for what is loaded.
    """

    def __init__(
        self, bucket: str, read: list[fx.Node], written: dict[fx.Node, fx.Node], order: dict[fx.Node, int]
    ) -> None:
        self.read, self.written = read, written
        users = [user for state in read for user in state.users if user.op == "call_function"]
        needed = sorted([*users, *written.values()], key=order.__getitem__)
        self.first, self.last = needed[0], needed[-1]
        self.gate = self.first
        self._origin = Origin(Phase.UPDATE, bucket, self.first.meta["origin"].source)
        self._stores: dict[fx.Node, fx.Node] = {}

    def store(self, program: Program) -> None:
        """Start to store each new value as soon as it is there."""
        for state, new in self.written.items():
            self._stores[state] = program.call(ops.store, new, out=state, origin=self._origin, before=new.next)

    def finish(self, program: Program, before: fx.Node) -> None:
        """Wait until all is stored, unless it is being waited for already."""
        results = program.results()
        for state, store in self._stores.items():
            stored = program.call(ops.wait, store, origin=self._origin, before=before)
            results[program.outputs.index(state.meta["input"])] = stored
        program.set_results(results, program.outputs)
        self._stores = {}

    def load(self, program: Program, before: fx.Node) -> None:
        """Start to load before a call, and wait before the first call that reads it."""
        for state in self.read:
            start = program.call(ops.load, state, origin=self._origin, before=before)
            loaded = program.call(ops.wait, start, origin=self._origin, before=self.first)
            self.gate = loaded if self.gate is self.first else self.gate
            for user in list(state.users):
                if user is not start and user.op == "call_function" and user.target is not ops.store:
                    user.replace_input_with(state, loaded)


def _streamed(program: Program, order: dict[fx.Node, int]) -> Iterator[_Streamed]:
    """The state of each bucket that is read or written."""
    results = dict(zip(program.outputs, program.results(), strict=True))
    states: dict[str, list[fx.Node]] = {}
    for node, what in program.placeholders():
        if program.is_on_disk(node):
            states.setdefault(what.name, []).append(node)
    for bucket, inputs in states.items():
        read = [node for node in inputs if any(user.op == "call_function" for user in node.users)]
        new = {node: results.get(node.meta["input"], node) for node in inputs}
        written = {node: result for node, result in new.items() if result is not node}
        if read or written:
            yield _Streamed(bucket, read, written, order)
