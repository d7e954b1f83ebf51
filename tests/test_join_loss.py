"""The gradient of logits a few rows at a time: the same bits, one tensor of the size of the logits, the same step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn

import zgraph
from tests.programs import Builder, assert_same_step, param, rewritten
from tests.test_into import as_bytes
from tests.test_liveness import assert_counts_agree
from tests.test_placement import assert_same_in_an_arena
from zgraph import ops, placement
from zgraph.codegen import library
from zgraph.codegen.region import Region
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.liveness import held_bytes, lifetimes
from zgraph.machines import preset
from zgraph.passes import JoinLossBackward, OverwriteOperands, default_passes, overwrite
from zgraph.passes.schedule import Holding
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Phase, Program, Role, Stage, operand

aten = torch.ops.aten

ROWS, CLASSES = 5, 4
ONE = ROWS * CLASSES * 8
"""Bytes of logits."""
AT_ONCE = 2 * CLASSES * 8

Change = Callable[[fx.Node], None]


@pytest.fixture(autouse=True)
def _small_values_count() -> Iterator[None]:
    """Logits of programs that are built by hand are few: two rows are computed at once."""
    with (
        mock.patch.object(overwrite, "SMALLEST_BYTES", 1),
        mock.patch.object(placement, "SMALLEST_BYTES", 1),
        mock.patch.dict(ops.AT_ONCE_BYTES, cpu=AT_ONCE),
    ):
        yield


# The operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "classes"), [(64, 1000), (33, 32768), (3, 7), (0, 5), (1, 300_000)])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("has_weights", [False, True])
def test_it_gives_the_bits_of_the_two_that_it_is_made_of(
    dtype: torch.dtype, num_rows: int, classes: int, reduction: int, has_weights: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logs = (torch.randn(num_rows, classes, generator=generator) * 5).to(dtype).log_softmax(1)
    target = torch.randint(classes, (num_rows,), generator=generator)
    target[1:2] = -100
    weight = torch.rand(classes, generator=generator).to(dtype) if has_weights else None
    loss, count = aten.nll_loss_forward(logs, target, weight, reduction, -100)
    gradient = torch.rand(loss.shape, generator=generator).to(dtype)
    of_loss = (gradient, logs, target, weight, reduction, -100, count)
    expected = aten._log_softmax_backward_data(aten.nll_loss_backward(*of_loss), logs, 1, dtype)
    for at_once in (2**20, 8 * classes * logs.itemsize, 1):
        with mock.patch.dict(ops.AT_ONCE_BYTES, cpu=at_once):
            assert as_bytes(ops.cross_entropy_backward(*of_loss, 1)) == as_bytes(expected)
            over = logs.clone()
            given = (gradient, over, *of_loss[2:], 1)
            assert torch.ops.zgraph.cross_entropy_backward.out(*given, out=over) is over
            assert as_bytes(over) == as_bytes(expected)


# The pass


Then = Callable[[Builder, fx.Node, fx.Node, fx.Node], fx.Node]


def classifier(
    then: Then = lambda *given: given[-1],
    *,
    weighed: bool = False,
    dim: int = 1,
    is_late: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Program:
    """``loss = cross_entropy(x @ w, argmax(x))``, trained by SGD.

    Args:
        then: makes, of the logarithms, of their gradient and of that of the logits, what is multiplied for that of w.
        weighed: classes have weights.
        dim: of classes, as the operators are given it.
        is_late: the loss's gradient is made of a product, which no region has.
    """
    b = Builder()
    w, lr = b.input(Role.PARAM, "w", shape=[3, CLASSES], dtype=dtype), b.input(Role.HYPER, "lr")
    x = b.input(Role.BATCH, "0", shape=[ROWS, 3], dtype=dtype)
    t = b.forward(aten.argmax.default, x, 1)
    weight = b.input(Role.BUFFER, "weight", shape=[CLASSES]) if weighed else None
    logs = b.forward(aten._log_softmax.default, b.forward(aten.mm.default, x, w), dim, False)
    pair = b.forward(aten.nll_loss_forward.default, logs, t, weight, 1, -100)
    loss, count = (b.forward(operator.getitem, pair, index) for index in (0, 1))
    one = b.backward(aten.ones_like.default, loss)
    if is_late:
        product = b.backward(aten.mm.default, b.backward(aten.t.default, x), b.backward(aten.mul.Tensor, x, loss))
        one = b.backward(aten.sum.default, product)
    g = b.backward(aten.nll_loss_backward.default, one, logs, t, weight, 1, -100, count)
    z = b.backward(aten._log_softmax_backward_data.default, g, logs, dim, dtype)
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), then(b, logs, g, z))
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gw, lr, module="w")
    return b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")})


def calls(program: Program) -> str:
    """Those of forward and backward with tensors of the size of logits."""
    lines = zip(program.text().splitlines(), program.graph.nodes, strict=True)
    return "\n".join(line for line, n in lines if f"f64[{ROWS}, {CLASSES}]" in line.split("=")[0])


def test_one_tensor_of_the_size_of_the_logits_is_there_at_a_time() -> None:
    captured = classifier()
    program = rewritten(captured, 0, 1)
    assert_expected_inline(
        calls(program),
        """\
%6: f64[5, 4] = aten.mm.default(%2, %5)
%7: f64[5, 4] = aten._log_softmax.out(%6, 1, False, out=%6)
%12: f64[5, 4] = zgraph.cross_entropy_backward.out(%11, %7, %3, None, 1, -100, %10, 1, out=%7)""",
    )
    assert_same_step(program, captured)
    assert_same_in_an_arena(captured, program)
    assert_counts_agree(program)
    alike = [life for life in lifetimes(program) if life.num_bytes == ONE]
    assert [life.node.target for life in alike] == [aten.mm.default]
    beside = [life for life in lifetimes(program) if life.is_beside]
    assert [(life.num_bytes, life.last - life.first) for life in beside] == [(AT_ONCE, 0)]


def joined(captured: Program, zero: int = 0, world: int = 1) -> list[str]:
    """Of each gradient of logits that is computed a few rows at a time, where it is stored."""
    program = rewritten(captured, zero, world)
    assert_same_step(program, captured)
    nodes = [n for n in program.graph.nodes if ops.allocating(n.target) is ops.cross_entropy_backward]
    return ["over" if n.kwargs.get("out") is n.args[1] else "beside" for n in nodes]


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (lambda *given: given[-1], ["over"]),
        (lambda b, logs, _, z: b.backward(aten.mul.Tensor, z, logs), ["beside"]),
        (lambda b, logs, _, z: b.backward(aten.mul.Tensor, z, b.backward(aten.view.default, logs, [5, 4])), ["beside"]),
        (lambda b, _, g, z: b.backward(aten.add.Tensor, z, g), []),  # as where labels are smoothed
    ],
    ids=["alone", "logarithms read again", "through a view", "gradient read again"],
)
def test_it_is_stored_over_the_logarithms_where_nothing_reads_them_later(then: Then, expected: list[str]) -> None:
    assert joined(classifier(then)) == expected


@pytest.mark.parametrize(("zero", "world"), [(0, 1), (1, 2), (3, 2), (3, 3)])
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("weighed", [False, True])
def test_any_sharding_joins_them(zero: int, world: int, dim: int, weighed: bool) -> None:
    assert joined(classifier(weighed=weighed, dim=dim), zero, world) == ["over"]


def test_few_rows_are_left_alone() -> None:
    with mock.patch.dict(ops.AT_ONCE_BYTES, cpu=ONE):
        assert joined(classifier()) == []


def test_the_scheduler_foresees_it() -> None:
    passes = default_passes(Config(0, 200), Mesh(1), hardware=preset("H100"))
    num_before = next(i for i, p in enumerate(passes) if p.gives is Stage.SCHEDULED) + 1
    scheduled = run(passes[:num_before], classifier()).program
    done = run(passes[num_before:], scheduled).program
    at = next(i for i, n in enumerate(scheduled.graph.nodes) if n.target is aten.nll_loss_backward.default)
    alive = held_bytes([life for life in lifetimes(done) if not life.is_beside], done.num_nodes())
    (node,) = (n for n in done.graph.nodes if n.target is torch.ops.zgraph.cross_entropy_backward.out)
    assert Holding(scheduled, staged=False).now()[at] == alive[list(done.graph.nodes).index(node)]


# Training


class Classifies(nn.Module):
    """Gives the loss of 11 classes."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.layers, self.loss = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 11)), loss

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return self.loss(self.layers(x), t)


@pytest.mark.parametrize(
    ("loss", "options", "num"),
    [
        (F.cross_entropy, {}, 1),
        (lambda y, t: F.cross_entropy(y, t, weight=torch.arange(1.0, 12)), {}, 1),
        (lambda y, t: F.cross_entropy(y, t, ignore_index=3, reduction="sum"), {}, 1),
        (lambda y, t: (F.cross_entropy(y, t, reduction="none") * t).mean(), {}, 1),
        (lambda y, t: F.nll_loss(F.log_softmax(y, -1), t), {}, 1),
        (lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1), {}, 0),
        (lambda y, t: F.cross_entropy(y.view(4, 10, 11).mT, t.view(4, 10)), {}, 0),
        (F.cross_entropy, {"accumulate": 2, "clip_norm": 1.0}, 1),
        (F.cross_entropy, {"precision": "bf16"}, 1),
        (F.cross_entropy, {"recompute": ["layers"]}, 1),
        (F.cross_entropy, {"memory_first": True}, 1),
        (F.cross_entropy, {"offload": {"activations": "disk"}}, 1),
    ],
    ids=[
        "mean",
        "weights",
        "ignored",
        "none",
        "logarithms",
        "smoothing",
        "2d",
        "micro-batches",
        "bf16",
        "recompute",
        "memory first",
        "offload",
    ],
)
def test_training_is_bit_for_bit_what_it_is_with_two_operators(loss: Any, options: dict[str, Any], num: int) -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    t = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1))
    found = []
    for at_once in (100, 2**20):
        torch.manual_seed(0)
        model = Classifies(loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        written_over = mock.patch.object(overwrite, "SMALLEST_BYTES", 1)
        with mock.patch.dict(ops.AT_ONCE_BYTES, cpu=at_once), written_over:
            zgraph.compile(model, optimizer, **options)
            losses = [model.train_step(x, t) for _ in range(3)]
        targets = [ops.allocating(node.target) for node in model.program.graph.nodes]
        assert targets.count(ops.cross_entropy_backward) == (num if at_once == 100 else 0)
        state = optimizer.state_dict()["state"]
        everything = [*losses, *model.state_dict().values(), *(v for each in state.values() for v in each.values())]
        found.append(list(map(as_bytes, everything)))
    assert found[0] == found[1]


@pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")
def test_a_region_keeps_its_calls_and_is_written_over_the_logarithms() -> None:
    captured = classifier(is_late=True, dtype=torch.float32)
    program = run(default_passes(Config(0, 200, kernels="zgraph"), Mesh(1)), captured).program
    (region,) = (n for n in program.graph.nodes if isinstance(n.target, Region))
    assert "aten.nll_loss_backward.default" in str(region.target)
    assert "aten._log_softmax_backward_data.default" in str(region.target)
    assert region.target.writes == (1,)
    assert ops.root_of(operand(region, 1)).target is aten._log_softmax.out
    assert not program.graph.find_nodes(op="call_function", target=ops.cross_entropy_backward)


# What the verifier refuses


def of_logits(program: Program) -> fx.Node:
    (found,) = program.graph.find_nodes(op="call_function", target=ops.cross_entropy_backward)
    return found


def broken(change: Change, then: Then = lambda *given: given[-1]) -> str:
    """What is said of a program with its calls joined, of which a pass of the user's has broken a rule."""

    class Break(Pass):
        takes = gives = Stage.INPLACE

        def rewrite(self, program: Program) -> None:
            change(of_logits(program))

    passes = [p for p in default_passes(Config(0, 200), Mesh(1)) if not isinstance(p, OverwriteOperands)]
    assert any(isinstance(p, JoinLossBackward) for p in passes)
    with pytest.raises(VerifyError) as raised:
        run([*passes, Break()], classifier(then))
    return raised.value.what


def tell(node: fx.Node, source: fx.Node) -> None:
    node.target, node.kwargs = torch.ops.zgraph.cross_entropy_backward.out, {"out": source}


def give(index: int, value: Any) -> Change:
    return lambda node: node.update_arg(index, value(node) if callable(value) else value)


def over_the_weights(node: fx.Node) -> None:
    weights = node.graph.find_nodes(op="call_function", target=aten.view.default)[0]
    tell(node, weights)


REFUSED: dict[str, tuple[Change, Then, str]] = {
    "logarithms that are read later": (
        lambda node: tell(node, operand(node, 1)),
        lambda b, logs, _, z: b.backward(aten.mul.Tensor, z, logs),
        "reads what _log_softmax_backward_data_default has written over",
    ),
    "over another form": (over_the_weights, lambda *given: given[-1], "has another form"),
    "over logits, which are another's": (
        lambda node: tell(node, operand(operand(node, 1))),
        lambda b, logs, _, z: b.backward(aten.mul.Tensor, z, logs.args[0]),
        "reads what _log_softmax_backward_data_default has written over",
    ),
    "of the sum": (give(4, 2), lambda *given: given[-1], "changed what the step computes"),
    "another row is ignored": (give(5, 0), lambda *given: given[-1], "changed what the step computes"),
    "of logits": (give(1, lambda node: operand(operand(node, 1))), lambda *given: given[-1], "changed what the step"),
    "the loss as its gradient": (
        give(0, lambda node: operand(operand(node))), lambda *given: given[-1], "changed what the step computes"
    ),
    "along the other dimension": (give(7, 0), lambda *given: given[-1], "cannot take its arguments"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused(mistake: str) -> None:
    change, then, expected = REFUSED[mistake]
    assert expected in broken(change, then)
