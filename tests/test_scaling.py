"""Float16 steps scale their loss as ``torch.amp.GradScaler`` does: the same steps are skipped, the same scales used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW

import zgraph
from tests.models import CASES
from tests.programs import assert_same_step, few_examples, rewritten, scaled
from tests.recipes import Param, Recipe, Rule, build, recipes
from tests.reference import slow
from zgraph.config import Config
from zgraph.errors import CaptureError, OptionError


@few_examples(40)
@given(recipes(), st.integers(0, 3), st.integers(1, 4), st.none() | st.just(0.1), st.booleans())
def test_any_scaled_step_is_the_same_on_any_number_of_ranks(
    recipe: Recipe, zero: int, world: int, limit: float | None, late: bool
) -> None:
    captured = scaled(build(recipe), limit)
    assert_same_step(rewritten(captured, zero, world), captured, late=late)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_without_elements_have_a_norm_of_zero(frozen: bool) -> None:
    """Alone, and beside a frozen parameter that has elements."""
    rule = Rule(("p",), (), count=False, keeps=False)
    shapes = [((0, 3), "trained"), *([((4,), "frozen")] if frozen else [])]
    params = tuple(Param(shape, use, 0, low=False, shares=False) for shape, use in shapes)
    recipe = Recipe(params, (rule,), backward=tuple(range(len(params))), first=False, random=False)
    for zero in range(4):
        captured = scaled(build(recipe))
        assert_same_step(rewritten(captured, zero, world=2), captured)


@pytest.mark.parametrize("zero", [3, *slow(2, 1, 0)])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"clip_value": 0.01}, {"accumulate": 3}], ids=str)
def test_scales_and_skipped_steps_are_those_of_a_grad_scaler(options: dict[str, Any], zero: int) -> None:
    """It begins with a scale at which everything overflows, and doubles it often."""
    case, world = CASES["gpt_tied"], 2
    num = options.get("accumulate", 1) * world
    model, reference = case.model(), case.model()
    eager, scaler = AdamW(reference.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", 2.0**22, growth_interval=2)
    ranks = zgraph.simulate_ranks(
        model,
        AdamW(model.parameters(), lr=1e-2),
        world_size=world,
        zero=zero,
        precision="fp16",
        loss_scale=2.0**22,
        loss_scale_interval=2,
        **options,
    )
    num_skipped = 0
    for batch in case.batches(12, num_samples=num):
        parts = [batch.part(rank, world) for rank in range(world)]
        found = ranks.train_step([(part.args, part.kwargs) for part in parts])
        eager.zero_grad()
        losses = []
        for i in range(num):
            part = batch.part(i, num)
            with torch.autocast("cpu", torch.float16):
                losses.append(reference(*part.args, **part.kwargs))
            scaler.scale(losses[-1]).backward()
        for p in reference.parameters():
            if p.grad is not None:
                p.grad /= num
        scaler.unscale_(eager)
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(reference.parameters(), options["clip_norm"])
        if "clip_value" in options:
            nn.utils.clip_grad_value_(reference.parameters(), options["clip_value"])
        before = scaler.get_scale()
        scaler.step(eager)
        scaler.update()
        num_skipped += scaler.get_scale() < before
        torch.testing.assert_close(found, torch.stack(losses).mean().detach())
        stats = ranks.stats()
        assert (stats["loss_scale"], stats["num_skipped_steps"]) == (scaler.get_scale(), num_skipped)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(ranks.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert 0 < num_skipped < 12
    steps = {float(entries["step"]) for entries in ranks.optimizer_state().values() if "step" in entries}
    assert steps == {12.0 - num_skipped}, "a skipped step is no step"


def test_a_compiled_model_tells_its_scale() -> None:
    model = nn.Linear(3, 1)
    compiled = zgraph.compile(
        model, optimizer=AdamW(model.parameters()), loss=lambda y, _: y.float().mean() / 8, precision="fp16"
    )
    compiled.train_step(torch.ones(2, 3))
    assert compiled.stats()["loss_scale"] == 2.0**16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_scale": 8.0}, "loss_scale is for precision='fp16'"),
        ({"precision": "bf16", "loss_scale_interval": 8}, "loss_scale_interval is for precision='fp16'"),
        ({"precision": "fp16", "loss_scale": None}, "loss_scale=None is out of range"),
        ({"precision": "fp16", "loss_scale": 1e39}, "is out of range"),
        ({"precision": "fp16", "loss_scale": 0}, "loss_scale=0 is out of range"),
        ({"precision": "fp16", "loss_scale_interval": 0}, "loss_scale_interval=0 is out of range"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        Config.from_options(options)


def test_float16_parameters_are_refused() -> None:
    model = nn.Linear(3, 1).half()
    compiled = zgraph.compile(
        model, optimizer=AdamW(model.parameters()), loss=lambda y, _: y.float().mean(), precision="fp16"
    )
    with pytest.raises(CaptureError, match="weight is float16"):
        compiled.train_step(torch.ones(2, 3))


def test_a_scale_that_would_be_infinite_does_not_grow() -> None:
    """Gradients are zero, so nothing ever overflows."""
    model, reference = nn.Linear(2, 2), nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", 2.0**99, growth_interval=1)
    eager = AdamW(reference.parameters())
    ranks = zgraph.simulate_ranks(
        model,
        AdamW(model.parameters()),
        world_size=1,
        loss=lambda y, _: y.float().sum() * 0,
        precision="fp16",
        loss_scale=2.0**99,
        loss_scale_interval=1,
    )
    for _ in range(32):
        ranks.train_step([(torch.ones(1, 2),)])
        eager.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = reference(torch.ones(1, 2)).float().sum() * 0
        scaler.scale(loss).backward()
        scaler.step(eager)
        scaler.update()
        assert ranks.stats()["loss_scale"] == scaler.get_scale()
    assert ranks.stats()["num_skipped_steps"] == 0


class NamedAlike(nn.Module):
    """Parameters are called like what the step keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_scale, self.gradient_norm = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.loss_scale * self.gradient_norm).sum()


def test_parameters_may_be_called_as_the_step_calls_its_own_state() -> None:
    model = NamedAlike()
    ranks = zgraph.simulate_ranks(
        model, AdamW(model.parameters()), world_size=2, precision="fp16", loss_scale=8.0, accumulate=2
    )
    for _ in range(2):
        ranks.train_step([(torch.ones(2, 2),)] * 2)
    assert (ranks.stats()["loss_scale"], ranks.stats()["num_skipped_steps"]) == (8.0, 0)
