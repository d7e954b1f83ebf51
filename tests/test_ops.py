"""What is asked about an operator is remembered; what is asked about a kernel is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zgraph.ops import is_elementwise, is_random, is_view, may_write

aten = torch.ops.aten


def test_dropout_is_random_and_not_elementwise() -> None:
    assert is_random(aten.native_dropout.default)
    assert not is_elementwise(aten.native_dropout.default)
    assert not is_random(aten.mul.Tensor)
    assert is_elementwise(aten.mul.Tensor)


@pytest.mark.parametrize("question", [is_random, is_view, is_elementwise, may_write])
def test_a_kernel_goes_with_the_last_program_that_calls_it(question: Callable[[Any], bool]) -> None:
    def kernel() -> None: ...

    question(kernel)
    watched = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert watched() is None
