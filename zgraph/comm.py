"""Collectives of a process group, and of those along the axes of a mesh, started and waited for separately.

With NCCL and other backends these are torch's functional collectives. With gloo on CPU they are reads of the peers'
memory where all ranks share a host (``zgraph.direct``), or else point-to-point transfers straight between the tensors
concerned: gloo's own all-gather and reduce-scatter stage through a second buffer of full size and run reduce-scatter as
an all-reduce, which doubles both memory and bytes (measured in benchmarks/comm.py). ``zgraph.which_comm`` chooses.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zgraph import ops
from zgraph.groups import HeldGroup

MESSAGE_BYTES = 2**14
"""Up to so many, ranks that may read each other's memory (``zgraph.direct``) send each other the values themselves: one
message instead of two or three."""


@dataclass
class Traffic:
    """Collectives issued and bytes this rank received through them, by operation."""

    count: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, num_bytes: int) -> None:
        self.count[name] += 1
        self.received_bytes[name] += num_bytes

    def clear(self) -> None:
        self.count.clear()
        self.received_bytes.clear()

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {name: {"count": n, "bytes": self.received_bytes[name]} for name, n in sorted(self.count.items())}


class Comm(Protocol):
    """What an emitted step calls.

    Attributes:
        rank, world: which rank this is, and of how many.
        traffic: of all axes.
        axes: by name, the collectives along each axis of the mesh but that of all ranks, whose are its own.
    """

    rank: int
    world: int
    traffic: Traffic
    is_staged: bool  # see zgraph.liveness.lifetimes
    axes: dict[str, Any]

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None) -> Any: ...
    def share(self, shard: torch.Tensor) -> Any: ...
    def reduce_scatter(self, full: torch.Tensor, operation: str, out: torch.Tensor | None = None) -> Any: ...
    def all_reduce(self, value: torch.Tensor, operation: str) -> Any: ...
    def all_to_all(self, full: torch.Tensor) -> Any: ...
    def wait(self, started: Any) -> torch.Tensor: ...
    def shard(self, full: torch.Tensor) -> torch.Tensor: ...


class Group:
    """What all implementations have in common."""

    group = HeldGroup()
    is_staged = False

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        self.traffic = Traffic()
        self.axes: dict[str, Any] = {}
        self._along = ""

    def count_along(self, axis: str, traffic: Traffic) -> None:
        """Count what is sent here as what is sent along an axis."""
        self.traffic, self._along = traffic, f" along {axis}"

    def _count(self, operation: str, num_bytes: int) -> None:
        self.traffic.add(operation + self._along, num_bytes)

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's contiguous 1/world of a flat buffer, as a view."""
        size = full.shape[0] // self.world
        return full[self.rank * size : (self.rank + 1) * size]

    def share(self, shard: torch.Tensor) -> Any:
        """As ``all_gather``; where all ranks have their parts in memory that they share, without a copy."""
        return self.all_gather(shard)

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None) -> Any:
        """The parts of all ranks, one after the other."""
        raise NotImplementedError

    def _others(self, num_bytes: int) -> int:
        return num_bytes * (self.world - 1) // self.world

    def _divisor(self, operation: str) -> int:
        assert operation in ("sum", "avg"), operation
        return self.world if operation == "avg" else 1


class FunctionalComm(Group):
    """torch's functional collectives; the backend orders them on streams of its own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._name = group.group_name

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self._count("all_gather", shard.nbytes * (self.world - 1))
        if out is None:
            return _tensor(ops.all_gather(shard, self.world, self._name))
        return _tensor(ops.all_gather_into(shard, self.world, self._name, out=out))

    def reduce_scatter(self, full: torch.Tensor, operation: str, out: torch.Tensor | None = None) -> torch.Tensor:
        self._count("reduce_scatter", self._others(full.nbytes))
        if out is None:
            return _tensor(ops.reduce_scatter(full, operation, self.world, self._name))
        return _tensor(ops.c10d.reduce_scatter_tensor_out.default(full, operation, self.world, self._name, out=out))

    def all_reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        self._count("all_reduce", 2 * self._others(value.nbytes))
        return _tensor(ops.all_reduce(value, operation, self._name))

    def all_to_all(self, full: torch.Tensor) -> torch.Tensor:
        self._count("all_to_all", self._others(full.nbytes))
        sizes = [len(full) // self.world] * self.world
        return _tensor(ops.all_to_all(full, sizes, sizes, self._name))

    def wait(self, started: torch.Tensor) -> torch.Tensor:
        return _tensor(ops.wait(started))


def _tensor(value: Any) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


@dataclass
class Transfer:
    """A started transfer: requests, tensors that must stay alive and unchanged, and how to finish."""

    works: list[dist.Work]
    result: torch.Tensor
    parts: list[torch.Tensor] | None = None
    keep: torch.Tensor | None = None
    divide_by: int = 1


_tags: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""Transfers issued on each process group, by all compiled models together: a tag is used once.

By group and not by its name: a later group may have the name of one that only some of its ranks belonged to.
"""


class PointToPointComm(Group):
    """Transfers between pairs of ranks, for gloo."""

    is_staged = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.peers = [(self.rank + i) % self.world for i in range(1, self.world)]
        self.first_peer = 0 if self.rank != 0 else 1  # a reduction adds up where this peer's part has arrived

    def next_tag(self) -> int:
        # All ranks issue the same operations in the same order, so equal counts name the same operation.
        assert self.group is not None
        _tags[self.group] = _tags.get(self.group, 0) + 1
        return _tags[self.group] % 2**30

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> dist.Work:
        work = dist.isend(tensor, group_dst=peer, group=self.group, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, peer: int, tag: int) -> dist.Work:
        work = dist.irecv(tensor, group_src=peer, group=self.group, tag=tag)
        assert work is not None
        return work

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None) -> Transfer:
        tag, size = self.next_tag(), shard.shape[0]
        self._count("all_gather", shard.nbytes * (self.world - 1))
        if out is None:
            out = shard.new_empty(size * self.world)
        works = [self.receive(out[p * size : (p + 1) * size], p, tag) for p in self.peers]
        works += [self.send(shard, p, tag) for p in self.peers]
        own = self.shard(out)
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard)
        return Transfer(works, out, keep=shard)

    def reduce_scatter(self, full: torch.Tensor, operation: str, out: torch.Tensor | None = None) -> Transfer:
        tag, size = self.next_tag(), full.shape[0] // self.world
        self._count("reduce_scatter", self._others(full.nbytes))
        given = {self.rank: self.shard(full)}
        if out is not None:
            given[self.first_peer] = out
        parts = [given[p] if p in given else full.new_empty(size) for p in range(self.world)]
        works = [self.receive(parts[p], p, tag) for p in self.peers]
        works += [self.send(full[p * size : (p + 1) * size], p, tag) for p in self.peers]
        return Transfer(works, full, parts, divide_by=self._divisor(operation))

    def all_reduce(self, value: torch.Tensor, operation: str) -> Transfer:
        self._count("all_reduce", 2 * self._others(value.nbytes))
        result = value.clone()
        work = dist.all_reduce(result, group=self.group, async_op=True)
        assert work is not None
        return Transfer([work], result, divide_by=self._divisor(operation))

    def all_to_all(self, full: torch.Tensor) -> Transfer:
        tag, size = self.next_tag(), full.shape[0] // self.world
        self._count("all_to_all", self._others(full.nbytes))
        out = torch.empty_like(full)
        works = [self.receive(out[p * size : (p + 1) * size], p, tag) for p in self.peers]
        works += [self.send(full[p * size : (p + 1) * size], p, tag) for p in self.peers]
        self.shard(out).copy_(self.shard(full))
        return Transfer(works, out, keep=full)

    def wait(self, started: Transfer) -> torch.Tensor:
        for work in started.works:
            work.wait()
        result = started.result
        if started.parts is not None:
            # Summed in rank order on every rank, so that the result does not depend on which rank owns it.
            first, second, *rest = started.parts
            result = torch.add(first, second, out=started.parts[self.first_peer])
            for part in rest:
                result += part
        if started.divide_by != 1:
            result.div_(started.divide_by)
        return result


class SingleComm(Group):
    """One rank: there is nothing to send."""

    def __init__(self) -> None:
        super().__init__(None)

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("a program for one rank has no collectives")

    def reduce_scatter(self, full: torch.Tensor, operation: str, out: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("a program for one rank has no collectives")

    def all_reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        raise AssertionError("a program for one rank has no collectives")

    def all_to_all(self, full: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a program for one rank has no collectives")

    def wait(self, started: Any) -> torch.Tensor:
        raise AssertionError("a program for one rank has no collectives")
