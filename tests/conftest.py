"""Fixtures every test may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A pool of ranks: ``ranks.run(function, *args, world=2)`` calls a top-level function on each."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same random state, one thread and float32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
