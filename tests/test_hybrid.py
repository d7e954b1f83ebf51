"""Ranks inside of nodes divide state, and nodes have copies of it: they train as one process does, and stay alike."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import zgraph
from tests.choices import in_turn
from tests.optimizers import OPTIMIZERS
from tests.reference import assert_equal, slow
from zgraph import ops
from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.program import REPLICA, SHARD, Mesh, Role

RANKS = [(4, 2), (6, 3), (6, 2), (4, 1), (4, 4), (8, 4)]
"""How many ranks there are, and in a node."""


class Net(nn.Module):
    """Its parameters have sizes that no number of ranks divides; the loss is that of a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.layers(x), y)


def made(optimizer: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    """Two equal models, each with an optimizer."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    other = copy.deepcopy(model)
    return model, OPTIMIZERS[optimizer](model), other, OPTIMIZERS[optimizer](other)


def batches(world: int, num_steps: int = 3, dtype: torch.dtype = torch.float64) -> list[list[tuple[Tensor, Tensor]]]:
    """For each step, each rank's part of a batch."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(num_steps):
        x, y = (torch.randn(4 * world, size, generator=generator).to(dtype) for size in (5, 3))
        steps.append(list(zip(x.chunk(world), y.chunk(world), strict=True)))
    return steps


def train_eager(
    model: nn.Module, optimizer: Optimizer, steps: list[list[tuple[Tensor, Tensor]]], clip_norm: float | None = None
) -> list[Tensor]:
    losses = []
    for parts in steps:
        optimizer.zero_grad()
        loss = model(*map(torch.cat, zip(*parts, strict=True)))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(loss.detach())
    return losses


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"clip_norm": 0.1, "accumulate": 2, "bucket_bytes": 256}),
    ("adamw", {}),
    ("muon_and_adam", {}),
    ("sgd_momentum", {"clip_norm": 0.1, "bucket_bytes": 1}),
]


@in_turn("zero, choice", list(itertools.product([3, 1, 2], CHOICES)), "ranks", RANKS, (3, CHOICES[0]))
def test_ranks_in_nodes_train_as_one_process(
    ranks: tuple[int, int], zero: int, choice: tuple[str, dict[str, Any]]
) -> None:
    (world, size), (optimizer, options) = ranks, choice
    model, mine, reference, theirs = made(optimizer)
    simulated = zgraph.simulate_ranks(model, mine, world_size=world, zero=zero, shard_size=size, **options)
    steps = batches(world)
    found = [simulated.train_step(parts) for parts in steps]
    expected = train_eager(reference, theirs, steps, options.get("clip_norm"))
    assert_equal(dict(enumerate(found)), dict(enumerate(expected)), "losses")  # type: ignore[arg-type]
    assert_equal(simulated.state_dict(), reference.state_dict(), "parameters")  # raises where nodes have parted
    simulated.optimizer_state()


OPTIONS: list[dict[str, Any]] = [
    {"state_precision": "int8", "clip_norm": 0.5},
    *slow(
        {"precision": "fp16", "bucket_bytes": 256, "loss_scale": 2.0**60},
        {"precision": "bf16", "reduce_precision": "bf16", "accumulate": 2, "keep_gathered": True, "ema": 0.9},
        {"recompute": ["layers"], "gradient_noise": 0.0, "clip_value": 0.1},
        {"gather_precision": "int8", "unshard": 1.0, "bucket_bytes": 256},
        {"gather_precision": "bf16", "recompute": 1.0, "bucket_bytes": 256},
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_every_part_of_a_recipe_goes_with_nodes(options: dict[str, Any]) -> None:
    """As all ranks that divide state among them train, to what rounding adds."""
    losses, states = [], []
    for size in (2, None):
        model, optimizer, _, _ = made("adamw", torch.float32)
        simulated = zgraph.simulate_ranks(model, optimizer, world_size=4, zero=3, shard_size=size, **options)
        losses.append(torch.stack([simulated.train_step(parts) for parts in batches(4, dtype=torch.float32)]))
        states.append(simulated.state_dict())
        simulated.optimizer_state()
    tolerance = 2e-2 if any(name.endswith("precision") for name in options) else 1e-5
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)


def test_a_rank_stores_what_its_place_in_the_node_is_of_and_every_node_has_all() -> None:
    model, optimizer, _, _ = made("adamw")
    simulated = zgraph.simulate_ranks(model, optimizer, world_size=6, zero=3, shard_size=3)
    simulated.train_step(batches(6, 1)[0])
    assert simulated.layout is not None
    assert simulated.layout.world == 3
    flat = [{what: v for what, v in values.items() if what and what.role is Role.PARAM} for values in simulated._values]
    for place in range(3):
        torch.testing.assert_close(flat[place], flat[place + 3], rtol=0, atol=0, equal_nan=True)
    whole = sum(bucket.numel for bucket in simulated.layout.buckets)
    assert all(sum(v.numel() for v in values.values()) * 3 == whole for values in flat)  # type: ignore[union-attr]


def test_only_slices_of_gradients_and_single_numbers_travel_between_nodes() -> None:
    model, optimizer, _, _ = made("adamw")
    simulated = zgraph.simulate_ranks(model, optimizer, world_size=4, zero=3, shard_size=2, clip_norm=1.0)
    simulated.train_step(batches(4, 1)[0])
    assert simulated.layout is not None
    sent: dict[str, list[int]] = {}
    for node in simulated.program.graph.nodes:
        if node.target in ops.STARTS:
            sent.setdefault(node.args[-1], []).append(node.meta["val"].numel())
    [bucket] = simulated.layout.buckets
    assert sent == {
        SHARD: [bucket.numel, bucket.numel // 2, 1],
        REPLICA: [bucket.numel // 2],
        "data": [1],
    }


def test_nodes_that_have_parted_are_told_of() -> None:
    model, optimizer, _, _ = made("adamw")
    simulated = zgraph.simulate_ranks(model, optimizer, world_size=4, zero=3, shard_size=2)
    simulated.train_step(batches(4, 1)[0])
    for what, value in simulated._values[3].items():
        if what is not None and what.role is Role.PARAM and isinstance(value, Tensor):
            simulated._values[3][what] = value + 1
    with pytest.raises(zgraph.ZgraphError, match="has another value on rank 2 than on rank 0"):
        simulated.state_dict()


@dataclass(frozen=True)
class CountAnotherNode(zgraph.Pass):
    """Say that there are more nodes than there are, which no collective inside of one would show."""

    takes = gives = zgraph.Stage.SHARDED

    def rewrite(self, program: zgraph.Program) -> None:
        program.mesh = Mesh(6, shard=2)


def test_a_pass_cannot_change_the_ranks_that_divide_state() -> None:
    model, optimizer, _, _ = made("adamw")
    simulated = zgraph.simulate_ranks(model, optimizer, world_size=4, shard_size=2, zero=1, passes=[CountAnotherNode()])
    with pytest.raises(zgraph.ZgraphError, match="CountAnotherNode changed the mesh"):
        simulated.train_step(batches(4, 1)[0])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as raised:
        call()
    return f"{raised.value.what}; {raised.value.fix}"


def test_a_node_that_ranks_do_not_fill_is_refused_before_any_work() -> None:
    model, optimizer, _, _ = made("adamw")
    said = refusal(lambda: zgraph.simulate_ranks(model, optimizer, world_size=6, shard_size=4))
    assert said == "shard_size=4 does not divide the 6 ranks; give one of 1, 2, 3, 6"
    said = refusal(lambda: zgraph.simulate_ranks(model, optimizer, world_size=6, secondary_size=4))
    assert said == "secondary_size=4 does not divide the 6 ranks; give one of 2, 3, 6"
    assert "on a single rank" in refusal(lambda: zgraph.compile(model, optimizer, shard_size=2))
    assert not hasattr(model, "train_step")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shard_size": 2, "zero": 0}, "zero=0, which divides nothing"),
        ({"shard_size": 2, "reduce_precision": "int8"}, "means of nodes would be rounded again"),
        ({"shard_size": 0}, "is no number of ranks"),
        ({"shard_size": True}, "is no number of ranks"),
        ({"shard_size": 2.0}, "is no number of ranks"),
        ({"secondary_size": 1}, "is no number of ranks; give 2 or more"),
        ({"secondary_size": 2, "zero": 2}, "zero=2: backward gathers nothing from other nodes"),
        ({"secondary_size": 2, "shard_size": 2}, "shard_size=2: backward gathers nothing"),
        ({"secondary_size": 2, "unshard": 0.5}, "for what is gathered from all ranks twice"),
        ({"secondary_size": 2, "gather_precision": "int8"}, "for what is gathered from all ranks twice"),
        ({"secondary_size": 2, "keep_gathered": True, "accumulate": 2}, "which gathers nothing for backward"),
    ],
)
def test_numbers_that_say_nothing_are_refused(options: dict[str, Any], why: str) -> None:
    assert why in refusal(lambda: Config.from_options(options))
