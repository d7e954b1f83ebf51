"""Tracing leaves nothing behind but its graph."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph_module import _loader

from zgraph import collector
from zgraph.program import Phase
from zgraph.tracing import Recorder, fake_mode, forget, trace


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.Graph:
    mode = fake_mode(scalars=True)
    with mode:
        args = tuple(torch.empty(shape) for shape in shapes)
    graph, _ = trace(function, args, mode, Recorder(Phase.UPDATE), fold_literals=False)
    return graph


def test_no_python_code_is_made_of_a_trace() -> None:
    before = dict(_loader.eval_cache)
    traced(lambda x: [x.sin() + 1], (3,))
    assert _loader.eval_cache == before  # torch keeps such code for good


def test_of_a_large_graph_nothing_is_remembered(monkeypatch: Any) -> None:
    monkeypatch.setattr(collector, "_LARGE", 3)

    def power(x: torch.Tensor, count: torch.Tensor) -> list[torch.Tensor]:
        return [x / (1 - 0.9 ** count.item())]

    def remembered() -> list[str]:
        gc.unfreeze()  # what is frozen is not among the objects
        caches = [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]
        modules = ("torch.fx.experimental.", "sympy.core.function")
        names = [c.__qualname__ for c in caches if c.__module__.startswith(modules) and c.cache_info().currsize]
        return names + ["fake tensors"] * bool(FakeTensorMode.cache_info().size)

    graph = traced(power, (3,), ())
    assert {"fake tensors", "_sympy_float_pow", "Application.__new__"} <= {*remembered()}
    forget(graph)
    assert remembered() == []
