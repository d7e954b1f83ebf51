"""Optimizers for tests: every option whose update differs, and one that torch has never seen.

Learning rates are large, so that ten steps move parameters far more than rounding does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from tests.updates import ByParameter


class Lion(Optimizer):
    """Lion (Chen et al., 2023) as a user would write it: ordinary tensor operators, a Python step count, ``math``.

    The learning rate falls with the square root of the step, so the count matters; ``warm_up`` steps also halve it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        warm_up: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "warm_up": warm_up})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["momentum"] = torch.zeros_like(p)
                state["step"] += 1
                lr = group["lr"] / math.sqrt(state["step"])
                if state["step"] < group["warm_up"]:
                    lr /= 2
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.sign(beta1 * state["momentum"] + (1 - beta1) * p.grad), alpha=-lr)
                state["momentum"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Lamb(ByParameter):
    """LAMB (You et al., 2020): Adam's step, as long as the parameter is. It keeps the ratio of the two lengths."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].lerp_(p.grad.square(), 1 - beta2)
        mean, square = (state[key] / (1 - beta ** state["step"]) for key, beta in (("mean", beta1), ("square", beta2)))
        change = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p
        lengths = p.norm(), change.norm()
        state["ratio"] = torch.where(lengths[1] > 0, lengths[0] / lengths[1].clamp(min=1e-6), 1.0)
        p.sub_(group["lr"] * state["ratio"] * change)


class Shampoo(ByParameter):
    """Shampoo (Gupta et al., 2018) on matrices, whose rows and columns have statistics of their own shapes."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        if not p.numel():
            return
        matrix = p.grad.reshape(p.shape[0] if p.dim() else 1, -1)
        state = self.state[p]
        if not state:
            state["rows"], state["columns"] = (torch.eye(n, dtype=p.dtype) for n in matrix.shape)
            state["momentum"] = torch.zeros_like(p)
        state["rows"] += matrix @ matrix.T
        state["columns"] += matrix.T @ matrix
        change = self._root(state["rows"]) @ matrix @ self._root(state["columns"])
        state["momentum"].mul_(group["momentum"]).add_(change.reshape(p.shape))
        p.sub_(group["lr"] * state["momentum"])

    @staticmethod
    def _root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**-0.25) @ vectors.T


class MuonAndAdam(ByParameter):
    """Muon (Jordan et al., 2024) for matrices and Adam for the rest, as many write it: by a flag of groups."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 1e-2) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.9, "betas": (0.9, 0.99), "use_muon": False})

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if group["use_muon"]:
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            p.add_(self._orthogonal(p.grad.lerp(state["momentum"], group["momentum"])), alpha=-group["lr"])
            return
        if not state:
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].lerp_(p.grad.square(), 1 - beta2)
        p.addcdiv_(state["mean"], state["square"].sqrt() + 1e-3, value=-group["lr"])

    @staticmethod
    def _orthogonal(matrix: Tensor) -> Tensor:
        """Five steps of Newton-Schulz."""
        x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_and_adam(model: nn.Module) -> MuonAndAdam:
    """Matrices are orthogonalised, the rest is not."""
    params = list(model.parameters())
    matrices, others = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
    return MuonAndAdam([{"params": matrices, "use_muon": True}, {"params": others}])


def two_groups(model: nn.Module) -> AdamW:
    """Matrices decay and move slowly; the rest does not decay, with a learning rate and betas of its own."""
    params = list(model.parameters())
    slow = {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.3}
    fast = {"params": [p for p in params if p.ndim < 2], "lr": 3e-2, "betas": (0.8, 0.9), "weight_decay": 0.0}
    return AdamW([slow, fast], lr=5e-3)


def only_trained(model: nn.Module) -> AdamW:
    """The optimizer never hears of frozen parameters."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def all_but_last(model: nn.Module) -> AdamW:
    """The last parameter is left to ``add_param_group``."""
    return AdamW(list(model.parameters())[:-1], lr=1e-2)


def _all(kind: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    return functools.partial(_build, kind, options)


def _build(kind: Callable[..., Optimizer], options: dict[str, Any], model: nn.Module) -> Optimizer:
    return kind(model.parameters(), **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": _all(SGD, lr=0.1),
    "sgd_momentum": _all(SGD, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "sgd_nesterov": _all(SGD, lr=0.05, momentum=0.9, nesterov=True, maximize=True),
    "sgd_foreach": _all(SGD, lr=0.05, momentum=0.9, foreach=True),
    "sgd_fused": _all(SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": _all(Adam, lr=1e-2, weight_decay=0.1),
    "adam_amsgrad": _all(Adam, lr=1e-2, amsgrad=True, maximize=True),
    "adamw": _all(AdamW, lr=1e-2),
    # Attention's key biases have no gradient but rounding; a larger epsilon keeps Adam from dividing it by itself.
    "adamw_large_eps": _all(AdamW, lr=1e-2, eps=1e-3),
    "adamw_foreach": _all(AdamW, lr=1e-2, foreach=True, amsgrad=True),
    "adamw_fused": _all(AdamW, lr=1e-2, fused=True),
    "adamw_fused_amsgrad": _all(AdamW, lr=1e-2, fused=True, amsgrad=True, maximize=True),
    "adamw_groups": two_groups,
    "adamw_only_trained": only_trained,
    "adamw_all_but_last": all_but_last,
    "adagrad": _all(Adagrad, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "adagrad_maximize": _all(Adagrad, lr=0.1, maximize=True),
    "rmsprop": _all(RMSprop, lr=1e-2),
    "rmsprop_centered": _all(RMSprop, lr=1e-2, centered=True, momentum=0.9, weight_decay=0.1),
    # These three branch on values, and are traced on torch's path for CUDA graphs, which has torch.where instead.
    "radam": _all(RAdam, lr=1e-2),
    "radam_decoupled": _all(RAdam, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "asgd": _all(ASGD, lr=0.05, t0=3, weight_decay=0.1),
    "rprop": _all(Rprop, lr=1e-3),
    "adadelta": _all(Adadelta, lr=0.5),
    "adamax": _all(Adamax, lr=1e-2),
    "nadam": _all(NAdam, lr=1e-2),
    # These mix the elements of a parameter, and so run on whole ones.
    "adafactor": _all(Adafactor, lr=1e-2),
    "lamb": _all(Lamb),
    "muon_and_adam": muon_and_adam,
    "shampoo": _all(Shampoo),
    "lion": _all(Lion),
    "lion_warm_up": _all(Lion, warm_up=5),
}


def tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every entry of the full optimizer state by name; numbers as float64 tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"state[{index}][{key!r}]": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for index, entries in state.items()
        for key, value in entries.items()
    }
