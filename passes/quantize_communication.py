"""Let parameters and gradients travel in 8 bits an element."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from zgraph import ops
from zgraph.passes.gathers import gathers_of_params
from zgraph.passes.quantize import elements_of
from zgraph.pipeline import Pass
from zgraph.program import FlatGradient, Input, Origin, Phase, Program, Role, Stage, operand
from zgraph.terms import Axiom, Form, Term, Terms, axis_of, is_input, zero_times

aten = torch.ops.aten


def _gathered(terms: Terms, term: Term) -> Term | None:
    """Parameters, for what was gathered of their quantised slices."""
    data = term.args[0]
    if not isinstance(data, Term) or data.target is not Form.GATHER or data.args[0].target is not ops.quantize:
        return None
    assert term.shape is not None
    assert term.dtype is not None
    whole = terms.whole(data.args[0].args[0], term.shape, axis_of(data))
    if whole is None:
        return None
    given = all(is_input(base, Role.PARAM) or zero_times(base) == frozenset() for base, _, _ in terms.pieces(whole))
    return terms.cast(whole, term.dtype) if given else None


@dataclass(frozen=True)
class GatherQuantized(Pass):
    """Quantise a rank's slice of float32 parameters, and gather the bytes (ZeRO++: Wang et al., 2023).

        w = wait(all_gather(shard))    ->    w = dequantize(wait(all_gather(quantize(where(elements, shard, 0)))))

    About a fourth of the bytes travel. This is not exact, and off by default: what forward and backward read of a
    parameter is off by at most 1/254 of the largest magnitude among 256 neighbours (``zgraph.quantized``), the same on
    all ranks. What is updated stays as it is. Padding would set the scale of others in its block, so zeros travel.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED
    assumes = (Axiom("dequantize(gather(quantize(shard(w)))) = w", ops.dequantize, _gathered),)

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        for start, wait, param in gathers_of_params(program):
            val = param.meta["val"]
            if val.dtype is not torch.float32:
                continue
            what: Input = param.meta["input"]
            origin: Origin = start.meta["origin"]
            sent, dtype = param, wait.meta["val"].dtype
            if program.layout.by_name[what.name].has_padding:
                elements = elements_of(program, what.name, param, origin, start)
                zero = program.call(
                    aten.zeros.default, [], dtype=val.dtype, device=val.device, origin=origin, before=start
                )
                sent = program.call(aten.where.self, elements, param, zero, origin=origin, before=start)
            data = program.call(ops.quantize, sent, origin=origin, before=start)
            before = operand(start)
            start.replace_input_with(before, data)
            if before is not param and not before.users:
                program.graph.erase_node(before)  # a cast, which what is read is given instead
            for node in (start, wait):
                node.meta["val"] = program.infer(node)
            readers = list(wait.users)
            whole = program.call(ops.dequantize, wait, dtype, origin=wait.meta["origin"], before=wait.next)
            for reader in readers:
                reader.replace_input_with(wait, whole)


def _exchanged(terms: Terms, term: Term) -> Term | None:
    """This rank's part of mean gradients, for the mean of the quantised parts that all ranks have sent."""
    data, world = term.args
    if not isinstance(data, Term) or data.target is not Form.EXCHANGE or data.args[0].target is not ops.quantize:
        return None
    gradient: Term = data.args[0].args[0]
    assert term.shape is not None
    if (
        axis_of(data) is not None
        or gradient.numel != term.numel * world
        or not all(map(terms.is_gradient, _bases(terms, gradient)))
    ):
        return None
    return terms.shard(terms.mean(gradient), term.shape)


def _bases(terms: Terms, vector: Term) -> list[Term]:
    """The tensors that a vector is made of, in whatever shape and order of dimensions they lie in it."""
    found = []
    for base, _, _ in terms.pieces(vector):
        while base.target in (Form.RESHAPE, Form.PERMUTE):
            base = base.args[0]
        found.append(base)
    return found


@dataclass(frozen=True)
class ReduceQuantized(Pass):
    """Quantise float32 gradients, let every rank send each its part, and add up in float32 (ZeRO++: Wang et al., 2023).

        mean = wait(reduce_scatter(g, "avg"))    ->    mean = mean_of_quantized(wait(all_to_all(quantize(g))))

    About a fourth of the bytes travel. This is not exact, and off by default: each rank's gradient is rounded once,
    so that an element of the mean is off by at most 1/254 of the mean, over the ranks, of the largest magnitudes among
    its 256 neighbours (``zgraph.quantized``), besides rounding in float32. Where one of them is infinite or NaN, all
    256 become NaN.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED
    assumes = (Axiom("mean(all_to_all(quantize(g))) = shard(mean(g))", ops.mean_of_quantized, _exchanged),)

    def rewrite(self, program: Program) -> None:
        mesh = program.mesh
        for start in list(program.graph.find_nodes(op="call_function", target=ops.reduce_scatter)):
            gradient = operand(start)
            holds = gradient.meta.get("holds")
            if not isinstance(holds, FlatGradient) or gradient.meta["val"].dtype is not torch.float32:
                continue
            (wait,) = start.users
            origin: Origin = start.meta["origin"]
            data = program.call(ops.quantize, gradient, origin=origin, before=start)
            sizes = [len(data.meta["val"]) // mesh.size] * mesh.size
            exchange = program.call(ops.all_to_all, data, sizes, sizes, mesh.axis, origin=origin, before=start)
            arrived = program.call(ops.wait, exchange, origin=wait.meta["origin"], before=wait)
            of_update = replace(origin, phase=Phase.UPDATE, module=holds.bucket)
            mean = program.call(ops.mean_of_quantized, arrived, mesh.size, origin=of_update, before=wait)
            wait.replace_all_uses_with(mean)
            for dead in (wait, start):
                program.graph.erase_node(dead)
