"""What a call of a program costs: seconds on a machine, from what the call does (``zgraph.work``).

Where shapes are symbolic, so are costs: sympy expressions in the same symbols.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.kernel import SLICES, Kernel, slice_on
from zgraph.codegen.region import Region
from zgraph.curves import maximum, minimum
from zgraph.hardware import Hardware
from zgraph.into import into
from zgraph.placement import Place
from zgraph.program import REPLICA, Mesh, Program
from zgraph.work import ATTENTION, DISK, FREE, HOST, LINK, LOOKUP, MATRIX, NOTHING, PROCESSORS, Size, Work, works

_AS_FAST_AS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COUNTED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Dtypes whose arithmetic has a rate of its own; complex numbers have that of their parts, and integers and booleans
are taken to be as fast as float32."""


@dataclass(frozen=True)
class Cost:
    """Seconds, operations and bytes of one call, and the works they come from."""

    seconds: Size
    works: tuple[Work, ...]

    @property
    def flops(self) -> Size:
        """Floating-point operations of matrix products, attention and vectors."""
        return sum(work.flops for work in self.works)

    @property
    def num_bytes(self) -> Size:
        """Memory traffic; of a collective, bytes of the whole tensor."""
        return sum(work.num_bytes for work in self.works)

    @cached_property  # asked for wherever a timeline is played
    def num_calls(self) -> Size:
        """Calls that the host makes: operators that are started."""
        return sum(work.num_calls for work in self.works)

    @property
    def is_known(self) -> bool:
        """Whether every operator in it belongs to a family."""
        return all(work.is_known for work in self.works)


class Costs:
    """Costs of a program's calls on a machine; equal calls are worked out once.

    Args:
        program: whose values say shapes and dtypes.
        hardware: the machine.
        world: ranks that collectives are among; those of their axis of the program's mesh if None. It may be a sympy
            symbol.
        copied: of calls that put together what is made where it belongs, the vectors that are copied there
            (``zgraph.placement.Placement``).
    """

    def __init__(
        self,
        program: Program,
        hardware: Hardware,
        world: Size | None = None,
        copied: Mapping[fx.Node, Mapping[int, Place]] = MappingProxyType({}),
    ) -> None:
        self._program, self._hardware = program, hardware
        self._world, self._copied = world, copied
        self._known: dict[Any, Cost] = {}

    def of(self, node: fx.Node) -> Cost:
        """What running ``node`` costs. A collective's cost is that of its start; to wait costs nothing by itself."""
        if node.op != "call_function":
            return Cost(0, (FREE,))
        val = node.meta.get("val")  # a gradient that an operator does not give has none
        if node in self._copied:
            return self._of_copies(sum(place.num_bytes for place in self._copied[node].values()))
        key = (self._program.form_of(val), self._program.call_key(node))
        if key not in self._known:
            world, together = self._ranks(node)
            how = {**self._started(node), **self._stored(node)}
            done = tuple(
                replace(work, **how, together=together if work.unit == LINK else None) for work in works(node, world)
            )
            self._known[key] = Cost(sum(seconds(work, self._hardware) for work in done), done)
        return self._known[key]

    def _of_copies(self, num_bytes: int) -> Cost:
        """What vectors of so many bytes cost that one call copies into memory that is in use."""
        work = Work("copy", read_bytes=num_bytes, written_bytes=num_bytes, in_place=True) if num_bytes else FREE
        return Cost(seconds(work, self._hardware), (work,))

    def _started(self, node: fx.Node) -> dict[str, Any]:
        """How a kernel is started: once where it is compiled, and otherwise operator by operator and slice by slice."""
        if isinstance(node.target, Kernel) and node.target.language(self._hardware.device_type) != SLICES:
            return {"num_operators": 1, "sliced_numel": 0}
        return {"slice_numel": slice_on(self._hardware.device_type)}

    def _stored(self, node: fx.Node) -> dict[str, Any]:
        """Where results go: on a CPU, into an arena if a call can be told so (``zgraph.placement``)."""
        is_told = self._hardware.device_type == "cpu" and (isinstance(node.target, Region) or into(node) is not None)
        return {"in_arena": True} if is_told else {}

    def _ranks(self, node: fx.Node) -> tuple[Size, int | None]:
        """How many ranks a call is among, and how many of them a node of the machine has; None for as many as fit."""
        mesh = self._program.mesh
        if self._world is not None:
            return self._world, None
        if node.target not in ops.STARTS:
            return mesh.size, None
        axis = ops.axis_of(node)
        return mesh.axes[axis], ranks_together(mesh, axis, self._hardware.devices_per_node)


def ranks_together(mesh: Mesh, axis: str, devices_per_node: int) -> int | None:
    """How many ranks of each group of an axis share a node of a machine that ranks fill node after node.

    Of a group that is cut by the end of a node, as 3 ranks can be where a node has 8, the smallest part counts: its
    links are those that all others wait for. None for all ranks, of which a node has as many as fit.
    """
    if axis == mesh.axis:
        return None
    if axis == REPLICA:
        return max(devices_per_node // mesh.shard_size, 1)
    return math.gcd(mesh.axes[axis], devices_per_node)


def seconds(work: Work, hardware: Hardware) -> Size:
    """How long a machine takes for some work.

    The longer one of computing and of moving bytes (the roofline: Williams et al., CACM 52:4, 2009). The hardware's
    matrix rates include the bytes that a product moves. The overhead of starting an operator is not part of it: where
    operators are started ahead of time, only a timeline can tell what it costs.
    """
    if work.unit == NOTHING:
        return 0
    return hardware.in_step.get(work.unit, 1) * _alone(work, hardware)


def _alone(work: Work, hardware: Hardware) -> Size:
    """Seconds of some work that nothing precedes."""
    if work.unit == LINK:
        return hardware.collective_s(work.collective, work.read_bytes, work.world, together=work.together)
    if work.unit in (HOST, DISK):
        way = (work.unit, "device") if work.family == "load" else ("device", work.unit)
        return hardware.transfer_s(*way, work.num_bytes)
    if work.unit == PROCESSORS:
        return hardware.host_s(work.num_bytes)
    if work.unit == LOOKUP:
        return hardware.gather_s(work.num_bytes)
    dtype = rate_of(work.dtype)
    if work.unit == MATRIX:
        return hardware.matmul_s(dtype, *work.shape)
    if work.unit == ATTENTION:
        return hardware.attention_s(dtype, work.flops, work.num_bytes)
    if work.in_loops and hardware.loops is not None:
        rates = hardware.loops
        computing = work.flops / rates.operations + work.transcendentals / rates.functions
        more_to_call = rates.launch_s - hardware.launch_s
        return maximum(_moving_s(work, hardware), computing) + maximum(more_to_call, 0)
    computing = hardware.vector_s(dtype, work.flops)
    if work.transcendentals != 0:
        computing = computing + hardware.transcendental_s(work.transcendentals)
    moving = _moving_s(work, hardware)
    if work.sliced_numel != 0 and hardware.device_type == "cpu":
        return moving + computing  # a slice is fetched, worked on in cache, and put back, one after the other
    return maximum(moving, computing)


def _moving_s(work: Work, hardware: Hardware) -> Size:
    """Seconds to read and write: what is written may need memory that nothing was written to before.

    A CPU fetches memory before it writes there ("write allocate"): in place, it has been fetched to be read.
    """
    if work.in_place or hardware.device_type != "cpu":
        return hardware.memory_s(work.num_bytes, in_place=work.in_place)
    if work.in_arena:
        return hardware.memory_s(work.num_bytes + work.written_bytes, in_place=True)
    both = minimum(work.read_bytes, work.written_bytes)
    more_read, more_written = work.read_bytes - both, work.written_bytes - both
    seconds = hardware.memory_s(2 * both + 2 * more_written)
    return seconds + hardware.memory_s(more_read, in_place=True) - hardware.memory_s(0, in_place=True)


def rate_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose arithmetic says how fast that of another is; float8 is only there in products."""
    if dtype in _COUNTED or (dtype.is_floating_point and dtype.itemsize == 1):
        return dtype
    return _AS_FAST_AS.get(dtype, torch.float32)
