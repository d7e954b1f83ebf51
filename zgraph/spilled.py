"""The rooms on lower tiers that a compiled model's steps spill to: what an arena is for memory (``zgraph.arena``).

On each tier one room for all programs of a model, as large as the largest of them needs, since nothing in it outlives
the run of a program. It is taken before the first step and kept, so that no step finds the tier full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from zgraph.codegen.emit import Step
from zgraph.placement import Place
from zgraph.tiers import Stored, Tier


class SpillRoom:
    """Room on one tier.

    Attributes:
        num_bytes: what the largest step needs.
        room: that there is.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.room: Stored | None = None

    def reserve(self, num_bytes: int) -> None:
        """Need room for so many bytes, which is taken before the step that needs it runs."""
        self.num_bytes = max(self.num_bytes, num_bytes)

    @property
    def taken_bytes(self) -> int:
        """Of the room that there is."""
        return 0 if self.room is None else self.room.nbytes

    @property
    def missing_bytes(self) -> int:
        """Of the room that has to be taken; 0 where there is one that is large enough."""
        return 0 if self.taken_bytes >= self.num_bytes else self.num_bytes

    def give_up(self) -> None:
        """Need no more than there is: what was asked for was refused."""
        self.num_bytes = self.taken_bytes


class SpillRooms:
    """Room on each tier, and the tensors in it that emitted steps spill to."""

    def __init__(self) -> None:
        self._rooms: defaultdict[str, SpillRoom] = defaultdict(SpillRoom)
        self._tensors: WeakKeyDictionary[Step, list[Stored]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> SpillRooms:
        """A copy of a model has rooms of its own."""
        return SpillRooms()

    def on(self, tier: str) -> SpillRoom:
        """That on one of them."""
        return self._rooms[tier]

    def reserve(self, num_bytes: Mapping[str, int]) -> None:
        """Need room for so many bytes on each tier."""
        for tier, needed in num_bytes.items():
            self._rooms[tier].reserve(needed)

    @property
    def num_bytes(self) -> int:
        """What the largest step needs on each tier, together."""
        return sum(room.num_bytes for room in self._rooms.values())

    def give_up(self) -> None:
        """Need no more than there is: what was asked for was refused."""
        for room in self._rooms.values():
            room.give_up()

    def take(self, name: str, tier: Tier) -> None:
        """Take the room that is needed on a tier, instead of one that is too small.

        Raises:
            ZgraphError: there is none, and all stays as it was.
        """
        if self._rooms[name].missing_bytes:
            self._rooms[name].room = tier.allocate(self._rooms[name].num_bytes, torch.uint8)
            self._tensors.clear()

    def tensors(self, step: Step) -> list[Stored]:
        """What a step whose bytes have been found is given: a tensor for each that it spills."""
        if step not in self._tensors:
            self._tensors[step] = [self._part(tier, place) for tier, place in step.spilled]
        return self._tensors[step]

    def _part(self, tier: str, place: Place) -> Stored:
        room = self._rooms[tier].room
        assert room is not None, "no room was taken"
        return room.part(place.start, place.shape, place.strides, place.dtype)
