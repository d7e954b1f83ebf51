# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ARG001 -- all are launched with the same arguments
"""What ``zgraph.codegen.quantizers`` runs on a GPU: one launch each. Imported where there is Triton alone."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
BYTES = tl.constexpr(260)  # of a block: its scale, and a code of each element
SMALLEST = tl.constexpr(2.0**-98)
JIT = triton.jit(do_not_specialize=["num"])  # one block is no constant: it is computed with
NEAREST = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds to whole numbers, of two to the even one


@triton.jit
def _blocks(num, ROWS: tl.constexpr):
    """Which blocks an instance computes, places in them, and whether they are there: of blocks, and of elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < num
    return row, column, inside, inside[:, None] & (column >= 0)[None, :]


@JIT
def quantize(x, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """Float32 vectors to scales and codes."""
    row, column, inside, both = _blocks(num, ROWS)
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


@JIT
def dequantize(data, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """The vectors, in the dtype of ``out``."""
    row, column, inside, both = _blocks(num, ROWS)
    values = _values(data, row, column, inside)
    tl.store(out + row[:, None] * BLOCK + column[None, :], values.to(out.dtype.element_ty), mask=both)


@JIT
def mean(data, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """The mean of as many vectors as there are ranks, added up in their order."""
    row, column, inside, both = _blocks(num, ROWS)
    total = _values(data, row, column, inside)
    for rank in tl.range(1, WORLD):
        total += _values(data, row + rank * num, column, inside)
    whole = tl.full(total.shape, WORLD * 1.0, tl.float32)
    tl.store(out + row[:, None] * BLOCK + column[None, :], tl.div_rn(total, whole), mask=both)


@JIT
def pack(x, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """Float32 vectors to codes of their fourth roots, and behind all of these scales."""
    row, column, inside, both = _blocks(num, ROWS)
    values = tl.load(x + row[:, None] * BLOCK + column[None, :], mask=both, other=0.0)
    most = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.where(most < SMALLEST, 0.0, most)
    divisor = scale[:, None] + tl.zeros_like(values)
    part = tl.where(divisor == 0.0, 0.0, tl.div_rn(values, divisor))
    root = tl.sqrt_rn(tl.sqrt_rn(tl.abs(part)))
    level = (root * 127.0 + NEAREST) - NEAREST
    level = tl.where(level < 1.0, 1.0, level)
    level = tl.where(part > 0.0, level, tl.where(part < 0.0, -level, 0.0))
    codes = out.to(tl.pointer_type(tl.int8))
    tl.store(codes + row[:, None] * BLOCK + column[None, :], level.to(tl.int8), mask=both)
    tl.store((codes + num.to(tl.int64) * BLOCK).to(tl.pointer_type(tl.float32)) + row, scale, mask=inside)


@JIT
def unpack(data, out, num, WORLD: tl.constexpr, ROWS: tl.constexpr):
    """The vectors that were packed."""
    row, column, inside, both = _blocks(num, ROWS)
    codes = data.to(tl.pointer_type(tl.int8))
    level = tl.load(codes + row[:, None] * BLOCK + column[None, :], mask=both, other=0).to(tl.float32)
    scales = (codes + num.to(tl.int64) * BLOCK).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales + row, mask=inside, other=0.0)
    part = tl.div_rn(level, tl.full(level.shape, 127.0, tl.float32))
    square = part * part
    value = tl.abs(square * square * scale[:, None])
    tl.store(out + row[:, None] * BLOCK + column[None, :], tl.where(part < 0.0, -value, value), mask=both)


FUNCTIONS: dict[str, Any] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "dequantize_bf16": dequantize,
    "mean": mean,
    "pack": pack,
    "unpack": unpack,
}
