"""Passes and the one function that runs them; all the infrastructure there is.

A pass is a frozen dataclass with ``rewrite(program)``. The runner checks the order before anything runs, then clones,
rewrites, verifies, times and keeps a record of each pass. A pass does none of these itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from zgraph.errors import VerifyError
from zgraph.program import Program, Stage
from zgraph.verify import verify


@dataclass(frozen=True)
class Pass:
    """A rewrite of a program. Its fields are its options, and its repr rebuilds it.

    Subclasses set ``takes`` and ``gives``, the stages before and after, and define ``rewrite``, which edits the
    program in place. Calling a pass is pure: it returns a rewritten and verified copy.
    """

    takes: ClassVar[Stage]
    gives: ClassVar[Stage]

    @property
    def name(self) -> str:
        return type(self).__name__

    def rewrite(self, program: Program) -> None:
        """Edit ``program`` in place; the runner has made it a copy, and verifies it afterwards."""
        raise NotImplementedError

    def __call__(self, program: Program) -> Program:
        return run([self], program).program


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: seconds it took, seconds of its verification, number of nodes before and after."""

    name: str
    time_s: float
    verify_s: float
    num_nodes_before: int
    num_nodes_after: int


@dataclass(frozen=True)
class PipelineResult:
    """A rewritten program and what each pass did to it."""

    program: Program
    records: tuple[PassRecord, ...]


def check_order(passes: Sequence[Pass], stage: Stage) -> None:
    """Raise VerifyError unless each pass takes the stage that the one before gives.

    Raises:
        VerifyError: naming the first pass out of order.
    """
    for p in passes:
        if p.takes is not stage:
            raise VerifyError(
                f"{p.name} takes a {p.takes.name} program but would be given a {stage.name} one",
                fix="change the order of passes; zgraph.passes.default_passes shows a legal one",
            )
        stage = p.gives


def run(passes: Sequence[Pass], program: Program) -> PipelineResult:
    """Run ``passes`` in order on a copy of ``program``, verifying after each.

    Raises:
        VerifyError: the order is wrong, or a pass broke a rule.
    """
    check_order(passes, program.stage)
    program = program.clone()
    records = []
    for p in passes:
        before, start = program.num_nodes(), time.perf_counter()
        with program.made_by(p.name):
            p.rewrite(program)
        program.stage = p.gives
        middle = time.perf_counter()
        verify(program, after=p.name)
        records.append(PassRecord(p.name, middle - start, time.perf_counter() - middle, before, program.num_nodes()))
    # fx remembers the name of every node it ever made, and with it the node; a copy leaves the erased ones behind.
    return PipelineResult(program.clone(), tuple(records))
