"""Updates that mix the elements of a parameter, as one call for a bucket: see ``zgraph.codegen.owned``."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.owned import OwnedUpdate, Part, Place
from zgraph.layout import Bucket, Layout
from zgraph.passes.updates import Updates
from zgraph.program import Input, Program, Role

aten = torch.ops.aten


def owned_update(
    program: Program,
    updates: Updates,
    layout: Layout,
    bucket: Bucket,
    copies: Mapping[fx.Node, fx.Node],
    before: fx.Node,
) -> dict[Input, fx.Node]:
    """Create the call, and return what it gives: the new values of the bucket's parameters and of their state.

    Args:
        bucket: of whole parameters.
        copies: what the bucket has in place of what its first parameter has.
        before: insertion point.
    """
    return _Builder(program, updates, layout, bucket, copies).call(before)


class _Builder:
    def __init__(
        self,
        program: Program,
        updates: Updates,
        layout: Layout,
        bucket: Bucket,
        copies: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.program, self.updates, self.layout, self.bucket = program, updates, layout, bucket
        self.names = [segment.name for segment in bucket.segments]
        self.stored = {term: copy for node, copy in copies.items() if (term := updates.term(node)) is not None}
        self.nodes = {
            name: [node for node in updates.nodes[name] if node not in updates.apart[name]] for name in self.names
        }
        self.whats = [
            what
            for what in updates.results[self.names[0]]
            if what.role is not Role.GRADIENT and updates.is_vector(what)
        ]
        self.shared: dict[Hashable, fx.Node] = {}  # what all parameters read alike, once
        inputs: dict[fx.Node, None] = {}
        for name in self.names:
            inside = set(self.nodes[name])
            used = [source for node in self.nodes[name] for source in node.all_input_nodes]
            used += [result for result in self.results(name) if result not in inside]
            inputs.update(dict.fromkeys(self.input_for(source) for source in used if source not in inside))
        self.flat = {copy for copy in copies.values() if _is_flat(copy)}
        stored = (node for node in copies.values() if node in self.flat and node.op == "placeholder")
        inputs.update(dict.fromkeys(node for node in stored if node.meta["input"].role is not Role.GRADIENT))
        self.inputs = list(inputs)  # with state that is not read, but written over

    def results(self, name: str) -> list[fx.Node]:
        """A parameter's new value, and those of its state."""
        return [self.updates.results[name][replace(what, name=name)] for what in self.whats]

    def input_for(self, source: fx.Node) -> fx.Node:
        """What the call is given for what a parameter's update reads."""
        term = self.updates.term(source)
        return self.stored[term] if term in self.stored else self.shared.setdefault(term, source)

    def call(self, before: fx.Node) -> dict[Input, fx.Node]:
        """The call, and what it gives."""
        bodies: dict[Hashable, fx.Graph] = {}
        parts = []
        for name, owner in zip(self.names, self.bucket.owners, strict=True):
            takes = tuple(self.place(name, node) for node in self.inputs)
            gives = tuple(self.place_of(name, what.key) for what in self.whats)
            results = self.results(name)
            key = (tuple(map(self.updates.term, results)), *(place and place.shape for place in takes))
            if key not in bodies:
                bodies[key] = self.body(self.nodes[name], results, takes)
            parts.append(Part(name, owner, takes, gives, bodies[key]))
        dtypes = tuple(result.meta["val"].dtype for result in self.results(self.names[0]))
        update = OwnedUpdate(
            f"update_{self.bucket.name}", tuple(parts), self.layout.world, dtypes, (None,) * len(dtypes)
        )
        origin = replace(self.nodes[self.names[0]][-1].meta["origin"], module=self.bucket.name)
        call = self.program.call(update, *self.inputs, origin=origin, before=before)
        return {
            replace(what, name=self.bucket.name): self.program.call(
                operator.getitem, call, index, origin=origin, before=before
            )
            for index, what in enumerate(self.whats)
        }

    def place(self, name: str, node: fx.Node) -> Place | None:
        """Where an input has what belongs to a parameter; None if it is the same for all."""
        if node not in self.flat:
            return None
        what: Input | None = node.meta.get("input")
        return self.place_of(name, "" if what is None else what.key)

    def place_of(self, name: str, key: str) -> Place:
        bucket, segment = self.layout.of_state(key).find(name)
        return Place(segment.offset, segment.shape, bucket.numel)

    def body(self, nodes: Sequence[fx.Node], results: Sequence[fx.Node], takes: Sequence[Place | None]) -> fx.Graph:
        """A parameter's update as a graph of its own, whose results lie in none of its inputs."""
        body = fx.Graph()
        given: dict[fx.Node, fx.Node] = {}
        for index, (node, place) in enumerate(zip(self.inputs, takes, strict=True)):
            val = node.meta["val"]
            given[node] = body.placeholder(f"in{index}")
            given[node].meta["val"] = val if place is None else self.program.empty(place.shape, val.dtype, val.device)
        copies: dict[fx.Node, fx.Node] = {}

        def copied(source: fx.Node) -> fx.Node:
            return copies[source] if source in copies else given[self.input_for(source)]

        for node in nodes:
            copies[node] = body.node_copy(node, copied)
            copies[node].meta["val"] = self.program.infer(copies[node])
        made = [copied(result) for result in results]
        for index, result in enumerate(made):
            if ops.root_of(result).op == "placeholder" or result in made[:index]:
                made[index] = body.call_function(aten.clone.default, (result,))
                made[index].meta.update(origin=nodes[-1].meta["origin"])
                made[index].meta["val"] = self.program.infer(made[index])
        body.output(made)
        return body


def _is_flat(node: Any) -> bool:
    val = node.meta["val"] if isinstance(node, fx.Node) else node
    return isinstance(val, torch.Tensor) and val.dim() == 1
