"""The lanes of a step, predicted and measured, in the trace-event format of Chrome, which Perfetto opens.

Each program is a process and each lane a thread, on which complete events ("X") follow one another without overlap;
memory is a counter ("C"). Times are microseconds.
Format: "Trace Event Format" (Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zgraph.hardware import LOWER_TIERS
from zgraph.report.runs import unrolled
from zgraph.timeline import COMPUTE


def chrome_trace(document: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a report's document."""
    tables, programs = document["tables"], document["programs"]
    events = [event for process, program in enumerate(programs, 1) for event in _predicted(tables, program, process)]
    for process, program in enumerate(programs, len(programs) + 1):
        if "measured" in program:
            events += _measured(tables, program, process)
    plan = document["plan"]
    about = {"model": plan["model"], "world_size": plan["world_size"], "hardware": plan["hardware"]}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _predicted(tables: Mapping[str, Any], program: Mapping[str, Any], process: int) -> Iterator[dict[str, Any]]:
    yield from _lanes(tables, process, f"{program['name']}, predicted")
    played = program["events"]
    for row, lane, start, end in zip(played["row"], played["lane"], played["start_s"], played["end_s"], strict=True):
        yield _call(tables, row, process, lane + 1, start, end)
    memory = program["passes"][-1]["memory"]
    for i, second in enumerate(memory["seconds"]):
        for name, tier in (("memory", memory["bytes"]), *((tier, memory.get(f"on_{tier}")) for tier in LOWER_TIERS)):
            if tier:
                held = {kind: each[i] for kind, each in tier.items()}
                yield {"ph": "C", "name": name, "pid": process, "tid": 0, "ts": second * 1e6, "args": held}


def _lanes(tables: Mapping[str, Any], process: int, name: str) -> Iterator[dict[str, Any]]:
    yield _named("process_name", process, 0, name)
    for thread, lane in enumerate(tables["lanes"], 1):
        yield _named("thread_name", process, thread, lane)
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}


def _measured(tables: Mapping[str, Any], program: Mapping[str, Any], process: int) -> Iterator[dict[str, Any]]:
    """Calls as they ran one after another, the time that they waited included; on its lane what each has started.

    What is started lasts until it has been waited for, or from then on where the lane still had an earlier one.
    """
    yield from _lanes(tables, process, f"{program['name']}, measured")
    rows, order, compute = (
        tables["rows"],
        list(unrolled(program["passes"][-1]["order"])),
        tables["lanes"].index(COMPUTE),
    )
    started: dict[int, tuple[int, float]] = {}
    free, start = [0.0] * len(tables["lanes"]), 0.0
    for position, end in zip(program["measured"]["position"], program["measured"]["end_s"], strict=True):
        row = order[position]
        if rows["lane"][row] != compute:
            started[rows["node"][row]] = row, start
        else:
            yield _call(tables, row, process, compute + 1, start, end)
        if tables["operators"][rows["operator"][row]] == tables["wait"]:
            source, began = started.pop(rows["inputs"][row][0])
            lane = rows["lane"][source]
            yield _call(tables, source, process, lane + 1, max(began, free[lane]), max(end, free[lane]))
            free[lane] = max(end, free[lane])
        start = end


def _call(tables: Mapping[str, Any], row: int, process: int, thread: int, start: float, end: float) -> dict[str, Any]:
    rows = tables["rows"]
    return {
        "ph": "X",
        "name": tables["operators"][rows["operator"][row]],
        "cat": tables["phases"][rows["phase"][row]],
        "pid": process,
        "tid": thread,
        "ts": start * 1e6,
        "dur": (end - start) * 1e6,
        "args": {
            "node": f"%{rows['node'][row]}",
            "gives": tables["forms"][rows["form"][row]],
            "module": tables["modules"][rows["module"][row]],
            "source": tables["sources"][rows["source"][row]]["at"] or "",
            "made by": tables["makers"][rows["made_by"][row]],
            "bytes": tables["costs"]["num_bytes"][rows["cost"][row]],
        },
    }


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
