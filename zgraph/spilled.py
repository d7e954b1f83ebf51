"""The room on a lower tier that a compiled model's steps spill to: what an arena is for memory (``zgraph.arena``).

One room for all programs of a model, as large as the largest of them needs, since nothing in it outlives the run of a
program. It is taken before the first step and kept, so that no step finds the tier full.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from zgraph.codegen.emit import Step
from zgraph.tiers import Stored, Tier


class SpillRoom:
    """Room on a tier, and the tensors in it that emitted steps spill to.

    Attributes:
        num_bytes: what the largest step needs.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._room: Stored | None = None
        self._tensors: WeakKeyDictionary[Step, list[Stored]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> SpillRoom:
        """A copy of a model has a room of its own."""
        return SpillRoom()

    def reserve(self, num_bytes: int) -> None:
        """Need room for so many bytes, which is taken before the step that needs it runs."""
        self.num_bytes = max(self.num_bytes, num_bytes)

    @property
    def taken_bytes(self) -> int:
        """Of the room that there is."""
        return 0 if self._room is None else self._room.nbytes

    @property
    def missing_bytes(self) -> int:
        """Of the room that has to be taken; 0 where there is one that is large enough."""
        return 0 if self.taken_bytes >= self.num_bytes else self.num_bytes

    def give_up(self) -> None:
        """Need no more than there is: what was asked for was refused."""
        self.num_bytes = self.taken_bytes

    def take(self, tier: Tier) -> None:
        """Take the room that is needed, instead of one that is too small.

        Raises:
            ZgraphError: there is none, and all stays as it was.
        """
        if self.missing_bytes:
            self._room = tier.allocate(self.num_bytes, torch.uint8)
            self._tensors.clear()

    def tensors(self, step: Step) -> list[Stored]:
        """What a step whose bytes have been found is given: a tensor for each that it spills."""
        assert self._room is not None, "no room was taken"
        if step not in self._tensors:
            self._tensors[step] = [
                self._room.part(place.start, place.shape, place.strides, place.dtype) for place in step.spilled
            ]
        return self._tensors[step]
