"""Updates in Triton: what is written, what it computes when interpreted, and what compilers make of it for GPUs."""

from __future__ import annotations

import math
import re
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

import zgraph
from tests.programs import Builder, few_examples
from tests.test_kernel import Body, bodies_of, inputs_of, make
from zgraph.codegen.kernel import SLICES, TRITON, Kernel, region
from zgraph.codegen.triton import BLOCK, OPTIONS, TritonWriter, _given, define, forms, launch
from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.program import Phase, Role

aten = torch.ops.aten
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
]


def update(optimizer: Any = torch.optim.AdamW, **options: Any) -> Kernel:
    """The update of the only bucket of a model."""
    model = torch.nn.Linear(64, 64)
    zgraph.compile(model, optimizer=optimizer(model.parameters()), loss=lambda y, _: y.square().mean(), **options)
    for _ in range(2):
        model.train_step(torch.ones(4, 64))
    (kernel,) = (n.target for n in model.program.graph.nodes if isinstance(n.target, Kernel))
    return kernel


def interpreted(kernel: Kernel, inputs: list[Any]) -> list[torch.Tensor]:
    return launch(kernel, InterpretedFunction(define(kernel).fn), *inputs)


def test_an_update_reads_and_writes_each_vector_once() -> None:
    assert_expected_inline(
        TritonWriter(update()).source(),
        """\
@triton.jit
def update_bucket0(i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x0 = tl.load(i0 + at, mask=inside)
    x1 = tl.load(i1 + at, mask=inside)
    x3 = tl.load(i3 + at, mask=inside)
    x8 = tl.load(i8 + at, mask=inside)
    v0 = tl.where(tl.abs(i2) < 0.5, tl.fma(i2, (x1 - x0), x0), tl.fma((x0 - x1), (1.0 - i2), x1))  # lerp
    v1 = x3 * i4  # mul
    v2 = tl.fma((i5 * x1), x1, v1)  # addcmul
    v3 = tl.sqrt_rn(v2)  # sqrt
    v4 = tl.div_rn(v3, i6)  # div
    v5 = v4 + i7  # add
    v6 = x8 * i9  # mul
    v7 = tl.fma(i10, tl.div_rn(v0, v5), v6)  # addcdiv
    tl.store(i0 + at, v0, mask=inside)
    tl.store(i3 + at, v2, mask=inside)
    tl.store(i8 + at, v7, mask=inside)
""",
    )


def test_without_a_gpu_a_kernel_runs_in_slices() -> None:
    kernel = update()
    assert kernel.language("cuda") == TRITON
    kernel.prepare()
    kernel(*inputs_of(kernel))
    assert list(kernel._functions) == [SLICES]


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adamax,
        torch.optim.NAdam,
    ],
)
def test_updates_of_torchs_optimizers_are_what_their_operators_compute(optimizer: Any) -> None:
    kernel = update(optimizer, clip_norm=1.0, ema=0.99)
    assert TritonWriter.can_write(kernel.body)
    inputs = [x.abs() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x for x in inputs_of(kernel)]
    check(kernel, inputs)


def check(kernel: Kernel, inputs: list[Any], rtol: float = 2e-6) -> None:
    """Interpreted, a kernel computes its body and writes over what it says."""
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    found = interpreted(kernel, copies)
    expected = fx.Interpreter(torch.nn.Module(), graph=kernel.body).run(*inputs)
    for mine, theirs, write in zip(found, expected, kernel.writes, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert write is None or mine is copies[write]
        assert torch.allclose(mine, theirs, rtol=rtol, atol=rtol / 2), TritonWriter(kernel).source()
    for index, (copy, before) in enumerate(zip(copies, inputs, strict=True)):
        assert not isinstance(copy, torch.Tensor) or index in kernel.writes or torch.equal(copy, before)


@few_examples(60)
@given(bodies_of(torch.float32, torch.float16, num_calls=4), st.sampled_from([1, 5, BLOCK, BLOCK + 1]))
def test_any_body_is_computed_operator_by_operator(body: Body, numel: int) -> None:
    """On powers of two, where float32 makes no error, and float16 the same one at the same place."""
    kernel = make(body, numel)
    assert TritonWriter.can_write(kernel.body)
    inputs = [
        torch.exp2(x.sign().round()).copysign(x) * (x.abs() > 0.1) if isinstance(x, torch.Tensor) else x
        for x in inputs_of(kernel)
    ]
    check(kernel, inputs, rtol=0)


def test_bfloat16_is_computed_with_in_float32_and_rounded_after_each_operator() -> None:
    b = Builder()
    x = b.input(Role.OPT_STATE, "bucket0", "m", shape=[8], dtype=torch.bfloat16)
    doubled = b.call(Phase.UPDATE, aten.add.Tensor, x, x)
    body, _ = region([doubled], [doubled])
    assert (
        "v0 = (x0.to(tl.float32) + x0.to(tl.float32)).to(tl.bfloat16)"
        in TritonWriter(Kernel("update", body, 1, (0,))).source()
    )


def call(target: Any, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> fx.Graph:
    b = Builder()
    x = b.input(Role.OPT_STATE, "bucket0", "m", shape=[8], dtype=dtype)
    result = b.call(Phase.UPDATE, target, x, *args, **kwargs)
    return region([result], [result])[0]


@pytest.mark.parametrize(
    "body",
    [
        call(aten.add.Tensor, 1, dtype=torch.float64),
        call(aten.add.Tensor, 1, dtype=torch.int64),
        call(aten.erf.default),
        call(aten.pow.Tensor_Scalar, 3),
        call(aten.div.Tensor_mode, 2, rounding_mode="floor"),
        call(aten.add.Tensor, 1, dtype=torch.bool),
    ],
    ids=["float64", "int64", "erf", "cube", "floor", "mask"],
)
def test_what_triton_would_compute_differently_stays_with_aten(body: fx.Graph) -> None:
    assert not TritonWriter.can_write(body)


def test_kernels_eager_writes_none() -> None:
    assert not update(kernels="eager").is_compiled
    with pytest.raises(OptionError, match="kernels='fast' is not known"):
        Config.from_options({"kernels": "fast"})


def test_numbers_of_the_host_reach_a_launch_as_floats() -> None:
    """As an integer, one would be 1 or a multiple of 16 now and then, and the kernel be compiled for it in a step."""
    given = [_given(torch.tensor(16), torch.device("cuda")), _given(3, torch.device("cuda"))]
    assert [(type(value), value) for value in given] == [(float, 16.0), (float, 3.0)]
    assert _given(torch.tensor(True), torch.device("cuda")) is True


def test_values_that_are_no_numbers_go_where_they_would() -> None:
    kernel = Kernel("update", call(aten.clamp.default, -1.0, 1.0), 1, (0,))
    (found,) = interpreted(kernel, [torch.tensor([math.nan, math.inf, -math.inf, 0.5])])
    assert found[0].isnan()
    assert found[1:].tolist() == [1.0, -1.0, 0.5]


def compiled(kernel: Kernel, target: GPUTarget) -> Any:
    """What a compiler makes of a kernel for a GPU, as it would be launched."""
    jitted = define(kernel)
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*i1", float: "fp32", bool: "i1", int: "i32"}
    given = [form if isinstance(form, torch.dtype) else type(form) for form in forms(kernel)]
    signature = {**dict(zip(jitted.arg_names, map(types.__getitem__, given), strict=False)), "BLOCK": "constexpr"}
    aligned = [i for i, name in enumerate(jitted.arg_names) if signature[name][0] == "*" or name == "n"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    made = ASTSource(fn=jitted, signature=signature, constexprs={"BLOCK": BLOCK}, attrs=attributes)
    return triton.compile(made, target=target, options=OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "ema": 0.99}], ids=str)
def test_gpus_get_wide_accesses_and_nothing_is_spilled(
    target: GPUTarget, options: dict[str, Any], tmp_path: Path
) -> None:
    kernel = update(**options)
    num_read, num_written = 4 + ("ema" in options), 3 + ("ema" in options)
    made = compiled(kernel, target)
    assert made.metadata.shared == 0
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        assert int(re.search(r"vgpr_spill_count:\s+(\d+)", text)[1]) == 0  # type: ignore[index]
        moved = Counter(re.findall(r"(?:global|buffer)_(load|store)_dwordx4", text))
        assert moved == {"load": num_read, "store": num_written}
        return
    moved = Counter(re.findall(r"(ld|st)\.global[\w.:]*\.v4\.b32", made.asm["ptx"]))
    assert moved == {"ld": 2 * num_read, "st": 2 * num_written}  # of 8 elements of a thread
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    told = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", told).groups())  # type: ignore[union-attr]
    assert stack == 0
    assert registers <= 96  # of 128 threads: at least four blocks on a multiprocessor
