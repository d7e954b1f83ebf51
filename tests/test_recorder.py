"""What is recorded of each pass is the program that it left, node by node, and what that costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples, one_layer, two_layers
from tests.recipes import Recipe, build, recipes
from tests.reporting import CPU, H100, report_of_blocks
from zgraph.config import Config
from zgraph.footprint import footprint
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Program
from zgraph.report.recorder import CAPTURE, Recorder, _moved
from zgraph.report.runs import runs
from zgraph.timeline import play


def expanded(found: list[list[int]]) -> list[int]:
    return [first + i for first, num in found for i in range(num)]


def text_of(tables: dict[str, Any], order: list[int]) -> str:
    """A program's text, put together from rows alone."""
    rows = tables["rows"]
    place = {rows["node"][row]: f"%{i}" for i, row in enumerate(order)}
    lines = []
    for i, row in enumerate(order):
        pieces = tables["arguments"][rows["arguments"][row]].split("%")
        names = [place[node] for node in rows["inputs"][row]]
        arguments = pieces[0] + "".join(name + piece for name, piece in zip(names, pieces[1:], strict=True))
        operator = rows["operator"][row]
        called = tables["bodies"][operator] or tables["operators"][operator]
        form = tables["forms"][rows["form"][row]]
        phase = tables["phases"][rows["phase"][row]]
        if phase == "input":
            lines.append(f"%{i}: {form} = input {arguments}")
        elif phase == "result":
            lines.append(f"return [{arguments}]")
        else:
            lines.append(f"%{i}: {form} = {called}({arguments})")
    return "\n".join(lines)


class Both:
    """Watches like a recorder, and keeps what it was shown."""

    def __init__(self) -> None:
        self.recorder, self.shown = Recorder(H100), list[Program]()

    def __call__(self, p: Pass | None, program: Program) -> None:
        self.recorder(p, program)
        self.shown.append(program.clone())


def plain(text: str) -> str:
    """A program's text with its results named as rows name them."""
    *lines, last = text.splitlines()
    results, _, names = last.removeprefix("return [").partition("]  # ")
    named = [f"{name}={result}" for name, result in zip(names.split(", "), results.split(", "), strict=True)]
    return "\n".join([*lines, f"return [{', '.join(named)}]"])


@given(recipes(), st.sampled_from([1, 2, 3]), st.sampled_from([0, 2, 3]))
@few_examples(8)
def test_rows_are_the_text_of_the_program_after_each_pass(recipe: Recipe, world: int, zero: int) -> None:
    passes = default_passes(Config(zero=zero, bucket_bytes=64), Mesh(world), hardware=H100)
    both = Both()
    run(passes, build(recipe), watch=both)
    (recorded,) = both.recorder.programs
    tables = both.recorder.tables()
    assert [each["name"] for each in recorded["passes"]] == [CAPTURE, *(p.name for p in passes)]
    for each, program in zip(recorded["passes"], both.shown, strict=True):
        order = expanded(each["order"])
        assert each["num_nodes"] == len(order) == program.num_nodes()
        assert text_of(tables, order) == plain(program.text())
        made = [node.meta["origin"].made_by for node in program.graph.nodes if "origin" in node.meta]
        rows = tables["rows"]
        recorded_makers = [tables["makers"][rows["made_by"][row]] for row in order if _is_call(tables, row)]
        assert recorded_makers == made


def _is_call(tables: dict[str, Any], row: int) -> bool:
    return tables["phases"][tables["rows"]["phase"][row]] not in ("input", "result")


def test_who_watches_changes_nothing() -> None:
    passes = default_passes(Config(bucket_bytes=64), Mesh(2), hardware=H100)
    watched = run(passes, two_layers(), watch=Recorder(H100))
    assert watched.program.digest() == run(passes, two_layers()).program.digest()


def test_one_pass_is_told_from_the_next() -> None:
    recorder = Recorder(H100)
    run(default_passes(Config(zero=1), Mesh(2), hardware=H100), one_layer(), watch=recorder)
    (recorded,) = recorder.programs
    told = {each["name"]: (each["stage"], each["num_added"], each["num_removed"]) for each in recorded["passes"]}
    assert told["capture"] == ("CAPTURED", 0, 0)
    assert told["FormBuckets"][0] == "BUCKETED"
    assert told["FormBuckets"][1] > 0
    assert told["UpdateInPlace"][0] == "INPLACE"
    tables = recorder.tables()
    rows = tables["rows"]
    inputs = {
        tables["arguments"][rows["arguments"][row]]: tables["makers"][rows["made_by"][row]]
        for row in expanded(recorded["passes"][-1]["order"])
        if tables["phases"][rows["phase"][row]] == "input"
    }
    assert inputs["param:bucket0"] == "FormBuckets"
    assert inputs["batch:0"] == CAPTURE
    about = {each["name"]: each["about"] for each in recorded["passes"]}
    assert "->" in about["FormBuckets"]  # the picture in its docstring


@given(recipes(), st.sampled_from([2, 3]))
@few_examples(10)
def test_changes_are_those_between_the_orders(recipe: Recipe, world: int) -> None:
    recorder = Recorder(H100)
    run(default_passes(Config(bucket_bytes=64), Mesh(world), hardware=H100), build(recipe), watch=recorder)
    node = recorder.tables()["rows"]["node"]
    passes = recorder.programs[0]["passes"]
    for before, after in pairwise(passes):
        was = {node[row]: row for row in expanded(before["order"])}
        now = {node[row]: row for row in expanded(after["order"])}
        assert after["num_added"] == len(now.keys() - was.keys())
        assert after["num_removed"] == len(was.keys() - now.keys())
        assert after["num_altered"] == sum(was[each] != now[each] for each in was.keys() & now.keys())
        stay = now.keys() & was.keys() - set(expanded(after["moved"]))
        assert [each for each in was if each in stay] == [each for each in now if each in stay]
        assert after["num_moved"] == len(expanded(after["moved"]))


def test_costs_are_the_timelines_and_the_footprints() -> None:
    both = Both()
    run(default_passes(Config(bucket_bytes=64), Mesh(2), hardware=H100), two_layers(), watch=both)
    recorded = both.recorder.programs[0]
    for each, program in zip(recorded["passes"], both.shown, strict=True):
        timeline, held = play(program, H100), footprint(program, staged=False)
        assert (each["step_s"], each["exposed_s"], each["busy_s"]) == (
            timeline.step_s, timeline.exposed_s, timeline.busy_s,
        )  # fmt: skip
        assert each["peak_bytes"] == held.peak_bytes
        memory = each["memory"]
        total = [sum(at) for at in zip(*memory["bytes"].values(), strict=True)]
        assert max(total) == held.peak_bytes
        assert memory["seconds"] == sorted(memory["seconds"])
    events = recorded["events"]
    assert events["start_s"] == [event.start_s for event in timeline.events]
    assert events["end_s"] == [event.end_s for event in timeline.events]


def test_an_arena_is_part_of_the_memory_over_time() -> None:
    document = report_of_blocks(hardware=CPU, width=128, num=2).document
    (program,) = document["programs"]
    last = program["passes"][-1]
    total = [sum(at) for at in zip(*last["memory"]["bytes"].values(), strict=True)]
    assert "arena, not in use" in last["memory"]["bytes"]
    assert max(total) == last["peak_bytes"] == document["plan"]["chosen"]["peak_bytes"]


@given(st.permutations(list(range(12))))
@few_examples(200)
def test_the_fewest_nodes_are_said_to_have_moved(order: list[int]) -> None:
    moved = _moved(list(range(12)), order)
    stay = [each for each in order if each not in moved]
    assert stay == sorted(stay)
    longest = [1] * 12
    for i, each in enumerate(order):
        longest[i] = 1 + max((longest[j] for j in range(i) if order[j] < each), default=0)
    assert len(stay) == max(longest)


@given(st.lists(st.integers(0, 20)))
@few_examples(100)
def test_runs_are_the_numbers(numbers: list[int]) -> None:
    assert expanded(runs(numbers)) == numbers
    assert len(runs(list(range(1000)))) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_program_of_a_step_is_there(accumulate: int) -> None:
    document = report_of_blocks(accumulate=accumulate, num=1).document
    names = {1: ["step"], 2: ["every micro-batch but the last", "last micro-batch"]}
    assert [program["name"] for program in document["programs"]] == names[accumulate]
    step_s = sum(program["repeats"] * program["passes"][-1]["step_s"] for program in document["programs"])
    assert step_s == pytest.approx(document["plan"]["chosen"]["step_s"], rel=1e-12)
