"""A region of elementwise operators as one call that overwrites its inputs.

A ``Kernel`` is the target of a single program node; its meaning is its body. On a GPU it is one Triton kernel, on a CPU
one loop in C++, where its body can be written so and there is what compiles it. Otherwise ATen runs it in slices that
stay in cache, so a chain of a dozen operators reads and writes memory once and needs no temporaries of full size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from zgraph.codegen import cpp, library, triton
from zgraph.codegen.cpp import CppWriter
from zgraph.codegen.elementwise import first_vector, is_vector, results_of
from zgraph.codegen.source import SourceWriter
from zgraph.codegen.triton import TritonWriter
from zgraph.into import out_overload
from zgraph.program import copy_graph, show, target_name

TRITON, CPP, INDUCTOR, SLICES = "Triton", "C++", "Inductor", "slices"
"""What a kernel can be written in."""

SLICE = 65536
"""Elements per slice on a CPU: few enough to stay in cache (256 KiB in float32), enough to hide the cost of a call."""

LARGE_SLICE = 64 * SLICE
"""On other devices, where each call takes the host about as long, and caches are larger: 16 MiB in float32."""


def _why_not(language: str) -> str | None:
    """Why kernels in a language cannot be compiled here."""
    if language == TRITON and not triton.is_available():
        return "Triton is not installed"
    return library.problem() if language == CPP else None


def slice_on(device_type: str) -> int:
    """Elements that a kernel works on at once."""
    return SLICE if device_type == "cpu" else LARGE_SLICE


@dataclass(frozen=True, eq=False)
class Kernel:
    """Elementwise operators on flat tensors of equal length.

    Attributes:
        name: for messages and generated code.
        body: placeholders are the inputs in order, tensors and numbers; the output's argument is the list of results.
        num_inputs: number of placeholders.
        writes: for each result, the index of the input that it overwrites, or None for a new tensor.
        is_compiled: where its language has all of the body, it is one loop in Triton or C++.
    """

    name: str
    body: fx.Graph
    num_inputs: int
    writes: tuple[int | None, ...]
    is_compiled: bool = False
    _functions: dict[str, Callable[..., list[Any]]] = field(default_factory=dict, repr=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        """The body as an expression list, independent of node names."""
        return f"{self.name}{{{expressions(self.body)} over {list(self.writes)}}}"

    def copy(self) -> Kernel:
        """A kernel with a body of its own."""
        return replace(self, body=copy_graph(self.body), _functions={})

    def __call__(self, *inputs: Any) -> list[torch.Tensor]:
        """Run on real tensors, or infer on fake ones."""
        flat = next(x for x in inputs if isinstance(x, torch.Tensor) and x.dim())
        language = SLICES if isinstance(flat, FakeTensor) else self.runs_in(flat.device.type)
        return self._function(language)(*inputs)

    def language(self, device_type: str) -> str:
        """One of ``TRITON``, ``CPP`` and ``SLICES``: what it is written in, for a kind of device.

        A vector of one slice is as fast in slices, and costs no compiler's time.
        """
        return self._written_in.get(device_type, SLICES)

    @property
    def device_type(self) -> str:
        """Where its inputs lie."""
        return first_vector(self.body).device.type

    @cached_property
    def _written_in(self) -> dict[str, str]:
        """The language that has all of the body, by kind of device: it runs in every step, and is worked out once."""
        found: dict[str, str] = {}
        if self.is_compiled and TritonWriter.can_write(self.body):
            found["cuda"] = TRITON
        if self.is_compiled and first_vector(self.body).numel() > SLICE and CppWriter.can_write(self.body):
            found["cpu"] = CPP
        return found

    def runs_in(self, device_type: str) -> str:
        """The language that it runs in here: slices, where nothing compiles another one."""
        language = self.language(device_type)
        return SLICES if _why_not(language) else language

    def why_in_slices(self) -> str | None:
        """What keeps it from being compiled here; None where it is compiled, or meant to run in slices."""
        return _why_not(self.language(self.device_type))

    def prepare(self) -> None:
        """Compile, before a step needs it.

        Raises:
            OptionError: it cannot be compiled.
        """
        self._function(self.runs_in(self.device_type))

    def _function(self, language: str) -> Callable[..., list[Any]]:
        if language not in self._functions:
            make = {TRITON: triton.compile_kernel, CPP: cpp.compile_kernel, SLICES: Kernel._in_slices}[language]
            self._functions[language] = make(self)
        return self._functions[language]

    def text(self, language: str) -> str:
        """What it is in a language."""
        if language == TRITON:
            return TritonWriter(self).source()
        return CppWriter(self).source() if language == CPP else self.source(SourceWriter())

    def source(self, writer: SourceWriter, slice_size: int | None = None) -> str:
        """The kernel as a Python function ``kernel(*inputs)``; ``writer`` collects its globals."""
        return _Slices(self, writer, slice_size).source()

    def _in_slices(self) -> Callable[..., list[Any]]:
        writer = SourceWriter()
        return writer.compile(self.source(writer), "kernel", f"<zgraph {self.name} {id(self):x}>")


class _Slices:
    """Writes a kernel as a loop over slices.

    Within a slice, an operator stores its result where a value lies that nothing reads any more: over the input that
    the result replaces, or over one of its own arguments. The slices of one iteration stay in cache.
    """

    def __init__(self, kernel: Kernel, writer: SourceWriter, slice_size: int | None) -> None:
        self.kernel, self.writer = kernel, writer
        self.inputs = list(kernel.body.find_nodes(op="placeholder"))
        self.flat = [node for node in self.inputs if is_vector(node)]
        self.slice_size = slice_size or slice_on(self.flat[0].meta["val"].device.type)
        self.results = results_of(kernel)
        self.donors = {
            result: self.inputs[write]
            for result, write in zip(self.results, kernel.writes, strict=True)
            if write is not None
        }
        self.order = {node: i for i, node in enumerate(kernel.body.nodes)}
        self.last_read = {node: max((self.order[u] for u in node.users), default=-1) for node in kernel.body.nodes}
        self.home: dict[fx.Node, str] = {}  # the variable a value lies in
        self.content: dict[str, fx.Node] = {}  # the value that lies in a variable

    def source(self) -> str:
        names = {node: f"i{index}" for index, node in enumerate(self.inputs)}
        lines = [f"def kernel({', '.join(names.values())}):", f"    n = {names[self.flat[0]]}.shape[0]"]
        for index, result in enumerate(self.results):
            if result in self.donors:
                lines.append(f"    o{index} = {names[self.donors[result]]}")
            else:
                dtype = self.writer.literal(result.meta["val"].dtype)
                lines.append(f"    o{index} = torch.empty(n, dtype={dtype}, device={names[self.flat[0]]}.device)")
        lines.append(f"    for a in range(0, n, {self.slice_size}):")
        lines.append(f"        b = min(a + {self.slice_size}, n)")
        for node, name in names.items():
            self._put(node, f"s{name}" if is_vector(node) else name)
            if is_vector(node):
                lines.append(f"        s{name} = {name}[a:b]")
        lines += [f"        {self._statement(n)}" for n in self.kernel.body.nodes if n.op == "call_function"]
        for index, result in enumerate(self.results):
            if result not in self.donors or self.home[result] != f"s{names[self.donors[result]]}":
                lines.append(f"        o{index}[a:b].copy_({self.home[result]})")
        outs = [f"o{index}" for index in range(len(self.results))]
        return "\n".join([*lines, f"    return [{', '.join(outs)}]"]) + "\n"

    def _put(self, node: fx.Node, place: str) -> None:
        self.home[node] = place
        self.content[place] = node

    def _statement(self, node: fx.Node) -> str:
        place = self._free_place(node)
        found = out_overload(node.target) if isinstance(node.target, torch._ops.OpOverload) else None
        args = [self._argument(arg, node) for arg in node.args]
        args += [f"{key}={self._argument(arg, node)}" for key, arg in node.kwargs.items()]
        if place is None or found is None:
            place = f"v{self.order[node]}"
            expression = self.writer.expression(node.target, args)
        else:
            target, out = found
            expression = self.writer.expression(target, [*args, f"{out}={place}"])
        self._put(node, place)
        return f"{place} = {expression}"

    def _argument(self, arg: Any, node: fx.Node) -> str:
        val = node.meta["val"]
        if isinstance(arg, (list, tuple)) and list(arg) == list(val.shape):
            return "[b - a]"  # the size of a tensor that is created
        return self.writer.argument(arg, self.home)

    def _free_place(self, node: fx.Node) -> str | None:
        """A variable of the right dtype whose content nothing reads after ``node``."""
        slices = {donor: f"si{self.inputs.index(donor)}" for donor in self.donors.values()}
        places = [slices[self.donors[node]]] if node in self.donors else []
        # A result that lay over another result's input would be lost when that one is stored there.
        allowed = list(places) if node in self.results else list(slices.values())
        places += [self.home[source] for source in node.all_input_nodes if is_vector(source)]
        for place in places:
            held = self.content[place]
            if (
                (place in allowed or place.startswith("v"))
                and held.meta["val"].dtype == node.meta["val"].dtype
                and self.last_read[held] <= self.order[node]
            ):
                return place
        return None


def expressions(body: fx.Graph) -> str:
    """A body as an expression list, independent of node names."""
    number = {node: f"%{i}" for i, node in enumerate(body.nodes)}
    lines = [
        f"{number[n]} = {target_name(n.target)}({', '.join(show(a, number) for a in n.args)}"
        + "".join(f", {k}={show(v, number)}" for k, v in sorted(n.kwargs.items()))
        + ")"
        for n in body.nodes
        if n.op == "call_function"
    ]
    return "; ".join([*lines, f"return {show(body.output_node().args[0], number)}"])


def calls_of(body: fx.Graph) -> tuple[str, ...]:
    """The calls of a body, in order."""
    return tuple(expressions(body).split("; ")[:-1])


def region(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """Copy ``nodes`` into a graph of their own.

    Returns:
        The graph and the outside nodes that its placeholders stand for, in order.
    """
    body = fx.Graph()
    inside = set(nodes)
    copies: dict[fx.Node, fx.Node] = {}
    outside: list[fx.Node] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in copies:
                copies[source] = body.placeholder(f"in{len(outside)}")
                copies[source].meta["val"] = source.meta["val"]
                outside.append(source)
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output([copies[node] for node in results])
    return body, outside
