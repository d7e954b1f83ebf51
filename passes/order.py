"""Put calls in another order, as far as what they read and write over allows.

A pass says where it wishes each call to stand and need not know what else has been moved: whatever order it is given
and whatever it wishes, the program stays one that may run.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.liveness import owners, written
from zgraph.program import Program, operand


def arrange(program: Program, wishes: Mapping[fx.Node, Any]) -> None:
    """Order calls by their wishes; a call that must wait for another one stands as soon behind it as it can.

    Random numbers are drawn in the order they were. Where a call writes over memory, those that read what was there
    come before it.

    Args:
        program: in any legal order but for what reads memory that is to be written over.
        wishes: of each call, a key to sort by; equal ones stay in the order they have.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    place = {node: i for i, node in enumerate(calls)}
    behind: dict[fx.Node, set[fx.Node]] = {node: {user for user in node.users if user in place} for node in calls}
    draws = [node for node in calls if ops.draws(node)]
    for earlier, later in (*itertools.pairwise(draws), *_overwritten(program, calls)):
        behind[earlier].add(later)
    waiting = dict.fromkeys(calls, 0)
    for later in itertools.chain.from_iterable(behind.values()):
        waiting[later] += 1
    ready = [(wishes[node], place[node], node) for node in calls if not waiting[node]]
    heapq.heapify(ready)
    ordered: dict[fx.Node, None] = {}
    while ready:
        *_, node = heapq.heappop(ready)
        ordered[node] = None
        for later in behind[node]:
            waiting[later] -= 1
            if not waiting[later]:
                heapq.heappush(ready, (wishes[later], place[later], later))
    # Calls of which each would write over what the other has yet to read keep their order, for the verifier to refuse.
    output = program.output_node
    for node in (*ordered, *(node for node in calls if node not in ordered)):
        output.prepend(node)


def _overwritten(program: Program, calls: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each call that reads memory as it was, with the one that writes over it.

    What is sent is read until it has arrived. A reader that needs the new value as well gets no place: the program
    would have to keep both.
    """
    writers = {node: sources for node in calls if (sources := written(node))}
    if not writers:
        return
    owner = owners(program)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in calls:
        sent = operand(node).all_input_nodes if node.target is ops.wait else []
        for source in (*node.all_input_nodes, *sent):
            readers.setdefault(owner[source], []).append(node)
    for writer, sources in writers.items():
        later = _descendants(writer)
        for source in sources:
            yield from ((reader, writer) for reader in readers[owner[source]] if reader not in later)


def _descendants(node: fx.Node) -> set[fx.Node]:
    """A call and all that depend on it."""
    found = {node}
    stack = [node]
    while stack:
        fresh = stack.pop().users.keys() - found
        found |= fresh
        stack.extend(fresh)
    return found
