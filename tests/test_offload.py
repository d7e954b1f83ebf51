"""Parameters and optimizer state on a disk: the same step, proved, with no more of it in memory than is said."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zgraph
from tests.models import CASES
from tests.mutants.steps import in_single_precision
from tests.optimizers import OPTIMIZERS, tensors_of
from tests.programs import accumulated, assert_same_step, blocks, clipped, few_examples, two_layers
from tests.recipes import Recipe, build, recipes
from tests.reference import slow
from zgraph import ops
from zgraph.config import Config
from zgraph.disk import padded
from zgraph.errors import DiskError, OptionError, StateError, VerifyError, ZgraphError
from zgraph.flat import FlatTensors
from zgraph.footprint import Kind, footprint, state_on_disk
from zgraph.hardware import Disk, Hardware
from zgraph.liveness import lifetimes
from zgraph.lower import Lowered, lower
from zgraph.machines import assumed_cpu
from zgraph.passes import Offload, default_passes
from zgraph.passes.offload import AHEAD, IN_MEMORY, KEPT
from zgraph.pipeline import Pass, run
from zgraph.placement import place
from zgraph.predict import predict
from zgraph.program import Mesh, Phase, Program, Role, Stage, operand, phase_of
from zgraph.timeline import COMPUTE, least_s, play

aten = torch.ops.aten
ON_DISK = {"optimizer": "disk"}
PARAMETERS = {"parameters": "disk"}
EVERYTHING = {**ON_DISK, **PARAMETERS}


def lowered(
    captured: Program, zero: int = 0, world: int = 1, *own: Pass, offload: dict[str, str] = ON_DISK, **options: Any
) -> Program:
    config = Config(zero, 1, 1, offload=offload, **options)
    return run(default_passes(config, Mesh(world), own=own), captured).program


def momentum(num: int) -> Program:
    """``blocks`` trained by SGD with momentum."""
    program = blocks(num)
    results = dict(zip(program.outputs, program.results(), strict=True))
    for what in [what for what in results if what is not None]:
        update: Any = results[what]
        gradient = operand(update, 1)
        m = program.placeholder(replace(what, role=Role.OPT_STATE, key="m"), gradient.meta["val"])
        new = program.call(aten.add.Tensor, m, gradient, origin=update.meta["origin"], before=update)
        update.replace_input_with(gradient, new)
        results[m.meta["input"]] = new
    program.set_results(list(results.values()), list(results))
    return program


def transfers(program: Program) -> str:
    """The calls that move or update state, in order."""
    number = {}
    lines = []
    for node in program.graph.nodes:
        bucket = node.meta["origin"].module if node.op == "call_function" else ""
        if node.target in ops.TRANSFERS:
            number[node] = f"{'load' if node.target is ops.load else 'store'} {bucket.removeprefix('bucket')}"
            lines.append(number[node])
        elif node.target is ops.wait and operand(node) in number:
            lines.append(f"wait for {number[operand(node)]}")
        elif hasattr(node.target, "writes"):
            lines.append(f"update {bucket.removeprefix('bucket')}")
    return "\n".join(lines)


# Where it goes


def test_state_comes_while_the_bucket_before_is_updated_and_goes_before_the_third_from_it_comes() -> None:
    assert_expected_inline(
        transfers(lowered(momentum(2))),
        """\
load 3
load 2
wait for load 3
update 3
store 3
load 1
wait for load 2
update 2
store 2
wait for store 3
load 0
wait for load 1
update 1
store 1
wait for load 0
update 0
store 0
wait for store 2
wait for store 1
wait for store 0""",
    )


def test_parameters_come_for_forward_and_backward_and_stay_for_what_follows_at_once() -> None:
    """Of four, three stay where forward turns into backward, and each from backward to its update."""
    assert_expected_inline(
        transfers(lowered(blocks(2), offload=PARAMETERS)),
        """\
load 0
load 1
wait for load 0
load 2
wait for load 1
load 3
wait for load 2
wait for load 3
update 3
store 3
update 2
store 2
load 0
update 1
store 1
wait for load 0
update 0
store 0
wait for store 1
wait for store 2
wait for store 3
wait for store 0""",
    )


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize(("zero", "world"), [(0, 1), (0, 3), (1, 3), (3, 2)])
def test_no_more_buckets_have_parameters_in_memory_than_is_said(num: int, zero: int, world: int) -> None:
    program = lowered(blocks(num), zero, world, offload=PARAMETERS)
    assert program.layout is not None
    assert program.layout.params_on_disk == tuple(bucket.name for bucket in program.layout.buckets)
    loaded = [life for life in lifetimes(program) if life.node.target is ops.load]
    assert 2 * num <= len(loaded) <= 4 * num
    at_once = [sum(life.first <= at <= life.last for life in loaded) for at in range(program.num_nodes())]
    assert max(at_once) <= min(IN_MEMORY + AHEAD + 1, 2 * num)


def test_a_parameter_is_cast_anew_from_what_is_loaded() -> None:
    """One that is cast for forward is not kept for backward, but for buckets that stay as a whole."""
    case = CASES["gpt_tied"]
    model = case.model(torch.float32)
    zgraph.compile(
        model, torch.optim.SGD(model.parameters()), loss=case.loss, bucket_bytes=1, precision="bf16", offload=PARAMETERS
    )
    (batch,) = case.batches(1, 4, dtype=torch.float32)
    model.train_step(*batch.args)
    casts = [
        node
        for node in model.program.graph.find_nodes(op="call_function", target=aten._to_copy.default)
        if ops.root_of(operand(node)).target is ops.wait
    ]
    kept = {
        operand(operand(ops.root_of(operand(node)))).meta["input"].name
        for node in casts
        if any(phase_of(user) is Phase.BACKWARD for user in node.users) and phase_of(node) is Phase.FORWARD
    }
    assert len(casts) > 10 > KEPT >= len(kept)


def test_the_text_of_a_program_says_what_lies_on_a_disk() -> None:
    lines = [
        line for line in lowered(two_layers(), 3, 2).text().splitlines() if "opt_state" in line or "zgraph." in line
    ]
    assert_expected_inline(
        "\n".join(lines[:4]),
        """\
%1: f64[16] = input opt_state:bucket0:m on disk
%3: f64[16] = input opt_state:bucket1:m on disk
%7: f64[16] = zgraph.load.default(%3)
%8: f64[16] = zgraph.load.default(%1)""",
    )


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("norm", [False, True])
def test_no_more_buckets_have_state_in_memory_than_is_said(num: int, norm: bool) -> None:
    captured = clipped(momentum(num), 0.1) if norm else momentum(num)
    program = lowered(captured)
    assert program.layout is not None
    assert len(program.layout.buckets) == 2 * num
    loaded = [life for life in lifetimes(program) if life.node.target is ops.load]
    assert len(loaded) == 2 * num
    at_once = [sum(life.first <= at <= life.last for life in loaded) for at in range(program.num_nodes())]
    assert max(at_once) == min(IN_MEMORY, 2 * num)


@dataclass(frozen=True)
class Speed:
    """A machine whose disk reads so many bytes in a second."""

    read: float

    def hardware(self) -> Hardware:
        return replace(assumed_cpu(2, 2**34), disk=Disk(self.read, self.read, 0.0))


def test_the_first_loads_start_in_time_and_no_earlier() -> None:
    captured = momentum(3)
    starts = {}
    for read in (1e30, 1e8, 1.0):
        program = run(
            default_passes(Config(0, 1, offload=ON_DISK), Mesh(1), hardware=Speed(read).hardware()), captured
        ).program
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        first = next(i for i, node in enumerate(calls) if node.target is ops.load)
        update = next(i for i, node in enumerate(calls) if hasattr(node.target, "writes"))
        starts[read] = first
        waiting = play(program, Speed(read).hardware()).exposed_s
        assert first < update
        assert (waiting == 0) == (read == 1e30)
    assert starts[1e30] > starts[1e8] > starts[1.0] == 0


def test_what_is_computed_from_state_before_all_gradients_are_there_is_streamed_as_far_as_it_can_be() -> None:
    """State that a norm is made of is in memory from there on; nothing is stored before it is needed no more."""

    @dataclass(frozen=True)
    class ReadEarly(Pass):
        """Read all state in forward, too."""

        takes = gives = Stage.INPLACE

        def rewrite(self, program: Program) -> None:
            first = next(node for node in program.graph.nodes if node.op == "call_function")
            for what, node in program.inputs(Role.OPT_STATE).items():
                origin = replace(first.meta["origin"], module=what[0])
                program.call(aten.sum.default, node, origin=origin, before=first)

    passes = default_passes(Config(0, 1, 1), Mesh(1))
    program = run((*passes, ReadEarly(), Offload()), momentum(3)).program
    loaded = [life for life in lifetimes(program) if life.node.target is ops.load]
    assert len(loaded) == 6
    assert_same_step(program, momentum(3))


# The same step


@given(recipes(), st.booleans())
@few_examples(60)
def test_any_step_is_the_same(recipe: Recipe, late: bool) -> None:
    captured = build(recipe)
    assert_same_step(lowered(captured, 3, 2), captured, late=late)


@given(recipes(), st.booleans(), st.sampled_from([(0, 1), (1, 2), (3, 1), (3, 2)]))
@few_examples(60)
def test_any_step_is_the_same_with_all_on_the_disk(recipe: Recipe, late: bool, divided: tuple[int, int]) -> None:
    captured = build(recipe)
    assert_same_step(lowered(captured, *divided, offload=EVERYTHING), captured, late=late)


@pytest.mark.parametrize("offload", [ON_DISK, PARAMETERS, EVERYTHING], ids=" and ".join)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_is_the_same_however_much_of_it_is_divided(zero: int, offload: dict[str, str]) -> None:
    for captured in (momentum(3), clipped(momentum(3), 0.1)):
        assert_same_step(lowered(captured, zero, 3, offload=offload), captured, late=True)


def test_micro_batches_have_the_same_buckets_on_disk() -> None:
    config = Config(3, 1, 1, accumulate=2, offload=EVERYTHING)
    both = lower(accumulated(momentum(2), 2), config, Mesh(2), None, ())
    assert both.micro is not None
    assert both.micro.layout == both.last.layout
    assert both.layout.on_disk == tuple(bucket.name for bucket in both.layout.buckets)
    assert both.layout.params_on_disk == both.layout.on_disk
    assert not any(node.target is ops.store for node in both.micro.graph.nodes)
    assert {node.meta["input"].role for node in loaded(both.micro)} == {Role.PARAM}


def loaded(program: Program) -> list[Any]:
    return [operand(node) for node in program.graph.find_nodes(op="call_function", target=ops.load)]


# What the verifier refuses


def nth(program: Program, target: Any, index: int = 0) -> Any:
    return program.graph.find_nodes(op="call_function", target=target)[index]


def at(node: Any) -> dict[str, Any]:
    return {"origin": node.meta["origin"], "before": node}


def store_before_it_is_loaded(program: Program) -> None:
    store = nth(program, ops.store)
    (arrived,) = nth(program, ops.load).users
    zeros = program.call(aten.zeros_like.default, program.inputs(Role.PARAM)["bucket1", ""], **at(arrived))
    store.replace_input_with(operand(store), zeros)
    arrived.prepend(store)


def load_what_is_still_written(program: Program) -> None:
    store = nth(program, ops.store)
    again = program.call(ops.load, store.kwargs["out"], **at(store.next))
    program.call(ops.wait, again, **at(again.next))


def write_over_what_is_still_stored(program: Program) -> None:
    first, second = nth(program, ops.store), nth(program, ops.store, -1)
    kernel = operand(operand(second))
    loaded = next(arg for arg in kernel.args if arg.target is ops.wait and operand(arg).target is ops.load)
    kernel.replace_input_with(loaded, operand(first))


def read_it_without_loading(program: Program) -> None:
    load = nth(program, ops.load)
    program.call(aten.neg.default, operand(load), **at(load))


def update_it_where_it_lies(program: Program) -> None:
    (arrived,) = nth(program, ops.load).users
    arrived.replace_all_uses_with(operand(operand(arrived)))


def load_what_is_in_memory(program: Program) -> None:
    load = nth(program, ops.load)
    again = program.call(ops.load, program.inputs(Role.PARAM)["bucket0", ""], **at(load))
    program.call(ops.wait, again, **at(again.next))


def read_before_it_has_arrived(program: Program) -> None:
    (arrived,) = nth(program, ops.load).users
    arrived.replace_all_uses_with(operand(arrived), delete_user_cb=lambda user: user.target is not ops.wait)


def never_wait_for_a_store(program: Program) -> None:
    store = nth(program, ops.store)
    (stored,) = store.users
    stored.replace_all_uses_with(operand(store))
    program.graph.erase_node(stored)


def of_bucket_0(program: Program, target: Any) -> list[Any]:
    calls = program.graph.find_nodes(op="call_function", target=target)
    return [node for node in calls if node.meta["origin"].module == "bucket0"]


def store_one_as_the_other(program: Program) -> None:
    one, two = of_bucket_0(program, ops.store)
    one.kwargs, two.kwargs = two.kwargs, one.kwargs
    results, outputs = program.results(), program.outputs
    i, j = (outputs.index(store.kwargs["out"].meta["input"]) for store in (one, two))
    results[i], results[j] = results[j], results[i]
    program.set_results(results, outputs)


def load_one_for_the_other(program: Program) -> None:
    one, two = of_bucket_0(program, ops.load)
    one.args, two.args = two.args, one.args


def forget_to_store(program: Program) -> None:
    store = nth(program, ops.store)
    (stored,) = store.users
    results = [store.kwargs["out"] if result is stored else result for result in program.results()]
    program.set_results(results, program.outputs)
    program.graph.erase_node(stored)
    program.graph.erase_node(store)


REFUSED: dict[Callable[[Program], None], str] = {
    store_before_it_is_loaded: r"writes over what load\w* is still sending",
    load_what_is_still_written: r"reads what store\w* has written over",
    read_it_without_loading: r"is given opt_state:bucket\d:\w, which lies on a disk",
    update_it_where_it_lies: r"is given opt_state:bucket\d:\w, which lies on a disk",
    load_what_is_in_memory: "is given param:bucket0, which is in memory",
    read_before_it_has_arrived: r"reads load\w* before it has arrived",
    never_wait_for_a_store: "is waited for 0 times",
    store_one_as_the_other: "changed what the step computes",
    load_one_for_the_other: "changed what the step computes",
    forget_to_store: "changed what the step computes",
}


@dataclass(frozen=True)
class Mistake(Pass):
    """Do one thing wrong after ``Offload``."""

    edit: Callable[[Program], None]

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        self.edit(program)


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_a_mistake_with_state_on_a_disk_is_refused(edit: Callable[[Program], None]) -> None:
    with pytest.raises(VerifyError, match=REFUSED[edit]):
        lowered(in_single_precision(), 0, 1, Mistake(edit))


def test_what_is_still_being_stored_may_not_be_written_over() -> None:
    with pytest.raises(VerifyError, match=r"writes over what store\w* is still sending"):
        lowered(two_layers(), 0, 1, Mistake(write_over_what_is_still_stored))


# What it takes


def test_a_parameter_that_is_not_stored_is_refused() -> None:
    with pytest.raises(VerifyError, match="changed what the step computes"):
        lowered(blocks(2), 0, 1, Mistake(forget_to_store), offload=PARAMETERS)


@pytest.mark.parametrize("zero", [0, 3])
def test_bytes_and_seconds_are_predicted(zero: int) -> None:
    program = lowered(momentum(3), zero, 2)
    state = sum(node.meta["val"].nbytes for _, node in program.inputs(Role.OPT_STATE).items())
    assert sum(state_on_disk(program).values()) == state
    held = footprint(program)
    largest = max(node.meta["val"].nbytes for node in program.inputs(Role.OPT_STATE).values())
    assert 0 < max(held.by_kind()[Kind.STATE]) <= IN_MEMORY * largest
    machine = Speed(1e3).hardware()
    timeline = play(program, machine)
    slow = 2 * state / 1e3 * machine.devices_per_node / 2
    assert timeline.busy_s["disk in"] == pytest.approx(slow)
    assert timeline.busy_s["disk out"] == pytest.approx(slow)
    assert slow < timeline.step_s < 2 * slow
    assert slow <= least_s(program, machine) <= timeline.step_s
    moved = [event for event in timeline.events if event.lane.startswith("disk")]
    assert sum(event.cost.num_bytes for event in moved) == 2 * state
    predicted = predict(Lowered(program, None, ()), machine)
    assert predicted.disk_moved_bytes == {"disk in": state, "disk out": state}
    fast = play(program, Speed(1e30).hardware())
    assert fast.busy_s[COMPUTE] == timeline.busy_s[COMPUTE]


def test_a_plan_says_what_lies_on_a_disk_and_needs_less_memory() -> None:
    def plan(**options: Any) -> zgraph.Plan:
        return zgraph.plan(
            lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))),
            torch.optim.AdamW,
            batch=(torch.empty(4, 64),),
            world_size=2,
            loss=mean_square,
            zero=3,
            bucket_bytes=1,
            accumulate=1,
            recompute=None,
            unshard=0.0,
            in_flight=0,
            **options,
        )

    plain, on_disk, everything = plan(), plan(offload=ON_DISK), plan(offload=EVERYTHING)
    state = 2 * 8 * 4 * (64 * 64 + 64) // 2
    saved = plain.chosen.peak_bytes - on_disk.chosen.peak_bytes
    assert state // 2 < saved < state
    assert not plain.notes
    assert on_disk.notes == (
        "130 KiB of each rank's optimizer state lie on a disk; a step reads 130 KiB and writes 130 KiB",
    )
    assert everything.notes[0].startswith("195 KiB of each rank's parameters and optimizer state lie on a disk;")
    assert state // 4 < on_disk.chosen.peak_bytes - everything.chosen.peak_bytes < state // 2
    assert zgraph.Plan.from_json(on_disk.to_json()).config.offload == ON_DISK


def test_loads_into_an_arena_begin_at_a_page_so_that_nothing_is_copied() -> None:
    layers = [nn.Linear(130, 130) for _ in range(4)]
    model = nn.Sequential(*layers)
    model = zgraph.compile(
        model, torch.optim.AdamW(model.parameters()), loss=mean_square, bucket_bytes=1, offload=ON_DISK
    )
    model.train_step(torch.randn(4, 130))
    placement = place(model.program)
    loads = [node for node in placement.places if node.target is ops.load]
    assert len(loads) == 2 * 4
    assert all(placement.places[node].start % 4096 == 0 for node in loads)


# Training


def mean_square(output: Tensor, *_: Any) -> Tensor:
    return output.square().mean()


def train(case_name: str, optimizer: str, num_steps: int = 4, **options: Any) -> tuple[Any, ...]:
    """What training gives: losses, parameters, optimizer state; and the compiled model."""
    case = CASES[case_name]
    model = case.model(torch.float32)
    made = OPTIMIZERS[optimizer](model)
    zgraph.compile(model, optimizer=made, loss=case.loss, bucket_bytes="1KiB", **options)
    losses = []
    for step, batch in enumerate(case.batches(num_steps, 4, dtype=torch.float32)):
        torch.manual_seed(step)
        losses.append(model.train_step(*batch.args, **batch.kwargs))
    return losses, dict(model.state_dict()), tensors_of(made), model


def assert_bitwise(found: Any, expected: Any) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(found[1:3], expected[1:3], strict=True):
        assert list(one) == list(other)
        for name, value in other.items():
            assert torch.equal(one[name], value), name


@pytest.mark.parametrize("optimizer", ["adamw", *slow("sgd_momentum", "adamw_fused_amsgrad", "muon_and_adam", "lion")])
def test_any_optimizer_trains_bit_for_bit_as_in_memory(optimizer: str) -> None:
    expected, found = train("awkward", optimizer), train("awkward", optimizer, offload=ON_DISK)
    assert_bitwise(found, expected)
    in_memory, on_disk = expected[3].stats(), found[3].stats()
    moved = sum(state_on_disk(found[3].program).values())
    assert on_disk["disk_bytes"] == on_disk["disk_read_bytes"] == on_disk["disk_written_bytes"] == moved > 0
    assert on_disk["optimizer_state_bytes"] + moved == in_memory["optimizer_state_bytes"]
    assert in_memory["disk_bytes"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", *slow("sgd_momentum", "muon_and_adam", "lion")])
def test_any_optimizer_trains_bit_for_bit_with_parameters_on_the_disk(optimizer: str) -> None:
    expected, found = train("awkward", optimizer), train("awkward", optimizer, offload=EVERYTHING)
    assert_bitwise(found, expected)
    in_memory, on_disk = expected[3].stats(), found[3].stats()
    assert on_disk["param_bytes"] == 0
    whats = ("param_bytes", "optimizer_state_bytes")
    assert on_disk["disk_bytes"] == sum(in_memory[what] - on_disk[what] for what in whats) > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate": 2},
    "clipped": {"clip_norm": 0.1},
    "packed": {"state_precision": "int8"},
    "averaged": {"ema": 0.9, "precision": "bf16"},
    "watched": {"check_memory": True},
}


@pytest.mark.parametrize("options", slow(*OPTIONS))
def test_any_recipe_trains_bit_for_bit_as_in_memory(options: str) -> None:
    expected = train("gpt_tied", "adamw", **OPTIONS[options])
    for offload in (ON_DISK, EVERYTHING):
        found = train("gpt_tied", "adamw", **OPTIONS[options], offload=offload)
        assert_bitwise(found, expected)
        assert found[3].stats()["disk_bytes"] == sum(state_on_disk(found[3].program).values()) > 0


def small(optimizer: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> tuple[Any, Any]:
    """A small compiled model, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    made = optimizer(model.parameters(), lr=1e-2)
    return zgraph.compile(model, made, loss=mean_square, bucket_bytes=1, **options), made


X = torch.linspace(-1, 1, 48).view(8, 6)


def test_state_that_the_first_step_creates_goes_to_the_disk_when_it_ends() -> None:
    """What an optimizer creates from gradients has no initial value that could be there before."""
    both = [small(KeepsFirst, **options) for options in ({}, {"offload": ON_DISK})]
    for _ in range(3):
        losses = [model.train_step(X) for model, _ in both]
        assert torch.equal(*losses)
    assert both[1][0].stats()["disk_bytes"] == both[0][0].stats()["optimizer_state_bytes"] > 0
    for one, other in zip(*(tensors_of(optimizer).items() for _, optimizer in both), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


class KeepsFirst(torch.optim.Optimizer):
    """Moves by the mean of the gradient and the first gradient there was."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["first"] = p.grad.clone()
                p.add_((p.grad + state["first"]) * 0.5, alpha=-group["lr"])


@pytest.mark.parametrize("offload", [ON_DISK, EVERYTHING], ids=" and ".join)
def test_state_stays_the_users(disk_path: Path, offload: dict[str, str]) -> None:
    """Save, load, change a hyperparameter, copy, load what was saved in memory, and be evaluated."""
    (model, optimizer), (plain, theirs) = small(offload=offload, offload_path=str(disk_path)), small()
    for one, other in ((model, plain), (optimizer, theirs)):
        for each in (one, other):
            if each in (optimizer, theirs):
                each.param_groups[0]["lr"] = 0.05
    for _ in range(2):
        assert torch.equal(model.train_step(X), plain.train_step(X))
    saved, progress = model.state_dict(), optimizer.state_dict()
    saved = {name: value.clone() for name, value in saved.items()}
    copied = copy.deepcopy(model)
    expected = [plain.train_step(X) for _ in range(2)]
    assert all(torch.equal(model.train_step(X), loss) for loss in expected)
    model.load_state_dict(saved)
    optimizer.load_state_dict(progress)
    assert model.stats()["disk_bytes"] > 0
    assert all(torch.equal(model.train_step(X), loss) for loss in expected)
    assert all(torch.equal(copied.train_step(X), loss) for loss in expected), "a copy has state of its own"
    fresh, its_optimizer = small()
    fresh.train_step(X)
    fresh.load_state_dict(saved)
    its_optimizer.load_state_dict(progress)
    assert all(torch.equal(fresh.train_step(X), loss) for loss in expected)
    assert list(disk_path.iterdir()) == []
    with torch.no_grad():
        assert torch.equal(model(X), fresh(X))


def test_parameters_on_a_disk_are_the_users_and_have_no_memory() -> None:
    (model, _), (plain, _) = small(offload=EVERYTHING), small()
    for each in (model, plain):
        each.train_step(X)
        each.load_state_dict({name: value + 1 for name, value in each.state_dict().items()})
        each.train_step(X)
    assert all(param.is_meta for param in model.parameters())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(param.is_meta for param in model.parameters())
    model.register_forward_pre_hook(lambda module, _: module[0].weight.zero_())
    with (
        torch.no_grad(),
        pytest.raises(StateError, match=r"would write to parameter '0\.weight', which lies on a disk"),
    ):
        model(X)


def test_a_model_on_meta_is_initialised_straight_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values that it has in memory, and no more than two buckets there at a time."""
    opened = []

    def seen(self: FlatTensors, *args: Any) -> Any:
        result = opens(self, *args)
        opened.append(len(self._opened))
        return result

    opens = FlatTensors._open
    monkeypatch.setattr(FlatTensors, "_open", seen)
    found = []
    for options in ({}, {"offload": EVERYTHING}):
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(6)))
        optimizer = torch.optim.AdamW(model.parameters())
        zgraph.compile(model, optimizer, loss=mean_square, bucket_bytes=1, **options)
        torch.manual_seed(3)
        found.append((model.train_step(torch.ones(2, 20)), model.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    assert max(opened) == 2


def test_parameters_are_saved_and_loaded_one_after_the_other(disk_path: Path) -> None:
    (model, _), (fresh, _) = small(offload=EVERYTHING), small(offload=EVERYTHING)
    with pytest.raises(ZgraphError, match="nothing is compiled yet"):
        next(model.full_params())
    for _ in range(2):
        model.train_step(X)
    saved = dict(model.full_params())
    assert list(saved) == [name for name, _ in model.named_parameters()]
    torch.save(saved, disk_path / "saved.pt")
    fresh.train_step(X)
    fresh.load_state_dict(torch.load(disk_path / "saved.pt", mmap=True))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("offload", [ON_DISK, EVERYTHING], ids=" and ".join)
def test_state_moves_along_when_buckets_are_formed_anew(offload: dict[str, str]) -> None:
    (model, optimizer), (plain, theirs) = small(offload=offload), small()
    for each in (model, plain):
        each.train_step(X)
        each[0].weight.requires_grad_(False)
    for _ in range(2):
        assert torch.equal(model.train_step(X), plain.train_step(X))
    assert_bitwise(([], {}, tensors_of(optimizer)), ([], {}, tensors_of(theirs)))


def test_a_step_that_fails_leaves_state_as_it_was() -> None:
    torch.manual_seed(0)
    models = []
    for options in ({}, {"offload": EVERYTHING}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 40), nn.Linear(40, 40))
        models.append(
            zgraph.compile(model, torch.optim.AdamW(model.parameters()), loss=mean_square, bucket_bytes=1, **options)
        )
    good, bad = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 7])
    for batch in (good, good, bad, good, good):
        if batch is bad:
            for model in models:
                with pytest.raises(IndexError):
                    model.train_step(batch)
        else:
            assert torch.equal(*(model.train_step(batch) for model in models))


def test_ranks_are_simulated_with_their_state_in_memory() -> None:
    losses = []
    for options in ({}, {"offload": EVERYTHING}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 50), nn.Linear(50, 3))
        ranks = zgraph.simulate_ranks(
            model, torch.optim.AdamW(model.parameters()), world_size=2, loss=mean_square, **options
        )
        losses.append([ranks.train_step([(X[:4],), (X[4:],)]) for _ in range(2)])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


# Chosen by a budget


def stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))


def planned(memory: int, disk: float = 1e8, **options: Any) -> zgraph.Plan:
    given = {"accumulate": 1, "recompute": None, "bucket_bytes": 1, "hardware": Speed(disk).hardware(), **options}
    batch = (torch.empty(4, 512),)
    return zgraph.plan(stack, torch.optim.AdamW, batch=batch, world_size=1, loss=mean_square, memory=memory, **given)


def test_what_a_budget_has_no_room_for_goes_to_the_disk_state_first() -> None:
    budget, found = 2**40, []
    while (plan := planned(budget, offload="auto")).fits:
        found.append(plan)
        budget = plan.chosen.reserved_bytes - 1
    assert [plan.options.get("offload") for plan in found] == [None, ON_DISK, EVERYTHING]
    assert sorted(plan.chosen.step_s for plan in found) == [plan.chosen.step_s for plan in found]
    assert plan.options["offload"] == EVERYTHING
    assert "6 x zgraph.load.default (optimizer state)" in str(plan.refusal())
    assert [other.estimate.options.get("offload") for other in found[2].rejected] == [None, ON_DISK]


def test_where_it_would_help_a_refusal_says_so() -> None:
    least = planned(1).chosen
    ways = planned(least.reserved_bytes - 1, disk=1e12).ways_out
    (way,) = (way for way in ways if way.change == f"offload={ON_DISK!r}")
    assert way.reserved_bytes < least.reserved_bytes


def test_on_a_gpu_nothing_is_chosen_for_the_disk_and_the_plan_says_so() -> None:
    batch = (torch.empty(4, 512),)
    plan = zgraph.plan(
        stack,
        torch.optim.AdamW,
        batch=batch,
        world_size=1,
        hardware="A100-80",
        loss=mean_square,
        offload="auto",
        zero=0,
    )
    assert "offload" not in plan.options
    assert "nothing was offloaded: on cuda, so far nothing can be" in plan.notes


def test_a_model_is_trained_as_its_budget_says() -> None:
    least = planned(1).chosen.reserved_bytes
    losses = []
    for options in ({}, {"memory": least - 2**20, "offload": "auto", "offload_path": "/var/tmp"}):
        torch.manual_seed(0)
        model = stack()
        optimizer = torch.optim.AdamW(model.parameters())
        zgraph.compile(model, optimizer, loss=mean_square, bucket_bytes=1, recompute=None, **options)
        losses.append([model.train_step(torch.ones(rows, 512)) for rows in (4, 4, 2)])
    assert all(map(torch.equal, *losses))
    assert model.plan.options["offload"] in (ON_DISK, EVERYTHING)
    assert model.plan.options["offload_path"] == "/var/tmp"
    assert model.stats()["disk_bytes"] > 0


def test_another_batch_finds_the_options_as_well_where_nothing_had_to_go_to_the_disk() -> None:
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters())
    options: dict[str, Any] = {"zero": 0, "recompute": None, "offload": "auto", "offload_path": "/var/tmp"}
    zgraph.compile(model, optimizer, loss=mean_square, memory="4GiB", **options)
    for rows in (4, 6):
        model.train_step(torch.ones(rows, 512))
    assert model.stats()["disk_bytes"] == 0


# What goes wrong


def test_a_model_that_was_interrupted_on_its_way_to_the_disk_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small(offload=EVERYTHING)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zgraph.disk.DiskTensor.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.train_step(X)
    for call in (lambda: model.train_step(X), model.state_dict):
        with pytest.raises(StateError, match="left in parts when moving its state failed: KeyboardInterrupt"):
            call()


def test_optimizer_state_that_torch_cannot_load_leaves_the_parameters_as_they_are() -> None:
    (model, optimizer), (plain, _) = small(offload=EVERYTHING), small()
    for each in (model, plain):
        each.train_step(X)
    progress = optimizer.state_dict()
    for entries in progress["state"].values():
        entries.update({key: value.to("meta") for key, value in entries.items() if value.dim()})
    with pytest.raises(NotImplementedError):
        optimizer.load_state_dict(progress)
    assert torch.equal(model.train_step(X), plain.train_step(X))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"offload": "disk"}, "offload='disk' does not say what lies where"),
        ({"offload": {}}, "offload={} does not say"),
        ({"offload": "auto"}, "offload='auto' is chosen by a budget, and none was given"),
        ({"offload": {"gradients": "disk"}}, "'gradients' is none of what can be moved: 'optimizer'"),
        ({"offload": {"optimizer": "host"}}, "'optimizer' can lie on 'disk', not on 'host'"),
        ({"offload_path": "/tmp"}, "offload_path without offload"),
        ({"offload": ON_DISK, "offload_path": 3}, "offload_path=3 is no path"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        small(**options)


def test_a_directory_that_is_not_there_is_refused_before_anything_changes(disk_path: Path) -> None:
    model, _ = small(offload=ON_DISK, offload_path=str(disk_path / "missing"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DiskError, match=f"cannot make a file in {disk_path}/missing: No such file or directory"):
        model.train_step(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (disk_path / "missing").mkdir()
    model.train_step(X)


def test_a_disk_without_room_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small(offload=ON_DISK)
    asked = []

    def full(*args: int) -> None:
        asked.append(args[-1])
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskError, match=r"cannot reserve .* bytes, .*: No space left on device\n.*make room there"):
            model.train_step(X)
    model.train_step(X)
    assert asked == [sum(padded(size) for size in state_on_disk(model.program).values())]


def test_a_block_that_has_changed_stops_the_step_that_reads_it() -> None:
    model, _ = small(offload=ON_DISK)
    model.train_step(X)
    disk = model._zgraph.state.disk
    with open(f"/proc/self/fd/{disk._fd}", "r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(DiskError, match="gave back other bytes than were written"):
        model.train_step(X)


def test_what_cannot_be_written_stops_the_step_and_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small(offload=ON_DISK)
    model.train_step(X)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(DiskError, match=r"cannot write .*: Input/output error"):
            model.train_step(X)
    for use in (lambda: model.train_step(X), optimizer.state_dict):
        with pytest.raises(DiskError, match="never been written completely"):
            use()


KILLED = """
import os, random, signal, sys, time
import torch, zgraph
from torch import nn

path, num = sys.argv[1], int(sys.argv[2])

def losses(num_steps, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), bucket_bytes=1, **options)
    return (model.train_step(torch.ones(2, 400)) for _ in range(num_steps))

everything = {"offload": {"optimizer": "disk", "parameters": "disk"}, "offload_path": path}
start = time.monotonic()
expected = list(losses(4))
longest = 1.5 * (time.monotonic() - start)
moment = random.Random(0)
for _ in range(num):
    child = os.fork()
    if not child:
        for _ in losses(10**9, **everything):
            pass
    time.sleep(moment.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert not os.listdir(path), os.listdir(path)
assert all(map(torch.equal, losses(4, **everything), expected))
"""


@pytest.mark.parametrize("num", [2, pytest.param(50, marks=pytest.mark.nightly)])
@pytest.mark.slow
def test_runs_that_are_killed_leave_nothing_behind_and_the_next_is_as_ever(disk_path: Path, num: int) -> None:
    """Each is killed at a moment of its own: while it is compiled, while state goes to the disk, or in a step."""
    command = [sys.executable, "-c", KILLED, str(disk_path), str(num)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
