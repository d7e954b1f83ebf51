"""Initial state is found where one update serves for all steps, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

import zgraph
from tests.optimizers import Lion
from tests.updates import TRAINED, ByParameter, Params, assert_follows, state_of, traced
from zgraph.program import Input, Role, StateInit


@pytest.mark.parametrize(
    ("make", "init"),
    [
        (AdamW, {"step": StateInit(0, torch.float32), "exp_avg": StateInit(0, torch.float64),
                 "exp_avg_sq": StateInit(0, torch.float64)}),
        (RMSprop, {"step": StateInit(0, torch.float32), "square_avg": StateInit(0, torch.float64)}),
        (lambda p: Adagrad(p, initial_accumulator_value=0.25), {}),  # its constructor creates the state
        (lambda p: SGD(p, lr=0.1), {}),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), None),  # the first gradient is the momentum, undampened
        (Lion, None),  # math.sqrt(1) is a literal
    ],
)  # fmt: skip
def test_initial_state_is_found_where_the_first_step_is_like_the_others(
    make: Callable[[Any], Optimizer], init: dict[str, StateInit] | None
) -> None:
    params = Params()
    optimizer = make(params.parameters())
    update = traced(optimizer, params, state_of(optimizer, params))
    expected = None if init is None else {Input(Role.OPT_STATE, n, k): s for n in TRAINED for k, s in init.items()}
    assert update.init == expected


class Anchored(ByParameter):
    """Pulls parameters towards where they started; keeps how strongly in its state, as a Python number."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, *, to_ones: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.to_ones = to_ones  # copy.copy of an optimizer would leave this out

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if not state:
            state["anchor"] = torch.ones_like(p) if self.to_ones else p.clone()
            state["strength"] = 0.25
        p.add_(state["anchor"] - p, alpha=group["lr"] * state["strength"]).sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("to_ones", [False, True])
def test_state_that_starts_as_the_parameter_or_as_a_python_number_is_found(to_ones: bool) -> None:
    params = Params()
    update = traced(Anchored(params.parameters(), to_ones=to_ones), params)
    assert update.init is not None
    assert update.init[Input(Role.OPT_STATE, "vector", "anchor")] == StateInit(1 if to_ones else None, torch.float64)
    assert update.init[Input(Role.OPT_STATE, "vector", "strength")] == StateInit(0.25, None)
    assert assert_follows(lambda p: Anchored(p.parameters(), to_ones=to_ones), exact=True) == 1


class Late(ByParameter):
    """Creates a second state in the second step."""

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        elif "square" not in state:
            state["square"] = p.grad.square()
        state["momentum"].add_(p.grad)
        p.sub_(state["momentum"], alpha=group["lr"])
        if "square" in state:
            p.sub_(state["square"], alpha=group["lr"])


def test_state_that_is_created_in_a_later_step_is_traced_again() -> None:
    assert_follows(lambda p: Late(p.parameters(), {"lr": 0.1}), exact=True, num_steps=4)


class Diary(ByParameter):
    """Keeps what it has done, and never reads it."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.1})

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        self.state[p]["last"], self.state[p]["num"] = p.grad * group["lr"], 3
        p.sub_(p.grad, alpha=group["lr"])


def test_state_that_is_never_read_may_start_as_anything() -> None:
    params = Params()
    update = traced(Diary(params.parameters()), params)
    assert update.init is not None
    assert update.init[Input(Role.OPT_STATE, "vector", "last")] == StateInit(0, torch.float64)


class Halving(ByParameter):
    """Its state is a Python number that the first step makes of nothing but numbers."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.1})

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        state["decay"] = state.get("decay", 1.0) * 0.5
        p.sub_(p.grad, alpha=group["lr"] * state["decay"])


def test_state_may_be_a_number_that_is_known_while_tracing() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Halving(model.parameters())
    compiled: Any = zgraph.compile(model, optimizer=optimizer, loss=lambda y, _: y.square().mean())
    for _ in range(3):
        compiled.train_step(torch.ones(2, 3))
    assert {entries["decay"] for entries in optimizer.state_dict()["state"].values()} == {0.125}
