"""``zgraph.bisect``: the first pass after which a step is not what it was.

The step is captured and rewritten pass by pass, as ``zgraph.compile`` does it on so many ranks. After each pass the
program that there is runs on all of them, in this process, and a check looks at it; by default its results have to be
those of the captured step. Beside that the verifier proves each pass, as it always does. What is told of the first pass
that fails either is what was found, and which calls that pass has made.

    Tidy             proved    equal
    FormBuckets      proved    equal
    Mine             refused   param:layers.0.weight is off by 0.5 of its largest element, on rank 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.accumulation import micro_step
from zgraph.agreement import Agreement
from zgraph.batches import Call, call_of, divided
from zgraph.capture import capture
from zgraph.compiler import check_arguments
from zgraph.config import Config
from zgraph.errors import OptimizerError, OptionError, VerifyError, first_line
from zgraph.execute import initial_value
from zgraph.facts import state_spec
from zgraph.generators import RandomStream
from zgraph.lockstep import Value, Values, run_ranks
from zgraph.metrics import check_metrics
from zgraph.optimizer_state import OptimizerState
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Input, Origin, Program, Role, Stage
from zgraph.reference import averaged, divide, join
from zgraph.simulate import values_of
from zgraph.update import check_step, hyperparameters
from zgraph.which_hardware import hardware_of

BOUNDS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""How far an element may be off, as a share of its tensor's largest, by the coarsest dtype that a step computes in."""

CAPTURE = "capture"
"""What the program before any pass is called."""

_NUM_CALLS = 8
"""Of those that a pass has made, how many are shown."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of results from those of the captured step.

    Attributes:
        what: the result, ``"loss"`` or as ``zgraph.program.Input`` is shown.
        rank: where.
        relative: as a share of the largest element of the tensor that was expected; infinite where only one of them is
            finite, or a result is missing.
    """

    what: str
    rank: int
    relative: float


@dataclass(frozen=True)
class Rewritten:
    """The program that there is after a pass: what a check is given.

    Attributes:
        program: after the pass; it must stay as it is.
        after: the pass; None for the captured program.
        inputs: of each rank, as the captured program takes them.
        reference: the captured program.
    """

    program: Program
    after: Pass | None
    inputs: tuple[Values, ...]
    reference: Program

    def results(self) -> list[Values]:
        """What each rank's results are, by ``zgraph.program.Input`` of whole parameters; None is the loss.

        Until a pass has put means over ranks into a program, each rank has results of its own.
        """
        program, streams = self.program, [RandomStream(rank) for rank in range(len(self.inputs))]
        if program.stage >= Stage.SHARDED:
            return join(program, run_ranks(program, divide(program, self.inputs), streams=streams))
        each = zip(divide(program, self.inputs), streams, strict=True)
        return join(program, [run_ranks(program, [mine], streams=[stream])[0] for mine, stream in each])

    def expected(self) -> list[Values]:
        """What they would be, computed from the captured program."""
        streams = [RandomStream(rank) for rank in range(len(self.inputs))]
        if self.program.stage >= Stage.SHARDED:
            return run_ranks(averaged(self.reference), self.inputs, streams=streams)
        each = zip(self.inputs, streams, strict=True)
        return [run_ranks(self.reference, [mine], streams=[stream])[0] for mine, stream in each]

    def difference(self) -> Difference:
        """The largest difference between the two."""
        differences = [
            Difference("loss" if what is None else str(what), rank, _relative(found.get(what), value))
            for rank, (found, expected) in enumerate(zip(self.results(), self.expected(), strict=True))
            for what, value in expected.items()
        ]
        return max(differences, key=lambda difference: difference.relative)


Check = Callable[[Rewritten], Any]
"""Is given what there is after each pass; it fails by returning False, or by raising."""


@dataclass(frozen=True)
class Step:
    """What was found after one pass.

    Attributes:
        name: of the pass; ``"capture"`` for none.
        micro_batch: ``"last"``, or ``"earlier"`` in a step with several.
        proof: what the verifier says against it; empty if it is proved.
        check: what the check says against it; empty if it passes; None if it was not asked.
    """

    name: str
    micro_batch: str
    proof: str
    check: str | None

    @property
    def is_good(self) -> bool:
        """Whether neither says anything against it."""
        return not self.proof and not self.check


@dataclass(frozen=True)
class Bisection:
    """The answer of ``zgraph.bisect``.

    Attributes:
        steps: in order, up to the first that fails.
        made: calls that the pass of that step has made, as text with the lines of the model.
        assumes: equations that the proof takes on trust because that pass says so.
    """

    steps: tuple[Step, ...]
    made: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()

    @property
    def culprit(self) -> Step | None:
        """The first step that fails; None if all are good."""
        return None if self.steps[-1].is_good else self.steps[-1]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        culprit = self.culprit
        return {
            "culprit": None if culprit is None else culprit.name,
            "steps": [vars(step) for step in self.steps],
            "made": list(self.made),
            "assumes": list(self.assumes),
        }

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        several = len({step.micro_batch for step in self.steps}) > 1
        lines = []
        for step in self.steps:
            of = f"{step.micro_batch:<7}  " if several else ""
            check = "not asked" if step.check is None else step.check or "passes"
            lines.append(f"{of}{step.name:<{width}}  {'refused' if step.proof else 'proved '}  {check}")
        culprit = self.culprit
        if culprit is None:
            return "\n".join([*lines, "no pass is to blame: after each of them, the check passes"])
        if culprit.name == CAPTURE:
            return "\n".join([*lines, "no pass is to blame: the captured program fails the check already"])
        lines.append(f"the first pass to fail: {culprit.name}")
        lines += [
            f"  the verifier: {line}" if not i else f"    {line}" for i, line in enumerate(culprit.proof.splitlines())
        ]
        lines += [f"  it assumes: {text}" for text in self.assumes]
        lines += ["  it made:", *(f"    {text}" for text in self.made)] if self.made else []
        return "\n".join(lines)


def bisect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    batch: Any,
    check: Check | None = None,
    *,
    world_size: int = 1,
    loss: Callable[..., torch.Tensor] | None = None,
    weight: Callable[..., torch.Tensor | float] | None = None,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    passes: Sequence[Pass] = (),
    bound: float | None = None,
    **options: Any,
) -> Bisection:
    """Find the first pass that makes a check fail, on ranks that are simulated in this process.

    The model, the optimizer and its state stay as they are; their values are what the step runs on.

    Args:
        model, optimizer, loss, weight, metrics, passes, options: as for ``zgraph.compile``. The model must have values.
        batch: of all ranks together, divided along the first dimension of its tensors; a tuple of positional arguments,
            a dictionary of keyword arguments, or a pair of these.
        check: is given a ``Rewritten`` after each pass, the captured program first, and returns False or raises if it
            is not as it should be. By default results must be those of the captured step within ``bound``.
        world_size: how many ranks.
        bound: how far an element of a result may be off, as a share of the largest element of its tensor; by default
            ``BOUNDS``. Passes that round on request (``reduce_precision``, ``gather_precision``, ``state_precision``)
            need a larger one than that.

    Raises:
        OptionError: options are out of range, or the batch does not divide over ranks.
        ZgraphError: there is no step to capture, as for ``zgraph.compile``.
    """
    config = Config.from_options(options)
    check_arguments(model, optimizer, loss, weight, passes, config)
    world: Any = world_size
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise OptionError(f"world_size={world_size!r} is not a number of ranks", fix="give a positive integer")
    if check is not None and bound is not None:
        raise OptionError("bound beside a check, which has one of its own", fix="leave one of them out")
    if bound is not None and not bound >= 0:
        raise OptionError(f"bound={bound!r} is not a share", fix="give a number from 0, such as 1e-3")
    if optimizer is None:
        raise OptimizerError("a step needs an optimizer", fix="pass optimizer=torch.optim.AdamW(...)")
    check_step(optimizer)
    mesh, machine = config.mesh(world_size), hardware_of(torch.device("cpu"), world_size)
    each = _calls(call_of(batch, "batch"), world_size, config.accumulate)
    functions: dict[str, Any] = {"loss": loss, "weight": weight, "metrics": check_metrics(metrics)}
    forms = OptimizerState(optimizer, Agreement(None)).forms(dict(model.named_parameters()))
    state = state_spec(model, {name: dict(sorted(entries.items())) for name, entries in forms.items()})
    captured = capture(model, optimizer, *each[0][-1], state=state, config=config, **functions)
    hypers: dict[str, Value] = {**hyperparameters(optimizer), **config.inputs(config.numbers(), world_size)}
    values = values_of(model, optimizer)
    todo = [("last", captured, [calls[-1] for calls in each])]
    if config.accumulate > 1:
        todo.append(("earlier", micro_step(captured), [calls[0] for calls in each]))
    steps: list[Step] = []
    layout = None
    for micro_batch, program, calls in todo:
        inputs = tuple(_inputs(program, values, hypers, call) for call in calls)
        order = default_passes(config, mesh, layout, own=tuple(passes), hardware=machine)
        limit = bound if bound is not None else BOUNDS[_coarsest(program)]
        walk = _Walk(program, order, inputs, micro_batch, check or _equal_within(limit))
        steps += walk.steps
        if not steps[-1].is_good:
            return Bisection(tuple(steps), walk.made, walk.assumes)
        layout = walk.layout
    return Bisection(tuple(steps))


def _calls(whole: Call, world: int, accumulate: int) -> list[list[Call]]:
    """Of each rank those of its micro-batches.

    Raises:
        OptionError: rows of the batch do not divide.
    """
    fix = f"give a batch of which {world} ranks get as many rows each, or another number of ranks"
    of_ranks = divided(*whole, world, "parts, one for each rank", fix, OptionError)
    fix = f"give a batch of which {accumulate} micro-batches of each rank get as many rows, or another accumulate"
    return [divided(*call, accumulate, "micro-batches of a rank", fix, OptionError) for call in of_ranks]


class _Walk:
    """One program from capture to the first pass that fails, or to the last."""

    def __init__(
        self, captured: Program, order: Sequence[Pass], inputs: tuple[Values, ...], micro_batch: str, check: Check
    ) -> None:
        self._captured, self._inputs, self._micro_batch, self._check = captured, inputs, micro_batch, check
        self.steps: list[Step] = []
        self.made: tuple[str, ...] = ()
        self.assumes: tuple[str, ...] = ()
        num_proved, refusal = self._prove(order)
        self._refused = order[num_proved] if refusal else None
        self._refusal = refusal
        try:
            self.layout = run(order, captured, prove=False, watch=self._look).program.layout
        except _Failed:
            pass
        except VerifyError as error:  # the pass itself has failed
            done = len(self.steps) - 1  # the first was of what was captured
            self._blame(order[done], error.what, None)

    def _prove(self, order: Sequence[Pass]) -> tuple[int, str]:
        """How many passes are proved, and what the verifier says against the next one."""
        seen: list[Pass | None] = []
        try:
            run(order, self._captured, watch=lambda p, _: seen.append(p))
        except VerifyError as error:
            if not seen:  # the order is wrong
                raise
            return len(seen) - 1, str(error)
        return len(order), ""

    def _look(self, p: Pass | None, program: Program) -> None:
        is_refused = p is not None and p is self._refused
        found = self._ask(Rewritten(program, p, self._inputs, self._captured))
        if not found and not is_refused:
            self.steps.append(Step(CAPTURE if p is None else p.name, self._micro_batch, "", ""))
            return
        self._blame(p, self._refusal if is_refused else "", found)
        if p is not None:
            self.made = tuple(_made_by(program, p.name))
        raise _Failed

    def _ask(self, rewritten: Rewritten) -> str:
        """What the check says against a program; nothing if it passes."""
        try:
            answer = self._check(rewritten)
        except Exception as error:  # noqa: BLE001 -- a check fails by raising, whatever it is
            return f"{type(error).__name__}: {first_line(error)}" if not isinstance(error, Unequal) else str(error)
        return "the check fails" if answer is False else ""

    def _blame(self, p: Pass | None, proof: str, found: str | None) -> None:
        self.steps.append(Step(CAPTURE if p is None else p.name, self._micro_batch, proof, found))
        self.assumes = () if p is None else tuple(axiom.text for axiom in p.assumes)


class _Failed(Exception):  # noqa: N818 -- no error: the walk ends here
    pass


class Unequal(AssertionError):  # noqa: N818 -- said of results, not of a mistake in them
    """Results differ by more than the bound."""


def _equal_within(bound: float) -> Check:
    """The check that compares results with those of the captured step."""

    def check(rewritten: Rewritten) -> None:
        worst = rewritten.difference()
        if not worst.relative <= bound:
            much = "is not what was expected" if math.isinf(worst.relative) else f"is off by {worst.relative:.2g}"
            of = "" if math.isinf(worst.relative) else " of its largest element"
            raise Unequal(f"{worst.what} {much}{of}, on rank {worst.rank} (bound {bound:.0e})")

    return check


def _relative(found: Value | None, expected: Value) -> float:
    """The largest difference of two values as a share of the largest that was expected."""
    if found is None:
        return math.inf
    one, other = (torch.as_tensor(value).detach().cpu() for value in (found, expected))
    if one.shape != other.shape:
        return math.inf
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    if not torch.equal(one.isfinite(), other.isfinite()):
        return math.inf
    off = (one - other).abs()[other.isfinite()]
    largest = float(other.abs()[other.isfinite()].max()) if off.numel() else 0.0
    worst = float(off.max()) if off.numel() else 0.0
    return worst / largest if largest else (math.inf if worst else 0.0)


def _inputs(program: Program, values: Values, hypers: Mapping[str, Value], call: Call) -> Values:
    """What a rank gives to the captured program."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    inputs: Values = {}
    for node, what in program.placeholders():
        if what.role is Role.BATCH:
            inputs[what] = tensors[int(what.name)]
        elif what.role is Role.HYPER:
            inputs[what] = hypers[what.name]
        elif what.role is Role.CONSTANT:
            inputs[what] = program.constants[what.name]
        elif what in values:
            inputs[what] = values[what]
        elif what.role is Role.OPT_STATE:
            inputs[what] = _first_state(program, what, node.meta["val"], values)
        elif what.role is Role.GRADIENT:  # zeros would hide where it goes
            generator = torch.Generator().manual_seed(len(inputs))
            val = node.meta["val"]
            drawn = torch.randn(val.shape, generator=generator, dtype=torch.float64)
            inputs[what] = drawn.to(val.device, val.dtype)
        else:
            inputs[what] = initial_value(program, what, node.meta["val"])
    return inputs


def _first_state(program: Program, what: Input, val: Any, values: Values) -> Value:
    start = program.init[what]
    if start.dtype is None:
        assert start.fill is not None
        return start.fill
    param = values[Input(Role.PARAM, what.name)]
    assert isinstance(param, torch.Tensor)
    if start.fill is None:
        return param.to(start.dtype, copy=True)
    return torch.full(val.shape, start.fill, dtype=start.dtype, device=val.device)


def _coarsest(program: Program) -> torch.dtype:
    """Of the dtypes that a program computes vectors in, the one with the fewest digits."""
    found = {torch.float64}
    for node in program.graph.nodes:
        for val in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(val, torch.Tensor) and val.dim() and val.dtype in BOUNDS:
                found.add(val.dtype)
    return max(found, key=BOUNDS.__getitem__)


def _made_by(program: Program, name: str) -> list[str]:
    """The first calls that a pass has made."""
    lines = []
    for text, node in zip(program.text(origins=True).splitlines(), program.graph.nodes, strict=True):
        origin: Origin | None = node.meta.get("origin")
        if origin is not None and origin.made_by == name:
            lines.append(text.strip())
    more = len(lines) - _NUM_CALLS
    return [*lines[:_NUM_CALLS], *([f"and {more} more"] if more > 0 else [])]
