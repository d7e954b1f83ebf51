"""Ranks that do different things, or fail alone, all hear of it, with the same explanation."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
import torch.distributed as dist

from tests.ranks import Ranks
from zgraph.agreement import Agreement
from zgraph.errors import RankError, StoppedError


def agreement() -> Agreement:
    return Agreement(dist.group.WORLD)


def disagree() -> None:
    rank, ranks = dist.get_rank(), agreement()
    ranks.check("train()", {"shape": "(2,)"})
    with pytest.raises(RankError, match=re.escape("rank 0 has called train(), rank 1 save()")):
        ranks.check("train()", {"shape": "(2,)"}) if rank == 0 else ranks.check("save()")
    with pytest.raises(RankError, match=re.escape("on shape: rank 0 has '(0,)', rank 1 has '(1,)'")):
        ranks.check("train()", {"length": "1", "shape": f"({rank},)"})
    with pytest.raises(ValueError if rank else RankError, match="a bug of the user's"):
        ranks.check("train()", {}, ValueError("a bug of the user's") if rank else None)
    ranks.check("train()", {"shape": "(2,)"})


def test_ranks_that_differ_are_told_in_what(ranks: Ranks) -> None:
    ranks.run(disagree, timeout_s=60)


def fail_on_rank_1(ranks: Agreement, communicates: bool) -> None:
    with ranks.together():
        if ranks.rank == 1:
            raise ValueError("a bug of the user's")
        if communicates:
            ranks.share_outcome(b"", None)
            raise AssertionError("no rank goes on where another has failed")


def fail_alone() -> None:
    ranks = agreement()
    for communicates in (False, True):
        with pytest.raises(ValueError if ranks.rank else RankError, match="a bug of the user's"):
            fail_on_rank_1(ranks, communicates)
    with ranks.together():
        pass
    ranks.check("train()")


def test_a_part_that_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    ranks.run(fail_alone, timeout_s=60)


def follow_the_first() -> None:
    ranks = agreement()
    assert ranks.of_first(lambda: f"of rank {ranks.rank}" * 1000) == "of rank 0" * 1000

    def fail() -> str:
        raise ValueError("a bug of the user's")

    with pytest.raises(RankError if ranks.rank else ValueError, match="a bug of the user's"):
        ranks.of_first(fail)
    ranks.check("train()")


def test_all_ranks_are_told_what_the_first_one_makes(ranks: Ranks) -> None:
    ranks.run(follow_the_first, timeout_s=60)
    assert Agreement(None).of_first(lambda: "mine") == "mine"


def take_the_least(number: int) -> int:
    ranks = agreement()
    return ranks.least(number - ranks.rank)


def test_the_smallest_number_of_all_ranks_is_taken(ranks: Ranks) -> None:
    assert ranks.run(take_the_least, 2**40 + 5, timeout_s=60) == [2**40 + 4] * 2
    assert ranks.run(take_the_least, 2**70, timeout_s=60) == [2**64 - 1] * 2
    assert Agreement(None).least(3) == 3


def fall_behind() -> None:
    ranks = agreement()
    with suppress(KeyError), ranks.no_return():
        raise KeyError("a bug of the user's")
    for call in (lambda: ranks.check("train()"), lambda: ranks.share_outcome(b"", None)):
        with pytest.raises(RankError, match='KeyError: "a bug of the user\'s"') as refusal:
            call()
        assert isinstance(refusal.value.__cause__, KeyError)
        assert "restart" in refusal.value.fix


def test_a_rank_that_is_behind_for_good_says_why(ranks: Ranks) -> None:
    ranks.run(fall_behind, timeout_s=60)


def stop_after(first: int) -> None:
    ranks = agreement()
    if ranks.rank == first:
        with pytest.raises(KeyError), ranks.no_return():
            raise KeyError("a bug of the user's")
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(RankError, match=f"^rank {first} failed: KeyError") as told, ranks.no_return():
            raise StoppedError("the other is gone")
        assert isinstance(told.value.__cause__, StoppedError)


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_meets_that_another_has_stopped_says_why_that_has(ranks: Ranks, first: int) -> None:
    ranks.run(stop_after, first, timeout_s=60)


def differ() -> None:
    told = agreement()
    if told.rank == 1:
        dist.barrier()
    with pytest.raises(RankError, match=f"^mine is {told.rank}"), told.no_return():
        raise RankError(f"mine is {told.rank}")
    if told.rank == 0:
        dist.barrier()


def test_what_all_ranks_have_found_each_says_by_itself(ranks: Ranks) -> None:
    ranks.run(differ, timeout_s=60)


def test_a_single_process_agrees_with_itself_whatever_has_failed() -> None:
    alone = Agreement(None)
    with suppress(KeyError), alone.no_return():
        raise KeyError
    alone.check("train()")
    with pytest.raises(ValueError, match="mine"), alone.together():
        raise ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        alone.check("train()", {}, ValueError("mine"))
