"""What a compiled model has on lower tiers: room for state that lies there and for what steps spill, and what moves.

Room is reserved before a step that needs it runs, on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from zgraph.disk import DEFAULT_PATH, Disk
from zgraph.errors import ZgraphError
from zgraph.footprint import spilled_bytes, state_on
from zgraph.hardware import LOWER_TIERS
from zgraph.host import Cuda, Host
from zgraph.lower import Lowered
from zgraph.machines import ranks_here
from zgraph.spilled import SpillRooms
from zgraph.staging import StagedDisk
from zgraph.state import TrainingState
from zgraph.tiers import Moved, Tier, padded


class LowerTiers:
    """Those of one model.

    Args:
        state: of the model.

    Attributes:
        spill_rooms: where steps spill to.
        moved: from and to each tier, by the last step.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self.spill_rooms = SpillRooms()
        self.moved: dict[str, Moved] = {}

    def reserve(self, lowered: Lowered, path: str | None) -> None:
        """Have room for all that is to lie there, before any of it is moved.

        Args:
            lowered: the programs of a step.
            path: a directory for files; the default one if None.

        Raises:
            ZgraphError: one rank has none.
        """
        agreement, layout = self._state.agreement, lowered.layout
        device = layout.buckets[0].device
        wanted: list[tuple[str, Tier, int]] = []
        try:
            for name in LOWER_TIERS:
                there = state_on(name, lowered.last)
                if not there and not any(spilled_bytes(each, name) for each in lowered.programs):
                    continue
                room = self.spill_rooms.on(name)
                num_bytes = sum(map(padded, there.values()))
                if name in self._state.tiers and layout == self._state.layout:
                    num_bytes -= self._state.tiers[name].used_bytes - room.taken_bytes  # it stays where it is
                missing = max(num_bytes, 0) + room.missing_bytes
                with agreement.together():
                    tier = self._state.open_tier(name, partial(_open, name, device, path or DEFAULT_PATH))
                    tier.check_room(missing, ranks_here(agreement.world))
                wanted.append((name, tier, missing))
            # A disk says only now whether it has room, and takes no memory: it comes first.
            for name, tier, missing in reversed(wanted):
                with agreement.together():
                    tier.reserve(missing)
                    self.spill_rooms.take(name, tier)
        except ZgraphError:
            self.spill_rooms.give_up()
            raise

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A step is run: count what moves, and tell what could not be written.

        Raises:
            ZgraphError: on all ranks, if one of them could not write something.
        """
        for tier in self._state.tiers.values():
            tier.moved = Moved()
        yield
        for name, tier in self._state.tiers.items():
            self.moved[name], tier.moved = tier.moved, Moved()
            with self._state.agreement.together():
                tier.check()


def _open(name: str, device: torch.device, path: str) -> Tier:
    """A tier for tensors of a device."""
    if name == "host":
        return Host(device, Cuda(device))
    return Disk(path) if device.type == "cpu" else StagedDisk(path, device, Cuda(device))
