"""The gradients that a captured update reads, and how to put others in their place.

Several parameters may have one gradient (two biases that are added), so a reader is known by the parameter it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from zgraph.program import Origin, Phase, Program, Role

aten = torch.ops.aten


class Gradients:
    """What the update of each parameter reads as its gradient.

    Args:
        program: CAPTURED.
        nodes: the gradient of each parameter that is trained.

    Attributes:
        nodes: as given.
        before: what calls between backward and the optimizer's own go in front of.
    """

    def __init__(self, program: Program, nodes: Mapping[str, fx.Node]) -> None:
        self.program, self.nodes = program, dict(nodes)
        calls = (node for node in program.graph.nodes if node.op == "call_function")
        update = (node for node in calls if node.meta["origin"].phase is Phase.UPDATE)
        self.before: fx.Node = next(update, program.output_node)
        self._readers = {name: [u for u in node.users if _serves(u, name)] for name, node in self.nodes.items()}

    def replace(self, new: Mapping[str, fx.Node]) -> Gradients:
        """Let what reads the gradients, and state that is one of them, have ``new`` ones instead: those returned."""
        for name, readers in self._readers.items():
            for reader in readers:
                reader.replace_input_with(self.nodes[name], new[name])
        results = self.program.results()
        for i, what in enumerate(self.program.outputs):
            if what is not None and what.role is Role.OPT_STATE and results[i] is self.nodes.get(what.name):
                results[i] = new[what.name]
        self.program.set_results(results, self.program.outputs)
        replaced = copy(self)
        replaced.nodes = dict(new)
        return replaced

    def call(self, target: Any, *args: Any, origin: Origin, **kwargs: Any) -> fx.Node:
        """A call between backward and the optimizer's own."""
        return self.program.call(target, *args, origin=origin, before=self.before, **kwargs)

    def times(self, factor: fx.Node) -> Gradients:
        """Let the update read gradients times a 0-dim ``factor``, which is rounded to the dtype of each."""
        factors: dict[torch.dtype, fx.Node] = {}
        products = {}
        for name, gradient in self.nodes.items():
            dtype = gradient.meta["val"].dtype.to_real()
            if dtype not in factors:
                factors[dtype] = self.call(aten._to_copy.default, factor, dtype=dtype, origin=self.origin_of_all)
            products[name] = self.call(aten.mul.Tensor, gradient, factors[dtype], origin=self.origin(name))
        return self.replace(products)

    @property
    def origin_of_all(self) -> Origin:
        """Of what is about all gradients: the line of the loss."""
        return Origin(Phase.UPDATE, source=self.program.results()[0].meta["origin"].source)

    def origin(self, name: str) -> Origin:
        """Of what is done to a parameter's gradient before the update reads it."""
        origin: Origin = self.nodes[name].meta.get("origin") or Origin(Phase.UPDATE)
        return replace(origin, phase=Phase.UPDATE, module=name)


def _serves(user: fx.Node, name: str) -> bool:
    """Whether a call belongs to the update of a parameter."""
    if user.op != "call_function":
        return False
    origin: Origin = user.meta["origin"]
    return origin.phase is Phase.UPDATE and origin.module == name
