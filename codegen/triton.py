"""A kernel of elementwise operators as one Triton kernel: one launch, and one pass over memory.

    v0 = lerp(m, g, w)        @triton.jit
    v1 = add(p, v0)     ->    def update(m, g, w, p, n, BLOCK): load m, g, p; ...; store over m and p

Every operator rounds its result to the dtype that it has in the graph, and what ATen's kernels fuse into one
multiply-and-add is one here (``tl.fma``); nothing else is (``enable_fp_fusion=False``). Division and square root are
IEEE's. Each element is read by the program instance that writes it, before it writes, so results may lie over inputs.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zgraph.codegen.source import SourceWriter
from zgraph.errors import OptionError, first_line

if TYPE_CHECKING:
    from zgraph.codegen.kernel import Kernel

aten = torch.ops.aten

BLOCK = 1024
"""Elements of a program instance: two accesses of 16 bytes for each of its threads, in float32."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of the compiler."""

_DTYPES = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.bool: "tl.int1",
}
"""What vectors may be of. Numbers reach a kernel as float32, which would be too few digits for float64."""

_LOW = (torch.bfloat16, torch.float16)

_NAN = "propagate_nan=tl.PropagateNan.ALL"


def _scaled(a: str, b: str, alpha: str) -> str:
    return f"{a} + {b}" if alpha in ("1", "1.0") else f"tl.fma({alpha}, {b}, {a})"


def _clamp(x: str, low: str | None, high: str | None) -> str:
    if low is not None:
        x = f"tl.maximum({x}, {low}, {_NAN})"
    return x if high is None else f"tl.minimum({x}, {high}, {_NAN})"


def _power(x: str, exponent: str) -> str:
    return {"2": f"{x} * {x}", "0.5": f"tl.sqrt_rn({x})", "1": x}[exponent.removesuffix(".0")]


_ARITHMETIC: dict[Any, Callable[..., str]] = {
    aten.add: lambda a, b, alpha="1": _scaled(a, b, alpha),
    aten.sub: lambda a, b, alpha="1": f"{a} - {b}" if alpha in ("1", "1.0") else f"tl.fma(-({alpha}), {b}, {a})",
    aten.rsub: lambda a, b: f"{b} - {a}",
    aten.mul: lambda a, b: f"{a} * {b}",
    aten.div: lambda a, b: f"tl.div_rn({a}, {b})",
    aten.neg: lambda x: f"-{x}",
    aten.abs: lambda x: f"tl.abs({x})",
    aten.sign: lambda x: f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, 0.0))",
    aten.sqrt: lambda x: f"tl.sqrt_rn({x})",
    aten.rsqrt: lambda x: f"tl.div_rn(1.0, tl.sqrt_rn({x}))",
    aten.reciprocal: lambda x: f"tl.div_rn(1.0, {x})",
    aten.exp: lambda x: f"tl.exp({x})",
    aten.log: lambda x: f"tl.log({x})",
    aten.maximum: lambda a, b: f"tl.maximum({a}, {b}, {_NAN})",
    aten.minimum: lambda a, b: f"tl.minimum({a}, {b}, {_NAN})",
    aten.clamp: lambda x, low=None, high=None, **both: _clamp(x, low or both.get("min"), high or both.get("max")),
    aten.clamp_min: lambda x, low: _clamp(x, low, None),
    aten.clamp_max: lambda x, high: _clamp(x, None, high),
    aten.pow: _power,
    aten.lerp: lambda a, b, w: (
        f"tl.where(tl.abs({w}) < 0.5, tl.fma({w}, {b} - {a}, {a}), tl.fma({a} - {b}, 1 - {w}, {b}))"
    ),
    aten.addcmul: lambda a, b, c, value="1": f"tl.fma({value} * {b}, {c}, {a})",
    aten.addcdiv: lambda a, b, c, value="1": f"tl.fma({value}, tl.div_rn({b}, {c}), {a})",
    aten.gt: lambda a, b: f"{a} > {b}",
    aten.ge: lambda a, b: f"{a} >= {b}",
    aten.lt: lambda a, b: f"{a} < {b}",
    aten.le: lambda a, b: f"{a} <= {b}",
    aten.eq: lambda a, b: f"{a} == {b}",
    aten.ne: lambda a, b: f"{a} != {b}",
    aten.where: lambda condition, a, b: f"tl.where({condition}, {a}, {b})",
    aten.clone: lambda x, **_: x,
    aten._to_copy: lambda x, **_: x,
    aten.copy: lambda _, x: x,
}
"""Triton's expressions for operators, on operands in float32 (those of ``where``'s condition as they are)."""

_FILLS: dict[Any, Callable[..., str]] = {
    aten.full: lambda _, value, **__: value,
    aten.full_like: lambda _, value, **__: value,
    aten.zeros: lambda *_, **__: "0.0",
    aten.zeros_like: lambda *_, **__: "0.0",
    aten.ones: lambda *_, **__: "1.0",
    aten.ones_like: lambda *_, **__: "1.0",
}

_COMPARISONS = (aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne)

_MOVES = {aten.clone: 0, aten._to_copy: 0, aten.copy: 1}
"""Operators that give one of their arguments, perhaps in another dtype."""

_OVERLOADS = {"default", "Tensor", "Scalar", "self", "ScalarSelf", "ScalarOther", "Tensor_Scalar"}


def is_writable(body: fx.Graph) -> bool:
    """Whether a body can be written in Triton: every operator of it, and every dtype."""
    return all(_is_writable(node) for node in body.nodes if node.op in ("placeholder", "call_function"))


def _is_writable(node: fx.Node) -> bool:
    val = node.meta["val"]
    if isinstance(val, torch.Tensor) and val.dim() and val.dtype not in _DTYPES:
        return False
    if node.op == "placeholder":
        return isinstance(val, (torch.Tensor, float, int, torch.SymFloat, torch.SymInt))
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._overloadname not in _OVERLOADS:
        return False
    if target.overloadpacket not in _MOVES:
        read = node.all_input_nodes[1:] if target.overloadpacket is aten.where else node.all_input_nodes
        if any(isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dtype is torch.bool for n in read):
            return False
    if target.overloadpacket is aten.pow:
        exponent = node.args[1]
        return isinstance(exponent, (int, float)) and exponent in (0.5, 1, 2)
    if target.overloadpacket is aten.div and "rounding_mode" in node.kwargs:
        return False
    return target.overloadpacket in _ARITHMETIC or target.overloadpacket in _FILLS


def is_available() -> bool:
    """Whether there is Triton here."""
    return importlib.util.find_spec("triton") is not None


def source(kernel: Kernel) -> str:
    """The kernel in Triton, ``kernel.name(*inputs, *outputs, n, BLOCK)``: outputs that lie in no input, n elements."""
    return _Writer(kernel).source()


def compile_kernel(kernel: Kernel) -> Callable[..., list[Any]]:
    """A function of the kernel's inputs that launches it, and gives its results. It is compiled for the GPU now.

    Raises:
        OptionError: it cannot be compiled.
    """
    jitted = define(kernel)
    try:
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
    return writer.compile(source(kernel), kernel.name, f"<zgraph {kernel.name} {id(kernel):x} in Triton>")


def forms(kernel: Kernel) -> list[Any]:
    """What stands for the arguments: dtypes for pointers, numbers for numbers, how many elements there are."""
    inputs = kernel.body.find_nodes(op="placeholder")
    first = next(node for node in inputs if _is_vector(node)).meta["val"]
    forms: list[Any] = []
    for node in inputs:
        val = node.meta["val"]
        is_pointer = isinstance(val, torch.Tensor) and val.device == first.device
        forms.append(val.dtype if is_pointer else getattr(val, "dtype", None) is torch.bool or 0.5)
    made = [node.meta["val"].dtype for node, w in zip(_results(kernel), kernel.writes, strict=True) if w is None]
    return [*forms, *made, first.numel()]


def launch(kernel: Kernel, jitted: Any, *inputs: Any) -> list[torch.Tensor]:
    """Run what ``define`` gave, or an interpreter of it."""
    first = next(value for value in inputs if isinstance(value, torch.Tensor) and value.dim() == 1)
    numel = first.numel()
    results = [node.meta["val"].dtype for node in _results(kernel)]
    outputs = [
        torch.empty(numel, dtype=dtype, device=first.device) if write is None else inputs[write]
        for dtype, write in zip(results, kernel.writes, strict=True)
    ]
    given = [_given(value, first.device) for value in inputs]
    made = [output for output, write in zip(outputs, kernel.writes, strict=True) if write is None]
    if numel:
        jitted[-(-numel // BLOCK),](*given, *made, numel, BLOCK=BLOCK, **OPTIONS)
    return outputs


def _given(value: Any, device: torch.device) -> Any:
    """An input as the launch takes it: vectors without gaps, and numbers of the host as such."""
    if isinstance(value, torch.Tensor):
        return value.contiguous() if value.device == device else value.item()
    return value if isinstance(value, bool) else float(value)


def _results(kernel: Kernel) -> list[fx.Node]:
    return list(kernel.body.output_node().args[0])  # type: ignore[arg-type]


def _is_vector(node: fx.Node) -> bool:
    val = node.meta["val"]
    return isinstance(val, torch.Tensor) and val.dim() == 1


class _Writer:
    """Writes a kernel operator by operator, each result in a variable of the dtype that it has in the graph."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.inputs = list(kernel.body.find_nodes(op="placeholder"))
        self.results = _results(kernel)
        self.names: dict[fx.Node, str] = {}
        flat = next(node for node in self.inputs if _is_vector(node))
        self.device = flat.meta["val"].device

    def source(self) -> str:
        names = [f"i{index}" for index in range(len(self.inputs))]
        made = [f"o{index}" for index, write in enumerate(self.kernel.writes) if write is None]
        lines = [
            "@triton.jit",
            f"def {self.kernel.name}({', '.join([*names, *made])}, n, BLOCK: tl.constexpr):",
            "    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
            "    inside = at < n",
        ]
        for node, name in zip(self.inputs, names, strict=True):
            self.names[node] = name
            if _is_vector(node):
                self.names[node] = f"x{name[1:]}"
                lines.append(f"    x{name[1:]} = tl.load({name} + at, mask=inside)")
            elif self._is_pointer(node):
                self.names[node] = f"x{name[1:]}"
                lines.append(f"    x{name[1:]} = tl.load({name})")
        calls = (node for node in self.kernel.body.nodes if node.op == "call_function")
        for index, node in enumerate(calls):
            lines.append(f"    v{index} = {self._expression(node)}  # {node.target.overloadpacket.__name__}")
            self.names[node] = f"v{index}"
        for index, (result, write) in enumerate(zip(self.results, self.kernel.writes, strict=True)):
            place = f"o{index}" if write is None else names[write]
            lines.append(f"    tl.store({place} + at, {self.names[result]}, mask=inside)")
        return "\n".join(lines) + "\n"

    def _is_pointer(self, node: fx.Node) -> bool:
        """Whether a number lies in the device's memory; one of the host's is handed over as it is."""
        val = node.meta["val"]
        return isinstance(val, torch.Tensor) and val.device == self.device

    def _expression(self, node: fx.Node) -> str:
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        dtype = node.meta["val"].dtype
        named = {key: self._read(value) for key, value in node.kwargs.items() if not _is_form(key)}
        if packet in _FILLS:
            value = _FILLS[packet](
                *(self._read(arg) if not isinstance(arg, (list, tuple)) else "" for arg in node.args)
            )
            return f"tl.full((BLOCK,), {value}, {_DTYPES[dtype]})"
        text = _ARITHMETIC[packet](*map(self._read, node.args), **named)
        computed = self._computed(node, packet)
        return text if computed == dtype else f"({text}).to({_DTYPES[dtype]})"

    def _computed(self, node: fx.Node, packet: Any) -> torch.dtype:
        """The dtype that an expression has before it is rounded."""
        moved = node.args[_MOVES[packet]] if packet in _MOVES else None
        is_mask = isinstance(moved, fx.Node) and moved.meta["val"].dtype is torch.bool
        return torch.bool if is_mask or packet in _COMPARISONS else torch.float32

    def _read(self, arg: Any) -> str | None:
        """An operand; low precision is computed with in float32."""
        if arg is None:
            return None
        if not isinstance(arg, fx.Node):
            return repr(float(arg)) if math.isfinite(arg) else f'float("{arg}")'
        val = arg.meta["val"]
        name = self.names[arg]
        is_low = isinstance(val, torch.Tensor) and val.dtype in (*_LOW, torch.float64)
        return f"{name}.to(tl.float32)" if is_low and name[0] in "xv" else name


def _is_form(key: str) -> bool:
    return key in ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")
