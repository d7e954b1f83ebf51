"""Keep an exponential moving average of the weights that are trained, as state of the optimizer.

    w' = update(w, g)    ->    w' = update(w, g)
                               ema' = lerp(ema, w', 1 - decay)

It starts as the weights are, and is divided, saved and loaded like the rest of ``optimizer.state``, which the
optimizer's own ``step()`` never sees it in.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from zgraph.errors import OptimizerError
from zgraph.gradients import Gradients
from zgraph.program import Input, Role, StateInit

aten = torch.ops.aten

WEIGHT_EMA = "weight_ema"
"""The key of the average in the state of a parameter: a tensor of its shape, in its dtype or float32 at least."""

DECAY = Input(Role.HYPER, "ema")
"""What is kept of the average in a step: a float."""

Entries = TypeVar("Entries")


def dtype_of_average(dtype: torch.dtype) -> torch.dtype:
    """In which the average of weights of ``dtype`` is kept."""
    return torch.promote_types(dtype, torch.float32)


def without_averages(state: Mapping[str, Mapping[str, Entries]]) -> dict[str, dict[str, Entries]]:
    """What the optimizer knows of its state, by parameter and key."""
    own = {name: {k: v for k, v in entries.items() if k != WEIGHT_EMA} for name, entries in state.items()}
    return {name: entries for name, entries in own.items() if entries}


def check_no_clash(keys: Iterable[str]) -> None:
    """Refuse an optimizer whose own state has the key of the average.

    Raises:
        OptimizerError: it does.
    """
    if WEIGHT_EMA in keys:
        raise OptimizerError(
            f"the optimizer keeps state called {WEIGHT_EMA!r}, which is where the average of the weights is kept",
            fix="call it something else, or leave the option ema out",
        )


def average_weights(gradients: Gradients) -> None:
    """Return the averages of weights that the update changes.

    Args:
        gradients: of a CAPTURED program.
    """
    program, origin = gradients.program, gradients.origin_of_all
    decay = program.placeholder(DECAY, 0.5)
    share = program.call(operator.sub, 1, decay, origin=origin, before=program.output_node)
    results, outputs = program.results(), list(program.outputs)
    for what, new in zip(program.outputs, program.results(), strict=True):
        if what is None or what.role is not Role.PARAM:
            continue
        average = replace(what, role=Role.OPT_STATE, key=WEIGHT_EMA)
        results.append(_averaged(gradients, average, new, share))
        outputs.append(average)
    program.set_results(results, outputs)


def _averaged(gradients: Gradients, what: Input, new: fx.Node, share: fx.Node) -> fx.Node:
    program, origin, val = gradients.program, gradients.origin(what.name), new.meta["val"]
    dtype = dtype_of_average(val.dtype)
    old = program.placeholder(what, program.empty(val.shape, dtype, val.device))
    program.init[what] = StateInit(None, dtype)
    if val.dtype != dtype:
        new = program.call(aten._to_copy.default, new, dtype=dtype, origin=origin, before=program.output_node)
    return program.call(aten.lerp.Scalar, old, new, share, origin=origin, before=program.output_node)
