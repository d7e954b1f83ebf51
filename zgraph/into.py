"""How a call stores its result in memory that it is given, bit for bit what it would have allocated.

    v3 = mm(v1, v2)            ->    v3 = mm_out(v1, v2, out=a0)
    v4 = clone(v3)             ->    v4 = copy(v3, out=a1)

Torch generates an ``out`` overload for every operator that has none of its own, which computes a result as ever and
then copies it (torchgen, tag ``generated``): no such overload is used. What copies, fills or looks up rows is written
here with operators that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.liveness import shares_memory

aten = torch.ops.aten


@dataclass(frozen=True)
class Into:
    """A call that stores its result where it is told to.

    Attributes:
        target: what is called.
        out: the keyword for the memory: a tensor of the result's shape, strides and dtype.
        args, kwargs: the others, of which some are nodes.
    """

    target: Callable[..., torch.Tensor]
    out: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def into(node: fx.Node) -> Into | None:
    """The call that stores what ``node`` computes in memory it is given; None if there is none."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, torch.Tensor) or not _is_plain(val):
        return None
    if not all(_is_plain(each) for source in node.all_input_nodes for each in _tensors(source)):
        return None
    if node.target in (ops.all_gather, ops.reduce_scatter, ops.load):
        return Into(node.target, "out", node.args)
    if not isinstance(node.target, torch._ops.OpOverload) or shares_memory(node):
        return None
    if ops.draws(node) or node.target._schema.is_mutable:
        return None
    own = _OWN.get(node.target)
    if own is not None:
        return own(node)
    found = out_overload(node.target)
    return None if found is None else Into(*found, node.args, node.kwargs)


_RESIZING = frozenset(
    {
        aten.binary_cross_entropy.default, aten.huber_loss.default, aten.mse_loss.default,
        aten.smooth_l1_loss.default, aten.soft_margin_loss.default,
    }
)  # fmt: skip
"""Operators that keep every element's loss in ``out`` before they reduce it to a number."""


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    val = node.meta["val"]
    return [each for each in (val if isinstance(val, (tuple, list)) else (val,)) if isinstance(each, torch.Tensor)]


def _is_plain(val: torch.Tensor) -> bool:
    """Whether a tensor is nothing but elements in memory of a CPU or of a GPU; complex ones may be conjugates."""
    is_known = val.device.type in ("cpu", "cuda") and val.layout is torch.strided
    return is_known and not val.is_complex() and not val.is_quantized


@cache
def out_overload(target: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, str] | None:
    """The overload that stores an operator's only result in an argument of its own kernel, all else equal.

    Returns:
        The overload and the name of that argument; None if there is none.
    """
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    if target in _RESIZING:
        return None
    for name in target.overloadpacket.overloads():
        overload: torch._ops.OpOverload = getattr(target.overloadpacket, name)
        given = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        if len(outs) == len(target._schema.returns) == 1 and given == wanted and _has_kernel(overload):
            return overload, outs[0]
    return None


def _has_kernel(overload: torch._ops.OpOverload) -> bool:
    """Whether an overload computes straight into its argument, and is neither generated nor made of others."""
    if torch.Tag.generated in overload.tags:
        return False
    name = f"{overload._schema.name}.{overload._schema.overload_name}"
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        for key in ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    )


# What has no kernel of its own


def copy(source: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Copy the elements of ``source``, in their order and in the dtype of ``out``, which may have another shape."""
    out.view(source.shape).copy_(source)
    return out


def fill(value: float, *, out: torch.Tensor) -> torch.Tensor:
    """Give all elements one value."""
    return out.fill_(value)


def embedding(weight: torch.Tensor, indices: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Rows of a table, as ``aten::embedding`` looks them up (ATen/native/Embedding.cpp)."""
    torch.index_select(weight, 0, indices.reshape(-1), out=out.view(-1, weight.shape[1]))
    return out


def embedding_gradient(gradient: torch.Tensor, indices: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """The sum of what came to each row of a table, added up in the order of ``aten::embedding_dense_backward``."""
    return out.zero_().index_add_(0, indices.reshape(-1), gradient.reshape(-1, out.shape[1]))


def _copied(node: fx.Node) -> Into:
    return Into(copy, "out", node.args[:1])


def _viewed(node: fx.Node) -> Into | None:
    """A reshape that has to copy; its result has no gaps, so it can be viewed in the shape of what is copied."""
    return Into(copy, "out", node.args[:1]) if node.meta["val"].is_contiguous() else None


def _filled(value: float) -> Callable[[fx.Node], Into]:
    return lambda _: Into(fill, "out", (value,))


def _filled_with(index: int) -> Callable[[fx.Node], Into]:
    return lambda node: Into(fill, "out", (node.args[index],))


def _looked_up(node: fx.Node) -> Into | None:
    table = node.args[0]
    assert isinstance(table, fx.Node)
    is_whole = node.meta["val"].is_contiguous() and len(table.meta["val"].shape) == 2
    return Into(embedding, "out", node.args[:2]) if is_whole else None


def _added_up(node: fx.Node) -> Into | None:
    *_, padding, scales = node.args
    gradient = node.args[0]
    assert isinstance(gradient, fx.Node)
    same = gradient.meta["val"].dtype == node.meta["val"].dtype
    is_plain = padding == -1 and scales is False and same and node.meta["val"].numel() > 0
    return Into(embedding_gradient, "out", node.args[:2]) if is_plain else None


_OWN: dict[Any, Callable[[fx.Node], Into | None]] = {
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten.contiguous.default: _copied,
    aten.reshape.default: _viewed,
    aten.full.default: _filled_with(1),
    aten.full_like.default: _filled_with(1),
    aten.new_full.default: _filled_with(2),
    aten.zeros.default: _filled(0),
    aten.zeros_like.default: _filled(0),
    aten.new_zeros.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.ones_like.default: _filled(1),
    aten.embedding.default: _looked_up,
    aten.embedding_dense_backward.default: _added_up,
}
"""Operators that are written here, ``out`` being what is given."""


ON_GPU = frozenset(
    {
        aten._to_copy.default, aten.add.Tensor, aten.addmm.default, aten.baddbmm.default, aten.bmm.default,
        aten.cat.default, aten.clone.default, aten.contiguous.default, aten.full.default, aten.full_like.default,
        aten.mm.default, aten.mul.Tensor, aten.new_full.default, aten.new_zeros.default, aten.reshape.default,
        aten.sum.dim_IntList, aten.zeros.default, aten.zeros_like.default,
    }
)  # fmt: skip
"""Operators that a GPU computes alike wherever results are stored, if aligned: those that gradients are made by. Sums
of an embedding's rows are not among them: ``index_add`` adds up there in no order of its own."""


def can_be_told(target: Any) -> bool:
    """Whether an operator can be told where to store its result, as far as its name says."""
    return target in _OWN or (isinstance(target, torch._ops.OpOverload) and out_overload(target) is not None)
