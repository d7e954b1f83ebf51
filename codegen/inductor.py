"""A region as TorchInductor compiles it: the one place that touches Inductor's internals.

    h = add(x, y)                                    h, n, mean, rstd = region(x, y, ...)
    n, mean, rstd = native_layer_norm(h, ...)   ->   where Inductor's kernels store results where they are told to

Inductor gets the body, decomposed as it decomposes graphs, and stores where results belong: what it is given beside the
inputs. It keeps what it has compiled in a cache of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from zgraph.codegen.kernel import INDUCTOR, SLICES
from zgraph.codegen.region import Region
from zgraph.codegen.source import SourceWriter
from zgraph.errors import OptionError, first_line
from zgraph.program import copy_graph

DEVICE_TYPES = ("cpu", "cuda")

COMPILE_S = 5.0
"""About how long Inductor takes to compile a region."""

NUM_STEPS = 1000
"""Steps that are to make up for it."""


@dataclass(frozen=True, eq=False)
class InductorRegion(Region):
    """Calls of ATen that Inductor makes kernels of, as many as it likes."""

    @cached_property
    def operations(self) -> tuple[int, int] | None:
        """Not known: what its loops compute is Inductor's choice."""
        return None

    @cached_property
    def workspace_bytes(self) -> int:
        """What Inductor's kernels pass on to each other is not known."""
        return 0

    def may_overwrite(self, place: int, index: int) -> bool:
        """No: it may read an input after it has stored a result."""
        return False

    @cached_property
    def _written_in(self) -> dict[str, str]:
        return dict.fromkeys(DEVICE_TYPES, INDUCTOR) if self.is_compiled else {}

    def runs_in(self, device_type: str) -> str:
        """Inductor's, or calls one by one where it fails."""
        return SLICES if self.why_in_slices() else self.language(device_type)

    def why_in_slices(self) -> str | None:
        """Why Inductor fails; None where it does not, or is not asked."""
        if self.language(self.device_type) == SLICES or not isinstance(self._compiled, str):
            return None
        return self._compiled

    @cached_property
    def _compiled(self) -> Any:
        """What Inductor gives; or why there is none, in words."""
        try:
            return _compile(self.body)
        except Exception as error:  # noqa: BLE001 -- whatever Inductor, or the compiler that it calls, stumbles over
            return f"Inductor cannot compile {self.name}: {first_line(error) or type(error).__name__}"

    def text(self, language: str) -> str:
        """Inductor's source, or that of the calls one by one."""
        if language == INDUCTOR and not isinstance(self._compiled, str):
            return str(self._compiled.source_code)
        return self.source(SourceWriter())

    def _loops_in(self, language: str) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
        compiled = self._compiled
        if isinstance(compiled, str):
            raise OptionError(compiled, fix="give kernels='zgraph', or kernels='update'")

        def run(inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
            compiled([*inputs, *outputs])

        return run


def can_write(body: fx.Graph, device_type: str) -> bool:
    """Whether Inductor may be given a body: tensors on one kind of device, results without gaps."""
    inputs = [node.meta["val"] for node in body.find_nodes(op="placeholder")]
    results: Any = body.output_node().args[0]
    vals = [node.meta["val"] for node in results]
    if device_type not in DEVICE_TYPES or not all(isinstance(val, torch.Tensor) for val in (*inputs, *vals)):
        return False
    if any(val.device.type != device_type for val in (*inputs, *vals)) or not any(val.dim() for val in vals):
        return False
    return all(_is_dense(val) for val in vals) and importlib.util.find_spec("torch._inductor") is not None


def _is_dense(val: torch.Tensor) -> bool:
    """Whether a tensor has its elements in any order, but without gaps."""
    order = sorted(range(val.dim()), key=val.stride().__getitem__, reverse=True)
    return val.permute(order).is_contiguous()


def _compile(body: fx.Graph) -> Any:
    """What Inductor makes of a body: a call takes a list of inputs, and of where results go behind them."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    num_inputs = len(body.find_nodes(op="placeholder"))
    vals = [node.meta["val"] for node in (*body.find_nodes(op="placeholder"), *_results(body))]
    plain = copy_graph(body)

    def store(*args: torch.Tensor) -> list[torch.Tensor]:
        found = fx.Interpreter(nn.Module(), graph=plain).run(*args[:num_inputs])
        for place, result in zip(args[num_inputs:], found, strict=True):
            place.copy_(result)
        return []

    with FakeTensorMode():
        given = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in vals]
        traced = make_fx(store, decomposition_table=select_decomp_table())(*given)
    return compile_fx_inner(traced, given)


def _results(body: fx.Graph) -> list[fx.Node]:
    return list(body.output_node().args[0])  # type: ignore[arg-type]
