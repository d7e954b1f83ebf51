"""Passes are data: their order is checked first, calling one is pure, and each is recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples, two_layers
from tests.recipes import Recipe, build, recipes
from zgraph import passes
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.passes import FormBuckets, ShardParams, Tidy, UpdateInPlace, default_passes
from zgraph.pipeline import Pass, check_order, run
from zgraph.program import Mesh, Origin, Phase, Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class AddNodes(Pass):
    """A user's own pass, with one option."""

    num: int

    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        loss = program.results()[0]
        for _ in range(self.num):
            origin = Origin(Phase.FORWARD, "head", "model.py:1 (forward)")
            loss = program.call(aten.clone.default, loss, origin=origin, before=program.output_node)
        program.set_results([loss, *program.results()[1:]], program.outputs)


@dataclass(frozen=True)
class DropResult(Pass):
    """A pass with a mistake in it."""

    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        program.set_results(program.results()[1:], program.outputs)


@pytest.mark.parametrize("zero", range(4))
def test_the_default_passes_of_a_stage_are_those_of_the_one_before_and_its_own(zero: int) -> None:
    names = [p.name for p in default_passes(Config(zero=zero), Mesh(2))]
    steps = ["AverageGradients", "ShardOptimizer", "ShardGradients", "ReadParamsEarly", "ShardParams"]
    steps.append("CastBeforeGather")
    last = ["Overlap", "UpdateInPlace", "JoinLossBackward", "OverwriteOperands", *(["Unshard"] if zero == 3 else [])]
    assert names == ["Tidy", "FormBuckets", *steps[: zero + 1 if zero < 3 else 6], *last]


@pytest.mark.parametrize("zero", range(4))
def test_the_repr_of_a_pass_rebuilds_it(zero: int) -> None:
    names = {**vars(passes), "Mesh": Mesh}
    for p in default_passes(Config(zero=zero), Mesh(3)):
        assert eval(repr(p), names) == p


def test_every_pass_says_what_it_does_before_and_after() -> None:
    for p in default_passes(Config(), Mesh(2)):
        assert "->" in (p.__doc__ or ""), p.name


def test_an_illegal_order_is_refused_before_anything_runs() -> None:
    program = two_layers()
    text = program.text()
    for illegal, says in (
        ([Tidy(), ShardParams(Mesh(2))], "ShardParams takes a SHARDED program but would be given a CAPTURED one"),
        ([UpdateInPlace()], "UpdateInPlace takes a SCHEDULED program but would be given a CAPTURED one"),
        ([FormBuckets(1, 1), FormBuckets(1, 1)], "FormBuckets takes a CAPTURED program"),
    ):
        with pytest.raises(VerifyError, match=says) as refusal:
            run(illegal, program)
        assert refusal.value.fix
        with pytest.raises(VerifyError, match=says):
            check_order(illegal, Stage.CAPTURED)
    assert program.text() == text


def test_calling_a_pass_is_pure() -> None:
    program = two_layers()
    before = program.text(origins=True), list(program.outputs), program.stage, program.layout
    for p in default_passes(Config(zero=3, bucket_bytes=1), Mesh(2)):
        text = program.text(origins=True)
        rewritten = p(program)
        assert rewritten is not program
        assert rewritten.stage is p.gives
        assert program.text(origins=True) == text
        program = rewritten
    again = two_layers()
    assert (again.text(origins=True), again.outputs, again.stage, again.layout) == before


def test_passes_of_ones_own_run_among_the_others_and_are_recorded() -> None:
    program = two_layers()
    result = run([AddNodes(3), *default_passes(Config(zero=3), Mesh(2))], program)
    assert [record.name for record in result.records][:2] == ["AddNodes", "Tidy"]
    first = result.records[0]
    assert (first.num_nodes_before, first.num_nodes_after) == (program.num_nodes(), program.num_nodes() + 3)
    assert result.records[-1].num_nodes_after == result.program.num_nodes()
    for one, following in zip(result.records, result.records[1:], strict=False):
        assert one.num_nodes_after == following.num_nodes_before
    assert all(record.time_s >= 0 and record.verify_s >= 0 for record in result.records)
    made = [node for node in result.program.graph.nodes if node.target is aten.clone.default]
    assert [node.meta["origin"].made_by for node in made] == ["AddNodes"] * 3


def test_a_pass_that_breaks_a_rule_is_named_and_leaves_the_program_as_it_was() -> None:
    program = two_layers()
    text = program.text()
    with pytest.raises(VerifyError, match="DropResult: 4 results for 5 declared outputs"):
        run([Tidy(), DropResult(), Tidy()], program)
    assert program.text() == text
    assert program._made_by == "capture"


def test_a_pass_is_its_options() -> None:
    assert AddNodes(2) == AddNodes(2) != AddNodes(3)
    assert replace(AddNodes(2), num=5) == AddNodes(5)
    with pytest.raises(AttributeError):
        AddNodes(2).num = 3  # type: ignore[misc]


@few_examples(6)
@given(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200]))
def test_every_rank_makes_the_same_program(recipe: Recipe, zero: int, world: int, bucket_bytes: int) -> None:
    """Passes that went through sets would order nodes by their addresses, which differ between processes."""
    options = default_passes(Config(zero, bucket_bytes), Mesh(world))
    programs = [run(options, build(recipe)).program for _ in range(2)]
    assert len({program.text(origins=True) for program in programs}) == 1
    assert len({program.digest() for program in programs}) == 1
