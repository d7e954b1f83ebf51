"""All ranks of a program in one process: what collectives bring, when they bring it, and who failed."""

from __future__ import annotations

import pytest
import torch

from tests.programs import Builder, divide, two_layers, values_for
from zgraph import lockstep, ops
from zgraph.config import Config
from zgraph.errors import RankError
from zgraph.generators import RandomStream
from zgraph.layout import Layout, ParamSpec, make_buckets
from zgraph.lockstep import Values, run_ranks
from zgraph.passes import default_passes
from zgraph.pipeline import run as run_passes
from zgraph.program import Input, Mesh, Program, Role

aten = torch.ops.aten

X = Input(Role.BATCH, "0")


def collective(target: object, *args: object) -> Program:
    """The loss is what a collective makes of a vector of four."""
    b = Builder()
    start = b.forward(target, b.input(Role.BATCH, "0", shape=[4]), *args)
    return b.finish({None: b.forward(ops.wait, start)})


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (collective(ops.all_reduce, "sum", "data"), [[10.0, 12, 14, 16], [10, 12, 14, 16]]),
        (collective(ops.all_reduce, "avg", "data"), [[5.0, 6, 7, 8], [5, 6, 7, 8]]),
        (collective(ops.reduce_scatter, "sum", 2, "data"), [[10.0, 12], [14, 16]]),
        (collective(ops.reduce_scatter, "avg", 2, "data"), [[5.0, 6], [7, 8]]),
        (collective(ops.all_gather, 2, "data"), [[1.0, 2, 3, 4, 9, 10, 11, 12]] * 2),
        (collective(ops.all_to_all, [2, 2], [2, 2], "data"), [[1.0, 2, 9, 10], [3, 4, 11, 12]]),
    ],
    ids=["all-reduce sum", "all-reduce avg", "reduce-scatter sum", "reduce-scatter avg", "all-gather", "all-to-all"],
)
@pytest.mark.parametrize("late", [False, True])
def test_every_rank_receives_its_part_of_what_all_have_sent(
    program: Program, expected: list[list[float]], late: bool
) -> None:
    inputs: list[Values] = [{X: torch.tensor([1.0, 2, 3, 4])}, {X: torch.tensor([9.0, 10, 11, 12])}]
    for found, value in zip(run_ranks(program, inputs, late=late), expected, strict=True):
        assert torch.as_tensor(found[None]).tolist() == value


def test_means_are_summed_in_rank_order() -> None:
    inputs: list[Values] = [{X: torch.full([4], value)} for value in (1.0, 2.0**-24, 2.0**-24)]
    (found, *_) = run_ranks(collective(ops.all_reduce, "sum", "data"), inputs)
    assert torch.equal(torch.as_tensor(found[None]), torch.ones(4)), "added the other way around it is more than one"


def test_each_rank_draws_from_its_own_stream_and_the_process_draws_on_as_if_nothing_had() -> None:
    b = Builder()
    drawn = b.forward(aten.bernoulli.p, b.input(Role.BATCH, "0", shape=[40]), 0.5)
    program = b.finish({None: drawn})
    inputs: list[Values] = [{X: torch.zeros(40)}] * 2
    streams = [RandomStream(7), RandomStream(9)]
    before = torch.get_rng_state()
    first, second = (run_ranks(program, inputs, streams=streams) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for rank, seed in enumerate((7, 9)):
        torch.manual_seed(seed)
        for found in (first, second):
            expected = torch.bernoulli(torch.zeros(40), 0.5)
            assert torch.equal(torch.as_tensor(found[rank][None]), expected)


def test_a_copied_stream_draws_the_same_and_leaves_the_first_where_it_is() -> None:
    stream, cpu = RandomStream(3), torch.device("cpu")
    with stream.drawn_from(cpu):
        torch.rand(5)
    found = []
    for each in (stream.copy(), stream.copy(), stream):
        with each.drawn_from(cpu):
            found.append(torch.rand(5))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_operator_that_fails_names_its_rank_and_the_users_line() -> None:
    b = Builder()
    table, index = b.input(Role.BATCH, "0", shape=[3, 2]), b.input(Role.BATCH, "1", shape=[1], dtype=torch.int64)
    program = b.finish({None: b.forward(aten.embedding.default, table, index)})
    inputs: list[Values] = [{X: torch.zeros(3, 2), Input(Role.BATCH, "1"): torch.tensor([i])} for i in (0, 2, 3)]
    with pytest.raises(RankError, match=r"rank 2 failed in aten.embedding.default: IndexError") as refusal:
        run_ranks(program, inputs)
    assert (refusal.value.where or "").startswith("model.py:")
    assert isinstance(refusal.value.__cause__, IndexError)


@pytest.mark.parametrize("overwrite", [False, True])
def test_state_is_written_over_only_where_it_may_be(overwrite: bool) -> None:
    captured = two_layers()
    program = run_passes(default_passes(Config(0, 1), Mesh(2)), captured).program
    inputs = divide(program, values_for(captured, world=2))
    before = [{what: torch.as_tensor(value).clone() for what, value in mine.items()} for mine in inputs]
    run_ranks(program, inputs, overwrite=overwrite)
    for mine, old in zip(inputs, before, strict=True):
        for what, value in mine.items():
            is_state = what is not None and what.role in (Role.PARAM, Role.OPT_STATE)
            same = torch.as_tensor(value).nan_to_num().equal(old[what].nan_to_num())  # padding is NaN
            assert same == (not overwrite or not is_state), what


@pytest.mark.parametrize(("shard_params", "shard_state"), [(False, False), (False, True), (True, True)])
def test_divided_values_joined_are_the_same(shard_params: bool, shard_state: bool) -> None:
    shapes = {"a": (3, 5), "scale": (), "empty": (0, 3), "b": (2,)}
    cpu = torch.device("cpu")
    specs = [ParamSpec(name, shape, torch.float32, cpu, trainable=True) for name, shape in shapes.items()]
    specs.append(ParamSpec("table", (7,), torch.int8, cpu, trainable=False))
    layout = Layout(make_buckets(specs, 3, 10**6), 3, shard_params, shard_state)
    whole: Values = {Input(Role.PARAM, name): torch.randn(shape) for name, shape in shapes.items()}
    whole[Input(Role.PARAM, "table")] = torch.arange(7, dtype=torch.int8)
    for name, shape in shapes.items():
        whole[Input(Role.OPT_STATE, name, "m")] = torch.randn(shape)
        whole[Input(Role.OPT_STATE, name, "step")] = torch.tensor(3.0)
    whole[Input(Role.BUFFER, "seen")] = torch.randn(2)
    divided = lockstep.divide(layout, [whole] * 3, {what for what in whole if what and what.key == "m"})
    assert {tuple(torch.as_tensor(v).shape) for what, v in divided[0].items() if what and what.key == "step"} == {()}
    stored = divided[1][Input(Role.PARAM, layout.find("a")[0].name)]
    assert torch.as_tensor(stored).numel() == layout.param_numel(layout.find("a")[0])
    for joined in lockstep.join(layout, divided):
        assert joined.keys() == whole.keys()
        assert all(torch.as_tensor(joined[what]).equal(torch.as_tensor(value)) for what, value in whole.items())
