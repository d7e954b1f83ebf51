"""Kernels of elementwise operators, operator by operator, in a language that a ``Writer`` knows.

Every operator rounds its result to the dtype that it has in the graph. What ATen's kernels fuse into one
multiply-and-add is one here; nothing else is. Division and square root are IEEE 754's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

if TYPE_CHECKING:
    from zgraph.codegen.kernel import Kernel

aten = torch.ops.aten

OPMATH = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""What ATen computes with, where it is not the dtype of the operands."""


class Writer(ABC):
    """Writes one kernel: an expression for each operator of its body, in a variable ``v0``, ``v1``, ...

    Attributes:
        dtypes: what vectors may be of, and what that is called.
        functions: those of exp and log that the language has fast code for.
        rounds_added: whether numbers that are added are rounded to the dtype of the vectors beside them first, as ATen
            does on a CPU.
        computing: the dtype of the expression that is being written.
        ordering: the dtype of the vectors beside numbers that are rounded to it first.
    """

    dtypes: ClassVar[Mapping[torch.dtype, str]]
    functions: ClassVar[tuple[Any, ...]] = ()
    rounds_added: ClassVar[bool] = False

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.inputs = list(kernel.body.find_nodes(op="placeholder"))
        self.results = results_of(kernel)
        self.names: dict[fx.Node, str] = {}
        self.computing = torch.float32
        self.ordering: torch.dtype | None = None

    @classmethod
    def can_write(cls, body: fx.Graph) -> bool:
        """Whether it has every operator of a body, and every dtype."""
        nodes = [node for node in body.nodes if node.op in ("placeholder", "call_function")]
        vectors = [node.meta["val"].dtype for node in nodes if is_vector(node)]
        known = all(_is_number(node) or is_vector(node) for node in nodes if node.op == "placeholder")
        calls = (node for node in nodes if node.op == "call_function")
        return known and all(dtype in cls.dtypes for dtype in vectors) and all(map(cls.can_call, calls))

    @classmethod
    def can_call(cls, node: fx.Node) -> bool:
        """Whether it has the operator of a call, for what the call is given."""
        target: Any = node.target
        if not is_vector(node) or not isinstance(target, torch._ops.OpOverload):
            return False
        packet = target.overloadpacket
        if target._overloadname not in _OVERLOADS or packet not in {*ARITHMETIC, *FILLS, *cls.functions}:
            return False
        if packet is aten.pow:
            exponent = node.args[1]
            return isinstance(exponent, (int, float)) and exponent in (0.5, 1, 2)
        read = node.all_input_nodes[1:] if packet is aten.where else node.all_input_nodes
        return packet in MOVES or not any(getattr(n.meta["val"], "dtype", None) is torch.bool for n in read)

    def statements(self) -> Iterator[tuple[str, str, fx.Node]]:
        """Variables, expressions and the calls that they stand for, in order."""
        calls = (node for node in self.kernel.body.nodes if node.op == "call_function")
        for index, node in enumerate(calls):
            expression = self.expression(node)
            self.names[node] = f"v{index}"
            yield f"v{index}", expression, node

    def expression(self, node: fx.Node) -> str:
        """What a call of the body computes."""
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        dtype = node.meta["val"].dtype
        named = {key: value for key, value in node.kwargs.items() if key not in FORM}
        moved = node.args[MOVES[packet]] if packet in MOVES else None
        compared = packet in COMPARISONS
        read = [moved] if isinstance(moved, fx.Node) else node.all_input_nodes if compared else [node]
        given = reduce(torch.promote_types, [n.meta["val"].dtype for n in read if is_vector(n)] or [dtype])
        self.computing = OPMATH.get(given, given)
        self.ordering = given if packet in (*COMPARISONS[:4], *(ADDITIONS if self.rounds_added else ())) else None
        if packet in FILLS:
            self.computing = OPMATH.get(dtype, dtype)
            values = [self.read(arg) for arg in node.args[FILLS[packet][0] :][:1]] or [self.literal(FILLS[packet][1])]
            return self.fill(values[0], dtype)
        given_args = [None if arg is None else self.read(arg) for arg in node.args]
        if packet is aten.where:
            given_args[0] = self.condition(node.args[0])
        given_names = {key: self.read(value) for key, value in named.items()}
        write = ARITHMETIC.get(packet)
        text = self.function(packet, *given_args) if write is None else write(self, *given_args, **given_names)
        return self.cast(text, torch.bool if compared else self.computing, dtype)

    # -- what a language says --------------------------------------------------------------------------------

    @abstractmethod
    def read(self, arg: Any) -> str:
        """An operand in the dtype that is computed with: a value of the body, or a number."""

    @abstractmethod
    def condition(self, arg: Any) -> str:
        """An operand that is true or false."""

    @abstractmethod
    def literal(self, value: float) -> str: ...

    @abstractmethod
    def cast(self, text: str, computed: torch.dtype, dtype: torch.dtype) -> str:
        """An expression that was computed in one dtype, in the one that it has in the graph."""

    @abstractmethod
    def fill(self, value: str, dtype: torch.dtype) -> str:
        """A vector of one number."""

    @abstractmethod
    def fma(self, a: str, b: str, c: str) -> str:
        """``a * b + c``, rounded once."""

    @abstractmethod
    def div(self, a: str, b: str) -> str: ...

    @abstractmethod
    def sqrt(self, x: str) -> str: ...

    @abstractmethod
    def abs(self, x: str) -> str: ...

    @abstractmethod
    def where(self, condition: str, a: str, b: str) -> str: ...

    @abstractmethod
    def larger(self, a: str, b: str) -> str:
        """The larger one, or NaN if one is; so ``smaller``."""

    @abstractmethod
    def smaller(self, a: str, b: str) -> str: ...

    def function(self, packet: Any, x: Any) -> str:
        """A call of one of ``functions``."""
        raise NotImplementedError(packet)


def results_of(kernel: Kernel) -> list[fx.Node]:
    """The values that leave a kernel's body."""
    return list(kernel.body.output_node().args[0])  # type: ignore[arg-type]


def is_vector(node: fx.Node) -> bool:
    """Whether a value is a flat tensor."""
    val = node.meta["val"]
    return isinstance(val, torch.Tensor) and val.dim() == 1


def first_vector(body: fx.Graph) -> torch.Tensor:
    """The value of the first input that is a flat tensor: all have its length, and are on its device."""
    val: torch.Tensor = next(filter(is_vector, body.find_nodes(op="placeholder"))).meta["val"]
    return val


def places_for(kernel: Kernel, inputs: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where a kernel stores its results: the inputs that they are written over, and new vectors; and these alone."""
    like = next(value for value in inputs if isinstance(value, torch.Tensor) and value.dim())
    made: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    for node, write in zip(results_of(kernel), kernel.writes, strict=True):
        if write is None:
            made.append(torch.empty(len(like), dtype=node.meta["val"].dtype, device=like.device))
        places.append(made[-1] if write is None else inputs[write])
    return places, made


def _is_number(node: fx.Node) -> bool:
    val = node.meta["val"]
    return not val.dim() if isinstance(val, torch.Tensor) else isinstance(val, _NUMBERS)


_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)
_OVERLOADS = {"default", "Tensor", "Scalar", "self", "ScalarSelf", "ScalarOther", "Tensor_Scalar"}
FORM = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")
"""Arguments that say what a result is like."""

_ONE = ("1.0", "1.0f")


def _clamp(w: Writer, x: str, low: str | None = None, high: str | None = None, **both: str) -> str:
    low, high = low or both.get("min"), high or both.get("max")
    x = x if low is None else w.larger(x, low)
    return x if high is None else w.smaller(x, high)


def _sign(w: Writer, x: str) -> str:
    below = w.where(f"{x} < {w.literal(0)}", w.literal(-1), w.literal(0))
    return w.where(f"{x} > {w.literal(0)}", w.literal(1), below)


def _lerp(w: Writer, a: str, b: str, weight: str) -> str:
    near = w.fma(weight, f"({b} - {a})", a)
    far = w.fma(f"({a} - {b})", f"({w.literal(1)} - {weight})", b)
    if weight[0].isdigit():
        return near if float(weight.rstrip("f")) < 0.5 else far
    return w.where(f"{w.abs(weight)} < {w.literal(0.5)}", near, far)


def _power(w: Writer, x: str, exponent: str) -> str:
    exponent = exponent.rstrip("f")
    return w.sqrt(x) if exponent == "0.5" else f"{x} * {x}" if exponent == "2.0" else x


MOVES = {aten.clone: 0, aten._to_copy: 0, aten.copy: 1}
"""Operators that give one of their arguments, perhaps in another dtype."""

ADDITIONS = (aten.add, aten.sub, aten.rsub)
COMPARISONS = (aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne)

FILLS: dict[Any, tuple[int, float]] = {
    aten.full: (1, 0),
    aten.full_like: (1, 0),
    aten.zeros: (9, 0),
    aten.zeros_like: (9, 0),
    aten.ones: (9, 1),
    aten.ones_like: (9, 1),
}
"""Operators that give one number everywhere: the position of the argument that has it, or else the number."""

ARITHMETIC: dict[Any, Callable[..., str]] = {
    aten.add: lambda w, a, b, alpha="1.0": f"{a} + {b}" if alpha in _ONE else w.fma(alpha, b, a),
    aten.sub: lambda w, a, b, alpha="1.0": f"{a} - {b}" if alpha in _ONE else w.fma(f"-({alpha})", b, a),
    aten.rsub: lambda w, a, b, alpha="1.0": f"{b} - {a}" if alpha in _ONE else w.fma(f"-({alpha})", a, b),
    aten.mul: lambda _, a, b: f"{a} * {b}",
    aten.div: lambda w, a, b: w.div(a, b),
    aten.neg: lambda _, x: f"-{x}",
    aten.abs: lambda w, x: w.abs(x),
    aten.sign: _sign,
    aten.sqrt: lambda w, x: w.sqrt(x),
    aten.rsqrt: lambda w, x: w.div(w.literal(1), w.sqrt(x)),
    aten.reciprocal: lambda w, x: w.div(w.literal(1), x),
    aten.maximum: lambda w, a, b: w.larger(a, b),
    aten.minimum: lambda w, a, b: w.smaller(a, b),
    aten.clamp: _clamp,
    aten.clamp_min: lambda w, x, low: w.larger(x, low),
    aten.clamp_max: lambda w, x, high: w.smaller(x, high),
    aten.pow: _power,
    aten.lerp: _lerp,
    aten.addcmul: lambda w, a, b, c, value="1.0": w.fma(b if value in _ONE else f"({value} * {b})", c, a),
    aten.addcdiv: lambda w, a, b, c, value="1.0": w.fma(value, w.div(b, c), a),
    aten.gt: lambda _, a, b: f"{a} > {b}",
    aten.ge: lambda _, a, b: f"{a} >= {b}",
    aten.lt: lambda _, a, b: f"{a} < {b}",
    aten.le: lambda _, a, b: f"{a} <= {b}",
    aten.eq: lambda _, a, b: f"{a} == {b}",
    aten.ne: lambda _, a, b: f"{a} != {b}",
    aten.where: lambda w, condition, a, b: w.where(condition, a, b),
    aten.clone: lambda _, x: x,
    aten._to_copy: lambda _, x: x,
    aten.copy: lambda _, __, x, *___: x,
}
"""Expressions of operators."""
