"""An average of the weights is kept in the graph: as PyTorch would keep it, and as state of the optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

import zgraph
from tests.choices import in_turn
from tests.optimizers import Lion
from tests.reference import assert_equal

Make = Callable[[nn.Module], Optimizer]


class Tied(nn.Module):
    """Tied, frozen, unused and 0-dim parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.frozen, self.unused = nn.Parameter(torch.ones(5), requires_grad=False), nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x + self.shift)) * self.scale + self.frozen)
        return y.square().mean()


def momentum(model: nn.Module) -> SGD:
    """Creates its state in the first step, which the second one reads."""
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.1)


def muon(model: nn.Module) -> Muon:
    return Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)


def lion(model: nn.Module) -> Lion:
    return Lion(model.parameters())


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)


CHOICES = [
    (1, 3, {}), (2, 3, {}), (3, 1, {"accumulate": 2}), (2, 0, {"clip_norm": 0.1}), (2, 2, {"clip_norm": 0.1}),
]  # fmt: skip


@in_turn("world, zero, options", CHOICES, "make", [momentum, adamw, lion, muon], CHOICES[1])
def test_the_average_is_pytorchs(make: Make, world: int, zero: int, options: dict[str, Any]) -> None:
    """``ema.lerp_(weight, 1 - decay)`` behind each ``optimizer.step()``, under a decay that grows."""
    torch.manual_seed(0)
    model = Tied().double()
    reference, average = copy.deepcopy(model), copy.deepcopy(model)
    ranks = zgraph.simulate_ranks(model, make(model), world_size=world, zero=zero, ema=0.5, **options)
    eager = make(reference)
    for step in range(4):
        x = torch.randn(12, 5, dtype=torch.float64)
        decay = ranks.recipe["ema"] = min(0.9, (1 + step) / (4 + step))
        ranks.train_step([(part,) for part in x.chunk(world)])
        eager.zero_grad()
        reference(x).backward()
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(eager.param_groups[0]["params"], options["clip_norm"])
        eager.step()
        update_average(average, reference, decay)
        found = {n: e["weight_ema"] for n, e in ranks.optimizer_state().items() if "weight_ema" in e}
        expected = dict(average.named_parameters())
        assert found
        assert_equal(found, {name: expected[name].detach() for name in found}, f"step {step}")
        assert_equal(ranks.state_dict(), reference.state_dict(), f"weights, step {step}")


def compiled(decay: float = 0.75) -> tuple[Any, Optimizer]:
    torch.manual_seed(0)
    model = Tied().double()
    optimizer = adamw(model)
    return zgraph.compile(model, optimizer=optimizer, ema=decay), optimizer


def test_the_average_is_read_as_a_state_dict_and_saved_with_the_optimizer() -> None:
    (model, optimizer), (other, others) = compiled(), compiled()
    average = copy.deepcopy(model.state_dict())
    assert_equal(model.ema_state_dict(), average, "before the first step")
    batches = [torch.randn(4, 5, dtype=torch.float64) for _ in range(4)]
    for x in batches[:2]:
        model.train_step(x)
    other.load_state_dict(model.state_dict())
    others.load_state_dict(optimizer.state_dict())
    for x in batches[2:]:
        for each in (model, other):
            each.train_step(x)
    found = model.ema_state_dict()
    assert list(found) == list(average)
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert not torch.equal(found["first.weight"], model.state_dict()["first.weight"])
    assert torch.equal(found["unused"], model.state_dict()["unused"])
    assert_equal(other.ema_state_dict(), found, "after loading")
    assert model.stats()["num_captures"] == 1
    plain = Tied().double()
    plain.load_state_dict(found)


def test_a_skipped_step_leaves_the_average() -> None:
    torch.manual_seed(0)
    model = Tied()
    trained: Any = zgraph.compile(model, optimizer=adamw(model), ema=0.5, clip_norm=1.0)
    trained.train_step(torch.randn(4, 5))
    before = {name: value.clone() for name, value in trained.ema_state_dict().items()}
    trained.train_step(torch.full((4, 5), math.nan))
    assert trained.stats()["num_skipped_steps"] == 1
    assert_equal(trained.ema_state_dict(), before, "average")


def test_an_average_of_low_precision_weights_is_kept_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False).bfloat16()
    start = model.weight.detach().float()
    trained: Any = zgraph.compile(
        model, optimizer=SGD(model.parameters(), lr=1.0), ema=0.999, loss=lambda y, _: y.float().square().mean()
    )
    trained.train_step(torch.randn(4, 4).bfloat16())
    average = trained.ema_state_dict()["weight"]
    assert average.dtype is torch.float32
    torch.testing.assert_close(average, start.lerp(trained.state_dict()["weight"].float(), 1 - 0.999))


@pytest.mark.parametrize("compile_first", [True, False])
def test_an_average_of_low_precision_weights_is_loaded_as_it_was(compile_first: bool) -> None:
    """torch rounds what it loads to the parameter's dtype."""
    torch.manual_seed(0)
    x = torch.randn(4, 4).bfloat16()

    def build() -> tuple[nn.Module, Optimizer]:
        model = nn.Linear(4, 4, bias=False).bfloat16()
        return model, AdamW(model.parameters())

    def compiled(model: nn.Module, optimizer: Optimizer) -> Any:
        return zgraph.compile(model, optimizer=optimizer, ema=0.999, loss=lambda y, _: y.float().square().mean())

    model, optimizer = build()
    trained = compiled(model, optimizer)
    trained.train_step(x)
    saved = copy.deepcopy(optimizer.state_dict())
    other, others = build()
    if compile_first:
        other = compiled(other, others)
        other.train_step(x)
    others.load_state_dict(saved)
    other.load_state_dict(trained.state_dict())
    if not compile_first:
        other = compiled(other, others)
    for each in (trained, other):
        each.train_step(x)
    found, expected = (each.ema_state_dict()["weight"] for each in (other, trained))
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0 if compile_first else 2**-8, atol=0)


def test_a_load_that_is_refused_leaves_nothing_behind() -> None:
    model, optimizer = compiled()
    x = torch.randn(4, 5, dtype=torch.float64)
    model.train_step(x)
    saved = optimizer.state_dict()
    bad = copy.deepcopy(saved)
    next(iter(bad["state"].values()))["exp_avg"] = torch.zeros(1, 1)
    with pytest.raises(zgraph.StateError, match="exp_avg"):
        optimizer.load_state_dict(bad)
    without = copy.deepcopy(saved)
    for entries in without["state"].values():
        del entries["weight_ema"]
    optimizer.load_state_dict(without)
    model.train_step(x)


class Clash(SGD):
    """Has state of its own under the average's key."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for p in self.param_groups[0]["params"]:
            self.state[p]["weight_ema"] = p.grad.clone()
            p.sub_(p.grad)


def test_what_no_average_can_be_kept_of_is_refused() -> None:
    model = nn.Linear(2, 2)
    trained: Any = zgraph.compile(model, optimizer=adamw(model), loss=lambda y, _: y.mean())
    with pytest.raises(zgraph.OptionError, match="no average of the weights is kept"):
        trained.ema_state_dict()
    trained.recipe["ema"] = 0.5
    with pytest.raises(zgraph.OptionError, match="the recipe has 'ema'"):
        trained.train_step(torch.ones(1, 2))
    for bad in (1.5, -0.1, math.nan, "0.9", True):
        with pytest.raises(zgraph.OptionError, match=r"ema=.* is out of range"):
            zgraph.compile(nn.Linear(2, 2), ema=bad)
    averaged, _ = compiled()
    averaged.recipe["ema"] = 2
    with pytest.raises(zgraph.OptionError, match="ema=2 is out of range"):
        averaged.train_step(torch.ones(1, 5, dtype=torch.float64))
    del averaged.recipe["ema"]
    with pytest.raises(zgraph.OptionError, match="the recipe has no 'ema'"):
        averaged.train_step(torch.ones(1, 5, dtype=torch.float64))
    model = nn.Linear(2, 2)
    clash: Any = zgraph.compile(model, optimizer=Clash(model.parameters()), ema=0.5, loss=lambda y, _: y.mean())
    with pytest.raises(zgraph.OptimizerError, match="'weight_ema', which is where the average"):
        clash.train_step(torch.ones(1, 2))
