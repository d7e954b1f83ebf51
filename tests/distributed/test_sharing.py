"""Ranks of one host read each other's parameters where they lie, and train as those that gather them."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from zgraph import ops, peer_memory, runtime, shared_memory, which_comm

X = torch.linspace(-1, 1, 48).view(8, 6)


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), zero=3, bucket_bytes=1, **options)


def traffic(model: Any) -> set[str]:
    return set(model.stats()["collectives"])


def train_both_ways() -> None:
    rank, num_ranks = world()
    batch = X.chunk(num_ranks)[rank]
    shared = small(check_memory=True)
    with mock.patch.object(shared_memory.os, "memfd_create", side_effect=OSError(12, "no memory")):
        copied = small()
        copied.train_step(batch)
    shared.train_step(batch)
    for _ in range(3):
        assert torch.equal(shared.train_step(batch), copied.train_step(batch))
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in shared.state_dict().items())
    is_one_host = peer_memory.find_readable_peers(dist.group.WORLD) is not None
    if num_ranks == 1 or not is_one_host:
        assert "share" not in traffic(shared)
        return
    assert "share" in traffic(shared)
    assert "all_gather" not in traffic(shared)
    assert shared.program.graph.find_nodes(op="call_function", target=ops.share)
    assert "share" not in traffic(copied), "where a rank has no such memory, all ranks gather"
    assert shared_memory.shared_bytes() == shared.stats()["param_bytes"]
    saved = {name: value.clone() for name, value in shared.state_dict().items()}
    for _ in range(2):
        shared.load_state_dict(saved)  # each rank for itself, while another may still be in the step before
        copied.load_state_dict(saved)
        assert torch.equal(shared.train_step(batch), copied.train_step(batch))
    del shared
    gc.collect()
    assert shared_memory.shared_bytes() == 0


def test_ranks_of_one_host_read_parameters_where_they_lie(ranks: Ranks) -> None:
    ranks.run(train_both_ways)


def train_where_ranks_cannot_see_each_other() -> None:
    rank, num_ranks = world()
    with ExitStack() as patches:
        for module in (runtime, shared_memory, which_comm):
            patches.enter_context(mock.patch.object(module, "find_readable_peers", return_value=None))
        model = small()
        model.train_step(X.chunk(num_ranks)[rank])
    assert not model.program.graph.find_nodes(op="call_function", target=ops.share)
    assert traffic(model) == {"all_gather", "all_reduce", "reduce_scatter"}


def test_ranks_of_several_hosts_gather(ranks: Ranks) -> None:
    ranks.run(train_where_ranks_cannot_see_each_other)
