"""``zgraph report``: a page from what ``zgraph plan`` takes or from saved data, and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.reporting import report_of_blocks
from tests.test_plan_command import FIXED, TINY
from zgraph import cli


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    where = ["--world", "4", "--hardware", "h100", "--seq", "16"]
    return ["report", "--hf", str(path), *where, *FIXED, "--output", str(tmp_path / "page.html")]


@pytest.mark.slow
def test_a_plan_is_shown_from_inside(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(asked) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"page.{end}") for end in ("html", "json", "trace.json")]
    assert cli.main(["plan", *asked[1:-2], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    document = json.loads((tmp_path / "page.json").read_text())
    assert document["plan"]["chosen"] == plan["chosen"]
    assert document["plan"]["owners"] == plan["owners"]
    assert document["is_proved"]


@pytest.mark.slow
def test_what_does_not_fit_has_a_page_and_a_status_of_its_own(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*asked, "--memory", "64KiB"]) == 1
    assert "nothing fits; the page says what is in the way" in capsys.readouterr().err
    document = json.loads((tmp_path / "page.json").read_text())
    assert not document["plan"]["fits"]


def test_a_saved_report_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, data, _ = report_of_blocks(num=1).write(tmp_path / "first.html")
    assert cli.main(["report", str(data), "--output", str(tmp_path / "again.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(data.read_text())
    assert (tmp_path / "again.html").read_text() == html.read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "zgraph report needs a model (give a report.json, or --preset, --hf or --model with --world"),
        (["--preset", "gpt2"], 2, "zgraph report needs --world"),
        (["saved.json", "--preset", "gpt2"], 2, "saved.json is a report already, and --preset asks for another"),
        (["saved.json", "--world", "2"], 2, "and --world asks for another"),
        (["saved.json", "--zero", "3"], 2, "and --zero asks for another"),
        (["saved.json", "--hardware", "cpu"], 2, "and --hardware asks for another"),
        (["saved.json", "--devices-per-node", "4"], 2, "and --devices-per-node asks for another"),
        (["saved.json"], 3, "saved.json cannot be read: No such file"),
        (["--preset", "nothing", "--world", "2"], 2, "no model is called 'nothing'"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *arguments]) == status
    printed = capsys.readouterr()
    assert says in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "lost"),
    [
        ("explain", ["would_free"]),
        ("explain", ["tables", "rows"]),
        ("report", ["tables", "rows"]),
        ("report", ["plan"]),
    ],
)
def test_a_saved_report_that_is_damaged_inside_is_refused(
    command: str, lost: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(report_of_blocks(num=1).to_json())
    path, inside = tmp_path / "saved.json", document
    for name in lost[:-1]:
        inside = inside[name]
    inside[lost[-1]] = None
    path.write_text(json.dumps(document))
    output = ["--output", str(tmp_path / "again.html")] if command == "report" else []
    assert cli.main([command, str(path), *output]) == 3
    printed = capsys.readouterr()
    assert f"{path} is damaged: " in printed.err or "this is not a plan" in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out
    assert list(tmp_path.iterdir()) == [path]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "zgraph report --preset llama3-8b --world 8" in printed
    assert "print the report's data as well, as one JSON object" in " ".join(printed.split()), "files are written too"
