"""Optimizers stay the user's: updates, schedules and structure are eager's, and a new number needs no recompile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.choices import in_turn
from tests.optimizers import OPTIMIZERS
from tests.ranks import Ranks
from tests.reference import nightly, slow, train_like_eager


@pytest.mark.parametrize("optimizer", ["adamw_groups", "lion", "muon_and_adam"])
def test_update_equals_eager(ranks: Ranks, optimizer: str) -> None:
    ranks.run(train_like_eager, "awkward", optimizer=optimizer, zero=3)


KINDS = ["sgd_nesterov", "adam_amsgrad", "adamw_fused", "adagrad", "rmsprop_centered", "radam_decoupled", "asgd"]
KINDS += ["nadam", "adafactor", "lamb", "shampoo"]
"""One of each kind of state and arithmetic: what ``test_update.py`` shows of every update holds on ranks, too."""


@in_turn("optimizer", KINDS, "world, zero", [(3, 3), (2, 1)])
def test_an_update_of_each_kind_equals_eager(ranks: Ranks, optimizer: str, world: int, zero: int) -> None:
    # Sums of rows and the like are not for tensors without elements.
    case = "gpt_tied" if optimizer in ("adafactor", "lamb", "shampoo") else "awkward"
    ranks.run(train_like_eager, case, optimizer=optimizer, zero=zero, world=world)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in (*KINDS, "lion_warm_up")])
@pytest.mark.parametrize(("world", "zero"), [(3, 3), (2, 1)])
def test_every_update_equals_eager(ranks: Ranks, optimizer: str, world: int, zero: int) -> None:
    ranks.run(train_like_eager, "awkward", optimizer=optimizer, zero=zero, world=world)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_only_trained", *nightly("sgd_momentum", "adamw_groups", "lion")])
def test_the_update_of_a_partly_frozen_model_equals_eager(ranks: Ranks, optimizer: str) -> None:
    ranks.run(train_like_eager, "partial", optimizer=optimizer, zero=3)


def warm_up_from_zero(_: nn.Module, optimizer: Optimizer) -> Callable[[int], Any]:
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    return lambda _: scheduler.step()


def one_cycle(_: nn.Module, optimizer: Optimizer) -> Callable[[int], Any]:
    scheduler = OneCycleLR(optimizer, max_lr=3e-2, total_steps=12)  # also moves momentum, or the first beta
    return lambda _: scheduler.step()


@pytest.mark.parametrize("schedule", [one_cycle, *slow(warm_up_from_zero)])
@pytest.mark.parametrize("optimizer", ["adamw_groups", *nightly("sgd_momentum")])
def test_schedules_work_without_recapture(ranks: Ranks, optimizer: str, schedule: Callable[..., Any]) -> None:
    ranks.run(train_like_eager, "awkward", optimizer=optimizer, change=schedule, zero=3)


def set_numbers(_: nn.Module, optimizer: Optimizer) -> Callable[[int], Any]:
    def change(step: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] = [1e-2, 3e-3, 0.0, 1, 1e-4][step % 5]
        group["weight_decay"] = 0.1 / (step + 1)
        if "betas" in group:
            group["betas"], group["eps"] = (0.9 - 0.01 * step, 0.95), 1e-7

    return change


@pytest.mark.parametrize("optimizer", ["adamw", *nightly("sgd_momentum", "lion")])
def test_assigned_numbers_take_effect_without_recapture(ranks: Ranks, optimizer: str) -> None:
    ranks.run(train_like_eager, "awkward", optimizer=optimizer, change=set_numbers, zero=3)


def toggle_decay_later(_: nn.Module, optimizer: Optimizer) -> Callable[[int], Any]:
    def change(step: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.1 * (step > 2 and step % 2)

    return change


@pytest.mark.slow
def test_a_number_the_update_branches_on_recaptures_once_per_branch(ranks: Ranks) -> None:
    ranks.run(train_like_eager, "awkward", optimizer="sgd", change=toggle_decay_later, num_recaptures=1, zero=3)


@pytest.mark.slow
def test_a_count_the_update_branches_on_recaptures_when_it_crosses(ranks: Ranks) -> None:
    ranks.run(train_like_eager, "awkward", optimizer="lion_warm_up", num_recaptures=1, zero=3)


WORLDS = [(2, 3), *(pytest.param(*at, marks=pytest.mark.nightly) for at in ((3, 1), (2, 0)))]


def freeze_for_a_while(model: nn.Module, _: Optimizer) -> Callable[[int], Any]:
    def change(step: int) -> None:
        if step in (2, 5):
            model.middle.requires_grad_(step == 5)  # its optimizer state falls three steps behind

    return change


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), WORLDS)
def test_parameters_can_be_frozen_and_thawed(ranks: Ranks, world: int, zero: int) -> None:
    ranks.run(train_like_eager, "awkward", change=freeze_for_a_while, num_recaptures=2, zero=zero, world=world)


def add_a_group(model: nn.Module, optimizer: Optimizer) -> Callable[[int], Any]:
    last = list(model.parameters())[-1]

    def change(step: int) -> None:
        if step == 3:
            optimizer.add_param_group({"params": [last], "lr": 3e-2})

    return change


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), WORLDS)
def test_a_group_can_be_added(ranks: Ranks, world: int, zero: int) -> None:
    options = {"optimizer": "adamw_all_but_last", "change": add_a_group, "num_recaptures": 2}
    ranks.run(train_like_eager, "awkward", zero=zero, world=world, **options)
