"""Training with state and activations on the host beside a device: bit for bit as on the device, whatever copies take.

There is no device here: what a GPU's streams do is done by ``tests.streams``, as late as it may be or in any order, and
computing is on the CPU. ``tests/test_cuda.py`` trains alike on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.offloading import X, assert_state_is_the_users, fail_and_go_on, small
from tests.optimizers import tensors_of
from tests.reference import slow
from tests.streams import Streams
from tests.test_offload_activations import X as ROWS
from tests.test_offload_activations import compiled, losses, stack
from tests.test_offload_training import assert_bitwise, train
from zgraph import host, ops
from zgraph.codegen.host_kernel import HostKernel
from zgraph.config import WAITED_FOR
from zgraph.errors import HostError
from zgraph.footprint import spilled_bytes, state_on
from zgraph.host import HostTensor
from zgraph.program import Role

OPTIMIZER = {"optimizer": "host"}
EVERYTHING = {**OPTIMIZER, "parameters": "host"}
SUMS_TOO = {**EVERYTHING, "gradients": "host"}
SPILLED = {"activations": WAITED_FOR["host"]}

SEEDS = (None, 1)
"""Of the order in which copies end; the first is for as late as may be."""


@pytest.fixture
def on_streams() -> Iterator[Callable[[int | None], list[Streams]]]:
    """Give models streams whose order has a seed; those that there are."""
    made: list[Streams] = []

    def use(seed: int | None) -> list[Streams]:
        def streams(_: torch.device) -> Streams:
            made.append(Streams(seed))
            return made[-1]

        patches.append(mock.patch("zgraph.lower_tiers.Cuda", streams))
        patches[-1].start()
        return made

    patches = [
        mock.patch("zgraph.passes.offload.check_tier"),
        mock.patch("zgraph.passes.offload_activations.check_tier"),
    ]
    for patch in patches:
        patch.start()
    yield use
    for patch in patches:
        patch.stop()


Use = Callable[[int | None], list[Streams]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offload", [OPTIMIZER, EVERYTHING], ids=" and ".join)
@pytest.mark.parametrize("optimizer", ["adamw", *slow("sgd_momentum", "muon_and_adam")])
def test_state_trains_bit_for_bit_as_on_the_device(
    on_streams: Use, optimizer: str, offload: dict[str, str], seed: int | None
) -> None:
    made = on_streams(seed)
    expected, found = train("awkward", optimizer), train("awkward", optimizer, offload=offload)
    assert_bitwise(found, expected)
    before, stats = expected[3].stats(), found[3].stats()
    stored = state_on("host", found[3].program)
    assert stats["host_bytes"] == stats["host_written_bytes"] == sum(stored.values()) > 0
    assert stats["disk_bytes"] == stats["disk_read_bytes"] == 0
    assert stats["host_read_bytes"] >= stats["host_written_bytes"]
    whats = ("param_bytes", "optimizer_state_bytes")
    assert sum(stored.values()) == sum(before[what] - stats[what] for what in whats)
    (streams,) = made
    assert len(streams.pinned) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "offload": SUMS_TOO}], ids=str)
def test_state_that_is_loaded_ahead_trains_bit_for_bit_as_on_the_device(
    on_streams: Use, options: dict[str, Any], seed: int | None
) -> None:
    on_streams(seed)
    given = {"offload": EVERYTHING, **options}
    expected = train("gpt", "adamw", **{**given, "offload": None})
    near, found = (train("gpt", "adamw", load_ahead=ahead, **given) for ahead in (False, True))
    assert_bitwise(found, expected)
    ahead, one_ahead = (
        [node.target for node in made[3].program.graph.nodes if node.target in (ops.load, ops.store)]
        for made in (found, near)
    )
    assert ahead != one_ahead


THERE: dict[str, dict[str, Any]] = {
    "alone": {},
    "added up on the device": {"accumulate": 2, "clip_norm": 0.1},
    "added up there": {"accumulate": 2, "offload": SUMS_TOO},
    "averaged": {"ema": 0.9, "precision": "bf16"},
    "in slices": {"kernels": "eager", "clip_value": 0.01},
    "with activations": {"offload": {**EVERYTHING, **SPILLED}},
    "packed": {"state_precision": "int8"},
}


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ("alone", None),
        ("alone", 1),
        ("added up there", 2),
        *(pytest.param(each, 3, marks=pytest.mark.slow) for each in THERE),
    ],
)
def test_updates_on_the_host_train_bit_for_bit_as_on_the_device(
    on_streams: Use, options: str, seed: int | None
) -> None:
    on_streams(seed)
    given = {"offload": EVERYTHING, **THERE[options]}
    found = train("gpt_tied", "adamw", host_updates=True, **given)
    assert_bitwise(found, train("gpt_tied", "adamw", **{**given, "offload": None}))
    last = found[3].program
    on_host = [node for node in last.graph.nodes if isinstance(node.target, HostKernel)]
    num = 0 if options == "packed" else len(last.layout.buckets)
    assert len(on_host) == num
    assert f"the host's processors update {num} of {len(last.layout.buckets)} buckets" in found[3].plan.notes
    assert ("# starts on host processors" in found[3].source) == (num > 0)
    assert sum(kernel.name.endswith("_on_host") for kernel in found[3].kernels()) == num


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "offload": SUMS_TOO}], ids=str)
def test_whoever_needs_an_update_waits_for_slow_processors(on_streams: Use, options: dict[str, Any]) -> None:
    """Steps of several batches, and their micro-batches, spill their gradients to one room."""
    on_streams(None)
    given = {"offload": EVERYTHING, **options}
    expected = train("gpt", "adamw", **{**given, "offload": None})
    run = host.Host.run

    def slowly(self: Any, function: Callable[..., Any], *others: Any) -> None:
        def late(*inputs: Any) -> None:
            time.sleep(0.005)
            function(*inputs)

        run(self, late, *others)

    with mock.patch.object(host.Host, "run", slowly):
        assert_bitwise(train("gpt", "adamw", host_updates=True, **given), expected)


def test_an_update_that_fails_stops_this_step_or_the_next_and_its_parameters_are_never_read(on_streams: Use) -> None:
    on_streams(None)
    model, _ = small(offload=EVERYTHING, host_updates=True)
    model.train_step(X)
    run = host.Host.run

    def failing(self: Any, _: Any, *others: Any) -> None:
        def fail(*_: Any) -> None:
            raise ArithmeticError("no")

        run(self, fail, *others)

    def train_on() -> None:
        for _ in range(2):  # the second step needs what the first has not updated, if that is not told before
            model.train_step(X)

    told = r"could not update what lies there|have failed to update what lies there"
    with mock.patch.object(host.Host, "run", failing), pytest.raises(HostError, match=told):
        train_on()
    with pytest.raises(HostError, match="have failed to update what lies there"):
        model.state_dict()


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate": 2, "clip_norm": 0.1, "offload": SUMS_TOO},
    "packed": {"state_precision": "int8"},
    "averaged": {"ema": 0.9, "precision": "bf16"},
    "watched": {"check_memory": True},
}


@pytest.mark.parametrize("options", ["accumulated", *slow("packed", "averaged", "watched")])
def test_any_recipe_trains_bit_for_bit_as_on_the_device(on_streams: Use, options: str) -> None:
    on_streams(2)
    given = {"offload": EVERYTHING, **OPTIONS[options]}
    found = train("gpt_tied", "adamw", **given)
    assert_bitwise(found, train("gpt_tied", "adamw", **{**given, "offload": None}))
    if "gradients" in given["offload"]:
        gradients = found[3].__dict__["_zgraph"].state.gradients
        assert all(isinstance(each, HostTensor) for each in gradients.values())
        assert any(what.role is Role.GRADIENT for what in state_on("host", found[3].program))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offload", [SPILLED, *slow({**EVERYTHING, **SPILLED})], ids=" and ".join)
@pytest.mark.parametrize("options", [{}, *slow({"check_memory": True}, {"recompute": "operators"})], ids=str)
def test_activations_train_bit_for_bit_as_on_the_device(
    on_streams: Use, offload: dict[str, str], options: dict[str, Any], seed: int | None
) -> None:
    on_streams(seed)
    plain, model = compiled(stack(), **options), compiled(stack(), offload=offload, **options)
    assert all(map(torch.equal, losses(plain, ROWS, ROWS, ROWS), losses(model, ROWS, ROWS, ROWS)))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.stats()["spilled_bytes"] >= (spilled := spilled_bytes(model.program, "host")) > 0
    if "optimizer" not in offload:
        stats = model.stats()
        assert stats["host_read_bytes"] == stats["host_written_bytes"] == spilled
    assert "# starts on host out" in model.source
    assert any("on the host" in note for note in model.plan.notes)


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_state_stays_the_users(on_streams: Use, seed: int | None, updates: bool) -> None:
    """Save, load, copy, load what was saved on the device, and be evaluated."""
    on_streams(seed)
    (model, optimizer), (plain, theirs) = small(offload=EVERYTHING, host_updates=updates), small()
    for _ in range(2):
        assert torch.equal(model.train_step(X), plain.train_step(X))
    assert all(param.is_meta for param in model.parameters())
    assert_state_is_the_users(model, optimizer, plain, dict(model.full_params()))
    model[0].weight.requires_grad_(False)
    plain[0].weight.requires_grad_(False)
    for each in (model, plain):  # buckets are formed anew
        each.train_step(X)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    for one, other in zip(*(tensors_of(each).values() for each in (optimizer, theirs)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("updates", [False, True])
def test_a_step_that_fails_leaves_nothing_in_flight(on_streams: Use, updates: bool) -> None:
    made = on_streams(None)

    def failed() -> None:
        assert not any(made[-1]._queues.values())

    fail_and_go_on(EVERYTHING, failed, {"host_updates": updates})


def test_what_has_no_room_on_the_host_is_refused_before_anything_changes(
    on_streams: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_streams(None)
    model, _ = small(offload=EVERYTHING)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(host, "available_bytes", lambda: 1000)
        with pytest.raises(HostError, match=r"cannot take .* bytes of the host's memory: 900 of it may be taken"):
            model.train_step(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_step(X)
