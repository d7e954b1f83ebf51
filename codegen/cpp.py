"""A kernel of elementwise operators as one loop in C++: one pass over memory, with the processor's vectors.

    v0 = lerp(m, g, w)        for (long i = 0; i < n; i++) {
    v1 = add(p, v0)     ->        load m, g, p; ...; store over m and p
                              }

Each element is read before it is written, so results may lie over inputs. Threads are those of torch's own OpenMP.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from zgraph.codegen.elementwise import Writer, is_vector, places_for
from zgraph.codegen.library import load

if TYPE_CHECKING:
    from zgraph.codegen.kernel import Kernel

_ADDRESS = ctypes.c_void_p


class CppWriter(Writer):
    """Without exponentials and logarithms, for which the C library has no vectors."""

    dtypes: ClassVar = {torch.float32: "float", torch.float64: "double", torch.bool: "bool"}

    def source(self) -> str:
        """``name(n, threads, vectors, numbers)``, named by its content: kernels that compute alike are one."""
        lines = []
        vectors = [node for node in self.inputs if is_vector(node)]
        numbers = [node for node in self.inputs if not is_vector(node)]
        for index, node in enumerate(vectors):
            self.names[node] = f"a{index}"
            lines.append(f"    {self._type(node)} *x{index} = ({self._type(node)} *)vectors[{index}];")
        made = [result for result, write in zip(self.results, self.kernel.writes, strict=True) if write is None]
        for index, node in enumerate(made, len(vectors)):
            lines.append(f"    {self._type(node)} *x{index} = ({self._type(node)} *)vectors[{index}];")
        for index, node in enumerate(numbers):
            self.names[node] = f"n{index}"
            lines.append(f"    const double n{index} = numbers[{index}];")
        lines += [
            "    #pragma omp parallel for simd num_threads(threads) if (parallel: threads > 1)",
            "    for (long i = 0; i < n; i++) {",
            *(f"        const {self._type(node)} a{index} = x{index}[i];" for index, node in enumerate(vectors)),
        ]
        for name, expression, node in self.statements():
            kind = node.target.overloadpacket.__name__  # type: ignore[union-attr]
            lines.append(f"        const {self._type(node)} {name} = {expression};  // {kind}")
        places = iter(range(len(vectors), len(vectors) + len(made)))
        for result, write in zip(self.results, self.kernel.writes, strict=True):
            place = next(places) if write is None else vectors.index(self.inputs[write])
            lines.append(f"        x{place}[i] = {self.names[result]};")
        text = "\n".join([*lines, "    }", "}"])
        name = f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return f'extern "C" void {name}(long n, int threads, void **vectors, const double *numbers) {{\n{text}\n'

    def _type(self, node: fx.Node) -> str:
        return self.dtypes[node.meta["val"].dtype]

    def read(self, arg: Any) -> str:
        if not isinstance(arg, fx.Node):
            return self.literal(arg)
        name, dtype = self.names[arg], getattr(arg.meta["val"], "dtype", None)
        is_same = dtype == self.computing and name[0] != "n"
        return name if is_same else f"({self.dtypes[self.computing]}){name}"

    def condition(self, arg: Any) -> str:
        name = self.names[arg]
        return f"{name} != 0" if name[0] == "n" else name

    def literal(self, value: float) -> str:
        suffix = "f" if self.computing == torch.float32 else ""
        if math.isfinite(value):
            return f"{float(value)!r}{suffix}"
        return (
            f'__builtin_nan{suffix}("")' if math.isnan(value) else f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
        )

    def cast(self, text: str, computed: torch.dtype, dtype: torch.dtype) -> str:
        return text if computed == dtype else f"({self.dtypes[dtype]})({text})"

    def fill(self, value: str, dtype: torch.dtype) -> str:
        return value

    def fma(self, a: str, b: str, c: str) -> str:
        return f"{self._builtin('fma')}({a}, {b}, {c})"

    def div(self, a: str, b: str) -> str:
        return f"{a} / {b}"

    def sqrt(self, x: str) -> str:
        return f"{self._builtin('sqrt')}({x})"

    def abs(self, x: str) -> str:
        return f"{self._builtin('fabs')}({x})"

    def where(self, condition: str, a: str, b: str) -> str:
        return f"({condition} ? {a} : {b})"

    def larger(self, a: str, b: str) -> str:
        return f"({a} > {b} || {a} != {a} ? {a} : {b})"

    def smaller(self, a: str, b: str) -> str:
        return f"({a} < {b} || {a} != {a} ? {a} : {b})"

    def _builtin(self, name: str) -> str:
        return f"__builtin_{name}{'f' if self.computing == torch.float32 else ''}"


def compile_kernel(kernel: Kernel, num_threads: Callable[[], int] = torch.get_num_threads) -> Callable[..., list[Any]]:
    """A function of the kernel's inputs that runs it, and gives its results.

    Args:
        num_threads: how many threads a run has.

    Raises:
        OptionError: it cannot be compiled.
    """
    text = CppWriter(kernel).source()
    name = text.split("(")[0].split()[-1]
    function = getattr(load(text), name)
    function.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.POINTER(_ADDRESS), ctypes.POINTER(ctypes.c_double)]
    function.restype = None
    return partial(_run, kernel, function, num_threads)


def _run(kernel: Kernel, function: Any, num_threads: Callable[[], int], *inputs: Any) -> list[torch.Tensor]:
    # What has gaps is copied; state, which is written over, has none.
    given = [value.contiguous() if isinstance(value, torch.Tensor) and value.dim() else value for value in inputs]
    vectors = [value for value in given if isinstance(value, torch.Tensor) and value.dim()]
    numbers = [float(value) for value in given if not isinstance(value, torch.Tensor) or not value.dim()]
    outputs, made = places_for(kernel, inputs)
    addresses = [vector.data_ptr() for vector in (*vectors, *made)]
    function(
        len(vectors[0]),
        num_threads(),
        (_ADDRESS * len(addresses))(*addresses),
        (ctypes.c_double * len(numbers))(*numbers),
    )
    return outputs
