"""Attributes of Python objects: what a trace takes for constants, and what it may change and must put back."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_PLAIN = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device})


def is_plain(value: Any) -> bool:
    """Whether a value is a number, text or the like, or a tuple of these."""
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))


def plain_attributes(owner: object) -> list[tuple[str, str]]:
    """Names and values of the plain attributes of an object, to be compared and shown."""
    return [(name, repr(value)) for name, value in vars(owner).items() if is_plain(value)]


def plain_values_of(function: Any) -> list[tuple[str, str]]:
    """Names and values of the plain values that a function reads, which a trace of it takes for constants.

    Those are its closure's, its defaults, global variables that it names, and attributes of the object that it is a
    method of, or that it is; of modules without parameters among these, such as losses, their attributes. What other
    functions read that it calls is not found.
    """
    if isinstance(function, functools.partial):
        given = [*function.keywords.items(), *((str(i), value) for i, value in enumerate(function.args))]
        return [*_plain_of(given), *plain_values_of(function.func)]
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        return _plain_of([("", owner)])
    code = getattr(function, "__code__", None)
    read: list[tuple[str, Any]] = list(vars(owner).items()) if hasattr(owner, "__dict__") else []
    if code is not None:
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            with contextlib.suppress(ValueError):  # a cell may be empty
                read.append((name, cell.cell_contents))
        read += [(name, function.__globals__[name]) for name in code.co_names if name in function.__globals__]
        read += [(f"default {i}", value) for i, value in enumerate(function.__defaults__ or ())]
    return _plain_of(read)


def _plain_of(values: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Those that are plain, and the attributes of modules that have no parameters."""
    found = []
    for name, value in values:
        if is_plain(value):
            found.append((name, repr(value)))
        elif isinstance(value, nn.Module) and (not name or next(value.parameters(), None) is None):
            for path, module in value.named_modules():
                prefix = ".".join(filter(None, (name, path)))
                found += [(f"{prefix}.{own}".lstrip("."), text) for own, text in plain_attributes(module)]
    return found


def contents(value: Any) -> Any:
    """What to keep of a value that may be changed in place: a copy of a container, else the value itself."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same object, equal plain values, or containers of the same objects."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(value[key] is other[key] for key in value)
    if isinstance(value, (list, set)) and isinstance(other, (list, set)):
        return list(map(id, value)) == list(map(id, other))
    return value is other or (is_plain(value) and repr(value) == repr(other))


class ModuleAttributes:
    """What the modules of a model hold, registered or not, to be compared with later and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (f"{path}." if path else "", module, {name: (v, contents(v)) for name, v in vars(module).items()})
            for path, module in model.named_modules()
        ]

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """What is no longer the same by name, before and now; None for what was not or is not there.

        Private attributes of torch's own modules are left out, such as the list of weights in ``nn.LSTM``.
        """
        found = {}
        for prefix, module, before in self._before:
            is_torchs = type(module).__module__.startswith("torch.")
            for name in before.keys() | vars(module).keys():
                then, now = before.get(name, (None, None))[1], vars(module).get(name)
                pairs = {name: (then, now)}
                if name in ("_parameters", "_buffers", "_modules"):
                    pairs = {key: (then.get(key), now.get(key)) for key in then.keys() | now.keys()}
                elif is_torchs and name.startswith("_"):
                    continue
                found.update({prefix + key: pair for key, pair in pairs.items() if not is_same(*pair)})
        return dict(sorted(found.items()))

    def restore(self) -> None:
        for _, module, before in self._before:
            for value, kept in before.values():
                if not is_same(value, kept):
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(kept)
            vars(module).clear()
            vars(module).update({name: value for name, (value, _) in before.items()})
