"""Looks on while passes run, and writes down what each of them left: every node, its order, seconds and bytes.

A node has one row for each form that it had: a pass that alters it adds a row, and one that leaves it alone adds
nothing. What a program was after each pass is a list of rows, in runs of neighbours, so that 30,000 nodes and fifteen
passes take little more than the nodes alone. Whoever watches costs nothing where nobody asks for a report.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.codegen.kernel import Kernel
from zgraph.cost import Cost
from zgraph.footprint import Footprint, Kind, held_by, placed, with_state
from zgraph.hardware import LOWER_TIERS, MOVERS, Hardware
from zgraph.liveness import held_bytes
from zgraph.pipeline import Pass, PassRecord
from zgraph.plans import owners_of
from zgraph.predict import costs_of
from zgraph.program import Input, Origin, Program, describe, show, target_name
from zgraph.report.runs import runs
from zgraph.report.sources import code_around
from zgraph.spread import spread_of
from zgraph.timeline import COMPUTE, INWARD, OUTWARD, Timeline, lane_of, play
from zgraph.work import LINK

CAPTURE = "capture"
"""What made the nodes that no pass has made."""

NUM_MOMENTS = 240
"""Points in time at which a page draws memory: as many as a screen shows; each has the most that is held near it."""

_COLUMNS = (
    "node", "operator", "form", "arguments", "inputs", "module", "source", "phase", "made_by", "lane", "cost",
)  # fmt: skip


class Table(dict[Any, int]):
    """Values by their number, each kept once."""

    def __missing__(self, value: Any) -> int:
        self[value] = number = len(self)
        return number


class Recorder:
    """A ``zgraph.pipeline.Watch`` that keeps what it sees.

    Args:
        hardware: the machine that costs are of.

    Attributes:
        programs: as ``document`` has them, in the order in which they were shown.
        footprints: what each program held after its last pass.
    """

    def __init__(self, hardware: Hardware) -> None:
        self.programs: list[dict[str, Any]] = []
        self.footprints: list[Footprint] = []
        self._hardware = hardware
        self._tables = {name: Table() for name in ("operator", "form", "module", "source", "phase", "made_by", "lane")}
        self._costs, self._arguments, self._texts = Table(), Table(), Table()
        self._text_of: dict[tuple[str, str], int] = {}  # of kernels, by operator and body
        self._rows: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._number: dict[fx.Node, int] = {}
        self._known: dict[
            fx.Node, tuple[tuple[Any, ...], int, tuple[Any, ...]]
        ] = {}  # what a node was made of, and its row
        self._made_by: dict[fx.Node, str] = {}  # inputs, which have no origin, by the pass behind which they were seen
        self._before: list[int] = []
        self._of_last: list[Footprint] = []  # after each pass, of the last micro-batch's program, which is shown first
        self._placed: dict[int, str] = {}  # nodes by number, in the program that is shown

    def __call__(self, p: Pass | None, program: Program) -> None:
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self._made_by.setdefault(node, CAPTURE if p is None else p.name)
        hardware = self._hardware
        placement = placed(program, hardware)
        costs = costs_of(program, hardware, placement)
        cost_of = {node: costs.of(node) for node in program.graph.nodes}
        cost_number = {id(cost): self._cost_number(cost) for cost in cost_of.values()}
        rows = [self._row(program, node, cost_number[id(cost)]) for node, cost in cost_of.items()]
        timeline = play(program, hardware, cost_of=cost_of.__getitem__)
        held = held_by(program, hardware, placement)
        if p is None:
            self.programs.append({"passes": []})
            self.footprints.append(held)
            self._before, self._placed = rows, {}
        if len(self.programs) == 1:
            self._of_last.append(held)
        else:
            held = with_state(held, self._of_last[min(len(self.programs[-1]["passes"]), len(self._of_last) - 1)])
        self.footprints[-1] = held
        numbers = self._rows["node"]
        before, after = self._before, rows
        was, now = {numbers[row]: row for row in before}, {numbers[row]: row for row in after}
        moved = _moved([numbers[row] for row in before if numbers[row] in now], [n for n in now if n in was])
        self.programs[-1]["passes"].append({
            "name": CAPTURE if p is None else p.name,
            "about": "The step as it was captured, on one rank." if p is None else _about(p),
            "stage": program.stage.name,
            "num_nodes": len(rows),
            "num_added": sum(number not in was for number in now),
            "num_removed": sum(number not in now for number in was),
            "num_moved": len(moved),
            "num_altered": sum(was.get(number, row) != row for number, row in now.items()),
            "moved": runs(sorted(moved)),
            "order": runs(after),
            "placed": self._newly_placed(program),
            "step_s": timeline.step_s,
            "exposed_s": timeline.exposed_s,
            "starved_s": timeline.starved_s,
            "busy_s": timeline.busy_s,
            "peak_bytes": held.peak_bytes,
            "communicated_bytes": sum(map(received_bytes, cost_of.values())),
            "num_collectives": sum(node.target in ops.STARTS for node in program.graph.nodes),
            "memory": moments(program, timeline, held),
            "owners": [asdict(owner) for owner in owners_of(held.peak_holdings)],
        })  # fmt: skip
        self.programs[-1]["events"] = self._events(timeline)
        self._before = rows

    def add_records(self, records: Iterable[PassRecord], *, proved: bool) -> None:
        """Add what the runner measured of each pass, in the order in which they ran."""
        passes = [each for program in self.programs for each in program["passes"]]
        ran = iter(records)
        for each in passes:
            if each["name"] != CAPTURE:
                record = next(ran)
                assert record.name == each["name"], (record, each["name"])
                each |= {"time_s": record.time_s, "verify_s": record.verify_s, "assumes": list(record.assumes)}
            else:
                each |= {"time_s": 0.0, "verify_s": 0.0, "assumes": []}
            each["proved"] = proved

    def tables(self) -> dict[str, Any]:
        """Rows by column, and the values that their numbers stand for."""
        operators = list(self._tables["operator"])
        sources = list(self._tables["source"])
        costs = list(self._costs)
        names = ("seconds", "num_calls", "num_bytes", "flops", "received_bytes", "family")
        return {
            "rows": self._rows,
            "operators": [name for name, _ in operators],
            "wait": target_name(ops.wait),
            "transfer_lanes": {lane[tier]: words for tier, words in MOVERS.items() for lane in (INWARD, OUTWARD)},
            "bodies": [body for _, body in operators],
            "texts": list(self._texts),
            "text_of": [self._text_of.get(operator) for operator in operators],
            "arguments": list(self._arguments),
            "sources": [{"at": source, "code": code_around(source)} for source in sources],
            "costs": {name: [cost[i] for cost in costs] for i, name in enumerate(names)},
            **{f"{name}s": list(self._tables[name]) for name in ("form", "module", "phase", "lane")},
            "makers": list(self._tables["made_by"]),
        }

    # -- nodes ----------------------------------------------------------------------------------------------

    def _row(self, program: Program, node: fx.Node, cost: int) -> int:
        """The row of a node as it is now; a new one if it was never so before."""
        meta = node.meta
        made_of = node.target, node.args, node.kwargs, meta.get("val"), meta.get("origin"), meta.get("input")
        known = self._known.get(node)
        if known is not None and not ops.may_write(node.target):  # the body of a kernel is edited in place
            was_made_of, row, content = known
            if content[-1] == cost and all(was is now for was, now in zip(was_made_of, made_of, strict=True)):
                return row
        content = self._content(program, node, cost)
        if known is not None and known[2] == content:
            row = known[1]
        else:
            row = len(self._rows["node"])
            for name, value in zip(_COLUMNS, content, strict=True):
                self._rows[name].append(value)
        self._known[node] = made_of, row, content
        return row

    def _content(self, program: Program, node: fx.Node, cost: int) -> tuple[Any, ...]:
        number = self._number.setdefault(node, len(self._number))
        what: Input | None = node.meta.get("input")
        origin: Origin | None = node.meta.get("origin")
        inputs: list[int] = []
        operator, body = _called(node)
        if isinstance(node.target, Kernel) and (operator, body) not in self._text_of:
            language = node.target.language(self._hardware.device_type)
            self._text_of[operator, body] = self._texts[node.target.text(language)]
        if what is not None:
            arguments, module = str(what), what.name.rpartition(".")[0] if program.layout is None else what.name
        else:
            arguments, module = self._shown(program, node, inputs), origin.module if origin is not None else ""
        tables = self._tables
        phase = "input" if what is not None else origin.phase.value if origin is not None else "result"
        return (
            number,
            tables["operator"][operator, body],
            tables["form"][describe(node.meta.get("val")) if node.op != "output" else ""],
            self._arguments[arguments],
            inputs,
            tables["module"][module],
            tables["source"][origin.source if origin is not None else None],
            tables["phase"][phase],
            tables["made_by"][origin.made_by if origin is not None else self._made_by.get(node, CAPTURE)],
            tables["lane"][lane_of(node)],
            cost,
        )

    def _newly_placed(self, program: Program) -> dict[str, list[list[int]]]:
        """Nodes, as runs of their numbers, by how they lie now; only those that have not lain so before."""
        spread = spread_of(program)
        found: dict[str, list[int]] = {}
        for node in program.graph.nodes:
            words = [spread[node].value] if node in spread else []
            tier = program.tier_of(node)
            placement = ", ".join([*words, *([f"on {tier}"] if tier else [])])
            number = self._number[node]
            if self._placed.get(number, "") != placement:
                self._placed[number] = placement
                found.setdefault(placement, []).append(number)
        return {placement: runs(sorted(numbers)) for placement, numbers in found.items()}

    def _cost_number(self, cost: Cost) -> int:
        amounts = float(cost.seconds), int(cost.num_calls), int(cost.num_bytes), int(cost.flops), received_bytes(cost)
        return self._costs[(*amounts, cost.works[0].family if cost.works else "")]

    def _shown(self, program: Program, node: fx.Node, inputs: list[int]) -> str:
        """Arguments as text with a ``%`` for each node, whose numbers go to ``inputs``."""
        text = _arguments(program, node, _Numbers(self._number, inputs))
        # A literal may have a % of its own: nodes are then shown by their numbers, and nothing is left to fill in.
        in_full = _Numbers(self._number, [], in_full=True)
        return text if text.count("%") == len(inputs) else _arguments(program, node, in_full)

    def _events(self, timeline: Timeline) -> dict[str, list[Any]]:
        """When the calls of the program run that is there now."""
        lanes = self._tables["lane"]
        return {
            "row": [self._known[event.node][1] for event in timeline.events],
            "lane": [lanes[event.lane] for event in timeline.events],
            "start_s": [event.start_s for event in timeline.events],
            "end_s": [event.end_s for event in timeline.events],
        }


def _about(p: Pass) -> str:
    """What a pass says of itself, with the picture of before and after, but without its options."""
    return (inspect.getdoc(type(p)) or "").partition("\n\nArgs:")[0].partition("\n\nAttributes:")[0]


class _Numbers(dict[fx.Node, str]):
    """Shows every node as ``%``, or in full as ``%12``, and notes which it was."""

    def __init__(self, number: dict[fx.Node, int], noted: list[int], *, in_full: bool = False) -> None:
        super().__init__()
        self._number, self._noted, self._in_full = number, noted, in_full

    def __missing__(self, node: fx.Node) -> str:
        self._noted.append(self._number[node])
        return f"%{self._number[node]}" if self._in_full else "%"


def _arguments(program: Program, node: fx.Node, numbers: _Numbers) -> str:
    if node.op == "output":
        names = ["loss" if what is None else str(what) for what in program.outputs]
        results = zip(names, program.results(), strict=True)
        return ", ".join(f"{name}={show(result, numbers)}" for name, result in results)
    shown = [show(arg, numbers) for arg in node.args]
    return ", ".join(shown + [f"{name}={show(value, numbers)}" for name, value in sorted(node.kwargs.items())])


def _called(node: fx.Node) -> tuple[str, str]:
    """What a node calls, and the body of a kernel."""
    if node.op == "placeholder":
        return "input", ""
    if node.op == "output":
        return "return", ""
    if ops.may_write(node.target) and hasattr(node.target, "writes"):
        return str(node.target.name), str(node.target)  # type: ignore[union-attr]
    return target_name(node.target), ""


def received_bytes(cost: Cost) -> int:
    """What a rank receives in a collective, or in an all-reduce sends, too, as ``stats()["collectives"]`` counts."""
    found = 0
    for work in cost.works:
        if work.unit == LINK:
            others = int(work.read_bytes) * (work.world - 1) // work.world
            found += 2 * others if work.collective == "all_reduce" else others
    return found


def _moved(before: Sequence[int], after: Sequence[int]) -> set[int]:
    """The fewest of some numbers that have to move to get from one order to another.

    Those that stay are a longest increasing sequence of their old places (Schensted, 1961).
    """
    place = {number: i for i, number in enumerate(before)}
    ends: list[int] = []  # the least last place of a sequence of each length
    at: list[int] = []
    for number in after:
        length = bisect_left(ends, place[number])
        ends[length : length + 1] = [place[number]]
        at.append(length)
    stay, length = set(), len(ends) - 1
    for number, reached in zip(reversed(after), reversed(at), strict=True):
        if reached == length:
            stay.add(number)
            length -= 1
    return set(after) - stay


def moments(program: Program, timeline: Timeline, held: Footprint) -> dict[str, Any]:
    """Bytes held by kind over time, at up to ``NUM_MOMENTS`` points: of each part of the step, where most is held.

    ``peak`` is the index of the point that is the footprint's ``peak_position``; ``on_host`` and ``on_disk`` are as
    ``bytes``, of what lies there.
    """
    nodes = list(program.graph.nodes)
    starts = {event.node: event.start_s for event in timeline.events if event.lane == COMPUTE}
    at, seconds = 0.0, []
    for node in nodes:
        at = max(at, starts.get(node, at))
        seconds.append(at)
    by_kind: dict[Kind, Sequence[int]] = {kind: each for kind, each in held.by_kind().items() if any(each)}
    if held.arena_bytes:
        inside = held_bytes((h for h in held.holdings if h.in_arena), held.num_positions)
        by_kind[Kind.UNUSED] = [held.arena_bytes - each for each in inside]
    total = [sum(each) for each in zip(*by_kind.values(), strict=True)] if by_kind else [0] * len(nodes)
    end = timeline.step_s or 1.0
    most: dict[int, int] = {}
    for i, second in enumerate(seconds):
        moment = min(int(second / end * NUM_MOMENTS), NUM_MOMENTS - 1)
        if moment not in most or (total[i], i == held.peak_position) > (total[most[moment]], False):
            most[moment] = i
    positions = [most[moment] for moment in sorted(most)]
    return {
        "peak": positions.index(held.peak_position),
        "positions": positions,
        "seconds": [round(seconds[i], 9) for i in positions],
        "bytes": {kind.value: [each[i] for i in positions] for kind, each in by_kind.items()},
        **{
            f"on_{tier}": {
                kind.value: [each[i] for i in positions] for kind, each in held.by_kind(tier).items() if any(each)
            }
            for tier in LOWER_TIERS
        },
    }


__all__ = ["CAPTURE", "NUM_MOMENTS", "Recorder", "Table", "moments", "received_bytes"]
