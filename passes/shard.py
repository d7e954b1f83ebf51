"""ZeRO (Rajbhandari et al., 2020) as four small rewrites, each taking one more kind of state apart.

Stage 0 is ``AverageGradients``; stage 1 adds ``ShardOptimizer``, stage 2 ``ShardGradients``, stage 3 ``ShardParams``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.layout import Bucket
from zgraph.passes.copies import Copies, derived, readers_of
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import (
    REPLICA,
    FlatGradient,
    Input,
    Mesh,
    Origin,
    Phase,
    Program,
    Role,
    Stage,
    operand,
    update_nodes,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class AverageGradients(Pass):
    """Replace every bucket's local gradient, and the loss, by the mean over the ranks.

    flat' = update(flat, g)    ->    flat' = update(flat, wait(all_reduce(g, "avg")))

    Where the maximum is asked for, it is that.
    """

    mesh: Mesh
    takes, gives = Stage.BUCKETED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        program.mesh = self.mesh
        if self.mesh.size == 1:
            return
        readers: dict[fx.Node, list[fx.Node]] = {}  # what the update reads of forward and backward, and where
        for node in program.graph.nodes:
            if node.target is ops.max_over_ranks:
                continue
            if node.op == "call_function" and node.meta["origin"].phase is Phase.UPDATE and node.target is not ops.wait:
                for value in node.all_input_nodes:
                    if value.op == "call_function" and value.meta["origin"].phase is not Phase.UPDATE:
                        readers.setdefault(value, []).append(node)
        for value, mine in readers.items():
            is_gradient = isinstance(value.meta.get("holds"), FlatGradient)
            mean = self._average(program, value, value.next, value.next if is_gradient else mine[0])
            for reader in mine:
                reader.replace_input_with(value, mean)
        for node in program.graph.find_nodes(op="call_function", target=ops.max_over_ranks):
            self._gather_largest(program, node)
        results = program.results()
        if results[0].meta["origin"].phase is not Phase.UPDATE:
            results[0] = self._average(program, results[0], program.output_node, program.output_node)
        program.set_results(results, program.outputs)

    def _average(self, program: Program, value: fx.Node, start_before: fx.Node, wait_before: fx.Node) -> fx.Node:
        """The mean of a value over the ranks, on its way from ``start_before`` on."""
        origin: Origin = value.meta["origin"]
        start = program.call(ops.all_reduce, value, "avg", self.mesh.axis, origin=origin, before=start_before)
        return program.call(ops.wait, start, origin=origin, before=wait_before)

    def _gather_largest(self, program: Program, node: fx.Node) -> None:
        """Replace a maximum over the ranks by that of what all of them have: backends that reduce lose NaN."""
        origin, size, source = node.meta["origin"], self.mesh.size, operand(node)
        start = program.call(ops.all_gather, source, size, self.mesh.axis, origin=origin, before=node)
        every = program.call(ops.wait, start, origin=origin, before=node)
        rows = program.call(aten.view.default, every, [size, len(source.meta["val"])], origin=origin, before=node)
        node.replace_all_uses_with(program.call(aten.amax.default, rows, [0], origin=origin, before=node))
        program.graph.erase_node(node)


@dataclass(frozen=True)
class ShardOptimizer(Pass):
    """Each rank keeps 1/N of the optimizer state, updates that slice of the parameters, and shares it.

    flat' = update(flat, g, m)    ->    flat' = wait(all_gather(update(shard(flat), shard(g), m_shard)))

    A sum over all gradients becomes the sum over the ranks of what each finds in its slices. Where the mesh has nodes,
    it is the ranks of a node that divide state and share it.
    """

    mesh: Mesh
    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        program.layout = replace(program.layout, shard_state=True)
        if self.mesh.shard_size == 1:
            return
        world, axis = self.mesh.shard_size, self.mesh.shard_axis
        states: dict[str, list[fx.Node]] = {}
        for node, what in program.placeholders():
            if what.role in (Role.OPT_STATE, Role.GRADIENT):
                states.setdefault(what.name, []).append(node)
        params = program.inputs(Role.PARAM)
        updates = update_nodes(program)
        results, outputs = program.results(), list(program.outputs)
        at = {what: i for i, what in enumerate(outputs)}
        for bucket in _trainable(program):
            nodes = updates[bucket.name]
            for state in states.get(bucket.name, ()):
                val = state.meta["val"]
                if isinstance(val, torch.Tensor) and val.dim() == 1:
                    numel = program.layout.bucket(bucket.name, state.meta["input"].key).numel
                    state.meta["val"] = program.empty([numel // world], val.dtype, val.device)
            flat = params[bucket.name, ""]
            gradient = _reduced_gradient(nodes)
            for source in dict.fromkeys([flat, gradient]):
                readers = [node for node in nodes if source in node.all_input_nodes]
                if readers:
                    piece = program.call(
                        ops.shard, source, world, axis, origin=nodes[0].meta["origin"], before=readers[0]
                    )
                    for reader in readers:
                        reader.replace_input_with(source, piece)
            for node in nodes:
                if ops.creates(node.target):
                    _resize(node, bucket.numel, bucket.numel // world)
                node.meta["val"] = program.infer(node)
            index = at.get(Input(Role.PARAM, bucket.name))
            if index is None:
                continue  # gradients are added up, and parameters are not updated yet
            new = results[index]
            start = program.call(ops.all_gather, new, world, axis, origin=new.meta["origin"], before=nodes[-1].next)
            results[index] = program.call(ops.wait, start, origin=new.meta["origin"], before=start.next)
        program.set_results(results, outputs)
        for share in program.graph.find_nodes(op="call_function", target=ops.add_up):
            self._add_shares(program, share)

    def _add_shares(self, program: Program, share: fx.Node) -> None:
        """Let what reads this rank's share of a sum over all gradients read the whole sum."""
        readers, origin = list(share.users), share.meta["origin"]
        start = program.call(ops.all_reduce, share, "sum", self.mesh.shard_axis, origin=origin, before=share.next)
        whole = program.call(ops.wait, start, origin=origin, before=start.next)
        for reader in readers:
            reader.replace_input_with(share, whole)


@dataclass(frozen=True)
class ShardGradients(Pass):
    """A rank that needs only its slice of a mean gradient gets only that slice.

    shard(wait(all_reduce(g, "avg")))    ->    wait(reduce_scatter(g, "avg"))

    Where the mesh has nodes, a slice is averaged inside of the node first, and then between nodes, so that as little as
    can be crosses from one to another:

        part = wait(reduce_scatter(g, "avg", "shard"))
        mean = wait(all_reduce(part, "avg", "replica"))
    """

    mesh: Mesh
    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for node in list(program.graph.find_nodes(op="call_function", target=ops.shard)):
            mean = operand(node)
            if mean.target is not ops.wait or len(mean.users) != 1 or operand(mean).target is not ops.all_reduce:
                continue
            start = operand(mean)
            origin: Origin = start.meta["origin"]
            gradient, operation, _ = start.args
            scatter = program.call(
                ops.reduce_scatter,
                gradient,
                operation,
                self.mesh.shard_size,
                self.mesh.shard_axis,
                origin=origin,
                before=start,
            )
            piece = program.call(ops.wait, scatter, origin=origin, before=mean)
            if self.mesh.has_levels:
                between = program.call(ops.all_reduce, piece, operation, REPLICA, origin=origin, before=mean)
                piece = program.call(ops.wait, between, origin=origin, before=mean)
            node.replace_all_uses_with(piece)
            for dead in (node, mean, start):
                program.graph.erase_node(dead)


@dataclass(frozen=True)
class ReadParamsEarly(Pass):
    """Let backward read a parameter as soon as it can, so that what was gathered for it is free earlier.

        gw = mm(t(gy), x)               gx = mm(gy, w)      # w is free from here
        gx = mm(gy, w)           ->     gw = mm(t(gy), x)

    An operator moves up to its latest other input in backward, unless its result is larger than the bucket it reads.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        flats = {name: node for (name, _), node in program.inputs(Role.PARAM).items()}
        backward = {n for n in order if n.op == "call_function" and n.meta["origin"].phase is Phase.BACKWARD}
        for bucket in program.layout.buckets:
            family = set(derived(flats[bucket.name]))
            moves = []
            tails: dict[fx.Node, fx.Node] = {}  # the last node that was moved behind each
            for node in ({user for member in family for user in member.users} & backward) - family:
                val = node.meta["val"]
                others = [source for source in node.all_input_nodes if source not in family]
                if not backward.isdisjoint(others) and isinstance(val, torch.Tensor) and val.nbytes <= bucket.num_bytes:
                    latest = max(others, key=order.__getitem__)
                    moves.append((order[latest], order[node], latest, node))
            # Earliest first, so that a view that two of them share has moved up far enough for both.
            for _, _, latest, node in sorted(moves, key=lambda move: move[:2]):
                path = _path(node, family, after=order[latest], order=order)
                family.difference_update(path)
                for member in (*path, node):
                    tails.get(latest, latest).append(member)
                    tails[latest] = member


@dataclass(frozen=True)
class ShardParams(Pass):
    """Each rank keeps 1/N of the parameters; a bucket is gathered before the forward reads it, and again before
    the backward does, and is free to go after the last read of each.

        y = mm(x, view(flat))               y = mm(x, view(wait(all_gather(shard))))
        gx = mm(gy, t(view(flat)))    ->    gx = mm(gy, t(view(wait(all_gather(shard)))))
        flat' = all_gather(update(shard(flat), g))          shard' = update(shard, g)

    Gathers stand right before the first read. Hiding them is the scheduler's job.
    """

    mesh: Mesh
    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        program.layout = replace(program.layout, shard_params=True)
        if self.mesh.shard_size == 1:
            return
        position = {node: i for i, node in enumerate(program.graph.nodes)}
        params = program.inputs(Role.PARAM)
        for bucket in program.layout.buckets:
            flat = params[bucket.name, ""]
            for node in list(flat.users):
                if node.target is ops.shard:
                    node.replace_all_uses_with(flat)
                    program.graph.erase_node(node)
            flat.meta["val"] = program.empty([bucket.numel // self.mesh.shard_size], bucket.dtype, bucket.device)
            # What is derived of it may be a result itself, such as a buffer.
            results = [node for node in derived(flat) if program.output_node in node.users]
            readers = dict.fromkeys((*readers_of(flat), *results))
            for phase in (Phase.FORWARD, Phase.BACKWARD):
                mine = sorted((u for u in readers if u.meta["origin"].phase is phase), key=lambda u: position.get(u, 0))
                if mine:
                    self._gather(program, bucket, flat, mine, phase)
        results = program.results()
        for index, what in enumerate(program.outputs):
            if what is not None and what.role is Role.PARAM:
                results[index] = operand(operand(results[index]))
        program.set_results(results, program.outputs)
        remove_dead(program)

    def _gather(
        self,
        program: Program,
        bucket: Bucket,
        flat: fx.Node,
        readers: list[fx.Node],
        phase: Phase,
    ) -> None:
        """Let ``readers`` read views of a buffer gathered just before the first of them.

        A reader that belongs to the family itself is a result of the program, which is then made from that buffer.
        """
        origin = Origin(phase, bucket.name, readers[0].meta["origin"].source)
        world, axis = self.mesh.shard_size, self.mesh.shard_axis
        start = program.call(ops.all_gather, flat, world, axis, origin=origin, before=readers[0])
        copies = Copies(program, flat, program.call(ops.wait, start, origin=origin, before=readers[0]))
        for reader in readers:
            if copies.has(reader):
                program.output_node.replace_input_with(reader, copies.of(reader, reader))
            else:
                copies.give(reader)


def _path(node: fx.Node, family: set[fx.Node], *, after: int, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The views that ``node`` reads a parameter through and that are made later than position ``after``."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in family and order[source] > after and source not in found:
                found.add(source)
                queue.append(source)
    return sorted(found, key=order.__getitem__)


def _trainable(program: Program) -> list[Bucket]:
    assert program.layout is not None
    return [bucket for bucket in program.layout.buckets if bucket.trainable]


def _reduced_gradient(nodes: list[fx.Node]) -> fx.Node:
    """The averaged flat gradient that an update reads."""
    for node in nodes:
        for source in node.all_input_nodes:
            if source.target is ops.wait:
                return source
    raise AssertionError(f"no averaged gradient among the inputs of {nodes[0].meta['origin'].module}")


def _resize(node: fx.Node, old: int, new: int) -> None:
    """Let an operator that creates a flat tensor of ``old`` elements create one of ``new``."""

    def resized(arg: Any) -> Any:
        return [new] if isinstance(arg, (list, tuple)) and list(arg) == [old] else arg

    node.args = tuple(map(resized, node.args))
