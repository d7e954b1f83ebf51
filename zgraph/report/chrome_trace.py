"""The predicted lanes of a step in the trace-event format of Chrome, which https://ui.perfetto.dev opens.

Each program is a process and each lane a thread, on which complete events ("X") follow one another without overlap;
memory is a counter ("C"). Times are microseconds.
Format: "Trace Event Format" (Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def chrome_trace(document: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a report's document."""
    events = [
        event for process, program in enumerate(document["programs"], 1)
        for event in _events(document["tables"], program, process)
    ]  # fmt: skip
    plan = document["plan"]
    about = {"model": plan["model"], "world_size": plan["world_size"], "hardware": plan["hardware"], "is": "predicted"}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _events(tables: Mapping[str, Any], program: Mapping[str, Any], process: int) -> Iterator[dict[str, Any]]:
    yield _named("process_name", process, 0, f"{program['name']}, predicted")
    for thread, lane in enumerate(tables["lanes"], 1):
        yield _named("thread_name", process, thread, lane)
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}
    rows, costs = tables["rows"], tables["costs"]
    played = program["events"]
    for row, lane, start, end in zip(played["row"], played["lane"], played["start_s"], played["end_s"], strict=True):
        source, cost = tables["sources"][rows["source"][row]]["at"], rows["cost"][row]
        yield {
            "ph": "X",
            "name": tables["operators"][rows["operator"][row]],
            "cat": tables["phases"][rows["phase"][row]],
            "pid": process,
            "tid": lane + 1,
            "ts": start * 1e6,
            "dur": (end - start) * 1e6,
            "args": {
                "node": f"%{rows['node'][row]}",
                "gives": tables["forms"][rows["form"][row]],
                "module": tables["modules"][rows["module"][row]],
                "source": source or "",
                "made by": tables["makers"][rows["made_by"][row]],
                "bytes": costs["num_bytes"][cost],
            },
        }
    memory = program["passes"][-1]["memory"]
    for i, second in enumerate(memory["seconds"]):
        held = {kind: each[i] for kind, each in memory["bytes"].items()}
        yield {"ph": "C", "name": "memory", "pid": process, "tid": 0, "ts": second * 1e6, "args": held}


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
