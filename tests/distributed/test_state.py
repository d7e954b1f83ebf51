"""A compiled model is still the user's module: its state goes out and in as in plain PyTorch, and it can be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import zgraph
from tests.choices import in_turn
from tests.models import CASES, GPT
from tests.ranks import Ranks
from tests.reference import Eager, assert_equal, assert_same_state, slow, world

DTYPE = torch.float64


def make(case_name: str, zero: int, seed: int = 0) -> tuple[nn.Module, AdamW]:
    """A model and its optimizer, compiled."""
    case = CASES[case_name]
    model = case.model(DTYPE, seed)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    return zgraph.compile(model, optimizer=optimizer, zero=zero, loss=case.loss), optimizer


def make_eager(case_name: str, *, average: bool = False) -> Eager:
    model = CASES[case_name].model(DTYPE)
    return Eager(CASES[case_name], model, AdamW(model.parameters(), lr=1e-2), average=average)


def stay_the_users_module(zero: int) -> None:
    case, (rank, num_ranks) = CASES["gpt_tied"], world()
    model = case.model()
    optimizer = AdamW(model.parameters())
    names, params = list(model.state_dict()), dict(model.named_parameters())
    shapes = {name: p.shape for name, p in params.items()}
    compiled = zgraph.compile(model, optimizer=optimizer, zero=zero)
    losses: list[tuple[Tensor, float]] = []
    for batch in case.batches(2):
        part, untouched = batch.part(rank, num_ranks), batch.part(rank, num_ranks)
        loss = compiled.train_step(*part.args, **part.kwargs)
        losses.append((loss, loss.item()))
        assert all(map(torch.equal, part.args, untouched.args))
        assert loss.shape == ()
        assert not loss.requires_grad
        assert compiled is model
        assert isinstance(model, GPT)
        assert list(model.state_dict()) == names
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        assert all(params[name] is p for name, p in model.named_parameters())
        assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
        assert model.head.weight is model.tokens.weight
        assert [p for group in optimizer.param_groups for p in group["params"]] == list(params.values())
        assert all(p.grad is None for p in model.parameters())
    assert all(loss.item() == value for loss, value in losses)  # a loss may be kept over later steps


@in_turn("world", [2, 1], "zero", [3, 0], 2)
def test_a_compiled_model_is_the_same_object_with_the_same_parameters(ranks: Ranks, world: int, zero: int) -> None:
    ranks.run(stay_the_users_module, zero, world=world)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 20)).to(DTYPE)


def stored_bytes(zero: int) -> tuple[int, int, int]:
    """Bytes of parameters, optimizer state, and of what the user's own parameter objects hold on to."""
    model = perceptron()
    zgraph.compile(model, optimizer=AdamW(model.parameters()), zero=zero, loss=lambda y, _: y.square().mean())
    model.train_step(torch.ones(2, 40, dtype=DTYPE))
    stats = model.stats()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters() if not p.is_meta}
    held = sum(storage.nbytes() for storage in storages.values())
    return stats["param_bytes"], stats["optimizer_state_bytes"], held


@pytest.mark.parametrize("world", slow(2, 3))
def test_each_stage_stores_its_share(ranks: Ranks, world: int) -> None:
    whole = sum(p.nbytes for p in perceptron().parameters())
    for zero in range(4):
        shares = [(world if zero == 3 else 1), (world if zero >= 1 else 1), (world if zero == 3 else 1)]
        for found in ranks.run(stored_bytes, zero, world=world):
            for stored, share, copies in zip(found, shares, (1, 2, 1), strict=True):
                assert stored <= 1.1 * copies * whole / share  # a tenth for padding
        assert found[0] >= whole / shares[0]
        assert found[1] >= 2 * whole / shares[1]


def start_from_different_seeds(zero: int) -> None:
    case, (rank, num_ranks) = CASES["gpt"], world()
    model, optimizer = make("gpt", zero, seed=rank)
    eager = make_eager("gpt")  # seed 0, as rank 0
    for batch in case.batches(2, dtype=DTYPE):
        part = batch.part(rank, num_ranks)
        model.train_step(*part.args)
        eager.step(batch)
    assert_same_state(model, optimizer, eager, "after two steps")


@pytest.mark.parametrize("zero", [3, *slow(0)])
def test_training_starts_from_rank_0s_parameters(ranks: Ranks, zero: int) -> None:
    ranks.run(start_from_different_seeds, zero)


def train_and_save(case_name: str, num_steps: int, zero: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rank, num_ranks = world()
    model, optimizer = make(case_name, zero)
    for batch in CASES[case_name].batches(8, dtype=DTYPE)[:num_steps]:
        part = batch.part(rank, num_ranks)
        model.train_step(*part.args, **part.kwargs)
    return dict(model.state_dict()), optimizer.state_dict()


def load_and_train(
    case_name: str, num_steps: int, zero: int, steps_before: int, saved: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Load what ``train_and_save`` gave, before any step or after some others, and go on as if never interrupted."""
    case, (rank, num_ranks) = CASES[case_name], world()
    batches = case.batches(8, dtype=DTYPE)
    model, optimizer = make(case_name, zero, seed=9)
    for batch in batches[:steps_before]:
        part = batch.part(rank, num_ranks)
        model.train_step(*part.args, **part.kwargs)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    eager = make_eager(case_name)
    for batch in batches[:num_steps]:
        eager.step(batch)
    assert_same_state(model, optimizer, eager, "as loaded")
    for batch in batches[num_steps:]:
        part = batch.part(rank, num_ranks)
        loss = model.train_step(*part.args, **part.kwargs)
        assert_equal({"loss": loss}, {"loss": eager.step(batch)}, "after loading")
    assert_same_state(model, optimizer, eager, "at the end")


RESUMED = [
    ((2, 2), (3, 3), 0),
    ((2, 2), (3, 3), 2),
    ((2, 3), (3, 3), 0),
    ((3, 1), (1, 0), 1),
    ((1, 3), (3, 2), 1),
]


@in_turn("worlds, zeros, steps_before", RESUMED, "case", ["gpt_tied", "partial", "counting"])
def test_training_resumes_on_other_ranks_and_stages(
    ranks: Ranks, case: str, worlds: tuple[int, int], zeros: tuple[int, int], steps_before: int
) -> None:
    saved = ranks.run(train_and_save, case, 4, zeros[0], world=worlds[0])
    ranks.run(load_and_train, case, 4, zeros[1], steps_before, saved[-1], world=worlds[1])


@pytest.mark.slow
def test_saved_state_loads_into_plain_pytorch(ranks: Ranks) -> None:
    model_state, optimizer_state = ranks.run(train_and_save, "gpt_tied", 4, 3)[1]
    eager = make_eager("gpt_tied")
    eager.model.load_state_dict(model_state)
    eager.optimizer.load_state_dict(optimizer_state)
    trained = make_eager("gpt_tied")
    batches = CASES["gpt_tied"].batches(8, dtype=DTYPE)
    for batch in batches[:4]:
        trained.step(batch)
    assert_equal({"loss": eager.step(batches[4])}, {"loss": trained.step(batches[4])}, "after loading")
    assert_same_state(eager.model, eager.optimizer, trained, "after loading")


def evaluate_between_steps(case_name: str, zero: int) -> None:
    case, (rank, num_ranks) = CASES[case_name], world()
    parts = [batch.part(rank, num_ranks) for batch in case.batches(4, dtype=DTYPE)]
    model, _ = make(case_name, zero)
    eager = make_eager(case_name, average=True)
    for step, part in enumerate(parts):
        for call in (model, eager.model):
            call.eval()
        with torch.no_grad():
            outputs = [call(*part.args, **part.kwargs) for call in (model, eager.model)]
        assert_equal({"output": outputs[0]}, {"output": outputs[1]}, f"before step {step}")
        assert not outputs[0].requires_grad
        for call in (model, eager.model):
            call.train()
        torch.manual_seed(step + rank)
        loss = model.train_step(*part.args, **part.kwargs)
        torch.manual_seed(step + rank)
        assert_equal({"loss": loss}, {"loss": eager.step(part)}, f"step {step}")
    assert model.stats()["num_captures"] == 1


CALLED = ["gpt_tied", "gpt_dropout", "resnet", "recommender", "awkward"]


@in_turn("case", CALLED, "zero", [3, 1])
def test_calling_the_model_under_no_grad_gives_the_current_parameters_output(
    ranks: Ranks, case: str, zero: int
) -> None:
    ranks.run(evaluate_between_steps, case, zero)


def train_in_eval_mode(zero: int) -> None:
    case, (rank, num_ranks) = CASES["gpt_dropout"], world()
    model, optimizer = make("gpt_dropout", zero)
    eager = make_eager("gpt_dropout")
    for step, batch in enumerate(case.batches(6, dtype=DTYPE)):
        for each in (model, eager.model):
            each.eval()  # no dropout, so one process is a reference
        part = batch.part(rank, num_ranks)
        loss = model.train_step(*part.args)
        assert_equal({"loss": loss}, {"loss": eager.step(batch)}, f"step {step}")
        model.train()
    assert_same_state(model, optimizer, eager, "at the end")
    model.train_step(*part.args)
    assert model.stats()["num_captures"] == 2


@pytest.mark.slow
def test_training_mode_is_part_of_what_is_captured(ranks: Ranks) -> None:
    ranks.run(train_in_eval_mode, 3)
