"""Tensors on the host beside a device: right in every order in which copies and computing may end."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from tests.streams import Event, Streams
from zgraph import host as on_host
from zgraph.errors import HostError
from zgraph.host import Cuda, Host, Way
from zgraph.tiers import PAGE, Tier, padded

CPU = torch.device("cpu")


def tensors(host: Tier, *sizes: int) -> list[Any]:
    return [host.allocate(size, torch.int64) for size in sizes]


class Play:
    """A random program on a device whose streams are all late, and what it is to come to.

    Tensors lie in ``slots`` of the device, each of which is used again as soon as what the program was given allows: a
    load may go to where something has just been read, and a store's memory is written over once it has been waited for.

    Args:
        seed: of the program.
        streams: of the device.
        tier: where ``stored`` lies; the host if None.
        one_at_a_time: what is on its way, either way, is not moved again before it has been waited for.
        adds_up: the host's processors are given work, too.
    """

    def __init__(
        self,
        seed: int,
        streams: Streams,
        tier: Tier | None = None,
        *,
        one_at_a_time: bool = False,
        adds_up: bool = False,
    ) -> None:
        self.adds_up = adds_up
        self.random, self.streams, self.one_at_a_time = random.Random(seed), streams, one_at_a_time
        self.tier = Host(CPU, streams) if tier is None else tier
        self.tier.reserve(8 * PAGE)
        self.stored = tensors(self.tier, *[5] * 4)
        self.slots = [torch.zeros(5, dtype=torch.int64) for _ in range(4)]
        self.expected = [0] * len(self.slots)
        self.kept = [-1] * len(self.stored)
        self.moving: dict[int, Any] = {}  # slots that a copy reads or writes
        self.coming: dict[int, int] = {}  # of these, what comes
        self.on_their_way: dict[int, int] = {}  # by slot, what is moved
        for i, value in enumerate(range(100, 104)):
            self.change(i % 4, value)
            self.store(i % 4, i)
            self.wait(i % 4)

    def change(self, slot: int, value: int, sources: tuple[int, ...] = ()) -> None:
        """Compute a slot out of a number and others."""
        out, read = self.slots[slot], [self.slots[source] for source in sources]

        def work() -> None:
            total = sum((each.clone() for each in read), torch.full_like(out, value))
            out.copy_(total)

        self.streams.compute(work)
        self.expected[slot] = value + sum(self.expected[source] for source in sources)

    def load(self, slot: int, index: int) -> None:
        self.moving[slot] = self.stored[index].load(out=self.slots[slot])
        self.coming[slot], self.on_their_way[slot] = self.kept[index], index

    def store(self, slot: int, index: int) -> None:
        self.moving[slot] = self.stored[index].store(self.slots[slot])
        self.kept[index], self.on_their_way[slot] = self.expected[slot], index

    def add_up(self, index: int, other: int) -> None:
        """Let the host's processors add one to another."""
        assert isinstance(self.tier, Host)

        def work(value: torch.Tensor, more: torch.Tensor) -> None:
            value += more

        self.tier.run(work, [self.stored[index], self.stored[other]], [self.stored[index]])
        self.kept[index] += self.kept[other]

    def wait(self, slot: int) -> None:
        self.moving.pop(slot).wait()
        self.on_their_way.pop(slot)
        self.expected[slot] = self.coming.pop(slot, self.expected[slot])

    def go_on(self) -> None:
        """Do something that may be done now."""
        slot, index = self.random.randrange(len(self.slots)), self.random.randrange(len(self.stored))
        if slot in self.moving:
            return self.wait(slot)
        free = [s for s in range(len(self.slots)) if s not in self.moving]
        action = self.random.choice(["change", "load", "store", *(["add_up"] if self.adds_up else [])])
        if action == "change":
            sources = self.random.sample(free, min(len(free), 2))
            return self.change(slot, self.random.randrange(100), tuple(sources))
        if self.one_at_a_time and index in self.on_their_way.values():
            return None
        if action == "add_up":
            return self.add_up(index, (index + 1) % len(self.stored))
        return getattr(self, action)(slot, index)  # type: ignore[no-any-return]

    def is_right(self, num: int) -> bool:
        """Whether all has its value after so many actions."""
        for _ in range(num):
            self.go_on()
        for slot in list(self.moving):
            self.wait(slot)
        self.streams.finish()
        found = [each.tolist() for each in self.slots]
        kept = [load.wait() for load in [each.load() for each in self.stored]]
        self.streams.finish()
        there = [each.tolist() for each in kept]
        return found == [[value] * 5 for value in self.expected] and there == [[value] * 5 for value in self.kept]


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@few_examples(150)
def test_values_are_right_in_any_order_in_which_streams_go_on(program: int, order: int) -> None:
    assert Play(program, Streams(order, at_once=False)).is_right(60)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@few_examples(150)
def test_values_are_right_whatever_the_hosts_processors_do_meanwhile(program: int, order: int) -> None:
    assert Play(program, Streams(order, at_once=False), adds_up=True).is_right(60)


class Forgetful(Streams):
    """Does not tell copies of some events.

    Args:
        which: of copies each way: whether computing (0), or what has moved the same tensor before (1), is forgotten.
    """

    def __init__(self, seed: int, which: tuple[Way, int]) -> None:
        super().__init__(seed, at_once=False)
        self._which = which

    def copy(self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Iterable[Event]) -> Event:
        computed, *others = after
        kept = ([] if self._which == (way, 0) else [computed], [] if self._which == (way, 1) else others)
        return super().copy(way, target, source, [*kept[0], *kept[1]])


class Hasty(Streams):
    """Does not let computing wait for copies."""

    def hold_up(self, event: Event) -> None:
        pass


@pytest.mark.parametrize("which", [(Way.IN, 0), (Way.OUT, 0), (Way.IN, 1), (Way.OUT, 1)], ids=str)
def test_without_any_of_the_events_some_order_is_wrong(which: tuple[Way, int]) -> None:
    assert not all(Play(seed, Forgetful(seed, which)).is_right(60) for seed in range(60))


@pytest.mark.parametrize("forgotten", ["settle", "events"])
def test_where_the_processors_do_not_wait_or_are_not_waited_for_some_order_is_wrong(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = {
        "settle": lambda: monkeypatch.setattr(Host, "settle", lambda *_: None),
        "events": lambda: monkeypatch.setattr(Streams, "wait", lambda *_: None),
    }
    patches[forgotten]()
    assert not all(Play(seed, Streams(seed, at_once=False), adds_up=True).is_right(60) for seed in range(60))


def test_without_waiting_some_order_is_wrong() -> None:
    assert not all(Play(seed, Hasty(seed, at_once=False)).is_right(60) for seed in range(60))


# Where they lie


def test_memory_is_locked_in_few_pieces_and_let_go_with_the_last_tensor() -> None:
    streams = Streams()
    host = Host(CPU, streams)
    host.reserve(6 * PAGE)
    kept = tensors(host, *[PAGE // 8] * 6)
    assert len(streams.pinned) == 1
    assert host.used_bytes == host.num_bytes == 6 * PAGE
    assert all(each._memory.data_ptr() % PAGE == 0 for each in kept)
    more = tensors(host, PAGE // 4)[0]  # in a piece of its own, however much is free in the first one
    del kept[1]
    assert len(streams.pinned) == 2
    assert host.used_bytes == 7 * PAGE
    (again,) = tensors(host, 1)
    assert len(streams.pinned) == 2
    for i, each in enumerate([*kept, more, again]):
        each.write(torch.full(each.shape, i))
    assert [each.read()[0].item() for each in [*kept, more, again]] == list(range(7))
    del each, kept, more, again, host
    gc.collect()
    assert not streams.pinned


@pytest.mark.parametrize(
    "value", [torch.arange(6.0).view(2, 3).t(), torch.ones(2, 3, dtype=torch.bool), torch.empty(0)]
)
def test_a_part_of_a_room_is_any_tensor_without_gaps(value: torch.Tensor) -> None:
    host = Host(CPU, Streams())
    room = host.allocate(3 * PAGE, torch.uint8)
    part = room.part(PAGE, value.shape, value.stride(), value.dtype)
    part.write(value)
    found = part.read()
    assert torch.equal(found, value)
    assert found.stride() == value.stride()
    part.write(value.contiguous())
    assert part.read().stride() == value.stride()
    assert host.moved.read_bytes == host.moved.written_bytes == 2 * value.nbytes


def test_copies_have_memory_of_their_own() -> None:
    streams = Streams()
    host = Host(CPU, streams)
    first, second = tensors(host, 10, 20)
    for each, value in ((first, 1), (second, 2)):
        each.write(torch.full(each.shape, value))
    both = copy.deepcopy({"a": first, "b": [second]})
    first.write(torch.zeros(10, dtype=torch.int64))
    assert both["a"].tier is both["b"][0].tier is not host
    assert both["a"].read().tolist() == [1] * 10
    assert both["b"][0].read().tolist() == [2] * 20
    assert both["a"].tier.num_bytes == host.used_bytes == sum(map(padded, (80, 160)))


def test_what_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(CPU, Streams())
    monkeypatch.setattr(on_host, "available_bytes", lambda: 10_000)
    host.check_room(9_000, 1)
    with pytest.raises(HostError, match=r"cannot take 4501 bytes of the host's memory for each of 2 ranks: 9000 of it"):
        host.check_room(4_501, 2)
    with pytest.raises(HostError, match=r"cannot lock \d+ bytes of the host's memory"):
        host.reserve(2**60)

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("cudaHostRegister gave error 2")

    monkeypatch.setattr(host.streams, "pin", refuse)
    with pytest.raises(HostError, match="4096 more than there are: cudaHostRegister gave error 2"):
        host.reserve(PAGE)
    assert host.num_bytes == 0


# What is asked of CUDA


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    """In place of ``torch.cuda``, with what it has of the same names; calls are noted."""
    noted = mock.MagicMock(spec_set=torch.cuda)
    noted.Stream.side_effect = [mock.MagicMock(name=way, spec_set=torch.cuda.Stream) for way in ("in", "out")]
    noted.cudart.return_value.cudaHostRegister.return_value = 0
    monkeypatch.setattr(torch, "cuda", noted)
    return noted


def test_copies_run_on_streams_of_their_own_between_events(cuda: mock.MagicMock) -> None:
    device = torch.device("cuda", 0)
    streams = Cuda(device)
    inward = streams._copying[Way.IN]
    calls = mock.MagicMock()
    for name, each in (("wait", inward.wait_event), ("record", inward.record_event), ("on", cuda.stream)):
        calls.attach_mock(each, name)
    target, source = mock.MagicMock(spec_set=torch.Tensor), torch.ones(3)
    calls.attach_mock(target.copy_, "copy")
    event = streams.copy(Way.IN, target, source, ["first", "second"])
    assert event is inward.record_event.return_value
    assert [call for call in calls.mock_calls if not call[0].startswith("on().")] == [
        mock.call.wait("first"),
        mock.call.wait("second"),
        mock.call.on(inward),
        mock.call.copy(source, non_blocking=True),
        mock.call.record(cuda.Event.return_value),
    ]
    cuda.Event.assert_called_once_with(blocking=True)
    streams.wait(event)
    event.synchronize.assert_called_once_with()
    computing = cuda.current_stream.return_value
    assert streams.computed() is computing.record_event.return_value
    streams.hold_up(event)
    computing.wait_event.assert_called_once_with(event)
    cuda.current_stream.assert_called_with(device)
    assert not cuda.synchronize.called


def test_pages_are_locked_for_all_devices_and_let_go_when_copies_are_done(
    cuda: mock.MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, memory = Cuda(torch.device("cuda", 0)), torch.ones(8)
    runtime = cuda.cudart.return_value
    streams.pin(memory)
    runtime.cudaHostRegister.assert_called_once_with(memory.data_ptr(), 32, 1)
    cuda.synchronize.side_effect = RuntimeError("the device has failed")
    streams.unpin(memory)
    runtime.cudaHostUnregister.assert_called_once_with(memory.data_ptr())
    runtime.cudaHostRegister.return_value = 2
    seen: list[Any] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **given: seen.append(given) or torch.ones(()))
    with pytest.raises(RuntimeError, match="cudaHostRegister gave error 2"):
        streams.pin(memory)
    assert seen, "what CUDA remembers of the error is told to nobody else"


def test_what_the_processors_fail_at_is_told_once_and_never_read_until_it_is_stored_anew() -> None:
    host = Host(CPU, Streams())
    host.reserve(3 * PAGE)
    one, two, three = tensors(host, 5, 5, 5)
    for each in (one, two, three):
        each.write(torch.arange(5))

    def fail(*_: torch.Tensor) -> None:
        raise ArithmeticError("no")

    def copy_over(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    host.run(fail, [one], [one])
    host.run(copy_over, [two, one], [two])  # of what is lost
    host.run(copy_over, [three, three], [three])
    for each in (one, two):
        with pytest.raises(HostError, match="have failed to update what lies there"):
            each.load()
    with pytest.raises(HostError, match="the host's processors could not update what lies there: no") as caught:
        host.check()
    assert isinstance(caught.value.__cause__, ArithmeticError)
    host.check()
    one.write(torch.arange(5, 10))
    assert one.read().tolist() == [5, 6, 7, 8, 9]
    assert three.read().tolist() == [0, 1, 2, 3, 4]
