"""Why a step takes what it takes, in sentences with numbers, out of what a report has recorded of it.

Whether it fits and what is in the way, what limits the step and what would make it faster, what ranks wait for, and why
these options rather than others. The same for a step that ran, one that was planned, and a report that was saved.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.hardware import LOWER_TIERS, MOVERS, UPDATER
from zgraph.plans import NO_WAY_OUT, Owner, Plan, show_bytes, show_options, show_s
from zgraph.report import Report
from zgraph.report.runs import unrolled
from zgraph.search import Search

_NUM_TOLD = 3
"""Tensors, families of operators and waits that are named."""

_SMALL = 0.005
"""Shares of a step or of a peak below this are not worth a word."""

_LIMITS = {
    "computing": "The device's computing limits it",
    "links": "The links between ranks limit it",
    "the host": "The host, which issues calls, limits it",
    "the link to the host": "The link to the host limits it",
    "the disk": "The disk limits it",
    UPDATER: "The host's processors, which update parameters, limit it",
}


@dataclass(frozen=True)
class Explanation:
    """Sentences by the question that they answer.

    Attributes:
        answers: question and sentences.
    """

    answers: tuple[tuple[str, tuple[str, ...]], ...]

    def as_dict(self) -> dict[str, list[str]]:
        """Sentences by question."""
        return {question: list(sentences) for question, sentences in self.answers}

    def __str__(self) -> str:
        return "\n\n".join("\n".join([question, *(f"  {each}" for each in told)]) for question, told in self.answers)


def explain(report: Report, search: Search | None = None) -> Explanation:
    """Answer what a person asks of a step first.

    Args:
        report: of ``model.report()`` or of a plan, or read from a file.
        search: that has found the plan, to be asked what other machines would make of it; not asked if None.
    """
    plan, document = report.plan, report.document
    answers = {
        "Does it fit?": _fits(plan),
        "What takes the memory?": _memory(document),
        "What limits the step?": _step(plan, document),
        "What do ranks wait for?": _communication(document),
        "Why these options?": _options(plan),
        "Why these kernels?": _kernels(document),
        "What would help?": _help(plan, document),
        "What would more of it buy?": _more(plan, search) if search is not None else (),
        "What else is to be known?": document["notes"],
    }
    told = ((question, tuple(sentences)) for question, sentences in answers.items())
    return Explanation(tuple((question, sentences) for question, sentences in told if sentences))


def _fits(plan: Plan) -> Iterator[str]:
    yield f"{'Yes' if plan.fits else 'No'}: {plan.verdict}."


def _memory(document: Mapping[str, Any]) -> Iterator[str]:
    program = max(document["programs"], key=lambda each: each["passes"][-1]["peak_bytes"])
    last, tables = program["passes"][-1], document["tables"]
    memory = last["memory"]
    totals = [sum(at) for at in zip(*memory["bytes"].values(), strict=True)]
    peak = memory["peak"]
    row = list(unrolled(last["order"]))[memory["positions"][peak]]
    where = tables["phases"][tables["rows"]["phase"][row]]
    module = tables["modules"][tables["rows"]["module"][row]]
    kinds = Counter({kind: held[peak] for kind, held in memory["bytes"].items()})
    shares = [
        f"{kind} {show_bytes(held)} ({held / totals[peak]:.0%})"
        for kind, held in kinds.most_common()
        if held > _SMALL * totals[peak]
    ]
    at = f"in {where}" + (f" of {module}" if module else "")
    yield f"At the peak, {at}, tensors hold {show_bytes(totals[peak])}: {', '.join(shares)}."
    yield from (str(Owner(**owner)) for owner in last["owners"][:_NUM_TOLD])
    for tier, on_tier in _away(program).items():
        stored = {kind: held[peak] for kind, held in on_tier.items() if held[peak]}
        if stored:
            told = ", ".join(f"{show_bytes(held)} of {kind}" for kind, held in stored.items())
            yield f"On each rank's {tier}, then, lie {told}."


def _step(plan: Plan, document: Mapping[str, Any]) -> Iterator[str]:
    chosen = plan.chosen
    parts: dict[str, float] = defaultdict(float)
    families: Counter[str] = Counter()
    waiting = " or ".join(["waiting for links", *_movers(document)])
    for program in document["programs"]:
        last, times = program["passes"][-1], program["repeats"]
        parts[waiting] += last["exposed_s"] * times
        parts["waiting for the host"] += last["starved_s"] * times
        parts["computing"] += last["busy_s"].get("compute", 0.0) * times
        for family, seconds in _families(document, last["order"]).items():
            families[family] += seconds * times
    if any(UPDATER in program["if_faster"] for program in document["programs"]):
        parts["waiting, in the end, for the host's processors"] += max(chosen.step_s - sum(parts.values()), 0.0)
    largest = sorted(((each, name) for name, each in parts.items()), key=lambda part: -part[0])
    told = [f"{show_s(each)} {name} ({each / chosen.step_s:.0%})" for each, name in largest if each]
    yield f"A step takes {show_s(chosen.step_s)}: {', '.join(told)}."
    if all("measured" in program for program in document["programs"]):
        took = sum(program["measured"]["end_s"][-1] * program["repeats"] for program in document["programs"])
        num = len(document["programs"][-1]["measured"]["steps_s"])
        yield f"It was measured to take {show_s(took)} ({took / chosen.step_s - 1:+.1%}), the median of {num} steps."
    total = families.total()
    slowest = [
        f"{family} {seconds / total:.0%}"
        for family, seconds in families.most_common(_NUM_TOLD)
        if seconds > _SMALL * total
    ]
    if slowest:
        yield f"Of the computing, by family of operators: {', '.join(slowest)}."
    faster = {
        what: sum(each["if_faster"][what] * each["repeats"] for each in document["programs"])
        for what in document["programs"][0]["if_faster"]
    }
    saved = sorted(faster.items(), key=lambda item: item[1])
    yield f"{_LIMITS[saved[0][0]]} most."
    gains = [
        f"{what} {show_s(seconds)} ({1 - seconds / chosen.step_s:.1%} less)"
        for what, seconds in saved
        if seconds < chosen.step_s
    ]
    yield f"If one of them were twice as fast, it would take: {', '.join(gains)}."
    if plan.gap > _SMALL:
        yield f"No order of the same calls takes less than {show_s(plan.least_s)}, which is {plan.gap:.1%} less."


def _movers(document: Mapping[str, Any]) -> list[str]:
    """What moves something to or from lower tiers in a step, in words."""
    used = {what for program in document["programs"] for what in program["if_faster"]}
    return [words for words in MOVERS.values() if words in used]


def _families(document: Mapping[str, Any], order: Sequence[Sequence[int]]) -> Counter[str]:
    """Seconds on the compute lane by family of operators."""
    tables = document["tables"]
    rows, costs, compute = tables["rows"], tables["costs"], tables["lanes"].index("compute")
    found: Counter[str] = Counter()
    for row in unrolled(order):
        cost = rows["cost"][row]
        if rows["lane"][row] == compute and costs["seconds"][cost]:
            found[costs["family"][cost]] += costs["seconds"][cost]
    return found


def _communication(document: Mapping[str, Any]) -> Iterator[str]:
    received = sum(each["passes"][-1]["communicated_bytes"] * each["repeats"] for each in document["programs"])
    num = sum(each["passes"][-1]["num_collectives"] * each["repeats"] for each in document["programs"])
    movers = _movers(document)
    if not num and not movers:
        return
    if num:
        yield f"A rank receives {show_bytes(received)} in the {num:,} collectives of a step."
    tables = document["tables"]
    waits: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    exposed, found = 0.0, list(_waits(document))
    for each in found:
        what = _operator(document, each.started), tables["phases"][tables["rows"]["phase"][each.row]]
        times = each.program["repeats"]
        waits[what] += each.seconds * times
        counts[what] += times
        exposed += each.seconds * times
    told = [(what, seconds) for what, seconds in waits.most_common(_NUM_TOLD) if seconds > _SMALL * exposed]
    if not told or not exposed:
        yield f"Computing never waits for {'them' if num else ' or '.join(movers)}."
    for (operator, where), seconds in told:
        times = counts[operator, where]
        yield f"Computing waits {show_s(seconds)} for {times:,} x {operator} in {where}."
    if told:
        yield from _longest_wait(document, max(found, key=lambda each: each.seconds))


def _operator(document: Mapping[str, Any], row: int) -> str:
    """What a row of the tables calls, in a word."""
    tables = document["tables"]
    name: str = tables["operators"][tables["rows"]["operator"][row]].split(".")[-2]
    return name


def _longest_wait(document: Mapping[str, Any], wait: _Wait) -> Iterator[str]:
    """What computing waits longest for at once: when it starts, why then, and when it is needed."""
    tables, row = document["tables"], wait.started
    rows, events = tables["rows"], wait.program["events"]
    lane = [
        (start, end, each)
        for each, start, end in zip(events["row"], events["start_s"], events["end_s"], strict=True)
        if rows["lane"][each] == rows["lane"][row]
    ]
    at = next(i for i, (*_, each) in enumerate(lane) if each == row)
    begins, ends, _ = lane[at]

    def named(each: int) -> str:
        operator, module = _operator(document, each), tables["modules"][rows["module"][each]]
        return f"{operator} of {module}" if module else operator

    yield (
        f"The longest wait is {show_s(wait.seconds)} for {named(row)}, which runs from {show_s(begins)} to "
        f"{show_s(ends)} and is needed at {show_s(wait.start_s)}."
    )
    if at and lane[at - 1][1] == begins:
        what = tables["transfer_lanes"].get(tables["lanes"][rows["lane"][row]], "the same link")
        yield f"It starts no earlier as {named(lane[at - 1][2])} before it keeps {what} until then."
    elif "reduce" in named(row):
        yield "It starts as soon as what it sends has been computed."
    else:
        size = tables["costs"]["num_bytes"][rows["cost"][row]]
        yield (
            f"It starts where the schedule has it: earlier, the {show_bytes(size)} that it moves would be held for "
            "longer, which prefetch and in_flight bound."
        )


@dataclass(frozen=True)
class _Wait:
    """Computing that waits: in which program, from when to when, its row, and the row of what it waits for."""

    program: Mapping[str, Any]
    start_s: float
    end_s: float
    row: int
    started: int

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def _waits(document: Mapping[str, Any]) -> Iterator[_Wait]:
    """Each wait that holds computing up."""
    tables = document["tables"]
    rows = tables["rows"]
    for program in document["programs"]:
        events = program["events"]
        of_node = {rows["node"][row]: row for row in unrolled(program["passes"][-1]["order"])}
        for row, start, end in zip(events["row"], events["start_s"], events["end_s"], strict=True):
            if tables["operators"][rows["operator"][row]] == tables["wait"] and end > start:
                yield _Wait(program, start, end, row, of_node[rows["inputs"][row][0]])


def _options(plan: Plan) -> Iterator[str]:
    chosen = show_options(plan.options) or "the defaults"
    if not plan.rejected:
        yield f"{chosen}: given, the defaults, or the first that fit; nothing else was looked at."
        return
    why = "the fastest that fits" if plan.fits else "what takes least, as nothing fits"
    yield f"{chosen}: {why}."
    for other in plan.rejected:
        made = other.estimate
        took = f"{show_bytes(made.reserved_bytes)} and {show_s(made.step_s)}"
        yield f"{show_options(made.options)} would take {took}: {other.why}."


def _kernels(document: Mapping[str, Any]) -> Iterator[str]:
    """What was made a kernel of forward and backward, and what was not, most frequent first."""
    counts: Counter[tuple[str, bool, str]] = Counter()
    for program in document["programs"]:
        for each in program.get("kernels", ()):  # reports of before have none
            counts[each["name"], each["is_kernel"], each["why"]] += each["count"] * program["repeats"]
    for is_kernel, what in ((True, "one kernel"), (False, "ATen's calls as they are")):
        told = [(name, why, count) for (name, made, why), count in counts.most_common() if made is is_kernel]
        for name, why, count in told[:_NUM_TOLD]:
            yield f"{count:,} x {name} is {what}: {why}."
        if others := sum(count for *_, count in told[_NUM_TOLD:]):
            yield f"{others:,} others are {what}, too."


def _help(plan: Plan, document: Mapping[str, Any]) -> Iterator[str]:
    yield from map(str, plan.ways_out)
    if not plan.fits and not plan.ways_out:
        yield f"No way out was found: {NO_WAY_OUT}."
    stored = max(
        sum(held[-1] for on_tier in _away(program).values() for held in on_tier.values())
        for program in document["programs"]
    )
    if plan.fits and 0 < stored <= plan.budget_bytes - plan.chosen.reserved_bytes:
        yield f"All of the {show_bytes(stored)} on lower tiers would fit into memory: leave out offload."
    largest = [kind for kind, _ in Counter(plan.by_kind).most_common(_NUM_TOLD) if kind in document["would_free"]]
    for kind in largest:
        yield f"Fewer bytes of {kind}: {document['would_free'][kind]}."


def _away(program: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[int]]]:
    """By lower tier, bytes by kind that each rank has there over the time of a program."""
    memory = program["passes"][-1]["memory"]
    return {tier: memory.get(f"on_{tier}", {}) for tier in LOWER_TIERS}


def _more(plan: Plan, search: Search) -> Iterator[str]:
    """More memory, one more device or node, and twice as many, each with the options that are best with it."""
    chosen = plan.chosen
    fastest = search.within(math.inf, estimated=True)
    if fastest is not None and fastest.estimate.step_s < (1 - _SMALL) * chosen.step_s:
        made = fastest.estimate
        yield (
            f"With {show_bytes(made.reserved_bytes)} of memory for each rank: {show_options(made.options)} would take "
            f"{show_s(made.step_s)}, {1 - made.step_s / chosen.step_s:.1%} less."
        )
    elif plan.fits:
        yield "More memory would not make it faster."
    if search.hardware.device_type == "cpu":  # whose ranks share one machine
        return
    per_node = search.hardware.devices_per_node
    one_more, what = (
        (per_node, f"one more node of {per_node}") if search.world >= per_node > 1 else (1, "one more device")
    )
    yield from _ranks(plan, search, search.world + one_more, what)
    if one_more != search.world:
        yield from _ranks(plan, search, 2 * search.world, "twice as many")


def _ranks(plan: Plan, search: Search, world: int, what: str) -> Iterator[str]:
    """What it would take on another number of ranks."""
    try:
        Config.from_options(search.fixed).mesh(world)
    except OptionError:  # the user's own options ask for another number
        return
    found = search.beside(world=world).within(plan.budget_bytes, estimated=True)
    if found is not None:
        made = found.estimate
        rate = world / search.world * plan.chosen.step_s / made.step_s
        yield (
            f"With {world} ranks, {what}, each with the same batch: {show_options(made.options)} would take "
            f"{show_bytes(made.reserved_bytes)} and {show_s(made.step_s)}: x {rate:.2f} examples per second."
        )


__all__ = ["Explanation", "explain"]
