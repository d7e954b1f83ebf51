"""What is called replicated is the same on all ranks, whatever the passes made of a step."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import accumulated, divide, few_examples, one_layer, values_for
from tests.recipes import Recipe, build, recipes
from zgraph import ops
from zgraph.config import Config
from zgraph.lockstep import run_ranks
from zgraph.machines import assumed_cpu
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Input, Program, Role, Stage
from zgraph.spread import Spread, spread_of

CPU = replace(assumed_cpu(2, 2**33), reads_peers=False)


def lowered(
    captured: Program, world: int, zero: int, shard_size: int | None = None, *, is_one_host: bool = False
) -> Program:
    config, machine = Config(zero=zero, bucket_bytes=64, shard_size=shard_size), replace(CPU, reads_peers=is_one_host)
    return run(default_passes(config, config.mesh(world), hardware=machine), captured).program


def told(program: Program) -> dict[str, str]:
    """How inputs lie, and results of collectives."""
    found = spread_of(program)
    return {str(node.meta.get("input", node.target)): found[node].value for node in found}


def test_state_is_divided_and_gathered_and_gradients_are_each_ranks_own_until_they_are_reduced() -> None:
    found = told(lowered(one_layer(), 2, 3))
    assert found["param:bucket0"] == found["opt_state:bucket0:m"] == "sharded"
    assert found["batch:0"] == "per rank"
    assert found["_c10d_functional.all_gather_into_tensor.default"] == "replicated"
    assert found["_c10d_functional.reduce_scatter_tensor.default"] == "sharded"
    assert told(lowered(one_layer(), 2, 3, is_one_host=True))["zgraph.share.default"] == "replicated"


def test_where_nodes_have_replicas_a_part_is_sharded_once_these_have_taken_the_mean_of_theirs() -> None:
    program = lowered(one_layer(), 4, 3, 2)
    found = spread_of(program)
    ((reduced, all_reduced),) = (
        (node, next(iter(next(iter(node.users)).users)))
        for node in program.graph.find_nodes(op="call_function", target=ops.reduce_scatter)
    )
    assert all_reduced.target is ops.all_reduce
    assert (found[reduced], found[all_reduced]) == (Spread.PER_RANK, Spread.SHARDED)


def test_a_step_of_one_rank_is_not_told_apart() -> None:
    assert spread_of(lowered(one_layer(), 1, 0)) == {}


@given(recipes(), st.sampled_from([(2, None), (3, None), (4, 2)]), st.sampled_from([0, 1, 2, 3]), st.booleans())
@few_examples(15)
def test_what_is_replicated_is_the_same_on_all_ranks_and_what_is_sharded_on_replicas(
    recipe: Recipe, ranks: tuple[int, int | None], zero: int, micro: bool
) -> None:
    captured = build(recipe)
    if micro:
        captured = accumulated(captured, 2)
    world, shard_size = ranks
    program = lowered(captured, world, zero, shard_size)
    assert program.stage >= Stage.SHARDED
    spread = spread_of(program)
    shown = [
        node
        for node, how in spread.items()
        if how is not Spread.PER_RANK
        and node.target not in ops.ASYNCHRONOUS
        and isinstance(node.meta["val"], torch.Tensor)
    ]
    results, outputs = program.results(), list(program.outputs)
    inputs = divide(program, values_for(captured, world=world))
    program.set_results([*results, *shown], [*outputs, *(Input(Role.HYPER, str(i)) for i in range(len(shown)))])
    ranks_have = run_ranks(program, inputs)
    for i, node in enumerate(shown):
        values = [mine[Input(Role.HYPER, str(i))] for mine in ranks_have]
        of_a_part = shard_size or world  # ranks so far apart have the same part
        for rank, value in enumerate(values):
            like = values[0] if spread[node] is Spread.REPLICATED else values[rank % of_a_part]
            torch.testing.assert_close(value, like, rtol=0, atol=0, equal_nan=True)
