"""The fastest choice of options that fits a budget, out of a family that does not depend on it.

Choices have one fixed order: fast first, then the milder one, then the one that takes less memory. A budget takes the
first that fits. So more memory never gives a slower choice, and less never one that takes more.

Few of them are looked at. What is never faster than another is not, while that other may be taken: a step with more
micro-batches or more recomputation is taken to be no faster than the same step with less. Nor is what cannot fit: its
state, and the activations that are held where forward ends, are too much already, or a choice that takes no more does
(``Search._leaner``). If several did not fit, the one that takes least of all is looked for: if that does not, none
does. And what makes the same program is not told apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, takewhile
from typing import Any

from zgraph.beginnings import Beginnings
from zgraph.captures import Captures
from zgraph.choices import ACCUMULATE, CHAINED, LEVELS, MEMORY_FIRST, Choice, family
from zgraph.config import BUCKET_BYTES, Config
from zgraph.errors import CaptureError, OptionError
from zgraph.hardware import Hardware, lower_tier
from zgraph.layout import aligned
from zgraph.liveness import lifetimes
from zgraph.lower import Lowered, lower
from zgraph.passes import Levels, default_passes, shares_parameters
from zgraph.pipeline import Pass, Watch
from zgraph.plans import Estimate, host_share
from zgraph.predict import Prediction, compiled_bytes, predict
from zgraph.program import Mesh, Phase, Program, Role, Stage, phase_of


@dataclass(frozen=True)
class Tried:
    """A choice and what it is predicted to take.

    Attributes:
        choice: of the family.
        estimate: of the whole model, extended from few blocks where it repeats some.
        is_exact: whether it is of the whole model's program instead.
        on_cpu: whether it is of a CPU, where reserved bytes are live ones and some for each node.
    """

    choice: Choice
    estimate: Estimate
    is_exact: bool
    on_cpu: bool

    @property
    def num_bytes(self) -> int:
        """What has to fit; of an estimate for a GPU, what is live: its allocator's bytes do not grow in a line."""
        return self.estimate.reserved_bytes if self.is_exact or self.on_cpu else self.estimate.peak_bytes


_PATIENCE = 8
"""How many choices may turn out not to fit before it is asked whether any does, which looks at some tens of them."""

_NEAR = 0.1
"""Where the most recomputation takes up to so much more than the least found, less of it may take less."""

_ADDS: tuple[tuple[str, Any], ...] = (
    ("unshard", 0.5), ("unshard", 1.0), ("keep_gathered", True), ("load_ahead", True), ("in_flight", None)
)  # fmt: skip
"""Options that hold more than their defaults."""

_OF_STATE = (
    "bucket_bytes", "host_updates", "in_flight", "keep_gathered", "load_ahead", MEMORY_FIRST, "shard_size",
    "tile_bytes", "unshard",
)  # fmt: skip
"""Options that change nothing of what a rank holds that has everything."""


class Search:
    """Estimates of a family's members, each made once, when it is asked for.

    Args:
        captures: of the step.
        hardware: the machine, as each rank finds it.
        world: how many ranks.
        fixed: options that are not searched.
        passes: of the user's own.
        tell: is given the search whenever it works something out, which takes a while.

    Attributes:
        members: the family.
        tried: what was estimated so far.
        tier: where the machine has what is offloaded.
    """

    def __init__(
        self,
        captures: Captures,
        hardware: Hardware,
        world: int,
        fixed: dict[str, Any],
        passes: Sequence[Pass] = (),
        tell: Callable[[Search], None] = lambda _: None,
    ) -> None:
        self._notes: list[str] = []
        self._refused: OptionError | CaptureError | None = None  # why the first of those was, that are left out
        self.tier = lower_tier(hardware)
        self.captures, self.hardware, self.world, self.fixed, self._passes = captures, hardware, world, fixed, passes
        self._tell = tell
        self._on_cpu = hardware.device_type == "cpu"
        self._host_budget = host_share(hardware, world)
        self.members = family(
            captures.num_rows,
            world,
            fixed,
            hardware.devices_per_node,
            is_long=captures.is_long,
            tile_bytes=captures.tile_bytes,
            tier=self.tier,
            # On GPUs the cost model is the default; but what it says for each number of blocks cannot be extrapolated.
            bucket_bytes=BUCKET_BYTES if world > 1 and not self._on_cpu else None,
        )
        self.tried: dict[Choice, Tried | None] = {}
        self._more_milder: dict[Choice, list[Choice]] = {choice: [] for choice in self.members}
        for choice in self.members:
            for milder in choice.milder:
                self._more_milder[milder].append(choice)
        self._by_config = {choice.config: choice for choice in self.members}
        self._first_of: dict[tuple[int, Any], Choice] = {}  # by number of micro-batches and recomputation
        for choice in self.members:
            self._first_of.setdefault((choice.config.accumulate, choice.config.recompute), choice)
        self._most_micro_batches = max(choice.config.accumulate for choice in self.members)
        self._least: Tried | None = None
        self._held: dict[Any, tuple[_Held, ...]] = {}
        self._estimates: dict[Config, Estimate] = {}
        self._levels: Levels = {}
        self._beginnings = Beginnings()
        self._last: tuple[Choice, tuple[Lowered, Prediction]] | None = None
        captures.check_blocks(self.members[0].config)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the plan should know."""
        return (*self.captures.notes, *self._notes)

    def beside(
        self,
        *,
        captures: Captures | None = None,
        hardware: Hardware | None = None,
        world: int | None = None,
        fixed: dict[str, Any] | None = None,
    ) -> Search:
        """A search in which something else is given."""
        search = Search(
            captures or self.captures,
            hardware or self.hardware,
            world or self.world,
            self.fixed if fixed is None else fixed,
            self._passes,
            self._tell,
        )
        if captures is None:
            # Which depend on neither machine nor ranks, and grow.
            search._held, search._beginnings = self._held, self._beginnings
        return search

    # -- choosing ---------------------------------------------------------------------------------------------

    def within(self, budget: float, *, estimated: bool = False) -> Tried | None:
        """The first choice that fits; None if none does.

        Args:
            budget: bytes that a rank may take.
            estimated: take it on its estimate, without working it out in full; whether any fits is asked first.
        """
        tie = count()
        waiting = {choice: len(choice.milder) for choice in self.members}
        known = dict.fromkeys(self.members, 0.0)  # seconds that it takes at least
        queue: list[tuple[float, int, int, int, Choice, Tried | None]] = []

        def put(seconds: float, num_bytes: int, choice: Choice, tried: Tried | None) -> None:
            heapq.heappush(queue, (seconds, choice.depth, num_bytes, next(tie), choice, tried))

        for choice in self.members:
            if not choice.milder:
                put(0.0, 0, choice, None)
        enough, some_fits = len(self.tried) + (0 if estimated else _PATIENCE), False
        while queue:
            if not some_fits and len(self.tried) >= enough:
                if not self._seems_to_fit(self._least_of_all(), budget):
                    return None
                some_fits = True
            seconds, *_, choice, tried = heapq.heappop(queue)
            if tried is not None:
                last = tried if estimated else self.exact(choice)
                if self.fits(last.estimate, budget):
                    return last
                continue
            if self._may_fit(choice, budget) and (tried := self.estimated(choice)) is not None:
                seconds = max(seconds, tried.estimate.step_s)
                if self._seems_to_fit(tried, budget):
                    some_fits = True
                    put(tried.estimate.step_s, tried.estimate.peak_bytes, choice, tried)
            for later in self._more_milder[choice]:
                known[later] = max(known[later], seconds)
                waiting[later] -= 1
                if not waiting[later]:
                    put(known[later], 0, later, None)
        return None

    def _seems_to_fit(self, tried: Tried | None, budget: float) -> bool:
        return tried is not None and tried.num_bytes <= budget and not self.too_much_on_host(tried.estimate)

    def fits(self, estimate: Estimate, budget: float) -> bool:
        """Whether what an estimate takes is within a budget, and the rank's share of its host's memory."""
        return estimate.reserved_bytes <= budget and not self.too_much_on_host(estimate)

    def too_much_on_host(self, estimate: Estimate) -> int:
        """Bytes by which an estimate has more on the host than the rank's share of it."""
        return max(estimate.host_bytes - self._host_budget, 0)

    def least(self) -> Tried:
        """The choice that takes least memory, worked out in full; of those that fit on the host, if any does.

        Raises:
            OptionError, CaptureError: the model can do none.
        """
        least = self._least_of_all()
        if least is None:
            assert self._refused is not None
            raise self._refused
        return self.exact(least.choice)

    def _least_of_all(self) -> Tried | None:
        """By estimates: of those with the most recomputation that nothing leaner stands beside, and of what is near.

        Less recomputation mostly holds no less, but may have the allocator take a little less, or have fewer nodes.
        None if the model can do none.
        """
        if self._least is None:
            best: Tried | None = None
            looked_at = []
            ends = [choice for choice in self.members if choice.config.recompute == self._most_recomputation]
            for choice in sorted(ends, key=lambda choice: (self.least_bytes(choice), -choice.depth)):
                if best is not None and (0, self.least_bytes(choice)) > self._size(best)[:2]:
                    break
                if any(self._can(o.config.accumulate, o.config.recompute) for o in self._leaner(choice)):
                    continue
                tried = self.estimated(choice)
                if tried is not None:
                    looked_at.append(tried)
                    best = min(best or tried, tried, key=self._size)
            if best is None:
                return None
            most = self._size(best)[1]
            if not isinstance(self._most_recomputation, float):  # of numbers, none holds less than the last
                most = int(most * (1 + _NEAR))
            near = {replace(t.choice.config, recompute=None) for t in looked_at if self._size(t)[:2] <= (0, most)}
            near.add(replace(best.choice.config, recompute=None))
            others = (
                self.estimated(choice)
                for choice in self.members
                if replace(choice.config, recompute=None) in near and self.least_bytes(choice) <= most
            )
            self._least = min([best, *(other for other in others if other is not None)], key=self._size)
        return self._least

    @cached_property
    def _most_recomputation(self) -> Any:
        """The last of the levels that the model can do."""
        levels = dict.fromkeys(choice.config.recompute for choice in self.members)
        possible = (level for level in reversed(levels) if any(self._can(a, level) for a, _ in self._first_of))
        return next(possible, None)

    def _can(self, accumulate: int, recompute: Any) -> bool:
        """Whether the model can be divided into so many micro-batches, and has such activations."""
        first = self._first_of.get((accumulate, recompute))
        return first is not None and self.estimated(first) is not None

    def _size(self, tried: Tried) -> tuple[int, int, float, int]:
        """What is less: bytes, those that the host lacks before all, then seconds, then what is asked for on top."""
        estimate = tried.estimate
        # On a GPU, of a longer model, some have been worked out in full, some not.
        is_live = not self._on_cpu and len(self.captures.sizes) > 1
        num_bytes = estimate.peak_bytes if is_live else estimate.reserved_bytes
        return self.too_much_on_host(estimate), num_bytes, estimate.step_s, tried.choice.depth

    def ordered(self, tried: Tried) -> Tried | None:
        """The same choice in the order of computing that takes least memory; None if the user has said which order."""
        choice = tried.choice
        if MEMORY_FIRST in self.fixed:
            return None
        options, config = {**choice.options, MEMORY_FIRST: True}, replace(choice.config, memory_first=True)
        return self.exact(Choice(options, config, [], choice.depth))

    def frontier(self) -> Iterator[Tried]:
        """From the fastest choice on, each with which less memory is taken and none is faster: what budgets choose."""
        budget = float("inf")
        while (tried := self.within(budget)) is not None:
            yield tried
            budget = tried.num_bytes - 1

    # -- estimating -------------------------------------------------------------------------------------------

    def estimated(self, choice: Choice) -> Tried | None:
        """What is known of a choice; None if the model has nothing to recompute so, or fails on so few rows."""
        if choice not in self.tried:
            try:
                is_exact = len(self.captures.sizes) == 1
                self.tried[choice] = Tried(choice, self._estimate(choice), is_exact, self._on_cpu)
            except (OptionError, CaptureError) as error:
                self._skip(choice, error)
        return self.tried[choice]

    def exact(self, choice: Choice) -> Tried:
        """What the whole model's program gives."""
        tried = self.estimated(choice)
        if tried is None or not tried.is_exact:
            made = self.in_full(choice)[1]
            tried = self.tried[choice] = Tried(
                choice, Estimate.of(choice.options, made), is_exact=True, on_cpu=self._on_cpu
            )
        return tried

    def in_full(self, choice: Choice) -> tuple[Lowered, Prediction]:
        """The whole model's programs; those of the last choice are kept, as they are mostly those that are taken."""
        if self._last is None or self._last[0] is not choice:
            self._last = None  # its programs may be large
            self._last = choice, self._predict(choice.config, self.captures.num_blocks)
        return self._last[1]

    def watched(self, config: Config, watch: Watch) -> Lowered:
        """The whole model's programs, made once more and proved while somebody looks on."""
        captured, mesh = self.captures.captured(config, self.captures.num_blocks), config.mesh(self.world)
        return lower(captured, config, mesh, None, self._passes, hardware=self.hardware, watch=watch)

    def _estimate(self, choice: Choice) -> Estimate:
        """Of the whole model; where it repeats blocks, from two numbers of them in a line."""
        alike = self._alike(choice.config)
        if alike not in self._estimates:
            self._estimates[alike] = self._estimate_anew(choice)
        return replace(self._estimates[alike], options=choice.options)

    def _estimate_anew(self, choice: Choice) -> Estimate:
        made = [self._predict(choice.config, size)[1] for size in self.captures.sizes]
        if len(made) == 1:
            return Estimate.of(choice.options, made[0])
        live = round(self._extended([each.peak_bytes for each in made]))
        return Estimate(
            choice.options,
            self._extended([each.step_s for each in made]),
            self._extended([each.exposed_s for each in made]),
            live,
            self._reserved(live, made),
            round(self._extended([each.away_bytes("host") for each in made])),
        )

    def _reserved(self, live: int, made: Sequence[Prediction]) -> int:
        """Of the whole model: on a CPU what is live and what compiling its graph leaves, elsewhere in proportion."""
        if self._on_cpu:
            return live + compiled_bytes(round(self._extended([each.num_nodes for each in made])))
        return round(live * made[-1].reserved_bytes / made[-1].peak_bytes)

    def _extended(self, found: Sequence[float]) -> float:
        """To the whole model, from what its few sizes give."""
        if len(found) == 1:
            return found[0]
        (few, more), sizes = found, self.captures.sizes
        return few + (self.captures.num_blocks - sizes[0]) / (sizes[1] - sizes[0]) * (more - few)

    def _predict(self, config: Config, num_blocks: int) -> tuple[Lowered, Prediction]:
        self._tell(self)
        captured = self.captures.captured(config, num_blocks)
        mesh = config.mesh(self.world)
        lowered = lower(
            captured,
            config,
            mesh,
            None,
            self._passes,
            hardware=self.hardware,
            levels=self._levels,
            prove=False,
            beginnings=self._beginnings,
        )
        return lowered, predict(lowered, self.hardware, config.accumulate)

    def _skip(self, choice: Choice, error: OptionError | CaptureError) -> None:
        """Leave out what the model cannot do, unless the user asked for it."""
        names = CHAINED if isinstance(error, OptionError) else (ACCUMULATE,)
        config = choice.config
        asked = [n for n in names if getattr(config, n) not in (getattr(Config, n), self.fixed.get(n))]
        if not asked:
            raise error
        self.tried[choice], self._refused = None, self._refused or error
        note = f"{asked[0]}={getattr(config, asked[0])!r} was not considered: {error.what}"
        if note not in self._notes:
            self._notes.append(note)

    def _alike(self, config: Config) -> Config:
        """The one that stands for all that make the same program.

        Those whose buckets hold all parameters; on a CPU, which hides nothing, those with any number of buckets in
        flight; and those that keep more parameters gathered where ranks share them.
        """
        if self._on_cpu and config.prefetch is None:
            config = replace(config, in_flight=Config.in_flight)
        if shares_parameters(config, config.mesh(self.world), self.hardware):
            config = replace(config, unshard=Config.unshard)
        given = BUCKET_BYTES if config.bucket_bytes is None else config.bucket_bytes
        if not isinstance(given, int) or config.prefetch is not None:
            return config
        captured = self.captures.captured(config, self.captures.sizes[-1])
        params = [node.meta["val"] for node, what in captured.placeholders() if what.role is Role.PARAM]
        total = sum(aligned(param.numel()) * param.itemsize for param in params)
        return replace(config, bucket_bytes=min(given, max(self.world * total, 1)))  # enough for whole ones, too

    # -- what cannot fit --------------------------------------------------------------------------------------

    def _may_fit(self, choice: Choice, budget: float) -> bool:
        """Whether a choice has to be estimated: it fits as far as is known without, and so does what takes less."""
        if self.least_bytes(choice) > budget:
            return False
        for leaner in self._leaner(choice):
            is_asked = isinstance(choice.config.recompute, float) and leaner is self._most_recomputed(choice)
            known = self.estimated(leaner) if is_asked else self.tried.get(leaner)
            if known is not None and known.estimate.peak_bytes > budget:
                return False
        return True

    def _leaner(self, choice: Choice) -> Iterator[Choice]:
        """Others that hold no more, by one option.

        With all the recomputation that there is; without what is held for longer than it has to be; and with as many
        micro-batches as there can be, where there are some, so that gradients are added up in any case.
        """
        config = choice.config
        changed: list[dict[str, Any]] = [
            {name: getattr(Config, name)} for name, value in _ADDS if getattr(config, name) == value
        ]
        if 1 < config.accumulate < self._most_micro_batches:
            changed.append({ACCUMULATE: self._most_micro_batches})
        others = [self._most_recomputed(choice), *(self._by_config.get(replace(config, **each)) for each in changed)]
        return (other for other in others if other is not None)

    def _most_recomputed(self, choice: Choice) -> Choice | None:
        """The same with all the recomputation there is, if a choice has none or a part of it."""
        all_there_is = LEVELS[-1]
        if choice.config.recompute == all_there_is:
            return None
        return self._by_config.get(replace(choice.config, recompute=all_there_is))

    def least_bytes(self, choice: Choice) -> int:
        """Bytes that a rank holds at least where forward ends, without passes that shard."""
        config = choice.config
        may_go = isinstance(config.recompute, float) or "activations" in (config.offload or ())
        return self._on_rank(choice, activations=not may_go)

    def state_bytes(self, choice: Choice) -> int:
        """Bytes that a rank holds there of state and gradients alone."""
        return self._on_rank(choice, activations=False)

    def _on_rank(self, choice: Choice, *, activations: bool) -> int:
        config = choice.config
        held, divided_over = self._held_of(choice), config.mesh(self.world).shard_size
        if not held:
            return 0
        return int(self._extended([each.on_rank(config.zero, divided_over, activations) for each in held]))

    def _held_of(self, choice: Choice) -> tuple[_Held, ...]:
        """Of one rank that has everything, for each number of blocks; nothing where the model cannot do it."""
        before = replace(choice.config, zero=0, **{name: getattr(Config, name) for name in _OF_STATE})
        if isinstance(before.recompute, float):  # chosen late, by all passes together
            before = replace(before, recompute=None)
        if isinstance(before.offload, dict):
            state = {what: tier for what, tier in before.offload.items() if what != "activations"}
            before = replace(before, offload=state or None)
        if before not in self._held:
            self._tell(self)
            try:
                self._held[before] = tuple(
                    _Held.of(self._recomputed(self.captures.captured(before, size), before), before)
                    for size in self.captures.sizes
                )
            except (OptionError, CaptureError) as error:
                self._held[before] = ()
                self._skip(choice, error)
        return self._held[before]

    def _recomputed(self, captured: Program, config: Config) -> Program:
        """The step after the passes that change what it computes, before those that divide it."""
        passes = default_passes(replace(config, offload=None), Mesh(1), hardware=self.hardware)
        first = tuple(takewhile(lambda p: p.gives is Stage.CAPTURED, passes))
        return self._beginnings.run(first, captured).program


@dataclass(frozen=True)
class _Held:
    """Bytes of one rank that has everything."""

    params: int
    state: int
    gradients: int
    activations: int

    @classmethod
    def of(cls, program: Program, config: Config) -> _Held:
        """What a step holds where its forward ends.

        Casts of parameters are left out, which a pass may make at another time; a quarter of the optimizer's state is
        what 8 bits take, and nothing is held that lies on a disk.
        """
        params, state, gradients = (
            sum(
                node.meta["val"].nbytes for node, what in program.placeholders() if what.role is role and _is_flat(node)
            )
            for role in (Role.PARAM, Role.OPT_STATE, Role.GRADIENT)
        )
        nodes = list(program.graph.nodes)
        backward = next((i for i, node in enumerate(nodes) if phase_of(node) is Phase.BACKWARD), len(nodes) - 1)
        casts = {node for node, what in program.placeholders() if what.role is Role.PARAM}
        for node in nodes[:backward]:
            if node.all_input_nodes and casts.issuperset(node.all_input_nodes):
                casts.add(node)
        activations = sum(
            life.num_bytes
            for life in lifetimes(program, staged=False)
            if phase_of(life.node) is Phase.FORWARD and life.first < backward <= life.last and life.node not in casts
        )
        on_disk = config.offload or ()
        gradients = 0 if "gradients" in on_disk else gradients
        state = 0 if "optimizer" in on_disk else state // 4 if config.state_precision is not None else state
        return cls(0 if "parameters" in on_disk else params, state, gradients, activations)

    def on_rank(self, zero: int, world: int, activations: float) -> float:
        """Of one of so many ranks that divide state, with a ZeRO stage and a share of the activations."""
        divided = (self.params if zero == 3 else 0) + (self.state if zero else 0) + (self.gradients if zero > 1 else 0)
        whole = self.params + self.state + self.gradients + activations * self.activations
        return whole - divided * (1 - 1 / world)


def _is_flat(node: Any) -> bool:
    return hasattr(node.meta["val"], "nbytes")
