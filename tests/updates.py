"""Traced updates beside the ``step()`` that they are traced from, on a few small parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from zgraph.program import Input, Role
from zgraph.update import StateEntry, StateSpec, Update, hyperparameters, trace_update

CPU = torch.device("cpu")


class Params(nn.Module):
    """A matrix, a vector, a number, and one that has no gradient."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name, shape in (("matrix", (3, 2)), ("vector", (5,)), ("number", ()), ("unused", (2,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))


class ByParameter(Optimizer):
    """Updates one parameter after the other, as most optimizers do."""

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p)


TRAINED = ["matrix", "vector", "number"]


def traced(optimizer: Optimizer, params: nn.Module, state: StateSpec | None = None) -> Update:
    return trace_update(optimizer, dict(params.named_parameters()), TRAINED, state or {}, CPU)


def state_of(optimizer: Optimizer, params: nn.Module) -> StateSpec:
    """The spec of state that exists."""
    return {
        name: {
            key: StateEntry(tuple(v.shape), v.dtype, None if v.dim() else v.item())
            if isinstance(v, Tensor)
            else StateEntry((), None, v)
            for key, v in optimizer.state[p].items()
        }
        for name, p in params.named_parameters()
        if optimizer.state.get(p)
    }


def evaluate(update: Update, values: dict[Input, Any], gradients: dict[str, Tensor]) -> dict[Input, Any]:
    """Run a traced update on real values."""
    env: dict[fx.Node, Any] = {update.gradients[name]: gradient for name, gradient in gradients.items()}
    for node in update.graph.nodes:
        if node.op == "placeholder":
            if node not in env:
                what = node.meta["input"]
                env[node] = update.constants[what.name] if what.role is Role.CONSTANT else values[what]
        elif node.op == "call_function" and node.target.__module__ != "torch._ops.profiler":
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
    return {what: env[node] if isinstance(node, fx.Node) else node for what, node in update.results.items()}


def initial(update: Update, params: nn.Module) -> dict[Input, Any]:
    """Values of the state that an update reads in the first step."""
    found: dict[Input, Any] = {}
    shapes = {n.meta["input"]: n.meta["val"] for n in update.graph.find_nodes(op="placeholder") if "input" in n.meta}
    for what, start in (update.init or {}).items():
        if start.dtype is None:
            found[what] = start.fill
        elif start.fill is None:
            found[what] = params.get_parameter(what.name).detach().to(start.dtype, copy=True)
        else:
            found[what] = torch.full(shapes[what].shape, start.fill, dtype=start.dtype)
    return found


def assert_follows(make: Callable[[nn.Module], Optimizer], *, exact: bool, num_steps: int = 3) -> int:
    """The traced update and ``step()`` agree at every step; returns how many traces that took."""
    params = Params()
    optimizer = make(params)
    mine = {Input(Role.PARAM, name): p.detach().clone() for name, p in params.named_parameters()}
    state: dict[Input, Any] = {
        Input(Role.OPT_STATE, name, key): copy.deepcopy(value)
        for name, p in params.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    update: Update | None = None
    num_traces = 0
    for step in range(num_steps):
        if update is None or not _reads_all(update):
            update = traced(optimizer, params, state_of(optimizer, params))
            num_traces += 1
            state = {**initial(update, params), **state}
        gradients = {name: torch.randn_like(params.get_parameter(name)) for name in TRAINED}
        for name, gradient in gradients.items():
            params.get_parameter(name).grad = gradient.clone()
        numbers = {Input(Role.HYPER, path): value for path, value in hyperparameters(optimizer).items()}
        results = evaluate(update, {**mine, **state, **numbers}, gradients)
        optimizer.step()
        for name, p in params.named_parameters():
            if name not in TRAINED:
                continue
            expected = {Input(Role.PARAM, name): p.detach()}
            expected.update({Input(Role.OPT_STATE, name, k): v for k, v in optimizer.state[p].items()})
            assert {what for what in results if what.name == name} == set(expected)
            for what, value in expected.items():
                found = torch.as_tensor(results[what])
                if exact:
                    assert torch.equal(found, torch.as_tensor(value)), f"step {step}: {what}"
                else:
                    torch.testing.assert_close(found, torch.as_tensor(value), rtol=1e-13, atol=1e-15)
        mine.update({what: value for what, value in results.items() if what.role is Role.PARAM})
        state.update({what: value for what, value in results.items() if what.role is Role.OPT_STATE})
        optimizer.param_groups[0]["lr"] *= 0.5  # costs no trace
    return num_traces


def _reads_all(update: Update) -> bool:
    read = {n.meta["input"] for n in update.graph.find_nodes(op="placeholder") if "input" in n.meta}
    return {what for what in update.results if what.role is Role.OPT_STATE} <= read
