"""Without in-place operators a graph computes the same, and says what it would have written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.programs import few_examples
from zgraph import functional
from zgraph.functional import make_functional
from zgraph.program import Input, Origin, Phase, Role

aten = torch.ops.aten

SHAPES = [(6,), (2, 3), (6,)]


class GraphBuilder:
    """A graph of ATen operators on fake tensors, as a trace would leave it."""

    def __init__(self, shapes: Sequence[Sequence[int]] = SHAPES) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.inputs = [self.graph.placeholder(f"x{i}") for i in range(len(shapes))]
        with self.mode:
            for node, shape in zip(self.inputs, shapes, strict=True):
                node.meta.update(val=torch.empty(shape, dtype=torch.float64), input=Input(Role.BUFFER, node.name))

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        node.meta["origin"] = Origin(Phase.FORWARD, "", f"model.py:{len(self.graph.nodes)} (forward)")
        return node


def run_graph(graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> Any:
    torch.manual_seed(0)
    return fx.Interpreter(torch.nn.Module(), graph=graph).run(*inputs)


def check(builder: GraphBuilder, results: list[fx.Node]) -> None:
    """The functional graph gives what the original returned and left in its inputs, and leaves its own inputs alone."""
    graph = builder.graph
    graph.output(results)
    values = [torch.randn(node.meta["val"].shape, dtype=torch.float64) for node in builder.inputs]
    written = [value.clone() for value in values]
    expected = [value.clone() for value in run_graph(graph, written)]
    origins = {node.meta["origin"] for node in graph.nodes if "origin" in node.meta}
    again, mutated = make_functional(graph, builder.mode)
    placeholders = list(again.find_nodes(op="placeholder"))
    assert [node.meta["input"].name for node in placeholders] == [node.name for node in builder.inputs]
    assert not [n for n in again.nodes if n.op == "call_function" and n.target is not operator.getitem
                and n.target._schema.is_mutable]  # fmt: skip
    assert {node.meta["origin"] for node in again.nodes if node.op == "call_function"} <= origins
    output = again.output_node()
    output.args = ([*output.args[0], *mutated.values()],)  # type: ignore[misc]
    again.lint()
    before = [value.clone() for value in values]
    found = run_graph(again, values)
    for value, unchanged in zip(values, before, strict=True):
        assert torch.equal(value, unchanged), "the functional graph writes to its inputs"
    new = dict(zip(mutated, found[len(expected) :], strict=True))
    for mine, theirs in zip(found, expected, strict=False):
        assert torch.equal(mine, theirs), f"{mine} is not {theirs}"
    for placeholder, value, final in zip(placeholders, values, written, strict=True):
        assert torch.equal(new.get(placeholder, value), final), f"{placeholder} ends as {final}"


@dataclass(frozen=True)
class Line:
    """One operator: its name, and two values by number, modulo how many there are."""

    name: str
    a: int
    b: int


_VIEWS = ["view", "slice", "select", "t", "unsqueeze", "detach"]
_PLAIN = ["add", "sin", "clone"]
_IN_PLACE = ["add_", "mul_", "copy_", "zero_", "relu_", "bernoulli_", "masked_fill_", "addcmul_"]

lines = st.builds(Line, st.sampled_from(_VIEWS + _PLAIN + 2 * _IN_PLACE), st.integers(0, 30), st.integers(0, 30))
programs = st.tuples(st.lists(lines, min_size=1, max_size=10), st.lists(st.integers(0, 30), min_size=1, max_size=4))


def write(program: tuple[list[Line], list[int]]) -> tuple[GraphBuilder, list[fx.Node]]:
    builder = GraphBuilder()
    call, values = builder.call, list(builder.inputs)
    root = {node: node for node in values}
    for line in program[0]:
        a, b = values[line.a % len(values)], values[line.b % len(values)]
        val = a.meta["val"]
        alike = b.meta["val"].shape == val.shape
        if not alike:
            b = a
        # Writing to memory that partly overlaps with what is read is an error in eager, too.
        apart = b if root[a] is not root[b] else call(aten.sin.default, a)
        match line.name:
            case "view" if val.is_contiguous():
                new = call(aten.view.default, a, [val.numel()])
            case "slice" if val.dim():
                new = call(aten.slice.Tensor, a, 0, 1, 9)
            case "select" if val.dim() and len(val):
                new = call(aten.select.int, a, 0, 0)
            case "t" if val.dim() == 2:
                new = call(aten.t.default, a)
            case "unsqueeze" if val.dim() < 2:
                new = call(aten.unsqueeze.default, a, 0)
            case "add":
                new = call(aten.add.Tensor, a, b)
            case "sin":
                new = call(aten.sin.default, a)
            case "clone":
                new = call(aten.clone.default, a)
            case "add_":
                new = call(aten.add_.Tensor, a, apart)
            case "mul_":
                new = call(aten.mul_.Tensor, a, 0.5)
            case "copy_":
                new = call(aten.copy_.default, a, apart)
            case "zero_":
                new = call(aten.zero_.default, a)
            case "relu_":
                new = call(aten.relu_.default, a)
            case "bernoulli_":
                new = call(aten.bernoulli_.float, a, 0.5)
            case "masked_fill_":
                new = call(aten.masked_fill_.Scalar, a, call(aten.gt.Scalar, apart, 0.0), 0.25)
            case "addcmul_":
                new = call(aten.addcmul_.default, a, apart, apart)
            case _:
                new = call(aten.detach.default, a)
        shares = line.name in _VIEWS or line.name in _IN_PLACE
        root[new] = root[a] if shares else new
        values.append(new)
    return builder, [values[index % len(values)] for index in program[1]]


@few_examples(60)
@given(programs)
def test_any_graph_without_its_in_place_operators_computes_the_same(program: tuple[list[Line], list[int]]) -> None:
    check(*write(program))


def test_writes_without_views_are_renamed_in_one_walk() -> None:
    builder = GraphBuilder([(6,)])
    x = builder.inputs[0]
    y = builder.call(aten.relu_.default, builder.call(aten.mul.Tensor, x, 2))
    builder.call(aten.add_.Tensor, x, y)
    with mock.patch.object(functional, "_retrace", side_effect=AssertionError("traced again")):
        check(builder, [y, builder.call(aten.add.Tensor, x, 1)])


@pytest.mark.parametrize("exponent", [2, torch.tensor(2.0)])
def test_a_power_in_place_has_a_twin_of_another_name(exponent: Any) -> None:
    """``pow_.Scalar(x, 2)`` is ``pow.Tensor_Scalar(x, 2)``, not ``pow.Scalar``, which is a number to the power of x."""
    b = GraphBuilder()
    args = (exponent,) if isinstance(exponent, int) else (b.inputs[2],)
    b.call(aten.pow_.Scalar if isinstance(exponent, int) else aten.pow_.Tensor, b.inputs[0], *args)
    b.graph.output([b.inputs[0]])
    graph, written = make_functional(b.graph, b.mode)
    inputs = [torch.rand(shape, dtype=torch.float64) for shape in SHAPES]
    graph.output_node().args = ([written[graph.find_nodes(op="placeholder")[0]]],)
    (found,) = run_graph(graph, inputs)
    assert torch.equal(found, inputs[0] ** (2 if isinstance(exponent, int) else inputs[2]))


def test_a_write_through_a_view_reaches_its_base_and_its_other_views() -> None:
    builder = GraphBuilder([(2, 3)])
    x = builder.inputs[0]
    column, row = builder.call(aten.select.int, x, 1, 0), builder.call(aten.select.int, x, 0, 0)
    builder.call(aten.zero_.default, column)
    check(builder, [x, row, builder.call(aten.add.Tensor, row, 1)])


@pytest.mark.parametrize("num_rows", [1, 2])
def test_what_is_written_between_gaps_has_none_out_of_place_nor_does_what_is_made_of_it(num_rows: int) -> None:
    """The gates of a GRU are such parts; how they are recorded to lie is how they do, whoever asks."""
    builder = GraphBuilder([(num_rows, 6)])
    parts = builder.call(aten.unsafe_split.Tensor, builder.call(aten.mul.Tensor, builder.inputs[0], 2), 3, 1)
    left = builder.call(aten.sigmoid_.default, builder.call(operator.getitem, parts, 0))
    assert left.meta["val"].stride() == (6, 1)
    made = builder.call(aten.add.Tensor, left, 1)
    check(builder, [left, made])
    assert left.meta["val"].stride() == made.meta["val"].stride() == (3, 1)
    assert left.meta["val"].untyped_storage().nbytes() == left.meta["val"].nbytes


def test_dropout_becomes_its_functional_twin_and_draws_the_same() -> None:
    builder = GraphBuilder([(6,)])
    mask = builder.call(aten.bernoulli_.float, builder.call(aten.empty_like.default, builder.inputs[0]), 0.5)
    check(builder, [builder.call(aten.mul.Tensor, builder.inputs[0], builder.call(aten.div_.Scalar, mask, 0.5))])


def test_dropout_on_transposed_memory_draws_in_the_order_of_memory_as_eager_does() -> None:
    builder = GraphBuilder([(7, 5)])
    empty = builder.call(aten.empty_like.default, builder.call(aten.t.default, builder.inputs[0]))
    mask = builder.call(aten.bernoulli_.float, empty)
    strides = mask.meta["val"].stride()
    assert strides == (1, 5)
    check(builder, [mask, builder.call(aten.mul.Tensor, mask, 2)])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_returns_its_running_statistics_as_new_values(training: bool) -> None:
    builder = GraphBuilder([(5, 3), (3,), (3,), (3,), (3,)])
    x, weight, bias, mean, var = builder.inputs
    normed = builder.call(aten.native_batch_norm.default, x, weight, bias, mean, builder.call(aten.abs.default, var),
                          training, 0.1, 1e-5)  # fmt: skip
    result = builder.call(operator.getitem, normed, 0)
    graph = builder.graph
    graph.output([result, builder.call(aten.mul.Tensor, mean, 2)])
    values = [torch.randn(node.meta["val"].shape, dtype=torch.float64) for node in builder.inputs]
    written = [value.clone() for value in values]
    expected = run_graph(graph, written)
    again, mutated = make_functional(graph, builder.mode)
    assert [node.name for node in mutated] == (["x3"] if training else [])
    again.output_node().args = ([*again.output_node().args[0], *mutated.values()],)  # type: ignore[misc]
    found = run_graph(again, values)
    for mine, theirs in zip(found, [*expected, *([written[3]] if training else [])], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(values[3], written[3]) != training


def test_a_graph_without_writes_is_left_alone() -> None:
    builder = GraphBuilder()
    builder.graph.output([builder.call(aten.sin.default, builder.inputs[0])])
    again, mutated = make_functional(builder.graph, builder.mode)
    assert again is builder.graph
    assert mutated == {}


def test_a_zero_tensor_without_memory_becomes_plain_zeros() -> None:
    """What few operators take: ``cat`` of it and a tensor with memory fails."""
    b = GraphBuilder()
    zero = b.call(aten._efficientzerotensor.default, [6])
    b.graph.output([zero])
    graph, _ = make_functional(b.graph, b.mode)
    (result,) = graph.output_node().args[0]
    assert result.target is aten.zeros.default
    with b.mode:
        torch.cat([result.meta["val"], b.inputs[0].meta["val"].float()])
