"""The trace keeps to what Perfetto takes of Chrome's format: on a lane one event after another, and counters."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from tests.reporting import report_of_blocks


@pytest.fixture(scope="module")
def made() -> tuple[dict, dict]:  # type: ignore[type-arg]
    report = report_of_blocks(accumulate=2, num=1)
    return json.loads(report.to_json()), json.loads(report.to_trace())


def test_every_event_of_the_timeline_is_there(made: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    document, trace = made
    shown = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(shown) == sum(len(program["events"]["row"]) for program in document["programs"])
    last = max(event["ts"] + event["dur"] for event in shown if event["pid"] == 1)
    assert last <= document["programs"][0]["passes"][-1]["step_s"] * 1e6 * (1 + 1e-9)
    assert {event["name"] for event in shown} >= {"aten.mm.default", "aten.addmm.default"}


def test_events_of_a_lane_follow_one_another(made: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    lanes = defaultdict(list)
    for event in made[1]["traceEvents"]:
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(lanes) == 4  # to compute and to communicate, in each of two programs
    for events in lanes.values():
        for (_, end), (start, _) in pairwise(events):
            assert start >= end * (1 - 1e-12)


def test_lanes_have_names_and_memory_is_counted(made: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    document, trace = made
    named = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert named == {"compute", "data"}
    counted = [sum(event["args"].values()) for event in trace["traceEvents"] if event["ph"] == "C"]
    assert max(counted) == document["plan"]["chosen"]["peak_bytes"]
