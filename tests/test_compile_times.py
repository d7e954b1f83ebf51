"""What is left of compiling is told by the compile before that was most alike, and by how fast this one goes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph.compile_times import NUM_KEPT, Compile, Estimate, known, remember

PARTS = (("capture", 10.0), ("Bucket", 2.0), ("Schedule", 4.0), ("kernels", 1.0))
BEFORE = Compile("compiled", is_first=True, num_modules=100, num_nodes=1000, parts=PARTS)
BEGUN = replace(BEFORE, num_nodes=0, parts=())


def left_s(now: Compile, *before: Compile, current_s: float = 0.0) -> float | None:
    return Estimate(now, before).left_s(current_s)


def test_nothing_is_said_before_anything_like_it_was_compiled() -> None:
    assert left_s(BEGUN) is None
    assert left_s(BEGUN, replace(BEFORE, is_first=False)) is None
    assert left_s(BEGUN, replace(BEFORE, what="options chosen")) is None


def test_the_same_again_takes_as_long_again() -> None:
    assert left_s(BEGUN, BEFORE) == 17
    assert left_s(BEGUN, BEFORE, current_s=4) == 13
    assert left_s(replace(BEFORE, parts=PARTS[:2]), BEFORE, current_s=1) == 4
    assert left_s(BEFORE, BEFORE) is None  # it is done


def test_modules_tell_how_long_capture_takes_and_nodes_how_long_the_rest_does() -> None:
    assert left_s(replace(BEGUN, num_modules=200), BEFORE) == 34  # of nodes nothing is known yet
    assert left_s(replace(BEGUN, num_nodes=3000, parts=(("capture", 10.0),)), BEFORE) == 3 * 7


def test_a_machine_that_is_slower_than_it_was_is_taken_to_stay_so() -> None:
    assert left_s(replace(BEFORE, parts=(("capture", 20.0),)), BEFORE) == 2 * 7
    assert left_s(replace(BEFORE, parts=(("capture", 20.0), ("Bucket", 1.0))), BEFORE) == pytest.approx(5 * 21 / 12)


def test_a_part_that_lasts_longer_than_expected_has_no_time_left() -> None:
    assert left_s(BEGUN, BEFORE, current_s=25) == 7
    assert left_s(replace(BEFORE, parts=PARTS[:3]), BEFORE, current_s=25) is None


def test_passes_that_are_left_out_or_new_are_passed_over() -> None:
    at = (("capture", 10.0), ("Schedule", 4.0))
    assert left_s(replace(BEFORE, parts=at), BEFORE) == 1
    assert left_s(replace(BEFORE, parts=(("capture", 10.0), ("Mine", 5.0))), BEFORE) == 7


def test_of_several_the_nearest_in_size_is_taken_and_of_those_the_last() -> None:
    small = replace(BEFORE, num_modules=10, parts=(("capture", 3.0),))
    twice = replace(BEFORE, parts=(("capture", 5.0),))
    assert left_s(replace(BEGUN, num_modules=20), BEFORE, small) == 6
    assert left_s(BEGUN, BEFORE, twice, small) == 5


seconds = st.floats(0.001, 1000)


@few_examples(50)
@given(st.lists(st.tuples(st.sampled_from("abcd"), seconds), max_size=6), st.lists(st.sampled_from("abcde")), seconds)
def test_whatever_ran_before_there_is_some_time_left_or_nothing_is_said(
    parts: list[tuple[str, float]], done: list[str], current_s: float
) -> None:
    now = replace(BEFORE, parts=tuple((name, 1.0) for name in done))
    found = left_s(now, replace(BEFORE, parts=tuple(parts)), current_s=current_s)
    assert found is None or 0 < found < float("inf")


def test_the_last_ones_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "times.json"
    assert known(file) == []
    done = [replace(BEFORE, num_nodes=i + 1) for i in range(NUM_KEPT + 3)]
    for each in done:
        remember(file, each, known(file))
    assert known(file) == done[-NUM_KEPT:]
    assert os.listdir(file.parent) == ["times.json"]


def written(num_modules: str, seconds: str) -> str:
    sizes = f'"num_modules": {num_modules}, "num_nodes": 1'
    return f'[{{"what": "x", "is_first": true, {sizes}, "parts": [["a", {seconds}]]}}]'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", '[{"what": 1}]', '"x"', "null", '{"a": [1]}'),
        *(written("Infinity", "1.0"), written("1", "NaN"), written("1", "-1.0"), written("0", "1.0")),
    ],
)
def test_a_file_that_says_something_else_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "times.json").write_text(text)
    assert known(tmp_path / "times.json") == []
    (tmp_path / "times.json").write_text(written("1", "1.0"))
    assert len(known(tmp_path / "times.json")) == 1


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    remember(tmp_path / "file" / "times.json", BEFORE, [])
    remember(None, BEFORE, [])
    assert known(None) == []
