"""Let parameters travel in the precision in which they are read; and gradients in less, where the user says so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from zgraph import ops
from zgraph.passes.gathers import gathers_of_params
from zgraph.pipeline import Pass
from zgraph.program import FlatGradient, Origin, Phase, Program, Role, Stage, operand
from zgraph.terms import Axiom, Form, Term, Terms, is_input

aten = torch.ops.aten


@dataclass(frozen=True)
class CastBeforeGather(Pass):
    """Cast a rank's slice of a bucket, not the whole of it, where all that reads the bucket reads it through that cast.

        w = to(view(wait(all_gather(shard))), bf16)    ->    w = view(wait(all_gather(to(shard, bf16))))

    Half the bytes travel and are held. Elements are cast one by one, so what is read is the same.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            (wait,) = (user for user in start.users if user.target is ops.wait)
            found = _casts(wait)
            if found is not None:
                self._cast_first(program, start, wait, *found)

    def _cast_first(
        self, program: Program, start: fx.Node, wait: fx.Node, views: list[fx.Node], casts: list[fx.Node]
    ) -> None:
        dtype = casts[0].meta["val"].dtype
        low = program.call(
            aten._to_copy.default, operand(start), dtype=dtype, origin=start.meta["origin"], before=start
        )
        start.replace_input_with(operand(start), low)
        for node in (start, wait, *views):
            node.meta["val"] = program.infer(node)
        for cast in casts:
            cast.replace_all_uses_with(operand(cast))
            program.graph.erase_node(cast)


def _rounded_parameter(terms: Terms, term: Term) -> Term | None:
    """A float32 parameter for what was rounded to bfloat16 and made wide again."""
    low = term.args[0]
    if term.dtype is not torch.float32 or low.target is not Form.CAST or low.dtype is not torch.bfloat16:
        return None
    param = low.args[0].args[0] if low.args[0].target is Form.RESHAPE else low.args[0]
    assert term.shape is not None
    is_param = is_input(param, Role.PARAM) and param.dtype is torch.float32
    return terms.reshape(param, term.shape) if is_param else None


@dataclass(frozen=True)
class GatherInLowPrecision(Pass):
    """Round a rank's slice of float32 parameters to bfloat16, gather that, and make it wide again.

        w = wait(all_gather(shard))    ->    w = to(wait(all_gather(to(shard, bf16))), f32)

    Half the bytes travel, where parameters are read in float32. This is not exact, and off by default: what forward
    and backward read of a parameter is off by at most 2^-8 of it, the same on all ranks. What is updated stays exact.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED
    assumes = (Axiom("to(to(w, bf16), f32) = w", Form.CAST, _rounded_parameter),)

    def rewrite(self, program: Program) -> None:
        for start, wait, param in gathers_of_params(program):
            if wait.meta["val"].dtype is not torch.float32:
                continue
            cast = aten._to_copy.default
            low = program.call(cast, param, dtype=torch.bfloat16, origin=start.meta["origin"], before=start)
            start.replace_input_with(param, low)
            for node in (start, wait):
                node.meta["val"] = program.infer(node)
            readers = list(wait.users)
            wide = program.call(cast, wait, dtype=torch.float32, origin=wait.meta["origin"], before=wait.next)
            for reader in readers:
                reader.replace_input_with(wait, wide)


def _rounded_mean(terms: Terms, term: Term) -> Term | None:
    """The mean of gradients for that of rounded ones, made wide again."""
    mean, dtype = term.args[:2]
    if not isinstance(mean, Term) or mean.target is not Form.MEAN or mean.args[0].target is not Form.CAST:
        return None
    gradient = mean.args[0].args[0]
    is_rounded = gradient.dtype == dtype and mean.dtype is torch.bfloat16
    return terms.mean(gradient) if is_rounded and terms.is_gradient(gradient) else None


@dataclass(frozen=True)
class ReduceInLowPrecision(Pass):
    """Round gradients to bfloat16 before they are averaged over the ranks.

    mean = wait(reduce_scatter(g, "avg"))    ->    mean = to(wait(reduce_scatter(to(g, bf16), "avg")), f32)

    Half the bytes travel. This is not exact, and off by default: each rank's gradient, each partial sum and the mean
    are rounded to 8 bits, so that an element of the mean over n ranks is off by at most (n + 1) 2^-8 of the mean of
    its magnitudes on the ranks, to first order.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED
    assumes = (Axiom("to(mean(to(g, bf16)), dtype of g) = mean(g)", Form.CAST, _rounded_mean),)

    def rewrite(self, program: Program) -> None:
        for start in [node for node in program.graph.nodes if node.target in (ops.all_reduce, ops.reduce_scatter)]:
            gradient = operand(start)
            holds, dtype = gradient.meta.get("holds"), gradient.meta["val"].dtype
            if not isinstance(holds, FlatGradient) or dtype not in (torch.float32, torch.float64):
                continue
            reduction = _reduction(start)
            wait = reduction[-1]
            origin: Origin = start.meta["origin"]
            low = program.call(aten._to_copy.default, gradient, dtype=torch.bfloat16, origin=origin, before=start)
            start.replace_input_with(gradient, low)
            slices = [user for user in wait.users if user.target is ops.shard]
            for node in (*reduction, *slices):
                node.meta["val"] = program.infer(node)
            of_update = replace(origin, phase=Phase.UPDATE, module=holds.bucket)
            for mean in (wait, *slices):
                readers = [user for user in mean.users if user not in slices]
                if readers:
                    wide = program.call(aten._to_copy.default, mean, dtype=dtype, origin=of_update, before=mean.next)
                    for reader in readers:
                        reader.replace_input_with(mean, wide)


def _reduction(start: fx.Node) -> list[fx.Node]:
    """The calls that reduce a gradient, inside of a node and then between nodes; the last of them gives the mean."""
    (wait,) = (user for user in start.users if user.target is ops.wait)
    between = [user for user in wait.users if user.target is ops.all_reduce]
    return [start, wait, *(_reduction(between[0]) if between else ())]


def _casts(whole: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The views of a gathered bucket, and the casts through which all that reads them does; None if some does not."""
    views: list[fx.Node] = []
    casts: list[fx.Node] = []
    stack = [whole]
    while stack:
        source = stack.pop()
        for user in source.users:
            if user.op == "call_function" and user.target is aten._to_copy.default:
                casts.append(user)
            elif ops.view_of(user) is source and len(user.all_input_nodes) == 1:
                views.append(user)
                stack.append(user)
            else:
                return None
    dtypes = {cast.meta["val"].dtype for cast in casts}
    by_place = any(user.target in ops.BY_PLACE for cast in casts for user in cast.users)
    if len(dtypes) != 1 or by_place or next(iter(dtypes)).itemsize >= whole.meta["val"].dtype.itemsize:
        return None
    alike = all(cast.meta["val"].stride() == operand(cast).meta["val"].stride() for cast in casts)
    return (views, casts) if alike else None
