"""A region of forward and backward as one call: norms, losses, activations and what lies around them.

Its meaning is its body, as that of every kernel; on a CPU it runs as loops in C++ (``zgraph.codegen.region_cpp``), on a
GPU in Triton (``zgraph.codegen.region_triton``). Where what compiles them is missing, ATen runs the body call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from zgraph import standalone
from zgraph.codegen import ir, region_cpp, region_launch, region_triton
from zgraph.codegen.elementwise import Writer, results_of
from zgraph.codegen.ir import CannotWriteError
from zgraph.codegen.kernel import CPP, SLICES, TRITON, Kernel, expressions
from zgraph.codegen.lowering import lower
from zgraph.codegen.region_cpp import RegionCppWriter
from zgraph.codegen.region_triton import RegionTritonWriter
from zgraph.codegen.source import SourceWriter
from zgraph.program import describe


@dataclass(frozen=True, eq=False)
class Region(Kernel):
    """Calls of ATen on tensors of any shapes.

    Equal regions, such as those of layers that are alike, are one object: it is compiled once.
    """

    def __str__(self) -> str:
        over = f" over {list(self.writes)}" if any(write is not None for write in self.writes) else ""
        return f"{self.name}{{{expressions(self.body)}{over}}}"

    def __call__(self, *inputs: Any, outs: Sequence[torch.Tensor | None] = ()) -> list[torch.Tensor]:
        """Run on real tensors, or infer on fake ones.

        Args:
            inputs: as the body takes them.
            outs: where results go, of their shapes, strides and dtypes; None for a new tensor, or for the input that
                the result is written over. Without, so are all.
        """
        fakes = any(isinstance(x, FakeTensor) for x in inputs)
        language = SLICES if fakes else self.runs_in(self.device_type)
        return self._function(language)(*inputs, outs=outs)

    def writing_over(self, writes: tuple[int | None, ...]) -> Region:
        """The same, which writes its results over inputs: see ``Kernel.writes``."""
        return replace(self, writes=writes, _functions={})

    def may_overwrite(self, place: int, index: int) -> bool:
        """Whether the result of one index may be written over the input of another."""
        writer = _WRITERS[self.device_type]
        return ir.may_overwrite(lower(self.body, writer), place, index)

    @property
    def device_type(self) -> str:
        """Where its results lie."""
        return str(self._results[0].device.type)

    @property
    def input_strides(self) -> tuple[tuple[int, ...] | None, ...]:
        """How inputs lie in memory; None for a number."""
        return tuple(_form(node.meta["val"]) for node in self.body.find_nodes(op="placeholder"))

    @property
    def forms(self) -> tuple[standalone.Form, ...]:
        """Shape, strides and dtype of each result."""
        return tuple((tuple(val.shape), tuple(val.stride()), val.dtype) for val in self._results)

    @cached_property
    def operations(self) -> tuple[int, int] | None:
        """Arithmetic operations, and exponentials and the like, of its loops in C++; None if it is in no such loops."""
        if self.language(self.device_type) != CPP:
            return None
        return region_cpp.operations(lower(self.body, RegionCppWriter))

    @cached_property
    def workspace_bytes(self) -> int:
        """Memory that it takes while it runs, beside its results."""
        language = self.language(self.device_type)
        if language == SLICES:
            return 0
        count = region_cpp.workspace_bytes if language == CPP else region_triton.workspace_bytes
        return count(lower(self.body, _WRITERS[self.device_type]))

    @cached_property
    def _results(self) -> list[torch.Tensor]:
        return [node.meta["val"] for node in results_of(self)]

    @cached_property
    def _written_in(self) -> dict[str, str]:
        found = {"cpu": CPP, "cuda": TRITON} if self.is_compiled else {}
        return {device_type: language for device_type, language in found.items() if can_write(self.body, device_type)}

    def text(self, language: str) -> str:
        """What it is in a language."""
        if language == CPP:
            return RegionCppWriter(lower(self.body, RegionCppWriter)).source()
        if language == TRITON:
            return RegionTritonWriter(lower(self.body, RegionTritonWriter), self.name).source()
        return self.source(SourceWriter())

    def _function(self, language: str) -> Callable[..., list[Any]]:
        if language not in self._functions:
            self._functions[language] = self._in_slices() if language == SLICES else self._in_loops(language)
        return self._functions[language]

    def _loops_in(self, language: str) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
        """What runs it in a language, given its inputs and where its results go.

        Raises:
            OptionError: it cannot be compiled.
        """
        if language == TRITON:
            with torch.cuda.device_of(self._results[0]):  # type: ignore[no-untyped-call]
                return region_launch.compile_region(lower(self.body, RegionTritonWriter), self.name)
        return region_cpp.compile_region(lower(self.body, RegionCppWriter))

    def _in_loops(self, language: str) -> Callable[..., list[torch.Tensor]]:
        run, device = self._loops_in(language), self._results[0].device
        return standalone.region(run, self.writes, self.input_strides, self.forms, device)

    def source(self, writer: SourceWriter, slice_size: int | None = None) -> str:
        """The body as a Python function ``kernel(*inputs, outs)``; ``writer`` collects its globals."""
        names = {node: f"i{index}" for index, node in enumerate(self.body.find_nodes(op="placeholder"))}
        lines = [f"def kernel({', '.join(names.values())}, *, outs=()):"]
        for index, node in enumerate(node for node in self.body.nodes if node.op == "call_function"):
            lines.append(f"    v{index} = {writer.call(node, names)}")
            names[node] = f"v{index}"
        lines.append(f"    found = [{', '.join(names[node] for node in results_of(self))}]")
        over = ", ".join("None" if write is None else f"i{write}" for write in self.writes)
        lines.append(f"    given = [a if b is None else b for a, b in zip(outs or [None] * len(found), [{over}])]")
        lines.append("    return [x if out is None else out.copy_(x) for x, out in zip(found, given)]")
        return "\n".join(lines) + "\n"


_WRITERS: dict[str, type[Writer]] = {"cpu": RegionCppWriter, "cuda": RegionTritonWriter}


def can_write(body: fx.Graph, device_type: str) -> bool:
    """Whether the language for a kind of device has all of a region's body."""
    if device_type not in _WRITERS:
        return False
    try:
        loops = lower(body, _WRITERS[device_type])
        if device_type == "cuda":
            region_triton.check(loops)
    except CannotWriteError:
        return False
    return True


def key_of(body: fx.Graph) -> Hashable:
    """Equal for bodies that compute alike on inputs that lie alike."""
    inputs = body.find_nodes(op="placeholder")
    return (expressions(body), tuple((describe(n.meta["val"]), _form(n.meta["val"])) for n in inputs))


def _form(val: Any) -> tuple[int, ...] | None:
    """The strides of a tensor; None for a number."""
    return tuple(val.stride()) if isinstance(val, torch.Tensor) and val.dim() else None
