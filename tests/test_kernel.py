"""A kernel computes its body, bit for bit, however it is sliced, and writes nothing but what it says."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, few_examples
from zgraph.codegen.kernel import SLICE, SLICES, Kernel, region
from zgraph.codegen.source import SourceWriter
from zgraph.program import Phase, Role

aten = torch.ops.aten


@dataclass(frozen=True)
class Body:
    """A random elementwise body.

    Attributes:
        dtypes: of the flat inputs; a number and a 0-dim tensor are inputs too.
        calls: operator names, and what they read: numbers modulo the number of values there are.
        results: which calls leave, modulo their number.
        writes: which input each result would overwrite, modulo their number; None for a new tensor.
    """

    dtypes: tuple[torch.dtype, ...]
    calls: tuple[tuple[str, int, int], ...]
    results: tuple[int, ...]
    writes: tuple[int | None, ...]


_CALLS = [
    "add",
    "mul",
    "sub",
    "maximum",
    "abs",
    "sign",
    "lerp",
    "where",
    "addcmul",
    "scaled",
    "filled",
    "zeros",
    "cast",
    "clone",
    "squared",
    "copied",
]
_numbers = st.integers(0, 99)


def bodies_of(*dtypes: torch.dtype, num_calls: int = 12) -> st.SearchStrategy[Body]:
    """Bodies of up to so many calls, on flat inputs of these dtypes."""
    return st.builds(
        Body,
        st.lists(st.sampled_from(dtypes), min_size=1, max_size=4).map(tuple),
        st.lists(st.tuples(st.sampled_from(_CALLS), _numbers, _numbers), min_size=1, max_size=num_calls).map(tuple),
        st.lists(_numbers, min_size=1, max_size=4).map(tuple),
        st.lists(st.one_of(st.none(), _numbers), min_size=4, max_size=4).map(tuple),
    )


bodies = bodies_of(torch.float64, torch.float64, torch.float32)


def make(body: Body, numel: int) -> Kernel:
    """The kernel that a description stands for."""
    b = Builder()
    flat = [b.input(Role.OPT_STATE, "bucket0", f"m{i}", shape=[numel], dtype=d) for i, d in enumerate(body.dtypes)]
    number, scalar = b.input(Role.HYPER, "lr"), b.input(Role.OPT_STATE, "bucket0", "step", shape=[])
    values = list(flat)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return b.call(Phase.UPDATE, target, *args, **kwargs)

    for name, i, j in (("add", 0, 0), *body.calls):
        x, y = values[i % len(values)], values[j % len(values)]
        same = y if y.meta["val"].dtype == x.meta["val"].dtype else x
        values.append(
            {
                "add": lambda x, y: call(aten.add.Tensor, x, y, alpha=number),
                "mul": lambda x, y: call(aten.mul.Tensor, x, y),
                "sub": lambda x, y: call(aten.sub.Tensor, y, x),
                "maximum": lambda x, y: call(aten.maximum.default, x, y),
                "abs": lambda x, _: call(aten.abs.default, x),
                "sign": lambda x, _: call(aten.sign.default, x),
                "lerp": lambda x, y: call(aten.lerp.Scalar, x, y, number),
                "where": lambda x, y: call(aten.where.self, call(aten.gt.Tensor, x, y), y, x),
                "addcmul": lambda x, y: call(aten.addcmul.default, x, y, y, value=0.5),
                "scaled": lambda x, _: call(aten.mul.Tensor, scalar, x),
                "filled": lambda x, _: call(aten.full.default, [numel], 0.25, dtype=x.meta["val"].dtype),
                "zeros": lambda x, _: call(aten.zeros_like.default, x),
                "cast": lambda x, _: call(aten._to_copy.default, x, dtype=torch.float32),
                "clone": lambda x, _: call(aten.clone.default, x),
                "squared": lambda x, _: call(aten.pow.Tensor_Scalar, x, 2),
                "copied": lambda x, y: call(aten.copy.default, x, y),
            }[name](x, same)
        )
    calls = [n for n in b.program.graph.nodes if n.op == "call_function"]
    made = values[len(flat) :]
    results = list(dict.fromkeys(made[index % len(made)] for index in body.results))
    graph, outside = region(calls, results)
    free = set(range(len(outside)))
    writes: list[int | None] = []
    for result, wish in zip(results, body.writes, strict=False):
        index = None if wish is None else wish % len(outside)
        val = outside[index].meta["val"] if index is not None else None
        fits = index in free and isinstance(val, torch.Tensor) and val.dim() and val.dtype == result.meta["val"].dtype
        writes.append(index if fits else None)
        free.discard(index if fits else -1)
    return Kernel("update_bucket0", graph, len(outside), tuple(writes))


def inputs_of(kernel: Kernel, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    vals = [node.meta["val"] for node in kernel.body.find_nodes(op="placeholder")]
    return [
        torch.randn(val.shape, generator=generator, dtype=torch.float64).to(val.dtype)
        if isinstance(val, torch.Tensor)
        else val
        for val in vals
    ]


def check(body: Body, numel: int, slice_size: int) -> None:
    kernel = make(body, numel)
    inputs = inputs_of(kernel)
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    expected = fx.Interpreter(torch.nn.Module(), graph=kernel.body).run(*copies)
    writer = SourceWriter()
    source = kernel.source(writer, slice_size)
    found = writer.compile(source, "kernel", "<kernel>")(*inputs)
    assert len(found) == len(expected)
    for index, (mine, theirs, write) in enumerate(zip(found, expected, kernel.writes, strict=True)):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), f"result {index} of {kernel}\n{source}"
        assert all((mine is value) == (i == write) for i, value in enumerate(inputs))
    for i, (value, before) in enumerate(zip(inputs, copies, strict=True)):
        if isinstance(value, torch.Tensor) and i not in kernel.writes:
            assert torch.equal(value, before), f"input {i} of {kernel} was written to\n{source}"


sizes = st.sampled_from([(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (9, 4), (5, 1), (7, 100)])


@few_examples(100)
@given(bodies, sizes)
def test_any_kernel_in_slices_computes_its_body_and_writes_only_where_it_says(
    body: Body, sizes: tuple[int, int]
) -> None:
    check(body, *sizes)


def adam(numel: int) -> Kernel:
    """p, m = update(p, g, m): one result over p, one over m, and a new one."""
    b = Builder()
    p, g, m = (b.input(Role.OPT_STATE, "bucket0", key, shape=[numel]) for key in ("p", "g", "m"))
    lr = b.input(Role.HYPER, "lr")
    new_m = b.forward(aten.lerp.Scalar, m, g, 0.1)
    size = b.forward(aten.sqrt.default, b.forward(aten.abs.default, new_m))
    new_p = b.forward(aten.add.Tensor, p, b.forward(aten.div.Tensor, new_m, size), alpha=lr)
    calls = [n for n in b.program.graph.nodes if n.op == "call_function"]
    body, outside = region(calls, [new_p, new_m, size])
    assert [node.meta["input"].key for node in outside] == ["m", "g", "p", ""]
    return Kernel("update_bucket0", body, 4, (2, 0, None))


@pytest.mark.parametrize("numel", [1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 3])
def test_slices_of_full_size_cover_every_element_once(numel: int) -> None:
    kernel = adam(numel)
    inputs = inputs_of(kernel)
    expected = fx.Interpreter(torch.nn.Module(), graph=kernel.body).run(
        *[torch.clone(v) for v in inputs[:3]], inputs[3]
    )
    found = kernel(*inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert found[0] is inputs[2]
    assert found[1] is inputs[0]


def test_a_kernel_reuses_the_memory_of_its_inputs() -> None:
    assert_expected_inline(
        adam(1000).source(SourceWriter(), 64),
        """\
def kernel(i0, i1, i2, i3):
    n = i0.shape[0]
    o0 = i2
    o1 = i0
    o2 = torch.empty(n, dtype=torch.float64, device=i0.device)
    for a in range(0, n, 64):
        b = min(a + 64, n)
        si0 = i0[a:b]
        si1 = i1[a:b]
        si2 = i2[a:b]
        si0 = lerp_Scalar_out(si0, si1, 0.1, out=si0)
        v5 = abs(si0)
        v5 = sqrt_out(v5, out=v5)
        v7 = div_Tensor(si0, v5)
        si2 = add_out(si2, v7, alpha=i3, out=si2)
        o2[a:b].copy_(v5)
    return [o0, o1, o2]
""",
    )


def test_a_region_takes_what_it_reads_from_outside_as_inputs_in_order() -> None:
    b = Builder()
    x, lr = b.input(Role.BATCH, "0", shape=[4]), b.input(Role.HYPER, "lr")
    size = b.forward(operator.neg, lr)
    one = b.forward(aten.add.Tensor, x, x, alpha=size)
    two = b.forward(aten.mul.Tensor, one, lr)
    body, outside = region([one, two], [two])
    assert outside == [x, size, lr]
    assert [node.op for node in body.nodes] == ["placeholder"] * 3 + ["call_function"] * 2 + ["output"]
    assert fx.Interpreter(torch.nn.Module(), graph=body).run(torch.ones(4), -2.0, 3.0)[0].tolist() == [-3.0] * 4


def test_literals_that_have_no_repr_of_their_own_are_written_out() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[3])
    filled = [b.forward(aten.full_like.default, x, value) for value in (math.inf, -math.inf, math.nan, -0.5)]
    body, _ = region(filled, filled)
    found = Kernel("fill", body, 1, (None,) * 4)(torch.zeros(3, dtype=torch.float64))
    assert [value[0].item() for value in found[:2]] == [math.inf, -math.inf]
    assert found[2].isnan().all()
    assert found[3].tolist() == [-0.5] * 3


def test_only_a_cpu_and_a_gpu_have_a_language_of_their_own() -> None:
    kernel = Kernel("update", adam(2 * SLICE).body, 4, (2, 0, None), is_compiled=True)
    assert {kernel.language(device_type) for device_type in ("meta", "xpu", "mps")} == {SLICES}
    found = kernel(*(torch.empty(2 * SLICE, dtype=torch.float64, device="meta") for _ in range(3)), 0.1)
    assert [value.device.type for value in found] == ["meta"] * 3
