"""The ``zgraph`` command: one subcommand per question, each with an example in its help.

What a command found goes to standard output, as a table or with ``--json`` as data; progress and errors go to standard
error. Scripts can rely on the exit status: 0 all is well, 1 a check failed, 2 bad arguments, 3 it could not run. As
with other commands, it is 130 after an interrupt, and 141 where whoever read what is printed has gone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException

from zgraph import bisect_command, calibrate, calibration, ckpt_command, demo, doctor, plan_command, report_command
from zgraph.disk import DEFAULT_PATH
from zgraph.errors import OptionError, ZgraphError

OK, CHECK_FAILED, BAD_ARGUMENTS, COULD_NOT_RUN, INTERRUPTED, NOT_READ = 0, 1, 2, 3, 130, 141


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, without the usage in front of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -5GiB is no option, but a value that is refused

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENTS, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse


def _demo(arguments: argparse.Namespace) -> int:
    report = demo.launch(demo.Options(arguments.steps, arguments.ranks, arguments.zero))
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        Console().print(demo.render(report))
    if not report.agrees:
        largest = max(report.differences)
        print(f"zgraph demo: the losses part by {largest:.1e}, bound {report.bound:.0e}", file=sys.stderr)
    return OK if report.agrees else CHECK_FAILED


def _plan(arguments: argparse.Namespace) -> int:
    return OK if plan_command.run(arguments) else CHECK_FAILED


def _report(arguments: argparse.Namespace) -> int:
    return OK if report_command.run(arguments) else CHECK_FAILED


def _explain(arguments: argparse.Namespace) -> int:
    return OK if report_command.run_explain(arguments) else CHECK_FAILED


def _bisect(arguments: argparse.Namespace) -> int:
    return OK if bisect_command.run(arguments) else CHECK_FAILED


def _ckpt(arguments: argparse.Namespace) -> int:
    return OK if ckpt_command.run(arguments) else CHECK_FAILED


def _doctor(arguments: argparse.Namespace) -> int:
    found = doctor.examine(arguments.directory)
    print(json.dumps(found.as_dict()) if arguments.json else found)
    return OK if found.works else CHECK_FAILED


def _calibrate(arguments: argparse.Namespace) -> int:
    path: Path = arguments.output or calibration.default_path()
    calibration.check_writable(path)
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"other programs keep {busy:.1f} core(s) busy: times will be too long", file=sys.stderr)
    about = max(arguments.budget, calibrate.LEAST_S)
    print(f"measuring for about {about} s, longer where cores are busy; it will be saved to {path}", file=sys.stderr)
    found = calibrate.measure(calibrate.Options(arguments.ranks, arguments.budget, arguments.directory))
    found.save(path)
    if arguments.json:
        print(json.dumps(found.as_dict()))
    else:
        Console().print(calibrate.render(found))
    print(f"measured in {found.seconds:.0f} s; saved to {path}", file=sys.stderr)
    return OK


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], **words: str) -> Any:
    """A parser for a command, which ``run`` then is given what was parsed for; with argparse's words about it."""
    is_laid_out = "\n" in words["epilog"]  # several examples, each in a line of its own
    formatter = argparse.RawDescriptionHelpFormatter if is_laid_out else argparse.HelpFormatter
    command = commands.add_parser(name, allow_abbrev=False, formatter_class=formatter, **words)
    command.set_defaults(run=run)
    return command


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zgraph",
        description="Train models that do not fit, by compiling the whole training step as one graph.",
        epilog="Example: zgraph demo --steps 5. Exit status: 0 all is well, 1 a check failed, 2 bad arguments, 3 it "
        "could not run, 130 it was interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"zgraph {version('zgraph-compiler')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _add_command(
        commands,
        "demo",
        _demo,
        help="train a GPT with zgraph and with plain PyTorch, and compare",
        description="Train a byte-level GPT of 10M parameters on the text of Python's standard library, with zgraph on "
        "several ranks and with plain PyTorch in one process, and compare losses, memory, communication and time. "
        f"Exits with status {CHECK_FAILED} if a loss differs by more than {demo.BOUND:.0e}, relative.",
        epilog="Example: zgraph demo --ranks 2 --zero 1 --steps 5",
    )
    defaults = demo.Options()
    command.add_argument("--steps", type=_integer(2, 10_000), default=defaults.steps, help="default: %(default)s")
    command.add_argument("--ranks", type=_integer(1, 64), default=defaults.ranks, help="default: %(default)s")
    command.add_argument("--zero", type=_integer(0, 3), default=defaults.zero, help="ZeRO stage; default: %(default)s")
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")

    command = _add_command(
        commands,
        "plan",
        _plan,
        help="will it fit, and how fast will it be?",
        description="Predict memory and time of a training step on machines that need not be there, and choose options."
        f"\nExits with status {CHECK_FAILED} if nothing fits.",
        epilog=plan_command.EXAMPLES,
    )
    plan_command.add_arguments(command)
    command.add_argument("--json", action="store_true", help="print the plan as one JSON object")

    command = _add_command(
        commands,
        "report",
        _report,
        help="see inside: what each pass does, what it costs, what is held when, and why",
        description="Write a page that shows a training step from inside, of the options that `zgraph plan` chooses or "
        f"of a saved report.json.\nExits with status {CHECK_FAILED} if nothing fits.",
        epilog=report_command.EXAMPLES,
    )
    report_command.add_report_arguments(command)

    command = _add_command(
        commands,
        "explain",
        _explain,
        help="why does it take so long, or so much memory?",
        description="Say in sentences why a training step takes what it takes, what limits it and what would help: of "
        "the options that `zgraph plan` chooses, or of a saved report.json."
        f"\nExits with status {CHECK_FAILED} if nothing fits.",
        epilog=report_command.EXPLAIN_EXAMPLES,
    )
    report_command.add_arguments(command)
    command.add_argument("--json", action="store_true", help="print sentences by question as one JSON object")

    command = _add_command(
        commands,
        "bisect",
        _bisect,
        help="which pass makes a check fail?",
        description="Run the step on simulated ranks after each pass, and name the first pass after which a check "
        "fails or that the verifier refuses.\n"
        f"Exits with status {CHECK_FAILED} if there is one, or if the captured program fails the check already.",
        epilog=bisect_command.EXAMPLES,
    )
    bisect_command.add_arguments(command)
    command.add_argument("--json", action="store_true", help="print what was found as one JSON object")

    command = _add_command(
        commands,
        "ckpt",
        _ckpt,
        help="what is in a checkpoint, and is it sound?",
        description="List the tensors of a file that torch.save or safetensors wrote, verify them, or write them in "
        f"another form.\nExits with status {CHECK_FAILED} if something is wrong with them.",
        epilog=ckpt_command.EXAMPLES,
    )
    ckpt_command.add_arguments(command)

    command = _add_command(
        commands,
        "doctor",
        _doctor,
        help="what works on this machine, and what will not?",
        description="Look at this machine, try what zgraph needs of it, and print one block to paste into a question: "
        "versions, devices, limits, what works, what is limited and what will not work, each with the fix. It names "
        f"neither the user nor the machine. Exits with status {CHECK_FAILED} if something will not work.",
        epilog="Example: zgraph doctor --directory /scratch",
    )
    command.add_argument(
        "--directory",
        type=Path,
        default=Path(DEFAULT_PATH),
        help="where state would be offloaded to; default: %(default)s",
    )
    command.add_argument("--json", action="store_true", help="print what was found as one JSON object")

    command = _add_command(
        commands,
        "calibrate",
        _calibrate,
        help="measure this machine, so that costs are predicted for it",
        description="Measure how long products of matrices, movement in memory, collectives and disk transfers take, "
        "with one rank and with several at once, and save it where find_hardware('cpu') and other commands look: "
        "$ZGRAPH_HARDWARE, or zgraph/hardware.json in $XDG_CACHE_HOME or ~/.cache. On a machine with GPUs, these are "
        "measured.",
        epilog="Example: zgraph calibrate --ranks 2",
    )
    command.add_argument(
        "--ranks", type=_integer(1, 64), default=calibrate.default_ranks(), help="at once; default: %(default)s"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="default: where other commands look")
    command.add_argument(
        "--budget",
        type=_integer(1, 3600),
        default=45,
        metavar="SECONDS",
        help=f"aimed at, {calibrate.LEAST_S} being about the least; default: %(default)s",
    )
    command.add_argument(
        "--directory",
        type=Path,
        default=calibrate.Options.directory,
        help="where a file is written and read to measure its disk; default: %(default)s",
    )
    command.add_argument("--json", action="store_true", help="print what was saved")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _make_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except OptionError as error:
        print(f"zgraph: {error.what}" + (f" ({error.fix})" if error.fix else ""), file=sys.stderr)
        return BAD_ARGUMENTS
    except ZgraphError as error:
        print(f"zgraph: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    except (KeyboardInterrupt, SignalException):
        print("zgraph: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 -- Python's own status for it is that of a check that failed
        if isinstance(error, BrokenPipeError) and not _is_read():
            return NOT_READ
        traceback.print_exc()
        return COULD_NOT_RUN
    return status


def _is_read() -> bool:
    """Whether somebody still reads what is printed; if not, what is left of it goes nowhere."""
    end = select.poll()
    end.register(sys.stdout, select.POLLOUT)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in end.poll(0)):
        return True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return False
