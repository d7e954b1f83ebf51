"""What lies on the host beside a GPU: the same step, proved, whose transfers are on lanes and at costs of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zgraph
from tests.offloading import Mistake, mean_square, nth
from tests.programs import assert_same_step, few_examples
from tests.recipes import Recipe, build, recipes
from tests.reporting import report_of_blocks
from tests.test_offload import momentum
from tests.test_offload_activations import deep, plain
from zgraph import ops
from zgraph.codegen.emit import emit
from zgraph.config import Config
from zgraph.errors import OptionError, VerifyError
from zgraph.explain import explain
from zgraph.footprint import Kind, footprint, spilled_bytes, state_on
from zgraph.machines import HOST_MARGIN, assumed_cpu, preset
from zgraph.passes import Offload, OffloadActivations, default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Program
from zgraph.timeline import least_s, play

GPU = preset("RTX-4090")
ON_HOST = {"optimizer": "host", "parameters": "host"}


def on_gpu(captured: Program, zero: int = 0, world: int = 1, *own: Pass, **offload: str) -> Program:
    config = Config(zero, 1, 1, offload=offload or ON_HOST)
    return run(default_passes(config, Mesh(world), own=own, hardware=GPU), captured).program


# The same step


@given(recipes(), st.booleans(), st.sampled_from([(0, 1), (3, 2)]))
@few_examples(20)
def test_any_step_is_the_same(recipe: Recipe, late: bool, divided: tuple[int, int]) -> None:
    captured = build(recipe)
    assert_same_step(on_gpu(captured, *divided), captured, late=late)


def test_each_thing_has_a_tier_of_its_own() -> None:
    program = on_gpu(momentum(3), optimizer="disk", parameters="host")
    assert_same_step(program, momentum(3))
    assert {what.role.value for what in state_on("host", program)} == {"param"}
    assert {what.role.value for what in state_on("disk", program)} == {"opt_state"}
    busy = play(program, GPU).busy_s
    assert all(busy[f"{tier} {way}"] > 0 for tier in ("host", "disk") for way in ("in", "out"))


def load_it_from_elsewhere(program: Program) -> None:
    load = nth(program, ops.load)
    load.update_arg(1, "disk")


def store_it_elsewhere(program: Program) -> None:
    store = nth(program, ops.store)
    store.update_arg(1, "disk")


def load_it_from_nowhere(program: Program) -> None:
    nth(program, ops.load).update_arg(1, "tape")


REFUSED: dict[Callable[[Program], None], str] = {
    load_it_from_elsewhere: r"is given \w+:bucket\d\S*, which lies on the host",
    store_it_elsewhere: r"is given \w+:bucket\d\S*, which lies on the host",
    load_it_from_nowhere: r"moves to or from \('tape',\), and tiers are host, disk",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_a_transfer_to_another_tier_is_refused(edit: Callable[[Program], None]) -> None:
    with pytest.raises(VerifyError, match=REFUSED[edit]):
        on_gpu(momentum(2), 0, 1, Mistake(edit))


@pytest.mark.parametrize("hardware", [None, assumed_cpu(2, 2**34)], ids=["unknown", "cpu"])
def test_on_a_cpu_the_host_is_refused(hardware: Any) -> None:
    passes = (*default_passes(Config(0, 1, 1), Mesh(1)), Offload((("optimizer", "host"),), hardware))
    with pytest.raises(OptionError, match="to the host on a CPU, where what lies in memory lies in the host's already"):
        run(passes, momentum(2))
    model = nn.Linear(4, 4)
    made = zgraph.compile(model, torch.optim.AdamW(model.parameters()), loss=mean_square, offload={"optimizer": "host"})
    with pytest.raises(OptionError, match=r"(?s)on a CPU.*say 'disk'"):
        made.train_step(torch.ones(2, 4))


# What it takes


def test_both_ways_of_the_link_are_lanes_and_move_at_its_pace() -> None:
    program = on_gpu(momentum(3))
    state = sum(state_on("host", program).values())
    timeline = play(program, GPU)
    loads = program.graph.find_nodes(op="call_function", target=ops.load)
    loaded = sum(node.meta["val"].nbytes for node in loads)
    link = GPU.host_link
    assert timeline.busy_s["host in"] == pytest.approx(loaded / link.pinned + len(loads) * link.latency_s)
    stores = program.graph.find_nodes(op="call_function", target=ops.store)
    assert timeline.busy_s["host out"] == pytest.approx(state / link.pinned + len(stores) * link.latency_s)
    assert least_s(program, GPU) <= timeline.step_s
    held = footprint(program)
    assert held.away_bytes("host") == state
    assert held.away_bytes("disk") == 0
    assert max(held.by_kind("host")[Kind.STATE]) == max(held.by_kind("host")[Kind.PARAMS])


def test_activations_go_to_the_host_as_far_as_its_link_is_fast() -> None:
    passes = default_passes(Config(0, 1, 1), Mesh(1))
    program = run((*passes, OffloadActivations(GPU, waits=True, smallest_bytes=1, tier="host")), deep()).program
    assert_same_step(program, deep())
    assert spilled_bytes(program, "host") == spilled_bytes(program) > 0
    assert spilled_bytes(program, "disk") == 0
    assert max(footprint(program).alive_bytes) < max(footprint(plain(deep())).alive_bytes)


def test_the_source_says_where_things_lie() -> None:
    source = emit(on_gpu(momentum(2))).source
    assert "#   host in: " in source
    assert "is opt_state:bucket0:m on the host" in source
    assert "# starts on host out" in source


def planned(**options: Any) -> zgraph.Plan:
    return zgraph.plan(
        lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))),
        torch.optim.AdamW,
        batch=(torch.empty(4, 64),),
        world_size=1,
        loss=mean_square,
        hardware=GPU,
        zero=0,
        bucket_bytes=1,
        recompute=None,
        accumulate=1,
        **options,
    )


def test_a_plan_for_a_gpu_says_what_lies_on_the_host() -> None:
    before, plan = planned(), planned(offload=ON_HOST, host_updates=False)
    state = 3 * 8 * 4 * (64 * 64 + 64)
    (note,) = plan.notes
    assert note.startswith("390 KiB of each rank's parameters and optimizer state lie on the host; a step reads 487.8")
    assert state // 2 < before.chosen.peak_bytes - plan.chosen.peak_bytes < state
    assert "waiting for links or a lower tier" in str(plan)


def test_a_report_and_an_explanation_name_the_host() -> None:
    report = report_of_blocks(hardware=GPU, num=2, offload=ON_HOST)
    (program,), tables = report.document["programs"], report.document["tables"]
    assert set(program["passes"][-1]["memory"]["on_host"]) == {Kind.PARAMS.value, Kind.STATE.value}
    assert not program["passes"][-1]["memory"]["on_disk"]
    assert tables["transfer_lanes"]["host in"] == "the link to the host"
    assert {"host in", "host out"} <= set(tables["lanes"])
    assert "the link to the host" in program["if_faster"]
    told = str(explain(report))
    assert "On each rank's host, then, lie" in told
    assert "waiting for links or the link to the host" in told


# Chosen by a budget


def stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))


STATE_BYTES = 2 * 4 * 4 * (512 * 512 + 512)
"""Of Adam's two vectors."""


def chosen(memory: int, host_bytes: float = 2**40, world: int = 1, rows: int = 4, **options: Any) -> zgraph.Plan:
    """A plan on GPUs of which two share a host with so much memory to take."""
    hardware = replace(GPU, host_memory_bytes=int(host_bytes / (1 - HOST_MARGIN)) + 1, devices_per_node=2)
    given = {"accumulate": 1, "recompute": None, "bucket_bytes": 1, "zero": 0, "hardware": hardware, **options}
    batch = (torch.empty(rows, 512),)
    return zgraph.plan(
        stack, torch.optim.AdamW, batch=batch, world_size=world, loss=mean_square, memory=memory, **given
    )


def test_what_a_budget_has_no_room_for_goes_to_the_host_state_first() -> None:
    budget, found = 2**40, []
    while (plan := chosen(budget, offload="auto", host_updates=False)).fits:
        found.append(plan)
        budget = plan.chosen.reserved_bytes - 1
    assert [plan.options.get("offload") for plan in found if "activations" not in plan.options.get("offload", {})] == [
        None,
        {"optimizer": "host"},
        ON_HOST,
    ]
    assert sorted(plan.chosen.step_s for plan in found) == [plan.chosen.step_s for plan in found]
    assert [plan.chosen.host_bytes for plan in found][:2] == [0, STATE_BYTES]
    assert "on the host" in str(found[-1])
    assert zgraph.Plan.from_json(found[-1].to_json()) == found[-1]


@pytest.mark.parametrize("world", [1, 2])
def test_no_more_goes_to_the_host_than_it_has_for_each_rank(world: int) -> None:
    fitting = chosen(2**40, STATE_BYTES * world, world, offload={"optimizer": "host"})
    assert fitting.fits
    assert fitting.host_budget_bytes == fitting.chosen.host_bytes == STATE_BYTES
    short = chosen(2**40, STATE_BYTES * world - world, world, offload={"optimizer": "host"})
    assert not short.fits
    assert short.verdict.endswith("and 8.016 MiB of the 8.016 MiB of its host, 1 B too much")
    assert "does not fit: 1 B too much on the host" in str(short)
    assert "1 B too much" in str(short.refusal())
    budget = fitting.chosen.reserved_bytes
    tight = chosen(budget, STATE_BYTES * world - world, world, offload="auto")
    assert tight.fits
    assert tight.options["offload"]["optimizer"] == "disk", "what the host has no room for"
    assert any(other.why == "1 B too much on the host" for other in tight.rejected)


def test_where_it_would_help_a_refusal_says_so() -> None:
    least = chosen(1)
    (way,) = (way for way in chosen(least.chosen.reserved_bytes - 1).ways_out if "offload" in way.change)
    assert way.change == "offload={'optimizer': 'host'}"
    short = chosen(least.chosen.reserved_bytes - 1, STATE_BYTES - 1)
    (way,) = (way for way in short.ways_out if "offload" in way.change)
    assert way.change == "offload={'optimizer': 'disk'}"


def test_a_disk_has_what_the_host_has_no_room_for() -> None:
    given = {"offload": "auto", "host_updates": False}
    everything = chosen(1, **given, offload_path="/var/tmp")
    assert everything.options["offload"]["optimizer"] == "host"
    assert "offload_path" not in everything.options
    less = chosen(1, everything.chosen.host_bytes - 1, **given, offload_path="/var/tmp")
    assert less.options["offload"] == {**everything.options["offload"], "optimizer": "disk"}
    assert less.options["offload_path"] == "/var/tmp"
    none = chosen(1, less.chosen.host_bytes - 1, **given)
    assert none.options["offload"] == {**less.options["offload"], "parameters": "disk"}
    assert everything.chosen.step_s < less.chosen.step_s < none.chosen.step_s
