"""A report is plain data with a version, which is written beside its page and read again."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from tests.reporting import CPU, H100, HOSTILE, Blocks, hostile_program, report_of_blocks, report_of_program
from zgraph import placement
from zgraph.config import Config
from zgraph.errors import StateError
from zgraph.footprint import Kind
from zgraph.hardware import Hardware
from zgraph.report import Report
from zgraph.report.document import SCHEMA, VERSION, would_free

_PASS = {
    "name": str, "about": str, "stage": str, "num_nodes": int, "num_added": int, "num_removed": int, "num_moved": int,
    "num_altered": int, "moved": list, "order": list, "placed": dict, "step_s": float, "exposed_s": float,
    "starved_s": float, "busy_s": dict, "peak_bytes": int, "communicated_bytes": int, "num_collectives": int,
    "memory": dict, "owners": list, "time_s": float, "verify_s": float, "assumes": list, "proved": bool,
}  # fmt: skip
_DOCUMENT = {
    "schema": str, "version": int, "made_with": dict, "plan": dict, "options": dict, "machine": dict, "mesh": dict,
    "digest": str, "is_proved": bool, "notes": list, "would_free": dict, "tables": dict, "programs": list,
}  # fmt: skip
_TABLES = {
    "rows", "operators", "wait", "transfer_lanes", "bodies", "texts", "text_of", "arguments", "sources", "costs",
    "forms", "modules", "phases", "lanes", "makers",
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of_blocks(num=1)


def test_the_data_is_of_version_2(report: Report) -> None:
    document = json.loads(report.to_json())
    assert (document["schema"], document["version"]) == (SCHEMA, VERSION) == ("zgraph-report", 2)
    assert {name: type(value) for name, value in document.items()} == _DOCUMENT
    assert document["tables"].keys() == _TABLES
    for program in document["programs"]:
        assert program.keys() == {"name", "repeats", "passes", "events", "if_faster", "kernels"}
        for each in program["passes"]:
            assert {name: type(value) for name, value in each.items()} == _PASS
    num_rows = {len(column) for column in document["tables"]["rows"].values()}
    assert len(num_rows) == 1
    for column, table in {"operator": "operators", "form": "forms", "module": "modules", "source": "sources"}.items():
        assert max(document["tables"]["rows"][column]) == len(document["tables"][table]) - 1


@pytest.mark.parametrize(
    ("hardware", "text"), [(H100, "@triton.jit\ndef update_"), (CPU, "def kernel(")], ids=["gpu", "cpu"]
)
def test_a_kernel_comes_with_the_text_that_is_compiled(hardware: Hardware, text: str) -> None:
    tables = report_of_blocks(hardware=hardware, num=1).document["tables"]
    assert len(set(tables["texts"])) == len(tables["texts"])
    for operator, number in zip(tables["operators"], tables["text_of"], strict=True):
        assert (number is not None) == operator.startswith("update_")
        assert number is None or tables["texts"][number].startswith(text)


@pytest.mark.parametrize("hardware", [H100, CPU], ids=["gpu", "cpu"])
def test_the_peak_is_told_alike_wherever_it_is_told(hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the arena is held throughout: where more of it is in use, no more is held."""
    monkeypatch.setattr(placement, "SMALLEST_BYTES", 2**8)
    report = report_of_blocks(hardware=hardware, num=2, world=1)
    assert ("arena, not in use" in report.document["plan"]["by_kind"]) == (hardware is CPU)
    memory = report.document["programs"][-1]["passes"][-1]["memory"]
    at_peak = {kind: held[memory["peak"]] for kind, held in memory["bytes"].items() if held[memory["peak"]]}
    assert at_peak == {kind: held for kind, held in report.document["plan"]["by_kind"].items() if held}


def test_what_was_written_is_read_again(report: Report, tmp_path: Path) -> None:
    html, data, trace = report.write(tmp_path / "step.html")
    assert [path.name for path in (html, data, trace)] == ["step.html", "step.json", "step.trace.json"]
    again = Report.read(data)
    assert again.document == json.loads(report.to_json())
    assert again.to_html() == html.read_text()
    assert json.loads(trace.read_text()) == json.loads(again.to_trace())


def test_a_report_is_printed_in_one_line(report: Report) -> None:
    assert re.fullmatch(r"<Report of Blocks on 4 x H100: step [\d.]+ m?s, peak [\d.]+ [KM]iB>", repr(report))
    assert str(report) == repr(report)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is not a report"),
        ('{"schema": "other"}', "has no schema"),
        (f'{{"schema": "{SCHEMA}", "version": 99}}', "is of version 99; this zgraph reads 2"),
        (f'{{"schema": "{SCHEMA}", "version": 2}}', "is damaged: it has no 'plan'"),
    ],
)
def test_what_is_no_report_is_refused(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StateError, match=says):
        Report.read(path)


def test_a_place_that_cannot_be_written_to_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"cannot be written: there is no folder .*nowhere"):
        report.write(tmp_path / "nowhere" / "report.html")
    (tmp_path / "page").mkdir()
    with pytest.raises(StateError, match=r"cannot be written: Is a directory"):
        report.write(tmp_path / "page")
    with pytest.raises(StateError, match=r"both the page and its data"):
        report.write(tmp_path / "report.json")
    for name in ("", "a\0b", 3):
        with pytest.raises(StateError, match=f"{re.escape(repr(name))} is no name of a page"):
            report.write(name)  # type: ignore[arg-type]


def test_what_cannot_be_written_leaves_what_was_there(report: Report, tmp_path: Path) -> None:
    (tmp_path / "step.json").mkdir()
    with pytest.raises(StateError, match=r"step.json cannot be written: Is a directory"):
        report.write(tmp_path / "step.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.html", "step.json"]


def test_ranks_that_write_the_same_page_do_not_mix(report: Report, tmp_path: Path) -> None:
    page = tmp_path / "step.html"
    with page.open("w") as other:  # of another rank, which has not written yet
        report.write(page)
        other.write("x" * 10**7)
    assert page.read_text() == report.to_html()


def test_a_kind_of_bytes_is_told_what_would_make_it_less() -> None:
    alone, sharded = would_free(Config(zero=0), 8), would_free(Config(zero=3), 8)
    assert "zero=1 divides it over 8 ranks" in alone[Kind.STATE.value]
    assert "zero=1" not in sharded[Kind.STATE.value]
    assert Kind.PARAMS.value not in sharded
    assert "recompute" in sharded[Kind.ACTIVATIONS.value]
    assert "recompute" not in would_free(Config(recompute="blocks"), 8)[Kind.ACTIVATIONS.value]


def test_what_is_twice_as_fast_takes_its_part_off_the_step() -> None:
    for hardware in (H100, CPU):
        (program,) = report_of_blocks(hardware=hardware, num=2).document["programs"]
        step_s, faster = program["passes"][-1]["step_s"], program["if_faster"]
        assert all(step_s / 2 <= seconds <= step_s for seconds in faster.values())
        assert min(faster.values()) < step_s
        if hardware is CPU:  # where nothing runs beside anything else, the three parts are the step
            assert sum(2 * (step_s - seconds) for seconds in faster.values()) == pytest.approx(step_s)


def test_what_a_disk_moves_is_on_lanes_of_its_own() -> None:
    document = report_of_blocks(hardware=CPU, num=2, offload={"optimizer": "disk"}).document
    (program,), tables = document["programs"], document["tables"]
    rows, lanes = tables["rows"], tables["lanes"]
    on_disk = {
        operator: {lanes[rows["lane"][row]] for row, number in enumerate(rows["operator"]) if number == at}
        for at, operator in enumerate(tables["operators"])
        if operator in ("zgraph.load.default", "zgraph.store.default")
    }
    assert on_disk == {"zgraph.load.default": {"disk in"}, "zgraph.store.default": {"disk out"}}
    assert tables["transfer_lanes"].items() >= {"disk in": "the disk", "disk out": "the disk"}.items()
    assert program["if_faster"]["the disk"] < program["passes"][-1]["step_s"]


# Of a compiled model


def trained(**options: Any) -> tuple[Any, torch.Tensor]:
    model = Blocks(2)
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), **options)  # type: ignore[assignment]
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    model.train_step(tokens)
    return model, tokens


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 1.0}])
def test_the_report_of_a_model_is_of_the_step_that_ran(options: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = trained(**options)
    model.train_step(tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, digest, num_captures = model.plan, model.program.digest(), model.stats()["num_captures"]
    report = model.report(tmp_path / "report.html")
    document = report.document
    assert (tmp_path / "report.html").exists()
    assert document["notes"] == []
    assert document["plan"]["chosen"]["step_s"] == plan.chosen.step_s
    assert document["programs"][-1]["passes"][-1]["num_nodes"] == model.program.num_nodes()
    assert document["programs"][-1]["passes"][-1]["step_s"] <= plan.chosen.step_s
    assert max(each["passes"][-1]["peak_bytes"] for each in document["programs"]) == plan.chosen.peak_bytes
    assert all(each["proved"] for program in document["programs"] for each in program["passes"])
    assert model.program.digest() == digest
    assert model.stats()["num_captures"] == num_captures
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.train_step(tokens)  # as before


@pytest.mark.slow
def test_a_step_in_which_an_operator_gives_no_gradient_has_a_report() -> None:
    """Convolution's backward has none for the batch; the pass that tidies up takes the empty result out."""
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.1))
    model = zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters()), loss=lambda y, _: y.square().mean())
    model.train_step(torch.randn(2, 1, 4, 4))
    document = model.report().document
    assert "NoneType" in document["tables"]["forms"]
    first, second, *_ = document["programs"][0]["passes"]
    assert second["num_nodes"] < first["num_nodes"]


@pytest.mark.slow
def test_a_model_that_has_changed_is_said_to_have() -> None:
    model, _ = trained()
    model.layers[0][1] = nn.ReLU()
    assert "the step has changed since it last ran" in model.report().document["notes"][0]


@pytest.mark.slow
def test_measured_steps_are_shown_beside_predicted_ones() -> None:
    model, tokens = trained(accumulate=2)
    source = model.source
    model.profile(steps=2)
    for _ in range(3):
        model.train_step(tokens)
    assert model.source == source
    report = model.report()
    for program in report.document["programs"]:
        measured, last = program["measured"], program["passes"][-1]
        calls = [
            row for row in _rows(last["order"]) if report.document["tables"]["rows"]["phase"][row] in _calls(report)
        ]
        order = _rows(last["order"])
        assert [order[position] for position in measured["position"]] == calls
        assert measured["end_s"] == sorted(measured["end_s"])
        assert len(measured["steps_s"]) == 2
        assert measured["end_s"][-1] == min(measured["steps_s"])
    trace = json.loads(report.to_trace())["traceEvents"]
    named = [event["args"]["name"] for event in trace if event["name"] == "process_name"]
    assert named[2:] == ["every micro-batch but the last, measured", "last micro-batch, measured"]
    assert "the median of 2 steps" in str(model.explain())
    model.profile(steps=1)  # forgets what was measured before
    assert "measured" not in model.report().document["programs"][0]


def _rows(order: list[list[int]]) -> list[int]:
    return [first + i for first, num in order for i in range(num)]


def _calls(report: Report) -> set[int]:
    phases = report.document["tables"]["phases"]
    return {phases.index(phase) for phase in ("forward", "backward", "update") if phase in phases}


@pytest.mark.parametrize(("steps", "says"), [(0, "steps=0 is not a number"), (True, "steps=True"), ("3", "steps='3'")])
def test_a_number_of_steps_to_measure_is_checked(steps: Any, says: str) -> None:
    model: Any = Blocks(1)
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(zgraph.OptionError, match=says):
        model.profile(steps)


def test_there_is_nothing_to_report_before_a_step() -> None:
    model = Blocks(1)
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()))  # type: ignore[assignment]
    with pytest.raises(zgraph.ZgraphError, match="nothing is compiled yet"):
        model.report()  # type: ignore[operator]


def test_names_of_a_model_are_data(tmp_path: Path) -> None:
    report = report_of_program(hostile_program(), Blocks(1), Config(zero=0), hardware=CPU)
    html, data, _ = report.write(tmp_path / "report.html")
    assert f"param:{HOSTILE}" in json.loads(data.read_text())["tables"]["arguments"]
    assert "onerror" not in html.read_text()


# On ranks


def on_a_rank() -> tuple[int, int, list[str], str]:
    model = Blocks(2)
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), bucket_bytes="4KiB")  # type: ignore[assignment]
    model.train_step(torch.zeros(4, 8, dtype=torch.int64))  # type: ignore[operator]
    document = model.report().document  # type: ignore[operator]
    received = sum(each["bytes"] for each in model.stats()["collectives"].values())  # type: ignore[operator]
    last = document["programs"][-1]["passes"][-1]
    return received, last["communicated_bytes"], document["notes"], document["digest"]


def measured_on_a_rank() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    model = Blocks(2)
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), bucket_bytes="4KiB")  # type: ignore[assignment]
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    model.train_step(tokens)  # type: ignore[operator]
    model.train_step(tokens)  # type: ignore[operator]
    model.profile(steps=1)  # type: ignore[operator]
    model.train_step(tokens)  # type: ignore[operator]
    report = model.report()  # type: ignore[operator]
    return report.document, json.loads(report.to_trace())["traceEvents"]


@pytest.mark.slow
def test_measured_lanes_of_ranks_have_the_calls_of_the_predicted_ones_in_their_order(ranks: Any) -> None:
    for document, trace in ranks.run(measured_on_a_rank, world=2):
        (program,) = document["programs"]
        rows, lanes = document["tables"]["rows"], document["tables"]["lanes"]
        order = _rows(program["passes"][-1]["order"])
        ran = [order[position] for position in program["measured"]["position"]]
        predicted = program["events"]["row"]
        assert [row for row in ran if row in set(predicted)] == predicted, "node order is equal"
        shown = {pid: defaultdict(list) for pid in (1, 2)}  # type: ignore[var-annotated]
        for event in trace:
            if event["ph"] == "X":
                shown[event["pid"]][lanes[event["tid"] - 1]].append(event)
        assert set(shown[1]) == set(shown[2]) == {"compute", "data"}
        assert [each["args"]["node"] for each in shown[1]["data"]] == [
            each["args"]["node"] for each in shown[2]["data"]
        ]
        for lane, events in shown[2].items():
            for one, other in pairwise(events):
                assert other["ts"] >= (one["ts"] + one["dur"]) * (1 - 1e-12), lane
        computed = [each["args"]["node"] for each in shown[2]["compute"]]
        assert computed == [f"%{rows['node'][row]}" for row in ran if lanes[rows["lane"][row]] == "compute"]
        whole = max(event["ts"] + event["dur"] for event in trace if event["ph"] == "X" and event["pid"] == 2)
        assert whole == pytest.approx(program["measured"]["end_s"][-1] * 1e6)


@pytest.mark.slow
def test_ranks_report_the_same_step_and_the_bytes_that_they_received(ranks: Any) -> None:
    first, second = ranks.run(on_a_rank, world=2)
    assert first == second
    received, predicted, notes, _ = first
    assert received == predicted > 0
    assert notes == []
