"""A fused region reads what comes from outside once and writes what is used outside once."""

from __future__ import annotations

import graphlib
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, few_examples
from zgraph.cost import Costs
from zgraph.footprint import footprint
from zgraph.fusion import FusedCosts, fuse, kernel_of, regions
from zgraph.program import Program, Role
from zgraph.which_hardware import find_hardware
from zgraph.work import NOTHING, num_bytes_of

aten = torch.ops.aten
MACHINE = find_hardware("H100")
SHAPE = (64, 32)
NUM_BYTES = 64 * 32 * 4


def moved(program: Program, *, fused: bool) -> int:
    """Bytes that the calls of a program read and write."""
    costs: Any = FusedCosts(program, MACHINE) if fused else Costs(program, MACHINE)
    return sum(w.num_bytes for node in program.graph.nodes for w in costs.of(node).works if w.unit != NOTHING)


class Chains:
    """A program that is built one call after another on float32 tensors of one shape."""

    def __init__(self, num_inputs: int = 1) -> None:
        self.builder = Builder()
        self.values = [
            self.builder.input(Role.BATCH, str(i), shape=SHAPE, dtype=torch.float32) for i in range(num_inputs)
        ]

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.builder.forward(target, *args)
        self.values.append(node)
        return node

    def returned(self, *results: fx.Node) -> Program:
        self.builder.program.set_results(list(results), [None] * len(results))
        return self.builder.program


def test_a_chain_reads_and_writes_once() -> None:
    chains = Chains(2)
    x, y = chains.values
    program = chains.returned(
        chains.call(aten.exp.default, chains.call(aten.mul.Tensor, chains.call(aten.neg.default, x), y))
    )
    (region,) = regions(program)
    assert (len(region.nodes), region.inputs, len(region.outputs)) == (3, (x, y), 1)
    assert moved(program, fused=True) == 3 * NUM_BYTES
    assert moved(program, fused=False) == 7 * NUM_BYTES
    assert kernel_of(region).flops == 2 * 64 * 32
    assert kernel_of(region).transcendentals == 64 * 32
    assert sum(FusedCosts(program, MACHINE).of(node).num_calls for node in program.graph.nodes) == 1


def test_a_product_parts_regions_though_what_surrounds_it_is_connected() -> None:
    chains = Chains()
    (x,) = chains.values
    first = chains.call(aten.neg.default, x)
    product = chains.call(aten.mm.default, first, chains.call(aten.t.default, first))
    row = chains.call(aten.sum.dim_IntList, product, [1], True)
    program = chains.returned(chains.call(aten.add.Tensor, first, row))
    assert [len(region.nodes) for region in regions(program)] == [1, 2]


def test_a_norm_of_rows_is_one_kernel_and_a_sum_of_columns_ends_one() -> None:
    chains = Chains()
    (x,) = chains.values
    rows = chains.call(aten.mean.dim, chains.call(aten.mul.Tensor, x, x), [1], True)
    scaled = chains.call(aten.mul.Tensor, x, chains.call(aten.rsqrt.default, rows))
    columns = chains.call(aten.sum.dim_IntList, scaled, [0], True)
    program = chains.returned(scaled, chains.call(aten.exp.default, columns))
    assert [len(region.nodes) for region in regions(program)] == [5, 1]


def test_what_is_cheap_to_compute_again_is_not_kept() -> None:
    chains = Chains()
    (x,) = chains.values
    wide = chains.call(aten._to_copy.default, chains.call(aten.mm.default, x, chains.call(aten.t.default, x)))
    product = chains.call(aten.mm.default, chains.call(aten.exp.default, wide), x)
    late = chains.call(aten.mul.Tensor, product, chains.call(aten.sum.dim_IntList, wide, [1], True))
    program = chains.returned(late)
    assert wide in fuse(program).internal
    plain, fused = footprint(program, staged=False), footprint(program, staged=False, fusion=fuse(program))
    assert fused.peak_bytes <= plain.peak_bytes


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Up to a dozen calls, each on what an earlier one has given."""
    chains = Chains(draw(st.integers(1, 3)))
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["unary", "binary", "rows", "columns", "product", "cast"]))
        first, second = (draw(st.sampled_from(chains.values)) for _ in range(2))
        if kind == "unary":
            chains.call(draw(st.sampled_from([aten.exp.default, aten.neg.default, aten.rsqrt.default])), first)
        elif kind == "binary":
            chains.call(aten.mul.Tensor, first, second)
        elif kind == "rows":
            chains.call(aten.mul.Tensor, first, chains.call(aten.sum.dim_IntList, second, [1], True))
            del chains.values[-2]
        elif kind == "columns":
            chains.call(aten.mul.Tensor, first, chains.call(aten.sum.dim_IntList, second, [0], True))
            del chains.values[-2]
        elif kind == "product":
            square = chains.call(aten.mm.default, first, chains.call(aten.t.default, second))
            chains.call(aten.mm.default, square, first)
            del chains.values[-4:-1]
        else:
            chains.call(aten.clone.default, first)
    results = draw(st.lists(st.sampled_from(chains.values), min_size=1, max_size=3, unique=True))
    return chains.returned(*results, chains.values[-1])


@given(programs())
@few_examples(60)
def test_fused_never_moves_more(program: Program) -> None:
    assert moved(program, fused=True) <= moved(program, fused=False)


@given(programs())
@few_examples(60)
def test_every_call_is_in_one_region_and_regions_can_be_put_in_order(program: Program) -> None:
    found = regions(program)
    home: dict[fx.Node, Any] = {node: index for index, region in enumerate(found) for node in region.nodes}
    assert len(home) == sum(len(region.nodes) for region in found)
    needs = graphlib.TopologicalSorter[Any]()
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if home.get(source, source) != home.get(node, node):
                needs.add(home.get(node, node), home.get(source, source))
    needs.prepare()  # raises where two regions wait for each other


@given(st.sampled_from([aten.exp.default, aten.neg.default, aten.clone.default]))
@few_examples(3)
def test_a_single_call_costs_what_it_costs(target: Any) -> None:
    chains = Chains()
    program = chains.returned(chains.call(target, *chains.values))
    (region,) = regions(program)
    assert kernel_of(region).num_bytes == moved(program, fused=False) == 2 * num_bytes_of(region.outputs[0].meta["val"])
    node = region.nodes[0]
    assert FusedCosts(program, MACHINE).of(node).seconds == Costs(program, MACHINE).of(node).seconds
