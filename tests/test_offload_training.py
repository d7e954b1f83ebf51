"""Training with parameters and optimizer state on a disk: bit for bit as in memory, and all of it the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from tests.models import CASES
from tests.offloading import (
    EVERYTHING,
    ON_DISK,
    SUMS_TOO,
    Speed,
    X,
    assert_state_is_the_users,
    fail_and_go_on,
    mean_square,
    small,
)
from tests.optimizers import OPTIMIZERS, tensors_of
from tests.reference import slow
from zgraph.disk import DiskTensor
from zgraph.errors import StateError, ZgraphError
from zgraph.flat import FlatTensors
from zgraph.footprint import spilled_bytes, state_on
from zgraph.program import Role


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
    moved = sum(state_on("disk", found[3].program).values())
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
        assert found[3].stats()["disk_bytes"] == sum(state_on("disk", found[3].program).values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"precision": "bf16", "zero": 2}], ids=str)
def test_gradients_are_added_up_on_a_disk_bit_for_bit_as_in_memory(options: dict[str, Any]) -> None:
    expected = train("gpt_tied", "adamw", accumulate=4, **options)
    found = train("gpt_tied", "adamw", accumulate=4, **options, offload=SUMS_TOO)
    assert_bitwise(found, expected)
    runtime = found[3].__dict__["_zgraph"]
    assert all(isinstance(each, DiskTensor) for each in runtime.state.gradients.values())
    on_disk = state_on("disk", found[3].program)
    sums = sum(num_bytes for what, num_bytes in on_disk.items() if what.role is Role.GRADIENT)
    stats = found[3].stats()
    assert 0 < sums < stats["disk_bytes"] == sum(on_disk.values())
    waited = spilled_bytes(found[3].program)
    assert (waited > 0) == ("clip_norm" in options)
    assert stats["disk_written_bytes"] == sum(on_disk.values()) + 3 * sums + waited
    assert any("sums of gradients" in note for note in found[3].plan.notes)


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
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert_state_is_the_users(model, optimizer, plain, saved)
    assert model.stats()["disk_bytes"] > 0
    assert list(disk_path.iterdir()) == []


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
        pytest.raises(StateError, match=r"would write to parameter '0\.weight', which lies on a lower tier"),
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


@pytest.mark.parametrize(("accumulate", "offload"), [(1, EVERYTHING), (2, SUMS_TOO)])
def test_a_step_that_fails_leaves_state_as_it_was(accumulate: int, offload: dict[str, str]) -> None:
    """Also one that has added up gradients already."""
    fail_and_go_on(offload, accumulate=accumulate)


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


def planned(memory: int, disk: float = 1e8, rows: int = 4, **options: Any) -> zgraph.Plan:
    given = {"accumulate": 1, "recompute": None, "bucket_bytes": 1, "hardware": Speed(disk).hardware(), **options}
    batch = (torch.empty(rows, 512),)
    return zgraph.plan(stack, torch.optim.AdamW, batch=batch, world_size=1, loss=mean_square, memory=memory, **given)


def test_what_a_budget_has_no_room_for_goes_to_the_disk_state_first() -> None:
    budget, found = 2**40, []
    while (plan := planned(budget, offload="auto")).fits:
        found.append(plan)
        budget = plan.chosen.reserved_bytes - 1
    assert [plan.options.get("offload") for plan in found] == [None, ON_DISK, EVERYTHING]
    assert sorted(plan.chosen.step_s for plan in found) == [plan.chosen.step_s for plan in found]
    assert plan.options["offload"] == EVERYTHING
    assert "4 x zgraph.load.default (optimizer state)" in str(plan.refusal())
    rejected = [other.estimate.options.get("offload") for other in found[2].rejected]
    assert [offload for offload in rejected if "activations" not in (offload or {})] == [ON_DISK], (
        "all in memory cannot fit"
    )


@pytest.mark.slow
def test_activations_go_before_state_where_they_are_what_is_large() -> None:
    budget, found = 2**40, []
    while (plan := planned(budget, disk=2e9, rows=2048, offload="auto")).fits:
        found.append(plan)
        budget = plan.chosen.reserved_bytes - 1
    assert [plan.options.get("offload") for plan in found] == [
        None,
        {"activations": "disk"},
        {**ON_DISK, "activations": "disk"},
        {**EVERYTHING, "activations": "disk"},
    ]
    assert sorted(plan.chosen.step_s for plan in found) == [plan.chosen.step_s for plan in found]
    assert found[1].chosen.step_s < 1.01 * found[0].chosen.step_s


def test_where_it_would_help_a_refusal_says_so() -> None:
    least = planned(1).chosen
    ways = planned(least.reserved_bytes - 1, disk=1e12).ways_out
    (way,) = (way for way in ways if way.change == f"offload={ON_DISK!r}")
    assert way.reserved_bytes < least.reserved_bytes


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
