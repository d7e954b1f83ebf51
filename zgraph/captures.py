"""A training step captured as often as its micro-batches differ in shape, so that options can be compared.

A model that repeats blocks is captured with few of them, and the program of the whole is written out from that
(``zgraph.blocks``, ``zgraph.repetition``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.batches import Call, common_rows, micro_batches
from zgraph.blocks import Short, find_blocks, shorten
from zgraph.capture import capture
from zgraph.choices import SEARCHED, TILE_BYTES
from zgraph.config import Config
from zgraph.errors import CaptureError
from zgraph.metrics import Metric
from zgraph.program import Program
from zgraph.repetition import KEPT, repeat_blocks

SIZES = (KEPT, KEPT + 2)
"""Numbers of blocks that stand for a model with more of them."""

FEW = 16
"""Blocks of a model that is estimated as it is. To plan the mixer of ``benchmarks/budget.py`` with 16 of them takes up
to 1.7 times as long as with two smaller ones instead, but where a bucket holds several blocks, few of these do not tell
how the whole model's lie in theirs."""


class Captures:
    """The captured step of one model and batch.

    Args:
        model, optimizer: which stay as they are.
        call: what the model is called with in a step, all micro-batches together.
        loss, weight, metrics: as for ``zgraph.compile``.
        device: where parameters on ``meta`` are taken to live.

    Attributes:
        notes: what a reader of the plan should know.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        call: Call,
        loss: Callable[..., torch.Tensor] | None = None,
        weight: Callable[..., torch.Tensor | float] | None = None,
        metrics: dict[str, Metric] | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 -- a constant
    ) -> None:
        self.model, self.optimizer, self._device = model, optimizer, device
        self.call: Call = pytree.tree_map_only(torch.Tensor, self._off_meta, call)
        self._functions: dict[str, Any] = {"loss": loss, "weight": weight, "metrics": metrics or {}}
        self._captured: dict[tuple[Config, int], Program | CaptureError] = {}
        self.notes: list[str] = []
        self._short: tuple[Short, torch.optim.Optimizer] | None = None
        path, self.num_blocks = max(find_blocks(model), key=lambda found: found[1], default=("", 1))
        self._blocks = f"{path}."
        if self.num_blocks > SIZES[-1]:
            try:
                short = shorten(model, path)
                self._short = short, short.optimizer(optimizer, model)
            except CaptureError as error:
                self._capture_whole(error)

    def with_rows(self, num_rows: int) -> Captures:
        """The step on so many rows of the batch, the first ones."""
        call = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[:num_rows], self.call)
        return Captures(self.model, self.optimizer, call, **self._functions, device=self._device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of blocks from which the whole model's estimate is extended; its own number if it is not."""
        return SIZES if self.is_long and self.num_blocks > FEW else (self.num_blocks,)

    @property
    def is_long(self) -> bool:
        """Whether the model repeats more blocks than are captured."""
        return self._short is not None

    @property
    def tile_bytes(self) -> int | None:
        """How much to gather at a time of matrices that are larger than all of the blocks': heads and tables.

        None if there are none. Of all large ones, tiles would take many times as many calls, and save little where
        blocks are alike: one of them is gathered while the one before is in use.
        """
        sizes: dict[bool, list[int]] = {True: [TILE_BYTES], False: [0]}
        for name, param in self.model.named_parameters():
            if param.dim() == 2:
                sizes[name.startswith(self._blocks)].append(param.nbytes)
        of_blocks, others = max(sizes[True]), max(sizes[False])
        return of_blocks if others > of_blocks else None

    @property
    def num_rows(self) -> int:
        """What accumulation can divide."""
        return common_rows(leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, torch.Tensor))

    def captured(self, config: Config, num_blocks: int) -> Program:
        """The step on the last micro-batch, of the model with so many blocks.

        What only passes read of the options makes no difference.

        Raises:
            CaptureError: the model fails on it.
        """
        read = replace(config, **{name: getattr(_DEFAULTS, name) for name in _ONLY_PASSES_READ})
        key = (read, num_blocks)
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(read, num_blocks)
            except CaptureError as error:
                self._captured[key] = error
        found = self._captured[key]
        if isinstance(found, CaptureError):
            raise found.with_traceback(None)
        return found

    def _capture(self, config: Config, num_blocks: int) -> Program:
        call = micro_batches(*self.call, config.accumulate)[-1]

        def captured(model: nn.Module, optimizer: torch.optim.Optimizer) -> Program:
            return capture(model, optimizer, *call, config=config, device=self._device, **self._functions)

        if self._short is None:
            return captured(self.model, self.optimizer)
        short, optimizer = self._short
        if num_blocks == len(short.kept):
            return captured(short.model, optimizer)
        return repeat_blocks(self.captured(config, len(short.kept)), short.path, num_blocks)

    def _capture_whole(self, error: CaptureError) -> None:
        """From now on, as the blocks are not alike."""
        self._short = None
        self._captured.clear()
        self.notes.append(f"all {self.num_blocks} blocks were captured: {error.what}")

    def check_blocks(self, config: Config) -> None:
        """Capture the whole model if what few of its blocks compute cannot be repeated."""
        if self._short is not None:
            try:
                self.captured(config, SIZES[-1])
            except CaptureError as error:
                self._capture_whole(error)

    def _off_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) if tensor.is_meta else tensor


_DEFAULTS = Config()
_ONLY_PASSES_READ = (
    *SEARCHED[1:], "secondary_size", "prefetch", "recompute_solver", "reduce_precision", "gather_precision",
    "state_precision", "check_collectives", "check_memory",
)  # fmt: skip
