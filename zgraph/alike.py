"""Parameters that torch's own optimizers treat alike: one of each kind is traced, and the updates of others are copies.

To trace an update takes a few milliseconds for each parameter, and a model has the same layer many times. Torch's
optimizers do to a parameter what its form, its group and the forms of its state say. Others may look at a parameter's
name, its place or its neighbours, so of these every parameter is traced.
"""

from __future__ import annotations

import inspect
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx, optim

from zgraph.program import Input, Role, copy_node

if TYPE_CHECKING:
    from zgraph.update import StateSpec, Update

_KINDS = frozenset(
    {
        optim.ASGD, optim.Adadelta, optim.Adafactor, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.Muon,
        optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD,
    }
)  # fmt: skip
"""Those whose update of a parameter reads nothing of another."""

T = TypeVar("T")


def representatives(
    optimizer: optim.Optimizer, params: Mapping[str, torch.nn.Parameter], trained: Sequence[str], state: StateSpec
) -> dict[str, str]:
    """For each trained parameter the first one that it is treated like, which may be itself.

    Args:
        params: the model's parameters by name.
        trained: names of those that have a gradient, all of them held by the optimizer.
        state: state that exists already.
    """
    kind = type(optimizer)
    if kind not in _KINDS or not inspect.unwrap(kind.step).__module__.startswith("torch.optim."):
        return {name: name for name in trained}
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    first: dict[Any, str] = {}
    found = {}
    for name in trained:
        p, entries = params[name], state.get(name, {})
        numbers = name if any(entry.dtype is None for entry in entries.values()) else None  # guards may be on them
        form = (group_of[id(p)], p.shape, p.dtype, p.device, tuple(entries.items()), numbers)
        found[name] = first.setdefault(form, name)
    return found


def copied(update: Update, like: Mapping[str, str]) -> Update:
    """The update of all parameters, made of that of their representatives.

    Calls are in the order in which the optimizer would make them if its groups had the order of ``like``: it goes over
    all parameters once, or several times.

    Args:
        update: of the representatives.
        like: the representative of each parameter.
    """
    owners = _owners(update)
    graph = fx.Graph()
    shared: dict[fx.Node, fx.Node] = {}
    copies: dict[str | None, MutableMapping[fx.Node, fx.Node]] = {None: shared}
    copies |= {name: ChainMap({}, shared) for name in like}

    def copy(node: fx.Node, name: str | None) -> None:
        made = copies[name][node] = copy_node(node, graph, copies[name])
        if name is not None and node.op == "placeholder":
            made.meta["val"] = _another(node.meta["val"])
            if "input" in node.meta:
                made.meta["input"] = replace(node.meta["input"], name=name)

    inputs: dict[str | None, list[fx.Node]] = {}
    for node in update.graph.find_nodes(op="placeholder"):
        inputs.setdefault(owners[node], []).append(node)
    for name, representative in like.items():
        for node in inputs[representative]:
            copy(node, name)
    for node in inputs.get(None, ()):
        copy(node, None)
    for calls in _rounds(update.graph, owners):
        for node in calls.get(None, ()):
            copy(node, None)
        for name, representative in like.items():
            for node in calls.get(representative, ()):
                copy(node, name)
    of_representatives = _by_name(update.results)
    results = {
        replace(what, name=name): copies[name][value] if isinstance(value, fx.Node) else value
        for name, representative in like.items()
        for what, value in of_representatives[representative]
    }
    graph.output(tuple(results.values()))
    init = None
    if update.init is not None:
        starts = _by_name(update.init)
        init = {
            replace(what, name=name): start
            for name, representative in like.items()
            for what, start in starts.get(representative, ())
        }
    return replace(
        update,
        graph=graph,
        gradients={name: copies[name][update.gradients[representative]] for name, representative in like.items()},
        results=results,
        init=init,
        state={name: update.state[representative] for name, representative in like.items()},
    )


def _owners(update: Update) -> dict[fx.Node, str | None]:
    """Of each node, the parameter that it is computed for; None if for several, or of hyperparameters alone."""
    gradients = {node: name for name, node in update.gradients.items()}
    owners: dict[fx.Node, str | None] = {}
    for node in update.graph.nodes:
        if node.op == "placeholder":
            what: Input | None = node.meta.get("input")
            is_own = what is not None and what.role in (Role.PARAM, Role.OPT_STATE)
            owners[node] = what.name if what is not None and is_own else gradients.get(node)
        elif node.op == "call_function":
            of = {owners[each] for each in node.all_input_nodes} - {None}
            assert len(of) <= 1, f"{node} is computed of several parameters: {of}"
            owners[node] = of.pop() if of else None
    wanted = {node: what.name for what, node in update.results.items() if isinstance(node, fx.Node)}
    for node in reversed(update.graph.nodes):  # state that is created of nothing
        if node.op == "call_function" and owners[node] is None:
            of = {owners[user] for user in node.users if user.op == "call_function"} | {wanted.get(node)} - {None}
            owners[node] = of.pop() if len(of) == 1 else None
    return owners


def _rounds(graph: fx.Graph, owners: Mapping[fx.Node, str | None]) -> Iterator[dict[str | None, list[fx.Node]]]:
    """The calls of each turn in which an optimizer goes over its parameters, by parameter."""
    calls: dict[str | None, list[fx.Node]] = {}
    last: str | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        owner = owners[node]
        if owner is not None and owner != last:
            if owner in calls:
                yield calls
                calls = {}
            last = owner
        calls.setdefault(owner, []).append(node)
    yield calls


def _by_name(values: Mapping[Input, T]) -> dict[str, list[tuple[Input, T]]]:
    found: dict[str, list[tuple[Input, T]]] = {}
    for what, value in values.items():
        found.setdefault(what.name, []).append((what, value))
    return found


def _another(value: Any) -> Any:
    """A value like this one, in memory of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
