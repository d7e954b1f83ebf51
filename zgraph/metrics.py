"""What a step tells besides its loss: numbers computed from the model's output, reduced over micro-batches and ranks.

They are results of the graph like the loss, and travel as one vector for means and one for sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zgraph.errors import CaptureError, OptionError
from zgraph.program import Input, Role

Function = Callable[..., Any]


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        function: ``function(output, *args, **kwargs)`` of the model's output and arguments: a tensor of one element.
        reduction: over micro-batches and ranks; a mean is weighted as the loss is.
    """

    function: Function
    reduction: str


@dataclass(frozen=True)
class Reduced:
    """All metrics of one reduction, in a vector.

    Attributes:
        reduction: ``"mean"`` or ``"sum"``.
        result: what the step returns.
        earlier: what earlier micro-batches have added up.
    """

    reduction: str
    result: Input
    earlier: Input

    @property
    def is_mean(self) -> bool:
        """Or else a sum."""
        return self.reduction == "mean"


MEANS = Reduced("mean", Input(Role.RECIPE, "means of metrics"), Input(Role.RECIPE, "earlier means of metrics"))
SUMS = Reduced("sum", Input(Role.RECIPE, "sums of metrics"), Input(Role.RECIPE, "earlier sums of metrics"))


def check_metrics(metrics: Any) -> dict[str, Metric]:
    """Metrics by name, from what the user gives: functions, or pairs of a function and ``"mean"`` or ``"sum"``.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(metrics, Mapping):
        raise OptionError(f"metrics is a {type(metrics).__name__}", fix="give a dictionary of functions by name")
    found = {}
    for name, given in metrics.items():
        function, reduction = given if isinstance(given, tuple) and len(given) == 2 else (given, "mean")
        if not isinstance(name, str) or not callable(function) or reduction not in (MEANS.reduction, SUMS.reduction):
            raise OptionError(
                f"metrics[{name!r}] is {given!r}",
                fix="give a function(output, *args, **kwargs), or a pair of one and 'mean' or 'sum'",
            )
        found[name] = Metric(function, reduction)
    return found


def evaluate(
    metrics: Mapping[str, Metric], output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: torch.Tensor
) -> list[tuple[Reduced, torch.Tensor]]:
    """The metrics of a micro-batch, as float64 vectors by reduction; those that there are.

    Args:
        like: a tensor on their device.

    Raises:
        CaptureError: one is not one number.
    """
    vectors = []
    for reduced in (MEANS, SUMS):
        values = [
            _number(name, metric.function(output, *args, **kwargs), like)
            for name, metric in metrics.items()
            if metric.reduction == reduced.reduction
        ]
        if values:
            vectors.append((reduced, torch.stack(values)))
    return vectors


def _number(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, (bool, int, float)):
        return torch.full((), value, dtype=torch.float64, device=like.device)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CaptureError(f"the metric {name!r} is {what}, not one real number", fix="return one number")
    return value.detach().reshape(()).to(like.device, torch.float64)


def by_name(metrics: Mapping[str, Metric], recipe: Mapping[str, Any], world: int) -> dict[str, torch.Tensor]:
    """Each metric as a 0-dim float64 tensor.

    Args:
        recipe: what the step has returned: sums as means over the ranks.
        world: how many ranks there are.
    """
    found: dict[str, torch.Tensor] = {}
    for reduced in (MEANS, SUMS):
        names = [name for name, metric in metrics.items() if metric.reduction == reduced.reduction]
        if names:
            vector = recipe[reduced.result.name]
            found.update(zip(names, (vector if reduced.is_mean else vector * world).unbind(), strict=True))
    return {name: found[name] for name in metrics}
