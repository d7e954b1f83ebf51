"""Whatever a pass wishes, what comes out is an order that may run and computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, assert_same_step, few_examples, two_layers
from tests.recipes import Recipe, build, recipes
from zgraph import ops
from zgraph.config import Config
from zgraph.passes import default_passes, order
from zgraph.passes.order import arrange
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Program, Stage, target_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Wish(Pass):
    """Arrange calls by random wishes."""

    takes: Stage  # type: ignore[misc]
    gives: Stage  # type: ignore[misc]
    seed: int

    def rewrite(self, program: Program) -> None:
        random = Random(self.seed)
        arrange(program, {node: random.random() for node in program.graph.nodes})


@few_examples(40)
@given(recipes(), st.integers(0, 3), st.integers(1, 3), st.sampled_from(Stage), st.integers(0, 99), st.booleans())
def test_any_wish_gives_an_order_that_may_run(
    recipe: Recipe, zero: int, world: int, stage: Stage, seed: int, late: bool
) -> None:
    captured = build(recipe)
    passes = default_passes(Config(zero, 1), Mesh(world), own=[Wish(stage, stage, seed)])
    assert_same_step(run(passes, captured).program, captured, late=late)


def test_an_order_that_may_run_is_granted_as_it_is() -> None:
    for zero in range(4):
        program = run(default_passes(Config(zero, 1), Mesh(2)), two_layers()).program
        before = program.text()
        arrange(program, {node: i for i, node in enumerate(program.graph.nodes)})
        assert program.text() == before


def test_a_call_that_must_wait_stands_right_behind_what_it_waits_for() -> None:
    b = Builder()
    a = b.forward(aten.ones.default, [2])
    calls = [b.forward(target, a) for target in (aten.sin.default, aten.cos.default, aten.tan.default)]
    first = b.forward(aten.neg.default, calls[1])
    program = b.finish({None: first})
    arrange(program, {node: node is not first for node in program.graph.nodes})
    assert names(program) == ["ones", "sin", "cos", "neg", "tan"]


def test_random_numbers_are_drawn_in_the_order_they_were() -> None:
    b = Builder()
    a = b.forward(aten.ones.default, [2])
    masks = [b.forward(aten.bernoulli.p, a, 0.25 * i) for i in range(4)]
    program = b.finish({None: masks[0]})
    arrange(program, {node: -i for i, node in enumerate(program.graph.nodes)})
    assert [node.args[1] for node in program.graph.nodes if ops.is_random(node.target)] == [0, 0.25, 0.5, 0.75]


def test_what_depends_on_a_call_is_found_once_however_much_it_writes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    program = run(default_passes(Config(0, 1), Mesh(1)), two_layers()).program
    find, asked = order._descendants, list[fx.Node]()

    def counted(node: fx.Node) -> set[fx.Node]:
        asked.append(node)
        return find(node)

    monkeypatch.setattr(order, "_descendants", counted)
    arrange(program, {node: i for i, node in enumerate(program.graph.nodes)})
    assert [node.target.__name__ for node in asked] == ["update_bucket1", "update_bucket0"]


def names(program: Program) -> list[str]:
    return [target_name(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function"]
