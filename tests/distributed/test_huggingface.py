"""Hugging Face models train unmodified, equal to plain PyTorch on the concatenated batch."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import Ranks
from tests.reference import train_like_eager


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3", "vit", "t5"])
def test_zero_3_on_two_ranks_equals_eager(ranks: Ranks, case: str) -> None:
    ranks.run(train_like_eager, case, optimizer="adamw_large_eps", zero=3)


REST = [pytest.param(*each, marks=pytest.mark.nightly) for each in (("gpt2", 3), ("t5", 2), ("vit", 0))]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "zero"), [("llama", 1), *REST])
def test_float32_equals_eager(ranks: Ranks, case: str, zero: int) -> None:
    ranks.run(train_like_eager, case, optimizer="sgd_momentum", dtype=torch.float32, zero=zero)
