"""Kernels of single numbers: their bits are ATen's, and a step has few of them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import zgraph
from tests.calibrations import made_up
from tests.interpreter import Interpreted
from tests.programs import Builder
from tests.test_triton import TARGETS
from zgraph import ops
from zgraph.capture import capture
from zgraph.codegen import library, numbers
from zgraph.codegen.elementwise import COMPARISONS
from zgraph.codegen.kernel import CPP, SLICES, TRITON, region
from zgraph.codegen.listing import ATEN
from zgraph.codegen.numbers import Numbers
from zgraph.config import Config
from zgraph.hardware import Hardware, LoopRates
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Phase, Program, Role, phase_of

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")

REALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.1, -0.3, 1e-30, 3e30, 0.5, 2.5, -7.0, 1 / 3, 1234.5678)
WHOLE = (0, 1, -1, 3, 2000, 2**24 + 1, 2**53 + 1, -(2**62))


def every_operator(*, of_host: bool = True) -> tuple[Numbers, list[fx.Node]]:
    """A kernel that calls each of them at least once, in each dtype, and its inputs."""
    b = Builder()

    def number(name: str, dtype: torch.dtype) -> fx.Node:
        return b.input(Role.OPT_STATE, "bucket0", name, shape=[], dtype=dtype)

    calls: list[tuple[Any, ...]] = []
    p, q = number("p", torch.bool), number("q", torch.bool)
    k, n = number("k", torch.int64), number("n", torch.int64)
    host = b.input(Role.HYPER, "number")
    for dtype in (torch.float32, torch.float64):
        x, y, z = (number(f"{name}{dtype}", dtype) for name in "xyz")
        other = torch.float64 if dtype is torch.float32 else torch.float32
        calls += [
            (aten.add.Tensor, x, y),
            (aten.add.Tensor, x, 1),
            (aten.add.Tensor, x, p),
            (aten.add.Tensor, x, k),
            (aten.add.Tensor, x, number(f"other {dtype}", other)),
            (aten.sub.Tensor, x, 1e-6),
            (aten.rsub.Scalar, x, 0.1),
            (aten.mul.Tensor, x, 0.1),
            (aten.mul.Tensor, y, q),
            (aten.div.Tensor, x, y),
            *((op.default, x) for op in (aten.neg, aten.abs, aten.sign, aten.sqrt, aten.rsqrt, aten.reciprocal)),
            (aten.maximum.default, x, y),
            (aten.minimum.default, x, y),
            (aten.clamp.default, x, None, 1.0),
            (aten.clamp.default, x, -0.3, 0.5),
            (aten.clamp_min.default, x, 0.1),
            (aten.clamp_max.default, x, 0.1),
            (aten.addcmul.default, x, y, z),
            (aten.addcdiv.default, x, y, z),
            *((op.Scalar, x, math.inf) for op in COMPARISONS),
            *((op.Tensor, x, y) for op in COMPARISONS),
            (aten.where.self, p, x, y),
            (aten.clone.default, x),
            *((op.default, x) for op in (aten.zeros_like, aten.ones_like)),
        ]
        if of_host:
            calls += [(aten.mul.Tensor, x, host), (aten.add.Tensor, y, host), (aten.lt.Scalar, x, host)]
            calls += [(aten.pow.Tensor_Scalar, x, exponent) for exponent in (0.5, 1, 2)]
        calls += [(aten._to_copy.default, x, to) for to in (other, torch.bool)]
        calls += [(aten._to_copy.default, each, dtype) for each in (p, k)]
    calls += [
        (aten.add.Tensor, k, n),
        (aten.add.Tensor, k, 1),
        (aten.add.Tensor, k, p),
        (aten.add.Tensor, k, 0.5),
        (aten.sub.Tensor, k, n),
        (aten.mul.Tensor, k, 3),
        (aten.mul.Tensor, k, 0.3),
        (aten.div.Tensor, k, n),
        (aten.neg.default, k),
        (aten.maximum.default, k, n),
        (aten.clamp.default, k, -1, 2),
        *((op.Scalar, k, 2000) for op in COMPARISONS),
        *((op.Tensor, k, n) for op in COMPARISONS),
        (aten.where.self, p, k, n),
        *((op.default, k) for op in (aten.zeros_like, aten.ones_like)),
        (aten.logical_not.default, p),
        (aten.logical_and.default, p, q),
        (aten.logical_or.default, p, q),
    ]
    results = [
        b.call(Phase.UPDATE, target, args[0], dtype=args[1])
        if target is aten._to_copy.default
        else b.call(Phase.UPDATE, target, *args)
        for target, *args in calls
    ]
    assert all(map(numbers.may_write, results)), [each for each in results if not numbers.may_write(each)]
    body, outside = region(results, results)
    return Numbers("numbers", body, len(outside), (None,) * len(results), is_compiled=True), outside


def given(outside: list[fx.Node], turn: int) -> list[Any]:
    """Inputs, others in each turn."""
    found: list[Any] = []
    for index, node in enumerate(outside):
        val, at = node.meta["val"], turn * (index % 5 + 1) + index
        if not isinstance(val, Tensor):
            found.append(REALS[at % len(REALS)])
        elif val.dtype is torch.bool:
            found.append(torch.tensor(bool(at % 2)))
        else:
            values = REALS if val.dtype.is_floating_point else WHOLE
            found.append(torch.tensor(values[at % len(values)], dtype=val.dtype))
    return found


def assert_same_bits(kernel: Numbers, found: list[Tensor], inputs: list[Any]) -> None:
    expected = fx.Interpreter(nn.Module(), graph=kernel.body).run(*inputs)
    for mine, theirs, node in zip(found, expected, kernel.body.output_node().args[0], strict=True):  # type: ignore[arg-type]
        told = (node.format_node(), mine, theirs, inputs)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), told
        assert torch.equal(mine, theirs) or (mine.isnan() and theirs.isnan()), told
        if mine.dtype.is_floating_point and not mine.isnan():
            assert mine.signbit() == theirs.signbit(), told


def test_in_cpp_every_operator_is_atens_bit_for_bit() -> None:
    kernel, outside = every_operator()
    assert kernel.runs_in("cpu") == CPP
    for turn in range(40):
        inputs = given(outside, turn)
        assert_same_bits(kernel, kernel(*inputs), inputs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_in_triton_every_operator_is_atens_bit_for_bit() -> None:
    kernel, outside = every_operator(of_host=False)
    assert numbers._InTriton.can_write(numbers._as_vectors(kernel).body)
    interpreter = Interpreted(numbers.define(kernel))
    for turn in range(8):
        inputs = given(outside, turn)
        results: Any = kernel.body.output_node().args[0]
        found = [torch.empty((), dtype=node.meta["val"].dtype) for node in results]
        interpreter[1,](*inputs, *found)
        assert_same_bits(kernel, found, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_gpus_have_every_operator(target: GPUTarget) -> None:
    kernel, _ = every_operator(of_host=False)
    jitted = numbers.define(kernel)
    types = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.bool: "*i1"}
    signature = {name: types[form] for name, form in zip(jitted.arg_names, numbers.forms(kernel), strict=True)}
    source = ASTSource(fn=jitted, signature=signature, constexprs={})
    text = compile_source(source, target=target, options=numbers._OPTIONS).asm
    if target.backend == "cuda":
        assert {"sqrt.rn.f64", "div.rn.f64", "sqrt.rn.f32", "div.rn.f32"} <= set(
            re.findall(r"\w+\.rn\.f\d+", text["ptx"])
        )


@pytest.mark.parametrize(
    "call",
    [
        (aten.add.Tensor, "k", "p", {"alpha": 2}),
        (aten.eq.Scalar, "k", 0.5, {}),
        (aten.add.Tensor, "p", "p", {}),
        (aten.eq.Tensor, "p", "p", {}),
        (aten.pow.Scalar, 0.9, "x", {}),
        (aten.exp.default, "x", {}),
        (aten.lerp.Scalar, "x", "x", 0.1, {}),
        (aten.add.Tensor, "h", "h", {}),
        (aten.add.Tensor, "x", "v", {}),
        (aten.logical_not.default, "k", {}),
    ],
    ids=str,
)
def test_what_would_be_another_number_stays_with_aten(call: Any) -> None:
    b = Builder()
    dtypes = {"p": torch.bool, "k": torch.int64, "x": torch.float32, "h": torch.bfloat16, "v": torch.float32}
    inputs = {
        name: b.input(Role.OPT_STATE, "bucket0", name, shape=[3] if name == "v" else [], dtype=dtype)
        for name, dtype in dtypes.items()
    }
    target, *args, kwargs = call
    node = b.call(Phase.UPDATE, target, *(inputs[a] if isinstance(a, str) else a for a in args), **kwargs)
    assert not numbers.may_write(node)


def test_an_operator_is_a_statement() -> None:
    b = Builder()
    total, count, old = (
        b.input(Role.OPT_STATE, "bucket0", name, shape=[], dtype=dtype)
        for name, dtype in (("total", torch.float64), ("count", torch.int64), ("old", torch.int64))
    )
    norm = b.call(Phase.UPDATE, aten.sqrt.default, total)
    holds = b.call(Phase.UPDATE, aten.lt.Scalar, norm, math.inf)
    more = b.call(Phase.UPDATE, aten.add.Tensor, count, 1)
    results = [norm, b.call(Phase.UPDATE, aten.where.self, holds, more, old)]
    body, outside = region([norm, holds, more, results[1]], results)
    kernel = Numbers("numbers", body, len(outside), (None, None), is_compiled=True)
    text = kernel.text(CPP)
    assert_expected_inline(
        text[text.index("{") :],
        """\
{
    const double a0 = *(const double *)inputs[0];
    const long a1 = *(const long *)inputs[1];
    const long a2 = *(const long *)inputs[2];
    const double v0 = __builtin_sqrt(a0);  // sqrt
    const bool v1 = v0 < __builtin_inf();  // lt
    const long v2 = a1 + 1;  // add
    const long v3 = (v1 ? v2 : a2);  // where
    *(double *)outputs[0] = v0;
    *(long *)outputs[1] = v3;
}
""",
    )
    assert_expected_inline(
        kernel.text(TRITON),
        """\
@triton.jit
def numbers(i0, i1, i2, o0, o1):
    x0 = tl.load(i0)
    x1 = tl.load(i1)
    x2 = tl.load(i2)
    v0 = tl.sqrt(x0)  # sqrt
    v1 = v0 < tl.full((), float("inf"), tl.float64)  # lt
    v2 = x1 + tl.full((), 1, tl.int64)  # add
    v3 = tl.where(v1, v2, x2)  # where
    tl.store(o0, v0)
    tl.store(o1, v3)
""",
    )


def clipped(kernels: str, zero: int = 0, world: int = 1, hardware: Hardware | None = None) -> Program:
    """A step of three layers with a bucket each that clips gradients."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())
    asked = Config(zero, clip_norm=1.0, bucket_bytes=20000)
    captured = capture(model, optimizer, (torch.zeros(2, 64),), {}, loss=lambda y, _: y.sum(), config=asked)
    config = replace(asked, kernels=kernels)
    return run(default_passes(config, Mesh(world), hardware=hardware), captured).program


def of_numbers(program: Program) -> list[fx.Node]:
    """Calls that give single numbers, and nothing else, but for sums over gradients."""
    vals = {node: node.meta["val"] for node in program.graph.nodes if phase_of(node) is Phase.UPDATE}
    return [
        node
        for node, val in vals.items()
        if node.op == "call_function" and node.target is not ops.operator.getitem
        and all(isinstance(each, Tensor) and not each.dim() for each in (val if isinstance(val, tuple) else (val,)))
        and node.target not in (ops.square_sum, ops.add_up)
    ]  # fmt: skip


def test_counts_of_steps_are_one_kernel_and_what_a_norm_says_another() -> None:
    assert len(of_numbers(clipped("update"))) == 3 + 3 + 9
    counts, norm = of_numbers(clipped("zgraph"))
    assert [str(call.target).split("{")[1].count("aten.") for call in (counts, norm)] == [3, 12]
    assert len(counts.meta["val"]) == 3


def test_numbers_are_a_kernel_where_shards_are_updated_while_others_are_on_their_way() -> None:
    """Counts are read as the first shard is updated, and those of later ones are counted with it."""
    program = clipped("zgraph", zero=2, world=2)
    counts, *_ = of_numbers(program)
    assert len(counts.meta["val"]) == 3
    order = list(program.graph.nodes)
    assert order.index(counts) < max(order.index(start) for start in order if start.target in ops.STARTS)


def trained(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model after five steps, one of which is skipped, and all that it is then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    zgraph.compile(model, optimizer, loss=lambda y, _: y.sum(), bucket_bytes=300, clip_norm=0.5, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        model.train_step(torch.randn(3, 8, generator=generator) * (math.inf if step == 2 else 1))
    state = optimizer.state_dict()["state"]
    tensors = {f"{name}.{key}": value for name, held in state.items() for key, value in held.items()}
    return model, {**model.state_dict(), **tensors}


@pytest.mark.parametrize("options", [{}, {"precision": "fp16", "loss_scale_interval": 1}], ids=str)
def test_a_step_whose_numbers_are_kernels_is_the_same_bit_for_bit(options: dict[str, Any]) -> None:
    (fused, found), (_, expected) = trained(kernels="zgraph", **options), trained(**options)
    assert any(isinstance(node.target, Numbers) for node in fused.program.graph.nodes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_without_a_compiler_numbers_are_atens_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "there is no C++ compiler")
    model, found = trained(kernels="zgraph")
    assert {each.language for each in model.kernels()} - {ATEN} == {SLICES}
    for name, value in trained()[1].items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_numbers_are_a_kernel_where_that_costs_less_than_their_calls() -> None:
    machine = made_up().hardware()
    found = []
    for launches in (2, 100):
        hardware = replace(machine, loops=LoopRates(1e9, 1e9, launches * machine.launch_s))
        program = clipped("auto", hardware=hardware)
        found.append(sum(isinstance(node.target, Numbers) for node in program.graph.nodes))
        assert {each.kernel_s < each.calls_s for each in program.weighed if each.is_kernel} <= {True}  # type: ignore[operator]
    assert found == [1, 0]
