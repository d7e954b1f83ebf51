"""A region's loops in Triton: a program instance has a row, all of it in registers or a block of columns at a time.

    for each row:  for each column:  ...        @triton.jit
                   for each column:  ...   ->   def region(i0, ..., o0, ...): a row is loaded once, and stored once

A row that registers do not hold, such as scores of a vocabulary, is gone over once for each of its loops: all but the
first find it in a cache. Without rows, an instance has ``BLOCK`` elements.

Sums over all rows are made of those of a few hundred instances, each of which goes over rows that follow each other; a
second, small kernel adds them up in order. What each row has one number of, as losses have, is stored row by row, and
added up in float64 by a single instance. So results are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from zgraph.codegen import ir
from zgraph.codegen.ir import CannotWriteError, Level, Loops, Store, Sweep, level_of
from zgraph.codegen.triton import BLOCK, TritonWriter

aten = torch.ops.aten

LONGEST_ROW = 8192
"""Elements of a row that an instance holds, a few dozen values of each at a time."""

COLUMNS = 4096
"""Of a longer row, those that an instance has at a time."""

MOST_CHUNKS = 512
"""Instances that add up rows: a few for each multiprocessor."""

_FEWEST_ROWS = 4
"""Rows that are added up before anything is written."""

_SUMS_TOGETHER, _SUMMED_COLUMNS = 128, 32
"""Sums of instances, and columns of them, that an instance adds up at a time: one after the other, they would wait for
memory as often as there are sums."""

_ADDED = 1024
"""Numbers of rows that are added up at a time."""


@dataclass(frozen=True)
class Part:
    """One of a region's kernels.

    Attributes:
        name: of its function.
        lines: of its function's body.
        parameters: what it is given: inputs ``i0`` in memory, ``n0`` of the host, results ``o0``, and rooms.
        num_instances: that are launched.
        options: of the compiler.
    """

    name: str
    lines: tuple[str, ...]
    parameters: tuple[str, ...]
    num_instances: int
    options: dict[str, Any]

    @property
    def source(self) -> str:
        """Its function."""
        head = f"@triton.jit\ndef {self.name}({', '.join(self.parameters)}):"
        return "\n".join((head, *(f"    {line}" for line in self.lines))) + "\n"


class RegionTritonWriter(TritonWriter):
    """Writes a region's loops.

    Attributes:
        rooms: numbers in float32 of what one kernel leaves to another: sums of some rows ``p0`` for each result, and of
            each total what rows have ``q0`` and the total itself ``t0``.
    """

    dtypes: ClassVar = {**TritonWriter.dtypes, torch.int64: "tl.int64"}
    functions: ClassVar[tuple[Any, ...]] = (aten.exp, aten.log, aten.erf, aten.tanh)

    def __init__(self, loops: Loops, name: str) -> None:
        check(loops)
        self.loops, self.name, self.is_held = loops, name, is_held(loops)
        self.names: dict[fx.Node, str] = {}
        self.computing = torch.float32
        self.ordering: torch.dtype | None = None
        self.column = "c"  # what columns are called that are written of
        self.masked: Level | None = Level.ELEMENT  # of what there are many at once
        self.index = {node: index for index, node in enumerate(loops.inputs)}
        for node, index in self.index.items():
            self.names[node] = f"{'x' if node in loops.in_memory else 'n'}{index}"
        for index, node in enumerate(node for node in loops.body.nodes if node.op == "call_function"):
            self.names[node] = f"v{index}"
        self.totals = {n: i for i, n in enumerate(node for node in loops.body.nodes if node.target is ir.total)}
        self.rooms = {f"p{store.place}": self.num_instances * loops.num_columns for store in self.sums}
        for index in self.totals.values():
            self.rooms |= {f"q{index}": loops.num_rows, f"t{index}": 1}

    @classmethod
    def can_call(cls, node: fx.Node) -> bool:
        """Whether there is an operator; whole numbers are read by functions of loops alone."""
        values = (node, *node.all_input_nodes)
        return all(value.meta["val"].dtype is not torch.int64 for value in values) and super().can_call(node)

    @property
    def sums(self) -> list[Store]:
        """What is added up over all rows."""
        return [store for store in self.loops.stores if store.over_rows]

    @property
    def num_instances(self) -> int:
        """Program instances of a kernel that goes over the rows."""
        if not self.loops.has_rows:
            return -(-math.prod(self.loops.sizes) // BLOCK)
        return -(-self.loops.num_rows // self.rows_together)

    @property
    def rows_together(self) -> int:
        """Rows of an instance."""
        return max(-(-self.loops.num_rows // MOST_CHUNKS), _FEWEST_ROWS) if self.sums else 1

    @property
    def block(self) -> int:
        """Elements that an instance has in registers, of which the last ones may be none."""
        if not self.is_held:
            return COLUMNS
        return 1 << (self.loops.num_columns - 1).bit_length() if self.loops.has_rows else BLOCK

    def source(self) -> str:
        """All kernels, in the order in which they are launched."""
        return "\n".join(part.source for part in self.parts)

    @cached_property
    def parts(self) -> list[Part]:
        """Of each sweep over the rows a kernel, and those that add up what rows have given."""
        found = []
        for number in range(self.loops.num_sweeps):
            this = Sweep(self.loops, number)
            if self._goes_over_rows(this):
                found.append(self._over_rows(this))
            if this.is_last and self.sums:
                found.append(self._adding())
            if this.totals or (this.is_last and self._numbers):
                found.append(self._adding_up(this))
        return found

    @property
    def _numbers(self) -> list[Store]:
        """Results that are one number for the whole region."""
        return [store for store in self.loops.stores if not level_of(store.value)]

    def _goes_over_rows(self, this: Sweep) -> bool:
        """Whether rows are gone over one by one, and not many at once where their numbers are added up."""
        return bool(this.stores) or this.num_loops > 0

    def _given(self, needed: Iterable[fx.Node]) -> list[str]:
        """What a kernel reads to compute some values."""
        wanted = set(needed)
        read = [(node, index) for node, index in self.index.items() if node in wanted]
        found = [f"{'i' if node in self.loops.in_memory else 'n'}{index}" for node, index in read]
        return [*found, *(f"t{index}" for node, index in self.totals.items() if node in wanted)]

    # -- over the rows --------------------------------------------------------------------------------------

    def _over_rows(self, this: Sweep) -> Part:
        sums = self.sums if this.is_last else []
        results = [f"o{store.place}" for store in this.stores if not store.over_rows]
        rooms = [*(f"p{store.place}" for store in sums), *(f"q{self.totals[node]}" for node in this.totals)]
        num_warps = 4 if self.block <= 1024 else 8 if self.block <= 4096 else 16
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        if any(node.target is ir.pick for node in this.needed):
            # Assertions are left out otherwise; additions of whole numbers need none.
            options |= {"debug": True, "sanitize_overflow": False}
        return Part(
            self.name if self.loops.num_sweeps == 1 else f"{self.name}_{this.number}",
            tuple(self._lines(this) if self.is_held else self._looped(this)),
            (*self._given(this.needed), *results, *rooms),
            self.num_instances,
            options,
        )

    def _lines(self, this: Sweep) -> Iterator[str]:
        """Of an instance that holds a row, or some elements."""
        if not self.loops.has_rows:
            yield f"at = tl.program_id(0).to(tl.int64) * {self.block} + tl.arange(0, {self.block})"
            yield f"inside = at < {math.prod(self.loops.sizes)}"
            yield from self._row(this)
            return
        yield f"c = tl.arange(0, {self.block})"
        yield f"inside = c < {self.loops.num_columns}"
        if not self.sums:
            yield "r = tl.program_id(0).to(tl.int64)"
            yield from self._row(this)
            return
        sums = self.sums if this.is_last else []
        yield f"first = tl.program_id(0).to(tl.int64) * {self.rows_together}"
        yield from (f"s{store.place} = tl.zeros(({self.block},), tl.float32)" for store in sums)
        yield f"for r in range(first, tl.minimum(first + {self.rows_together}, {self.loops.num_rows})):"
        yield from (f"    {line}" for line in self._row(this))
        for store in sums:
            place = f"p{store.place} + tl.program_id(0) * {self.loops.num_columns} + c"
            yield f"tl.store({place}, s{store.place}, mask=inside)"

    def _row(self, this: Sweep) -> Iterator[str]:
        calls = [node for node in self.loops.body.nodes if node.op == "call_function"]
        for node in (*self.loops.inputs, *calls):
            if node in this.needed:
                yield from self._value(node)
        yield from self._stored(this.stores)
        yield from self._left(this)

    def _looped(self, this: Sweep) -> Iterator[str]:
        """Of an instance that goes over the columns of a row once for each of its loops."""
        yield "r = tl.program_id(0).to(tl.int64)"
        yield from self._of_numbers(this.needed)
        for depth in range(max(this.num_loops, 1 + max(map(self.loops.depth.__getitem__, this.needed), default=0))):
            row = this.rows(depth)
            for node in row:
                yield from self._value(node)
            if any(node.target is ir.pick for node in row):
                # All threads have read what was picked before one of them stores over it.
                yield "tl.debug_barrier()"
            if depth < this.num_loops:
                yield from self._loop(this, depth)
        yield from self._stored(store for store in this.stores if level_of(store.value) is Level.ROW)
        yield from self._left(this)

    def _loop(self, this: Sweep, depth: int) -> Iterator[str]:
        """Over the columns of a row."""
        found, stores = this.reductions(depth), this.element_stores(depth)
        sinks = [*map(ir.argument, found), *(store.value for store in stores)]
        if not sinks:
            return
        for node in found:
            yield f"{self._kept(node)} = tl.full(({self.block},), {_least(node)}, tl.float32)"
        yield f"for first in range(0, {self.loops.num_columns}, {self.block}):"
        yield f"    c = first + tl.arange(0, {self.block})"
        yield f"    inside = c < {self.loops.num_columns}"
        for node in this.elements(sinks):
            yield from (f"    {line}" for line in self._value(node))
        for node in found:
            kept, value = self._kept(node), f"tl.where(inside, {self.names[ir.argument(node)]}, {_least(node)})"
            both = f"{kept} + {value}" if node.target is ir.row_sum else f"tl.maximum({kept}, {value})"
            yield f"    {kept} = {both}"
        yield from (f"    {line}" for line in self._stored(stores))
        for node in found:
            yield f"{self.names[node]} = tl.{_function(node)}({self._kept(node)}, 0)"

    def _kept(self, node: fx.Node) -> str:
        """What of each place in a block is known of a row's sum or maximum."""
        return f"a{self.names[node][1:]}"

    def _of_numbers(self, needed: set[fx.Node]) -> Iterator[str]:
        """What is computed of numbers of the whole region, and needed."""
        for node in self.loops.body.nodes:
            if node in needed and not level_of(node):
                yield from self._value(node)

    def _left(self, this: Sweep) -> Iterator[str]:
        """What a row leaves to be added up."""
        return (f"tl.store(q{self.totals[node]} + r, {self.names[ir.argument(node)]})" for node in this.totals)

    def _stored(self, stores: Iterable[Store]) -> Iterator[str]:
        for store in stores:
            name = self.names[store.value]
            if store.over_rows:
                value = name if store.value.meta["val"].dtype is torch.float32 else f"{name}.to(tl.float32)"
                yield f"s{store.place} += {value}"
            elif level_of(store.value) is Level.ROW:
                yield f"tl.store(o{store.place} + r, {name})"
            else:
                where = f"r * {self.loops.num_columns} + c" if self.loops.has_rows else "at"
                yield f"tl.store(o{store.place} + {where}, {name}, mask=inside)"

    # -- what is read ---------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Iterator[str]:
        """What is loaded or computed; a number of the host is there."""
        if node.op == "call_function" and node.target is not ir.total:
            yield from self._statements(node)
        elif node.op == "call_function" or node in self.loops.in_memory:
            yield f"{self.names[node]} = tl.load({self._place(node)})"

    def _place(self, node: fx.Node) -> str:
        """Where it lies, and of which rows or elements it is there."""
        if node.target is ir.total:
            return f"t{self.totals[node]}"
        name, level = f"i{self.index[node]}", level_of(node)
        if not level:
            return name
        if not self.loops.has_rows:
            terms = list(self._terms("at", self.loops.sizes, self.loops.strides[node]))
        else:
            terms = list(self._terms("r", self.loops.sizes[:-1], self.loops.strides[node]))
            if level is Level.ELEMENT:
                terms.append(self.column if self.loops.strides[node][-1] else f"{self.column} * 0")
        is_vector = level is self.masked
        if is_vector and not terms:
            terms = ["r * 0" if self.loops.has_rows else "at * 0"]
        return " + ".join([name, *terms]) + (", mask=inside, other=0.0" if is_vector else "")

    def _terms(self, at: str, sizes: Sequence[int], strides: Sequence[int]) -> Iterator[str]:
        below = math.prod(sizes)
        for index, (size, stride) in enumerate(zip(sizes, strides, strict=False)):
            below //= size
            if stride:
                each = f"({at} // {below})" if below > 1 else at
                each = each if index == 0 else f"({each} % {size})"
                yield each if stride == 1 else f"{each} * {stride}"

    # -- single values --------------------------------------------------------------------------------------

    def _statements(self, node: fx.Node) -> Iterator[str]:
        name, target = self.names[node], node.target
        if target in ir.REDUCTIONS:
            value = self.names[ir.argument(node)]
            yield f"{name} = tl.{_function(node)}(tl.where(inside, {value}, {_least(node)}), 0)"
        elif target is ir.pick:
            yield from self._picked(node)
        elif target is ir.spread:
            value, column = map(self.names.__getitem__, node.all_input_nodes)
            yield f"{name} = tl.where({self.column} == {column}, {value}, 0.0)  # spread"
        elif target is ir.is_not:
            (number,) = node.all_input_nodes
            yield f"{name} = {self.names[number]} != {node.args[1]}  # is not"
        elif target is ir.normal_below:
            (x,) = node.all_input_nodes
            yield f"{name} = (tl.erf({self.names[x]} * {math.sqrt(0.5)}) + 1.0) * 0.5  # normal below"
        else:
            yield f"{name} = {self.expression(node)}  # {target.overloadpacket.__name__}"  # type: ignore[union-attr]

    def _picked(self, node: fx.Node) -> Iterator[str]:
        """The element in one column: of those that are held, or computed for itself."""
        value, *others = node.all_input_nodes
        column, is_wanted = map(self.names.__getitem__, others)
        width = self.loops.num_columns
        is_there = f"({is_wanted} == 0) | (({column} >= 0) & ({column} < {width}))"
        yield f'tl.device_assert({is_there}, "a target is out of bounds: there are {width} classes")'
        if self.is_held:
            here = f"(c == {column}) & {is_wanted}"
            yield f"{self.names[node]} = tl.sum(tl.where({here}, {self.names[value]}, 0.0), 0)  # pick"
            return
        yield f"at = tl.where({is_wanted}, {column}, 0)"
        elements = list(ir.computed_of([value], lambda n: level_of(n) is Level.ELEMENT))
        with self._writing(None, "at", {element: f"{self.names[element]}p" for element in elements}):
            for element in (n for n in self.loops.body.nodes if n in elements):
                yield from self._value(element)
            picked = self.names[value]
        yield f"{self.names[node]} = tl.where({is_wanted}, {picked}, 0.0)  # pick"

    @contextmanager
    def _writing(
        self, masked: Level | None, column: str = "c", names: Mapping[fx.Node, str] = MappingProxyType({})
    ) -> Iterator[None]:
        """Write of many values of a level at once, or of none, of another column, and by other names."""
        before = self.masked, self.column, self.names
        self.masked, self.column, self.names = masked, column, {**self.names, **names}
        yield
        self.masked, self.column, self.names = before

    def fill(self, value: str, dtype: torch.dtype) -> str:
        return f"tl.cast({value}, {self.dtypes[dtype]})"

    def function(self, packet: Any, x: Any) -> str:
        if packet is not aten.tanh:
            return super().function(packet, x)
        # As zgraph.codegen.vector_math has it: Triton's own is not part of its interpreter, nor the same on all GPUs.
        near = "-0.005704990588128567"
        for factor in (0.02063908986747265, -0.05373971536755562, 0.13331441581249237, -0.3333328068256378):
            near = f"tl.fma({near}, {x} * {x}, {factor})"
        far = f"(1.0 - tl.div_rn(2.0, tl.exp(2.0 * tl.minimum(tl.abs({x}), 40.0)) + 1.0))"
        signed = f"tl.where({x} < 0, -{far}, {far})"
        return f"tl.where((tl.abs({x}) < 0.625) | ({x} != {x}), tl.fma({near} * {x} * {x}, {x}, {x}), {signed})"

    # -- sums -----------------------------------------------------------------------------------------------

    def _adding(self) -> Part:
        """Sums over all rows, of those of each instance."""
        width, names = self.loops.num_columns, [f"{kind}{store.place}" for kind in "po" for store in self.sums]
        places = [store.place for store in self.sums]
        tile = f"{_SUMS_TOGETHER}, {_SUMMED_COLUMNS}"
        lines = [
            f"c = tl.program_id(0) * {_SUMMED_COLUMNS} + tl.arange(0, {_SUMMED_COLUMNS})",
            f"inside = c < {width}",
            *(f"s{place} = tl.zeros(({tile}), tl.float32)" for place in places),
            f"for first in range(0, {self.num_instances}, {_SUMS_TOGETHER}):",
            f"    k = first + tl.arange(0, {_SUMS_TOGETHER})",
            f"    at = k[:, None] * {width} + c[None, :]",
            f"    known = (k < {self.num_instances})[:, None] & inside[None, :]",
            *(f"    s{place} += tl.load(p{place} + at, mask=known, other=0.0)" for place in places),
            *(f"tl.store(o{place} + c, tl.sum(s{place}, 0), mask=inside)" for place in places),
        ]
        num_tiles = -(-width // _SUMMED_COLUMNS)
        return Part(f"{self.name}_sums", tuple(lines), tuple(names), num_tiles, {"num_warps": 8})

    def _adding_up(self, this: Sweep) -> Part:
        """Totals of what rows have left, and, in the end, what numbers are computed of them."""
        mine = {node: self.totals[node] for node in this.totals}
        numbers = self._numbers if this.is_last else []
        of_rows = set() if self._goes_over_rows(this) else this.needed - mine.keys()
        of_numbers = set(ir.computed_of(store.value for store in numbers)) - mine.keys()
        lines = [*self._of_numbers(of_rows), *(self._over_many_rows(mine, of_rows) if mine else ())]
        for node, index in mine.items():
            lines.append(f"{self.names[node]} = tl.sum(s{index}, 0).to(tl.float32)")
            lines.append(f"tl.store(t{index}, {self.names[node]})")
        lines += self._of_numbers(of_numbers - of_rows)
        lines += (f"tl.store(o{store.place}, {self.names[store.value]})" for store in numbers)
        rooms = [f"{kind}{index}" for kind in ("t" if of_rows else "qt") for index in mine.values()]
        given = [*self._given(of_rows | of_numbers), *(f"o{store.place}" for store in numbers), *rooms]
        options = {"num_warps": 4, "enable_fp_fusion": False}
        return Part(f"{self.name}_totals_{this.number}", tuple(lines), tuple(given), 1, options)

    def _over_many_rows(self, mine: Mapping[fx.Node, int], of_rows: set[fx.Node]) -> Iterator[str]:
        """Add up what rows have left, or what is computed of many rows at once."""
        yield from (f"s{index} = tl.zeros(({_ADDED},), tl.float64)" for index in mine.values())
        yield f"for first in range(0, {self.loops.num_rows}, {_ADDED}):"
        yield f"    r = first + tl.arange(0, {_ADDED}).to(tl.int64)"
        yield f"    inside = r < {self.loops.num_rows}"
        with self._writing(Level.ROW):
            for node in self.loops.body.nodes:
                if node in of_rows and level_of(node):
                    yield from (f"    {line}" for line in self._value(node))
        for node, index in mine.items():
            left = f"tl.load(q{index} + r, mask=inside, other=0.0)"
            if of_rows:
                left = f"tl.where(inside, {self.names[ir.argument(node)]}, 0.0)"
            yield f"    s{index} += {left}.to(tl.float64)"


def _least(reduction: fx.Node) -> str:
    """What changes no sum, or no maximum."""
    return "0.0" if reduction.target is ir.row_sum else 'float("-inf")'


def _function(reduction: fx.Node) -> str:
    return "sum" if reduction.target is ir.row_sum else "max"


def is_held(loops: Loops) -> bool:
    """Whether an instance has a whole row, or some elements where there are no rows, in registers."""
    return not loops.has_rows or loops.num_columns <= LONGEST_ROW


def workspace_bytes(loops: Loops) -> int:
    """What a region's kernels leave to each other while it runs."""
    return 4 * sum(RegionTritonWriter(loops, "region").rooms.values())


def check(loops: Loops) -> None:
    """Refuse what there are no kernels for.

    Raises:
        CannotWriteError: it adds up rows, each with all others, that are too long, or gives a number without rows.
    """
    if any(store.over_rows for store in loops.stores) and not is_held(loops):
        raise CannotWriteError(f"it adds up rows of {loops.num_columns} elements with each other")
    if not loops.has_rows and any(not level_of(store.value) for store in loops.stores):
        raise CannotWriteError("it gives a number")
