"""Run Triton's kernels on a CPU, one by one, in a process that also compiles others.

Triton's interpreter is made for whole processes: what a kernel calls (``tl.sum``) is compiled unless everything is
interpreted, and what a call inside of a kernel has patched is never put back.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


class Interpreted:
    """A kernel that is interpreted when it is launched: ``Interpreted(kernel)[grid](*args)``."""

    def __init__(self, jitted: Any) -> None:
        self._function = interpreter.InterpretedFunction(jitted.fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with _interpreting():
                self._function[grid](*args, **kwargs)

        return launch


@contextmanager
def _interpreting() -> Iterator[None]:
    """Interpret whatever is called, and patch Triton's language once, until the end."""
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patched = interpreter._patch_lang(everything)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

    nothing = interpreter._LangPatchScope()
    try:
        with (
            mock.patch.object(JITFunction, "__call__", call),
            mock.patch.object(interpreter, "_patch_lang", return_value=nothing),
        ):
            yield
    finally:
        patched.restore()
