"""The command line: what it says, where, and with which exit status."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from zgraph import cli, demo
from zgraph.errors import RankError


def make_report(our_losses: list[float]) -> demo.Report:
    """A report of two steps, in which plain PyTorch's losses are 2 and 1."""
    ours = demo.Run(1, our_losses, [9.0, 0.5], 50, 100, {"all_gather": {"count": 3, "bytes": 4000}})
    plain = demo.Run(2, [2.0, 1.0], [1.0, 0.25], 100, 200)
    return demo.Report(demo.Options(steps=2), 25, 1000, 64, zgraph=ours, plain=plain)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[demo.Report | BaseException], None]:
    """Make ``zgraph demo`` end with a given report or error."""

    def end_with(outcome: demo.Report | BaseException) -> None:
        def launch(_options: demo.Options) -> demo.Report:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(demo, "launch", launch)

    return end_with


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["bogus"], "bogus"),
        (["demo", "--bogus"], "--bogus"),
        (["demo", "--step", "5"], "--step"),
        (["demo", "--steps", "1"], "'1' is not an integer from 2 to 10000"),
        (["demo", "--ranks", "0"], "'0' is not an integer from 1 to 64"),
        (["demo", "--zero", "4"], "'4' is not an integer from 0 to 3"),
        (["demo", "--zero", "three"], "'three' is not an integer"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "Example: zgraph demo" in capsys.readouterr().out


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser, and those of its commands and of their parts."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from commands(each)


def test_every_command_has_an_example_that_is_understood_and_prints_json() -> None:
    parser = cli._make_parser()
    found = list(commands(parser))
    assert {"zgraph demo", "zgraph plan", "zgraph ckpt verify"} <= {each.prog for each in found}
    for each in found:
        examples = re.findall(rf"(?:Example: |^  )({each.prog}\b.*?)(?:\. |$)", each.epilog or "", re.MULTILINE)
        assert examples, each.prog
        for example in examples:
            parser.parse_args(shlex.split(example)[1:])
        has_parts = any(isinstance(action, argparse._SubParsersAction) for action in each._actions)
        assert has_parts or "--json" in each.format_help(), each.prog


def test_every_command_of_the_documents_is_understood() -> None:
    root, parser, found = Path(__file__).parent.parent, cli._make_parser(), set()
    for path in (root / "README.md", *(root / "docs").glob("*.md")):
        for block in re.findall(r"^```\n(zgraph .*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.findall(r"^zgraph [a-z].*", block, re.MULTILINE):
                found.add(parser.parse_args(shlex.split(line, comments=True)[1:]).run)
    assert len(found) > 6


def test_a_mistake_of_zgraphs_is_no_check_that_failed(
    launch: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launch(ZeroDivisionError("in zgraph"))
    assert cli.main(["demo"]) == 3
    assert "ZeroDivisionError: in zgraph" in capsys.readouterr().err


@pytest.mark.slow
def test_who_stops_reading_is_told_nothing_more() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "from zgraph import cli; raise SystemExit(cli.main(['doctor', '--json']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 141
    assert "BrokenPipe" not in said


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"zgraph {version('zgraph-compiler')}\n"


def test_the_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="zgraph")
    assert script.load() is cli.main


def test_demo_prints_a_table_and_succeeds(launch: Callable[[object], None], capsys: pytest.CaptureFixture[str]) -> None:
    launch(make_report([2.0, 1.00001]))
    assert cli.main(["demo"]) == 0
    printed = capsys.readouterr()
    for part in ("loss, step 2", "1.000010", "1.0e-05 ok", "x 0.50", "3 of 4.0 kB", "x 2.00"):
        assert part in printed.out
    assert not printed.err


def test_demo_prints_json(launch: Callable[[object], None], capsys: pytest.CaptureFixture[str]) -> None:
    launch(make_report([2.0, 1.0]))
    assert cli.main(["demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"] is True
    assert report["differences"] == [0.0, 0.0]
    assert report["zgraph"]["param_bytes"] == 50
    assert report["plain"]["losses"] == [2.0, 1.0]


@pytest.mark.parametrize("loss", [1.001, 0.999, math.nan, math.inf])
def test_demo_fails_when_losses_part(
    loss: float, launch: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launch(make_report([2.0, loss]))
    assert cli.main(["demo"]) == 1
    printed = capsys.readouterr()
    assert "TOO LARGE" in printed.out
    assert "the losses part by" in printed.err
    assert "bound 1e-04" in printed.err


def test_an_error_is_told_with_its_own_status(
    launch: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launch(RankError("rank 1 of 2 failed: out of memory", fix="use more ranks"))
    assert cli.main(["demo"]) == 3
    printed = capsys.readouterr()
    assert printed.err == "zgraph: rank 1 of 2 failed: out of memory\n  fix: use more ranks\n"
    assert not printed.out


def test_an_interrupt_is_not_a_failure(launch: Callable[[object], None], capsys: pytest.CaptureFixture[str]) -> None:
    launch(KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "zgraph: interrupted\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "130 it was interrupted" in " ".join(capsys.readouterr().out.split())
