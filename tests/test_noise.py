"""Noise in the gradients has the size that the user names, however many ranks and micro-batches draw it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import zgraph
from tests.reference import assert_equal


class Flat(nn.Module):
    """Its gradient is zero."""

    def __init__(self, num: int = 20_000) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * 0).sum() + x.sum()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x @ self.w, 0.5).square().mean()


def test_one_process_draws_what_pytorch_would() -> None:
    """Behind backward, from the generator that dropout draws from."""
    model = Dropping().double()
    reference = copy.deepcopy(model)
    compiled: Any = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1), gradient_noise=0.5)
    optimizer = SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(5, 4, dtype=torch.float64)
        size = compiled.recipe["gradient_noise"] = 0.5 / (1 + step)
        torch.manual_seed(step)
        compiled.train_step(x)
        torch.manual_seed(step)
        optimizer.zero_grad()
        reference(x).backward()
        reference.w.grad += size * torch.randn(4, 3, dtype=torch.float64)
        optimizer.step()
        assert_equal(compiled.state_dict(), reference.state_dict(), f"step {step}")
    assert compiled.stats()["num_captures"] == 1


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (3, 1), (2, 4)])
def test_what_remains_in_the_mean_has_the_size_that_is_named(world: int, accumulate: int, zero: int) -> None:
    model = Flat()
    ranks = zgraph.simulate_ranks(
        model,
        SGD(model.parameters(), lr=1.0),
        world_size=world,
        zero=zero,
        accumulate=accumulate,
        gradient_noise=0.25,
    )
    ranks.train_step([(torch.ones(accumulate),)] * world)
    w = ranks.state_dict()["w"]  # which is refused where ranks differ
    assert w.std().item() == pytest.approx(0.25, rel=0.05)
    assert abs(w.mean().item()) < 0.01


def test_where_its_size_would_not_be_right_it_is_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="gradient_noise with precision='fp16'"):
        zgraph.compile(Flat(), gradient_noise=0.1, precision="fp16")
    with pytest.raises(zgraph.OptionError, match="gradient_noise with a weight"):
        zgraph.compile(Flat(), gradient_noise=0.1, weight=lambda x: x.sum())
    with pytest.raises(zgraph.OptionError, match=r"gradient_noise=-1 is out of range"):
        zgraph.compile(Flat(), gradient_noise=-1)
