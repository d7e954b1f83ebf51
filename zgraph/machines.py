"""Known devices: what their data sheets say, and which measurements stand in for those that nobody published.

Names of rows (SP-, BW-, GM-) are of the collection of published measurements that benchmarks/fit_hardware.py reads.
"Sheet" is the maker's data sheet. Everything else says that it is assumed.

What was fitted is in zgraph.fitted. What was not measured is taken over from the nearest device that was:

* Products of matrices on other NVIDIA GPUs have the H100's losses (bfloat16, 375 shapes), with their own peak, number
  of multiprocessors and memory. The A100's peak is scaled to the best that any shape was found to reach (GM-001). The
  H100's float8 has the losses of the B200's. Products of float32 (no TF32) and float64 have the losses of bfloat16 in
  the absence of any measurement.
* NVIDIA's NVLink groups without a row have the H100's collectives, with bandwidth in proportion to NVLink's. An
  all-reduce without NVLS has the bandwidth of an all-gather (BW-021 and BW-022 of the H200 are 367 and 361 GB/s).
* Devices on PCIe only have the H100's latencies and half of the link's rate: each byte goes to the host and back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from zgraph import fitted
from zgraph.curves import Collective, Curve, Matmul, MeasuredCollective, Network
from zgraph.hardware import KINDS, TF32, Disk, Hardware, HostLink, LoopRates
from zgraph.peer_memory import may_read_peers

GIB = 2**30

STREAMED = 0.75
"""Part of the specified memory bandwidth that a large copy reaches: BW-043 (A100) 0.775, BW-044 (H100) 0.754, BW-045
(GB200) 0.725."""

KERNEL_S = 2e-6
"""Seconds of the smallest elementwise kernel on a GPU; assumed. Products of matrices have their own, fitted."""

LAUNCH_S = 6e-6
"""Seconds the host spends on an operator of eager PyTorch before a GPU; assumed, 5 to 10 us being usual."""

ATTENTION = 0.35
"""Part of the peak of matrix units that flash attention reaches on Hopper and later: 8.8e12 operations a step in 28 ms
forward (TTK-011, TTK-001 for the model: half of 2 * 2 * 8192**2 * 2048 a layer, 32 layers), so 0.32 of 989e12 on a
device of 500 W, and backward, 2.5 times the operations, 63 ms (TTK-007), 0.35. PyTorch's own kernel is FlashAttention
2, which does not use what is new in Hopper; 0.6 on older GPUs, assumed of its paper."""

VECTOR = 0.7
"""Part of the specified arithmetic outside matrix units that elementwise kernels reach; assumed."""

SPECIAL = 1 / 4
"""Exponentials and the like per operation of float32 arithmetic: a quarter of the lanes have the units; sheets. One
operation counts as half a fused multiply-add."""

PINNED = 55.4 / 63
"""Part of the specified rate of PCIe that copies from page-locked memory reach; BW-046, BW-047."""

PAGEABLE = 0.4
"""Pageable copies beside page-locked ones, assumed: each byte is copied once more by the host."""

PCIE = MappingProxyType({3: 15.75e9, 4: 31.5e9, 5: 63e9})
"""Bytes per second and direction of sixteen lanes, by generation; sheets."""

CHANNELS = 12, 2
"""Of memory of a host, for a node of several devices, whose host has two processors, and for a desktop; assumed."""

CHANNEL = MappingProxyType({3: 21.3e9, 4: 25.6e9, 5: 38.4e9})
"""Bytes per second of each, by the generation of PCIe that came with it: DDR4-2666, DDR4-3200 and DDR5-4800; sheets."""

NVME = Disk(2.9e9, 2.04e9, 1e-4)
"""One consumer's drive; BW-137, BW-138. The latency is assumed, here and below."""

GEN4 = Disk(10.1e9, 5.3e9, 1e-4)
"""Four drives of PCIe 4; BW-117, BW-119."""

GEN5 = Disk(27e9, 11e9, 1e-4)
"""Four drives of PCIe 5; BW-127, BW-128."""


@dataclass(frozen=True)
class Sheet:
    """A device as its maker specifies it. Rates are of dense operations per second, or bytes per second.

    Attributes:
        peaks: of matrix units, by name of dtype; float32 and float64 are what products of them run at.
        vector: of float32 outside matrix units, and ``vector_64`` of float64.
        units: streaming multiprocessors.
        memory_gib: as the name says, or as the driver does: 23034 MiB of an L4, 46068 of an L40S, 143,150 of an H200;
            of a B200 pytorch/ao#4002, of an MI300X ROCm/vllm#397.
        nvlink: one direction of all links of a device together; 0 without.
        pcie: generation.
        network: one direction, a device's share of its node's network cards; the usual for such nodes.
        devices: usual number in a node.
        host_gib: usual memory of a node; assumed.
        best: part of the peak that the best product reaches where it was measured; otherwise as the fit has it.
        sustained: part of the fitted rates of products and attention that the device's power allows.
        reduces_in_switch: whether NVLS is there.
        channel: bytes per second of a channel of the host's memory, where it is newer than PCIe says.
        sources: rows.
    """

    peaks: Mapping[str, float]
    vector: float
    vector_64: float
    units: int
    memory_gib: float
    memory: float
    nvlink: float
    pcie: int
    network: float
    devices: int
    host_gib: int
    disk: Disk
    sources: str
    like: str = "H100"
    attention: float = ATTENTION
    best: float | None = None
    sustained: float = 1.0
    reduces_in_switch: bool = False
    channel: float | None = None


def _tera(**rates: float) -> Mapping[str, float]:
    return MappingProxyType({name: rate * 1e12 for name, rate in rates.items()})


_AMPERE = _tera(bfloat16=312, float16=312, tf32=156, float32=19.5, float64=19.5)
_HOPPER = _tera(
    bfloat16=989,
    float16=989,
    tf32=494.5,
    float32=66.9,
    float64=66.9,
    float8_e4m3fn=1979,
    float8_e5m2=1979,
)
_A100_80 = Sheet(
    peaks=_AMPERE,
    vector=19.5e12,
    vector_64=9.7e12,
    units=108,
    memory_gib=80,
    memory=2.039e12,
    nvlink=300e9,
    pcie=4,
    network=25e9,
    devices=8,
    host_gib=1024,
    disk=GEN4,
    sources="SP-003",
    attention=0.6,
    best=271.2 / 312,
)
_H100 = Sheet(
    peaks=_HOPPER,
    vector=66.9e12,
    vector_64=33.5e12,
    units=132,
    memory_gib=80,
    memory=3.35e12,
    nvlink=450e9,
    pcie=5,
    network=50e9,
    devices=8,
    host_gib=2048,
    disk=GEN5,
    sources="SP-004",
    reduces_in_switch=True,
)

SHEETS: Mapping[str, Sheet] = MappingProxyType(
    {
        # No bfloat16 in its matrix units: products of it run at the rate of float32. Four cards of 100 Gb/s for eight.
        "V100-32": Sheet(
            peaks=_tera(float16=125, bfloat16=15.7, float32=15.7, float64=7.8),
            vector=15.7e12,
            vector_64=7.8e12,
            units=80,
            memory_gib=32,
            memory=0.9e12,
            nvlink=150e9,
            pcie=3,
            network=6.25e9,
            devices=8,
            host_gib=512,
            disk=NVME,
            sources="SP-001",
            attention=0.4,
        ),
        "A100-40": replace(_A100_80, memory_gib=40, memory=1.555e12, network=6.25e9, sources="SP-002, GM-001"),
        "A100-80": replace(_A100_80, sources="SP-003, GM-001, BW-001 to BW-012"),
        "H100": _H100,
        # torchtitan's: 96 GB of HBM2e and a cap of 500 W instead of 700 W, to which sustained rates are in proportion.
        # Its products take 380 ms a step (TTK-002) for 1.84e14 operations: 0.69 of the fitted rate.
        "H100-96": replace(_H100, memory_gib=96, memory=2.4e12, sustained=500 / 700, sources="TT-001 (gpu), TTK-002"),
        "H200": replace(_H100, memory_gib=139.8, memory=4.8e12, sources="SP-005, BW-013 to BW-023"),
        "B200": Sheet(
            peaks=_tera(
                bfloat16=2250, float16=2250, tf32=1125, float32=75, float64=37, float8_e4m3fn=4500, float8_e5m2=4500
            ),
            vector=75e12,
            vector_64=37e12,
            units=148,
            memory_gib=178.35,
            memory=8.0e12,
            nvlink=900e9,
            pcie=5,
            network=50e9,
            devices=8,
            host_gib=2048,
            disk=GEN5,
            sources="SP-006",
            like="B200",
            reduces_in_switch=True,
        ),
        "L4": Sheet(
            peaks=_tera(
                bfloat16=121, float16=121, tf32=60, float32=30.3, float64=0.47, float8_e4m3fn=242, float8_e5m2=242
            ),
            vector=30.3e12,
            vector_64=0.47e12,
            units=58,
            memory_gib=22.49,
            memory=0.3e12,
            nvlink=0,
            pcie=4,
            network=1.25e9,
            devices=8,
            host_gib=256,
            disk=NVME,
            sources="SP-007",
            attention=0.6,
        ),
        "L40S": Sheet(
            peaks=_tera(
                bfloat16=362, float16=362, tf32=183, float32=91.6, float64=1.43, float8_e4m3fn=733, float8_e5m2=733
            ),
            vector=91.6e12,
            vector_64=1.43e12,
            units=142,
            memory_gib=44.99,
            memory=0.864e12,
            nvlink=0,
            pcie=4,
            network=1.25e9,
            devices=8,
            host_gib=512,
            disk=GEN4,
            sources="SP-008",
            attention=0.6,
        ),
        "RTX-3090": Sheet(
            peaks=_tera(bfloat16=71, float16=71, tf32=35.6, float32=35.6, float64=0.556),
            vector=35.6e12,
            vector_64=0.556e12,
            units=82,
            memory_gib=24,
            memory=0.936e12,
            nvlink=0,
            pcie=4,
            network=1.25e9,
            devices=1,
            host_gib=64,
            disk=NVME,
            sources="SP-009; without the bridge",
            attention=0.6,
        ),
        "RTX-4090": Sheet(
            peaks=_tera(
                bfloat16=165.2,
                float16=165.2,
                tf32=82.6,
                float32=82.6,
                float64=1.29,
                float8_e4m3fn=330.3,
                float8_e5m2=330.3,
            ),
            vector=82.6e12,
            vector_64=1.29e12,
            units=128,
            memory_gib=24,
            memory=1.008e12,
            nvlink=0,
            pcie=4,
            network=1.25e9,
            devices=1,
            host_gib=64,
            disk=NVME,
            sources="SP-010",
            attention=0.6,
            channel=CHANNEL[5],
        ),
        "RTX-5090": Sheet(
            peaks=_tera(
                bfloat16=209.5,
                float16=209.5,
                tf32=104.8,
                float32=104.8,
                float64=1.64,
                float8_e4m3fn=419,
                float8_e5m2=419,
            ),
            vector=104.8e12,
            vector_64=1.64e12,
            units=170,
            memory_gib=32,
            memory=1.792e12,
            nvlink=0,
            pcie=5,
            network=1.25e9,
            devices=1,
            host_gib=64,
            disk=NVME,
            sources="SP-011",
            attention=0.6,
        ),
        "MI300X": Sheet(
            peaks=_tera(bfloat16=1307, float16=1307, tf32=653.7, float32=163.4, float64=163.4),
            vector=163.4e12,
            vector_64=81.7e12,
            units=304,
            memory_gib=191.98,
            memory=5.3e12,
            nvlink=448e9,
            pcie=5,
            network=50e9,
            devices=8,
            host_gib=2048,
            disk=GEN5,
            sources="SP-012",
            like="MI300X",
        ),
    }
)
PRESETS = tuple(SHEETS)

ASSUMED = "assumed"
"""The sources of a machine of which nothing was measured."""

_BYTES = MappingProxyType({"float64": 8, "float32": 4, TF32: 4, "bfloat16": 2, "float16": 2})


def _matmul(sheet: Sheet, dtype: str) -> Matmul:
    """The fitted losses of the nearest device and dtype, at this one's peak."""
    known = {name: model for (gpu, name), model in fitted.MATMULS.items() if gpu == sheet.like}
    like = sheet.like
    if dtype in known:
        source = dtype
    elif dtype.startswith("float8"):
        like, source = "B200", "float8_e4m3fn"
    else:
        source = "bfloat16"
    base, origin = fitted.MATMULS[like, source], SHEETS[like]
    part = sheet.best or base.rate / origin.peaks[source]
    element = _BYTES.get(dtype, 1)
    return replace(
        base,
        rate=part * sheet.peaks[dtype] * sheet.sustained,
        bytes_per_s=base.bytes_per_s * sheet.memory / origin.memory,
        units=sheet.units,
        in_bytes=element,
        out_bytes=max(element, 2),  # products of float8 are bfloat16
    )


def _collectives(name: str, sheet: Sheet) -> Mapping[str, Collective | MeasuredCollective]:
    """The fitted ones of this device; else those of the nearest, at this one's links."""
    found: dict[str, Collective | MeasuredCollective] = {}
    for kind in KINDS:
        if (name, kind) in fitted.COLLECTIVES:
            found[kind] = fitted.COLLECTIVES[name, kind]
        elif name.startswith("A100") and kind == "all_reduce":
            found[kind] = fitted.COLLECTIVES["A100", kind]
        else:
            base = fitted.COLLECTIVES["H100", kind]
            if kind == "all_reduce" and not sheet.reduces_in_switch:
                gather = fitted.COLLECTIVES["H100", "all_gather"]
                base = replace(base, bandwidth=gather.bandwidth, small_group=gather.small_group)
            if sheet.nvlink:
                found[kind] = replace(base, bandwidth=base.bandwidth * sheet.nvlink / SHEETS["H100"].nvlink)
            else:
                found[kind] = replace(base, bandwidth=PCIE[sheet.pcie] * PINNED / 2, small_group=0.0)
    return found


SUSTAINED = {"H100": 1.34, "H200": 1.34, "A100-40": 1.15, "A100-80": 1.15}
"""How much longer products of matrices take in a step than alone: a device that works without a pause runs at the clock
that its power allows, which short measurements do not see. There is no step on an H200 among those that were fitted: it
is taken to be as the H100, whose chip and power it has. Of other devices nothing is known, and nothing assumed."""

BESIDE = 1.12
"""How much longer collectives take beside computing.

Both are what benchmarks/fit_published.py fitted to half of the configurations of trust A; docs/accuracy.md has the
errors of the other half.
"""


def preset(name: str) -> Hardware:
    """The hardware of a name in ``PRESETS``, with as many devices in a node as is usual."""
    sheet = SHEETS[name]
    attention = {
        dtype: Curve.line(sheet.attention * sheet.sustained * sheet.peaks[dtype], KERNEL_S)
        for dtype in sheet.peaks
        if dtype in ("bfloat16", "float16", "float32", "float64")
    }
    streaming = Curve.line(STREAMED * sheet.memory, KERNEL_S)
    pinned = PCIE[sheet.pcie] * PINNED
    return Hardware(
        name=name,
        device_type="cuda",
        memory_bytes=int(sheet.memory_gib * GIB),
        memory_bandwidth=sheet.memory,
        devices_per_node=sheet.devices,
        launch_s=LAUNCH_S,
        host_memory_bytes=sheet.host_gib * GIB,
        host_bandwidth=STREAMED * (sheet.channel or CHANNEL[sheet.pcie]) * CHANNELS[sheet.devices == 1],
        peak_flops=sheet.peaks,
        vector_flops={
            "float32": VECTOR * sheet.vector,
            "bfloat16": VECTOR * sheet.vector,
            "float16": VECTOR * sheet.vector,
            "float64": VECTOR * sheet.vector_64,
        },
        matmuls={dtype: _matmul(sheet, dtype) for dtype in sheet.peaks},
        attention=attention,
        memory=streaming,
        memory_in_place=streaming,
        gather=streaming,
        transcendental=Curve.line(VECTOR * sheet.vector * SPECIAL / 2, KERNEL_S),
        collectives=_collectives(name, sheet),
        network=Network(
            sheet.network,
            fitted.NETWORK_EFFICIENCY,
            fitted.NETWORK_LATENCY_S,
            fitted.NETWORK_RAMP_S,
            fitted.NETWORK_RAMP_BYTES,
            reduces_in_node=sheet.reduces_in_switch,
        ),
        host_link=HostLink(pinned, PAGEABLE * pinned, 1e-5),
        disk=sheet.disk,
        in_step={"matrix": SUSTAINED.get(name, 1.0), "link": BESIDE},
        sources=sheet.sources,
    )


def preset_of(name: str, memory_bytes: int) -> str | None:
    """The preset of a GPU as its driver names it; None if it is another.

    Args:
        name: such as ``"NVIDIA A100-SXM4-80GB"``.
        memory_bytes: which tells variants of one name apart.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & {"LAPTOP", "MOBILE", "PCIE", "NVL", "MIG", "MAX", "D"}:
        return None  # slower than the preset of the same name
    gibibytes = memory_bytes / 2**30
    if "H100" in words:
        return "H100-96" if gibibytes > 88 else "H100"
    if "A100" in words:
        return "A100-80" if gibibytes > 60 else "A100-40"
    if "V100" in words:
        return "V100-32" if gibibytes > 24 else None
    exact = {"H200": "H200", "B200": "B200", "L4": "L4", "L40S": "L40S", "MI300X": "MI300X"}
    exact |= {number: f"RTX-{number}" for number in ("3090", "4090", "5090")}
    found = [preset for word, preset in exact.items() if word in words]
    return found[0] if found and "TI" not in words else None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


HOST_MARGIN = 0.1
"""Part of a host's memory that what is offloaded there leaves alone: for the system, for Python, and for what drivers
and libraries hold; assumed."""


def host_budget(num_bytes: int) -> int:
    """How much of so much memory of a host what is offloaded there may take."""
    return int(num_bytes * (1 - HOST_MARGIN))


def available_bytes() -> int:
    """Bytes of this machine's memory that this process may take now."""
    return min(_available())


def ranks_here(num_ranks: int) -> int:
    """How many of so many ranks are on this machine: as torchrun says, and all of them if it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))


def _available() -> Iterator[int]:
    """Bytes of memory that are available: on the machine, and within each control group (v2) of this process."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), "/")
    group = Path("/sys/fs/cgroup") / own.lstrip("/")
    for each in (group, *group.parents):
        try:
            most, used = ((each / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:  # the root has no limit, and a container may not see its group
            continue
        if most != "max":
            yield max(int(most) - int(used), 0)


def this_cpu() -> Hardware:
    """This machine, whose numbers are assumed until ``zgraph calibrate`` measures them; a rank has all cores."""
    return assumed_cpu(available_cores(), available_memory())


def assumed_cpu(cores: int, total: int) -> Hardware:
    """A machine of so many cores and bytes of memory, whose numbers are assumed; a rank has all cores."""
    rate, stream = 3e10 * cores, 1e10
    rates = {"float32": rate, "float64": rate / 2, "bfloat16": rate / 4, "float16": rate / 8}
    reads_peers = may_read_peers()
    between_ranks = Curve.line(5e9, 1e-4) if reads_peers else Curve.line(1.5e9, 2e-4)
    return Hardware(
        name="cpu",
        device_type="cpu",
        memory_bytes=total,
        memory_bandwidth=stream,
        devices_per_node=cores,
        launch_s=1e-5,
        host_memory_bytes=total,
        host_bandwidth=stream,
        peak_flops=rates,
        vector_flops={name: each / 10 for name, each in rates.items()},
        matmuls={
            name: Matmul(each, _BYTES[name], _BYTES[name], stream, 2e-6, ramp_m=4, ramp_n=8, ramp_k=8)
            for name, each in rates.items()
        },
        attention={name: Curve.line(each / 2, 1e-5) for name, each in rates.items()},
        memory=Curve.line(stream / 4, 1e-6),
        memory_in_place=Curve.line(stream, 1e-6),
        gather=Curve.line(stream / 4, 1e-6),
        transcendental=Curve.line(2e8 * cores, 1e-6),
        collectives={kind: MeasuredCollective(between_ranks, 2 if kind == "all_reduce" else 1) for kind in KINDS},
        reads_peers=reads_peers,
        # Of loops' own: what is in cache is as fast as a product is, but a call from Python takes several of ATen's.
        loops=LoopRates(operations=rate, functions=2e8 * cores, launch_s=4e-5),
        network=Network(1.25e9, 0.8, 1e-4),
        host_link=HostLink(stream, stream, 1e-6),
        disk=Disk(5e8, 2e8, 1e-3),
        sources=ASSUMED,
    )
