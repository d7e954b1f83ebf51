"""A step that is watched holds what was predicted, and stops at the first call where it holds more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
