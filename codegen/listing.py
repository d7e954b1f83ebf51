"""What kernels a step has: what each computes, what it moves, and its text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from zgraph.codegen.kernel import SLICES, Kernel, expressions, slice_on
from zgraph.program import Program
from zgraph.work import works


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of a step.

    Attributes:
        name: of the kernel; of an update, the bucket is part of it.
        language: that it is written in: ``"Triton"``, ``"C++"``, or ``"slices"`` for calls of ATen.
        operators: the calls that it replaces, in order.
        read_bytes, written_bytes: memory traffic, each vector once.
        num_calls: that the host makes: one, or one for each operator and slice.
        source: its text.
        module: of the model, that the last of the calls comes from; of an update, the bucket.
    """

    name: str
    language: str
    operators: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    num_calls: int
    source: str
    module: str = ""


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
        source=kernel.text(language),
        module=node.meta["origin"].module,
    )
