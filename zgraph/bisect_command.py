"""``zgraph bisect``: the command line of ``zgraph.bisect``."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from typing import Any

from torch import nn

from zgraph.bisection import bisect
from zgraph.errors import OptionError
from zgraph.functions import call_function, find_function

EXAMPLES = """examples:
  zgraph bisect --model train:build --world 2 --option zero=3 --option clip_norm=1.0
  zgraph bisect --model train:build --passes train:my_passes
  zgraph bisect --model train:build --check train:has_no_copies"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    command.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        required=True,
        help="a function that returns a model with values, its optimizer, and a batch of all ranks together: what the "
        "model is called with, as a tuple or a dictionary",
    )
    command.add_argument(
        "--check",
        metavar="MODULE:FUNCTION",
        help="a function that is given a zgraph.bisection.Rewritten after each pass, and returns False or raises where "
        "it is not as it should be; default: results are those of the captured step",
    )
    command.add_argument(
        "--passes", metavar="MODULE:FUNCTION", help="a function that returns a list of passes of your own"
    )
    command.add_argument("--world", type=int, default=1, metavar="N", help="how many ranks; default: %(default)s")
    command.add_argument("--bound", type=float, metavar="X", help="of differences, relative; default: by dtype")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of zgraph.compile, as it is written in Python, such as zero=3; may be given several times",
    )


def run(arguments: argparse.Namespace) -> bool:
    """Bisect and print; whether nothing fails, neither after a pass nor of what was captured.

    Raises:
        OptionError: an argument is not what it should be.
        ZgraphError: see ``zgraph.bisect``.
    """
    options = dict(_option(text) for text in arguments.option)
    made = call_function(find_function(arguments.model, "--model"), arguments.model, "--model")
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
        raise OptionError(
            f"--model {arguments.model} returned a {type(made).__name__}",
            fix="return a model, its optimizer and a batch, in a tuple",
        )
    passes = []
    if arguments.passes is not None:
        passes = call_function(find_function(arguments.passes, "--passes"), arguments.passes, "--passes")
    check = None if arguments.check is None else find_function(arguments.check, "--check")
    found = bisect(*made, check, world_size=arguments.world, passes=passes, bound=arguments.bound, **options)
    sys.stdout.write((json.dumps(found.as_dict()) if arguments.json else str(found)) + "\n")
    return found.culprit is None


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"--option {text} is not NAME=VALUE", fix="write it as in --option zero=3")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word such as bf16, without quotes
