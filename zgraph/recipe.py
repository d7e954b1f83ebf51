"""What lies between backward and the optimizer's own update, in order.

    gradients get noise               noise
    micro-batches add up, weighted    accumulation
    the loss scale is taken out       scaling
    gradients are clipped             clipping
    averages of the weights move      averages
    a step that failed is skipped     skipping
    the loss scale moves              scaling

All of it is part of what is captured, so the passes shard it and the verifier proves it like the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from zgraph.accumulation import accumulate
from zgraph.averages import average_weights
from zgraph.clipping import check_clipping, clip_norm, clip_value, norm_of
from zgraph.config import Config
from zgraph.gradients import Gradients
from zgraph.metrics import Reduced
from zgraph.noise import add_noise
from zgraph.scaling import unscale, update_scale
from zgraph.skipping import skip_unless, spare_skipped


def complete(
    gradients: Gradients,
    config: Config,
    weight: fx.Node | None = None,
    metrics: Mapping[Reduced, fx.Node] | None = None,
) -> None:
    """Let the update of a CAPTURED program read what ``config`` says.

    Args:
        gradients: of the scaled loss in float16, else of the loss; times ``weight`` if there is one.
        config: options.
        weight: of this micro-batch: a 0-dim tensor.
        metrics: of this micro-batch: vectors to return.

    Raises:
        CaptureError: see ``check_clipping``.
    """
    check_clipping(gradients, config)
    if config.gradient_noise is not None:
        gradients = add_noise(gradients)
    gradients = accumulate(gradients, config.accumulate, weight, metrics)
    if config.scales_loss:
        gradients = unscale(gradients, config.loss_scale)
    may_skip = config.clip_norm is not None or config.scales_loss
    norm, finite = norm_of(gradients) if may_skip else (None, None)
    if config.clip_norm is not None:
        assert norm is not None
        gradients = clip_norm(gradients, norm, config.clip_norm)
    if config.clip_value is not None:
        gradients = clip_value(gradients, config.clip_value)
    if finite is not None:
        gradients = spare_skipped(gradients, finite)
    if config.ema is not None:
        average_weights(gradients)
    if norm is not None and finite is not None:
        skip_unless(gradients.program, finite, norm)
    if config.scales_loss:
        assert finite is not None
        update_scale(gradients, finite, config.loss_scale_interval)
