"""A region's loops in C++: rows are shared by the threads, and columns lie in the processor's vectors.

    for each row:       v0 = a[c] + b[c]; s0 += v0; h[c] = v0      # a loop over columns
                        v1 = s0 / 256
                        v2 = h[c] - v1; ...                        # the next one, which needs what the first has found

Rows that a later loop needs again are kept by the thread, unless they are computed faster than they are fetched. Sums
over all rows are made of the sums of each ``ROWS_TOGETHER`` rows, which are added up in float64: results depend on no
number of threads, and round less the more rows there are.

A value of bfloat16 is a float32 that is rounded where an operator gives it, as ATen's does; memory has its upper half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from zgraph import standalone
from zgraph.codegen import ir, vector_math
from zgraph.codegen.cpp import CppWriter
from zgraph.codegen.ir import Level, Loops, Store, Sweep, level_of
from zgraph.codegen.library import load

aten = torch.ops.aten

ROWS_TOGETHER = 32
"""Rows that are added up in the dtype of their elements."""

_MOST_KEPT = 2**18
"""Bytes of rows that a thread keeps at most; what does not fit is computed again."""

_CHEAP = 4
"""Operations that take about as long as it takes to keep a number and fetch it again."""

BFLOAT16 = """\
static inline float bits_of(unsigned bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }

static inline float widen(unsigned short half) { return bits_of((unsigned)half << 16); }

// To the nearest, and of two to the even one; NaN stays NaN.
static inline unsigned upper_half(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, 4);
    const unsigned nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x == x ? nearest : 0x7fc00000u;
}

static inline unsigned short narrow(float x) { return upper_half(x) >> 16; }

static inline unsigned short half_of(float rounded) {
    unsigned bits;
    __builtin_memcpy(&bits, &rounded, 4);
    return bits >> 16;
}

static inline float rounded(float x) { return bits_of(upper_half(x) & 0xffff0000u); }
"""


class RegionCppWriter(CppWriter):
    """Writes a region's loops."""

    dtypes: ClassVar = {**CppWriter.dtypes, torch.int64: "long", torch.bfloat16: "float"}
    in_memory: ClassVar = {**dtypes, torch.bfloat16: "unsigned short"}
    functions: ClassVar[tuple[Any, ...]] = tuple(vector_math.NAMES)
    rounds_added: ClassVar[bool] = True

    def __init__(self, loops: Loops) -> None:
        self.loops = loops
        self.names: dict[fx.Node, str] = {}
        self.computing = torch.float32
        self.ordering: torch.dtype | None = None
        for index, node in enumerate(node for node in loops.body.nodes if node.op == "placeholder"):
            self.names[node] = f"{'a' if level_of(node) else 'n'}{index}"
        for index, node in enumerate(node for node in loops.body.nodes if node.op == "call_function"):
            self.names[node] = f"v{index}"
        self.partials: dict[Any, int] = {}  # what is summed over all rows, and where sums of some rows lie
        self.num_chunks = -(-loops.num_rows // ROWS_TOGETHER)
        self.workspace = 0  # numbers in float32
        self._reserve()
        self.index = "int" if loops.num_columns < 2**31 else "long"  # ints are as wide as float32

    @classmethod
    def can_call(cls, node: fx.Node) -> bool:
        """Whether there is an operator; exponentials and the like are computed in float32 alone."""
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        if packet in cls.functions and node.meta["val"].dtype not in (torch.float32, torch.bfloat16):
            return False
        # Whole numbers are compared by functions of loops; ATen's operators would compute in float32 with them.
        if any(source.meta["val"].dtype is torch.int64 for source in node.all_input_nodes):
            return False
        return super().can_call(node)

    def source(self) -> str:
        """``name(threads, inputs, outputs, workspace)``; it gives the number of rows whose column is none."""
        return "\n".join(text for _, text in self.parts())

    def parts(self) -> Iterator[tuple[str, str]]:
        """What it calls of functions that other regions may call, too, and the function itself, by their names."""
        body = "\n".join(self._lines())
        if any(f"{function}(" in body for function in ("widen", "narrow", "half_of", "rounded")):
            yield "bfloat16", BFLOAT16
        if self._has_functions():
            yield "vector_math", vector_math.SOURCE
        name = f"region_{hashlib.sha256(body.encode()).hexdigest()[:16]}"
        head = f'extern "C" long {name}(int threads, void **inputs, void **outputs, float *workspace)'
        yield name, f"{head} {{\n{body}\n    return wrong;\n}}\n"

    # -- the whole ------------------------------------------------------------------------------------------

    def _has_functions(self) -> bool:
        called = {getattr(node.target, "overloadpacket", node.target) for node in self.loops.body.nodes}
        return not called.isdisjoint({aten.exp, aten.tanh, aten.erf, ir.normal_below})

    def _reserve(self) -> None:
        """Find room for what the sums of some rows come to."""
        for node in self.loops.body.nodes:
            if node.target is ir.total:
                self.partials[node] = self._room(1, node)
        for store in self.loops.stores:
            if store.over_rows:
                self.partials[store] = self._room(self.loops.num_columns, store.value)

    def _room(self, width: int, value: fx.Node) -> int:
        start, num = self.workspace, self.num_chunks * width * (2 if value.meta["val"].dtype is torch.float64 else 1)
        self.workspace += -(-num // 16) * 16
        return start

    def _lines(self) -> Iterator[str]:
        for node, index in self.loops.inputs.items():
            if level_of(node):
                kind = self.in_memory[node.meta["val"].dtype]
                yield f"    const {kind} *i{self.names[node]} = (const {kind} *)inputs[{index}];"
            else:
                yield f"    const double {self.names[node]} = *(const double *)inputs[{index}];"
        for store in self.loops.stores:
            kind = self.in_memory[store.dtype]
            yield f"    {kind} *o{store.place} = ({kind} *)outputs[{store.place}];"
        for key, start in self.partials.items():
            kind = self._type(key) if isinstance(key, fx.Node) else self._type(key.value)
            yield f"    {kind} *p{start} = ({kind} *)(workspace + {start});"
        yield "    long wrong = 0;"
        done: set[fx.Node] = set()
        for number in range(self.loops.num_sweeps):
            this = Sweep(self.loops, number)
            yield from self._numbers(this.needed, done)
            yield from self._sweep(this)
            for node in this.totals:
                yield f"    double sum{self.names[node]} = 0;"
                start = self.partials[node]
                yield f"    for (long k = 0; k < {self.num_chunks}; k++) sum{self.names[node]} += p{start}[k];"
                yield f"    const {self._type(node)} {self.names[node]} = sum{self.names[node]};"
                done.add(node)
            for store in this.stores:
                if store.over_rows:
                    yield from self._added(store)
        numbers = [store for store in self.loops.stores if not level_of(store.value)]
        yield from self._numbers({store.value for store in numbers}, done)
        yield from (f"    o{store.place}[0] = {_stored(self.names[store.value], store)};" for store in numbers)

    def _numbers(self, needed: set[fx.Node], done: set[fx.Node]) -> Iterator[str]:
        """What is computed of numbers alone, and needed now."""
        roots = [n for node in needed for n in (node, *node.all_input_nodes) if not level_of(n)]
        found = set(ir.computed_of(roots, lambda node: not level_of(node) and node not in done))
        for node in self.loops.body.nodes:
            if node in found and node.op == "call_function":
                assert node.target is not ir.total, node
                yield f"    {self._statement(node)}"
                done.add(node)

    def _added(self, store: Store) -> Iterator[str]:
        start, width = self.partials[store], self.loops.num_columns
        yield "    #pragma omp parallel for simd num_threads(threads) if (parallel: threads > 1)"
        yield f"    for ({self.index} c = 0; c < {width}; c++) {{"
        yield "        double sum = 0;"
        yield f"        for (long k = 0; k < {self.num_chunks}; k++) sum += p{start}[k * {width} + c];"
        yield f"        o{store.place}[c] = {_stored('sum', store)};"
        yield "    }"

    # -- a sweep --------------------------------------------------------------------------------------------

    def _sweep(self, this: Sweep) -> Iterator[str]:
        rows, width = self.loops.num_rows, self.loops.num_columns
        if not this.needed:
            return
        if rows == 1:
            yield "    #pragma omp parallel for simd num_threads(threads) if (parallel: threads > 1)"
            yield from self._columns(this, 0, {}, "    ")
            return
        sums = [store for store in this.stores if store.over_rows]
        is_in_chunks = bool(sums or this.totals)
        kept = self._kept(this)
        yield "    #pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+:wrong)"
        if is_in_chunks:
            yield f"    for (long k = 0; k < {self.num_chunks}; k++) {{"
        else:
            yield f"    for (long r = 0; r < {rows}; r++) {{"
        indent = "        "
        for node in kept:
            yield f"{indent}alignas(64) {self._type(node)} k{self.names[node]}[{width}];"
        if is_in_chunks:
            for store in sums:
                kind, start = self._type(store.value), self.partials[store]
                yield f"{indent}{kind} *q{start} = p{start} + k * {width};"
                yield f"{indent}for ({self.index} c = 0; c < {width}; c++) q{start}[c] = 0;"
            for node in this.totals:
                yield f"{indent}double part{self.names[node]} = 0;"
            last = f"k * {ROWS_TOGETHER} + {ROWS_TOGETHER}"
            yield f"{indent}const long last = {last} < {rows} ? {last} : {rows};"
            yield f"{indent}for (long r = k * {ROWS_TOGETHER}; r < last; r++) {{"
            indent += "    "
        yield from self._row(this, kept, indent)
        if is_in_chunks:
            yield "        }"
            for node in this.totals:
                yield f"        p{self.partials[node]}[k] = part{self.names[node]};"
        yield "    }"

    def _row(self, this: Sweep, kept: dict[fx.Node, int], indent: str) -> Iterator[str]:
        yield from self._places(this, indent)
        for depth in range(max(this.num_loops, 1 + max(map(self.loops.depth.__getitem__, this.needed), default=0))):
            for node in this.rows(depth):
                if node.op == "placeholder":
                    read = _read(f"*x{self.names[node]}", node)
                    yield f"{indent}const {self._type(node)} {self.names[node]} = {read};"
                elif node.target is ir.pick:
                    yield from self._picked(this, node, indent)
                else:
                    yield f"{indent}{self._statement(node)}"
            if depth < this.num_loops:
                found = this.reductions(depth)
                for node in found:
                    least = "0" if node.target is ir.row_sum else "-__builtin_inf()"
                    yield f"{indent}{self._type(node)} {self.names[node]} = {least};"
                clauses = [f" reduction({'+' if n.target is ir.row_sum else 'max'}:{self.names[n]})" for n in found]
                yield f"{indent}#pragma omp simd{''.join(clauses)}"
                yield from self._columns(this, depth, kept, indent)
        for store in this.stores:
            if level_of(store.value) is Level.ROW:
                yield f"{indent}o{store.place}[r] = {_stored(self.names[store.value], store)};"
        for node in this.totals:
            yield f"{indent}part{self.names[node]} += {self.names[ir.argument(node)]};"

    def _places(self, this: Sweep, indent: str) -> Iterator[str]:
        """Where the row lies of everything that is read and stored."""
        sizes = self.loops.sizes
        below = 1
        indices: list[str] = []
        for index in reversed(range(len(sizes) - 1)):
            inner = f"r / {below}" if below > 1 else "r"
            indices.insert(0, f"({inner})" if index == 0 else f"({inner} % {sizes[index]})")
            below *= sizes[index]
        for node in self.loops.inputs:
            if node in this.needed and level_of(node):
                terms = [f"{i} * {s}" for i, s in zip(indices, self.loops.strides[node], strict=False) if s]
                place = " + ".join([f"i{self.names[node]}", *terms])
                yield f"{indent}const {self.in_memory[node.meta['val'].dtype]} *x{self.names[node]} = {place};"
        for store in this.stores:
            if level_of(store.value) is Level.ELEMENT and not store.over_rows:
                kind = self.in_memory[store.dtype]
                yield f"{indent}{kind} *y{store.place} = o{store.place} + r * {self.loops.num_columns};"

    def operations(self) -> tuple[int, int]:
        """Arithmetic operations, and exponentials and the like, of all loops over columns together."""
        found = [
            node
            for number in range(self.loops.num_sweeps)
            for this in [Sweep(self.loops, number)]
            for kept in [self._kept(this)]
            for depth in range(this.num_loops)
            for node in this.elements(self._sinks(this, depth, kept), _known(kept, depth))
        ]
        functions = sum(_is_function(node) for node in found)
        others = sum(_operations(node) for node in found if not _is_function(node))
        numel = self.loops.num_rows * self.loops.num_columns
        return others * numel, functions * numel

    def _sinks(self, this: Sweep, depth: int, kept: dict[fx.Node, int]) -> list[fx.Node]:
        """What a loop over columns is for: what it adds up, stores and keeps."""
        stored = [store.value for store in this.element_stores(depth)]
        kept_now = [node for node, first in kept.items() if first == depth]
        return [*map(ir.argument, this.reductions(depth)), *stored, *kept_now]

    def _columns(self, this: Sweep, depth: int, kept: dict[fx.Node, int], indent: str) -> Iterator[str]:
        yield f"{indent}for ({self.index} c = 0; c < {self.loops.num_columns}; c++) {{"
        inner = indent + "    "
        stores = this.element_stores(depth)
        yield from self._elements(this, self._sinks(this, depth, kept), depth, kept, inner)
        for node in (node for node, first in kept.items() if first == depth):
            yield f"{inner}k{self.names[node]}[c] = {self.names[node]};"
        for node in this.reductions(depth):
            name, value = self.names[node], self.names[ir.argument(node)]
            is_sum = node.target is ir.row_sum
            yield f"{inner}{name} {f'+= {value}' if is_sum else f'= {value} > {name} ? {value} : {name}'};"
        for store in stores:
            name = self.names[store.value]
            if store.over_rows:
                yield f"{inner}q{self.partials[store]}[c] += {name};"
            else:
                place = f"y{store.place}" if self.loops.num_rows > 1 else f"o{store.place}"
                yield f"{inner}{place}[c] = {_stored(name, store)};"
        yield f"{indent}}}"

    def _elements(
        self, this: Sweep, sinks: Sequence[fx.Node], depth: int, kept: dict[fx.Node, int], indent: str
    ) -> Iterator[str]:
        """Statements for what some elements of a column are computed of, and for themselves."""
        there = _known(kept, depth)
        read = {n for node in this.elements(sinks, there) for n in node.all_input_nodes} | set(sinks)
        for node in there:
            if node in read:
                yield f"{indent}const {self._type(node)} {self.names[node]} = k{self.names[node]}[c];"
        for node in this.elements(sinks, there):
            if node.op == "placeholder":
                place = f"x{self.names[node]}" if self.loops.num_rows > 1 else f"i{self.names[node]}"
                column = "c" if self.loops.strides[node][-1] else "0"
                value = _read(f"{place}[{column}]", node)
                yield f"{indent}const {self._type(node)} {self.names[node]} = {value};"
            else:
                yield f"{indent}{self._statement(node)}"

    def _picked(self, this: Sweep, node: fx.Node, indent: str) -> Iterator[str]:
        """The element in one column, computed for itself."""
        value, *others = node.all_input_nodes
        column, is_wanted = map(self.names.__getitem__, others)
        name = self.names[node]
        yield f"{indent}{self._type(node)} {name} = 0;"
        yield f"{indent}wrong += {is_wanted} && ({column} < 0 || {column} >= {self.loops.num_columns});"
        yield f"{indent}if ({is_wanted} && {column} >= 0 && {column} < {self.loops.num_columns}) {{"
        yield f"{indent}    const long c = {column};"
        yield from self._elements(this, [value], 0, {}, indent + "    ")
        yield f"{indent}    {name} = {self.names[value]};"
        yield f"{indent}}}"

    def _kept(self, this: Sweep) -> dict[fx.Node, int]:
        """Elements that the thread keeps for later loops, each with the loop that computes it first."""
        kept: dict[fx.Node, int] = {}
        room = _MOST_KEPT
        for depth in range(1, this.num_loops):
            sinks = [*map(ir.argument, this.reductions(depth)), *(s.value for s in this.element_stores(depth))]
            for node in this.elements(sinks, kept):
                first = self.loops.depth[node]
                size = self.loops.num_columns * node.meta["val"].itemsize
                if first < depth and node not in kept and room >= size and self._cost(node, kept) > _CHEAP:
                    kept[node] = first
                    room -= size
        return kept

    def _cost(self, node: fx.Node, kept: dict[fx.Node, int]) -> int:
        """About how many operations an element takes."""
        found = ir.computed_of([node], lambda n: level_of(n) is Level.ELEMENT and n not in kept)
        return sum(map(_operations, found))

    # -- single values --------------------------------------------------------------------------------------

    def _statement(self, node: fx.Node) -> str:
        target: Any = node.target
        if target is ir.is_not:
            number, other = node.args
            expression, kind = f"{self.names[number]} != {other}", "is not"  # type: ignore[index]
        elif target is ir.spread:
            value, column = node.args[:2]
            expression, kind = f"c == ({self.index}){self.names[column]} ? {self.names[value]} : 0", "spread"  # type: ignore[index]
        elif target is ir.normal_below:
            (x,) = node.all_input_nodes
            expression, kind = f"normal_below({self.names[x]})", "normal below"
        else:
            expression, kind = self.expression(node), target.overloadpacket.__name__
        return f"const {self._type(node)} {self.names[node]} = {expression};  // {kind}"

    def read(self, arg: Any) -> str:
        # A number that is compared or added is one of the dtype that it is compared with or added to.
        if self.ordering is not torch.bfloat16:
            return super().read(arg)
        if isinstance(arg, fx.Node):
            text = super().read(arg)
            return text if level_of(arg) else f"rounded({text})"
        return self.literal(torch.tensor(arg, dtype=torch.bfloat16).item())

    def cast(self, text: str, computed: torch.dtype, dtype: torch.dtype) -> str:
        return f"rounded({text})" if dtype is torch.bfloat16 else super().cast(text, computed, dtype)

    def fill(self, value: str, dtype: torch.dtype) -> str:
        return self.cast(value, dtype, dtype)

    def function(self, packet: Any, x: Any) -> str:
        return f"{vector_math.NAMES[packet]}({x})"


def _read(place: str, node: fx.Node) -> str:
    """What lies in memory, as a value."""
    return f"widen({place})" if node.meta["val"].dtype is torch.bfloat16 else place


def _stored(value: str, store: Store) -> str:
    """A value, as it lies in memory."""
    if store.dtype is not torch.bfloat16:
        return value
    is_rounded = not store.over_rows and store.value.meta["val"].dtype is torch.bfloat16
    return f"half_of({value})" if is_rounded else f"narrow({value})"


def workspace_bytes(loops: Loops) -> int:
    """What sums of some rows take while a region runs."""
    return 4 * RegionCppWriter(loops).workspace


def operations(loops: Loops) -> tuple[int, int]:
    """Arithmetic operations, and exponentials and the like, of a region's loops."""
    return RegionCppWriter(loops).operations()


def _known(kept: dict[fx.Node, int], depth: int) -> list[fx.Node]:
    """What earlier loops have kept."""
    return [node for node, first in kept.items() if first < depth]


def _is_function(node: fx.Node) -> bool:
    return node.target is ir.normal_below or getattr(node.target, "overloadpacket", None) in vector_math.NAMES


def _operations(node: fx.Node) -> int:
    packet = getattr(node.target, "overloadpacket", None)
    rounding = 6 if node.op == "call_function" and node.meta["val"].dtype is torch.bfloat16 else 0
    if _is_function(node):
        return 20 + rounding
    return rounding + 4 if packet in (aten.div, aten.reciprocal, aten.sqrt, aten.rsqrt) else rounding + 1


def compile_region(loops: Loops) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """A function of a region's inputs, and of where its results go.

    Raises:
        OptionError: it cannot be compiled.
    """
    writer = RegionCppWriter(loops)
    parts = dict(writer.parts())
    library = load("\n".join(parts.values()))
    return standalone.loops(library, list(parts)[-1], writer.workspace, loops.num_columns)
