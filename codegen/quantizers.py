"""Vectors to 8 bits an element and back in one pass over memory: in C++ on a CPU, in Triton on a GPU.

Bit for bit what ``zgraph.quantized``, of what travels, and ``zgraph.packed``, of state, compute by several calls of
ATen on a CPU, which are what runs where nothing compiles these. (On a GPU ATen multiplies by the inverse of 127, which
these do not.) A block's bytes are read and written once; the mean over ranks needs no vector in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from zgraph import ops, packed, quantized
from zgraph.codegen import library, triton
from zgraph.codegen.region_cpp import BFLOAT16
from zgraph.packed import BLOCK, SMALLEST, packed_numel, unpacked_numel
from zgraph.quantized import BLOCK_BYTES, quantized_numel

_HEAD = f"""{BFLOAT16}
enum {{ BLOCK = {BLOCK}, BYTES = {BLOCK_BYTES} }};

static inline float scale_of(const unsigned char *row) {{ float x; __builtin_memcpy(&x, row, 4); return x; }}

// The largest magnitude. They have the order of their bits, in which NaN comes last.
static inline float largest(const float *block) {{
    unsigned most = 0;
    for (int i = 0; i < BLOCK; i++) {{
        unsigned bits;
        __builtin_memcpy(&bits, block + i, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }}
    return bits_of(most);
}}

"""

SOURCE = f"""{_HEAD}extern "C" void zgraph_quantize(long num, int threads, const float *x, unsigned char *out, int) {{
    #pragma omp parallel for num_threads(threads) if (num > 64)
    for (long b = 0; b < num; b++) {{
        const float *block = x + b * BLOCK;
        unsigned char *row = out + b * BYTES;
        const float scale = largest(block);
        __builtin_memcpy(row, &scale, 4);
        signed char *codes = (signed char *)row + 4;
        for (int i = 0; i < BLOCK; i++) {{
            const float level = __builtin_rintf(block[i] / scale * 127.0f);
            codes[i] = (signed char)(int)(level == level ? level : 0.0f);
        }}
    }}
}}

extern "C" void zgraph_dequantize(long num, int threads, const unsigned char *data, float *out, int) {{
    #pragma omp parallel for num_threads(threads) if (num > 64)
    for (long b = 0; b < num; b++) {{
        const signed char *codes = (const signed char *)data + b * BYTES + 4;
        const float scale = scale_of(data + b * BYTES);
        for (int i = 0; i < BLOCK; i++) out[b * BLOCK + i] = (float)codes[i] / 127.0f * scale;
    }}
}}

extern "C" void zgraph_dequantize_bf16(long num, int threads, const unsigned char *data, unsigned short *out, int) {{
    #pragma omp parallel for num_threads(threads) if (num > 64)
    for (long b = 0; b < num; b++) {{
        const signed char *codes = (const signed char *)data + b * BYTES + 4;
        const float scale = scale_of(data + b * BYTES);
        for (int i = 0; i < BLOCK; i++) out[b * BLOCK + i] = narrow((float)codes[i] / 127.0f * scale);
    }}
}}

extern "C" void zgraph_mean(long num, int threads, const unsigned char *data, float *out, int world) {{
    #pragma omp parallel for num_threads(threads) if (num > 64)
    for (long b = 0; b < num; b++) {{
        float *total = out + b * BLOCK;
        for (int rank = 0; rank < world; rank++) {{
            const unsigned char *row = data + (rank * num + b) * BYTES;
            const signed char *codes = (const signed char *)row + 4;
            const float scale = scale_of(row);
            for (int i = 0; i < BLOCK; i++) {{
                const float x = (float)codes[i] / 127.0f * scale;
                total[i] = rank ? total[i] + x : x;
            }}
        }}
        for (int i = 0; i < BLOCK; i++) total[i] /= (float)world;
    }}
}}
"""

SOURCE += f"""extern "C" void zgraph_pack(long num, int threads, const float *x, signed char *out, int) {{
    #pragma omp parallel for num_threads(threads) if (num > 64)
    for (long b = 0; b < num; b++) {{
        const float *block = x + b * BLOCK;
        const float most = largest(block), scale = most < {SMALLEST!r}f ? 0.0f : most;
        __builtin_memcpy(out + num * BLOCK + b * 4, &scale, 4);
        for (int i = 0; i < BLOCK; i++) {{
            const float part = scale == 0.0f ? 0.0f : block[i] / scale;
            const float root = __builtin_sqrtf(__builtin_sqrtf(__builtin_fabsf(part)));
            const float level = __builtin_rintf(root * 127.0f), shown = level < 1.0f ? 1.0f : level;
            out[b * BLOCK + i] = (signed char)(int)(part > 0.0f ? shown : part < 0.0f ? -shown : 0.0f);
        }}
    }}
}}

extern "C" void zgraph_unpack(long num, int threads, const signed char *data, float *out, int) {{
    #pragma omp parallel for num_threads(threads) if (num > 64)
    for (long b = 0; b < num; b++) {{
        const float scale = scale_of((const unsigned char *)data + num * BLOCK + b * 4);
        for (int i = 0; i < BLOCK; i++) {{
            const float part = (float)data[b * BLOCK + i] / 127.0f, square = part * part;
            out[b * BLOCK + i] = __builtin_copysignf(square * square * scale, part);
        }}
    }}
}}
"""

_DEQUANTIZE = {torch.float32: "dequantize", torch.bfloat16: "dequantize_bf16"}


def prepare(device_type: str) -> None:
    """Compile for a CPU, before a step needs it."""
    if device_type == "cpu" and "cpu" in _compiled():
        library.load(SOURCE)


def why_not(device_type: str) -> str | None:
    """What keeps these from being compiled here; None if nothing does."""
    if device_type in _compiled() or device_type not in ("cpu", "cuda"):
        return None
    return library.problem() if device_type == "cpu" else "Triton is not installed"


def quantize(x: torch.Tensor) -> torch.Tensor:
    """See ``zgraph.quantized.quantize``."""
    if x.device.type not in _compiled():
        return quantized.quantize(x)
    out = torch.empty(quantized_numel(len(x)), dtype=torch.uint8, device=x.device)
    _run("quantize", x, out, len(x) // BLOCK)
    return out


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See ``zgraph.quantized.dequantize``."""
    if data.device.type not in _compiled() or dtype not in _DEQUANTIZE:
        return quantized.dequantize(data, dtype)
    num = len(data) // BLOCK_BYTES
    out = torch.empty(num * BLOCK, dtype=dtype, device=data.device)
    _run(_DEQUANTIZE[dtype], data, out, num)
    return out


def mean_of_quantized(data: torch.Tensor, world: int) -> torch.Tensor:
    """See ``zgraph.quantized.mean_of_quantized``."""
    if data.device.type not in _compiled():
        return quantized.mean_of_quantized(data, world)
    num = len(data) // world // BLOCK_BYTES
    out = torch.empty(num * BLOCK, dtype=torch.float32, device=data.device)
    _run("mean", data, out, num, world)
    return out


def pack_into(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See ``zgraph.packed.pack_into``."""
    if x.device.type not in _compiled():
        return packed.pack_into(x, out)
    _run("pack", x, out, len(x) // BLOCK)
    return out


def pack(x: torch.Tensor) -> torch.Tensor:
    """See ``zgraph.packed.pack``."""
    return pack_into(x, torch.empty(packed_numel(len(x)), dtype=torch.uint8, device=x.device))


def unpack(data: torch.Tensor) -> torch.Tensor:
    """See ``zgraph.packed.unpack``."""
    if data.device.type not in _compiled():
        return packed.unpack(data)
    out = torch.empty(unpacked_numel(len(data)), dtype=torch.float32, device=data.device)
    _run("unpack", data, out, len(out) // BLOCK)
    return out


IN_ONE_PASS: dict[Any, Callable[..., torch.Tensor]] = {
    ops.quantize: quantize,
    ops.dequantize: dequantize,
    ops.mean_of_quantized: mean_of_quantized,
    ops.pack_state: pack,
    ops.pack_state_into: pack_into,
    ops.unpack_state: unpack,
}
"""What a step calls instead of operators."""


ROWS = 8
"""Blocks of a program instance in Triton: 2048 elements for its 128 threads."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of Triton's compiler."""


@cache
def _compiled() -> frozenset[str]:
    """Devices for which something compiles these here."""
    found = {"cpu": library.problem() is None, "cuda": triton.is_available() and torch.cuda.is_available()}
    return frozenset(device for device, is_so in found.items() if is_so)


def _run(name: str, given: torch.Tensor, out: torch.Tensor, num: int, world: int = 1) -> None:
    """Compute so many blocks."""
    assert given.dtype in (torch.float32, torch.uint8), given.dtype
    assert out.is_contiguous(), out.stride()
    assert out.nbytes == num * (BLOCK_BYTES if out.dtype is torch.uint8 else BLOCK * out.itemsize), (out.shape, num)
    if given.device.type == "cpu":
        function = getattr(library.load(SOURCE), f"zgraph_{name}")
        given = given.contiguous()
        pointers = ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr())
        function(ctypes.c_long(num), torch.get_num_threads(), *pointers, world)
        return
    with torch.cuda.device_of(given):  # type: ignore[no-untyped-call]
        launch(in_triton()[name], given, out, num, world)


def launch(jitted: Any, given: torch.Tensor, out: torch.Tensor, num: int, world: int) -> None:
    """Run what ``in_triton`` gave, or an interpreter of it."""
    if num:
        jitted[-(-num // ROWS),](given.contiguous(), out, num, WORLD=world, ROWS=ROWS, **OPTIONS)


@cache
def in_triton() -> dict[str, Any]:
    """The same functions by name, as ``triton.jit`` makes them: ``function(given, out, num, WORLD, ROWS)``."""
    from zgraph.codegen import quantizers_triton

    return quantizers_triton.FUNCTIONS
