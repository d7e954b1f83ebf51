"""Compute forward in low precision by the rules of ``torch.autocast``, with modules left out by name.

Autocast casts what an operator reads, operator by operator, so the casts become nodes of the captured graph like all
else: each weight is cast once, where it is first read, and backward reads what forward has cast. Parameters stay as
they are. Two things differ from running the model inside ``torch.autocast``: a module that is left out gets its
arguments in float32, and the passes may cast a rank's slice of a weight before it is gathered, which is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.config import PRECISIONS, Config
from zgraph.errors import OptionError


@contextmanager
def low_precision(model: nn.Module, config: Config, device: torch.device) -> Iterator[None]:
    """Run calls of ``model`` as ``config`` says; nothing of it lasts.

    Args:
        device: where the model's parameters live.

    Raises:
        OptionError: a name is of no module and of no parameter.
    """
    if config.precision is None:
        yield
        return
    kept = {name: _module_of(model, name) for name in config.keep_float32}
    before = {module: vars(module).get("forward") for module in kept.values()}
    try:
        for module in before:
            module.forward = _in_float32(module.forward, device)
        with torch.autocast(device.type, PRECISIONS[config.precision]):
            yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _in_float32(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            args, kwargs = pytree.tree_map_only(torch.Tensor, _widened, (args, kwargs))
            return forward(*args, **kwargs)

    return run


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in PRECISIONS.values() else tensor


def _module_of(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name]
    owner, _, attribute = name.rpartition(".")
    if owner in modules and attribute in modules[owner]._parameters:
        return modules[owner]
    raise OptionError(
        f"keep_float32 names {name!r}, which is no module and no parameter of the model",
        fix="give names as model.named_modules() and model.named_parameters() have them",
    )
