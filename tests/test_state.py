"""Parameters move into buckets and back out without changing, whatever the layout and the number of ranks."""

from __future__ import annotations

import io
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.layouts import layout_of
from zgraph.errors import StateError
from zgraph.state import TrainingState

WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.slow)]


class Awkward(nn.Module):
    """Tied, scalar, one-element, prime-sized and frozen parameters; persistent and other buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 20)
        self.blocks = nn.ModuleList(nn.Linear(20, 20) for _ in range(2))
        self.norm = nn.BatchNorm1d(20)
        self.scale = nn.Parameter(torch.randn(()))
        self.shift = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(7, 3), requires_grad=False)
        self.head = nn.Linear(20, 37, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.randint(0, 9, ()))
        self.register_buffer("mask", torch.rand(5) > 0.5, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.relu(block(x)) * self.scale
        return self.head(x + self.shift + self.frozen.sum())


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def awkward(seed: int) -> Awkward:
    torch.manual_seed(seed)
    return Awkward()


def own_seed() -> int:
    return 1 + (dist.get_rank() if dist.is_initialized() else 0)


def committed(zero: int, seed: int | None = None, **options: Any) -> tuple[Awkward, TrainingState]:
    model = awkward(own_seed() if seed is None else seed)
    state = TrainingState(model, None, group())
    state.commit(layout_of(model, world(), zero, **options))
    return model, state


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].device == value.device, name
        assert torch.equal(found[name], value), name


# -- commit -----------------------------------------------------------------------------------------------------------


def take_over(zero: int) -> None:
    model = awkward(own_seed())
    params, storages = dict(model.named_parameters()), [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    model.scale.note = "mine"
    model.shift.grad = torch.ones(1)
    state = TrainingState(model, None, group())
    layout = layout_of(model, world(), zero)
    state.commit(layout)
    of_rank_0 = awkward(1)

    assert dict(model.named_parameters()) == params, "the same objects, by identity"
    assert all(type(p) is nn.Parameter for p in params.values())
    assert model.scale.note == "mine"
    assert model.shift.grad is None
    assert model.head.weight is model.embedding.weight
    assert [p.requires_grad for p in params.values()] == [p.requires_grad for p in of_rank_0.parameters()]
    deadline = time.monotonic() + 10
    while not all(storage.expired() for storage in storages):  # gloo's thread drops what it sent a moment later
        assert time.monotonic() < deadline, "the memory from before is not freed"
        time.sleep(0.01)

    assert_same(dict(state.full_params()), dict(of_rank_0.named_parameters()))
    assert_same(dict(model.named_buffers()), dict(of_rank_0.named_buffers()))
    for bucket in layout.buckets:
        flat = state.params[bucket.name]
        assert flat.shape == (layout.param_numel(bucket),)
        for segment in bucket.segments:
            param = params[segment.name]
            assert param.shape == segment.shape
            if layout.shard_params:
                assert param.is_meta
            else:
                assert param.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
                assert param.storage_offset() == segment.offset


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_commit_takes_over_the_values_of_rank_0_and_frees_what_was(ranks, world, zero):
    ranks.run(take_over, zero, world=world)


def padding_of_shards(zero: int) -> list[float]:
    _, state = committed(zero)
    sums = []
    for bucket in state.layout.buckets:
        full = state.params[bucket.name]
        if state.layout.shard_params:
            full = torch.cat([torch.zeros_like(full) for _ in range(dist.get_world_size())])
            dist.all_gather_single(full, state.params[bucket.name])
        used = torch.zeros_like(full, dtype=torch.bool)
        for segment in bucket.segments:
            used[segment.offset : segment.offset + segment.numel] = True
        sums.append(full[~used].abs().sum().item())
    return sums


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_padding_is_zero(ranks, zero):
    assert not any(ranks.run(padding_of_shards, zero, world=2)[0])


def test_whole_parameters_follow_their_bucket_and_run_eagerly():
    tokens = torch.arange(12)
    expected = awkward(1)(tokens)
    model, state = committed(zero=0)
    assert torch.equal(model(tokens), expected)
    bucket, _ = state.layout.find("embedding.weight")
    state.params[bucket.name].fill_(0.5)
    assert (model.embedding.weight == 0.5).all()


def test_whole_parameters_can_be_trained_eagerly():
    model, _ = committed(zero=0)
    model(torch.arange(12)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.scale.grad is not None
    assert model.scale.item() != awkward(1).scale.item()


def test_creating_a_state_changes_nothing():
    model = awkward(1)
    optimizer = torch.optim.AdamW(model.parameters())
    storages = [p.data_ptr() for p in model.parameters()]
    state = TrainingState(model, optimizer, None)
    assert state.layout is None
    assert storages == [p.data_ptr() for p in model.parameters()]
    assert_same(state.state_dict(model.state_dict), model.state_dict())
    assert optimizer.state_dict()["state"] == {}


def share_non_contiguous(zero: int) -> None:
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    expected = torch.arange(model.weight.numel()).view(model.weight.shape).float()
    model.weight.data.copy_(expected * own_seed())
    model.register_buffer("table", (torch.arange(6.0) + own_seed()).view(2, 3).t())
    assert not model.weight.is_contiguous()
    assert not model.table.is_contiguous()
    state = TrainingState(model, None, group())
    state.commit(layout_of(model, world(), zero))
    assert torch.equal(dict(state.full_params())["weight"], expected)
    assert torch.equal(model.table, (torch.arange(6.0) + 1).view(2, 3).t())


def test_non_contiguous_values_are_taken_over(ranks):
    ranks.run(share_non_contiguous, 3, world=2)


def dtypes(zero: int) -> None:
    model = nn.Module()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int16, torch.complex64, torch.bool):
        value = torch.randint(0, 2, (5, 7)).to(dtype)
        model.register_parameter(f"of_{str(dtype).partition('.')[2]}", nn.Parameter(value, requires_grad=False))
    before = tensors_of(model)
    state = TrainingState(model, None, group())
    state.commit(layout_of(model, world(), zero))
    assert_same(dict(state.full_params()), before)


def test_every_dtype_can_be_divided(ranks):
    ranks.run(dtypes, 3, world=2)


# -- another layout ---------------------------------------------------------------------------------------------------


def change_layout(steps: list[dict[str, Any]]) -> None:
    model, state = committed(zero=0, seed=1)
    expected = tensors_of(awkward(1))
    params = dict(model.named_parameters())
    model.steps.add_(own_seed())
    expected["steps"] += own_seed()
    for options in steps:
        layout = layout_of(model, world(), **options)
        state.commit(layout)
        assert state.layout is layout
        assert dict(model.named_parameters()) == params
        assert {name: flat.numel() for name, flat in state.params.items()} == {
            bucket.name: layout.param_numel(bucket) for bucket in layout.buckets
        }
        found = {**dict(state.full_params()), **dict(model.named_buffers())}
        assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("world", WORLDS)
def test_another_layout_keeps_every_value_and_each_ranks_buffers(ranks, world):
    steps = [
        {"zero": 3},
        {"zero": 3, "bucket_bytes": 4096},
        {"zero": 3, "bucket_bytes": 64, "reverse": True},
        {"zero": 1},
        {"zero": 1, "reverse": True},
        {"zero": 3},
    ]
    ranks.run(change_layout, steps, world=world)


def replace_a_module() -> None:
    model, state = committed(zero=3)
    torch.manual_seed(own_seed())
    model.blocks[1] = nn.Linear(20, 20)
    state.commit(layout_of(model, world(), 3))
    torch.manual_seed(1)
    expected = awkward(1)
    torch.manual_seed(1)
    expected.blocks[1] = nn.Linear(20, 20)
    assert_same(dict(state.full_params()), dict(expected.named_parameters()))


def test_a_parameter_that_the_user_has_replaced_is_taken_over_anew(ranks):
    ranks.run(replace_a_module, world=2)


def test_the_same_layout_again_moves_nothing():
    model, state = committed(zero=0)
    before = dict(state.params)
    state.commit(layout_of(model, 1, 0))
    assert all(state.params[name] is flat for name, flat in before.items())


# -- values that the user assigns --------------------------------------------------------------------------------------


def assign(zero: int) -> None:
    """``param.data = ...`` on every rank, values of its own: rank 0's count."""
    model, state = committed(zero)
    expected = tensors_of(awkward(1))
    flats, params = dict(state.params), dict(model.named_parameters())
    assert state.replaced() == []
    for name, value in (("blocks.0.weight", torch.ones(20, 20)), ("shift", torch.zeros(1).expand(1))):
        given_value = value * own_seed()
        if params[name].is_meta:
            torch.utils.swap_tensors(params[name], nn.Parameter(given_value))
        else:
            params[name].data = given_value
        expected[name] = value
    assert state.replaced() == ["shift", "blocks.0.weight"]
    state.commit(state.layout)
    assert state.replaced() == []
    assert dict(model.named_parameters()) == params
    assert all(state.params[name] is flat for name, flat in flats.items()), "only what is new is moved"
    assert_same({**dict(state.full_params()), **dict(model.named_buffers())}, expected)


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 1), (2, 3)])
def test_values_that_replace_a_parameters_memory_are_taken_in(ranks, world, zero):
    ranks.run(assign, zero, world=world)


def test_values_that_lie_in_the_place_of_others_are_taken_in():
    model, state = committed(zero=0)
    first, second = (block.weight for block in model.blocks)
    values = first.detach().clone(), second.detach().clone()
    first.data, second.data = second.data, first.data.t()
    assert state.replaced() == ["blocks.0.weight", "blocks.1.weight"]
    state.commit(state.layout)
    assert torch.equal(first, values[1])
    assert torch.equal(second, values[0].t())
    first.data = first.data.t()
    assert state.replaced() == ["blocks.0.weight"], "the same memory in another order"


def assign_and_change_layout(zero: int) -> None:
    model, state = committed(zero)
    expected = tensors_of(awkward(1))
    new = torch.full((20, 20), float(own_seed()))
    torch.utils.swap_tensors(model.blocks[0].weight, nn.Parameter(new))
    expected["blocks.0.weight"] = torch.ones(20, 20)
    state.commit(layout_of(model, world(), zero, bucket_bytes=4096))
    found = {**dict(state.full_params()), **dict(model.named_buffers())}
    assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("zero", [0, 3])
def test_assigned_values_survive_another_layout(ranks, zero):
    ranks.run(assign_and_change_layout, zero, world=2)


# -- state_dict -------------------------------------------------------------------------------------------------------


def save(zero: int) -> None:
    model, state = committed(zero)
    expected = awkward(1).state_dict()
    found = state.state_dict(model.state_dict)
    assert_same(found, expected)
    assert found._metadata == expected._metadata
    assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
    assert_same(state.state_dict(model.state_dict, prefix="inner."), {f"inner.{k}": v for k, v in expected.items()})
    destination = {"mine": torch.ones(1)}
    assert state.state_dict(model.state_dict, destination=destination) is destination
    assert list(destination) == ["mine", *expected]
    assert_same(state.state_dict(model.state_dict, keep_vars=True), expected)
    if state.layout.shard_params:
        assert all(p.is_meta for p in model.parameters())
        assert [found[key].untyped_storage().nbytes() for key in expected] == [v.nbytes for v in expected.values()]
        before = found["scale"].clone()
        for flat in state.params.values():
            flat.zero_()
        assert torch.equal(found["scale"], before), "training does not change a state dict that was taken"


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_state_dict_is_that_of_the_plain_model(ranks, world, zero):
    ranks.run(save, zero, world=world)


def save_with_hooks() -> list[str]:
    model, state = committed(3)
    model.blocks[0].register_state_dict_post_hook(halve_weight)
    model.register_state_dict_pre_hook(count)
    found = state.state_dict(model.state_dict)
    assert found["blocks.0.weight"].dtype == torch.float16
    assert torch.equal(found["blocks.0.weight"], awkward(1).blocks[0].weight.half())
    assert model.count == 1
    return list(found)


def halve_weight(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].half()
    del state_dict[f"{prefix}bias"]


def count(module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    module.count = getattr(module, "count", 0) + 1


def test_state_dict_hooks_see_full_values(ranks):
    keys = ranks.run(save_with_hooks, world=2)
    assert keys[0] == [key for key in awkward(1).state_dict() if key != "blocks.0.bias"]


def load(zero: int) -> None:
    model, state = committed(zero)
    file = io.BytesIO()
    torch.save(awkward(9).state_dict(), file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = state.load_state_dict(model.load_state_dict, torch.load(file))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(state.state_dict(model.state_dict), awkward(9).state_dict())
    again, other = committed(zero)
    other.load_state_dict(again.load_state_dict, state.state_dict(model.state_dict))
    assert_same(dict(other.full_params()), dict(state.full_params()))


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_load_state_dict_gives_what_was_saved(ranks, world, zero):
    ranks.run(load, zero, world=world)


def load_bad(zero: int) -> list[str]:
    model, state = committed(zero)
    before = {**dict(state.full_params()), **{n: b.clone() for n, b in model.named_buffers()}}
    good = awkward(9).state_dict()
    missing = {key: value for key, value in good.items() if key != "shift"}
    messages = []
    for bad in (
        missing,
        {**good, "extra": torch.ones(1)},
        {**good, "shift": torch.ones(2)},
        {**good, "shift": "a string"},
        {**good, "shift": torch.ones(1, device="meta")},
    ):
        with pytest.raises(RuntimeError, match=r"shift|extra") as caught:
            state.load_state_dict(model.load_state_dict, bad)
        messages.append(str(caught.value))
        assert_same({**dict(state.full_params()), **dict(model.named_buffers())}, before)
    with pytest.raises(StateError, match="assign"):
        state.load_state_dict(model.load_state_dict, good, assign=True)
    assert_same({**dict(state.full_params()), **dict(model.named_buffers())}, before)

    result = state.load_state_dict(model.load_state_dict, missing, strict=False)
    assert result.missing_keys == ["shift"]
    expected = {**tensors_of(awkward(9)), "shift": before["shift"], "mask": before["mask"]}
    assert_same({**dict(state.full_params()), **dict(model.named_buffers())}, {k: expected[k] for k in before})
    return messages


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 3)])
def test_a_state_dict_that_does_not_fit_changes_nothing(ranks, world, zero):
    messages = ranks.run(load_bad, zero, world=world)[0]
    assert "Missing key(s)" in messages[0]
    assert "Unexpected key(s)" in messages[1]
    assert "size mismatch for shift" in messages[2]
    assert "expected torch.Tensor" in messages[3]
    assert "no values" in messages[4]


def load_swapping() -> None:
    model, state = committed(3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        state.load_state_dict(model.load_state_dict, awkward(9).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(dict(state.full_params()), dict(awkward(9).named_parameters()))
    assert all(p.is_meta for p in model.parameters())


def test_loading_writes_to_the_shards_where_torch_would_swap_parameters(ranks):
    ranks.run(load_swapping, world=2)


def load_renamed() -> None:
    model, state = committed(3)
    model.register_load_state_dict_pre_hook(rename)
    renamed = {key.replace("scale", "gamma"): value for key, value in awkward(9).state_dict().items()}
    state.load_state_dict(model.load_state_dict, renamed)
    assert_same(dict(state.full_params()), dict(awkward(9).named_parameters()))


def rename(_module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    if "gamma" in state_dict:
        state_dict["scale"] = state_dict.pop("gamma")


def test_hooks_that_rename_keys_before_loading_are_honoured(ranks):
    ranks.run(load_renamed, world=2)


def test_a_buffer_is_the_modules_own():
    model, state = committed(0)
    assert state.buffer("norm.running_mean") is model.norm.running_mean
    model.steps = torch.tensor(3)
    assert state.buffer("steps") is model.steps
