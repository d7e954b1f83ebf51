"""When calls run on the lanes of a machine: closed forms for small graphs, and what must hold of any."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, fewer_examples, two_layers
from zgraph import ops
from zgraph.cost import Cost
from zgraph.hardware import Hardware
from zgraph.machines import preset
from zgraph.program import REPLICA, SHARD, Input, Mesh, Phase, Program, Role, operand
from zgraph.timeline import COMPUTE, ISSUE, Timeline, least_s, play
from zgraph.work import MATRIX, Work

aten = torch.ops.aten
AXIS = "data"

GPU = replace(preset("H100"), launch_s=0.0)
CPU = replace(GPU, device_type="cpu")
MACHINES = {"cuda": GPU, "cpu": CPU}


# Graphs in a word per call: "c" computes, "s" starts a collective, "w" waits for the oldest that nobody waited for


@dataclass(frozen=True)
class Step:
    """A graph, and the seconds of each call of it that takes time."""

    program: Program
    seconds: Mapping[fx.Node, float]

    def play(self, hardware: Hardware = GPU, *, factor: float = 1.0) -> Timeline:
        return play(self.program, hardware, cost_of=lambda node: cost_of(factor * self.seconds.get(node, 0.0), node))

    def least_s(self, hardware: Hardware) -> float:
        return least_s(self.program, hardware, cost_of=lambda node: cost_of(self.seconds.get(node, 0.0), node))


def cost_of(seconds: float, node: fx.Node) -> Cost:
    return Cost(seconds, () if node.target is ops.wait else (Work("made up"),))


def step(calls: str, seconds: Sequence[float]) -> Step:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4])
    program = b.finish({None: x})
    program.mesh = Mesh(2, AXIS)
    times = iter(seconds)
    found: dict[fx.Node, float] = {}
    started: list[fx.Node] = []
    for call in calls:
        if call == "w":
            b.forward(ops.wait, started.pop(0))
        elif call == "s":
            started.append(b.backward(ops.all_reduce, x, "sum", AXIS))
            found[started[-1]] = next(times)
        else:
            found[b.forward(aten.neg.default, x)] = next(times)
    return Step(program, found)


def ends(timeline: Timeline) -> list[float]:
    return [event.end_s for event in timeline.events]


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_compute_follow_one_another(machine: str) -> None:
    timeline = step("ccc", [1, 2, 4]).play(MACHINES[machine])
    assert ends(timeline) == [1, 3, 7]
    assert timeline.step_s == timeline.busy_s[COMPUTE] == 7
    assert timeline.exposed_s == timeline.starved_s == 0


def test_a_collective_that_takes_less_than_what_is_computed_meanwhile_costs_nothing() -> None:
    timeline = step("cscwc", [1, 3, 5, 2]).play(GPU)
    assert timeline.step_s == 1 + 5 + 2
    assert timeline.busy_s[AXIS] == 3
    assert timeline.exposed_s == 0


def test_what_a_collective_takes_longer_than_computing_is_exposed() -> None:
    timeline = step("cscwc", [1, 7, 5, 2]).play(GPU)
    assert timeline.step_s == 1 + 7 + 2
    assert timeline.exposed_s == 7 - 5
    wait = next(event for event in timeline.events if event.node.target is ops.wait)
    assert (wait.start_s, wait.end_s, wait.lane) == (6, 8, COMPUTE)


@pytest.mark.parametrize("sending", [3, 7])
def test_on_a_cpu_what_travels_takes_from_what_is_computed_meanwhile(sending: float) -> None:
    timeline = step("cscwc", [1, sending, 5, 2]).play(CPU)
    assert timeline.step_s == 1 + sending + 5 + 2
    assert timeline.exposed_s == sending


def test_collectives_of_one_group_take_turns() -> None:
    timeline = step("csscwcw", [1, 4, 4, 1, 1]).play()
    assert [(e.start_s, e.end_s) for e in timeline.events if e.lane == AXIS] == [(1, 5), (5, 9)]
    assert timeline.step_s == 9
    assert timeline.exposed_s == (5 - 2) + (9 - 6)


def test_collectives_of_unlike_axes_travel_at_once() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4])
    program = b.finish({None: x})
    program.mesh = Mesh(4, shard=2)
    inside, between = (b.backward(ops.all_reduce, x, "sum", axis) for axis in (SHARD, REPLICA))
    for start in (inside, between):
        b.forward(ops.wait, start)
    timeline = Step(program, {inside: 4.0, between: 3.0}).play()
    assert [(e.lane, e.start_s, e.end_s) for e in timeline.events[:2]] == [(SHARD, 0, 4), (REPLICA, 0, 3)]
    assert timeline.step_s == 4
    assert timeline.busy_s == {"issue": 0, SHARD: 4, REPLICA: 3}


def test_what_is_sent_has_been_computed() -> None:
    timeline = step("csw", [5, 1]).play()
    assert [(e.start_s, e.end_s) for e in timeline.events if e.lane == AXIS] == [(5, 6)]


def test_a_step_ends_with_the_last_collective_even_if_nothing_waits_for_it() -> None:
    timeline = step("cs", [1, 5]).play()
    assert timeline.step_s == 6
    assert timeline.exposed_s == 0


def test_before_a_gpu_a_host_that_is_slower_than_the_calls_sets_the_pace() -> None:
    timeline = step("c" * 100, [1] * 100).play(replace(GPU, launch_s=5))
    assert timeline.step_s == 100 * 5 + 1
    assert timeline.busy_s == {ISSUE: 500, COMPUTE: 100}
    assert timeline.starved_s == 5 + 99 * 4


def test_before_a_gpu_a_host_that_is_faster_costs_one_launch() -> None:
    timeline = step("c" * 100, [5] * 100).play(replace(GPU, launch_s=1))
    assert timeline.step_s == 1 + 100 * 5
    assert timeline.starved_s == 1


def test_on_a_cpu_every_launch_adds() -> None:
    timeline = step("ccscwc", [1, 1, 3, 1, 1]).play(replace(CPU, launch_s=0.5))
    # two calls, a start, one call, the three seconds that the collective takes, and one call
    assert timeline.step_s == 1.5 + 1.5 + 0.5 + 1.5 + 3 + 1.5
    assert timeline.busy_s == {ISSUE: 5 * 0.5, COMPUTE: 4, AXIS: 3}
    assert timeline.starved_s == 2.5
    assert timeline.exposed_s == 3


def test_a_second_in_which_the_host_is_late_is_not_exposed_as_well() -> None:
    """The collective has come back at 3, and computing goes on at 4, when the next call has been issued."""
    timeline = step("scwc", [2, 1, 1]).play(replace(GPU, launch_s=1))
    assert timeline.exposed_s == 0
    late = step("scwc", [4, 0.5, 1]).play(replace(GPU, launch_s=1))
    assert late.exposed_s == 5 - 2.5
    assert late.starved_s == 2
    assert late.step_s == 5 + 1


def test_calls_that_cost_nothing_are_no_events_and_are_not_issued() -> None:
    program = two_layers()
    timeline = play(program, replace(GPU, launch_s=1), cost_of=lambda _: Cost(0, ()))
    assert timeline.events == ()
    assert timeline.step_s == 0


def test_a_call_that_stands_for_several_operators_is_issued_so_often() -> None:
    several = Cost(1, (Work("one"), Work("two"), Work("view", "nothing")))
    made = step("cc", [1, 1])
    timeline = play(made.program, replace(GPU, launch_s=5), cost_of=lambda _: several)
    assert timeline.busy_s[ISSUE] == 2 * 2 * 5
    assert timeline.step_s == 20 + 1


def test_flops_are_those_of_products_and_every_call_of_an_unknown_operator_counts() -> None:
    works = (Work("product", MATRIX, flops=7), Work("other", flops=100), Work("unknown", is_known=False))
    made = step("ccc", [1, 1, 1])
    timeline = play(made.program, GPU, cost_of=lambda _: Cost(1, works))
    assert timeline.matrix_flops == 21
    assert timeline.unknown == {"aten.neg.default": 3}


# Any graph


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, list[float]]:
    calls, in_flight = "", 0
    for call in draw(st.text("cccssw", max_size=30)):
        if call != "w" or in_flight:
            calls += call
            in_flight += {"c": 0, "s": 1, "w": -1}[call]
    times = draw(st.lists(st.integers(0, 20), min_size=len(calls), max_size=len(calls)))
    return calls + "w" * in_flight, [float(t) for t in times]


machines = st.builds(
    lambda machine, launch: replace(MACHINES[machine], launch_s=float(launch)),
    st.sampled_from(list(MACHINES)),
    st.integers(0, 10),
)


def critical_path(made: Step) -> float:
    """The longest chain of calls of which each needs the one before it: on its lane, or by what is sent or waited."""
    computed, link, found = 0.0, 0.0, {}
    for node in made.program.graph.nodes:
        if node.target is ops.wait:
            computed = max(computed, found[node.args[0]])
        elif node in made.seconds and node.target in ops.STARTS:
            link = found[node] = max(computed, link) + made.seconds[node]
        elif node in made.seconds:
            computed += made.seconds[node]
    return max(computed, link)


@fewer_examples(0.2)
@given(steps(), machines)
def test_a_step_takes_no_less_than_any_lane_or_chain_and_no_more_than_everything(
    drawn: tuple[str, list[float]], machine: Hardware
) -> None:
    made = step(*drawn)
    timeline = made.play(machine)
    assert timeline.step_s >= max(timeline.busy_s.values(), default=0)
    assert timeline.step_s >= critical_path(made)
    assert timeline.step_s <= sum(timeline.busy_s.values())
    if not machine.launch_s and machine.device_type != "cpu":
        assert timeline.step_s == critical_path(made)


@fewer_examples(0.2)
@given(steps(), machines)
def test_no_order_is_faster_than_the_bound(drawn: tuple[str, list[float]], machine: Hardware) -> None:
    made = step(*drawn)
    assert made.least_s(machine) <= made.play(machine).step_s * (1 + 1e-12)


@pytest.mark.parametrize(
    ("calls", "seconds", "least"),
    [
        ("cccs", [1, 2, 4, 3], 7),  # the link is used beside
        ("cssw", [1, 4, 5], 9),  # one link
        ("scwc", [5, 1, 1], 5),
    ],
)
def test_the_bound_is_the_busiest_lane_or_the_longest_chain(calls: str, seconds: list[float], least: float) -> None:
    made = step(calls, seconds)
    assert made.least_s(GPU) == least
    assert made.least_s(CPU) == sum(seconds)


def test_what_has_to_be_there_before_a_lane_starts_and_behind_it_counts() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4])
    first = b.forward(ops.wait, b.forward(ops.all_reduce, x, "sum", AXIS))
    second = b.forward(aten.neg.default, first)
    last = b.forward(ops.wait, b.forward(ops.all_reduce, second, "sum", AXIS))
    beside = b.forward(aten.neg.default, first)
    program = b.finish({None: last, Input(Role.BUFFER, "beside"): beside})
    program.mesh = Mesh(2, AXIS)
    made = Step(program, {operand(first): 5.0, second: 2.0, operand(last): 4.0, beside: 3.0})
    assert made.least_s(GPU) == 11  # of which the links take 9, between which something is computed
    assert made.play().step_s == 14  # what is computed beside is issued too late


@fewer_examples(0.2)
@given(steps(), machines)
def test_every_second_of_computing_is_work_or_exposed_or_starved(
    drawn: tuple[str, list[float]], machine: Hardware
) -> None:
    timeline = step(*drawn).play(machine)
    computing = [event.end_s for event in timeline.events if event.lane == COMPUTE]
    spent = timeline.busy_s.get(COMPUTE, 0.0) + timeline.exposed_s + timeline.starved_s
    if machine.device_type == "cpu" or not computing:  # there a start takes its turn, too
        assert max(computing, default=0) <= spent <= timeline.step_s
    else:
        assert spent == max(computing)


@fewer_examples(0.2)
@given(steps(), machines)
def test_calls_on_a_lane_never_overlap(drawn: tuple[str, list[float]], machine: Hardware) -> None:
    timeline = step(*drawn).play(machine)
    for lane in (COMPUTE, AXIS):
        events = [event for event in timeline.events if event.lane == lane]
        assert all(event.start_s <= event.end_s for event in events)
        assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(events))


@fewer_examples(0.2)
@given(steps(), machines)
def test_a_wait_never_ends_before_its_collective(drawn: tuple[str, list[float]], machine: Hardware) -> None:
    timeline = step(*drawn).play(machine)
    end = {event.node: event.end_s for event in timeline.events}
    for event in timeline.events:
        if event.node.target is ops.wait:
            assert event.end_s >= end[event.node.args[0]]  # type: ignore[index]


@fewer_examples(0.2)
@given(steps(), machines, st.data())
def test_a_later_wait_never_makes_a_step_longer(
    drawn: tuple[str, list[float]], machine: Hardware, data: st.DataObject
) -> None:
    made = step(*drawn)
    before = made.play(machine).step_s
    waits = [node for node in made.program.graph.nodes if node.target is ops.wait]
    for wait in waits:
        for _ in range(data.draw(st.integers(0, 5))):
            if wait.next.op == "call_function" and wait.next.target is not ops.wait:
                wait.next.append(wait)
    assert made.play(machine).step_s <= before


@fewer_examples(0.2)
@given(steps(), st.sampled_from(list(MACHINES)), st.sampled_from([0.25, 2.0, 1024.0]))
def test_calls_that_take_so_many_times_as_long_make_a_step_that_does(
    drawn: tuple[str, list[float]], machine: str, factor: float
) -> None:
    made = step(*drawn)
    one, many = made.play(MACHINES[machine]), made.play(MACHINES[machine], factor=factor)
    assert many.step_s == factor * one.step_s
    assert many.exposed_s == factor * one.exposed_s


@fewer_examples(0.2)
@given(steps(), st.integers(1, 10))
def test_a_slower_host_never_makes_a_step_shorter(drawn: tuple[str, list[float]], launch: int) -> None:
    made = step(*drawn)
    for machine in MACHINES.values():
        times = [made.play(replace(machine, launch_s=float(each))).step_s for each in (0, launch, 2 * launch)]
        assert times == sorted(times)


def test_a_captured_step_is_played_with_the_costs_of_its_calls() -> None:
    program = two_layers()
    timeline = play(program, preset("H100"))
    num_calls = sum(event.cost.num_calls for event in timeline.events)
    assert not timeline.unknown
    assert timeline.matrix_flops == 2 * 4 * (2 * 3 + 3 * 1) + 2 * 4 * (3 * 1 + 3 * 1 + 2 * 3)
    assert math.isclose(timeline.busy_s[ISSUE], num_calls * preset("H100").launch_s)
    assert timeline.step_s >= timeline.busy_s[ISSUE]


def test_phases_of_the_graph_do_not_matter_to_a_machine() -> None:
    """Node order is issue order; the update of one bucket may overlap the reduction of another."""
    made = step("scswcw", [3, 2, 3, 1])
    for node in made.program.graph.nodes:
        if node.op == "call_function":
            node.meta["origin"] = replace(node.meta["origin"], phase=Phase.UPDATE)
    assert made.play().step_s == 3 + 3
