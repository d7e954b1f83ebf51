"""An explanation answers with the numbers of the report, and what it suggests makes a step fit."""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import zgraph
from tests.reporting import CPU, H100, Blocks, report_of_blocks
from tests.test_plan_command import FIXED, TINY
from zgraph import cli
from zgraph.decision import decide
from zgraph.explain import explain
from zgraph.hardware import Hardware
from zgraph.planner import open_search, report_of
from zgraph.plans import show_bytes, show_s
from zgraph.report import Report


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of_blocks(accumulate=2, num=1)


def sentences(report: Report) -> dict[str, list[str]]:
    return explain(report).as_dict()


def test_every_question_is_answered_with_numbers(report: Report) -> None:
    told = sentences(report)
    assert list(told) == [
        "Does it fit?", "What takes the memory?", "What limits the step?", "What do ranks wait for?",
        "Why these options?", "What would help?",
    ]  # fmt: skip
    plan = report.plan
    assert told["Does it fit?"][0].startswith(f"Yes: {plan.verdict}.")
    assert f" it takes {show_bytes(plan.chosen.reserved_bytes)} of the 1 GiB that each of 4 x " in plan.verdict
    assert show_bytes(plan.chosen.peak_bytes) in told["What takes the memory?"][0]
    assert told["What limits the step?"][0].startswith(f"A step takes {show_s(plan.chosen.step_s)}: ")
    assert "zero=3: given" in told["Why these options?"][0]


def test_the_parts_of_a_step_add_up_to_it(report: Report) -> None:
    (whole,) = re.findall(r"A step takes [^:]*: (.*)\.", sentences(report)["What limits the step?"][0])
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", whole)]
    assert sum(shares) == pytest.approx(100, abs=3)


def test_what_is_waited_for_adds_up_to_what_is_exposed(report: Report) -> None:
    waits = Counter[str]()
    for line in sentences(report)["What do ranks wait for?"][1:]:
        for number, unit, what in re.findall(r"Computing waits ([\d.]+) (m?s) for (.*)\.", line):
            waits[what] = float(number) * (1e-3 if unit == "ms" else 1)
    assert waits.total() == pytest.approx(report.plan.chosen.exposed_s, rel=0.02)


@pytest.mark.parametrize(
    ("hardware", "why"),
    [
        (H100, "It starts no earlier as {before} before it keeps the same link until then."),
        (CPU, "It starts as soon as what it sends has been computed."),
    ],
    ids=["gpu", "cpu"],
)
def test_the_longest_wait_comes_with_why_it_begins_no_earlier(hardware: Hardware, why: str) -> None:
    report = report_of_blocks(hardware=hardware, num=2, width=256)
    tables, (program,) = report.document["tables"], report.document["programs"]
    events = [dict(zip(program["events"], each, strict=True)) for each in zip(*program["events"].values(), strict=True)]
    operator = [tables["operators"][row] for row in tables["rows"]["operator"]]
    longest = max(e["end_s"] - e["start_s"] for e in events if operator[e["row"]] == tables["wait"])
    *_, what, reason = sentences(report)["What do ranks wait for?"]
    assert what.startswith(f"The longest wait is {show_s(longest)} for ")
    begins = re.findall(r"runs from ([\d.]+ \S+) to", what)[0]
    on_link = [e for e in events if tables["lanes"][e["lane"]] == "data"]
    before = [operator[e["row"]].split(".")[-2] for e in on_link if show_s(e["end_s"]) == begins]
    assert reason.startswith(why.partition("{before}")[0])
    assert (hardware is CPU) or any(name in reason for name in before)


def test_who_waits_for_nobody_is_told_so() -> None:
    told = sentences(report_of_blocks(world=1, hardware=CPU, num=1))
    assert "What do ranks wait for?" not in told


def test_a_disk_that_the_last_micro_batch_alone_uses_is_what_limits_the_step() -> None:
    report = report_of_blocks(world=2, hardware=CPU, num=2, accumulate=2, offload={"optimizer": "disk"})
    earlier, last = report.document["programs"]
    assert earlier["if_faster"].keys() == last["if_faster"].keys()
    assert earlier["if_faster"]["the disk"] == earlier["passes"][-1]["step_s"]
    faster = {what: earlier["if_faster"][what] + last["if_faster"][what] for what in last["if_faster"]}
    assert min(faster, key=lambda what: faster[what]) == "the disk"
    told = sentences(report)["What limits the step?"]
    assert "The disk limits it most." in told
    assert "waiting for links or the disk (" in told[0]


def test_one_rank_is_told_what_it_waits_for_of_a_disk() -> None:
    told = sentences(report_of_blocks(world=1, hardware=CPU, num=2, offload={"optimizer": "disk"}))
    first, *_ = told["What do ranks wait for?"]
    assert first.startswith("Computing waits ")
    assert "x load in update" in first


def test_what_limits_a_step_is_what_makes_it_fastest(report: Report) -> None:
    faster: Counter[str] = Counter()
    for program in report.document["programs"]:
        for what, seconds in program["if_faster"].items():
            faster[what] += seconds * program["repeats"]
    best = min(faster, key=lambda what: faster[what])
    words = {"computing": "computing limits it", "links": "links between ranks limit it", "the host": "host, which"}
    assert any(words[best] in line for line in sentences(report)["What limits the step?"])


def test_a_saved_report_is_explained(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report.write(tmp_path / "report.html")[1]
    assert cli.main(["explain", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{explain(report)}\n"
    assert printed.startswith("Does it fit?\n  Yes: ")
    assert cli.main(["explain", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sentences(report)


@pytest.mark.slow
def test_a_plan_is_explained_with_what_more_would_buy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    where = ["--world", "4", "--hardware", "h100", "--seq", "16"]
    assert cli.main(["explain", "--hf", str(path), *where, *FIXED, "--memory", "64KiB", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["Does it fit?"][0].startswith("No: ")
    assert any(line.startswith("memory=") for line in told["What would help?"])
    assert cli.main(["explain", "--hf", str(path), *where, *FIXED, "--json"]) == 0
    more = json.loads(capsys.readouterr().out)["What would more of it buy?"]
    assert more[0] == "More memory would not make it faster." or more[0].startswith("With ")
    assert more[1].startswith("With 5 ranks, one more device, each with the same batch: ")
    assert more[2].startswith("With 8 ranks, twice as many, each with the same batch: ")


@pytest.mark.slow
def test_an_error_and_an_explanation_say_the_same() -> None:
    fixed = {"zero": 3, "recompute": None, "accumulate": 1, "bucket_bytes": "64MiB", "in_flight": 0, "unshard": 0.0}
    batch = (torch.zeros(64, 512, dtype=torch.int64),)
    made = {"batch": batch, "world_size": 2, "hardware": "rtx4090", "memory": "512MiB", **fixed}
    search, budget = open_search(lambda: Blocks(2, 1024), torch.optim.AdamW, **made)
    plan = decide(search, budget)
    told, error = explain(report_of(search, plan)).as_dict(), str(plan.refusal())
    assert told["Does it fit?"] == [f"No: {plan.verdict}."]
    assert plan.verdict in error
    largest = told["What takes the memory?"][1]
    assert f"\n  {largest}\n" in error
    assert plan.ways_out
    for way in plan.ways_out:
        assert str(way) in told["What would help?"]
        assert str(way) in error


@pytest.mark.slow
def test_a_compiled_model_explains_its_step() -> None:
    model: Any = Blocks(1)
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()))
    model.train_step(torch.zeros(2, 8, dtype=torch.int64))
    told = model.explain()
    assert told.as_dict() == explain(model.report()).as_dict()
    assert f"A step takes {show_s(model.plan.chosen.step_s)}" in str(told)
    assert "zero=3: given, the defaults, or the first that fit" in str(told), "the stage is told in any case"


def bad_plan(seed: int) -> dict[str, Any]:
    """Arguments of a plan that may not fit: too large a model, too large a batch, or too small a budget."""
    draw = random.Random(seed)
    width, num, rows = draw.choice([2048, 8192, 12288]), draw.choice([2, 3]), draw.choice([2, 64, 1024])
    return {
        "model": lambda: Blocks(num, width),
        "optimizer": draw.choice([torch.optim.AdamW, torch.optim.SGD]),
        "batch": (torch.zeros(rows, draw.choice([16, 512]), dtype=torch.int64),),
        "world_size": draw.choice([1, 2, 8]),
        "hardware": draw.choice(["h100", "rtx4090"]),
        "memory": draw.choice([None, None, "2GiB"]),
        "zero": 3,
        "recompute": None,
        "accumulate": 1,
        "bucket_bytes": "64MiB",
        "in_flight": 0,
        "unshard": 0.0,
    }


def applied(asked: dict[str, Any], change: str) -> dict[str, Any]:
    """The same with a suggestion taken."""
    if rows := re.match(r"(\d+) of \d+ rows in a batch(, )?", change):
        asked, change = {**asked, "batch": (asked["batch"][0][: int(rows[1])],)}, change[rows.end() :]
    call = ast.parse(f"f({re.split(', of |, for ', change)[0]})", mode="eval").body
    assert isinstance(call, ast.Call)
    values = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    if "hardware" in values:
        asked = {**asked, "memory": None}
    return {**asked, **values}


@pytest.mark.slow
def test_where_no_single_change_helps_it_comes_with_the_memory_that_it_needs() -> None:
    batch = (torch.zeros(64, 512, dtype=torch.int64),)
    fixed = {"zero": 3, "recompute": None, "accumulate": 1, "bucket_bytes": "64MiB", "in_flight": 0, "unshard": 0.0}
    asked = {
        "model": lambda: Blocks(3, 12288),
        "optimizer": torch.optim.AdamW,
        "batch": batch,
        "world_size": 8,
        **fixed,
    }
    asked |= {"hardware": "rtx4090", "memory": "2GiB"}
    plan = zgraph.plan(**asked)
    assert plan.chosen.reserved_bytes > 22.56 * 2**30  # more than there is, whatever the budget
    assert plan.ways_out
    for way in plan.ways_out:
        assert ", memory=" in way.change
        assert zgraph.plan(**applied(asked, way.change)).fits


@pytest.mark.nightly
def test_the_first_suggestion_makes_a_bad_plan_fit() -> None:
    found: list[tuple[str, bool]] = []
    for seed in itertools.count():
        asked = bad_plan(seed)
        plan = zgraph.plan(**asked)
        if not plan.fits:
            change = plan.ways_out[0].change if plan.ways_out else ""
            found.append((change, bool(change) and zgraph.plan(**applied(asked, change)).fits))
        if len(found) == 20:
            break
    assert sum(fits for _, fits in found) >= 18, found
    assert len({change.partition("=")[0] for change, _ in found}) > 2, "they are not all alike"
