"""Large matrices are gathered, and their gradients made, a tile at a time: the same step, and less of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zgraph
from tests.models import GPT
from tests.programs import TableAndHead, assert_close, few_examples, language_model, reference, values_for
from tests.ranks import Ranks
from tests.test_liveness import assert_counts_agree
from zgraph import ops, placement, runtime
from zgraph.config import Config
from zgraph.errors import OptionError, VerifyError, ZgraphError
from zgraph.layout import ALIGN
from zgraph.liveness import alive_bytes, lifetimes
from zgraph.lockstep import run_ranks
from zgraph.passes import default_passes, overwrite
from zgraph.pipeline import run
from zgraph.program import Input, Mesh, Program, Role, operand
from zgraph.reference import divide, join
from zgraph.verify import verify

aten = torch.ops.aten

ROW = 16 * 8
"""Bytes of a row of sixteen numbers, so that parts of ranks need no padding."""


@pytest.fixture(autouse=True)
def _small_values_count() -> Iterator[None]:
    with mock.patch.object(overwrite, "SMALLEST_BYTES", 1), mock.patch.object(placement, "SMALLEST_BYTES", 1):
        yield


def values_of(captured: Program, shape: TableAndHead, world: int) -> list[dict[Any, Any]]:
    """Inputs of each rank."""
    inputs = values_for(captured, world=world)
    generator = torch.Generator().manual_seed(1)
    for mine in inputs:
        mine[Input(Role.BATCH, "0")] = torch.randint(shape.rows, (shape.tokens,), generator=generator)
    return inputs  # type: ignore[return-value]


def tiled(captured: Program, tile_bytes: int | None, mesh: Mesh, **options: Any) -> Program:
    config = Config(3, 1, tile_bytes=tile_bytes, **options)
    return run(default_passes(config, mesh), captured).program


def calls(program: Program) -> str:
    """What communicates and multiplies, each with its shape."""
    kinds = (ops.all_gather, ops.reduce_scatter, aten.mm.default, aten.embedding_dense_backward.default)
    kinds += (ops.product_columns, torch.ops.zgraph.product_columns.out, ops.embedding_rows_backward)
    lines = []
    for node in program.graph.nodes:
        if node.target in kinds:
            numbers = [arg for arg in node.args if isinstance(arg, int)]
            name = node.target._schema.name.partition("::")[2] + ("" if "out" not in node.kwargs else " over")
            origin = node.meta["origin"]
            lines.append(f"{origin.phase.value} {origin.module}: {name}{numbers} {list(node.meta['val'].shape)}")
    return "\n".join(lines)


def test_each_rank_sends_some_of_its_rows_or_some_columns_of_all_of_them() -> None:
    program = tiled(language_model(TableAndHead(3, 8, 16)), 4 * ROW, Mesh(2), prefetch=0)
    assert_expected_inline(
        calls(program),
        """\
forward bucket0: all_gather_into_tensor[2] [128]
forward bucket1: all_gather_into_tensor[2] [64]
forward head: product_columns[2, 0, 8] [3, 8]
forward bucket1: all_gather_into_tensor[2] [64]
forward head: product_columns over[2, 2, 8] [3, 8]
backward bucket1: all_gather_into_tensor[2] [64]
backward head: product_columns[1, 0, 16] [3, 16]
backward bucket1: all_gather_into_tensor[2] [64]
backward head: product_columns over[1, 8, 16] [3, 16]
backward head: mm[] [4, 16]
backward bucket1: reduce_scatter_tensor[2] [32]
backward head: mm[] [4, 16]
backward bucket1: reduce_scatter_tensor[2] [32]
backward table: embedding_rows_backward[8, 2, 0, 2] [4, 16]
backward bucket0: reduce_scatter_tensor[2] [32]
backward table: embedding_rows_backward[8, 2, 2, 2] [4, 16]
backward bucket0: reduce_scatter_tensor[2] [32]""",
    )


@few_examples(40)
@given(
    st.builds(
        TableAndHead,
        tokens=st.integers(1, 5),
        rows=st.sampled_from([16, 32, 48, 64]),
        columns=st.sampled_from([1, 3, 16, 17, 32]),
        turned=st.booleans(),
    ),
    st.sampled_from([Mesh(2), Mesh(4), Mesh(4, shard=2), Mesh(1)]),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([{}, {"memory_first": True}]),
)
def test_the_ranks_of_any_such_step_compute_the_same(
    shape: TableAndHead, mesh: Mesh, tile: int, late: bool, options: dict[str, Any]
) -> None:
    """Up to rounding: a library may add up otherwise for a tile of one column."""
    captured = language_model(shape)
    program = tiled(captured, tile * ROW, mesh, **options)
    inputs = values_of(captured, shape, mesh.size)
    found = join(program, run_ranks(program, divide(program, inputs), late=late))
    assert_close(found, reference(captured, inputs))
    smallest = mesh.shard_size * max(shape.rows, shape.columns) * 8
    rows_of_head = shape.columns if shape.turned else shape.rows
    is_padded = shape.rows * shape.columns % (mesh.shard_size * ALIGN) != 0
    sends = [node for node in program.graph.nodes if node.target in (ops.all_gather, ops.reduce_scatter)]
    for node in sends:
        is_of_table = node.meta["origin"].module == "bucket0"
        is_whole = is_padded or (shape.rows if is_of_table else rows_of_head) % mesh.shard_size != 0
        is_whole |= is_of_table and node.target is ops.all_gather  # forward reads a table whole
        if not is_whole:
            most = max(n.meta["val"].nbytes for n in (node, *node.all_input_nodes))
            assert most <= max(tile * ROW, smallest)


def of_one_matrix(program: Program) -> set[tuple[int, ...]]:
    """Blocks and columns of the products of a head that are made a tile at a time."""
    made = program.graph.find_nodes(op="call_function", target=ops.product_columns)
    return {(node.args[3], node.args[5]) for node in made}


def test_a_matrix_of_one_column_is_read_as_it_lies() -> None:
    """It has the same strides as the row that it is in forward."""
    captured = language_model(TableAndHead(3, 64, 1))
    program = tiled(captured, 16 * 8, Mesh(2))
    assert (2, 64) in of_one_matrix(program), "forward"
    inputs = values_of(captured, TableAndHead(3, 64, 1), 2)
    assert_close(join(program, run_ranks(program, divide(program, inputs))), reference(captured, inputs))


def test_columns_lie_beside_each_other_in_one_matrix() -> None:
    program = tiled(language_model(TableAndHead(3, 16, 16)), 2 * ROW, Mesh(2))
    made = [n for n in program.graph.nodes if ops.allocating(n.target) is ops.product_columns]
    first = [n for n in made if n.args[0] is None]
    assert len(first) == 2, "one in forward, one in backward"
    assert all(n.kwargs.get("out") is n.args[0] for n in made if n not in first)


# How much is there


def held_bytes(program: Program) -> int:
    """At the peak, without what is there throughout."""
    return max(held_at(program))


def held_at(program: Program) -> list[int]:
    return [held for _, held in alive_bytes(program, staged=False)]


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_held_is_what_running_holds_and_less_of_it(turned: bool) -> None:
    shape = TableAndHead(4, 64, 64, turned)
    captured = language_model(shape)
    whole, parts = (tiled(captured, tile_bytes, Mesh(2), in_flight=0) for tile_bytes in (None, 4 * 64 * 8))
    assert_counts_agree(parts)
    matrix, tokens = 64 * 64 * 8, 4 * 64 * 8
    assert held_bytes(whole) >= 2 * matrix, "a matrix, and before it is divided its gradient"
    of_table = held_at(parts)[: next(i for i, n in enumerate(parts.graph.nodes) if n.target is ops.product_columns)]
    assert max(of_table) >= matrix, "forward looks rows up in the whole table"
    assert max(held_at(parts)[len(of_table) :]) < 1.25 * matrix + 6 * tokens


def test_a_tile_that_is_stored_in_several_blocks_is_in_memory_once_more() -> None:
    program = tiled(language_model(TableAndHead(4, 64, 64)), 4 * 64 * 8, Mesh(2))
    beside = [life for life in lifetimes(program) if life.is_beside and ops.scratch_bytes(life.node)]
    assert {(life.num_bytes, life.last - life.first) for life in beside} == {(4 * 4 * 8, 0)}
    assert len(beside) == 16, "of forward, whose tiles are of rows"


# What is left as it is


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.table(tokens), self.table.weight).square().mean()


def kinds(model: nn.Module, batch: torch.Tensor, **options: Any) -> set[str]:
    """Of the gathers and reductions of a step, which phases do less than a whole bucket at a time."""
    ranks = zgraph.simulate_ranks(model, torch.optim.SGD(model.parameters(), lr=0.1), world_size=2, **options)
    ranks.train_step([(batch,), (batch,)])
    layout = ranks.program.layout
    assert layout is not None
    found = set()
    for node in ranks.program.graph.nodes:
        if node.target in (ops.all_gather, ops.reduce_scatter):
            whole = node if node.target is ops.all_gather else operand(node)
            if whole.meta["val"].numel() < min(bucket.numel for bucket in layout.buckets):
                found.add(f"{node.meta['origin'].phase.value} {node.target._opname.partition('_')[0]}")
    return found


def test_what_reads_a_matrix_otherwise_keeps_it_whole() -> None:
    """Forward of a tied table reads rows of it; its gradient is the sum of two."""
    tokens = torch.arange(8)
    options = {"bucket_bytes": 1, "tile_bytes": 1024}
    assert kinds(Tied(), tokens, **options) == {"backward all"}
    with_bias = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))
    loss = {"loss": lambda y, _: y.square().mean()}
    assert "forward all" not in kinds(with_bias, tokens, **options, **loss), "a bias is added within the product"
    without = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64, bias=False))
    assert kinds(without, tokens, **options, **loss) == {"forward all", "backward all", "backward reduce"}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(TableAndHead(3, 9, 16), id="rows that ranks cannot divide"),
        pytest.param(TableAndHead(3, 6, 8), id="parts that need padding"),
        pytest.param(TableAndHead(3, 16, 16), id="no more than a tile"),
    ],
)
def test_a_matrix_that_does_not_divide_into_tiles_stays_whole(shape: TableAndHead) -> None:
    captured = language_model(shape)
    assert tiled(captured, 16 * ROW, Mesh(2)).text() == tiled(captured, None, Mesh(2)).text()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"zero": 2}, "tile_bytes=1024 with zero=2, where parameters are whole"),
        (
            {"keep_gathered": True, "accumulate": 2},
            "tile_bytes=1024 with keep_gathered=True, which is for whole buckets",
        ),
        ({"secondary_size": 2}, "with secondary_size=2"),
        ({"gather_precision": "bf16"}, "with gather_precision='bf16'"),
        ({"reduce_precision": "int8"}, "with reduce_precision='int8'"),
        ({"tile_bytes": 0}, "tile_bytes"),
        ({"tile_bytes": "much"}, "tile_bytes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        Config.from_options({"tile_bytes": "1KiB", **options})


# With all else


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "clip_norm": 0.1},
        {"recompute": "blocks", "shard_size": 2},
        {"precision": "bf16", "ema": 0.9},
        {"kernels": "zgraph", "memory_first": True},
        {"state_precision": "int8"},
    ],
)
def test_a_language_model_trains_as_without(options: dict[str, Any]) -> None:
    found = []
    for tile_bytes in (None, 2048):
        torch.manual_seed(0)
        model = GPT(width=32, vocab=64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ranks = zgraph.simulate_ranks(
            model, optimizer, world_size=4, bucket_bytes=4096, tile_bytes=tile_bytes, **options
        )
        batches = [torch.arange(8 * 11).view(8, 11) % 64 + rank for rank in range(4)]
        parts = [(tokens[:, :-1] % 64, tokens[:, 1:] % 64) for tokens in batches]
        losses = [ranks.train_step(parts) for _ in range(3)]
        found.append((losses, model.state_dict()))
        targets = {ops.allocating(node.target) for node in ranks.program.graph.nodes if node.op == "call_function"}
        assert {ops.product_columns, ops.embedding_rows_backward} <= targets or tile_bytes is None
    bound = 2e-2 if options.get("precision") == "bf16" else 1e-4
    torch.testing.assert_close(found[1][0], found[0][0], rtol=bound, atol=bound)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=bound, atol=bound, msg=name)


def test_a_tile_in_the_wrong_place_is_refused() -> None:
    captured = language_model(TableAndHead(4, 16, 16))
    program = tiled(captured, 4 * ROW, Mesh(2))
    verify(program, after="nothing", reference=captured)
    first, second, *_ = [n for n in program.graph.nodes if ops.allocating(n.target) is ops.product_columns]
    assert (first.args[4], second.args[4]) == (0, 2)
    second.args = (*second.args[:4], 4, *second.args[5:])
    with pytest.raises(VerifyError, match="changed what the step computes"):
        verify(program, after="a mistake", reference=captured)


# The operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_blocks", [1, 2, 8])
def test_columns_are_those_of_the_whole_product_and_others_stay(dtype: torch.dtype, num_blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rest, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 64), (6, 32)))
    w = torch.randn(32, 64, generator=generator).to(dtype)
    each, start, width = 64 // num_blocks, 3, 4
    at = [block * each + start + column for block in range(num_blocks) for column in range(width)]
    expected = rest.clone()
    expected[:, at] = (x.double() @ w.double()).to(dtype)[:, at]
    given = (rest, x, w[:, at], num_blocks, start, 64)
    bound = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(ops.product_columns(*given), expected, rtol=bound, atol=bound)
    over, others = rest.clone(), [column for column in range(64) if column not in at]
    assert torch.ops.zgraph.product_columns.out(over, *given[1:], out=over) is over
    torch.testing.assert_close(over, expected, rtol=bound, atol=bound)
    assert torch.equal(over[:, others], rest[:, others])


def test_rows_of_a_tables_gradient_are_those_of_the_whole_one() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(48, (5, 7), generator=generator)
    gradient = torch.randn(5, 7, 3, generator=generator)
    whole = aten.embedding_dense_backward(gradient, indices, 48, -1, False).view(4, 12, 3)
    for start, width in ((0, 5), (5, 7), (0, 12), (11, 1)):
        rows = ops.embedding_rows_backward(gradient, indices, 48, 4, start, width)
        assert torch.equal(rows, whole[:, start : start + width].reshape(-1, 3))


def test_a_tile_without_a_place_is_refused() -> None:
    x, tile = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")
    for num_blocks, start, num_columns in ((1, 5, 8), (3, 0, 9), (2, 0, 7), (2, 3, 8), (1, -1, 8)):
        with pytest.raises(ZgraphError, match=r"a tile of 4 columns in \d blocks from -?\d on has no place"):
            ops.product_columns(None, x, tile, num_blocks, start, num_columns)
    with pytest.raises(ZgraphError, match="2 rows from 3 on in 2 blocks are no rows of 8"):
        ops.embedding_rows_backward(x, torch.empty(2, dtype=torch.int64, device="meta"), 8, 2, 3, 2)


class OfSomeColumns(torch.nn.Module):
    """A head of a part of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(16, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x[:, :16]).square().mean()  # type: ignore[no-any-return]


def test_of_a_slice_of_columns_gradients_are_made_whole() -> None:
    found = []
    for tile_bytes in (None, 1024):
        torch.manual_seed(0)
        model = OfSomeColumns()
        options: dict[str, Any] = {"bucket_bytes": 1, "tile_bytes": tile_bytes}
        ranks = zgraph.simulate_ranks(model, torch.optim.SGD(model.parameters(), lr=0.1), world_size=2, **options)
        losses = [ranks.train_step([(torch.randn(8, 32),), (torch.randn(8, 32),)]) for _ in range(2)]
        found.append((losses, ranks.state_dict()))
    assert of_one_matrix(ranks.program), "forward is tiled"
    torch.testing.assert_close(found[0], found[1])


def untiled(tile_bytes: int) -> list[str]:
    """What is logged of a model of one matrix of 16 KiB."""
    found: list[str] = []
    model = nn.Linear(64, 64)
    with mock.patch.object(runtime.log, "warning", lambda text, *args: found.append(text % args)):
        given: dict[str, Any] = {"bucket_bytes": 1, "tile_bytes": tile_bytes, "loss": lambda y, _: y.square().mean()}
        zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)
        model.train_step(torch.ones(2, 64))
    return found


@pytest.mark.slow
def test_tiles_of_nothing_are_told_once(ranks: Ranks) -> None:
    (told,), nothing = ranks.run(untiled, 2**20)
    assert "tile_bytes=1048576 tiles nothing" in told
    assert nothing == []
    assert ranks.run(untiled, 2**10)[0] == []
