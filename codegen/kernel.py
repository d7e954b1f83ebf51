"""A region of elementwise operators as one call that overwrites its inputs.

A ``Kernel`` is the target of a single program node; its meaning is its body. On the CPU it runs in slices that stay
in cache, so a chain of a dozen operators reads and writes memory once and needs no temporaries of full size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from zgraph.codegen.source import SourceWriter
from zgraph.program import show, target_name

SLICE = 32768
"""Elements per slice: a dozen float32 slices fit a 2 MiB second-level cache."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """Elementwise operators on flat tensors of equal length.

    Attributes:
        name: for messages and generated code.
        body: placeholders are the inputs in order, tensors and numbers; the output's argument is the list of results.
        num_inputs: number of placeholders.
        writes: for each result, the index of the input that it overwrites, or None for a new tensor.
    """

    name: str
    body: fx.Graph
    num_inputs: int
    writes: tuple[int | None, ...]
    _compiled: list[Callable[..., list[Any]]] = field(default_factory=list, repr=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        """The body as an expression list, independent of node names."""
        number = {node: f"%{i}" for i, node in enumerate(self.body.nodes)}
        lines = [
            f"{number[n]} = {target_name(n.target)}({', '.join(show(a, number) for a in n.args)}"
            + "".join(f", {k}={show(v, number)}" for k, v in sorted(n.kwargs.items()))
            + ")"
            for n in self.body.nodes
            if n.op == "call_function"
        ]
        results = show(self.body.output_node().args[0], number)
        return f"{self.name}{{{'; '.join(lines)}; return {results} over {list(self.writes)}}}"

    def __call__(self, *inputs: Any) -> list[torch.Tensor]:
        """Run on real tensors, or infer on fake ones."""
        if not self._compiled:
            self._compiled.append(self._compile())
        return self._compiled[0](*inputs)

    def _compile(self) -> Callable[..., list[Any]]:
        return SourceWriter().kernel(self.body, self.writes, SLICE)


def region(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """Copy ``nodes`` into a graph of their own.

    Returns:
        The graph and the outside nodes that its placeholders stand for, in order.
    """
    body = fx.Graph()
    inside = set(nodes)
    copies: dict[fx.Node, fx.Node] = {}
    outside: list[fx.Node] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in copies:
                copies[source] = body.placeholder(f"in{len(outside)}")
                copies[source].meta["val"] = source.meta["val"]
                outside.append(source)
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output([copies[node] for node in results])
    return body, outside
