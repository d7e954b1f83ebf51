"""A kernel of elementwise operators as one Triton kernel: one launch, and one pass over memory.

    v0 = lerp(m, g, w)        @triton.jit
    v1 = add(p, v0)     ->    def update(m, g, w, p, n, BLOCK): load m, g, p; ...; store over m and p

Each element is read by the program instance that writes it, before it writes, so results may lie over inputs.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from zgraph.codegen.elementwise import OPMATH, Writer, first_vector, is_vector, places_for, results_of
from zgraph.codegen.source import SourceWriter
from zgraph.errors import OptionError, first_line

if TYPE_CHECKING:
    from zgraph.codegen.kernel import Kernel

aten = torch.ops.aten

BLOCK = 1024
"""Elements of a program instance: two accesses of 16 bytes for each of its threads, in float32."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of the compiler."""

_NAN = "propagate_nan=tl.PropagateNan.ALL"


class TritonWriter(Writer):
    """Numbers reach a kernel as float32, which would be too few digits for vectors in float64."""

    dtypes: ClassVar = {
        torch.float32: "tl.float32",
        torch.bfloat16: "tl.bfloat16",
        torch.float16: "tl.float16",
        torch.bool: "tl.int1",
    }
    functions: ClassVar[tuple[Any, ...]] = (aten.exp, aten.log)

    def source(self) -> str:
        """``kernel.name(*inputs, *outputs, n, BLOCK)``: outputs that lie in no input, n elements."""
        names = [f"i{index}" for index in range(len(self.inputs))]
        made = [f"o{index}" for index, write in enumerate(self.kernel.writes) if write is None]
        lines = [
            "@triton.jit",
            f"def {self.kernel.name}({', '.join([*names, *made])}, n, BLOCK: tl.constexpr):",
            "    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
            "    inside = at < n",
        ]
        device = first_vector(self.kernel.body).device
        for node, name in zip(self.inputs, names, strict=True):
            self.names[node] = name
            if _is_pointer(node, device):
                self.names[node] = f"x{name[1:]}"
                where = f"{name} + at, mask=inside" if is_vector(node) else name
                lines.append(f"    x{name[1:]} = tl.load({where})")
        for name, expression, node in self.statements():
            lines.append(f"    {name} = {expression}  # {node.target.overloadpacket.__name__}")  # type: ignore[union-attr]
        for index, (result, write) in enumerate(zip(self.results, self.kernel.writes, strict=True)):
            place = f"o{index}" if write is None else names[write]
            lines.append(f"    tl.store({place} + at, {self.names[result]}, mask=inside)")
        return "\n".join(lines) + "\n"

    def read(self, arg: Any) -> str:
        # Literals are rounded here: what is computed of them alone, Triton computes in float64.
        rounding = self.ordering if self.ordering in OPMATH else None
        if not isinstance(arg, fx.Node):
            return self.literal(torch.tensor(float(arg), dtype=rounding or torch.float32).item())
        name, dtype = self.names[arg], getattr(arg.meta["val"], "dtype", None)
        is_other = name[0] in "xv" and dtype not in (torch.float32, torch.bool)
        if rounding is not None and not is_vector(arg):
            return f"tl.cast({name}, {self.dtypes[rounding]}).to(tl.float32)"
        return f"{name}.to(tl.float32)" if is_other else name

    def condition(self, arg: Any) -> str:
        return self.names[arg]

    def literal(self, value: float) -> str:
        return repr(float(value)) if math.isfinite(value) else f'float("{value}")'

    def cast(self, text: str, computed: torch.dtype, dtype: torch.dtype) -> str:
        return text if computed == dtype else f"({text}).to({self.dtypes[dtype]})"

    def fill(self, value: str, dtype: torch.dtype) -> str:
        return f"tl.full((BLOCK,), {value}, {self.dtypes[dtype]})"

    def fma(self, a: str, b: str, c: str) -> str:
        return f"tl.fma({a}, {b}, {c})"

    def div(self, a: str, b: str) -> str:
        return f"tl.div_rn({a}, {b})"

    def sqrt(self, x: str) -> str:
        return f"tl.sqrt_rn({x})"

    def abs(self, x: str) -> str:
        return f"tl.abs({x})"

    def where(self, condition: str, a: str, b: str) -> str:
        return f"tl.where({condition}, {a}, {b})"

    def larger(self, a: str, b: str) -> str:
        return f"tl.maximum({a}, {b}, {_NAN})"

    def smaller(self, a: str, b: str) -> str:
        return f"tl.minimum({a}, {b}, {_NAN})"

    def function(self, packet: Any, x: Any) -> str:
        return f"tl.{packet.__name__}({x})"


@cache
def is_available() -> bool:
    """Whether there is Triton here."""
    return importlib.util.find_spec("triton") is not None


def compile_kernel(kernel: Kernel) -> Callable[..., list[Any]]:
    """A function of the kernel's inputs that launches it, and gives its results. It is compiled for the GPU now.

    Raises:
        OptionError: it cannot be compiled.
    """
    jitted = define(kernel)
    try:
        with torch.cuda.device_of(first_vector(kernel.body)):  # type: ignore[no-untyped-call]
            jitted.warmup(*forms(kernel), BLOCK=BLOCK, grid=(1,), **OPTIONS)
    except Exception as error:
        raise OptionError(
            f"Triton cannot compile {kernel.name}: {first_line(error) or type(error).__name__}",
            fix="mend what it names (it needs a C compiler), or give kernels='eager'",
        ) from error
    return partial(launch, kernel, jitted)


def define(kernel: Kernel) -> Any:
    """The kernel as ``triton.jit`` makes it."""
    import triton
    import triton.language as tl

    writer = SourceWriter()
    writer.namespace |= {"triton": triton, "tl": tl}
    text = TritonWriter(kernel).source()
    return writer.compile(text, kernel.name, f"<zgraph {kernel.name} {id(kernel):x} in Triton>")


def forms(kernel: Kernel) -> list[Any]:
    """What stands for the arguments: dtypes for pointers, numbers for numbers, how many elements there are."""
    first = first_vector(kernel.body)
    found: list[Any] = []
    for node in kernel.body.find_nodes(op="placeholder"):
        dtype = getattr(node.meta["val"], "dtype", None)
        found.append(dtype if _is_pointer(node, first.device) else dtype is torch.bool or 0.5)
    made = [node.meta["val"].dtype for node, w in zip(results_of(kernel), kernel.writes, strict=True) if w is None]
    return [*found, *made, first.numel()]


def launch(kernel: Kernel, jitted: Any, *inputs: Any) -> list[torch.Tensor]:
    """Run what ``define`` gave, or an interpreter of it."""
    outputs, made = places_for(kernel, inputs)
    first = next(value for value in inputs if isinstance(value, torch.Tensor) and value.dim())
    numel = len(first)
    given = [_given(value, first.device) for value in inputs]
    if numel:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            jitted[-(-numel // BLOCK),](*given, *made, numel, BLOCK=BLOCK, **OPTIONS)
    return outputs


def _is_pointer(node: fx.Node, device: torch.device) -> bool:
    """Whether an input lies in the device's memory; a number of the host's is handed over as it is."""
    val = node.meta["val"]
    return isinstance(val, torch.Tensor) and val.device == device


def _given(value: Any, device: torch.device) -> Any:
    """An input as the launch takes it: vectors without gaps, and numbers of the host as such.

    All of them as floats: Triton compiles a kernel anew for an integer that is 1, or one that 16 divides.
    """
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value.contiguous()
        value = value.item()
    return value if isinstance(value, bool) else float(value)
