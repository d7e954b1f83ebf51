"""The update of the parameters of a bucket, each computed as a whole by the rank that owns it.

    rank 0    p[0:64], m[0:64] = body(p[0:64], g[0:64], m[0:64])
    rank 1    p[64:96], m[64:96] = body(p[64:96], g[64:96], m[64:96])

An ``OwnedUpdate`` is the target of a single program node, the same on all ranks; which parts run depends on the rank.
Where buckets are not divided, every rank runs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from zgraph.codegen.kernel import expressions
from zgraph.codegen.source import SourceWriter
from zgraph.liveness import last_uses
from zgraph.program import copy_graph


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a flat one of ``numel`` elements, counted over all ranks."""

    offset: int
    shape: tuple[int, ...]
    numel: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape)

    def view(self, flat: torch.Tensor, *, rank: int | None, world: int) -> torch.Tensor:
        """The tensor, in the part of the flat one that ``rank`` has; None has all of it."""
        start = 0 if rank is None else rank * (self.numel // world)
        return flat[self.offset - start : self.end - start].view(self.shape)


@dataclass(frozen=True, eq=False)
class Part:
    """What is computed for one parameter.

    Attributes:
        name: of the parameter, for messages.
        owner: the rank that computes it.
        takes: of each input, where this parameter's part of it lies; None for one that all parts read as it is.
        gives: of each result, where it goes.
        body: placeholders are the inputs in order; the output's argument is the list of results. None of them lies
            in an input.
    """

    name: str
    owner: int
    takes: tuple[Place | None, ...]
    gives: tuple[Place, ...]
    body: fx.Graph


@dataclass(frozen=True, eq=False)
class OwnedUpdate:
    """Updates of whole parameters.

    Attributes:
        name: for messages and generated code.
        parts: one for each parameter.
        world: how many ranks own them.
        dtypes: of the results.
        writes: for each result, the index of the input that it overwrites, or None for a new tensor.
    """

    name: str
    parts: tuple[Part, ...]
    world: int
    dtypes: tuple[torch.dtype, ...]
    writes: tuple[int | None, ...]
    _compiled: dict[fx.Graph, Callable[..., list[torch.Tensor]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        """What each rank computes, independent of node names."""
        bodies = {body: f"body{i}" for i, body in enumerate(self.bodies())}
        lines = [f"{name} = {expressions(body)}" for body, name in bodies.items()]
        for part in self.parts:
            takes = ", ".join("all" if p is None else f"{p.offset}:{list(p.shape)}" for p in part.takes)
            gives = ", ".join(f"{p.offset}:{list(p.shape)}" for p in part.gives)
            lines.append(f"rank {part.owner}: {gives} = {bodies[part.body]}({takes})")
        return f"{self.name}{{{'; '.join(lines)} over {list(self.writes)}}}"

    def bodies(self) -> list[fx.Graph]:
        """Those that there are; parameters of one shape may have the same."""
        return list(dict.fromkeys(part.body for part in self.parts))

    def copy(self) -> OwnedUpdate:
        """One with bodies of its own."""
        bodies = {body: copy_graph(body) for body in self.bodies()}
        return replace(self, parts=tuple(replace(part, body=bodies[part.body]) for part in self.parts))

    def is_divided(self, inputs: tuple[Any, ...]) -> bool:
        """Whether tensors, or their values on a node, are a rank's part of flat ones."""
        return any(
            place is not None and len(given) * self.world == place.numel and self.world > 1
            for given, place in zip(inputs, self.parts[0].takes, strict=True)
        )

    def infer(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes and dtypes of the results."""
        world = self.world if self.is_divided(inputs) else 1
        device = next(x.device for x, place in zip(inputs, self.parts[0].takes, strict=True) if place is not None)
        return tuple(
            torch.empty(place.numel // world, dtype=dtype, device=device)
            for place, dtype in zip(self.parts[0].gives, self.dtypes, strict=True)
        )

    def __call__(self, *inputs: Any, rank: int | None = None) -> list[torch.Tensor]:
        """Compute the results.

        Args:
            inputs: whole flat tensors, and numbers; or a rank's parts of them.
            rank: whose parts they are; None if they are whole.
        """
        flat = next(x for x, place in zip(inputs, self.parts[0].takes, strict=True) if place is not None)
        world = 1 if rank is None else self.world
        results = [
            torch.zeros(place.numel // world, dtype=dtype, device=flat.device) if write is None else inputs[write]
            for place, dtype, write in zip(self.parts[0].gives, self.dtypes, self.writes, strict=True)
        ]
        for part in self.parts:
            if rank is None or part.owner == rank:
                given = [
                    x if place is None else place.view(x, rank=rank, world=self.world)
                    for x, place in zip(inputs, part.takes, strict=True)
                ]
                for result, place, value in zip(results, part.gives, self._function(part.body)(given), strict=True):
                    place.view(result, rank=rank, world=self.world).copy_(value)
        return results

    def _function(self, body: fx.Graph) -> Callable[..., list[torch.Tensor]]:
        if body not in self._compiled:
            writer = SourceWriter()
            filename = f"<zgraph {self.name} {id(body):x}>"
            self._compiled[body] = writer.compile("\n".join(_lines(body, writer)) + "\n", "body", filename)
        return self._compiled[body]


def _lines(body: fx.Graph, writer: SourceWriter) -> Iterator[str]:
    """``body(inputs) -> results``; values are dropped right after their last use."""
    names = {node: f"v{index}" for index, node in enumerate(body.nodes)}
    dying = last_uses(body)
    yield "def body(inputs):"
    yield f"    [{', '.join(names[node] for node in body.find_nodes(op='placeholder'))}] = inputs"
    for node in body.nodes:
        if node.op == "call_function":
            yield f"    {names[node]} = {writer.call(node, names)}"
            dead = [names[value] for value in dying.get(node, ())]
            if dead:
                yield f"    del {', '.join(dead)}"
    yield f"    return {writer.argument(body.output_node().args[0], names)}"
