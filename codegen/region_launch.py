"""Compile a region's kernels in Triton (``zgraph.codegen.region_triton``), and launch them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zgraph.codegen.ir import Loops
from zgraph.codegen.region_triton import Part, RegionTritonWriter
from zgraph.codegen.source import SourceWriter
from zgraph.errors import OptionError, first_line


@dataclass(frozen=True)
class Jitted:
    """A region's kernels as ``triton.jit`` makes them, or as an interpreter does.

    Attributes:
        writer: who wrote them.
        kernels: one for each of the writer's parts.
    """

    writer: RegionTritonWriter
    kernels: tuple[Any, ...]


def define(loops: Loops, name: str) -> Jitted:
    """A region's kernels, not compiled yet."""
    import triton
    import triton.language as tl

    writer, kernels = RegionTritonWriter(loops, name), []
    for part in writer.parts:
        source = SourceWriter()
        source.namespace |= {"triton": triton, "tl": tl}
        kernels.append(source.compile(part.source, part.name, f"<zgraph {part.name} {id(loops):x} in Triton>"))
    return Jitted(writer, tuple(kernels))


def launch(jitted: Jitted, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
    """Run a region's kernels."""
    loops, device = jitted.writer.loops, outputs[0].device
    given: dict[str, Any] = {f"o{store.place}": outputs[store.place] for store in loops.stores}
    for index, (node, read) in enumerate(loops.inputs.items()):
        if node in loops.in_memory:
            given[f"i{index}"] = inputs[read]
        else:
            given[f"n{index}"] = float(inputs[read])
    for name, num in jitted.writer.rooms.items():
        given[name] = torch.empty(num, dtype=torch.float32, device=device)
    with torch.cuda.device_of(outputs[0]):  # type: ignore[no-untyped-call]
        for part, kernel in zip(jitted.writer.parts, jitted.kernels, strict=True):
            kernel[part.num_instances,](*(given[name] for name in part.parameters), **part.options)


def compile_region(loops: Loops, name: str) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """A function of a region's inputs, and of where its results go. It is compiled for the GPU now.

    Raises:
        OptionError: it cannot be compiled.
    """
    jitted = define(loops, name)
    try:
        for part, kernel in zip(jitted.writer.parts, jitted.kernels, strict=True):
            kernel.warmup(*forms(jitted.writer, part), grid=(1,), **part.options)
    except Exception as error:
        raise OptionError(
            f"Triton cannot compile {name}: {first_line(error) or type(error).__name__}",
            fix="mend what it names (it needs a C compiler), or give kernels='update'",
        ) from error
    return lambda inputs, outputs: launch(jitted, inputs, outputs)


def forms(writer: RegionTritonWriter, part: Part) -> list[Any]:
    """What stands for the arguments of a kernel: dtypes for pointers, numbers for numbers."""
    known: dict[str, Any] = dict.fromkeys(writer.rooms, torch.float32)
    known |= {f"o{store.place}": store.dtype for store in writer.loops.stores}
    for index, node in enumerate(writer.loops.inputs):
        known |= {f"i{index}": node.meta["val"].dtype, f"n{index}": 0.5}
    return [known[name] for name in part.parameters]
