"""Training with zgraph equals plain PyTorch: any number of ranks, any ZeRO stage, any optimizer, at every step."""

from __future__ import annotations

import pytest
import torch

from tests.choices import in_turn, pairwise
from tests.models import CASES
from tests.ranks import Ranks
from tests.reference import slow, train_like_eager

HUGGING_FACE = {"gpt2", "llama", "qwen3", "vit", "t5"}
OWN = [name for name in CASES if name not in HUGGING_FACE]
QUICK = ["gpt", "gpt_tied", "awkward", "resnet"]


@pytest.mark.parametrize("case", [*QUICK, *slow(*(name for name in OWN if name not in QUICK))])
def test_zero_3_on_two_ranks_equals_eager(ranks: Ranks, case: str) -> None:
    ranks.run(train_like_eager, case, zero=3)


@pairwise(dtype=[torch.float64, torch.float32], world=[1, 2, 3], zero=[0, 1, 2, 3], case=["gpt", "gpt_tied"])
def test_every_stage_on_one_to_three_ranks_equals_eager(
    ranks: Ranks, dtype: torch.dtype, world: int, zero: int, case: str
) -> None:
    ranks.run(train_like_eager, case, zero=zero, dtype=dtype, world=world)


@in_turn("case", ["experts", "recommender", "recurrent"], "world, zero", [(2, 3), (3, 1)])
def test_float32_equals_eager(ranks: Ranks, world: int, zero: int, case: str) -> None:
    ranks.run(train_like_eager, case, zero=zero, dtype=torch.float32, world=world)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("case", [name for name in OWN if name not in ("gpt", "gpt_tied")])
@pytest.mark.parametrize(("world", "zero"), [(3, 3), (2, 2), (1, 3)])
def test_every_model_equals_eager(ranks: Ranks, world: int, zero: int, case: str) -> None:
    ranks.run(train_like_eager, case, zero=zero, world=world)
