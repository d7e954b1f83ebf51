"""Where every parameter lives: flat buckets in order of use, each rank owning one contiguous 1/N.

A bucket is one flat buffer. Its segments are parameters, laid out in the order the step first reads
them, each starting at a multiple of ``ALIGN`` elements (so that vector loads of any segment are aligned);
the end is padded so that the bucket divides evenly over the ranks. Because the buffer *is* the gathered
form, an all-gather needs no copy in and no copy out: parameters are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

ALIGN = 16
"""Elements. Padding every segment and shard to 16 lets compiled kernels use full vector loads."""


@dataclass(frozen=True)
class Segment:
    """One parameter inside a bucket: ``bucket[offset : offset + numel].view(shape)``."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters stored, gathered, reduced and updated together.

    Attributes:
        name: ``bucket0``, ``bucket1``, ... in order of first use.
        dtype, device: of the parameters.
        segments: the parameters, offsets ascending and non-overlapping.
        numel: elements including padding; a multiple of ``world * ALIGN``.
        trainable: False when no segment is updated by the optimizer (frozen or unused).
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    segments: tuple[Segment, ...]
    numel: int
    trainable: bool

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """All buckets of a model and how they are divided.

    Attributes:
        world: number of ranks the state is divided over.
        shard_params: each rank stores 1/world of every bucket's parameters (ZeRO-3).
        shard_state: each rank stores 1/world of every bucket's optimizer state (ZeRO-1, 2, 3).
    """

    buckets: tuple[Bucket, ...]
    world: int
    shard_params: bool = False
    shard_state: bool = False
    _index: dict[str, tuple[Bucket, Segment]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for bucket in self.buckets:
            for segment in bucket.segments:
                self._index[segment.name] = (bucket, segment)

    def find(self, name: str) -> tuple[Bucket, Segment]:
        """The bucket and segment of the parameter called ``name``."""
        return self._index[name]

    @cached_property
    def by_name(self) -> dict[str, Bucket]:
        """Buckets by their names."""
        return {bucket.name: bucket for bucket in self.buckets}

    def param_numel(self, bucket: Bucket) -> int:
        """Elements of the bucket's parameters that one rank stores."""
        return bucket.numel // self.world if self.shard_params else bucket.numel

    def state_numel(self, bucket: Bucket) -> int:
        """Elements of each flat optimizer-state tensor of the bucket that one rank stores."""
        return bucket.numel // self.world if self.shard_state else bucket.numel


@dataclass(frozen=True)
class ParamSpec:
    """What bucketing needs to know of one parameter, in order of first use.

    ``group`` says which parameters may share a bucket: equal for parameters whose update is the same
    expression of the same hyperparameters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trainable: bool
    group: Hashable = None


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def make_buckets(params: Iterable[ParamSpec], world: int, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Divide parameters, given in order of first use, into buckets of about ``bucket_bytes``.

    Parameters of one bucket agree in dtype, device, trainability and ``group``. A bucket closes when the
    next parameter would take it over ``bucket_bytes``. Buckets are ordered by their first parameter.
    """
    open_buckets: dict[Hashable, list[ParamSpec]] = {}
    closed: list[list[ParamSpec]] = []
    size: dict[Hashable, int] = {}
    for param in params:
        key = (param.dtype, str(param.device), param.trainable, param.group)
        num_bytes = _round_up(math.prod(param.shape), ALIGN) * param.dtype.itemsize
        if key not in open_buckets or size[key] + num_bytes > bucket_bytes:
            open_buckets[key] = []
            closed.append(open_buckets[key])
            size[key] = 0
        open_buckets[key].append(param)
        size[key] += num_bytes
    buckets = []
    for index, members in enumerate(closed):
        segments, offset = [], 0
        for param in members:
            segments.append(Segment(param.name, param.shape, offset))
            offset += _round_up(math.prod(param.shape), ALIGN)
        first = members[0]
        numel = _round_up(max(offset, 1), world * ALIGN)
        buckets.append(Bucket(f"bucket{index}", first.dtype, first.device, tuple(segments), numel, first.trainable))
    return tuple(buckets)
