"""What a program computes on all of its ranks, in one process and without a process group.

``run_ranks`` takes all ranks through the graph together, node by node, so that a collective sees what each of them
sends; it gives every collective its meaning, and so needs no code to be emitted. ``divide`` and ``join`` turn the
values of parameters into those of each rank's buckets, and back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from zgraph import ops
from zgraph.codegen.owned import OwnedUpdate
from zgraph.errors import RankError, first_line, quoted
from zgraph.generators import RandomStream
from zgraph.layout import Layout
from zgraph.liveness import last_uses
from zgraph.packed import pack, unpack
from zgraph.program import OF_PARAMETERS, Input, Mesh, Program, Role, target_name

Value = torch.Tensor | float | int
Values = dict[Input | None, Value]
"""What goes into a program or comes out of it, on one rank; None is the loss."""


def run_ranks(
    program: Program,
    inputs: Sequence[Values],
    *,
    streams: Sequence[RandomStream] | None = None,
    late: bool = False,
    overwrite: bool = False,
) -> list[Values]:
    """What each rank's results are.

    A mean or a sum over ranks is taken in rank order, as ``PointToPointComm`` takes it.

    Args:
        program: at any stage.
        inputs: of each rank.
        streams: what each rank draws from; by default what it draws after ``torch.manual_seed(rank)``.
        late: collectives read what they send, and write what they bring, as late as they may; by default as early.
        overwrite: the program may write over parameters and optimizer state; by default it gets copies of these.

    Raises:
        RankError: an operator failed on some rank. The streams may have moved on.
    """
    ranks = range(len(inputs))
    values: list[dict[fx.Node, Any]] = [{} for _ in ranks]
    streams = [RandomStream(rank) for rank in ranks] if streams is None else streams
    dying = last_uses(program.graph)
    with torch.enable_grad():  # as a real step, for operators that keep more in grad mode; nothing requires a gradient
        for node in program.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                what: Input = node.meta["input"]
                if what.role is Role.GATHERED:
                    for group in _groups(program.mesh, program.mesh.shard_axis, len(inputs)):
                        parts = [inputs[rank][Input(Role.PARAM, what.name)] for rank in group]
                        whole = torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
                        for rank in group:
                            values[rank][node] = whole.to(node.meta["val"].dtype)
                    continue
                copied = what.role in OF_PARAMETERS and not overwrite
                for mine, given in zip(values, inputs, strict=True):
                    value = given[what]
                    value = value.detach() if isinstance(value, torch.Tensor) else value
                    mine[node] = value.clone() if copied and isinstance(value, torch.Tensor) else value
            elif node.target in ops.ASYNCHRONOUS:
                for group in _together(program.mesh, node, len(inputs)):
                    started = _Started(node, [values[rank] for rank in group])
                    if late:
                        started.spoil()
                    else:
                        started.receive()
                    for rank in group:
                        values[rank][node] = started
            elif node.target is ops.wait:
                for group in _together(program.mesh, node, len(inputs)):
                    received = values[group[0]][node.args[0]].receive()
                    for rank, value in zip(group, received, strict=True):
                        values[rank][node] = value
            else:
                for rank in ranks:
                    values[rank][node] = _evaluate(node, values[rank], rank, program.mesh, len(ranks), streams[rank])
            for dead in dying.get(node, ()):
                for mine in values:
                    del mine[dead]
    outputs = list(zip(program.outputs, program.results(), strict=True))
    return [
        {what: mine[node] if isinstance(node, fx.Node) else node for what, node in outputs}  # numbers are themselves
        for mine in values
    ]


def _together(mesh: Mesh, node: fx.Node, num_ranks: int) -> list[range]:
    """The ranks that take part in a collective, or each by itself in a transfer between tiers; likewise of its wait."""
    started = node.args[0] if node.target is ops.wait else node
    if isinstance(started, fx.Node) and started.target in ops.TRANSFERS:
        return [range(rank, rank + 1) for rank in range(num_ranks)]
    return _groups(mesh, ops.axis_of(node), num_ranks)


def _groups(mesh: Mesh, axis: str, num_ranks: int) -> list[range]:
    """The ranks that communicate along an axis; before there is a mesh, all of them would."""
    return mesh.groups(axis) if mesh.size == num_ranks else [range(num_ranks)]


def part_of(full: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The contiguous 1/world of a flat buffer that a rank owns, as a view; every ``world`` ranks divide one."""
    size, rank = len(full) // world, rank % world
    return full[rank * size : (rank + 1) * size]


class _Started:
    """A collective in flight, on all ranks, or a transfer on one; here, what lies on a lower tier is in memory, too."""

    def __init__(self, node: fx.Node, values: Sequence[Mapping[fx.Node, Any]]) -> None:
        self._node = node
        self._sent: list[torch.Tensor] = [mine[node.args[0]] for mine in values]  # type: ignore[index]
        out = node.kwargs.get("out")
        self._out: list[torch.Tensor] = [mine[out] for mine in values] if isinstance(out, fx.Node) else []
        self._received: list[torch.Tensor] | None = None

    def spoil(self) -> None:
        """What is in a buffer until the wait is anybody's guess, but for the part that a rank sends from there."""
        if self._node.target is ops.store:
            self._out[0].fill_(torch.nan if self._out[0].is_floating_point() else 0)
            return
        for rank, out in enumerate(self._out):
            size = len(out) // len(self._out)
            out[: rank * size].fill_(torch.nan)
            out[(rank + 1) * size :].fill_(torch.nan)

    def receive(self) -> list[torch.Tensor]:
        """What each rank has received; it is read from the senders the first time."""
        if self._received is None:
            self._received = self._travel()
        return self._received

    def _travel(self) -> list[torch.Tensor]:
        target, sent = self._node.target, self._sent
        if target in ops.TRANSFERS:
            return [out.copy_(sent[0]) for out in self._out] if self._out else [sent[0].clone()]
        if target in (ops.all_gather, ops.all_gather_into, ops.share):
            full = torch.cat(sent)
            return [out.copy_(full) for out in self._out] if self._out else [full.clone() for _ in sent]
        if target is ops.all_to_all:
            ranks = range(len(sent))
            return [torch.cat([part_of(full, rank, len(sent)) for full in sent]) for rank in ranks]
        reduced = _reduced(sent, self._node.args[1])
        if target is ops.all_reduce:
            return [reduced.clone() for _ in sent]
        assert target is ops.reduce_scatter, target
        return [part_of(reduced, rank, len(sent)).clone() for rank in range(len(sent))]


def _reduced(sent: Sequence[torch.Tensor], operation: Any) -> torch.Tensor:
    assert operation in ("sum", "avg"), operation
    total = sent[0].clone()
    for value in sent[1:]:
        total += value
    return total / len(sent) if operation == "avg" and len(sent) > 1 else total


def _evaluate(
    node: fx.Node, env: Mapping[fx.Node, Any], rank: int, mesh: Mesh, num_ranks: int, stream: RandomStream
) -> Any:
    arguments: Any = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    args, kwargs = arguments
    if node.target is ops.shard:
        group = next(group for group in _groups(mesh, ops.axis_of(node), num_ranks) if rank in group)
        return part_of(args[0], group.index(rank), len(group))
    assert callable(node.target), node.target
    if isinstance(node.target, OwnedUpdate) and node.target.is_divided(args):
        kwargs = {"rank": rank % node.target.world}
    try:
        if ops.draws(node):
            drawn = next(val for val in pytree.tree_leaves(node.meta["val"]) if isinstance(val, torch.Tensor))
            with stream.drawn_from(drawn.device):
                return node.target(*args, **kwargs)
        return node.target(*args, **kwargs)
    except Exception as error:
        raise RankError(
            f"rank {rank} failed in {target_name(node.target)}: {type(error).__name__}: {first_line(error)}",
            where=quoted(node.meta["origin"].source),
            fix="check what this rank was given, above all its part of the batch",
        ) from error


def divide(layout: Layout, whole: Sequence[Values], flat: Collection[Input]) -> list[Values]:
    """Each rank's values as a layout stores them, from those of whole parameters and of their optimizer state.

    Padding is NaN, so that a leak shows; but zero between gradients that add up, where it has to be, and where state is
    packed in blocks, which it would spoil.

    Args:
        layout: the buckets.
        whole: of each rank.
        flat: optimizer state that is each parameter's own tensor. Of other state, numbers for example, which must be
            equal within a bucket, the first is taken.
    """
    return [_divided(layout, values, flat, rank) for rank, values in enumerate(whole)]


def _divided(layout: Layout, whole: Values, flat: Collection[Input], rank: int) -> Values:
    mine: Values = {}
    flats: dict[Input, torch.Tensor] = {}
    for what, value in whole.items():
        if what is None or what.role not in OF_PARAMETERS:
            mine[what] = value
            continue
        bucket, segment = layout.of_state(what.key).find(what.name)
        there = Input(what.role, bucket.name, what.key)
        if what.role is Role.OPT_STATE and what not in flat:
            mine.setdefault(there, value)
            continue
        assert isinstance(value, torch.Tensor), what
        if there not in flats:
            is_zero = what.role is Role.GRADIENT or layout.packs(bucket.name, what.key)
            has_nan = value.is_floating_point() or value.is_complex()
            padding = torch.nan if has_nan and not is_zero else 0
            flats[there] = torch.full([bucket.numel], padding, dtype=value.dtype, device=bucket.device)
        flats[there][segment.offset : segment.offset + segment.numel] = value.flatten()
    for there, whole_flat in flats.items():
        sharded = layout.shard_params if there.role is Role.PARAM else layout.shard_state
        part = part_of(whole_flat, rank, layout.world).clone() if sharded else whole_flat
        packed = there.role is Role.OPT_STATE and layout.packs(there.name, there.key)
        mine[there] = pack(part) if packed else part
    return mine


def join(layout: Layout, divided: Sequence[Values]) -> list[Values]:
    """The values of whole parameters and of their optimizer state, from those that each rank stores.

    What is divided has one value for all ranks that divide it. Tensors are views of buckets.
    """
    whole: list[Values] = [{} for _ in divided]
    for what in divided[0]:
        each = [mine[what] for mine in divided]
        if what is None or what.role not in OF_PARAMETERS:
            for values, value in zip(whole, each, strict=True):
                values[what] = value
            continue
        bucket = layout.bucket(what.name, what.key)
        if what.role is Role.OPT_STATE and layout.packs(what.name, what.key):
            each = [unpack(value) if isinstance(value, torch.Tensor) else value for value in each]
        flats = [value for value in each if isinstance(value, torch.Tensor) and value.dim() == 1]
        if flats and len(flats[0]) < bucket.numel:
            nodes = [torch.cat(flats[i : i + layout.world]) for i in range(0, len(flats), layout.world)]
            each = [whole_flat for whole_flat in nodes for _ in range(layout.world)]
        for values, value in zip(whole, each, strict=True):
            for segment in bucket.segments:
                part = value
                if isinstance(value, torch.Tensor) and value.dim() == 1:
                    assert len(value) == bucket.numel, f"{what} has {len(value)} of {bucket.numel} elements"
                    part = value[segment.offset : segment.offset + segment.numel].view(segment.shape)
                values[Input(what.role, segment.name, what.key)] = part
    return whole
