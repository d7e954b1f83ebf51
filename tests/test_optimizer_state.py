"""Optimizer state is absorbed into buckets, and comes back in torch's own format, exactly."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.layouts import layout_of
from zgraph.errors import StateError
from zgraph.state import TrainingState


class Net(nn.Module):
    """A layer, a tied one, a frozen one, a 0-dim and a one-element parameter, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)
        self.outer = nn.Linear(7, 7)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(1))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.frozen(self.outer(self.inner(x).relu())) * self.scale + self.shift).square().mean()


Make = Callable[[Any], torch.optim.Optimizer]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, amsgrad=True)


def fused_adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01, fused=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def adagrad(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1)


def rmsprop(params: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.9)


def nadam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(params, lr=0.01)


class Lion(torch.optim.Optimizer):
    """Of the kind that users write: a number, not a tensor, counts the steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    moment = state.setdefault("moment", torch.zeros_like(p))
                    p.add_(torch.sign(moment.mul_(0.9).add_(p.grad)), alpha=-group["lr"])


OPTIMIZERS = [adamw, fused_adam, sgd, adagrad, rmsprop, nadam, Lion]


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def trained(make: Make, num_steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).backward()
        optimizer.step()
    return model, optimizer


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, str]:
    """Parameters that have been updated share no bucket with those that have not."""
    forms = TrainingState(model, optimizer, None).state_forms()
    return {name: repr(sorted(form.items())) for name, form in forms.items()}


def layout_for(model: nn.Module, optimizer: torch.optim.Optimizer, zero: int, **options: Any) -> Any:
    return layout_of(model, world(), zero, groups=groups_of(model, optimizer), **options)


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Equal to the last bit: types, order of keys, dtypes and devices."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device) == (expected.dtype, expected.device), path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    else:
        assert found == expected, path


def absorb_all(zero: int) -> None:
    for make in OPTIMIZERS:
        absorb(make, zero)


def absorb(make: Make, zero: int) -> None:
    model, optimizer = trained(make)
    expected = copy.deepcopy(optimizer.state_dict())
    storages = [
        StorageWeakRef(t.untyped_storage()) for s in optimizer.state.values() for t in s.values() if is_large(t)
    ]
    state = TrainingState(model, optimizer, group())
    layout = layout_for(model, optimizer, zero)
    state.commit(layout)
    assert not optimizer.state
    assert all(storage.expired() for storage in storages), "the memory from before is free"
    for bucket in layout.buckets:
        for value in state.opt[bucket.name].values():
            assert not isinstance(value, torch.Tensor) or value.shape in ((), (layout.state_numel(bucket),))
    for _ in range(2):
        assert_same(optimizer.state_dict(), expected)
        assert not optimizer.state


def is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


@pytest.mark.parametrize(
    ("world", "zero"), [(1, 0), (2, 0), (2, 1), (2, 3), pytest.param(3, 3, marks=pytest.mark.slow)]
)
def test_existing_state_moves_to_the_buckets_and_is_given_back(ranks, world, zero):
    ranks.run(absorb_all, zero, world=world)


def load_all(zero: int) -> None:
    for make in OPTIMIZERS:
        load(make, zero)


def load(make: Make, zero: int) -> None:
    source, source_optimizer = trained(make, num_steps=5)
    source_optimizer.param_groups[0]["lr"] = 0.5
    expected = copy.deepcopy(source_optimizer.state_dict())
    model, optimizer = trained(make, num_steps=0)
    state = TrainingState(model, optimizer, group())
    state.commit(layout_for(source, source_optimizer, zero))

    file = io.BytesIO()
    torch.save(expected, file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_same(optimizer.state_dict(), expected)
    assert all(p.is_meta == state.layout.shard_params for p in model.parameters())

    optimizer.load_state_dict({**expected, "state": {}})
    assert state.opt == {bucket.name: {} for bucket in state.layout.buckets}
    assert_same(optimizer.state_dict(), {**expected, "state": {}})


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 1), (2, 3)])
def test_a_loaded_state_dict_is_given_back(ranks, world, zero):
    ranks.run(load_all, zero, world=world)


def load_old_format() -> None:
    """Step counts used to be plain numbers; the optimizer's own ``__setstate__`` makes them tensors."""
    model, optimizer = trained(adamw)
    expected = copy.deepcopy(optimizer.state_dict())
    old = copy.deepcopy(expected)
    for entries in old["state"].values():
        entries["step"] = int(entries["step"])
    state = TrainingState(model, optimizer, group())
    state.commit(layout_for(model, optimizer, 3))
    optimizer.load_state_dict(old)
    assert_same(optimizer.state_dict(), expected)


def test_old_checkpoints_load_as_torch_loads_them(ranks):
    ranks.run(load_old_format, world=2)


def load_half_precision() -> None:
    """Torch casts loaded state to the dtype of its parameter."""
    model, optimizer = trained(adamw)
    half = copy.deepcopy(optimizer.state_dict())
    for entries in half["state"].values():
        entries["exp_avg"] = entries["exp_avg"].half()
    reference_model, reference = trained(adamw, num_steps=0)
    reference.load_state_dict(copy.deepcopy(half))
    state = TrainingState(model, optimizer, group())
    state.commit(layout_for(model, optimizer, 3))
    optimizer.load_state_dict(half)
    assert_same(optimizer.state_dict(), reference.state_dict())
    assert len(list(reference_model.parameters())) == len(list(model.parameters()))


def test_loaded_state_takes_the_dtype_of_its_parameter(ranks):
    ranks.run(load_half_precision, world=2)


def change_layouts(steps: list[dict[str, Any]]) -> None:
    for make in (adamw, Lion):
        change_layout(make, steps)


def change_layout(make: Make, steps: list[dict[str, Any]]) -> None:
    model, optimizer = trained(make)
    expected = copy.deepcopy(optimizer.state_dict())
    groups = groups_of(model, optimizer)
    state = TrainingState(model, optimizer, group())
    for options in steps:
        layout = layout_of(model, world(), groups=groups, **options)
        state.commit(layout)
        assert set(state.opt) == {bucket.name for bucket in layout.buckets}
        assert_same(optimizer.state_dict(), expected)


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_another_layout_keeps_every_value(ranks, world):
    steps = [
        {"zero": 0},
        {"zero": 3},
        {"zero": 3, "bucket_bytes": 4096, "reverse": True},
        {"zero": 1, "bucket_bytes": 64},
        {"zero": 0},
    ]
    ranks.run(change_layouts, steps, world=world)


def create_in_executor() -> None:
    """What a first step would add to the buckets comes out as torch's own state."""
    model, optimizer = trained(adamw)
    expected = copy.deepcopy(optimizer.state_dict())
    forms = TrainingState(model, optimizer, group()).state_forms()
    groups = groups_of(model, optimizer)
    by_name = {name: optimizer.state.pop(p) for name, p in model.named_parameters() if p in optimizer.state}
    state = TrainingState(model, optimizer, group())
    layout = layout_of(model, world(), 3, groups=groups)
    state.commit(layout)
    assert state.opt == {bucket.name: {} for bucket in layout.buckets}
    for bucket in layout.buckets:
        start = dist.get_rank() * layout.state_numel(bucket)
        for key, form in forms[bucket.segments[0].name].items():
            if form.flat:
                full = torch.zeros(bucket.numel)
                for segment in bucket.segments:
                    full[segment.offset : segment.offset + segment.numel] = by_name[segment.name][key].reshape(-1)
                state.opt[bucket.name][key] = full[start : start + layout.state_numel(bucket)]
            else:
                state.opt[bucket.name][key] = by_name[bucket.segments[0].name][key]
    assert state.state_forms() == forms
    assert_same(optimizer.state_dict(), expected)


def test_state_that_a_step_created_is_given_back(ranks):
    ranks.run(create_in_executor, world=2)


class Scale(nn.Module):
    """A parameter without dimensions, which a step count cannot be told from by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        self.gain.fill_(1)


def layer_and_scale() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), Scale(), nn.Linear(5, 7))


def adagrad_on_meta(fused: bool) -> None:
    with torch.device("meta"):
        model = layer_and_scale()
        optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.25, fused=fused)
    state = TrainingState(model, optimizer, group())
    state.commit(layout_of(model, world(), 3))
    reference = torch.optim.Adagrad(layer_and_scale().parameters(), initial_accumulator_value=0.25, fused=fused)
    assert_same(optimizer.state_dict(), reference.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_state_that_the_constructor_made_on_meta_gets_values(ranks, fused):
    ranks.run(adagrad_on_meta, fused, world=2)


class MadeOnMeta(torch.optim.Optimizer):
    """Its constructor makes state and cannot be called with the options it keeps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"kept": 1})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.ones_like(p)


def test_state_on_meta_that_cannot_be_made_again_is_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    state = TrainingState(model, MadeOnMeta(model.parameters()), None)
    with pytest.raises(StateError, match="MadeOnMeta created state on meta"):
        state.commit(layout_of(model, 1, 0))
    assert all(p.is_meta for p in model.parameters())


def test_a_parameter_without_dimensions_has_moments_and_a_step_count():
    torch.manual_seed(0)
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam(model.parameters())
    model.scale.square().backward()
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict())
    state = TrainingState(model, optimizer, None)
    state.commit(layout_of(model, 1, 0))
    assert {key: value.shape for key, value in state.opt["bucket0"].items()} == {
        "step": (), "exp_avg": (16,), "exp_avg_sq": (16,),
    }  # fmt: skip
    assert_same(optimizer.state_dict(), expected)


def unfreeze() -> None:
    """Groups by form keep apart what has made different numbers of steps."""
    model, optimizer = trained(adamw)
    model.unused.grad = torch.ones(3)
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict())
    expected["state"] = dict(sorted(expected["state"].items()))  # torch has them in the order of their first steps
    state = TrainingState(model, optimizer, group())
    state.commit(layout_for(model, optimizer, 3))
    assert_same(optimizer.state_dict(), expected)
    assert state.state_forms()["unused"]["step"].value == 1
    assert state.state_forms()["shift"]["step"].value == 4
    assert state.state_forms()["frozen.bias"] == {}


def test_parameters_with_different_step_counts_keep_theirs(ranks):
    ranks.run(unfreeze, world=2)


# -- refusals ---------------------------------------------------------------------------------------------------------


def wrong_step(entries: dict[str, Any]) -> None:
    entries["step"] = torch.tensor(9.0)


def absent(entries: dict[str, Any]) -> None:
    del entries["exp_avg"]


def wrong_dtype(entries: dict[str, Any]) -> None:
    entries["exp_avg"] = entries["exp_avg"].double()


def wrong_shape(entries: dict[str, Any]) -> None:
    entries["exp_avg"] = torch.ones(2)


def wrong_type(entries: dict[str, Any]) -> None:
    entries["history"] = [1, 2]


BAD = [
    (wrong_step, r"'step' of 'scale' is 3.0 \(torch.float32\) and of 'inner.bias' 9.0 \(torch.float32\)"),
    (
        absent,
        "'exp_avg' of 'scale' is a torch.float32 tensor shaped like the parameter and of 'inner.bias' absent",
    ),
    (wrong_dtype, "'exp_avg' of 'scale' is a torch.float32 .* of 'inner.bias' a torch.float64"),
    (wrong_shape, r"'exp_avg' of 'inner.bias' has shape \(2,\), not \(7,\)"),
    (wrong_type, "'history' of 'inner.bias' is a list"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_state_that_cannot_share_a_bucket_is_refused_at_commit(spoil, message):
    model, optimizer = trained(adamw)
    groups = groups_of(model, optimizer)
    spoil(optimizer.state[model.inner.bias])
    expected = copy.deepcopy(optimizer.state_dict())
    params = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    state = TrainingState(model, optimizer, None)
    with pytest.raises(StateError, match=message):
        state.commit(layout_of(model, 1, 0, bucket_bytes=4096, groups=groups))
    assert state.layout is None
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == params
    assert_same(optimizer.state_dict(), expected)


def refuse_loads(cases: list[tuple[Callable[[dict[str, Any]], None], str]]) -> None:
    for spoil, message in cases:
        refuse_load(spoil, message)


def refuse_load(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    model, optimizer = trained(adamw)
    expected = copy.deepcopy(optimizer.state_dict())
    state = TrainingState(model, optimizer, group())
    state.commit(layout_for(model, optimizer, 3, bucket_bytes=4096))
    bad = copy.deepcopy(expected)
    bad["param_groups"][0]["lr"] = 7.0
    spoil(bad["state"][[name for name, _ in model.named_parameters()].index("inner.bias")])
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(bad)
    assert not optimizer.state
    assert all(p.is_meta for p in model.parameters())
    assert_same(optimizer.state_dict(), expected)


def test_a_state_dict_that_does_not_fit_changes_nothing(ranks):
    ranks.run(refuse_loads, [bad for bad in BAD if bad[0] is not wrong_dtype], world=2)


def test_a_state_dict_of_another_optimizer_is_refused_by_torch_and_changes_nothing():
    model, optimizer = trained(adamw)
    state = TrainingState(model, optimizer, None)
    expected = copy.deepcopy(optimizer.state_dict())
    state.commit(layout_for(model, optimizer, 0))
    with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match the size"):
        optimizer.load_state_dict(torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict())
    assert_same(optimizer.state_dict(), expected)


def test_state_that_belongs_to_no_parameter_is_refused():
    model, optimizer = trained(adamw)
    optimizer.state["global"] = {"count": 1}
    state = TrainingState(model, optimizer, None)
    with pytest.raises(StateError, match=re.escape("an entry for 'global'")):
        state.commit(layout_of(model, 1, 0))
    del optimizer.state["global"]
    state.commit(layout_for(model, optimizer, 0))
    saved = optimizer.state_dict()
    saved["state"]["global"] = {"count": 1}
    with pytest.raises(StateError, match=re.escape("an entry 'global'")):
        optimizer.load_state_dict(saved)
