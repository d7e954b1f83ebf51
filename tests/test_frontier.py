"""The frontier from keeping all to the lowest peak: it only falls, and no choice is far from the best there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.programs import blocks, few_examples, network
from tests.test_recomputation import LAYERS, Case
from zgraph.config import Config
from zgraph.frontier import Choice, frontier, pareto
from zgraph.recomputation import Profile


def profile_of(layers: list[tuple[str, int]], rows: int) -> Profile:
    return Case(network(layers, rows=rows), Config(3, 200), 2).profile


def test_only_what_nothing_beats_in_both_is_on_the_frontier() -> None:
    points = [(0.0, 9), (1.0, 7), (1.0, 6), (2.0, 6), (2.5, 8), (3.0, 2)]
    found = pareto(Choice(frozenset(), peak, seconds) for seconds, peak in points)
    assert [(choice.seconds, choice.peak_bytes) for choice in found] == [(0.0, 9), (1.0, 6), (3.0, 2)]


@given(LAYERS, st.sampled_from([4, 64]))
@few_examples(20)
def test_the_peak_falls_and_the_seconds_grow_along_the_frontier(layers: list[tuple[str, int]], rows: int) -> None:
    profile = profile_of(layers, rows)
    choices = frontier(profile)
    assert choices[0].peak_bytes <= profile.kept.peak_bytes
    for one, more in itertools.pairwise(choices):
        assert more.peak_bytes < one.peak_bytes
        assert more.seconds > one.seconds
    for choice in choices:
        outcome = profile.outcome(choice.dropped)
        assert (outcome.peak_bytes, outcome.seconds) == (choice.peak_bytes, choice.seconds)


def every_choice(profile: Profile) -> tuple[Choice, ...]:
    """The best there is, by trying all subsets."""
    found = []
    for num in range(len(profile.candidates) + 1):
        for subset in itertools.combinations(profile.candidates, num):
            outcome = profile.outcome(frozenset(subset))
            found.append(Choice(frozenset(subset), outcome.peak_bytes, outcome.seconds))
    return pareto(found)


@given(LAYERS, st.sampled_from([4, 64]))
@few_examples(30)
def test_the_frontier_is_near_the_best_there_is(layers: list[tuple[str, int]], rows: int) -> None:
    """Two thirds of the way to the lowest peak at least, mostly all of it; and as fast there, to within a third."""
    profile = profile_of(layers, rows)
    assume(1 <= len(profile.candidates) <= 9)
    best, found = every_choice(profile), frontier(profile)
    way = profile.kept.peak_bytes - best[-1].peak_bytes
    assert found[-1].peak_bytes - best[-1].peak_bytes <= way / 3
    for choice in best:
        mine = [each.seconds for each in found if each.peak_bytes <= choice.peak_bytes]
        assert not mine or min(mine) <= choice.seconds * 4 / 3


@pytest.mark.parametrize("num", [3, 12])
def test_alike_blocks_are_dropped_in_order(num: int) -> None:
    """What is held longest goes first."""
    profile = Case(blocks(num), Config(3), 1).profile
    tanhs = [node for node in profile.candidates if "tanh" in str(node.target)]
    for choice in frontier(profile):
        dropped = [node in choice.dropped for node in tanhs]
        assert dropped == sorted(dropped, reverse=True)
