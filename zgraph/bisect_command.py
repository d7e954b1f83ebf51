"""``zgraph bisect``: the command line of ``zgraph.bisect``."""

from __future__ import annotations

import json
from typing import Any

import click
from torch import nn

from zgraph.bisection import bisect
from zgraph.command_line import Command, json_option, literal
from zgraph.errors import OptionError
from zgraph.functions import call_function, find_function

EXAMPLES = """\b
Examples:
  zgraph bisect --model train:build --world 2 --option zero=3 --option clip_norm=1.0
  zgraph bisect --model train:build --passes train:my_passes
  zgraph bisect --model train:build --check train:has_no_copies"""


@click.command("bisect", cls=Command, short_help="which pass makes a check fail?", epilog=EXAMPLES)
@click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    required=True,
    help="a function that returns a model with values, its optimizer, and a batch of all ranks together: what the "
    "model is called with, as a tuple or a dictionary",
)
@click.option(
    "--check",
    metavar="MODULE:FUNCTION",
    show_default="results are those of the captured step",
    help="a function that is given a zgraph.bisection.Rewritten after each pass, and returns False or raises where it "
    "is not as it should be",
)
@click.option("--passes", metavar="MODULE:FUNCTION", help="a function that returns a list of passes of your own")
@click.option("--world", type=int, default=1, metavar="N", help="how many ranks")
@click.option("--bound", type=float, metavar="X", show_default="by dtype", help="of differences, relative")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="of zgraph.compile, as it is written in Python, such as zero=3; may be given several times",
)
@json_option("what was found")
def command(
    model: str,
    check: str | None,
    passes: str | None,
    world: int,
    bound: float | None,
    options: tuple[str, ...],
    *,
    as_json: bool,
) -> bool:
    """Run the step on simulated ranks after each pass, and name the first pass after which a check fails or that the
    verifier refuses.

    Exits with status 1 if there is one, or if the captured program fails the check already.
    """
    given = dict(_option(text) for text in options)
    made = call_function(find_function(model, "--model"), model, "--model")
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
        raise OptionError(
            f"--model {model} returned a {type(made).__name__}",
            fix="return a model, its optimizer and a batch, in a tuple",
        )
    own = [] if passes is None else call_function(find_function(passes, "--passes"), passes, "--passes")
    checked = None if check is None else find_function(check, "--check")
    found = bisect(*made, checked, world_size=world, passes=own, bound=bound, **given)
    click.echo(json.dumps(found.as_dict()) if as_json else found)
    return found.culprit is None


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"--option {text} is not NAME=VALUE", fix="write it as in --option zero=3")
    return name, literal(value)
