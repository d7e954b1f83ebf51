"""Models of many equal blocks: find them, and capture few of them in place of all.

``shorten`` gives the model with four of its blocks, and its optimizer; ``zgraph.repetition`` makes of its captured step
that of the whole.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zgraph.attributes import contents, is_plain, is_same
from zgraph.errors import CaptureError, first_line
from zgraph.repetition import KEPT, Arrangement, Numbering


def find_blocks(model: nn.Module) -> list[tuple[str, int]]:
    """Lists of equal blocks, outermost ones: path and number of each.

    Of five and more, the first and the last may differ from those between. Blocks are equal if they are of the same
    classes all the way down, with parameters and buffers of the same shapes, dtypes and ``requires_grad``, and hold the
    same values otherwise, but for whole numbers that count blocks, as ``layer_idx`` does. What they compute is not
    looked at; ``repeat_blocks`` does that.
    """
    found: list[tuple[str, int]] = []

    def visit(path: str, module: nn.Module) -> None:
        members = list(module.children())
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(members) > 1 and _are_equal(members):
            found.append((path, len(members)))
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return found


def _are_equal(blocks: Sequence[nn.Module]) -> bool:
    traits = [_traits(block) for block in (blocks if len(blocks) <= KEPT else blocks[1:-1])]
    first = traits[0]
    return all(own.keys() == first.keys() for own in traits) and all(
        _is_constant_or_counts([own[key] for own in traits]) for key in first
    )


def _is_constant_or_counts(values: list[Any]) -> bool:
    if all(_is_equal(value, values[0]) for value in values[1:]):
        return True
    counts = all(type(value) is int for value in values)
    return counts and all(value - values[0] == i for i, value in enumerate(values))


def _is_equal(value: Any, other: Any) -> bool:
    if isinstance(value, (list, tuple)) and type(value) is type(other):
        return len(value) == len(other) and all(map(_is_equal, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return list(value) == list(other) and all(_is_equal(value[key], other[key]) for key in value)
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (value.shape, value.dtype, value.device) == (other.shape, other.dtype, other.device)
        return value is other or (alike and not value.is_meta and torch.equal(value, other))
    return type(value) is type(other) and (is_same(value, other) or (is_plain(value) and value == other))


_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _traits(block: nn.Module) -> dict[str, Any]:
    """Everything about a block that its computation may depend on, by path."""
    traits: dict[str, Any] = {}
    for path, module in block.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        traits[f"{at}class"] = type(module)
        traits[f"{at}training"] = module.training
        for name in ("_parameters", "_buffers"):
            for key, tensor in vars(module)[name].items():
                traits[f"{at}{key} in {name}"] = None if tensor is None else _kind_of(tensor)
        traits[f"{at}kept"] = sorted(module._non_persistent_buffers_set)
        traits[f"{at}modules"] = [(name, child is None) for name, child in vars(module)["_modules"].items()]
        for name, value in vars(module).items():
            if name not in _OWN:
                traits[f"{at}{name}"] = value
            elif name.endswith("_hooks"):
                traits[f"{at}{name}"] = list(value.values())
    return traits


def _kind_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


@dataclass(frozen=True)
class Short:
    """A model with few of its blocks.

    Attributes:
        model: on meta, a copy.
        path: of the list of blocks.
        num_layers: how many blocks the whole model has.
        kept: numbers of the blocks that are left, as the whole model has them.
    """

    model: nn.Module
    path: str
    num_layers: int
    kept: tuple[int, ...]
    _parameters: dict[int, nn.Parameter] = field(repr=False)

    def optimizer(self, whole: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the short model: groups, hyperparameters and order as the whole one's; without state.

        Args:
            whole: the optimizer of the whole model.
            model: the whole model.

        Raises:
            CaptureError: a block that is left out has its parameters in other groups, or in another order.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        short_names = {id(p): name for name, p in self.model.named_parameters()}
        numbering, plan = Numbering(self.path), Arrangement(len(self.kept), self.num_layers)
        groups = []
        for index, group in enumerate(whole.param_groups):
            members = [self._parameters[id(p)] for p in group["params"] if id(p) in self._parameters]
            kept = [short_names[id(p)] for p in members]

            def keep(name: str) -> str:
                block = numbering.block(name)
                return name if block is None else numbering.renamed(name, plan.renumbered(block))

            def make(counterparts: tuple[str, ...], block: int) -> str:
                return numbering.renamed(counterparts[0], block)

            labels = [numbering.block(name) for name in kept]
            expected = plan.repeated(kept, labels, f"in group {index} of the optimizer,", make, keep)
            held = [names.get(id(p), "a parameter that is not the model's") for p in group["params"]]
            for found, name in zip([*held, None], [*expected, None], strict=False):
                if found != name:
                    raise CaptureError(
                        f"group {index} of the optimizer has {found or 'nothing'} where other blocks of {self.path} "
                        f"would have {name or 'nothing'}",
                        fix="capture the whole model instead",
                    )
            groups.append({**group, "params": members})
        short = type(whole).__new__(type(whole))  # copy.copy would leave out what subclasses add
        for attribute, value in vars(whole).items():
            setattr(short, attribute, contents(value))
        short.state, short.param_groups = defaultdict(dict), groups
        return short


def shorten(model: nn.Module, path: str, num_kept: int = KEPT) -> Short:
    """A copy of a model on meta, with few of its equal blocks; the model itself is left alone.

    The first and the last block are kept. Of those between, one is the second, and one is as far from it as can be
    where the number is of the other parity, so that what depends on it shows.

    Args:
        model: whole, on any device.
        path: of the list of blocks, see ``find_blocks``.
        num_kept: how many blocks to keep, at least 4.

    Raises:
        CaptureError: there are no more blocks than that, or something that the model holds cannot be copied.
    """
    members = list(model.get_submodule(path).children())
    if not KEPT <= num_kept < len(members):
        raise CaptureError(
            f"{path} has {len(members)} blocks, of which {num_kept} are to be kept", fix="capture the whole model"
        )
    last = len(members) - 1
    far = last - 1 if num_kept > KEPT or last % 2 else last - 2
    kept = (0, *range(1, num_kept - 2), far, last)
    parameters = {id(p): nn.Parameter(_on_meta(p), p.requires_grad) for p in model.parameters()}
    memo: dict[int, Any] = {**parameters, **{id(buffer): _on_meta(buffer) for buffer in model.buffers()}}
    memo.update({id(block): nn.Module() for i, block in enumerate(members) if i not in kept})
    try:
        short = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {type(error).__name__}: {first_line(error)}", fix="capture the whole model"
        ) from error
    container = short.get_submodule(path)
    left = [block for i, block in enumerate(container.children()) if i in kept]
    container._modules.clear()
    container._modules.update({str(i): block for i, block in enumerate(left)})
    there = set(map(id, short.parameters()))
    return Short(short, path, len(members), kept, {own: p for own, p in parameters.items() if id(p) in there})


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
