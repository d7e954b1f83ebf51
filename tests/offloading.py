"""Programs and models with some of what they hold on a disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
