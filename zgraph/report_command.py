"""``zgraph report`` and ``zgraph explain``: of a step that need not be run, or of a report that was saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from zgraph.command_line import PATH, Command, is_given, json_option
from zgraph.decision import decide
from zgraph.errors import OptionError, StateError, first_line
from zgraph.explain import explain
from zgraph.plan_command import options_of_a_plan, search_for
from zgraph.planner import report_of
from zgraph.report import Report, files_of
from zgraph.search import Search

EXAMPLES = """\b
Examples:
  zgraph report --preset llama3-8b --world 8 --hardware h100 --batch 1 --seq 8192 --precision bf16
  zgraph report --model train:build_model --world 2 --batch 8 --seq 512 --output step.html
  zgraph report report.json --output again.html"""

EXPLAIN_EXAMPLES = """\b
Examples:
  zgraph explain --preset llama3-70b --world 16 --hardware h100 --batch 1 --seq 8192 --precision bf16
  zgraph explain report.json"""

_saved = click.argument("saved", type=PATH, required=False, metavar="[REPORT.json]")


@click.command(
    "report",
    cls=Command,
    short_help="see inside: what each pass does, what it costs, what is held when, and why",
    epilog=EXAMPLES,
)
@_saved
@options_of_a_plan
@click.option("--output", type=PATH, default="report.html", metavar="FILE.html", help="the page")
@json_option("the report's data as well,")
def report_command(saved: Path | None, output: Path, *, as_json: bool, **asked: Any) -> bool:
    """Write a page that shows a training step from inside, of the options that `zgraph plan` chooses or of REPORT.json,
    which a report was saved as.

    Exits with status 1 if nothing fits.
    """
    files_of(output)
    with _whole(saved):
        report, _ = _made(saved, asked)
        fits = report.plan.fits
        written = report.write(output)
    click.echo(report.to_json() if as_json else "\n".join(map(str, written)))
    if not fits:
        click.echo("zgraph report: nothing fits; the page says what is in the way, and the ways out", err=True)
    return fits


@click.command(
    "explain", cls=Command, short_help="why does it take so long, or so much memory?", epilog=EXPLAIN_EXAMPLES
)
@_saved
@options_of_a_plan
@json_option("sentences by question")
def explain_command(saved: Path | None, *, as_json: bool, **asked: Any) -> bool:
    """Say in sentences why a training step takes what it takes, what limits it and what would help: of the options that
    `zgraph plan` chooses, or of REPORT.json, which a report was saved as.

    Exits with status 1 if nothing fits.
    """
    with _whole(saved):
        report, search = _made(saved, asked)
        told, fits = explain(report, search), report.plan.fits
    click.echo(json.dumps(told.as_dict()) if as_json else told)
    return fits


@contextmanager
def _whole(saved: Path | None) -> Iterator[None]:
    """Say that a saved report is damaged where something inside of it is missing, or of another type."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if saved is None:
            raise
        what = f"{saved} is damaged: {type(error).__name__}: {first_line(error)}"
        raise StateError(what, fix="make it anew with model.report() or `zgraph report`") from error


def _made(saved: Path | None, asked: dict[str, Any]) -> tuple[Report, Search | None]:
    """The report, and the search that has found its plan."""
    if saved is None:
        search, budget = search_for(**asked)
        return report_of(search, decide(search, budget)), search
    for name in filter(is_given, asked):
        what = f"{saved} is a report already, and --{name.replace('_', '-')} asks for another"
        raise OptionError(what, fix="leave one of them out")
    return Report.read(saved), None
