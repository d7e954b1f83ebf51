"""``zgraph.compile``: capture, passes, code, execution. The table of contents of the project.

``compile`` itself only checks its arguments and gives the model a ``train_step``. The first ``train_step`` knows the
batch, so there the step is captured, rewritten, verified and emitted, all ranks agree on it, and only then do the
parameters move into their buckets. Until that moment the user's model and optimizer are untouched.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import InitVar, dataclass, field
from functools import partial
from textwrap import shorten
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from zgraph.agreement import CheckedComm
from zgraph.arena import Arena
from zgraph.averages import WEIGHT_EMA
from zgraph.batches import Call, MicroBatches, micro_batches
from zgraph.budget import Budget, free_bytes, refuse_open_options
from zgraph.capture import batch_device, capture, check_optimizer
from zgraph.captures import Captures
from zgraph.choices import ACCUMULATE, STORED, searched
from zgraph.codegen.emit import emit
from zgraph.collector import collect_garbage
from zgraph.comm import Comm
from zgraph.config import Config, check_numbers
from zgraph.decision import decide
from zgraph.eager import GatherOnUse
from zgraph.errors import CaptureError, OptimizerError, OptionError, StateError, ZgraphError
from zgraph.execute import Executable
from zgraph.facts import ARGUMENTS, ATTRIBUTES, STEP_COUNTS, Facts, fact_of, hold, state_spec
from zgraph.groups import open_axes, process_group
from zgraph.hardware import Hardware
from zgraph.heap import release_free_memory
from zgraph.layout import Layout
from zgraph.lower import Lowered, check_same_buckets, lower
from zgraph.memory_check import MemoryCheck
from zgraph.metrics import Metric, by_name, check_metrics
from zgraph.overwrites import check_overwrites
from zgraph.pipeline import Pass, PassRecord
from zgraph.placement import place
from zgraph.plans import Plan, default_budget, describe, show_bytes
from zgraph.predict import predict
from zgraph.program import Guard, Input, Program, Role
from zgraph.search import Search
from zgraph.skipping import GRADIENT_NORM, NUM_SKIPPED, report
from zgraph.state import TrainingState
from zgraph.tracing import forget
from zgraph.update import check_step, hyperparameters
from zgraph.which_comm import make_comm
from zgraph.which_hardware import hardware_of, tell, told

log = logging.getLogger("zgraph")

NUM_KEPT_STEPS = 8
"""Compiled steps that are kept, those used last: each holds a graph of its own. Who needs more is told so."""


def compile(  # noqa: A001
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable[..., torch.Tensor] | None = None,
    weight: Callable[..., torch.Tensor | float] | None = None,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    passes: Sequence[Pass] = (),
    plan: Plan | None = None,
    memory: int | str | None = None,
    **options: Any,
) -> Any:
    """Give ``model`` a ``train_step`` that runs forward, backward, communication and update as one graph.

    The model stays the same object; like FSDP2's ``fully_shard``, this swaps its class for a subclass.

    Args:
        model: any module; parameters may be on ``meta`` and are then initialised by each module's own
            ``reset_parameters``, every rank keeping only its part.
        optimizer: the user's; it stays the source of hyperparameters.
        loss: ``loss(output, *args, **kwargs)`` of the model's output and arguments. By default the output
            itself, or its ``.loss``.
        weight: ``weight(*args, **kwargs)`` of the model's arguments: by how much a (micro-)batch counts, the number
            of its tokens say. Loss and gradients are then those of ``sum(weight * loss) / sum(weight)`` over
            micro-batches and ranks, which is the mean over all tokens where each loss is the mean over its own. By
            default all count alike.
        metrics: what ``train_step`` returns besides the loss: by name, a ``function(output, *args, **kwargs)`` of one
            number, whose mean over micro-batches and ranks is taken; or a pair of such a function and ``"sum"``,
            ``"max"`` or ``"min"``.
        passes: of your own. Each runs after the last of zgraph's that gives the stage it takes, under the same
            verifier; it must leave the stage as it was.
        plan: of ``zgraph.plan``, whose options are taken. It must be for as many ranks as there are, and fit.
        memory: what one rank may take: bytes, a string such as ``"8GiB"``, or ``"auto"`` for what its device has free,
            less 6 %. The first step then takes the fastest options whose predicted peak is within it, as
            ``zgraph.plan`` finds them, or is refused. Options that are given stay as they are; those that
            ``zgraph.choices`` lists are chosen if they are ``"auto"`` or not given, but for ``accumulate``, which is 1
            unless it is ``"auto"``: micro-batches change results where the loss is no mean over the rows of a batch.
            ``model.plan`` says what was chosen.
        options: see ``zgraph.config.Config``.

    Returns:
        ``model`` itself, now also a ``CompiledModule``. (Python cannot spell the type that is both, hence ``Any``.)

    Raises:
        OptionError: an unknown option, or one out of range; a pass that cannot be placed.
        OptimizerError: the optimizer holds parameters that are not the model's, or has step hooks.
        CaptureError: there is nothing to train, or a lazy module has not been called yet.
    """
    budget = None
    if memory is None:
        refuse_open_options(options)
        config = Config.from_options(_with_plan(plan, options))
    elif plan is not None:
        raise OptionError("memory beside a plan, which has a budget of its own", fix="give memory to zgraph.plan")
    else:
        budget = Budget.of(memory, options)
        config = budget.config
    check_arguments(model, optimizer, loss, weight, passes, config)
    for name in ("train_step", "stats", "program", "source", "recipe", "ema_state_dict", "plan"):
        if hasattr(model, name):
            raise OptionError(
                f"the model has an attribute {name!r}, which zgraph.compile would hide", fix="rename the attribute"
            )
    group = process_group()
    if plan is not None:
        _check_plan(plan, group, model)
    runtime = _Runtime(model, optimizer, loss, weight, check_metrics(metrics), config, group, tuple(passes), budget)
    model.__class__ = type(f"Compiled{type(model).__name__}", (CompiledModule, type(model)), {})
    model.__dict__["_zgraph"] = runtime
    return model


class CompiledModule(nn.Module):
    """What a compiled model can do besides being the module it was."""

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """One training step on a batch.

        Args:
            args, kwargs: passed to the model. With ``accumulate=k``, every tensor is divided along its first
                dimension into k parts, one for each micro-batch; or all there is is a ``zgraph.MicroBatches``.

        Returns:
            The loss averaged over micro-batches and ranks, detached: a 0-dim tensor. With ``metrics``, a pair of it and
            a dictionary of 0-dim float64 tensors by name.

        Raises:
            ZgraphError: on all ranks, before anything is communicated or changed. An error inside the running step is
                torch's own; buffers may then be as an earlier micro-batch has left them.
        """
        return self.__dict__["_zgraph"].train_step(args, kwargs)

    def stats(self) -> dict[str, Any]:
        """Bytes this rank stores, collectives it issued, and what compiling cost.

        Returns:
            ``param_bytes``, ``optimizer_state_bytes``, ``buffer_bytes``; ``arena_bytes`` that temporaries of all steps
            share on a CPU, and ``copied_bytes`` that the last step copied to put gradients side by side, as they could
            not be made there; ``collectives`` of the last step: operation
            -> ``count`` and ``bytes`` received or, for all_reduce, received and sent; ``num_nodes``,
            ``num_captures``, ``capture_s``, ``passes_s``; with ``clip_norm`` or float16 also ``gradient_norm`` of the
            last step, before it was clipped, and ``num_skipped_steps`` since the model was compiled; with float16
            ``loss_scale`` of the next step.
        """
        return self.__dict__["_zgraph"].stats()  # type: ignore[no-any-return]

    @property
    def recipe(self) -> dict[str, float]:
        """Numbers of the recipe by option (``ema``), read anew in each step; all ranks change them alike."""
        return self.__dict__["_zgraph"].numbers  # type: ignore[no-any-return]

    @property
    def program(self) -> Program:
        """The program of the last step, after all passes."""
        return self.__dict__["_zgraph"].last().executable.program  # type: ignore[no-any-return]

    @property
    def source(self) -> str:
        """The Python that the last step ran."""
        return self.__dict__["_zgraph"].last().executable.step.source  # type: ignore[no-any-return]

    @property
    def plan(self) -> Plan:
        """What the last step is predicted to take on this machine, as ``zgraph.plan`` tells it.

        Raises:
            OptionError: this kind of GPU is not known; ``zgraph calibrate`` measures it.
        """
        return self.__dict__["_zgraph"].plan()  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["_zgraph"].eager():
            return super().__call__(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Full parameters under their original names. All ranks call it together."""
        return self.__dict__["_zgraph"].state.state_dict(super().state_dict, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load full parameters; each rank stores its part."""
        return self.__dict__["_zgraph"].state.load_state_dict(super().load_state_dict, *args, **kwargs)

    def ema_state_dict(self) -> dict[str, Any]:
        """What ``state_dict`` gives, with the averages of trained weights in their place.

        All ranks call it together. What an average is saved in, and loaded from, is ``optimizer.state_dict()``.

        Raises:
            OptionError: the model was compiled without ``ema``.
        """
        return self.__dict__["_zgraph"].ema_state_dict()  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            "a compiled model cannot be pickled: it holds generated code and, on several ranks, a part of the state",
            fix="save model.state_dict(), which has the whole parameters under their original names",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with an optimizer of its own, as plain modules and their optimizers have when copied together."""
        runtime = self.__dict__["_zgraph"]
        if runtime.state.group is not None:
            raise StateError(
                "a compiled model cannot be copied while its process group is part of it",
                fix="build another model and load_state_dict(model.state_dict())",
            )
        memo[id(runtime.cache)], memo[id(runtime._last)] = [], None  # the copy captures a step of its own
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@dataclass(eq=False)
class _Compiled:
    """A step compiled for one kind of batch.

    ``keys`` are of the facts that it was captured under, and of those that its own first run led to.
    """

    keys: set[str]
    config: Config
    executable: Executable
    micro: Executable | None  # runs on every micro-batch but the last
    guards: tuple[Guard, ...]
    records: tuple[PassRecord, ...]
    capture_s: float
    decided: Plan | None  # of the options, where a budget chose them

    def copied_bytes(self, num_steps: int) -> int:
        """What so many micro-batches copy into flat gradients."""
        before = 0 if self.micro is None else (num_steps - 1) * self.micro.step.copied_bytes
        return before + self.executable.step.copied_bytes

    @property
    def layout(self) -> Layout:
        layout = self.executable.program.layout
        assert layout is not None
        return layout


@dataclass
class _Runtime:
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss: Callable[..., torch.Tensor] | None
    weight: Callable[..., torch.Tensor | float] | None
    metrics: dict[str, Metric]
    config: Config
    group: InitVar[dist.ProcessGroup | None]
    passes: tuple[Pass, ...] = ()
    budget: Budget | None = None
    cache: list[_Compiled] = field(default_factory=list)  # in order of last use
    arena: Arena = field(default_factory=Arena)
    _comm: Comm | None = None
    _machine: str | None = None
    _budget_bytes: int | None = None
    _decided: dict[str, Plan] = field(default_factory=dict)  # by what a step is given
    _last_decided: Plan | None = None
    _num_captures: int = 0
    _num_skipped: int = 0
    _num_changes: Counter[str] = field(default_factory=Counter)
    _last: _Compiled | None = None
    _facts_seen: dict[str, str] = field(default_factory=dict)
    _capturing: bool = False

    def __post_init__(self, group: dist.ProcessGroup | None) -> None:
        world = 1 if group is None else dist.get_world_size(group)
        self.mesh = self.config.mesh(world)
        self.state = TrainingState(self.model, self.optimizer, group, self.mesh)
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
                facts = self.facts.read(*pytree.tree_flatten(call))
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
        made: list[tuple[Call, _Compiled]] = []
        values = self._guarded_values(hypers)
        last = self._compiled(keys[-1], calls[-1], values, facts, made)
        layout = last.layout
        used = [
            self._compiled(key, call, values, facts, made, layout)
            for key, call in zip(keys[:-1], calls[:-1], strict=True)
        ]
        if replaced or layout != self.state.layout:
            self.state.commit(layout)
        self._keep((*used, last))
        assert self._comm is not None
        self._comm.traffic.clear()
        with self.agreement.no_return(), self.state.adding_up():
            for compiled, call in zip(used, calls[:-1], strict=True):
                assert compiled.micro is not None
                compiled.micro.run(_tensors(call), hypers)
            loss = last.executable.run(_tensors(calls[-1]), hypers)
        for call, compiled in made:
            facts = self.facts.read(*pytree.tree_flatten(call))
            if compiled.executable.program.reads_all_state():  # what created its state reads it from now on
                compiled.keys.add(self.facts.key)
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
        made: list[tuple[Call, _Compiled]],
        layout: Layout | None = None,
    ) -> _Compiled:
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

    def _keep(self, used: Sequence[_Compiled]) -> None:
        """Count these as used last; of all steps those used last are kept. All ranks decide alike."""
        for compiled in used:
            if compiled in self.cache:
                self.cache.remove(compiled)
            else:
                self._num_captures += 1
            self.cache.append(compiled)
        del self.cache[: -max(NUM_KEPT_STEPS, len(set(used)))]
        self._last = used[-1]

    def _compile(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout | None) -> _Compiled:
        assert self.optimizer is not None
        self._agree_on_machine((args, kwargs))
        error: Exception | None = None
        digest = b""
        self._capturing = True
        try:
            start = time.perf_counter()
            program = capture(
                self.model,
                self.optimizer,
                args,
                kwargs,
                loss=self.loss,
                weight=self.weight,
                metrics=self.metrics,
                state=state_spec(self.model, self.state.state_forms()),
                device=self._device(),
                config=self.config,
            )
            collect_garbage(program.graph)
            capture_s = time.perf_counter() - start
            lowered = lower(program, self.config, self.mesh, layout, self.passes, hardware=self._hardware)
            digest = lowered.digest()
            self._check_budget(lowered)
            del program
        except Exception as caught:  # noqa: BLE001 -- whatever it is, the other ranks are told before this one stops
            error = caught
        finally:
            self._capturing = False
        self.agreement.share_outcome(digest, error)
        if self._comm is None:
            devices = {bucket.device.type for bucket in lowered.layout.buckets}
            self._comm = make_comm(self.state.group, devices, self.mesh)
            if self.config.check_collectives and self.state.group is not None:
                self._comm = CheckedComm(self._comm, self.agreement)
        with self.agreement.together():
            micro, executable = (None, *map(self._executable, lowered.programs))[-2:]
        for program in lowered.programs:
            forget(program.graph)
        gc.collect()  # graphs are full of cycles; what capture left behind is gone before the first step
        release_free_memory()
        assert executable is not None
        guards, records = lowered.last.guards, lowered.records
        return _Compiled({key}, self.config, executable, micro, guards, records, capture_s, self._last_decided)

    def _executable(self, program: Program) -> Executable:
        assert self._comm is not None
        tagged = isinstance(self._comm, CheckedComm)
        if self.config.check_memory:
            watch = MemoryCheck(program, staged=self._comm.is_staged)
            return Executable(program, emit(program, tagged=tagged, watch=watch), self.state, self._comm, self.arena)
        placement = place(program, staged=self._comm.is_staged)
        check_overwrites(program, placement)
        self.arena.reserve(placement.num_bytes)
        return Executable(program, emit(program, placement, tagged=tagged), self.state, self._comm, self.arena)

    def _agree_on_machine(self, batch: Call) -> None:
        if self._machine is None:
            self._machine = self.agreement.of_first(partial(self._tell_machine, batch))

    def _tell_machine(self, batch: Call) -> str:
        """The machine as ``zgraph.which_hardware`` tells it; nothing where it is a GPU that is not known."""
        try:
            return tell(self._place(batch))
        except OptionError:
            return ""

    def _place(self, batch: Call) -> torch.device:
        """Where the step computes."""
        devices = [p.device for p in self.model.parameters() if not p.is_meta]
        return self._device() or (devices[0] if devices else batch_device(batch))

    @property
    def _hardware(self) -> Hardware | None:
        """Rank 0's machine, by which all ranks decide."""
        return told(self._machine, self.agreement.world) if self._machine else None

    def _device(self) -> torch.device | None:
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

    # -- a budget -------------------------------------------------------------------------------------------

    def _choose_options(self, budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the options that were chosen for such a step; choose them now, on all ranks, if none were."""
        assert self.optimizer is not None
        try:
            check_step(self.optimizer)
            calls = _calls(args, kwargs)
            leaves, spec = pytree.tree_flatten(calls)
            batch = repr(([fact_of(leaf) for leaf in leaves], spec))
        except Exception:  # noqa: BLE001 -- the step meets it again, and tells the other ranks
            return
        if batch not in self._decided:
            self.agreement.check("model.train_step(), whose options are to be chosen", {"the batch": batch})
            largest = max(calls, key=_num_elements)
            self._agree_on_machine(largest)
            if self._hardware is None:
                raise OptionError("this GPU is not known, so that memory= has no times", fix="run `zgraph calibrate`")
            if self._budget_bytes is None:
                self._budget_bytes = self.agreement.least(budget.num_bytes or self._free_bytes(largest))
            split = (
                MicroBatches([largest] * len(calls)) if len(args) == 1 and isinstance(args[0], MicroBatches) else None
            )
            call: Call = ((split,), {}) if split is not None else largest
            plan = Plan.from_json(self.agreement.of_first(partial(self._choose, budget, call, self._hardware)))
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
            return decide(search, self._budget_bytes).to_json()

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
        held = [*params, *(p.grad for p in params), *self.model.buffers(), *states, *stored, *_tensors(call)]
        tensors = [t for t in held if isinstance(t, torch.Tensor) and not t.is_meta]
        return free_bytes(self._place(call), self.agreement.world, tensors)

    def _check_budget(self, lowered: Lowered) -> None:
        """Refuse a program that takes more than its plan said, before it runs.

        Raises:
            BudgetError: with what is in the way.
        """
        if self._last_decided is None or self._hardware is None:
            return
        made, budget = predict(lowered, self._hardware, self.config.accumulate), self._last_decided.budget_bytes
        if made.reserved_bytes > budget:
            raise describe(self.model, lowered, made, _given(self.config), self._hardware, budget).refusal()

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
        if self.state.layout is None:
            return nullcontext()
        if self.state.divided:
            self.agreement.check("model()")
        return GatherOnUse(self.state)

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

    def last(self) -> _Compiled:
        if self._last is None:
            raise ZgraphError(
                "nothing is compiled yet", fix="call train_step once: the batch is part of what is compiled"
            )
        return self._last

    def plan(self) -> Plan:
        last = self.last()
        micro = last.micro.program if last.micro is not None else None
        lowered = Lowered(last.executable.program, micro, last.records)
        hardware = self._hardware or hardware_of(last.layout.buckets[0].device, self.agreement.world)
        made = predict(lowered, hardware, last.config.accumulate)
        if last.decided is None:
            return describe(self.model, lowered, made, _given(last.config), hardware, default_budget(hardware))
        decided = last.decided
        return describe(
            self.model,
            lowered,
            made,
            decided.options,
            hardware,
            decided.budget_bytes,
            rejected=decided.rejected,
            notes=decided.notes,
        )

    def stats(self) -> dict[str, Any]:
        last = self.last()
        states = [v for entries in self.state.opt.values() for v in entries.values() if isinstance(v, torch.Tensor)]
        return {
            "param_bytes": sum(t.nbytes for t in self.state.params.values()),
            "optimizer_state_bytes": sum(t.nbytes for t in states),
            "buffer_bytes": sum(b.nbytes for b in self.model.buffers()),
            "arena_bytes": self.arena.num_bytes,
            "copied_bytes": last.copied_bytes(self.config.accumulate),
            "collectives": self._comm.traffic.as_dict() if self._comm is not None else {},
            "num_nodes": last.executable.program.num_nodes(),
            "num_captures": self._num_captures,
            "capture_s": last.capture_s,
            "passes_s": sum(record.time_s + record.verify_s for record in last.records),
            **report(self.state.recipe),
        }


def _with_plan(plan: Plan | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a plan and those that are given beside it."""
    if plan is None:
        return options
    given: Any = plan
    if not isinstance(given, Plan):
        raise OptionError(f"plan is a {type(given).__name__}", fix="pass what zgraph.plan returns")
    wanted, planned = Config.from_options({**plan.options, **options}), plan.config
    for name in options:
        if getattr(wanted, name) != getattr(planned, name):
            raise OptionError(
                f"{name}={options[name]!r}, but the plan has {name}={getattr(planned, name)!r}",
                fix=f"leave it out, or give {name}={options[name]!r} to zgraph.plan",
            )
    return {**plan.options, **options}


def _check_plan(plan: Plan, group: dist.ProcessGroup | None, model: nn.Module) -> None:
    world = 1 if group is None else dist.get_world_size(group)
    if plan.world_size != world:
        raise OptionError(
            f"the plan is for {plan.world_size} ranks, and there are {world}", fix=f"plan with world_size={world}"
        )
    num_params = sum(p.numel() for p in model.parameters())
    if plan.num_params != num_params:
        raise OptionError(
            f"the plan is for a {plan.model} of {plan.num_params:,} parameters, and this model has {num_params:,}",
            fix="plan with this model",
        )
    if not plan.fits:
        raise plan.refusal()


def _given(config: Config) -> dict[str, Any]:
    """Options that differ from their defaults."""
    return {name: value for name, value in vars(config).items() if value != getattr(Config, name)}


def _calls(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """What ``train_step`` was given: one call, or those of a ``MicroBatches``."""
    if len(args) == 1 and not kwargs and isinstance(args[0], MicroBatches):
        return micro_batches(args, kwargs, len(args[0].batches))
    return [(args, kwargs)]


def _num_elements(call: Call) -> int:
    return sum(tensor.numel() for tensor in _tensors(call))


def _tensors(call: Call) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def functions_by_name(
    loss: Callable[..., Any] | None, weight: Callable[..., Any] | None, metrics: Mapping[str, Metric]
) -> dict[str, Callable[..., Any]]:
    """The user's functions that are part of a step."""
    given = {"loss": loss, "weight": weight, **{f"metric {name}": metric.function for name, metric in metrics.items()}}
    return {name: function for name, function in given.items() if function is not None}


def check_arguments(model: Any, optimizer: Any, loss: Any, weight: Any, passes: Sequence[Any], config: Config) -> None:
    """Refuse what cannot be trained.

    Raises:
        OptionError, OptimizerError, CaptureError: see ``compile``.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}", fix="pass a torch.nn.Module")
    if loss is not None and not callable(loss):
        raise OptionError(f"loss is a {type(loss).__name__}", fix="pass a function loss(output, *args, **kwargs)")
    if weight is not None and not callable(weight):
        raise OptionError(f"weight is a {type(weight).__name__}", fix="pass a function weight(*args, **kwargs)")
    if weight is not None and config.gradient_noise is not None:
        raise OptionError("gradient_noise with a weight, which would weigh it, too", fix="leave one of them out")
    params: Iterable[tuple[str, Any]] = model.named_parameters()
    lazy = [name for name, p in params if is_lazy(p)]
    if lazy:
        raise CaptureError(
            f"{lazy[0]} has no shape yet",
            fix="call the model once on a batch before zgraph.compile, as lazy modules need",
        )
    if isinstance(model, CompiledModule):
        raise OptionError("this model is compiled already", fix="compile each model once")
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptionError(f"optimizer is a {type(optimizer).__name__}", fix="pass a torch.optim.Optimizer")
        check_optimizer(model, optimizer)
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise CaptureError(
                "there is nothing to train: no parameter of the optimizer requires a gradient",
                fix="leave requires_grad=True on what should train",
            )
    if not isinstance(passes, Sequence):
        raise OptionError(f"passes is a {type(passes).__name__}", fix="give a list of passes")
    for p in passes:
        if not isinstance(p, Pass):
            raise OptionError(f"passes holds a {type(p).__name__}", fix="pass instances of subclasses of zgraph.Pass")
        if p.takes is not p.gives:
            raise OptionError(
                f"{p.name} takes a {p.takes.name} program and gives a {p.gives.name} one",
                fix="leave the stage as it was: takes and gives must be equal for a pass of your own",
            )
