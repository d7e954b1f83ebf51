"""How long work takes as a function of its size: numbers in, number out; sympy expressions in, an expression out.

Seconds, bytes and floating-point operations throughout. Every curve only rises with the work. That each can be written
with sums, products, maxima and ceilings is what lets a cost be a formula of batch, sequence and world size.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy

Number: TypeAlias = Any
"""An ``int``, a ``float`` or a ``sympy.Expr``: a union would make every sum of two of them an error to mypy."""


def is_plain(*values: Number) -> bool:
    """Whether all are Python's own numbers, so that arithmetic can be the fast kind."""
    return all(isinstance(value, int | float) for value in values)


def maximum(first: Number, second: Number) -> Number:
    """The larger of two; unevaluated if symbolic, because sympy would try to prove which one is."""
    if is_plain(first, second):
        return max(first, second)
    first, second = sympy.sympify(first), sympy.sympify(second)
    return sympy.Max(first, second, evaluate=first.is_number and second.is_number)


def minimum(first: Number, second: Number) -> Number:
    """The smaller of two."""
    if is_plain(first, second):
        return min(first, second)
    first, second = sympy.sympify(first), sympy.sympify(second)
    return sympy.Min(first, second, evaluate=first.is_number and second.is_number)


def ceiling_of(value: Number, divisor: int = 1) -> Number:
    """``value / divisor`` rounded up. Exact for integers and for expressions of integer symbols."""
    if is_plain(value):
        return -(-value // divisor)
    return sympy.ceiling(value / sympy.Integer(divisor))


def logarithm_of(value: Number) -> Number:
    """The logarithm to base 2."""
    return math.log2(value) if is_plain(value) else sympy.log(value, 2)


@dataclass(frozen=True)
class Curve:
    """Seconds over a size, straight between measured points, and on from the last along the last line.

    Attributes:
        points: size and seconds of each point, both rising. Below the first, seconds are the first's.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def line(cls, per_second: float, fixed_s: float = 0.0) -> Curve:
        """A constant rate after a fixed time."""
        return cls(((0.0, fixed_s), (per_second, fixed_s + 1.0)))

    @classmethod
    def through(cls, measured: Sequence[tuple[float, float]]) -> Curve:
        """The curve of measurements. Noise only adds to a time, so none took longer than one of a larger size."""
        pairs = sorted(measured, reverse=True)
        lowered = itertools.accumulate((seconds for _, seconds in pairs), min)
        points = ((float(size), seconds) for (size, _), seconds in zip(pairs, lowered, strict=True))
        return cls(tuple(reversed(list(points))))

    def _slopes(self) -> list[float]:
        return [(t1 - t0) / (x1 - x0) for (x0, t0), (x1, t1) in itertools.pairwise(self.points)]

    def seconds(self, size: Number) -> Number:
        """How long work of this size takes."""
        points = self.points
        if len(points) == 1:
            return points[0][1]
        if is_plain(size):
            if size <= points[0][0]:
                return points[0][1]
            i = min(bisect.bisect_right(points, (size, math.inf)), len(points) - 1)
            (x0, t0), (x1, t1) = points[i - 1], points[i]
            return t0 + (size - x0) * (t1 - t0) / (x1 - x0)
        total: Number = sympy.Float(points[0][1])
        before = 0.0
        for (start, _), slope in zip(points, self._slopes(), strict=False):
            total += (slope - before) * maximum(size - start, 0)
            before = slope
        return total

    def scaled(self, factor: float) -> Curve:
        """The same sizes taking ``factor`` times as long."""
        return Curve(tuple((size, seconds * factor) for size, seconds in self.points))


@dataclass(frozen=True)
class Matmul:
    """A matrix product (batch, m, k) @ (batch, k, n) of one dtype, as tiles over the multiprocessors of a device.

    Arithmetic takes ``2 * batch * (m + ramp_m) * (n + ramp_n) * (k + ramp_k) / rate``, with m and n rounded up to
    tiles, and the number of tiles rounded up to a multiple of ``units`` as far as ``quantisation`` says: kernels are
    chosen among several sizes of tile and split k, so the loss is a part of what one tile size would lose. Memory takes
    its bytes over ``bytes_per_s``. The longer of the two hides ``overlap`` of the shorter. Before, a library on a CPU
    copies operands to where the elements of a tile follow each other, unless one of them is a vector (Goto and van de
    Geijn, 2008, "Anatomy of high-performance matrix multiplication"): for few rows, that is what takes long.

    Attributes:
        rate: operations per second that large products come near to.
        units: multiprocessors that work on tiles at once.
        tile: rows and columns of a tile.
        quantisation: from 0, no loss to a last wave that is not full, to 1, all of it.
        ramp_m: rows' worth of time that every product spends in addition; likewise ``ramp_n`` and ``ramp_k``.
        fixed_s: seconds of the smallest product, without launching it.
        bytes_per_s: rate at which operands and result move.
        in_bytes: bytes of an element of an operand; ``out_bytes``, of the result.
        overlap: from 0, arithmetic and movement take turns, to 1, the shorter is hidden.
        packed_per_s: bytes of operands that are copied in a second; infinite where none are.
    """

    rate: float
    in_bytes: int
    out_bytes: int
    bytes_per_s: float
    fixed_s: float
    units: int = 1
    tile: int = 1
    quantisation: float = 0.0
    ramp_m: float = 0.0
    ramp_n: float = 0.0
    ramp_k: float = 0.0
    overlap: float = 1.0
    packed_per_s: float = math.inf

    def seconds(self, batch: Number, m: Number, n: Number, k: Number) -> Number:
        """How long one product takes, launching it not included."""
        tiles = batch * ceiling_of(m, self.tile) * ceiling_of(n, self.tile)
        if self.quantisation:
            waves = (1 - self.quantisation) * tiles / self.units + self.quantisation * ceiling_of(tiles, self.units)
            arithmetic = 2 * self.tile**2 * self.units * waves * (k + self.ramp_k) / self.rate
        else:
            arithmetic = 2 * batch * (m + self.ramp_m) * (n + self.ramp_n) * (k + self.ramp_k) / self.rate
        num_bytes = batch * (self.in_bytes * (m * k + k * n) + self.out_bytes * m * n)
        movement = num_bytes / self.bytes_per_s
        longer = maximum(arithmetic, movement)
        is_packed = minimum(minimum(m, n) - 1, 1)  # 0 if one of them is a vector
        packing = is_packed * batch * self.in_bytes * (m * k + k * n) / self.packed_per_s
        return self.fixed_s + packing + self.overlap * longer + (1 - self.overlap) * (arithmetic + movement)

    def scaled(self, factor: float) -> Matmul:
        """The same taking ``factor`` times as long."""
        return replace(
            self,
            rate=self.rate / factor,
            bytes_per_s=self.bytes_per_s / factor,
            fixed_s=self.fixed_s * factor,
            packed_per_s=self.packed_per_s / factor,
        )


@dataclass(frozen=True)
class Collective:
    """One kind of collective inside a node, fitted: latency, then bytes at a rate that larger groups come near to.

    With n ranks and S bytes of full tensor, a rank moves ``S * (n - 1) / n`` (twice that to reduce to all), in
    ``latency_s + per_rank_s * (n - 1) + moved / bandwidth(n) + ramp_s * moved / (moved + ramp_bytes)`` seconds. The
    last part is what a large message loses to filling the pipeline, and small ones, sent by another protocol, do not.

    Attributes:
        latency_s, per_rank_s: seconds of the smallest, and of each further rank.
        bandwidth: bytes per second that large messages in large groups come near to.
        small_group: bandwidth(n) is ``bandwidth * (1 - small_group / n)``, from 0 to 1; not of a mesh.
        mesh: whether every pair of devices has a link of ``bandwidth`` of its own, as xGMI has, and no switch; then
            bandwidth(n) is ``bandwidth * (n - 1)``, and more devices are faster.
        ramp_s, ramp_bytes: time lost to filling the pipeline, and the size at which half of it is.
        rounds: times that the moved bytes are; 2 for all_reduce.
    """

    latency_s: float
    per_rank_s: float
    bandwidth: float
    small_group: float = 0.0
    ramp_s: float = 0.0
    ramp_bytes: float = 1.0
    rounds: int = 1
    mesh: bool = False

    def moved(self, num_bytes: Number, world: Number) -> Number:
        """Bytes that one rank receives."""
        return self.rounds * num_bytes * (world - 1) / world

    def seconds(self, num_bytes: Number, world: Number, local: Number) -> Number:
        """How long the links inside a node take for their part: ``local`` of the ``world`` ranks are in it."""
        several = minimum(local - 1, 1)
        moved = several * self.moved(num_bytes, world)
        rate = self.bandwidth * (maximum(local - 1, 1) if self.mesh else 1 - self.small_group / local)
        filling = self.ramp_s * moved / (moved + self.ramp_bytes)
        return self.latency_s + self.per_rank_s * (local - 1) + moved / rate + filling

    def scaled(self, factor: float) -> Collective:
        """The same taking ``factor`` times as long."""
        return replace(
            self,
            latency_s=self.latency_s * factor,
            per_rank_s=self.per_rank_s * factor,
            bandwidth=self.bandwidth / factor,
            ramp_s=self.ramp_s * factor,
        )


@dataclass(frozen=True)
class MeasuredCollective:
    """One kind of collective as measured on this machine, over the bytes that one rank moves."""

    curve: Curve
    rounds: int = 1

    def seconds(self, num_bytes: Number, world: Number, local: Number) -> Number:
        """How long it takes; ``local`` is ignored by a machine that is one node."""
        del local
        return self.curve.seconds(self.rounds * num_bytes * (world - 1) / world)

    def scaled(self, factor: float) -> MeasuredCollective:
        """The same taking ``factor`` times as long."""
        return MeasuredCollective(self.curve.scaled(factor), self.rounds)


@dataclass(frozen=True)
class Network:
    """Links between nodes.

    Attributes:
        bytes_per_s: of one device's share of the network cards of its node, one direction, as specified.
        efficiency: part of it that large messages reach.
        latency_s: seconds of each doubling of the number of nodes.
        ramp_s, ramp_bytes: time lost to filling the pipeline, and the bytes per device at which half of it is.
        reduces_in_node: whether all_reduce adds up inside the node first and sends only the sums between nodes, as NCCL
            does where the switch can reduce (NVLSTree on Hopper and later).
    """

    bytes_per_s: float
    efficiency: float
    latency_s: float
    ramp_s: float = 0.0
    ramp_bytes: float = 1.0
    reduces_in_node: bool = False

    def seconds(self, kind: str, num_bytes: Number, world: Number, nodes: Number, local: Number) -> Number:
        """How long the links between nodes take, their latency not included; nothing if there is one node."""
        several = minimum(nodes - 1, 1)
        if kind == "all_to_all":  # each rank sends what is its own to all others but those of its node
            moved = several * num_bytes * (world - local) / world
            return moved / (self.bytes_per_s * self.efficiency) + self.ramp_s * moved / (moved + self.ramp_bytes)
        part = (nodes - 1) / nodes if kind == "all_reduce" and self.reduces_in_node else several * (world - 1) / world
        moved = (2 if kind == "all_reduce" else 1) * num_bytes * part / local
        return moved / (self.bytes_per_s * self.efficiency) + self.ramp_s * moved / (moved + self.ramp_bytes)


def collective_seconds(
    kind: str,
    inside: Collective | MeasuredCollective,
    network: Network,
    num_bytes: Number,
    world: Number,
    per_node: int,
) -> Number:
    """A collective over nodes that have ``per_node`` ranks of it, but for the last: rings that pass through every one.

    The slower of the links inside a node and between nodes sets the pace of a ring, so its time is the longer of both,
    and the latency of each doubling of nodes is added. Nothing for a world of one.
    """
    nodes = ceiling_of(world, per_node)
    local = minimum(world, per_node)
    paced = maximum(inside.seconds(num_bytes, world, local), network.seconds(kind, num_bytes, world, nodes, local))
    return minimum(world - 1, 1) * (paced + network.latency_s * logarithm_of(nodes))
