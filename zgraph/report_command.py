"""``zgraph report`` and ``zgraph explain``: of a step that need not be run, or of a report that was saved."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zgraph import plan_command
from zgraph.decision import decide
from zgraph.errors import OptionError, StateError, first_line
from zgraph.explain import explain
from zgraph.planner import open_search, report_of
from zgraph.report import Report, files_of
from zgraph.search import Search

EXAMPLES = """examples:
  zgraph report --preset llama3-8b --world 8 --hardware h100 --batch 1 --seq 8192 --precision bf16
  zgraph report --model train:build_model --world 2 --batch 8 --seq 512 --output step.html
  zgraph report report.json --output again.html"""

EXPLAIN_EXAMPLES = """examples:
  zgraph explain --preset llama3-70b --world 16 --hardware h100 --batch 1 --seq 8192 --precision bf16
  zgraph explain report.json"""

_MODELS = ("preset", "hf", "model")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of ``zgraph plan``, or a file."""
    command.add_argument("saved", nargs="?", type=Path, metavar="REPORT.json", help="what a report was saved as")
    plan_command.add_arguments(command, required=False)


def add_report_arguments(command: argparse.ArgumentParser) -> None:
    """Declare those of ``zgraph report``."""
    add_arguments(command)
    command.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE.html", help="default: %(default)s"
    )
    command.add_argument("--json", action="store_true", help="print the report's data as well, as one JSON object")


def run(arguments: argparse.Namespace) -> bool:
    """Write the page and its data; whether the step fits.

    Raises:
        OptionError: neither a saved report nor a model to plan for is given, or both are.
        StateError: a file cannot be read or written.
        ZgraphError: see ``zgraph.plan``.
    """
    files_of(arguments.output)
    with _whole(arguments.saved):
        report, _ = _made("report", arguments)
        fits = report.plan.fits
        written = report.write(arguments.output)
    if arguments.json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))
    if not fits:
        sys.stderr.write("zgraph report: nothing fits; the page says what is in the way, and the ways out\n")
    return fits


def run_explain(arguments: argparse.Namespace) -> bool:
    """Print why a step takes what it takes; whether it fits. Raises as ``run`` does."""
    with _whole(arguments.saved):
        report, search = _made("explain", arguments)
        told, fits = explain(report, search), report.plan.fits
    sys.stdout.write((json.dumps(told.as_dict()) if arguments.json else str(told)) + "\n")
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


def _made(command: str, arguments: argparse.Namespace) -> tuple[Report, Search | None]:
    """The report, and the search that has found its plan."""
    given = [name for name in _MODELS if getattr(arguments, name) is not None]
    if arguments.saved is not None:
        others = _planned(arguments)
        if others:
            raise OptionError(
                f"{arguments.saved} is a report already, and --{others[0]} asks for another",
                fix="leave one of them out",
            )
        return Report.read(arguments.saved), None
    if not given or arguments.world is None:
        missing = "--world" if given else "a model"
        raise OptionError(
            f"zgraph {command} needs {missing}",
            fix="give a report.json, or --preset, --hf or --model with --world, as zgraph plan takes them",
        )
    search, budget = open_search(**plan_command.asked(arguments), tell=plan_command.Telling())
    return report_of(search, decide(search, budget)), search


def _planned(arguments: argparse.Namespace) -> list[str]:
    """Which arguments of ``zgraph plan`` are given another value than they have by themselves."""
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser, required=False)
    defaults = vars(parser.parse_args([]))
    return [name.replace("_", "-") for name, value in defaults.items() if getattr(arguments, name) != value]
