"""Passes and the one function that runs them; all the infrastructure there is.

A pass is a frozen dataclass with ``rewrite(program)``. The runner checks the order before anything runs, then clones,
rewrites, proves, times and keeps a record of each pass. A pass does none of these itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from zgraph.collector import collector_paused
from zgraph.errors import MISTAKE_IN_PASS, VerifyError, ZgraphError, first_line
from zgraph.program import Program, Stage
from zgraph.terms import Axiom
from zgraph.verify import Verifier


@dataclass(frozen=True)
class Pass:
    """A rewrite of a program. Its fields are its options, and its repr rebuilds it.

    Subclasses set ``takes`` and ``gives``, the stages before and after, and define ``rewrite``, which edits the
    program in place. Calling a pass is pure: it returns a rewritten copy that is proved to compute the same.

    A pass that rewrites by an equation other than those of data movement states it in ``assumes``. It is then part of
    what the proof rests on, and is listed with the pass.
    """

    takes: ClassVar[Stage]
    gives: ClassVar[Stage]
    assumes: ClassVar[tuple[Axiom, ...]] = ()

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
    """What one pass did.

    Attributes:
        name: of the pass.
        time_s, verify_s: seconds it took, and seconds of the proof that it changed no meaning.
        num_nodes_before, num_nodes_after: nodes of the graph.
        assumes: the equations that the proof takes on trust because the pass says so.
    """

    name: str
    time_s: float
    verify_s: float
    num_nodes_before: int
    num_nodes_after: int
    assumes: tuple[str, ...] = ()


Watch = Callable[[Pass | None, Program], None]
"""Is shown the program before the first pass, with None, and after each pass; it may keep nodes, and alter nothing."""


@dataclass(frozen=True)
class PipelineResult:
    """A rewritten program and what each pass did to it."""

    program: Program
    records: tuple[PassRecord, ...]


def check_order(passes: Sequence[Pass], stage: Stage) -> None:
    """Raise VerifyError unless each pass takes the stage that the one before gives.

    Raises:
        VerifyError: naming the first pass out of order, or one that goes back.
    """
    for p in passes:
        if p.takes is not stage:
            raise VerifyError(
                f"{p.name} takes a {p.takes.name} program but would be given a {stage.name} one",
                fix="change the order of passes; zgraph.passes.default_passes shows a legal one",
            )
        if p.gives < p.takes:
            raise VerifyError(f"{p.name} gives a {p.gives.name} program, which is a stage before {p.takes.name}")
        stage = p.gives


def run(passes: Sequence[Pass], program: Program, *, prove: bool = True, watch: Watch | None = None) -> PipelineResult:
    """Run ``passes`` in order on a copy of ``program``, and prove after each that the meaning stayed.

    Args:
        passes: in order.
        program: before them.
        prove: False for a program that will not run.
        watch: who looks on; nobody if None. What survives a pass is the same node before and after it.

    Raises:
        VerifyError: the order is wrong, or a pass broke a rule or changed what the step computes.
    """
    check_order(passes, program.stage)
    with collector_paused():
        return _run(passes, program, prove, watch)


def _run(passes: Sequence[Pass], program: Program, prove: bool, watch: Watch | None) -> PipelineResult:
    verifier = Verifier(program) if prove else None
    program = verifier.copy() if verifier is not None else program.clone()
    records = []
    if watch is not None:
        watch(None, program)
    for p in passes:
        num_before, start = program.num_nodes(), time.perf_counter()
        with program.made_by(p.name):
            _rewrite(p, program)
        program.stage = p.gives
        end = time.perf_counter()
        if verifier is not None:
            verifier.assume(p.assumes)
            verifier.check(program, after=p.name)
        verify_s = time.perf_counter() - end
        assumes = tuple(axiom.text for axiom in p.assumes)
        records.append(PassRecord(p.name, end - start, verify_s, num_before, program.num_nodes(), assumes))
        if watch is not None:
            watch(p, program)
    if verifier is not None:
        # fx remembers the name of every node it ever made, and with it the node; a copy leaves the erased ones behind.
        program = program.clone()
        program.forget_values()
    return PipelineResult(program, tuple(records))


def _rewrite(p: Pass, program: Program) -> None:
    try:
        p.rewrite(program)
    except ZgraphError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error) or type(error).__name__}"
        raise VerifyError(f"{p.name} failed: {what}", fix=MISTAKE_IN_PASS) from error
