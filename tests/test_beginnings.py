"""Passes that runs begin with alike run once more at most, and what comes out is what they make without that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import accumulated, blocks, few_examples, two_layers
from tests.recipes import Recipe, build, recipes
from tests.test_pipeline import AddNodes
from tests.test_search import search
from zgraph import pipeline
from zgraph.accumulation import micro_step
from zgraph.beginnings import Beginnings
from zgraph.config import Config
from zgraph.lower import lower
from zgraph.machines import preset
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Program, Stage

H100 = preset("H100")


@dataclass(frozen=True)
class Tagged(Pass):
    """A user's own pass, with options that cannot be looked up."""

    tags: list[str]

    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def rewrite(self, program: Program) -> None: ...


@dataclass(frozen=True)
class Weighted(Pass):
    """One with an option that is no single truth when it is compared."""

    weights: torch.Tensor

    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def rewrite(self, program: Program) -> None: ...


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each pass runs."""
    counts: Counter[str] = Counter()
    rewrite = pipeline._rewrite

    def count(p: Pass, program: Program) -> None:
        counts[p.name] += 1
        rewrite(p, program)

    monkeypatch.setattr(pipeline, "_rewrite", count)
    return counts


def test_what_runs_begin_with_is_run_by_the_first_two_alone(counted: Counter[str]) -> None:
    program, beginnings = two_layers(), Beginnings()
    for share in range(10):
        passes = default_passes(Config(unshard=share / 10), Mesh(2), hardware=H100)
        result = beginnings.run(passes, program)
        assert [record.name for record in result.records] == [p.name for p in passes]
    assert counted.pop("Unshard") == 10
    assert set(counted.values()) == {2}


def test_choices_do_not_run_anew_what_they_have_in_common(counted: Counter[str]) -> None:
    of = search(blocks(3), 2, recompute="operators")
    for choice in of.members:
        assert of.estimated(choice) is not None
    assert counted["Tidy"] == counted["RecomputeModules"] == 2
    assert counted["FormBuckets"] < counted["Schedule"] < len(of.members)


def test_micro_batches_before_the_last_begin_alike_too(counted: Counter[str]) -> None:
    program, beginnings = accumulated(two_layers(), 2), Beginnings()
    for zero in range(4):
        for in_flight in (0, 2):
            config = Config(zero, 2**24, accumulate=2, in_flight=in_flight)
            lower(program, config, Mesh(2), None, (), hardware=H100, beginnings=beginnings, prove=False)
    assert counted["FormBuckets"] == 4


def test_a_pass_whose_options_cannot_be_looked_up_is_compared(counted: Counter[str]) -> None:
    program, beginnings = two_layers(), Beginnings()
    for num, tag in enumerate("aaab"):
        beginnings.run([Tagged([tag]), AddNodes(num)], program)
    assert counted == {"Tagged": 3, "AddNodes": 4}


def test_no_more_is_kept_than_may_be(counted: Counter[str]) -> None:
    program = two_layers()
    most = 2 * program.num_nodes() + 3
    beginnings = Beginnings(most)
    for _ in range(3):
        for num in range(5):
            for _ in range(2):
                beginnings.run([AddNodes(num)], program)
                kept = [place.kept.program.num_nodes() for place in beginnings._kept if place.kept is not None]
                assert sum(kept) <= most
    assert counted["AddNodes"] == 5 * 3 + 5  # forgotten before it comes again


@few_examples(6)
@given(recipes(), st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 200]), st.sampled_from([None, 0, 2]))),
       st.sampled_from([0, 300, 10**6]))  # fmt: skip
def test_what_is_made_does_not_depend_on_what_was_made_before(
    recipe: Recipe, options: Sequence[tuple[int, int, int | None]], most_nodes: int
) -> None:
    captured, beginnings = build(recipe), Beginnings(most_nodes)
    text = captured.text(origins=True)
    for zero, bucket_bytes, in_flight in options:
        config = Config(zero, bucket_bytes, in_flight=in_flight)
        passes = default_passes(config, Mesh(2), hardware=H100)
        for program in (captured, beginnings.derived(Program.clone, captured)):
            made, alone = beginnings.run(passes, program), run(passes, program, prove=False)
            assert made.program.text(origins=True) == alone.program.text(origins=True)
            assert made.program.digest() == alone.program.digest()
            assert [record.name for record in made.records] == [record.name for record in alone.records]
    assert captured.text(origins=True) == text


def test_what_is_derived_is_derived_once() -> None:
    program, beginnings = accumulated(two_layers(), 2), Beginnings()
    assert beginnings.derived(micro_step, program) is beginnings.derived(micro_step, program)


def test_passes_whose_options_cannot_be_compared_run_each_time(counted: Counter[str]) -> None:
    beginnings = Beginnings()
    for _ in range(3):
        beginnings.run((Weighted(torch.ones(3)),), two_layers())
    program = two_layers()
    for _ in range(3):
        beginnings.run((Weighted(torch.ones(3)),), program)
    assert counted["Weighted"] == 6
