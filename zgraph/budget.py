"""The memory that one rank may take, as the user names it: bytes, or what its device has free, less a margin.

What the model and its optimizer hold on the device already is part of what a step takes, so it counts as free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zgraph.choices import ACCUMULATE, SEARCHED
from zgraph.config import Config, parse_bytes
from zgraph.decision import AUTO, config_of, fixed_options
from zgraph.errors import OptionError
from zgraph.machines import available_bytes, ranks_here
from zgraph.plans import MARGIN


@dataclass(frozen=True)
class Budget:
    """What ``zgraph.compile`` decides by.

    Attributes:
        num_bytes: of one rank; None for what is free.
        fixed: options that the user gave.
    """

    num_bytes: int | None
    fixed: Mapping[str, Any]

    @classmethod
    def of(cls, memory: Any, options: Mapping[str, Any]) -> Budget:
        """From ``memory=`` and the other options.

        Micro-batches are open only on request: a step that has them is the same only where the loss is a mean over the
        rows of a batch, which zgraph cannot see.

        Raises:
            OptionError: they cannot be.
        """
        if options.get("shard_size") == AUTO:
            raise OptionError(
                "shard_size='auto' with memory, but process groups are made before a step is seen",
                fix="give a number, or take it from zgraph.plan",
            )
        num_bytes = None if memory == AUTO else parse_bytes(memory, "memory")
        return cls(num_bytes, fixed_options({ACCUMULATE: 1, **options}))

    @property
    def config(self) -> Config:
        """Defaults, where nothing was given."""
        return config_of(dict(self.fixed))


def refuse_open_options(options: Mapping[str, Any]) -> None:
    """Refuse ``"auto"`` where no budget is given, by which to choose.

    Raises:
        OptionError: naming the option.
    """
    for name in SEARCHED:
        if options.get(name) == AUTO and name != "bucket_bytes":  # by the cost model then
            raise OptionError(
                f"{name}='auto' is chosen by a budget, and none was given",
                fix="give memory='8GiB', say, or memory='auto' for what is free; or a value",
            )


def free_bytes(device: torch.device, num_ranks: int, held: Iterable[torch.Tensor]) -> int:
    """What one rank may take of its device, ``zgraph.plans.MARGIN`` of it left alone.

    Args:
        device: where it computes.
        num_ranks: in the process group. The ranks of a CPU share it, those of this machine as torchrun says.
        held: the rank's own tensors.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch keeps for itself
    else:
        free = available_bytes() // ranks_here(num_ranks)
    storages = {t.untyped_storage() for t in held if t.device.type == device.type}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return int((free + sum(sizes.values())) * (1 - MARGIN))
