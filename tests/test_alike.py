"""An update that is copied to parameters of the same form is the update that the optimizer makes of all of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from tests.optimizers import OPTIMIZERS
from tests.test_shortcuts import Alike, Expressions
from tests.updates import CPU
from zgraph.alike import representatives
from zgraph.program import Role
from zgraph.update import StateEntry, StateSpec, Update, trace_update


def update_of(optimizer: torch.optim.Optimizer, model: nn.Module, state: StateSpec) -> Update:
    params = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return trace_update(optimizer, params, [name for name, p in params.items() if id(p) in held], state, CPU)


def of_each(*args: Any) -> dict[str, str]:
    return {name: name for name in args[2]}


def calls(update: Update) -> list[Any]:
    """Operators on tensors, in order; scopes for a profiler, in which nothing is computed, left out."""
    targets = [node.target for node in update.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [target for target in targets if target.namespace != "profiler"]


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copied_update_is_that_of_all_parameters(name: str, is_first: bool) -> None:
    torch.manual_seed(0)
    model = Alike()
    optimizer = OPTIMIZERS[name](model)
    state = {} if is_first else update_of(optimizer, model, {}).state
    copied = update_of(optimizer, model, state)
    with mock.patch("zgraph.update.representatives", of_each):
        whole = update_of(optimizer, model, state)
    expressions = Expressions()
    assert expressions.of(copied) == expressions.of(whole)
    assert list(copied.results) == list(whole.results)
    assert list(copied.state) == list(whole.state)
    if name != "adafactor":  # where a number is computed once for matrices and vectors, and now twice
        assert sorted(map(str, calls(copied))) == sorted(map(str, calls(whole)))
    if name not in ("adafactor", "adamw_groups"):  # groups may be in another order than the model's parameters
        assert calls(copied) == calls(whole)
    copied.graph.lint()


def test_only_one_parameter_of_each_form_is_traced() -> None:
    model = Alike()
    optimizer = AdamW(model.parameters())
    step = AdamW.step
    seen = []

    def watched(self: Any, closure: Any = None) -> Any:
        seen.append(sum(len(group["params"]) for group in self.param_groups))
        return step(self, closure)

    watched.__wrapped__ = step  # type: ignore[attr-defined]
    with mock.patch.object(AdamW, "step", watched):
        update = update_of(optimizer, model, {})
    assert seen == [5, 5]  # to create state, and with it
    assert len(update.gradients) == 10


def test_memory_is_each_parameters_own() -> None:
    update = update_of(AdamW((model := Alike()).parameters()), model, {})
    own = [node for node in update.graph.find_nodes(op="placeholder") if node.meta.get("input") is None]
    own += [
        n for n in update.graph.find_nodes(op="placeholder") if n not in own and n.meta["input"].role is not Role.HYPER
    ]
    memory = {node.meta["val"].untyped_storage()._cdata for node in own}
    assert len(memory) == len(own) == 10 * 5


def representatives_of(optimizer: torch.optim.Optimizer, model: nn.Module, state: StateSpec | None = None) -> list[str]:
    params = dict(model.named_parameters())
    return list(representatives(optimizer, params, list(params), state or {}).values())


class Mine(AdamW):
    """A user's."""


def test_parameters_are_alike_by_form_group_and_state_in_torchs_own_optimizers_alone() -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (2, 3), (3, 2), (2, 3), (6,)])
    assert representatives_of(AdamW(model), model) == ["0", "0", "2", "0", "4"]
    assert representatives_of(Mine(model), model) == ["0", "1", "2", "3", "4"]
    groups = [{"params": [model[0], model[2]]}, {"params": [model[3], model[1], model[4]], "lr": 0.1}]
    assert representatives_of(SGD(groups, lr=0.2), model) == ["0", "1", "2", "1", "4"]
    buffer = {"momentum_buffer": StateEntry((2, 3), torch.float32)}
    assert representatives_of(SGD(model, lr=0.2, momentum=0.9), model, {"1": buffer, "3": buffer}) == [*"01214"]
    counted = {"step": StateEntry((), None, 2)}  # conditions may be on it
    assert representatives_of(SGD(model, lr=0.2), model, {"0": counted, "1": counted}) == [*"01234"]
    with mock.patch.object(AdamW, "step", representatives_of):
        assert representatives_of(AdamW(model), model) == ["0", "1", "2", "3", "4"]
