"""The solver finds what trying all subsets finds, and says how far others are from it."""

from __future__ import annotations

import builtins
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import zgraph
from tests.programs import blocks, few_examples
from tests.test_frontier import every_choice, profile_of
from tests.test_recomputation import LAYERS, Case
from tests.test_recompute_activations import lowered, made_again
from zgraph.config import Config
from zgraph.frontier import frontier
from zgraph.optimal_recomputation import Optimum, optimum


@given(LAYERS, st.sampled_from([4, 64]))
@few_examples(25)
def test_it_finds_what_trying_all_subsets_finds(layers: list[tuple[str, int]], rows: int) -> None:
    profile = profile_of(layers, rows)
    assume(2 <= len(profile.candidates) <= 7)
    best, found = every_choice(profile), frontier(profile)
    for choice in best:
        exact = optimum(profile, choice.peak_bytes, most_ruled_out=200)
        assert exact.choice is not None
        assert exact.choice.seconds == pytest.approx(choice.seconds)
        assert exact.gap(choice.seconds) == pytest.approx(0, abs=1e-9)
        mine = next((c for c in found if c.peak_bytes <= choice.peak_bytes), None)
        assert mine is None or 0 <= exact.gap(mine.seconds) <= 0.25
    assert optimum(profile, best[-1].peak_bytes - 1, most_ruled_out=200) == Optimum(None, float("inf"))


def test_where_it_stops_early_its_bound_holds() -> None:
    profile = Case(blocks(4), Config(0, 1), 1).profile
    choice = frontier(profile)[-1]
    stopped, solved = (optimum(profile, choice.peak_bytes, most_ruled_out=num) for num in (1, 200))
    assert solved.choice is not None
    assert stopped.bound_s <= solved.choice.seconds
    assert solved.gap(solved.choice.seconds) == 0
    assert Optimum(None, 3.0).gap(4.0) == 0.25


def test_a_step_may_ask_for_it() -> None:
    captured = blocks(4)
    greedy, solved = (
        lowered(captured, 0.6, zero=0, bucket_bytes=1, **options) for options in ({}, {"recompute_solver": "milp"})
    )
    assert 0 < len(made_again(solved)) <= len(made_again(greedy))
    (note,) = solved.notes
    assert re.fullmatch(r"recompute_solver='milp': what runs again takes .* ms, at most 0.0% of it more than .*", note)
    assert not greedy.notes


def test_too_many_activations_are_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="at most 64 activations, and there are 79"):
        lowered(blocks(40), 0.5, zero=0, bucket_bytes=1, recompute_solver="milp")


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(zgraph.OptionError, match="SciPy, which is not installed") as caught:
        lowered(blocks(4), 0.5, zero=0, bucket_bytes=1, recompute_solver="milp")
    assert "pip install scipy" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"recompute": 0.5, "recompute_solver": "simplex"}, "recompute_solver='simplex' is not known"),
        ({"recompute": "blocks", "recompute_solver": "milp"}, "recompute_solver with recompute='blocks'"),
    ],
)
def test_what_is_no_choice_is_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(zgraph.OptionError, match=rule):
        Config.from_options(options)
