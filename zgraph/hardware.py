"""What a machine can do, as far as predicting a training step needs it: how long work of a size takes.

A ``Hardware`` is one kind of device, how many of them a node has, and the links between them, to host memory and to
disk. It comes from a table of known devices (zgraph.machines) or from measuring this one (``zgraph calibrate``); both
have the same methods. Each takes numbers and returns seconds, or takes sympy expressions and returns one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from zgraph.curves import Collective, Curve, Matmul, MeasuredCollective, Network, Number, collective_seconds, maximum
from zgraph.errors import OptionError

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
LOWER_TIERS = {"host": "the host", "disk": "a disk"}
"""Where tensors may lie instead of in a device's memory, each with words for it."""

MOVERS = {"host": "the link to the host", "disk": "the disk"}
"""What moves tensors to each of them and back, in words."""

UPDATER = "the host's processors"
"""What updates what lies on the host, in words."""

HOST_LATENCY_S = 5e-5
"""Seconds until a thread of the host begins what it is given, and knows that copies are done; assumed."""

TIERS = ("device", *LOWER_TIERS)
TF32 = "tf32"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class HostLink:
    """Between one device and the memory of its host, in either direction: bytes per second, and seconds to start."""

    pinned: float
    pageable: float
    latency_s: float


@dataclass(frozen=True)
class Disk:
    """Local storage of one node, shared by its devices: bytes per second, and seconds to start."""

    read: float
    write: float
    latency_s: float


@dataclass(frozen=True)
class LoopRates:
    """What the loops that zgraph writes for a CPU (``zgraph.codegen.region_cpp``) reach on what lies in its caches.

    Attributes:
        operations: per second, of float32.
        functions: exponentials and the like per second.
        launch_s: seconds to call one.
    """

    operations: float
    functions: float
    launch_s: float

    def scaled(self, factor: float) -> LoopRates:
        """The same where everything but calling takes ``factor`` times as long."""
        return replace(self, operations=self.operations / factor, functions=self.functions / factor)


@dataclass(frozen=True)
class Hardware:
    """A cluster of one kind of device.

    Attributes:
        name: as ``zgraph.find_hardware`` knows it.
        device_type: ``"cuda"`` or ``"cpu"``. On a CPU a device is a rank: a process with a share of the cores.
        memory_bytes: of one device.
        memory_bandwidth: bytes per second of the device's memory as specified; what kernels reach is ``memory_s``.
        devices_per_node: how many share a host, its memory, its disk and the fast links.
        launch_s: seconds the host spends on one operator of eager PyTorch. A GPU works meanwhile on operators that were
            launched before, so there it is a lower bound of each operator's time, and on a CPU an addition to it.
        host_memory_bytes: of one node.
        host_bandwidth: bytes per second that all processors of a node together read and write of it.
        peak_flops: operations per second of the matrix units as specified, by name of dtype, and of ``"tf32"``.
        vector_flops: operations per second of elementwise arithmetic that kernels reach, by name of dtype.
        matmuls: by name of dtype; a ``"tf32"`` is what float32 becomes where it is allowed.
        attention: over operations, by name of dtype.
        memory: over bytes read and written, into new memory; ``memory_in_place``, into memory in use.
        gather: over bytes read and written by embedding lookups.
        transcendental: over numbers of exponentials or the like.
        loops: of a CPU; None where they were not measured, and are taken to be as fast as PyTorch's kernels.
        collectives: inside a node, by kind.
        reads_peers: on a CPU, whether ranks read each other's memory (``zgraph.direct``) instead of sending messages.
        network: between nodes.
        host_link, disk: beyond the device.
        in_step: how much longer work takes in a step than its measurement alone says, by what does it (units of
            ``zgraph.work``); 1 where not said.
        sources: where the numbers are from.
        variants: on a CPU that was calibrated, the machine as each of so many ranks at once finds it.
    """

    name: str
    device_type: str
    memory_bytes: int
    memory_bandwidth: float
    devices_per_node: int
    launch_s: float
    host_memory_bytes: int
    host_bandwidth: float
    peak_flops: Mapping[str, float] = field(hash=False)
    vector_flops: Mapping[str, float] = field(hash=False)
    matmuls: Mapping[str, Matmul] = field(hash=False)
    attention: Mapping[str, Curve] = field(hash=False)
    memory: Curve
    memory_in_place: Curve
    gather: Curve
    transcendental: Curve
    collectives: Mapping[str, Collective | MeasuredCollective] = field(hash=False)
    network: Network
    host_link: HostLink
    disk: Disk
    in_step: Mapping[str, float] = field(default_factory=dict, hash=False)
    reads_peers: bool = False
    loops: LoopRates | None = None
    sources: str = ""
    variants: Mapping[int, Hardware] = field(default_factory=dict, hash=False)

    @property
    def is_staged(self) -> bool:
        """Whether collectives hold what they receive beside their result: see ``zgraph.liveness.lifetimes``."""
        return self.device_type == "cpu" and not self.reads_peers

    def matmul_s(self, dtype: torch.dtype, batch: Number, m: Number, n: Number, k: Number) -> Number:
        """Seconds of a batched matrix product (m, k) @ (k, n), launching it not included.

        Products of float32 are without TF32, which is torch's default; see ``with_tf32``.
        """
        return _of_dtype(self.matmuls, dtype, f"matmuls on {self.name}").seconds(batch, m, n, k)

    def attention_s(self, dtype: torch.dtype, flops: Number, num_bytes: Number) -> Number:
        """Seconds of fused attention of so many operations that reads and writes so many bytes, without launch.

        A dtype that attention is not known of takes as much longer than float32 as products of matrices do.
        """
        name = str(dtype).removeprefix("torch.")
        slower: Number = 1
        if name not in self.attention and name in self.matmuls and "float32" in self.matmuls:
            slower = self.matmul_s(dtype, 1, 1024, 1024, 1024) / self.matmul_s(torch.float32, 1, 1024, 1024, 1024)
            dtype = torch.float32
        curve = _of_dtype(self.attention, dtype, f"attention on {self.name}")
        return maximum(slower * curve.seconds(flops), self.memory_s(num_bytes))

    def memory_s(self, num_bytes: Number, *, in_place: bool = False) -> Number:
        """Seconds to stream so many bytes, read and written together, without launch.

        Args:
            num_bytes: read plus written.
            in_place: the result goes to memory that is in use already. A CPU takes new memory from the system page by
                page, which can take longer than the arithmetic; on a GPU there is no difference.
        """
        return (self.memory_in_place if in_place else self.memory).seconds(num_bytes)

    def vector_s(self, dtype: torch.dtype, flops: Number) -> Number:
        """Seconds of so many elementwise operations outside matrix units; movement is ``memory_s`` beside it."""
        return flops / _of_dtype(self.vector_flops, dtype, f"elementwise arithmetic on {self.name}")

    def transcendental_s(self, count: Number) -> Number:
        """Seconds of so many exponentials, logarithms or the like, elementwise."""
        return self.transcendental.seconds(count)

    def gather_s(self, num_bytes: Number) -> Number:
        """Seconds of lookups in an embedding, by bytes read plus written."""
        return self.gather.seconds(num_bytes)

    def collective_s(self, kind: str, num_bytes: Number, world: Number, *, together: int | None = None) -> Number:
        """Seconds of a collective of ``world`` ranks that fill node after node; nothing for one rank.

        The other ranks of its nodes may be in such collectives meanwhile: each device has its share of the network.

        Args:
            kind: one of ``KINDS``.
            num_bytes: of the full, unsharded tensor; for all_to_all, of the buffer that each rank sends from.
            world: ranks.
            together: how many of them share a node; as many as it has devices if None.
        """
        if kind not in self.collectives:
            raise OptionError(f"collective {kind!r} is unknown", fix=f"one of {', '.join(KINDS)}")
        per_node = self.devices_per_node if together is None else together
        return collective_seconds(kind, self.collectives[kind], self.network, num_bytes, world, per_node)

    def transfer_s(self, source: str, target: str, num_bytes: Number, *, pinned: bool = True) -> Number:
        """Seconds to move bytes of one device between tiers while the node's other devices move as many.

        The link to the host is each device's own; the disk is shared. Between device and disk, bytes go through host
        memory first and then on: BW-121 and BW-132 took the sum of both ways.

        Args:
            source: one of ``TIERS``; likewise ``target``.
            num_bytes: of this device.
            pinned: host memory is page-locked.
        """
        for tier in (source, target):
            if tier not in TIERS:
                raise OptionError(f"tier {tier!r} is unknown", fix=f"one of {', '.join(TIERS)}")
        if source == target:
            return 0 * num_bytes
        link = self.host_link.pinned if pinned else self.host_link.pageable
        seconds = 0 * num_bytes
        if "device" in (source, target) and self.device_type != "cpu":
            seconds = seconds + self.host_link.latency_s + num_bytes / link
        if "disk" in (source, target):
            rate = self.disk.read if source == "disk" else self.disk.write
            seconds = seconds + self.disk.latency_s + num_bytes * self.devices_per_node / rate
        return seconds

    def host_s(self, num_bytes: Number) -> Number:
        """Seconds in which the host's processors go over so many bytes, while they do as much for its other devices.

        What moves between the host and devices meanwhile takes nothing of that.

        Args:
            num_bytes: of one device, read plus written.
        """
        return HOST_LATENCY_S + num_bytes * self.devices_per_node / self.host_bandwidth

    def with_tf32(self) -> Hardware:
        """The same with products of float32 in TF32, as ``torch.set_float32_matmul_precision("high")`` allows.

        Raises:
            OptionError: the device has no TF32.
        """
        if TF32 not in self.matmuls:
            raise OptionError(f"{self.name} has no TF32")
        return replace(self, matmuls={**self.matmuls, "float32": self.matmuls[TF32]})

    def for_ranks(self, ranks: int) -> Hardware:
        """The machine as each of so many ranks on one node finds it, all working at once.

        GPUs are not shared: the same. The ranks of a CPU share cores and memory: what was measured with so many, or
        with the nearest smaller number, and then each takes longer in proportion.
        """
        if ranks < 1:
            raise OptionError(f"{ranks} ranks is not a number of ranks", fix="at least 1")
        if self.device_type != "cpu":
            return self
        measured = max((n for n in self.variants if n <= ranks), default=None)
        nearest, before = (self, 1) if measured is None else (self.variants[measured], measured)
        in_turns = max(ranks, self.devices_per_node) / max(before, self.devices_per_node)  # where cores are fewer
        found = _slower(nearest, ranks / before)
        return replace(found, devices_per_node=ranks, launch_s=nearest.launch_s * in_turns)


def lower_tier(hardware: Hardware) -> str:
    """Where a machine has what is offloaded: a CPU on a disk, and a device on its host."""
    return "disk" if hardware.device_type == "cpu" else "host"


def _of_dtype(table: Mapping[str, _Value], dtype: torch.dtype, what: str) -> _Value:
    try:
        return table[str(dtype).removeprefix("torch.")]
    except KeyError:
        raise OptionError(f"no {what} of {dtype} are known", fix=f"known are {', '.join(table)}") from None


def _slower(one: Hardware, factor: float) -> Hardware:
    """A CPU whose every work takes ``factor`` times as long; each rank has as much less of the memory."""
    if factor == 1:
        return one
    return replace(
        one,
        memory_bytes=int(one.memory_bytes / factor),
        memory_bandwidth=one.memory_bandwidth / factor,
        host_bandwidth=one.host_bandwidth / factor,
        peak_flops={name: rate / factor for name, rate in one.peak_flops.items()},
        vector_flops={name: rate / factor for name, rate in one.vector_flops.items()},
        matmuls={name: matmul.scaled(factor) for name, matmul in one.matmuls.items()},
        attention={name: curve.scaled(factor) for name, curve in one.attention.items()},
        memory=one.memory.scaled(factor),
        memory_in_place=one.memory_in_place.scaled(factor),
        gather=one.gather.scaled(factor),
        transcendental=one.transcendental.scaled(factor),
        collectives={kind: inside.scaled(factor) for kind, inside in one.collectives.items()},
        loops=one.loops.scaled(factor) if one.loops is not None else None,
    )
