"""What a compiled model tells of the step that ran last: its plan, its report, its numbers, and files that run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zgraph.batches import Call, MicroBatches, call_of, micro_batches, tensors_of, with_tensors_on
from zgraph.export import check_batch, check_exportable, rank_of, write
from zgraph.hardware import LOWER_TIERS, Hardware
from zgraph.lower import lower
from zgraph.plans import Plan, default_budget, describe
from zgraph.predict import predict
from zgraph.report import Recorder, Report, make_report
from zgraph.runtime import Compiled, Runtime
from zgraph.skipping import report
from zgraph.stopwatch import Measured
from zgraph.tiers import Moved, Stored
from zgraph.update import hyperparameters
from zgraph.which_hardware import hardware_of


def plan_of(runtime: Runtime) -> Plan:
    """What the last step is predicted to take: see ``CompiledModule.plan``."""
    last, hardware = runtime.last(), _hardware(runtime)
    made, decided = predict(last.lowered, hardware, last.config.accumulate), last.decided
    if decided is None:
        budget = default_budget(hardware)
        return describe(runtime.model, last.lowered, made, last.config.given(), hardware, budget)
    return describe(
        runtime.model,
        last.lowered,
        made,
        decided.options,
        hardware,
        decided.budget_bytes,
        rejected=decided.rejected,
        notes=decided.notes,
    )


def report_of(runtime: Runtime) -> Report:
    """Captures and rewrites the last step once more, and looks on: nothing is kept for it before."""
    last, hardware = runtime.last(), _hardware(runtime)
    plan, recorder = plan_of(runtime), Recorder(hardware)
    captured = runtime.capture(*with_tensors_on(runtime.device(), last.call), last.config)
    lowered = lower(
        captured, last.config, runtime.mesh, last.layout, runtime.passes, hardware=runtime.hardware, watch=recorder
    )
    notes = []
    if [program.text() for program in lowered.programs] != [program.text() for program in last.lowered.programs]:
        notes.append("the step has changed since it last ran: this is the one that would be compiled now")
    return make_report(
        recorder,
        lowered,
        plan,
        last.config,
        hardware,
        proved=True,
        digest=last.lowered.digest(),
        notes=notes,
        measured=[] if notes else _measured(runtime, last),
    )


def export(runtime: Runtime, directory: Path, batch: Any) -> list[Path]:
    """Write the last step, to run without zgraph: see ``CompiledModule.export``."""
    last = runtime.last()
    programs = [each.program for each in last.executables]
    check_exportable(programs, last.layout.buckets[0].device, last.config)
    given = None
    if batch is not None:
        whole: Call = ((batch,), {}) if isinstance(batch, MicroBatches) else call_of(batch, "the batch")
        given = [tensors_of(call) for call in micro_batches(*whole, last.config.accumulate)]
        for tensors, program in zip(given, [*programs[:1] * (len(given) - 1), programs[-1]], strict=True):
            check_batch(program, tensors)
    assert runtime.optimizer is not None
    with torch.no_grad():
        state: dict[str, Any] = {}
        for each in last.executables:
            state |= each.state()
    return write(
        directory,
        [(each.program, each.step) for each in last.executables],
        state=state,
        batch=given,
        hypers={**hyperparameters(runtime.optimizer), **last.config.inputs(runtime.numbers, runtime.agreement.world)},
        num_micro_batches=last.config.accumulate,
        arena_bytes=runtime.arena.num_bytes,
        rank=rank_of(runtime.state.group),
    )


def stats_of(runtime: Runtime) -> dict[str, Any]:
    """Numbers of this rank: see ``CompiledModule.stats``."""
    last, state = runtime.last(), runtime.state
    entries = [v for each in state.opt.values() for v in each.values()]
    stored = [*state.params.values(), *state.gradients.values(), *entries]
    return {
        "param_bytes": _num_bytes(state.params.values()),
        "optimizer_state_bytes": _num_bytes(entries),
        **_away(runtime, stored),
        "spilled_bytes": runtime.lower_tiers.spill_rooms.num_bytes,
        "buffer_bytes": _num_bytes(runtime.model.buffers()),
        "arena_bytes": runtime.arena.num_bytes,
        "copied_bytes": last.copied_bytes(runtime.config.accumulate),
        "collectives": runtime.comm.traffic.as_dict() if runtime.comm is not None else {},
        "num_nodes": last.executable.program.num_nodes(),
        "num_captures": runtime.num_captures,
        "capture_s": last.capture_s,
        "passes_s": sum(record.time_s + record.verify_s for record in last.records),
        **report(state.recipe),
    }


def _away(runtime: Runtime, stored: Sequence[Any]) -> dict[str, int]:
    """What lies on each lower tier, and what the last step moved from and to it."""
    found: dict[str, int] = {}
    for name in LOWER_TIERS:
        on_it = [value for value in stored if isinstance(value, Stored) and value.tier.name == name]
        moved = runtime.lower_tiers.moved.get(name, Moved())
        found[f"{name}_bytes"] = sum(value.nbytes for value in on_it)
        found[f"{name}_read_bytes"], found[f"{name}_written_bytes"] = moved.read_bytes, moved.written_bytes
    return found


def _num_bytes(values: Any) -> int:
    """In memory."""
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _hardware(runtime: Runtime) -> Hardware:
    """The machine that the last step ran on.

    Raises:
        OptionError: it is a GPU that is not known.
    """
    return runtime.hardware or hardware_of(runtime.last().layout.buckets[0].device, runtime.agreement.world)


def _measured(runtime: Runtime, last: Compiled) -> Sequence[Measured]:
    """Of each of a step's programs; nothing where one of them was not measured."""
    found = [measured for each in last.executables if (measured := runtime.measured(each)) is not None]
    return found if len(found) == len(last.executables) else ()
