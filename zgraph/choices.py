"""The options that are searched, and their values: one table, and the family of choices that it spans.

The family does not depend on a budget, which only says what of it fits. So more memory never means a slower plan, and
less never a higher peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zgraph.config import BY_COST, WAITED_FOR, Config, may_load_ahead, may_update_on_host, uses_disk
from zgraph.errors import OptionError

ACCUMULATE = "accumulate"
"""Searched among the numbers that divide the batch."""

CHAINED: dict[str, tuple[Any, ...]] = {"recompute": (None, "operators", "blocks")}
"""Options of which each value computes all that the one before computes, and is never faster. So is a larger number of
micro-batches."""

OFFLOAD = "offload"
"""Searched, where that is asked for, in ``offloads``."""


def offloads(tier: str) -> tuple[Any, ...]:
    """What may lie on a lower tier, by options.

    Activations as far as nothing waits for them, and state, which is needed once in a step, before parameters, which
    are needed twice or more; then activations for which computing waits; last of all gradients, where there are
    micro-batches, in each of which their sums are needed and written, or where they wait for their norm. Where that is
    the host's memory, and it has no room for all, a disk behind it has optimizer state, then parameters, too.
    """
    state = {"optimizer": tier}
    all_state = {**state, "parameters": tier}
    hidden, waited_for = {"activations": tier}, {"activations": WAITED_FOR[tier]}
    found: tuple[dict[str, str] | None, ...] = (
        None,
        hidden,
        state,
        {**state, **hidden},
        all_state,
        {**all_state, **hidden},
        {**all_state, **waited_for},
        {**all_state, "gradients": tier, **waited_for},
    )
    if tier == "disk":
        return found
    further = [{**(found[i] or {}), "optimizer": "disk"} for i in _WITH_STATE]
    return (*found, *further, *({**each, "parameters": "disk"} for each in further if "parameters" in each))


_WITH_STATE = (2, 3, 4, 5, 6, 7)
"""Of ``offloads``, those by which optimizer state lies elsewhere."""

_LESS = (None, 0, 0, 2, 2, 4, 5, 6, *_WITH_STATE, 10, 11, 12, 13)
"""For each of ``offloads`` the one, by index, of which all lies there or nearer, too, and which is never slower."""

LEVELS = (None, 0.25, 0.5, 0.75, 1.0)
"""Of recomputation, instead, where a model is not long: to weigh single activations takes seconds for each choice."""

CROSSED: dict[str, tuple[Any, ...]] = {"zero": (0, 1, 2, 3), "shard_size": (None,)}
"""Options of which each value is tried with all of the others. Where ranks fill several nodes, a node's is one."""


@dataclass(frozen=True)
class Variation:
    """An option of which each value is tried with the defaults of the other variations.

    Attributes:
        values: besides the default.
        matters: whether it changes anything beside other options.
        instead: options of a member that is never slower, where there is none with one of the chained options a step
            back.
    """

    values: tuple[Any, ...]
    matters: Callable[[Config], bool] = field(default=lambda _: True)
    instead: Mapping[str, Any] = field(default_factory=dict)


def _gathers(config: Config) -> bool:
    return config.zero == 3


TILE_BYTES = 8 * 2**20
"""Of large matrices, how much is gathered at a time at least where that is tried: enough that products of matrices take
long beside what starts them."""


VARIED: dict[str, Variation] = {
    "bucket_bytes": Variation((*(mebi * 2**20 for mebi in (4, 64, 256)), BY_COST)),
    "in_flight": Variation((0, None), lambda config: _gathers(config) and config.prefetch is None),
    "unshard": Variation((0.5, 1.0), lambda config: _gathers(config) and not config.keep_gathered),
    "tile_bytes": Variation((TILE_BYTES,), _gathers),
    "keep_gathered": Variation((True,), lambda config: _gathers(config) and config.accumulate > 1, {"zero": 2}),
    "load_ahead": Variation((True,), may_load_ahead),
    "host_updates": Variation((True,), may_update_on_host),
}
ON_ANY_RANK = ("host_updates", "load_ahead")
"""Those that matter on a single rank, too."""

STORED = ("zero", "shard_size", "bucket_bytes", OFFLOAD)
"""Options that say how state lies in memory, or where else."""

MEMORY_FIRST = "memory_first"
"""Taken where nothing fits otherwise, with what takes least."""

SEARCHED = (ACCUMULATE, *CHAINED, OFFLOAD, *CROSSED, *VARIED, MEMORY_FIRST)


def searched(config: Config) -> dict[str, Any]:
    """What a configuration has for options that may be searched, but for one that has no meaning beside another."""
    ahead = ["in_flight"] if config.prefetch is not None else []
    return {name: getattr(config, name) for name in SEARCHED if name not in ahead}


@dataclass(eq=False)
class Choice:
    """One member of the family.

    Attributes:
        options: those that the user fixed, and those that differ from their defaults; the stage in any case.
        config: the same, checked.
        milder: members with one of the chained options a step back.
        depth: how many such steps there are.
    """

    options: dict[str, Any]
    config: Config
    milder: list[Choice]
    depth: int


def family(
    num_rows: int,
    world: int,
    fixed: Mapping[str, Any],
    devices_per_node: int = 1,
    *,
    is_long: bool = True,
    tile_bytes: int | None = TILE_BYTES,
    tier: str = "disk",
    bucket_bytes: int | None = None,
) -> list[Choice]:
    """All choices, milder ones first.

    Args:
        num_rows: what micro-batches divide.
        world: how many ranks.
        fixed: options that the user gave; of them, ``offload`` is open if it is ``"auto"``.
        devices_per_node: of the machine.
        is_long: the model repeats more blocks than are captured.
        tile_bytes: of large matrices, how much is gathered at a time where that is tried; None if it is not.
        tier: where the machine has what is offloaded.
        bucket_bytes: the size of buckets that others are tried beside; None for the default.

    Raises:
        OptionError: one of them cannot be.
    """
    chains: dict[str, Sequence[Any]] = {ACCUMULATE: divisors(num_rows), **CHAINED}
    if not is_long:
        chains["recompute"] = LEVELS
    if fixed.get(OFFLOAD) == BY_COST:
        chains[OFFLOAD] = offloads(tier)
    crossed = {**chains, **(CROSSED if world > 1 else {"zero": (0,), "shard_size": (None,)})}
    if 1 < devices_per_node < world and world % devices_per_node == 0:
        crossed["shard_size"] = (None, devices_per_node)
    if bucket_bytes is not None:
        crossed["bucket_bytes"] = (bucket_bytes,)
    crossed = {
        name: (fixed[name],) if name in fixed and name != OFFLOAD else values for name, values in crossed.items()
    }
    variations = [
        varied for varied in _variations(fixed, tile_bytes) if world > 1 or all(name in ON_ANY_RANK for name in varied)
    ]
    found: dict[Any, Choice] = {}
    refused: OptionError | None = None  # of what the user asked for, and defaults
    for options in _product(crossed):
        for varied in variations:
            both = {**options, **varied}
            given = {name: value for name, value in fixed.items() if name not in both}
            if fixed.get(OFFLOAD) == BY_COST and not uses_disk({**given, **both}.get(OFFLOAD)):
                given.pop("offload_path", None)
            for name in ON_ANY_RANK if fixed.get(OFFLOAD) == BY_COST else ():
                if name in given and not VARIED[name].matters(_of_offload(given, both)):
                    del given[name]
            try:
                config = Config.from_options({**given, **both})
            except OptionError as error:
                usual = {"bucket_bytes": bucket_bytes, **fixed}
                if all(both[name] == usual.get(name, getattr(Config, name)) for name in both):
                    refused = refused or error
                continue
            if any(not VARIED[name].matters(config) for name in varied) or _copies_in_vain(config, fixed):
                continue
            before = {name: _before(name, crossed[name], options[name]) for name in chains}
            milder = []
            for name in (name for name, values in before.items() if values):
                back = {name: before[name][-1]}
                instead = [{**options, **VARIED[each].instead, **back} for each in varied if VARIED[each].instead]
                known = [found[key] for key in map(_key, ({**both, **back}, *instead)) if key in found]
                milder += known[:1]
            told = {name: value for name, value in both.items() if name == "zero" or value != getattr(Config, name)}
            told |= {name: both[name] for name in fixed if name in crossed and name != OFFLOAD}
            found[_key(both)] = Choice({**told, **given}, config, milder, sum(map(len, before.values())))
    if not found and world == 1 and "zero" not in fixed:  # what was asked for needs a stage, which changes nothing here
        stage = {**fixed, "zero": Config.zero}
        return family(num_rows, 1, stage, devices_per_node, is_long=is_long, tile_bytes=tile_bytes, tier=tier)
    if not found and refused is not None:
        raise refused
    assert found, "what cannot be asked for is refused"
    return list(found.values())


def _of_offload(*options: Mapping[str, Any]) -> Config:
    """A configuration that says where things lie, unchecked."""
    return Config(offload={key: value for each in options for key, value in each.items()}.get(OFFLOAD))


def _before(name: str, values: Sequence[Any], value: Any) -> Sequence[Any]:
    """The values of a chained option that are milder than one, each than the next."""
    if name != OFFLOAD or len(values) == 1:
        return values[: values.index(value)]
    found, index = list[Any](), _LESS[values.index(value)]
    while index is not None:
        found.append(values[index])
        index = _LESS[index]
    return found[::-1]


def _copies_in_vain(config: Config, fixed: Mapping[str, Any]) -> bool:
    """Whether nodes would have copies though gradients are not divided: that saves only some of a gather's way."""
    return config.zero < 2 and config.shard_size is not None and "shard_size" not in fixed


def _product(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for name, each in values.items():
        found = [{**before, name: value} for before in found for value in each]
    return found


LEAN: dict[str, Any] = {"bucket_bytes": 4 * 2**20, "in_flight": 0, "tile_bytes": TILE_BYTES}
"""Variations that together take less memory than each: of few bytes at a time, none before it is needed."""


def _variations(fixed: Mapping[str, Any], tile_bytes: int | None) -> list[dict[str, Any]]:
    """None, one of each value, and all that save memory together."""
    values = {name: variation.values for name, variation in VARIED.items() if name not in fixed}
    if "tile_bytes" in values:
        values["tile_bytes"] = () if tile_bytes is None else (tile_bytes,)
    lean = {name: value for name, value in LEAN.items() if values.get(name)}
    if "tile_bytes" in lean:
        lean["tile_bytes"] = tile_bytes
    return [
        {},
        *({name: value} for name, each in values.items() for value in each),
        *([lean] if len(lean) > 1 else []),
    ]


def _key(options: Mapping[str, Any]) -> Any:
    return tuple(sorted((name, repr(value)) for name, value in options.items()))


def divisors(number: int) -> tuple[int, ...]:
    """Numbers that divide ``number``, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return tuple(dict.fromkeys([*small, *(number // n for n in reversed(small))]))
