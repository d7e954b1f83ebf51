"""Ranks of one host read each other's parameters where they lie, and train as those that gather them."""

from __future__ import annotations

import gc
import mmap
import os
import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from zgraph import ops, peer_memory, shared_memory, which_comm
from zgraph.direct import DirectComm
from zgraph.errors import RankError
from zgraph.tiers import PAGE

X = torch.linspace(-1, 1, 48).view(8, 6)


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), zero=3, bucket_bytes=1, **options)


def traffic(model: Any) -> set[str]:
    return set(model.stats()["collectives"])


def shared_and_copied() -> tuple[Any, Any, torch.Tensor]:
    """A model whose ranks share memory, one whose ranks cannot, and a rank's batch."""
    rank, num_ranks = world()
    batch = X.chunk(num_ranks)[rank]
    with mock.patch.object(shared_memory.os, "memfd_create", side_effect=OSError(12, "no memory")):
        copied = small(check_memory=True)
        copied.train_step(batch)
    return small(check_memory=True), copied, batch


def is_one_host() -> bool:
    return world()[1] > 1 and peer_memory.find_readable_peers(dist.group.WORLD) is not None


def train_both_ways() -> None:
    shared, copied, batch = shared_and_copied()
    shared.train_step(batch)
    for _ in range(3):
        assert torch.equal(shared.train_step(batch), copied.train_step(batch))
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in shared.state_dict().items())
    assert ("share" in traffic(shared)) == is_one_host()
    assert "share" not in traffic(copied), "where a rank has no such memory, all ranks gather"
    if not is_one_host():
        return
    assert "all_gather" not in traffic(shared)
    assert shared.program.graph.find_nodes(op="call_function", target=ops.share)
    mine, others = shared_memory.shared_bytes()
    assert mine == shared.stats()["param_bytes"]
    assert others == mine * (world()[1] - 1)
    del shared
    gc.collect()
    assert shared_memory.shared_bytes() == (0, 0)


def test_ranks_of_one_host_read_parameters_where_they_lie(ranks: Ranks) -> None:
    ranks.run(train_both_ways)


def load_while_others_are_in_the_step_before() -> None:
    rank, num_ranks = world()
    shared, copied, batch = shared_and_copied()
    shared.train_step(batch)
    saved = {name: value.clone() for name, value in shared.state_dict().items()}
    wait = DirectComm.wait

    def late(comm: Any, started: Any) -> Any:
        if rank == num_ranks - 1:
            time.sleep(0.01)
        return wait(comm, started)

    for _ in range(3):
        with mock.patch.object(DirectComm, "wait", late):
            found = shared.train_step(batch)
        assert torch.equal(found, copied.train_step(batch))
        for model in (shared, copied):
            model.load_state_dict(saved)  # each rank for itself


def test_values_may_be_loaded_as_soon_as_a_ranks_own_step_has_ended(ranks: Ranks) -> None:
    ranks.run(load_while_others_are_in_the_step_before)


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate": 2},
    "clipped": {"clip_norm": 0.1},
    "checked": {"check_collectives": True},
    "fused": {"kernels": "zgraph"},
}


def train_with(options: dict[str, Any]) -> None:
    rank, num_ranks = world()
    batch = X.chunk(num_ranks)[rank]
    shared, copied = small(**options), small(**options)
    losses = [shared.train_step(batch) for _ in range(3)]
    with mock.patch.object(shared_memory.os, "memfd_create", side_effect=OSError(12, "no memory")):
        assert all(torch.equal(copied.train_step(batch), loss) for loss in losses)
    assert "share" not in traffic(copied)
    assert ("share" in traffic(shared)) == is_one_host()


@pytest.mark.parametrize("options", list(OPTIONS))
def test_parameters_are_shared_with_any_option(ranks: Ranks, options: str) -> None:
    ranks.run(train_with, OPTIONS[options])


def fail_on_one_rank() -> None:
    """A file that another process has under the number of the first rank's; and a rank that can map only a little."""
    rank, num_ranks = world()
    batch = X.chunk(num_ranks)[rank]
    opened = shared_memory.os.open

    def another(path: str, flags: int) -> int:
        return opened(path, flags) if rank == 0 else os.memfd_create("another")

    with mock.patch.object(shared_memory.os, "open", another):
        model = small()
        model.train_step(batch)
        assert "share" not in traffic(model)
    if not is_one_host():
        return
    mapped = mmap.mmap

    class Little(mapped):
        def __new__(cls, fd: int, length: int) -> Any:
            if rank == num_ranks - 1 and length > PAGE:
                raise OSError(12, "no memory")
            return mapped.__new__(cls, fd, length)

    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refusal = pytest.raises(RankError, match=r"1 of 2 ranks cannot map \d+ bytes of memory that all of them share")
    with mock.patch.object(shared_memory.mmap, "mmap", Little), refusal:
        model.train_step(batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_step(batch)
    assert "share" in traffic(model)


def test_another_file_is_never_mapped_and_what_cannot_be_is_refused_on_all_ranks(ranks: Ranks) -> None:
    ranks.run(fail_on_one_rank)


def train_where_ranks_cannot_see_each_other() -> None:
    rank, num_ranks = world()
    with ExitStack() as patches:
        for module in (shared_memory, which_comm):
            patches.enter_context(mock.patch.object(module, "find_readable_peers", return_value=None))
        model = small()
        model.train_step(X.chunk(num_ranks)[rank])
    assert not model.program.graph.find_nodes(op="call_function", target=ops.share)
    assert traffic(model) == {"all_gather", "all_reduce", "reduce_scatter"}


def test_ranks_of_several_hosts_gather(ranks: Ranks) -> None:
    ranks.run(train_where_ranks_cannot_see_each_other)
