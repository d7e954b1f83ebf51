"""The gradients of a step's micro-batches add up, each rank keeping its part, and the update reads their mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import zgraph
from tests.programs import accumulated, assert_same_step, few_examples, one_layer, rewritten
from tests.recipes import Recipe, build, recipes
from tests.reference import assert_equal
from zgraph.accumulation import micro_step
from zgraph.batches import MicroBatches, micro_batches
from zgraph.config import Config
from zgraph.errors import CaptureError, OptionError, ZgraphError
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Role


def test_the_last_micro_batch_updates_with_the_mean_and_the_sums_begin_anew() -> None:
    assert_expected_inline(
        accumulated(one_layer(), 4).text(),
        """\
%0: f64[2, 3] = input param:w
%1: f64[4, 2] = input batch:0
%2: f64[2, 3] = input opt_state:w:m
%3: float = input hyper:lr
%4: f64[] = input recipe:earlier losses
%5: f64[2, 3] = input gradient:w
%6: f64[4, 3] = aten.mm.default(%1, %0)
%7: f64[] = aten.sum.default(%6)
%8: f64[2, 4] = aten.t.default(%1)
%9: f64[4, 3] = aten.ones_like.default(%6)
%10: f64[2, 3] = aten.mm.default(%8, %9)
%11: f64[] = aten.add.Tensor(%4, %7)
%12: f64[] = aten.div.Tensor(%11, 4)
%13: f64[] = aten.zeros_like.default(%12)
%14: f64[2, 3] = aten.add.Tensor(%5, %10)
%15: f64[2, 3] = aten.div.Tensor(%14, 4)
%16: f64[2, 3] = aten.zeros_like.default(%15)
%17: f64[2, 3] = aten.add.Tensor(%2, %15)
%18: float = operator.neg(%3)
%19: f64[2, 3] = aten.add.Tensor(%0, %17, alpha=%18)
return [%12, %19, %17, %13, %16]  # loss, param:w, opt_state:w:m, recipe:earlier losses, gradient:w""",
    )


def test_every_other_micro_batch_only_adds_up() -> None:
    assert_expected_inline(
        micro_step(accumulated(one_layer(), 4)).text(),
        """\
%0: f64[2, 3] = input param:w
%1: f64[4, 2] = input batch:0
%2: f64[] = input recipe:earlier losses
%3: f64[2, 3] = input gradient:w
%4: f64[4, 3] = aten.mm.default(%1, %0)
%5: f64[] = aten.sum.default(%4)
%6: f64[2, 4] = aten.t.default(%1)
%7: f64[4, 3] = aten.ones_like.default(%4)
%8: f64[2, 3] = aten.mm.default(%6, %7)
%9: f64[] = aten.add.Tensor(%2, %5)
%10: f64[2, 3] = aten.add.Tensor(%3, %8)
return [%9, %9, %10]  # loss, recipe:earlier losses, gradient:w""",
    )


def test_the_mean_lies_where_the_sum_lay_until_its_norm_is_known() -> None:
    """A clipped step keeps one copy of this rank's gradients, not two."""
    program = rewritten(accumulated(one_layer(), 4, limit=1.0), zero=3, world=2)
    first, second = (node.target for node in program.graph.nodes if hasattr(node.target, "body"))
    assert str(first) == (
        "gradient_bucket0{%2 = aten.add.Tensor(%0, %1); %3 = aten.div.Tensor(%2, 4); return [%3] over [0]}"
    )
    assert "%6 = aten.zeros_like.default(%0)" in str(second)
    assert "return [%6, %10, %11] over [0, 3, 2]" in str(second)


@few_examples(20)
@given(
    recipes(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.none() | st.just(0.1),
    st.booleans(),
)  # fmt: skip
def test_any_step_adds_up_alike_on_any_number_of_ranks(
    recipe: Recipe, zero: int, world: int, num_steps: int, weighted: bool, limit: float | None, late: bool
) -> None:
    captured = accumulated(build(recipe), num_steps, weighted=weighted, limit=limit)
    last = rewritten(captured, zero, world)
    assert_same_step(last, captured, late=late)
    if num_steps > 1:
        micro = micro_step(captured)
        passes = default_passes(Config(zero, 200), Mesh(world), last.layout)
        program = run(passes, micro).program
        assert program.layout == last.layout, "both programs keep state in the same buckets"
        assert_same_step(program, micro, late=late)


# Against torch


class Classes(nn.Module):
    """Targets below zero do not count; a mean over those that do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.inner, self.scale = nn.Linear(5, 5), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.head(self.inner(self.embedding(x))) * self.scale
        return nn.functional.cross_entropy(logits, y, ignore_index=-1)


def num_targets(_: Tensor, y: Tensor) -> Tensor:
    return (y >= 0).sum()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_of_unlike_weight_are_the_mean_over_all_that_counts(world: int, zero: int) -> None:
    """One micro-batch of one rank counts for nothing: its own mean is NaN."""
    torch.manual_seed(0)
    model, reference = Classes().double(), Classes().double()
    reference.load_state_dict(model.state_dict())
    ranks = zgraph.simulate_ranks(
        model,
        AdamW(model.parameters()),
        world_size=world,
        zero=zero,
        accumulate=3,
        weight=num_targets,
        bucket_bytes=200,
    )
    optimizer = AdamW(reference.parameters())
    for step in range(4):
        x, y = torch.randint(7, (12,)), torch.randint(-3, 7, (12,)).clamp(min=-1)
        if step == 1:
            y[: 12 // world // 3] = -1
        found = ranks.train_step(list(zip(x.chunk(world), y.chunk(world), strict=True)))
        optimizer.zero_grad()
        loss = reference(x, y)
        loss.backward()
        optimizer.step()
        assert_equal({"loss": found}, {"loss": loss.detach()}, f"step {step}")
        assert_equal(ranks.state_dict(), reference.state_dict(), f"after step {step}")


def test_weights_are_for_one_batch_on_ranks_of_unlike_counts_too() -> None:
    model, reference = Classes().double(), Classes().double()
    reference.load_state_dict(model.state_dict())
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=1.0), world_size=2, weight=num_targets)
    x, y = torch.arange(6), torch.tensor([1, -1, -1, 2, 3, 4])
    found = ranks.train_step(list(zip(x.chunk(2), y.chunk(2), strict=True)))
    loss = reference(x, y)
    loss.backward()
    SGD(reference.parameters(), lr=1.0).step()
    assert_equal({"loss": found}, {"loss": loss.detach()}, "the loss")
    assert_equal(ranks.state_dict(), reference.state_dict(), "after the step")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_micro_batches_may_differ_in_shape(accumulate: int) -> None:
    torch.manual_seed(0)
    model, reference = Classes().double(), Classes().double()
    reference.load_state_dict(model.state_dict())
    optimizer = AdamW(model.parameters())
    compiled = zgraph.compile(model, optimizer=optimizer, accumulate=accumulate, weight=num_targets)
    eager = AdamW(reference.parameters())
    for _ in range(3):
        batches = [(torch.randint(7, (n,)), torch.randint(7, (n,))) for n in (2, 5, 5, 3)[-accumulate:]]
        found = compiled.train_step(MicroBatches(batches))
        eager.zero_grad()
        loss = reference(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        loss.backward()
        eager.step()
        assert_equal({"loss": found}, {"loss": loss.detach()}, "the loss")
        assert_equal(compiled.state_dict(), reference.state_dict(), "after the step")
    assert compiled.stats()["num_captures"] == len({2, 5, 3} if accumulate == 4 else {3})
    assert not any("gradient" in key for entries in optimizer.state_dict()["state"].values() for key in entries)


def test_buffers_go_from_micro_batch_to_micro_batch() -> None:
    model, reference = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1), loss=lambda y, _: y.sum(), accumulate=3)
    x = torch.randn(12, 3, dtype=torch.float64)
    compiled.train_step(x)
    for part in x.chunk(3):
        reference(part)
    assert_equal(dict(compiled.named_buffers()), dict(reference.named_buffers()), "running statistics")


def test_a_step_that_fails_leaves_nothing_added_up() -> None:
    def loss_of(output: Tensor, x: Tensor) -> Tensor:
        return torch.gather(output, 1, x).sum()

    model, reference = nn.Embedding(4, 5), nn.Embedding(4, 5)
    reference.load_state_dict(model.state_dict())
    compiled = zgraph.compile(
        nn.Sequential(model, nn.Flatten()), optimizer=SGD(model.parameters(), lr=1.0), loss=loss_of, accumulate=2
    )
    right, wrong = torch.tensor([[1], [2]]), torch.tensor([[1], [9]])
    with pytest.raises((RuntimeError, IndexError)):
        compiled.train_step(wrong)
    compiled.train_step(right)
    expected = reference.weight.detach().clone()
    expected[1, 1] -= 0.5
    expected[2, 2] -= 0.5
    torch.testing.assert_close(model.weight.detach(), expected)


def test_earlier_gradients_are_float32_and_a_rank_keeps_its_part() -> None:
    model = nn.Linear(16, 16, bias=False).bfloat16()
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.1), world_size=2, loss=lambda y, _: y.sum(), accumulate=2
    )
    ranks.train_step([(torch.ones(2, 16, dtype=torch.bfloat16),)] * 2)
    (earlier,) = ranks.program.inputs(Role.GRADIENT).values()
    assert (earlier.meta["val"].dtype, earlier.meta["val"].numel()) == (torch.float32, 128)


class Branches(nn.Module):
    """Which weight is read depends on the shape of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.long, self.short = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared(x)
        return (self.long(hidden) if len(x) > 4 else self.short(hidden)).square().mean()


def test_micro_batches_that_train_other_parameters_are_refused_before_anything_runs() -> None:
    batches = MicroBatches([(torch.ones(8, 3),), (torch.ones(3, 3),)])
    model = Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=1, accumulate=2)
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1), accumulate=2)
    for step in (lambda: compiled.train_step(batches), lambda: ranks.train_step([batches])):
        with pytest.raises(CaptureError, match=r"do not fit together: long\.bias is trained by some of them only"):
            step()
    assert all(torch.equal(value, before[name]) for name, value in compiled.state_dict().items())


def masked_mean(output: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    return (output.square().sum(1) * mask).sum() / mask.sum()


class Masked(nn.Linear):
    def forward(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_counts_for_nothing_adds_nothing_even_if_its_gradient_is_not_a_number(accumulate: int) -> None:
    model, reference = Masked(4, 4).double(), Masked(4, 4).double()
    reference.load_state_dict(model.state_dict())
    x, mask = torch.randn(8, 4, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    mask[: 4 // accumulate] = 0  # all of a micro-batch of the first rank
    ranks = zgraph.simulate_ranks(
        model,
        SGD(model.parameters(), lr=0.1),
        world_size=2,
        accumulate=accumulate,
        loss=masked_mean,
        weight=lambda _, mask: mask.sum(),
    )
    found = ranks.train_step(list(zip(x.chunk(2), mask.chunk(2), strict=True)))
    loss = masked_mean(reference(x), x, mask)
    loss.backward()
    SGD(reference.parameters(), lr=0.1).step()
    assert_equal({"loss": found}, {"loss": loss.detach()}, "the loss")
    assert_equal(ranks.state_dict(), reference.state_dict(), "after the step")


class Means(nn.Linear):
    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return super().forward(x).mean().bfloat16()


def test_a_weight_is_not_rounded_to_the_dtype_of_the_loss() -> None:
    model = Means(2, 2)
    batches = [(torch.full((1, 2), float(i)), torch.tensor([weight])) for i, weight in enumerate((257.0, 1.0))]
    with torch.no_grad():
        losses = [model(*batch).double() for batch in batches]
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.1), world_size=2, weight=lambda _, weight: weight.sum()
    )
    found = ranks.train_step(batches)
    torch.testing.assert_close(found.double(), (257 * losses[0] + losses[1]) / 258, rtol=1e-6, atol=1e-7)


class Number(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.bias = (nn.Parameter(torch.tensor(v, dtype=dtype)) for v in (1.5, 0.5))
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight * self.scale + self.bias).double().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_single_numbers_of_lower_precision_than_the_weight(accumulate: int, dtype: torch.dtype) -> None:
    model = Number(dtype)
    options: dict[str, Any] = {"weight": lambda x: x.sum().double(), "accumulate": accumulate, "clip_norm": 1.0}
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=2, zero=3, **options)
    assert ranks.train_step([(torch.ones(2, 3),)] * 2).isfinite()


def test_a_step_that_is_interrupted_leaves_simulated_ranks_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.BatchNorm1d(3).double()
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.1), world_size=2, loss=lambda y, _: y.square().sum(), accumulate=2
    )
    batches = [(torch.randn(8, 3, dtype=torch.float64),)] * 2
    ranks.train_step(batches)
    before, calls, run = ranks.state_dict(), [], zgraph.simulate.run_ranks

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("zgraph.simulate.run_ranks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ranks.train_step(batches)
    assert all(torch.equal(value, before[name]) for name, value in ranks.state_dict().items())
    expected = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.1), world_size=2, loss=lambda y, _: y.square().sum(), accumulate=2
    )
    for _ in range(2):
        expected.train_step(batches)
    ranks.train_step(batches)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in ranks.state_dict().items())


# Dividing a batch


def test_a_batch_is_divided_along_its_first_dimension() -> None:
    x = torch.arange(6)
    calls = micro_batches((x, "mean"), {"mask": {"rows": x + 1}}, 3)
    assert [(args[0].tolist(), args[1], kwargs["mask"]["rows"].tolist()) for args, kwargs in calls] == [
        ([0, 1], "mean", [1, 2]), ([2, 3], "mean", [3, 4]), ([4, 5], "mean", [5, 6]),
    ]  # fmt: skip


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "too many rows": ((torch.zeros(7),), r"args\[0\] has 7 rows"),
    "a number": ((torch.zeros(6), torch.tensor(1.0)), r"args\[1\] is a single number"),
    "unlike tensors": ((torch.zeros(6), torch.zeros(3)), r"args\[0\] has 6 rows, args\[1\] has 3 rows"),
    "another number": ((MicroBatches([(), ()]),), r"was given 2 micro-batches, but accumulate=3"),
    "no batch": ((MicroBatches([(), (), 5]),), "micro-batch 2 is a int"),
    "a sparse tensor": ((torch.zeros(6).to_sparse(),), "or sparse"),
    "no rows": ((torch.zeros(0, 4), torch.zeros(0), torch.tensor(1.0)), "the batch has no rows"),
    "no rows of one": ((MicroBatches([(), (torch.zeros(0),), ()]),), "micro-batch 1 has no rows"),
}


@pytest.mark.parametrize("args", REFUSED.values(), ids=REFUSED)
def test_a_batch_that_does_not_divide_is_refused(args: tuple[tuple[Any, ...], str]) -> None:
    given_, reason = args
    with pytest.raises(ZgraphError, match=reason):
        micro_batches(given_, {}, 3)


def test_some_tensors_of_a_batch_may_have_no_rows() -> None:
    x, boxes = torch.zeros(2, 4), torch.zeros(0, 4)
    assert micro_batches((x,), {"boxes": boxes}, 1) == [((x,), {"boxes": boxes})]


def test_micro_batches_may_come_from_a_generator_but_not_from_anything() -> None:
    assert len(MicroBatches(x for x in ((), ())).batches) == 2  # type: ignore[arg-type]
    for odd in (None, 3, torch.ones(2), {"x": 1}):
        with pytest.raises(ZgraphError, match="MicroBatches was given a"):
            MicroBatches(odd)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_a_step_has_a_positive_number_of_micro_batches(value: Any) -> None:
    with pytest.raises(OptionError, match=r"accumulate=.* is out of range"):
        Config.from_options({"accumulate": value})


ODD_WEIGHTS: dict[str, Callable[..., Any]] = {
    r"a tensor f32\[2, 3\]": lambda x: x,
    "is NoneType": lambda _: None,
    "is complex": lambda _: 1j,
}


@pytest.mark.parametrize(("reason", "weight"), ODD_WEIGHTS.items(), ids=ODD_WEIGHTS)
def test_a_weight_is_one_number(weight: Callable[..., Any], reason: str) -> None:
    model = nn.Linear(3, 1)
    compiled = zgraph.compile(
        model, optimizer=SGD(model.parameters(), lr=0.1), loss=lambda y, _: y.mean(), weight=weight, accumulate=2
    )
    with pytest.raises(CaptureError, match=reason):
        compiled.train_step(torch.ones(4, 3))


def test_a_weight_of_nothing_at_all_is_not_a_number() -> None:
    model = Classes()
    compiled = zgraph.compile(
        model, optimizer=SGD(model.parameters(), lr=0.1), weight=num_targets, accumulate=2, clip_norm=1.0
    )
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    assert math.isnan(compiled.train_step(torch.arange(4), torch.full((4,), -1)))
    assert compiled.stats()["num_skipped_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in compiled.state_dict().items())
