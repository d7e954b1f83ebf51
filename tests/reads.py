"""Ways in which a random program reads a tensor, one call after the other, each a word in a recipe.

Between them they have what a verifier may get wrong: strides and memory that is read by its place, broadcasts between
ranks, promotion of 0-dim operands of other dtypes, steps, sizes of zero, several results, indices that are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

Call = Callable[..., fx.Node]
"""Makes a call: an operator and its arguments."""

Read = Callable[[Call, fx.Node, torch.Tensor], fx.Node]
"""Given how to call, a node and its value, what is read of it."""


def follow(call: Call, node: fx.Node, reads: Sequence[str]) -> fx.Node:
    """What a chain of reads makes of a floating-point tensor, as float64; those that do not fit it are left out."""
    for name in reads:
        min_dim, max_dim, read = READS[name]
        val = node.meta["val"]
        if min_dim <= val.dim() <= max_dim and (val.numel() or min_dim == 0):
            node = read(call, node, val)
    return node if node.meta["val"].dtype is torch.float64 else call(aten._to_copy.default, node, dtype=torch.float64)


def _turned(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.permute.default, x, list(range(val.dim()))[::-1])


def _contiguous(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.clone.default, x, memory_format=torch.contiguous_format)


def _flat(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.view.default, _contiguous(call, x, val), [val.numel()])


def _by_place(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    """Every second element of the memory that a copy has, which lies as the original does."""
    return call(aten.as_strided.default, call(aten.sin.default, x), [val.numel() // 2], [2], 0)


def _from_within(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.as_strided.default, call(aten.neg.default, x), [val.numel() - 1], [1], 1)


def _steps(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.slice.Tensor, x, val.dim() - 1, 0, val.shape[-1], 2)


def _rest(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.slice.Tensor, x, 0, 1, val.shape[0])


def _nothing(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.slice.Tensor, x, 0, 0, 0)


def _last(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.select.int, x, 0, -1)


def _twice(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.cat.default, [x, call(aten.sin.default, x)])


def _after_nothing(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.cat.default, [_nothing(call, x, val), x], -1)


def _stacked(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.stack.default, [x, call(aten.cos.default, x)], val.dim())


def _wide(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.expand.default, call(aten.unsqueeze.default, x, 0), [2, *val.shape])


def _less_mean(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.sub.Tensor, x, call(aten.mean.dim, x, [-1], True))


def _with_sum_of_rows(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.add.Tensor, x, call(aten.sum.dim_IntList, x, [0]))


def _outer(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.mul.Tensor, call(aten.unsqueeze.default, x, -1), x)


def _times_own_sum(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    """A float32 tensor beside a float64 number, which counts only if the tensor is 0-dim itself."""
    low = call(aten._to_copy.default, x, dtype=torch.float32)
    return call(aten.mul.Tensor, low, call(aten._to_copy.default, call(aten.sum.default, x), dtype=torch.float64))


def _whole(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    """Integers beside a number of a floating-point type."""
    signs = call(aten._to_copy.default, call(aten.gt.Scalar, x, 0), dtype=torch.int64)
    return call(aten.add.Tensor, signs, call(aten.scalar_tensor.default, 0.3, dtype=torch.float32))


def _rounded(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten._to_copy.default, x, dtype=torch.bfloat16)


def _where(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    limit = call(aten.scalar_tensor.default, 0.1, dtype=torch.float32)
    return call(aten.where.self, call(aten.ge.Tensor, x, limit), x, limit)


def _ordered(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.gather.default, x, 0, call(aten.argsort.default, x, 0))


def _order(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    """A vector of indices into the first dimension."""
    return call(aten.argsort.default, call(aten.sum.dim_IntList, x, list(range(1, val.dim()))) if val.dim() > 1 else x)


def _picked(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.index.Tensor, x, [_order(call, x, val)])


def _added(call: Call, x: fx.Node, val: torch.Tensor) -> fx.Node:
    return call(aten.index_add.default, x, 0, _order(call, x, val), x)


def _written(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    source = call(aten.cos.default, call(aten.slice.Tensor, x, 0, 0, 1))
    return call(aten.slice_scatter.default, x, source, 0, 0, 1)


def _part(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    parts = call(aten.split.Tensor, x, 2)
    return call(operator.getitem, parts, len(parts.meta["val"]) - 1)


def _largest(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(operator.getitem, call(aten.max.dim, x, -1), 0)


def _product(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    return call(aten.mm.default, x, call(aten.t.default, x))


def _masked(call: Call, x: fx.Node, _: torch.Tensor) -> fx.Node:
    """Masks are drawn in the order in which memory lies."""
    return call(aten.mul.Tensor, x, call(aten.bernoulli.p, x, 0.5))


def _plain(target: Any, *args: Any) -> Read:
    return lambda call, x, _: call(target, x, *args)


ANY = 9

READS: dict[str, tuple[int, int, Read]] = {
    "turned": (0, ANY, _turned),
    "contiguous": (0, ANY, _contiguous),
    "flat": (0, ANY, _flat),
    "by place": (1, ANY, _by_place),
    "from within": (1, ANY, _from_within),
    "steps": (1, ANY, _steps),
    "rest": (1, ANY, _rest),
    "nothing": (1, ANY, _nothing),
    "last": (1, ANY, _last),
    "twice": (1, ANY, _twice),
    "after nothing": (1, 1, _after_nothing),
    "stacked": (0, ANY, _stacked),
    "wide": (0, 3, _wide),
    "less mean": (1, ANY, _less_mean),
    "with sum of rows": (1, ANY, _with_sum_of_rows),
    "outer": (1, 1, _outer),
    "times own sum": (0, ANY, _times_own_sum),
    "whole": (0, ANY, _whole),
    "rounded": (0, ANY, _rounded),
    "where": (0, ANY, _where),
    "ordered": (1, ANY, _ordered),
    "picked": (1, ANY, _picked),
    "added": (1, ANY, _added),
    "written": (1, ANY, _written),
    "part": (1, ANY, _part),
    "largest": (1, ANY, _largest),
    "product": (2, 2, _product),
    "masked": (0, ANY, _masked),
    "softmax": (1, ANY, _plain(aten._softmax.default, -1, False)),
    "running sum": (1, ANY, _plain(aten.cumsum.default, 0)),
    "padded": (1, ANY, _plain(aten.constant_pad_nd.default, [1, 2])),
    "rolled": (1, ANY, _plain(aten.roll.default, [1], [0])),
}
"""By name: the fewest and the most dimensions of what can be read so, and how."""
