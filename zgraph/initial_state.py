"""Find how optimizer state starts, by comparing the first update with the second.

An optimizer that has no state yet creates it. Where it creates zeros, say, and goes on as it does with any other value,
one update serves for all steps: that of later steps, with zeros as the state's initial value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zgraph.program import Input, Role, StateInit

if TYPE_CHECKING:
    from zgraph.update import Update

aten = torch.ops.aten


def initial_values(first: Update, later: Update) -> dict[Input, StateInit] | None:
    """State values under which ``later`` computes what ``first`` does; None if there are none.

    The two graphs are walked together from their results. Where ``later`` reads a state placeholder, whatever
    ``first`` has there is that state's initial value; everywhere else they must be the same operator.
    """
    if first.results.keys() != later.results.keys():
        return None  # state is created, or dropped, in the second step
    bound: dict[fx.Node, Any] = {}
    done: set[tuple[fx.Node, Any]] = set()
    gradient_of = {node: name for u in (first, later) for name, node in u.gradients.items()}

    def same_leaf(a: fx.Node, b: fx.Node) -> bool:
        if a in gradient_of or b in gradient_of:
            return gradient_of.get(a) == gradient_of.get(b)
        if a.meta["input"].role is Role.CONSTANT and b.meta["input"].role is Role.CONSTANT:
            return torch.equal(first.constants[a.meta["input"].name], later.constants[b.meta["input"].name])
        return bool(a.meta["input"] == b.meta["input"])

    stack: list[tuple[Any, Any]] = [(first.results[what], result) for what, result in later.results.items()]
    while stack:
        a, b = stack.pop()
        if isinstance(b, fx.Node):
            if (b, a) in done:
                continue
            done.add((b, a))
            if b.op == "placeholder" and b not in gradient_of and b.meta["input"].role is Role.OPT_STATE:
                if not isinstance(a, fx.Node) or b not in bound:
                    if b in bound and bound[b] != a:
                        return None
                    bound[b] = a
                elif bound[b] is not a:
                    return None
                continue
            if not isinstance(a, fx.Node) or a.op != b.op:
                return None
            if b.op == "placeholder":
                if not same_leaf(a, b):
                    return None
                continue
            if a.target is not b.target or len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
                return None
            stack.extend(zip(a.args, b.args, strict=True))
            stack.extend((a.kwargs[key], b.kwargs[key]) for key in b.kwargs)
        elif isinstance(b, (list, tuple)):
            if not isinstance(a, (list, tuple)) or len(a) != len(b):
                return None
            stack.extend(zip(a, b, strict=True))
        elif a != b:
            return None
    init: dict[Input, StateInit] = {}
    for node, value in bound.items():
        start = _start(value, node.meta["val"], first)
        if start is None:
            return None
        init[node.meta["input"]] = start
    for node in later.graph.find_nodes(op="placeholder"):
        what = node.meta.get("input")
        if what in later.results and what.role is Role.OPT_STATE and what not in init:
            init[what] = _anything(node.meta["val"])  # it is written in every step, and never read
    return init


def _anything(like: Any) -> StateInit:
    return StateInit(0 if isinstance(like, torch.Tensor) else type(like)(0), getattr(like, "dtype", None))


def _start(value: Any, like: Any, first: Update) -> StateInit | None:
    """A created tensor or number as a StateInit, if it is a plain fill or a copy of the parameter."""
    dtype = like.dtype if isinstance(like, torch.Tensor) else None
    while isinstance(value, fx.Node) and value.target in (
        aten.lift_fresh_copy.default, aten.clone.default, aten.detach.default, aten._to_copy.default,
    ):  # fmt: skip
        value = value.args[0]
    if isinstance(value, (int, float)):
        return StateInit(value, dtype)
    if value.op == "placeholder":
        what = value.meta.get("input")
        if what is None:
            return None  # a gradient
        if what.role is Role.PARAM:
            return StateInit(None, dtype)
        if what.role is Role.CONSTANT and first.constants[what.name].numel() == 1:
            return StateInit(first.constants[what.name].item(), dtype)
        return None
    fills = {
        aten.zeros_like.default: 0, aten.zeros.default: 0, aten.new_zeros.default: 0,
        aten.ones_like.default: 1, aten.ones.default: 1, aten.new_ones.default: 1,
    }  # fmt: skip
    if value.target in fills:
        return StateInit(fills[value.target], dtype)
    if value.target in (aten.full_like.default, aten.full.default) and isinstance(value.args[1], (int, float)):
        return StateInit(value.args[1], dtype)
    return None
