"""Updates on the processors of a device's host: the same step, proved, and less that moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from tests.mutants.steps import in_single_precision
from tests.offloading import Mistake
from tests.programs import accumulated, assert_same_step, clipped, few_examples
from tests.recipes import Recipe, build, recipes
from tests.reporting import report_of_blocks
from tests.test_offload import at, momentum, transfers
from tests.test_tiers import chosen
from zgraph import ops
from zgraph.accumulation import micro_step
from zgraph.codegen import host_kernel
from zgraph.codegen.host_kernel import HostKernel
from zgraph.codegen.kernel import Kernel
from zgraph.config import Config
from zgraph.cost import Costs
from zgraph.errors import OptionError, VerifyError
from zgraph.explain import explain
from zgraph.footprint import Kind, footprint, spilled_bytes
from zgraph.lower import lower
from zgraph.machines import preset
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.placement import ON_THEIR_WAY, spilled_places
from zgraph.program import Mesh, Phase, Program, Role, operand, phase_of
from zgraph.timeline import COMPUTE, INWARD, OUTWARD, PROCESSORS, play

aten = torch.ops.aten
GPU = preset("RTX-4090")
ON_HOST = {"optimizer": "host", "parameters": "host"}
SUMS_TOO = {**ON_HOST, "gradients": "host"}


def lowered(
    captured: Program, zero: int = 0, world: int = 1, *own: Pass, on_host: bool = True, **given: Any
) -> Program:
    options = {"offload": ON_HOST, **given}
    config = Config(zero, 1, 1, host_updates=on_host, **options)
    return run(default_passes(config, Mesh(world), own=own, hardware=GPU), captured).program


def on_host(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if isinstance(node.target, HostKernel)]


# What moves


def test_gradients_go_to_the_host_while_others_are_computed_and_nothing_comes_for_an_update() -> None:
    assert_expected_inline(
        transfers(lowered(momentum(2))),
        """\
load 0
load 1
wait for load 0
load 2
wait for load 1
load 3
wait for load 2
wait for load 3
spill 3
wait for spill 3
update 3 on the host
spill 2
wait for spill 2
update 2 on the host
spill 1
wait for spill 1
update 1 on the host
spill 0
wait for spill 0
update 0 on the host""",
    )


def test_what_an_update_does_on_the_device_alone_stays_there() -> None:
    """The sum of gradients lies on the device: what its last addition gives goes, and zeros stay."""
    program = lowered(accumulated(momentum(1), 2), accumulate=2)
    first, second = [node for node in program.graph.nodes if hasattr(node.target, "writes")][:2]
    assert type(first.target) is Kernel
    assert_expected_inline(
        str(first.target),
        """update_bucket1{%2 = aten.add.Tensor(%0, %1); %3 = aten.div.Tensor(%2, 2); """
        """%4 = aten.zeros_like.default(%3); return [%4, %3] over [0, None]}""",
    )
    assert_expected_inline(
        str(second.target),
        """update_bucket1_on_host{%4 = aten.add.Tensor(%0, %1); %5 = aten.add.Tensor(%2, %4, alpha=%3); """
        """return [%4, %5] over [0, 2]}""",
    )


@pytest.mark.parametrize("zero", [0, 3])
def test_less_moves_than_where_the_device_updates(zero: int) -> None:
    def moved(program: Program) -> tuple[int, int]:
        """Bytes that come and go."""
        found = play(program, GPU).events
        came, went = (sum(int(e.cost.num_bytes) for e in found if e.lane == way["host"]) for way in (INWARD, OUTWARD))
        return came, went

    there, here = (lowered(momentum(3), zero, 2, on_host=each) for each in (True, False))
    num_bytes = sum(node.meta["val"].nbytes for node, what in there.placeholders() if what.role is Role.PARAM)
    came, went = moved(here)
    for_updates = [n for n in here.graph.find_nodes(op="call_function", target=ops.load) if phase_of(n) is Phase.UPDATE]
    for_updates_bytes = sum(node.meta["val"].nbytes for node in for_updates)
    assert for_updates_bytes >= num_bytes  # momentum, and parameters that have not stayed since backward
    assert moved(there) == (came - for_updates_bytes, went - num_bytes)  # gradients go instead of both
    footprints = [footprint(program) for program in (there, here)]
    gradients = [each for each in footprints[0].away["host"] if each.kind is Kind.GRADIENTS]
    assert len(gradients) == ON_THEIR_WAY
    assert all(each.kind is not Kind.GRADIENTS for each in footprints[1].away["host"])


def test_an_update_takes_what_the_hosts_processors_need_for_its_bytes_beside_the_device() -> None:
    program = lowered(momentum(2))
    found = play(program, GPU)
    updates = [event for event in found.events if event.lane == PROCESSORS]
    assert [event.node for event in updates] == on_host(program)
    for event in updates:
        num_bytes = 5 * event.node.args[0].meta["val"].nbytes  # p, g and m are read, p and m are written
        assert event.cost.num_bytes == num_bytes
        assert event.end_s - event.start_s == pytest.approx(GPU.host_s(num_bytes))
    assert found.busy_s[COMPUTE] < play(lowered(momentum(2), on_host=False), GPU).busy_s[COMPUTE]
    slow = replace(GPU, host_bandwidth=1e3)
    of_updates = sum(Costs(program, slow).of(node).seconds for node in on_host(program))
    assert play(program, slow).step_s == pytest.approx(of_updates, rel=0.01)


def test_the_host_has_room_for_few_gradients_and_none_lies_where_another_is_still_read() -> None:
    for captured in (momentum(9), clipped(momentum(9), 0.1)):
        program = lowered(captured)
        at = {node: index for index, node in enumerate(program.graph.nodes)}
        spans: dict[int, list[tuple[int, int]]] = {}
        for node, place in spilled_places(program).items():
            read = max(at[user] for wait in node.users for user in wait.users)
            spans.setdefault(place.start, []).append((at[node], read))
        numbers = [n for n in program.graph.find_nodes(op="call_function", target=ops.spill) if not n.meta["val"].dim()]
        assert len(spans) == ON_THEIR_WAY + len(numbers)
        for together in spans.values():
            assert all(read < spilled for (_, read), (spilled, _) in pairwise(together))
        others = [node for node in spilled_places(program) if node not in numbers]
        most = max(node.meta["val"].nbytes for node in others)
        assert spilled_bytes(program) == ON_THEIR_WAY * most + sum(node.meta["val"].nbytes for node in numbers)


def test_gradients_that_wait_for_their_norm_wait_on_the_host() -> None:
    """Each goes behind its part of the norm, and not before its update."""
    captured = clipped(momentum(3), 0.1)
    early, late = (lowered(captured, clip_norm=0.1, offload=offload) for offload in (SUMS_TOO, ON_HOST))
    for program, has_gone in ((early, True), (late, False)):
        assert_same_step(program, captured, late=True)
        at = {node: index for index, node in enumerate(program.graph.nodes)}
        (norm,) = program.graph.find_nodes(op="call_function", target=aten.sqrt.default)
        spills = program.graph.find_nodes(op="call_function", target=ops.spill)
        gradients = [node for node in spills if node.meta["val"].dim()]
        assert len(gradients) == 6
        assert all((at[node] < at[norm]) == has_gone for node in gradients)
    assert spilled_bytes(early) > spilled_bytes(late)


# The same step


@given(recipes(), st.booleans(), st.sampled_from([(0, 1), (1, 2), (2, 2), (3, 1), (3, 2)]))
@few_examples(60)
def test_any_step_is_the_same(recipe: Recipe, late: bool, divided: tuple[int, int]) -> None:
    captured = build(recipe)
    assert_same_step(lowered(captured, *divided), captured, late=late)


@pytest.mark.parametrize("offload", [ON_HOST, SUMS_TOO], ids=" and ".join)
@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_steps_that_add_gradients_up_are_the_same(zero: int, limit: float | None, offload: dict[str, str]) -> None:
    captured = accumulated(momentum(3), 2, limit=limit)
    config = Config(zero, 1, 1, accumulate=2, offload=offload, host_updates=True, clip_norm=limit)
    both = lower(captured, config, Mesh(3), None, (), hardware=GPU)
    assert both.micro is not None
    assert len(on_host(both.last)) == (len(both.layout.buckets) if zero != 2 else 0)
    assert len(on_host(both.micro)) == (len(both.layout.buckets) if offload is SUMS_TOO else 0)  # which add up there
    for program, reference in ((both.last, captured), (both.micro, micro_step(captured))):
        assert_same_step(program, reference, late=True)


def test_a_norm_goes_to_the_host_once() -> None:
    program = lowered(clipped(momentum(3), 0.1))
    updates = on_host(program)
    assert len(updates) == len(program.layout.buckets) > 1  # type: ignore[union-attr]
    numbers = {arg for node in updates for arg in node.args if arg.target is ops.wait and not arg.meta["val"].dim()}
    spills = program.graph.find_nodes(op="call_function", target=ops.spill)
    assert len(spills) == len(updates) + len(numbers)


# What stays on the device


def test_an_update_whose_result_is_gathered_stays_on_the_device() -> None:
    program = lowered(momentum(2), 1, 2)
    assert not on_host(program)
    assert "the host's processors update 0 of 4 buckets" in program.notes


def test_nothing_is_asked_of_the_host_where_something_lies_elsewhere() -> None:
    for offload in (None, {"optimizer": "host"}, {**ON_HOST, "optimizer": "disk"}, {**ON_HOST, "activations": "disk"}):
        with pytest.raises(
            OptionError, match=r"host_updates with offload=.*: it is for parameters and optimizer state"
        ):
            Config.from_options({"offload": offload, "host_updates": True})
    with pytest.raises(OptionError, match="host_updates=1 is not a bool"):
        Config.from_options({"offload": ON_HOST, "host_updates": 1})


@pytest.mark.parametrize(("host_bandwidth", "is_chosen"), [(1e12, True), (1e8, False)])
def test_whether_the_host_updates_is_chosen_by_what_it_costs(host_bandwidth: float, is_chosen: bool) -> None:
    given = {"offload": ON_HOST, "hardware": replace(GPU, host_bandwidth=host_bandwidth)}
    plan = chosen(2**40, **given)
    assert plan.options.get("host_updates", False) is is_chosen
    assert any("the host's processors update 8 of 8 buckets" in note for note in plan.notes) is is_chosen
    both = [chosen(2**40, **given, host_updates=each) for each in (False, True)]
    assert plan.chosen.step_s == min(each.chosen.step_s for each in both)


@pytest.mark.parametrize("memory", [2**40, 1])
def test_updates_on_the_host_may_be_asked_for_where_it_is_open_what_lies_there(memory: int) -> None:
    plan = chosen(memory, offload="auto", host_updates=True)
    assert plan.options.get("host_updates", False) is (memory == 1)
    assert ("offload" in plan.options) is (memory == 1)


def test_an_update_that_would_run_in_slices_stays_on_the_device() -> None:
    assert on_host(lowered(momentum(1)))
    with mock.patch("zgraph.codegen.host_kernel.SLICE", 0), mock.patch("zgraph.codegen.kernel.SLICE", 0):
        assert on_host(lowered(momentum(1)))
        assert not on_host(lowered(momentum(1), kernels="eager"))
        assert not on_host(lowered(in_single_precision())), "no loops in C++ have its exponentials"


def test_a_rank_updates_with_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for cores, ranks, expected in ((16, 1, 16), (16, 4, 4), (4, 4, 4), (2, 1, 2), (16, 32, 1)):
        monkeypatch.setattr(host_kernel, "available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert host_kernel._num_cores() == expected


def test_a_report_and_an_explanation_name_the_processors() -> None:
    offloaded = {"offload": ON_HOST, "host_updates": True}
    slow = report_of_blocks(hardware=replace(GPU, host_bandwidth=1e3), num=2, **offloaded)
    (program,) = slow.document["programs"]
    assert PROCESSORS in slow.document["tables"]["lanes"]
    assert program["if_faster"]["the host's processors"] == pytest.approx(program["passes"][-1]["step_s"] / 2, rel=0.01)
    told = str(explain(slow))
    assert "The host's processors, which update parameters, limit it most." in told
    assert re.search(r"A step takes [\d.]+ s: [\d.]+ s waiting, in the end, for the host's processors \(\d+%\)", told)
    micro = report_of_blocks(hardware=GPU, num=2, accumulate=2, **offloaded)
    assert all("the host's processors" in each["if_faster"] for each in micro.document["programs"])


# Mistakes


def update_while_it_is_loaded(program: Program) -> None:
    update = on_host(program)[0]
    param = next(arg for arg in update.args if arg.op == "placeholder" and arg.meta["input"].role is Role.PARAM)
    start = program.call(ops.load, param, "host", **at(update))
    program.call(ops.wait, start, **at(update.next))


def load_what_was_updated_as_if_it_were_not(program: Program) -> None:
    update = on_host(program)[0]
    param = next(arg for arg in update.args if arg.op == "placeholder" and arg.meta["input"].role is Role.PARAM)
    start = program.call(ops.load, param, "host", **at(update.next))
    program.call(ops.wait, start, **at(start.next))


def give_it_what_is_on_the_device(program: Program) -> None:
    update = on_host(program)[0]
    gradient = next(arg for arg in update.args if arg.target is ops.wait)
    update.replace_input_with(gradient, operand(operand(gradient)))


def read_its_result_on_the_device(program: Program) -> None:
    result = next(iter(on_host(program)[0].users))
    program.call(aten.neg.default, result, origin=result.meta["origin"], before=program.output_node)


def update_one_with_the_gradient_of_the_other(program: Program) -> None:
    one, two = on_host(program)[:2]
    gradients = [next(arg for arg in node.args if arg.target is ops.wait) for node in (one, two)]
    two.replace_input_with(gradients[1], gradients[0])


def give_it_a_new_result(program: Program) -> None:
    update = on_host(program)[0]
    update.target = replace(update.target, writes=(None, *update.target.writes[1:]))


REFUSED: dict[Callable[[Program], None], str] = {
    update_while_it_is_loaded: r"writes over what load\w* is still sending",
    load_what_was_updated_as_if_it_were_not: r"reads what update_bucket\d_on_host has written over",
    give_it_what_is_on_the_device: r"is given \w+, which is in memory",
    give_it_a_new_result: "has a result that is written over nothing on the host",
    read_its_result_on_the_device: r"is given getitem\w*, which lies on the host",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_a_mistake_with_an_update_on_the_host_is_refused(edit: Callable[[Program], None]) -> None:
    with pytest.raises(VerifyError, match=REFUSED[edit]):
        lowered(in_single_precision(), 0, 1, Mistake(edit))


def test_a_gradient_of_another_bucket_is_refused() -> None:
    with pytest.raises(VerifyError, match="changed what the step computes"):
        lowered(momentum(2), 0, 1, Mistake(update_one_with_the_gradient_of_the_other))
