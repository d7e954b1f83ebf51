"""What lies where in an arena: by hand, of any program and of captured models, run in memory full of other bytes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

import zgraph
from tests.models import CASES
from tests.programs import (
    Builder,
    assert_identical,
    divide,
    few_examples,
    join,
    param,
    reference,
    rewritten,
    two_layers,
    values_for,
)
from tests.recipes import Recipe, build, recipes
from tests.reference import slow
from zgraph import ops, placement
from zgraph.arena import Arena
from zgraph.capture import capture
from zgraph.codegen.emit import emit
from zgraph.comm import SingleComm
from zgraph.config import Config
from zgraph.cost import Costs
from zgraph.liveness import held_bytes, lifetimes
from zgraph.lockstep import Values
from zgraph.lower import lower
from zgraph.machines import preset
from zgraph.overwrites import check_overwrites
from zgraph.placement import Placement, place
from zgraph.predict import costs_of
from zgraph.program import Input, Mesh, Phase, Program, Role

aten = torch.ops.aten


@pytest.fixture
def _small_values_count() -> Iterator[None]:
    """Values of programs that are built by hand are small."""
    with small_values_count():
        yield


def small_values_count() -> Any:
    """Neither size nor place keeps a value of a small program from lying somewhere."""
    return mock.patch.multiple(placement, SMALLEST_BYTES=1, ALIGNMENT_ON_GPU=1)


def two_gradients() -> Program:
    """``loss = sum(x @ w + v)``, trained by SGD: the gradients of a matrix and of a vector."""
    b = Builder()
    w, v = b.input(Role.PARAM, "w", shape=[6, 8]), b.input(Role.PARAM, "v", shape=[8])
    x, lr = b.input(Role.BATCH, "0", shape=[4, 6]), b.input(Role.HYPER, "lr")
    y = b.forward(aten.addmm.default, v, x, w)
    loss = b.forward(aten.sum.default, y)
    gy = b.backward(aten.ones_like.default, y)
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), gy)
    gv = b.backward(aten.sum.dim_IntList, gy, [0])
    size = b.call(Phase.UPDATE, operator.neg, lr)
    new = {
        name: b.call(Phase.UPDATE, aten.add.Tensor, p, g, alpha=size, module=name)
        for name, p, g in (("w", w, gw), ("v", v, gv))
    }
    return b.finish({None: loss, param("w"): new["w"], param("v"): new["v"]})


def run_placed(program: Program, inputs: Values, device_type: str | None = None) -> Values:
    """Emit a program for one rank and run it in an arena full of ones, which is full of ones again when it returns."""
    made = place(program, device_type=device_type)
    check_overwrites(program, made)
    step, arena = emit(program, made), Arena()
    arena.reserve(made.num_bytes)
    tensors = arena.tensors(step)
    for tensor in tensors:
        tensor.untyped_storage().fill_(1)
    arguments = [inputs[what] for _, what in program.placeholders()]
    with uninitialised_memory_filled():
        results = step.function(arguments, SingleComm(), *([tensors] if step.places else []))
    for tensor in tensors:
        tensor.untyped_storage().fill_(1)
    return dict(zip(program.outputs, results, strict=True))


@contextmanager
def uninitialised_memory_filled() -> Iterator[None]:
    """What is allocated and not written is NaN (``torch.utils.deterministic.fill_uninitialized_memory``)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_in_an_arena(captured: Program, program: Program, device_type: str | None = None) -> None:
    inputs = values_for(captured)
    expected = reference(captured, inputs)
    torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
    assert_identical(join(program, [run_placed(program, divide(program, inputs)[0], device_type)]), expected)


# What lies where


@pytest.mark.usefixtures("_small_values_count")
def test_gradients_are_made_in_the_flat_gradient_and_zeros_are_written_between_them() -> None:
    program = rewritten(two_gradients(), 0, 1)
    source = emit(program, place(program)).source
    lines = source[source.index("    [a0") :].splitlines()
    assert_expected_inline(
        "\n".join(line for line in lines if line and not line.startswith("    del ")),
        """\
    [a0, a1, a2, a3, a4, a5] = arena
    # ==== update ====
    v4 = -v3
    # ==== forward ====
    v5 = slice_Tensor(v0, 0, 0, 48)
    v6 = view(v5, [6, 8])
    v7 = slice_Tensor(v1, 0, 0, 8)
    v8 = view(v7, [8])
    v9 = addmm_out(v8, v2, v6, out=a3)
    v10 = sum(v9)
    # ==== backward ====
    v11 = fill(1, out=a4)
    v12 = t(v2)
    v13 = mm_out(v12, v11, out=a5)
    # backward bucket0
    v14 = reshape(v13, [-1])
    # ==== update bucket0 ====
    v15 = update_bucket0(v0, v14, v4)
    v16 = v15[0]
    # ==== backward ====
    v17 = sum_IntList_out(v11, [0], out=a1)
    # backward bucket1
    v18 = reshape(v17, [-1])
    v19 = fill(0, out=a2)
    v20 = a0
    # ==== update bucket1 ====
    v21 = update_bucket1(v1, v20, v4)
    v22 = v21[0]
    return [v10, v16, v22]
    # Places in the arena:
    #   a0: f64[16] in bytes 0 to 128
    #   a1: f64[8] in bytes 0 to 64
    #   a2: f64[8] in bytes 64 to 128
    #   a3: f64[4, 8] in bytes 0 to 256
    #   a4: f64[4, 8] in bytes 384 to 640
    #   a5: f64[6, 8] in bytes 0 to 384""",
    )
    assert place(program).copied_bytes == 0
    assert_same_in_an_arena(two_gradients(), program)


@few_examples(10)
@given(recipes(), st.integers(0, 3), st.sampled_from([1, 200]))
def test_any_step_computes_the_same_in_an_arena(recipe: Recipe, zero: int, bucket_bytes: int) -> None:
    with small_values_count():
        captured = build(recipe)
        assert_same_in_an_arena(captured, rewritten(captured, zero, 1, bucket_bytes))


@few_examples(10)
@given(recipes(), st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_an_arena_raises_no_peak_and_nothing_in_it_is_written_over(recipe: Recipe, zero: int, world: int) -> None:
    with small_values_count():
        program = rewritten(build(recipe), zero, world)
        assert_good(program, place(program))


def assert_good(program: Program, made: Placement) -> None:
    check_overwrites(program, made)
    everything, num_positions = lifetimes(program), len(program.graph.nodes)
    assert {*made.places} <= {life.node for life in everything}
    in_another = made.places.keys() - made.apart.keys()
    assert len(made.elsewhere) == sum(life.is_beside or life.node not in in_another for life in everything)
    together = [*made.inside, *made.elsewhere]
    assert max(held_bytes(together, num_positions)) <= max(held_bytes(everything, num_positions))


def captured_step(name: str, config: Config) -> Program:
    case = CASES[name]
    model, batch = case.model(), case.batches(1)[0]
    return capture(model, torch.optim.AdamW(model.parameters()), *batch, loss=case.loss, config=config)


CONFIGS = {
    "zero 3": Config(3, bucket_bytes=2**14),
    "zero 0": Config(0),
    "accumulate": Config(2, accumulate=2),
    "bf16": Config(3, precision="bf16"),
}


@pytest.mark.parametrize("name", ["gpt", *slow("resnet", "recurrent")])
@pytest.mark.parametrize("options", ["zero 3", *slow(*(name for name in CONFIGS if name != "zero 3"))])
def test_what_lies_in_the_arena_of_a_model_is_never_written_over(name: str, options: str) -> None:
    with small_values_count():
        for program in lower(captured_step(name, CONFIGS[options]), CONFIGS[options], Mesh(2), None, ()).programs:
            made = place(program)
            assert_good(program, made)
            assert made.num_bytes <= 1.05 * made.least_bytes


@pytest.mark.usefixtures("_small_values_count")
def test_nothing_is_placed_that_is_neither_on_a_cpu_nor_on_a_gpu() -> None:
    program = rewritten(two_gradients(), 0, 1)
    assert place(program).places
    made = place(program, device_type="meta")
    assert not made.places
    assert made.num_bytes == 0
    assert list(made.elsewhere) == lifetimes(program)


# On a GPU


@pytest.mark.usefixtures("_small_values_count")
def test_on_a_gpu_a_flat_gradient_is_allocated_with_the_first_of_its_parts() -> None:
    program = rewritten(two_gradients(), 0, 1)
    source = emit(program, place(program, device_type="cuda")).source
    lines = source[source.index("    a0 =") :].splitlines()
    assert_expected_inline(
        "\n".join(lines[: next(i for i, line in enumerate(lines) if "====" in line)]).rstrip(),
        """\
    a0 = empty_strided([16], [1], dtype=torch.float64, device=torch.device('cpu'))
    a1 = as_strided(a0, [8], [1], 0)
    a2 = as_strided(a0, [8], [1], 8)
    v17 = sum_IntList_out(v11, [0], out=a1)
    del v11
    # backward bucket1
    v18 = reshape(v17, [-1])
    del v17
    v19 = fill(0, out=a2)
    v20 = a0
    del v18, v19, a0, a1, a2""",
    )
    made = place(program, device_type="cuda")
    assert made.copied_bytes == made.num_bytes == 0
    assert list(made.apart) == program.graph.find_nodes(op="call_function", target=aten.cat.default)


@pytest.mark.usefixtures("_small_values_count")
@pytest.mark.parametrize("machine", ["H100", "cpu"])
def test_what_is_made_where_it_belongs_costs_no_copy(machine: str) -> None:
    hardware = preset(machine) if machine != "cpu" else replace(preset("H100"), device_type="cpu")
    program = rewritten(two_gradients(), 0, 1)
    (flat,) = program.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert Costs(program, hardware).of(flat).num_bytes == 2 * 128
    assert costs_of(program, hardware).of(flat).num_bytes == 0
    assert costs_of(program, hardware).of(flat).num_calls == 0


@few_examples(10)
@given(recipes(), st.integers(0, 3), st.sampled_from([1, 200]))
def test_any_step_computes_the_same_with_flat_gradients_that_lie_apart(
    recipe: Recipe, zero: int, bucket_bytes: int
) -> None:
    with small_values_count():
        captured = build(recipe)
        assert_same_in_an_arena(captured, rewritten(captured, zero, 1, bucket_bytes), "cuda")


@few_examples(10)
@given(recipes(), st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_flat_gradients_that_lie_apart_raise_no_peak(recipe: Recipe, zero: int, world: int) -> None:
    with small_values_count():
        program = rewritten(build(recipe), zero, world)
        assert_good(program, place(program, device_type="cuda"))


READ_BY_PLACE: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
    aten.as_strided.default: lambda _: ([64], [1], 0),
    aten.as_strided_copy.default: lambda _: ([64], [1], 0),
    aten.as_strided_scatter.default: lambda source: (source, [32], [1], 0),
}


def vectors(num: int, target: Any) -> Program:
    """So many parameters, trained by SGD, each with a gradient that an operator makes the next one's of."""
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[64])
    params = [b.input(Role.PARAM, f"w{i}", shape=[64]) for i in range(num)]
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, x, params[0]))
    source = b.backward(aten.slice.Tensor, x, 0, 0, 32)
    gradients = [b.backward(aten.mul.Tensor, x, 2.0)]
    for i in range(1, num):
        made = b.backward(aten.mul.Tensor, x, 2.0 + i)
        gradients.append(made if i % 2 else b.backward(target, gradients[-1], *READ_BY_PLACE[target](source)))
    new = {
        param(f"w{i}"): b.call(Phase.UPDATE, aten.sub.Tensor, each, gradient, module=f"w{i}")
        for i, (each, gradient) in enumerate(zip(params, gradients, strict=True))
    }
    return b.finish({None: loss, **new})


@pytest.mark.usefixtures("_small_values_count")
@pytest.mark.parametrize("target", READ_BY_PLACE, ids=str)
def test_what_is_read_by_its_place_in_memory_has_memory_of_its_own_on_a_gpu(target: Any) -> None:
    """A part of a tensor begins elsewhere than at the first element of its storage."""
    captured = vectors(3, target)
    program = rewritten(captured, 0, 1, 2**20)
    (flat,) = program.graph.find_nodes(op="call_function", target=aten.cat.default)
    made = place(program, device_type="cuda")
    assert made.copied_bytes == 2 * 64 * 8
    assert len(made.places) == 2
    assert list(made.apart) == [flat]
    cost = costs_of(program, preset("H100")).of(flat)
    assert cost.num_bytes == 2 * made.copied_bytes
    assert cost.num_calls == 1
    assert_same_in_an_arena(captured, program, "cuda")


@pytest.mark.usefixtures("_small_values_count")
def test_all_that_is_copied_into_a_flat_gradient_is_copied_by_one_call() -> None:
    captured = vectors(5, aten.as_strided_copy.default)
    program = rewritten(captured, 0, 1, 2**20)
    made = place(program, device_type="cuda")
    assert made.copied_bytes == 4 * 64 * 8
    source = emit(program, made).source
    assert source.count("copy_(") == source.count("_foreach_copy_(") == 1
    (flat,) = made.apart
    assert costs_of(program, preset("H100")).of(flat).num_calls == 1
    assert_same_in_an_arena(captured, program, "cuda")


def test_a_gpu_is_given_no_part_that_libraries_may_compute_otherwise_for_its_place() -> None:
    with mock.patch.object(placement, "SMALLEST_BYTES", 1):
        program = rewritten(two_gradients(), 0, 1)
        (flat,) = program.graph.find_nodes(op="call_function", target=aten.cat.default)
        made = place(program, device_type="cuda")
    offsets = {made.places[node].start - made.places[flat].start for node in made.places}
    assert offsets == {0}
    assert made.copied_bytes == 64


@pytest.mark.usefixtures("_small_values_count")
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_vectors_of_another_dtype_than_what_they_are_put_together_to_lie_elsewhere(device_type: str) -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[32]), b.input(Role.BATCH, "0", shape=[32])
    half = b.forward(aten._to_copy.default, b.forward(aten.mul.Tensor, x, w), dtype=torch.float32)
    both = b.forward(aten.cat.default, [half, b.forward(aten.mul.Tensor, x, 2.0)])
    loss = b.forward(aten.sum.default, both)
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, b.backward(aten.mul.Tensor, x, 3.0), module="w")
    captured = b.finish({None: loss, param("w"): new})
    program = rewritten(captured, 0, 1)
    assert not place(program, device_type=device_type).copied
    assert_same_in_an_arena(captured, program, device_type)


@pytest.mark.usefixtures("_small_values_count")
def test_an_arena_has_nothing_that_is_on_another_device() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[32]), b.input(Role.BATCH, "0", shape=[32])
    there = b.forward(aten._to_copy.default, b.forward(aten.mul.Tensor, x, w), device=torch.device("cuda"))
    back = b.forward(aten._to_copy.default, b.forward(aten.mul.Tensor, there, there), device=torch.device("cpu"))
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, b.backward(aten.mul.Tensor, x, 3.0), module="w")
    program = rewritten(b.finish({None: b.forward(aten.sum.default, back), param("w"): new}), 0, 1)
    placed = place(program).places
    assert placed
    assert {node.meta["val"].device.type for node in placed} == {"cpu"}


@pytest.mark.usefixtures("_small_values_count")
def test_nothing_is_placed_where_parameters_are_on_several_kinds_of_device() -> None:
    program = rewritten(two_gradients(), 0, 1)
    layout = program.layout
    assert layout is not None
    first, *others = layout.buckets
    program.layout = replace(layout, buckets=(replace(first, device=torch.device("cuda")), *others))
    assert not place(program).places
    assert not place(program, device_type="cuda").places


@pytest.mark.parametrize("options", [{}, {"check_memory": True}, {"accumulate": 2, "clip_norm": 0.1}], ids=str)
def test_a_model_trains_alike_with_flat_gradients_that_lie_apart(options: dict[str, Any]) -> None:
    case = CASES["gpt"]
    found = {}
    for device_type in (None, "cuda"):
        model = case.model(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        with small_values_count(), mock.patch("zgraph.runtime.place", partial(place, device_type=device_type)):
            zgraph.compile(model, optimizer, loss=case.loss, bucket_bytes="4KiB", **options)
            losses = [model.train_step(*batch.args) for batch in case.batches(3, 4, dtype=torch.float32)]
        found[device_type] = losses, model.state_dict()
        assert ("= empty_strided(" in model.source) == (device_type == "cuda")
    assert all(map(torch.equal, found[None][0], found["cuda"][0]))
    assert all(torch.equal(value, found["cuda"][1][name]) for name, value in found[None][1].items())


def test_small_values_stay_with_the_c_library() -> None:
    assert not place(rewritten(two_layers(), 0, 1)).places


@pytest.mark.usefixtures("_small_values_count")
@pytest.mark.parametrize("world", [2, 3])
def test_reduced_gradients_lie_in_the_arena_and_parts_of_other_ranks_do_not(world: int) -> None:
    program = rewritten(two_gradients(), 3, world)
    made = place(program)
    starts = set(program.graph.find_nodes(op="call_function", target=ops.reduce_scatter))
    assert starts
    assert starts <= set(made.places)
    received = [life.node for life in made.elsewhere if life.is_beside]
    assert set(received) == (starts if world > 2 else set()), "the first of them lies where they are added up"
    assert emit(program, made).source.count("comm.reduce_scatter") == len(starts)
    assert all(", out=a" in line for line in emit(program, made).source.splitlines() if ".reduce_scatter(" in line)


@pytest.mark.usefixtures("_small_values_count")
def test_what_a_step_returns_does_not_lie_in_the_arena() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[4]), b.input(Role.BATCH, "0", shape=[4])
    y = b.forward(aten.mul.Tensor, x, w)
    kept = b.forward(aten.view.default, b.forward(aten.neg.default, y), [2, 2])
    loss = b.forward(aten.sum.default, y)
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, b.backward(aten.mul.Tensor, x, 2.0), module="w")
    captured = b.finish({None: loss, Input(Role.BUFFER, "b"): kept, param("w"): new})
    program = rewritten(captured, 0, 1)
    placed = {node.target for node in place(program).places}
    assert aten.mul.Tensor in placed
    assert not placed & {aten.neg.default, aten.sum.default}
