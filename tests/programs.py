"""Training steps built node by node, and what they mean when N ranks run them, all in one process.

``reference`` says what N ranks must compute, whatever the passes do: the captured step, with the gradients and the loss
averaged between the ranks.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from zgraph import ops
from zgraph.config import Config
from zgraph.gradients import Gradients
from zgraph.lockstep import Value, Values, run_ranks
from zgraph.metrics import MAXIMA
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Input, Mesh, Origin, Phase, Program, Role, Stage, operand, target_name
from zgraph.recipe import complete
from zgraph.reference import averaged as averaged_over_ranks
from zgraph.reference import divide, join
from zgraph.scaling import LOSS_SCALE

aten = torch.ops.aten


def few_examples(num: int) -> settings:
    """So many examples, the same in every run; twenty times as many in ``make nightly``, and others each time."""
    return settings(max_examples=num if settings.default.derandomize else 20 * num)


def fewer_examples(part: float) -> settings:
    """This part of the examples that ``make quick`` and ``make test`` ask for: of a property of slow examples."""
    whole = settings.default
    return settings(max_examples=round(part * whole.max_examples) if whole.derandomize else whole.max_examples)


# Building


class Builder:
    """Builds a CAPTURED program, one node at a time."""

    def __init__(self) -> None:
        graph = fx.Graph()
        graph.output([])
        self.program = Program(graph, Stage.CAPTURED, Mesh(1), [], FakeTensorMode())

    def input(
        self,
        role: Role,
        name: str,
        key: str = "",
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> fx.Node:
        """A tensor; a float if it has no shape."""
        first = next(node for node in self.program.graph.nodes if node.op != "placeholder")
        val = 0.5 if shape is None else self.program.empty(shape, dtype, torch.device("cpu"))
        return self.program.placeholder(Input(role, name, key), val, before=first)

    def call(self, phase: Phase, target: Any, *args: Any, module: str = "", **kwargs: Any) -> fx.Node:
        """A call at the end of what there is."""
        origin = Origin(phase, module, f"model.py:{len(self.program.graph.nodes)} (forward)")
        return self.program.call(target, *args, origin=origin, before=self.program.output_node, **kwargs)

    def turned_batch(self, name: str, shape: Sequence[int]) -> fx.Node:
        """A part of the batch whose memory is that of its transpose."""
        node = self.input(Role.BATCH, name, shape=shape[::-1])
        with self.program.fake_mode:
            node.meta["val"] = node.meta["val"].t()
        return node

    def forward(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.call(Phase.FORWARD, target, *args, **kwargs)

    def backward(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.call(Phase.BACKWARD, target, *args, **kwargs)

    def finish(self, results: Mapping[Input | None, Any]) -> Program:
        """The program that returns ``results``; the loss is first."""
        self.program.set_results(list(results.values()), list(results))
        return self.program


def param(name: str) -> Input:
    return Input(Role.PARAM, name)


def state(name: str, key: str) -> Input:
    return Input(Role.OPT_STATE, name, key)


def one_layer() -> Program:
    """loss = sum(x @ w), trained by SGD with momentum: for goldens."""
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[2, 3]), b.input(Role.BATCH, "0", shape=[4, 2])
    m, lr = b.input(Role.OPT_STATE, "w", "m", shape=[2, 3]), b.input(Role.HYPER, "lr")
    y = b.forward(aten.mm.default, x, w)
    loss = b.forward(aten.sum.default, y)
    g = b.backward(aten.mm.default, b.backward(aten.t.default, x), b.backward(aten.ones_like.default, y))
    new_m = b.call(Phase.UPDATE, aten.add.Tensor, m, g, module="w")
    size = b.call(Phase.UPDATE, operator.neg, lr, module="w")
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, new_m, alpha=size, module="w")
    return b.finish({None: loss, param("w"): new, state("w", "m"): new_m})


def two_layers() -> Program:
    """``loss = sum(x @ w1 @ w2)`` trained by SGD with momentum, each with a learning rate of its own: for goldens."""
    b = Builder()
    w1, w2 = b.input(Role.PARAM, "w1", shape=[2, 3]), b.input(Role.PARAM, "w2", shape=[3, 1])
    x = b.input(Role.BATCH, "0", shape=[4, 2])
    h = b.forward(aten.mm.default, x, w1, module="first")
    y = b.forward(aten.mm.default, h, w2, module="second")
    loss = b.forward(aten.sum.default, y)
    gy = b.backward(aten.ones_like.default, y)
    gw2 = b.backward(aten.mm.default, b.backward(aten.t.default, h), gy, module="second")
    gh = b.backward(aten.mm.default, gy, b.backward(aten.t.default, w2), module="second")
    gw1 = b.backward(aten.mm.default, b.backward(aten.t.default, x), gh, module="first")
    results: dict[Input | None, Any] = {None: loss}
    for name, w, g in (("w1", w1, gw1), ("w2", w2, gw2)):
        lr = b.input(Role.HYPER, f"group_of_{name}.lr")
        m = b.input(Role.OPT_STATE, name, "m", shape=w.meta["val"].shape)
        new_m = b.call(Phase.UPDATE, aten.add.Tensor, m, g, module=name)
        size = b.call(Phase.UPDATE, operator.neg, lr, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, w, new_m, alpha=size, module=name)
        results[state(name, "m")] = new_m
    return b.finish(results)


def blocks(num: int = 2, *, dropout: bool = False) -> Program:
    """``x = x + 2 * tanh(x @ v) @ w`` so many times, in modules ``blocks.0``, ``blocks.1``, ...; trained by SGD."""
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 2])
    shapes = {f"{name}{i}": shape for i in range(num) for name, shape in (("v", [2, 6]), ("w", [6, 2]))}
    params = {name: b.input(Role.PARAM, name, shape=shape) for name, shape in shapes.items()}
    lr = b.input(Role.HYPER, "lr")
    saved = []
    for i in range(num):
        at = {"module": f"blocks.{i}"}
        y = b.forward(aten.tanh.default, b.forward(aten.mm.default, x, params[f"v{i}"], **at), **at)
        mask = b.forward(aten.bernoulli.p, y, 0.5, **at) if dropout else None
        dropped = y if mask is None else b.forward(aten.mul.Tensor, y, mask, **at)
        saved.append((x, y, mask, dropped))
        z = b.forward(aten.mm.default, dropped, params[f"w{i}"], **at)
        x = b.forward(aten.add.Tensor, x, z, alpha=2, **at)
    loss = b.forward(aten.sum.default, x)
    gx = b.backward(aten.expand.default, b.backward(aten.ones_like.default, loss), [4, 2])
    gradients = {}
    for i, (x, y, mask, dropped) in reversed(list(enumerate(saved))):
        at = {"module": f"blocks.{i}"}
        gz = b.backward(aten.mul.Tensor, gx, 2, **at)
        gradients[f"w{i}"] = b.backward(aten.mm.default, b.backward(aten.t.default, dropped, **at), gz, **at)
        gy = b.backward(aten.mm.default, gz, b.backward(aten.t.default, params[f"w{i}"], **at), **at)
        gy = gy if mask is None else b.backward(aten.mul.Tensor, gy, mask, **at)
        gh = b.backward(aten.tanh_backward.default, gy, y, **at)
        gradients[f"v{i}"] = b.backward(aten.mm.default, b.backward(aten.t.default, x, **at), gh, **at)
        back = b.backward(aten.mm.default, gh, b.backward(aten.t.default, params[f"v{i}"], **at), **at)
        gx = b.backward(aten.add.Tensor, gx, back, **at)
    results: dict[Input | None, Any] = {None: loss}
    for name, p in params.items():
        size = b.call(Phase.UPDATE, operator.neg, lr, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, p, gradients[name], alpha=size, module=name)
    return b.finish(results)


@dataclass(frozen=True)
class TableAndHead:
    """Of ``y = embedding(table, i) @ t(head)``, or ``@ head`` if that lies turned: tokens, rows and columns."""

    tokens: int
    rows: int
    columns: int
    turned: bool = False


def language_model(shape: TableAndHead) -> Program:
    """``loss = sum(y * y)`` for ``y = embedding(table, tokens) @ t(head)``, trained by SGD."""
    b = Builder()
    num, rows, columns = shape.tokens, shape.rows, shape.columns
    table = b.input(Role.PARAM, "table", shape=[rows, columns])
    head = b.input(Role.PARAM, "head", shape=[columns, rows] if shape.turned else [rows, columns])
    lr, indices = b.input(Role.HYPER, "lr"), b.input(Role.BATCH, "0", shape=[num], dtype=torch.int64)

    def turn(phase: Phase, x: fx.Node) -> fx.Node:
        return b.call(phase, aten.t.default, x, module="head")

    x = b.forward(aten.embedding.default, table, indices, module="table")
    right = head if shape.turned else turn(Phase.FORWARD, head)
    y = b.forward(aten.mm.default, x, right, module="head")
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, y, y))
    gy = b.backward(aten.mul.Tensor, y, 2)
    left, others = (x, gy) if shape.turned else (gy, x)
    ghead = b.backward(aten.mm.default, turn(Phase.BACKWARD, left), others, module="head")
    back = turn(Phase.BACKWARD, head) if shape.turned else head
    gx = b.backward(aten.mm.default, gy, back, module="head")
    gtable = b.backward(aten.embedding_dense_backward.default, gx, indices, rows, -1, False, module="table")
    size = b.call(Phase.UPDATE, operator.neg, lr)
    new = [
        b.call(Phase.UPDATE, aten.add.Tensor, p, g, alpha=size, module=name)
        for name, p, g in (("table", table, gtable), ("head", head, ghead))
    ]
    return b.finish({None: loss, param("table"): new[0], param("head"): new[1]})


# Order


def order(program: Program) -> str:
    """The calls that compute with matrices, communicate or update, in order: one a line, with the bucket's number."""
    number = {}
    lines = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = target_name(node.target).removeprefix("_c10d_functional.").removeprefix("aten.").partition(".")[0]
        module = node.meta["origin"].module.removeprefix("bucket")
        if node.target in ops.STARTS or node.target is ops.wait:
            number[node] = module if node.target in ops.STARTS else number[operand(node)]
            lines.append(f"{name.removesuffix('_into_tensor').removesuffix('_tensor')} {number[node] or 'loss'}")
        elif node.meta["origin"].phase is Phase.UPDATE and module and isinstance(node.meta["val"], torch.Tensor):
            lines.append(f"update {module}")
        elif node.target is aten.mm.default:
            lines.append(f"mm {node.meta['origin'].phase.value}")
    return "\n".join(lines)


# Networks


OPERATIONS = ("sin", "tanh", "wide", "narrow", "mul", "add", "dropout", "split")
"""What a layer of ``network`` may compute."""


def network(
    layers: Sequence[tuple[str, int]], *, rows: int = 4, width: int = 4, dtype: torch.dtype = torch.float64
) -> Program:
    """Layers that feed each other, with their true gradients; trained by SGD.

    Args:
        layers: of each, one of ``OPERATIONS``, and how many values back the second operand is, if it takes one.
        rows, width: of the batch.
        dtype: of all tensors.
    """
    b = Builder()
    values = [b.input(Role.BATCH, "0", shape=[rows, width], dtype=dtype)]
    lr = b.input(Role.HYPER, "lr")
    made: list[tuple[str, str, fx.Node, fx.Node, fx.Node | None]] = []
    params: dict[str, fx.Node] = {}
    for i, (kind, back) in enumerate(layers):
        x, module = values[-1], f"layers.{i}"
        like = [value for value in values if value.meta["val"].shape == x.meta["val"].shape]
        other: fx.Node | None = like[max(len(like) - 1 - back, 0)]
        if kind in ("wide", "narrow"):
            shape = [x.meta["val"].shape[1], 3 * width if kind == "wide" else width // 2]
            other = params[f"w{i}"] = b.input(Role.PARAM, f"w{i}", shape=shape, dtype=dtype)
            y = b.forward(aten.mm.default, x, other, module=module)
        elif kind in ("mul", "add"):
            y = b.forward(aten.mul.Tensor if kind == "mul" else aten.add.Tensor, x, other, module=module)
        elif kind == "dropout":
            other = b.forward(aten.bernoulli.p, x, 0.5, module=module)
            y = b.forward(aten.mul.Tensor, x, other, module=module)
        elif kind == "split":
            halves = b.forward(aten.split.Tensor, x, rows // 2, module=module)
            first, second = (b.forward(operator.getitem, halves, k, module=module) for k in range(2))
            y = b.forward(aten.cat.default, [second, first], module=module)
        else:
            y = b.forward(aten.sin.default if kind == "sin" else aten.tanh.default, x, module=module)
        made.append((kind, module, x, y, other))
        values.append(y)
    loss = b.forward(aten.sum.default, values[-1])
    gradient = {
        values[-1]: b.backward(aten.expand.default, b.backward(aten.ones_like.default, loss), [*y.meta["val"].shape])
    }

    def add(value: fx.Node, more: fx.Node) -> None:
        known = gradient.get(value)
        gradient[value] = more if known is None else b.backward(aten.add.Tensor, known, more)

    for kind, module, x, y, other in reversed(made):
        g, at = gradient[y], {"module": module}
        if kind in ("wide", "narrow"):
            assert other is not None
            add(other, b.backward(aten.mm.default, b.backward(aten.t.default, x, **at), g, **at))
            add(x, b.backward(aten.mm.default, g, b.backward(aten.t.default, other, **at), **at))
        elif kind == "mul":
            add(x, b.backward(aten.mul.Tensor, g, other, **at))
            assert other is not None
            add(other, b.backward(aten.mul.Tensor, g, x, **at))
        elif kind == "add":
            add(x, g)
            assert other is not None
            add(other, g)
        elif kind == "dropout":
            add(x, b.backward(aten.mul.Tensor, g, other, **at))
        elif kind == "split":
            halves = b.backward(aten.split.Tensor, g, rows // 2, **at)
            first, second = (b.backward(operator.getitem, halves, k, **at) for k in range(2))
            add(x, b.backward(aten.cat.default, [second, first], **at))
        elif kind == "sin":
            add(x, b.backward(aten.mul.Tensor, g, b.backward(aten.cos.default, x, **at), **at))
        else:
            add(x, b.backward(aten.tanh_backward.default, g, y, **at))
    results: dict[Input | None, Any] = {None: loss}
    for name, p in params.items():
        size = b.call(Phase.UPDATE, operator.neg, lr, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, p, gradient[p], alpha=size, module=name)
    return b.finish(results)


# Meaning


def values_for(program: Program, seed: int = 0, world: int = 1) -> list[Values]:
    """Inputs of a CAPTURED program for each rank: equal but for the batch and the buffers; all counts are equal.

    Whole numbers are not negative, and small.
    """
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(100, (), generator=generator).to(torch.float32)

    def random(val: Any) -> Value:
        if isinstance(val, torch.Tensor):
            drawn = torch.randn(val.shape, dtype=torch.float64, generator=generator)
            if not val.dtype.is_floating_point:
                drawn = drawn.abs().clamp(max=3)
            return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).copy_(drawn)
        return 0.1 + 0.8 * torch.rand((), generator=generator).item()

    shared: dict[Input, Value] = {
        what: count if what.key == "count" else random(node.meta["val"])
        for node, what in program.placeholders()
        if what.role not in (Role.BATCH, Role.BUFFER)
    }
    own = [(what, node.meta["val"]) for node, what in program.placeholders() if what not in shared]
    return [{**shared, **{what: random(val) for what, val in own}} for _ in range(world)]


def reference(captured: Program, inputs: Sequence[Values]) -> list[Values]:
    """What the ranks' results must be, whatever the passes do."""
    return run_ranks(averaged_over_ranks(captured), inputs)


def gradients_of(program: Program) -> dict[str, fx.Node]:
    """The gradient that each parameter's update reads, in a CAPTURED program."""
    return {
        node.meta["origin"].module: source
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta["origin"].phase is Phase.UPDATE and node.meta["origin"].module
        for source in node.all_input_nodes
        if source.op == "call_function" and source.meta["origin"].phase is not Phase.UPDATE
    }


def clipped(program: Program, limit: float) -> Program:
    """The same CAPTURED program, with all its gradients clipped to a norm."""
    complete(Gradients(program, gradients_of(program)), Config(clip_norm=limit))
    return program


def averaged(program: Program) -> Program:
    """The same CAPTURED program, with averages of its weights."""
    complete(Gradients(program, gradients_of(program)), Config(ema=0.9))
    return program


def noisy(program: Program) -> Program:
    """The same CAPTURED program, with noise in its gradients."""
    complete(Gradients(program, gradients_of(program)), Config(gradient_noise=0.1, clip_norm=0.1))
    return program


def with_maximum(program: Program, num_steps: int = 1) -> Program:
    """The same CAPTURED program, which tells the largest loss of its micro-batches and ranks."""
    loss = program.results()[0]
    vector = program.call(aten.reshape.default, loss, [1], origin=loss.meta["origin"], before=loss.next)
    gradients = Gradients(program, gradients_of(program))
    complete(gradients, Config(accumulate=num_steps), None, {MAXIMA: vector})
    return program


def scaled(program: Program, limit: float | None = None) -> Program:
    """The same CAPTURED program as one whose gradients are of a scaled loss."""
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    program.placeholder(LOSS_SCALE, program.empty([], torch.float32, torch.device("cpu")), before=first)
    complete(Gradients(program, gradients_of(program)), Config(precision="fp16", clip_norm=limit))
    return program


def rewritten(captured: Program, zero: int, world: int, bucket_bytes: int = 200) -> Program:
    """A CAPTURED program after all passes."""
    return run(default_passes(Config(zero, bucket_bytes), Mesh(world)), captured).program


def accumulated(program: Program, num_steps: int, *, weighted: bool = False, limit: float | None = None) -> Program:
    """The same CAPTURED program as the last of so many micro-batches, which count by what is in their batch."""
    weight = None
    if weighted:
        loss = program.results()[0]
        weight = program.call(aten.exp.default, loss, origin=loss.meta["origin"], before=loss.next)
    gradients = Gradients(program, gradients_of(program))
    complete(gradients, Config(accumulate=num_steps, clip_norm=limit), weight)
    return program


def assert_same_step(
    program: Program, captured: Program, *, late: bool = False, inputs: Sequence[Values] | None = None
) -> None:
    """The ranks of ``program`` compute, bit for bit, the captured step with mean gradients.

    A norm of all gradients is added up in another order, so are means that are taken inside of nodes first, and so may
    be products of small matrices that are made in tiles; a step that has one of them is compared to a tolerance.

    Args:
        late: see ``run_ranks``.
        inputs: of each rank, for the captured program; by default ``values_for`` it.
    """
    inputs = values_for(captured, world=program.mesh.size) if inputs is None else inputs
    found, expected = join(program, run_ranks(program, divide(program, inputs), late=late)), reference(captured, inputs)
    has_norm = bool(captured.graph.find_nodes(op="call_function", target=ops.add_up))
    has_tiles = any(ops.allocating(node.target) is ops.product_columns for node in program.graph.nodes)
    (assert_close if has_norm or has_tiles or program.mesh.has_levels else assert_identical)(found, expected)


def assert_close(found: Sequence[Values], expected: Sequence[Values]) -> None:
    """Every rank has the same names, and values that differ by rounding alone, in float32 if any does; NaN is NaN."""
    dtypes = {v.dtype for mine in expected for v in mine.values() if isinstance(v, torch.Tensor)}
    rounding = 1e-5 if torch.float32 in dtypes else 1e-11
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert set(mine) == set(theirs)
        for what, value in theirs.items():
            wanted = torch.as_tensor(value)
            torch.testing.assert_close(
                torch.as_tensor(mine[what]), wanted, rtol=rounding, atol=rounding, equal_nan=True,
                msg=lambda text, rank=rank, what=what: f"rank {rank}: {what or 'loss'}: {text}",
            )  # fmt: skip


def assert_identical(found: Sequence[Values], expected: Sequence[Values]) -> None:
    """Every rank has the same names and, bit for bit, the same values."""
    assert len(found) == len(expected)
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert set(mine) == set(theirs)
        for what, value in theirs.items():
            same = torch.as_tensor(mine[what]), torch.as_tensor(value)
            assert torch.equal(*same), f"rank {rank}: {what or 'loss'} is {same[0]}, not {same[1]}"
