"""Ranks that read each other's memory get the bits that messages would give them, and never read too late."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zgraph
from tests.ranks import Ranks, RanksError
from tests.test_comm import DTYPES, everyones, group, made, pids
from zgraph import runtime
from zgraph.comm import Comm, PointToPointComm
from zgraph.direct import DirectComm
from zgraph.errors import RankError
from zgraph.peer_memory import find_readable_peers
from zgraph.which_comm import make_comm

SIZES = [0, 1, 65, 1000]


def direct() -> DirectComm:
    """Reads everything, in pieces that do not divide it."""
    return DirectComm(group(), pids(), message_bytes=0, passing_bytes=120)


def bits(value: torch.Tensor) -> torch.Tensor:
    """To compare -0.0 with 0.0, and NaN of any payload with NaN."""
    return torch.where(value.isnan(), torch.ones_like(value), value).reshape(-1).view(torch.uint8)


def compare_with_messages() -> None:
    world = dist.get_world_size()
    ways: list[Comm] = [direct(), DirectComm(group(), pids()), PointToPointComm(group())]
    for dtype in [*DTYPES, torch.int64, torch.int8]:
        for size in SIZES:
            shard, full = (made(numel, torch.float64).mul(100).to(dtype) for numel in (size, size * world))
            if dtype.is_floating_point and size:
                full[0] = torch.nan
                full[-1] = -0.0
            gathered = [comm.wait(comm.all_gather(shard)) for comm in ways]
            assert all(torch.equal(bits(each), bits(gathered[-1])) for each in gathered)
            for operation in ("sum", "avg") if dtype.is_floating_point else ("sum",):
                if world > 1:
                    scattered = [comm.wait(comm.reduce_scatter(full, operation)) for comm in ways]
                    assert all(torch.equal(bits(each), bits(scattered[-1])) for each in scattered)
                total, *others = everyones(full)
                for other in others:
                    total = total + other
                total = total / world if operation == "avg" else total
                reduced = [comm.wait(comm.all_reduce(full, operation)) for comm in ways]
                in_order = reduced if world < 3 else reduced[:-1]  # gloo's own has another order from three ranks on
                assert all(torch.equal(bits(each), bits(total)) for each in in_order)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_are_bitwise_those_of_messages(ranks: Ranks, world: int) -> None:
    ranks.run(compare_with_messages, world=world, group=True)


def reduce_shapes() -> None:
    comm = direct()
    for value in (torch.tensor(2.0), torch.ones(3, 5).t(), torch.ones(0, 2), torch.arange(7).repeat(2, 1)[:, ::2]):
        reduced = comm.wait(comm.all_reduce(value, "sum"))
        assert reduced.shape == value.shape
        assert torch.equal(reduced, value * dist.get_world_size())


def test_an_all_reduce_takes_any_shape_and_strides(ranks: Ranks) -> None:
    ranks.run(reduce_shapes, world=3)


STARTS: dict[str, Callable[[Comm, torch.Tensor], object]] = {
    "all_gather": lambda comm, value: comm.all_gather(value),
    "reduce_scatter": lambda comm, value: comm.reduce_scatter(value, "sum"),
    "all_reduce": lambda comm, value: comm.all_reduce(value, "sum"),
}


def overwrite(name: str, slow_rank: int) -> None:
    """All but one overwrite at once what they have sent and received."""
    comm, (rank, world) = direct(), (dist.get_rank(), dist.get_world_size())
    value = torch.full((world * 100,), float(rank + 1))
    total = world * (world + 1) / 2
    expected = torch.arange(1.0, world + 1).repeat_interleave(len(value)) if name == "all_gather" else None
    for _ in range(3):
        value.fill_(rank + 1)
        started = STARTS[name](comm, value)
        if name == "all_reduce":
            value.fill_(-1)  # a copy is sent
        if rank == slow_rank:
            time.sleep(0.2)
        result = comm.wait(started)
        assert torch.equal(result, torch.full_like(result, total) if expected is None else expected)
        result.fill_(-1)
        value.fill_(-1)
        del result, started


@pytest.mark.parametrize("slow_rank", [0, 2])
@pytest.mark.parametrize("name", STARTS)
def test_what_was_sent_may_be_overwritten_right_after_the_wait(ranks: Ranks, name: str, slow_rank: int) -> None:
    ranks.run(overwrite, name, slow_rank, world=3)


def mix() -> None:
    """Several on one group, beside messages, gloo's own, and a group of some of the ranks."""
    rank = dist.get_rank()
    some = dist.new_group([0, 2])
    comms: list[Comm] = [direct(), PointToPointComm(group()), direct(), DirectComm(group(), pids())]
    if rank != 1:
        assert some is not None
        found = find_readable_peers(some)
        assert found is not None
        inner = DirectComm(some, found, message_bytes=0)
        pair = inner.all_gather(torch.full((3,), rank))
    started = [(comm, comm.reduce_scatter(torch.full((9,), float(i)), "sum"), 3.0 * i) for i, comm in enumerate(comms)]
    started += [
        (comm, comm.all_reduce(torch.full((9,), float(rank * i)), "sum"), 3.0 * i) for i, comm in enumerate(comms)
    ]
    one = torch.ones(2)
    dist.all_reduce(one)
    assert one.tolist() == [3.0, 3.0]
    for comm, work, expected in reversed(started):
        result = comm.wait(work)
        assert torch.equal(result, torch.full_like(result, expected))
    if rank != 1:
        assert inner.wait(pair).tolist() == [0, 0, 0, 2, 2, 2]


def test_groups_and_models_do_not_take_each_others_messages(ranks: Ranks) -> None:
    ranks.run(mix, world=3)


def train(zero: int) -> None:
    """Steps of tensors that are read and of tensors that are sent, beside a step that sends all."""
    ends = []
    for choose in (make_comm, lambda group, *_: PointToPointComm(group)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 200), nn.Tanh(), nn.Linear(200, 96))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with mock.patch.object(runtime, "make_comm", choose):
            step = zgraph.compile(
                model, optimizer=optimizer, loss=lambda y, x: (y - x).square().mean(), zero=zero, bucket_bytes=50000
            )
            losses = [step.train_step(made(96, torch.float32).view(1, 96) + i) for i in range(3)]
        ends.append((losses, list(step.state_dict().values())))
    for found, expected in zip(*ends, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("zero", [0, 3])
def test_a_step_trains_to_the_same_bits_as_with_messages(ranks: Ranks, zero: int) -> None:
    ranks.run(train, zero)


def disagree() -> str:
    comm = direct()
    with pytest.raises(RankError) as raised:
        comm.wait(comm.all_gather(torch.zeros(10 + dist.get_rank())))
    return str(raised.value).splitlines()[0]


def test_tensors_of_unlike_sizes_are_refused_on_both_sides(ranks: Ranks) -> None:
    assert ranks.run(disagree) == [
        "rank 1 sends 44 bytes in an all-gather where rank 0 has 40",
        "rank 0 sends 40 bytes in an all-gather where rank 1 has 44",
    ]


def die(name: str, *, when: str) -> None:
    """Rank 1 ends before it takes part, or when it has said where its tensor lies."""
    comm, value = direct(), torch.ones(100)
    if dist.get_rank() == 0:
        started = STARTS[name](comm, value)
        time.sleep(0.5)
        with pytest.raises(RankError, match=r"rank 1 has stopped.*an? (all|reduce)-"):
            comm.wait(started)
    else:
        if when == "started":
            STARTS[name](comm, value)
            time.sleep(0.2)
        os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "started"])
@pytest.mark.parametrize("name", STARTS)
def test_a_rank_that_has_died_is_named(ranks: Ranks, name: str, when: str) -> None:
    with pytest.raises(RanksError) as raised:
        ranks.run(die, name, when=when, timeout_s=60)
    assert str(raised.value).strip() == "rank 1 of 2 died with exit code 3"


def stay_away() -> None:
    some = dist.new_group([0, 1], timeout=dt.timedelta(seconds=1))
    assert some is not None
    found = find_readable_peers(some)
    assert found is not None
    comm = DirectComm(some, found, message_bytes=0)
    if dist.get_rank() == 0:
        start = time.monotonic()
        with pytest.raises(RankError, match="rank 1 has stopped before the end of an all-gather"):
            comm.wait(comm.all_gather(torch.ones(10)))
        assert time.monotonic() - start < 10
    dist.barrier()


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_the_groups_timeout_says(ranks: Ranks) -> None:
    ranks.run(stay_away)
