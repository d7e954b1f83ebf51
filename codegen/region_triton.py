"""A region's loops in Triton: a program instance has a whole row in registers, so all its sums are at hand.

    for each row:  for each column:  ...        @triton.jit
                   for each column:  ...   ->   def region(i0, ..., o0, ...): a row is loaded once, and stored once

Without rows, an instance has ``BLOCK`` elements. Sums over all rows are made of those of a few hundred instances, each
of which goes over rows that follow each other; a second, small kernel adds them up in order, so results are the same
in every run. Sums of everything, as losses have, and rows that no registers hold stay with ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from zgraph.codegen import ir
from zgraph.codegen.ir import CannotWriteError, Level, Loops, Store, Sweep, level_of
from zgraph.codegen.source import SourceWriter
from zgraph.codegen.triton import BLOCK, TritonWriter
from zgraph.errors import OptionError, first_line

aten = torch.ops.aten

LONGEST_ROW = 8192
"""Elements of a row that an instance holds, a few dozen values of each at a time."""

MOST_CHUNKS = 512
"""Instances that add up rows: a few for each multiprocessor."""

_FEWEST_ROWS = 4
"""Rows that are added up before anything is written."""


class RegionTritonWriter(TritonWriter):
    """Writes a region's loops."""

    functions: ClassVar[tuple[Any, ...]] = (aten.exp, aten.log, aten.erf, aten.tanh)

    def __init__(self, loops: Loops, name: str) -> None:
        check(loops)
        self.loops, self.name = loops, name
        self.this = Sweep(loops, 0)
        self.names: dict[fx.Node, str] = {}
        self.computing = torch.float32
        self.ordering: torch.dtype | None = None
        for index, node in enumerate(loops.inputs):
            self.names[node] = f"{'x' if node in loops.in_memory else 'n'}{index}"
        for index, node in enumerate(node for node in loops.body.nodes if node.op == "call_function"):
            self.names[node] = f"v{index}"

    @property
    def sums(self) -> list[Store]:
        """What is added up over all rows."""
        return [store for store in self.loops.stores if store.over_rows]

    @property
    def num_instances(self) -> int:
        """Program instances of the kernel that goes over the rows."""
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
        return 1 << (self.loops.num_columns - 1).bit_length() if self.loops.has_rows else BLOCK

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler."""
        return {"num_warps": 4 if self.block <= 1024 else 8 if self.block <= 4096 else 16, "enable_fp_fusion": False}

    def source(self) -> str:
        """``name(*inputs, *results, *sums of some rows)``, and, where there are such sums, what adds them up."""
        return "\n".join([*self._kernel(), *(self._adding() if self.sums else ())]) + "\n"

    # -- the kernel -----------------------------------------------------------------------------------------

    def _parameters(self) -> list[str]:
        is_read = self.loops.in_memory
        given = [f"i{index}" if node in is_read else f"n{index}" for index, node in enumerate(self.loops.inputs)]
        results = [f"o{store.place}" for store in self.loops.stores if not store.over_rows]
        return [*given, *results, *(f"p{store.place}" for store in self.sums)]

    def _kernel(self) -> Iterator[str]:
        yield "@triton.jit"
        yield f"def {self.name}({', '.join(self._parameters())}):"
        if not self.loops.has_rows:
            yield f"    at = tl.program_id(0).to(tl.int64) * {self.block} + tl.arange(0, {self.block})"
            yield f"    inside = at < {math.prod(self.loops.sizes)}"
            yield from self._row("    ")
            return
        yield f"    c = tl.arange(0, {self.block})"
        yield f"    inside = c < {self.loops.num_columns}"
        if not self.sums:
            yield "    r = tl.program_id(0).to(tl.int64)"
            yield from self._row("    ")
            return
        yield f"    first = tl.program_id(0).to(tl.int64) * {self.rows_together}"
        yield from (f"    s{store.place} = tl.zeros(({self.block},), tl.float32)" for store in self.sums)
        yield f"    for r in range(first, tl.minimum(first + {self.rows_together}, {self.loops.num_rows})):"
        yield from self._row("        ")
        for store in self.sums:
            place = f"p{store.place} + tl.program_id(0) * {self.loops.num_columns} + c"
            yield f"    tl.store({place}, s{store.place}, mask=inside)"

    def _row(self, indent: str) -> Iterator[str]:
        for index, node in enumerate(self.loops.inputs):
            if not level_of(node) and node in self.loops.in_memory:
                yield f"{indent}x{index} = tl.load(i{index})"
            elif level_of(node) is Level.ROW:
                yield f"{indent}x{index} = tl.load(i{index}{self._of_row(node)})"
            elif level_of(node) is Level.ELEMENT:
                yield f"{indent}x{index} = tl.load(i{index}{self._of_element(node)}, mask=inside, other=0.0)"
        for node in self.loops.body.nodes:
            if node.op == "call_function":
                yield f"{indent}{self._statement(node)}"
        for store in self.loops.stores:
            name = self.names[store.value]
            if store.over_rows:
                value = name if store.value.meta["val"].dtype is torch.float32 else f"{name}.to(tl.float32)"
                yield f"{indent}s{store.place} += {value}"
            elif level_of(store.value) is Level.ROW:
                yield f"{indent}tl.store(o{store.place} + r, {name})"
            else:
                where = f"r * {self.loops.num_columns} + c" if self.loops.has_rows else "at"
                yield f"{indent}tl.store(o{store.place} + {where}, {name}, mask=inside)"

    def _of_row(self, node: fx.Node) -> str:
        """Where the row lies of what is read."""
        return "".join(f" + {term}" for term in self._terms("r", self.loops.sizes[:-1], self.loops.strides[node]))

    def _of_element(self, node: fx.Node) -> str:
        strides = self.loops.strides[node]
        if self.loops.has_rows:
            return self._of_row(node) + (" + c" if strides[-1] else " + c * 0")
        terms = list(self._terms("at", self.loops.sizes, strides))
        return "".join(f" + {term}" for term in terms or ["at * 0"])

    def _terms(self, at: str, sizes: Sequence[int], strides: Sequence[int]) -> Iterator[str]:
        below = math.prod(sizes)
        for index, (size, stride) in enumerate(zip(sizes, strides, strict=False)):
            below //= size
            if stride:
                inner = f"{at} // {below}" if below > 1 else at
                yield f"({inner}) * {stride}" if index == 0 else f"(({inner}) % {size}) * {stride}"

    def _statement(self, node: fx.Node) -> str:
        target: Any = node.target
        if target in ir.REDUCTIONS:
            function, least = ("sum", "0.0") if target is ir.row_sum else ("max", 'float("-inf")')
            value = self.names[ir.argument(node)]
            return f"{self.names[node]} = tl.{function}(tl.where(inside, {value}, {least}), 0)"
        if target is ir.normal_below:
            (x,) = node.all_input_nodes
            return f"{self.names[node]} = (tl.erf({self.names[x]} * {math.sqrt(0.5)}) + 1.0) * 0.5  # normal below"
        return f"{self.names[node]} = {self.expression(node)}  # {target.overloadpacket.__name__}"

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

    # -- sums over all rows ---------------------------------------------------------------------------------

    def _adding(self) -> Iterator[str]:
        width = self.loops.num_columns
        names = [f"{kind}{store.place}" for kind in "po" for store in self.sums]
        yield "\n@triton.jit"
        yield f"def {self.name}_sums({', '.join(names)}):"
        yield "    c = tl.program_id(0) * 128 + tl.arange(0, 128)"
        yield f"    inside = c < {width}"
        yield from (f"    s{store.place} = tl.zeros((128,), tl.float32)" for store in self.sums)
        yield f"    for k in range({self.num_instances}):"
        for store in self.sums:
            yield f"        s{store.place} += tl.load(p{store.place} + k * {width} + c, mask=inside, other=0.0)"
        for store in self.sums:
            yield f"    tl.store(o{store.place} + c, s{store.place}, mask=inside)"


def workspace_bytes(loops: Loops) -> int:
    """What sums of some rows take while a region runs."""
    writer = RegionTritonWriter(loops, "region")
    return 4 * writer.num_instances * loops.num_columns * len(writer.sums)


def check(loops: Loops) -> None:
    """Refuse what an instance cannot hold.

    Raises:
        CannotWriteError: it adds up everything, or has rows that are too long.
    """
    if any(node.target in (ir.total, ir.pick, ir.spread) for node in loops.body.nodes):
        raise CannotWriteError("it adds up everything")
    if loops.has_rows and loops.num_columns > LONGEST_ROW:
        raise CannotWriteError(f"it has rows of {loops.num_columns} elements")
    if any(not level_of(store.value) for store in loops.stores):
        raise CannotWriteError("it gives a number")


@dataclass(frozen=True)
class Jitted:
    """A region's kernels as ``triton.jit`` makes them, or as an interpreter does.

    Attributes:
        writer: who wrote them.
        rows: goes over the rows.
        sums: adds up what instances have found; None where there is nothing to add up.
    """

    writer: RegionTritonWriter
    rows: Any
    sums: Any


def define(loops: Loops, name: str) -> Jitted:
    """A region's kernels, not compiled yet."""
    import triton
    import triton.language as tl

    written = RegionTritonWriter(loops, name)
    text = written.source()
    source = SourceWriter()
    source.namespace |= {"triton": triton, "tl": tl}
    rows = source.compile(text, name, f"<zgraph {name} {id(loops):x} in Triton>")
    return Jitted(written, rows, source.namespace.get(f"{name}_sums"))


def launch(jitted: Jitted, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
    """Run a region's kernels."""
    writer = jitted.writer
    given = [inputs[index] for index in writer.loops.inputs.values()]
    is_read = writer.loops.in_memory
    numbers = [x if node in is_read else float(x) for node, x in zip(writer.loops.inputs, given, strict=True)]
    results = [outputs[store.place] for store in writer.loops.stores if not store.over_rows]
    sums = [outputs[store.place] for store in writer.sums]
    width = writer.loops.num_columns
    shape = (writer.num_instances, width)
    partial = [torch.empty(shape, dtype=torch.float32, device=outputs[0].device) for _ in sums]
    with torch.cuda.device_of(outputs[0]):  # type: ignore[no-untyped-call]
        jitted.rows[writer.num_instances,](*numbers, *results, *partial, **writer.options)
        if sums:
            jitted.sums[-(-width // 128),](*partial, *sums, num_warps=4)


def compile_region(loops: Loops, name: str) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """A function of a region's inputs, and of where its results go. It is compiled for the GPU now.

    Raises:
        OptionError: it cannot be compiled.
    """
    jitted = define(loops, name)
    writer = jitted.writer
    try:
        jitted.rows.warmup(*forms(writer), grid=(1,), **writer.options)
        if writer.sums:
            dtypes = [torch.float32] * len(writer.sums)
            jitted.sums.warmup(*dtypes, *(store.dtype for store in writer.sums), grid=(1,), num_warps=4)
    except Exception as error:
        raise OptionError(
            f"Triton cannot compile {name}: {first_line(error) or type(error).__name__}",
            fix="mend what it names (it needs a C compiler), or give kernels='update'",
        ) from error
    return lambda inputs, outputs: launch(jitted, inputs, outputs)


def forms(writer: RegionTritonWriter) -> list[Any]:
    """What stands for the arguments of the kernel that goes over the rows: dtypes for pointers, numbers for numbers."""
    is_read = writer.loops.in_memory
    given = [node.meta["val"].dtype if node in is_read else 0.5 for node in writer.loops.inputs]
    results = [store.dtype for store in writer.loops.stores if not store.over_rows]
    return [*given, *results, *(torch.float32 for _ in writer.sums)]
