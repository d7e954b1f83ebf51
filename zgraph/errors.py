"""Errors a user can meet: each says what went wrong, where in their code, and what to do about it.

``ZgraphError`` subclasses are for users; a failed ``assert`` anywhere in zgraph is a bug in zgraph.
"""

from __future__ import annotations

import linecache
import re


class ZgraphError(Exception):
    """Base of every error zgraph raises on purpose.

    Args:
        what: one sentence naming the cause, with the numbers or names involved.
        where: the user's source position, ``file:line (function): code``, when one is known.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  at:  {where}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class OptionError(ZgraphError):
    """An option of ``zgraph.compile`` is unknown or out of range."""


class CaptureError(ZgraphError):
    """The model's training step cannot be captured as one graph."""


class OptimizerError(ZgraphError):
    """The optimizer does not fit the model, or its update cannot be captured or sharded."""


class StateError(ZgraphError):
    """Parameters, buffers or optimizer state cannot be stored, loaded or initialised."""


class RankError(ZgraphError):
    """The ranks of a job disagree, or another rank failed."""


class StoppedError(RankError):
    """Another rank has stopped before the end of what all take part in; this one has met that."""


class BudgetError(ZgraphError, MemoryError):
    """No choice of options fits the memory that a rank may take, or a step took more than was planned."""


class DiskError(ZgraphError, OSError):
    """State that lies on a disk cannot be written there, or not be read again."""


class HostError(ZgraphError):
    """What is to lie in the memory of a device's host has no room there."""


class VerifyError(ZgraphError):
    """A pass produced a program that breaks a rule; the program was not run."""


MISTAKE_IN_PASS = "this is a mistake in the pass; nothing was run"
"""The fix of every error about what a pass has made."""


def quoted(source: str | None) -> str | None:
    """A recorded source position with its line of code."""
    match = re.fullmatch(r"(.*):(\d+) \(.*\)", source or "")
    line = linecache.getline(match[1], int(match[2])).strip() if match else ""
    return f"{source}: {line}" if line else source


def first_line(error: BaseException) -> str:
    """What an error says, in one line; nothing if it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]
