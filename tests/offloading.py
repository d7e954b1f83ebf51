"""Programs and models with some of what they hold on a disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zgraph
from zgraph.config import Config
from zgraph.hardware import Disk, Hardware
from zgraph.machines import assumed_cpu
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Program, Stage

ON_DISK = {"optimizer": "disk"}
PARAMETERS = {"parameters": "disk"}
EVERYTHING = {**ON_DISK, **PARAMETERS}
SUMS_TOO = {**EVERYTHING, "gradients": "disk"}
"""With sums of gradients over micro-batches."""


def lowered(
    captured: Program, zero: int = 0, world: int = 1, *own: Pass, offload: dict[str, str] = ON_DISK, **options: Any
) -> Program:
    config = Config(zero, 1, 1, offload=offload, **options)
    return run(default_passes(config, Mesh(world), own=own), captured).program


@dataclass(frozen=True)
class Speed:
    """A machine whose disk reads so many bytes in a second."""

    read: float

    def hardware(self) -> Hardware:
        return replace(assumed_cpu(2, 2**34), disk=Disk(self.read, self.read, 0.0))


@dataclass(frozen=True)
class Mistake(Pass):
    """Do one thing wrong behind the other passes."""

    edit: Callable[[Program], None]

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        self.edit(program)


def nth(program: Program, target: Any, index: int = 0) -> Any:
    """A call of an operator."""
    return program.graph.find_nodes(op="call_function", target=target)[index]


def mean_square(output: Tensor, *_: Any) -> Tensor:
    return output.square().mean()


def small(optimizer: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> tuple[Any, Any]:
    """A small compiled model, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    made = optimizer(model.parameters(), lr=1e-2)
    return zgraph.compile(model, made, loss=mean_square, bucket_bytes=1, **options), made


X = torch.linspace(-1, 1, 48).view(8, 6)


def assert_state_is_the_users(model: Any, optimizer: Any, plain: Any, saved: Mapping[str, Tensor]) -> None:
    """Copy, load what has been saved, also into what has all in memory, and be evaluated: each trains on alike.

    Args:
        model, optimizer: ``small`` ones, some of whose state lies elsewhere.
        plain: a model with the same state, in memory.
        saved: the parameters of both.
    """
    progress = optimizer.state_dict()
    copied = copy.deepcopy(model)
    expected = [plain.train_step(X) for _ in range(2)]
    assert all(torch.equal(model.train_step(X), loss) for loss in expected)
    model.load_state_dict(saved)
    optimizer.load_state_dict(progress)
    assert all(torch.equal(model.train_step(X), loss) for loss in expected)
    assert all(torch.equal(copied.train_step(X), loss) for loss in expected), "a copy has state of its own"
    in_memory, its_optimizer = small()
    in_memory.train_step(X)
    in_memory.load_state_dict(saved)
    its_optimizer.load_state_dict(progress)
    assert all(torch.equal(in_memory.train_step(X), loss) for loss in expected)
    with torch.no_grad():
        assert torch.equal(model(X), in_memory(X))


def fail_and_go_on(
    offload: Mapping[str, str],
    failed: Callable[[], None] = lambda: None,
    how: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> None:
    """A step that fails in its middle, with and without what lies elsewhere, and then those that do not.

    Args:
        failed: looks on, behind the step that has failed.
        how: options beside ``offload``.
        options: of both.
    """
    models = []
    for given in ({}, {"offload": offload, **how}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 40), nn.Linear(40, 40))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        models.append(zgraph.compile(model, optimizer, loss=mean_square, bucket_bytes=1, **given, **options))
    good, bad = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 7])
    for batch in (good, good, bad, good, good):
        if batch is bad:
            for model in models:
                with pytest.raises(IndexError):
                    model.train_step(batch)
            failed()
        else:
            assert torch.equal(*(model.train_step(batch) for model in models))
