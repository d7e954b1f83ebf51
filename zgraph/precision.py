"""Compute forward in low precision by the rules of ``torch.autocast``, with modules left out by name.

Autocast casts what an operator reads, operator by operator, so the casts become nodes of the captured graph like all
else: a weight is cast for each operator that reads it, and backward reads what forward has cast. Parameters stay as
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
        OptionError: a name is of no module and of no parameter, of the model itself, or of what forward does not call.
    """
    if config.precision is None:
        yield
        return
    kept = {module: name for name in config.keep_float32 for module in _modules_of(model, name)}
    before = {module: vars(module).get("forward") for module in kept}
    called: set[nn.Module] = set()
    try:
        for module in kept:
            module.forward = _in_float32(module, device, called)
        with torch.autocast(device.type, PRECISIONS[config.precision]):
            yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    for module, name in kept.items():
        if module not in called:
            raise OptionError(
                f"keep_float32 names {name!r}, but forward does not call that module: what it holds is read elsewhere",
                fix="name the module whose forward reads it, or leave it out",
            )


def _in_float32(module: nn.Module, device: torch.device, called: set[nn.Module]) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        called.add(module)
        with torch.autocast(device.type, enabled=False):
            args, kwargs = pytree.tree_map_only(torch.Tensor, _widened, (args, kwargs))
            return forward(*args, **kwargs)

    return run


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in PRECISIONS.values() else tensor


def _modules_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a name means; of a container, which has no forward, what it contains."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    owner, _, attribute = name.rpartition(".")
    if name not in modules and not (owner in modules and attribute in modules[owner]._parameters):
        raise OptionError(
            f"keep_float32 names {name!r}, which is no module and no parameter of the model",
            fix="give names as model.named_modules() and model.named_parameters() have them",
        )
    module = modules[name] if name in modules else modules[owner]
    if module is model:
        raise OptionError(
            f"keep_float32 names {name!r}, which would keep the whole model in float32",
            fix="put what is to stay into a module of its own, or leave precision out",
        )
    return _with_forward(module)


def _with_forward(module: nn.Module) -> list[nn.Module]:
    if type(module).forward is not nn.Module.forward:
        return [module]
    return [inner for child in module.children() for inner in _with_forward(child)]
