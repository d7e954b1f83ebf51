"""Compute again in backward what forward has computed, instead of keeping it: activation checkpointing as a pass.

Chen, Xu, Zhang, Guestrin (2016), "Training Deep Nets with Sublinear Memory Cost". A call that is made again is the same
term, so the proof needs no equation for it; a random operator that ran again would be another draw, and is refused.
"""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

import torch
from torch import fx

from zgraph import ops
from zgraph.errors import OptionError
from zgraph.liveness import owners
from zgraph.passes.again import make_again
from zgraph.pipeline import Pass
from zgraph.program import Phase, Program, Stage, operand, phase_of, target_name

aten = torch.ops.aten

EXPENSIVE = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten.baddbmm.default",
    "aten.convolution.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
)
"""Matrix products, convolutions and attention: what takes most of the time of forward."""


@dataclass(frozen=True)
class RecomputeModules(Pass):
    """Keep of the named modules what goes in; backward computes again what else it reads of them.

        h = mm(x, v)                            h = mm(x, v)
        y = tanh(h)                             y = tanh(h)
        z = mm(y, w)                            z = mm(y, w)            # h and y are free from here
        ...                             ->      ...
        gw = mm(t(y), gz)                       h2 = mm(x, v)
        gh = tanh_backward(gy, y)               y2 = tanh(h2)
                                                gw = mm(t(y2), gz)
                                                gh = tanh_backward(gy, y2)

    Each call is made again right before the first in backward that needs it. What has to be kept in any case, since
    it goes into another module, say, is read and not made again; nor is what draws random numbers (attention with
    dropout does), nor what travels. Where a module would have to keep as many bytes as it frees, it is left alone.

    Args:
        modules: patterns of module paths, such as ``blocks.*``; all calls of a module that matches and of those in it
            are one block. Without any, the members of lists of like modules.
        keep: operators whose results are kept, too, by name: ``aten.mm.default``.
        every_second: of these operators in ``keep``, the second, fourth and so on of each block are made again all
            the same.
        operands_of: operators of backward, whose operands are kept, too: to make them again costs passes over memory
            that no fusion saves, as torch's min-cut partitioner supposes, which keeps what backward "materializes".
            What is made of parameters alone is not counted among them.
    """

    modules: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    every_second: tuple[str, ...] = ()
    operands_of: tuple[str, ...] = ()

    takes, gives = Stage.CAPTURED, Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        patterns = self.modules or _lists_of_like_modules(program)
        _check_patterns(program, patterns)
        _Recomputation(program, patterns, self).run()


class _Recomputation:
    """Decides what is kept, from the last block to the first, and then makes calls again.

    A value is kept if memory that it lies in is, so a view of what is kept costs nothing.
    """

    def __init__(self, program: Program, patterns: tuple[str, ...], asked: RecomputeModules) -> None:
        self.program, self.patterns = program, patterns
        self.owner = owners(program)
        self.paths: dict[str, str | None] = {}
        self.blocks = list(self._find_blocks())
        self.block_of = {node: block for block in self.blocks for node in block.members}
        self.keep = {*self._find_kept(asked), *self._find_operands(asked.operands_of)}
        self.kept: set[fx.Node] = set()  # calls whose memory lasts until backward, whatever is made again
        self.again: set[fx.Node] = set()  # calls that are made again

    def run(self) -> None:
        calls = [node for node in self.program.graph.nodes if node.op == "call_function"]
        late = [node for node in calls if phase_of(node) is not Phase.FORWARD]
        wanted: dict[_Block, set[fx.Node]] = {}
        for reader in (*late, self.program.output_node):
            for source in reader.all_input_nodes:
                if self._may_read(reader, source):
                    wanted.setdefault(self.block_of[source], set()).add(source)
                elif phase_of(source) is Phase.FORWARD:
                    self.kept.add(self.owner[source])
        for block in reversed(self.blocks):
            self._plan(wanted.get(block, set()))
        make_again(self.program, self.again, self._may_read, self._same_block)

    def _find_blocks(self) -> Iterator[_Block]:
        """Blocks in the order of forward; one that is called again behind another is two."""
        last = None
        for node in self.program.graph.nodes:
            path = self._path_of(node) if phase_of(node) is Phase.FORWARD else None
            if path is None:
                continue
            if last is None or last.path != path:
                if last is not None:
                    yield last
                last = _Block(path, [])
            last.members.append(node)
        if last is not None:
            yield last

    def _find_kept(self, asked: RecomputeModules) -> Iterator[fx.Node]:
        """The calls of blocks whose results are kept because of their operator."""
        for block in self.blocks:
            counts: Counter[str] = Counter()
            for node in block.members:
                name = target_name(node.target)
                counts[name] += 1
                if name in asked.keep and not (name in asked.every_second and counts[name] % 2 == 0):
                    yield node

    def _find_operands(self, operators: tuple[str, ...]) -> Iterator[fx.Node]:
        """The calls of blocks that make what these operators of backward read, but for what parameters alone make."""
        for node in self.program.graph.nodes:
            if phase_of(node) is Phase.BACKWARD and target_name(node.target) in operators:
                for source in node.all_input_nodes:
                    memory = self.owner[source]
                    if memory in self.block_of and any(n.op == "call_function" for n in memory.all_input_nodes):
                        yield memory

    def _path_of(self, node: fx.Node) -> str | None:
        """The outermost module that a call belongs to and that is asked for."""
        module: str = node.meta["origin"].module
        if module not in self.paths:
            matching = (path for path in _prefixes(module) if any(fnmatchcase(path, p) for p in self.patterns))
            self.paths[module] = next(matching, None)
        return self.paths[module]

    def _may_read(self, reader: fx.Node, source: fx.Node) -> bool:
        """Whether a call behind forward may read a value that is computed anew: in the same block alone.

        What goes out of a block is kept by whoever takes it in.
        """
        if phase_of(reader) is not Phase.BACKWARD or source not in self.block_of:
            return False
        return self._path_of(reader) == self.block_of[source].path and self._can_be_made(source)

    def _can_be_made(self, node: fx.Node) -> bool:
        """Whether a value of a block can be made from others: where it lies in a kept one's memory, it need not be."""
        block = self.block_of[node]
        while (memory := self.owner[node]) is not node:
            if self.block_of.get(memory) is not block:
                return False
            node = memory
        source = operand(node) if node.target is operator.getitem else node
        return ops.can_run_again(node) and source not in self.keep

    def _plan(self, wanted: set[fx.Node]) -> None:
        """Decide which values of one block are made again so that backward has those that are ``wanted``."""
        wanted = {node for node in wanted if self.owner[node] not in self.kept}
        again: set[fx.Node] = set()
        read: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node in again:
                continue
            again.add(node)
            for source in node.all_input_nodes:
                block = self.block_of.get(source)
                inside = block is self.block_of[node] and self.owner[source] not in self.kept
                if inside and self._can_be_made(source):
                    stack.append(source)
                else:
                    read.add(self.owner[source])
        read = {memory for memory in read - self.kept if memory.op == "call_function"}
        freed = {self.owner[node] for node in wanted}
        if _num_bytes(freed) > _num_bytes(read):
            self.again |= again
            self.kept |= read
        else:
            self.kept |= freed

    def _same_block(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether what is made again reads a source that is made again, too, rather than what is kept of it."""
        return self.block_of[source] is self.block_of[node]


@dataclass(eq=False)
class _Block:
    """The calls of one module in forward, in order."""

    path: str
    members: list[fx.Node]


def _num_bytes(memories: Iterable[fx.Node]) -> int:
    vals = [memory.meta["val"] for memory in memories]
    return sum(val.nbytes for val in vals if isinstance(val, torch.Tensor))


def _prefixes(path: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    return accumulate(path.split("."), lambda outer, name: f"{outer}.{name}") if path else iter(())


def _forward_paths(program: Program) -> list[str]:
    """The module of every call of forward, in order."""
    return [n.meta["origin"].module for n in program.graph.nodes if phase_of(n) is Phase.FORWARD]


def _check_patterns(program: Program, patterns: tuple[str, ...]) -> None:
    """Refuse a pattern that matches no module that forward calls."""
    found = sorted({prefix for path in _forward_paths(program) for prefix in _prefixes(path)})
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in found):
            near = difflib.get_close_matches(pattern, found, n=3, cutoff=0) if found else []
            raise OptionError(
                f"recompute names {pattern!r}, but forward calls no module of that path",
                fix=f"name modules by their path, such as {', '.join(near)}" if near else "leave recompute out",
            )


def _lists_of_like_modules(program: Program) -> tuple[str, ...]:
    """Patterns of the members of each outermost list of which two or more compute alike, and more than one thing."""
    lists: dict[str, dict[str, list[str]]] = {}  # list -> member -> what it computes
    for node in program.graph.nodes:
        if phase_of(node) is not Phase.FORWARD or not _computes(node):
            continue
        for path in _prefixes(node.meta["origin"].module):
            outer, _, name = path.rpartition(".")
            if name.isdecimal():
                lists.setdefault(outer, {}).setdefault(path, []).append(target_name(node.target))
    found: list[str] = []
    large = [outer for outer, members in lists.items() if sum(len(calls) > 1 for calls in members.values()) > 1]
    for outer in sorted(large, key=lambda path: len(list(_prefixes(path)))):
        within = any(fnmatchcase(path, pattern) for path in _prefixes(outer) for pattern in found)
        computed = [tuple(calls) for calls in lists[outer].values() if len(calls) > 1]
        if not within and len(set(computed)) < len(computed):
            found.append(_members(outer))
    if not found:
        names = [_members(outer) for outer in large] or sorted(
            {path.partition(".")[0] for path in _forward_paths(program)}
        )
        raise OptionError(
            "recompute finds no blocks: no list or sequence of modules has two members that compute alike",
            fix=f"name modules by their path: recompute={[name for name in names if name][:3]}",
        )
    return tuple(found)


def _members(outer: str) -> str:
    """A pattern of the members of a list of modules."""
    return f"{outer}.[0-9]*" if outer else "[0-9]*"


def _computes(node: fx.Node) -> bool:
    """Whether a call does more than to cast a value, or to look at it in another way."""
    return node.target not in (operator.getitem, aten._to_copy.default) and not ops.is_view(node.target)
