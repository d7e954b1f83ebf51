"""Write graph nodes as lines of Python.

Generated identifiers only (``v12``, ``mm``): no name from a model ever reaches the interpreter; paths and source lines
appear in comments, escaped. Literals are written out if their repr is exact; anything else is bound as a global.
"""

from __future__ import annotations

import keyword
import linecache
import math
import operator
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from zgraph.program import target_name

_INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%",
}  # fmt: skip
_MATH = {"sqrt": math.sqrt, "cos": math.cos, "sin": math.sin, "tanh": math.tanh, "float": float, "int": int}
_LOCAL = re.compile(r"[abn]|(?:si|[aiov])\d+")
"""What variables in generated functions are called; no global is (``aten.i0``, say, would be hidden by an input)."""
_TORCH_REPR = (torch.dtype, torch.layout, torch.memory_format)


class SourceWriter:
    """Collects the globals that generated lines refer to."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"torch": torch}
        self._names: dict[int, str] = {}

    def bind(self, value: Any, hint: str) -> str:
        """A global name for ``value``."""
        if id(value) not in self._names:
            stem = re.sub(r"\W", "_", hint)
            if not stem.isidentifier() or keyword.iskeyword(stem) or _LOCAL.fullmatch(stem):
                stem = f"value_{stem}"
            name, count = stem, 1
            while name in self.namespace:
                count += 1
                name = f"{stem}_{count}"
            self.namespace[name] = value
            self._names[id(value)] = name
        return self._names[id(value)]

    def literal(self, value: Any) -> str:
        """An expression for a constant."""
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
        if isinstance(value, _TORCH_REPR):
            return repr(value)
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, (list, tuple)):
            inner = ", ".join(map(self.literal, value))
            return f"[{inner}]"
        return self.bind(value, type(value).__name__)

    def argument(self, arg: Any, names: Mapping[fx.Node, str]) -> str:
        if isinstance(arg, fx.Node):
            return names[arg]
        if isinstance(arg, (list, tuple)):
            return "[" + ", ".join(self.argument(a, names) for a in arg) + "]"
        return self.literal(arg)

    def call(self, node: fx.Node, names: Mapping[fx.Node, str], target: Any = None) -> str:
        """The expression for one call, or for the same of another ``target``."""
        args = [self.argument(a, names) for a in node.args]
        return self.expression(
            target or node.target, args + [f"{key}={self.argument(value, names)}" for key, value in node.kwargs.items()]
        )

    def expression(self, target: Any, args: list[str]) -> str:
        """A call of ``target`` on arguments that are written already."""
        if target is operator.pow:
            return f"({args[0]}) ** {args[1]}"  # a negative literal binds less tightly
        if target in _INFIX:
            return f"{args[0]} {_INFIX[target]} {args[1]}"
        if target is operator.neg:
            return f"-{args[0]}"
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if target is torch.ops.aten._local_scalar_dense.default:
            return f"{args[0]}.item()"
        short = getattr(target, "__name__", "").lstrip("_").removeprefix("sym_")
        if not isinstance(target, torch._ops.OpOverload) and short in _MATH:
            return f"{self.bind(_MATH[short], short)}({', '.join(args)})"
        hint = getattr(target, "name", "kernel") if hasattr(target, "writes") else target_name(target)
        hint = hint.removeprefix("aten.").removeprefix("zgraph.into.").removesuffix(".default")
        return f"{self.bind(target, hint)}({', '.join(args)})"

    def compile(self, source: str, name: str, filename: str) -> Callable[..., Any]:
        """Compile ``source`` and return its function ``name``; tracebacks and debuggers can show its lines."""
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec"), self.namespace)  # noqa: S102
        function: Callable[..., Any] = self.namespace[name]
        weakref.finalize(function, linecache.cache.pop, filename, None)
        return function
