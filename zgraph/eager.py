"""Run plain PyTorch code while the memory of a model's parameters is elsewhere.

Under ZeRO-3 the user's ``nn.Parameter`` objects have a shape but no memory. ``GatherOnUse`` makes ``model(x)`` work
all the same: a function that is given such a parameter gets its gathered value instead, bucket by bucket. Gathering is
a collective, so all ranks must run the same code on inputs of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from zgraph.errors import StateError

if TYPE_CHECKING:
    from zgraph.state import TrainingState

Function = Callable[..., Any]


def getter(name: str) -> Function:
    """What a torch function mode sees when ``tensor.name`` is read."""
    return getattr(torch.Tensor, name).__get__  # type: ignore[no-any-return]


_METADATA: frozenset[Function] = frozenset(
    {
        *map(getter, ("shape", "dtype", "ndim", "requires_grad", "grad", "is_leaf")),
        torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.stride,
        torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.__len__,
        torch.Tensor.requires_grad_, torch.numel, torch.is_floating_point, torch.is_complex,
    }
)  # fmt: skip
"""Functions that use no values: they are given the tensor itself."""


class OnTouch(TorchFunctionMode):
    """While active, every tensor whose values a torch function may use passes through ``touch`` first."""

    def touch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor to use in place of ``tensor``."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            return func(*args, **(kwargs or {}))
        return func(*_map(self.touch, args), **_map(self.touch, kwargs or {}))


class GatherOnUse(OnTouch):
    """While active, sharded parameters of a model read as if they were whole.

    The buckets used last are kept, two at most, so that memory stays small and a layer that alternates between a
    weight and a bias of different buckets does not gather again. Parameters can be read only: what is written to a
    gathered value would be lost.
    """

    def __init__(self, state: TrainingState) -> None:
        super().__init__()
        layout = state.layout
        assert layout is not None, "GatherOnUse before commit"
        self._params = state.stored_params(num_cached=2)
        self._names = {id(p): name for name, p in state.model.named_parameters() if self._params.is_away(name)}

    def touch(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names.get(id(tensor))
        return tensor if name is None else self._params.read(name)

    def __torch_function__(
        self, func: Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        name = self._names.get(id(first))
        if name is not None and func == getter("device"):
            return self._params.layout.find(name)[0].device
        if name is not None and getattr(func, "__name__", "") == "__set__":  # such as param.grad = None
            return func(*args, **kwargs)
        written = self._names.get(id(kwargs.get("out"))) or (name if _writes(func) else None)
        if written is not None and func not in _METADATA:
            raise StateError(
                f"{func.__name__} would write to parameter {written!r}, which "
                + ("is divided over the ranks" if self._params.sharded else "lies on a lower tier"),
                fix="change parameters through model.load_state_dict(), or before zgraph.compile",
            )
        return super().__torch_function__(func, types, args, kwargs)


def _writes(func: Function) -> bool:
    """Whether a function writes to its first argument, by torch's naming: ``add_``, ``__iadd__``, ``__setitem__``."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and hasattr(torch.Tensor, f"{name[3:-2]}_"))
    return name.endswith("_")


def _map(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Apply to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_map(function, item) for item in tree)
    if type(tree) is dict:
        return {key: _map(function, item) for key, item in tree.items()}
    return tree
