"""Clip gradients between backward and update: by the norm of all of them together, or each element by itself.

    g1, g2 = backward(...)              norm = sqrt(add_up([square_sum(g1), square_sum(g2)]))
    w1' = update(w1, g1)         ->     factor = clamp(max_norm / (norm + 1e-6), max=1)
    w2' = update(w2, g2)                w1' = update(w1, g1 * factor)
                                        w2' = update(w2, g2 * factor)

The passes take the norm from slices; every element counts once, however parameters are tied, padded or divided.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from zgraph import ops
from zgraph.config import Config
from zgraph.errors import CaptureError
from zgraph.gradients import Gradients

aten = torch.ops.aten

EPSILON = 1e-6
"""Added to the norm that is divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""


def check_clipping(gradients: Gradients, config: Config) -> None:
    """Refuse gradients that cannot be clipped as ``config`` says.

    Raises:
        CaptureError: they are on several devices and have no norm, or are complex and clipped by value.
    """
    devices = {gradient.meta["val"].device for gradient in gradients.nodes.values()}
    if len(devices) > 1 and (config.clip_norm is not None or config.scales_loss):
        raise CaptureError(
            f"gradients are on {' and '.join(sorted(map(str, devices)))}, and their norm would be on neither",
            fix=f"move the model to one device, or leave {'precision' if config.scales_loss else 'clip_norm'} out",
        )
    for name, gradient in gradients.nodes.items():
        if gradient.meta["val"].is_complex() and config.clip_value is not None:
            raise CaptureError(
                f"the gradient of {name} is complex, which cannot be clipped by value", fix="use clip_norm"
            )


def clip_value(gradients: Gradients, limit: float) -> Gradients:
    """Gradients whose elements are at most ``limit``, and at least its opposite."""
    return gradients.replace(
        {
            name: gradients.call(aten.clamp.default, gradient, -limit, limit, origin=gradients.origin(name))
            for name, gradient in gradients.nodes.items()
        }
    )


def norm_of(gradients: Gradients) -> tuple[fx.Node, fx.Node]:
    """The norm of all gradients together, a 0-dim float64, and whether it is finite."""
    call, origin = gradients.call, gradients.origin_of_all
    squares = [call(ops.square_sum, g, origin=gradients.origin(name)) for name, g in gradients.nodes.items()]
    norm = call(aten.sqrt.default, call(ops.add_up, squares, origin=origin), origin=origin)
    return norm, call(aten.lt.Scalar, norm, math.inf, origin=origin)  # which NaN is not, either


def clip_norm(gradients: Gradients, norm: fx.Node, limit: float) -> Gradients:
    """Gradients scaled down by one factor so that their ``norm`` is at most ``limit``."""
    call, origin = gradients.call, gradients.origin_of_all
    inverse = call(aten.reciprocal.default, call(aten.add.Tensor, norm, EPSILON, origin=origin), origin=origin)
    factor = call(aten.clamp.default, call(aten.mul.Tensor, inverse, limit, origin=origin), None, 1.0, origin=origin)
    return gradients.times(factor)
