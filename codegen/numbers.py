"""Operators on single numbers, 0-dim tensors, as one call: counts of steps, and what a norm says of all gradients.

    c1' = add(c1, 1)                    c1', c2' = numbers(c1, c2)
    c2' = add(c2, 1)             ->
    norm = sqrt(total)
    holds = lt(norm, inf)               norm, holds, d1', d2' = numbers(total, d1, d2, c1', c2')
    d1' = where(holds, c1', d1) ...

Each costs ATen a call, or a launch, that computes nothing to speak of. Here they are statements, one after the other,
in C++ or Triton; each rounds as ATen's does by itself, so the bits are ATen's. A number is in float32, float64, int64
or bool; hyperparameters, which the host has, are read as float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import fx

from zgraph import standalone
from zgraph.codegen.cpp import CppWriter
from zgraph.codegen.elementwise import COMPARISONS, FILLS, FORM, MOVES, Writer, is_vector, results_of
from zgraph.codegen.ir import form
from zgraph.codegen.kernel import CPP, TRITON
from zgraph.codegen.library import load
from zgraph.codegen.region import Region
from zgraph.codegen.source import SourceWriter
from zgraph.codegen.triton import TritonWriter
from zgraph.errors import OptionError, first_line
from zgraph.program import copy_graph

aten = torch.ops.aten

LOGIC: dict[Any, str] = {aten.logical_not: "!", aten.logical_and: "&&", aten.logical_or: "||"}
"""Operators on what is true or false, in C++."""

_OF_INTEGERS = frozenset(
    {
        aten.add, aten.sub, aten.rsub, aten.mul, aten.neg, aten.maximum, aten.minimum, aten.clamp, aten.clamp_min,
        aten.clamp_max, aten.where, *MOVES, *COMPARISONS, *FILLS,
    }
)  # fmt: skip
"""Operators that give whole numbers of whole numbers, or compare them."""

_OF_BOOLS = (aten.add, aten.mul)
"""Operators that take what is true for 1, in the dtype of another operand."""


@dataclass(frozen=True, eq=False)
class Numbers(Region):
    """Calls of ATen on 0-dim tensors of one device."""

    @cached_property
    def operations(self) -> tuple[int, int] | None:
        """One for each of its calls: what there is of loops in it."""
        if self.language(self.device_type) != CPP:
            return None
        return sum(node.op == "call_function" for node in self.body.nodes), 0

    @property
    def workspace_bytes(self) -> int:
        """Nothing is added up in parts."""
        return 0

    def language(self, device_type: str) -> str:
        """What it is written in where its numbers are: counts of steps are on the CPU, whatever the rest is on."""
        return super().language(self.device_type)

    def may_overwrite(self, place: int, index: int) -> bool:
        """No: what is this small gains nothing by it."""
        return False

    @cached_property
    def _written_in(self) -> dict[str, str]:
        writer = _WRITERS.get(self.device_type)
        if not self.is_compiled or writer is None or not writer.can_write(_as_vectors(self).body):
            return {}
        return {self.device_type: CPP if self.device_type == "cpu" else TRITON}

    def text(self, language: str) -> str:
        """What it is in a language."""
        if language == CPP:
            return _InCpp(self).source()
        return _InTriton(self).source() if language == TRITON else self.source(SourceWriter())

    def _loops_in(self, language: str) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
        return _in_triton(self) if language == TRITON else _in_cpp(self)


def may_write(node: fx.Node) -> bool:
    """Whether a call is part of such a kernel: it computes a number of numbers that are on its device."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, torch.Tensor) or val.dim():
        return False
    writer = _WRITERS.get(val.device.type)
    tensors = [source.meta["val"] for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)]
    if writer is None or not tensors or any(each.dim() or each.device != val.device for each in tensors):
        return False
    body = fx.Graph()
    inputs = {source: _value_of(body.placeholder("x"), source) for source in node.all_input_nodes}
    body.output([_value_of(body.node_copy(node, inputs.__getitem__), node)])
    return writer.can_write(body)


def is_of_numbers(body: fx.Graph) -> bool:
    """Whether a body has nothing but 0-dim tensors and numbers of the host."""
    vals = (node.meta["val"] for node in body.nodes if node.op != "output")
    return all(not isinstance(val, (tuple, list)) and not getattr(val, "ndim", 0) for val in vals)


def _value_of(node: fx.Node, source: fx.Node) -> fx.Node:
    """With the value of ``source``: operators promote between 0-dim tensors as between vectors, which it stands for."""
    val = source.meta["val"]
    node.meta["val"] = form(val.dtype) if isinstance(val, torch.Tensor) else val
    return node


def _as_vectors(kernel: Numbers) -> Numbers:
    body = copy_graph(kernel.body)
    for node in body.nodes:
        if node.op != "output":
            _value_of(node, node)
    return Numbers(kernel.name, body, kernel.num_inputs, kernel.writes, kernel.is_compiled)


class _OfNumbers(Writer):
    """Knows which operators mean for whole numbers, and for what is true or false, what an expression of them does."""

    functions: ClassVar[tuple[Any, ...]] = tuple(LOGIC)

    def __init__(self, kernel: Numbers) -> None:
        super().__init__(_as_vectors(kernel))

    @classmethod
    def can_call(cls, node: fx.Node) -> bool:
        """Whether it has the operator of a call, for what the call is given."""
        target: Any = node.target
        if not is_vector(node) or not isinstance(target, torch._ops.OpOverload):
            return False
        packet, mine = target.overloadpacket, node.meta["val"].dtype
        dtypes = [source.meta["val"].dtype for source in node.all_input_nodes if is_vector(source)]
        if packet in LOGIC:
            return set(dtypes) == {torch.bool}
        if packet is aten.lerp:  # of a single number ATen rounds the product, and of vectors it does not
            return False
        if torch.int64 in ((mine, *dtypes) if packet in COMPARISONS else (mine,)) and not _is_of_integers(node):
            return False
        if packet in _OF_BOOLS and torch.bool in dtypes:
            return mine is not torch.bool and target._overloadname == "Tensor" and not node.kwargs
        return super().can_call(node)


def _is_of_integers(node: fx.Node) -> bool:
    """Whether a call computes, or compares, whole numbers as such."""
    packet: Any = node.target.overloadpacket  # type: ignore[union-attr]
    literals = [arg for arg in node.args if isinstance(arg, float)]
    is_scaled = not node.kwargs.keys() <= set(FORM)
    return packet in _OF_INTEGERS and not literals and not is_scaled and all(map(is_vector, node.all_input_nodes))


class _InCpp(_OfNumbers, CppWriter):
    """``name(inputs, outputs)``: addresses, of numbers of the host, too."""

    dtypes: ClassVar = {**CppWriter.dtypes, torch.int64: "long"}

    def source(self) -> str:
        lines = []
        for index, node in enumerate(self.inputs):
            kind = self._type(node) if is_vector(node) else "double"
            self.names[node] = f"{'a' if is_vector(node) else 'n'}{index}"
            lines.append(f"    const {kind} {self.names[node]} = *(const {kind} *)inputs[{index}];")
        for name, expression, node in self.statements():
            kind = node.target.overloadpacket.__name__  # type: ignore[union-attr]
            lines.append(f"    const {self._type(node)} {name} = {expression};  // {kind}")
        for index, result in enumerate(self.results):
            lines.append(f"    *({self._type(result)} *)outputs[{index}] = {self.names[result]};")
        text = "\n".join(lines)
        name = f"numbers_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return f'extern "C" void {name}(void **inputs, void **outputs) {{\n{text}\n}}\n'

    def literal(self, value: float) -> str:
        return str(int(value)) if self.computing in _WHOLE else super().literal(value)

    def function(self, packet: Any, *args: Any) -> str:
        return f"!{args[0]}" if packet is aten.logical_not else f"{args[0]} {LOGIC[packet]} {args[1]}"


class _InTriton(_OfNumbers, TritonWriter):
    """``name(*inputs, *results)``, run by one instance."""

    dtypes: ClassVar = {
        torch.float32: "tl.float32",
        torch.float64: "tl.float64",
        torch.int64: "tl.int64",
        torch.bool: "tl.int1",
    }

    @classmethod
    def can_call(cls, node: fx.Node) -> bool:
        """Whether it has an operator: numbers of the host would come in float32, and exponents are no literals."""
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        return all(map(is_vector, node.all_input_nodes)) and packet is not aten.pow and super().can_call(node)

    def source(self) -> str:
        given = [f"i{index}" for index in range(len(self.inputs))]
        made = [f"o{index}" for index in range(len(self.results))]
        lines = ["@triton.jit", f"def {self.kernel.name}({', '.join([*given, *made])}):"]
        for node, name in zip(self.inputs, given, strict=True):
            self.names[node] = f"x{name[1:]}"
            whole = ".to(tl.int1)" if node.meta["val"].dtype is torch.bool else ""
            lines.append(f"    {self.names[node]} = tl.load({name}){whole}")
        for name, expression, node in self.statements():
            lines.append(f"    {name} = {expression}  # {node.target.overloadpacket.__name__}")  # type: ignore[union-attr]
        for result, name in zip(self.results, made, strict=True):
            lines.append(f"    tl.store({name}, {self.names[result]})")
        return "\n".join(lines) + "\n"

    def read(self, arg: Any) -> str:
        if not isinstance(arg, fx.Node):
            return self.literal(arg)
        is_same = arg.meta["val"].dtype == self.computing
        return self.names[arg] if is_same else f"{self.names[arg]}.to({self.dtypes[self.computing]})"

    def literal(self, value: float) -> str:
        text = repr(int(value)) if self.computing in _WHOLE else super().literal(value)
        return f"tl.full((), {text}, {self.dtypes[self.computing]})"

    def fill(self, value: str, dtype: torch.dtype) -> str:
        return value

    def div(self, a: str, b: str) -> str:
        return super().div(a, b) if self.computing is torch.float32 else f"{a} / {b}"

    def sqrt(self, x: str) -> str:
        return super().sqrt(x) if self.computing is torch.float32 else f"tl.sqrt({x})"

    def larger(self, a: str, b: str) -> str:
        return f"tl.where(({a} > {b}) | ({a} != {a}), {a}, {b})"

    def smaller(self, a: str, b: str) -> str:
        return f"tl.where(({a} < {b}) | ({a} != {a}), {a}, {b})"

    def function(self, packet: Any, *args: Any) -> str:
        if packet is aten.logical_not:
            return f"{args[0]} == 0"
        return f"{args[0]} {'&' if packet is aten.logical_and else '|'} {args[1]}"


_WHOLE = (torch.int64, torch.bool)

_WRITERS: dict[str, type[_InCpp | _InTriton]] = {"cpu": _InCpp, "cuda": _InTriton}


def _in_cpp(kernel: Numbers) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """A function of inputs, and of where results go.

    Raises:
        OptionError: it cannot be compiled.
    """
    text = kernel.text(CPP)
    return standalone.numbers(load(text), text.split("(")[0].split()[-1])


def define(kernel: Numbers) -> Any:
    """The kernel as ``triton.jit`` makes it."""
    import triton
    import triton.language as tl

    writer = SourceWriter()
    writer.namespace |= {"triton": triton, "tl": tl}
    return writer.compile(kernel.text(TRITON), kernel.name, f"<zgraph {kernel.name} {id(kernel):x} in Triton>")


def forms(kernel: Numbers) -> list[torch.dtype]:
    """What the pointers are to, in the order of the kernel's arguments."""
    nodes = (*kernel.body.find_nodes(op="placeholder"), *results_of(kernel))
    return [node.meta["val"].dtype for node in nodes]


def _in_triton(kernel: Numbers) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """The same, compiled for the GPU now.

    Raises:
        OptionError: it cannot be compiled.
    """
    jitted, device = define(kernel), kernel._results[0]
    try:
        with torch.cuda.device_of(device):  # type: ignore[no-untyped-call]
            jitted.warmup(*forms(kernel), grid=(1,), **_OPTIONS)
    except Exception as error:
        raise OptionError(
            f"Triton cannot compile {kernel.name}: {first_line(error) or type(error).__name__}",
            fix="mend what it names (it needs a C compiler), or give kernels='update'",
        ) from error

    def run(inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        with torch.cuda.device_of(outputs[0]):  # type: ignore[no-untyped-call]
            jitted[(1,)](*inputs, *outputs, **_OPTIONS)

    return run


_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Of the compiler."""
