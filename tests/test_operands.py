"""What kernels refuse is refused before a step starts: with the operator, its arguments and the line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zgraph


def compiled(model: nn.Module) -> zgraph.compiler.CompiledModule:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return zgraph.compile(model, optimizer=optimizer, loss=lambda y, *_: y.sum())


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 2), nn.LayerNorm(3), nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))]
)
def test_a_batch_of_another_dtype_is_refused_and_later_ones_train(model: nn.Module) -> None:
    model = compiled(copy.deepcopy(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(zgraph.CaptureError, match=r"takes arguments of one dtype, not .*f64.* f32|f32.* f64"):
            model.train_step(torch.ones(4, 3, dtype=torch.float64))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_step(torch.ones(4, 3))


def test_half_precision_goes_into_a_norm_with_float32_weights() -> None:
    model = nn.LayerNorm(3)
    y = model(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zgraph.compile(model, optimizer=optimizer, loss=lambda y, *_: y.float().sum())
    assert model.train_step(torch.ones(4, 3, dtype=torch.bfloat16)) == y.float().sum()


def test_a_batch_on_meta_is_refused() -> None:
    with pytest.raises(zgraph.CaptureError, match="on meta, where it has no values"):
        compiled(nn.Linear(3, 2)).train_step(torch.ones(4, 3, device="meta"))


def test_a_loss_that_is_no_function_or_gives_no_tensor_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(zgraph.OptionError, match="loss is a str"):
        zgraph.compile(model, optimizer=optimizer, loss="mse")
    zgraph.compile(model, optimizer=optimizer, loss=lambda *_: None)
    with pytest.raises(zgraph.CaptureError, match="the loss function returned None instead of a tensor"):
        model.train_step(torch.ones(4, 3))


def test_a_lazy_module_is_refused_until_it_has_a_shape() -> None:
    model = nn.LazyLinear(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(zgraph.CaptureError, match="weight has no shape yet"):
        zgraph.compile(model, optimizer=optimizer)
