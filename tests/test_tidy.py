"""What tracing leaves behind goes; values, random draws and their order stay."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from hypothesis import given

from tests.programs import (
    Builder,
    accumulated,
    assert_identical,
    assert_same_step,
    few_examples,
    param,
    rewritten,
    values_for,
)
from tests.recipes import Param, Recipe, Rule, build, recipes
from zgraph import ops
from zgraph.lockstep import run_ranks
from zgraph.passes import Tidy
from zgraph.program import Phase, Program, Role

aten = torch.ops.aten


def test_no_ops_and_dead_code_go() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[2, 3]), b.input(Role.BATCH, "0", shape=[4, 2])
    a = b.forward(aten.detach.default, w)
    a = b.forward(aten.t.default, b.forward(aten.t.default, a))
    y = b.forward(aten.mm.default, x, b.forward(aten.alias.default, a))
    y = b.forward(aten.expand.default, b.forward(aten.view.default, y, [4, 3]), [4, 3])
    b.forward(aten.exp.default, b.forward(aten.sin.default, y))
    loss = b.forward(aten.sum.default, b.forward(aten.view.default, y, [12]))
    new = b.call(Phase.UPDATE, aten.copy.default, w, b.call(Phase.UPDATE, aten.neg.default, w))
    program = Tidy()(b.finish({None: loss, param("w"): new}))
    assert_expected_inline(
        program.text(),
        """\
%0: f64[2, 3] = input param:w
%1: f64[4, 2] = input batch:0
%2: f64[4, 3] = aten.mm.default(%1, %0)
%3: f64[12] = aten.view.default(%2, [12])
%4: f64[] = aten.sum.default(%3)
%5: f64[2, 3] = aten.neg.default(%0)
return [%4, %5]  # loss, param:w""",
    )


def kept(target: Any, *args: Any, shape: tuple[int, ...] = (2, 3), of: str = "x") -> bool:
    """Whether a call on a tensor x (or its transpose) survives."""
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=shape)
    source = b.forward(aten.t.default, x) if of == "t" else x
    node = b.forward(target, source, *args)
    program = Tidy()(b.finish({None: b.forward(aten.sum.default, node)}))
    return any(n.target is target for n in program.graph.nodes)


def test_what_changes_shape_strides_or_dtype_stays() -> None:
    assert not kept(aten.view.default, [2, 3])
    assert kept(aten.view.default, [3, 2])
    assert not kept(aten.reshape.default, [3, 2], of="t")
    assert kept(aten.contiguous.default, of="t")
    assert kept(aten.expand.default, [5, 2, 3])
    assert kept(aten.t.default)


def test_a_copy_that_converts_or_broadcasts_stays() -> None:
    for shape, dtype in (((3,), torch.float64), ((2, 3), torch.float32), ((2, 3), torch.float64)):
        b = Builder()
        w, x = b.input(Role.PARAM, "w", shape=[2, 3]), b.input(Role.BATCH, "0", shape=shape, dtype=dtype)
        new = b.call(Phase.UPDATE, aten.copy.default, w, x)
        program = Tidy()(b.finish({None: b.forward(aten.sum.default, x), param("w"): new}))
        assert (program.results()[1].target is aten.copy.default) == ((shape, dtype) != ((2, 3), torch.float64))


def test_unread_random_operators_stay_in_order() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4])
    draws = [b.forward(aten.bernoulli.p, x, p) for p in (0.5, 0.25, 0.75)]
    b.forward(aten.exp.default, draws[0])
    program = Tidy()(b.finish({None: b.forward(aten.sum.default, draws[2])}))
    assert [n.args[1] for n in program.graph.nodes if ops.is_random(n.target)] == [0.5, 0.25, 0.75]
    assert not program.graph.find_nodes(op="call_function", target=aten.exp.default)


def untidy(program: Program) -> Program:
    """The same step with a no-op after every value and some dead code."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            origin, readers = node.meta["origin"], list(node.users)
            alias = program.call(aten.alias.default, node, origin=origin, before=node.next)
            program.call(aten.clone.default, node, origin=origin, before=alias.next)
            for reader in readers:
                reader.replace_input_with(node, alias)
    return program


@few_examples(15)
@given(recipes())
def test_a_tidy_step_computes_the_same_and_holds_no_more_than_it_needs(recipe: Recipe) -> None:
    captured = build(recipe)
    inputs = values_for(captured)
    expected = run_ranks(captured, inputs)
    tidy = Tidy()(untidy(build(recipe)))
    assert_identical(run_ranks(tidy, inputs), expected)
    assert tidy.text() == Tidy()(captured).text()
    assert {what for _, what in tidy.placeholders()} == {what for _, what in captured.placeholders()}


def test_a_copy_whose_strides_are_not_those_of_what_it_copies_stays() -> None:
    """In a dimension of one element any stride will do, and torch makes one of its own."""
    flat, row = Param((7,), "trained", 0, low=False, shares=True, tied=True, again=True), (1, 5)
    params = (
        flat,
        Param(row, "frozen", 0, low=False, shares=False),
        Param(row, "trained", 0, low=True, shares=False, again=True),
        Param((7,), "trained", 0, low=False, shares=False, tied=True),
        Param(row, "trained", 0, low=False, shares=False, tied=True, reads=("contiguous",), narrow=True),
        Param((), "trained", 0, low=True, shares=False, again=True),
    )
    states = (("zeros_like", ("scaled", ("copy", ("g",), ("g",)))), ("copy", ("zeros", ("m1",)), ("square", ("m1",))))
    rule = Rule(("p",), states, count=True, keeps=False)
    recipe = Recipe(params, (rule,), backward=(5, 1, 3, 2, 0, 4), first=True, random=True)
    captured = accumulated(build(recipe), 3, weighted=True)
    assert_same_step(rewritten(captured, 3, 4), captured)
