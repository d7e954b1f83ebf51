"""Everything that a captured step is specialised on, in words: when one of these facts changes, it is captured again.

They are asked for in every step. So words are made only when something has changed, which a fingerprint of the model,
the optimizer and the batch tells: cheap to take and to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.attributes import plain_attributes, plain_values_of
from zgraph.batches import Call, name_of
from zgraph.errors import CaptureError
from zgraph.layout import Layout
from zgraph.optimizer_state import Forms
from zgraph.program import Guard, Input, in_words
from zgraph.update import StateEntry, StateSpec, structure, unnamed

STEP_COUNTS = "the optimizer's step counts"
"""The one fact that ranks must agree on although a captured step does not depend on it."""

ATTRIBUTES = "what modules, the optimizer and functions have as attributes"
"""Only what differs from the first capture: ranks may have different attributes, but must change them together."""

ARGUMENTS = "the arguments' shapes and values"

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TOLD_ELSEWHERE = frozenset({"training", "_opt_called"})  # by a fact of its own; by learning-rate schedulers


class HasForms(Protocol):
    """Whoever stores a model's optimizer state."""

    layout: Layout | None

    def state_forms(self) -> Forms:
        """By parameter name: what exists, stored or still in the user's optimizer."""

    def stored_forms(self) -> Forms:
        """By bucket name: what is stored."""


class Facts:
    """Reads the facts of one model and its optimizer.

    Args:
        functions: of the user's that are part of the step: loss, weight, metrics, by name.

    Attributes:
        key: the facts read last, in one string, without step counts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: HasForms,
        functions: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        self.key = ""
        self._functions = functions
        self._model, self._optimizer, self._state = model, optimizer, state
        self._fingerprint: Any = None
        self._words: dict[str, str] = {}
        self._met: list[Any] = []
        self._num_met = 0
        self._at_first: dict[str, str] | None = None

    def begin(self) -> None:
        """A step begins, of which ``forget_last`` forgets all that is read."""
        self._num_met = len(self._met)

    def read(self, call: Call) -> dict[str, str]:
        """The facts as they are now, by name, for a step that is given these arguments.

        Raises:
            CaptureError: an argument is an object whose content would silently become a constant of the graph.
        """
        leaves, spec = pytree.tree_flatten(call)
        batch = [fact_of(leaf) for leaf in leaves]
        modules = [(name, type(module), *_of_module(module)) for name, module in _modules(self._model)]
        settings = (
            [torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda")],
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        )
        members = [list(map(id, group["params"])) for group in self._optimizer.param_groups]
        optimizer = (structure(self._optimizer), plain_attributes(self._optimizer), members, self._objects())
        forms = self._state.state_forms() if self._optimizer.state else self._state.stored_forms()
        kinds, counts = _kinds_and_counts(forms)
        functions = [(name, plain_values_of(function)) for name, function in self._functions.items()]
        fingerprint = (str(spec), batch, modules, settings, optimizer, kinds, self._state.layout, functions)
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._words = {
                ARGUMENTS: in_names(call, batch),
                "the arguments' structure": str(spec),
                **self._of_model(),
                **self._of_optimizer(),
                ATTRIBUTES: self._changed_attributes(),
                "autocast and defaults": repr(settings),
            }
            self.key = repr(self._words)
        return {**self._words, STEP_COUNTS: repr(sorted(counts))}

    def forget_last(self) -> None:
        """Undo a ``read`` whose step was refused: no step was taken, and ranks must keep counting alike."""
        del self._met[self._num_met :]
        self._fingerprint = None

    def settle(self) -> None:
        """Take the attributes read last for those that later ones are compared with."""
        if self._at_first is None:
            self._at_first = self._attributes()

    def _of_model(self) -> dict[str, str]:
        params, buffers = self._model.named_parameters(), self._model.named_buffers()
        return {
            "the model's parameters": repr([(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in params]),
            "the model's buffers": repr([(n, tuple(b.shape), str(b.dtype)) for n, b in buffers]),
            "training mode": "".join("t" if m.training else "e" for m in self._model.modules()),
        }

    def _of_optimizer(self) -> dict[str, str]:
        names = {id(p): name for name, p in self._model.named_parameters()}
        members = [[names.get(id(p), "?") for p in group["params"]] for group in self._optimizer.param_groups]
        kinds, _ = _kinds_and_counts(self._state.state_forms())
        return {
            "the optimizer": repr((structure(self._optimizer), members)),
            "the optimizer's state": repr(kinds),
            "the objects among the optimizer's options": repr(self._objects()),
        }

    def _objects(self) -> list[int]:
        """Objects among the optimizer's options, by the order in which they were met.

        So that one put in the place of another counts as a change, and yet ranks that do the same say the same.
        """
        numbers = []
        for value in unnamed(self._optimizer):
            number = next((i for i, seen in enumerate(self._met) if seen is value), len(self._met))
            if number == len(self._met):
                self._met.append(value)
            numbers.append(number)
        return numbers

    def _attributes(self) -> dict[str, str]:
        """The fingerprint's attributes and numbers of hooks, by name."""
        _, _, modules, _, (_, of_optimizer, *_), _, _, functions = self._fingerprint
        found = {f"optimizer.{name}": value for name, value in of_optimizer}
        found.update((f"{own} of {name}", value) for name, values in functions for own, value in values)
        for path, kind, attributes, hooks, params, _ in modules:
            prefix = f"{path}." if path else ""
            found[f"type({path or 'model'})"] = kind.__qualname__
            found.update((f"{prefix}{name}", value) for name, value in attributes)
            found.update((f"len({prefix}{name})", str(num)) for name, num in zip(_HOOKS, hooks, strict=True))
            found.update((f"hooks of {prefix}{param[0]}", str(param[-1])) for param in params)
        return {name: value for name, value in found.items() if name.rpartition(".")[2] not in _TOLD_ELSEWHERE}

    def _changed_attributes(self) -> str:
        if self._at_first is None:
            return ""
        now, then = self._attributes(), self._at_first
        changed = [name for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]
        return ", ".join(
            f"{name} is {now.get(name, 'absent')} and was {then.get(name, 'absent')} at first" for name in changed
        )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, without its cost for deep models."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            prefix = f"{path}." if path else ""
            stack.extend((prefix + name, child) for name, child in module._modules.items() if child is not None)


def _of_module(module: nn.Module) -> tuple[Any, ...]:
    """Attributes, numbers of hooks, parameters and buffers of one module, to be compared."""
    own = vars(module)
    return (
        plain_attributes(module),
        [len(own[name]) for name in _HOOKS],
        [
            (name, id(p), p.shape, p.dtype, p.requires_grad, _num_hooks(p))
            for name, p in own["_parameters"].items()
            if p is not None
        ],
        [(name, b.shape, b.dtype) for name, b in own["_buffers"].items() if b is not None],
    )


def _num_hooks(param: torch.Tensor) -> int:
    return len(param._backward_hooks or ()) + len(getattr(param, "_post_accumulate_grad_hooks", None) or ())


def _kinds_and_counts(forms: Forms) -> tuple[list[Any], set[Any]]:
    """What state there is, and the step counts in it.

    Counts themselves change in every step; which parameters share one is what buckets depend on.
    """
    counts: dict[Any, int] = {}
    kinds = []
    for name, entries in forms.items():
        numbers = tuple((key, form.value) for key, form in entries.items() if form.value is not None)
        own = [(key, form.flat, str(form.dtype), form.shape) for key, form in entries.items()]
        kinds.append((name, own, counts.setdefault(numbers, len(counts))))
    return kinds, set(counts)


def fact_of(leaf: Any) -> str:
    """What a captured step depends on of one leaf of its arguments.

    Raises:
        CaptureError: the leaf is an object whose content would silently become a constant of the graph.
    """
    if isinstance(leaf, torch.Tensor) and leaf.is_meta:
        raise CaptureError("a tensor of the batch is on meta, where it has no values", fix="pass a batch with values")
    if isinstance(leaf, torch.Tensor):
        order = tuple(leaf.stride()) if leaf.layout is torch.strided else leaf.layout
        return f"{leaf.dtype} {tuple(leaf.shape)} {order} {leaf.device.type}"
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return in_words(leaf)
    raise CaptureError(
        f"an argument of train_step holds a {type(leaf).__name__}, which would become a constant of the graph",
        fix="pass tensors (torch.from_numpy for arrays), numbers and strings, in lists, tuples and dictionaries",
    )


def in_names(call: Call, facts: Iterable[str]) -> str:
    """What a step depends on of its call's arguments, each by name; by number where a container names none.

    Args:
        call: positional arguments and keyword arguments.
        facts: of the leaves, in order.
    """
    try:
        names = [name_of(path) for path, _ in pytree.tree_flatten_with_path(call)[0]]
    except ValueError:
        names = [f"leaf {number}" for number, _ in enumerate(pytree.tree_leaves(call))]
    return ", ".join(f"{name}: {fact}" for name, fact in zip(names, facts, strict=True))


def state_spec(model: nn.Module, state: Forms) -> StateSpec:
    """Optimizer state that exists now, for capture."""
    params = {name: tuple(param.shape) for name, param in model.named_parameters()}
    spec: StateSpec = {}
    for name, forms in state.items():
        entries = {
            key: StateEntry(form.shape_beside(params[name]) if form.flat else (), form.dtype, form.value, form.flat)
            for key, form in forms.items()
        }
        if entries:
            spec[name] = entries
    return spec


def hold(guards: tuple[Guard, ...], values: dict[Input, float]) -> bool:
    """Whether what was decided while capturing would be decided alike now.

    Args:
        guards: of the program.
        values: hyperparameters, and optimizer state that is a number.
    """
    return all(
        all(what in values for what in guard.inputs) and guard.holds(*(values[what] for what in guard.inputs))
        for guard in guards
    )
