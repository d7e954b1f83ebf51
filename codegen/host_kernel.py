"""An update that the processors of a device's host make, of vectors that lie in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from zgraph.codegen import cpp
from zgraph.codegen.kernel import CPP, Kernel
from zgraph.host import HostTensor
from zgraph.machines import available_cores, ranks_here
from zgraph.program import copy_graph


@dataclass(frozen=True, eq=False)
class HostKernel(Kernel):
    """A kernel whose tensors lie on the host, all of them, and stay there.

    Where they are ``HostTensor``, a call returns at once, and what it writes over is there when it is loaded, or given
    to another one (``zgraph.host.Host.run``).

    Attributes:
        tier: where its tensors lie.
    """

    tier: ClassVar[str] = "host"

    def copy(self) -> HostKernel:
        return HostKernel(self.name, copy_graph(self.body), self.num_inputs, self.writes, self.is_compiled)

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

    def _function(self, language: str) -> Callable[..., list[Any]]:
        if language == CPP and language not in self._functions:
            self._functions[language] = cpp.compile_kernel(self, _num_cores)
        return super()._function(language)


def _num_cores() -> int:
    """Those of this process's share of the machine: ``torchrun`` gives torch one, for what waits for nothing else."""
    return max(available_cores() // ranks_here(1), 1)
