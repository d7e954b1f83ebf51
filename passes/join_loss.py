"""Make one operator of the two with which the backward of a cross-entropy begins, so that one tensor is there at once.

The gradient of the logarithms that a loss is computed from is as large as the logits, and zero but for one element of
each row. It is there for what follows alone, which goes row by row, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from zgraph import ops
from zgraph.pipeline import Pass
from zgraph.program import Phase, Program, Stage, operand, phase_of

aten = torch.ops.aten


@dataclass(frozen=True)
class JoinLossBackward(Pass):
    """Compute the gradient of a cross-entropy's logits a few rows at a time.

        gy = nll_loss_backward(gl, y, t, ...)
        gx = log_softmax_backward(gy, y, 1)       ->    gx = cross_entropy_backward(gl, y, t, ..., 1)

    Bit for bit the same, and on a CPU what the first of them gives stays in a cache. Logits of more rows than are
    computed at once (``zgraph.ops.rows_at_once``) are, whose gradient nothing else reads. A region that has these calls
    keeps them.
    """

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        for node, of_loss in joinable(program).items():
            names = [argument.name for argument in of_loss.target._schema.arguments]  # type: ignore[union-attr]
            given = [ops.argument(of_loss, name) for name in names]
            dim = ops.argument(node, "dim")
            of_loss.prepend(node)  # what a loss is computed from need not be there for longer
            node.target, node.args, node.kwargs = ops.cross_entropy_backward, (*given, dim), {}
            node.meta["origin"] = replace(node.meta["origin"], made_by=self.name)
            program.graph.erase_node(of_loss)


def joinable(program: Program) -> dict[fx.Node, fx.Node]:
    """The calls that give gradients of logits in backward, each with the call that it can be joined with."""
    losses = program.graph.find_nodes(op="call_function", target=aten.nll_loss_backward.default)
    return {next(iter(of_loss.users)): of_loss for of_loss in losses if _can_join(of_loss)}


def _can_join(of_loss: fx.Node) -> bool:
    """Whether a call of backward gives what one other goes on from, over rows of which more than a few are there."""
    logs = operand(of_loss, 1)
    val = logs.meta["val"]
    readers = list(of_loss.users)
    if len(readers) != 1 or readers[0].target is not aten._log_softmax_backward_data.default:
        return False
    (node,) = readers
    of_backward = phase_of(of_loss) is phase_of(node) is Phase.BACKWARD
    if not of_backward or node.args[:2] != (of_loss, logs) or val.dim() != 2 or not val.is_contiguous():
        return False
    of_rows = ops.argument(node, "dim") in (-1, 1) and ops.argument(node, "input_dtype") == val.dtype
    return of_rows and 0 < ops.rows_at_once(val) < len(val)
