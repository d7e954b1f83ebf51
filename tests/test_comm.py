"""Collectives of the training step equal torch's own, are counted exactly, and give every rank the same bits."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks
from zgraph.agreement import Agreement
from zgraph.comm import FunctionalComm, PointToPointComm, SingleComm
from zgraph.direct import DirectComm
from zgraph.errors import RankError
from zgraph.groups import backends, default_backend
from zgraph.peer_memory import find_readable_peers
from zgraph.which_comm import make_comm

SIZES = [16, 48, 4096 + 16]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def made(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of this rank's own."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank() + numel)).to(dtype)


KINDS = {
    "pairs": lambda: PointToPointComm(group()),
    "direct": lambda: DirectComm(group(), pids(), message_bytes=0, passing_bytes=256),
    "direct or pairs": lambda: DirectComm(group(), pids()),
}
"""Implementations for gloo."""


def pids() -> tuple[int, ...]:
    found = find_readable_peers(group())
    assert found is not None, "ranks here can read each other's memory"
    return found


def everyones(value: torch.Tensor) -> list[torch.Tensor]:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return values


def gather_everything(kind: str) -> None:
    comm, (rank, world) = KINDS[kind](), (dist.get_rank(), dist.get_world_size())
    for dtype in [*DTYPES, torch.int64, torch.bool]:
        for size in SIZES:
            shard = made(size, dtype)
            expected = torch.cat(everyones(shard))
            assert torch.equal(comm.wait(comm.all_gather(shard)), expected)
            buffer = torch.zeros(size * world, dtype=dtype)
            assert comm.wait(comm.all_gather(shard, out=buffer)).data_ptr() == buffer.data_ptr()
            assert torch.equal(buffer, expected)
            inside = torch.zeros(size * world, dtype=dtype)
            own = comm.shard(inside)
            own.copy_(shard)
            assert comm.shard(inside).data_ptr() == inside[rank * size :].data_ptr()
            comm.wait(comm.all_gather(own, out=inside))
            assert torch.equal(inside, expected), "from a part of the buffer itself"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_all_gather_equals_torchs_own(ranks: Ranks, kind: str, world: int) -> None:
    ranks.run(gather_everything, kind, world=world)


def reduce_everything(kind: str) -> None:
    comm, (rank, world) = KINDS[kind](), (dist.get_rank(), dist.get_world_size())
    for dtype in DTYPES:
        for size in SIZES:
            full = made(size * world, dtype)
            before = full.clone()
            values = everyones(full)
            total = values[0].clone()
            for value in values[1:]:
                total += value
            torchs = full.clone()
            dist.all_reduce(torchs)
            torch.testing.assert_close(total, torchs, rtol=1e-2, atol=1e-2)  # in low precision the order matters
            for operation, expected in (("sum", total), ("avg", total / world)):
                piece = comm.wait(comm.reduce_scatter(full, operation))
                assert torch.equal(piece, expected[rank * size : (rank + 1) * size])
                buffer = torch.zeros(size, dtype=dtype)
                assert comm.wait(comm.reduce_scatter(full, operation, out=buffer)).data_ptr() == buffer.data_ptr()
                assert torch.equal(buffer, piece)
                reduced = comm.wait(comm.all_reduce(full, operation))
                torch.testing.assert_close(reduced, expected, rtol=1e-2, atol=1e-2)
                assert all(torch.equal(other, reduced) for other in everyones(reduced)), "the same bits on all ranks"
            assert torch.equal(full, before), "what is sent stays as it was"
    loss = torch.tensor(float(rank))
    assert comm.wait(comm.all_reduce(loss, "avg")).item() == (world - 1) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_reductions_equal_torchs_own(ranks: Ranks, kind: str, world: int) -> None:
    ranks.run(reduce_everything, kind, world=world)


def exchange_everything(kind: str) -> None:
    (rank, world) = (dist.get_rank(), dist.get_world_size())
    for comm in (KINDS[kind](), FunctionalComm(group())):
        for dtype in [*DTYPES, torch.uint8]:
            full = made(16 * world, dtype)
            sent = everyones(full)
            expected = torch.cat([other[rank * 16 : (rank + 1) * 16] for other in sent])
            assert torch.equal(comm.wait(comm.all_to_all(full)), expected)
            assert torch.equal(full, sent[rank]), "what is sent stays as it was"
        num_bytes = sum(dtype.itemsize for dtype in [*DTYPES, torch.uint8]) * 16 * (world - 1)
        assert comm.traffic.as_dict() == {"all_to_all": {"count": len(DTYPES) + 1, "bytes": num_bytes}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_all_to_all_brings_each_rank_its_part_of_everyones(ranks: Ranks, kind: str, world: int) -> None:
    ranks.run(exchange_everything, kind, world=world)


def own_the_same(kind: str) -> list[float]:
    """Every rank owns the same numbers of everybody's."""
    comm, block = KINDS[kind](), made(64, torch.float32)
    return comm.wait(comm.reduce_scatter(block.repeat(dist.get_world_size()), "avg")).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_does_not_depend_on_which_rank_owns_it(ranks: Ranks, kind: str) -> None:
    results = ranks.run(own_the_same, kind, world=3)
    assert results[0] == results[1] == results[2]


def overlap(kind: str) -> None:
    comm, world = KINDS[kind](), dist.get_world_size()
    shards = [made(16 * (i + 1), torch.float64) for i in range(4)]
    fulls = [made(32 * world, torch.float64) + i for i in range(3)]
    gathers = [comm.all_gather(shard) for shard in shards]
    reductions = [comm.reduce_scatter(full, "sum") for full in fulls]
    loss = comm.all_reduce(shards[0], "sum")
    assert torch.equal(comm.wait(loss), sum(everyones(shards[0])))
    for full, started in reversed([*zip(fulls, reductions, strict=True)]):
        assert torch.equal(comm.wait(started), comm.shard(sum(everyones(full))))
    for shard, started in zip(shards, gathers, strict=True):
        assert torch.equal(comm.wait(started), torch.cat(everyones(shard)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_may_be_in_flight_and_be_waited_for_in_any_order(ranks: Ranks, kind: str, world: int) -> None:
    ranks.run(overlap, kind, world=world)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_starts_anew_whatever_its_ranks_have_done_in_others(ranks: Ranks, kind: str) -> None:
    """A rank that was not in the first group would wait for messages with other tags."""
    ranks.run(overlap, kind, world=2)
    ranks.run(overlap, kind, world=3, timeout_s=60)


def count(kind: str) -> dict[str, dict[str, int]]:
    comm, world = KINDS[kind](), dist.get_world_size()
    comm.wait(comm.all_gather(torch.zeros(32, dtype=torch.float64)))
    comm.wait(comm.all_gather(torch.zeros(16), out=torch.zeros(16 * world)))
    comm.wait(comm.reduce_scatter(torch.zeros(16 * world, dtype=torch.bfloat16), "avg"))
    comm.wait(comm.all_reduce(torch.zeros(world), "avg"))
    comm.shard(torch.zeros(16 * world))
    counted = comm.traffic.as_dict()
    comm.traffic.clear()
    assert comm.traffic.as_dict() == {}
    return counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_collectives_and_bytes_are_counted(ranks: Ranks, kind: str, world: int) -> None:
    others = world - 1
    expected = {
        "all_gather": {"count": 2, "bytes": (32 * 8 + 16 * 4) * others},
        "all_reduce": {"count": 1, "bytes": 2 * 4 * others},
        "reduce_scatter": {"count": 1, "bytes": 16 * 2 * others},
    }
    assert ranks.run(count, kind, world=world) == [expected] * world


def release(kind: str) -> None:
    comm = KINDS[kind]()
    shard, full = made(1024, torch.float32), made(1024 * dist.get_world_size(), torch.float32)
    sent = [weakref.ref(shard), weakref.ref(full)]
    started = [comm.all_gather(shard), comm.reduce_scatter(full, "avg")]
    del shard, full
    assert all(ref() is not None for ref in sent), "memory that is being sent stays"
    received = [weakref.ref(comm.wait(started.pop(0))), weakref.ref(comm.wait(started.pop(0)))]
    gc.collect()
    assert not any(ref() is not None for ref in [*sent, *received])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_held_while_it_travels_and_not_longer(ranks: Ranks, kind: str) -> None:
    ranks.run(release, kind)


def run_functional() -> None:
    """torch's functional collectives, which NCCL uses, take the same calls."""
    comm, (rank, world) = FunctionalComm(group()), (dist.get_rank(), dist.get_world_size())
    shard, full = made(32, torch.float32), made(32 * world, torch.float32)
    expected = torch.cat(everyones(shard))
    assert torch.equal(comm.wait(comm.all_gather(shard)), expected)
    buffer = torch.zeros(32 * world)
    assert comm.wait(comm.all_gather(shard, out=buffer)).data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, expected)
    total = sum(everyones(full))
    torch.testing.assert_close(comm.wait(comm.all_reduce(full, "sum")), total)
    torch.testing.assert_close(comm.wait(comm.reduce_scatter(full, "sum")), total[rank * 32 : (rank + 1) * 32])
    piece = torch.zeros(32)
    assert comm.wait(comm.reduce_scatter(full, "sum", out=piece)).data_ptr() == piece.data_ptr()
    torch.testing.assert_close(piece, total[rank * 32 : (rank + 1) * 32])
    assert comm.traffic.as_dict() == {
        "all_gather": {"count": 2, "bytes": 2 * 128 * (world - 1)},
        "all_reduce": {"count": 1, "bytes": 2 * 128 * (world - 1)},
        "reduce_scatter": {"count": 2, "bytes": 2 * 128 * (world - 1)},
    }


def test_functional_collectives_take_the_same_calls(ranks: Ranks) -> None:
    ranks.run(run_functional)


CONFIGS = {
    "cpu:gloo,cuda:gloo": {"cpu": "gloo", "cuda": "gloo"},
    "cpu:gloo,cuda:nccl": {"cpu": "gloo", "cuda": "nccl"},
    "cpu:gloo": {"cpu": "gloo"},
    "cuda:nccl": {"cuda": "nccl"},
    "cpu:mpi,cuda:mpi": {"cpu": "mpi", "cuda": "mpi"},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_each_type_of_device_has_a_backend(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda _: config)
    assert backends(None) == CONFIGS[config]  # type: ignore[arg-type]


def destroy(rendezvous: str) -> tuple[bool, str]:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    held, comm, agreement = weakref.ref(group()), make_comm(group(), {"cpu"}), Agreement(group())
    agreement.check("anything")
    dist.destroy_process_group()
    with pytest.raises(RankError) as raised:
        agreement.check("anything else")
    return held() is None and comm.rank == 0, str(raised.value)


def test_what_the_user_destroys_ends_with_its_threads_and_is_missed_by_name(ranks: Ranks, tmp_path: Path) -> None:
    [(ended, message)] = ranks.run(destroy, str(tmp_path / "rendezvous"), world=1)
    assert ended, "a group that something holds keeps its threads, and they abort the process as it ends"
    assert "was destroyed" in message
    assert "after the last use" in message


def test_a_group_made_by_zgraph_serves_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_backend() == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert default_backend() == "cpu:gloo,cuda:nccl"


def test_a_single_process_sends_nothing() -> None:
    comm = SingleComm()
    full = torch.arange(16.0)
    assert comm.shard(full).data_ptr() == full.data_ptr()
    for call in (
        comm.all_gather,
        lambda x: comm.reduce_scatter(x, "avg"),
        lambda x: comm.all_reduce(x, "avg"),
        comm.wait,
    ):
        with pytest.raises(AssertionError, match="one rank has no collectives"):
            call(full)
