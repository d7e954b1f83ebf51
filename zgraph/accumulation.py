"""Add gradients up over the micro-batches of a step, and update with their mean.

    w' = update(w, g)    ->    total = add(earlier, g)
                               w' = update(w, total / 4)
                               earlier' = zeros

What earlier micro-batches have added up is state, ``Role.GRADIENT``, in float32 at least, so the passes divide it over
the ranks like all other state. ``micro_step`` makes the step of all micro-batches but the last: it only adds up.

With weights, loss and gradients are those of a mean in which each micro-batch of each rank counts by its weight, the
number of its tokens say:

    sum(weight * loss) / sum(weight)    over micro-batches and ranks
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.gradients import Gradients
from zgraph.metrics import ALL, MAXIMA, Reduced
from zgraph.passes.tidy import remove_dead
from zgraph.program import Input, Origin, Program, Role, StateInit

aten = torch.ops.aten

LOSS = Input(Role.RECIPE, "earlier losses")
"""What the losses of earlier micro-batches add up to, times their weights: a 0-dim tensor."""

WEIGHT = Input(Role.RECIPE, "earlier weights")
"""What the weights of earlier micro-batches add up to, in the mean over the ranks: a 0-dim tensor."""

ADD_UP = (LOSS, WEIGHT, *(reduced.earlier for reduced in ALL))
"""State of the step that micro-batches add up, or keep the largest of."""


def accumulate(
    gradients: Gradients,
    num_steps: int,
    weight: fx.Node | None = None,
    metrics: Mapping[Reduced, fx.Node] | None = None,
) -> Gradients:
    """Let the update read the mean over micro-batches, and return the mean of the losses.

    Args:
        gradients: on the last micro-batch; of the loss times ``weight`` if there is one.
        num_steps: how many micro-batches a step has.
        weight: of this micro-batch: a 0-dim tensor.
        metrics: of this micro-batch: vectors to return as well; means times ``weight`` if there is one.
    """
    accumulation = _Accumulation(gradients, num_steps, weight)
    for reduced, vector in (metrics or {}).items():
        accumulation.tell(reduced, vector)
    return accumulation.gradients if num_steps == 1 and weight is None else accumulation.rewrite()


class _Accumulation:
    def __init__(self, gradients: Gradients, num_steps: int, weight: fx.Node | None) -> None:
        self.program, self.gradients, self.num_steps = gradients.program, gradients, num_steps
        # Asked for once, as there are many parameters.
        self._behind_inputs = self.program.graph.find_nodes(op="placeholder")[-1].next
        self._results, self._outputs = self.program.results(), list(self.program.outputs)
        self._loss: fx.Node = self._results[0]
        self._origin = gradients.origin_of_all
        # Kept for a single micro-batch, too: what comes from the state of the step is known to be no parameter's own.
        self._by: Any = num_steps
        self._divisors: dict[torch.dtype, fx.Node] = {}
        if weight is not None:
            self._by = total = self._total(WEIGHT, weight, self._origin)
            self._begin_anew(WEIGHT, total, self._origin)

    def rewrite(self) -> Gradients:
        self._results[0] = self._mean(LOSS, self._loss, self._origin)
        means = {}
        for name, gradient in self.gradients.nodes.items():
            origin, dtype = self.gradients.origin(name), gradient.meta["val"].dtype
            means[name] = self._mean(Input(Role.GRADIENT, name), gradient, origin)
            if means[name].meta["val"].dtype != dtype:
                means[name] = self.gradients.call(aten._to_copy.default, means[name], origin=origin, dtype=dtype)
        self.program.set_results(self._results, self._outputs)
        return self.gradients.replace(means)

    def tell(self, reduced: Reduced, vector: fx.Node) -> None:
        """Return metrics."""
        combine: Any = aten.add.Tensor
        first: tuple[Any, ...] = (aten.zeros_like.default,)
        if reduced is MAXIMA:
            combine, first = aten.maximum.default, (aten.full_like.default, -math.inf)
            vector = self.gradients.call(ops.max_over_ranks, vector, origin=self._origin)
            if self.num_steps > 1:
                self.program.init[reduced.earlier] = StateInit(-math.inf, torch.float64)
        if self.num_steps > 1:
            vector = self._total(reduced.earlier, vector, self._origin, combine)
            self._begin_anew(reduced.earlier, vector, self._origin, *first)
        if reduced.is_mean:
            value = self.gradients.call(aten.div.Tensor, vector, self._divisor(torch.float64), origin=self._origin)
        else:
            value = self.gradients.call(aten.clone.default, vector, origin=self._origin)
        self._outputs.append(reduced.result)
        self._results.append(value)
        self.program.set_results(self._results, self._outputs)

    def _mean(self, what: Input, new: fx.Node, origin: Origin) -> fx.Node:
        dtype = torch.promote_types(new.meta["val"].dtype, torch.float32)
        total = new
        if self.num_steps > 1:
            total = self._total(what, new, origin)
        elif new.meta["val"].dtype != dtype:
            total = self.gradients.call(aten._to_copy.default, new, origin=origin, dtype=dtype)
        mean = self.gradients.call(aten.div.Tensor, total, self._divisor(dtype.to_real()), origin=origin)
        if self.num_steps > 1:
            self._begin_anew(what, mean, origin)
        return mean

    def _divisor(self, dtype: torch.dtype) -> Any:
        """What a total of ``dtype`` is divided by, in that dtype, for one that is a single number would be promoted."""
        if not isinstance(self._by, fx.Node) or self._by.meta["val"].dtype == dtype:
            return self._by
        if dtype not in self._divisors:
            self._divisors[dtype] = self.gradients.call(
                aten._to_copy.default, self._by, origin=self._origin, dtype=dtype
            )
        return self._divisors[dtype]

    def _total(self, what: Input, new: fx.Node, origin: Origin, combine: Any = aten.add.Tensor) -> fx.Node:
        """What micro-batches have added up to, or been combined to, this one included."""
        val = new.meta["val"]
        start = self.program.empty(val.shape, torch.promote_types(val.dtype, torch.float32), val.device)
        earlier = self.program.placeholder(what, start, before=self._behind_inputs)
        return self.gradients.call(combine, earlier, new, origin=origin)

    def _begin_anew(
        self, what: Input, like: fx.Node, origin: Origin, fill: Any = aten.zeros_like.default, *value: float
    ) -> None:
        self._outputs.append(what)
        self._results.append(self.gradients.call(fill, like, *value, origin=origin))


def micro_step(program: Program) -> Program:
    """The step of every micro-batch but the last: it only adds up.

    Args:
        program: CAPTURED, the step on the last one.
    """
    inner = program.clone()
    inputs = {what: node for node, what in inner.placeholders()}
    outputs, results = list(inner.outputs), inner.results()
    kept: dict[Input | None, Any] = {}
    for what, result in zip(outputs, results, strict=True):
        if what is not None and what.role in (Role.BUFFER, Role.CONSTANT):
            kept[what] = result
        elif what in ADD_UP or (what is not None and what.role is Role.GRADIENT):
            (kept[what],) = inputs[what].users  # the sum
    inner.set_results([kept[LOSS], *kept.values()], [None, *kept])
    remove_dead(inner)
    for what, node in inputs.items():
        if not node.users and what.role in (Role.OPT_STATE, Role.HYPER, Role.RECIPE, Role.CONSTANT):
            inner.graph.erase_node(node)
            inner.constants.pop(what.name, None)
    given = {what for _, what in inner.placeholders()}
    inner.init, inner.guards = {what: start for what, start in inner.init.items() if what in given}, ()
    return inner
