"""A step that is watched holds what was predicted, and stops at the first call where it holds more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import zgraph
from tests.models import CASES
from tests.ranks import Ranks
from tests.reference import world
from tests.test_planner import Stack, rows
from zgraph import memory_check
from zgraph.errors import BudgetError


def train(case: str, **options: Any) -> None:
    rank, num_ranks = world()
    torch.manual_seed(0)
    model = CASES[case].model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    zgraph.compile(model, optimizer=optimizer, check_memory=True, bucket_bytes=4096, **options)
    for batch in CASES[case].batches(2):
        model.train_step(*batch.part(rank, num_ranks).args)


@pytest.mark.parametrize("options", [{}, {"recompute": "blocks", "clip_norm": 1.0}], ids=str)
def test_one_rank_holds_what_was_predicted(options: dict[str, Any]) -> None:
    train("gpt", **options)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_ranks_hold_what_was_predicted(ranks: Ranks, zero: int) -> None:
    ranks.run(train, "gpt", zero=zero)


@pytest.mark.slow
def test_parts_of_gradients_that_are_messages_are_predicted(ranks: Ranks) -> None:
    """Of three ranks, each is sent the small parts of the two others, though they may read each other's memory."""
    ranks.run(train, "gpt", zero=2, world=3)


class Squares(torch.nn.Module):
    """torch keeps each element's loss in the memory of their mean, whose shape does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.layer(x), torch.ones(64, 1024)) + F.smooth_l1_loss(x, torch.zeros_like(x))


class Layers(torch.nn.Module):
    """oneDNN's LSTM keeps a workspace for backward, whose size torch does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.LSTM(8, 96, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)[0].square().mean()


class Frozen(Layers):
    """Of which nothing reads what it keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.layers(x)[0]
        return self.head(hidden).square().mean()

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(192, 1)


@pytest.mark.parametrize(("model", "shape"), [(Frozen, (32, 6, 8)), (Squares, (64, 8)), (Layers, (32, 6, 8))])
def test_memory_that_no_shape_tells_is_predicted(model: type[torch.nn.Module], shape: tuple[int, ...]) -> None:
    trained = model()
    zgraph.compile(trained, optimizer=torch.optim.SGD(trained.parameters(), lr=1e-3), check_memory=True)
    for _ in range(2):
        trained.train_step(torch.randn(shape))


def test_a_step_that_holds_more_stops_with_the_call_and_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = memory_check.held_bytes

    def less(held: Any, num_positions: int) -> list[int]:
        return [num_bytes // 2 for num_bytes in predicted(held, num_positions)]

    monkeypatch.setattr(memory_check, "held_bytes", less)
    model = Stack()
    zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters()), check_memory=True)
    with pytest.raises(BudgetError) as raised:
        model.train_step(*rows())
    for part in ("after call", "of module blocks.0", "were predicted", "test_planner.py"):
        assert part in str(raised.value)


def test_views_and_inputs_count_once_or_not_at_all() -> None:
    check = object.__new__(memory_check.MemoryCheck)
    check._expected, check._slack, check._nodes = [32], 0.0, []
    given, own = torch.zeros(100), torch.zeros(8)
    check.begin([given, 1.0])
    check.see(0, {"a": given.view(10, 10), "b": own, "c": (own[:4], [own.t(), 2, None, "name"])})
