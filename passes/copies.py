"""Views and casts of a bucket of parameters: who reads them, and how to read them of a copy instead."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from zgraph import ops
from zgraph.program import Program, operand


def derived(flat: fx.Node) -> dict[fx.Node, None]:
    """Views and casts of a parameter buffer, which any phase can make again from a copy."""
    family: dict[fx.Node, None] = {}
    queue = [flat]
    while queue:
        for user in queue.pop().users:
            again = ops.view_of(user) is not None or user.target is torch.ops.aten._to_copy.default
            if again and user.op == "call_function" and len(user.all_input_nodes) == 1 and user not in family:
                family[user] = None
                queue.append(user)
    return family


def readers_of(flat: fx.Node) -> dict[fx.Node, None]:
    """The calls that read a parameter buffer itself, or what is derived of it, other than to derive more."""
    family = derived(flat)
    users = (user for node in (flat, *family) for user in node.users)
    return dict.fromkeys(user for user in users if user not in family and user.op == "call_function")


def erase_unread(flat: fx.Node) -> None:
    """Erase what is derived of a parameter buffer and nothing reads."""
    for node in reversed(derived(flat)):
        if not node.users:
            node.graph.erase_node(node)


class Copies:
    """Lets calls read of a copy what they read of a parameter buffer.

    Args:
        flat: the buffer.
        copy: of it.
    """

    def __init__(self, program: Program, flat: fx.Node, copy: fx.Node) -> None:
        self._program, self._flat, self._members = program, flat, derived(flat)
        self._copies = {flat: copy}

    def has(self, node: fx.Node) -> bool:
        """Whether a node is derived of the buffer."""
        return node in self._members

    def give(self, reader: fx.Node) -> None:
        """Let a call read the copy."""
        for source in reader.all_input_nodes:
            if source is self._flat or source in self._members:
                reader.replace_input_with(source, self.of(source, reader))

    def of(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The like of the buffer, or of what is derived of it; made before a call if there is none yet."""
        if node not in self._copies:
            source = self.of(operand(node), before)
            origin = replace(node.meta["origin"], phase=before.meta["origin"].phase)
            self._copies[node] = self._program.call(
                node.target, source, *node.args[1:], origin=origin, before=before, **node.kwargs
            )
        return self._copies[node]
