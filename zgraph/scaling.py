"""Scale the loss up before backward, so that small gradients survive float16, and the gradients down again.

The rule is that of ``torch.amp.GradScaler``: a step with a gradient that is not finite is skipped and halves the scale;
so many steps in a row without one double it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from zgraph.gradients import Gradients
from zgraph.program import Input, Origin, Phase, Program, Role, StateInit

aten = torch.ops.aten

LOSS_SCALE = Input(Role.RECIPE, "loss_scale")
"""What the loss is multiplied by: a 0-dim float32."""

NUM_GOOD_STEPS = Input(Role.RECIPE, "steps since the loss scale changed")
"""A 0-dim int64."""

GROWTH, BACKOFF = 2.0, 0.5


def unscale(gradients: Gradients, start: float) -> Gradients:
    """Divide gradients by the scale of their loss.

    Args:
        gradients: of the scaled loss.
        start: what the scale is in the first step.
    """
    program, origin = gradients.program, gradients.origin_of_all
    program.init[LOSS_SCALE] = StateInit(start, torch.float32)
    wide = gradients.call(aten._to_copy.default, _scale(program), dtype=torch.float64, origin=origin)
    return gradients.times(
        gradients.call(aten.reciprocal.default, wide, origin=origin)
    )  # rounded once, as in GradScaler


def update_scale(gradients: Gradients, finite: fx.Node, interval: int) -> None:
    """Return the scale of the next step.

    Args:
        finite: whether all gradients are.
        interval: how many steps in a row without one that is not double the scale.
    """
    program = gradients.program
    scale, origin = _scale(program), Origin(Phase.UPDATE, source=finite.meta["origin"].source)
    good = program.placeholder(NUM_GOOD_STEPS, program.empty([], torch.int64, scale.meta["val"].device))

    def call(target: Any, *args: Any) -> fx.Node:
        return program.call(target, *args, origin=origin, before=program.output_node)

    zero = call(aten.zeros_like.default, good)
    count = call(aten.where.self, finite, call(aten.add.Tensor, good, 1), zero)
    is_time = call(aten.eq.Scalar, count, interval)
    larger, smaller = call(aten.mul.Tensor, scale, GROWTH), call(aten.mul.Tensor, scale, BACKOFF)
    grows = call(aten.logical_and.default, is_time, call(aten.lt.Scalar, larger, math.inf))
    new = call(aten.where.self, finite, call(aten.where.self, grows, larger, scale), smaller)
    count = call(aten.where.self, is_time, zero, count)
    program.set_results([*program.results(), new, count], [*program.outputs, LOSS_SCALE, NUM_GOOD_STEPS])


def _scale(program: Program) -> fx.Node:
    return program.inputs(Role.RECIPE)[LOSS_SCALE.name, LOSS_SCALE.key]
