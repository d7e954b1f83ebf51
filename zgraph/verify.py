"""What must hold of a program after every pass; a pass that breaks a rule is named and its program never runs.

Structure: arguments are defined before use; every node has a value and an origin; results fit the inputs they are
donated to; each collective that is started is waited for exactly once, and nothing else reads it before; what is
written over is not read afterwards.
"""

from __future__ import annotations

from torch import fx

from zgraph import ops
from zgraph.errors import VerifyError
from zgraph.liveness import owners
from zgraph.program import Program, Role, Stage, describe, operand, readers, target_name
from zgraph.tracing import quoted


def verify(program: Program, *, after: str) -> None:
    """Check ``program``; ``after`` is the pass to blame.

    Raises:
        VerifyError: with the rule, the node, the user's source line and the pass.
    """
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise _broken(after, node, f"reads {source.name} before it is computed")
        seen.add(node)
        if node.op == "placeholder":
            if "input" not in node.meta or "val" not in node.meta:
                raise _broken(after, node, "is an input without a meaning")
        elif node.op == "call_function":
            if "origin" not in node.meta or "val" not in node.meta:
                raise _broken(after, node, "has no recorded value or origin")
            _check_collective(node, after)
        elif node.op != "output":
            raise _broken(after, node, f"is a {node.op}; only placeholders and calls are allowed")
    _check_results(program, after)
    if program.stage >= Stage.INPLACE:
        _check_overwrites(program, after)


def _check_overwrites(program: Program, after: str) -> None:
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    owner = owners(program)
    overwritten: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.target is ops.all_gather_into:
            written = [node.kwargs["out"]]
        elif isinstance(getattr(node.target, "writes", None), tuple):
            written = [node.args[index] for index in node.target.writes if index is not None]
        else:
            continue
        for memory in written:
            source = operand(memory) if memory.target is ops.shard else memory
            overwritten[owner[source]] = node
            for reader in readers(source):
                if order[reader] > order[node] and reader.target not in (ops.all_gather_into, ops.wait):
                    raise _broken(after, reader, f"reads what {node.name} has written over")
    for what, result in zip(program.outputs, program.results(), strict=True):
        memory = owner.get(result)
        if memory in overwritten and memory.meta.get("input") != what:
            raise _broken(after, overwritten[memory], f"writes over what is returned as {what or 'the loss'}")


def _check_collective(node: fx.Node, after: str) -> None:
    if node.target in ops.STARTS:
        waits = [user for user in node.users if user.target is ops.wait]
        if len(waits) != 1:
            raise _broken(after, node, f"is waited for {len(waits)} times instead of once")
        for user in node.users:
            if user is not waits[0]:
                raise _broken(after, user, f"reads {node.name} before it has arrived")
    elif node.target is ops.wait and operand(node).target not in ops.STARTS:
        raise _broken(after, node, "waits for a value that no collective produces")


def _check_results(program: Program, after: str) -> None:
    results = program.results()
    if len(results) != len(program.outputs):
        raise VerifyError(f"{after}: {len(results)} results for {len(program.outputs)} declared outputs")
    inputs = {what: node for node, what in program.placeholders()}
    donated: set[object] = set()
    for what, result in zip(program.outputs, results, strict=True):
        if what is None:
            continue
        if what in donated:
            raise VerifyError(f"{after}: two results are the new value of {what}")
        donated.add(what)
        if what.role not in (Role.PARAM, Role.OPT_STATE, Role.BUFFER, Role.CONSTANT):
            raise VerifyError(f"{after}: a result is the new value of {what}, which is not state")
        if what not in inputs:
            continue  # state that this step creates
        before, new = inputs[what].meta["val"], result.meta["val"] if isinstance(result, fx.Node) else result
        if describe(before) != describe(new):
            raise VerifyError(f"{after}: the new value of {what} is {describe(new)}, but it is {describe(before)}")
    if program.stage >= Stage.BUCKETED and program.layout is None:
        raise VerifyError(f"{after}: the program is {program.stage.name} but has no layout")


def _broken(after: str, node: fx.Node, rule: str) -> VerifyError:
    origin = node.meta.get("origin")
    name = target_name(node.target) if node.op == "call_function" else node.op
    return VerifyError(
        f"{after} left a program that breaks a rule: {node.name} ({name}) {rule}",
        where=quoted(origin.source) if origin else None,
        fix="this is a mistake in the pass; nothing was run",
    )
