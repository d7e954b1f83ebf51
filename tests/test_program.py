"""The representation: copies are independent, text and digest say what is computed and nothing else."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from torch import fx

from tests.programs import Builder, few_examples, param
from tests.recipes import Recipe, build, recipes
from zgraph.codegen.kernel import Kernel, region
from zgraph.layout import Layout, ParamSpec, make_buckets
from zgraph.program import (
    REPLICA,
    SHARD,
    Input,
    Mesh,
    Origin,
    Phase,
    Program,
    Role,
    Stage,
    describe,
    in_words,
    show,
    target_name,
    update_nodes,
)

aten = torch.ops.aten


def small(size: int = 3, *, factor: float = 2.0) -> Program:
    """loss = sum(x * w * factor); w' = w + lr * w."""
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[size]), b.input(Role.BATCH, "0", shape=[size])
    lr = b.input(Role.HYPER, "group0.lr")
    scaled = b.forward(aten.mul.Tensor, b.forward(aten.mul.Tensor, x, w), factor)
    loss = b.forward(aten.sum.default, scaled)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, w, alpha=lr, module="w")
    return b.finish({None: loss, param("w"): new})


def test_a_mesh_of_nodes_has_a_group_for_each_node_and_one_for_each_place_in_them() -> None:
    mesh = Mesh(6, shard=3)
    assert mesh.axes == {"data": 6, SHARD: 3, REPLICA: 2}
    assert [list(group) for group in mesh.groups(SHARD)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(group) for group in mesh.groups(REPLICA)] == [[0, 3], [1, 4], [2, 5]]
    assert [list(group) for group in mesh.groups("data")] == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("mesh", [Mesh(3), Mesh(3, shard=3), Mesh(3, shard=1), Mesh(1)])
def test_a_mesh_of_one_node_or_of_nodes_of_one_rank_has_one_axis(mesh: Mesh) -> None:
    assert mesh.axes == {"data": mesh.size}
    assert mesh.shard_axis == "data"


def test_text_shows_inputs_operators_results_and_on_request_origins() -> None:
    program = small()
    assert_expected_inline(
        program.text(),
        """\
%0: f64[3] = input param:w
%1: f64[3] = input batch:0
%2: float = input hyper:group0.lr
%3: f64[3] = aten.mul.Tensor(%1, %0)
%4: f64[3] = aten.mul.Tensor(%3, 2.0)
%5: f64[] = aten.sum.default(%4)
%6: f64[3] = aten.add.Tensor(%0, %0, alpha=%2)
return [%5, %6]  # loss, param:w""",
    )
    assert program.text(origins=True).splitlines()[-2].endswith("# update w model.py:7 (forward) [capture]")
    assert str(program) == program.text()


def test_a_clone_shares_no_node_and_changes_alone() -> None:
    program = small()
    text = program.text(origins=True)
    clone = program.clone()
    assert clone.text(origins=True) == text
    assert not set(clone.graph.nodes) & set(program.graph.nodes)
    assert all(source in set(clone.graph.nodes) for node in clone.graph.nodes for source in node.all_input_nodes)
    for node in clone.graph.nodes:
        node.meta["origin"] = Origin(Phase.FORWARD, "changed")
    clone.stage = Stage.INPLACE
    clone.constants["new"] = torch.ones(1)
    clone.init[Input(Role.OPT_STATE, "w", "new")] = None  # type: ignore[assignment]
    clone.outputs.pop()
    clone.graph.erase_node(clone.output_node)
    assert program.text(origins=True) == text
    assert (program.stage, program.constants, program.init, len(program.outputs)) == (Stage.CAPTURED, {}, {}, 2)


def test_text_does_not_depend_on_node_names() -> None:
    program = small()
    text = program.text(origins=True)
    for index, node in enumerate(program.graph.nodes):
        node._rename(f"other_name_{100 - index}")
    assert program.text(origins=True) == text


@few_examples(10)
@given(recipes())
def test_equal_programs_have_equal_digests(recipe: Recipe) -> None:
    assert build(recipe).digest() == build(recipe).digest() == build(recipe).clone().digest()


def other(arg: Any) -> Iterator[Any]:
    """Arguments that mean something else than ``arg``."""
    if isinstance(arg, (list, tuple)):
        yield [*arg, 1]
        for index, inner in enumerate(arg):
            yield from ([*arg[:index], changed, *arg[index + 1 :]] for changed in other(inner))
    elif isinstance(arg, torch.dtype):
        yield torch.float16
    elif isinstance(arg, (int, float)):
        yield arg + 1
        yield float(arg) if isinstance(arg, int) else arg * (1 + 2**-52)  # the last bit counts, and so does the type


@few_examples(5)
@given(recipes())
def test_any_changed_argument_changes_the_digest(recipe: Recipe) -> None:
    program = build(recipe)
    digests = [program.digest()]
    first = next(iter(program.graph.nodes))
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = node.args, node.kwargs
        for index, arg in enumerate(args):
            changes = [first] if isinstance(arg, fx.Node) and arg is not first else list(other(arg))
            for change in changes:
                node.args = (*args[:index], change, *args[index + 1 :])
                digests.append(program.digest())
        node.args = args
        for key, value in kwargs.items():
            for change in other(value):
                node.kwargs = {**kwargs, key: change}
                digests.append(program.digest())
        node.kwargs = kwargs
        target, node.target = node.target, aten.mm.default
        digests.append(program.digest())
        node.target = target
    assert program.digest() == digests[0]
    assert digests.count(digests[0]) == 1


def test_a_digest_covers_shapes_roles_results_and_layout_but_not_where_nodes_come_from() -> None:
    digest = small().digest()
    assert small(4).digest() != digest
    assert small(factor=2.5).digest() != digest
    program = small()
    node = next(iter(program.graph.nodes))
    node.meta["input"] = Input(Role.BUFFER, "w")
    assert program.digest() != digest
    program = small()
    program.set_results(program.results(), [None, param("v")])
    assert program.digest() != digest
    program = small()
    program.set_results(program.results()[::-1], program.outputs)
    assert program.digest() != digest
    program = small()
    spec = ParamSpec("w", (3,), torch.float64, torch.device("cpu"), True)
    program.layout = Layout(make_buckets([spec], 1, 64), 1)
    assert program.digest() != digest
    program = small()
    for node in program.graph.nodes:
        node.meta["origin"] = Origin(Phase.BACKWARD, "elsewhere", "/another/machine/model.py:1 (forward)")
    assert program.digest() == digest


def on_device(index: int) -> Program:
    """A program with a device among its literals and in its layout, as the rank that has that device makes it."""
    device = torch.device("cuda", index)
    program = small()
    node = next(node for node in program.graph.nodes if node.target is aten.sum.default)
    node.kwargs = {"device": device}
    spec = ParamSpec("w", (3,), torch.float64, device, True)
    program.layout = Layout(make_buckets([spec], 1, 64), 1)
    return program


def test_each_rank_may_have_a_device_of_its_own() -> None:
    assert on_device(0).digest() == on_device(1).digest()
    assert "device=cuda)" in on_device(1).text()
    program = on_device(0)
    program.layout = replace(program.layout, buckets=(replace(program.layout.buckets[0], device=torch.device("cpu")),))
    assert program.digest() != on_device(0).digest()


class Opaque:
    """It has no repr, so Python shows its address."""


def named() -> None:
    pass


def test_objects_are_shown_by_name_and_never_by_address() -> None:
    held = [Opaque(), Opaque(), named, Opaque.__init__, functools.partial(named), lambda: None, torch.Generator()]
    values = [*held, {"deep": (held[0], {3: held[1]})}, frozenset({named})]
    assert not [words for words in map(in_words, values) if "0x" in words]
    assert in_words(held[0]) == in_words(held[1]) != in_words(named)
    assert in_words(named) == f"{__name__}.named"
    assert show([held[0]], {}) == f"[{__name__}.Opaque]"
    assert target_name(functools.partial(named)) == "functools.partial"
    assert len({in_words(v) for v in (1, 1.0, True, "1", torch.float32, (1,), [1], {1: 1}, torch.tensor([1]))}) == 9


def test_a_call_infers_its_value_and_records_which_pass_made_it() -> None:
    program = small()
    x = program.inputs(Role.BATCH)["0", ""]
    origin = Origin(Phase.BACKWARD, "blocks.0", "model.py:3 (forward)")
    captured = program.call(aten.exp.default, x, origin=origin, before=program.output_node)
    with program.made_by("MyPass"):
        made = program.call(
            aten.sum.dim_IntList, x, [0], dtype=torch.float32, origin=origin, before=program.output_node
        )
    with pytest.raises(ZeroDivisionError), program.made_by("FailingPass"):
        raise ZeroDivisionError
    later = program.call(aten.exp.default, x, origin=origin, before=program.output_node)
    assert describe(captured.meta["val"]) == "f64[3]"
    assert describe(made.meta["val"]) == "f32[]"
    assert made.meta["origin"] == replace(origin, made_by="MyPass")
    assert captured.meta["origin"].made_by == later.meta["origin"].made_by == "capture"
    assert [node.next for node in (captured, made, later)] == [made, later, program.output_node]


def test_a_call_on_numbers_is_a_number_of_the_right_type() -> None:
    b = Builder()
    lr, step = b.input(Role.HYPER, "lr"), b.input(Role.OPT_STATE, "w", "step", shape=[], dtype=torch.int64)
    count = b.forward(aten._local_scalar_dense.default, step)
    expected = [
        (count, int), (b.forward(operator.add, count, 1), int), (b.forward(operator.mul, count, lr), float),
        (b.forward(operator.truediv, count, 3), float), (b.forward(torch.sym_sqrt, lr), float),
    ]  # fmt: skip
    for node, number in expected:
        assert type(node.meta["val"]) is number, node


def with_kernel(factor: float) -> Program:
    program = small(factor=factor)
    nodes = [node for node in program.graph.nodes if node.target is aten.mul.Tensor]
    body, outside = region(nodes, nodes[-1:])
    x, w = outside
    with program.graph.inserting_before(program.output_node):
        node = program.graph.call_function(Kernel("update_w", body, 2, (0,)), (x, w))
    node.meta.update(val=(x.meta["val"],), origin=Origin(Phase.UPDATE))
    return program


def test_the_text_holds_the_bodies_of_kernels() -> None:
    call = "update_w{%2 = aten.mul.Tensor(%0, %1); %3 = aten.mul.Tensor(%2, 2.0); return [%3] over [0]}(%1, %0)"
    assert with_kernel(2.0).text().splitlines()[-2] == f"%7: (f64[3]) = {call}"
    assert with_kernel(2.0).digest() == with_kernel(2.0).digest() != with_kernel(3.0).digest()


def test_update_nodes_are_grouped_by_what_they_serve() -> None:
    program = small()
    assert {name: [n.target for n in nodes] for name, nodes in update_nodes(program).items()} == {
        "w": [aten.add.Tensor]
    }
