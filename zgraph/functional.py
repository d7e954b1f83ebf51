"""Make a traced graph functional: every in-place operator becomes its out-of-place twin.

Straight-line code without views of mutated tensors, which is nearly all of it (dropout, ``relu_``, optimizers), is
renamed in one linear walk that tracks the current version of every storage. Code that writes through views is
traced once more under ``torch.func.functionalize``. Writes to placeholders come back as their new values.
"""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from zgraph import ops
from zgraph.errors import CaptureError, quoted
from zgraph.program import Phase
from zgraph.tracing import Recorder, trace

aten = torch.ops.aten

_TWINS = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.bernoulli_.Tensor: aten.bernoulli.Tensor,
    aten.normal_.default: aten.normal_functional.default,
}
_SAME_VALUE = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


class _WritesThroughViewError(Exception):
    """The one-walk method does not apply."""


def make_functional(graph: fx.Graph, mode: FakeTensorMode) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Rewrite ``graph`` without in-place operators.

    Returns:
        The functional graph (same placeholders in the same order) and the new value of each placeholder that was
        written to.
    """
    _expose_batch_norm(graph)
    _join_bias_gradients(graph)
    _store_zeros(graph, mode)
    _draw_in_memory_order(graph, mode)
    for node in graph.nodes:
        if _is_mutable(node) and node.target.namespace not in ("aten", "profiler"):
            raise CaptureError(
                f"{node.target} writes to its arguments, and what it writes is not known to the graph",
                where=quoted(node.meta["origin"].source),
                fix="give the operator a variant that returns new tensors",
            )
    if not any(_is_mutable(node) for node in graph.nodes):
        return graph, {}
    try:
        return _rename(graph, mode)
    except _WritesThroughViewError:
        return _retrace(graph, mode)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _expose_batch_norm(graph: fx.Graph) -> None:
    """Show the writes that ``native_batch_norm`` does not declare: it updates running statistics."""
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        _, _, _, mean, var, training, _, _ = node.args
        if not training or mean is None:
            continue
        node.target = aten._native_batch_norm_legit_functional.default
        with graph.inserting_before(node.next):
            for index, buffer in ((3, mean), (4, var)):
                new = graph.call_function(operator.getitem, (node, index))
                new.meta.update(val=buffer.meta["val"], origin=node.meta["origin"])
                write = graph.call_function(aten.copy_.default, (buffer, new))
                write.meta.update(val=buffer.meta["val"], origin=node.meta["origin"])
        node.meta["val"] = (*node.meta["val"], mean.meta["val"], var.meta["val"])


def _join_bias_gradients(graph: fx.Graph) -> None:
    """Show that the biases of a recurrent layer of oneDNN's have one gradient, which lies in one memory.

    Traced, it has one name or two, by whether torch has seen the like of the layer before.
    """
    for node in graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer_backward.default):
        alike = [user for user in node.users if user.args[1] in (3, 4)]
        for user in alike[:1]:
            user.args = (node, 3)
        for user in alike[1:]:
            user.replace_all_uses_with(alike[0])
            graph.erase_node(user)


def own_memory_by_place(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Let operators that read memory by its place read memory of their own.

    ``as_strided`` counts from the start of its argument's memory, whatever part of it the argument is. Parameters come
    to lie in buckets and batches may be parts of larger tensors, so each is copied first, as it lies in eager.

    Raises:
        CaptureError: a variant that cannot be given the whole memory is applied to a part of it.
    """
    for node in list(graph.nodes):
        if node.target not in ops.BY_PLACE:
            continue
        source: fx.Node = node.args[0]
        root = ops.root_of(source)
        if _lies_alike(root, source):
            source = root
            node.args = (root, *node.args[1:])
        if root is not source and node.target is not aten.as_strided.default:
            raise CaptureError(
                f"{node.target} is applied to a part of a tensor",
                where=quoted(node.meta["origin"].source),
                fix="clone the part first",
            )
        if root is not source:
            offset = node.args[3] if len(node.args) > 3 and node.args[3] is not None else None
            start = source.meta["val"].storage_offset() if offset is None else offset
            node.args = (root, *node.args[1:3], start)
        if root.op == "placeholder":
            with graph.inserting_before(node):
                copy = graph.call_function(aten.clone.default, (root,))
            with mode:
                copy.meta.update(val=aten.clone.default(root.meta["val"]), origin=node.meta["origin"])
            node.args = (copy, *node.args[1:])


def _lies_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors in one memory are the same part of it."""
    a, b = one.meta["val"], other.meta["val"]
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _store_zeros(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Give zero tensors memory: few operators take them without. The gradient of ``sgn`` is one."""
    for node in graph.find_nodes(op="call_function", target=aten._efficientzerotensor.default):
        node.target = aten.zeros.default
        with mode:
            node.meta["val"] = aten.zeros.default(*node.args, **node.kwargs)


def _draw_in_memory_order(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Let dropout on transposed or channels-last memory draw as eager does: ``bernoulli_`` in the order of memory.

    Its functional twin would draw in the order of dimensions, into contiguous memory.
    """
    for node in graph.find_nodes(op="call_function", target=aten.bernoulli_.float):
        target, *rest = node.args
        if target.meta["val"].is_contiguous():
            continue
        strides = target.meta["val"].stride()
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        _fill_in_defaults(node, aten.bernoulli.p)
        with graph.inserting_before(node):
            ordered = graph.call_function(aten.permute.default, (target, order))
            drawn = graph.call_function(aten.bernoulli.p, (ordered, *rest), node.kwargs)
            back = graph.call_function(aten.permute.default, (drawn, [order.index(dim) for dim in range(len(order))]))
        for new in (ordered, drawn, back):
            assert callable(new.target)
            with mode:
                val = new.target(*fx.map_arg(new.args, lambda n: n.meta["val"]), **new.kwargs)
            new.meta.update(val=val, origin=node.meta["origin"])
        node.target, node.args, node.kwargs = aten.copy_.default, (target, back), {}


def _twin(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The out-of-place operator of an in-place one."""
    if op in _TWINS:
        return _TWINS[op]
    name = op._schema.name.split("::")[1]
    if not name.endswith("_"):
        raise _WritesThroughViewError(op)
    packet = getattr(torch.ops.aten, name[:-1], None)
    names = packet.overloads() if packet is not None else []
    for overload in sorted(names, key=lambda other: other != op._overloadname):
        twin = getattr(packet, overload)
        if isinstance(twin, torch._ops.OpOverload) and _types(twin) == _types(op):  # pow_.Scalar: pow.Tensor_Scalar
            return twin
    raise _WritesThroughViewError(op)


def _types(op: torch._ops.OpOverload) -> list[str]:
    return [str(argument.type) for argument in op._schema.arguments]


def _rename(graph: fx.Graph, mode: FakeTensorMode) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    position = {node: i for i, node in enumerate(graph.nodes)}
    last_use = {node: max((position[u] for u in node.users), default=-1) for node in graph.nodes}
    root: dict[fx.Node, fx.Node] = {}  # node -> the node whose storage it is
    views: dict[fx.Node, list[fx.Node]] = {}  # root -> views of part of it, or in another shape
    is_view: set[fx.Node] = set()
    # All refusals are found before the first rewrite, so that the other method starts from the graph as it was.
    plan: list[tuple[fx.Node, torch._ops.OpOverload | None]] = []
    for node in graph.nodes:
        op = node.target
        source = ops.view_of(node)
        if op in _SAME_VALUE:
            assert source is not None
            root[node] = root.get(source, source)
            if source in is_view:
                is_view.add(node)
                views[root[node]].append(node)
        elif source is not None:
            root[node] = root.get(source, source)
            is_view.add(node)
            views.setdefault(root[node], []).append(node)
        elif isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable:
            written = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            target = node.args[0] if node.args else None
            if len(written) != 1 or written[0] is not op._schema.arguments[0] or not isinstance(target, fx.Node):
                raise _WritesThroughViewError(op)
            base = root.get(target, target)
            if target in is_view or any(last_use[v] > position[node] for v in views.get(base, ())):
                raise _WritesThroughViewError(op)
            dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if _is_tensor(n)}
            if len(dtypes) > 1 and op is not aten.copy_.default:
                raise _WritesThroughViewError(op)  # the twin would promote, where the original keeps its dtype
            root[node] = base
            plan.append((node, None if op is aten.copy_.default else _twin(op)))
    replaced = dict(plan)
    version: dict[fx.Node, fx.Node] = {}  # root -> the node that holds its current value

    def current(node: fx.Node) -> fx.Node:
        if node in is_view:
            return node
        base = root.get(node, node)
        return version.get(base, node)

    elsewhere: set[fx.Node] = set()  # what does not lie as it was recorded to
    for node in graph.nodes:
        if version:
            node.args = fx.map_arg(node.args, current)
            node.kwargs = fx.map_arg(node.kwargs, current)
        if node in replaced:
            twin = replaced[node]
            base = root[node]
            if twin is None:
                node.target = aten.copy.default
            else:
                _fill_in_defaults(node, twin)
                node.target = twin
            version[base] = node
        is_twin = node in replaced and not all(map(_lies_in_order, node.all_input_nodes))
        if is_twin or not elsewhere.isdisjoint(node.all_input_nodes):
            _infer_again(node, mode, elsewhere)
    mutated = {base: new for base, new in version.items() if base.op == "placeholder"}
    return graph, mutated


def _lies_in_order(node: fx.Node) -> bool:
    """Whether a value has all of its memory, in the order of its dimensions, those of one place included."""
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor):
        return True
    expected = tuple(accumulate(reversed(val.shape[1:]), operator.mul, initial=1))[::-1] if val.dim() else ()
    return bool(val.stride() == expected and val.untyped_storage().nbytes() == val.nbytes)


def _infer_again(node: fx.Node, mode: FakeTensorMode, elsewhere: set[fx.Node]) -> None:
    """Record how what a call gives lies: an operator in place leaves gaps between elements, where its twin leaves none.

    Args:
        elsewhere: calls of which some result lies otherwise than it did; this one is added.
    """
    if node.op != "call_function":
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with mode, torch.no_grad():
        val = node.target(*args, **kwargs)  # type: ignore[operator]
    if _places(val) != _places(node.meta["val"]):
        node.meta["val"] = val
        elsewhere.add(node)


def _places(val: Any) -> list[tuple[Any, ...]]:
    """How tensors lie in memory, and in how much of it."""
    tensors = [each for each in pytree.tree_leaves(val) if isinstance(each, torch.Tensor)]
    return [(each.stride(), each.storage_offset(), each.untyped_storage().nbytes()) for each in tensors]


def _fill_in_defaults(node: fx.Node, twin: torch._ops.OpOverload) -> None:
    """Write out arguments that the call leaves to a default which its twin has not (``bernoulli_`` has p=0.5)."""
    assert isinstance(node.target, torch._ops.OpOverload)
    optional = {a.name for a in twin._schema.arguments if a.has_default_value()}
    left_out = node.target._schema.arguments[len(node.args) :]
    defaults = {a.name: a.default_value for a in left_out if a.name not in node.kwargs and a.name not in optional}
    node.kwargs = {**node.kwargs, **defaults}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


class _Replay(fx.Interpreter):
    """Run a graph again, giving the new nodes the origins of the old."""

    def __init__(self, graph: fx.Graph, recorder: Recorder) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        if "origin" not in n.meta:
            return super().run_node(n)
        with self._recorder.as_if(n.meta["origin"]):
            return super().run_node(n)


def _retrace(graph: fx.Graph, mode: FakeTensorMode) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    recorder = Recorder(Phase.FORWARD)
    placeholders = list(graph.find_nodes(op="placeholder"))
    values = [node.meta["val"] for node in placeholders]
    origins = [node.meta["origin"] for node in graph.nodes if "origin" in node.meta]

    def run(*args: Any) -> Any:
        return _Replay(graph, recorder).run(*args)

    def run_functional(*args: Any) -> Any:
        with recorder.as_if(origins[-1]):  # what comes after the last node makes the results and what was written
            return torch.func.functionalize(run)(*args)

    with torch.no_grad():
        again, further = trace(run_functional, tuple(values), mode, recorder)
    assert not further, further
    mutated: dict[fx.Node, fx.Node] = {}
    for old, new in zip(placeholders, again.find_nodes(op="placeholder"), strict=True):
        if "input" in old.meta:
            new.meta["input"] = old.meta["input"]
    for node in list(again.nodes):
        if node.target is aten.copy_.default and node.args[0].op == "placeholder":
            mutated[node.args[0]] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            again.erase_node(node)
    return again, mutated
