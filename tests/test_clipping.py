"""Gradients are clipped by the norm of all of them, each element once; a norm that is not finite moves nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import zgraph
from tests.optimizers import Lion
from tests.programs import assert_same_step, clipped, few_examples, one_layer, rewritten, two_layers, values_for
from tests.recipes import Recipe, build, recipes
from tests.reference import TOLERANCE, assert_equal, slow
from zgraph.clipping import check_clipping
from zgraph.config import Config
from zgraph.errors import CaptureError, OptionError
from zgraph.gradients import Gradients


def test_the_update_reads_scaled_gradients_and_keeps_its_state_where_the_norm_is_not_finite() -> None:
    assert_expected_inline(
        clipped(one_layer(), 1.0).text(),
        """\
%0: f64[2, 3] = input param:w
%1: f64[4, 2] = input batch:0
%2: f64[2, 3] = input opt_state:w:m
%3: float = input hyper:lr
%4: i64[] = input recipe:num_skipped_steps
%5: f64[4, 3] = aten.mm.default(%1, %0)
%6: f64[] = aten.sum.default(%5)
%7: f64[2, 4] = aten.t.default(%1)
%8: f64[4, 3] = aten.ones_like.default(%5)
%9: f64[2, 3] = aten.mm.default(%7, %8)
%10: f64[] = zgraph.square_sum.default(%9)
%11: f64[] = zgraph.add_up.default([%10])
%12: f64[] = aten.sqrt.default(%11)
%13: b8[] = aten.lt.Scalar(%12, inf)
%14: f64[] = aten.add.Tensor(%12, 1e-06)
%15: f64[] = aten.reciprocal.default(%14)
%16: f64[] = aten.mul.Tensor(%15, 1.0)
%17: f64[] = aten.clamp.default(%16, None, 1.0)
%18: f64[] = aten._to_copy.default(%17, dtype=torch.float64)
%19: f64[2, 3] = aten.mul.Tensor(%9, %18)
%20: f64[2, 3] = aten.add.Tensor(%2, %19)
%21: float = operator.neg(%3)
%22: f64[2, 3] = aten.add.Tensor(%0, %20, alpha=%21)
%23: f64[2, 3] = aten.where.self(%13, %22, %0)
%24: f64[2, 3] = aten.where.self(%13, %20, %2)
%25: b8[] = aten.logical_not.default(%13)
%26: i64[] = aten.add.Tensor(%4, %25)
return [%6, %23, %24, %12, %26]  # loss, param:w, opt_state:w:m, recipe:gradient_norm, recipe:num_skipped_steps""",
    )


def test_each_rank_adds_the_squares_of_its_slices_as_they_arrive_and_one_number_travels() -> None:
    program = rewritten(clipped(two_layers(), 1.0), zero=3, world=2, bucket_bytes=1)
    between = program.text().partition("reduce_scatter")[2].partition("aten.sqrt")[0]
    assert_expected_inline(
        between,
        """\
_tensor.default(%30, 'avg', 2, 'data')
%32: f64[2, 4] = aten.t.default(%4)
%33: f64[2, 3] = aten.mm.default(%32, %25)
%34: f64[6] = aten.reshape.default(%33, [-1])
%35: f64[26] = aten.full.default([26], 0, device=cpu, dtype=torch.float64)
%36: f64[32] = aten.cat.default([%34, %35])
%37: f64[16] = _c10d_functional.reduce_scatter_tensor.default(%36, 'avg', 2, 'data')
%38: f64[16] = _c10d_functional.wait_tensor.default(%31)
%39: f64[] = zgraph.square_sum.default(%38)
%40: f64[16] = _c10d_functional.wait_tensor.default(%37)
%41: f64[] = zgraph.square_sum.default(%40)
%42: f64[] = zgraph.add_up.default([%41, %39])
%43: f64[] = _c10d_functional.all_reduce.default(%42, 'sum', 'data')
%44: f64[] = _c10d_functional.wait_tensor.default(%43)
%45: f64[] = """,
    )


@few_examples(60)
@given(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([0.01, 1.0, 1e6]), st.booleans())
def test_any_step_is_clipped_alike_on_any_number_of_ranks(
    recipe: Recipe, zero: int, world: int, limit: float, late: bool
) -> None:
    captured = clipped(build(recipe), limit)
    assert_same_step(rewritten(captured, zero, world, 200), captured, late=late)


@few_examples(30)
@given(recipes(), st.integers(0, 3), st.integers(2, 3), st.sampled_from([math.nan, math.inf]), st.integers(0, 1))
def test_what_one_rank_cannot_represent_all_of_them_skip(
    recipe: Recipe, zero: int, world: int, value: float, rank: int
) -> None:
    captured = clipped(build(recipe), 1.0)
    inputs = values_for(captured, world=world)
    for what, given_ in inputs[rank].items():
        if what is not None and what.role.value == "batch":
            assert isinstance(given_, Tensor)
            given_.fill_(value)
    assert_same_step(rewritten(captured, zero, world, 200), captured, inputs=inputs)


# Against torch


class Tied(nn.Module):
    """A tied weight, a frozen one, an unused one, a number, and sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.inner, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.unused, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        hidden = self.norm(self.inner(self.embedding(x)) + self.frozen)
        return nn.functional.cross_entropy(self.head(hidden) * self.scale, y) * factor.mean()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-2),
    "lion": lambda model: Lion(model.parameters()),  # its step count is a Python number
    "sgd": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5),  # its first step makes state
}
LIMIT = 0.5


def train(name: str, dtype: torch.dtype, world: int, zero: int, broken: dict[int, float], **options: Any) -> None:
    """Train like torch on the whole batch; steps in ``broken`` have a factor in the last rank's loss."""
    torch.manual_seed(0)
    model, reference = Tied().to(dtype), Tied().to(dtype)
    reference.load_state_dict(model.state_dict())
    optimizer, eager = OPTIMIZERS[name](model), OPTIMIZERS[name](reference)
    ranks = zgraph.simulate_ranks(model, optimizer, world_size=world, zero=zero, bucket_bytes=200, **options)
    for step in range(5):
        x, y = torch.randint(7, (6,)), torch.randint(7, (6,))
        factor = torch.ones(world, dtype=dtype)
        factor[-1] = broken.get(step, 1.0)
        parts = list(zip(x.chunk(world), y.chunk(world), factor.chunk(world), strict=True))
        found = ranks.train_step(parts)
        eager.zero_grad()
        loss = sum((reference(*part) for part in parts), torch.zeros(())) / world
        loss.backward()
        if "clip_value" in options:
            nn.utils.clip_grad_value_(reference.parameters(), options["clip_value"])
            eager.step()
        else:
            norm = nn.utils.clip_grad_norm_(reference.parameters(), options["clip_norm"])
            if norm.isfinite():
                eager.step()
                assert_equal({"loss": found}, {"loss": loss.detach().to(dtype)}, f"step {step}")
            assert ranks.stats()["gradient_norm"] == pytest.approx(norm.item(), rel=TOLERANCE[dtype], nan_ok=True)
        assert_equal(ranks.state_dict(), reference.state_dict(), f"after step {step}")
        names = {id(p): name for name, p in reference.named_parameters()}
        state = {names[id(p)]: entries for p, entries in eager.state.items()}
        for key in ("exp_avg", "exp_avg_sq", "momentum", "momentum_buffer", "step"):
            mine = {n: torch.as_tensor(e[key]) for n, e in ranks.optimizer_state().items() if key in e}
            theirs = {n: torch.as_tensor(e[key]) for n, e in state.items() if key in e}
            if theirs:
                assert_equal({n: mine[n] for n in theirs}, theirs, f"{key} after step {step}")
    assert ranks.stats().get("num_skipped_steps", 0) == len(broken)


@pytest.mark.parametrize("zero", [*slow(0, 1, 2), 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_tied_frozen_unused_and_uneven_parameters_equals_torch(optimizer: str, zero: int) -> None:
    for world, dtype in ((1, torch.float64), (2, torch.float32), (3, torch.float64)):
        train(optimizer, dtype, world, zero, {}, clip_norm=LIMIT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_by_value_equals_torch(optimizer: str) -> None:
    for world, zero in ((1, 3), (3, 1), (2, 3)):
        train(optimizer, torch.float64, world, zero, {}, clip_value=0.02)


@pytest.mark.parametrize("zero", [*slow(0, 1, 2), 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nan_or_infinity_in_one_ranks_gradient_skips_the_step_on_all_from_the_first_on(
    optimizer: str, zero: int
) -> None:
    for world in (1, 2, 3):
        train(optimizer, torch.float64, world, zero, {0: math.nan, 2: math.inf}, clip_norm=LIMIT)


def test_nothing_is_clipped_unasked() -> None:
    """Some rivals clip at 1.0 unless told otherwise."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    before, x = model.weight.detach().clone(), torch.full((2, 3), 100.0)
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=1.0), loss=lambda y, _: y.sum())
    compiled.train_step(x)
    torch.testing.assert_close(model.weight.detach(), before - 200.0)
    assert "gradient_norm" not in compiled.stats()


def test_a_skipped_step_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 1)
    optimizer = AdamW(model.parameters())
    compiled = zgraph.compile(model, optimizer=optimizer, loss=lambda y, _: y.mean(), clip_norm=1.0)
    compiled.train_step(torch.ones(2, 3))
    assert compiled.stats()["num_skipped_steps"] == 0
    weights, state = compiled.state_dict(), optimizer.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    with caplog.at_level(logging.WARNING):
        compiled.train_step(torch.full((2, 3), math.inf))
    assert "a step was skipped, since its gradient norm is inf (1 so far)" in caplog.text
    stats = compiled.stats()
    assert (stats["num_skipped_steps"], stats["gradient_norm"]) == (1, math.inf)
    assert all(torch.equal(value, weights[name]) for name, value in compiled.state_dict().items())
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][index][key]) for key, value in entries.items())


class Halving(SGD):
    """Keeps a number in its state that is made of hyperparameters alone."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                state["last"] = group["lr"] * 0.5 + state.get("last", 0.0) * 0
                p.add_(p.grad, alpha=-state["last"])


def test_state_that_is_a_number_of_hyperparameters_alone_goes_with_clipping() -> None:
    model = nn.Linear(3, 1)
    compiled = zgraph.compile(
        model, optimizer=Halving(model.parameters(), lr=0.1), loss=lambda y, _: y.sum(), clip_norm=1.0
    )
    for value in (1.0, math.inf, 1.0):
        compiled.train_step(torch.full((2, 3), value))
    assert compiled.stats()["num_skipped_steps"] == 1
    assert {entries["steps"] for entries in compiled._zgraph.state.opt.values()} == {2}


# Refusals


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "1.0"])
@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
def test_a_limit_is_a_positive_number(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name}=.* is not a positive number"):
        Config.from_options({name: value})


def test_one_way_to_clip_is_enough() -> None:
    with pytest.raises(OptionError, match="clip_norm and clip_value are both given"):
        Config.from_options({"clip_norm": 1.0, "clip_value": 1.0})


def test_complex_gradients_have_a_norm_but_no_order() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).abs().sum()

    for options, refused in (({"clip_value": 1.0}, True), ({"clip_norm": 0.1}, False)):
        model, reference = Complex(), Complex()
        reference.load_state_dict(model.state_dict())
        ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=2, **options)
        if refused:
            with pytest.raises(CaptureError, match="the gradient of weight is complex"):
                ranks.train_step([(torch.ones(3),)] * 2)
            continue
        ranks.train_step([(torch.ones(3),)] * 2)
        reference(torch.ones(3)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        SGD(reference.parameters(), lr=0.1).step()
        torch.testing.assert_close(ranks.state_dict()["weight"], reference.weight.detach())


def test_a_norm_needs_one_device() -> None:
    program = two_layers()
    first = next(node for node in program.graph.nodes if node.meta.get("origin") and node.meta["val"].dim() == 2)
    second = program.graph.output_node().prev
    with program.fake_mode:
        second.meta["val"] = second.meta["val"].to("meta")
    with pytest.raises(CaptureError, match="gradients are on cpu and meta"):
        check_clipping(Gradients(program, {"w1": first, "w2": second}), Config(clip_norm=1.0))
