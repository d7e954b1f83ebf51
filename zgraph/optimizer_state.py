"""Optimizer state in flat buckets, and in torch's own format when the user asks for it.

Per bucket and key there is one flat tensor (``exp_avg`` of all its parameters), in memory or on a lower tier, or one
number (``step``), whatever the optimizer. The user's ``optimizer.state`` is empty meanwhile: hooks fill it for the
moment of ``optimizer.state_dict()`` and empty it again after ``optimizer.load_state_dict()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from zgraph.agreement import Agreement
from zgraph.averages import WEIGHT_EMA, dtype_of_average
from zgraph.errors import StateError, first_line
from zgraph.flat import FlatTensors, place, without_memory
from zgraph.groups import HeldGroup
from zgraph.layout import Bucket, Layout
from zgraph.packed import pack, unpack
from zgraph.tiers import Stored, Tier
from zgraph.unread import Unread

Value = torch.Tensor | Stored | int | float | None
"""One entry of a parameter's optimizer state."""

Params = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class StateForm:
    """What parameters of one bucket must agree on, for one key of their optimizer state.

    Attributes:
        flat: a tensor for each parameter, stored flat; otherwise a single number.
        dtype: of the tensor; None for a plain number.
        value: the single number (a step count, for one).
        shape: of the tensor where it is not the parameter's; in this, parameters of one bucket may differ.
    """

    flat: bool
    dtype: torch.dtype | None
    value: int | float | None = None
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.flat:
            shaped = "shaped like the parameter" if self.shape is None else f"of shape {self.shape}"
            return f"a {self.dtype} tensor {shaped}"
        return str(self.value) if self.dtype is None else f"{self.value} ({self.dtype})"

    def shape_beside(self, param: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor of a parameter of this shape."""
        return param if self.shape is None else self.shape


Forms = dict[str, dict[str, StateForm]]
"""Parameter name -> state key -> form; empty for a parameter without state."""


class OptimizerState:
    """The state of one optimizer, stored as a layout says.

    Args:
        optimizer: the user's; without one there is no state.
        agreement: of the ranks.

    Attributes:
        stored: bucket name -> state key -> this rank's flat tensor, a 0-dim tensor, or a number.
        tiers: by name, those where flat tensors lie that are not in memory, those of parameters, too.
    """

    _group = HeldGroup()

    def __init__(self, optimizer: torch.optim.Optimizer | None, agreement: Agreement) -> None:
        self.stored: dict[str, dict[str, Value]] = {}
        self.tiers: dict[str, Tier] = {}
        self._optimizer, self._group, self._agreement = optimizer, None, agreement
        self._layout = Layout((), world=1)
        self._params: Params = {}
        self._to_read: dict[str, FlatTensors] | None = None  # by key, while a state_dict is made that has not been read
        self._is_hooked = False
        self._hooks: list[RemovableHandle] = []  # until then
        self._averages: list[tuple[torch.Tensor, torch.Tensor]] = []  # of parameters, that are being loaded
        self._lent: list[torch.Tensor] = []  # that have memory while state is being loaded

    def lend_to_load(self) -> None:
        """Let the user load state before there is a layout, though parameters are on meta."""
        if self._optimizer is not None:
            self._hooks = [
                self._optimizer.register_load_state_dict_pre_hook(self._before_first_load),
                self._optimizer.register_load_state_dict_post_hook(self._after_first_load),
            ]

    def has_been_copied(self) -> None:
        """So has the optimizer, but not its hooks, which torch leaves out."""
        if self._is_hooked:
            self._is_hooked = False
            self._hook()
        elif self._hooks:
            self.lend_to_load()

    def forms(self, params: Params) -> Forms:
        """The state that exists, in the user's optimizer or stored. Involves no other rank.

        Raises:
            StateError: an entry is neither a tensor nor a number, or belongs to no parameter.
        """
        given = self._given(params)
        forms = _forms_of(given, params)
        stored = forms_by_parameter(self._layout, self.stored_forms())
        for name, param in params.items():
            if name not in given and self._params.get(name) is param:
                forms[name] = stored[name]
        return forms

    def keep(self, bucket: str, key: str, value: Value) -> Value:
        """Store an entry where the layout has it; as it is stored."""
        entries = self.stored.setdefault(bucket, {})
        entries[key] = self.placed(self._layout.tier_of("optimizer", bucket), value)
        return entries[key]

    def placed(self, tier: str | None, value: Value) -> Value:
        """A value of a bucket as it is stored: flat tensors of some of them on a lower tier."""
        if tier is None or not isinstance(value, torch.Tensor) or value.dim() != 1:
            return value
        there = self.tiers[tier].allocate(len(value), value.dtype)
        there.write(value)
        return there

    def stored_forms(self) -> Forms:
        """The state that is stored, by bucket name."""
        return {
            bucket: {key: stored_form(value, packed=self._layout.packs(bucket, key)) for key, value in entries.items()}
            for bucket, entries in self.stored.items()
        }

    @torch.no_grad()
    def move(self, layout: Layout, params: Params, forms: Forms, group: dist.ProcessGroup | None = None) -> None:
        """Take over what the user's optimizer holds, and lay out anew what is stored already.

        Args:
            layout: the new layout.
            params: the model's parameters.
            forms: from ``forms``; equal within each bucket (see ``check_agreement``).
            group: the ranks that divide state; None for a single process.
        """
        self._group = group
        readers: dict[str, FlatTensors] = {}
        moved: dict[str, dict[str, Value]] = {}
        for bucket in layout.buckets:
            names = [segment.name for segment in bucket.segments]
            entries = moved[bucket.name] = {}
            for key, form in forms[names[0]].items():
                if form.flat or bucket.keeps(key):
                    flat = FlatTensors(layout.of_state(key), sharded=layout.shard_state, group=self._group)
                    entries[key] = flat.allocate(flat.layout.by_name[bucket.name], form.dtype)
                    for name in names:
                        value = self._value(name, params[name], key, readers)
                        assert isinstance(value, torch.Tensor)
                        flat.write(name, value)
                    if layout.packs(bucket.name, key):
                        entries[key] = pack(flat.tensors[bucket.name])
                    entries[key] = self.placed(layout.tier_of("optimizer", bucket.name), entries[key])
                else:
                    entries[key] = _copy(self._value(names[0], params[names[0]], key, readers))
            if self._optimizer is not None:
                for name in names:
                    self._optimizer.state.pop(params[name], None)
        self.stored, self._layout, self._params = moved, layout, params
        self._hook()

    def _given(self, params: Params) -> dict[str, dict[str, Value]]:
        """State in the user's optimizer, by parameter name."""
        if self._optimizer is None:
            return {}
        names = {id(p): name for name, p in params.items()}
        given = {}
        for param, entries in self._optimizer.state.items():
            if id(param) not in names:
                key: Any = param  # torch allows anything
                what = f"a parameter of shape {tuple(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)
                raise StateError(
                    f"optimizer.state has an entry for {what}, which is not one of the model's parameters",
                    fix="zgraph stores state that belongs to parameters; remove the entry",
                )
            on_meta = [key for key, value in entries.items() if isinstance(value, torch.Tensor) and value.is_meta]
            if on_meta:
                numbers = [key for key in on_meta if not entries[key].dim()]
                # Numbers are needed now; of tensors, only that they can be made when their turn comes.
                initial = self._initial(param, torch.device("cpu" if numbers else "meta"))
                entries = {**entries, **{key: initial[key] for key in numbers}}
            if WEIGHT_EMA in entries:
                entries = {**entries, WEIGHT_EMA: entries[WEIGHT_EMA].to(dtype_of_average(param.dtype))}
            if entries:
                given[names[id(param)]] = entries
        return given

    def _value(self, name: str, param: nn.Parameter, key: str, readers: dict[str, FlatTensors]) -> Value:
        """An entry's full value, from the user's optimizer or else from where it is stored."""
        given: dict[str, Value] = self._optimizer.state.get(param, {}) if self._optimizer is not None else {}
        if given:
            value = given[key]
            if isinstance(value, torch.Tensor) and value.is_meta:
                return self._initial(param, torch.device("cpu"))[key]
            return value
        bucket, _ = self._layout.find(name)
        value = self.stored[bucket.name][key]
        if not _is_flat(value):
            return value
        if key not in readers:
            readers[key] = self._flat(key)
        return readers[key].read(name)

    def _flat(self, key: str) -> FlatTensors:
        """One kind of state; all there is of it."""
        layout = self._layout.of_state(key)
        tensors = cast("dict[str, torch.Tensor]", _Unpacked(self._layout, key, self.stored))
        return FlatTensors(layout, sharded=layout.shard_state, group=self._group, tensors=tensors)

    def _initial(self, param: torch.Tensor, device: torch.device) -> dict[str, Value]:
        """The state that the optimizer's constructor gives a parameter, where the user's was built on meta.

        Adagrad, for one, creates its state there.
        """
        optimizer = self._optimizer
        assert optimizer is not None
        group = next(group for group in optimizer.param_groups if any(p is param for p in group["params"]))
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        stand_in = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=device))
        why = "its constructor creates other state when called again"
        try:
            fresh = type(optimizer)([{**options, "params": [stand_in]}], **optimizer.defaults)
            state: dict[str, Value] = fresh.state[stand_in]
        except (TypeError, ValueError, RuntimeError) as error:
            state, why = {}, f"its constructor cannot be called again: {type(error).__name__}: {error}"
        if state.keys() != optimizer.state[param].keys():
            raise StateError(
                f"{type(optimizer).__name__} created state on meta, where it has no values, and {why}",
                fix="build the model on a real device before the optimizer, or create the state in step(); if it was "
                "loaded, call zgraph.compile before optimizer.load_state_dict",
            )
        return state

    # -- torch's own format -------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._optimizer is None or self._is_hooked:
            return
        for hook in self._hooks:
            hook.remove()
        self._optimizer.register_state_dict_pre_hook(self._before_save)
        self._optimizer.register_state_dict_post_hook(self._after_save)
        self._optimizer.register_load_state_dict_pre_hook(self._before_load)
        self._optimizer.register_load_state_dict_post_hook(self._after_load)
        self._is_hooked = True

    @torch.no_grad()
    def _before_save(self, optimizer: torch.optim.Optimizer) -> None:
        values = [value for entries in self.stored.values() for value in entries.values()]
        is_divided = self._layout.shard_state and self._layout.world > 1 and any(map(_is_flat, values))
        if is_divided and self._to_read is None:
            self._agreement.check("optimizer.state_dict()")
        full: dict[int, dict[str, Value | Unread]] = {}
        for bucket in self._layout.buckets:
            for key in self.stored[bucket.name]:
                for name, value in self._full(bucket, key) if self._to_read is None else self._unread(bucket, key):
                    full.setdefault(id(self._params[name]), {})[key] = value
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) in full:
                    optimizer.state[param] = full[id(param)]

    def unread(self) -> dict[str, Any]:
        """What ``optimizer.state_dict`` gives, with what is to be read in the place of tensors like parameters.

        Raises:
            StateError: a hook, or the optimizer's own method, needs tensors.
        """
        assert self._optimizer is not None
        self._to_read = {}
        try:
            return self._optimizer.state_dict()
        except Exception as error:
            raise StateError(
                f"optimizer.state_dict() failed where tensors are not read yet: {first_line(error)}",
                fix="save model.state_dict() and optimizer.state_dict() with torch.save",
            ) from error
        finally:
            self._to_read = None
            self._optimizer.state.clear()

    def _unread(self, bucket: Bucket, key: str) -> Iterator[tuple[str, Value | Unread]]:
        """By parameter, what an entry of a bucket is read of."""
        value = self.stored[bucket.name][key]
        if not _is_flat(value):
            yield from self._full(bucket, key)
            return
        assert self._to_read is not None
        if key not in self._to_read:
            self._to_read[key] = self._flat(key)
        flat = self._to_read[key]
        form = stored_form(value, packed=self._layout.packs(bucket.name, key))
        assert form.dtype is not None
        for name in (segment.name for segment in bucket.segments):
            shape = flat.layout.find(name)[1].shape
            yield name, Unread(shape, form.dtype, partial(flat.read, name), self._layout.order[name])

    @torch.no_grad()
    def full(self, key: str) -> dict[int, Value]:
        """Full values of one kind of state, by the ``id`` of the parameter; all ranks ask together."""
        if self._layout.shard_state and self._layout.world > 1:
            self._agreement.check(f"reading the optimizer state {key!r}")
        buckets = [bucket for bucket in self._layout.buckets if key in self.stored[bucket.name]]
        return {id(self._params[name]): value for bucket in buckets for name, value in self._full(bucket, key)}

    def _full(self, bucket: Bucket, key: str) -> Iterator[tuple[str, Value]]:
        """By parameter, the full value of an entry of a bucket."""
        value = self.stored[bucket.name][key]
        if _is_flat(value):
            flat = self._flat(key)
            yield from ((segment.name, flat.read(segment.name).clone()) for segment in bucket.segments)
        else:
            yield from ((segment.name, _copy(value)) for segment in bucket.segments)

    def _after_save(self, optimizer: torch.optim.Optimizer, _: dict[str, Any]) -> None:
        optimizer.state.clear()

    def _before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse what does not fit before torch changes anything."""
        by_key = _by_key(optimizer, state_dict)
        if by_key is None:
            return
        names = {id(p): name for name, p in self._params.items()}
        given = {}
        for key, entries in state_dict["state"].items():
            if key not in by_key or id(by_key[key]) not in names:
                raise StateError(
                    f"the loaded optimizer state has an entry {key!r} that belongs to no parameter of the model",
                    fix="zgraph stores state that belongs to parameters; remove the entry from state_dict['state']",
                )
            given[names[id(by_key[key])]] = entries
        check_agreement(self._layout, _forms_of(given, self._params))
        self._lend(
            by_key, state_dict, {id(param): self._layout.find(name)[0].device for name, param in self._params.items()}
        )

    def _before_first_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        by_key = _by_key(optimizer, state_dict)
        if by_key is not None:
            self._lend(by_key, state_dict, {})

    def _after_first_load(self, optimizer: torch.optim.Optimizer) -> None:
        self._restore_averages(optimizer)
        self.take_back()

    def _lend(
        self, by_key: Mapping[Any, torch.Tensor], state_dict: dict[str, Any], devices: Mapping[int, torch.device]
    ) -> None:
        """Have parameters on a real device, to which torch moves what is loaded; a CPU unless ``devices`` say which."""
        # Averages are noted, for torch rounds them to the parameter's dtype.
        saved = ((by_key[key], entries) for key, entries in state_dict["state"].items() if key in by_key)
        self._averages = [(param, entries[WEIGHT_EMA]) for param, entries in saved if WEIGHT_EMA in entries]
        self.take_back()
        self._lent = [param for param in by_key.values() if param.is_meta]
        for param in self._lent:
            device = devices.get(id(param), torch.device("cpu"))
            place(param, torch.zeros((), dtype=param.dtype, device=device).expand(param.shape))

    def take_back(self) -> None:
        """Parameters that stand on a real device while torch loads: they go back to meta, also where it has failed."""
        for param in self._lent:
            place(param, without_memory(param))
        self._lent = []

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        self._restore_averages(optimizer)
        self.take_back()
        self.stored = {bucket.name: {} for bucket in self._layout.buckets}
        self.move(self._layout, self._params, self.forms(self._params), self._group)

    def _restore_averages(self, optimizer: torch.optim.Optimizer) -> None:
        for param, average in self._averages:
            state = optimizer.state[param]
            state[WEIGHT_EMA] = average.to(state[WEIGHT_EMA].device)
        self._averages = []


def _by_key(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[Any, torch.Tensor] | None:
    """The optimizer's parameters, by what a state that is loaded calls them; None where torch refuses that state."""
    if [len(each["params"]) for each in state_dict["param_groups"]] != [
        len(group["params"]) for group in optimizer.param_groups
    ]:
        return None
    keys = (key for each in state_dict["param_groups"] for key in each["params"])
    return dict(zip(keys, (param for group in optimizer.param_groups for param in group["params"]), strict=True))


class _Unpacked(Mapping[str, torch.Tensor]):
    """Flat tensors of one kind of state by bucket, as updates see them, made when they are asked for.

    The last one is kept: parameters of a bucket are asked for one after the other.
    """

    def __init__(self, layout: Layout, key: str, stored: Mapping[str, Mapping[str, Value]]) -> None:
        self._packs = {bucket: layout.packs(bucket, key) for bucket in stored}
        self._flat = {bucket: value for bucket, each in stored.items() if _is_flat(value := each.get(key))}
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, bucket: str) -> torch.Tensor:
        value: Any = self._flat[bucket]
        if not self._packs[bucket] and isinstance(value, torch.Tensor):
            return value
        if self._last is None or self._last[0] != bucket:
            self._last = None
            value = value.read() if isinstance(value, Stored) else value
            self._last = bucket, unpack(value) if self._packs[bucket] else value
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flat)

    def __len__(self) -> int:
        return len(self._flat)


def check_agreement(layout: Layout, forms: Forms) -> None:
    """Parameters of one bucket must have optimizer state of the same form, and tensors that fit their place.

    Raises:
        StateError: naming two parameters that differ, or one that does not fit.
    """
    for bucket in layout.buckets:
        first = bucket.segments[0].name
        for name, shape in ((segment.name, segment.shape) for segment in bucket.segments):
            for key in forms[first].keys() | forms[name].keys():
                one, other = forms[first].get(key), forms[name].get(key)
                place = layout.of_state(key).find(name)[1].shape
                if other is not None and other.flat and other.shape_beside(shape) != place:
                    raise StateError(
                        f"optimizer state {key!r} of {name!r} has shape {other.shape_beside(shape)}, not {place}",
                        fix="load the state of an optimizer of the same kind, for a model of the same shapes",
                    )
                if bucket.keeps(key) and one is not None and other is not None and one.dtype == other.dtype:
                    continue  # of tensors of no dimension, each parameter has its own value
                if one != other:
                    raise StateError(
                        f"optimizer state {key!r} of {first!r} is {one or 'absent'} and of {name!r} "
                        f"{other or 'absent'}, but {bucket.name} stores both together",
                        fix="load optimizer state in which parameters of one kind have made the same number of steps",
                    )


def _forms_of(entries: Mapping[str, Mapping[str, Any]], params: Params) -> Forms:
    tensor_keys = _tensor_keys(entries, params)
    return {
        name: {
            key: _form(name, key, value, params[name].shape, key in tensor_keys)
            for key, value in entries.get(name, {}).items()
        }
        for name in params
    }


def forms_by_parameter(layout: Layout, stored: Mapping[str, Mapping[str, StateForm]]) -> Forms:
    """The forms of what is stored, by parameter.

    Args:
        stored: by bucket.
    """
    forms: Forms = {}
    for bucket in layout.buckets:
        for segment in bucket.segments:
            own = forms[segment.name] = dict(stored.get(bucket.name, {}))
            for key, form in own.items():
                shape = layout.of_state(key).find(segment.name)[1].shape
                if form.flat and shape != segment.shape:
                    own[key] = replace(form, shape=shape)
    return forms


def _tensor_keys(entries: Mapping[str, Mapping[str, Any]], params: Params) -> set[str]:
    """Keys of tensors that are each parameter's own.

    For a 0-dim parameter a moment and a step count look the same, so the other parameters tell; if there are none,
    the name does, as in torch's own ``Optimizer.load_state_dict``.
    """
    known, own_tensor = set(), set()
    for name, own in entries.items():
        for key, value in own.items():
            if params[name].dim() and isinstance(value, torch.Tensor):
                known.add(key)
                if value.dim():
                    own_tensor.add(key)
    return own_tensor | {key for own in entries.values() for key in own if key not in known and key != "step"}


def _form(name: str, key: str, value: Any, shape: torch.Size, is_own: bool) -> StateForm:
    if isinstance(value, torch.Tensor):
        if is_own and value.shape == shape:
            return StateForm(True, value.dtype)
        if value.dim():
            return StateForm(True, value.dtype, shape=tuple(value.shape))
        return StateForm(False, value.dtype, value.item())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return StateForm(False, None, value)
    raise StateError(
        f"optimizer state {key!r} of {name!r} is a {type(value).__name__}, neither a tensor nor a number",
        fix="use an optimizer that keeps tensors and numbers in its state",
    )


def stored_form(value: Value, *, packed: bool) -> StateForm:
    """The form of an entry as a rank stores it."""
    if packed:
        return StateForm(True, torch.float32)
    if isinstance(value, Stored):
        return StateForm(True, value.dtype)
    if isinstance(value, torch.Tensor):
        return StateForm(True, value.dtype) if value.dim() else StateForm(False, value.dtype, value.item())
    return StateForm(False, None, value)


def _is_flat(value: Value) -> bool:
    return isinstance(value, Stored) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _copy(value: Value) -> Value:
    return value.clone() if isinstance(value, torch.Tensor) else value
