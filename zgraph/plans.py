"""A plan: options for a training step, what they are predicted to cost, and what else was considered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn

from zgraph import ops
from zgraph.batches import common_rows
from zgraph.config import Config
from zgraph.cost import Costs
from zgraph.errors import BudgetError, StateError, first_line, quoted
from zgraph.expected_error import NOTHING_MEASURED, ExpectedError, Spread, expected_error
from zgraph.footprint import Footprint, Holding, Kind, spilled_bytes, spilled_kind, state_on
from zgraph.hardware import LOWER_TIERS, Hardware
from zgraph.lower import Lowered
from zgraph.machines import ASSUMED, host_budget
from zgraph.predict import Prediction
from zgraph.program import Role
from zgraph.timeline import INWARD, OUTWARD, least_s

VERSION = 1

_NUM_TOLD = 5
"""Owners of the peak that a refusal names."""

MARGIN = 0.06
"""Part of a device's memory that a default budget leaves alone: for the context of the driver, for libraries and
communication buffers, none of which the allocator counts."""


@dataclass(frozen=True)
class Owner:
    """Tensors of one kind and origin that are held at the peak.

    Attributes:
        what: the input, or the operator that makes them.
        kind: what they are for (``zgraph.footprint.Kind``).
        num_bytes: of all of them together.
        count: how many there are.
        source: the user's line that makes them; None for state.
        module: the user's module that makes the first of them; empty for state.
    """

    what: str
    kind: str
    num_bytes: int
    count: int
    source: str | None
    module: str = ""

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        where = ", ".join(filter(None, (self.module and f"module {self.module}", quoted(self.source))))
        return f"{show_bytes(self.num_bytes)}: {times}{self.what} ({self.kind})" + (f", {where}" if where else "")


@dataclass(frozen=True)
class Estimate:
    """What one choice of options is predicted to take, on one rank.

    Attributes:
        options: those of ``zgraph.Config`` that were chosen.
        step_s: seconds of a step.
        exposed_s: of these, seconds in which computing waits for communication or a lower tier.
        peak_bytes: the most that tensors hold at once.
        reserved_bytes: what the allocator takes for them, which is what has to fit.
        host_bytes: what lies on the host beside a device, which has to fit there.
    """

    options: Mapping[str, Any]
    step_s: float
    exposed_s: float
    peak_bytes: int
    reserved_bytes: int
    host_bytes: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any], made: Prediction) -> Estimate:
        """What was predicted for these options."""
        away = made.away_bytes("host")
        return cls(options, made.step_s, made.exposed_s, made.peak_bytes, made.reserved_bytes, away)


@dataclass(frozen=True)
class Rejected:
    """An estimate that was not chosen, and why."""

    estimate: Estimate
    why: str


@dataclass(frozen=True)
class WayOut:
    """A change that would make a step fit.

    Attributes:
        change: in words.
        step_s: seconds of a step after it.
        reserved_bytes: of one rank after it.
        cost: device-seconds for one example, as a multiple of those of the plan that does not fit.
    """

    change: str
    step_s: float
    reserved_bytes: int
    cost: float

    def __str__(self) -> str:
        takes = f"takes {show_bytes(self.reserved_bytes)} and {show_s(self.step_s)}"
        return f"{self.change} ({takes}, an example costs x {self.cost:.2f})"


NO_WAY_OUT = "use a larger machine, a smaller model or a smaller batch"
"""What to do where no change of options makes a step fit."""


@dataclass(frozen=True)
class Plan:
    """The answer of ``zgraph.plan``.

    Attributes:
        model: its class or name, and how many parameters it has.
        num_params: elements of all parameters, tied ones once.
        num_examples: rows of the batch that one rank gets, the first dimension of its tensors.
        num_tokens: elements of the largest integer tensor of that batch; 0 if there is none.
        world_size: ranks.
        hardware: the machine's name.
        devices_per_node: how many of its devices share a node.
        budget_bytes: what one rank may take.
        chosen: the fastest choice that fits; if none does, the one that takes least memory.
        least_s: what a step of these options takes at least, in whatever order it issues its calls.
        flops: floating-point operations of one rank's matrix products and attention in a step, recomputation included.
        by_kind: bytes at the peak by what they are for.
        owners: what holds most at the peak, largest first.
        rejected: other choices, best first.
        ways_out: changes that make it fit, cheapest first; none if it fits.
        error: how far predictions of this class were off where they were measured.
        unknown: operators that were costed by their bytes alone, and how often a step calls them.
        notes: what else a reader should know.
        host_budget_bytes: what one rank may have on the host beside a device.
    """

    model: str
    num_params: int
    num_examples: int
    num_tokens: int
    world_size: int
    hardware: str
    devices_per_node: int
    budget_bytes: int
    chosen: Estimate
    least_s: float
    flops: int
    by_kind: Mapping[str, int]
    owners: tuple[Owner, ...]
    rejected: tuple[Rejected, ...]
    ways_out: tuple[WayOut, ...]
    error: ExpectedError
    unknown: Mapping[str, int]
    notes: tuple[str, ...] = ()
    host_budget_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether what the chosen options take is within the budget, and what they have on the host fits there."""
        return self.chosen.reserved_bytes <= self.budget_bytes and not self._too_much_on_host

    @property
    def _too_much_on_host(self) -> int:
        return max(self.chosen.host_bytes - self.host_budget_bytes, 0)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options for ``zgraph.compile``."""
        return dict(self.chosen.options)

    @property
    def config(self) -> Config:
        """The same, checked."""
        return Config.from_options(self.options)

    @property
    def gap(self) -> float:
        """How much of the step's time another order of the same calls could save at most."""
        return 1 - self.least_s / self.chosen.step_s

    @property
    def examples_per_s(self) -> float:
        """Rows of the batch that all ranks together train on in a second."""
        return self.num_examples * self.world_size / self.chosen.step_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens that one rank trains on in a second; 0 where the batch has none."""
        return self.num_tokens / self.chosen.step_s

    def to_json(self) -> str:
        """All of it as a JSON object; bytes and seconds are numbers."""
        return json.dumps({"version": VERSION, "fits": self.fits, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What ``to_json`` gave.

        Raises:
            StateError: the text is nothing that this version of it gives.
        """
        try:
            return cls._read(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StateError(f"this is not a plan: {first_line(error)}", fix="give what Plan.to_json gave") from error

    @classmethod
    def _read(cls, data: Any) -> Plan:
        if data.pop("version") != VERSION:
            raise ValueError("it is of another version")
        del data["fits"]
        spreads = {
            name: Spread(**data["error"][name])
            for name in ("live", "reserved", "time")
            if data["error"][name] is not None
        }
        rejected = (Rejected(Estimate(**each["estimate"]), each["why"]) for each in data["rejected"])
        return cls(**{
            **data,
            "chosen": Estimate(**data["chosen"]),
            "owners": tuple(Owner(**owner) for owner in data["owners"]),
            "rejected": tuple(rejected),
            "ways_out": tuple(WayOut(**way) for way in data["ways_out"]),
            "error": ExpectedError(data["error"]["measured_on"], **spreads),
            "notes": tuple(data["notes"]),
        })  # fmt: skip

    @property
    def verdict(self) -> str:
        """Whether it fits, in a sentence with its bytes."""
        taken, budget = self.chosen.reserved_bytes, self.budget_bytes
        told = (
            f"with {show_options(self.options) or 'the defaults'} it takes {show_bytes(taken)} of the "
            f"{show_bytes(budget)} that each of {self.world_size} x {self.hardware} may take"
        )
        if self._too_much_on_host:
            on_host = f"{show_bytes(self.chosen.host_bytes)} of the {show_bytes(self.host_budget_bytes)} of its host"
            return f"{told}, and {on_host}, {show_bytes(self._too_much_on_host)} too much"
        return (
            f"{told}, and leaves {show_bytes(budget - taken)}"
            if self.fits
            else (f"{told}, {show_bytes(taken - budget)} too much")
        )

    def refusal(self) -> BudgetError:
        """The error of a plan that does not fit: by how much, what is in the way, and what would help."""
        lines = [f"no options fit: {self.verdict}; at the peak:"]
        lines += [f"  {owner}" for owner in self.owners[:_NUM_TOLD]]
        if (beside := self.chosen.reserved_bytes - self.chosen.peak_bytes) > self.chosen.reserved_bytes / 10:
            lines.append(f"  {show_bytes(beside)} beside what is live: what compiling leaves, and the allocator takes")
        lines += self.notes
        return BudgetError("\n".join(lines), fix="; or ".join(map(str, self.ways_out)) or NO_WAY_OUT)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=110, force_terminal=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get().rstrip()

    def __rich__(self) -> Group:
        error = self.error
        if self.fits:
            verdict = f"fits, with {show_bytes(self.budget_bytes - self.chosen.reserved_bytes)} to spare"
        elif self._too_much_on_host:
            verdict = f"does not fit: {show_bytes(self._too_much_on_host)} too much on the host"
        else:
            verdict = f"does not fit: {show_bytes(self.chosen.reserved_bytes - self.budget_bytes)} too much"
        head = Table.grid(padding=(0, 2))
        head.add_row("model", f"{self.model}, {self.num_params:,} parameters")
        nodes = -(-self.world_size // self.devices_per_node)
        where = f" in {nodes} nodes of {self.devices_per_node}" if nodes > 1 else ""
        machine = f"{self.world_size} x {self.hardware}{where}, {show_bytes(self.budget_bytes)} for each rank"
        head.add_row("machine", machine)
        head.add_row("verdict", verdict)
        head.add_row("options", show_options(self.options) or "defaults")
        head.add_row("live peak", f"{show_bytes(self.chosen.peak_bytes)} ({error.words('live')})")
        head.add_row("taken for it", f"{show_bytes(self.chosen.reserved_bytes)} ({error.words('reserved')})")
        if self.chosen.host_bytes:
            there = f"{show_bytes(self.chosen.host_bytes)} of {show_bytes(self.host_budget_bytes)} for each rank"
            head.add_row("on the host", there)
        exposed = self.chosen.exposed_s / self.chosen.step_s
        waits = "links or a lower tier" if self.options.get("offload") else "links"
        head.add_row(
            "step", f"{show_s(self.chosen.step_s)}, {exposed:.0%} of it waiting for {waits} ({error.words('time')})"
        )
        head.add_row("in any order", f"at least {show_s(self.least_s)}, {self.gap:.1%} less")
        rate = f"{self.examples_per_s:,.4g} examples/s on all ranks"
        if self.num_tokens:
            rate += f", {self.tokens_per_s:,.4g} tokens/s on each"
        head.add_row("throughput", f"{rate}, {self.flops / self.chosen.step_s / 1e12:,.4g} TFLOP/s on each")
        parts: list[Any] = [head]
        kinds = Table("at the peak", "bytes", box=None, pad_edge=False)
        for kind, num_bytes in self.by_kind.items():
            kinds.add_row(kind, show_bytes(num_bytes))
        parts += [Text(), kinds]
        if not self.fits:
            owners = Table("in the way", "kind", "bytes", "from", box=None, pad_edge=False)
            for owner in self.owners:
                times = f"{owner.count} x " if owner.count > 1 else ""
                owners.add_row(times + owner.what, owner.kind, show_bytes(owner.num_bytes), owner.source or "")
            parts += [Text(), owners]
            ways = Table("ways out", "memory", "step", "cost of an example", box=None, pad_edge=False)
            for way in self.ways_out:
                ways.add_row(way.change, show_bytes(way.reserved_bytes), show_s(way.step_s), f"x {way.cost:.2f}")
            parts += [Text(), ways if self.ways_out else Text("no way out was found")]
        if self.rejected:
            others = Table("also considered", "memory", "step", "why not", box=None, pad_edge=False)
            for other in self.rejected:
                estimate = other.estimate
                others.add_row(
                    show_options(estimate.options),
                    show_bytes(estimate.reserved_bytes),
                    show_s(estimate.step_s),
                    other.why,
                )
            parts += [Text(), others]
        for name, count in self.unknown.items():
            parts.append(Text(f"{name} ({count} calls) is costed by its bytes alone"))
        parts += [Text(note) for note in self.notes]
        return Group(*parts)


def describe(
    model: nn.Module,
    lowered: Lowered,
    prediction: Prediction,
    options: Mapping[str, Any],
    hardware: Hardware,
    budget_bytes: int,
    *,
    rejected: tuple[Rejected, ...] = (),
    ways_out: tuple[WayOut, ...] = (),
    notes: tuple[str, ...] = (),
) -> Plan:
    """Everything that is known of one choice of options.

    Args:
        model: of which the step is.
        lowered: its programs.
        prediction: what they take.
        options: chosen.
        hardware: the machine.
        budget_bytes: what one rank may take.
        rejected, ways_out, notes: see ``Plan``.
    """
    num_calls = sum(prediction.repeats)
    batch = [node.meta["val"] for node in lowered.last.inputs(Role.BATCH).values()]
    tokens = [val.numel() for val in batch if val.dim() > 1 and _counts_tokens(val.dtype)]
    in_any_order = 0.0
    for program, times in zip(lowered.programs, prediction.repeats, strict=True):
        # In some order, all that is put together may be made where it belongs.
        cats = program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        costs = Costs(program, hardware, copied={cat: {} for cat in cats})
        in_any_order += times * least_s(program, hardware, cost_of=costs.of)
    return Plan(
        model=type(model).__name__,
        num_params=sum(p.numel() for p in model.parameters()),
        num_examples=num_calls * common_rows(batch),
        num_tokens=num_calls * max(tokens, default=0),
        world_size=lowered.last.mesh.size,
        hardware=hardware.name,
        devices_per_node=hardware.devices_per_node,
        budget_bytes=budget_bytes,
        chosen=Estimate.of(options, prediction),
        least_s=min(in_any_order, prediction.step_s),  # the same numbers, added up in another order
        flops=prediction.flops,
        by_kind={kind.value: num_bytes for kind, num_bytes in prediction.peak.peak_by_kind().most_common()},
        owners=owners_of([*prediction.peak.peak_holdings, *_unused(prediction.peak)]),
        rejected=rejected,
        ways_out=ways_out,
        error=expected_error(hardware.device_type, hardware.name) if _was_compared(hardware) else NOTHING_MEASURED,
        unknown=dict(prediction.unknown),
        notes=tuple(dict.fromkeys((*notes, *lowered.last.notes, *_tier_notes(lowered, prediction)))),
        host_budget_bytes=host_share(hardware, lowered.last.mesh.size),
    )


def _counts_tokens(dtype: torch.dtype) -> bool:
    """Whether elements of a batch may be tokens: not numbers that are measured, nor masks."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _tier_notes(lowered: Lowered, prediction: Prediction) -> Iterator[str]:
    """What lies on lower tiers, if anything does, and how much of it a step moves."""
    for tier, where in LOWER_TIERS.items():
        found = state_on(tier, lowered.last)
        spilled = max(spilled_bytes(program, tier) for program in lowered.programs)
        stored = sum(found.values()) + spilled
        if not stored:
            continue
        named = {Role.PARAM: "parameters", Role.OPT_STATE: "optimizer state", Role.GRADIENT: "sums of gradients"}
        state = [words for role, words in named.items() if any(what.role is role for what in found)]
        spills = (n for each in lowered.programs for n in each.graph.find_nodes(op="call_function", target=ops.spill))
        of_step = sorted({spilled_kind(node).value for node in spills if ops.tier_of(node) == tier})
        *first, last = [*state, *of_step]
        kinds = f"{', '.join(first)} and {last}" if first else last
        read, written = (show_bytes(prediction.moved_bytes[way[tier]]) for way in (INWARD, OUTWARD))
        yield f"{show_bytes(stored)} of each rank's {kinds} lie on {where}; a step reads {read} and writes {written}"


def _was_compared(hardware: Hardware) -> bool:
    """Whether predictions for such a machine were compared with measurements: not where its numbers are assumed."""
    return hardware.sources != ASSUMED


def default_budget(hardware: Hardware) -> int:
    """Bytes that one rank may take if nobody says: ``MARGIN`` less than the device has."""
    return int(hardware.memory_bytes * (1 - MARGIN))


def host_share(hardware: Hardware, world: int) -> int:
    """Bytes that one of so many ranks may have on the host beside its device: ``HOST_MARGIN`` less than its part."""
    return host_budget(hardware.host_memory_bytes) // min(world, hardware.devices_per_node)


def _unused(peak: Footprint) -> Iterator[Holding]:
    """What an arena has at the peak for calls at other times."""
    num_bytes, at = peak.peak_by_kind()[Kind.UNUSED], peak.peak_position
    if num_bytes:
        yield Holding("kept for other calls", Kind.UNUSED, num_bytes, at, at)


def owners_of(held: Sequence[Holding], num: int = 8) -> tuple[Owner, ...]:
    """What is held, alike tensors together, largest first."""
    alike: dict[tuple[str, str, str | None], list[Holding]] = {}
    for holding in held:
        alike.setdefault((holding.what, holding.kind.value, holding.source), []).append(holding)
    found = [
        Owner(what, kind, sum(each.num_bytes for each in of_them), len(of_them), source, of_them[0].module)
        for (what, kind, source), of_them in alike.items()
    ]
    return tuple(sorted(found, key=lambda owner: -owner.num_bytes)[:num])


def show_bytes(num_bytes: float) -> str:
    """In the largest binary unit of which there is at least one."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}" if num_bytes < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes:.0f} B"


def show_s(seconds: float) -> str:
    """In seconds, or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def show_options(options: Mapping[str, Any]) -> str:
    """As they are written in a call."""
    return ", ".join(f"{name}={text}" for name, text in written(options).items())


def written(options: Mapping[str, Any]) -> dict[str, str]:
    """The value of each as it is written in a call."""
    shown = {**options}
    for name in ("bucket_bytes", "tile_bytes"):
        if isinstance(shown.get(name), int):
            shown[name] = show_bytes(shown[name]).replace(" ", "")
    return {name: repr(value) for name, value in shown.items()}
