"""A step is captured again whenever something changes that it was specialised on, and says what that was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils import _pytree as pytree

import zgraph
from tests.ranks import Ranks
from tests.reference import world


class Net(nn.Module):
    """Reads a number and a flag of its own, dropout's probability, and whatever hooks there are."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.drop, self.leave = nn.Linear(4, 5), nn.Dropout(0.0), nn.Linear(5, 3)
        self.act: nn.Module = nn.ReLU()
        self.scale, self.negative, self.shape = 1.0, False, (5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.act(self.enter(x))).reshape(-1, *self.shape).squeeze(-1)
        return (self.leave(-hidden if self.negative else hidden) * self.scale).square().mean()


class Gains(Optimizer):
    """SGD with a factor that is kept on the optimizer, where no parameter group knows of it."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.gain = 1.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * self.gain)


def halve(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output / 2


def set_scale(model: Any, _: Any) -> None:
    model.scale = 0.5


def set_flag(model: Any, _: Any) -> None:
    model.negative = True


def set_tuple(model: Any, _: Any) -> None:
    model.shape = (5,)


def set_probability(model: Any, _: Any) -> None:
    model.drop.p = 1.0


def replace_module(model: Any, _: Any) -> None:
    model.act = nn.Tanh()


def add_hook(model: Any, _: Any) -> None:
    model.enter.register_forward_hook(halve)


def set_gain(_: Any, optimizer: Any) -> None:
    optimizer.gain = 0.25


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_scale, "scale is 0.5 and was 1.0 at first"),
        (set_flag, "negative is True and was False at first"),
        (set_tuple, "shape is (5,) and was (5, 1) at first"),
        (set_probability, "drop.p is 1.0 and was 0.0 at first"),
        (replace_module, "type(act) is Tanh and was ReLU at first"),
        (add_hook, "len(enter._forward_hooks) is 1 and was 0 at first"),
        (set_gain, "optimizer.gain is 0.25 and was 1.0 at first"),
    ],
)
def test_what_changes_between_steps_changes_the_step_and_is_said_once(
    change: Callable[[Any, Any], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = [Net()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [Gains(model.parameters()) for model in models]
    compiled = zgraph.compile(models[0], optimizer=optimizers[0])
    for step in range(4):
        if step == 2:
            for model, optimizer in zip(models, optimizers, strict=True):
                change(model, optimizer)
        x = torch.randn(6, 4)
        optimizers[1].zero_grad()
        expected = models[1](x)
        expected.backward()
        optimizers[1].step()
        assert torch.equal(compiled.train_step(x), expected.detach()), f"step {step}"
    told = [record.getMessage() for record in caplog.records if record.name == "zgraph"]
    assert len(told) == 1, told
    assert says in told[0]
    assert compiled.stats()["num_captures"] == 2


@pytest.mark.parametrize(
    ("momentum", "says"),
    [(0.9, "the last one created optimizer state"), (0.0, "a hyperparameter crossed a condition")],
)
def test_the_optimizers_own_reasons_are_told_apart(
    momentum: float, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.0)
    compiled = zgraph.compile(model, optimizer=optimizer)
    compiled.train_step(torch.ones(6, 4))
    if not momentum:
        optimizer.param_groups[0]["weight_decay"] = 0.1
    compiled.train_step(torch.ones(6, 4))
    (told,) = (record.getMessage() for record in caplog.records if record.name == "zgraph")
    assert says in told


def test_a_step_that_is_as_it_was_before_is_not_captured_again() -> None:
    model = Net()
    compiled = zgraph.compile(model, optimizer=AdamW(model.parameters()))
    for scale in (1.0, 0.5, 1.0, 0.5):
        model.scale = scale
        compiled.train_step(torch.ones(6, 4))
    assert compiled.stats()["num_captures"] == 2


def test_a_gradient_hook_that_comes_later_is_refused() -> None:
    model = Net()
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1))
    compiled.train_step(torch.ones(6, 4))
    handle = model.enter.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(zgraph.CaptureError, match=r"enter.weight has a gradient hook"):
        compiled.train_step(torch.ones(6, 4))
    handle.remove()
    compiled.train_step(torch.ones(6, 4))
    assert compiled.stats()["num_captures"] == 1


class Checked:
    """A batch in a container that is made of tensors alone, and whose parts have no names."""

    def __init__(self, x: torch.Tensor) -> None:
        assert x.dim() == 2
        self.x = x


pytree.register_pytree_node(Checked, lambda batch: ([batch.x], None), lambda leaves, _: Checked(*leaves))


@pytest.mark.parametrize("options", [{}, {"memory": "1GiB"}], ids=str)
def test_a_container_of_the_users_own_is_never_made_of_anything_but_tensors(options: dict[str, Any]) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zgraph.compile(OfBatch(model), optimizer, **options).train_step(Checked(torch.ones(2, 3)))


class OfBatch(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, batch: Checked) -> torch.Tensor:
        return self.layer(batch.x).square().mean()


def test_a_sparse_batch_is_refused() -> None:
    model = Net()
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1))
    with pytest.raises(zgraph.CaptureError, match=r"torch.sparse_coo, not a dense tensor"):
        compiled.train_step(torch.ones(6, 4).to_sparse())


def have_other_attributes_but_change_them_together() -> None:
    model = Net()
    model.rank = world()[0]
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1))
    compiled.train_step(torch.ones(6, 4))
    model.scale = 0.5
    compiled.train_step(torch.ones(6, 4))
    model.scale = 0.25 + 0.5 * world()[0]
    with pytest.raises(zgraph.RankError, match=r"scale is 0.25 .*scale is 0.75") as refusal:
        compiled.train_step(torch.ones(6, 4))
    assert "attributes" in str(refusal.value)
    model.scale = 0.5
    compiled.train_step(torch.ones(6, 4))


def test_ranks_may_have_other_attributes_but_must_change_them_together(ranks: Ranks) -> None:
    ranks.run(have_other_attributes_but_change_them_together, timeout_s=60)


class Weighted(nn.Module):
    """A loss with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, output: Tensor, _: Tensor) -> Tensor:
        return output.square().mean() * self.by


criterion = nn.MSELoss()
FACTOR = 1.0


def global_loss(output: Tensor, x: Tensor) -> Tensor:
    return criterion(output, x[:, :3]) * FACTOR


def test_global_variables_that_a_loss_names_are_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.0), loss=global_loss)
    x = torch.ones(2, 4)
    first = compiled.train_step(x)
    monkeypatch.setattr(criterion, "reduction", "sum")
    torch.testing.assert_close(compiled.train_step(x), 6 * first)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    torch.testing.assert_close(compiled.train_step(x), 12 * first)


def test_numbers_that_loss_weight_and_metrics_hold_are_facts() -> None:
    loss, shift, count = Weighted(), 1.0, 1
    model = nn.Linear(4, 3)
    compiled = zgraph.compile(
        model,
        optimizer=SGD(model.parameters(), lr=0.0),
        loss=loss,
        weight=lambda _: count,
        metrics={"shifted": lambda output, _: output.mean() * 0 + shift},
    )
    x = torch.ones(2, 4)
    first, told = compiled.train_step(x)
    assert told["shifted"] == 1.0
    loss.by = 10.0
    second, _ = compiled.train_step(x)
    torch.testing.assert_close(second, 10 * first)
    shift, count = 2.0, 3
    _, told = compiled.train_step(x)
    assert told["shifted"] == 2.0
    assert compiled.stats()["num_captures"] == 3
    compiled.train_step(x)
    assert compiled.stats()["num_captures"] == 3
