"""What kernels a step has: what each computes, what it moves, its text, and what was weighed against it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from zgraph.codegen.kernel import SLICES, Kernel, calls_of, slice_on
from zgraph.plans import show_bytes, show_s
from zgraph.program import Program, Weighed
from zgraph.work import works

ATEN = "ATen"
"""The language of calls that stay as they are."""


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of a step, or calls that could be one and are not.

    Attributes:
        name: of the kernel; of an update, the bucket is part of it.
        language: that it is written in: ``"Triton"``, ``"C++"``, or ``"slices"`` for calls of ATen; ``"ATen"`` where
            there is no kernel.
        operators: the calls that it replaces, in order.
        read_bytes, written_bytes: memory traffic, each vector once; 0 where there is no kernel.
        num_calls: that the host makes: one, or one for each operator and slice.
        source: its text; empty where there is no kernel.
        module: of the model, that the last of the calls comes from; of an update, the bucket.
        why: it is a kernel, or is none; empty of updates.
    """

    name: str
    language: str
    operators: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    num_calls: int
    source: str
    module: str = ""
    why: str = ""


def kernels_of(program: Program) -> list[KernelInfo]:
    """The kernels of a program, in order, and then what could be one more."""
    chosen = {(each.name, each.module): why(each) for each in program.weighed if each.is_kernel}
    nodes = [node for node in program.graph.nodes if isinstance(node.target, Kernel)]
    made = [_describe(node, node.target) for node in nodes]
    made = [replace(info, why=chosen.get((info.name, info.module), "")) for info in made]
    return [*made, *(_refused(each) for each in program.weighed if not each.is_kernel)]


def why(weighed: Weighed) -> str:
    """Why calls are a kernel, or are none."""
    if weighed.raises_peak_by:
        return f"it would raise the peak by {show_bytes(weighed.raises_peak_by)}"
    if weighed.kernel_s is None or weighed.calls_s is None:
        return "asked for"
    told = f"predicted {show_s(weighed.kernel_s)}, and {show_s(weighed.calls_s)} call by call"
    return f"{told}; compiling it takes {show_s(weighed.compiling_s)} of each step" if weighed.compiling_s else told


def _refused(weighed: Weighed) -> KernelInfo:
    num_calls = sum("getitem" not in each for each in weighed.operators)
    return KernelInfo(weighed.name, ATEN, weighed.operators, 0, 0, num_calls, "", weighed.module, why(weighed))


def _describe(node: fx.Node, kernel: Kernel) -> KernelInfo:
    (work,) = works(node, 1)
    device_type = node.meta["val"][0].device.type
    language = kernel.runs_in(device_type)
    return KernelInfo(
        name=kernel.name,
        language=language,
        operators=calls_of(kernel.body),
        read_bytes=int(work.read_bytes),
        written_bytes=int(work.written_bytes),
        num_calls=1 if language != SLICES else int(replace(work, slice_numel=slice_on(device_type)).num_calls),
        source=kernel.text(language),
        module=node.meta["origin"].module,
    )


def weighed_as_data(program: Program) -> list[dict[str, Any]]:
    """What was weighed, as plain data: those that are alike, as layers are, are one with a count."""
    counts = Counter((each.name, each.is_kernel, why(each)) for each in program.weighed)
    return [
        {"name": name, "is_kernel": is_kernel, "why": reason, "count": count}
        for (name, is_kernel, reason), count in counts.items()
    ]
