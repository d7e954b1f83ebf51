"""What passes do to nodes directly is seen; what they leave alone is not looked at again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from tests.programs import two_layers
from zgraph.changes import Look
from zgraph.config import Config
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Phase, Program, Role, operand

aten = torch.ops.aten


def first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def new_arguments(node: fx.Node) -> list[fx.Node]:
    node.args = (*node.args,)
    return [node]


def new_target(node: fx.Node) -> list[fx.Node]:
    node.target = aten.matmul.default
    return [node]


def another_source(node: fx.Node) -> list[fx.Node]:
    node.replace_input_with(operand(node, 1), operand(node))
    return [node]


def new_value(node: fx.Node) -> list[fx.Node]:
    node.meta["val"] = torch.clone(node.meta["val"])
    return [node, *node.users]


def new_origin(node: fx.Node) -> list[fx.Node]:
    node.meta["origin"] = replace(node.meta["origin"], phase=Phase.UPDATE)
    return [node, *node.users]


@pytest.mark.parametrize("edit", [new_arguments, new_target, another_source, new_value, new_origin])
def test_an_edit_of_a_node_is_seen_and_nothing_else_is(edit: Callable[[fx.Node], list[fx.Node]]) -> None:
    program = two_layers()
    before = Look(program)
    assert list(before.touched) == list(program.graph.nodes)[:-1]
    assert not Look(program, before).touched
    touched = edit(first(program, aten.mm.default))
    order = list(program.graph.nodes)
    expected = sorted({*touched} - {program.output_node}, key=order.index)
    assert list(Look(program, before).touched) == expected


def test_readers_of_an_input_whose_value_a_pass_changed_are_looked_at() -> None:
    program = two_layers()
    before = Look(program)
    node = next(iter(program.inputs(Role.PARAM).values()))
    node.meta["val"] = torch.clone(node.meta["val"])
    assert set(Look(program, before).touched) == {node, *node.users} - {program.output_node}


def test_an_input_that_a_pass_gave_another_meaning_is_looked_at() -> None:
    program = two_layers()
    before = Look(program)
    node = next(iter(program.inputs(Role.PARAM).values()))
    node.meta["input"] = replace(node.meta["input"], name="other")
    assert node in Look(program, before).touched


def test_a_node_that_only_moves_is_not_looked_at() -> None:
    program = two_layers()
    before = Look(program)
    last = next(node for node in reversed(program.graph.nodes) if node.op == "call_function")
    program.output_node.prepend(last)
    assert not Look(program, before).touched


def test_the_first_node_that_reads_another_too_early_is_found() -> None:
    program = two_layers()
    assert Look(program).too_early is None
    node = first(program, aten.mm.default)
    reader = next(iter(node.users))
    reader.append(node)
    assert Look(program).too_early is reader


def test_a_kernel_is_always_looked_at_since_its_body_may_have_changed() -> None:
    program = run(default_passes(Config(zero=3), Mesh(2)), two_layers()).program
    again = Look(program, Look(program)).touched
    assert again
    assert {node for node in program.graph.nodes if hasattr(node.target, "body")} <= set(again)
