"""Functions of a user's own, as a command line names them: ``MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from zgraph.errors import OptionError, first_line


def find_function(text: str, option: str) -> Callable[..., Any]:
    """A function, found as ``python -m`` finds modules: from the current directory as well.

    Args:
        text: ``MODULE:FUNCTION``.
        option: that it was given as, for errors.

    Raises:
        OptionError: there is none, or its module cannot be imported.
    """
    module_name, colon, name = text.partition(":")
    if not colon:
        raise OptionError(f"{option} {text} has no colon", fix="write it as MODULE:FUNCTION")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise failed(text, option, error) from error
    finally:
        sys.path.remove("")
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{option} {text}: {module_name} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., Any], text: str, option: str, **arguments: Any) -> Any:
    """What it returns.

    Raises:
        OptionError: it raised; with the last line of the user's that was running.
    """
    try:
        return function(**arguments)
    except Exception as error:
        raise failed(text, option, error) from error


def failed(text: str, option: str, error: Exception) -> OptionError:
    """What went wrong in the user's file, with the last line of it that was running."""
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    theirs = [frame for frame in where if not frame.filename.startswith(("<", sys.prefix, sys.base_prefix))]
    line = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return OptionError(f"{option} {text}: {type(error).__name__}: {first_line(error)}{line}")
