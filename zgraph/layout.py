"""Where every parameter lives: flat buckets in order of use, each rank owning one contiguous 1/N.

A bucket is one flat buffer. Its segments are parameters, laid out in the order the step first reads
them, each starting at a multiple of ``ALIGN`` elements (so that vector loads of any segment are aligned);
the end is padded so that the bucket divides evenly over the ranks. Because the buffer *is* the gathered
form, an all-gather needs no copy in and no copy out: parameters are views of it.

Where the update of a parameter mixes its elements (Muon's, say), no segment crosses from one rank's part into the
next: each rank owns whole parameters, dealt out by ``zgraph.ownership``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from zgraph.ownership import deal, fill_with_whole

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
        owners: the rank that has each segment, where none is cut, and computes its update.
        states: by key, where optimizer state lies whose tensors have shapes of their own, by parameter.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    segments: tuple[Segment, ...]
    numel: int
    trainable: bool
    owners: tuple[int, ...] = ()
    states: tuple[tuple[str, Bucket], ...] = ()

    def ranges(self) -> tuple[list[int], list[int]]:
        """Where segments start, and where they stop."""
        return [s.offset for s in self.segments], [s.offset + s.numel for s in self.segments]

    @property
    def has_padding(self) -> bool:
        """Whether some elements are of no segment."""
        return sum(segment.numel for segment in self.segments) < self.numel

    def keeps(self, key: str) -> bool:
        """Whether optimizer state called ``key`` has tensors of shapes of their own."""
        return any(key == own for own, _ in self.states)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Away:
    """What of some buckets lies on a lower tier instead of in the memory that is computed in.

    Attributes:
        what: ``"optimizer"``, vectors of optimizer state; ``"parameters"``; or ``"gradients"``, added up over
            micro-batches.
        tier: ``"host"`` or ``"disk"``.
        buckets: their names.
    """

    what: str
    tier: str
    buckets: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """All buckets of a model and how they are divided.

    Attributes:
        world: number of ranks the state is divided over.
        shard_params: each rank stores 1/world of every bucket's parameters (ZeRO-3).
        shard_state: each rank stores 1/world of every bucket's optimizer state (ZeRO-1, 2, 3).
        packed: bucket and key of optimizer state that lies in 8 bits an element (``zgraph.packed``).
        away: what lies on lower tiers.
    """

    buckets: tuple[Bucket, ...]
    world: int
    shard_params: bool = False
    shard_state: bool = False
    packed: tuple[tuple[str, str], ...] = ()
    away: tuple[Away, ...] = ()
    _index: dict[str, tuple[Bucket, Segment]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _of_state: dict[str, Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for bucket in self.buckets:
            for segment in bucket.segments:
                self._index[segment.name] = (bucket, segment)

    def find(self, name: str) -> tuple[Bucket, Segment]:
        """The bucket and segment of the parameter called ``name``."""
        return self._index[name]

    @cached_property
    def order(self) -> dict[str, int]:
        """By parameter: in the order of the buckets, and within them."""
        names = (segment.name for bucket in self.buckets for segment in bucket.segments)
        return {name: index for index, name in enumerate(names)}

    @cached_property
    def by_name(self) -> dict[str, Bucket]:
        """Buckets by their names."""
        return {bucket.name: bucket for bucket in self.buckets}

    def undivided(self) -> Layout:
        """The same buckets, before passes divide them or put them on lower tiers."""
        return replace(self, shard_params=False, shard_state=False, away=())

    def of_state(self, key: str) -> Layout:
        """Where optimizer state called ``key`` lies if it is a tensor: as parameters do, but for shapes of its own."""
        if key not in self._of_state:
            buckets = tuple(dict(bucket.states).get(key, bucket) for bucket in self.buckets)
            alike = buckets == self.buckets
            self._of_state[key] = self if alike else Layout(buckets, self.world, self.shard_params, self.shard_state)
        return self._of_state[key]

    def bucket(self, name: str, key: str) -> Bucket:
        """A bucket as it holds what is called ``key``: empty for parameters and gradients, else optimizer state."""
        return self.of_state(key).by_name[name]

    def packs(self, bucket: str, key: str) -> bool:
        """Whether the optimizer state of a bucket called ``key`` lies packed."""
        return (bucket, key) in self.packed

    def on_tiers(self, what: str) -> dict[str, str]:
        """The buckets of which something lies on a lower tier, each with the tier.

        Args:
            what: see ``Away``.
        """
        return {name: each.tier for each in self.away if each.what == what for name in each.buckets}

    def tier_of(self, what: str, bucket: str) -> str | None:
        """The lower tier on which something of a bucket lies; None where it is in memory."""
        return next((each.tier for each in self.away if each.what == what and bucket in each.buckets), None)

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

    Attributes:
        work: of an update that needs the whole parameter: what it costs, in operations; None for an elementwise one.
        states: shapes of optimizer-state tensors by key, where they are not the parameter's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trainable: bool
    group: Hashable = None
    work: int | None = None
    states: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def room(self) -> int:
        """Elements it takes up in a bucket."""
        return aligned(math.prod(self.shape))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def aligned(numel: int) -> int:
    """Elements that a segment of ``numel`` takes up."""
    return _round_up(numel, ALIGN)


def make_buckets(
    params: Iterable[ParamSpec],
    world: int,
    bucket_bytes: int,
    granule: int = ALIGN,
    divide: Callable[[Sequence[ParamSpec]], list[list[int]]] | None = None,
) -> tuple[Bucket, ...]:
    """Divide parameters, given in order of first use, into buckets of about ``bucket_bytes``.

    Parameters of one bucket agree in dtype, device, trainability and ``group``. A bucket closes when the
    next parameter would take it over ``bucket_bytes``; one of whole parameters, see ``zgraph.ownership``. Buckets
    are ordered by their first parameter.

    Args:
        granule: each rank's part has a multiple of so many elements, itself a multiple of ``ALIGN``.
        divide: says, instead of ``bucket_bytes``, which of some parameters that agree share buckets, by their numbers;
            not of whole ones.
    """
    alike: dict[Hashable, list[ParamSpec]] = {}
    position: dict[str, int] = {}
    for param in params:
        position[param.name] = len(position)
        alike.setdefault((param.dtype, str(param.device), param.trainable, param.group), []).append(param)
    filled: list[list[ParamSpec]] = []
    for members in alike.values():
        limit = bucket_bytes // members[0].dtype.itemsize
        is_whole = members[0].work is not None
        dealt_to = world if is_whole else 1
        if divide is not None and not is_whole:
            together = divide(members)
        else:
            together = fill_with_whole([param.room for param in members], limit, dealt_to)
        filled += [[members[index] for index in indices] for indices in together]
    loads = [0] * world  # of each rank, over all buckets
    return tuple(
        _bucket(f"bucket{index}", members, world, granule, loads)
        for index, members in enumerate(sorted(filled, key=lambda members: position[members[0].name]))
    )


def _bucket(name: str, members: Sequence[ParamSpec], world: int, granule: int, loads: list[int]) -> Bucket:
    """A bucket of these parameters; where they are to be whole, ``loads`` is what each rank has to do already."""
    first = members[0]
    parts: list[list[ParamSpec]] = [list(members)]
    if first.work is not None:
        dealt = deal([param.room for param in members], [param.work or 0 for param in members], loads)
        parts = [[p for p, owner in zip(members, dealt, strict=True) if owner == rank] for rank in range(world)]
    segments, numel = _place([[(p.name, p.shape) for p in part] for part in parts], granule * world)
    bucket = Bucket(name, first.dtype, first.device, segments, numel, first.trainable)
    states = []
    for key in sorted({key for param in members for key, _ in param.states}):
        shapes = [[(p.name, dict(p.states).get(key, p.shape)) for p in part] for part in parts]
        of_state, size = _place(shapes, granule * world)
        states.append((key, replace(bucket, segments=of_state, numel=size)))
    owners = tuple(rank for rank, part in enumerate(parts) for _ in part) if first.work is not None else ()
    return replace(bucket, owners=owners, states=tuple(states))


def _place(parts: Sequence[Sequence[tuple[str, tuple[int, ...]]]], multiple: int) -> tuple[tuple[Segment, ...], int]:
    """Tensors one after the other in equal parts of a bucket, and its number of elements.

    Args:
        parts: name and shape of each tensor; one part is the whole bucket, else there is one for each rank.
        multiple: of which the bucket has to be.
    """
    size = max(sum(aligned(math.prod(shape)) for _, shape in part) for part in parts)
    size = _round_up(max(size, 1), multiple // len(parts))
    segments = []
    for index, part in enumerate(parts):
        offset = index * size
        for name, shape in part:
            segments.append(Segment(name, shape, offset))
            offset += aligned(math.prod(shape))
    return tuple(segments), size * len(parts)
