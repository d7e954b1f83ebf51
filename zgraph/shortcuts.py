"""What a trace has seen the like of, it records without going through torch's tracer again.

An optimizer does to each parameter what it did to the one before. What an operator gives depends on the operator and on
the forms of its arguments alone, and torch takes half a millisecond to find that out. So the first call of each form
goes through all of torch, and those after it only add a node like the first one's, in later traces of the process, too.
The traced function itself still runs, so whatever Python decides for one parameter and not for another is in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import SymBool, SymFloat, SymInt, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    _compute_proxy,
    _ProxyTensor,
    disable_proxy_modes_tracing,
    set_proxy_slot,
    thunkify,
)
from torch.fx.experimental.sym_node import SymNode, to_node, wrap_node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

_NUMBERS = (SymFloat, SymInt, SymBool)
_PLAIN = frozenset(
    {bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_LATER = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "float_truediv",
    operator.pow: "float_pow", operator.neg: "neg", operator.ge: "ge",
}  # fmt: skip
_DECISIONS = ("evaluate_sym_node", "guard_or_defer_runtime_assert", "_maybe_evaluate_static")
_OF_CACHES = ("cache_clear", "cache_info")
_OTHERWISE = (torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape)


class _UnknownFormError(Exception):
    """An argument is nothing that another call could have the like of."""


class _Gives(Enum):
    """What an operator gives that has shortcuts."""

    TENSOR = auto()  # a new one
    FIRST = auto()  # its first argument, written to
    VIEW = auto()  # a view of its first argument
    TENSORS = auto()  # several new ones
    NUMBER = auto()  # the value of its argument


@dataclass(frozen=True)
class _Like:
    """What calls of one form give the like of, and what torch calls their nodes."""

    val: Any
    name: str


_SEEN: dict[Hashable, tuple[list[tuple[Any, ...]], str]] = {}
"""What calls of PyTorch's operators have given in whichever trace of this process: how tensors lie, and a name.

By what decides it, as in torch's own memory of such things (``FakeTensorMode._cache_key``), which is slower to ask.
"""

_MOST_SEEN = 20_000


class Shortcuts(TorchDispatchMode):
    """A mode for traced functions to run under, above torch's own.

    Args:
        proxies, mode: torch's modes that record operators, and that tell what they give.
    """

    def __init__(self, proxies: ProxyTorchDispatchMode, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._proxies, self._tracer, self._mode = proxies, proxies.tracer, mode
        self._known: dict[Hashable, _Like] = {}
        self._gives: dict[Any, _Gives | None] = {}
        self._numbers: dict[Hashable, Any] = {}
        self._env = mode.shape_env
        self._num_decisions = 0  # on what numbers are; what an operator gives may depend on it

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Take shortcuts in the trace that is running now."""
        self._compute: Any = self._proxies.__sym_dispatch__
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(self._proxies, "__sym_dispatch__", self._number))
            for name in _DECISIONS if self._env is not None else ():
                patches.enter_context(mock.patch.object(self._env, name, self._counted(getattr(self._env, name))))
            patches.enter_context(self)
            yield

    def _counted(self, decide: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._num_decisions += 1
            return decide(*args, **kwargs)

        vars(counted).update({name: getattr(decide, name) for name in _OF_CACHES if hasattr(decide, name)})
        return counted

    # -- tensors --------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        if func not in self._gives:
            self._gives[func] = _gives(func)
        gives = self._gives[func]
        if gives is None or (gives is _Gives.NUMBER and getattr(args[0], "item_memo", None) is not None):
            return func(*args, **kwargs)
        try:
            key = (func, self._form(args), *((name, self._form(value)) for name, value in kwargs.items()))
            node_args: Any = self._in_graph(args)
            node_kwargs = {name: self._in_graph(value) for name, value in kwargs.items()}
        except _UnknownFormError:
            key = None
        if key is None:  # not where the error is handled, or it would be taken for the cause of what fails in there
            return func(*args, **kwargs)
        known = self._known.get(key) or self._seen(gives, key)
        if known is None:
            before, num_decisions = self._tracer.graph._root.prev, self._num_decisions
            result = func(*args, **kwargs)
            node = before.next
            is_plain = (node.target, node.args, node.kwargs) == (func, node_args, node_kwargs)
            if (
                is_plain
                and self._num_decisions == num_decisions
                and self._is_as_expected(gives, result, args, node, key[1])
            ):
                self._known[key] = _Like(node.meta["val"], func.overloadpacket.__name__)
                self._remember(gives, key)
            return result
        node = self._new_node(func, node_args, node_kwargs, known.name)
        return self._give(gives, known.val, node, args, kwargs)

    def _remember(self, gives: _Gives, key: tuple[Any, ...]) -> None:
        """Let later traces know, too, if a call gives nothing but new tensors and what it has written to."""
        if gives not in _SEEN_OF or not torch._library.utils.is_builtin(key[0]):
            return
        known = self._known[key]
        vals = known.val if gives is _Gives.TENSORS else (known.val,)
        if any(self._form(self._like(val)) != self._form(val) for val in vals):  # in the midst of a larger one, say
            return
        if len(_SEEN) >= _MOST_SEEN:
            _SEEN.clear()
        _SEEN[_surroundings(), key] = [_laid_out(val) for val in vals], known.name

    def _seen(self, gives: _Gives, key: Hashable) -> _Like | None:
        """The like of what a call of this form has given in an earlier trace."""
        seen = _SEEN.get((_surroundings(), key))
        if seen is None:
            return None
        made = tuple(self._made(*each) for each in seen[0])
        self._known[key] = known = _Like(made if gives is _Gives.TENSORS else made[0], seen[1])
        return known

    def _is_as_expected(self, gives: _Gives, result: Any, args: tuple[Any, ...], node: fx.Node, form: Hashable) -> bool:
        """Whether what torch has made of a call is what ``_give`` would, and arguments have the form they had."""
        try:
            is_like = self._gives_the_like(gives, result, args, node)
            return is_like and (gives is not _Gives.FIRST or self._form(args) == form)
        except _UnknownFormError:  # such as a sparse tensor's
            return False

    def _gives_the_like(self, gives: _Gives, result: Any, args: tuple[Any, ...], node: fx.Node) -> bool:
        last = self._tracer.graph._root.prev
        if gives is _Gives.NUMBER:
            return node is last and type(result) is SymFloat and self._in_graph(result) is node
        if gives is _Gives.TENSORS:
            items = [node]
            for i, part in enumerate(result):
                item = items[-1].next
                if (item.target, item.args) != (operator.getitem, (node, i)) or not self._stands_for(item, part):
                    return False
                items.append(item)
            return type(result) is tuple and items[-1] is last
        is_first = bool(args) and result is args[0]
        return node is last and is_first is (gives is _Gives.FIRST) and self._stands_for(node, result)

    def _stands_for(self, node: fx.Node, result: Any) -> bool:
        is_tensor = type(result) is FakeTensor and self._in_graph(result) is node
        return is_tensor and self._form(result) == self._form(node.meta["val"])

    def _give(self, gives: _Gives, val: Any, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let ``node`` stand for the result of a call, which is like ``val``."""
        node.meta["val"] = val
        if gives is _Gives.NUMBER:
            assert self._env is not None
            proxy = fx.Proxy(node, self._tracer)
            with self._env.ignore_fresh_unbacked_symbols():
                number = args[0].item_memo = node.meta["val"] = self._env.create_unbacked_symfloat()
            set_proxy_slot(number, self._tracer, thunkify(self._tracer, lambda: proxy))
            return number
        if gives is _Gives.TENSORS:
            items = []
            for i, part in enumerate(val):
                item = self._new_node(operator.getitem, (node, i), {}, "getitem")
                item.meta["val"] = part
                items.append(self._track(self._like(part), item))
            return tuple(items)
        if gives is _Gives.VIEW:
            with disable_proxy_modes_tracing():
                return self._track(node.target(*args, **kwargs), node)  # type: ignore[operator]
        return self._track(args[0] if gives is _Gives.FIRST else self._like(val), node)

    def _track(self, tensor: FakeTensor, node: fx.Node) -> FakeTensor:
        self._tracer.tensor_tracker[tensor] = _ProxyTensor(fx.Proxy(node, self._tracer), None)
        return tensor

    def _new_node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        node = self._tracer.create_node("call_function", target, (), {}, name)
        node.args, node.kwargs = args, kwargs  # afterwards, as in ``copy_node``
        return node

    def _form(self, value: Any) -> Any:
        """What another argument must have in common with this one for an operator to give the like of it."""
        kind = type(value)
        if kind is FakeTensor:
            if value.layout is not torch.strided or value.constant is not None or value._has_symbolic_sizes_strides:
                raise _UnknownFormError
            return (
                value.dtype, value.shape, value.stride(), value.storage_offset(), value.untyped_storage().nbytes(),
                value.fake_device, value.is_conj(), value.is_neg(),
            )  # fmt: skip
        if kind in _PLAIN:
            return kind, value
        if kind is SymFloat and self._env is not None and not self._env.replacements:
            return kind  # once some number was found to be constant, it may stand there as a literal
        if kind is list or kind is tuple:
            return kind, *map(self._form, value)
        raise _UnknownFormError

    def _in_graph(self, value: Any) -> Any:
        """What stands for an argument in the graph."""
        kind = type(value)
        if kind is FakeTensor:
            tracked = self._tracer.tensor_tracker.get(value)
            if tracked is None or tracked.constant is not None:
                raise _UnknownFormError
            return tracked.proxy.node
        if kind in _NUMBERS:
            number = self._tracer.symnode_tracker.get(value)
            if number is None:
                raise _UnknownFormError
            return number.force().node
        return kind(map(self._in_graph, value)) if kind is list or kind is tuple else value

    def _like(self, val: FakeTensor) -> FakeTensor:
        return self._made(*_laid_out(val))

    def _made(self, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> FakeTensor:
        with no_dispatch():
            memory = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            return FakeTensor(self._mode, memory, device)

    # -- numbers --------------------------------------------------------------------------------------------

    def _number(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Record a function of numbers, once for the same numbers."""
        key = (function, *(arg.node if isinstance(arg, _NUMBERS) else repr(arg) for arg in args))
        found: Any = self._numbers.get(key)
        if found is None:
            if function in _LATER and any(isinstance(arg, (float, SymFloat)) for arg in args):
                found = wrap_node(_Later(function, args, self._env))
                recorded: Any = partial(_compute_proxy, self._tracer, func=function, args=args, out=found)
                self._tracer.symnode_tracker[found] = thunkify(self._tracer, recorded)
            else:
                found = self._compute(function, types, args, kwargs)
            self._numbers[key] = found
        return found


class _Later(SymNode):
    """What an operator gives for floats; sympy's expression of it is made when torch asks for it, which is seldom."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], shape_env: ShapeEnv | None) -> None:
        hints = [arg.node.hint if isinstance(arg, _NUMBERS) else arg for arg in args]
        self._function, self._args, self._made = function, args, None
        self.pytype = bool if function is operator.ge else float
        self.shape_env, self.constant, self.fx_node = shape_env, None, None
        self._hint = None if None in hints else self.pytype(function(*hints))
        self._optimized_summation, self._expr_ver, self._expr_cache = False, -1, None

    @property
    def _expr(self) -> Any:  # type: ignore[override]
        if self._made is None:
            like = next(arg.node for arg in self._args if isinstance(arg, _NUMBERS))
            with disable_proxy_modes_tracing():
                self._made = getattr(SymNode, _LATER[self._function])(*(to_node(like, arg) for arg in self._args))._expr
        return self._made

    def expect_true(self, file: str, line: int) -> bool:
        """Take it to be so where no value is known, as torch does; it writes it down, too, but nobody reads that."""
        return True if self._hint is None else super().expect_true(file, line)


_SEEN_OF = (_Gives.TENSOR, _Gives.TENSORS, _Gives.FIRST)


def _surroundings() -> tuple[Any, ...]:
    """What besides its arguments decides what an operator gives."""
    return torch.get_default_dtype(), torch._C._get_default_device(), torch.is_inference_mode_enabled()


def _laid_out(val: FakeTensor) -> tuple[Any, ...]:
    return val.shape, val.stride(), val.dtype, val.fake_device


def _gives(func: Any) -> _Gives | None:
    """What an operator gives; None if it has no shortcuts."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return _Gives.NUMBER
    if not isinstance(func, torch._ops.OpOverload) or not {*_OTHERWISE}.isdisjoint(func.tags):
        return None
    schema = func._schema
    if not schema.returns or any(str(given.type) != "Tensor" for given in schema.returns):
        return None
    aliased = [argument for argument in schema.arguments if argument.alias_info is not None]
    if not aliased and all(given.alias_info is None for given in schema.returns):
        return _Gives.TENSOR if len(schema.returns) == 1 else _Gives.TENSORS
    if aliased != schema.arguments[:1] or len(schema.returns) > 1 or schema.returns[0].alias_info is None:
        return None
    if not schema.is_mutable:
        return _Gives.VIEW
    return _Gives.FIRST if schema.name.endswith("_") else None
