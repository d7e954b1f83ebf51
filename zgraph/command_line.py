"""What the commands have in common: the order of their names, how arguments are read, and what is said of mistakes."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

PATH: click.Path = click.Path(path_type=Path)


class Integer(click.IntRange):
    """An integer from one to another, which is not called an "integer range" where there is none."""

    name = "integer"


class Command(click.Command):
    """A command in which an option is none that another option takes for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            click.UsageError: they are not what the command takes.
        """
        options = {name: each for each in self.get_params(ctx) if isinstance(each, click.Option) for name in each.opts}
        for name, following in itertools.zip_longest(args, args[1:]):
            needs_value = name in options and not options[name].is_flag and not ctx.resilient_parsing
            if needs_value and (following is None or following in options):
                raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """Commands in the order in which they were added."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


def json_option(what: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """``--json``, which prints something as one JSON object."""
    return click.option("--json", "as_json", is_flag=True, help=f"print {what} as one JSON object")


def is_given(name: str) -> bool:
    """Whether an argument of the command that runs stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def literal(text: str) -> Any:
    """A value as it is written in Python, or a word, without quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it may raise
        return text
