"""What to say when a rewritten program computes something else: the node where meaning parted, and both values.

The verifier finds that an output has another term. The mistake is seldom at the output: it is at the first node that
computes what no node of the original does, and there at the innermost place in which the two terms differ.
"""

from __future__ import annotations

from torch import fx

from zgraph.errors import MISTAKE_IN_PASS, VerifyError
from zgraph.meaning import Meaning
from zgraph.movement import Started, Value
from zgraph.program import Program, source_of
from zgraph.terms import Form, Term, part, show

MISSING = object()
"""The value of what a program does not have."""

Result = tuple[Value, "fx.Node | None"]
"""What a program returns or draws, and the node that it comes from."""


def changed(
    program: Program, after: str, what: str, before: Result, now: Result, expected: Meaning, found: Meaning
) -> VerifyError:
    """The error for a program of which ``what`` is another value than it should be.

    Args:
        program: the rewritten one.
        after: the pass to blame.
        what: in words.
        before, now: its value in the reference, and in ``program``.
        expected, found: what the reference and ``program`` mean.
    """
    (wanted, source), (got, node) = before, now
    culprit = _first_foreign(program, node, expected, found) or node
    inner_wanted, inner_got = part(wanted, got)
    lines = [f"{after} changed what the step computes: {what}"]
    if culprit is not None:
        maker = culprit.meta["origin"].made_by if "origin" in culprit.meta else "capture"
        lines.append(f"  node:     {culprit.name}, made by {maker}")
    for depth in range(5, 40):
        texts = _show(inner_wanted, depth), _show(inner_got, depth)
        if texts[0] != texts[1]:
            break
    lines += [f"  expected: {texts[0]}", f"  found:    {texts[1]}"]
    if (inner_wanted, inner_got) != (wanted, got):
        lines.append(f"  within:   {_show(got, 3)}")
    if culprit is not None:
        lines += ["  around:", *(f"    {line}" for line in _around(program, culprit))]
    return VerifyError(
        "\n".join(lines),
        where=source_of(culprit) or source_of(node) or source_of(source),
        fix=MISTAKE_IN_PASS,
    )


def _first_foreign(program: Program, node: fx.Node | None, expected: Meaning, found: Meaning) -> fx.Node | None:
    """The first node that ``node`` depends on whose value is none of the reference's, nor a part of one."""
    if node is None:
        return None
    ancestors = {node}
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in ancestors:
                ancestors.add(source)
                stack.append(source)
    known = _Known(expected)
    for candidate in program.graph.nodes:
        if candidate in ancestors and not known.holds(found.values[candidate]):
            return candidate  # type: ignore[no-any-return]
    return None


class _Known:
    """The values of a meaning, and whatever moves or averages them."""

    def __init__(self, meaning: Meaning) -> None:
        self._terms = {value for value in meaning.values.values() if isinstance(value, Term)}
        self._terms.update(value for value in meaning.results if isinstance(value, Term))

    def holds(self, value: Value) -> bool:
        if isinstance(value, Started):
            return self.holds(value.arrives)
        if isinstance(value, tuple):
            return all(map(self.holds, value))
        if not isinstance(value, Term) or value in self._terms:
            return True
        if value.target is Form.FLAT:
            return all(base.target is Form.PADDING or self.holds(base) for base, _, _ in value.args)
        if value.target is Form.RESHAPE and value.args[0].target is Form.FLAT:
            return False  # a part that is no whole tensor
        if value.target in (Form.MEAN, Form.SUM):
            return value.args[0] in self._terms
        if value.target in (Form.SHARD, Form.RESHAPE, Form.PERMUTE, Form.SPLAT):
            return self.holds(value.args[0])
        return value.target in (Form.INPUT, Form.FILL)


def _show(value: Value, depth: int) -> str:
    return "nothing" if value is None or value is MISSING else show(value, depth)


def _around(program: Program, node: fx.Node, reach: int = 2) -> list[str]:
    """The lines of a program's text next to a node, which is marked."""
    nodes = list(program.graph.nodes)
    at = nodes.index(node)
    lines = program.text().splitlines()
    return [f"{'>' if i == at else ' '} {lines[i]}" for i in range(max(0, at - reach), min(len(nodes), at + reach + 1))]
