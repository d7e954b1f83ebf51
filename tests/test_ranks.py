"""The multi-rank harness itself: a harness that hides failures would make every other test here worthless."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks, RanksError


def sum_over_ranks(value: float) -> tuple[int, float, float]:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.rand(()).item()


def is_initialized() -> bool:
    return dist.is_initialized()


def raise_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank's own words")
    dist.barrier()


def hang_on_first_rank() -> None:
    if dist.get_rank() == 0:
        time.sleep(3600)


def die_on_first_rank() -> None:
    if dist.get_rank() == 0:
        os._exit(7)


def test_ranks_return_in_order_with_the_same_seed(ranks: Ranks) -> None:
    for world in (2, 3):
        results = ranks.run(sum_over_ranks, 1.0, world=world)
        assert [rank for rank, _, _ in results] == list(range(world))
        assert {total for _, total, _ in results} == {sum(1.0 + rank for rank in range(world))}
        assert len({number for _, _, number in results}) == 1


def test_one_rank_has_a_group_only_when_asked(ranks: Ranks) -> None:
    assert ranks.run(is_initialized, world=1) == [False]
    assert ranks.run(is_initialized, world=1, group=True) == [True]


def test_an_exception_names_its_rank_and_the_pool_recovers(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ranks.GRACE_S", 0.5)
    with pytest.raises(RanksError, match=r"(?s)rank 1 of 2 raised.*raise_on_last_rank.*the last rank's own words"):
        ranks.run(raise_on_last_rank)
    assert len(ranks.run(sum_over_ranks, 1.0)) == 2


def test_a_hang_names_its_rank_and_stack(ranks: Ranks) -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 0 had not returned after 2 s.*in hang_on_first_rank"):
        ranks.run(hang_on_first_rank, timeout_s=2)
    assert len(ranks.run(sum_over_ranks, 1.0)) == 2


def test_a_death_names_its_rank_and_exit_code(ranks: Ranks) -> None:
    with pytest.raises(RanksError, match="rank 0 of 2 died with exit code 7"):
        ranks.run(die_on_first_rank)
    assert len(ranks.run(sum_over_ranks, 1.0)) == 2
