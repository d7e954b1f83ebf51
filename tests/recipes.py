"""Random training steps and random legal orders.

``recipes`` are plain data that Hypothesis draws and prints; ``build`` makes a CAPTURED program of one, so nothing is
ever traced.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, param, state
from tests.reads import READS, Call, follow
from zgraph import ops
from zgraph.liveness import owners
from zgraph.pipeline import Pass
from zgraph.program import OF_PARAMETERS, Input, Phase, Program, Role, Stage

aten = torch.ops.aten


# Another legal order


@dataclass(frozen=True)
class Reshuffle(Pass):
    """Issue calls in a random order, except that draws and collectives keep theirs, and so does what is in place."""

    takes: Stage  # type: ignore[misc]
    gives: Stage  # type: ignore[misc]
    seed: int

    def rewrite(self, program: Program) -> None:
        random = Random(self.seed)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        behind = {node: set(node.users) for node in calls}
        for kept in self._in_order(program, calls):
            for earlier, later in itertools.pairwise(kept):
                behind[earlier].add(later)
        waiting = Counter(later for users in behind.values() for later in users)
        ready = [node for node in calls if not waiting[node]]
        while ready:
            node = ready.pop(random.randrange(len(ready)))
            program.output_node.prepend(node)
            for later in behind[node]:
                waiting[later] -= 1
                if not waiting[later] and later.op == "call_function":
                    ready.append(later)

    def _in_order(self, program: Program, calls: Sequence[fx.Node]) -> list[list[fx.Node]]:
        draws = [node for node in calls if ops.is_random(node.target)]
        collectives = [node for node in calls if node.target in ops.ASYNCHRONOUS or node.target is ops.wait]
        if program.stage < Stage.INPLACE:
            return [draws, collectives]
        owner = owners(program)
        state = {node for node, what in program.placeholders() if what.role in OF_PARAMETERS}
        state.update(node for node in calls if node.target is ops.load)
        touching = [node for node in calls if state & {owner[value] for value in (node, *node.all_input_nodes)}]
        return [draws, collectives, [node for node in calls if node in {*touching, *collectives}]]


# Random training steps


@dataclass(frozen=True)
class Param:
    """A parameter, ``p0``, ``p1``, ... in the order of its reads.

    Attributes:
        use: "trained", "frozen" (read by forward and backward) or "unused" (read by nothing).
        group: which of the update rules it follows.
        low: float32, cast to float64 where it is read.
        shares: its gradient is that of the trained parameter before it, if the shapes allow it.
        tied: read in two places, so that its gradient is a sum of two.
        reads: how it is read besides, by names of ``READS``.
        again: backward reads it so again, and does not keep what forward read.
        narrow: float64, but read in float32.
    """

    shape: tuple[int, ...]
    use: str
    group: int
    low: bool
    shares: bool
    tied: bool = False
    reads: tuple[str, ...] = ()
    again: bool = False
    narrow: bool = False


Term = tuple[Any, ...]
"""An elementwise expression: ("g",) or an operator's name and terms."""


@dataclass(frozen=True)
class Rule:
    """``p' = p - lr * (g + step)``, and one state tensor per term: ``m' = m * g + term``.

    Attributes:
        step: term over p, g and the new states.
        states: terms over p, g and the old states.
        count: whether the bias correction ``1 - beta ** count'`` of a 0-dim count takes part.
        keeps: whether the gradient itself becomes state (``last``), and what that was before, too (``older``).
        mixes: whether a norm and sums of rows take part, which become state (``ratio`` and ``rows``).
    """

    step: Term
    states: tuple[Term, ...]
    count: bool
    keeps: bool
    mixes: bool = False


@dataclass(frozen=True)
class Recipe:
    """A training step.

    Attributes:
        backward: the order in which gradients come, as sort keys of the parameters.
        first: optimizer state does not exist yet; the step creates it.
        random: dropout is part of forward.
        buffers: kinds of ``BUFFERS``.
        turned: how a batch whose memory is that of its transpose is read, if there is one.
    """

    params: tuple[Param, ...]
    rules: tuple[Rule, ...]
    backward: tuple[int, ...]
    first: bool
    random: bool
    buffers: tuple[str, ...] = ()
    turned: tuple[str, ...] | None = None


BUFFERS = {"count": [], "rolls": [4], "is written": [3, 2], "is viewed": [2], "takes turns": [2]}
"""Kinds of buffers: their shapes."""

_SHAPES = [(), (1,), (7,), (16,), (17,), (3, 5), (4, 4), (2, 3, 4), (0, 3), (31,), (1, 5), (0,)]


def _terms(leaves: Sequence[str]) -> st.SearchStrategy[Term]:
    return st.recursive(
        st.sampled_from([(leaf,) for leaf in leaves]),
        lambda inner: st.one_of(
            st.tuples(
                st.sampled_from(["sign", "abs", "zeros_like", "zeros", "square", "rounded", "scaled", "clamp"]), inner
            ),
            st.tuples(st.sampled_from(["add", "mul", "maximum", "lerp", "where", "copy"]), inner, inner),
        ),
        max_leaves=4,
    )


@st.composite
def _rules(draw: st.DrawFn) -> Rule:
    num_states = draw(st.integers(0, 2))
    keys = [f"m{i}" for i in range(num_states)]
    leaves = ["p", "g", *keys]
    terms = [draw(_terms(leaves)) for _ in range(num_states + 1)]
    return Rule(
        step=terms[0],
        states=tuple(terms[1:]),
        count=draw(st.booleans()),
        keeps=draw(st.sampled_from([False, False, True])),
        mixes=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any training step, with at least one trained parameter."""
    rules = tuple(draw(st.lists(_rules(), min_size=1, max_size=2)))
    reads = st.lists(st.sampled_from(list(READS)), max_size=3).map(tuple)
    one = st.builds(
        Param,
        st.sampled_from(_SHAPES),
        st.sampled_from(["trained", "trained", "trained", "frozen", "unused"]),
        st.integers(0, len(rules) - 1),
        st.sampled_from([False, False, False, True]),
        st.sampled_from([False, False, False, True]),
        st.sampled_from([False, False, False, True]),
        st.just(()) | st.just(()) | reads,
        st.booleans(),
        st.sampled_from([False, False, True]),
    )
    params = draw(st.lists(one, min_size=1, max_size=7).filter(lambda all_: any(p.use == "trained" for p in all_)))
    backward = draw(st.permutations(range(len(params))))
    if draw(st.booleans()):
        backward = list(reversed(range(len(params))))  # as autograd has it
    buffers = draw(st.lists(st.sampled_from(list(BUFFERS)), max_size=2).map(tuple))
    first, random = draw(st.booleans()), draw(st.booleans())
    return Recipe(tuple(params), rules, tuple(backward), first, random, buffers, draw(st.none() | reads))


def build(recipe: Recipe) -> Program:
    """The CAPTURED program of a recipe."""
    b = Builder()
    names = [f"p{i}" for i in range(len(recipe.params))]
    dtypes = [torch.float32 if p.low else torch.float64 for p in recipe.params]
    params = [
        b.input(Role.PARAM, name, shape=p.shape, dtype=dtype)
        for name, p, dtype in zip(names, recipe.params, dtypes, strict=True)
    ]
    buffer, batch = b.input(Role.BUFFER, "seen", shape=()), b.input(Role.BATCH, "0", shape=[len(params)])
    carry = b.forward(aten.sum.default, batch)
    results: dict[Input | None, Any] = {
        None: carry,
        Input(Role.BUFFER, "seen"): b.forward(aten.add.Tensor, buffer, carry),
    }
    carry = _keep_buffers(b, recipe.buffers, carry, results)
    if recipe.turned is not None:
        turned = follow(b.forward, b.turned_batch("1", [4, 3]), recipe.turned)
        carry = b.forward(aten.add.Tensor, carry, b.forward(aten.sum.default, turned))
    read: list[fx.Node] = []
    kept: dict[int, fx.Node] = {}
    losses: list[fx.Node] = []
    for i, (p, node) in enumerate(zip(recipe.params, params, strict=True)):
        losses.append(carry)
        if p.use == "unused":
            read.append(node)
            continue
        narrow = b.forward(aten._to_copy.default, node, dtype=torch.float32) if p.narrow and not p.low else node
        wide = b.forward(aten._to_copy.default, narrow, dtype=torch.float64) if narrow is not node or p.low else node
        read.append(_turned(b.forward, wide))
        x = b.forward(aten.select.int, batch, 0, i)
        layer = b.forward(aten.sin.default, b.forward(aten.mul.Tensor, read[i], x))
        if p.tied:
            layer = b.forward(aten.add.Tensor, layer, b.forward(aten.mul.Tensor, read[i], carry))
        if recipe.random:
            layer = b.forward(aten.mul.Tensor, layer, b.forward(aten.bernoulli.p, layer, 0.5))
        total = b.forward(aten.sum.default, layer)
        if p.reads:
            kept[i] = follow(b.forward, read[i], p.reads)
            total = b.forward(aten.add.Tensor, total, b.forward(aten.sum.default, kept[i]))
        carry = b.forward(aten.tanh.default, b.forward(aten.add.Tensor, carry, total))
    results[None] = carry
    gradients: dict[int, fx.Node] = {}
    for i in sorted(range(len(params)), key=recipe.backward.__getitem__):
        p = recipe.params[i]
        if p.use == "unused":
            continue
        again = b.backward(aten.unsqueeze.default, read[i], 0)
        gradient = b.backward(aten.squeeze.dim, b.backward(aten.mul.Tensor, again, carry), 0)
        if p.tied:
            gradient = b.backward(aten.add.Tensor, gradient, b.backward(aten.mul.Tensor, read[i], losses[i]))
        if p.reads:
            seen = follow(b.backward, read[i], p.reads) if p.again else kept[i]
            size = b.backward(aten.tanh.default, b.backward(aten.sum.default, seen))
            gradient = b.backward(aten.add.Tensor, gradient, b.backward(aten.mul.Tensor, read[i], size))
        if p.use == "trained":
            gradient = _turned(b.backward, gradient)
            if p.low:
                gradient = b.backward(aten._to_copy.default, gradient, dtype=torch.float32)
            gradients[i] = gradient
        product = b.backward(aten.sum.default, b.backward(aten.mul.Tensor, again, losses[i]))
        carry = b.backward(aten.tanh.default, b.backward(aten.add.Tensor, carry, product))
    earlier: dict[tuple[tuple[int, ...], bool], int] = {}
    for i, p in enumerate(recipe.params):
        if p.use == "trained":
            if p.shares and (p.shape, p.low) in earlier:
                gradients[i] = gradients[earlier[p.shape, p.low]]
            earlier[p.shape, p.low] = i
    hypers = [{key: b.input(Role.HYPER, f"group{k}.{key}") for key in ("lr", "beta")} for k in range(len(recipe.rules))]
    for i, p in enumerate(recipe.params):
        if p.use == "trained":
            rule = recipe.rules[p.group]
            results.update(_update(b, names[i], params[i], gradients[i], rule, hypers[p.group], recipe.first))
    return b.finish(results)


def _turned(call: Call, node: fx.Node) -> fx.Node:
    """A matrix's transpose, and the like for tensors of more dimensions."""
    dim = node.meta["val"].dim()
    if dim < 2:
        return node
    return call(aten.t.default, node) if dim == 2 else call(aten.permute.default, node, list(range(dim))[::-1])


def _keep_buffers(b: Builder, kinds: Sequence[str], carry: fx.Node, results: dict[Input | None, Any]) -> fx.Node:
    """Buffers that forward reads and gives new values, all of them functionally; returns what it has computed."""
    for i, kind in enumerate(kinds):
        whats = [Input(Role.BUFFER, f"buffer{i}{letter}") for letter in ("ab" if kind == "takes turns" else "a")]
        dtype = torch.int64 if kind == "count" else torch.float64
        old = [b.input(Role.BUFFER, what.name, shape=BUFFERS[kind], dtype=dtype) for what in whats]
        if kind == "count":
            new = [b.forward(aten.add.Tensor, old[0], 1)]
        elif kind == "rolls":
            rest = b.forward(aten.slice.Tensor, old[0], 0, 1, 4)
            new = [b.forward(aten.cat.default, [rest, b.forward(aten.view.default, carry, [1])])]
        elif kind == "is written":
            new = [b.forward(aten.select_scatter.default, old[0], b.forward(aten.expand.default, carry, [2]), 0, 1)]
        elif kind == "is viewed":
            new = [b.forward(aten.view.default, old[0], BUFFERS[kind])]
        else:
            new = old[::-1]
        results.update(zip(whats, new, strict=True))
        seen = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, old[0], 0.5))
        carry = b.forward(aten.tanh.default, b.forward(aten.add.Tensor, carry, seen))
    return carry


def _update(
    b: Builder, name: str, p: fx.Node, g: fx.Node, rule: Rule, hyper: dict[str, fx.Node], first: bool
) -> dict[Input | None, Any]:
    """The update of one parameter by a rule; what it makes anew."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return b.call(Phase.UPDATE, target, *args, module=name, **kwargs)

    shape, dtype = p.meta["val"].shape, p.meta["val"].dtype

    def write(term: Term, leaves: Mapping[str, fx.Node]) -> fx.Node:
        name, *inner = term
        if not inner:
            return leaves[name]
        a, *rest = (write(t, leaves) for t in inner)
        if name == "zeros":
            return call(aten.zeros.default, list(shape), dtype=dtype)
        if name == "zeros_like":
            return call(aten.zeros_like.default, a)
        if name == "rounded":
            return call(aten._to_copy.default, call(aten._to_copy.default, a, dtype=torch.bfloat16), dtype=dtype)
        if name == "scaled":  # by a number in a tensor of another dtype, which a tensor with dimensions outweighs
            other = torch.float64 if dtype is torch.float32 and shape else dtype
            return call(aten.mul.Tensor, a, call(aten.scalar_tensor.default, hyper["beta"], dtype=other))
        if name == "clamp":
            return call(aten.clamp.default, a, -1, 1)
        if name == "lerp":
            return call(aten.lerp.Scalar, a, rest[0], hyper["beta"])
        if name == "where":
            return call(aten.where.self, call(aten.gt.Tensor, a, rest[0]), a, rest[0])
        overload = "Tensor" if name in ("add", "mul") else "default"
        return call(getattr(getattr(aten, name), overload), a, *rest)

    def zeros() -> fx.Node:
        return call(aten.zeros_like.default, p)

    leaves = {"p": p, "g": g}
    results: dict[Input | None, Any] = {}
    for i in range(len(rule.states)):
        key = f"m{i}"
        leaves[key] = zeros() if first else b.input(Role.OPT_STATE, name, key, shape=shape, dtype=dtype)
    new = dict(leaves)
    for i, term in enumerate(rule.states):
        decayed = call(aten.mul.Tensor, leaves[f"m{i}"], g)
        new[f"m{i}"] = results[state(name, f"m{i}")] = call(aten.add.Tensor, decayed, write(term, leaves))
    size = call(operator.neg, hyper["lr"])
    if rule.count:
        if first:
            count = call(aten.full.default, [], 0, dtype=torch.float32)
        else:
            count = b.input(Role.OPT_STATE, name, "count", shape=(), dtype=torch.float32)
        later = results[state(name, "count")] = call(aten.add.Tensor, count, 1)
        power = call(operator.pow, hyper["beta"], call(aten._local_scalar_dense.default, later))
        size = call(operator.mul, size, call(operator.sub, 1, power))
    if rule.keeps:
        last = zeros() if first else b.input(Role.OPT_STATE, name, "last", shape=shape, dtype=dtype)
        results.update({state(name, "last"): g, state(name, "older"): last})
    change = call(aten.add.Tensor, g, write(rule.step, new))
    if rule.mixes:
        size_of_matrix = [shape[0] if shape else 1, math.prod(shape[1:])]
        matrix, column = call(aten.reshape.default, g, size_of_matrix), [size_of_matrix[0], 1]
        if first:
            rows = call(aten.zeros.default, column, dtype=dtype)
        else:
            rows = b.input(Role.OPT_STATE, name, "rows", shape=column, dtype=dtype)
            b.input(Role.OPT_STATE, name, "ratio", shape=(), dtype=dtype)
        seen = call(aten.sum.dim_IntList, call(aten.square.default, matrix), [1], True)
        rows = results[state(name, "rows")] = call(aten.add.Tensor, rows, seen)
        ratio = results[state(name, "ratio")] = call(aten.tanh.default, call(aten.linalg_vector_norm.default, change))
        even = call(aten.div.Tensor, matrix, call(aten.exp.default, call(aten.tanh.default, rows)))
        change = call(aten.add.Tensor, change, call(aten.reshape.default, even, list(shape)))
        change = call(aten.mul.Tensor, change, ratio)
    results[param(name)] = call(aten.add.Tensor, p, change, alpha=size)
    return results
