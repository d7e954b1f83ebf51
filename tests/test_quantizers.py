"""What quantises in one pass gives the very bits that the calls of ATen give, also of numbers that are none."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zgraph
from tests.interpreter import Interpreted
from tests.programs import few_examples
from tests.test_triton import TARGETS, TOOLS
from zgraph import packed, quantized
from zgraph.codegen import library, quantizers
from zgraph.codegen.quantizers import OPTIONS, ROWS, in_triton, launch
from zgraph.packed import BLOCK
from zgraph.quantized import BLOCK_BYTES, quantized_numel

needs_compiler = pytest.mark.skipif(library.problem() is not None, reason="there is no C++ compiler")

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-38, 3.4e38, 0.5, 1.0, 126.5, 127.0]


def vector(seed: int, num_blocks: int) -> torch.Tensor:
    """Blocks of many magnitudes; a fourth of them with numbers that are special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_blocks, BLOCK, generator=generator)
    x *= torch.exp2(torch.randint(-60, 60, (num_blocks, 1), generator=generator))
    for row in range(seed % 4, num_blocks, 4):
        at = torch.randint(BLOCK, (5,), generator=generator)
        x[row, at] = torch.tensor([SPECIAL[(seed + row + i) % len(SPECIAL)] for i in range(5)])
    for row in range(seed % 7, num_blocks, 7):
        x[row] = SPECIAL[(seed + row) % 2]
    return x.view(-1)


def in_cpp(name: str, x: torch.Tensor, *more: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(quantizers, name)(x, *more)
    return found


def interpreted(name: str, x: torch.Tensor, *more: Any) -> torch.Tensor:
    world, dtype = 1, torch.float32
    if name in ("quantize", "pack"):
        num = len(x) // BLOCK
        out = torch.empty(quantized_numel(len(x)), dtype=torch.uint8)
    elif name == "unpack":
        num = len(x) // BLOCK_BYTES
        out = torch.empty(num * BLOCK)
    else:
        world, dtype = (more[0], dtype) if name == "mean_of_quantized" else (1, *more)
        num = len(x) // world // BLOCK_BYTES
        out = torch.empty(num * BLOCK, dtype=dtype)
    launch(Interpreted(in_triton()[name.removesuffix("_of_quantized")]), x, out, num, world)
    return out


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but that a NaN may have other bits."""
    if found.dtype is torch.uint8:
        one, other = (each.view(-1, BLOCK_BYTES) for each in (found, expected))
        assert torch.equal(one[:, 4:], other[:, 4:])
        found, expected = (each[:, :4].contiguous().view(torch.float32) for each in (one, other))
    both_nan = found.isnan() & expected.isnan()
    bits = torch.int32 if found.dtype is torch.float32 else torch.int16
    assert torch.equal(found.masked_fill(both_nan, 0).view(bits), expected.masked_fill(both_nan, 0).view(bits))


@pytest.mark.parametrize("run", [pytest.param(in_cpp, marks=needs_compiler), interpreted], ids=["C++", "Triton"])
@given(st.integers(0, 2**20), st.sampled_from([1, 3, ROWS, 67]), st.sampled_from([1, 2, 3]))
@few_examples(12)
def test_one_pass_gives_the_bits_of_several(
    run: Callable[..., torch.Tensor], seed: int, num_blocks: int, world: int
) -> None:
    vectors = [vector(seed + rank, num_blocks) for rank in range(world)]
    sent = []
    for x in vectors:
        expected = quantized.quantize(x)
        assert_same(run("quantize", x), expected)
        # Triton's interpreter cuts bits off where GPUs round.
        for dtype in (torch.float32, *([] if run is interpreted else [torch.bfloat16])):
            assert_same(run("dequantize", expected, dtype), quantized.dequantize(expected, dtype))
        sent.append(expected)
    together = torch.cat(sent)
    assert_same(run("mean_of_quantized", together, world), quantized.mean_of_quantized(together, world))


@pytest.mark.parametrize("run", [pytest.param(in_cpp, marks=needs_compiler), interpreted], ids=["C++", "Triton"])
@given(st.integers(0, 2**20), st.sampled_from([1, 3, ROWS, 67]))
@few_examples(12)
def test_state_is_packed_to_the_same_bits(run: Callable[..., torch.Tensor], seed: int, num_blocks: int) -> None:
    x = vector(seed, num_blocks)
    expected, found = packed.pack(x), run("pack", x)
    assert torch.equal(found[: len(x)], expected[: len(x)])
    assert_same(*(each[len(x) :].view(torch.float32) for each in (found, expected)))
    assert_same(run("unpack", expected), packed.unpack(expected))
    assert_same(run("unpack", run("pack", packed.unpack(expected))), packed.unpack(expected))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads: int) -> None:
    x, before = vector(3, 1000), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(quantizers.quantize(x), quantized.quantize(x))
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_and_in_other_dtypes_aten_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vector(0, 5)
    data = quantized.quantize(x)
    assert_same(quantizers.dequantize(data, torch.float16).float(), quantized.dequantize(data, torch.float16).float())
    monkeypatch.setattr(quantizers, "_compiled", frozenset)
    assert torch.equal(quantizers.quantize(x), data)
    assert_same(quantizers.mean_of_quantized(data, 1), quantized.mean_of_quantized(data, 1))


@needs_compiler
def test_what_has_gaps_is_read_as_it_is() -> None:
    x = vector(5, 300)
    apart = torch.stack([x, torch.full_like(x, 7.0)], 1)[:, 0]
    assert_same(quantizers.quantize(apart), quantized.quantize(x))


def test_nothing_is_nothing() -> None:
    assert len(quantizers.quantize(torch.empty(0))) == 0
    assert len(quantizers.dequantize(torch.empty(0, dtype=torch.uint8))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("name", ["quantize", "dequantize", "mean", "pack", "unpack"])
def test_gpus_move_each_byte_once_and_spill_nothing(name: str, target: Any, tmp_path: Path) -> None:
    import triton
    from triton.compiler import ASTSource

    jitted = in_triton()[name]
    packs = name in ("quantize", "pack")
    pointers = ("*fp32", "*u8") if packs else ("*u8", "*fp32")
    constants = {"WORLD": 2, "ROWS": ROWS}
    signature = dict(zip(jitted.arg_names, (*pointers, "i32"), strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    source = ASTSource(fn=jitted, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=target, options=OPTIONS)
    if target.backend == "hip":
        assert int(re.search(r"vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"])[1]) == 0  # type: ignore[index]
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    assert stack <= 8, "an address at most"
    assert local == 0
    assert registers <= 96
    ptx = made.asm["ptx"]
    moved = Counter(re.findall(r"(ld|st)\.global[\w.:]*?\.(v4\.b32|v2\.b32|b32|b8|v4\.b8|v2\.b8|b16|v2\.b16)", ptx))
    vectors = moved["ld", "v4.b32"] if packs else moved["st", "v4.b32"]
    assert vectors == ROWS * BLOCK // (128 * 4), moved
    assert not any(width in ("b8", "v2.b8") for _, width in moved), moved


@pytest.mark.parametrize("name", ["quantize", "dequantize", "mean", "pack", "unpack"])
def test_how_many_blocks_there_are_is_no_constant_of_a_kernel(name: str) -> None:
    (number,) = (param for param in in_triton()[name].params if param.name == "num")
    assert number.do_not_specialize


def test_a_half_is_not_read_as_a_float() -> None:
    with pytest.raises(AssertionError):
        quantizers.quantize(torch.zeros(BLOCK, dtype=torch.float16))


@needs_compiler
@pytest.mark.parametrize(("kernels", "is_one_pass"), [("eager", False), ("update", True)])
def test_eager_kernels_are_calls_of_aten(kernels: str, is_one_pass: bool) -> None:
    model: Any = torch.nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    model = zgraph.compile(
        model, optimizer, loss=lambda y, _: y.square().mean(), kernels=kernels, state_precision="int8"
    )
    for _ in range(2):
        model.train_step(torch.ones(4, 32))
    assert ("quantizers_unpack" in model.source) == is_one_pass
