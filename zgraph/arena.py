"""The memory that a compiled model's steps keep for their temporaries on a CPU.

One block for all programs of a model, as large as the largest of them needs, taken at the first step and kept: later
steps fault no pages in and leave no holes. Nothing in it outlives the run of a program.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from zgraph.codegen.emit import Step
from zgraph.tiers import PAGE


class Arena:
    """A block of memory, and the tensors in it that emitted steps store their results in."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._block: Any = None
        self._tensors: WeakKeyDictionary[Step, list[torch.Tensor]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        """A copy of a model has an arena of its own."""
        return Arena()

    def reserve(self, num_bytes: int) -> None:
        """Have room for so many bytes, which are taken when they are first needed."""
        if num_bytes > self.num_bytes:
            self.num_bytes, self._block = num_bytes, None
            self._tensors.clear()

    def tensors(self, step: Step) -> list[torch.Tensor]:
        """What a step whose bytes have been reserved is given: a tensor for each of its places.

        Each has a storage of its own, like a tensor that torch has allocated, so that an operator that reads memory by
        its place (``aten::as_strided``) finds what it would find there.
        """
        if step not in self._tensors:
            if self._block is None:
                # For large blocks NumPy asks the kernel for huge pages; all but small ones are mappings of their own.
                block = np.empty(self.num_bytes + PAGE, dtype=np.uint8)
                self._block = block[-block.ctypes.data % PAGE :]
            self._tensors[step] = [
                torch.frombuffer(self._block[place.start : place.stop], dtype=place.dtype).as_strided(
                    place.shape, place.strides
                )
                for place in step.places
            ]
        return self._tensors[step]
