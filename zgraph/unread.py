"""What stands for a tensor until it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Unread:
    """A tensor that takes no memory until it is read.

    Attributes:
        shape, dtype: of it.
        read: gives it, to be read only; where it is divided, on all ranks together.
        order: the less the sooner it is to be read: what is near another in a bucket has a number near its.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    order: int
