"""A model built on meta gets the values, and leaves the random state, of the same resets on a whole model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import zgraph
from tests.layouts import layout_of
from zgraph.errors import RankError, StateError
from zgraph.state import TrainingState

WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.slow)]


class Net(nn.Module):
    """Torch's own modules, a tied head, and module-level oddities, with sizes that divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 10, padding_idx=0)
        self.block = Block(10)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.normalisation = nn.BatchNorm2d(5)
        self.recurrent = nn.LSTM(7, 5, num_layers=2)
        self.attention = nn.MultiheadAttention(10, 2)
        self.activation = nn.PReLU()
        self.head = nn.Linear(10, 23)
        self.head.weight = self.embedding.weight


class Block(nn.Module):
    """Its reset draws numbers for its child too, from ``.data`` and through torch.nn.init."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(size))
        self.register_buffer("frequencies", torch.empty(size), persistent=False)
        self.register_buffer("causal", torch.empty(size, size, dtype=torch.bool))
        self.register_buffer("positions", torch.empty(size, dtype=torch.int64))
        self.linear = nn.Linear(size, size)
        self.nothing = nn.Parameter(torch.empty(0, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.linear.weight.data.normal_()
        nn.init.uniform_(self.linear.bias)
        nn.init.trunc_normal_(self.gain)
        self.frequencies = 1 / torch.arange(1.0, len(self.frequencies) + 1)
        self.causal.fill_(True).tril_()
        torch.arange(len(self.positions), out=self.positions)


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reset_all(model: nn.Module) -> None:
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if own and reset is not None:
            with torch.no_grad():
                reset()


def whole(make: Callable[[], nn.Module], seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = make()
    torch.manual_seed(seed)
    reset_all(model)
    values = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return values, torch.get_rng_state()


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def commit(model: nn.Module, zero: int) -> TrainingState:
    state = TrainingState(model, None, group())
    state.commit(layout_of(model, world(), zero))
    return state


def assert_initialised(model: nn.Module, state: TrainingState, expected: dict[str, torch.Tensor]) -> None:
    found = {**dict(state.full_params()), **dict(model.named_buffers())}
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert not found[name].is_meta, name
        assert torch.equal(found[name], value), name


def equal_to_whole(make: Callable[[], nn.Module], zero: int) -> None:
    model = on_meta(make)
    params = dict(model.named_parameters())
    expected, generator = whole(make, seed=5)
    torch.manual_seed(5)
    state = commit(model, zero)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_initialised(model, state, expected)
    assert dict(model.named_parameters()) == params, "the same objects, by identity"
    for name, param in params.items():
        assert type(param) is nn.Parameter
        assert param.requires_grad
        if state.layout.shard_params:
            assert param.is_meta
        else:
            bucket, _ = state.layout.find(name)
            assert param.untyped_storage().data_ptr() == state.params[bucket.name].untyped_storage().data_ptr()


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_a_meta_model_equals_the_whole_model_from_the_same_seed(ranks, world, zero):
    ranks.run(equal_to_whole, Net, zero, world=world)


def different_seeds() -> None:
    model = on_meta(Net)
    expected, advanced = whole(Net, seed=1)
    torch.manual_seed(1 + dist.get_rank())
    before = torch.get_rng_state()
    assert_initialised(model, commit(model, 3), expected)
    after = advanced if dist.get_rank() == 0 else before
    assert torch.equal(torch.get_rng_state(), after)


def test_rank_0s_random_state_is_used_and_others_get_theirs_back(ranks):
    ranks.run(different_seeds, world=2)


def mixed(zero: int) -> None:
    """Only some modules are on meta: the others keep their values and draw nothing."""
    torch.manual_seed(3)
    model = Net()
    with torch.device("meta"):
        model.block = Block(10)
        model.recurrent = nn.LSTM(7, 5)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    torch.manual_seed(5)
    reference = nn.ModuleDict({"block": Block(10), "recurrent": nn.LSTM(7, 5)})
    torch.manual_seed(5)
    reset_all(reference)
    torch.manual_seed(5)
    found = dict(commit(model, zero).full_params())
    assert len(kept) + len(list(reference.parameters())) == len(found)
    for name, value in [*kept.items(), *reference.named_parameters()]:
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_modules_with_real_values_keep_them(ranks, zero):
    ranks.run(mixed, zero, world=2)


class Tied(nn.Module):
    """The second holder of the tied weight changes what the first wrote, long after."""

    class Head(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def reset_parameters(self) -> None:
            self.weight.mul_(0.5)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(9, 9)
        self.between = nn.Linear(9, 9)
        self.head = self.Head(self.first.weight)


class Late(nn.Module):
    """A later module rescales the weight of an earlier one, which is stored by then."""

    class Scaler(nn.Module):
        def __init__(self, earlier: nn.Linear) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.empty(3))
            self.earlier = [earlier]

        def reset_parameters(self) -> None:
            nn.init.normal_(self.gain)
            self.earlier[0].weight.div_(self.earlier[0].weight.norm())

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)
        self.scaler = self.Scaler(self.linear)


@pytest.mark.parametrize("make", [Tied, Late])
@pytest.mark.parametrize("world", WORLDS)
def test_what_later_modules_change_is_changed(ranks, world, make):
    ranks.run(equal_to_whole, make, 3 if world > 1 else 0, world=world)


class Watched(nn.Module):
    """Notes how much memory the parameters of the whole model have while it is being reset."""

    model: nn.Module
    seen_bytes: list[int]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        with torch._C.DisableTorchFunction():  # or to look would be to touch
            alive = [p for p in Watched.model.parameters() if not p.is_meta]
            Watched.seen_bytes.append(sum(p.untyped_storage().nbytes() for p in alive))
            Watched.references += [StorageWeakRef(p.untyped_storage()) for p in alive]


def peak_bytes(sizes: list[int]) -> tuple[list[int], bool]:
    Watched.model = on_meta(lambda: nn.Sequential(*(Watched(size) for size in sizes)))
    Watched.seen_bytes, Watched.references = [], []
    state = commit(Watched.model, 3)
    assert sum(flat.numel() for flat in state.params.values()) < 0.6 * sum(sizes)
    return Watched.seen_bytes, all(reference.expired() for reference in Watched.references)


def test_only_one_module_is_whole_at_a_time(ranks):
    sizes = [1000, 3000, 500]
    for seen_bytes, freed in ranks.run(peak_bytes, sizes, world=2):
        assert seen_bytes == [4 * size for size in sizes]
        assert freed


class Custom(nn.Module):
    """A module whose reset does what the test says."""

    def __init__(self, reset: Callable[[Custom], None] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3))
        self.register_buffer("table", torch.empty(4, dtype=torch.bool))
        if reset is not None:
            self.reset_parameters = lambda: reset(self)


def fill_weight_only(module: Custom) -> None:
    module.weight.normal_()


def fill_buffer_only(module: Custom) -> None:
    assert module.weight.shape == (5, 3)
    module.table.zero_()


def replace_weight(module: Custom) -> None:
    module.table.zero_()
    module.weight = nn.Parameter(torch.zeros(5, 3))


def leave_buffer_on_meta(module: Custom) -> None:
    module.weight.zero_()
    module.table = torch.ones(4, dtype=torch.bool, device="meta")


def fail(module: Custom) -> None:
    module.weight.normal_()
    module.table = torch.ones(4)
    raise ValueError("a bug of the user's")


BAD = [
    (fill_weight_only, StateError, "reset_parameters() of 1 (Custom) does not fill table"),
    (fill_buffer_only, StateError, "reset_parameters() of 1 (Custom) does not fill weight"),
    (leave_buffer_on_meta, StateError, "reset_parameters() of 1 (Custom) does not fill table"),
    (replace_weight, StateError, "reset_parameters() of 1 (Custom) replaces parameter 'weight'"),
    (fail, StateError, "reset_parameters() of 1 (Custom) raised ValueError: a bug of the user's"),
]


def refuse(reset: Callable[[Custom], None] | None, error: type[Exception], message: str) -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Custom(reset)))
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    generator = torch.get_rng_state()
    state = TrainingState(model, None, group())
    with pytest.raises(error, match=re.escape(message)):
        state.commit(layout_of(model, world(), 3))
    assert state.layout is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert dict(model.named_parameters()) == params
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(tensor.is_meta for tensor in [*params.values(), *buffers.values()])


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("reset", "error", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_reset_that_does_not_do_its_job_is_refused_and_changes_nothing(ranks, world, reset, error, message):
    ranks.run(refuse, reset, error, message, world=world)


def fail_on_rank_1(module: Custom) -> None:
    module.table.zero_()
    if dist.get_rank() == 1:
        raise ValueError("a bug of the user's")
    module.weight.normal_()


def refuse_on_rank_1(late: bool) -> None:
    """Rank 0 learns it where it would communicate next: to rescale a weight that is divided already, or at the end."""
    model = on_meta(lambda: nn.Sequential(Late().linear, Custom(fail_on_rank_1)))
    if late:
        with torch.device("meta"):
            model.append(Late.Scaler(model[0]))
    generator = torch.get_rng_state()
    state = TrainingState(model, None, group())
    if dist.get_rank() == 1:
        with pytest.raises(StateError, match=re.escape("reset_parameters() of 1 (Custom) raised")) as caught:
            state.commit(layout_of(model, 2, 3))
        assert "test_initialise.py" in caught.value.where
    else:
        with pytest.raises(RankError, match=re.escape("rank 1 failed: reset_parameters() of 1 (Custom) raised")):
            state.commit(layout_of(model, 2, 3))
    assert state.layout is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    state.agreement.check("still together")


@pytest.mark.parametrize("late", [False, True])
def test_a_reset_that_fails_on_one_rank_stops_all(ranks, late):
    ranks.run(refuse_on_rank_1, late, world=2, timeout_s=60)


def lacks_reset_on_rank_1() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Custom(fill_weight_only if dist.get_rank() == 0 else None)))
    state = TrainingState(model, None, group())
    with pytest.raises(StateError if dist.get_rank() == 1 else RankError, match=re.escape("1 (Custom): weight, table")):
        state.commit(layout_of(model, 2, 3))
    state.agreement.check("still together")


def test_a_module_that_one_rank_cannot_initialise_stops_all(ranks):
    ranks.run(lacks_reset_on_rank_1, world=2, timeout_s=60)


def test_modules_without_reset_parameters_are_named_before_anything_is_touched():
    message = (
        "modules that have tensors on meta have no reset_parameters() to initialise them: "
        "0 (Custom): weight, table; 2 (ParameterList): 0, 1"
    )
    with torch.device("meta"):
        unhelped = nn.ParameterList([torch.empty(2), torch.empty(3)])
        model = nn.Sequential(Custom(), nn.Linear(3, 3), unhelped)
    with pytest.raises(StateError, match=re.escape(message)):
        TrainingState(model, None, None).commit(layout_of(model, 1, 0))
    assert all(p.is_meta for p in model.parameters())


def test_a_meta_buffer_without_a_reset_is_refused():
    model = nn.Linear(3, 3)
    model.register_module("rotary", nn.Module())
    model.rotary.register_buffer("frequencies", torch.empty(4, device="meta"), persistent=False)
    with pytest.raises(StateError, match=re.escape("rotary (Module): frequencies")):
        TrainingState(model, None, None).commit(layout_of(model, 1, 0))


def train_then_change_layout() -> None:
    """Parameters that are on meta because they are divided are not initialised again."""
    model = on_meta(Net)
    state = commit(model, 3)
    before = dict(state.full_params())
    state.commit(layout_of(model, world(), 3, bucket_bytes=4096))
    found = dict(state.full_params())
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_another_layout_does_not_initialise_again(ranks):
    ranks.run(train_then_change_layout, world=2)


def tuned(build: Callable[[], nn.Module], saved: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A model that is given saved values before its first step, and its optimizer."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss = lambda y, x: (y - x).square().mean()  # noqa: E731
    model = zgraph.compile(model, optimizer, loss=loss, **options)
    assert model.load_state_dict(saved) == nn.Linear(3, 3).load_state_dict(saved)
    return model, optimizer


def load_before_the_first_step(offload: dict[str, str] | None) -> None:
    torch.manual_seed(1)
    saved = {name: value.clone() for name, value in nn.Linear(3, 3).state_dict().items()}
    whole, theirs = tuned(lambda: nn.Linear(3, 3), saved, zero=3)
    model, optimizer = tuned(lambda: on_meta(lambda: nn.Linear(3, 3)), saved, zero=3, offload=offload)
    x = torch.ones(2, 3) + (dist.get_rank() if dist.is_initialized() else 0)
    for _ in range(3):
        assert torch.equal(model.train_step(x), whole.train_step(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    found, expected = optimizer.state_dict()["state"], theirs.state_dict()["state"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model.load_state_dict(saved)
    torch.testing.assert_close(dict(model.state_dict()), saved, rtol=0, atol=0)


@pytest.mark.parametrize("offload", [None, {"parameters": "disk", "optimizer": "disk"}], ids=["in memory", "on a disk"])
@pytest.mark.parametrize("world", [1, 2])
def test_values_for_what_is_on_meta_are_loaded_when_it_is_initialised(ranks, world, offload):
    """Fine-tuning starts from them, and the optimizer has seen no others."""
    ranks.run(load_before_the_first_step, offload, world=world)


class Scaled(nn.Module):
    """Nobody can initialise its scale but whoever has values for it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 3))
        self.register_buffer("shift", torch.arange(3.0))
        self.inner = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + self.shift


def go_on_from_what_was_saved(
    kind: type[torch.optim.Optimizer], offload: dict[str, str] | None, model_first: bool, **options: Any
) -> None:
    """Neither memory nor time is spent on values that nobody needs."""

    def compiled(model: nn.Module, **more: Any) -> tuple[Any, Any]:
        optimizer = kind(model.parameters(), lr=0.1)
        loss = lambda y, x: (y - x).square().mean()  # noqa: E731
        return zgraph.compile(model, optimizer, loss=loss, zero=3, bucket_bytes=1, **options, **more), optimizer

    torch.manual_seed(1)
    whole, theirs = compiled(Scaled())
    x = torch.ones(2, 3) + (dist.get_rank() if dist.is_initialized() else 0)
    for _ in range(2):
        whole.train_step(x)
    saved, progress = copy.deepcopy((dict(whole.state_dict()), theirs.state_dict()))
    model, optimizer = compiled(on_meta(Scaled), offload=offload)
    for load in (True, False) if model_first else (False, True):
        if load:
            model.load_state_dict(saved)
        else:
            optimizer.load_state_dict(progress)
    assert all(param.is_meta for param in model.parameters())
    state = torch.get_rng_state()
    with mock.patch.object(nn.Linear, "reset_parameters", side_effect=AssertionError("for nothing")):
        losses = [model.train_step(x) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(loss, whole.train_step(x)) for loss in losses)
    torch.testing.assert_close(dict(model.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    found, expected = optimizer.state_dict()["state"], theirs.state_dict()["state"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


ON_DISK = {"parameters": "disk", "optimizer": "disk"}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("kind", "offload", "model_first", "options"),
    [
        (torch.optim.AdamW, None, True, {}),
        (torch.optim.AdamW, ON_DISK, False, {"ema": 0.9}),
        (torch.optim.Adagrad, ON_DISK, True, {}),  # its constructor makes state
        (torch.optim.SGD, None, False, {"state_precision": None}),
    ],
    ids=str,
)
def test_training_goes_on_from_what_was_saved_with_a_model_on_meta(ranks, world, kind, offload, model_first, options):
    ranks.run(go_on_from_what_was_saved, kind, offload, model_first, world=world, **options)


def test_a_module_is_initialised_unless_values_of_all_its_tensors_are_loaded():
    saved = Scaled().state_dict()
    loss = lambda y, x: (y - x).square().mean()  # noqa: E731
    for name in ("scale", "shift"):
        model = on_meta(Scaled)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        zgraph.compile(model, optimizer, loss=loss)
        model.load_state_dict({key: value for key, value in saved.items() if key != name}, strict=False)
        with pytest.raises(
            StateError, match=rf"no reset_parameters\(\) to initialise them: the model \(CompiledScaled\): {name}\n"
        ):
            model.train_step(torch.ones(2, 3))
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        model.load_state_dict(saved)
        model.train_step(torch.ones(2, 3))
        torch.testing.assert_close(dict(model.state_dict()), dict(saved), rtol=0, atol=0)


def test_what_is_loaded_is_not_there_before_the_first_step_and_must_stay_as_it_is():
    saved = {name: value.clone() for name, value in nn.Linear(3, 3).state_dict().items()}
    model = on_meta(lambda: nn.Linear(3, 3))
    zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), loss=lambda y, x: (y - x).square().mean())
    model.load_state_dict(saved)
    with pytest.raises(StateError, match=r"state_dict\(\) before the first step, which loads what load_state_dict"):
        model.state_dict()
    with torch.no_grad(), pytest.raises(StateError, match="calling the model before the first step"):
        model(torch.ones(2, 3))
    saved["bias"].zero_()
    with pytest.raises(StateError, match="bias of what load_state_dict was given has been written to before the first"):
        model.train_step(torch.ones(2, 3))
    assert all(param.is_meta for param in model.parameters())


def test_a_copy_of_a_model_that_waits_for_values_has_them():
    saved = nn.Linear(3, 3).state_dict()
    for value in saved.values():
        value.mul_(2).add_(1)  # before they are given; what is copied has another history
    model = on_meta(lambda: nn.Linear(3, 3))
    zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), loss=lambda y, x: (y - x).square().mean())
    model.load_state_dict(saved)
    copied = copy.deepcopy(model)
    for each in (copied, model):
        each.train_step(torch.ones(2, 3))
        torch.testing.assert_close(dict(each.state_dict()), dict(saved), rtol=0, atol=0)


def test_what_was_not_on_meta_is_loaded_once():
    model = nn.Sequential(nn.Linear(3, 3), on_meta(lambda: nn.Linear(3, 3)))
    zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), loss=lambda y, x: (y - x).square().mean())
    model.load_state_dict(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).state_dict())
    with torch.no_grad():
        model[0].weight.fill_(3)
    model.train_step(torch.ones(2, 3))
    assert (model.state_dict()["0.weight"] == 3).all()


def test_a_model_is_loaded_though_state_was_refused_before():
    model = on_meta(lambda: nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    zgraph.compile(model, optimizer, loss=lambda y, x: (y - x).square().mean())

    def refuse(*_: Any) -> None:
        raise ValueError("refused")

    optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="refused"):
        optimizer.load_state_dict(torch.optim.SGD(nn.Linear(3, 3).parameters()).state_dict())
    saved = nn.Linear(3, 3).state_dict()
    model.load_state_dict(saved)
    model.train_step(torch.ones(2, 3))
    torch.testing.assert_close(dict(model.state_dict()), dict(saved), rtol=0, atol=0)


def test_a_value_that_a_hook_takes_away_is_none_that_is_loaded():
    model = on_meta(lambda: nn.Linear(3, 3))
    zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), loss=lambda y, x: (y - x).square().mean())
    model.register_load_state_dict_pre_hook(lambda _, values, *__: values.pop("bias", None))
    saved = nn.Linear(3, 3).state_dict()
    model.load_state_dict(saved, strict=False)
    torch.manual_seed(5)
    model.train_step(torch.ones(2, 3))
    torch.manual_seed(5)
    assert torch.equal(model.state_dict()["bias"], nn.Linear(3, 3).bias)
    assert torch.equal(model.state_dict()["weight"], saved["weight"])


def load_on_one_rank() -> None:
    model = on_meta(lambda: nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = zgraph.compile(model, optimizer, loss=lambda y, x: (y - x).square().mean())
    if dist.get_rank() == 1:
        model.load_state_dict(nn.Linear(3, 3).state_dict())
    with pytest.raises(RankError, match="disagree on what load_state_dict was given before it"):
        model.train_step(torch.ones(2, 3))
    assert all(param.is_meta for param in model.parameters())


def test_values_for_what_is_on_meta_are_given_on_all_ranks(ranks):
    ranks.run(load_on_one_rank, world=2)


def test_values_that_cannot_be_loaded_are_refused_where_they_are_given():
    saved = nn.Linear(3, 3).state_dict()
    model = on_meta(lambda: nn.Linear(3, 3))
    zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), loss=lambda y, x: (y - x).square().mean())
    for bad in ({"weight": saved["weight"]}, {**saved, "bias": torch.ones(2)}, {**saved, "extra": torch.ones(1)}):
        with pytest.raises(RuntimeError, match=r"bias|extra"):
            model.load_state_dict(bad)
    with pytest.raises(StateError, match="would replace weight, which the optimizer holds"):
        model.load_state_dict(saved, assign=True)
    with pytest.raises(StateError, match="the value of weight is on meta"):
        model.load_state_dict(dict(on_meta(lambda: nn.Linear(3, 3)).named_parameters()))
    model.load_state_dict({}, strict=False)
    model.load_state_dict(saved)
    model.train_step(torch.ones(2, 3))
    torch.testing.assert_close(dict(model.state_dict()), dict(saved), rtol=0, atol=0)
    only_evaluated = zgraph.compile(on_meta(lambda: nn.Linear(3, 3)))
    with pytest.raises(StateError, match="weight is on meta, where there is no memory"):
        only_evaluated.load_state_dict(saved)
