"""Float32 tensors in 8 bits an element: blocks of 256, each with a scale of its own.

    x = sign(c) * scale * (|c| / 127)^4        c: int8; scale: the largest magnitude of the block, float32

The fourth power gives small elements the precision that second moments need, which span many orders of magnitude.
Fourth roots are what is rounded, so the error is bounded in them: for an element ``x`` that becomes ``y``,

    | (|y| / scale)^(1/4) - (|x| / scale)^(1/4) | <= 1/254, or < 1/127 where x is not 0 and would round to it

besides rounding in float32: what is not 0 stays so, for it may be divided by. Signs, zeros and the largest element of
each block are exact, and packing again what was unpacked changes no bit. A block whose scale is below 2^-98, of which
float32 cannot hold the smallest level, becomes zero; in one with NaN or infinity, nothing else is kept.

Block-wise quantised optimizer state is from Dettmers et al., 2022, 8-bit optimizers via block-wise quantization.
"""

from __future__ import annotations

import torch

BLOCK = 256
"""Elements that have one scale."""

_LEVELS = 127
_SCALE_BYTES = 4
SMALLEST = 2.0**-98
"""Blocks with no larger magnitude become zero."""


def packed_numel(numel: int) -> int:
    """Bytes of ``numel`` packed elements, a multiple of ``BLOCK``."""
    assert numel % BLOCK == 0, numel
    return numel + numel // BLOCK * _SCALE_BYTES


def unpacked_numel(num_bytes: int) -> int:
    """Elements in so many bytes."""
    return num_bytes // (BLOCK + _SCALE_BYTES) * BLOCK


def pack(x: torch.Tensor) -> torch.Tensor:
    """A float32 vector as bytes: the codes of all elements, then the scales of all blocks."""
    return pack_into(x, torch.empty(packed_numel(len(x)), dtype=torch.uint8, device=x.device))


def pack_into(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The same, in memory that is there."""
    blocks, codes, scales = x.view(-1, BLOCK), *_parts(out)
    torch.amax(blocks.abs(), 1, keepdim=True, out=scales)
    scales[scales < SMALLEST] = 0
    parts = torch.where(scales == 0, 0.0, blocks / scales)
    levels = parts.abs().sqrt_().sqrt_().mul_(_LEVELS).round_().clamp_(min=1)
    codes.copy_(levels.mul_(parts.sign_()))
    return out


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The vector."""
    codes, scales = _parts(packed)
    parts = codes.float().div_(_LEVELS)
    return (parts.square().square_() * scales).copysign_(parts).view(-1)


def _parts(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, as rows of blocks and as a column, in the memory of ``packed``."""
    numel = unpacked_numel(len(packed))
    return packed[:numel].view(torch.int8).view(-1, BLOCK), packed[numel:].view(torch.float32).view(-1, 1)
