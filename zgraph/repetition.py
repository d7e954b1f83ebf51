"""Repeat blocks of a captured step: what capturing more of them gives, node for node.

    captured of 4 blocks        0      1             2      3
    made for n blocks           0      1  2 ... n-3  n-2    n-1

First and last block stay as they are, since backward begins and ends there; the two between must be equal but for their
number, and are then repeated. What cannot be shown to be equal is refused, and the whole model has to be captured.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import fx

from zgraph.errors import CaptureError
from zgraph.program import Guard, Input, Origin, Program, Role, Stage, describe, show, source_of, target_name

Item = TypeVar("Item")
Value = TypeVar("Value")

KEPT = 4
"""Blocks of a shortened model: the first, two to compare, the last."""

_WHOLE = "capture the whole model instead: its blocks are not repetitions of one another"


def repeat_blocks(program: Program, path: str, num_layers: int) -> Program:
    """What capture gives for the same model with more blocks.

    Args:
        program: CAPTURED, of a model with at least four blocks, all in order and named from 0 on.
        path: of the ``nn.ModuleList`` or ``nn.Sequential`` that has them.
        num_layers: how many blocks there are to be, at least as many as there are.

    Raises:
        CaptureError: with the first place where blocks 1 and 2, say, are not equal but for their number.
    """
    assert program.stage is Stage.CAPTURED
    names = {what.name for _, what in program.placeholders() if what.role is not Role.CONSTANT}
    modules = {node.meta["origin"].module for node in program.graph.nodes if "origin" in node.meta}
    numbering = Numbering(path)
    found = {block for name in names | modules if (block := numbering.block(name)) is not None}
    if len(found) < KEPT or max(found) != len(found) - 1:
        raise CaptureError(
            f"{path} has {len(found)} blocks in what was captured, and {KEPT} or more can be repeated",
            fix="capture the whole model instead",
        )
    if num_layers < len(found):
        raise CaptureError(
            f"{len(found)} blocks of {path} were captured, of {num_layers}", fix="capture the whole model instead"
        )
    return (
        program.clone() if num_layers == len(found) else _Repetition(program, numbering, len(found), num_layers).run()
    )


class Numbering:
    """Reads and changes the number of a block in names of modules and parameters."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._pattern = re.compile(re.escape(path) + r"\.(\d+)(?=\.|$)")
        self._blocks: dict[str, int | None] = {}

    def block(self, name: str) -> int | None:
        """The number of the block that a name is in; None if it is in none."""
        if name not in self._blocks:
            match = self._pattern.match(name)
            self._blocks[name] = int(match[1]) if match else None
        return self._blocks[name]

    def renamed(self, name: str, block: Any) -> str:
        """The same name in another block."""
        match = self._pattern.match(name)
        return f"{self.path}.{block}{name[match.end() :]}" if match else name


class Arrangement:
    """Where the items of a sequence go when blocks are repeated.

    Items of the blocks between first and last come in *sweeps*: all of one block, in equal number, then all of the
    next, upwards or downwards. Items of no block that follow each block of a sweep belong to it.

    Args:
        before, after: how many blocks there are, and are to be.
    """

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after = before, after
        self.middle = range(1, before - 1)

    def renumbered(self, block: int) -> int:
        """The new number of a block that there was."""
        return block if block < 2 else block + self.after - self.before

    def steps(
        self, labels: Sequence[int | None], kinds: Sequence[Hashable], refuse: Callable[[int], CaptureError]
    ) -> Iterator[tuple[tuple[int, ...], int | None]]:
        """The new sequence, item by item.

        Args:
            labels: the block of each item.
            kinds: items of different kinds are in no sweep together.
            refuse: says that an item of a block has no counterpart.

        Yields:
            Positions of an item in the old sequence: one, and None; or those of its counterparts in each block between
            first and last, and the new number of the block that it is for.
        """
        i = 0
        while i < len(labels):
            if labels[i] not in self.middle:
                yield (i,), None
                i += 1
                continue
            length, upwards = self._sweep(i, labels, kinds, refuse)
            blocks = range(1, self.after - 1)
            for block in blocks if upwards else reversed(blocks):
                for start in range(i, i + length):
                    at = tuple(range(start, start + length * len(self.middle), length))
                    yield (at if upwards else at[::-1]), block
            i += length * len(self.middle)

    def _sweep(
        self, first: int, labels: Sequence[int | None], kinds: Sequence[Hashable], refuse: Callable[[int], CaptureError]
    ) -> tuple[int, bool]:
        """How many items each block has in the sweep that begins here, and whether it goes upwards."""
        order = list(self.middle) if labels[first] == self.middle[0] else list(reversed(self.middle))
        second = first
        while second < len(labels) and kinds[second] == kinds[first] and labels[second] in (order[0], None):
            second += 1
        length = second - first
        if labels[first] != order[0] or second == len(labels) or labels[second] != order[1]:
            raise refuse(first)
        for at, block in enumerate(order):
            for start in range(first, first + length):
                i = start + at * length
                if i >= len(labels) or kinds[i] != kinds[first]:
                    raise refuse(start)
                if labels[i] != block and (labels[start] is not None or labels[i] in self.middle):
                    raise refuse(start)
        end = first + length * len(order)
        if end < len(labels) and labels[end] == order[-1] and kinds[end] == kinds[first]:
            raise refuse(end)
        return length, order[0] < order[1]

    def repeated(
        self,
        items: Sequence[Item],
        labels: Sequence[int | None],
        what: str,
        make: Callable[[tuple[Item, ...], int], Value],
        keep: Callable[[Item], Value],
    ) -> list[Value]:
        """A new sequence of items that ``make`` and ``keep`` give.

        Args:
            what: the items are, for an error.
            make: from counterparts, and the number of their block.
            keep: from one that is in no sweep.
        """

        def refuse(i: int) -> CaptureError:
            return CaptureError(f"{what} {_shown(items[i])} of block {labels[i]} has no counterpart", fix=_WHOLE)

        return [
            keep(items[at[0]]) if block is None else make(tuple(items[i] for i in at), block)
            for at, block in self.steps(labels, [None] * len(items), refuse)
        ]


def _shown(item: Any) -> str:
    return str(item[0] if isinstance(item, tuple) and item else item)


@dataclass
class _Operand:
    """What a call in a repeated block reads in one place.

    Attributes:
        nodes: what it reads in each block between first and last, before.
        offset: in which block, from its own on: -1, 0 or 1; None if it is one and the same for all.
        slot: where there, if that block is repeated itself.
    """

    nodes: tuple[fx.Node, ...]
    offset: int | None
    slot: int


@dataclass
class _Slot:
    """A node that is in every block between first and last.

    Attributes:
        nodes: of each of these blocks, before.
        operands: of its calls, in order.
        copies: by the new number of their block.
    """

    nodes: tuple[fx.Node, ...]
    operands: list[_Operand] = field(default_factory=list)
    copies: dict[int, fx.Node] = field(default_factory=dict)


class _Anything(defaultdict[fx.Node, str]):
    """Shows every node alike."""

    def __missing__(self, key: fx.Node) -> str:
        return "%"


class _Repetition:
    def __init__(self, program: Program, numbering: Numbering, before: int, after: int) -> None:
        self.program, self.numbering = program, numbering
        self.plan = Arrangement(before, after)
        self.nodes = [node for node in program.graph.nodes if node.op != "output"]
        self.labels, near, self.kinds = self._blocks_of_nodes()
        self.graph = fx.Graph()
        self.kept: dict[fx.Node, fx.Node] = {}
        self.label_of = dict(zip(self.nodes, near, strict=True))
        self.slots: dict[int, _Slot] = {}  # by position of the node in the first block of its sweep
        self.slot_of: dict[fx.Node, tuple[int, int]] = {}  # block and slot of what is repeated
        self.constants: dict[str, torch.Tensor] = {}
        self.constant_names: dict[str, str] = {}
        self._renumber_constants = False

    # -- which block -------------------------------------------------------------------------------------

    def _blocks_of_nodes(self) -> tuple[list[int | None], list[int | None], list[Hashable]]:
        """For each node the block that it is to be repeated with, the block that it is next to, and its phase or role.

        Names of modules and parameters say so for most. What a step does between two blocks belongs to both, and is
        placed by the plan. What it does elsewhere, to what comes from one block or two neighbours, belongs to the block
        that it was made by last: a parameter as it is before it is trained, say, or what is summed up over blocks.
        """
        kinds: list[Hashable] = [
            node.meta["input"].role if node.op == "placeholder" else node.meta["origin"].phase for node in self.nodes
        ]
        named = [self._named_block(node) for node in self.nodes]
        labels, between = self._filled(named, kinds)
        near = list(labels)
        at = {node: i for i, node in enumerate(self.nodes)}
        for i, node in enumerate(self.nodes):
            if i in between:
                near[i] = between[i]
            elif near[i] is None and node.op != "placeholder":
                operands = [at[operand] for operand in node.all_input_nodes]
                if 0 < len({near[operand] for operand in operands} - {None}) < 3:
                    near[i] = near[max(operand for operand in operands if near[operand] is not None)]
                    labels[i] = near[i] if near[i] in self.plan.middle else None
        for i, node in enumerate(self.nodes):
            if kinds[i] is Role.CONSTANT:  # has no name, but readers
                readers = {labels[at[user]] if user in at else None for user in node.users}
                labels[i] = near[i] = readers.pop() if len(readers) == 1 else None
        return labels, near, kinds

    def _filled(self, named: list[int | None], kinds: list[Hashable]) -> tuple[list[int | None], dict[int, int | None]]:
        """Places between those that have names: inside of a block, or between two, and then the first of these.

        A module that all blocks have in common has the name that it has in block 0, wherever it is called.
        """
        labels: list[int | None] = list(named)
        between: dict[int, int | None] = {}

        def note(first: int, second: int) -> None:
            one, other = labels[first], labels[second]
            assert one is not None
            assert other is not None
            if len(set(kinds[first : second + 1])) > 1:
                return
            if one == other and one in self.plan.middle:
                labels[first + 1 : second] = [one] * (second - first - 1)
            elif abs(one - other) == 1:
                labels[first + 1 : second] = [None] * (second - first - 1)
                between.update(dict.fromkeys(range(first + 1, second), one))

        others = [i for i, label in enumerate(named) if label]
        for first, second in pairwise(others):
            note(first, second)
        every = [i for i, label in enumerate(labels) if label is not None]
        for first, second in pairwise(every):
            if {labels[first], labels[second]} == {0, 1}:
                note(first, second)
        return labels, between

    def _named_block(self, node: fx.Node) -> int | None:
        """The block in the name of a node's module, parameter or buffer."""
        if node.op == "placeholder":
            what: Input = node.meta["input"]
            return None if what.role is Role.CONSTANT else self.numbering.block(what.name)
        origin: Origin = node.meta["origin"]
        return self.numbering.block(origin.module)

    def run(self) -> Program:
        """The new program."""

        def refuse(i: int) -> CaptureError:
            node = self.nodes[i]
            called = node.meta["input"] if node.op == "placeholder" else target_name(node.target)
            return CaptureError(
                f"blocks of {self.numbering.path} differ: {called} of block {self.labels[i]} has no counterpart",
                where=source_of(node),
                fix=_WHOLE,
            )

        steps = list(self.plan.steps(self.labels, self.kinds, refuse))
        for at, block in steps:
            if block is not None and at[0] not in self.slots:
                slot = self.slots[at[0]] = _Slot(tuple(self.nodes[i] for i in at))
                self.slot_of.update({node: (self.plan.middle[i], at[0]) for i, node in enumerate(slot.nodes)})
        if not self.slots:
            raise CaptureError(f"nothing in what was captured belongs to blocks of {self.numbering.path}", fix=_WHOLE)
        for slot in self.slots.values():
            self._check_equal(slot)
            slot.operands = [self._operand(slot, nodes) for nodes in zip(*map(_read_by, slot.nodes), strict=True)]
        self._check_constants()
        for at, block in steps:
            if block is None:
                node = self.nodes[at[0]]
                self.kept[node] = self._keep(node)
            else:
                self._make(self.slots[at[0]], block)
        return self._finish()

    def _differ(self, slot: _Slot, how: str) -> CaptureError:
        return CaptureError(
            f"blocks {self.plan.middle[0]} and {self.plan.middle[1]} of {self.numbering.path} differ: {how}",
            where=source_of(slot.nodes[-1]),
            fix=_WHOLE,
        )

    def _check_equal(self, slot: _Slot) -> None:
        """Refuse nodes that differ in more than what they read and the number of their block."""
        forms = [self._form(node) for node in slot.nodes]
        for form in forms[1:]:
            for one, other in zip(forms[0], form, strict=True):
                if one != other:
                    raise self._differ(slot, f"{one} in one is {other} in the other")

    def _form(self, node: fx.Node) -> list[str]:
        anything, val = _Anything(), node.meta.get("val")
        tensors = [one for one in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(one, torch.Tensor)]
        said = f"{describe(val)} with strides {[t.stride() for t in tensors]} on {[str(t.device) for t in tensors]}"
        if node.op == "placeholder":
            what: Input = node.meta["input"]
            name = "" if what.role is Role.CONSTANT else self.numbering.renamed(what.name, "*")
            return [f"input {replace(what, name=name)}", said]
        args = [show(arg, anything) for arg in node.args]
        args += [f"{key}={show(arg, anything)}" for key, arg in sorted(node.kwargs.items())]
        origin: Origin = node.meta["origin"]
        module = self.numbering.renamed(origin.module, "*") if self._is_of_its_block(node) else origin.module
        made = f"what {module or 'the model'} does at {origin.source} [{origin.phase.value}, {origin.made_by}]"
        return [f"{target_name(node.target)}({', '.join(args)})", said, made]

    def _is_of_its_block(self, node: fx.Node) -> bool:
        """Whether the number in the name of a repeated node's module is that of the block where it stands."""
        return self.numbering.block(node.meta["origin"].module) == self.slot_of[node][0]

    def _operand(self, slot: _Slot, nodes: tuple[fx.Node, ...]) -> _Operand:
        """What counterparts read in the same place.

        Raises:
            CaptureError: they do not read the same, nor counterparts of their own or a neighbouring block.
        """
        if len(set(nodes)) == 1 and nodes[0] not in self.slot_of:
            return _Operand(nodes, None, 0)
        own = self.plan.middle
        inside = [(*self.slot_of[node], block) for node, block in zip(nodes, own, strict=True) if node in self.slot_of]
        offsets = {block - of for block, _, of in inside}
        places = {place for _, place, _ in inside}
        offset = offsets.pop() if len(offsets) == 1 else None
        outside = {block: self.label_of[n] for block, n in zip(own, nodes, strict=True) if n not in self.slot_of}
        # The first of them may read from block 0 instead, the last from the last block, or what belongs to none.
        allowed = {-1: {own[0]: 0}, 0: {}, 1: {own[-1]: self.plan.before - 1}}
        if (
            offset not in allowed
            or len(places) != 1
            or outside.keys() != allowed[offset].keys()
            or any(block not in (None, allowed[offset][at]) for at, block in outside.items())
        ):
            raise self._differ(slot, f"what {_call(slot.nodes[0])} reads in one is not what it reads in the other")
        return _Operand(nodes, offset, places.pop())

    def _resolve(self, operand: _Operand, block: int) -> fx.Node:
        """What the copy for a block reads."""
        if operand.offset is None:
            return self.kept[operand.nodes[0]]
        block += operand.offset
        if block == 0:
            return self.kept[operand.nodes[0]]
        if block == self.plan.after - 1:
            return self.kept[operand.nodes[-1]]
        return self.slots[operand.slot].copies[block]

    def _make(self, slot: _Slot, block: int) -> None:
        """A copy of a node for a block."""
        like = slot.nodes[0]
        operands = iter(slot.operands)
        args, kwargs = fx.map_arg((like.args, dict(like.kwargs)), lambda _: self._resolve(next(operands), block))
        made = slot.copies[block] = self.graph.create_node(like.op, like.target, args, kwargs)
        made.meta = dict(like.meta)
        if like.op == "placeholder":
            made.meta["input"] = self._input(like.meta["input"], block)
        elif self._is_of_its_block(like):
            origin: Origin = like.meta["origin"]
            made.meta["origin"] = replace(origin, module=self.numbering.renamed(origin.module, block))

    def _keep(self, node: fx.Node) -> fx.Node:
        """A node that there is once, as it was."""
        label = self.label_of[node]
        args = tuple(self._moved(arg, node, label) for arg in node.args)
        kwargs = {key: self._moved(arg, node, label) for key, arg in node.kwargs.items()}
        kept = self.graph.create_node(node.op, node.target, args, kwargs)
        kept.meta = dict(node.meta)
        if node.op == "placeholder":
            kept.meta["input"] = self._input(node.meta["input"])
        else:
            origin: Origin = node.meta["origin"]
            kept.meta["origin"] = replace(origin, module=self._name(origin.module))
        return kept

    def _moved(self, arg: Any, reader: fx.Node, label: int | None) -> Any:
        """An argument of a node that there is once; a list of one item per block has more of them."""
        if not isinstance(arg, (list, tuple)):
            return fx.map_arg(arg, lambda node: self._neighbour(node, reader, label))
        blocks = [self.slot_of[item][0] if isinstance(item, fx.Node) and item in self.slot_of else None for item in arg]
        if len(set(blocks) - {None}) < 2:
            return [self._moved(item, reader, label) for item in arg]

        def make(items: tuple[fx.Node, ...], block: int) -> fx.Node:
            return self._resolve(self._own(items, reader), block)

        return self.plan.repeated(
            arg, blocks, f"in {_call(reader)},", make, lambda item: self._moved(item, reader, label)
        )

    def _own(self, items: Sequence[fx.Node], reader: fx.Node | None) -> _Operand:
        """Counterparts, each in its own block."""
        places = {self.slot_of[item][1] if item in self.slot_of else None for item in items}
        if len(places) != 1 or None in places:
            what = "what the step returns" if reader is None else f"what {_call(reader)} reads"
            raise CaptureError(
                f"blocks of {self.numbering.path} differ in {what}",
                where=source_of(items[-1] if reader is None else reader),
                fix=_WHOLE,
            )
        place = self.slot_of[items[0]][1]
        return _Operand(tuple(items), 0, place)

    def _neighbour(self, node: fx.Node, reader: fx.Node, label: int | None) -> fx.Node:
        """What a node that there is once reads, which may be in the block next to its own."""
        if node not in self.slot_of:
            return self.kept[node]
        block, place = self.slot_of[node]
        at_end = label == self.plan.before - 1 and block == self.plan.middle[-1]
        if not at_end and not (label == 0 and block == self.plan.middle[0]):
            raise CaptureError(
                f"{_call(reader)} reads block {block} of {self.numbering.path}, and no other",
                where=source_of(reader),
                fix=_WHOLE,
            )
        return self.slots[place].copies[self.plan.renumbered(block)]

    # -- names -------------------------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        """The new name of what there is once."""
        block = self.numbering.block(name)
        return name if block is None else self.numbering.renamed(name, self.plan.renumbered(block))

    def _input(self, what: Input, block: int | None = None) -> Input:
        """The new meaning of a placeholder, of a block if it is repeated."""
        if what.role is not Role.CONSTANT:
            name = self._name(what.name) if block is None else self.numbering.renamed(what.name, block)
            return replace(what, name=name)
        prefix, number = re.fullmatch(r"(.*?)(\d*)", what.name).groups()  # type: ignore[union-attr]
        if self._renumber_constants:
            number = str(sum(name.startswith(prefix) for name in self.constants))
        self.constants[prefix + number] = self.program.constants[what.name]
        self.constant_names.setdefault(what.name, prefix + number)
        return replace(what, name=prefix + number)

    def _check_constants(self) -> None:
        """Constants are numbered through, and those of a block must have the same value in all blocks."""
        repeated = [slot for slot in self.slots.values() if self._is_constant(slot.nodes[0])]
        self._renumber_constants = bool(repeated)
        for slot in repeated:
            first, *others = (self.program.constants[node.meta["input"].name] for node in slot.nodes)
            if any(first.is_meta or not torch.equal(first, other) for other in others):
                raise self._differ(slot, f"a constant {describe(first)} has other values")
        counted: Counter[str] = Counter()
        for node in self.nodes if repeated else ():
            if self._is_constant(node):
                name = node.meta["input"].name
                prefix = name.rstrip("0123456789")
                if name != f"{prefix}{counted[prefix]}":
                    raise CaptureError(f"constants are not numbered through: {name}", fix=_WHOLE)
                counted[prefix] += 1

    @staticmethod
    def _is_constant(node: fx.Node) -> bool:
        return node.op == "placeholder" and node.meta["input"].role is Role.CONSTANT

    # -- facts -------------------------------------------------------------------------------------------

    def _finish(self) -> Program:
        results, outputs = self._results()
        self.graph.output(results)

        def of_input(item: tuple[Input, Any]) -> int | None:
            return self._block_of(item[0])

        init = self._facts(list(self.program.init.items()), of_input, "the initial value", self._input)
        given = self._facts(
            list(self.program.given.items()), lambda i: self.numbering.block(i[0]), "the state", self._key
        )
        shapes = self._facts(
            list(self.program.given_shapes.items()), lambda i: self.numbering.block(i[0]), "the shape", self._key
        )
        return replace(
            self.program,
            graph=self.graph,
            outputs=outputs,
            constants=self.constants,
            init=dict(init),
            given=dict(given),
            given_shapes=dict(shapes),
            guards=self._guards(),
        )

    def _key(self, name: str, block: int | None = None) -> str:
        return self._name(name) if block is None else self.numbering.renamed(name, block)

    def _block_of(self, what: Input | None) -> int | None:
        return None if what is None or what.role is Role.CONSTANT else self.numbering.block(what.name)

    def _results(self) -> tuple[list[Any], list[Input | None]]:
        """What is returned, and what it is."""
        items = list(zip(self.program.outputs, self.program.results(), strict=True))
        labels = [self._block_of(what) for what, _ in items]

        def keep(item: tuple[Input | None, Any]) -> tuple[Any, Input | None]:
            what, result = item
            if what is not None and what.role is Role.CONSTANT:
                what = replace(what, name=self.constant_names[what.name])
            elif what is not None:
                what = self._input(what)
            if isinstance(result, fx.Node):
                result = self._neighbour(result, self.program.output_node, self._block_of(item[0]))
            return result, what

        def make(counterparts: tuple[tuple[Input | None, Any], ...], block: int) -> tuple[Any, Input | None]:
            what, result = counterparts[0]
            assert what is not None
            self._check_same([self._input(w, 0) for w, _ in counterparts if w is not None], "what is returned")
            if isinstance(result, fx.Node):
                return self._resolve(self._own([r for _, r in counterparts], None), block), self._input(what, block)
            self._check_same([repr(r) for _, r in counterparts], "what is returned")
            return result, self._input(what, block)

        pairs = self.plan.repeated(items, labels, "the new value of", make, keep)
        return [result for result, _ in pairs], [what for _, what in pairs]

    def _check_same(self, values: Sequence[Any], what: str) -> None:
        if any(value != values[0] for value in values[1:]):
            raise CaptureError(
                f"blocks of {self.numbering.path} differ in {what}: {values[0]} and {values[1]}", fix=_WHOLE
            )

    def _facts(
        self,
        items: list[tuple[Any, Any]],
        block_of: Callable[[tuple[Any, Any]], int | None],
        what: str,
        rename: Callable[..., Any],
    ) -> list[tuple[Any, Any]]:
        """Facts by the name that they are about."""

        def make(counterparts: tuple[tuple[Any, Any], ...], block: int) -> tuple[Any, Any]:
            self._check_same([(rename(name, 0), fact) for name, fact in counterparts], what)
            return rename(counterparts[0][0], block), counterparts[0][1]

        labels = [block_of(item) for item in items]
        return self.plan.repeated(items, labels, f"{what} of", make, lambda item: (rename(item[0]), item[1]))

    def _guards(self) -> tuple[Guard, ...]:
        """Conditions on inputs of all blocks."""

        def make(guards: tuple[Guard, ...], block: int) -> Guard:
            self._check_same([(g.text, [self._input(what, 0) for what in g.inputs]) for g in guards], "a condition")
            return replace(guards[0], inputs=tuple(self._input(what, block) for what in guards[0].inputs))

        def keep(guard: Guard) -> Guard:
            return replace(guard, inputs=tuple(map(self._input, guard.inputs)))

        guards = self.program.guards
        labels = [next((b for w in guard.inputs if (b := self._block_of(w)) is not None), None) for guard in guards]
        return tuple(self.plan.repeated(guards, labels, "the condition", make, keep))


def _call(node: fx.Node) -> str:
    return "the step's result" if node.op == "output" else target_name(node.target)


def _read_by(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments of a call, in order, as often as it is there."""
    read: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), read.append)
    return read
