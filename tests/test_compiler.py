"""Around a step: what makes it new, what one rank alone does or fails at, and what else a compiled model can do."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import linecache
import pickle
import re
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from zgraph import runtime
from zgraph.errors import OptionError, RankError, StateError, ZgraphError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.linear(self.table(index)).square().mean()


INDEX = torch.tensor([0, 1, 2])


def compiled(zero: int = 3) -> tuple[Net, AdamW]:
    torch.manual_seed(0)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.1)
    return zgraph.compile(model, optimizer=optimizer, zero=zero), optimizer


def vector_to_parameters(zero: int) -> None:
    model, _ = compiled(zero)
    model.train_step(INDEX)
    nn.utils.vector_to_parameters(torch.zeros(5 * 4 + 4 * 4 + 4), model.parameters())
    assert model.train_step(INDEX).item() == 0
    assert model.stats()["num_captures"] == 1


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 2)])
def test_values_assigned_between_steps_are_trained_on(ranks: Ranks, world: int, zero: int) -> None:
    ranks.run(vector_to_parameters, zero, world=world)


def assign_on_rank_1() -> None:
    model, _ = compiled(zero=1)
    model.train_step(INDEX)
    if world()[0] == 1:
        model.linear.bias.data = torch.zeros(4)
    with pytest.raises(RankError, match="linear"):
        model.train_step(INDEX)


def test_values_assigned_on_one_rank_alone_are_refused(ranks: Ranks) -> None:
    ranks.run(assign_on_rank_1, timeout_s=60)


class ToldWhere(Net):
    def forward(self, index: Tensor, device: torch.device) -> Tensor:
        assert device.type == "cuda"
        return super().forward(index)


def pass_own_device() -> None:
    model = ToldWhere()
    zgraph.compile(model, optimizer=AdamW(model.parameters()))
    assert model.train_step(INDEX, torch.device("cuda", world()[0])).isfinite()


def test_each_rank_may_pass_a_device_of_its_own(ranks: Ranks) -> None:
    ranks.run(pass_own_device, timeout_s=60)


class Breaks(nn.Linear):
    """It cannot be initialised while it says so."""

    broken = True

    def reset_parameters(self) -> None:
        if self.broken and world()[0] == 1:
            raise ValueError("only rank 1")
        super().reset_parameters()


def initialise_on_the_second_try() -> None:
    Breaks.broken = False
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), Breaks(4, 1))
    Breaks.broken = True
    zgraph.compile(model, optimizer=AdamW(model.parameters()), loss=lambda output, *_: output.square().mean())
    with pytest.raises(ZgraphError, match="only rank 1"):
        model.train_step(torch.ones(2, 4))
    with pytest.raises(ZgraphError, match="nothing is compiled yet"):
        model.stats()
    assert all(p.is_meta for p in model.parameters())
    Breaks.broken = False
    assert model.train_step(torch.ones(2, 4)).isfinite()
    assert model.stats()["num_captures"] == 1


def test_a_step_whose_state_cannot_be_placed_is_not_kept(ranks: Ranks) -> None:
    ranks.run(initialise_on_the_second_try, timeout_s=60)


class Scales(Optimizer):
    """Its step asks a function that the user keeps in the group."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["scale"](group["lr"]))


def scale_by(factor: float) -> Callable[[float], float]:
    return lambda lr: lr * factor


def replace_a_function() -> None:
    model = Net()
    optimizer = Scales([{"params": model.parameters(), "scale": scale_by(1.0)}], {"lr": 0.1})
    zgraph.compile(model, optimizer=optimizer)
    for _ in range(2):
        model.train_step(INDEX)
    assert model.stats()["num_captures"] == 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.param_groups[0]["scale"] = scale_by(0.0)
    model.train_step(INDEX)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.stats()["num_captures"] == 2
    if world()[0] == 1:
        optimizer.param_groups[0]["scale"] = scale_by(1.0)
    with pytest.raises(RankError, match="objects among the optimizer's options"):
        model.train_step(INDEX)
    optimizer.param_groups[0]["scale"] = scale_by(2.0)
    assert model.train_step(INDEX).isfinite()


def test_functions_among_the_optimizers_options_are_compared_by_name_and_replaced_by_identity(ranks: Ranks) -> None:
    ranks.run(replace_a_function)


OUT_OF_RANGE = torch.tensor([0, 1, 9])


def fail_within_a_step(zero: int) -> None:
    model, optimizer = compiled(zero)
    model.train_step(INDEX)
    with pytest.raises(IndexError):
        model.train_step(OUT_OF_RANGE)
    collectives = [lambda: model.train_step(INDEX), optimizer.state_dict]
    collectives += [model.state_dict] if zero == 3 else []
    for call in collectives:
        with pytest.raises(RankError, match=r"IndexError: .*out of range") as refusal:
            call()
        assert isinstance(refusal.value.__cause__, IndexError)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_step_that_fails_between_collectives_is_the_last(ranks: Ranks, zero: int) -> None:
    ranks.run(fail_within_a_step, zero, timeout_s=60)


def test_a_step_that_fails_in_a_single_process_is_no_step() -> None:
    (model, optimizer), (other, other_optimizer) = compiled(), compiled()
    for each in (model, other):
        each.train_step(INDEX)
    with pytest.raises(IndexError):
        model.train_step(OUT_OF_RANGE)
    assert model.train_step(INDEX).item() == other.train_step(INDEX).item()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert str(optimizer.state_dict()) == str(other_optimizer.state_dict())


def do_different_things() -> None:
    model, optimizer = compiled(zero=3)
    model.train_step(INDEX)

    def evaluate() -> None:
        with torch.no_grad():
            model(INDEX)

    calls = {
        "model.train_step()": lambda: model.train_step(INDEX),
        "model.state_dict()": model.state_dict,
        "optimizer.state_dict()": optimizer.state_dict,
        "model()": evaluate,
    }
    for one, other in itertools.permutations(calls, 2):
        with pytest.raises(RankError, match=re.escape(f"rank 0 has called {one}, rank 1 {other}")):
            calls[(one, other)[world()[0]]]()
    for call in calls.values():
        call()
    assert model.train_step(INDEX).isfinite()


def test_ranks_that_call_different_things_are_told_which(ranks: Ranks) -> None:
    ranks.run(do_different_things, timeout_s=60)


def save_on_rank_0() -> None:
    model, _ = compiled(zero=2)
    model.train_step(INDEX)
    if world()[0] == 0:
        model.state_dict()
    model.train_step(INDEX)


def test_one_rank_may_save_what_it_has_whole(ranks: Ranks) -> None:
    ranks.run(save_on_rank_0, timeout_s=60)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return (self.weight * x).sum() * factor


def count_sources() -> int:
    """Steps whose source Python's tracebacks can show."""
    return sum(name.startswith("<zgraph step") for name in linecache.cache)


def test_a_bounded_number_of_steps_is_kept_and_who_needs_more_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "NUM_KEPT_STEPS", 2)
    model = Scaled()
    zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.0))
    programs, num_sources = [], count_sources()
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 4.0, 2.0):
        assert model.train_step(torch.ones(2), factor).item() == 2 * factor
        programs.append(weakref.ref(model.program))
    assert model.stats()["num_captures"] == 5, "the step for 1.0 was among those used last"
    gc.collect()
    assert len({id(program()) for program in programs if program() is not None}) == 2
    assert count_sources() <= num_sources + 2
    told = [record.getMessage() for record in caplog.records if "times" in record.getMessage()]
    assert len(told) == 1
    assert "the arguments' shapes and values changed 2 times" in told[0]
    assert "as tensors" in told[0]


class CreatesState(Optimizer):
    """Its first step differs from later ones."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if "velocity" in self.state[p]:
                    self.state[p]["velocity"].add_(p.grad)
                else:
                    self.state[p]["velocity"] = p.grad.clone()
                p.sub_(self.state[p]["velocity"], alpha=group["lr"])


def test_the_second_capture_of_an_optimizer_that_creates_its_state_is_explained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net()
    zgraph.compile(model, optimizer=CreatesState(model.parameters()))
    for _ in range(3):
        model.train_step(INDEX)
    assert model.stats()["num_captures"] == 2
    (told,) = [record.getMessage() for record in caplog.records if record.name == "zgraph"]
    assert "created optimizer state" in told


@pytest.mark.parametrize("name", ["train_step", "kernels", "plan", "recipe"])
def test_an_attribute_that_compiling_would_hide_is_refused(name: str) -> None:
    model = Net()
    model.add_module(name, nn.Linear(1, 1))
    with pytest.raises(OptionError, match=f"the model has an attribute '{name}', which zgraph.compile would hide"):
        zgraph.compile(model, optimizer=SGD(model.parameters()))
    assert type(model) is Net


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO()), copy.copy])
def test_a_compiled_model_refuses_to_be_pickled(save: Callable[[nn.Module], Any]) -> None:
    model, _ = compiled()
    model.train_step(INDEX)
    with pytest.raises(StateError, match=r"pickled") as refusal:
        save(model)
    assert "state_dict()" in refusal.value.fix


def test_a_copy_in_a_single_process_trains_on_its_own() -> None:
    model, _ = compiled()
    model.train_step(INDEX)
    other = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [other.train_step(INDEX) for _ in range(2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert losses == [model.train_step(INDEX) for _ in range(2)]


def test_an_optimizer_that_is_copied_with_its_model_has_its_state() -> None:
    """Though torch copies no hooks, by which state is saved and loaded."""
    model, optimizer = compiled()
    model.train_step(INDEX)
    for copied in (copy.deepcopy((model, optimizer)), copy.deepcopy((optimizer, model))[::-1]):
        other, theirs = copied
        torch.testing.assert_close(theirs.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
        saved = copy.deepcopy((other.state_dict(), theirs.state_dict()))
        loss = other.train_step(INDEX)
        other.load_state_dict(saved[0])
        theirs.load_state_dict(saved[1])
        assert torch.equal(other.train_step(INDEX), loss)


def copy_on_two_ranks() -> None:
    model, _ = compiled()
    with pytest.raises(StateError, match="process group"):
        copy.deepcopy(model)


def test_a_model_that_is_divided_refuses_to_be_copied(ranks: Ranks) -> None:
    ranks.run(copy_on_two_ranks)
