"""What Inductor makes of a step that zgraph has captured: how many kernels, and how many bytes they move."""

from __future__ import annotations

from functools import reduce
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.scheduler import FusedSchedulerNode, Scheduler, SchedulerNode
from torch.fx.experimental.proxy_tensor import make_fx

from zgraph import ops
from zgraph.program import Program


class _DoneError(Exception):
    """The schedule is made; code is not wanted."""


class _InAten(fx.Interpreter):
    """Runs a graph as ATen's operators, of which Inductor makes kernels.

    What is read from a tensor, such as the count of steps, is a number known in advance. A norm over gradients is
    written in as few passes as there can be.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As the graph says."""
        if target is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if target is ops.square_sum:
            return args[0].double().square().sum()
        if target is ops.add_up:
            return reduce(torch.add, args[0])
        return super().call_function(target, args, kwargs)


def count(program: Program) -> tuple[int, int]:
    """Kernels of a captured step and the bytes that they read and write, without what other libraries compute.

    Inductor gets forward, backward and update as one graph, its own decompositions and the passes that it runs on both
    halves together, and is stopped when its scheduler has fused what it fuses.
    """
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    with program.fake_mode:
        run = _InAten(nn.Module(), graph=program.graph).run
        traced = make_fx(run, decomposition_table=select_decomp_table())(*inputs)
    joint_graph_passes(traced)
    found: list[tuple[int, int]] = []

    def stop(scheduler: Scheduler) -> None:
        made = [node for node in scheduler.nodes if isinstance(node, (SchedulerNode, FusedSchedulerNode))]
        found.append((len(made), sum(node.get_read_write_buffers_sizes() for node in made)))
        raise _DoneError

    with mock.patch.object(Scheduler, "codegen", stop):
        try:
            compile_fx_inner(traced, inputs)
        except Exception as error:
            if not found:
                raise RuntimeError("Inductor does not take this step") from error
    return found[0]
