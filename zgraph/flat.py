"""Flat buffers at run time: what one rank stores of every bucket, and how to read and write parameters in it.

``FlatTensors`` holds one value (the parameters, or one kind of optimizer state) for all buckets of a layout, whole on
every rank or divided, in memory or on a lower tier. The collectives here serve rare operations (building, loading and
saving state), so they are plain and synchronous; the training step has its own. Values travel as bytes, so that every
dtype works.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from zgraph.groups import HeldGroup, backends
from zgraph.heap import release_free_memory
from zgraph.layout import Bucket, Layout
from zgraph.tiers import Stored, Tier


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Give every rank the value that rank 0 has, in place; nothing without a group."""
    if group is None:
        return
    carried = tensor.detach().to(_carrier(tensor.device, group)).contiguous()
    dist.broadcast(_bytes(carried), group_src=0, group=group)
    if carried.data_ptr() != tensor.data_ptr():
        tensor.copy_(carried)


def gather(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All ranks' shards, concatenated: a new tensor, unless there is one rank only."""
    if group is None:
        return shard
    carried = shard.detach().to(_carrier(shard.device, group))
    whole = carried.new_empty(dist.get_world_size(group) * shard.numel())
    dist.all_gather_single(_bytes(whole), _bytes(carried), group=group)
    return whole.to(shard.device)


def place(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Let ``tensor``, a leaf, have the memory of ``data``; its identity, class and attributes stay.

    Its gradient is dropped, since it may no longer fit.
    """
    tensor.grad = None
    if tensor.device.type == data.device.type:
        tensor.data = data
    else:
        # ``tensor.data = data`` refuses to cross between meta and real memory, and torch.utils.swap_tensors refuses
        # parameters that have weak references (those of nn.LSTM have) and swaps the attributes too.
        torch._C._swap_tensor_impl(tensor, data.detach().requires_grad_(tensor.requires_grad))


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class FlatTensors:
    """One flat tensor per bucket of a layout.

    Args:
        layout: the buckets.
        sharded: each rank stores 1/world of every bucket; otherwise all of it.
        group: the ranks; None for a single process.
        tensors: flat tensors that exist already, by bucket name.
        num_cached: how many buckets, gathered or read from a lower tier, are kept in memory at most.
        away: the buckets that lie on lower tiers, each with its tier's name. What is written of them has to be followed
            by ``flush``.
        tiers: these, by name.
    """

    group = HeldGroup()

    def __init__(
        self,
        layout: Layout,
        *,
        sharded: bool,
        group: dist.ProcessGroup | None,
        tensors: dict[str, Any] | None = None,
        num_cached: int = 1,
        away: Mapping[str, str] = MappingProxyType({}),
        tiers: Mapping[str, Tier] = MappingProxyType({}),
    ) -> None:
        self.layout, self.group, self.num_cached = layout, group, num_cached
        self.sharded = sharded and layout.world > 1
        self.tensors: dict[str, Any] = {} if tensors is None else tensors
        self._away, self._tiers = away, tiers
        self._opened: OrderedDict[str, torch.Tensor] = OrderedDict()  # of those on a lower tier
        self._changed: set[str] = set()
        self._rank = dist.get_rank(group) if group is not None else 0
        self._gathered: OrderedDict[str, torch.Tensor] = OrderedDict()

    def is_away(self, name: str) -> bool:
        """Whether no memory holds the whole value of a parameter for good: its bucket is divided, or is not there."""
        return self.sharded or self.layout.find(name)[0].name in self._away

    def allocate(self, bucket: Bucket, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's flat tensor for a bucket, in memory; zeros (so the padding is zero) if there was none."""
        if bucket.name in self.tensors:
            return self._in_memory(bucket)
        numel = bucket.numel // self.layout.world if self.sharded else bucket.numel
        flat = torch.zeros(numel, dtype=dtype or bucket.dtype, device=bucket.device)
        if bucket.name not in self._away:
            self.tensors[bucket.name] = flat
            return flat
        self.tensors[bucket.name] = self._tiers[self._away[bucket.name]].allocate(numel, flat.dtype)
        self._changed.add(bucket.name)
        return self._open(bucket, flat)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Store this rank's part of the value of a parameter (or of its state)."""
        bucket, segment = self.layout.find(name)
        flat = self.allocate(bucket)
        self._gathered.pop(bucket.name, None)
        if bucket.name in self._away:
            self._changed.add(bucket.name)
        start = self._rank * flat.numel() if self.sharded else 0
        low, high = max(segment.offset, start), min(segment.offset + segment.numel, start + flat.numel())
        if low < high:
            source = value.reshape(-1)[low - segment.offset : high - segment.offset]
            flat[low - start : high - start].copy_(source)

    def read(self, name: str) -> torch.Tensor:
        """The full value, a view of a bucket; a collective where the bucket is divided and not in the cache.

        Of a bucket that is divided, or on a lower tier, it is there to be read only.
        """
        bucket, segment = self.layout.find(name)
        whole = self._whole(bucket)
        return whole[segment.offset : segment.offset + segment.numel].view(segment.shape)

    def copies(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every full value in memory of its own, bucket by bucket; a collective where buckets are divided."""
        for bucket in self.layout.buckets:
            if bucket.name in self.tensors:
                for segment in bucket.segments:
                    yield segment.name, self.read(segment.name).clone()
        self._gathered.clear()

    def flush(self) -> None:
        """Have on the lower tier what was written of buckets that lie there, and nothing of them in memory.

        Raises:
            ZgraphError: it cannot be written.
        """
        while self._opened:
            self._close()

    def _in_memory(self, bucket: Bucket) -> torch.Tensor:
        """This rank's flat tensor for a bucket; of one on a lower tier, what it is."""
        stored = self.tensors[bucket.name]
        if not isinstance(stored, Stored):
            return stored  # type: ignore[no-any-return]
        if bucket.name in self._opened:
            self._opened.move_to_end(bucket.name)
            return self._opened[bucket.name]
        return self._open(bucket, stored)

    def _open(self, bucket: Bucket, value: torch.Tensor | Stored) -> torch.Tensor:
        """Keep a bucket that lies on a lower tier in memory for a while, instead of others."""
        while len(self._opened) >= self.num_cached:
            self._close()
        self._opened[bucket.name] = value.read() if isinstance(value, Stored) else value
        return self._opened[bucket.name]

    def _close(self) -> None:
        """Of the buckets in memory that lie on a lower tier, have the one there that was used the longest ago."""
        name, value = self._opened.popitem(last=False)
        if name in self._changed:
            self.tensors[name].write(value)
            self._changed.remove(name)
        del value
        release_free_memory()  # or small blocks would come to lie there, and leave no room for the next bucket

    def _whole(self, bucket: Bucket) -> torch.Tensor:
        if not self.sharded:
            return self._in_memory(bucket)
        if bucket.name in self._gathered:
            self._gathered.move_to_end(bucket.name)
        else:
            while len(self._gathered) >= self.num_cached:
                self._gathered.popitem(last=False)
            self._gathered[bucket.name] = gather(self._in_memory(bucket), self.group)
        return self._gathered[bucket.name]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _carrier(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """The device from which a value on ``device`` can be sent: NCCL, for one, takes no CPU tensors."""
    served = backends(group)
    if device.type in served:
        return device
    first = next(iter(served))
    return torch.device(first, torch.get_device_module(first).current_device())
