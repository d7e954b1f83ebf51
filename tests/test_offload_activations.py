"""Activations that are on a disk between forward and backward: the same step, proved; less memory, and no longer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zgraph
from tests.offloading import EVERYTHING, Mistake, Speed, mean_square, nth
from tests.programs import accumulated, assert_same_step, few_examples, network
from tests.recipes import Recipe, build, recipes
from tests.reference import slow
from zgraph import memory_check, ops
from zgraph.capture import capture
from zgraph.config import WAITED_FOR, Config
from zgraph.errors import DiskError, OptionError, VerifyError
from zgraph.footprint import Kind, footprint, spilled_bytes
from zgraph.hardware import Hardware
from zgraph.liveness import held_bytes, lifetimes
from zgraph.lower import lower
from zgraph.passes import OffloadActivations, default_passes, overwrite
from zgraph.passes.offload_activations import SLACK
from zgraph.pipeline import Pass, run
from zgraph.plans import show_bytes
from zgraph.program import Mesh, Program, operand, target_name
from zgraph.tiers import padded
from zgraph.timeline import INWARD, OUTWARD, play

aten = torch.ops.aten
ACTIVATIONS = {"activations": "disk"}
NO_TIME, SOME_TIME, VERY_LONG = 1e30, 2e9, 1.0
"""Bytes that a disk moves in a second, beside calls that take microseconds."""
ONE = 64 * 12 * 8
"""Bytes of an activation of ``deep``."""


def machine(disk: float) -> Hardware:
    """One on which it takes no time to start a call, which is most of the time of small ones."""
    return replace(Speed(disk).hardware(), launch_s=0.0)


def passes(disk: float, zero: int = 0, world: int = 1, *, waits: bool = False) -> tuple[Pass, ...]:
    """Those of a configuration, and then every tensor that can may go."""
    return (*default_passes(Config(zero, 1, 1), Mesh(world)), OffloadActivations(machine(disk), waits, 1))


def spilling(captured: Program, disk: float = NO_TIME, zero: int = 0, world: int = 1, **how: bool) -> Program:
    return run(passes(disk, zero, world, **how), captured).program


def plain(captured: Program) -> Program:
    return run(default_passes(Config(0, 1, 1), Mesh(1)), captured).program


def peak_bytes(program: Program) -> int:
    return max(held_bytes(lifetimes(program), program.num_nodes()))


def deep(num: int = 12) -> Program:
    """So many layers of which each leaves something for backward."""
    return network([("wide", 0), *[("sin", 0), ("tanh", 0)] * (num // 2)], rows=64)


def shown(program: Program) -> str:
    """The calls of forward and backward that compute or move, in order, with what they read."""
    number = {node: f"v{i}" for i, node in enumerate(program.graph.nodes)}
    lines = []
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(val := node.meta["val"], Tensor) and val.numel() > 1:
            name = target_name(node.target).split(".")[1].removesuffix("_tensor")
            lines.append(f"{number[node]} = {name}({', '.join(number[each] for each in node.all_input_nodes)})")
    return "\n".join(lines)


# Where it goes


def test_what_is_needed_last_again_goes_when_forward_has_read_it_and_comes_before_backward_does() -> None:
    program = spilling(deep(6))
    assert_expected_inline(
        shown(program),
        """\
v4 = slice(v0)
v5 = view(v4)
v6 = mm(v1, v5)
v7 = sin(v6)
v8 = spill(v6)
v9 = wait(v8)
v10 = tanh(v7)
v11 = sin(v10)
v12 = spill(v10)
v13 = wait(v12)
v14 = tanh(v11)
v15 = sin(v14)
v16 = tanh(v15)
v19 = expand(v18)
v20 = tanh_backward(v19, v16)
v21 = cos(v14)
v22 = mul(v20, v21)
v23 = tanh_backward(v22, v14)
v24 = load(v13)
v25 = wait(v24)
v26 = cos(v25)
v27 = mul(v23, v26)
v28 = tanh_backward(v27, v25)
v29 = load(v9)
v30 = wait(v29)
v31 = cos(v30)
v32 = mul(v28, v31)
v33 = t(v1)
v34 = mm(v33, v32)
v35 = reshape(v34)
v37 = getitem(v36)""",
    )


@pytest.mark.parametrize("disk", [NO_TIME, SOME_TIME, VERY_LONG])
def test_a_step_takes_no_longer_for_it_and_holds_less_the_faster_the_disk(disk: float) -> None:
    before, program = plain(deep()), spilling(deep(), disk)
    assert play(program, machine(disk)).step_s <= play(before, machine(disk)).step_s * (1 + SLACK)
    num_spilled = {NO_TIME: 5, SOME_TIME: 4, VERY_LONG: 0}[disk]
    assert spilled_bytes(program) == num_spilled * ONE
    assert peak_bytes(before) - peak_bytes(program) == num_spilled * ONE


def test_where_computing_may_wait_what_is_held_does_not_grow_with_the_depth() -> None:
    few, many = (spilling(deep(num), VERY_LONG, waits=True) for num in (20, 40))
    assert peak_bytes(few) == peak_bytes(many) < peak_bytes(plain(deep(20))) // 2
    assert peak_bytes(spilling(deep(40), VERY_LONG)) == peak_bytes(plain(deep(40)))
    assert play(few, machine(VERY_LONG)).exposed_s > 1
    held = [peak_bytes(spilling(deep(40), SOME_TIME, waits=waits)) for waits in (False, True)]
    assert held[1] < held[0]


def test_what_does_not_lower_the_peak_stays() -> None:
    """Of two layers, the peak is where backward has what the first one has left."""
    captured = network([("wide", 0), ("sin", 0)], rows=64)
    assert spilled_bytes(spilling(captured, waits=True)) == 0


def test_what_was_written_over_in_forward_goes_as_it_is_left() -> None:
    with mock.patch.object(overwrite, "SMALLEST_BYTES", 1):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Softmax(-1)) for _ in range(6)))
        optimizer = torch.optim.SGD(model.parameters())
        captured = capture(model, optimizer, (torch.ones(640, 12),), {}, loss=mean_square)
        program = spilling(captured)
    assert_same_step(program, captured)
    spilled = [operand(node) for node in program.graph.nodes if node.target is ops.spill]
    assert spilled
    assert {node.target for node in spilled} == {aten._softmax.out}


def test_bytes_and_seconds_are_predicted() -> None:
    program, spilled = spilling(deep(), SOME_TIME), 4 * ONE
    timeline = play(program, machine(SOME_TIME))
    for lane in (INWARD["disk"], OUTWARD["disk"]):
        moved = [event for event in timeline.events if event.lane == lane]
        assert sum(event.cost.num_bytes for event in moved) == spilled
        assert timeline.busy_s[lane] == pytest.approx(spilled / SOME_TIME * machine(SOME_TIME).devices_per_node)
    held = max(footprint(program).by_kind()[Kind.ACTIVATIONS])
    assert ONE < held < max(footprint(plain(deep())).by_kind()[Kind.ACTIVATIONS])


# The same step


@given(recipes(), st.booleans(), st.booleans(), st.sampled_from([(0, 1), (1, 2), (3, 2)]))
@few_examples(40)
def test_any_step_is_the_same(recipe: Recipe, late: bool, waits: bool, divided: tuple[int, int]) -> None:
    captured = build(recipe)
    assert_same_step(spilling(captured, NO_TIME, *divided, waits=waits), captured, late=late)


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_spilled_is_read_through_the_same_views(waits: bool) -> None:
    captured = network([("wide", 0), ("sin", 0), ("narrow", 0), ("split", 0), ("wide", 0), ("mul", 1)] * 2, rows=32)
    program = spilling(captured, SOME_TIME, waits=waits)
    loaded = [operand(node) for node in program.graph.find_nodes(op="call_function", target=ops.load)]
    assert len(loaded) > 2
    assert_same_step(program, captured, late=True)


def test_micro_batches_spill_alike() -> None:
    config = Config(3, 1, 1, accumulate=2, offload=ACTIVATIONS)
    made = lower(
        accumulated(network([("wide", 0), *[("sin", 0)] * 8], rows=2048), 2),
        config,
        Mesh(2),
        None,
        (),
        hardware=machine(NO_TIME),
    )
    last, micro = (spilled_bytes(program) for program in made.programs)
    assert last == micro > 0


# What the verifier refuses


def read_what_lies_on_the_disk(program: Program) -> None:
    load = nth(program, ops.load)
    (arrived,) = load.users
    arrived.replace_all_uses_with(operand(load))


def load_before_it_is_written(program: Program) -> None:
    load = nth(program, ops.load)
    load.replace_input_with(operand(load), operand(operand(load)))


def load_one_for_the_other(program: Program) -> None:
    one, two = (nth(program, ops.load, index) for index in (0, 1))
    one.args, two.args = two.args, one.args


def load_what_is_in_memory(program: Program) -> None:
    load = nth(program, ops.load)
    load.replace_input_with(operand(load), operand(operand(operand(load))))


def return_what_was_spilled(program: Program) -> None:
    results = program.results()
    spilled = nth(program, ops.load)
    (stored,) = (node for node in spilled.all_input_nodes)
    results[0] = stored
    program.set_results(results, program.outputs)


REFUSED: dict[Callable[[Program], None], str] = {
    read_what_lies_on_the_disk: r"is given wait\w*, which lies on a disk",
    load_before_it_is_written: r"is given spill\w*, which is in memory",
    load_one_for_the_other: "changed what the step computes",
    load_what_is_in_memory: r"is given \w+, which is in memory",
    return_what_was_spilled: "is returned as the loss but was spilled for this step only",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_a_mistake_with_what_is_spilled_is_refused(edit: Callable[[Program], None]) -> None:
    with pytest.raises(VerifyError, match=REFUSED[edit]):
        run((*passes(NO_TIME), Mistake(edit)), deep())


# Training


def stack(num: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)) for _ in range(num)))


X = torch.linspace(-1, 1, 1024 * 128).view(1024, 128)


def compiled(model: nn.Module, **options: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return zgraph.compile(model, optimizer, loss=mean_square, progress=False, **options)


def losses(model: Any, *batches: Tensor) -> list[Tensor]:
    return [model.train_step(batch) for batch in batches]


OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "all on the disk": {"offload": {**EVERYTHING, "activations": WAITED_FOR["disk"]}},
    "waited for": {"offload": {"activations": WAITED_FOR["disk"]}},
    "accumulated": {"accumulate": 2, "clip_norm": 0.1},
    "in low precision": {"precision": "bf16"},
    "recomputed": {"recompute": "operators"},
    "fused": {"kernels": "zgraph"},
    "in another order": {"memory_first": True},
}


@pytest.mark.parametrize("name", ["alone", *slow(*list(OPTIONS)[1:])])
def test_training_is_bit_for_bit_what_it_is_in_memory(name: str) -> None:
    options = {"offload": ACTIVATIONS, **OPTIONS[name]}
    in_memory, model = compiled(stack(), **{**options, "offload": None}), compiled(stack(), **options)
    assert all(map(torch.equal, losses(in_memory, X, X, X), losses(model, X, X, X)))
    assert all(torch.equal(value, in_memory.state_dict()[name]) for name, value in model.state_dict().items())
    stats, times = model.stats(), options.get("accumulate", 1)
    assert stats["spilled_bytes"] >= (spilled := spilled_bytes(model.program)) > 0
    if "optimizer" not in options["offload"]:
        assert stats["disk_read_bytes"] == stats["disk_written_bytes"] == times * spilled
    assert model.plan.chosen.peak_bytes < in_memory.plan.chosen.peak_bytes or "parameters" in options["offload"]


def test_what_a_step_holds_is_what_was_predicted_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def see(self: Any, number: int, values: Any) -> None:
        sizes = {each.data_ptr(): each.nbytes() for each in memory_check._storages(values.values())}
        held = sum(size for memory, size in sizes.items() if memory not in self._given)
        assert held <= self._expected[number]
        found.append(held)

    monkeypatch.setattr(memory_check.MemoryCheck, "see", see)
    model = compiled(stack(2), offload=ACTIVATIONS, check_memory=True)
    model.train_step(X)
    assert max(found) == peak_bytes(model.program)
    assert spilled_bytes(model.program) > 0


@pytest.mark.slow
def test_a_plan_and_the_source_say_what_goes() -> None:
    model = compiled(stack(), offload=ACTIVATIONS)
    model.train_step(X)
    (note,) = model.plan.notes
    moved = show_bytes(spilled_bytes(model.program))
    assert note == f"{moved} of each rank's activations lie on a disk; a step reads {moved} and writes {moved}"
    assert "#   d0: f32[1024, 256] from byte 0 on" in model.source
    assert "= d0.store(" in model.source
    events = [event for program in model.report().document["programs"] for event in program["events"]]
    assert events


# What goes wrong


@pytest.mark.slow
def test_steps_share_the_room_that_is_found_before_they_run() -> None:
    model = compiled(stack(), offload=ACTIVATIONS)
    sizes = []
    for batch in (X, X[:900], torch.cat([X, X])):
        model.train_step(batch)
        sizes.append(model.stats()["spilled_bytes"])
        disk = model._zgraph.state.tiers["disk"]
        assert padded(sizes[-1]) == disk.used_bytes
    assert sizes[0] == sizes[1] < sizes[2]


def test_trouble_with_the_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room: before anything changes. No writing: when the step has ended, as in memory, with the reason."""
    model, plain = compiled(stack(2), offload=ACTIVATIONS), compiled(stack(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuse(number: int) -> Callable[..., int]:
        def refused(*_: Any) -> int:
            raise OSError(number, "refused")

        return refused

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
        with pytest.raises(DiskError, match=r"cannot reserve .* bytes, .*: No space left on device\n.*make room there"):
            model.train_step(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_step(X)
    assert spilled_bytes(model.program) > 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse(errno.EIO))
        with pytest.raises(DiskError, match=r"cannot write .*: Input/output error"):
            model.train_step(X)
    losses(plain, X, X)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert losses(model, X) == losses(plain, X)


def test_a_room_that_is_refused_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(stack(2), offload={"activations": "disk, waited for"})
    model.train_step(X[:512])
    before = model.stats()["spilled_bytes"]
    assert before > 0

    def refused(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refused)
        with pytest.raises(DiskError, match="cannot reserve"):
            model.train_step(torch.cat([X, X]))
        assert model.stats()["spilled_bytes"] == before
        losses(model, X[:512], X[:500])


class Pooled(nn.Module):
    """Indices of max pooling are read by backward alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = self.pool(convolution(x))
        return x


def test_what_only_backward_reads_goes_as_soon_as_it_is_there() -> None:
    images = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32)
    model, plain = compiled(Pooled(), offload={"activations": "disk, waited for"}), compiled(Pooled())
    assert losses(model, images, images) == losses(plain, images, images)
    assert spilled_bytes(model.program) > 0


def test_a_tier_that_a_machine_does_not_have_is_refused() -> None:
    program = plain(deep())
    with pytest.raises(OptionError, match=r"to the host on a CPU, .*\n.*say 'disk'"):
        OffloadActivations(machine(NO_TIME), tier="host").rewrite(program)


def test_a_machine_that_is_not_known_has_no_time_to_hide_it() -> None:
    with pytest.raises(OptionError, match="weighs seconds, and this machine is not known"):
        default_passes(Config(offload=ACTIVATIONS), Mesh(1))
