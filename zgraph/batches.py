"""What a training step is given: calls of the model, one for each micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zgraph.errors import ZgraphError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the model."""

FORMS = "a tuple of arguments, such as (x,), a dictionary of keyword arguments, or a pair of these"


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one step, for ``train_step`` of a model that was compiled with ``accumulate``.

    Attributes:
        batches: each is what the model is called with: a tuple or list of positional arguments, a dictionary of keyword
            arguments, or a pair of such a tuple and dictionary. They may differ in shape.
    """

    batches: Sequence[Any]

    def __post_init__(self) -> None:
        given: Any = self.batches
        if not isinstance(given, Iterable) or isinstance(given, (str, torch.Tensor, Mapping)):
            raise ZgraphError(
                f"MicroBatches was given a {type(given).__name__}", fix="give a list with a batch for each"
            )
        object.__setattr__(self, "batches", tuple(given))


def micro_batches(args: tuple[Any, ...], kwargs: dict[str, Any], num: int) -> list[Call]:
    """The calls of the model that a step makes.

    Args:
        args, kwargs: of ``train_step``: a ``MicroBatches``, or a batch to be divided.
        num: how many micro-batches a step has.

    Raises:
        ZgraphError: there are more or fewer, or the batch does not divide, or none of its tensors has a row.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], MicroBatches):
        batches = args[0].batches
        if len(batches) != num:
            raise ZgraphError(
                f"train_step was given {len(batches)} micro-batches, but accumulate={num}",
                fix=f"give {num} of them, or compile with accumulate={len(batches)}",
            )
        calls = [call_of(batch, f"micro-batch {i}") for i, batch in enumerate(batches)]
        for i, call in enumerate(calls):
            _check_rows(call, f"micro-batch {i}")
        return calls
    _check_rows((args, kwargs), "the batch")
    fix = (
        f"give a batch of as many rows as accumulate={num} divides, or train_step a zgraph.MicroBatches, which says "
        "what belongs to each micro-batch"
    )
    return divided(args, kwargs, num, "micro-batches", fix)


def _check_rows(call: Call, whose: str) -> None:
    lengths = [_length(tensor) for tensor in tensors_of(call) if tensor.dim()]
    if lengths and all(length == 0 for length in lengths):
        raise ZgraphError(
            f"{whose} has no rows", fix="leave it out, on all ranks: of no rows a mean is not a number, and a sum is 0"
        )


def divided(
    args: tuple[Any, ...], kwargs: dict[str, Any], num: int, parts: str, fix: str, kind: type[ZgraphError] = ZgraphError
) -> list[Call]:
    """Parts of a batch along the first dimension of its tensors, which must all be as long.

    Args:
        args, kwargs: the batch.
        num: how many parts.
        parts: what they are, in the plural.
        fix: what to do where it does not divide.
        kind: of the error that is raised there.
    """
    if num == 1:
        return [(args, kwargs)]
    leaves, spec = pytree.tree_flatten_with_path((args, kwargs))
    lengths = {name_of(path): _length(leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    for name, length in lengths.items():
        if length is None or length % num:
            what = "is a single number, or sparse" if length is None else f"has {length} rows"
            raise kind(f"the batch cannot be divided into {num} {parts}: {name} {what}", fix=fix)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length} rows" for name, length in lengths.items())
        raise kind(f"the batch cannot be divided into {num} {parts}: {told}", fix=fix)
    chunks = [leaf.chunk(num) if isinstance(leaf, torch.Tensor) else [leaf] * num for _, leaf in leaves]
    return [pytree.tree_unflatten([chunk[i] for chunk in chunks], spec) for i in range(num)]


def _length(tensor: torch.Tensor) -> int | None:
    return tensor.shape[0] if tensor.dim() and tensor.layout is torch.strided else None


def call_of(batch: Any, whose: str) -> Call:
    """Positional and keyword arguments of a batch.

    Raises:
        ZgraphError: it is of another kind; ``whose`` is named.
    """
    if isinstance(batch, tuple) and len(batch) == 2:
        args, kwargs = batch
        if isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise ZgraphError(f"{whose} is a {type(batch).__name__}", fix=f"give {FORMS}")


def name_of(path: pytree.KeyPath) -> str:
    """``args[0]`` or ``kwargs['x']``."""
    first, *rest = path
    assert isinstance(first, pytree.SequenceKey)
    return ("args", "kwargs")[first.idx] + pytree.keystr(tuple(rest))


def common_rows(tensors: Iterable[torch.Tensor]) -> int:
    """The first dimension that all tensors of a batch have; 1 if they have none in common."""
    lengths = {_length(tensor) for tensor in tensors}
    return (lengths.pop() or 1) if len(lengths) == 1 else 1


def with_tensors_on(device: torch.device | str | None, call: Call) -> Call:
    """The same call as far as capture looks at it: with tensors of the same form, and no values."""

    def form(tensor: torch.Tensor) -> torch.Tensor:
        size, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
        return torch.empty_strided(size, stride, dtype=dtype, device=device, requires_grad=tensor.requires_grad)

    made: Call = pytree.tree_map_only(torch.Tensor, form, call)
    return made


def tensors_of(call: Call) -> list[torch.Tensor]:
    """The tensors of a call, in flattening order."""
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
