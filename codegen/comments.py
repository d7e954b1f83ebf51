"""What an emitted step says of itself in comments: its inputs, buckets, lanes, phases, and where calls come from.

A call computes unless its line says on which other lane it starts something: the links along an axis of the mesh, or a
way from or to a lower tier. A wait says for which lane. Names of a model's modules and parameters stay inside of
comments, whatever they contain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import fx

from zgraph import ops
from zgraph.hardware import LOWER_TIERS
from zgraph.layout import Bucket
from zgraph.program import Phase, Program, describe, operand
from zgraph.timeline import COMPUTE, INWARD, PROCESSORS, TRANSFER_LANES, lane_of


def header(program: Program, names: Mapping[fx.Node, str]) -> Iterator[str]:
    """What a step is given, the buckets that it has, and the lanes that it uses.

    Args:
        names: of nodes in the emitted function.
    """
    lanes = Counter(lane_of(node) for node in program.graph.nodes if node.op == "call_function")
    del lanes[COMPUTE]
    if lanes:
        yield f"# Lanes beside {COMPUTE}, where all calls run that name none:"
        yield from (f"#   {lane}: {_uses(program, lane, count)}" for lane, count in lanes.items())
    if program.layout is not None:
        yield "# Buckets, in order of first use:"
        yield from (f"#   {bucket.name}: {_parameters(bucket)}" for bucket in program.layout.buckets)
    yield "# Inputs:"
    for node, what in program.placeholders():
        tier = program.tier_of(node)
        where = f" on {LOWER_TIERS[tier]}" if tier else ""
        yield f"#   {names[node]}: {describe(node.meta['val'])} is {plain(str(what))}{where}"


def _parameters(bucket: Bucket) -> str:
    first, last = (plain(segment.name) for segment in (bucket.segments[0], bucket.segments[-1]))
    count = len(bucket.segments)
    return f"{bucket.numel} elements, " + (first if count == 1 else f"{count} parameters from {first} to {last}")


def _uses(program: Program, lane: str, count: int) -> str:
    plural = "" if count == 1 else "s"
    if lane == PROCESSORS:
        return f"{count} update{plural}"
    if lane not in TRANSFER_LANES:
        return f"{count} collective{plural} between {program.mesh.axes[lane]} ranks"
    return f"{count} {'read' if lane in INWARD.values() else 'write'}{plural}"


class Groups:
    """Says where calls come from, once for all in a row that come from the same place."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._module = ""

    def before(self, node: fx.Node) -> list[str]:
        """Lines that stand before a call: none where it is of the same phase and module as the one before it."""
        origin = node.meta["origin"]
        last_phase, self._phase = self._phase, origin.phase
        last_module, self._module = self._module, origin.module
        where = f"{origin.phase.value} {plain(origin.module)}".rstrip()
        if last_phase is not origin.phase:
            return ["", f"# ==== {where} ===="]
        return [] if last_module == origin.module else [f"# {where}"]


def mark(node: fx.Node) -> str:
    """What is said behind a call: nothing where it computes."""
    if node.target is ops.wait:
        return f"  # waits for {lane_of(operand(node))}"
    found = lane_of(node)
    return "" if found == COMPUTE else f"  # starts on {found}"


def plain(text: str) -> str:
    """Text that stays inside a comment, whatever a model's names contain."""
    return ascii(text)[1:-1]
