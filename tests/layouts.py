"""Layouts for tests that need state in buckets but no captured program."""

from __future__ import annotations

import torch
from torch import nn

from zgraph.layout import Layout, ParamSpec, make_buckets


def layout_of(
    model: nn.Module,
    world: int,
    zero: int,
    bucket_bytes: int = 256,
    *,
    reverse: bool = False,
    groups: dict[str, str] | None = None,
) -> Layout:
    """A layout of all parameters in the order of the model (or the reverse), in small buckets.

    Args:
        groups: parameter name -> group, for parameters that may not share a bucket with the others.
    """
    specs = [
        ParamSpec(
            name,
            tuple(p.shape),
            p.dtype,
            torch.device("cpu") if p.is_meta else p.device,
            p.requires_grad,
            (groups or {}).get(name),
        )
        for name, p in model.named_parameters()
    ]
    if reverse:
        specs.reverse()
    return Layout(
        make_buckets(specs, world, bucket_bytes), world, shard_params=zero == 3 and world > 1, shard_state=zero >= 1
    )
