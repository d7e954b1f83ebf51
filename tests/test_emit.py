"""The emitted step is readable Python that computes the program, drops every value in time, and runs nothing else."""

from __future__ import annotations

import ast
import gc
import math
import operator
import os
import traceback
import weakref
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.programs import (
    Builder,
    assert_identical,
    divide,
    few_examples,
    join,
    one_layer,
    param,
    reference,
    values_for,
)
from tests.recipes import Recipe, build, recipes
from zgraph.codegen.emit import emit
from zgraph.codegen.source import SourceWriter
from zgraph.comm import SingleComm
from zgraph.config import Config
from zgraph.lockstep import Values
from zgraph.passes import default_passes
from zgraph.pipeline import run as run_passes
from zgraph.program import Input, Mesh, Origin, Phase, Program, Role

aten = torch.ops.aten


def lowered(program: Program, zero: int = 3, world: int = 1, bucket_bytes: int = 1) -> Program:
    return run_passes(default_passes(Config(zero, bucket_bytes), Mesh(world)), program).program


def run_emitted(program: Program, inputs: Values) -> Values:
    """Emit a program for one rank, and call it."""
    arguments = [inputs[what] for _, what in program.placeholders()]
    results = emit(program).function(arguments, SingleComm())
    assert arguments == [], "the caller's list holds nothing any more"
    return dict(zip(program.outputs, results, strict=True))


def test_the_source_reads_like_the_program() -> None:
    assert_expected_inline(
        emit(lowered(one_layer(), world=2)).source,
        """\
def step(inputs, comm):
    # Lanes beside compute, where all calls run that name none:
    #   data: 3 collectives between 2 ranks
    # Buckets, in order of first use:
    #   bucket0: 32 elements, w
    # Inputs:
    #   v0: f64[16] is param:bucket0
    #   v1: f64[16] is opt_state:bucket0:m
    #   v2: f64[4, 2] is batch:0
    #   v3: float is hyper:lr
    [v0, v1, v2, v3] = inputs
    inputs.clear()

    # ==== update ====
    v4 = -v3
    del v3

    # ==== forward bucket0 ====
    v5 = comm.all_gather(v0)  # starts on data
    v6 = comm.wait(v5)  # waits for data
    del v5
    # forward
    v7 = slice_Tensor(v6, 0, 0, 6)
    del v6
    v8 = view(v7, [2, 3])
    del v7
    v9 = mm(v2, v8)
    del v8
    v10 = sum(v9)

    # ==== backward ====
    v11 = t(v2)
    del v2
    v12 = ones_like(v9)
    del v9
    v13 = mm(v11, v12)
    del v11, v12
    # backward bucket0
    v14 = reshape(v13, [-1])
    del v13
    v15 = full([26], 0, dtype=torch.float64, device=torch.device('cpu'))
    v16 = cat([v14, v15])
    del v14, v15
    v17 = comm.reduce_scatter(v16, 'avg')  # starts on data
    del v16
    v18 = comm.wait(v17)  # waits for data
    del v17

    # ==== update bucket0 ====
    v19 = update_bucket0(v1, v18, v0, v4)
    del v4, v0, v18, v1
    v20 = v19[0]
    v21 = v19[1]
    del v19

    # ==== forward ====
    v22 = comm.all_reduce(v10, 'avg')  # starts on data
    del v10
    v23 = comm.wait(v22)  # waits for data
    del v22
    return [v23, v21, v20]
""",
    )


@few_examples(20)
@given(recipes(), st.integers(0, 3), st.sampled_from([1, 200]))
def test_an_emitted_step_computes_the_program(recipe: Recipe, zero: int, bucket_bytes: int) -> None:
    captured = build(recipe)
    program = lowered(captured, zero, bucket_bytes=bucket_bytes)
    inputs = values_for(captured)
    expected = reference(captured, inputs)
    torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
    assert_identical(join(program, [run_emitted(program, divide(program, inputs)[0])]), expected)


# Lifetimes

_alive: dict[str, list[str]] = {}
_made: dict[str, weakref.ref[torch.Tensor]] = {}


def note(name: str, *_: torch.Tensor) -> torch.Tensor:
    """Stands for any operator: makes a tensor, and notes which of the earlier ones are alive meanwhile."""
    _alive[name] = [other for other, ref in _made.items() if ref() is not None]
    result = torch.ones(3)
    _made[name] = weakref.ref(result)
    return result


def note_two(name: str, *_: torch.Tensor) -> list[torch.Tensor]:
    return [note(f"{name}0"), note(f"{name}1")]


def test_every_value_is_dropped_right_after_its_last_use_and_inputs_are_too() -> None:
    b = Builder()
    x, w = b.input(Role.BATCH, "0", shape=[3]), b.input(Role.PARAM, "w", shape=[3])
    first = b.forward(note, "first", x)
    b.forward(note, "unread", first)
    second = b.forward(note, "second", first, w)
    pair = b.forward(note_two, "pair", second)
    one = b.forward(operator.getitem, pair, 1)
    third = b.forward(note, "third", one)
    last = b.forward(note, "last", third, first)
    program = b.finish({None: last})
    step = emit(program)
    _alive.clear()
    _made.clear()
    arguments = []
    for name in ("x", "w"):
        tensor = torch.ones(3)
        _made[name] = weakref.ref(tensor)
        arguments.append(tensor)
    del tensor
    gc.disable()  # only reference counts may free
    try:
        results = step.function(arguments, SingleComm())
    finally:
        gc.enable()
    assert _alive == {
        "first": ["x", "w"],
        "unread": ["w", "first"],
        "second": ["w", "first"],
        "pair0": ["first", "second"],
        "pair1": ["first", "second", "pair0"],
        "third": ["first", "pair1"],
        "last": ["first", "third"],
    }
    assert [name for name, ref in _made.items() if ref() is not None] == ["last"]
    assert len(results) == 1


# Hostile names

HOSTILE = [
    'w"); import os; os.environ["PWNED"] = "1"; ("',
    "w'''\nimport os\nos.environ['PWNED'] = '1'\n'''",
    "w\n    __import__('os').environ['PWNED'] = '1'\n#",
    "w\r__import__('os').environ['PWNED'] = '1'",
    "w\u2028__import__('os').environ['PWNED'] = '1'\x0c\x85",
    "w\\",
    "v0 = 1  # é",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_a_model_never_reach_code(name: str) -> None:
    b = Builder()
    w = b.input(Role.PARAM, name, shape=[3])
    state, lr = b.input(Role.OPT_STATE, name, name, shape=[3]), b.input(Role.HYPER, f"group0.{name}")
    buffer = b.input(Role.BUFFER, name, shape=[])
    loss = b.forward(aten.add.Tensor, b.forward(aten.sum.default, w, module=name), buffer, module=name)
    g = b.backward(aten.cos.default, w, module=name)
    g.meta["origin"] = Origin(Phase.BACKWARD, name, f"{name}:1 ({name})")
    new_state = b.call(Phase.UPDATE, aten.add.Tensor, state, g, module=name)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, new_state, alpha=lr, module=name)
    results: dict[Input | None, fx.Node] = {None: loss, param(name): new, Input(Role.OPT_STATE, name, name): new_state}
    captured = b.finish(results)
    inputs = values_for(captured)
    for program in (captured, lowered(captured)):
        step = emit(program)
        assert step.source.isascii()
        (function,) = ast.parse(step.source).body
        assert isinstance(function, ast.FunctionDef)
        assert not [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "PWNED" not in ast.unparse(function), "only comments may say it"
        values = divide(program, inputs) if program.layout else inputs
        found = [run_emitted(program, values[0])]
        assert_identical(join(program, found) if program.layout else found, reference(captured, inputs))
    assert "PWNED" not in os.environ


literals = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())


@few_examples(100)
@given(st.one_of(literals, st.lists(literals, max_size=3)))
def test_literals_evaluate_to_themselves(value: Any) -> None:
    writer = SourceWriter()
    found = eval(writer.literal(value), dict(writer.namespace))
    assert found == value
    assert repr(found) == repr(value)  # -0.0 is not 0.0, True is not 1


def test_literals_of_torch_evaluate_to_themselves() -> None:
    writer = SourceWriter()
    for value in (torch.float32, torch.strided, torch.preserve_format, torch.device("cpu"), torch.device("cuda", 1)):
        assert eval(writer.literal(value), dict(writer.namespace)) == value
    assert eval(writer.literal((1, 2)), {}) == [1, 2]
    generator = torch.Generator()
    assert eval(writer.literal(generator), dict(writer.namespace)) is generator


def test_globals_are_named_once_each_and_hide_nothing() -> None:
    writer = SourceWriter()
    first, second = object(), object()
    names = [writer.bind(first, "mm"), writer.bind(second, "mm"), writer.bind(first, "other")]
    assert names == ["mm", "mm_2", "mm"]
    for hint in ("v12", "i0", "si3", "o1", "a", "n", "class", "", "1x", "torch", "x); import os  #"):
        name = writer.bind(object(), hint)
        assert name.isidentifier()
        assert name not in ("v12", "i0", "si3", "o1", "a", "n", "class", "torch")
    assert writer.namespace["torch"] is torch


def test_numbers_that_python_cannot_write_or_would_misread_survive() -> None:
    b = Builder()
    x, lr = b.input(Role.BATCH, "0", shape=[2]), b.input(Role.HYPER, "lr")
    filled = [b.forward(aten.full_like.default, x, value) for value in (math.inf, -math.inf, math.nan, -0.0, 1e-45)]
    numbers = [
        b.forward(operator.pow, -2.0, 2), b.forward(operator.sub, 1, b.forward(operator.neg, lr)),
        b.forward(operator.sub, lr, -1), b.forward(torch.sym_sqrt, b.forward(operator.pow, lr, 2)),
    ]  # fmt: skip
    shifted = [b.forward(aten.add.Tensor, x, number) for number in numbers]
    program = b.finish({None: b.forward(aten.sum.default, x)})
    program.output_node.args = ([*program.results(), *filled, *shifted],)
    _, inf, minus_inf, nan, zero, tiny, *rest = emit(program).function([torch.zeros(2), 3.0], SingleComm())
    assert (inf[0], minus_inf[0]) == (math.inf, -math.inf)
    assert nan.isnan().all()
    assert math.copysign(1, zero[0]) == -1
    assert tiny[0] > 0
    assert [value[0].item() for value in rest] == [4.0, 4.0, 4.0, 3.0]


def test_a_traceback_shows_the_generated_line() -> None:
    step = emit(one_layer())
    with pytest.raises(RuntimeError) as error:
        step.function([torch.ones(2, 3), torch.ones(5, 7), torch.ones(2, 3), 0.1], SingleComm())
    shown = "".join(traceback.format_exception(error.value))
    assert "= mm(v1, v0)" in shown
