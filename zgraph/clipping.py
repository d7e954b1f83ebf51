"""Clip gradients between backward and update, and leave all state as it was where their norm is not finite.

    g1, g2 = backward(...)              norm = sqrt(add_up([square_sum(g1), square_sum(g2)]))
    w1' = update(w1, g1)         ->     factor = clamp(max_norm / (norm + 1e-6), max=1)
    w2' = update(w2, g2)                w1' = where(norm < inf, update(w1, g1 * factor), w1)
                                        w2' = where(norm < inf, update(w2, g2 * factor), w2)

This is part of what is captured, so the passes shard it and the verifier proves it like the rest: every element counts
once, however parameters are tied, padded or divided.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.config import Config
from zgraph.errors import CaptureError
from zgraph.gradients import Gradients
from zgraph.program import Input, Origin, Phase, Program, Role

aten = torch.ops.aten

GRADIENT_NORM = Input(Role.RECIPE, "gradient_norm")
"""The norm of all gradients before they were clipped: a result, a 0-dim float64."""

NUM_SKIPPED = Input(Role.RECIPE, "num_skipped_steps")
"""How many steps have been skipped: a 0-dim int64."""

EPSILON = 1e-6
"""Added to the norm that is divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""


def clip(gradients: Gradients, config: Config) -> Gradients:
    """Let the update read clipped gradients.

    Args:
        gradients: as they are.
        config: says how.

    Raises:
        CaptureError: parameters are on several devices, or are complex and clipped by value.
    """
    if config.clip_value is not None:
        gradients = _clip_value(gradients, config.clip_value)
    if config.clip_norm is not None:
        gradients = _clip_norm(gradients, config.clip_norm)
    return gradients


def report(recipe: Mapping[str, Any]) -> dict[str, float | int]:
    """``gradient_norm`` and ``num_skipped_steps`` as numbers, from what steps have returned; empty without clipping."""
    return {what.name: recipe[what.name].item() for what in (GRADIENT_NORM, NUM_SKIPPED) if what.name in recipe}


def _clip_value(gradients: Gradients, limit: float) -> Gradients:
    for name, gradient in gradients.nodes.items():
        if gradient.meta["val"].is_complex():
            raise CaptureError(
                f"the gradient of {name} is complex, which cannot be clipped by value", fix="use clip_norm"
            )
    before, call = gradients.before, gradients.program.call
    return gradients.replace(
        {
            name: call(aten.clamp.default, gradient, -limit, limit, origin=gradients.origin(name), before=before)
            for name, gradient in gradients.nodes.items()
        }
    )


def _clip_norm(gradients: Gradients, limit: float) -> Gradients:
    program, before = gradients.program, gradients.before
    devices = {gradient.meta["val"].device for gradient in gradients.nodes.values()}
    if len(devices) > 1:
        raise CaptureError(
            f"gradients are on {' and '.join(sorted(map(str, devices)))}, and their norm would be on neither",
            fix="move the model to one device, or leave clip_norm out",
        )
    loss = program.results()[0]
    whole = Origin(Phase.UPDATE, source=loss.meta["origin"].source)

    def call(target: Any, *args: Any, origin: Origin = whole, **kwargs: Any) -> fx.Node:
        return program.call(target, *args, origin=origin, before=before, **kwargs)

    squares = [call(ops.square_sum, g, origin=gradients.origin(name)) for name, g in gradients.nodes.items()]
    norm = call(aten.sqrt.default, call(ops.add_up, squares))
    finite = call(aten.lt.Scalar, norm, math.inf)  # which NaN is not, either
    ratio = call(aten.mul.Tensor, call(aten.reciprocal.default, call(aten.add.Tensor, norm, EPSILON)), limit)
    factor = call(aten.clamp.default, ratio, None, 1.0)
    factors: dict[torch.dtype, fx.Node] = {}
    clipped = {}
    for name, gradient in gradients.nodes.items():
        dtype = gradient.meta["val"].dtype.to_real()
        if dtype not in factors:
            factors[dtype] = call(aten._to_copy.default, factor, dtype=dtype)
        clipped[name] = call(aten.mul.Tensor, gradient, factors[dtype], origin=gradients.origin(name))
    gradients = gradients.replace(clipped)
    _SkippedUnless(program, finite).rewrite()
    inputs = list(program.graph.find_nodes(op="placeholder"))
    count = program.empty([], torch.int64, next(iter(devices)))
    skipped = program.placeholder(NUM_SKIPPED, count, before=inputs[-1].next)
    skipped = call(aten.add.Tensor, skipped, call(aten.logical_not.default, finite))
    program.set_results([*program.results(), norm, skipped], [*program.outputs, GRADIENT_NORM, NUM_SKIPPED])
    return gradients


class _SkippedUnless:
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
        holds = self._as_number
        kept = self._call(operator.mul, old, self._call(operator.sub, 1, holds), name=name)
        return self._call(operator.add, self._call(operator.mul, new, holds, name=name), kept, name=name)

    def _on(self, device: torch.device) -> fx.Node:
        if device not in self._conditions:
            self._conditions[device] = self._call(aten._to_copy.default, self._condition, device=device)
        return self._conditions[device]

    def _call(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        origin = replace(self._condition.meta["origin"], module=name)
        return self.program.call(target, *args, origin=origin, before=self.program.output_node, **kwargs)
