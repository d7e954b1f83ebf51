"""State of several ranks on the host that they share, with streams that are played: as on devices of their own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from tests.streams import Streams
from zgraph import host
from zgraph.codegen.host_kernel import HostKernel
from zgraph.errors import ZgraphError
from zgraph.footprint import state_on
from zgraph.tiers import padded

EVERYTHING = {"optimizer": "host", "parameters": "host"}
X = torch.linspace(-1, 1, 48).view(8, 6)


def on_streams(seed: int | None) -> list[Any]:
    """What lets a model on a CPU have a host, with streams whose order has a seed."""
    return [
        mock.patch("zgraph.passes.offload.check_tier"),
        mock.patch("zgraph.lower_tiers.Cuda", return_value=Streams(seed)),
    ]


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    return zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), zero=3, bucket_bytes=1, **options)


def train_beside_a_device() -> None:
    rank, num_ranks = world()
    batch = X.chunk(num_ranks)[rank]
    first, second = on_streams(rank)
    with first, second:
        for how in ({}, {"host_updates": True}):
            model, plain = small(offload=EVERYTHING, **how), small()
            for _ in range(3):
                assert torch.equal(model.train_step(batch), plain.train_step(batch))
            assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
            assert model.stats()["param_bytes"] == 0
            assert any(isinstance(node.target, HostKernel) for node in model.program.graph.nodes) == bool(how)


def test_ranks_train_bit_for_bit_as_on_devices(ranks: Ranks) -> None:
    ranks.run(train_beside_a_device)


def start_where_there_is_room_for_one() -> None:
    first, second = on_streams(None)
    with first, second:
        model = small(offload=EVERYTHING)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "available_bytes", lambda: 4096 * 20)
            with pytest.raises(ZgraphError, match="of the host's memory for each of 2 ranks: 73728 of it may be taken"):
                model.train_step(X)
        assert model._zgraph.state.tiers["host"].num_bytes == 0
        model.train_step(X)
        stored = state_on("host", model.program)
        assert 36864 < sum(map(padded, stored.values())) == model._zgraph.state.tiers["host"].num_bytes < 73728


def test_what_the_ranks_of_a_machine_need_together_has_to_fit(ranks: Ranks) -> None:
    ranks.run(start_where_there_is_room_for_one)
