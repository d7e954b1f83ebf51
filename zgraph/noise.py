"""Add normal noise to gradients (Neelakantan et al., 2015, Adding gradient noise improves learning).

    g' = g + size * randn

Each rank adds its own to what backward gives for each of its micro-batches, before these are averaged. So a rank draws
as dropout does, and ``size`` is larger than the noise that is to remain in the mean: see ``Config.inputs``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from zgraph.gradients import Gradients
from zgraph.program import Input, Phase, Role

aten = torch.ops.aten

NOISE = Input(Role.HYPER, "gradient_noise")
"""The standard deviation of what is drawn: a float."""


def add_noise(gradients: Gradients) -> Gradients:
    """Gradients with noise, each right where it comes from backward."""
    program = gradients.program
    size = program.placeholder(NOISE, 0.5)
    noisy: dict[str, fx.Node] = {}
    for name, gradient in gradients.nodes.items():
        origin, val = replace(gradients.origin(name), phase=Phase.BACKWARD), gradient.meta["val"]
        before = gradient.next if gradient.op == "call_function" else gradients.before
        drawn = program.call(
            aten.randn.default, list(val.shape), dtype=val.dtype, device=val.device, origin=origin, before=before
        )
        scaled = program.call(aten.mul.Tensor, drawn, size, origin=origin, before=before)
        noisy[name] = program.call(aten.add.Tensor, gradient, scaled, origin=origin, before=before)
    return gradients.replace(noisy)
