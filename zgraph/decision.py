"""What a budget decides: the plan of the fastest choice that fits it, or of what takes least, with the ways out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from zgraph.choices import ACCUMULATE, CHAINED, OFFLOAD, SEARCHED, offloads, searched
from zgraph.config import Config, keeps_gradients, uses_disk
from zgraph.errors import OptionError, ZgraphError
from zgraph.hardware import Hardware
from zgraph.machines import PRESETS, preset
from zgraph.plans import Plan, Rejected, WayOut, default_budget, describe, show_bytes
from zgraph.search import Search, Tried

AUTO = "auto"
KERNELS = "kernels"

_NUM_REJECTED = 5
_NUM_WAYS_OUT = 4
MOST_RANKS = 2**16


def fixed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not open, and ``offload`` if it was opened; checked, as ``Config`` has them.

    Raises:
        OptionError: one does not exist or is out of range, or is left open though it is not searched.
    """
    for name, value in options.items():
        if value == AUTO and name not in (*SEARCHED, "prefetch", KERNELS):  # the cost model decides those
            raise OptionError(f"{name}='auto' is not searched", fix="give a value, or leave it out")
    fixed = {name: value for name, value in options.items() if value != AUTO or name in (OFFLOAD, KERNELS)}
    config = config_of(fixed)
    return {name: getattr(config, name) for name in fixed}


def config_of(fixed: dict[str, Any]) -> Config:
    """Options that others are open beside, of which some may need more than one micro-batch."""
    try:
        return Config.from_options(fixed)
    except OptionError:
        if ACCUMULATE in fixed:
            raise
    return Config.from_options({**fixed, ACCUMULATE: 2})


def decide(search: Search, budget: int) -> Plan:
    """The plan of the choice that a budget takes; if none fits, of the one that takes least memory."""
    best, ways_out = search.within(budget), tuple[WayOut, ...]()
    if best is None:
        best = search.least()
        ordered = search.ordered(best)
        if ordered is not None and search.fits(ordered.estimate, budget):
            best = ordered
        else:
            ways_out = _WaysOut(search, best, budget).cheapest()
    lowered, prediction = search.in_full(best.choice)
    return describe(
        search.captures.model,
        lowered,
        prediction,
        best.choice.options,
        search.hardware,
        budget,
        rejected=tuple(
            Rejected(tried.estimate, _why(search, tried, best, budget)) for tried in _others(search, best, budget)
        ),
        ways_out=ways_out,
        notes=search.notes,
    )


def _others(search: Search, best: Tried, budget: int) -> list[Tried]:
    """The best other of each stage, mesh, number of micro-batches, recomputation and what lies on a lower tier.

    Those that fit come first.
    """
    tried = [tried for tried in search.tried.values() if tried is not None and tried.choice is not best.choice]
    found: dict[Any, Tried] = {}
    for each in sorted(tried, key=lambda tried: (tried.num_bytes > budget, tried.estimate.step_s, tried.num_bytes)):
        config = each.choice.config
        found.setdefault(
            (config.zero, config.shard_size, config.accumulate, config.recompute, repr(config.offload)), each
        )
    return list(found.values())[:_NUM_REJECTED]


def _why(search: Search, tried: Tried, best: Tried, budget: int) -> str:
    if excess := search.too_much_on_host(tried.estimate):
        return f"{show_bytes(excess)} too much on the host"
    if tried.estimate.reserved_bytes > budget:
        return f"{show_bytes(tried.estimate.reserved_bytes - budget)} too much"
    slower = tried.estimate.step_s / best.estimate.step_s - 1
    if slower > 5e-4:
        return f"{slower:.1%} slower"
    return "no faster" if tried.is_exact else "no faster that is certain: estimated from few of its blocks"


class _WaysOut:
    """Changes that make the choice which takes least memory fit."""

    def __init__(self, search: Search, least: Tried, budget: int) -> None:
        self._search, self._least, self._budget = search, least, budget

    def cheapest(self) -> tuple[WayOut, ...]:
        """Those that cost least, cheapest first.

        Where no single change helps within the budget, the budget may be all memory that there is, beside one.
        """
        found, most = self._found(), default_budget(self._search.hardware)
        if not found and self._budget < most:
            with_all = _WaysOut(self._search, self._least, most)._found()
            found = [replace(way, change=f"{way.change}, {_memory(way.reserved_bytes)}") for way in with_all]
        return tuple(sorted(found, key=lambda way: way.cost)[:_NUM_WAYS_OUT])

    def _found(self) -> list[WayOut]:
        estimate = self._least.estimate
        found: list[WayOut] = []
        if self._search.fits(estimate, most := default_budget(self._search.hardware)):
            words = f"{_memory(estimate.reserved_bytes)}, of {show_bytes(most)} that there is"
            found.append(WayOut(words, estimate.step_s, estimate.reserved_bytes, 1.0))
        kinds = (self._micro_batches, self._offloads, self._precisions, self._ranks, self._machines, self._batches)
        for ways in kinds:
            found += ways()
        return found

    def _way(self, change: str, tried: Tried | None, rows: float = 1.0) -> Iterator[WayOut]:
        """Nothing if it does not fit; every rank has ``rows`` of its batch."""
        if tried is not None:
            made = tried.estimate
            cost = made.step_s / self._least.estimate.step_s / rows
            yield WayOut(change, made.step_s, made.reserved_bytes, cost)

    def _fixed(self, *opened: str) -> dict[str, Any]:
        """The options of the choice, but for some that the user left open."""
        config = self._least.choice.config
        chosen = {name: value for name, value in searched(config).items() if name not in opened}
        return {**chosen, **self._search.fixed}

    def _micro_batches(self) -> Iterator[WayOut]:
        """As few as fit, if a step was to have one; not looked for where state alone is too much."""
        if self._search.fixed.get(ACCUMULATE) != 1 or self._search.captures.num_rows == 1:
            return
        if self._search.state_bytes(self._least.choice) > self._budget:
            return
        fixed = {name: value for name, value in self._fixed(*CHAINED).items() if name != ACCUMULATE}
        if (fits := self._search.beside(fixed=fixed).within(self._budget, estimated=True)) is not None:
            yield from self._way(f"{ACCUMULATE}={fits.choice.config.accumulate}, for means over rows", fits)

    def _offloads(self) -> Iterator[WayOut]:
        """The least that goes to a lower tier, if the user has not said what does."""
        if OFFLOAD in self._search.fixed:
            return
        fixed, is_short = self._fixed(*CHAINED), False
        has_gradients = keeps_gradients(replace(self._least.choice.config, accumulate=fixed[ACCUMULATE]))
        ways = [what for what in offloads(self._search.tier)[1:] if has_gradients or "gradients" not in what]

        @cache
        def search_of(index: int) -> Search:
            return self._search.beside(fixed={**fixed, OFFLOAD: ways[index]})

        has_room = self._search.tier == "disk"  # for all
        if has_room and search_of(len(ways) - 1).within(self._budget, estimated=True) is None:
            return
        for index, what in enumerate(ways):
            if self._search.tier == "host" and uses_disk(what) and not is_short:
                continue  # the host has room for all that could go to a disk
            search = search_of(index)
            if (fits := search.within(self._budget, estimated=True)) is not None:
                yield from self._way(f"{OFFLOAD}={what!r}", fits)
                return
            is_short |= any(search.too_much_on_host(tried.estimate) for tried in search.tried.values() if tried)

    def _precisions(self) -> Iterator[WayOut]:
        config = self._least.choice.config
        lower = {"precision": "bf16", "state_precision": "int8"}
        lower = {name: value for name, value in lower.items() if getattr(config, name) is None}
        for options in [*({name: value} for name, value in lower.items()), *([lower] if len(lower) > 1 else [])]:
            words = ", ".join(f"{name}={value!r}" for name, value in options.items())
            search = self._search.beside(fixed={**self._fixed(*CHAINED), **options})
            yield from self._way(words, search.within(self._budget, estimated=True))

    def _ranks(self) -> Iterator[WayOut]:
        """Twice as many until the step fits; what each rank gets stays."""
        if self._search.hardware.device_type == "cpu":
            return
        for doublings in range(1, 7):
            world = self._search.world << doublings
            if world > MOST_RANKS:
                return
            options: dict[str, Any] = {} if "zero" in self._search.fixed else {"zero": 3}
            words = ", ".join([f"world_size={world}", *(f"{name}={value}" for name, value in options.items())])
            search = self._search.beside(world=world, fixed={**self._fixed(ACCUMULATE, *CHAINED), **options})
            if (fits := search.within(self._budget, estimated=True)) is not None:
                yield from self._way(words, fits)
                return

    def _machines(self) -> Iterator[WayOut]:
        """The smallest device that has enough memory, if all of this one's was used."""
        if self._budget < default_budget(self._search.hardware):
            return
        for machine in _larger(self._search.hardware):
            search = self._search.beside(hardware=machine, fixed=self._fixed(ACCUMULATE, *CHAINED))
            if (fits := search.within(default_budget(machine), estimated=True)) is not None:
                yield from self._way(f"hardware={machine.name!r}", fits)
                return

    def _batches(self) -> Iterator[WayOut]:
        """Half of the batch, until it fits; only a single row where micro-batches of one are too large."""
        rows = self._search.captures.num_rows
        halves = [rows >> halved for halved in range(1, rows.bit_length()) if rows % (1 << halved) == 0]
        if ACCUMULATE not in self._search.fixed:
            halves = [1] if rows > 1 else []
        for fewer in halves:
            options = {} if ACCUMULATE in self._search.fixed else {ACCUMULATE: 1}
            try:
                captures = self._search.captures.with_rows(fewer)
                search = self._search.beside(captures=captures, fixed={**self._fixed(*CHAINED), **options})
                fits = search.within(self._budget, estimated=True)
            except ZgraphError:
                return  # fewer rows do not divide into the micro-batches that were asked for, or are no batch
            if fits is not None:
                yield from self._way(f"{fewer} of {rows} rows in a batch", fits, fewer / rows)
                return


def _memory(num_bytes: int) -> str:
    """The option that gives a rank so many bytes."""
    return f"memory='{math.ceil(num_bytes / 2**20)}MiB'"


def _larger(hardware: Hardware) -> list[Hardware]:
    """Presets whose devices have more memory, those with least of it first."""
    if hardware.device_type == "cpu":
        return []
    found = [machine for machine in map(preset, PRESETS) if machine.memory_bytes > hardware.memory_bytes]
    return sorted(found, key=lambda machine: machine.memory_bytes)
