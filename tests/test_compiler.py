"""Around a step: what makes it new, what one rank alone does or fails at, and what else a compiled model can do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from zgraph.errors import RankError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.linear(self.table(index)).square().mean()


INDEX = torch.tensor([0, 1, 2])


def compiled(zero: int = 3) -> tuple[Net, AdamW]:
    torch.manual_seed(0)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.1)
    return zgraph.compile(model, optimizer=optimizer, zero=zero), optimizer


def vector_to_parameters(zero: int) -> None:
    model, _ = compiled(zero)
    model.train_step(INDEX)
    nn.utils.vector_to_parameters(torch.zeros(5 * 4 + 4 * 4 + 4), model.parameters())
    assert model.train_step(INDEX).item() == 0
    assert model.stats()["num_captures"] == 1


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 2)])
def test_values_assigned_between_steps_are_trained_on(ranks: Ranks, world: int, zero: int) -> None:
    ranks.run(vector_to_parameters, zero, world=world)


def assign_on_rank_1() -> None:
    model, _ = compiled(zero=1)
    model.train_step(INDEX)
    if world()[0] == 1:
        model.linear.bias.data = torch.zeros(4)
    with pytest.raises(RankError, match="linear"):
        model.train_step(INDEX)


def test_values_assigned_on_one_rank_alone_are_refused(ranks: Ranks) -> None:
    ranks.run(assign_on_rank_1, timeout_s=60)
