"""Emit a program as one readable Python function.

Each value is dropped right after its last use, and the argument list is emptied on entry, so that a buffer is free as
soon as the program is done with it. Collectives go through a ``comm`` object; everything else is a plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.codegen.owned import OwnedUpdate
from zgraph.codegen.source import SourceWriter
from zgraph.heap import release_free_memory
from zgraph.liveness import alive_bytes, last_uses
from zgraph.memory_check import MemoryCheck
from zgraph.program import Phase, Program, describe, operand

_COMM_METHODS: dict[Any, str] = {
    ops.all_gather: "all_gather",
    ops.all_gather_into: "all_gather",
    ops.reduce_scatter: "reduce_scatter",
    ops.all_reduce: "all_reduce",
    ops.all_to_all: "all_to_all",
    ops.wait: "wait",
    ops.shard: "shard",
}


@dataclass(frozen=True)
class Step:
    """An emitted program: its source and the function ``step(inputs, comm) -> results``."""

    source: str
    function: Callable[[list[Any], Any], list[Any]]


def emit(program: Program, *, tagged: bool = False, staged: bool = True, watch: MemoryCheck | None = None) -> Step:
    """Write and compile ``program``.

    Args:
        tagged: each collective says which one it is, for ``zgraph.agreement.CheckedComm``.
        staged: see ``zgraph.liveness.lifetimes``.
        watch: is shown everything that the step holds after each call.
    """
    writer = SourceWriter()
    names: dict[fx.Node, str] = {node: f"v{i}" for i, node in enumerate(program.graph.nodes)}
    dying = last_uses(program.graph)
    lines = ["def step(inputs, comm):"]
    placeholders = list(program.placeholders())
    for node, what in placeholders:
        lines.append(f"    # {names[node]}: {describe(node.meta['val'])} is {_comment(str(what))}")
    lines.append(f"    [{', '.join(names[node] for node, _ in placeholders)}] = inputs")
    watched = writer.bind(watch, "memory") if watch is not None else None
    if watched is not None:
        lines.append(f"    {watched}.begin(inputs)")
    lines.append("    inputs.clear()")
    phase: Phase | None = None
    module = ""
    full = _where_memory_is_short(program, staged)
    for number, node in enumerate(program.graph.nodes):
        if node in full:
            lines.append(
                f"    {writer.bind(release_free_memory, 'release_free_memory')}()  # memory is short from here"
            )
        if node.op == "output":
            lines.append(f"    return {writer.argument(node.args[0], names)}")
        if node.op != "call_function":
            continue
        origin = node.meta["origin"]
        if origin.phase is not phase or origin.module != module:
            phase, module = origin.phase, origin.module
            lines.append(f"    # {phase.value} {_comment(module)}".rstrip())
        tag = _tag(node, names[node]) if tagged and node.target in ops.STARTS else None
        lines.append(f"    {names[node]} = {_expression(writer, node, names, tag)}")
        if watched is not None:
            lines.append(f"    {watched}.see({number}, locals())")
        dead = [names[n] for n in dying.get(node, ())]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    source = "\n".join(lines) + "\n"
    return Step(source, writer.compile(source, "step", f"<zgraph step {id(program):x}>"))


def _tag(node: fx.Node, name: str) -> str:
    """A collective's name, operation, and value; the same on all ranks that run the same program."""
    what = f"{name} = {_COMM_METHODS[node.target]} of {describe(operand(node).meta['val'])}"
    return f"{what} ({node.meta['origin'].source or 'no line of the model'})"


def _expression(writer: SourceWriter, node: fx.Node, names: dict[fx.Node, str], tag: str | None) -> str:
    method = _COMM_METHODS.get(node.target)
    if method is not None:
        # The mesh gives size and axis; what is passed is the tensor, the reduction, and where to put the result.
        args = [writer.argument(a, names) for a in node.args[: 2 if "reduce" in method else 1]]
        args += [f"{key}={writer.argument(value, names)}" for key, value in node.kwargs.items()]
        if tag is not None:
            args.append(f"tag={writer.literal(tag)}")
        return f"comm.{method}({', '.join(args)})"
    if isinstance(node.target, OwnedUpdate):
        vals = tuple(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args)
        whose = ["rank=comm.rank"] if node.target.is_divided(vals) else []
        return writer.expression(node.target, [*(writer.argument(arg, names) for arg in node.args), *whose])
    return writer.call(node, names)


_SHORT = (0.0, 0.6, 0.8, 0.9, 1.0)
"""Fractions of the peak of temporary memory; free heap pages are returned when each is first reached."""


def _where_memory_is_short(program: Program, staged: bool) -> set[fx.Node]:
    """Calls before which host memory should be returned; none on devices that manage their own memory."""
    if program.layout is None or any(bucket.device.type != "cpu" for bucket in program.layout.buckets):
        return set()
    alive = [item for item in alive_bytes(program, staged=staged) if item[0].op == "call_function"]
    peak = max(num_bytes for _, num_bytes in alive)
    return {next(node for node, num_bytes in alive if num_bytes >= fraction * peak) for fraction in _SHORT}


def _comment(text: str) -> str:
    """Text that stays inside a comment, whatever a model's names contain."""
    return ascii(text)[1:-1]
