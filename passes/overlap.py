"""Order the nodes: start communication early, wait for it late, update as gradients arrive.

Node order is issue order, so this is the schedule. Collectives keep one order on all ranks because all ranks hold
the same program.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from zgraph import ops
from zgraph.passes.gathers import prepares
from zgraph.passes.order import arrange
from zgraph.pipeline import Pass
from zgraph.program import Phase, Program, Stage, operand, update_nodes


@dataclass(frozen=True)
class Overlap(Pass):
    """Issue each gather ``prefetch`` gathers ahead, and take up each reduced gradient one reduction later.

        w1 = wait(gather(s1))              g1, g2 = gather(s1), gather(s2)
        y1 = mm(x, w1)                     w1 = wait(g1)
        w2 = wait(gather(s2))       ->     y1 = mm(x, w1)            # while g2 travels
        y2 = mm(y1, w2)                    w2 = wait(g2)
                                           y2 = mm(y1, w2)

    A gradient that is reduced between nodes, too, sets out for them one reduction later, and is taken up two later.

    Args:
        prefetch: 0 leaves every wait next to its start.
        limit_bytes: buckets larger than this are gathered just in time, so that at most one is held early.
    """

    prefetch: int
    limit_bytes: int

    takes, gives = Stage.SHARDED, Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        place: dict[fx.Node, tuple[int, ...]] = {node: (i,) for node, i in order.items()}
        self._take_up_reductions(program, order, place)
        self._prefetch_gathers(program, order, place)
        output = program.output_node
        for node in program.graph.find_nodes(op="call_function", target=ops.wait):
            if set(node.users) == {output}:  # it only leaves the program: wait at the very end
                place[node] = (order[output] - 1, LAST, order[node])
        arrange(program, place)

    def _prefetch_gathers(self, program: Program, order: dict[fx.Node, int], place: Places) -> None:
        """Place each gather right before its first reader, and its start right after the wait ``prefetch`` before."""
        gathers = sorted(
            (min(map(order.__getitem__, wait.users), default=order[wait]), order[wait], wait)
            for wait in program.graph.find_nodes(op="call_function", target=ops.wait)
            if operand(wait).target is ops.all_gather and wait.meta["origin"].phase is not Phase.UPDATE
        )
        top = max((order[node] for node, _ in program.placeholders()), default=-1)
        for i, (first_read, _, wait) in enumerate(gathers):
            start, early = operand(wait), self.prefetch and wait.meta["val"].nbytes <= self.limit_bytes
            place[wait] = (first_read - 1, BEFORE, i, 1)
            if early and i < self.prefetch:
                place[start] = (top, FIRST, i)
            elif early:
                place[start] = (*place[gathers[i - self.prefetch][-1]], order[start])
            else:
                place[start] = (first_read - 1, BEFORE, i, 0)
            place.update(dict.fromkeys(prepares(start) or (), place[start]))

    def _take_up_reductions(self, program: Program, order: dict[fx.Node, int], place: Places) -> None:
        """Place the wait for a reduced gradient, and its update, right after the start of the next reduction."""
        updates = update_nodes(program)
        reductions: list[tuple[int, str, fx.Node]] = []
        inside: dict[fx.Node, fx.Node] = {}  # of what is reduced between nodes, the wait for it inside of one
        for name, update in updates.items():
            waits = {source for node in update for source in node.all_input_nodes if source.target is ops.wait}
            for wait in waits:
                sent = operand(wait)
                if operand(sent).target is ops.wait:
                    inside[wait] = operand(sent)
                    sent = operand(inside[wait])
                reductions.append((order[sent], name, wait))
        reductions.sort(key=lambda item: item[0])
        after = {name: order[update[0]] for name, update in updates.items()}
        starts = [start for start, _, _ in reductions]
        for i, (start, name, wait) in enumerate(reductions):
            later = starts[i + 1 : i + 3] if self.prefetch else []
            after[name] = start if not later else later[-1] if wait in inside else later[0]
            if wait in inside:
                for node in (inside[wait], operand(wait)):
                    place[node] = (later[0] if later else start, NEXT, 0, order[node])
        groups = {name: list(update) for name, update in updates.items()}
        for _, name, wait in reductions:
            groups[name].insert(0, wait)
        for name, group in groups.items():
            for node in group:
                place[node] = (after[name], NEXT, order[group[0]], order[node])


FIRST, NEXT, LAST, BEFORE = 0, 1, 2, 3
"""Among nodes placed right after the same one: gathers start first, updates follow, final waits come last; then what is
placed right before the node that comes after it."""

Places = dict[fx.Node, tuple[int, ...]]
"""Where each node goes: its own old position, or that of the node it follows and then a rank among its like."""
