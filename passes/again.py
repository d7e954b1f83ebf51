"""Make calls of forward again in backward, whoever decides which.

Each is made once, right before the first call of backward that needs it or something that is made of it. Several
results of a call are unpacked together, as one that is not unpacked yet holds the memory of all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import fx

from zgraph.passes.tidy import remove_dead
from zgraph.program import Phase, Program, phase_of

Reads = Callable[[fx.Node, fx.Node], bool]
"""Whether a call reads a source that is made again as made again, rather than as forward has made it."""


def always(reader: fx.Node, source: fx.Node) -> bool:  # noqa: ARG001 -- one of ``Reads``
    """Let every reader have what is made again."""
    return True


def make_again(program: Program, again: AbstractSet[fx.Node], late: Reads = always, inside: Reads = always) -> None:
    """Let what stands behind forward read copies of calls.

    Args:
        program: in any legal order.
        again: the calls of forward that are made again.
        late: asked of readers behind forward.
        inside: asked of calls that are made again.
    """
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    copies: dict[fx.Node, fx.Node] = {}

    def sources(node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in again and inside(node, source)]

    def made(wanted: fx.Node, reader: fx.Node) -> fx.Node:
        needed: set[fx.Node] = set()
        stack = [wanted]
        while stack:
            node = stack.pop()
            if node not in needed and node not in copies:
                needed.add(node)
                stack.extend(sources(node))
                stack.extend(user for user in node.users if user.target is operator.getitem and user in again)
        for node in sorted(needed, key=position.__getitem__):
            copies[node] = _copied(program, node, {source: copies[source] for source in sources(node)}, reader)
        return copies[wanted]

    for reader in position:
        if reader.op == "placeholder" or phase_of(reader) is Phase.FORWARD:
            continue
        for source in reader.all_input_nodes:
            if source in again and late(reader, source):
                reader.replace_input_with(source, made(source, reader))
    remove_dead(program)


def _copied(program: Program, node: fx.Node, mine: Mapping[fx.Node, fx.Node], reader: fx.Node) -> fx.Node:
    """The same call before ``reader``, which reads copies where there are some."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: mine.get(source, source))
    origin = replace(node.meta["origin"], phase=Phase.BACKWARD)
    return program.call(node.target, *args, origin=origin, before=reader, **kwargs)
