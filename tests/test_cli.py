"""The command line: what it says, where, and with which exit status."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import click
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
        ([], "zgraph: Missing command (see zgraph --help)"),
        (["ckpt"], "zgraph ckpt: Missing command (see zgraph ckpt --help)"),
        (["bogus"], "bogus"),
        (["--bogus"], "--bogus"),
        (["demo", "--bogus"], "--bogus"),
        (["demo", "--step", "5"], "--step"),
        (["demo", "--steps", "1"], "zgraph demo: Invalid value for '--steps': 1 is not in the range 2<=x<=10000 (see "),
        (["demo", "--ranks", "0"], "0 is not in the range 1<=x<=64"),
        (["demo", "--zero", "4"], "4 is not in the range 0<=x<=3"),
        (["demo", "--zero", "-1"], "-1 is not in the range 0<=x<=3"),
        (["demo", "--zero", "three"], "'three' is not a valid integer (see"),
        (["demo", "--steps"], "zgraph demo: Option '--steps' requires an argument (see zgraph demo --help)"),
        (["calibrate", "--output", "--json"], "'--output' requires an argument"),
        (["ckpt", "ls"], "zgraph ckpt ls: Missing argument 'FILE' (see zgraph ckpt ls --help)"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "Example: zgraph demo" in capsys.readouterr().out


def test_commands_are_listed_in_their_order_and_no_word_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["demo", "plan", "report", "explain", "bisect", "ckpt", "doctor", "calibrate"]
    assert cli.main(["ckpt", "--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    widths = []
    for columns in ("60", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["demo", "--help"]) == 0
        widths.append(max(map(len, capsys.readouterr().out.splitlines())))
    assert 50 < widths[0] <= 60 < 140 < widths[1] <= 160


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["zgraph", "ex"], "explain"),
        (["zgraph", "plan", "--preset", "gpt2", "--mem"], "--memory"),
        (["zgraph", "plan", "--precision", "b"], "bf16"),
    ],
)
def test_a_shell_completes_what_was_begun(
    words: list[str], offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ZGRAPH_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert cli.main() == 0
    assert capsys.readouterr().out == f"plain,{offered}\n"


def contexts(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Of a command, its commands and their parts."""
    context = click.Context(command, info_name=command.name, parent=parent)
    yield context
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        yield from contexts(each, context)


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the commands that would have run, as a command line is understood; none does."""
    names = []

    def run(**_: object) -> bool:
        names.append(click.get_current_context().command_path)
        return True

    for each in contexts(cli.command):
        if not isinstance(each.command, click.Group):
            monkeypatch.setattr(each.command, "callback", run)
    return names


def test_every_command_has_an_example_that_is_understood_and_prints_json(understood: list[str]) -> None:
    found = list(contexts(cli.command))
    assert {"zgraph demo", "zgraph plan", "zgraph ckpt verify"} <= {each.command_path for each in found}
    for each in found:
        name, told = each.command_path, each.command.epilog or ""
        examples = re.findall(rf"(?:Example: |^  )({name}\b.*?)(?:\. |$)", told, re.MULTILINE)
        assert examples, name
        for example in examples:
            assert cli.main(shlex.split(example)[1:]) == 0, example
            assert understood[-1].startswith(name)
        assert isinstance(each.command, click.Group) or "--json" in each.get_help(), name


def test_every_command_of_the_documents_is_understood(understood: list[str]) -> None:
    root = Path(__file__).parent.parent
    for path in (root / "README.md", *(root / "docs").glob("*.md")):
        for block in re.findall(r"^```\n(zgraph .*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.findall(r"^zgraph [a-z].*", block, re.MULTILINE):
                assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line
    assert len(set(understood)) > 6


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
    assert cli.main(["--version"]) == 0
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
    assert cli.main(["--help"]) == 0
    assert "130 it was interrupted" in " ".join(capsys.readouterr().out.split())
