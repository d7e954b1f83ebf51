"""Where torch's tracing internals are touched, here and in ``shortcuts``: run a function on fake tensors, get ATen.

``trace`` records for every node where it came from: the phase of the step, the path of the user's module and the
user's source line. Backward nodes inherit both from the forward operator that they differentiate, joined by
autograd's sequence number.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import sympy.core.cache
import sympy.tensor.tensor
import torch
import torch._inductor.compiler_bisector
import torch.export._trace  # tracing imports these three on first use; better now than in the first step
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    _temp_remove_metadata_torch_function_mode,
    get_proxy_mode,
    make_fx,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from zgraph.collector import collect_garbage, collector_paused, is_large
from zgraph.errors import CaptureError, quoted
from zgraph.program import Input, Origin, Phase, Role, copy_graph
from zgraph.shortcuts import Shortcuts

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OPTIM = os.path.join(_TORCH, "optim") + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = sysconfig.get_path("purelib") + os.sep
_OPTIM_BASE = os.path.join(_OPTIM, "optimizer.py")
# Where functions of symbolic numbers come from.
_SYMBOLIC = ("torch.fx.experimental.", "torch.utils._sympy.", "_operator")
_LruCache = type(lru_cache(lambda: None))
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_MODELS = (f"{os.sep}demo.py", f"{os.sep}presets.py")  # zgraph's own, which are traced like anybody's


def is_user_file(filename: str) -> bool:
    """Whether a source file is the user's (or an optimizer's), rather than torch's or zgraph's machinery."""
    if filename.startswith(_OPTIM):
        return filename != _OPTIM_BASE
    if filename.startswith(_STDLIB) and not filename.startswith(_PACKAGES):
        return False
    return not filename.startswith((_TORCH, "<")) and (not filename.startswith(_HERE) or filename.endswith(_MODELS))


def user_source() -> str | None:
    """``file:line (function)`` of the innermost user frame on the stack, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if is_user_file(code.co_filename):
            return f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return None


def source_of_error(error: BaseException) -> str | None:
    """The innermost user frame of an exception's traceback, with its line of code."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_user_file(code.co_filename):
            found = quoted(f"{code.co_filename}:{traceback.tb_lineno} ({code.co_name})")
        traceback = traceback.tb_next
    return found


class Recorder:
    """Gives every node created during a trace its ``Origin``."""

    def __init__(self, phase: Phase, names: dict[int, str] | None = None) -> None:
        self.phase = phase
        self._names = names or {}
        self._modules: list[str] = [""]
        self._by_sequence_nr: dict[int, Origin] = {}
        self._override: Origin | None = None
        self.last_source: str | None = None  # of the node recorded last

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record the nodes of the trace that is running now; to be entered inside the traced function."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        original = tracer.create_node

        def create_node(*args: Any, **kwargs: Any) -> fx.Node:
            node = original(*args, **kwargs)
            if node.op != "placeholder":
                node.meta["origin"] = self._origin()
                self.last_source = node.meta["origin"].source
            return node

        tracer.create_node = create_node  # type: ignore[method-assign]
        enter = torch.nn.modules.module.register_module_forward_pre_hook(self._enter)
        leave = torch.nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()
            del tracer.create_node

    @contextmanager
    def as_if(self, origin: Origin | None) -> Iterator[None]:
        """Nodes created inside take this origin (used when a graph is traced again)."""
        before, self._override = self._override, origin
        try:
            yield
        finally:
            self._override = before

    def enter_backward(self, loss: torch.Tensor) -> None:
        """Join every autograd node below ``loss`` to its forward operator; later nodes are BACKWARD ones."""
        self.phase = Phase.BACKWARD
        seen: set[Any] = set()
        stack = [loss.grad_fn]
        while stack:
            function = stack.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            origin = self._by_sequence_nr.get(function._sequence_nr())
            if origin is not None:
                function.register_prehook(self._joined(origin))
            stack.extend(next_function for next_function, _ in function.next_functions)

    def _joined(self, origin: Origin) -> Callable[[Any], None]:
        backward = Origin(Phase.BACKWARD, origin.module, origin.source)

        def before(_: Any) -> None:
            self._override = backward

        return before

    def _origin(self) -> Origin:
        if self._override is not None:
            return self._override
        origin = Origin(self.phase, self._modules[-1], user_source())
        if self.phase is Phase.FORWARD:
            self._by_sequence_nr.setdefault(torch.autograd._get_sequence_nr() - 1, origin)  # type: ignore[attr-defined]
        return origin

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        self._modules.append(self._names.get(id(module), self._modules[-1]))

    def _leave(self, module: torch.nn.Module, _args: Any, _output: Any) -> None:
        self._modules.pop()


class _UndoWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Undo what a traced function writes to real tensors: writing is for the graph to do, each time it runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in pytree.tree_leaves(given.get(argument.name)):
                        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
                            self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._before:
            with _disable_current_modes():
                self._before[id(tensor)] = tensor, tensor.detach().clone()

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, before in reversed(self._before.values()):
                tensor.copy_(before)


@contextmanager
def python_generators_kept() -> Iterator[list[str]]:
    """Put the global generators of Python and numpy back; gives the names of those that were drawn from, at the end.

    What they give becomes a constant of the graph, where torch's generator becomes an operator.
    """
    drawn: list[str] = []
    before, numpy_before = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 -- the user's generator
    try:
        yield drawn
    finally:
        if random.getstate() != before:
            drawn.append("random")
            random.setstate(before)
        if str(np.random.get_state(legacy=False)) != str(numpy_before):  # noqa: NPY002
            drawn.append("numpy.random")
            np.random.set_state(numpy_before)  # noqa: NPY002


def fake_mode(*, scalars: bool) -> FakeTensorMode:
    """A mode whose tensors have shapes but no data; with ``scalars``, ``.item()`` gives a symbolic number."""
    if scalars:
        return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, static_shapes=True)
    return FakeTensorMode(allow_non_fake_inputs=True)


def forget(graph: fx.Graph) -> None:
    """Drop what torch remembers of the operators it has traced; of a large graph, also what is known of its numbers.

    That is some tens of megabytes, and lies scattered over all the memory that tracing has used, so that little of that
    could be given back.
    """
    FakeTensorMode.cache_clear()
    if is_large(graph):
        sympy.core.cache.clear_cache()
        for cache in gc.get_objects():  # torch keeps them in closures
            if type(cache) is _LruCache and str(cache.__module__).startswith(_SYMBOLIC):
                cache.cache_clear()


def trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    mode: FakeTensorMode,
    recorder: Recorder,
    *,
    fold_literals: bool = True,
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Run ``function`` on fake ``args`` and record its ATen operators.

    With ``fold_literals`` (torch's own behaviour) ``torch.tensor(3).item()`` is 3 while tracing; without, it is a
    symbolic number like any other.

    Returns:
        The graph (placeholders are the flattened leaves of ``args``; real tensors met on the way become further
        CONSTANT placeholders at the end) and those constants by name.
    """

    writes = _UndoWrites()

    def recorded(*inner: Any) -> Any:
        proxies = get_proxy_mode()
        assert isinstance(proxies, ProxyTorchDispatchMode)
        shortcuts = Shortcuts(proxies, mode)
        # The mode that is removed notes the name of every function and attribute that Python reads, for nobody here.
        with _temp_remove_metadata_torch_function_mode(), recorder.attached(), writes, shortcuts.attached():
            return function(*inner)

    try:
        limit = int(fold_literals)  # elements up to which a literal's value is tracked
        with (
            collector_paused(),
            mock.patch("torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT", limit),
            mock.patch("torch.fx.experimental.proxy_tensor.CONSTANT_NUMEL_LIMIT", limit),
            mock.patch("torch._inductor.fx_passes.dedupe_symint_uses.dedupe_symints"),  # numbers are recorded once
            mode,
            torch.autograd.set_multithreading_enabled(False),
            _use_lazy_graph_module(True),  # nobody runs the module, so nobody needs its code
        ):
            module = make_fx(recorded)(*args)
    finally:
        writes.undo()
    graph, constants = _copy(module, mode)
    del module
    collect_garbage(graph)
    return graph, constants


def _copy(module: fx.GraphModule, mode: FakeTensorMode) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """A copy of a traced graph with nothing but values and origins on its nodes; its constants as placeholders."""
    graph = copy_graph(module.graph)
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in ("val", "origin") if key in node.meta}
    return graph, _lift_constants(graph, module, mode)


def _lift_constants(graph: fx.Graph, module: fx.GraphModule, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Turn ``get_attr`` nodes into CONSTANT placeholders after the existing ones."""
    constants: dict[str, torch.Tensor] = {}
    by_attribute: dict[str, fx.Node] = {}
    last = next(reversed(list(graph.find_nodes(op="placeholder"))))
    for node in list(graph.find_nodes(op="get_attr")):
        attribute = str(node.target)
        if attribute not in by_attribute:
            name = f"constant{len(constants)}"
            value = getattr(module, attribute)
            if not isinstance(value, torch.Tensor):
                user = next(iter(node.users))
                raise CaptureError(
                    f"{user.target} is given a {type(value).__name__}, which no input of a graph can be",
                    where=quoted(user.meta["origin"].source),
                    fix="leave generator= out: torch's global generator is advanced as in plain PyTorch"
                    if isinstance(value, torch.Generator)
                    else "compute with tensors and numbers",
                )
            constants[name] = value.detach()
            with graph.inserting_after(last):
                last = by_attribute[attribute] = graph.placeholder(name)
            last.meta["input"] = Input(Role.CONSTANT, name)
            last.meta["val"] = mode.from_tensor(value.detach())
        node.replace_all_uses_with(by_attribute[attribute])
        graph.erase_node(node)
    return constants
