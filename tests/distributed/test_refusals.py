"""Bad input is refused on every rank, with the cause, the user's line and the cure, and leaves everything as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import zgraph
from tests.ranks import Ranks
from tests.reference import slow, world
from zgraph.errors import CaptureError, OptimizerError, OptionError, RankError, StateError, ZgraphError


class Net(nn.Module):
    """A model with nothing wrong: dropout, statistics and all, so that a half-done step would leave a trace."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(7, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.enter(x)), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.hidden(x)).square().mean()


class BranchesOnValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        if hidden.sum() > 0:
            hidden = hidden * 2
        return self.leave(hidden).square().mean()


class ReadsValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        scale = hidden.abs().max().item()
        return self.leave(hidden / scale).square().mean()


class SelectsByValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        positive = hidden[hidden > 0]
        return self.leave(hidden).square().mean() + positive.mean()


class BranchesOnOneRank(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        if world()[0] == 1 and hidden.sum() > 0:
            hidden = hidden * 2
        return self.leave(hidden).square().mean()


class DiffersByRank(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.leave(hidden * 2 if world()[0] == 1 else hidden).square().mean()


class ReturnsVector(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.hidden(x)).square().mean(1)


class ReturnsNoLoss(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.hidden(x)
        return self.leave(hidden), hidden


class DetachesLoss(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.hidden(x)).square().mean().detach()


class WritesParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.enter.weight.clamp_(-1, 1)
        return super().forward(x)


class SparseTable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 7, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table(x[:, 0].long().abs() % 11))


class HoldsStrayTensor(Net):
    """A module with a parameter on meta that nothing can initialise."""

    def __init__(self) -> None:
        super().__init__()
        self.stray = nn.Parameter(torch.empty(7, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.stray)


class ClipsByValue(SGD):
    """Its update branches on the value of a gradient."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.norm() > 1.0:
                        p.grad.div_(p.grad.norm())
                    p.sub_(p.grad, alpha=group["lr"])


class SharesLength(SGD):
    """Its update of one parameter depends on the gradients of the others, which lie in other buckets."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            length = torch.stack([p.grad.norm() for p in trained]).norm()
            for p in trained:
                p.sub_(p.grad / (length + 1e-6), alpha=group["lr"])


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2)


def adamw_with_another_models(model: nn.Module) -> Optimizer:
    return AdamW([*model.parameters(), *nn.Linear(13, 17).parameters()], lr=1e-2)


def adamw_of_frozen(model: nn.Module) -> Optimizer:
    model.requires_grad_(False)
    return AdamW(model.parameters(), lr=1e-2)


def adamw_of_one_frozen(model: Net) -> Optimizer:
    model.enter.requires_grad_(False)
    return AdamW(model.enter.parameters(), lr=1e-2)


def clips_by_value(model: nn.Module) -> Optimizer:
    return ClipsByValue(model.parameters(), lr=1e-2)


def shares_length(model: nn.Module) -> Optimizer:
    return SharesLength(model.parameters(), lr=1e-2)


def lbfgs(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=1e-2)


def one_rank_adamw_other_sgd(model: nn.Module) -> Optimizer:
    return (adamw if world()[0] == 0 else sgd)(model)


def wider_on_rank_1() -> Net:
    return Net(5 + world()[0])


def snapshot(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """All that a refusal must leave as it was, copied."""
    modules = dict(model.named_modules())
    return {
        "tensors": {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "identities": {name: id(p) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
        "training": {name: module.training for name, module in modules.items()},
        "groups": None if optimizer is None else copy.deepcopy([_numbers(group) for group in optimizer.param_groups]),
        "state": 0 if optimizer is None else len(optimizer.state),
        "generator": torch.get_rng_state(),
    }


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "params": [id(p) for p in group["params"]]}


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "tensors":
            assert list(value) == list(after[key]), f"tensors were {list(value)}, are {list(after[key])}"
            for name, tensor in value.items():
                other = after[key][name]
                same = tensor.device == other.device and (tensor.is_meta or torch.equal(tensor, other))
                assert same, f"{name} was {tensor}, is {other}"
        elif key == "generator":
            assert torch.equal(value, after[key]), "the random generator has moved"
        else:
            assert value == after[key], f"{key} was {value}, is {after[key]}"


def refuse(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[Any], Optimizer] | None,
    error_type: type[ZgraphError],
    says: Iterable[str],
    line: str | None = None,
    num_samples: Callable[[], int] | None = None,
    options: Callable[[], dict[str, Any]] | None = None,
    still_trains: bool = True,
) -> None:
    """On this rank: compile and train one step, which must be refused, and find everything as it was.

    Args:
        says: what the message must contain.
        line: the user's source line that the error must point at.
        num_samples, options: by default 6 on every rank, and none.
        still_trains: whether plain PyTorch can train the model, which must then work.
    """
    torch.manual_seed(0)
    model = make_model()
    optimizer = make_optimizer(model) if make_optimizer is not None else None
    x = torch.randn(num_samples() if num_samples else 6, 7)
    before = snapshot(model, optimizer)
    try:
        zgraph.compile(model, optimizer=optimizer, **(options() if options else {})).train_step(x)
    except ZgraphError as refusal:
        error = refusal
    else:
        raise AssertionError("it was not refused")
    assert isinstance(error, error_type), f"{type(error).__name__}, not {error_type.__name__}: {error}"
    for words in says:
        assert words in str(error), f"{words!r} is not in: {error}"
    assert error.fix, f"no word of what to do: {error}"
    if line is not None:
        assert error.where is not None, f"no source line: {error}"
        assert line in error.where, f"{line!r} is not the line that it points at: {error}"
        assert "test_refusals.py" in error.where, f"not the file that it points at: {error}"
    assert_untouched(before, snapshot(model, optimizer))
    if still_trains:
        train_plainly(model, optimizer or SGD(model.parameters(), lr=0.1), x)


def train_plainly(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    before = [p.clone() for p in model.parameters()]
    loss = model(x)
    loss.sum().backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


IN_FORWARD = [
    pytest.param(BranchesOnValue, ["value of a tensor"], "if hidden.sum() > 0:", id="branch"),
    pytest.param(
        ReadsValue, ["value of a tensor"], "scale = hidden.abs().max().item()", id="item", marks=pytest.mark.slow
    ),
    pytest.param(
        SelectsByValue,
        ["shape", "value of a tensor"],
        "positive = hidden[hidden > 0]",
        id="mask",
        marks=pytest.mark.slow,
    ),
    pytest.param(ReturnsVector, ["not a scalar", "(6,)"], "square().mean(1)", id="vector"),
    pytest.param(WritesParameter, ["enter.weight", "in place"], "self.enter.weight.clamp_(-1, 1)", id="write"),
]


@pytest.mark.parametrize("num_ranks", [2, *slow(1)])
@pytest.mark.parametrize(("model", "says", "line"), IN_FORWARD)
def test_forward_that_is_not_one_graph(
    ranks: Ranks, model: Callable[[], nn.Module], says: list[str], line: str, num_ranks: int
) -> None:
    ranks.run(refuse, model, adamw, CaptureError, says, line, world=num_ranks)


@pytest.mark.parametrize(
    ("model", "optimizer", "says"),
    [
        pytest.param(ReturnsNoLoss, adamw, ["tuple", "loss"], id="no-loss", marks=pytest.mark.slow),
        pytest.param(DetachesLoss, adamw, ["nothing to train"], id="detached"),
        pytest.param(Net, adamw_of_frozen, ["nothing to train"], id="all-frozen"),
        pytest.param(Net, adamw_of_one_frozen, ["nothing to train"], id="only-frozen-held", marks=pytest.mark.slow),
    ],
)
def test_nothing_to_train(
    ranks: Ranks, model: Callable[[], nn.Module], optimizer: Callable[[Any], Optimizer], says: list[str]
) -> None:
    ranks.run(refuse, model, optimizer, CaptureError, says, still_trains=False)


def test_sparse_gradients(ranks: Ranks) -> None:
    ranks.run(refuse, SparseTable, sgd, CaptureError, ["table.weight", "sparse"])


def test_an_optimizer_of_another_model(ranks: Ranks) -> None:
    ranks.run(refuse, Net, adamw_with_another_models, OptimizerError, ["(17, 13)", "group 0"])


@pytest.mark.parametrize(
    ("optimizer", "says", "line"),
    [
        pytest.param(clips_by_value, ["ClipsByValue"], "if p.grad.norm() > 1.0:", id="branch"),
        pytest.param(lbfgs, ["LBFGS"], None, id="closure"),
        pytest.param(shares_length, ["another parameter's value, gradient or state"], "torch.stack", id="coupled"),
    ],
)
def test_an_optimizer_that_cannot_be_traced_or_sharded(
    ranks: Ranks, optimizer: Callable[[Any], Optimizer], says: list[str], line: str | None
) -> None:
    ranks.run(refuse, Net, optimizer, OptimizerError, says, line, still_trains=line is not None)


def test_no_optimizer(ranks: Ranks) -> None:
    ranks.run(refuse, Net, None, ZgraphError, ["train_step", "optimizer"])


def test_a_meta_parameter_that_nothing_initialises(ranks: Ranks) -> None:
    ranks.run(
        refuse, HoldsStrayTensor, adamw, StateError, ["HoldsStrayTensor", "stray", "reset_parameters"],
        still_trains=False,
    )  # fmt: skip


def one_sample_more_on_rank_1() -> int:
    return 6 + world()[0]


def option_by_rank(name: str, values: tuple[Any, Any]) -> dict[str, Any]:
    return {name: values[world()[0]]}


@pytest.mark.parametrize(
    ("model", "optimizer", "more"),
    [
        pytest.param(wider_on_rank_1, adamw, {}, id="model"),
        pytest.param(DiffersByRank, adamw, {}, id="forward", marks=pytest.mark.slow),
        pytest.param(Net, one_rank_adamw_other_sgd, {}, id="optimizer", marks=pytest.mark.slow),
        pytest.param(Net, adamw, {"num_samples": one_sample_more_on_rank_1}, id="shape"),
        pytest.param(Net, adamw, {"options": functools.partial(option_by_rank, "zero", (3, 1))}, id="zero"),
        pytest.param(
            Net,
            adamw,
            {"options": functools.partial(option_by_rank, "bucket_bytes", (64, 128))},
            id="bucket",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Net,
            adamw,
            {"options": functools.partial(option_by_rank, "prefetch", (1, 2))},
            id="prefetch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_disagree(
    ranks: Ranks, model: Callable[[], nn.Module], optimizer: Callable[[Any], Optimizer], more: dict[str, Any]
) -> None:
    ranks.run(refuse, model, optimizer, RankError, ["rank"], timeout_s=60, **more)


def refuse_on_one_rank() -> None:
    if world()[0] == 1:
        refuse(BranchesOnOneRank, adamw, CaptureError, ["value of a tensor"], "hidden.sum() > 0")
    else:
        refuse(BranchesOnOneRank, adamw, RankError, ["rank 1"])


def test_what_one_rank_cannot_capture_stops_all(ranks: Ranks) -> None:
    ranks.run(refuse_on_one_rank, timeout_s=60)


def option_refused_on_one_rank() -> None:
    options = functools.partial(option_by_rank, "zero", (3, 7))
    if world()[0] == 1:
        refuse(Net, adamw, OptionError, ["zero=7"], options=options)
    else:
        refuse(Net, adamw, RankError, ["rank"], options=options)


def test_an_option_that_one_rank_refuses_stops_all(ranks: Ranks) -> None:
    ranks.run(option_refused_on_one_rank, timeout_s=60)


def change_shape_on_one_rank_later() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model)
    zgraph.compile(model, optimizer=optimizer)
    model.train_step(torch.randn(6, 7))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(RankError, match="rank") as refusal:
        model.train_step(torch.randn(6 + world()[0], 7))
    assert refusal.value.fix
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} has changed"
    assert model.train_step(torch.randn(6, 7)).isfinite()


def test_a_shape_that_changes_on_one_rank_later(ranks: Ranks) -> None:
    ranks.run(change_shape_on_one_rank_later, timeout_s=60)


def be_refused_then_train() -> None:
    """A refused step is no step: after it, the right call trains as if it had been the first."""
    torch.manual_seed(0)
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    optimizer, other_optimizer = adamw(model), adamw(other)
    zgraph.compile(model, optimizer=optimizer)
    zgraph.compile(other, optimizer=other_optimizer)
    with pytest.raises(RankError):
        model.train_step(torch.randn(6 + world()[0], 7))
    x = torch.randn(6, 7)
    losses = []
    for each in (model, other):
        torch.manual_seed(1)
        losses.append(each.train_step(x).item())
    assert losses[0] == losses[1]
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_right_call_trains_after_a_refusal(ranks: Ranks) -> None:
    ranks.run(be_refused_then_train, timeout_s=60)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"zero": 4}, ["zero=4", "0 to 3"]),
        ({"zero": -1}, ["zero=-1", "0 to 3"]),
        ({"zero": "3"}, ["zero='3'"]),
        ({"zero": True}, ["zero=True"]),
        ({"zero": 2.0}, ["zero=2.0"]),
        ({"stage": 3}, ["'stage'", "zero"]),
        ({"prefech": 1}, ["'prefech'", "did you mean 'prefetch'"]),
        ({"prefetch": -1}, ["prefetch=-1"]),
        ({"bucket_bytes": 0}, ["bucket_bytes=0"]),
        ({"bucket_bytes": "16 parsecs"}, ["16 parsecs", "16MiB"]),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], says: list[str]) -> None:
    refuse(Net, adamw, OptionError, says, options=lambda: options)
