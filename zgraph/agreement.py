"""Ranks agree before they communicate: a digest is exchanged before every step and after every compile.

Ranks that differ (another model, batch shape, option, learning rate; an error on one of them; one that saves while
another trains) would hang in the next collective or average unlike things. Here all of them stop with the same
explanation instead.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zgraph.comm import Comm
from zgraph.errors import RankError, StoppedError
from zgraph.groups import HeldGroup, backends

_MAX_BYTES = 4096
_made: WeakKeyDictionary[dist.ProcessGroup, itertools.count[int]] = WeakKeyDictionary()
"""Numbers for those of each group, which ranks make in the same order."""


class Agreement:
    """Exchanges short messages between all ranks, on a CPU group of its own.

    Args:
        group: the ranks; None for a single process, which always agrees with itself.
    """

    _group = HeldGroup()

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self._group = group
        if group is not None and backends(group).get("cpu") != "gloo":
            self._group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        self._behind: BaseException | None = None
        self._number = 0 if group is None else next(_made.setdefault(group, itertools.count()))

    def check(self, operation: str, facts: Mapping[str, str] | None = None, error: Exception | None = None) -> None:
        """Raise on all ranks, naming the first fact that differs, unless all do the same with the same facts.

        Args:
            operation: what the user called, which all ranks must call together.
            facts: in words, by name; the same names wherever the operation is the same.
            error: what went wrong on this rank before it knew its facts.

        Raises:
            RankError: with the operations; or with the fact's name, this rank's value and the other's; or quoting
                another rank's error.
        """
        facts = facts or {}
        if self._group is None:
            if error is not None:
                raise error
            return
        digest = hashlib.sha256(repr((operation, sorted(facts.items()))).encode()).digest()
        if len(set(self._exchange(bytes(len(digest)) if error else digest))) == 1 and error is None:
            return
        mine = json.dumps({"operation": operation, "facts": dict(facts), "error": str(error) if error else ""}).encode()
        everyone = [json.loads(raw) for raw in self._exchange_long(mine)]
        if error is not None:
            raise error
        for rank, other in enumerate(everyone):
            if other["error"]:
                raise _failed(rank, other["error"])
        for rank, other in enumerate(everyone):
            if other["operation"] != everyone[0]["operation"]:
                raise RankError(
                    f"rank 0 has called {_called(everyone[0])}, rank {rank} {_called(other)}",
                    fix="call each of them on all ranks, in the same order",
                )
        for name, value in everyone[0]["facts"].items():
            for rank, other in enumerate(everyone):
                if other["facts"][name] != value:
                    raise RankError(
                        f"the ranks disagree on {name}: {_difference(value, other['facts'][name], rank)}",
                        fix="run the same script with the same model, options and batch shapes on all ranks",
                    )
        raise AssertionError("digests differ but no fact does")

    @contextmanager
    def no_return(self) -> Iterator[None]:
        """Around what takes all ranks to its end: this rank is behind the others for good if it fails inside.

        The others are told why, for when they meet that this one has stopped.

        Raises:
            RankError: another rank has stopped first, and this one has met that; with that rank's reason.
        """
        try:
            yield
        except BaseException as error:
            if self._group is None:
                raise
            first = self._told_first(error)
            if first is None or not _is_of_another(error):
                self._behind = error
                raise
            self._behind = first
            raise first from error

    def _told_first(self, error: BaseException) -> RankError | None:
        """Say why this rank stops, unless another has said so before; what that was."""
        assert self._group is not None
        mine = f"{self.rank} {type(error).__name__}: {error}"[:_MAX_BYTES]
        try:
            told = self._group.get_group_store().compare_set(f"zgraph stopped {self._number}", "", mine)
        except RuntimeError:  # the store went with the rank that had it
            return None
        rank, _, reason = told.decode(errors="replace").partition(" ")
        return None if rank == str(self.rank) else _failed(int(rank), reason)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a part that may fail on one rank alone: all go on, or all raise, as ``share_outcome`` does.

        Before a collective inside, every rank calls ``share_outcome`` too, where it meets one that has failed.
        """
        try:
            yield
        except RankError:
            raise  # from another rank, in an exchange that all of them took part in
        except Exception as error:
            self.share_outcome(b"", error)
            raise
        self.share_outcome(b"", None)

    def share_outcome(self, digest: bytes, error: Exception | None) -> None:
        """After a part that may fail on one rank alone: raise everywhere if it failed anywhere.

        Args:
            digest: of what was made; must be the same on all ranks.
            error: what went wrong on this rank.

        Raises:
            ZgraphError: this rank's own error, or RankError quoting the first other rank's.
        """
        if self._group is None:
            if error is not None:
                raise error
            return
        status = b"ok" + digest if error is None else b"no" + str(error).encode()[:_MAX_BYTES]
        everyone = self._exchange_long(status)
        if error is not None:
            raise error
        for rank, other in enumerate(everyone):
            if other[:2] == b"no":
                raise _failed(rank, other[2:].decode(errors="replace"))
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise RankError(
                    f"rank {rank} compiled another program than rank 0",
                    fix="use the same model, options, and versions of torch and zgraph on all ranks",
                )

    def of_first(self, make: Callable[[], str]) -> str:
        """What ``make`` gives on rank 0, on all ranks, so that they decide alike where machines differ a little.

        Raises:
            ZgraphError: rank 0's own error, or RankError quoting it.
        """
        if self._group is None:
            return make()
        message, error = b"", None
        if self.rank == 0:
            try:
                message = b"ok" + make().encode()
            except Exception as caught:  # noqa: BLE001 -- the other ranks are told before this one stops
                message, error = b"no" + str(caught).encode()[:_MAX_BYTES], caught
        message = self._exchange_long(message)[0]
        if error is not None:
            raise error
        if message[:2] == b"no":
            raise _failed(0, message[2:].decode(errors="replace"))
        return message[2:].decode()

    def least(self, number: int) -> int:
        """The smallest number of all ranks; none is negative, and any from 2**64 - 1 on counts as that."""
        if self._group is None:
            return number
        told = min(number, 2**64 - 1).to_bytes(8, "little")
        return min(int.from_bytes(raw, "little") for raw in self._exchange(told))

    def _exchange(self, message: bytes) -> list[bytes]:
        """All ranks' messages; all of one length."""
        if self._behind is not None:
            raise RankError(
                "an earlier error has stopped this rank between the collectives of a step, so that it is behind the "
                f"others: {type(self._behind).__name__}: {self._behind}",
                fix="mend that error, restart all ranks and load the state that was saved last",
            ) from self._behind
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        theirs = [torch.empty_like(mine) for _ in range(self.world)]
        try:
            dist.all_gather(theirs, mine, group=self._group)
        except RuntimeError as error:  # what gloo raises when a peer is gone
            first = self._told_first(error)
            if first is not None:
                raise first from error
            raise StoppedError(
                f"another rank has stopped: {error}", fix="look for the first error among the ranks' outputs"
            ) from error
        return [bytes(t.tolist()) for t in theirs]

    def _exchange_long(self, message: bytes) -> list[bytes]:
        """All ranks' messages, of any length."""
        lengths = [int.from_bytes(raw, "little") for raw in self._exchange(len(message).to_bytes(8, "little"))]
        padded = self._exchange(message.ljust(max(lengths), b"\0"))
        return [raw[:length] for raw, length in zip(padded, lengths, strict=True)]


class CheckedComm:
    """Collectives that start only when all ranks are about to start the same one.

    gloo does not notice two all-reduces of one shape in another order: it sums unlike tensors and says nothing.

    Args:
        comm: does the work.
        agreement: of all ranks, which issue the same collectives along each axis of the mesh.
    """

    def __init__(self, comm: Comm, agreement: Agreement) -> None:
        self._comm, self._agreement = comm, agreement
        self.rank, self.world, self.traffic = comm.rank, comm.world, comm.traffic
        self.is_staged = comm.is_staged
        self.axes = {name: CheckedComm(among, agreement) for name, among in comm.axes.items()}

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor | None = None, *, tag: str = "") -> Any:
        """As ``Comm.all_gather``.

        Raises:
            RankError: on all ranks, with what each is about to start.
        """
        self._agreement.check(tag)
        return self._comm.all_gather(shard, out)

    def share(self, shard: torch.Tensor, *, tag: str = "") -> Any:
        """As ``Comm.share``; raises as ``all_gather`` does."""
        self._agreement.check(tag)
        return self._comm.share(shard)

    def reduce_scatter(
        self, full: torch.Tensor, operation: str, out: torch.Tensor | None = None, *, tag: str = ""
    ) -> Any:
        """As ``Comm.reduce_scatter``; raises as ``all_gather`` does."""
        self._agreement.check(tag)
        return self._comm.reduce_scatter(full, operation, out)

    def all_reduce(self, value: torch.Tensor, operation: str, *, tag: str = "") -> Any:
        """As ``Comm.all_reduce``; raises as ``all_gather`` does."""
        self._agreement.check(tag)
        return self._comm.all_reduce(value, operation)

    def all_to_all(self, full: torch.Tensor, *, tag: str = "") -> Any:
        """As ``Comm.all_to_all``; raises as ``all_gather`` does."""
        self._agreement.check(tag)
        return self._comm.all_to_all(full)

    def wait(self, started: Any) -> torch.Tensor:
        return self._comm.wait(started)

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        return self._comm.shard(full)


def _is_of_another(error: BaseException) -> bool:
    """Whether an error is that of a collective that another rank does not take part in."""
    return isinstance(error, StoppedError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _failed(rank: int, message: str) -> RankError:
    return RankError(f"rank {rank} failed: {message}", fix="mend what failed there; this rank has stopped with it")


def _called(one: Mapping[str, Any]) -> str:
    """What a rank has called, with its batch if that is what it was called for."""
    batch = one["facts"].get("the batch")
    return one["operation"] if batch is None else f"{one['operation']} ({batch})"


def _difference(first: str, other: str, rank: int) -> str:
    """The part of two long descriptions where they part."""
    at = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    start = max(0, at - 40)
    shown = [("..." if start else "") + text[start : start + 160] for text in (first, other)]
    return f"rank 0 has {shown[0]!r}, rank {rank} has {shown[1]!r}"
