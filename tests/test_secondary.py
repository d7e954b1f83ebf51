"""What forward has gathered is kept within each node, from where backward gathers it: equal values, fewer links."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import assert_same_step, blocks, few_examples, two_layers
from tests.recipes import Recipe, build, recipes
from zgraph import ops
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.passes import KeepSecondaryShards, default_passes
from zgraph.pipeline import run
from zgraph.program import SECONDARY, Mesh, Phase, Program, operand
from zgraph.verify import verify

aten = torch.ops.aten
TWO_NODES = Mesh(4, secondary=2)


def rewritten(captured: Program, mesh: Mesh = TWO_NODES, bucket_bytes: int = 1, prefetch: int = 1) -> Program:
    config = Config(3, bucket_bytes, prefetch, secondary_size=mesh.secondary)
    return run(default_passes(config, mesh), captured).program


def gathers(program: Program) -> list[str]:
    """Phase, bucket, axis and number of ranks of each gather, in order of issue."""
    starts = program.graph.find_nodes(op="call_function", target=ops.all_gather)
    where = [start.meta["origin"] for start in starts]
    return [f"{o.phase.value} {o.module} {s.args[2]} {s.args[1]}" for o, s in zip(where, starts, strict=True)]


def test_backward_gathers_along_another_axis() -> None:
    assert_expected_inline(
        "\n".join(gathers(rewritten(two_layers()))),
        """\
forward bucket0 data 4
forward bucket1 data 4
backward bucket1 secondary 2""",
    )


def test_each_rank_keeps_its_part_of_the_node_and_lets_go_of_the_whole() -> None:
    program = rewritten(two_layers())
    [start] = [node for node in program.graph.nodes if node.target is ops.all_gather and SECONDARY in node.args]
    kept = operand(start)
    part = operand(kept)
    assert (kept.target, part.target) == (aten.clone.default, ops.shard)
    assert kept.meta["val"].numel() * 2 == operand(part).meta["val"].numel()
    readers = [user for user in operand(part).users if user.meta["origin"].phase is Phase.BACKWARD]
    assert not readers, "backward reads what it has gathered itself"


@few_examples(20)
@given(
    recipes(), st.sampled_from([Mesh(4, secondary=2), Mesh(6, secondary=3)]), st.sampled_from([1, 200]), st.booleans()
)
def test_the_ranks_of_any_step_compute_the_same(recipe: Recipe, mesh: Mesh, bucket_bytes: int, late: bool) -> None:
    captured = build(recipe)
    assert_same_step(rewritten(captured, mesh, bucket_bytes), captured, late=late)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_blocks_are_gathered_in_any_schedule(prefetch: int) -> None:
    captured = blocks()
    assert_same_step(rewritten(captured, prefetch=prefetch), captured)


def test_one_node_has_nothing_to_keep() -> None:
    one = rewritten(two_layers(), Mesh(4, secondary=4))
    assert one.text() == run(default_passes(Config(3, 1), Mesh(4)), two_layers()).program.text()


def test_a_part_that_is_put_together_along_another_axis_is_refused() -> None:
    """Two nodes of two: groups of both axes have as many ranks, so that only the meaning tells them apart."""
    captured = two_layers()
    passes = default_passes(Config(3, 1, secondary_size=2), Mesh(4, secondary=2))
    at = next(i for i, p in enumerate(passes) if isinstance(p, KeepSecondaryShards))
    program = run(passes[: at + 1], captured).program
    verify(program, after="nothing", reference=captured)
    part = next(node for node in program.graph.nodes if node.target is ops.shard and SECONDARY in node.args)
    start = next(node for node in program.graph.nodes if node.target is ops.all_gather and SECONDARY in node.args)
    for node in (part, start):
        node.args = (node.args[0], 2, "replica")
    with pytest.raises(VerifyError, match="is on axis 'replica' of a mesh whose axes are 'data', 'secondary'"):
        verify(program, after="a mistake", reference=captured)
    part.args, start.args = (part.args[0], 2, SECONDARY), (start.args[0], 2, SECONDARY)
    whole = operand(part)
    other = next(
        node
        for node in program.graph.nodes
        if node.target is ops.wait and operand(node).target is ops.all_gather and node is not whole
    )
    part.replace_input_with(whole, other)
    with pytest.raises(VerifyError, match="changed what the step computes"):
        verify(program, after="a mistake", reference=captured)
