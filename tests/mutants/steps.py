"""Small training steps that between them have everything a pass can get wrong."""

from __future__ import annotations

import operator
from typing import Any

import torch

from tests.programs import (
    Builder,
    TableAndHead,
    accumulated,
    averaged,
    blocks,
    clipped,
    language_model,
    noisy,
    param,
    scaled,
    two_layers,
    with_maximum,
)
from tests.recipes import Param, Recipe, Rule, build
from zgraph.accumulation import micro_step
from zgraph.program import Guard, Input, Phase, Program, Role, StateInit

aten = torch.ops.aten

TABLE_AND_HEAD = "a table and a head"


def many_parameters(*, first: bool = False) -> Program:
    """Frozen, unused, 0-dim, empty and low-precision parameters; two rules; state of many kinds; dropout."""
    shapes = [(3, 5), (17,), (), (0, 3), (4, 4), (7,), (3, 5)]
    uses = ["trained", "trained", "trained", "trained", "frozen", "unused", "trained"]
    params = tuple(
        Param(shape, use, group=i // 4, low=i == 6, shares=False)
        for i, (shape, use) in enumerate(zip(shapes, uses, strict=True))
    )
    rules = (
        Rule(("m0",), (("g",), ("p",)), count=True, keeps=True),
        Rule(("add", ("p",), ("zeros", ("p",))), (("add", ("g",), ("p",)),), count=False, keeps=False),
    )
    return build(Recipe(params, rules, backward=(6, 5, 4, 3, 2, 1, 0), first=first, random=True))


def mixed_elements(*, first: bool = False) -> Program:
    """Parameters whose updates mix elements, two of one shape among them; two kinds of state and a count."""
    params = tuple(
        Param(shape, "trained", group=0, low=False, shares=False) for shape in ((3, 5), (17,), (3, 5), (), (4, 4))
    )
    rule = Rule(("m0",), (("g",), ("p",)), count=True, keeps=True, mixes=True)
    return build(Recipe(params, (rule,), backward=(4, 3, 2, 1, 0), first=first, random=False))


def read_in_low_precision() -> Program:
    """Two weights that are read in float32 only, and two in one bucket of which one is read as it is, too."""
    b = Builder()
    names = ("u", "v", "w", "z")
    u, v, w, z = params = [b.input(Role.PARAM, name, shape=[3, 3]) for name in names]
    x, lr = b.input(Role.BATCH, "0", shape=[3, 3]), b.input(Role.HYPER, "lr")

    def low(node: Any, call: Any = b.forward) -> Any:
        return call(aten._to_copy.default, node, dtype=torch.float32)

    first, second, third = low(u), low(v), low(w)
    h = b.forward(aten.mm.default, b.forward(aten.mm.default, low(x), first), second)
    y = b.forward(aten._to_copy.default, b.forward(aten.mm.default, h, third), dtype=torch.float64)
    whole = b.forward(aten.mm.default, b.forward(aten.add.Tensor, y, w), z)
    loss = b.forward(aten.sum.default, whole)
    gy = b.backward(aten.mm.default, whole, b.backward(aten.t.default, z))
    gh = b.backward(aten.mm.default, low(gy, b.backward), b.backward(aten.t.default, third))
    gx = b.backward(aten.mm.default, b.backward(aten.mm.default, gh, second), first)
    results: dict[Input | None, Any] = {None: loss}
    for name, p, g in zip(names, params, (gx, gh, gy, whole), strict=True):
        wide = b.backward(aten._to_copy.default, b.backward(aten.sin.default, g), dtype=torch.float64)
        size = b.call(Phase.UPDATE, operator.neg, lr, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, p, wide, alpha=size, module=name)
    return b.finish(results)


def in_single_precision() -> Program:
    """Two parameters with two moments in float32, and one with moments in float64."""
    b = Builder()
    x, lr = b.input(Role.BATCH, "0", shape=[40]), b.input(Role.HYPER, "lr")
    dtypes = {"v": torch.float32, "w": torch.float32, "wide": torch.float64}
    params = {name: b.input(Role.PARAM, name, shape=[40], dtype=dtype) for name, dtype in dtypes.items()}
    products = {name: b.forward(aten.mul.Tensor, p, x) for name, p in params.items()}
    both = b.forward(aten.add.Tensor, products["v"], products["w"])
    results: dict[Input | None, Any] = {
        None: b.forward(aten.sum.default, b.forward(aten.add.Tensor, both, products["wide"]))
    }
    gradients = {
        name: b.backward(aten._to_copy.default, b.backward(aten.sin.default, product), dtype=dtypes[name])
        for name, product in products.items()
    }
    for name, g in gradients.items():
        m, s = (b.input(Role.OPT_STATE, name, key, shape=[40], dtype=dtypes[name]) for key in ("m", "s"))

        def call(target: Any, *args: Any, name: str = name) -> Any:
            return b.call(Phase.UPDATE, target, *args, module=name)

        square = call(aten.square.default, g)
        new_m = results[Input(Role.OPT_STATE, name, "m")] = call(aten.lerp.Scalar, m, g, 0.1)
        new_s = results[Input(Role.OPT_STATE, name, "s")] = call(aten.lerp.Scalar, s, square, 0.01)
        step = call(aten.div.Tensor, call(aten.add.Tensor, new_m, m), call(aten.exp.default, new_s))
        results[param(name)] = call(aten.sub.Tensor, params[name], call(aten.mul.Tensor, step, lr))
    return b.finish(results)


def with_numbers() -> Program:
    """Two parameters of one rule that have taken different numbers of steps, with conditions on them."""
    params = tuple(Param((4,), "trained", group=0, low=False, shares=False) for _ in range(2))
    rule = Rule(("g",), (), count=True, keeps=False)
    program = build(Recipe(params, (rule,), backward=(1, 0), first=False, random=False))
    program.given = {"p0": (("count", "torch.float32", 1.0),), "p1": (("count", "torch.float32", 7.0),)}
    counts = [Input(Role.OPT_STATE, name, "count") for name in ("p0", "p1")]
    program.guards = tuple(Guard((count,), lambda x: x > 0, "x0 > 0") for count in counts)
    program.init = {count: StateInit(0, torch.float32) for count in counts}
    return program


def tied_and_tidied() -> Program:
    """A weight read twice, a norm in the loss, copies, casts, transposes, reshapes, masks, buffers passed on."""
    b = Builder()
    w, v = b.input(Role.PARAM, "w", shape=[3, 3]), b.input(Role.PARAM, "v", shape=[3, 3])
    now, before = (b.input(Role.BUFFER, name, shape=[3]) for name in ("now", "before"))
    x, lr = b.input(Role.BATCH, "0", shape=[3, 3]), b.input(Role.HYPER, "lr")
    shifted = b.forward(aten.add.Tensor, b.forward(aten.add.Tensor, x, now), before)
    kept = b.forward(aten.copy.default, x, b.forward(aten.sin.default, shifted))
    narrow = b.forward(aten._to_copy.default, kept, dtype=torch.float32)
    wide = b.forward(aten.copy.default, x, narrow)
    b.forward(aten.bernoulli.p, x, 0.5)
    masks = [b.forward(aten.bernoulli.p, x, p) for p in (0.5, 0.25)]
    h = b.forward(aten.mul.Tensor, b.forward(aten.mm.default, wide, w), masks[0])
    turned = b.forward(aten.t.default, b.forward(aten.t.default, h))
    y = b.forward(aten.mul.Tensor, b.forward(aten.mm.default, turned, b.forward(aten.t.default, w)), masks[1])
    z = b.forward(aten.mm.default, y, b.forward(aten.t.default, v))
    row = b.forward(aten.reshape.default, z, [9])
    norm = b.forward(aten.linalg_vector_norm.default, v)
    loss = b.forward(aten.add.Tensor, b.forward(aten.sum.default, b.forward(aten.cumsum.default, row, 0)), norm)
    gz = b.backward(aten.mul.Tensor, z, loss)
    first = b.backward(aten.mm.default, b.backward(aten.t.default, gz), y)
    gy = b.backward(aten.mul.Tensor, b.backward(aten.mm.default, gz, v), masks[1])
    gh = b.backward(aten.mul.Tensor, b.backward(aten.mm.default, gy, w), masks[0])
    second = b.backward(aten.mm.default, b.backward(aten.t.default, gy), turned)
    gw = b.backward(aten.add.Tensor, second, b.backward(aten.mm.default, b.backward(aten.t.default, wide), gh))
    gv = b.backward(aten.addcmul.default, w, first, b.backward(aten.cos.default, gw))
    results: dict[Input | None, Any] = {
        None: loss,
        Input(Role.BUFFER, "now"): before,
        Input(Role.BUFFER, "before"): now,
    }
    for name, p, g in (("w", w, gw), ("v", v, gv)):
        size = b.call(Phase.UPDATE, operator.neg, lr, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, p, g, alpha=size, module=name)
    return b.finish(results)


def steps() -> dict[str, Program]:
    """All of them by name."""
    return {
        "two layers": two_layers(),
        "two blocks": blocks(dropout=True),
        "many parameters": many_parameters(),
        "the first step": many_parameters(first=True),
        "different step counts": with_numbers(),
        "tied weights": tied_and_tidied(),
        "the last of many micro-batches": accumulated(many_parameters(), 2),
        "one of many micro-batches": micro_step(accumulated(many_parameters(), 2)),
        "read in low precision": read_in_low_precision(),
        "single precision": in_single_precision(),
        "averages of weights": averaged(mixed_elements()),
        "noisy gradients": noisy(two_layers()),
        "the largest loss": with_maximum(two_layers()),
        "the largest loss of many": with_maximum(two_layers(), 2),
        "a scaled loss": scaled(two_layers()),
        "a clipped norm": clipped(two_layers(), 0.1),
        "a clipped norm of many parameters": clipped(many_parameters(), 0.1),
        "updates that mix elements": mixed_elements(),
        "the first of these": mixed_elements(first=True),
        "updates that mix elements, clipped": clipped(mixed_elements(), 0.1),
        "the last micro-batch of these": accumulated(mixed_elements(), 2, limit=0.1),
        "the last micro-batch, clipped": accumulated(two_layers(), 3, weighted=True, limit=0.1),
        TABLE_AND_HEAD: language_model(TableAndHead(4, 16, 16)),
    }
