"""Collectives of ranks that read each other's memory, for gloo groups on one host.

A rank tells its peers by short messages where the tensor lies that it sends. Each reads what it needs when it waits,
straight to where it belongs or, to add it up, through a buffer that stays in cache, and says when it is done. Cores are
busy computing, so nothing is read earlier: a thread would take the time from somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zgraph.comm import MESSAGE_BYTES, Group, PointToPointComm, Traffic, Transfer
from zgraph.errors import RankError, StoppedError
from zgraph.peer_memory import PeerMemory
from zgraph.shared_memory import whole_of

PASSING_BYTES = 2**19
"""Of a peer's part that is added up at once: it and what it is added to stay in a cache of the second level."""


class _Exchange:
    """A tensor of each rank that the others may read, until all have said that they are done.

    Args:
        pairs: sends the messages.
        memory: of the ranks.
        what: the collective, in words.
        tensor: contiguous; must stay and be unchanged until the last ``hear``.
        rounds: how often all ranks will ``say`` something and ``hear`` it from the others.
    """

    def __init__(
        self, pairs: PointToPointComm, memory: PeerMemory, what: str, tensor: torch.Tensor, rounds: int
    ) -> None:
        assert tensor.is_contiguous(), what
        self._rank, self._memory, self._what, self._tensor = pairs.rank, memory, what, tensor
        # Everything is received from the start, so that what is sent later finds its receiver ready.
        self._places, *self._rounds = (_Messages(pairs, what, 2) for _ in range(1 + rounds))
        self._places.send(torch.tensor([tensor.data_ptr(), tensor.nbytes]))
        self._said = self._heard = 0

    def read(self, peer: int, start: int, out: torch.Tensor) -> None:
        """Fill ``out`` with a peer's elements from ``start`` on, as soon as the peer has come as far as to send them.

        Raises:
            RankError: the peer has stopped, or sends a tensor of another size.
        """
        address, num_bytes = self._places.of(peer).tolist()
        if num_bytes != self._tensor.nbytes:
            raise RankError(
                f"rank {peer} sends {num_bytes:,} bytes in {self._what} where rank {self._rank} has "
                f"{self._tensor.nbytes:,}",
                fix="run the same script with the same model, options and batch shapes on all ranks",
            )
        self._memory.read(peer, address + start * out.itemsize, out, self._what)

    def say(self) -> None:
        """Tell the others that this rank has got to the end of a round."""
        self._rounds[self._said].send(torch.zeros(2, dtype=torch.int64))
        self._said += 1

    def hear(self) -> None:
        """Wait until the others are at the end of the next round."""
        self._places.all()
        self._rounds[self._heard].all()
        self._heard += 1


class _Messages:
    """One from each peer and one to all of them, each a vector of so many elements."""

    def __init__(self, pairs: PointToPointComm, what: str, numel: int, dtype: torch.dtype = torch.int64) -> None:
        self._pairs, self._what, self._tag = pairs, what, pairs.next_tag()
        self._contents = {peer: torch.empty(numel, dtype=dtype) for peer in pairs.peers}
        self._receiving = {peer: pairs.receive(into, peer, self._tag) for peer, into in self._contents.items()}
        self._sent: torch.Tensor | None = None
        self._sending: dict[int, dist.Work] = {}

    def send(self, content: torch.Tensor) -> None:
        """To all peers."""
        self._sent = content  # stays until it is with them
        self._sending = {peer: self._pairs.send(content, peer, self._tag) for peer in self._pairs.peers}

    def of(self, peer: int) -> torch.Tensor:
        """A peer's, once it is here."""
        work = self._receiving.pop(peer, None)
        if work is not None:
            self._finish(work, peer)
        return self._contents[peer]

    def all(self) -> dict[int, torch.Tensor]:
        """The peers', once all are here."""
        found = {peer: self.of(peer) for peer in self._pairs.peers}
        while self._sending:
            peer, work = self._sending.popitem()
            self._finish(work, peer)
        return found

    def _finish(self, work: dist.Work, peer: int) -> None:
        try:
            work.wait()
        except RuntimeError as error:  # what gloo raises when a peer is gone, or does not answer in time
            raise StoppedError(
                f"rank {peer} has stopped before the end of {self._what}: {error}",
                fix="look for the first error among the ranks' outputs",
            ) from error


@dataclass
class _Started:
    """A collective that has been started, and how to finish it; what is sent is held by ``finish``."""

    finish: Callable[[], torch.Tensor]


class DirectComm(Group):
    """Reads of the peers' memory, and transfers of what is tiny.

    A wait returns when the peers have read what this rank sent, too, so that it may be overwritten or freed at once.
    All ranks wait in the same order.

    Args:
        group: a gloo group.
        pids: process ids by rank, of ``zgraph.peer_memory.find_readable_peers``.
        message_bytes: what a rank sends to another is not read but sent if it is no more.
        passing_bytes: of a peer's part, so many are read at once and added up.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        pids: Sequence[int],
        *,
        message_bytes: int = MESSAGE_BYTES,
        passing_bytes: int = PASSING_BYTES,
    ) -> None:
        super().__init__(group)
        self._pairs, self._memory = PointToPointComm(group), PeerMemory(pids)
        self._pairs.traffic = self.traffic
        self._message_bytes, self._passing_bytes = message_bytes, passing_bytes

    def count_along(self, axis: str, traffic: Traffic) -> None:
        super().count_along(axis, traffic)
        self._pairs.count_along(axis, traffic)

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None) -> _Started | Transfer:
        if shard.nbytes <= self._message_bytes:
            return self._pairs.all_gather(shard, out)
        self._count("all_gather", shard.nbytes * (self.world - 1))
        size = shard.shape[0]
        result = shard.new_empty(size * self.world) if out is None else out
        exchange = _Exchange(self._pairs, self._memory, "an all-gather", shard, rounds=1)

        def finish() -> torch.Tensor:
            for peer in self._pairs.peers:
                exchange.read(peer, 0, result[peer * size : (peer + 1) * size])
            exchange.say()
            own = self.shard(result)
            if own.data_ptr() != shard.data_ptr():
                own.copy_(shard)
            exchange.hear()
            return result

        return _Started(finish)

    def share(self, shard: torch.Tensor) -> _Started | Transfer:
        whole = whole_of(shard)
        if whole is None:
            return self.all_gather(shard)
        self._count("share", 0)
        messages = _Messages(self._pairs, "the sharing of parameters", 1)
        messages.send(torch.zeros(1, dtype=torch.int64))

        def finish() -> torch.Tensor:
            messages.all()
            return whole

        return _Started(finish)

    def reduce_scatter(
        self, full: torch.Tensor, operation: str, out: torch.Tensor | None = None
    ) -> _Started | Transfer:
        if full.nbytes // self.world <= self._message_bytes:
            return self._pairs.reduce_scatter(full, operation, out)
        self._count("reduce_scatter", self._others(full.nbytes))
        divisor = self._divisor(operation)
        own = self.shard(full)
        result = torch.empty_like(own) if out is None else out
        exchange = _Exchange(self._pairs, self._memory, "a reduce-scatter", full, rounds=1)

        def finish() -> torch.Tensor:
            self._add_up(exchange, own, self.rank * len(own), result)
            exchange.say()
            _divide(result, divisor)
            exchange.hear()
            return result

        return _Started(finish)

    def all_reduce(self, value: torch.Tensor, operation: str) -> _Started:
        self._count("all_reduce", 2 * self._others(value.nbytes))
        divisor = self._divisor(operation)
        result = value.clone()
        flat = result.as_strided((result.numel(),), (1,))  # a clone has no gaps
        if value.nbytes <= self._message_bytes:
            return self._all_reduce_by_messages(result, flat, divisor)
        size = -(-len(flat) // self.world)
        parts = [flat[rank * size : (rank + 1) * size] for rank in range(self.world)]
        exchange = _Exchange(self._pairs, self._memory, "an all-reduce", flat, rounds=2)

        def finish() -> torch.Tensor:
            own = parts[self.rank]  # the others read it only once it is summed up
            self._add_up(exchange, own, self.rank * size, own)
            _divide(own, divisor)
            exchange.say()
            exchange.hear()
            for peer in self._pairs.peers:
                exchange.read(peer, peer * size, parts[peer])
            exchange.say()
            exchange.hear()
            return result

        return _Started(finish)

    def all_to_all(self, full: torch.Tensor) -> _Started | Transfer:
        size = full.shape[0] // self.world
        if full.nbytes // self.world <= self._message_bytes:
            return self._pairs.all_to_all(full)
        self._count("all_to_all", self._others(full.nbytes))
        result = torch.empty_like(full)
        exchange = _Exchange(self._pairs, self._memory, "an all-to-all", full, rounds=1)

        def finish() -> torch.Tensor:
            for peer in self._pairs.peers:
                exchange.read(peer, self.rank * size, result[peer * size : (peer + 1) * size])
            exchange.say()
            self.shard(result).copy_(self.shard(full))
            exchange.hear()
            return result

        return _Started(finish)

    def wait(self, started: _Started | Transfer) -> torch.Tensor:
        return started.finish() if isinstance(started, _Started) else self._pairs.wait(started)

    def _all_reduce_by_messages(self, result: torch.Tensor, flat: torch.Tensor, divisor: int) -> _Started:
        messages = _Messages(self._pairs, "an all-reduce", len(flat), flat.dtype)
        messages.send(flat)

        def finish() -> torch.Tensor:
            values = {**messages.all(), self.rank: flat}
            total = values[0]
            for rank in range(1, self.world):
                total = torch.add(total, values[rank])
            if total is not flat:
                flat.copy_(total)
            return _divide(result, divisor)

        return _Started(finish)

    def _add_up(self, exchange: _Exchange, own: torch.Tensor, start: int, out: torch.Tensor) -> None:
        """Sum this rank's part with the peers', from element ``start`` of theirs, in rank order on every rank.

        So the result does not depend on which rank owns it. ``out`` may be ``own``.
        """
        size = self._passing_bytes // own.itemsize
        bounce = own.new_empty((1 if self.rank < 2 else 2, min(size, len(own))))
        for first in range(0, len(own), size):
            mine, result = own[first : first + size], out[first : first + size]
            before, passing = bounce[0, : len(mine)], bounce[-1, : len(mine)]
            total = mine
            if self.rank > 0:
                exchange.read(0, start + first, before)
                total = before
            for rank in range(1, self.world):
                part = mine
                if rank != self.rank:
                    exchange.read(rank, start + first, passing)
                    part = passing
                # This rank's own part may lie where the result will: nothing is written there before it is added.
                total = torch.add(total, part, out=before if rank < self.rank else result)
            if self.world == 1 and own is not out:
                result.copy_(mine)


def _divide(total: torch.Tensor, divisor: int) -> torch.Tensor:
    return total if divisor == 1 else total.div_(divisor)
