"""Lines of the user's code around a recorded source position."""

from __future__ import annotations

import linecache
import re

AROUND = 2
"""Lines before and behind."""


def code_around(source: str | None) -> list[list[int | str]]:
    """Numbers and texts of the lines around a position; none where the file cannot be read.

    Args:
        source: ``file:line (function)``, as ``zgraph.program.Origin`` has it.
    """
    match = re.fullmatch(r"(.*):(\d+) \(.*\)", source or "")
    if match is None:
        return []
    middle = int(match[2])
    lines = ((number, linecache.getline(match[1], number)) for number in range(middle - AROUND, middle + AROUND + 1))
    return [[number, text.rstrip()] for number, text in lines if text]
