"""Every operator that kernels have, in every language, beside ATen: on NaN, infinities, and zeros of both signs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx

from tests.programs import Builder
from tests.test_triton import TARGETS, compiled, interpreted
from zgraph.codegen import cpp
from zgraph.codegen.elementwise import ARITHMETIC, COMPARISONS, FILLS
from zgraph.codegen.kernel import Kernel, region
from zgraph.codegen.library import find_compiler
from zgraph.codegen.triton import TritonWriter
from zgraph.program import Phase, Role

aten = torch.ops.aten

NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.1, -0.3, 1e-30, 3e30, 0.5, 2.5, -7.0, 4.0)


def every_operator() -> tuple[Kernel, list[Any]]:
    """A kernel that calls each of them at least once, with literals, numbers and tensors; and inputs of it."""
    b = Builder()
    x, y, z, mask, scalar = (
        b.input(Role.OPT_STATE, "bucket0", name, shape=shape, dtype=dtype)
        for name, shape, dtype in (
            ("x", [len(NUMBERS)], torch.float32),
            ("y", [len(NUMBERS)], torch.float32),
            ("z", [len(NUMBERS)], torch.float32),
            ("mask", [len(NUMBERS)], torch.bool),
            ("scalar", [], torch.float32),
        )
    )
    number = b.input(Role.HYPER, "number")
    calls: list[tuple[Any, ...]] = [
        (aten.add.Tensor, x, y),
        (aten.add.Scalar, x, 1, 2),
        (aten.add.Tensor, scalar, x),
        (aten.sub.Tensor, x, y),
        (aten.sub.Scalar, x, -1.0, -2.0),
        (aten.rsub.Scalar, x, -1.0),
        (aten.rsub.Scalar, x, 1.0, 2.0),
        (aten.mul.Tensor, x, number),
        (aten.div.Tensor, x, y),
        (aten.div.Tensor, scalar, y),
        *((op.default, x) for op in (aten.neg, aten.abs, aten.sign, aten.sqrt, aten.rsqrt, aten.reciprocal)),
        (aten.maximum.default, x, y),
        (aten.minimum.default, scalar, y),
        (aten.clamp.default, x, -1.0, 1.0),
        (aten.clamp.default, x, None, 0.5),
        (aten.clamp.default, x, 2.0, -0.5),
        (aten.clamp.default, x, math.nan, 0.5),
        (aten.clamp.Tensor, x, y, z),
        (aten.clamp_min.default, x, -0.3),
        (aten.clamp_max.default, x, math.inf),
        *((aten.pow.Tensor_Scalar, x, exponent) for exponent in (0.5, 1, 2)),
        *((aten.lerp.Scalar, x, y, weight) for weight in (0.1, 0.5, 0.9, 1, 2, -0.25, -2.0, number)),
        (aten.lerp.Tensor, x, y, z),
        (aten.addcmul.default, x, y, z),
        (aten.addcdiv.default, x, y, z),
        *((op.Scalar, x, number) for op in COMPARISONS),
        *((op.Scalar, x, -0.3) for op in COMPARISONS),
        *((op.Tensor, x, y) for op in COMPARISONS),
        *((op.Tensor, scalar, y) for op in COMPARISONS),
        (aten.where.self, mask, x, y),
        (aten.where.ScalarOther, mask, x, -0.5),
        (aten.where.ScalarSelf, mask, -math.inf, x),
        (aten.where.Scalar, mask, 1.0, -2.0),
        (aten.clone.default, x),
        (aten.copy.default, x, y, True),
        (aten.copy.default, x, scalar),
        (aten.full.default, [len(NUMBERS)], math.nan),
        *((op.default, x) for op in (aten.zeros_like, aten.ones_like)),
        *((op.default, [len(NUMBERS)]) for op in (aten.zeros, aten.ones)),
    ]
    results = [b.call(Phase.UPDATE, *call) for call in calls]
    results += [
        b.call(Phase.UPDATE, aten.sub.Tensor, x, y, alpha=-0.5),
        b.call(Phase.UPDATE, aten.addcmul.default, x, y, z, value=-1),
        b.call(Phase.UPDATE, aten.addcdiv.default, x, y, z, value=-0.25),
        b.call(Phase.UPDATE, aten._to_copy.default, x, dtype=torch.bool),
        b.call(Phase.UPDATE, aten._to_copy.default, mask, dtype=torch.float32),
        b.call(Phase.UPDATE, aten.full_like.default, x, True, dtype=torch.bool),
    ]
    body, outside = region(results, results)
    inputs = {number: 0.75, scalar: torch.tensor(0.1), mask: torch.tensor(NUMBERS) > 0}
    for vector, start in ((x, 0), (y, 1), (z, 5)):
        inputs[vector] = torch.tensor(NUMBERS[start:] + NUMBERS[:start])
    return Kernel("update", body, len(outside), (None,) * len(results)), [inputs[node] for node in outside]


def check(kernel: Kernel, found: list[torch.Tensor], inputs: list[Any]) -> None:
    expected = fx.Interpreter(torch.nn.Module(), graph=kernel.body).run(*inputs)
    for mine, theirs, node in zip(found, expected, kernel.body.output_node().args[0], strict=True):  # type: ignore[arg-type]
        assert mine.dtype == theirs.dtype, node.format_node()
        assert torch.allclose(mine, theirs, rtol=2e-7, atol=0, equal_nan=True), (node.format_node(), mine, theirs)


def test_every_operator_is_among_them() -> None:
    kernel, _ = every_operator()
    called = {node.target.overloadpacket for node in kernel.body.nodes if node.op == "call_function"}
    assert called == {*ARITHMETIC, *FILLS}


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
def test_in_cpp_every_operator_is_atens() -> None:
    kernel, inputs = every_operator()
    assert cpp.CppWriter.can_write(kernel.body)
    check(kernel, cpp.compile_kernel(kernel)(*inputs), inputs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_in_triton_every_operator_is_atens() -> None:
    kernel, inputs = every_operator()
    assert TritonWriter.can_write(kernel.body)
    check(kernel, interpreted(kernel, inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_compilers_take_every_operator(target: Any) -> None:
    """The interpreter takes more than they do."""
    compiled(every_operator()[0], target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_the_vectors_that_they_are_compared_with(dtype: torch.dtype) -> None:
    b = Builder()
    x = b.input(Role.OPT_STATE, "bucket0", "x", shape=[3], dtype=dtype)
    scalar = b.input(Role.OPT_STATE, "bucket0", "scalar", shape=[], dtype=torch.float32)
    number = b.input(Role.HYPER, "number")
    orders = (aten.gt, aten.ge, aten.lt, aten.le)
    masks = [b.call(Phase.UPDATE, op.Scalar, x, limit) for op in orders for limit in (0.7, number)]
    masks += [b.call(Phase.UPDATE, op.Tensor, *pair) for op in orders for pair in ((x, scalar), (scalar, x))]
    body, outside = region(masks, masks)
    given = {x: torch.tensor([0.0, 0.7, 0.9], dtype=dtype), scalar: torch.tensor(0.7), number: 0.7}
    kernel, inputs = Kernel("update", body, 3, (None,) * len(masks)), [given[node] for node in outside]
    check(kernel, interpreted(kernel, inputs), inputs)
