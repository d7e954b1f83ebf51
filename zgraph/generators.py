"""Random generators: those of the process, one a device, and streams that stand in for them.

Operators of a program draw from the process's own generator, as in eager code. Where one process plays many ranks, each
has a ``RandomStream`` that takes the generator's place while that rank draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def random_state(device: torch.device) -> torch.Tensor:
    """The state of the process's generator on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Let the process's generator on a device go on from a state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class RandomStream:
    """What a process draws after ``torch.manual_seed(seed)``, on every device."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: dict[torch.device, torch.Tensor] = {}

    def copy(self) -> RandomStream:
        """A stream that goes on from where this one is, and leaves this one there."""
        other = RandomStream(self._seed)
        other._states.update(self._states)
        return other

    @contextmanager
    def drawn_from(self, device: torch.device) -> Iterator[None]:
        """Within, operators on ``device`` draw from this stream; afterwards the process's generator is as before."""
        own = random_state(device)
        if device not in self._states:
            self._states[device] = torch.Generator(device).manual_seed(self._seed).get_state()
        set_random_state(device, self._states[device])
        try:
            yield
        finally:
            self._states[device] = random_state(device)
            set_random_state(device, own)
