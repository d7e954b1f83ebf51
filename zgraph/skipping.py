"""Leave all state as it was where the norm of the gradients is not finite, and count how often that was so.

w' = update(w, g)    ->    w' = where(norm < inf, update(w, g), w)

An update that mixes elements may fail on what is not finite, as a decomposition of a matrix does, on the one rank that
computes it. So it is given zeros in a step that is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.gradients import Gradients
from zgraph.program import Input, Program, Role, update_nodes
from zgraph.scaling import LOSS_SCALE

aten = torch.ops.aten

GRADIENT_NORM = Input(Role.RECIPE, "gradient_norm")
"""The norm of all gradients before they were clipped: a result, a 0-dim float64."""

NUM_SKIPPED = Input(Role.RECIPE, "num_skipped_steps")
"""How many steps have been skipped: a 0-dim int64."""


def report(recipe: Mapping[str, Any]) -> dict[str, float | int]:
    """Norm, number of skipped steps and loss scale, those that there are, as numbers."""
    told = (GRADIENT_NORM, NUM_SKIPPED, LOSS_SCALE)
    return {what.name: recipe[what.name].item() for what in told if what.name in recipe}


def spare_skipped(gradients: Gradients, finite: fx.Node) -> Gradients:
    """Zeros for the gradients of a step that is skipped, where an operator of the update is not elementwise."""
    program, safe = gradients.program, dict(gradients.nodes)
    for name, nodes in update_nodes(program).items():
        if all(ops.is_elementwise(node.target) or node.target is ops.square_sum for node in nodes):
            continue
        origin, val = gradients.origin(name), safe[name].meta["val"]
        zero = gradients.call(aten.zeros.default, [], dtype=val.dtype, device=val.device, origin=origin)
        safe[name] = gradients.call(aten.where.self, finite, safe[name], zero, origin=origin)
    return gradients.replace(safe)


def skip_unless(program: Program, finite: fx.Node, norm: fx.Node) -> None:
    """Let parameters and optimizer state keep their values unless ``finite``; return the norm, and the count.

    Args:
        program: CAPTURED.
        finite: a 0-dim bool.
        norm: of all gradients.
    """
    _Choice(program, finite).rewrite()
    origin = finite.meta["origin"]
    count = program.empty([], torch.int64, norm.meta["val"].device)
    skipped = program.placeholder(NUM_SKIPPED, count)
    failed = program.call(aten.logical_not.default, finite, origin=origin, before=program.output_node)
    skipped = program.call(aten.add.Tensor, skipped, failed, origin=origin, before=program.output_node)
    program.set_results([*program.results(), norm, skipped], [*program.outputs, GRADIENT_NORM, NUM_SKIPPED])


class _Choice:
    """Lets parameters and optimizer state keep their values unless ``condition``, a 0-dim bool, holds."""

    def __init__(self, program: Program, condition: fx.Node) -> None:
        self.program = program
        self._conditions = {condition.meta["val"].device: condition}
        self._condition = condition
        self._as_number: fx.Node | None = None

    def rewrite(self) -> None:
        inputs = {what: node for node, what in self.program.placeholders()}
        results = self.program.results()
        for i, what in enumerate(self.program.outputs):
            if what in inputs and what.role in (Role.PARAM, Role.OPT_STATE) and results[i] is not inputs[what]:
                results[i] = self._chosen(results[i], inputs[what], what.name)
        self.program.set_results(results, self.program.outputs)

    def _chosen(self, new: Any, old: fx.Node, name: str) -> fx.Node:
        val = old.meta["val"]
        if isinstance(val, torch.Tensor):
            return self._call(aten.where.self, self._on(val.device), new, old, name=name)
        if self._as_number is None:
            holds = self._call(aten._to_copy.default, self._on(torch.device("cpu")), dtype=torch.int64)
            self._as_number = self._call(aten._local_scalar_dense.default, holds)
        return self._call(ops.sym_choose, self._as_number, new, old, name=name)

    def _on(self, device: torch.device) -> fx.Node:
        if device not in self._conditions:
            self._conditions[device] = self._call(aten._to_copy.default, self._condition, device=device)
        return self._conditions[device]

    def _call(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        origin = replace(self._condition.meta["origin"], module=name)
        return self.program.call(target, *args, origin=origin, before=self.program.output_node, **kwargs)
