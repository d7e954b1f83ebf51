"""Trace an optimizer's own ``step()`` into a functional graph, with its hyperparameters as scalar inputs.

Nothing is known about particular optimizers, but that torch's own do the same to parameters of one form
(``zgraph.alike``). The plain per-parameter code path runs on fake tensors; every float in
``param_groups`` is a symbolic number, so ``1 - lr * weight_decay`` becomes Python-scalar nodes that compute in
double precision exactly as eager does. Conditions on such numbers (``if weight_decay != 0``) become guards.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from textwrap import shorten
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree as pytree

from zgraph import ops
from zgraph.alike import copied, representatives
from zgraph.attributes import contents, is_same
from zgraph.errors import OptimizerError, ZgraphError, first_line, quoted
from zgraph.functional import make_functional
from zgraph.initial_state import initial_values
from zgraph.program import Guard, Input, Phase, Role, StateInit, in_words, target_name
from zgraph.tracing import Recorder, fake_mode, python_generators_kept, source_of_error, trace

Number = int | float


@dataclass(frozen=True)
class StateEntry:
    """One value of ``optimizer.state[param]``: a tensor of ``shape`` and ``dtype``, or a number (dtype None).

    ``sample`` is the current value of a single number, by which conditions on it are decided; None for a tensor with
    one element per element of the parameter. A tensor is where the parameter is if it is ``beside`` it or has
    dimensions, else on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    sample: Number | None = None
    beside: bool = False


StateSpec = dict[str, dict[str, StateEntry]]
"""Parameter name -> state key -> entry. A parameter without state is absent."""


@dataclass
class Update:
    """A traced optimizer update.

    Attributes:
        graph: functional; each placeholder has an ``Input`` in its meta. Gradients are CONSTANT-free placeholders
            listed in ``gradients``.
        gradients: parameter name -> its gradient placeholder.
        results: PARAM and OPT_STATE inputs -> the node (or number) that is their new value.
        init: initial values under which this update also serves as the first one; None if the first differs.
        guards: conditions decided while tracing.
        constants: values of CONSTANT placeholders.
        state: state that is there after the step.
    """

    graph: fx.Graph
    gradients: dict[str, fx.Node]
    results: dict[Input, fx.Node | Number]
    init: dict[Input, StateInit] | None
    guards: tuple[Guard, ...]
    constants: dict[str, torch.Tensor]
    state: StateSpec


def hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Every float in ``param_groups``, by path: ``group0.lr``, ``group1.betas[0]``. Read anew each step."""
    found: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key == "params":
                continue
            for suffix, leaf, default in _leaves(value, optimizer.defaults.get(key)):
                number = _as_float(leaf, default)
                if number is not None:
                    found[f"group{index}.{key}{suffix}"] = number
    return found


def structure(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """What a traced update is specialised on besides its float hyperparameters."""
    groups = []
    for group in optimizer.param_groups:
        fixed = []
        for key, value in sorted(group.items(), key=lambda item: item[0]):
            if key != "params":
                leaves = _leaves(value, optimizer.defaults.get(key))
                fixed.append(
                    (key, tuple("float" if _as_float(v, d) is not None else in_words(v) for _, v, d in leaves))
                )
        groups.append(tuple(fixed))
    return (type(optimizer).__module__, type(optimizer).__qualname__, tuple(groups))


def unnamed(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Objects in ``param_groups`` that ``structure`` describes by type alone, in order."""
    found: list[Any] = []

    def note(value: Any) -> str:
        found.append(value)
        return ""

    for group in optimizer.param_groups:
        in_words([value for key, value in sorted(group.items(), key=lambda item: item[0]) if key != "params"], note)
    return found


def check_step(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what would run around an optimizer's ``step()`` without being part of its class.

    Learning-rate schedulers replace ``step`` on the optimizer, too, but only to count its calls.

    Raises:
        OptimizerError: with the hook, or the replaced method.
    """
    kind = type(optimizer)
    for_all = [*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()]
    hooks: list[Callable[..., Any]] = [
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
        *(hook for hook in for_all if not hook.__module__.startswith("torch.")),  # torch's profiler counts steps
    ]
    if hooks:
        raise OptimizerError(
            f"{kind.__name__} has a step hook, {_name(hooks[0])}, which a compiled step would not call",
            where=_definition(hooks[0]),
            fix="remove the hook, or put what it does into the optimizer's step()",
        )
    step = vars(optimizer).get("step")
    counts_calls = hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is kind.step
    if step is not None and not counts_calls:
        raise OptimizerError(
            f"step was replaced on this {kind.__name__} by {_name(step)}, which a compiled step would not call",
            where=_definition(step),
            fix=f"define step() in a subclass of {kind.__name__} instead",
        )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _definition(function: Callable[..., Any]) -> str | None:
    code = getattr(function, "__code__", None)
    return quoted(f"{code.co_filename}:{code.co_firstlineno} ({code.co_name})") if code is not None else None


def _leaves(value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """A hyperparameter's path suffix, value and default; each element of a tuple or list by itself."""
    if isinstance(value, (tuple, list)):
        defaults = default if isinstance(default, (tuple, list)) and len(default) == len(value) else [None] * len(value)
        for i, v in enumerate(value):
            yield f"[{i}]", v, defaults[i]
    else:
        yield "", value, default


def _as_float(value: Any, default: Any) -> float | None:
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        return float(value)  # lr = 1 where the optimizer was made with lr=0.1
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
        return float(value)
    return None


def trace_update(
    optimizer: torch.optim.Optimizer,
    params: dict[str, torch.nn.Parameter],
    trained: Sequence[str],
    state: StateSpec,
    device: torch.device,
) -> Update:
    """Trace ``optimizer.step()``.

    Args:
        optimizer: the user's; it is not touched.
        params: the model's parameters by name.
        trained: names of those that have a gradient, all of them held by the optimizer.
        state: state that exists already; a parameter that is absent starts with none, as in a first step.
        device: where parameters on ``meta`` will live.

    Raises:
        OptimizerError: the update depends on values of tensors, or fails on fake tensors.
    """
    like = representatives(optimizer, params, trained, state)
    traced = [name for name in trained if like[name] == name]
    trace_with = partial(_trace_once, optimizer, params, traced, device=device)
    try:
        update = _trace_both(trace_with, traced, state)
    except OptimizerError as error:
        if not any("capturable" in group for group in optimizer.param_groups):
            raise
        try:
            update = _trace_both(partial(trace_with, capturable=True), traced, state)
        except OptimizerError:
            raise error from None
    return update if traced == list(trained) else copied(update, like)


def _trace_both(trace_with: Callable[[StateSpec], Update], trained: Sequence[str], state: StateSpec) -> Update:
    """Trace a step, and if it creates state, a later one, too; the later one serves as both if that is possible."""
    first = trace_with(state)
    fresh = [name for name in trained if name not in state and first.state.get(name)]
    if not fresh:
        first.init = {}
        return first
    for node in first.graph.nodes:
        if node.op == "call_function":
            node.meta.clear()  # only compared by operators from here on, and fake tensors are large
    later = trace_with(first.state)
    later.init = initial_values(first, later)
    if later.init is not None:
        return later
    del first, later  # large, and of no use to the third trace
    return trace_with(state)


def _trace_once(
    optimizer: torch.optim.Optimizer,
    params: dict[str, torch.nn.Parameter],
    trained: Sequence[str],
    state: StateSpec,
    *,
    device: torch.device,
    capturable: bool = False,
) -> Update:
    """Trace one step.

    Args:
        capturable: on torch's code path for CUDA graphs, which decides by ``torch.where`` instead of branches, and
            computes with counts and the like as 0-dim tensors: in float64 here, as Python does on the other path.
    """
    mode = fake_mode(scalars=True)
    assert mode.shape_env is not None
    names = {id(p): name for name, p in params.items()}
    symbols: dict[sympy.Symbol, Input] = {}

    def symbolic(what: Input, value: Number) -> Any:
        return _symbolic(mode.shape_env, symbols, what, value)  # type: ignore[arg-type]

    inputs: list[Input | str] = []  # a str is the name of a parameter whose gradient this is
    values: list[Any] = []

    def add(what: Input | str, value: Any) -> int:
        inputs.append(what)
        values.append(value)
        return len(values) - 1

    with mode:
        where: dict[str, tuple[int, int, dict[str, int]]] = {}
        for name in trained:
            p = params[name]
            target = device if p.is_meta else p.device
            at_param, at_grad = (
                add(what, torch.empty(p.shape, dtype=p.dtype, device=target))
                for what in (Input(Role.PARAM, name), name)
            )
            at_state = {}
            for key, entry in state.get(name, {}).items():
                what = Input(Role.OPT_STATE, name, key)
                if entry.dtype is None:
                    assert entry.sample is not None
                    at_state[key] = add(what, symbolic(what, entry.sample))
                else:
                    place = target if entry.shape or entry.beside else torch.device("cpu")
                    at_state[key] = add(what, torch.empty(entry.shape, dtype=entry.dtype, device=place))
            where[name] = (at_param, at_grad, at_state)
    hypers = {
        path: add(Input(Role.HYPER, path), symbolic(Input(Role.HYPER, path), v))
        for path, v in hyperparameters(optimizer).items()
    }
    counts = _count_keys(state, params) if capturable else set()
    produced: list[Input] = []
    new_state: StateSpec = {}

    def run(arguments: list[Any]) -> list[Any]:
        fake = type(optimizer).__new__(type(optimizer))  # copy.copy would leave out what subclasses add
        for attribute, value in vars(optimizer).items():
            setattr(fake, attribute, contents(value))
        fake.state = defaultdict(dict)
        fake.param_groups = []
        leaves: dict[str, torch.Tensor] = {}
        for index, group in enumerate(optimizer.param_groups):
            members = []
            for p in group["params"]:
                name = names[id(p)]
                if name not in where:
                    continue
                at_param, at_grad, at_state = where[name]
                leaf = arguments[at_param]
                leaf.requires_grad_()
                leaf.grad = arguments[at_grad]
                leaves[name] = leaf
                if at_state:
                    given = {key: arguments[i] for key, i in at_state.items()}
                    fake.state[leaf].update({k: _widened(v) if k in counts else v for k, v in given.items()})
                members.append(leaf)
            plain = _plain(group, index, hypers, arguments, capturable=capturable)
            fake.param_groups.append({**plain, "params": members})
        before = _held(fake)
        memory = {name: leaf.untyped_storage()._cdata for name, leaf in leaves.items()}
        with _symbolic_math(type(optimizer)), _as_if_compiling() if capturable else nullcontext():
            type(optimizer).step(fake)
        for what, value in _held(fake).items():
            if not is_same(value, before.get(what)):
                raise OptimizerError(
                    f"{type(optimizer).__name__}.step() changes {what}, which a captured step would not",
                    fix="keep what changes from step to step in optimizer.state[param]",
                )
        for name, leaf in leaves.items():
            if leaf.untyped_storage()._cdata != memory[name]:
                raise OptimizerError(
                    f"{type(optimizer).__name__}.step() assigns to the data of {name}, which a graph cannot see",
                    fix="write to the parameter in place, as in p.sub_(...) or p.copy_(...)",
                )
        of_others = [key for key in fake.state if not any(key is leaf for leaf in leaves.values())]
        if of_others:
            raise OptimizerError(
                f"{type(optimizer).__name__}.step() keeps state for {shorten(repr(of_others[0]), 60)}, "
                "which is no parameter that is trained",
                fix="keep what changes from step to step in optimizer.state[param]",
            )
        made = _count_keys({name: fake.state.get(leaf, {}) for name, leaf in leaves.items()}, leaves)
        results: list[Any] = []
        for name in trained:
            leaf = leaves[name]
            produced.append(Input(Role.PARAM, name))
            results.append(leaf)
            new_state[name] = {}
            for key, value in fake.state.get(leaf, {}).items():
                if capturable and key in made:
                    value = _narrowed(value, state.get(name, {}).get(key))
                entry = _entry(f"{key!r} of {name}", value, leaf.device)
                new_state[name][key] = entry
                produced.append(Input(Role.OPT_STATE, name, key))
                results.append(value)
        return results

    recorder = Recorder(Phase.UPDATE)
    try:
        # A step count that was just created must stay an input, not become the literal it was created from.
        with python_generators_kept() as drawn:
            graph, constants = trace(run, (values,), mode, recorder, fold_literals=False)
    except ZgraphError:
        raise
    except GuardOnDataDependentSymNode as error:
        raise OptimizerError(
            f"{type(optimizer).__name__}.step() decides by the value of a tensor or of the step count, "
            "so it is not one fixed graph",
            where=source_of_error(error),
            fix="make the branch a torch.where, or use an optimizer without it",
        ) from error
    except Exception as error:
        raise OptimizerError(
            f"{type(optimizer).__name__}.step() cannot be traced: {type(error).__name__}: {first_line(error)}",
            where=source_of_error(error),
            fix="the update must be made of torch operators on parameters, gradients and state",
        ) from error
    if drawn:
        raise OptimizerError(
            f"{type(optimizer).__name__}.step() draws numbers from {' and '.join(drawn)}, "
            "which would be the same in every step",
            fix="draw them outside of step() and pass them as a float hyperparameter in param_groups",
        )
    placeholders = list(graph.find_nodes(op="placeholder"))
    for node, meaning in zip(placeholders, inputs, strict=False):
        if not isinstance(meaning, str):
            node.meta["input"] = meaning
    graph, mutated = make_functional(graph, mode)
    for node, new in mutated.items():
        written: Input | None = node.meta.get("input")
        if written is not None and written.role is Role.CONSTANT:
            raise OptimizerError(
                f"{type(optimizer).__name__}.step() writes to a tensor that is not in its state",
                where=quoted(new.meta["origin"].source) if "origin" in new.meta else None,
                fix="keep what changes from step to step in optimizer.state[param]",
            )
    for node in graph.nodes:
        if node.target in ops.BY_PLACE:
            raise OptimizerError(
                f"{type(optimizer).__name__}.step() reads memory by its place in {target_name(node.target)}, and "
                "parameters lie in buckets",
                where=quoted(node.meta["origin"].source),
                fix="read elements by index, or through view and transpose",
            )
    placeholders = list(graph.find_nodes(op="placeholder"))
    gradients = {meaning: node for node, meaning in zip(placeholders, inputs, strict=False) if isinstance(meaning, str)}
    out: Any = graph.output_node().args[0]
    results: dict[Input, fx.Node | Number] = {
        what: mutated.get(result, result) if isinstance(result, fx.Node) else result
        for what, result in zip(produced, out, strict=True)
    }
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(_sample, node.meta["val"])
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # what was reshaped was contiguous here; a gradient may not be
    return Update(graph, gradients, results, None, _guards(mode.shape_env, symbols), constants, new_state)


def _count_keys(entries: Mapping[str, Mapping[str, Any]], params: Mapping[str, torch.Tensor]) -> set[str]:
    """Keys of state that is a 0-dim tensor whatever its parameter: counts, and what is computed from them.

    What the state of parameters with dimensions shows; if there are none, only ``step`` is known to be one.
    """
    shown = [(key, value) for name, own in entries.items() if params[name].dim() for key, value in own.items()]
    return {key for key, value in shown if getattr(value, "shape", None) == ()} if shown else {"step"}


def _widened(value: Any) -> Any:
    """A count or the like, in float64."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _narrowed(value: Any, entry: StateEntry | None) -> Any:
    """A count or the like, in the dtype that it has in state, or would have been created in."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.float64:
        return value
    dtype = torch.get_default_dtype() if entry is None else entry.dtype
    return value.to(dtype)


@contextmanager
def _as_if_compiling() -> Iterator[None]:
    """Let torch's optimizers take their path for CUDA graphs on any device, and create counts in float64.

    A number that becomes state is rounded as it would be otherwise.
    """
    default, as_tensor = torch.get_default_dtype(), torch.as_tensor

    def rounded(data: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        is_number = not isinstance(data, torch.Tensor) and dtype is torch.float64
        return (
            as_tensor(data, dtype=default, **kwargs).double() if is_number else as_tensor(data, dtype=dtype, **kwargs)
        )

    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch("torch.compiler.is_compiling", return_value=True), mock.patch("torch.as_tensor", rounded):
            yield
    finally:
        torch.set_default_dtype(default)


def _plain(
    group: dict[str, Any], index: int, hypers: dict[str, int], arguments: list[Any], *, capturable: bool
) -> dict[str, Any]:
    """A parameter group with symbolic floats, and torch's multi-tensor and fused code paths switched off."""
    plain: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        leaves = [
            arguments[hypers[path]] if (path := f"group{index}.{key}{suffix}") in hypers else leaf
            for suffix, leaf, _ in _leaves(value, None)
        ]
        plain[key] = type(value)(leaves) if isinstance(value, (tuple, list)) else leaves[0]
    for switch in ("foreach", "fused", "capturable", "differentiable"):
        if switch in plain:
            plain[switch] = capturable and switch == "capturable"
    return plain


def _held(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer holds besides its state, in words; containers are copied."""
    held = {f"its attribute {key!r}": v for key, v in vars(optimizer).items() if key not in ("state", "param_groups")}
    for index, group in enumerate(optimizer.param_groups):
        held.update({f"param_groups[{index}][{key!r}]": value for key, value in group.items()})
    return {what: contents(value) for what, value in held.items()}


def _entry(what: str, value: Any, device: torch.device) -> StateEntry:
    if isinstance(value, torch.Tensor):
        return StateEntry(tuple(value.shape), value.dtype, beside=value.device == device and device.type != "cpu")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return StateEntry((), None, 2)
    if isinstance(value, (float, torch.SymFloat)):
        return StateEntry((), None, 2.0)
    raise OptimizerError(
        f"the optimizer keeps a {type(value).__name__} in its state, {what}, which cannot be an input of a graph",
        fix="keep tensors and numbers in optimizer.state",
    )


def _sample(value: Any) -> Any:
    """A plain number in place of a symbolic one; shapes and dtypes are what matters of the rest."""
    if isinstance(value, torch.SymFloat):
        return 0.5
    if isinstance(value, torch.SymInt):
        return 2
    return value


def _symbolic(env: ShapeEnv, symbols: dict[sympy.Symbol, Input], what: Input, value: Number) -> Any:
    source = ConstantSource(str(what))
    symbol = env.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    if isinstance(symbol, sympy.Symbol):
        symbols[symbol] = what
    if isinstance(value, int):
        return env.create_symintnode(symbol, hint=value, source=source)
    return env.create_symfloatnode(symbol, hint=value, source=source)


def _guards(env: ShapeEnv, symbols: dict[sympy.Symbol, Input]) -> tuple[Guard, ...]:
    guards = []
    for guard in env.guards:
        free = sorted(guard.expr.free_symbols, key=str)
        if not free:
            continue
        assert symbols.keys() >= set(free), f"{guard.expr} was decided on something that is no input"
        text = str(guard.expr.xreplace({s: sympy.Symbol(f"x{i}") for i, s in enumerate(free)}))
        guards.append(Guard(tuple(symbols[s] for s in free), _holds(guard.expr, free), text))
    return tuple(guards)


def _holds(expression: Any, free: list[sympy.Symbol]) -> Callable[..., bool]:
    def holds(*values: Number) -> bool:
        return bool(expression.xreplace({s: sympy.sympify(v) for s, v in zip(free, values, strict=True)}))

    return holds


@contextmanager
def _symbolic_math(kind: type[torch.optim.Optimizer]) -> Iterator[None]:
    """Let ``math.sqrt`` and its kin, ``min`` and ``max`` take symbolic numbers while an optimizer is traced.

    Args:
        kind: the optimizer's class; ``min`` and ``max`` do so in the modules in which its methods are defined.
    """

    def extreme(symbolic: Callable[..., Any], bound: str) -> Callable[..., Any]:
        def of_two(one: Any, other: Any) -> Any:
            if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
                tensor, number = (one, other) if isinstance(one, torch.Tensor) else (other, one)
                return torch.clamp(tensor, **{bound: number})
            return symbolic(one, other)

        return lambda *args: reduce(of_two, args)

    def symbolic_or(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_symbolic = any(isinstance(arg, (torch.SymFloat, torch.SymInt)) for arg in args)
            return symbolic(*args) if is_symbolic and not kwargs else plain(*args, **kwargs)

        return call

    names = [name.removeprefix("_sym_") for name in dir(torch) if name.startswith("_sym_")]
    in_math: dict[str, Any] = {name: symbolic_or(getattr(math, name), getattr(torch, f"_sym_{name}")) for name in names}
    in_math["pow"] = lambda x, y: x**y
    built_in = {
        "min": symbolic_or(min, extreme(torch.sym_min, "max")),
        "max": symbolic_or(max, extreme(torch.sym_max, "min")),
    }
    methods = (inspect.unwrap(f) for base in kind.__mro__ for f in vars(base).values() if inspect.isfunction(f))
    hiding: list[tuple[dict[str, Any], str]] = []  # names of built-in functions, where nothing had them
    with mock.patch.multiple(math, **in_math):
        try:
            for own in {id(method.__globals__): method.__globals__ for method in methods}.values():
                hiding += [(own, name) for name in built_in if name not in own]
            for own, name in hiding:
                own[name] = built_in[name]
            yield
        finally:
            for own, name in hiding:
                own.pop(name, None)
