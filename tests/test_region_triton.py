"""Regions in Triton: what they compute when interpreted, and what compilers make of them for GPUs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.interpreter import Interpreted
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
from zgraph.codegen.ir import CannotWriteError
from zgraph.codegen.kernel import SLICES, TRITON
from zgraph.codegen.lowering import lower
from zgraph.codegen.region import Region, can_write
from zgraph.codegen.region_triton import Jitted, RegionTritonWriter, define, forms, launch

aten = torch.ops.aten


def defined(region: Region) -> Jitted:
    assert can_write(region.body, "cuda")
    return define(lower(region.body, RegionTritonWriter), region.name)


def interpreted(region: Region, *args: Any) -> list[torch.Tensor]:
    jitted = defined(region)
    interpreter = Jitted(jitted.writer, Interpreted(jitted.rows), jitted.sums and Interpreted(jitted.sums))
    results: Any = region.body.output_node().args[0]
    vals = [node.meta["val"] for node in results]
    outputs = [torch.empty_strided(val.shape, val.stride(), dtype=val.dtype) for val in vals]
    launch(interpreter, args, outputs)
    return outputs


def check(function: Callable[..., Any], *args: Any, least: float = 5e-7) -> None:
    """Interpreted, results are as near to those in float64 as ATen's are, twice over, or within ``least``."""
    found, eager = interpreted(region_of(function, *args), *args), as_list(function(*args))
    exact = as_list(function(*(x.double() for x in args)))
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
    x0 = tl.load(i0 + (r // 3) * 24 + ((r) % 3) * 8 + c, mask=inside, other=0.0)
    x1 = tl.load(i1 + ((r) % 3) * 8 + c, mask=inside, other=0.0)
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


def test_what_instances_cannot_hold_stays_with_aten() -> None:
    long = region_of(lambda x: aten._softmax(x * 2, -1, False), torch.empty(2, 10_000))
    loss = region_of(cross_entropy, normal(4, 8), torch.arange(4))
    assert not can_write(long.body, "cuda")
    assert not can_write(loss.body, "cuda")
    with pytest.raises(CannotWriteError, match="rows of 10000 elements"):
        RegionTritonWriter(lower(long.body, RegionTritonWriter), "region")
    assert long.runs_in("cuda") == SLICES


def compiled(jitted: Any, given: list[Any], options: dict[str, Any], target: GPUTarget) -> Any:
    """What a compiler makes of a kernel for a GPU, as it would be launched."""
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
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
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gpus_get_wide_accesses_and_nothing_is_spilled(
    target: GPUTarget, make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    jitted = defined(make(dtype))
    made = compiled(jitted.rows, forms(jitted.writer), jitted.writer.options, target)
    if jitted.sums is not None:
        sums = jitted.writer.sums
        compiled(jitted.sums, [torch.float32] * (2 * len(sums)), {"num_warps": 4}, target)
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
