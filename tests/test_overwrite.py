"""Calls store their results where nothing reads what lies there any more, and compute what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.operators import differentiable, name_of
from tests.programs import Builder, assert_same_step, few_examples, param, rewritten
from tests.recipes import Recipe, build, recipes
from tests.reference import slow
from tests.test_into import as_bytes
from tests.test_liveness import assert_counts_agree
from tests.test_placement import assert_good, assert_same_in_an_arena
from zgraph import ops, placement
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.into import out_overload
from zgraph.liveness import held_bytes, lifetimes
from zgraph.machines import preset
from zgraph.passes import OverwriteOperands, default_passes, overwrite
from zgraph.passes.schedule import Holding
from zgraph.pipeline import run
from zgraph.placement import place
from zgraph.program import Mesh, Phase, Program, Role, Stage

aten = torch.ops.aten

Then = Callable[[Builder, fx.Node, fx.Node], Any]
Change = Callable[[Program, dict[str, fx.Node]], None]


@pytest.fixture(autouse=True)
def _small_values_count() -> Iterator[None]:
    """Values of programs that are built by hand are small."""
    with mock.patch.object(overwrite, "SMALLEST_BYTES", 1), mock.patch.object(placement, "SMALLEST_BYTES", 1):
        yield


def last(*given: Any) -> Any:
    """Nothing more: the gradient of the logits itself."""
    return given[-1]


def classifier(then: Then = last) -> Program:
    """``loss = sum(log_softmax(x @ w) * y)``, trained by SGD.

    Args:
        then: makes, of the gradient of the logarithms and of that of the logits, what is multiplied for that of w.
    """
    b = Builder()
    w, lr = b.input(Role.PARAM, "w", shape=[3, 4]), b.input(Role.HYPER, "lr")
    x, y = b.input(Role.BATCH, "0", shape=[5, 3]), b.input(Role.BATCH, "1", shape=[5, 4])
    logs = b.forward(aten._log_softmax.default, b.forward(aten.mm.default, x, w), 1, False)
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, logs, y))
    g = b.backward(aten.mul.Tensor, y, loss)
    z = b.backward(aten._log_softmax_backward_data.default, g, logs, 1, torch.float64)
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), then(b, g, z))
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gw, lr, module="w")
    return b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")})


def calls(program: Program, phase: Phase) -> str:
    """The calls of a phase."""
    lines = zip(program.text().splitlines(), program.graph.nodes, strict=True)
    return "\n".join(line for line, n in lines if n.op == "call_function" and n.meta["origin"].phase is phase)


def test_logarithms_of_softmax_are_written_over_logits() -> None:
    program = rewritten(classifier(), 0, 1)
    assert_expected_inline(
        calls(program, Phase.FORWARD),
        """\
%4: f64[12] = aten.slice.Tensor(%0, 0, 0, 12)
%5: f64[3, 4] = aten.view.default(%4, [3, 4])
%6: f64[5, 4] = aten.mm.default(%2, %5)
%7: f64[5, 4] = aten._log_softmax.out(%6, 1, False, out=%6)
%8: f64[5, 4] = aten.mul.Tensor(%7, %3)
%9: f64[] = aten.sum.default(%8)""",
    )
    assert_same_in_an_arena(classifier(), program)
    assert_counts_agree(program)


def test_a_gradient_of_logits_is_written_over_that_of_their_logarithms() -> None:
    captured = classifier(lambda b, _, z: b.backward(aten.neg.default, z))
    program = rewritten(captured, 0, 1)
    assert_expected_inline(
        calls(program, Phase.BACKWARD),
        """\
%10: f64[5, 4] = aten.mul.Tensor(%3, %9)
%11: f64[5, 4] = aten._log_softmax_backward_data.out(%10, %7, 1, torch.float64, out=%10)
%12: f64[3, 5] = aten.t.default(%2)
%13: f64[5, 4] = aten.neg.out(%11, out=%11)
%14: f64[3, 4] = aten.mm.default(%12, %13)
%15: f64[12] = aten.reshape.default(%14, [-1])
%16: f64[4] = aten.full.default([4], 0, device=cpu, dtype=torch.float64)
%17: f64[16] = aten.cat.default([%15, %16])""",
    )
    assert_same_in_an_arena(captured, program)
    assert_counts_agree(program)


def stored(captured: Program, zero: int = 0, world: int = 1) -> list[str]:
    """The operators that store their results over an operand."""
    program = rewritten(captured, zero, world)
    assert_same_step(program, captured)
    over = (node for node in program.graph.nodes if node.target not in ops.INTO and ops.out_of(node.target))
    return [node.target._opname for node in over]


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (last, ["_log_softmax_backward_data"]),
        (lambda b, g, z: b.backward(aten.sub.Tensor, z, g), ["sub"]),  # over z: g is read as well, and ends as well
        (lambda b, g, z: b.backward(aten.mul.Tensor, z, b.backward(aten.view.default, g, [5, 4])), ["mul"]),
        (lambda b, _, z: b.backward(aten.add.Tensor, z, z), ["_log_softmax_backward_data", "add"]),
        (lambda b, _, z: b.backward(aten.relu.default, z), ["_log_softmax_backward_data"]),  # has no way to be told
        (lambda b, _, z: b.backward(aten.cumsum.default, z, 0), ["_log_softmax_backward_data"]),  # reads others' sums
    ],
    ids=["alone", "read again", "read through a view", "read twice by one", "not told", "not elementwise"],
)
def test_what_is_written_over_is_read_by_nothing_later(then: Then, expected: list[str]) -> None:
    assert stored(classifier(then)) == ["_log_softmax", *expected]


def test_rows_along_another_dimension_are_not_written_over() -> None:
    b = Builder()
    w, x, lr = b.input(Role.PARAM, "w", shape=[3, 4]), b.input(Role.BATCH, "0", shape=[3, 4]), b.input(Role.HYPER, "lr")
    logs = b.forward(aten._log_softmax.default, b.forward(aten.mul.Tensor, x, w), 0, False)
    g = b.backward(aten.mul.Tensor, x, 2.0)
    gw = b.backward(aten._log_softmax_backward_data.default, g, logs, 0, torch.float64)
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gw, lr, module="w")
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")
    assert stored(b.finish({None: b.forward(aten.sum.default, logs), param("w"): new})) == []


def attention(scores: Callable[[Builder, fx.Node], fx.Node], dim: int = 1) -> Program:
    """``loss = sum(softmax(x * w))``, trained by SGD.

    Args:
        scores: makes what the softmax reads, of the product.
    """
    b = Builder()
    w, x, lr = b.input(Role.PARAM, "w", shape=[3, 4]), b.input(Role.BATCH, "0", shape=[3, 4]), b.input(Role.HYPER, "lr")
    product = b.forward(aten.mul.Tensor, x, w)
    y = b.forward(aten._softmax.default, scores(b, product), dim, False)
    loss = b.forward(aten.sum.default, y)
    gz = b.backward(aten._softmax_backward_data.default, b.backward(aten.mul.Tensor, x, loss), y, 1, torch.float64)
    gw = b.backward(aten.mul.Tensor, gz, b.backward(aten.sin.default, product))
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gw, lr, module="w")
    return b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")})


def across(b: Builder, x: fx.Node) -> fx.Node:
    """Scores that lie in memory column by column."""
    return b.forward(aten.t.default, b.forward(aten.view.default, b.forward(aten.cos.default, x), [4, 3]))


@pytest.mark.parametrize(
    ("scores", "dim", "is_over"),
    [
        (lambda b, x: b.forward(aten.cos.default, x), 1, True),
        (lambda b, x: b.forward(aten.view.default, b.forward(aten.cos.default, x), [3, 4]), -1, True),
        (lambda b, x: b.forward(aten.cos.default, x), 0, False),  # its rows are columns
        (lambda _, x: x, 1, False),  # backward reads it
        (lambda b, x: b.forward(aten.view.default, x, [3, 4]), 1, False),
        (across, 1, False),  # it lies otherwise
        (lambda b, x: b.forward(aten.cumsum.default, x, 0), 1, True),
        (lambda b, x: b.forward(aten.relu.default, x), 1, False),  # only the C library has a place for it
    ],
    ids=["alone", "a view", "columns", "read later", "read later itself", "strides", "by another", "not told"],
)  # fmt: skip
def test_in_forward_a_softmax_is_written_over_what_nothing_reads_later(
    scores: Callable[[Builder, fx.Node], fx.Node], dim: int, is_over: bool
) -> None:
    assert ("_softmax" in stored(attention(scores, dim))) is is_over


def test_what_else_forward_has_made_stays() -> None:
    """It may be made again instead of kept, or be sent to a disk, which is decided by looking at it as it is."""
    b = Builder()
    w, x, lr = b.input(Role.PARAM, "w", shape=[3, 4]), b.input(Role.BATCH, "0", shape=[3, 4]), b.input(Role.HYPER, "lr")
    y = b.forward(aten.tanh.default, b.forward(aten.mul.Tensor, x, w))
    loss = b.forward(aten.sum.default, y)
    gy = b.backward(aten.expand.default, loss, [3, 4])
    gz = b.backward(aten.tanh_backward.default, gy, y)
    gw = b.backward(aten.mul.Tensor, gz, x)
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gw, lr, module="w")
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")
    assert stored(b.finish({None: loss, param("w"): new})) == ["mul"]


# Properties


def without(program: Program, zero: int, world: int) -> Program:
    """A captured program after all passes but the one."""
    passes = (p for p in default_passes(Config(zero, 200), Mesh(world)) if not isinstance(p, OverwriteOperands))
    return run(list(passes), program).program


def peak(program: Program) -> int:
    return max(held_bytes(lifetimes(program), len(program.graph.nodes)))


@few_examples(10)
@given(recipes(), st.integers(0, 3), st.sampled_from([1, 2, 3]), st.booleans())
def test_any_step_computes_the_same_and_holds_no_more(recipe: Recipe, zero: int, world: int, late: bool) -> None:
    captured = build(recipe)
    program = rewritten(captured, zero, world)
    assert_same_step(program, captured, late=late)
    assert peak(program) <= peak(without(captured, zero, world))
    assert_good(program, place(program))


@few_examples(10)
@given(recipes(), st.integers(0, 3))
def test_any_step_computes_the_same_in_an_arena(recipe: Recipe, zero: int) -> None:
    captured = build(recipe)
    assert_same_in_an_arena(captured, rewritten(captured, zero, 1))


def test_the_scheduler_foresees_what_will_be_written_over() -> None:
    passes = default_passes(Config(0, 200), Mesh(1), hardware=preset("H100"))
    num_before = next(i for i, p in enumerate(passes) if p.gives is Stage.SCHEDULED) + 1
    scheduled = run(passes[:num_before], classifier()).program
    done = run(passes[num_before:], scheduled).program
    assert max(Holding(scheduled, staged=False).now()) == peak(done) == peak(without(classifier(), 0, 1)) - 5 * 4 * 8


class Overwrite(TorchDispatchMode):
    """Computes every call a second time, over each operand that it may write over."""

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        result = func(*args, **kwargs)
        told = out_overload(func) if isinstance(func, torch._ops.OpOverload) else None
        if told is None or not isinstance(result, torch.Tensor) or result.is_complex() or not self.may(func, args):
            return result
        for index, leaf in enumerate(before):
            alike = isinstance(leaf, torch.Tensor) and leaf.layout is result.layout is torch.strided
            if not alike or (leaf.shape, leaf.stride(), leaf.dtype) != (result.shape, result.stride(), result.dtype):
                continue
            given = [*before[:index], leaf.clone(), *before[index + 1 :]]
            again, named = pytree.tree_unflatten(given, spec)
            found = told[0](*again, **named, **{told[1]: given[index]})
            assert found.data_ptr() == given[index].data_ptr(), func
            assert as_bytes(found) == as_bytes(result), func
            self.compared.add(func)
        return result

    def may(self, func: Any, args: Any) -> bool:
        graph = fx.Graph()
        nodes = pytree.tree_map(lambda x: x if not isinstance(x, torch.Tensor) else graph.placeholder("x"), args)
        for node, x in zip(pytree.tree_leaves(nodes), pytree.tree_leaves(args), strict=True):
            if isinstance(node, fx.Node):
                node.meta["val"] = x
        return ops.may_overwrite(graph.call_function(func, tuple(nodes)))


COMMON = ("nn.functional.gelu", "log_softmax", "softmax", "add", "mul", "where", "lerp", "addcmul", "tanh", "clamp")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("num_samples", [0, *slow(4)], ids=["common ones", "all"])
def test_every_operator_that_may_gives_over_an_operand_what_it_gives_elsewhere(
    num_samples: int, dtype: torch.dtype
) -> None:
    overwrites = Overwrite()
    for op in differentiable():
        if dtype in op.supported_backward_dtypes("cpu") and (num_samples or name_of(op) in COMMON):
            for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=True), num_samples or 8):
                torch.manual_seed(0)
                with overwrites:
                    results = pytree.tree_leaves(op(sample.input, *sample.args, **sample.kwargs))
                    losses = [r.abs().sum() for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
                    if losses:
                        torch.stack([loss.float() for loss in losses]).sum().backward()
    expected = {aten.gelu_backward.default, aten._log_softmax_backward_data.default, aten.mul.Tensor, aten.where.self}
    assert expected <= overwrites.compared
    assert num_samples == 0 or len(overwrites.compared) > 60


def test_large_rows_give_the_same_over_an_operand() -> None:
    overwrites = Overwrite()
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for width in (7, 1000, 33000):
            g, x = (torch.randn(9, width, generator=generator).to(dtype) for _ in range(2))
            with overwrites:
                aten._log_softmax_backward_data.default(g, x.log_softmax(1), 1, dtype)
                aten._softmax_backward_data.default(g, x.softmax(1), -1, dtype)
    expected = {aten._log_softmax.default, aten._softmax.default}
    assert overwrites.compared == expected | {
        aten._log_softmax_backward_data.default,
        aten._softmax_backward_data.default,
    }


# What the verifier refuses


def broken(change: Change, then: Then) -> str:
    """What is said of a program after all passes of which a pass of the user's has broken a rule."""

    class Break(OverwriteOperands):
        def rewrite(self, program: Program) -> None:
            calls = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
            change(program, {node.target._opname: node for node in calls})

    passes = [p for p in default_passes(Config(0, 200), Mesh(1)) if not isinstance(p, OverwriteOperands)]
    with pytest.raises(VerifyError) as raised:
        run([*passes, Break()], classifier(then))
    return raised.value.what


def tell(node: fx.Node, source: fx.Node) -> None:
    """Let a call store its result over a value."""
    told = out_overload(node.target)  # type: ignore[arg-type]
    assert told is not None
    node.target, name = told
    node.kwargs = {**node.kwargs, name: source}


def over(name: str, index: int) -> Change:
    return lambda _, calls: tell(calls[name], calls[name].all_input_nodes[index])


def over_the_batch(program: Program, calls: dict[str, fx.Node]) -> None:
    tell(calls["neg"], program.inputs(Role.BATCH)["1", ""])


def over_another_form(_: Program, calls: dict[str, fx.Node]) -> None:
    logits = calls["_log_softmax"]
    tell(calls["neg"], logits.graph.find_nodes(op="call_function", target=aten.view.default)[0])


def flattened(b: Builder, _: fx.Node, z: fx.Node) -> fx.Node:
    return b.backward(aten.sub.Tensor, z, b.backward(aten.view.default, b.backward(aten.view.default, z, [20]), [5, 4]))


def negated(b: Builder, _: fx.Node, z: fx.Node) -> fx.Node:
    return b.backward(aten.neg.default, z)


REFUSED: dict[str, tuple[Change, Then, str]] = {
    "read later": (
        over("_log_softmax_backward_data", 0),
        lambda b, g, z: b.backward(aten.sub.Tensor, z, g),
        "reads what _log_softmax_backward_data_default has written over",
    ),
    "logits that are read later": (
        over("_log_softmax", 0),
        lambda b, _, z: b.backward(aten.sub.Tensor, z, b.backward(aten.sin.default, z.args[1].args[0])),
        "reads what _log_softmax_default has written over",
    ),
    "read through a view": (over("sub", 0), flattened, "which lies in what it writes over"),
    "of the batch": (over_the_batch, negated, "writes over batch:1, but does not return its new value"),
    "not elementwise": (
        over("cumsum", 0),
        lambda b, _, z: b.backward(aten.cumsum.default, z, 0),
        "writes to its arguments",
    ),
    "another form": (over_another_form, negated, "has another form"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused(mistake: str) -> None:
    change, then, expected = REFUSED[mistake]
    assert expected in broken(change, then)
