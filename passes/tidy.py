"""Remove what tracing leaves behind: no-ops, dead code, transposes of transposes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from zgraph import ops
from zgraph.pipeline import Pass
from zgraph.program import Program, Stage

aten = torch.ops.aten

_ALWAYS_NOOP = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default})


@dataclass(frozen=True)
class Tidy(Pass):
    """Replace no-ops by their argument and drop nodes that nothing reads.

        a = detach(w)
        b = t(t(a))              ->    y = mm(x, w)
        y = mm(x, b)

    Random operators stay even when unread: they advance the generator, as in eager.
    """

    takes, gives = Stage.CAPTURED, Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        for node in program.graph.nodes:
            if node.op == "call_function":
                same = _same_value(node)
                if same is not None:
                    node.replace_all_uses_with(same)
        remove_dead(program)


def remove_dead(program: Program) -> None:
    """Erase calls that nothing reads, except random ones."""
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and not node.users and not ops.draws(node):
            program.graph.erase_node(node)


def _same_value(node: fx.Node) -> fx.Node | None:
    """An earlier node with the same value, shape, strides and dtype."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in _ALWAYS_NOOP:
        return source
    if node.target is aten.t.default and source.target is aten.t.default:
        inner = source.args[0]
        return inner if isinstance(inner, fx.Node) else None
    if node.target is aten.copy.default:
        new = node.args[1]
        return new if isinstance(new, fx.Node) and _alike(node, new) else None
    if node.target in _RESHAPES and _alike(source, node):
        return source
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return (
        isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.dtype == y.dtype
        and x.device == y.device
    )
