"""What a module's own ``load_state_dict`` would copy, and what waits to be copied until there is memory for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zgraph.eager import getter
from zgraph.errors import StateError


@dataclass
class Waiting:
    """What was given to ``load_state_dict`` before the first step.

    Attributes:
        original: the module's own method.
        values, strict: as they were given.
        targets: parameters and buffers on meta that it gives values.
    """

    original: Callable[..., Any]
    values: Mapping[str, Any]
    strict: bool
    targets: tuple[torch.Tensor, ...]
    _versions: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._versions = _times_written(self.values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        """A copy of a model has copies of the values, which nobody has written to."""
        given = (self.original, self.values, self.strict, self.targets)
        return Waiting(*copy.deepcopy(given, memo))

    def check(self) -> None:
        """Raises: StateError: a value is another one now."""
        for name, version in _times_written(self.values).items():
            if version != self._versions[name]:
                raise StateError(
                    f"{name} of what load_state_dict was given has been written to before the first step loads it",
                    fix="leave it as it is until then, or load it again",
                )


def _times_written(values: Mapping[str, Any]) -> dict[str, int]:
    """How often each tensor has been written to."""
    tensors = ((name, value) for name, value in values.items() if isinstance(value, torch.Tensor))
    return {name: value._version for name, value in tensors if not value.is_inference()}


def copies_of(
    model: nn.Module, original: Callable[..., Any], state_dict: Mapping[str, Any], strict: bool
) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What a module's own ``load_state_dict``, ``original``, returns, and what it would copy, each with where to."""
    deferred = _DeferredCopies([*model.parameters(), *model.buffers()])
    with torch.no_grad(), _copying_not_swapping(), deferred:
        return original(state_dict, strict=strict), deferred.copies


@contextmanager
def _copying_not_swapping() -> Iterator[None]:
    """``load_state_dict`` copies to parameters, whatever the user chose for plain modules."""
    chosen = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(chosen)


class _DeferredCopies(TorchFunctionMode):
    """While active, copies to the given tensors are noted instead of made."""

    def __init__(self, targets: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._targets = {id(target) for target in targets}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if args and id(args[0]) in self._targets:
            if func == getter("is_meta"):
                return False  # or torch warns that copying to it has no effect
            if func == torch.Tensor.copy_:
                target, value = args
                if value.is_meta:
                    raise NotImplementedError("it is on meta, which has no values")  # torch adds which one it is
                self.copies.append((target, value))
                return target
        return func(*args, **(kwargs or {}))
