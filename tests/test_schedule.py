"""The cost model says when what travels is sent; what is held stays within a limit, and no value changes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from tests.mutants.steps import in_single_precision
from tests.programs import assert_same_step, blocks, clipped, few_examples, order, two_layers
from tests.recipes import Recipe, Reshuffle, build, recipes
from zgraph import ops
from zgraph.config import BUCKET_BYTES, IN_FLIGHT, Config
from zgraph.curves import Collective
from zgraph.hardware import Hardware
from zgraph.machines import assumed_cpu, preset
from zgraph.passes import Overlap, Schedule, default_passes
from zgraph.passes.bounds import Bounds
from zgraph.passes.schedule import GAIN, Holding, _costs, _put, _Step
from zgraph.pipeline import run
from zgraph.program import REPLICA, SHARD, Mesh, Phase, Program, Stage, operand
from zgraph.timeline import Timeline, least_s, play

aten = torch.ops.aten


def machine(link_s: float, device_type: str = "cuda") -> Hardware:
    """One whose every product takes about 4 us, and whose collectives take ``link_s`` seconds of any size."""
    gpu = replace(preset("H100"), launch_s=0.0, in_step={}, device_type=device_type)
    link = Collective(link_s, 0.0, 1e18)
    return replace(gpu, collectives=dict.fromkeys(gpu.collectives, link), devices_per_node=8)


SLOW, FAST = machine(1e-5), machine(1e-6)
CPU = machine(1e-5, "cpu")


def sharded(program: Program, zero: int = 3, world: int = 2, bucket_bytes: int = 1, **nodes: int) -> Program:
    """Ranks with nodes of ``shard`` ranks that divide state, or ``secondary`` that keep what forward has gathered."""
    config = Config(zero, bucket_bytes, secondary_size=nodes.get("secondary"))
    passes = default_passes(config, Mesh(world, **nodes))
    return run([p for p in passes if p.gives < Stage.SCHEDULED], program).program


def seconds(program: Program, hardware: Hardware) -> float:
    return play(program, hardware, cost_of=_costs(program, hardware).__getitem__).step_s


def peak(program: Program, hardware: Hardware) -> int:
    return max(Holding(program, staged=hardware.device_type == "cpu").now())


def with_nothing_in_flight(program: Program, hardware: Hardware) -> tuple[int, int]:
    """Bytes at the peak if nothing is in flight, and of an average bucket."""
    copy = program.clone()
    step = _Step(copy, hardware, _costs(copy, hardware))
    _put(copy, step.order())
    return peak(copy, hardware), step.bucket_bytes


def test_gathers_are_issued_while_others_compute_and_gradients_are_taken_up_when_they_have_arrived() -> None:
    assert_expected_inline(
        order(Schedule(SLOW, 2)(sharded(blocks(2)))),
        """\
all_gather 0
wait 0
all_gather 1
mm forward
wait 1
all_gather 2
mm forward
wait 2
all_gather 3
mm forward
wait 3
all_gather 3
mm forward
wait 3
mm backward
all_gather 2
mm backward
reduce_scatter 3
wait 2
mm backward
all_gather 1
mm backward
wait 3
update 3
reduce_scatter 2
wait 1
mm backward
mm backward
wait 2
update 2
reduce_scatter 1
mm backward
reduce_scatter 0
wait 1
update 1
wait 0
update 0
all_reduce loss
wait loss""",
    )


def test_ranks_that_would_issue_calls_in_another_order_have_another_digest() -> None:
    """By which they refuse to begin: a verifier sees one program, and cannot know what other ranks run."""
    program = sharded(blocks(2))
    orders = {order(made): made.digest() for made in (Schedule(SLOW, 0)(program), Schedule(SLOW, None)(program))}
    assert len(orders) == len(set(orders.values())) == 2


def test_without_room_only_what_raises_no_peak_is_in_flight() -> None:
    assert_expected_inline(
        order(Schedule(SLOW, 0)(sharded(two_layers()))),
        """\
all_gather 0
wait 0
all_gather 1
mm forward
wait 1
mm forward
all_gather 1
wait 1
mm backward
mm backward
reduce_scatter 1
mm backward
wait 1
update 1
update 1
reduce_scatter 0
wait 0
update 0
update 0
all_reduce loss
wait loss""",
    )


def test_where_nothing_is_hidden_nothing_is_in_flight() -> None:
    """A CPU's cores move what travels, so that sending early saves nothing and takes memory."""
    program = Schedule(CPU, None)(sharded(blocks(2)))
    calls = list(program.graph.nodes)
    starts = [node for node in calls if node.target in ops.STARTS and node.meta["origin"].phase is not Phase.UPDATE]
    assert len(starts) > 8
    for start in starts:
        assert next(iter(start.users)) is start.next
    assert order(program) == order(Overlap(0, 0)(sharded(blocks(2))))


def test_what_is_gathered_is_there_in_time_and_no_gather_stands_earlier_than_it_has_to() -> None:
    """Links that are ten times as fast need a tenth of the time ahead: here, one product."""
    program = sharded(blocks(4))
    step = _Step(program, FAST, _costs(program, FAST))
    _put(program, step.order())
    calls = step.order(math.inf, step.held_by_each(program, Holding(program, staged=False).now()))
    for wait in calls:
        if wait.target is ops.wait and operand(wait).target is ops.all_gather:
            between = calls[calls.index(operand(wait)) : calls.index(wait)]
            assert sum(node.target is aten.mm.default for node in between) <= 1


programs = st.tuples(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200]))
machines = st.sampled_from([SLOW, FAST, CPU, preset("H100")])


@pytest.mark.slow
@few_examples(20)
@given(programs, machines, st.sampled_from(IN_FLIGHT), st.booleans())
def test_the_order_changes_no_value_whenever_messages_travel(
    drawn: tuple[Recipe, int, int, int], hardware: Hardware, in_flight: int | None, late: bool
) -> None:
    recipe, *how = drawn
    captured = build(recipe)
    program = sharded(captured, *how)
    first, second = (Schedule(hardware, in_flight)(program) for _ in range(2))
    assert first.digest() == second.digest()
    assert_same_step(first, captured, late=late)


@pytest.mark.slow
@few_examples(12)
@given(programs, machines)
def test_more_in_flight_is_never_slower_and_never_beyond_its_limit(
    drawn: tuple[Recipe, int, int, int], hardware: Hardware
) -> None:
    recipe, *how = drawn
    program = sharded(build(recipe), *how)
    least_peak, bucket_bytes = with_nothing_in_flight(program, hardware)
    before = seconds(program, hardware) if peak(program, hardware) <= least_peak else float("inf")
    for in_flight in IN_FLIGHT:
        made = Schedule(hardware, in_flight)(program)
        found = seconds(made, hardware)
        least = least_s(made, hardware, cost_of=_costs(made, hardware).__getitem__)
        assert least * (1 - 1e-9) <= found <= before
        if in_flight is not None:
            assert peak(made, hardware) <= least_peak + in_flight * bucket_bytes
        before = found


def test_no_order_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[str] = []

    def look(program: Program, *args: Any, **how: Any) -> Timeline:
        played.append(program.text())
        return play(program, *args, **how)

    monkeypatch.setattr("zgraph.passes.schedule.play", look)
    run([Schedule(SLOW, None)], sharded(blocks(3)), prove=False)
    assert len(played) == len(set(played)) > 3


@given(recipes(), st.integers(0, 3), st.integers(0, 2**16), st.booleans())
@few_examples(8)
def test_what_is_held_is_told_of_one_order_after_another(recipe: Recipe, zero: int, seed: int, staged: bool) -> None:
    program = sharded(build(recipe), zero)
    holding = Holding(program, staged=staged)
    for each in (seed, seed + 1):
        Reshuffle(Stage.SHARDED, Stage.SHARDED, each).rewrite(program)
        assert holding.now() == Holding(program, staged=staged).now()


def test_memory_in_flight_is_taken_only_where_it_saves_time() -> None:
    program = sharded(blocks(4))
    least_peak, bucket_bytes = with_nothing_in_flight(program, SLOW)
    by_limit = [Schedule(SLOW, in_flight)(program) for in_flight in (0, 2)]
    peaks, times = [peak(each, SLOW) for each in by_limit], [seconds(each, SLOW) for each in by_limit]
    assert peaks[0] == least_peak < peaks[1] <= least_peak + 2 * bucket_bytes
    assert times[1] < times[0] * (1 - GAIN) < seconds(program, SLOW) * (1 - GAIN)


def test_what_a_node_has_reduced_sets_out_for_the_others_as_it_arrives() -> None:
    """Both axes have links of their own, so that the next reduction inside of the node goes on meanwhile."""
    captured = blocks(2)
    program = Schedule(SLOW, None)(sharded(captured, world=4, shard=2))
    assert_same_step(program, captured)
    assert_expected_inline(
        order(program).partition("mm backward")[2],
        """\

mm backward
reduce_scatter 3
wait 2
all_gather 1
mm backward
mm backward
reduce_scatter 2
wait 3
all_reduce 3
wait 1
mm backward
mm backward
reduce_scatter 1
wait 2
all_reduce 2
wait 3
update 3
mm backward
reduce_scatter 0
wait 1
all_reduce 1
wait 0
all_reduce 0
wait 2
update 2
wait 1
update 1
wait 0
update 0
all_reduce loss
wait loss""",
    )
    events = [event for event in play(program, SLOW).events if event.lane in (SHARD, REPLICA)]
    inside, between = ([(e.start_s, e.end_s) for e in events if e.lane == lane] for lane in (SHARD, REPLICA))
    assert any(a < d and c < b for a, b in inside for c, d in between)
    assert seconds(program, SLOW) <= min(
        seconds(Overlap(n, 2**62)(sharded(blocks(2), world=4, shard=2)), SLOW) for n in (0, 1, 2)
    )


@few_examples(12)
@given(
    recipes(),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 200]),
    machines,
    st.sampled_from(IN_FLIGHT),
    st.booleans(),
)
def test_the_order_with_nodes_changes_no_value(
    recipe: Recipe, zero: int, bucket_bytes: int, hardware: Hardware, in_flight: int | None, late: bool
) -> None:
    captured = build(recipe)
    for nodes in ({"shard": 2}, {"secondary": 2}) if zero == 3 else ({"shard": 2},):
        program = sharded(captured, zero, 4, bucket_bytes, **nodes)
        least_peak, num_bytes = with_nothing_in_flight(program, hardware)
        made = Schedule(hardware, in_flight)(program)
        assert_same_step(made, captured, late=late)
        assert in_flight is None or peak(made, hardware) <= least_peak + in_flight * num_bytes


def test_parts_that_are_kept_are_gathered_for_backward_no_earlier_than_forward_has_read_them() -> None:
    captured = blocks(2)
    program = Schedule(SLOW, None)(sharded(captured, world=4, secondary=2))
    assert_same_step(program, captured)
    assert_expected_inline(
        order(program).partition("wait 3")[2],
        """\

all_gather 3
mm forward
wait 3
all_gather 2
mm backward
mm backward
reduce_scatter 3
wait 2
all_gather 1
mm backward
mm backward
reduce_scatter 2
wait 3
update 3
wait 1
mm backward
mm backward
reduce_scatter 1
wait 2
update 2
mm backward
reduce_scatter 0
wait 1
update 1
wait 0
update 0
all_reduce loss
wait loss""",
    )


def test_a_step_with_a_norm_of_all_gradients_takes_gradients_up_as_they_arrive_and_updates_behind_it() -> None:
    captured = clipped(two_layers(), 1.0)
    program = Schedule(SLOW, 2)(sharded(captured))
    assert_same_step(program, captured)
    lines = order(program).partition("reduce_scatter 1")[2].splitlines()
    assert lines.index("wait 1") < lines.index("wait 0") < max(i for i, line in enumerate(lines) if line == "update 1")


@pytest.mark.parametrize("prefetch", [None, 0, 2])
def test_a_machine_schedules_and_an_integer_keeps_its_distance(prefetch: int | None) -> None:
    config = Config(prefetch=prefetch)
    passes = [p for p in default_passes(config, Mesh(2), hardware=SLOW) if p.gives is Stage.SCHEDULED]
    assert passes == [Schedule(SLOW, 2) if prefetch is None else Overlap(prefetch, BUCKET_BYTES)]
    without = [p for p in default_passes(config, Mesh(2)) if p.gives is Stage.SCHEDULED]
    assert without == [Overlap(1 if prefetch is None else prefetch, BUCKET_BYTES)]


def test_the_cost_model_says_where_buckets_end_on_several_gpus_that_are_known() -> None:
    def bounds(ranks: int, hardware: Hardware | None, **options: Any) -> Any:
        (form,) = (
            p for p in default_passes(Config(**options), Mesh(ranks), hardware=hardware) if p.name == "FormBuckets"
        )
        return form.bounds

    assert bounds(2, preset("H100")) == Bounds(preset("H100"), Mesh(2), 3)
    assert bounds(2, assumed_cpu(2, 2**34), bucket_bytes="auto") is not None
    for ranks, hardware, options in (
        (1, preset("H100"), {}),
        (2, None, {}),
        (2, assumed_cpu(2, 2**34), {}),
        (2, preset("H100"), {"bucket_bytes": 2**24}),
        (2, preset("H100"), {"prefetch": 1}),
    ):
        assert bounds(ranks, hardware, **options) is None


@pytest.mark.parametrize("gather_precision", [None, "bf16", "int8"])
def test_whatever_a_shard_becomes_before_it_travels_it_is_gathered_as_parameters_are(
    gather_precision: str | None,
) -> None:
    """Quantised, padding is set to zero before, so that what is sent is made of more than the shard."""
    config = Config(3, 1, gather_precision=gather_precision)
    passes = [p for p in default_passes(config, Mesh(2)) if p.gives < Stage.SCHEDULED]
    captured = in_single_precision()
    program = run(passes, captured).program
    padded = program.graph.find_nodes(op="call_function", target=aten.where.self)
    assert bool(padded) == (gather_precision == "int8")
    step = _Step(program, SLOW, _costs(program, SLOW))
    starts = program.graph.find_nodes(op="call_function", target=ops.all_gather)
    assert set(step.gathers) == set(starts)
    assert not {*step.sends} & {*starts}
