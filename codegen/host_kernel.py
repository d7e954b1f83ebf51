"""An update that the processors of a device's host make, of vectors that lie in the host's memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist

from zgraph.codegen import cpp
from zgraph.codegen.elementwise import first_vector
from zgraph.codegen.kernel import CPP, SLICE, Kernel
from zgraph.host import HostTensor
from zgraph.machines import available_cores, ranks_here


@dataclass(frozen=True, eq=False)
class HostKernel(Kernel):
    """A kernel whose tensors lie on the host, all of them, and stay there.

    Where they are ``HostTensor``, a call returns at once, and what it writes over is there when it is loaded, or given
    to another one (``zgraph.host.Host.run``).

    Attributes:
        tier: where its tensors lie.
    """

    tier: ClassVar[str] = "host"

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run on what lies on the host, or at once on tensors, real or fake."""
        stored = [x for x in inputs if isinstance(x, HostTensor)]
        if not stored:
            return super().__call__(*inputs)
        written = [inputs[index] for index in self.writes if index is not None]
        stored[0].tier.run(super().__call__, inputs, written)
        return written

    def language(self, device_type: str) -> str:
        return super().language(self.device_type)

    @property
    def device_type(self) -> str:
        return "cpu"

    def runs_in(self, device_type: str) -> str:
        return super().runs_in(self.device_type)

    @property
    def is_fast(self) -> bool:
        """Whether it goes over its vectors once, or they stay in caches."""
        return self.language(self.device_type) == CPP or first_vector(self.body).numel() <= SLICE

    def _function(self, language: str) -> Callable[..., list[Any]]:
        if language == CPP and language not in self._functions:
            self._functions[language] = cpp.compile_kernel(self, _num_cores)
        return super()._function(language)


def _num_cores() -> int:
    """Those of this process's share of the machine; torch itself is given one by ``torchrun``."""
    ranks = ranks_here(dist.get_world_size() if dist.is_initialized() else 1)
    return max(min(available_cores(), (os.cpu_count() or 1) // ranks), 1)
