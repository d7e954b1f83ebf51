"""Models whose meaning is easily lost on the way to one functional graph: compiled, they train bit-equal to eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zgraph

Forward = Callable[["Net", torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Two layers and a few buffers; ``body`` is the forward in question."""

    def __init__(self, body: Forward) -> None:
        super().__init__()
        self.body = body
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.narrow = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.recurrent = nn.LSTM(6, 3, 2, dropout=0.2, bidirectional=True)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("now", torch.zeros(6))
        self.register_buffer("before", torch.zeros(6))
        self.register_buffer("kept", torch.zeros(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x).float().pow(2).mean() + 0 * self.weight.sum()


def default_dropout(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.second(nn.functional.dropout(net.first(x)))  # p=0.5 is the default of bernoulli_ too


def write_to_a_chunk(net: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = x.clone().chunk(2, 1)
    left.mul_(2)
    return net.second(net.first(torch.cat((right, left), 1)))


def write_under_chunks(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = x.clone()
    left, right = hidden.chunk(2, 1)
    hidden.mul_(2)
    return net.second(net.first(torch.cat((right, left), 1)))


def write_to_rows(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = x.clone()
    for row in hidden.unbind(0):
        row.mul_(2)
    return net.second(net.first(hidden))


def write_in_lower_precision(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = x.bfloat16()
    hidden += net.now
    return net.narrow(hidden)


def pass_a_buffer_on(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.before = net.now
    net.now = x.mean(0)
    return net.second(net.first(x + net.before))


def remember_part_of_a_parameter(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.now.copy_(net.weight.detach()[0])
    return net.second(net.first(x)) @ net.weight + net.now


def remember_a_parameter(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.kept.copy_(net.weight.detach())
    return net.second(net.first(x)) @ net.weight


def a_parameter_is_the_loss(net: Net, _: torch.Tensor) -> torch.Tensor:
    return net.scale


def read_halves_of_a_parameter(net: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = net.weight.detach().chunk(2, 1)
    hidden = torch.cat((x @ left, x @ right), 1)
    return net.second(net.first(hidden)) @ net.weight


def recur(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.second(net.first(net.recurrent(x)[0]))


BODIES = [
    default_dropout, write_to_a_chunk, write_under_chunks, write_to_rows, write_in_lower_precision, pass_a_buffer_on,
    remember_part_of_a_parameter, remember_a_parameter, a_parameter_is_the_loss, read_halves_of_a_parameter,
    recur,
]  # fmt: skip


def small_buckets(net: nn.Module, optimizer: torch.optim.Optimizer) -> zgraph.compiler.CompiledModule:
    return zgraph.compile(net, optimizer=optimizer, bucket_bytes=64)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_training_is_bit_equal_to_eager(body: Forward) -> None:
    torch.manual_seed(0)
    eager = Net(body)
    net = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, net)]
    compiled = small_buckets(net, optimizers[1])
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        loss = eager(x)
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        torch.manual_seed(step)
        assert torch.equal(compiled.train_step(x), loss.detach())
        state = compiled.state_dict()
        for name, value in eager.state_dict().items():
            assert torch.equal(state[name], value), name


def test_a_batch_or_buffer_that_requires_a_gradient_leaves_no_autograd_graph() -> None:
    net = Net(pass_a_buffer_on)
    net.now.requires_grad_()
    compiled = small_buckets(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for _ in range(2):
        loss = compiled.train_step(torch.randn(4, 6, requires_grad=True))
        assert loss.grad_fn is None
        assert not any(tensor.grad_fn for tensor in compiled.state_dict(keep_vars=True).values())


def test_freezing_one_layer_after_another_equals_eager() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    net = copy.deepcopy(eager)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in (eager, net)]
    compiled = zgraph.compile(net, optimizer=optimizers[1], loss=lambda y, _: y.pow(2).mean(), bucket_bytes=100)
    frozen: list[tuple[int, ...]] = [(0,), (0, 1), (0, 1), (1,), (), (2, 3), ()]
    for layers in frozen:
        for model in (eager, net):
            for index, layer in enumerate(model):
                layer.requires_grad_(index not in layers)
        x = torch.randn(5, 3)
        loss = eager(x).pow(2).mean()
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        assert torch.allclose(compiled.train_step(x), loss.detach(), rtol=1e-6)
    for name, value in eager.state_dict().items():
        assert torch.allclose(compiled.state_dict()[name], value, rtol=1e-6, atol=1e-7), name


@torch.library.custom_op("zgraph_test::double_", mutates_args={"x"})
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


def recompute_dropout(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = checkpoint(lambda h: nn.functional.dropout(net.first(h), 0.3), x, use_reentrant=False)
    assert isinstance(hidden, torch.Tensor)
    return net.second(hidden)


def call_an_operator_that_writes(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = net.first(x).detach()
    double_(hidden)
    return net.second(hidden)


@pytest.mark.parametrize(
    ("body", "reason"),
    [(recompute_dropout, "calls torch.utils.checkpoint"), (call_an_operator_that_writes, "writes to its")],
)
def test_what_a_graph_cannot_keep_is_refused(body: Forward, reason: str) -> None:
    net = Net(body)
    compiled = small_buckets(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(zgraph.CaptureError, match=reason):
        compiled.train_step(torch.randn(4, 6))


def test_gradient_hooks_are_refused() -> None:
    net = Net(default_dropout)
    net.weight.register_hook(lambda g: g * 0)
    compiled = small_buckets(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(zgraph.CaptureError, match="weight has a gradient hook"):
        compiled.train_step(torch.randn(4, 6))


def test_a_step_hook_that_comes_later_is_refused_at_the_next_step() -> None:
    net = Net(default_dropout)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled = small_buckets(net, optimizer)
    compiled.train_step(torch.randn(4, 6))
    handle = optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(zgraph.OptimizerError, match="step hook"):
        compiled.train_step(torch.randn(4, 6))
    handle.remove()
    compiled.train_step(torch.randn(4, 6))


def test_an_array_in_the_batch_is_refused_instead_of_frozen() -> None:
    net = nn.Linear(2, 1)
    compiled = zgraph.compile(
        net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), loss=lambda y, _, extra: y.sum() + float(extra.sum())
    )
    with pytest.raises(zgraph.CaptureError, match="ndarray"):
        compiled.train_step(torch.randn(3, 2), np.zeros((40, 40)))
