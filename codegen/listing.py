"""What kernels a step has: what each computes, what it moves, and its text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from zgraph.codegen.cpp import CppWriter
from zgraph.codegen.kernel import CPP, SLICES, TRITON, Kernel, expressions, slice_on
from zgraph.codegen.source import SourceWriter
from zgraph.codegen.triton import TritonWriter
from zgraph.program import Program
from zgraph.work import works


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of a step.

    Attributes:
        name: of the kernel; the bucket that it updates is part of it.
        language: that it is written in: ``"Triton"``, ``"C++"``, or ``"slices"`` for calls of ATen.
        operators: the calls that it replaces, in order.
        read_bytes, written_bytes: memory traffic, each vector once.
        num_calls: that the host makes: one, or one for each operator and slice.
        source: its text.
    """

    name: str
    language: str
    operators: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    num_calls: int
    source: str


def kernels_of(program: Program) -> list[KernelInfo]:
    """The kernels of a program, in order."""
    return [_describe(node, node.target) for node in program.graph.nodes if isinstance(node.target, Kernel)]


def _describe(node: fx.Node, kernel: Kernel) -> KernelInfo:
    (work,) = works(node, 1)
    device_type = node.meta["val"][0].device.type
    language = kernel.runs_in(device_type)
    return KernelInfo(
        name=kernel.name,
        language=language,
        operators=tuple(expressions(kernel.body).split("; ")[:-1]),
        read_bytes=int(work.read_bytes),
        written_bytes=int(work.written_bytes),
        num_calls=1 if language != SLICES else int(replace(work, slice_numel=slice_on(device_type)).num_calls),
        source=_source(kernel, language),
    )


def _source(kernel: Kernel, language: str) -> str:
    if language == TRITON:
        return TritonWriter(kernel).source()
    return CppWriter(kernel).source() if language == CPP else kernel.source(SourceWriter())
