"""Proof that a pass has changed nothing but where data lives and when it moves.

``Verifier`` holds the program that a pipeline started from. After every pass it checks the structure of the rewritten
program, then interprets both over the same terms: every output must be the output of the original, term for term, and
lie where the layout says. That needs no numbers and is linear in nodes. What is refused never runs, and the error shows
the first node at which meaning parted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.changes import Look
from zgraph.collector import collector_paused
from zgraph.difference import MISSING, changed
from zgraph.errors import MISTAKE_IN_PASS, VerifyError
from zgraph.layout import Bucket, Layout
from zgraph.meaning import Meaning, Numbers, interpret, numbers_of
from zgraph.movement import Value, axis_in_terms
from zgraph.program import OF_PARAMETERS, Input, Program, Role, Stage, StateInit, describe, source_of
from zgraph.structure import check_structure
from zgraph.terms import Axiom, Form, Term, Terms, form, show, zero_times

Outputs = dict[Input | None, tuple[Value, fx.Node | None]]
"""What a program returns, state by parameter even where it lies in buckets; and the node it comes from."""


class Verifier:
    """Compares rewritten programs with the one that they were made from.

    Args:
        reference: the original; must not change while it is compared with.
    """

    def __init__(self, reference: Program) -> None:
        self._reference = reference
        self._constants = {name: (tensor, tensor._version) for name, tensor in reference.constants.items()}
        self._layout = reference.layout
        self._mesh = reference.mesh if reference.stage >= Stage.SHARDED else None
        self._axioms: tuple[Axiom, ...] = ()
        self._terms = Terms()
        self._numbers: Numbers = {}
        self._expected: Meaning | None = None
        self._wanted: Outputs = {}
        self._look: Look | None = None
        self._found: Meaning | None = None
        self._twins: dict[fx.Node, fx.Node] = {}
        self._rules: tuple[Any, ...] | None = None  # given state, initial state and guards that were found right
        self._returned: tuple[Any, ...] | None = None  # what is returned, and was found right

    def copy(self) -> Program:
        """A copy of the reference, to be rewritten: it means the same, so only what passes change is looked at."""
        program = self._reference.clone()
        kernels: dict[Any, Any] = {}
        for node in program.graph.nodes:
            if hasattr(node.target, "writes"):  # its body may be edited, too
                node.target = kernels.setdefault(node.target, node.target.copy())
        self._look, self._twins = (
            Look(program),
            dict(zip(self._reference.graph.nodes, program.graph.nodes, strict=True)),
        )
        return program

    def assume(self, axioms: Iterable[Axiom]) -> None:
        """Take equations on trust from now on."""
        new = tuple(axiom for axiom in axioms if axiom not in self._axioms)
        if new:
            self._axioms += new
            self._terms = Terms(self._axioms)
            self._expected = self._found = None

    @collector_paused()
    def check(self, program: Program, *, after: str) -> None:
        """Check the structure of ``program``, and that it means what the reference means.

        Args:
            program: made from the reference by passes.
            after: the last of them, to blame. Of a program that was checked before, only what has changed since is
                looked at again.

        Raises:
            VerifyError: with the rule or the output, the node, the user's source line and the pass.
        """
        look, self._look = Look(program, self._look), None  # what is refused now is looked at from nothing next time
        check_structure(program, after=after, look=look)
        self._check_facts(program, after)
        check = _Check(self._reference, program, self._terms, after)
        rules = (dict(program.given), dict(program.init), tuple(program.guards))
        if rules != self._rules or not look.same_inputs:
            check.inputs()
        numbers = self._numbers if look.same_inputs else numbers_of(program)
        if self._expected is None or numbers != self._numbers:
            expected = interpret(self._reference, self._terms, numbers, before=self._expected, is_reference=True)
            self._wanted = check.outputs(self._reference, expected)
            self._expected, self._numbers = expected, numbers
        if self._twins:
            self._found = self._expected.of_copy(self._twins)
        found = interpret(program, self._terms, numbers, before=self._found, look=look)
        check.draws(self._expected, found)
        returned = (program.layout, program.mesh, list(program.outputs), found.results, self._expected)
        if returned != self._returned:
            check.results(self._wanted, self._expected, found)
        self._look, self._found, self._twins, self._layout = look, found, {}, program.layout
        self._mesh = program.mesh if program.stage >= Stage.SHARDED else None
        self._rules, self._returned = rules, returned

    def _check_facts(self, program: Program, after: str) -> None:
        """What no pass may touch is as it was: constants, buckets that exist, and the ranks that divide them."""
        for name, (tensor, version) in self._constants.items():
            if tensor._version != version:
                raise VerifyError(f"{after} wrote to the constant {name}, which is the user's", fix=MISTAKE_IN_PASS)
        before, now = self._layout, program.layout
        if before is not None and (now is None or _stored(now) != _stored(before)):
            raise VerifyError(f"{after} changed the buckets, which state is already stored in", fix=MISTAKE_IN_PASS)
        if self._mesh is not None and program.mesh != self._mesh:
            raise VerifyError(f"{after} changed the mesh, over which state is already divided", fix=MISTAKE_IN_PASS)


def verify(program: Program, *, after: str, reference: Program | None = None) -> None:
    """Check ``program``, every node of it; see ``Verifier.check``.

    Args:
        reference: what it must mean; without one, only that its structure is sound.
    """
    if reference is None:
        check_structure(program, after=after)
    else:
        Verifier(reference).check(program, after=after)


class _Check:
    """One comparison of a rewritten program with its reference."""

    def __init__(self, reference: Program, program: Program, terms: Terms, after: str) -> None:
        self.reference, self.program, self.terms, self.after = reference, program, terms, after

    # -- what goes in ---------------------------------------------------------------------------------------

    def inputs(self) -> None:
        """Inputs, initial state and guards are those of the reference, bucket by bucket."""
        known = _by_parameter(self.reference, {what: None for _, what in self.reference.placeholders()})
        given = _by_parameter(self.program, {what: None for _, what in self.program.placeholders()})
        extra = [what for what in given if what not in known]
        if extra:
            raise self._error(f"the program reads {extra[0]}, which is not an input of the step", extra[0].name)
        self._same_forms()
        if self.program.given != self.reference.given:
            raise VerifyError(f"{self.after}: the optimizer state given at capture has changed", fix=MISTAKE_IN_PASS)
        if self.program.stage < Stage.SHARDED and self.program.mesh != self.reference.mesh:
            raise VerifyError(f"{self.after}: the mesh changed before anything is divided over it", fix=MISTAKE_IN_PASS)
        mine, theirs = self.program.layout, self.reference.layout
        if mine is not None:
            wanted = {name for (name, _) in self.reference.inputs(Role.PARAM)}
            if theirs is not None:
                wanted = {segment.name for bucket in theirs.buckets for segment in bucket.segments}
            found = [segment.name for bucket in mine.buckets for segment in bucket.segments]
            if sorted(found) != sorted(wanted):
                odd = sorted(wanted.symmetric_difference(found)) or sorted(n for n in found if found.count(n) > 1)
                raise self._error(f"{odd[0]} is not in exactly one bucket", odd[0])
            self._numbers_agree(mine)
        starts, now = _initial(self.reference), _initial(self.program)
        for what in {**starts, **now}:
            was, is_now = starts.get(what), now.get(what)
            if was != is_now:
                called = f"{what.key} of {what.name}" if what.key else what.name
                raise self._error(f"{called} starts as {is_now}, but started as {was}", what.name)
        kept = _guards(self.program)
        for guard, name in _guards(self.reference).items():
            if guard not in kept:
                raise self._error(f"the condition {guard}, which held at capture, is no longer checked", name)

    def _same_forms(self) -> None:
        """Batch, buffers, constants and hyperparameters have the shapes, dtypes and devices that they had."""
        before = {what: node.meta["val"] for node, what in self.reference.placeholders()}
        for node, what in self.program.placeholders():
            if what in before and what.role not in OF_PARAMETERS:
                was, val = before[what], node.meta["val"]
                if describe(was) != describe(val) or getattr(was, "device", None) != getattr(val, "device", None):
                    raise self._error(
                        f"the input {what} is recorded as {describe(val)}, but is {describe(was)}", what.name
                    )

    def _numbers_agree(self, layout: Layout) -> None:
        for bucket in layout.buckets:
            first, *others = [segment.name for segment in bucket.segments]
            for name in others:
                if self._numbers(bucket, name) != self._numbers(bucket, first):
                    raise self._error(f"{name} and {first} share {bucket.name}, but not their step count", name)

    def _numbers(self, bucket: Bucket, name: str) -> Any:
        """What a parameter's state was at capture, but for what is its own in the bucket."""
        given: Any = self.reference.given.get(name)
        return given and [(key, dtype, None if bucket.keeps(key) else value) for key, dtype, value in given]

    def _error(self, what: str, name: str) -> VerifyError:
        """An error about the parameter or other input called ``name``, at the line that reads it."""
        nodes = [node for node, given in self.reference.placeholders() if given.name == name and node.users]
        return VerifyError(f"{self.after}: {what}", where=source_of(nodes[0]) if nodes else None, fix=MISTAKE_IN_PASS)

    # -- what comes out -------------------------------------------------------------------------------------

    def draws(self, expected: Meaning, found: Meaning) -> None:
        """Random numbers are drawn in the reference's order."""
        draws = zip_longest(expected.draws.values(), found.draws.items(), fillvalue=None)
        for number, (mine, drawn) in enumerate(draws, 1):
            node, theirs = drawn or (None, None)
            if mine is not theirs:
                draw = f"random draw number {number}"
                raise changed(self.program, self.after, draw, (mine, None), (theirs, node), expected, found)

    def results(self, wanted: Outputs, expected: Meaning, found: Meaning) -> None:
        """Every output is the term that is wanted."""
        got = self.outputs(self.program, found)
        for what, (value, node) in got.items():
            before, source = wanted.get(what, (MISSING, None))
            if before is MISSING and what is not None:
                before = self._unchanged(what)
            if _differ(before, value):
                raise changed(self.program, self.after, _new(what), (before, source), (value, node), expected, found)
        for what, (value, node) in wanted.items():
            if what not in got and _differ(value, self._unchanged(what)):
                raise VerifyError(
                    f"{self.after}: {_new(what)} is not returned", where=source_of(node), fix=MISTAKE_IN_PASS
                )

    def _unchanged(self, what: Input | None) -> Value:
        """The term of a state input of the reference."""
        for node, given in self.reference.placeholders():
            if given == what:
                return self.terms.input(given, *form(node.meta["val"]), varies=given.role is Role.BUFFER)
        return MISSING

    def outputs(self, program: Program, meaning: Meaning) -> Outputs:
        """What a program returns, parameter by parameter."""
        outputs: Outputs = {}
        layout = program.layout
        for what, result, value in zip(program.outputs, program.results(), meaning.results, strict=True):
            node = result if isinstance(result, fx.Node) else None
            if what is None or layout is None or what.role not in OF_PARAMETERS:
                outputs[what] = (value, node)
                continue
            if what.name not in layout.by_name:
                raise VerifyError(
                    f"{self.after}: a result is {_new(what)}, which is not of a bucket", fix=MISTAKE_IN_PASS
                )
            is_shard = layout.shard_params if what.role is Role.PARAM else layout.shard_state
            bucket = layout.bucket(what.name, what.key)
            packs = what.role is Role.OPT_STATE and layout.packs(what.name, what.key)
            is_packed = packs and isinstance(value, Term) and value.target is ops.pack_state
            value = value.args[0] if is_packed else value
            divided = is_shard and program.mesh.shard_size > 1
            must_be_zero = is_packed or what.role is Role.GRADIENT
            parts = self._parts(program, what, value, bucket, divided=divided, zero_between=must_be_zero)
            outputs.update({name: (part, node) for name, part in parts.items()})
        return outputs

    def _parts(
        self, program: Program, what: Input, value: Value, bucket: Bucket, *, divided: bool, zero_between: bool
    ) -> dict[Input, Value]:
        """The value of each parameter of a bucket."""
        names = {segment.name: Input(what.role, segment.name, what.key) for segment in bucket.segments}
        if not isinstance(value, Term) or not value.shape:
            return dict.fromkeys(names.values(), value)
        layout = program.layout
        assert layout is not None
        numel = (layout.param_numel if what.role is Role.PARAM else layout.state_numel)(bucket)
        if value.shape != (numel,):
            raise self._misplaced(program, what, value, f"each rank must return {numel} elements")
        if divided:
            axis = axis_in_terms(program.mesh, program.mesh.shard_axis)
            whole = self.terms.whole(value, (bucket.numel,), axis)
            if whole is None:
                raise self._misplaced(program, what, value, "each rank must return its part of one vector")
            value = whole
        elif value.target is Form.SHARD:
            raise self._misplaced(program, what, value, "every rank must return the whole")
        if zero_between:
            ends = [0, *(end for s in bucket.segments for end in (s.offset, s.offset + s.numel)), bucket.numel]
            gaps = (self.terms.slice(value, *gap) for gap in zip(ends[::2], ends[1::2], strict=True))
            bases = (base for gap in gaps for base, _, length in self.terms.pieces(gap) if length)
            if any(zero_times(base) != frozenset() for base in bases):
                raise self._misplaced(program, what, value, "padding between parameters must stay zero")
        return {
            names[s.name]: self.terms.reshape(self.terms.slice(value, s.offset, s.offset + s.numel), s.shape)
            for s in bucket.segments
        }

    def _misplaced(self, program: Program, what: Input, value: Term, rule: str) -> VerifyError:
        result = program.results()[program.outputs.index(what)]
        return VerifyError(
            f"{self.after} left the new value of {what} in the wrong place: {rule}\n  found: {show(value)}",
            where=source_of(result),
            fix=MISTAKE_IN_PASS,
        )


def _stored(layout: Layout) -> Any:
    """What no pass may change of a layout."""
    return layout.buckets, layout.world, layout.packed


def _differ(one: Value, other: Value) -> bool:
    """Whether values are not the same: terms are made once, numbers are not."""
    return one is not other if isinstance(one, Term) or isinstance(other, Term) else bool(one != other)


def _by_parameter(program: Program, inputs: dict[Input, None]) -> dict[Input, None]:
    """Inputs with those of buckets replaced by those of their parameters."""
    if program.layout is None:
        return inputs
    buckets = program.layout.by_name
    found: dict[Input, None] = {}
    for what in inputs:
        if what.role in OF_PARAMETERS and what.name in buckets:
            found.update({Input(what.role, s.name, what.key): None for s in buckets[what.name].segments})
        elif what.role is Role.GATHERED and what.name in buckets:
            found.update({Input(Role.PARAM, s.name): None for s in buckets[what.name].segments})
        else:
            found[what] = None
    return found


def _initial(program: Program) -> dict[Input, StateInit]:
    """How absent state starts, that of the optimizer by parameter."""
    buckets = {} if program.layout is None else program.layout.by_name
    found = {}
    for what, start in program.init.items():
        of_bucket = what.role is Role.OPT_STATE and what.name in buckets
        names = [segment.name for segment in buckets[what.name].segments] if of_bucket else [what.name]
        found.update({replace(what, name=name): start for name in names})
    return found


def _guards(program: Program) -> dict[str, str]:
    """The conditions that must hold to run, on inputs of parameters, each with one that it reads."""
    buckets = {} if program.layout is None else program.layout.by_name
    found = {}
    for guard in program.guards:
        names = [
            [s.name for s in buckets[what.name].segments] if what.name in buckets else [what.name]
            for what in guard.inputs
        ]
        for position in range(max(map(len, names), default=1)):
            each = [those[position % len(those)] for those in names]
            on = [str(replace(what, name=name)) for what, name in zip(guard.inputs, each, strict=True)]
            found[f"{guard.text} on {', '.join(on)}"] = next(iter(each), "")
    return found


def _new(what: Input | None) -> str:
    return "the loss" if what is None else f"the new value of {what}"
