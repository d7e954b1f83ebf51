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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from zgraph.program import target_name

_INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.pow: "**", operator.mod: "%",
}  # fmt: skip
_MATH = {"sqrt": math.sqrt, "cos": math.cos, "sin": math.sin, "tanh": math.tanh, "float": float, "int": int}
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
            if not stem.isidentifier() or keyword.iskeyword(stem) or re.fullmatch(r"v\d+", stem):
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

    def call(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        """The expression for one call."""
        target = node.target
        args = [self.argument(a, names) for a in node.args]
        if target in _INFIX:
            return f"{args[0]} {_INFIX[target]} {args[1]}"
        if target is operator.neg:
            return f"-{args[0]}"
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if target is torch.ops.aten._local_scalar_dense.default:
            return f"{args[0]}.item()"
        args += [f"{key}={self.argument(value, names)}" for key, value in node.kwargs.items()]
        short = getattr(target, "__name__", "").lstrip("_").removeprefix("sym_")
        if not isinstance(target, torch._ops.OpOverload) and short in _MATH:
            return f"{self.bind(_MATH[short], short)}({', '.join(args)})"
        hint = getattr(target, "name", "kernel") if hasattr(target, "body") else target_name(target)
        hint = hint.removeprefix("aten.").removesuffix(".default")
        return f"{self.bind(target, hint)}({', '.join(args)})"

    def compile(self, source: str, name: str, filename: str) -> Callable[..., Any]:
        """Compile ``source`` and return its function ``name``; tracebacks and debuggers can show its lines."""
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec"), self.namespace)  # noqa: S102
        function: Callable[..., Any] = self.namespace[name]
        return function

    def kernel(self, body: fx.Graph, writes: tuple[int | None, ...], size: int) -> Callable[..., list[Any]]:
        """A function that runs ``body`` slice by slice, storing results over inputs or into new tensors."""
        names: dict[fx.Node, str] = {}
        inputs: list[fx.Node] = []
        for node in body.find_nodes(op="placeholder"):
            names[node] = f"i{len(inputs)}"
            inputs.append(node)
        tensors = [n for n in inputs if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dim() == 1]
        results = list(body.output_node().args[0])  # type: ignore[arg-type]
        lines = [f"def kernel({', '.join(names[n] for n in inputs)}):"]
        lines.append(f"    n = {names[tensors[0]]}.shape[0]")
        outs = []
        for k, (result, write) in enumerate(zip(results, writes, strict=True)):
            outs.append(f"o{k}")
            if write is not None:
                lines.append(f"    o{k} = {names[inputs[write]]}")
            else:
                dtype = self.literal(result.meta["val"].dtype)
                lines.append(f"    o{k} = torch.empty(n, dtype={dtype}, device={names[tensors[0]]}.device)")
        lines.append(f"    for a in range(0, n, {size}):")
        lines.append(f"        b = min(a + {size}, n)")
        inner = dict(names)
        for node in tensors:
            inner[node] = f"s{names[node]}"
            lines.append(f"        s{names[node]} = {names[node]}[a:b]")
        last = {source: node for node in body.nodes for source in node.all_input_nodes}
        for index, node in enumerate(n for n in body.nodes if n.op == "call_function"):
            inner[node] = f"v{index}"
            lines.append(f"        v{index} = {self._sliced(node, inner)}")
            dead = [inner[s] for s in node.all_input_nodes if last[s] is node and s.op == "call_function"]
            if dead:
                lines.append(f"        del {', '.join(dead)}")
        for out, result in zip(outs, results, strict=True):
            lines.append(f"        {out}[a:b].copy_({inner[result]})")
        lines.append(f"    return [{', '.join(outs)}]")
        return self.compile("\n".join(lines) + "\n", "kernel", f"<zgraph kernel {id(body):x}>")

    def _sliced(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        """A call inside the slice loop; operators that create a flat tensor create a slice of it."""
        text = self.call(node, names)
        val = node.meta["val"]
        if isinstance(val, torch.Tensor) and val.dim() == 1:
            for arg in node.args:
                if isinstance(arg, (list, tuple)) and list(arg) == [val.shape[0]]:
                    text = text.replace(f"[{val.shape[0]}]", "[b - a]", 1)
        return text
