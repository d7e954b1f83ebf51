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
from collections.abc import Callable
from functools import partial

import torch
from torch import fx

from zgraph import ops
from zgraph.config import Config
from zgraph.errors import CaptureError
from zgraph.gradients import Gradients
from zgraph.program import Origin, Phase
from zgraph.scaling import unscale, update_scale
from zgraph.skipping import skip_unless

aten = torch.ops.aten

EPSILON = 1e-6
"""Added to the norm that is divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""


def clip(gradients: Gradients, config: Config) -> Gradients:
    """Let the update read clipped gradients, and do nothing where one is not finite, if ``config`` asks for that.

    Args:
        gradients: of the scaled loss in float16, else of the loss.
        config: says how.

    Raises:
        CaptureError: parameters are on several devices, or are complex and clipped by value.
    """
    if config.scales_loss:
        gradients = unscale(gradients, config.loss_scale)
    if config.clip_norm is None and not config.scales_loss:
        return gradients if config.clip_value is None else _clip_value(gradients, config.clip_value)
    norm, finite = _norm(gradients)
    if config.clip_norm is not None:
        gradients = _clip_norm(gradients, norm, config.clip_norm)
    if config.clip_value is not None:
        gradients = _clip_value(gradients, config.clip_value)
    skip_unless(gradients.program, finite, norm)
    if config.scales_loss:
        update_scale(gradients, finite, config.loss_scale_interval)
    return gradients


def _clip_value(gradients: Gradients, limit: float) -> Gradients:
    for name, gradient in gradients.nodes.items():
        if gradient.meta["val"].is_complex():
            raise CaptureError(
                f"the gradient of {name} is complex, which cannot be clipped by value", fix="use clip_norm"
            )
    call = gradients.program.call
    return gradients.replace(
        {
            name: call(
                aten.clamp.default, gradient, -limit, limit, origin=gradients.origin(name), before=gradients.before
            )
            for name, gradient in gradients.nodes.items()
        }
    )


def _norm(gradients: Gradients) -> tuple[fx.Node, fx.Node]:
    """The norm of all gradients together, and whether it is finite."""
    devices = {gradient.meta["val"].device for gradient in gradients.nodes.values()}
    if len(devices) > 1:
        raise CaptureError(
            f"gradients are on {' and '.join(sorted(map(str, devices)))}, and their norm would be on neither",
            fix="move the model to one device, or leave clip_norm out",
        )
    call, origin = _caller(gradients)
    squares = [call(ops.square_sum, g, origin=gradients.origin(name)) for name, g in gradients.nodes.items()]
    norm = call(aten.sqrt.default, call(ops.add_up, squares, origin=origin), origin=origin)
    return norm, call(aten.lt.Scalar, norm, math.inf, origin=origin)  # which NaN is not, either


def _clip_norm(gradients: Gradients, norm: fx.Node, limit: float) -> Gradients:
    call, origin = _caller(gradients)
    inverse = call(aten.reciprocal.default, call(aten.add.Tensor, norm, EPSILON, origin=origin), origin=origin)
    factor = call(aten.clamp.default, call(aten.mul.Tensor, inverse, limit, origin=origin), None, 1.0, origin=origin)
    factors: dict[torch.dtype, fx.Node] = {}
    clipped = {}
    for name, gradient in gradients.nodes.items():
        dtype = gradient.meta["val"].dtype.to_real()
        if dtype not in factors:
            factors[dtype] = call(aten._to_copy.default, factor, dtype=dtype, origin=origin)
        clipped[name] = call(aten.mul.Tensor, gradient, factors[dtype], origin=gradients.origin(name))
    return gradients.replace(clipped)


def _caller(gradients: Gradients) -> tuple[Callable[..., fx.Node], Origin]:
    """How to make a call between backward and update, and where one about all gradients comes from."""
    loss = gradients.program.results()[0]
    origin = Origin(Phase.UPDATE, source=loss.meta["origin"].source)
    return partial(gradients.program.call, before=gradients.before), origin
