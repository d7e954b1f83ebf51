"""A disk beside a device: right in every order in which copies, reads and computing may end."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.offloading import X, assert_state_is_the_users, fail_and_go_on, small
from tests.programs import few_examples
from tests.reference import slow
from tests.streams import Event, Streams
from tests.test_host import CPU, Play
from tests.test_offload_activations import X as ROWS
from tests.test_offload_activations import compiled, losses, stack
from tests.test_offload_training import assert_bitwise, train
from zgraph.config import WAITED_FOR
from zgraph.disk import BLOCK_BYTES, DEFAULT_PATH
from zgraph.errors import DiskError, HostError
from zgraph.footprint import Kind, footprint, spilled_bytes, state_on
from zgraph.host import Way
from zgraph.staging import StagedDisk


def play(seed: int, streams: Streams, made: type[StagedDisk] = StagedDisk) -> Play:
    return Play(seed, streams, made(DEFAULT_PATH, CPU, streams), one_at_a_time=True)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@few_examples(30)
def test_values_are_right_in_any_order_in_which_streams_go_on(program: int, order: int) -> None:
    assert play(program, Streams(order, at_once=False)).is_right(40)


class Forgetful(Streams):
    """Does not tell copies of one way what was computed before."""

    def __init__(self, seed: int, way: Way) -> None:
        super().__init__(seed, at_once=False)
        self._way = way

    def copy(self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Iterable[Event]) -> Event:
        return super().copy(way, target, source, [] if way is self._way else after)


class Hasty(StagedDisk):
    """Lets computing go on beside what is loaded."""

    def arrived(self) -> None:
        pass


class Narrow(StagedDisk):
    """Has one block for all that is on its way."""

    num_threads = 1


class Rash(Narrow):
    """Uses a block again while it is copied."""

    def _staged(self, num_bytes: int) -> Any:
        self._last = dict.fromkeys(self._last)
        return super()._staged(num_bytes)


@pytest.mark.parametrize("way", Way)
def test_without_what_was_computed_before_some_order_is_wrong(way: Way) -> None:
    assert not all(play(seed, Forgetful(seed, way)).is_right(40) for seed in range(40))


def test_without_holding_computing_up_some_order_is_wrong() -> None:
    assert not all(play(seed, Streams(seed, at_once=False), Hasty).is_right(40) for seed in range(40))


def test_without_waiting_for_a_block_some_order_is_wrong() -> None:
    assert all(play(seed, Streams(seed, at_once=False), Narrow).is_right(40) for seed in range(10))
    assert not all(play(seed, Streams(seed, at_once=False), Rash).is_right(40) for seed in range(60))


def test_a_block_that_is_bad_leaves_no_others_on_their_way(disk_path: Path) -> None:
    streams = Streams(at_once=False)
    disk = StagedDisk(disk_path, CPU, streams)
    stored = disk.allocate(3 * BLOCK_BYTES, torch.uint8)
    stored.write(torch.ones(3 * BLOCK_BYTES, dtype=torch.uint8))
    with open(f"/proc/self/fd/{disk._fd}", "r+b") as file:
        file.seek(stored.start + BLOCK_BYTES)
        file.write(b"x")
    memory = torch.zeros(3 * BLOCK_BYTES, dtype=torch.uint8)
    with pytest.raises(DiskError, match="gave back other bytes than were written"):
        stored.load(out=memory).wait()
    streams.compute(lambda: memory.fill_(7))  # type: ignore[arg-type, return-value]
    streams.finish()
    assert memory.eq(7).all()


@pytest.mark.parametrize("num_bytes", [1, BLOCK_BYTES, 20 * BLOCK_BYTES + 5])
def test_any_number_of_blocks_comes_back_as_it_went(num_bytes: int, disk_path: Path) -> None:
    streams = Streams()
    disk = StagedDisk(disk_path, CPU, streams)
    stored = disk.allocate(num_bytes, torch.uint8)
    values = [torch.randint(0, 256, (num_bytes,), dtype=torch.uint8) for _ in range(2)]
    for value in values:
        stored.write(value)
    assert torch.equal(copy.deepcopy(stored).read(), values[1])
    assert torch.equal(stored.read(), values[1])
    assert disk.moved.written_bytes == 2 * num_bytes
    assert len(streams.pinned) == 1
    del disk, stored
    gc.collect()
    assert not streams.pinned


def test_a_host_that_locks_no_memory_is_told_of(disk_path: Path) -> None:
    streams = mock.Mock(spec=Streams)
    streams.pin.side_effect = RuntimeError("cudaHostRegister gave error 2")
    with pytest.raises(HostError, match=r"cannot lock 16777216 bytes .* on their way to a disk: cudaHostRegister"):
        StagedDisk(disk_path, CPU, streams)


# Training

Use = Callable[[int | None], None]


@pytest.fixture
def beside_a_device() -> Iterator[Use]:
    """Give models a host and a disk beside a device whose streams' order has a seed."""
    with ExitStack() as patches:

        def use(seed: int | None) -> None:
            def disk(path: str) -> StagedDisk:
                return StagedDisk(path, CPU, Streams(seed))

            patches.enter_context(mock.patch("zgraph.lower_tiers.Cuda", side_effect=lambda _: Streams(seed)))
            patches.enter_context(mock.patch("zgraph.lower_tiers.Disk", disk))
            patches.enter_context(mock.patch("zgraph.passes.offload.check_tier"))
            patches.enter_context(mock.patch("zgraph.passes.offload_activations.check_tier"))

        yield use


DISK = {"optimizer": "disk"}
BOTH = {**DISK, "parameters": "host"}
ALL_ON_DISK = {**DISK, "parameters": "disk"}


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    "offload", [BOTH, *slow(DISK, ALL_ON_DISK, {"optimizer": "host", "parameters": "disk"})], ids=str
)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 0.1}], ids=str)
def test_state_trains_bit_for_bit_as_on_the_device(
    beside_a_device: Use, offload: dict[str, str], options: dict[str, Any], seed: int | None
) -> None:
    beside_a_device(seed)
    given = {**offload, "gradients": "disk"} if "accumulate" in options else offload
    expected, found = train("gpt", "adamw", **options), train("gpt", "adamw", offload=given, **options)
    assert_bitwise(found, expected)
    model = found[3]
    stats = model.stats()
    for tier in ("host", "disk"):
        stored = sum(state_on(tier, model.program).values())
        assert (stored > 0) == (tier in given.values())
        assert stats[f"{tier}_bytes"] == stored
        assert stats[f"{tier}_read_bytes"] >= stats[f"{tier}_written_bytes"] >= (stored if not options else 0)


@pytest.mark.parametrize("seed", [None, 1])
def test_activations_go_to_a_disk_and_state_to_the_host(beside_a_device: Use, seed: int | None) -> None:
    beside_a_device(seed)
    offload = {"optimizer": "host", "activations": WAITED_FOR["disk"]}
    plain, model = compiled(stack()), compiled(stack(), offload=offload)
    assert all(map(torch.equal, losses(plain, ROWS, ROWS, ROWS), losses(model, ROWS, ROWS, ROWS)))
    stats = model.stats()
    assert stats["disk_read_bytes"] == stats["disk_written_bytes"] == spilled_bytes(model.program, "disk") > 0
    assert stats["host_bytes"] == sum(state_on("host", model.program).values()) > 0
    assert stats["spilled_bytes"] >= spilled_bytes(model.program)
    assert [sorted(model._zgraph.state.tiers)] == [["disk", "host"]]


@pytest.mark.parametrize("seed", [None, 1])
def test_gradients_wait_on_a_disk_and_activations_on_the_host(beside_a_device: Use, seed: int | None) -> None:
    beside_a_device(seed)
    offload = {"gradients": "disk", "activations": WAITED_FOR["host"]}
    options = {"clip_norm": 0.01, "bucket_bytes": 1}
    plain, model = compiled(stack(), **options), compiled(stack(), offload=offload, **options)
    assert all(map(torch.equal, losses(plain, ROWS, ROWS, ROWS), losses(model, ROWS, ROWS, ROWS)))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    stats = model.stats()
    for tier in ("host", "disk"):
        assert stats[f"{tier}_read_bytes"] == stats[f"{tier}_written_bytes"] == spilled_bytes(model.program, tier) > 0
    on_tiers = footprint(model.program).away
    assert {each.kind for each in on_tiers["disk"]} == {Kind.GRADIENTS}
    assert {each.kind for each in on_tiers["host"]} == {Kind.ACTIVATIONS}


def test_state_stays_the_users(beside_a_device: Use) -> None:
    """Save, load, copy, load what was saved on the device, and be evaluated."""
    beside_a_device(2)
    (model, optimizer), (plain, _) = small(offload=BOTH), small()
    for _ in range(2):
        assert torch.equal(model.train_step(X), plain.train_step(X))
    assert_state_is_the_users(model, optimizer, plain, dict(model.full_params()))


def test_what_cannot_be_written_stops_the_step(beside_a_device: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    beside_a_device(None)
    model, _ = small(offload=BOTH)
    model.train_step(X)

    def refuse(*_: Any) -> int:
        raise OSError(5, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(DiskError, match=r"cannot write .*: Input/output error"):
            model.train_step(X)
    with pytest.raises(DiskError, match="never been written completely"):
        model.train_step(X)


def test_no_room_on_either_is_refused_before_anything_changes(
    beside_a_device: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_a_device(None)
    model, _ = small(offload=BOTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def full(*_: Any) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr("zgraph.host.available_bytes", lambda: 1000)
        with pytest.raises(HostError, match=r"cannot take .* bytes of the host's memory"):
            model.train_step(X)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskError, match=r"cannot reserve .* No space left on device"):
            model.train_step(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_step(X)


def test_a_step_that_fails_leaves_nothing_in_flight(beside_a_device: Use) -> None:
    beside_a_device(None)
    fail_and_go_on(ALL_ON_DISK)
