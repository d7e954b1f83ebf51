"""Regions in Triton: what they compute when interpreted, and what compilers make of them for GPUs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.interpreter import Interpreted
from tests.programs import few_examples
from tests.test_region import (
    ACTIVATIONS_AND_SUMS,
    add_and_norm,
    as_list,
    cross_entropy,
    gelu_backward_and_sum,
    norm_backward,
    normal,
    region_of,
)
from tests.test_triton import TARGETS, TOOLS
from zgraph.codegen import region_triton
from zgraph.codegen.ir import CannotWriteError
from zgraph.codegen.kernel import SLICES, TRITON
from zgraph.codegen.lowering import lower
from zgraph.codegen.region import Region, can_write
from zgraph.codegen.region_launch import Jitted, define, forms, launch
from zgraph.codegen.region_triton import RegionTritonWriter

aten = torch.ops.aten


def defined(region: Region) -> Jitted:
    assert can_write(region.body, "cuda")
    return define(lower(region.body, RegionTritonWriter), region.name)


def interpreted(region: Region, *args: Any, over: dict[int, int] | None = None) -> list[torch.Tensor]:
    """Its results, some of which lie where arguments did."""
    jitted = defined(region)
    results: Any = region.body.output_node().args[0]
    vals = [node.meta["val"] for node in results]
    outputs = [torch.empty_strided(val.shape, val.stride(), dtype=val.dtype) for val in vals]
    for place, index in (over or {}).items():
        outputs[place] = args[index]
    launch(Jitted(jitted.writer, tuple(map(Interpreted, jitted.kernels))), args, outputs)
    return outputs


def check(function: Callable[..., Any], *args: Any, least: float = 5e-7) -> None:
    """Interpreted, results are as near to those in float64 as ATen's are, twice over, or within ``least``."""
    found, eager = interpreted(region_of(function, *args), *args), as_list(function(*args))
    exact = as_list(function(*(x.double() if x.is_floating_point() else x for x in args)))
    for mine, theirs, want in zip(found, eager, exact, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        scale = want.abs().max()
        error, of_eager = ((x.double() - want).abs().max() / scale for x in (mine, theirs))
        assert error <= max(2 * of_eager, least), (error, of_eager)


def test_a_residual_and_its_norm_are_one_kernel() -> None:
    region = region_of(add_and_norm, normal(2, 3, 8), normal(3, 8), normal(8), normal(8))
    assert_expected_inline(
        region.text(TRITON),
        """\
@triton.jit
def region(i0, i1, i2, i3, o0, o1, o2, o3):
    c = tl.arange(0, 8)
    inside = c < 8
    r = tl.program_id(0).to(tl.int64)
    x0 = tl.load(i0 + (r // 3) * 24 + (r % 3) * 8 + c, mask=inside, other=0.0)
    x1 = tl.load(i1 + (r % 3) * 8 + c, mask=inside, other=0.0)
    x2 = tl.load(i2 + c, mask=inside, other=0.0)
    x3 = tl.load(i3 + c, mask=inside, other=0.0)
    v0 = x0 + x1  # add
    v1 = tl.sum(tl.where(inside, v0, 0.0), 0)
    v2 = tl.div_rn(v1, 8.0)  # div
    v3 = v0 - v2  # sub
    v4 = v3 * v3  # mul
    v5 = tl.sum(tl.where(inside, v4, 0.0), 0)
    v6 = tl.div_rn(v5, 8.0)  # div
    v7 = v6 + 9.999999747378752e-06  # add
    v8 = tl.div_rn(1.0, tl.sqrt_rn(v7))  # rsqrt
    v9 = v3 * v8  # mul
    v10 = v9 * x2  # mul
    v11 = v10 + x3  # add
    tl.store(o0 + r * 8 + c, v0, mask=inside)
    tl.store(o1 + r * 8 + c, v11, mask=inside)
    tl.store(o2 + r, v2)
    tl.store(o3 + r, v8)
""",
    )


@pytest.mark.parametrize("shape", [(2, 3, 8), (9, 33)], ids=str)
def test_norms_and_what_lies_around_them(shape: tuple[int, ...]) -> None:
    x, y, weight, bias = normal(*shape), normal(*shape[1:]), normal(shape[-1]), normal(shape[-1])
    check(add_and_norm, x, y, weight, bias)
    _, mean, scale = aten.native_layer_norm(x, [shape[-1]], weight, bias, 1e-5)
    check(norm_backward, normal(*shape, scale=3), x, mean, scale, weight, bias, y)


@pytest.mark.parametrize("function", ACTIVATIONS_AND_SUMS)
def test_activations_and_sums(function: Any) -> None:
    check(function, normal(3, 5, 37, scale=2))


def test_gradients_and_what_they_add_up_to() -> None:
    x, gradient = normal(700, 7, scale=2), normal(7, 700).t().contiguous()
    check(gelu_backward_and_sum, gradient, x)
    check(lambda g, y: aten._softmax_backward_data(g, y, -1, torch.float32) * 0.3, gradient, x)


def test_what_lies_otherwise_is_read_where_it_lies() -> None:
    turned = normal(4, 3, 2, 16).transpose(1, 2)
    check(lambda x, y, z: (x * y + z).contiguous(), turned, normal(2, 1, 16), normal(4, 2, 3, 16))


def test_what_lies_transposed_is_written_as_it_lies() -> None:
    turned = normal(4, 3, 2, 16).transpose(1, 2)
    found = interpreted(region_of(lambda x, y: x * y + x, turned, normal(3, 16)), turned, normal(3, 16))
    assert found[0].stride() == turned.stride()
    torch.testing.assert_close(found[0], turned * normal(3, 16) + turned)


def test_numbers_are_read_where_they_lie() -> None:
    """One of the device is fetched by the kernel, so that the host need not wait for it."""
    region = region_of(lambda x, y: x * y + x, normal(3, 8), torch.tensor(0.3))
    assert "x1 = tl.load(i1)" in region.text(TRITON)
    check(lambda x, y: x * y + x, normal(3, 8), torch.tensor(0.3))


@pytest.fixture(params=["held", "looped"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How an instance has its row: all of it, or 16 columns at a time."""
    if request.param == "looped":
        monkeypatch.setattr(region_triton, "LONGEST_ROW", 1)
        monkeypatch.setattr(region_triton, "COLUMNS", 16)
    return str(request.param)


def targets_of(num: int, num_classes: int) -> torch.Tensor:
    targets = torch.arange(num) * 7 % num_classes
    targets[2:5] = -100
    return targets


def test_of_a_long_row_blocks_are_gone_over_once_for_each_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_triton, "LONGEST_ROW", 16)
    monkeypatch.setattr(region_triton, "COLUMNS", 16)
    region = region_of(cross_entropy, normal(70, 33), targets_of(70, 33))
    assert_expected_inline(
        region.text(TRITON),
        """\
@triton.jit
def region_totals_0(i1, t1):
    s1 = tl.zeros((1024,), tl.float64)
    for first in range(0, 70, 1024):
        r = first + tl.arange(0, 1024).to(tl.int64)
        inside = r < 70
        x1 = tl.load(i1 + r, mask=inside, other=0.0)
        v6 = x1 != -100  # is not
        v10 = (v6).to(tl.float32)  # _to_copy
        s1 += tl.where(inside, v10, 0.0).to(tl.float64)
    v11 = tl.sum(s1, 0).to(tl.float32)
    tl.store(t1, v11)

@triton.jit
def region_1(i0, i1, t1, o1, q0):
    r = tl.program_id(0).to(tl.int64)
    v11 = tl.load(t1)
    v13 = tl.cast(1.0, tl.float32)  # full
    v14 = -v13  # neg
    v15 = tl.div_rn(v14, v11)  # div
    x1 = tl.load(i1 + r)
    v6 = x1 != -100  # is not
    v16 = tl.where(v6, v15, 0.0)  # where
    a0 = tl.full((16,), float("-inf"), tl.float32)
    for first in range(0, 33, 16):
        c = first + tl.arange(0, 16)
        inside = c < 33
        x0 = tl.load(i0 + r * 33 + c, mask=inside, other=0.0)
        a0 = tl.maximum(a0, tl.where(inside, x0, float("-inf")))
    v0 = tl.max(a0, 0)
    a3 = tl.full((16,), 0.0, tl.float32)
    for first in range(0, 33, 16):
        c = first + tl.arange(0, 16)
        inside = c < 33
        x0 = tl.load(i0 + r * 33 + c, mask=inside, other=0.0)
        v1 = x0 - v0  # sub
        v2 = tl.exp(v1)  # exp
        a3 = a3 + tl.where(inside, v2, 0.0)
    v3 = tl.sum(a3, 0)
    v4 = tl.log(v3)  # log
    tl.device_assert((v6 == 0) | ((x1 >= 0) & (x1 < 33)), "a target is out of bounds: there are 33 classes")
    at = tl.where(v6, x1, 0)
    x0p = tl.load(i0 + r * 33 + at)
    v1p = x0p - v0  # sub
    v5p = v1p - v4  # sub
    v7 = tl.where(v6, v5p, 0.0)  # pick
    v18 = tl.div_rn(1.0, v3)  # reciprocal
    v19 = v16 * v18  # mul
    tl.debug_barrier()
    for first in range(0, 33, 16):
        c = first + tl.arange(0, 16)
        inside = c < 33
        x0 = tl.load(i0 + r * 33 + c, mask=inside, other=0.0)
        v1 = x0 - v0  # sub
        v2 = tl.exp(v1)  # exp
        v17 = tl.where(c == x1, v16, 0.0)  # spread
        v20 = v2 * v19  # mul
        v21 = v17 - v20  # sub
        tl.store(o1 + r * 33 + c, v21, mask=inside)
    tl.store(q0 + r, v7)

@triton.jit
def region_totals_1(t1, o0, q0, t0):
    s0 = tl.zeros((1024,), tl.float64)
    for first in range(0, 70, 1024):
        r = first + tl.arange(0, 1024).to(tl.int64)
        inside = r < 70
        s0 += tl.load(q0 + r, mask=inside, other=0.0).to(tl.float64)
    v8 = tl.sum(s0, 0).to(tl.float32)
    tl.store(t0, v8)
    v9 = -v8  # neg
    v11 = tl.load(t1)
    v12 = tl.div_rn(v9, v11)  # div
    tl.store(o0, v12)
""",
    )


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("shape", [(70, 33), (6, 16)], ids=str)
def test_a_loss_and_its_gradient(shape: tuple[int, int]) -> None:
    check(cross_entropy, normal(*shape, scale=4), targets_of(*shape), least=2e-6)


def test_a_loss_and_the_gradient_of_a_bias() -> None:
    """Instances have several rows each, in a sweep that knows how many rows have a target."""

    def both(scores: Any, targets: Any) -> Any:
        loss, gradient = cross_entropy(scores, targets)
        return loss, gradient, gradient.sum([0], keepdim=True)

    check(both, normal(70, 33, scale=4), targets_of(70, 33), least=2e-6)


@pytest.mark.usefixtures("rows")
def test_the_gradient_of_scores_may_lie_over_them() -> None:
    x, targets = normal(70, 33, scale=4), targets_of(70, 33)
    region = region_of(cross_entropy, x, targets)
    expected = interpreted(region, x, targets)
    assert region.may_overwrite(1, 0)
    found = interpreted(region, given := x.clone(), targets, over={1: 0})
    assert found[1] is given
    assert all(map(torch.equal, found, expected))


@few_examples(6)
@given(st.integers(2, 5), st.integers(2, 70), st.sampled_from([1, 16, 64]), st.sampled_from([16, 32]))
def test_rows_of_any_length_are_held_or_gone_over(num: int, width: int, longest: int, columns: int) -> None:
    """Of sums, maxima and products of rows, whatever is masked in the last block."""
    x, y, weight, bias = normal(num, width, scale=2), normal(num, width), normal(width), normal(width)
    with mock.patch.object(region_triton, "LONGEST_ROW", longest), mock.patch.object(region_triton, "COLUMNS", columns):
        check(add_and_norm, x, y, weight, bias)
        check(lambda x: aten._softmax(x * 0.3, -1, False), x)
        check(lambda x: aten._log_softmax(x, -1, False), x)
        check(cross_entropy, x, targets_of(num, width), least=2e-6)


@pytest.mark.usefixtures("rows")
def test_rows_of_bfloat16_are_within_one_rounding() -> None:
    x = normal(5, 70, scale=2).bfloat16()
    (found,) = interpreted(region_of(lambda x: aten._softmax(x, -1, False) * 2, x), x)
    exact = torch.softmax(x.double(), -1).bfloat16().double() * 2
    assert ((found.double() - exact).abs() <= exact * 2**-7).all()


def test_what_there_are_no_kernels_for_stays_with_aten() -> None:
    x, y, weight, bias = wide((4, 10_000), torch.float32)
    long = region_of(norm_backward, y, x, torch.empty(4, 1), torch.empty(4, 1), weight, bias, y)
    assert not can_write(long.body, "cuda")
    with pytest.raises(CannotWriteError, match="rows of 10000 elements with each other"):
        RegionTritonWriter(lower(long.body, RegionTritonWriter), "region")
    assert long.runs_in("cuda") == SLICES
    with pytest.raises(CannotWriteError, match="int64"):
        lower(region_of(lambda x: (x + 1).contiguous(), torch.arange(8)).body, RegionTritonWriter)


def compiled(jitted: Any, given: list[Any], options: dict[str, Any], target: GPUTarget) -> Any:
    """What a compiler makes of a kernel for a GPU, as it would be launched."""
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature = {name: types.get(form, "fp32") for name, form in zip(jitted.arg_names, given, strict=True)}
    attributes = {(i,): [["tt.divisibility", 16]] for i, form in enumerate(given) if form in types}
    source = ASTSource(fn=jitted, signature=signature, constexprs={}, attrs=attributes)
    return compile_source(source, target=target, options=options)


def wide(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(torch.empty(each, dtype=dtype) for each in (shape, shape, shape[-1:], shape[-1:]))


def of_norm(dtype: torch.dtype) -> Region:
    return region_of(add_and_norm, *wide((64, 1024), dtype))


def of_norm_backward(dtype: torch.dtype) -> Region:
    x, y, weight, bias = wide((64, 1024), dtype)
    mean, scale = torch.empty(64, 1), torch.empty(64, 1)
    return region_of(norm_backward, y, x, mean, scale, weight, bias, y)


def of_gelu_backward(dtype: torch.dtype) -> Region:
    x, y, *_ = wide((64, 4096), dtype)
    return region_of(gelu_backward_and_sum, y, x)


def of_loss(dtype: torch.dtype) -> Region:
    return region_of(cross_entropy, torch.empty(64, 32_768, dtype=dtype), torch.empty(64, dtype=torch.int64))


def of_small_loss(dtype: torch.dtype) -> Region:
    return region_of(cross_entropy, torch.empty(64, 1024, dtype=dtype), torch.empty(64, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (of_norm, torch.float32),
        (of_norm, torch.bfloat16),
        (of_norm_backward, torch.float32),
        (of_gelu_backward, torch.float32),
        (of_gelu_backward, torch.bfloat16),
        (of_loss, torch.float32),
        (of_small_loss, torch.float32),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gpus_get_wide_accesses_and_nothing_is_spilled(
    target: GPUTarget, make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    jitted = defined(make(dtype))
    parts = jitted.writer.parts
    made = [
        compiled(kernel, forms(jitted.writer, part), part.options, target)
        for part, kernel in zip(parts, jitted.kernels, strict=True)
    ]
    made = next(
        each for part, each in zip(parts, made, strict=True) if part.num_instances == jitted.writer.num_instances
    )
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        assert int(re.search(r"vgpr_spill_count:\s+(\d+)", text)[1]) == 0  # type: ignore[index]
        width = 4 if dtype is torch.float32 or make is of_gelu_backward else 2  # 256 threads have 4 elements each
        assert re.search(rf"(?:global|buffer)_load_dwordx{width}", text)
        assert re.search(rf"(?:global|buffer)_store_dwordx{width}", text)
        return
    text = made.asm["ptx"]
    assert re.search(r"ld\.global[\w.:]*\.v4\.b32", text)
    assert re.search(r"st\.global[\w.:]*\.v4\.b32", text)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    told = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"REG:\d+ STACK:0", told), told
