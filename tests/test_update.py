"""A traced update is the optimizer's own ``step()``, bit for bit, with its numbers as inputs."""

from __future__ import annotations

import copy
import math
import random
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import zgraph
from tests.optimizers import OPTIMIZERS, Lion
from tests.updates import CPU, TRAINED, ByParameter, Params, assert_follows, traced
from zgraph.errors import OptimizerError
from zgraph.program import Input, Role, describe
from zgraph.update import (
    StateEntry,
    StateSpec,
    check_step,
    hyperparameters,
    structure,
    trace_update,
    unnamed,
)

_QUICK = ("sgd_momentum", "sgd_nesterov", "adam_amsgrad", "adamw_groups", "adagrad", "rmsprop_centered", "lion")


@pytest.mark.parametrize("name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_the_traced_update_is_the_optimizers_step(name: str) -> None:
    num_traces = assert_follows(OPTIMIZERS[name], exact="fused" not in name and "foreach" not in name)
    assert num_traces <= 2


def test_what_branches_only_where_torch_has_no_other_path_is_refused_for_its_branch() -> None:
    class Branching(ByParameter):
        def update(self, group: dict[str, Any], p: Tensor) -> None:
            if p.grad.sum() > 0:  # type: ignore[union-attr]
                p.add_(p.grad, alpha=-group["lr"])  # type: ignore[arg-type]

    params = Params()
    for defaults in ({"lr": 0.1}, {"lr": 0.1, "capturable": False}):
        with pytest.raises(OptimizerError, match=r"decides by the value of a tensor") as caught:
            traced(Branching(params.parameters(), defaults), params)
        assert "p.grad.sum() > 0" in str(caught.value)


def test_conditions_on_numbers_become_guards() -> None:
    params = Params()
    groups = [{"params": [params.matrix], "weight_decay": 0.1}, {"params": [params.vector], "weight_decay": 0.0}]
    optimizer = SGD(groups, lr=0.5)
    update = trace_update(optimizer, dict(params.named_parameters()), TRAINED[:2], {}, CPU)
    decay = [Input(Role.HYPER, f"group{index}.weight_decay") for index in (0, 1)]
    guards = {guard.inputs: guard for guard in update.guards}
    assert guards[decay[0],].holds(0.1)
    assert guards[decay[0],].holds(0.7)
    assert not guards[decay[0],].holds(0.0)
    assert guards[decay[1],].holds(0.0)
    assert not guards[decay[1],].holds(0.1)
    assert not any("lr" in what.name for guard in update.guards for what in guard.inputs)


def test_a_condition_on_a_count_becomes_a_guard_on_that_state() -> None:
    params = Params()
    optimizer = Lion(params.parameters(), warm_up=5)
    state: StateSpec = {
        name: {"step": StateEntry((), None, 2), "momentum": StateEntry(tuple(p.shape), p.dtype)}
        for name, p in params.named_parameters()
        if name in TRAINED
    }
    update = traced(optimizer, params, state)
    (guard,) = (guard for guard in update.guards if guard.inputs == (Input(Role.OPT_STATE, "vector", "step"),))
    assert guard.text == "x0 + 1 < 5"
    assert [guard.holds(step) for step in (0, 2, 3, 4, 5)] == [True, True, True, False, False]


def test_numbers_are_hyperparameters_by_path_and_the_rest_is_structure() -> None:
    params = Params()
    optimizer = Adam([{"params": [params.matrix]}, {"params": [params.vector], "betas": [0.5, 0.25]}], lr=0.5)
    numbers = hyperparameters(optimizer)
    assert numbers["group0.lr"] == numbers["group1.lr"] == 0.5
    assert (numbers["group1.betas[0]"], numbers["group1.betas[1]"]) == (0.5, 0.25)
    assert not {"group0.amsgrad", "group0.params", "group0.maximize"} & set(numbers)
    before = structure(optimizer)
    optimizer.param_groups[0]["lr"] = 1  # a whole number where a float was
    assert hyperparameters(optimizer)["group0.lr"] == 1.0
    optimizer.param_groups[1]["betas"] = [0.1, 0.2]
    assert structure(optimizer) == before
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    assert hyperparameters(optimizer)["group0.lr"] == 0.25
    for key, value in (("amsgrad", True), ("maximize", True), ("betas", (0.1, 0.2, 0.3))):
        changed = copy.deepcopy(optimizer)
        changed.param_groups[1][key] = value
        assert structure(changed) != before, key
    assert structure(AdamW(params.parameters())) != structure(Adam(params.parameters()))


def test_objects_are_part_of_the_structure_by_name_and_can_be_told_apart() -> None:
    params = Params()
    optimizers = [
        AdamW([{"params": params.parameters(), "lr_fn": lambda step: step, "log": [torch.Generator()]}])
        for _ in range(2)
    ]  # fmt: skip
    assert structure(optimizers[0]) == structure(optimizers[1])
    assert "<lambda>" in str(structure(optimizers[0]))
    group = optimizers[0].param_groups[0]
    assert unnamed(optimizers[0]) == [group["log"][0], group["lr_fn"]]
    group["lr_fn"] = torch.sin
    assert structure(optimizers[0]) != structure(optimizers[1])


def test_tracing_leaves_the_optimizer_alone() -> None:
    params = Params()
    optimizer = Adam(params.parameters(), lr=0.1, foreach=True)
    before = {key: value for key, value in vars(optimizer).items() if key != "state"}
    group = dict(optimizer.param_groups[0])
    traced(optimizer, params)
    assert {key: value for key, value in vars(optimizer).items() if key != "state"} == before
    assert dict(optimizer.param_groups[0]) == group
    assert not optimizer.state
    assert all(p.grad is None for p in params.parameters())


def test_the_update_of_low_precision_parameters_keeps_their_dtypes() -> None:
    params = Params(torch.bfloat16)
    update = traced(AdamW(params.parameters()), params)
    assert {describe(node.meta["val"]) for what, node in update.results.items() if what.name == "vector"} == {  # type: ignore[union-attr]
        "bf16[5]",
        "f32[]",
    }


# Refusals


class Bad(ByParameter):
    """Plain SGD with one thing that no fixed graph can do."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.1, "count": 0})
        self.num_steps = 0
        self.log: list[int] = []
        self.table: dict[str, Any] = {}
        self.total = torch.zeros(2)

    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        raise NotImplementedError

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        self.extra(group, p)
        p.sub_(p.grad, alpha=group["lr"])


class Branches(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        if p.grad.abs().max() > 1:
            p.grad.zero_()


class ReadsValue(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        p.grad.mul_(float(p.grad.abs().max() > 1) or 0.5)


class Raises(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        raise LookupError("no such thing")


class KeepsText(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        self.state[p]["phase"] = "warm-up"


class CountsItself(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        self.num_steps += 1


class CountsInGroup(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        group["count"] += 1


class Schedules(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        group["lr"] = group["lr"] * 0.9


class Logs(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        self.log.append(1)


class KeepsTable(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        self.table["last"] = p.grad


class Draws(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        p.grad.mul_(random.random())


class WritesOwnTensor(Bad):
    def extra(self, group: dict[str, Any], p: Tensor) -> None:
        self.total += p.grad.sum()


@pytest.mark.parametrize(
    ("kind", "says", "line"),
    [
        (Branches, r"Branches.step\(\) decides by the value of a tensor", "if p.grad.abs().max() > 1:"),
        (ReadsValue, r"ReadsValue.step\(\) decides by the value of a tensor", "p.grad.mul_(float("),
        (Raises, r"Raises.step\(\) cannot be traced: LookupError: 'no such thing'|no such thing", "raise LookupError"),
        (KeepsText, r"keeps a str in its state", None),
        (CountsItself, r"CountsItself.step\(\) changes its attribute 'num_steps'", None),
        (CountsInGroup, r"CountsInGroup.step\(\) changes param_groups\[0\]\['count'\]", None),
        (Schedules, r"Schedules.step\(\) changes param_groups\[0\]\['lr'\]", None),
        (Logs, r"Logs.step\(\) changes its attribute 'log'", None),
        (KeepsTable, r"KeepsTable.step\(\) changes its attribute 'table'", None),
        (Draws, r"Draws.step\(\) draws numbers from random", None),
        (WritesOwnTensor, r"WritesOwnTensor.step\(\) writes to a tensor that is not in its state", "self.total +="),
        (lambda p: torch.optim.LBFGS(list(p)), r"LBFGS.step\(\) cannot be traced", None),
    ],
)
def test_what_no_graph_can_do_is_refused_with_its_line_and_without_a_trace(
    kind: Callable[[Any], Optimizer], says: str, line: str | None
) -> None:
    params = Params()
    optimizer = kind(params.parameters())
    before = {
        key: copy.copy(value) for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "total")
    }
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(OptimizerError, match=says) as refusal:
        traced(optimizer, params)
    assert refusal.value.fix
    if line is not None:
        assert line in (refusal.value.where or "")
        assert "test_update.py" in (refusal.value.where or "")
    assert {key: value for key, value in vars(optimizer).items() if key in before} == before
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert not optimizer.state
    if isinstance(optimizer, Bad):
        assert optimizer.total.tolist() == [0.0, 0.0]


def clip(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        nn.utils.clip_grad_value_(group["params"], 0.1)


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer: optimizer.register_step_pre_hook(clip),
        lambda optimizer: optimizer.register_step_post_hook(clip),
        lambda _: register_optimizer_step_pre_hook(clip),
        lambda _: register_optimizer_step_post_hook(clip),
    ],
)
def test_step_hooks_are_refused_with_their_name_and_line(register: Callable[[Optimizer], Any]) -> None:
    optimizer = SGD(Params().parameters(), lr=0.1)
    handle = register(optimizer)
    with pytest.raises(OptimizerError, match="SGD has a step hook, clip,") as refusal:
        check_step(optimizer)
    assert "def clip(" in (refusal.value.where or "")
    handle.remove()
    check_step(optimizer)


def test_a_step_that_was_replaced_on_the_object_is_refused() -> None:
    optimizer = SGD(Params().parameters(), lr=0.1)
    plain = optimizer.step

    def twice(_: Optimizer) -> None:
        plain()
        plain()

    optimizer.step = types.MethodType(twice, optimizer)  # type: ignore[method-assign]
    with pytest.raises(OptimizerError, match=r"step was replaced on this SGD by .*twice") as refusal:
        check_step(optimizer)
    assert "def twice(" in (refusal.value.where or "")
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # a scheduler on top does not hide it
    with pytest.raises(OptimizerError, match=r"step was replaced on this SGD by .*twice"):
        check_step(optimizer)


def test_a_step_that_a_scheduler_wrapped_is_still_the_optimizers() -> None:
    optimizer = SGD(Params().parameters(), lr=0.1)
    for _ in range(2):
        torch.optim.lr_scheduler.ConstantLR(optimizer)
        assert "step" in vars(optimizer)
        check_step(optimizer)


class Scheduled(ByParameter):
    """A learning rate that is a function of the step count, by ``math``."""

    def __init__(self, params: Any, name: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.name = name

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        p.sub_(p.grad, alpha=group["lr"] * getattr(math, self.name)(1 / (1 + state["step"])))


@pytest.mark.parametrize("name", ["sqrt", "log2", "atan", "cosh"])
def test_functions_of_a_step_count_need_no_capture_for_each_step(name: str) -> None:
    torch.manual_seed(0)
    model, reference = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    reference.load_state_dict(model.state_dict())
    compiled: Any = zgraph.compile(
        model, optimizer=Scheduled(model.parameters(), name), loss=lambda y, _: y.square().mean()
    )
    eager = Scheduled(reference.parameters(), name)
    for _ in range(4):
        x = torch.ones(2, 3, dtype=torch.float64)
        compiled.train_step(x)
        eager.zero_grad()
        reference(x).square().mean().backward()
        eager.step()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in reference.state_dict().items())
    assert compiled.stats()["num_captures"] <= 2
