# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ARG001 -- all are launched with the same arguments
"""What ``zgraph.codegen.quantizers`` runs on a GPU: one launch each. Imported where there is Triton alone."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
BYTES = tl.constexpr(260)  # of a block: its scale, and a code of each element
NEAREST = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds to whole numbers, of two to the even one


@triton.jit
def quantize(x, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """Float32 vectors to scales and codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < num
    both = inside[:, None] & (column >= 0)[None, :]
    values = tl.load(x + row[:, None] * BLOCK + column[None, :], mask=both, other=0.0)
    # Magnitudes have the order of their bits, in which NaN comes last.
    most = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = most.to(tl.float32, bitcast=True)
    level = tl.div_rn(values, scale[:, None] + tl.zeros_like(values)) * 127.0
    level = tl.where(level == level, (level + NEAREST) - NEAREST, 0.0)
    tl.store(out.to(tl.pointer_type(tl.float32)) + row * (BYTES // 4), scale, mask=inside)
    codes = out.to(tl.pointer_type(tl.int8)) + row[:, None] * BYTES + 4 + column[None, :]
    tl.store(codes, level.to(tl.int8), mask=both)


@triton.jit
def _values(data, row, column, inside):
    """What blocks are, in float32."""
    scale = tl.load(data.to(tl.pointer_type(tl.float32)) + row * (BYTES // 4), mask=inside, other=0.0)
    both = inside[:, None] & (column >= 0)[None, :]
    codes = tl.load(data.to(tl.pointer_type(tl.int8)) + row[:, None] * BYTES + 4 + column[None, :], mask=both, other=0)
    level = codes.to(tl.float32)
    return tl.div_rn(level, tl.full(level.shape, 127.0, tl.float32)) * scale[:, None]


@triton.jit
def dequantize(data, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """The vectors, in the dtype of ``out``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < num
    values = _values(data, row, column, inside)
    both = inside[:, None] & (column >= 0)[None, :]
    tl.store(out + row[:, None] * BLOCK + column[None, :], values.to(out.dtype.element_ty), mask=both)


@triton.jit
def mean(data, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """The mean of as many vectors as there are ranks, added up in their order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < num
    total = _values(data, row, column, inside)
    for rank in tl.range(1, WORLD):
        total += _values(data, row + rank * num, column, inside)
    both = inside[:, None] & (column >= 0)[None, :]
    whole = tl.full(total.shape, WORLD * 1.0, tl.float32)
    tl.store(out + row[:, None] * BLOCK + column[None, :], tl.div_rn(total, whole), mask=both)


FUNCTIONS: dict[str, Any] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "dequantize_bf16": dequantize,
    "mean": mean,
}
