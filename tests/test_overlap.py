"""The order of nodes hides communication, keeps few buckets whole at once, and changes no value."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from tests.mutants.steps import read_in_low_precision
from tests.programs import assert_same_step, few_examples, order, two_layers
from tests.recipes import Recipe, Reshuffle, build, recipes
from zgraph import ops
from zgraph.config import Config
from zgraph.passes import Overlap, default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Phase, Program, Stage, operand

FAR = 10**9


def scheduled(program: Program, zero: int = 3, world: int = 2, bucket_bytes: int = 1, **options: int) -> Program:
    passes = default_passes(Config(zero, bucket_bytes), Mesh(world))
    before = [p for p in passes if p.gives < Stage.SCHEDULED]
    return run([*before, Overlap(**{"prefetch": 1, "limit_bytes": FAR, **options})], program).program


def test_gathers_start_one_ahead_and_reduced_gradients_are_taken_up_one_later() -> None:
    assert_expected_inline(
        order(scheduled(two_layers())),
        """\
all_gather 0
wait 0
all_gather 1
mm forward
wait 1
all_gather 1
mm forward
wait 1
mm backward
mm backward
reduce_scatter 1
mm backward
reduce_scatter 0
wait 1
update 1
update 1
wait 0
update 0
update 0
all_reduce loss
wait loss""",
    )


def test_without_prefetch_every_wait_follows_its_start() -> None:
    assert_expected_inline(
        order(scheduled(two_layers(), prefetch=0)),
        """\
all_gather 0
wait 0
mm forward
all_gather 1
wait 1
mm forward
all_gather 1
wait 1
mm backward
mm backward
reduce_scatter 1
wait 1
update 1
update 1
mm backward
reduce_scatter 0
wait 0
update 0
update 0
all_reduce loss
wait loss""",
    )


def test_buckets_over_the_limit_are_gathered_just_in_time() -> None:
    assert order(scheduled(two_layers(), limit_bytes=100)).splitlines()[:2] == ["all_gather 0", "wait 0"]
    assert order(scheduled(two_layers(), limit_bytes=32 * 8)) == order(scheduled(two_layers()))


def test_a_slice_is_cast_as_early_as_its_gather_starts() -> None:
    program = scheduled(read_in_low_precision())
    casts = [
        n for n in program.graph.nodes if n.target is torch.ops.aten._to_copy.default and n.args[0].op == "placeholder"
    ]
    slices = [cast for cast in casts if any(user.target is ops.all_gather for user in cast.users)]
    assert len(slices) == 5
    assert all(cast.next.target is ops.all_gather for cast in slices)
    assert order(program).splitlines()[:6] == [
        "all_gather 0", "wait 0", "all_gather 1", "mm forward", "wait 1", "all_gather 2",
    ]  # fmt: skip


def test_stage_1_shares_updated_parameters_until_the_very_end() -> None:
    assert_expected_inline(
        order(scheduled(two_layers(), zero=1)),
        """\
mm forward
mm forward
mm backward
all_reduce 1
mm backward
mm backward
all_reduce 0
wait 1
update 1
update 1
update 1
update 1
all_gather 1
wait 0
update 0
update 0
update 0
update 0
all_gather 0
all_reduce loss
wait 1
wait 0
wait loss""",
    )


programs = st.tuples(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200]), st.integers(0, 3))


def draw(drawn: tuple[Recipe, int, int, int, int]) -> tuple[Program, Program]:
    recipe, zero, world, bucket_bytes, prefetch = drawn
    captured = build(recipe)
    return captured, scheduled(captured, zero, world, bucket_bytes, prefetch=prefetch)


@few_examples(20)
@given(programs, st.booleans())
def test_the_order_changes_no_value_whenever_messages_travel(
    drawn: tuple[Recipe, int, int, int, int], late: bool
) -> None:
    captured, program = draw(drawn)
    assert_same_step(program, captured, late=late)


@few_examples(12)
@given(programs)
def test_no_more_gathers_are_in_flight_than_were_asked_for(drawn: tuple[Recipe, int, int, int, int]) -> None:
    _, program = draw(drawn)
    prefetch = max(drawn[-1], 1)
    in_flight = 0
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta["origin"].phase is Phase.UPDATE:
            continue
        if node.target is ops.all_gather:
            in_flight += 1
        elif node.target is ops.wait and operand(node).target is ops.all_gather:
            in_flight -= 1
        assert in_flight <= prefetch


@few_examples(20)
@given(recipes(), st.integers(0, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99))
def test_any_order_will_do_to_start_from(recipe: Recipe, zero: int, world: int, prefetch: int, seed: int) -> None:
    captured = build(recipe)
    before = [p for p in default_passes(Config(zero, 1), Mesh(world)) if p.gives < Stage.SCHEDULED]
    passes = [*before, Reshuffle(Stage.SHARDED, Stage.SHARDED, seed), Overlap(prefetch, FAR)]
    assert_same_step(run(passes, captured).program, captured)


def test_gathers_stand_before_their_first_readers_whatever_stood_between() -> None:
    before = [p for p in default_passes(Config(3, 1), Mesh(2)) if p.gives < Stage.SCHEDULED]

    def how_gathers_start(prefetch: int, seed: int) -> list[str]:
        passes = [*before, Reshuffle(Stage.SHARDED, Stage.SHARDED, seed), Overlap(prefetch, FAR)]
        program = run(passes, two_layers()).program
        return [
            "just in time" if operand(wait).next is wait else "early"
            for wait in program.graph.find_nodes(op="call_function", target=ops.wait)
            if operand(wait).target is ops.all_gather
        ]

    for seed in range(10):
        assert how_gathers_start(0, seed) == ["just in time"] * 3
        assert "early" in how_gathers_start(1, seed)


def test_gathers_start_in_the_order_of_their_waits_whatever_order_they_stood_in() -> None:
    before = [p for p in default_passes(Config(3, 1), Mesh(2)) if p.gives < Stage.SCHEDULED]
    for seed in range(10):
        passes = [*before, Reshuffle(Stage.SHARDED, Stage.SHARDED, seed), Overlap(2, FAR)]
        calls = list(run(passes, two_layers()).program.graph.nodes)
        starts = [node for node in calls if node.target is ops.all_gather]
        waits = [node for node in calls if node.target is ops.wait and operand(node) in starts]
        assert [operand(wait) for wait in waits] == starts
