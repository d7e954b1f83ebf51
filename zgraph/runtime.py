"""What a compiled model does around its steps: captures each kind of step once, keeps it, chooses options, runs it.

``train_step`` finds the step for what it is given, or has the passes make it; a budget chooses the options that were
left open. What all ranks must agree on is agreed before anything runs. What is told of a step that ran is in
``zgraph.inspection``.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.agreement import CheckedComm
from zgraph.arena import Arena
from zgraph.averages import WEIGHT_EMA
from zgraph.batches import Call, MicroBatches, micro_batches, tensors_of, with_tensors_on
from zgraph.budget import Budget, free_bytes
from zgraph.capture import batch_device, capture
from zgraph.captures import Captures
from zgraph.child import in_child
from zgraph.choices import ACCUMULATE, OFFLOAD, STORED, searched
from zgraph.codegen import quantizers
from zgraph.codegen.emit import Watch, emit
from zgraph.codegen.host_kernel import HostKernel
from zgraph.codegen.kernel import Kernel
from zgraph.codegen.quantizers import IN_ONE_PASS
from zgraph.collector import collect_garbage, only_new_objects
from zgraph.comm import Comm
from zgraph.compile_times import CAPTURE
from zgraph.config import Config, check_numbers, uses_disk
from zgraph.decision import AUTO, KERNELS, decide
from zgraph.eager import GatherOnUse
from zgraph.errors import OptimizerError, OptionError, ZgraphError
from zgraph.execute import Executable
from zgraph.facts import ARGUMENTS, ATTRIBUTES, STEP_COUNTS, Facts, fact_of, hold, in_names, state_spec
from zgraph.groups import open_axes
from zgraph.hardware import Hardware
from zgraph.heap import release_free_memory
from zgraph.layout import Layout
from zgraph.lower import Lowered, check_same_buckets, lower
from zgraph.lower_tiers import LowerTiers
from zgraph.memory_check import MemoryCheck
from zgraph.metrics import Metric, by_name
from zgraph.overwrites import check_overwrites
from zgraph.pipeline import Pass, PassRecord
from zgraph.placement import place
from zgraph.plans import Plan, describe, host_share, show_bytes
from zgraph.predict import predict
from zgraph.program import Guard, Input, Program, Role
from zgraph.progress import PASSES, Phases
from zgraph.search import Search
from zgraph.shared_memory import may_share
from zgraph.sharing import shares
from zgraph.skipping import GRADIENT_NORM, NUM_SKIPPED
from zgraph.state import TrainingState
from zgraph.stopwatch import Measured, Stopwatch
from zgraph.tracing import forget
from zgraph.update import check_step, hyperparameters
from zgraph.which_comm import make_comm
from zgraph.which_hardware import tell, told

log = logging.getLogger("zgraph")

NUM_KEPT_STEPS = 8
"""Compiled steps that are kept, those used last: each holds a graph of its own. Who needs more is told so."""


@dataclass(eq=False)
class Compiled:
    """A step compiled for one kind of batch.

    ``keys`` are of the facts that it was captured under, and of those that its own first run led to. ``call`` is what
    it was captured on, with tensors on ``meta``.
    """

    keys: set[str]
    config: Config
    executable: Executable
    micro: Executable | None  # runs on every micro-batch but the last
    guards: tuple[Guard, ...]
    records: tuple[PassRecord, ...]
    capture_s: float
    decided: Plan | None  # of the options, where a budget chose them
    call: Call

    def copied_bytes(self, num_steps: int) -> int:
        """What so many micro-batches copy into flat gradients."""
        before = 0 if self.micro is None else (num_steps - 1) * self.micro.step.copied_bytes
        return before + self.executable.step.copied_bytes

    @property
    def executables(self) -> tuple[Executable, ...]:
        """What runs on micro-batches before the last, if there are any, and on the last."""
        return (self.executable,) if self.micro is None else (self.micro, self.executable)

    @property
    def lowered(self) -> Lowered:
        """The programs that run."""
        return Lowered(self.executable.program, self.micro.program if self.micro is not None else None, self.records)

    @property
    def layout(self) -> Layout:
        layout = self.executable.program.layout
        assert layout is not None
        return layout


@dataclass
class Runtime:
    """Trains one model; see ``zgraph.compile`` for what it is given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss: Callable[..., torch.Tensor] | None
    weight: Callable[..., torch.Tensor | float] | None
    metrics: dict[str, Metric]
    config: Config
    group: InitVar[dist.ProcessGroup | None]
    passes: tuple[Pass, ...] = ()
    budget: Budget | None = None
    progress: bool = True
    cache: list[Compiled] = field(default_factory=list)  # in order of last use
    arena: Arena = field(default_factory=Arena)
    comm: Comm | None = None
    _machine: str | None = None
    _is_one_host: bool = True  # all ranks can share memory, where any can
    _budget_bytes: int | None = None
    _decided: dict[str, Plan] = field(default_factory=dict)  # by what a step is given
    _last_decided: Plan | None = None
    num_captures: int = 0
    _num_skipped: int = 0
    _num_changes: Counter[str] = field(default_factory=Counter)
    _last: Compiled | None = None
    _facts_seen: dict[str, str] = field(default_factory=dict)
    _capturing: bool = False
    _in_one_pass: bool = False  # vectors are quantised and packed, on all ranks
    timed: dict[Executable, tuple[Executable, Stopwatch]] = field(default_factory=dict)  # twins that read the clock
    _num_to_time: int = 0

    def __post_init__(self, group: dist.ProcessGroup | None) -> None:
        world = 1 if group is None else dist.get_world_size(group)
        self.mesh = self.config.mesh(world)
        self.state = TrainingState(self.model, self.optimizer, group, self.mesh)
        self.lower_tiers = LowerTiers(self.state)
        self.numbers = self.config.numbers()
        self.agreement = self.state.agreement
        functions = functions_by_name(self.loss, self.weight, self.metrics)
        self.facts = Facts(self.model, self.optimizer, self.state, functions) if self.optimizer is not None else None

    # -- a step ---------------------------------------------------------------------------------------------

    def train_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.optimizer is None or self.facts is None:
            raise OptimizerError(
                "train_step needs an optimizer", fix="zgraph.compile(model, optimizer=torch.optim.AdamW(...))"
            )
        if self._last is None:  # those that have a budget begin by agreeing on options
            self.agreement.check("model.train_step()", {"memory": "not given" if self.budget is None else "given"})
        if self.budget is not None:
            self._choose_options(self.budget, args, kwargs)
        hypers: dict[str, float] = {}
        facts: dict[str, str] = {}
        replaced: list[str] = []
        calls: list[Call] = []
        keys: list[str] = []
        shapes: list[str] = []
        error: Exception | None = None
        try:
            check_step(self.optimizer)
            check_numbers(self.numbers, self.config)
            hypers = {**hyperparameters(self.optimizer), **self.config.inputs(self.numbers, self.agreement.world)}
            calls = micro_batches(args, kwargs, self.config.accumulate)
            self.facts.begin()
            for call in calls:
                facts = self.facts.read(call)
                keys.append(self.facts.key)
                shapes.append(facts[ARGUMENTS])
            replaced = self.state.replaced()
        except Exception as caught:  # noqa: BLE001 -- another rank may not have it, and is told before this one stops
            error = caught
        others = {
            "hyperparameters": repr(hypers),
            "zgraph options": repr((self.config, self.passes)),
            "the micro-batches": " then ".join(shapes if len(set(keys)) > 1 else shapes[:1]),
            "the metrics": ", ".join(f"{metric.reduction} of {name}" for name, metric in self.metrics.items()),
            "which parameters have been given other values": repr(replaced),
        }
        try:
            self.agreement.check("model.train_step()", {**facts, **others}, error)
        except Exception:
            self.facts.forget_last()
            raise
        open_axes(self.state.group, self.mesh)
        made: list[tuple[Call, Compiled]] = []
        values = self._guarded_values(hypers)
        last = self._compiled(keys[-1], calls[-1], values, facts, made)
        layout = last.layout
        used = [
            self._compiled(key, call, values, facts, made, layout)
            for key, call in zip(keys[:-1], calls[:-1], strict=True)
        ]
        needs_tier = bool(layout.away) or self.lower_tiers.spill_rooms.num_bytes > 0
        if needs_tier and (made or layout != self.state.layout):
            self.lower_tiers.reserve(last.lowered, self.config.offload_path)
        if replaced or layout != self.state.layout:
            programs = (program for each in (*used, last) for program in each.lowered.programs)
            self.state.commit(layout, in_shared_memory=any(map(shares, programs)))
            if layout.away:
                release_free_memory()  # where the model was built, and no state comes to lie
        self._keep((*used, last))
        assert self.comm is not None
        self.comm.traffic.clear()
        with self.lower_tiers.counting(), self.agreement.no_return(), self.state.adding_up():
            for compiled, call in zip(used, calls[:-1], strict=True):
                assert compiled.micro is not None
                self._to_run(compiled.micro).run(tensors_of(call), hypers)
            loss = self._to_run(last.executable).run(tensors_of(calls[-1]), hypers)
        self._num_to_time = max(self._num_to_time - 1, 0)
        for call, compiled in made:
            facts = self.facts.read(call)
            if compiled.executable.program.reads_all_state():  # what created its state reads it from now on
                compiled.keys.add(self.facts.key)
        if made:
            release_free_memory()  # as state takes its places, much comes and goes that never will again
        self._facts_seen = facts
        self._warn_if_skipped()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # as after optimizer.step(), for schedulers
        return (loss, by_name(self.metrics, self.state.recipe, self.agreement.world)) if self.metrics else loss

    def _compiled(
        self,
        key: str,
        call: Call,
        values: dict[Input, float],
        facts: dict[str, str],
        made: list[tuple[Call, Compiled]],
        layout: Layout | None = None,
    ) -> Compiled:
        """The step for a call, in these buckets if it is said which; a new one is added to ``made``."""
        for compiled in (*self.cache, *(new for _, new in made)):
            fits = layout is None or compiled.layout == layout
            asked = key in compiled.keys and compiled.config == self.config
            if asked and fits and hold(compiled.guards, values):
                return compiled
        if self._last is not None:
            self._warn(key, facts)
        compiled = self._compile(key, *call, layout or self.state.layout)
        if layout is not None:
            check_same_buckets(layout, compiled.layout)
        assert self.facts is not None
        self.facts.settle()
        made.append((call, compiled))
        return compiled

    def _keep(self, used: Sequence[Compiled]) -> None:
        """Count these as used last; of all steps those used last are kept. All ranks decide alike."""
        for compiled in used:
            if compiled in self.cache:
                self.cache.remove(compiled)
            else:
                self.num_captures += 1
            self.cache.append(compiled)
        del self.cache[: -max(NUM_KEPT_STEPS, len(set(used)))]
        self._last = used[-1]

    def _compile(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout | None) -> Compiled:
        is_first = self._last is None
        with Phases().shown("compiled", self.model, is_first=is_first, asked=self.progress) as phases:
            return self._compile_in(phases, key, args, kwargs, layout)

    def _compile_in(
        self, phases: Phases, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout | None
    ) -> Compiled:
        assert self.optimizer is not None
        self._agree_on_machine((args, kwargs))
        error: Exception | None = None
        digest = b""
        try:
            with only_new_objects():
                with phases.phase(CAPTURE):
                    program = self.capture(args, kwargs, self.config)
                phases.captured(program.num_nodes())
                with phases.phase(PASSES):
                    lowered = lower(
                        program,
                        self.config,
                        self.mesh,
                        layout,
                        self.passes,
                        hardware=self.hardware,
                        watch=phases.watch,
                    )
                del program
                collect_garbage(lowered.last.graph)
            phases.divide(lowered.records)
            self._warn_of_no_use(lowered)
            digest = lowered.digest()
            self._check_budget(lowered)
        except Exception as caught:  # noqa: BLE001 -- whatever it is, the other ranks are told before this one stops
            error = caught
        self.agreement.share_outcome(digest, error)
        if self.comm is None:
            devices = {bucket.device.type for bucket in lowered.layout.buckets}
            self.comm = make_comm(self.state.group, devices, self.mesh)
            if self.config.check_collectives and self.state.group is not None:
                self.comm = CheckedComm(self.comm, self.agreement)
        self._agree_on_kernels(lowered.programs)
        with phases.phase("kernels"), self.agreement.together():
            micro, executable = (None, *map(self._executable, lowered.programs))[-2:]
        for program in lowered.programs:
            forget(program.graph)
        gc.collect()  # graphs are full of cycles; what capture left behind is gone before the first step
        release_free_memory()
        assert executable is not None
        guards, records, capture_s = lowered.last.guards, lowered.records, phases.seconds[CAPTURE]
        call = with_tensors_on("meta", (args, kwargs))
        return Compiled({key}, self.config, executable, micro, guards, records, capture_s, self._last_decided, call)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config) -> Program:
        """The step on a batch, before any pass. Involves no other rank."""
        assert self.optimizer is not None
        self._capturing = True
        try:
            program = capture(
                self.model,
                self.optimizer,
                args,
                kwargs,
                loss=self.loss,
                weight=self.weight,
                metrics=self.metrics,
                state=state_spec(self.model, self.state.state_forms()),
                device=self.device(),
                config=config,
            )
        finally:
            self._capturing = False
        collect_garbage(program.graph)
        return program

    def _executable(self, program: Program, stopwatch: Stopwatch | None = None) -> Executable:
        assert self.comm is not None
        for node in program.graph.nodes:
            if isinstance(node.target, Kernel):
                node.target.prepare()
            elif node.target in IN_ONE_PASS and self._in_one_pass:
                quantizers.prepare(node.meta["val"].device.type)
        write = partial(emit, tagged=isinstance(self.comm, CheckedComm), in_one_pass=self._in_one_pass)
        placement = place(program, staged=self.comm.is_staged)
        if self.config.check_memory and not placement.apart:  # in an arena, nothing would be seen to come and go
            step = write(program, watch=MemoryCheck(program, staged=self.comm.is_staged))
        else:
            check_overwrites(program, placement)
            self.arena.reserve(placement.num_bytes)
            watch: Watch | None = stopwatch
            if self.config.check_memory:
                watch = MemoryCheck(program, staged=self.comm.is_staged, held=placement.elsewhere)
            step = write(program, placement, watch=watch)
        self.lower_tiers.spill_rooms.reserve(step.spilled_bytes)
        return Executable(program, step, self.state, self.comm, self.arena, self.lower_tiers.spill_rooms)

    def _agree_on_kernels(self, programs: Sequence[Program]) -> None:
        """Run updates in slices on all ranks where one of them cannot compile: replicas are to be rounded alike."""
        quantizing = [n for program in programs for n in program.graph.nodes if n.target in IN_ONE_PASS]
        if quantizing:
            device_type = quantizing[0].meta["val"].device.type
            can = self.config.kernels != "eager" and quantizers.why_not(device_type) is None
            self._in_one_pass = bool(self.agreement.least(can))
        calls = [node for program in programs for node in program.graph.nodes if isinstance(node.target, Kernel)]
        for device_type in sorted({node.target.device_type for node in calls}):
            mine = [node for node in calls if node.target.device_type == device_type]
            why = next((reason for node in mine if (reason := node.target.why_in_slices())), None)
            if why is not None:
                log.warning("zgraph: kernels run in slices, which takes longer, on all ranks: %s", why)
            if not self.agreement.least(why is None):
                for node in mine:
                    node.target = replace(node.target, is_compiled=False)

    def _agree_on_machine(self, batch: Call) -> None:
        if self._machine is None:
            self._machine = self.agreement.of_first(partial(self._tell_machine, batch))
            group, machine = self.state.group, self.hardware
            if group is not None and machine is not None and machine.device_type == "cpu" and machine.reads_peers:
                self._is_one_host = may_share(group)

    def _tell_machine(self, batch: Call) -> str:
        """The machine as ``zgraph.which_hardware`` tells it; nothing where it is a GPU that is not known."""
        try:
            return tell(self._place(batch))
        except OptionError:
            return ""

    def _place(self, batch: Call) -> torch.device:
        """Where the step computes."""
        devices = [p.device for p in self.model.parameters() if not p.is_meta]
        return self.device() or (devices[0] if devices else batch_device(batch))

    @property
    def hardware(self) -> Hardware | None:
        """Rank 0's machine, by which all ranks decide."""
        if not self._machine:
            return None
        machine = told(self._machine, self.agreement.world)
        return machine if self._is_one_host else replace(machine, reads_peers=False)

    def device(self) -> torch.device | None:
        """Where parameters without memory live; None before they have a place."""
        return self.state.layout.buckets[0].device if self.state.layout is not None else None

    def _warn(self, key: str, facts: dict[str, str]) -> None:
        """Say why the step is captured again, and once when one cause recurs."""
        changed = [name for name in facts if name != STEP_COUNTS and facts[name] != self._facts_seen.get(name)]
        if any(key in compiled.keys for compiled in self.cache):
            why = "a hyperparameter crossed a condition in the optimizer's step()"
        elif changed:
            why = f"{' and '.join(changed)} changed"
            if ATTRIBUTES in changed:
                why += f": {shorten(facts[ATTRIBUTES], 300, placeholder=' ...')}"
        else:
            why = "the last one created optimizer state, which later ones read"
        log.warning("zgraph: capturing the training step again, because %s", why)
        self._num_changes.update(changed)
        for name in changed:
            if self._num_changes[name] == NUM_KEPT_STEPS:
                log.warning(
                    "zgraph: %s changed %d times, and each time the step was captured again; only %d captured steps "
                    "are kept. Pass numbers that change as tensors, and batches in few shapes",
                    name,
                    NUM_KEPT_STEPS,
                    NUM_KEPT_STEPS,
                )

    def _warn_of_no_use(self, lowered: Lowered) -> None:
        """Say that an option asks for tiles, or updates on the host, of which there are none."""
        moved = any(isinstance(node.target, HostKernel) for each in lowered.programs for node in each.graph.nodes)
        if self.config.host_updates and not moved and self.agreement.rank == 0:
            log.warning(
                "zgraph: host_updates moves no update to the host: each is gathered in the same step, mixes elements, "
                "cannot be compiled in C++, or would not move fewer bytes there"
            )
        is_alike = any(r.name == "TileProducts" and r.num_nodes_before == r.num_nodes_after for r in lowered.records)
        if is_alike and self.agreement.rank == 0:
            log.warning(
                "zgraph: tile_bytes=%d tiles nothing: no bucket is a single matrix of more bytes than that, of whole "
                "rows for each rank, which products or lookups read",
                self.config.tile_bytes,
            )

    def _warn_if_skipped(self) -> None:
        """Say that the last step was skipped, where the CPU knows without waiting for a device."""
        count = self.state.recipe.get(NUM_SKIPPED.name)
        if count is not None and count.device.type == "cpu" and int(count) > self._num_skipped:
            self._num_skipped = int(count)
            norm = self.state.recipe[GRADIENT_NORM.name].item()
            log.warning(
                "zgraph: a step was skipped, since its gradient norm is %s (%d so far)", norm, self._num_skipped
            )

    def _guarded_values(self, hypers: dict[str, float]) -> dict[Input, float]:
        values = {Input(Role.HYPER, path): value for path, value in hypers.items()}
        for bucket, entries in self.state.opt.items():
            for key, value in entries.items():
                if isinstance(value, (int, float)):
                    values[Input(Role.OPT_STATE, bucket, key)] = value
        return values

    # -- how long it takes ----------------------------------------------------------------------------------

    def profile(self, steps: Any) -> None:
        """See ``CompiledModule.profile``."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps={steps!r} is not a number of steps", fix="give a positive integer")
        if self.config.check_memory:
            raise OptionError("profile with check_memory, which makes steps slower", fix="compile without it")
        self.timed, self._num_to_time = {}, steps

    def _to_run(self, executable: Executable) -> Executable:
        """What runs for an executable: its twin that reads the clock, while steps are profiled."""
        if not self._num_to_time:
            return executable
        if executable not in self.timed:
            device = self.device()
            assert device is not None
            stopwatch = Stopwatch(device.type)
            self.timed[executable] = self._executable(executable.program, stopwatch), stopwatch
        return self.timed[executable][0]

    def measured(self, executable: Executable) -> Measured | None:
        """What was measured of an executable, if anything was."""
        if executable not in self.timed:
            return None
        num_calls = sum(node.op == "call_function" for node in executable.program.graph.nodes)
        return self.timed[executable][1].measured(num_calls)

    # -- a budget -------------------------------------------------------------------------------------------

    def _choose_options(self, budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the options that were chosen for such a step; choose them now, on all ranks, if none were."""
        assert self.optimizer is not None
        try:
            check_step(self.optimizer)
            calls = _calls(args, kwargs)
            flat = [pytree.tree_flatten(call) for call in calls]
            facts = [([fact_of(leaf) for leaf in leaves], spec) for leaves, spec in flat]
            batch = repr(facts)
        except Exception:  # noqa: BLE001 -- the step meets it again, and tells the other ranks
            return
        if batch not in self._decided:
            told = "; ".join(in_names(call, each) for call, (each, _) in zip(calls, facts, strict=True))
            self.agreement.check("model.train_step() with a batch unlike those before", {"the batch": told})
            largest = max(calls, key=_num_elements)
            self._agree_on_machine(largest)
            if self.hardware is None:
                raise OptionError("this GPU is not known, so that memory= has no times", fix="run `zgraph calibrate`")
            if self._budget_bytes is None:
                with self.agreement.together():
                    num_bytes = budget.num_bytes or self._free_bytes(largest)
                self._budget_bytes = self.agreement.least(num_bytes)
            split = (
                MicroBatches([largest] * len(calls)) if len(args) == 1 and isinstance(args[0], MicroBatches) else None
            )
            call: Call = ((split,), {}) if split is not None else largest
            is_first = self._last_decided is None
            phases = Phases()
            with (
                phases.shown("options chosen", self.model, is_first=is_first, asked=self.progress),
                phases.phase("search"),
            ):
                choose = partial(self._choose, budget, call, self.hardware)
                on_cpu = self.hardware.device_type == "cpu"
                chosen = self.agreement.of_first(partial(in_child, choose) if on_cpu else choose)
            plan = Plan.from_json(chosen)
            if not plan.fits:
                raise plan.refusal()
            log.info("zgraph: options chosen for a budget of %s: %s", show_bytes(plan.budget_bytes), plan.options)
            self._decided[batch] = plan
        self._last_decided = self._decided[batch]
        self.config = self._last_decided.config

    def _choose(self, budget: Budget, call: Call, hardware: Hardware) -> str:
        """The plan for a step, as JSON.

        Once there are buckets they stay, and so do all options if the step fits with them.
        """
        assert self.optimizer is not None
        assert self._budget_bytes is not None
        fixed = dict(budget.fixed)
        if isinstance(call[0][0] if call[0] else None, MicroBatches):
            fixed.setdefault(ACCUMULATE, len(call[0][0].batches))
        if self.agreement.world > hardware.devices_per_node:
            fixed.setdefault("shard_size", None)  # how ranks are grouped has been settled
        kept: list[dict[str, Any]] = []
        if self._last_decided is not None:
            before = self._last_decided.config
            if fixed.get(OFFLOAD) == AUTO and not uses_disk(before.offload):
                fixed.pop("offload_path", None)
            fixed = {name: value for name, value in fixed.items() if value != AUTO or name == KERNELS}
            kept = [{**searched(before), **fixed}]
            fixed = {**{name: getattr(before, name) for name in STORED}, **fixed}
        with self._plain() as model:
            captures = Captures(model, self.optimizer, call, self.loss, self.weight, self.metrics, self._place(call))
            for options in kept:
                with suppress(ZgraphError):  # the batch does not divide into as many micro-batches
                    search = Search(captures, hardware, self.agreement.world, options, self.passes)
                    if search.within(self._budget_bytes) is not None:
                        return decide(search, self._budget_bytes).to_json()
            search = Search(captures, hardware, self.agreement.world, fixed, self.passes)
            plan = decide(search, self._budget_bytes)
            if kept:
                as_before = ", ".join(f"{name}={fixed[name]!r}" for name in STORED if name not in budget.fixed)
                plan = replace(plan, notes=(*plan.notes, f"state stays where the first batch has put it: {as_before}"))
            return plan.to_json()

    @contextmanager
    def _plain(self) -> Iterator[nn.Module]:
        """The model as it was before it was compiled, which can be copied."""
        compiled = self.model.__class__
        runtime = self.model.__dict__.pop("_zgraph")
        self.model.__class__ = compiled.__bases__[1]
        try:
            yield self.model
        finally:
            self.model.__class__ = compiled
            self.model.__dict__["_zgraph"] = runtime

    def _free_bytes(self, call: Call) -> int:
        assert self.optimizer is not None
        params = list(self.model.parameters())
        states = [v for entries in self.optimizer.state.values() for v in entries.values()]
        stored = [v for entries in self.state.opt.values() for v in entries.values()]
        held = [*params, *(p.grad for p in params), *self.model.buffers(), *states, *stored, *tensors_of(call)]
        tensors = [t for t in held if isinstance(t, torch.Tensor) and not t.is_meta]
        return free_bytes(self._place(call), self.agreement.world, tensors)

    def _check_budget(self, lowered: Lowered) -> None:
        """Refuse a program that takes more than its plan said, before it runs.

        Raises:
            BudgetError: with what is in the way.
        """
        if self._last_decided is None or self.hardware is None:
            return
        made, budget = predict(lowered, self.hardware, self.config.accumulate), self._last_decided.budget_bytes
        if made.reserved_bytes > budget or made.away_bytes("host") > host_share(self.hardware, self.agreement.world):
            raise describe(self.model, lowered, made, self.config.given(), self.hardware, budget).refusal()

    # -- around steps ---------------------------------------------------------------------------------------

    def eager(self) -> Any:
        """Context in which the model may be called as a plain module."""
        if self._capturing:
            return nullcontext()
        if torch.is_grad_enabled() and self.state.layout is not None:
            raise ZgraphError(
                "a compiled model trains through train_step; calling it would record gradients that are never used",
                fix="call model.train_step(...), or wrap evaluation in torch.no_grad()",
            )
        self.state.check_whole()
        if self.state.layout is None:
            self.state.check_loaded("calling the model")
            return nullcontext()
        if self.state.divided:
            self.agreement.check("model()")
        return GatherOnUse(self.state)

    def full_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.last()
        if self.state.divided:
            self.agreement.check("model.full_params()")
        return self.state.full_params()

    def ema_state_dict(self) -> dict[str, Any]:
        if self.config.ema is None:
            raise OptionError("no average of the weights is kept", fix="zgraph.compile(model, ..., ema=0.999)")
        found: dict[str, Any] = copy.copy(self.model.state_dict())
        averages = self.state.optimizer_state(WEIGHT_EMA)
        params = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in found.items():
            if name in params and id(params[name]) in averages:
                found[name] = averages[id(params[name])]
            elif isinstance(value, torch.Tensor):
                found[name] = value.clone()
        return found

    def last(self) -> Compiled:
        if self._last is None:
            raise ZgraphError(
                "nothing is compiled yet", fix="call train_step once: the batch is part of what is compiled"
            )
        return self._last


def _calls(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """What ``train_step`` was given: one call, or those of a ``MicroBatches``."""
    if len(args) == 1 and not kwargs and isinstance(args[0], MicroBatches):
        return micro_batches(args, kwargs, len(args[0].batches))
    return [(args, kwargs)]


def _num_elements(call: Call) -> int:
    return sum(tensor.numel() for tensor in tensors_of(call))


def functions_by_name(
    loss: Callable[..., Any] | None, weight: Callable[..., Any] | None, metrics: Mapping[str, Metric]
) -> dict[str, Callable[..., Any]]:
    """The user's functions that are part of a step."""
    given = {"loss": loss, "weight": weight, **{f"metric {name}": metric.function for name, metric in metrics.items()}}
    return {name: function for name, function in given.items() if function is not None}
