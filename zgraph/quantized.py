"""Float32 vectors on their way in 8 bits an element: blocks of 256, each with a scale of its own.

    x = scale * c / 127        c: int8; scale: the largest magnitude of the block, float32

Levels are equally far apart, as in ZeRO++ (Wang et al., 2023), so an element is off by at most 1/254 of the largest
magnitude in its block, besides rounding in float32. Zeros, and the elements of largest magnitude, are exact, and
rounding again what was rounded changes no bit. A block with infinity or NaN becomes NaN as a whole, so that what checks
for them finds them.

A block is 260 bytes, scale and codes side by side, so that parts of vectors may be cut out and put together at blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zgraph.packed import BLOCK

_LEVELS = 127
_SCALE_BYTES = 4
BLOCK_BYTES = _SCALE_BYTES + BLOCK
"""Of a block's scale and codes."""
_BLOCKS_AT_ONCE = 2**14
"""What is computed with between float32 and bytes is no larger than so many blocks."""


def quantized_numel(numel: int) -> int:
    """Bytes of ``numel`` elements, a multiple of ``BLOCK``."""
    assert numel % BLOCK == 0, numel
    return numel // BLOCK * BLOCK_BYTES


def quantize(x: torch.Tensor) -> torch.Tensor:
    """A float32 vector as bytes."""
    out = torch.empty(quantized_numel(len(x)), dtype=torch.uint8, device=x.device)
    for blocks, row in _some_at_once(x, out):
        least, most = blocks.aminmax(dim=1, keepdim=True)
        scales, codes = _parts(row)
        torch.maximum(most, -least, out=least).abs_()  # the scale of zeros has no sign
        scales.copy_(least)
        codes.copy_((blocks / least).mul_(_LEVELS).round_().nan_to_num_(0))  # 0 times a scale that is not finite is NaN
    return out


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The vector, computed in float32 and returned in ``dtype``."""
    out = torch.empty(len(data) // BLOCK_BYTES * BLOCK, dtype=dtype, device=data.device)
    for blocks, row in _some_at_once(out, data):
        scales, codes = _parts(row)
        blocks.copy_(codes.float().div_(_LEVELS).mul_(scales))
    return out


def mean_of_quantized(data: torch.Tensor, world: int) -> torch.Tensor:
    """The mean of as many vectors as there are ranks, one after the other; added up in float32, in their order."""
    first, *others = data.view(world, -1)
    total = dequantize(first)
    for other in others:
        total += dequantize(other)
    return total.div_(world)


def _some_at_once(x: torch.Tensor, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of a vector and of its bytes, as rows."""
    elements, both = x.view(-1, BLOCK), data.view(-1, BLOCK_BYTES)
    for start in range(0, len(elements), _BLOCKS_AT_ONCE):
        yield elements[start : start + _BLOCKS_AT_ONCE], both[start : start + _BLOCKS_AT_ONCE]


def _parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, as a column, and codes of blocks."""
    return rows[:, :_SCALE_BYTES].view(torch.float32), rows[:, _SCALE_BYTES:].view(torch.int8)
