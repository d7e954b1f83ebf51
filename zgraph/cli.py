"""The ``zgraph`` command: one subcommand per question, each with an example in its help.

What a command found goes to standard output, as a table or with ``--json`` as data; progress and errors go to standard
error. Scripts can rely on the exit status: 0 all is well, 1 a check failed, 2 bad arguments, 3 it could not run. As
with other commands, it is 130 after an interrupt, and 141 where whoever read what is printed has gone.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete
from torch.distributed.elastic.multiprocessing import SignalException

from zgraph import bisect_command, calibrate, ckpt_command, demo, doctor, plan_command, report_command
from zgraph.command_line import Group
from zgraph.errors import OptionError, ZgraphError

OK, CHECK_FAILED, BAD_ARGUMENTS, COULD_NOT_RUN, INTERRUPTED, NOT_READ = 0, 1, 2, 3, 130, 141

_NAME, _COMPLETE = "zgraph", "_ZGRAPH_COMPLETE"


@click.group(
    _NAME,
    cls=Group,
    no_args_is_help=False,
    commands=[
        demo.command,
        plan_command.command,
        report_command.report_command,
        report_command.explain_command,
        bisect_command.command,
        ckpt_command.command,
        doctor.command,
        calibrate.command,
    ],
    epilog="Example: zgraph demo --steps 5. Exit status: 0 all is well, 1 a check failed, 2 bad arguments, 3 it could "
    "not run, 130 it was interrupted.",
    # Help is as wide as the terminal is.
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": sys.maxsize},
)
@click.version_option(package_name="zgraph-compiler", prog_name=_NAME, message="%(prog)s %(version)s")
def command() -> None:
    """Train models that do not fit, by compiling the whole training step as one graph."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        if instruction := os.environ.get(_COMPLETE):
            return shell_complete(command, {}, _NAME, _COMPLETE, instruction)
        # Not ``command.main``, which has a status of its own for an interrupt and for what nobody reads.
        with command.make_context(_NAME, list(sys.argv[1:] if argv is None else argv)) as context:
            is_well = command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as told:  # its help, or its version
        return told.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else _NAME
        click.echo(f"{path}: {error.format_message().removesuffix('.')} (see {path} --help)", err=True)
        return BAD_ARGUMENTS
    except OptionError as error:
        click.echo(f"zgraph: {error.what}" + (f" ({error.fix})" if error.fix else ""), err=True)
        return BAD_ARGUMENTS
    except ZgraphError as error:
        click.echo(f"zgraph: {error}", err=True)
        return COULD_NOT_RUN
    except (KeyboardInterrupt, SignalException):
        click.echo("zgraph: interrupted", err=True)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 -- Python's own status for it is that of a check that failed
        if isinstance(error, BrokenPipeError) and not _is_read():
            return NOT_READ
        traceback.print_exc()
        return COULD_NOT_RUN
    return OK if is_well else CHECK_FAILED


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
