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
from zgraph.program import Input, Origin, Phase, Program, Role

aten = torch.ops.aten

GRADIENT_NORM = Input(Role.RECIPE, "gradient_norm")
"""The norm of all gradients before they were clipped: a result, a 0-dim float64."""

NUM_SKIPPED = Input(Role.RECIPE, "num_skipped_steps")
"""How many steps have been skipped: a 0-dim int64."""

EPSILON = 1e-6
"""Added to the norm that is divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""


def clip(program: Program, gradients: Mapping[str, fx.Node], config: Config) -> None:
    """Let the update read clipped gradients.

    Args:
        program: CAPTURED.
        gradients: of each parameter that is trained.
        config: says how.

    Raises:
        CaptureError: parameters are on several devices, or are complex and clipped by value.
    """
    if config.clip_value is not None:
        _clip_value(program, gradients, config.clip_value)
    if config.clip_norm is not None:
        _clip_norm(program, gradients, config.clip_norm)


def report(recipe: Mapping[str, Any]) -> dict[str, float | int]:
    """``gradient_norm`` and ``num_skipped_steps`` as numbers, from what steps have returned; empty without clipping."""
    return {what.name: recipe[what.name].item() for what in (GRADIENT_NORM, NUM_SKIPPED) if what.name in recipe}


def _clip_value(program: Program, gradients: Mapping[str, fx.Node], limit: float) -> None:
    for name, gradient in gradients.items():
        if gradient.meta["val"].is_complex():
            raise CaptureError(
                f"the gradient of {name} is complex, which cannot be clipped by value", fix="use clip_norm"
            )
    before, clipped = _first_of_update(program), {}
    for name, gradient in gradients.items():
        clipped[name] = program.call(
            aten.clamp.default, gradient, -limit, limit, origin=_origin(gradient, name), before=before
        )
    _read_instead(program, gradients, clipped)


def _clip_norm(program: Program, gradients: Mapping[str, fx.Node], limit: float) -> None:
    before, clipped = _first_of_update(program), {}
    devices = {gradient.meta["val"].device for gradient in gradients.values()}
    if len(devices) > 1:
        raise CaptureError(
            f"gradients are on {' and '.join(sorted(map(str, devices)))}, and their norm would be on neither",
            fix="move the model to one device, or leave clip_norm out",
        )
    loss = program.results()[0]
    whole = Origin(Phase.UPDATE, source=loss.meta["origin"].source)

    def call(target: Any, *args: Any, origin: Origin = whole, **kwargs: Any) -> fx.Node:
        return program.call(target, *args, origin=origin, before=before, **kwargs)

    squares = [call(ops.square_sum, g, origin=_origin(g, name)) for name, g in gradients.items()]
    norm = call(aten.sqrt.default, call(ops.add_up, squares))
    finite = call(aten.lt.Scalar, norm, math.inf)  # which NaN is not, either
    ratio = call(aten.mul.Tensor, call(aten.reciprocal.default, call(aten.add.Tensor, norm, EPSILON)), limit)
    factor = call(aten.clamp.default, ratio, None, 1.0)
    factors: dict[torch.dtype, fx.Node] = {}
    for name, gradient in gradients.items():
        dtype = gradient.meta["val"].dtype.to_real()
        if dtype not in factors:
            factors[dtype] = call(aten._to_copy.default, factor, dtype=dtype)
        clipped[name] = call(aten.mul.Tensor, gradient, factors[dtype], origin=_origin(gradient, name))
    _read_instead(program, gradients, clipped)
    _SkippedUnless(program, finite).rewrite()
    inputs = list(program.graph.find_nodes(op="placeholder"))
    skipped = program.placeholder(
        NUM_SKIPPED, program.empty([], torch.int64, next(iter(devices))), before=inputs[-1].next
    )
    failed = call(aten.logical_not.default, finite)
    count = call(aten.add.Tensor, skipped, failed)
    program.set_results([*program.results(), norm, count], [*program.outputs, GRADIENT_NORM, NUM_SKIPPED])


def _first_of_update(program: Program) -> fx.Node:
    """What calls between backward and update go in front of."""
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return next((node for node in calls if node.meta["origin"].phase is Phase.UPDATE), program.output_node)


def _origin(gradient: fx.Node, name: str) -> Origin:
    """Of what is done to a parameter's gradient."""
    origin: Origin = gradient.meta.get("origin") or Origin(Phase.UPDATE)
    return replace(origin, phase=Phase.UPDATE, module=name)


def _read_instead(program: Program, gradients: Mapping[str, fx.Node], clipped: Mapping[str, fx.Node]) -> None:
    """Let each parameter's update and state have the clipped gradient; several parameters may have one gradient."""
    new = set(clipped.values())
    for name, gradient in gradients.items():
        for user in [u for u in gradient.users if u.op == "call_function" and u not in new]:
            origin: Origin = user.meta["origin"]
            if origin.phase is Phase.UPDATE and origin.module == name and user.target is not ops.square_sum:
                user.replace_input_with(gradient, clipped[name])
    results = program.results()
    for i, (what, result) in enumerate(zip(program.outputs, results, strict=True)):
        if what is not None and what.role is Role.OPT_STATE and result is gradients.get(what.name):
            results[i] = clipped[what.name]
    program.set_results(results, program.outputs)


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
