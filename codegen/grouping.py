"""Which calls of forward and backward become one kernel: those whose values then never lie in memory.

    h = add(x, y)
    n = native_layer_norm(h, ...)       ->      h, n, mean, rstd = region(x, y, ...)
    m = mm(n, w)                                m = mm(n, w)

Calls join one after another, each with what it reads, as long as loops have words for all of them together, nothing but
they lies between what they read and what reads them, and no collective starts later than it did. Each region stands
where the last of its calls stood, or before the first call that reads a result of it; but none of backward's
stands in the middle of forward. Calls of the update on single numbers need not feed each other to be one: they move
nothing, and their number is what they cost.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen import numbers
from zgraph.codegen.lowering import may_lower
from zgraph.codegen.region import key_of
from zgraph.program import Phase, Program, phase_of


@dataclass(frozen=True)
class Group:
    """Calls that become one kernel.

    Attributes:
        nodes: in order; of several results of one call, what unpacks them, too.
        results: those of them that are read elsewhere, in order.
        place: position in the program at which the kernel stands; a half lies before a call.
    """

    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    place: float


def groups(program: Program, can_write: Callable[[fx.Graph], bool], kept: Iterable[fx.Node] = ()) -> list[Group]:
    """The regions of a program, in order.

    Args:
        program: functional, in the order in which it is to run.
        can_write: whether there is a kernel for a body.
        kept: calls that stay as they are.
    """
    return _Grouping(program, can_write, set(kept)).groups()


class _Grouping:
    def __init__(self, program: Program, can_write: Callable[[fx.Graph], bool], kept: set[fx.Node]) -> None:
        self.nodes = list(program.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.starts = [index for index, node in enumerate(self.nodes) if node.target in ops.STARTS]
        self.can_write = can_write
        self.known: dict[Hashable, bool] = {}
        self.of: dict[fx.Node, Group] = {}
        self.fusable = {node for node in self.nodes if node not in kept and _may_fuse(node)}
        self.numbers = [node for node in self.nodes if node not in kept and _is_number_of_update(node)]

    def groups(self) -> list[Group]:
        for node in self.nodes:
            if node not in self.fusable or node.target is operator.getitem:
                continue
            alone = self._group(self._with_parts(node), is_written=False)
            if alone is None:
                continue
            self._set(alone)
            for source in dict.fromkeys(self._sources(node)):
                mine, theirs = self.of[node], self.of.get(source)
                if theirs is not None and theirs is not mine:
                    both = self._group({*mine.nodes, *theirs.nodes})
                    if both is not None:
                        self._set(both)
        self._join_numbers()
        found = [group for group in dict.fromkeys(self.of.values()) if _is_worthwhile(group)]
        return sorted(found, key=lambda group: self.position[group.nodes[-1]])

    def _join_numbers(self) -> None:
        """Make as few kernels of numbers as what they wait for, and what waits for them, allows."""
        made: list[Group] = []
        for node in self.numbers:
            device = node.meta["val"].device
            for index, other in reversed(list(enumerate(made))):
                both = self._group({*other.nodes, node}, is_written=False, may_hurry=True)
                if both is not None and other.nodes[0].meta["val"].device == device:
                    made[index] = both
                    break
            else:
                alone = self._group({node}, is_written=False)
                if alone is None:
                    continue
                made.append(alone)
                both = alone
            self._set(both)

    def _set(self, group: Group) -> None:
        self.of.update(dict.fromkeys(group.nodes, group))

    def _with_parts(self, node: fx.Node) -> set[fx.Node]:
        """A call, and what unpacks its results."""
        parts = [user for user in node.users if user.target is operator.getitem]
        return {node, *parts} if isinstance(node.meta["val"], (tuple, list)) else {node}

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The calls that a call reads results of, through views."""
        for source in node.all_input_nodes:
            yield ops.root_of(source)

    def _group(self, inside: set[fx.Node], *, is_written: bool = True, may_hurry: bool = False) -> Group | None:
        """The calls as one kernel, if one is written; None where there can be none.

        Args:
            inside: the calls.
            is_written: whether there must be a kernel for them.
            may_hurry: whether they may go before collectives that they came after: they take no time by themselves.
        """
        nodes = tuple(sorted(inside, key=self.position.__getitem__))
        readers = {node: [r for r in _readers(node) if r not in inside] for node in nodes}
        results = tuple(node for node in nodes if readers[node])
        if not results:
            return None
        last = float(self.position[nodes[-1]])
        first_reader = min(self._place(reader) for node in results for reader in readers[node])
        place = min(last, first_reader - 0.5)
        last_read = max((self._place(source) for source in self._outside(nodes, inside)), default=-1.0)
        if last_read >= place or (not may_hurry and any(place < start < last for start in self.starts)):
            return None
        of_backward = [self.position[node] for node in nodes if phase_of(node) is Phase.BACKWARD]
        if 0 < len(of_backward) < len(nodes) and place < of_backward[0]:
            return None  # what only backward needs would be kept from forward on
        if is_written and not self._can_write(body_of(nodes, results)[0]):
            return None
        return Group(nodes, results, place)

    def _can_write(self, body: fx.Graph) -> bool:
        key = key_of(body)
        if key not in self.known:
            self.known[key] = self.can_write(body)
        return self.known[key]

    def _place(self, node: fx.Node) -> float:
        """Where a value is there, or a call reads: that of its kernel if it is part of one."""
        memory = ops.root_of(node)
        group = self.of.get(memory)
        if group is not None and _is_worthwhile(group):
            return group.place
        return float(self.position[memory])

    def _outside(self, nodes: Iterable[fx.Node], inside: set[fx.Node]) -> Iterator[fx.Node]:
        for node in nodes:
            for source in node.all_input_nodes:
                if ops.root_of(source) not in inside and source.op != "placeholder":
                    yield source


def body_of(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """Calls in a graph of their own, with the views through which they read each other.

    Returns:
        The graph, and the nodes that its placeholders stand for, in order.
    """
    inside = set(nodes)
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if ops.root_of(source) not in inside and source not in copies:
                copies[source] = body.placeholder(f"in{len(copies)}")
                copies[source].meta["val"] = source.meta["val"]
    outside = list(copies)

    def copy_of(source: fx.Node) -> fx.Node:
        if source not in copies:  # a view
            copies[source] = body.node_copy(source, copy_of)
        return copies[source]

    for node in nodes:
        for source in node.all_input_nodes:
            copy_of(source)
        copies[node] = body.node_copy(node, copy_of)
    body.output([copies[node] for node in results])
    return body, outside


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, through views or not."""
    for user in node.users:
        if ops.view_of(user) is not None:
            yield from _readers(user)
        else:
            yield user


def _may_fuse(node: fx.Node) -> bool:
    """Whether a call of forward or backward may be part of a region, as far as its operator and its result say."""
    if node.op != "call_function" or phase_of(node) is Phase.UPDATE:
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and ops.view_of(node) is None and _may_fuse(source)
    if not may_lower(node):
        return False
    vals = list(_vals(node))
    sized = (v for n in (node, *node.all_input_nodes) for v in _vals(n) if isinstance(v, torch.Tensor) and v.dim())
    is_strided = all(v is None or (isinstance(v, torch.Tensor) and v.layout is torch.strided) for v in vals)
    return is_strided and len({v.device for v in sized}) <= 1


def _is_number_of_update(node: fx.Node) -> bool:
    """Whether a call of the update may be part of a kernel of numbers."""
    return node.op == "call_function" and phase_of(node) is Phase.UPDATE and numbers.may_write(node)


def _vals(node: fx.Node) -> Iterator[Any]:
    val = node.meta["val"]
    yield from val if isinstance(val, (tuple, list)) else (val,)


def _is_worthwhile(group: Group) -> bool:
    """Whether a kernel replaces several calls that go over memory."""
    calls = [n for n in group.nodes if n.target is not operator.getitem and not ops.creates(n.target)]
    return len(calls) > 1
