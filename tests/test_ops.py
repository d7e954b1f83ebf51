"""What is asked about an operator is remembered; what is asked about a kernel is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from zgraph.ops import draws, is_elementwise, is_random, is_view, may_write

aten = torch.ops.aten


def test_dropout_is_random_and_not_elementwise() -> None:
    assert is_random(aten.native_dropout.default)
    assert not is_elementwise(aten.native_dropout.default)
    assert not is_random(aten.mul.Tensor)
    assert is_elementwise(aten.mul.Tensor)


@pytest.mark.parametrize(
    "attention",
    [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ],
)
def test_attention_draws_only_where_it_drops_out(attention: torch._ops.OpOverload) -> None:
    graph = fx.Graph()
    names = [argument.name for argument in attention._schema.arguments]
    values = [graph.placeholder(name) for name in names[: names.index("dropout_p")]]
    assert draws(graph.call_function(attention, (*values, 0.1)))
    assert not draws(graph.call_function(attention, (*values, 0.0)))
    assert draws(graph.call_function(attention, (*values, graph.placeholder("p"))))
    assert draws(graph.call_function(aten.native_dropout.default, (values[0], 0.0, True)))
    assert not draws(graph.call_function(aten.mul.Tensor, (values[0], values[0])))


@pytest.mark.parametrize("question", [is_random, is_view, is_elementwise, may_write])
def test_a_kernel_goes_with_the_last_program_that_calls_it(question: Callable[[Any], bool]) -> None:
    def kernel() -> None: ...

    question(kernel)
    watched = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert watched() is None
