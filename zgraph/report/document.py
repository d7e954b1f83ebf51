"""What a report says, as plain data: ``report.json``, which the page and the trace are made of.

``docs/report.md`` describes the fields. Whoever reads a report checks ``version``, which grows where a field changes
its meaning or goes away, and stays where one is added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.host_kernel import HostKernel
from zgraph.codegen.listing import weighed_as_data
from zgraph.config import Config
from zgraph.cost import Cost
from zgraph.errors import StateError, first_line
from zgraph.files import beside
from zgraph.footprint import Kind
from zgraph.hardware import MOVERS, UPDATER, Hardware
from zgraph.lower import Lowered
from zgraph.plans import Plan, show_bytes, show_s
from zgraph.predict import costs_of
from zgraph.program import Program
from zgraph.report.chrome_trace import chrome_trace
from zgraph.report.page import page
from zgraph.report.recorder import Recorder
from zgraph.stopwatch import Measured
from zgraph.timeline import COMPUTE, INWARD, OUTWARD, PROCESSORS, lane_of, play

SCHEMA, VERSION = "zgraph-report", 2

_REQUIRED = ("plan", "options", "machine", "mesh", "tables", "programs", "digest", "notes", "would_free", "is_proved")


def files_of(path: str | Path) -> tuple[Path, Path, Path]:
    """The page at a path, its data and its trace.

    Raises:
        StateError: no page can have that name, or there is no such folder.
    """
    given: object = path
    if not isinstance(given, (str, Path)) or not Path(given).name or "\0" in str(given):
        raise StateError(f"{given!r} is no name of a page", fix="give a name such as 'report.html'")
    made = Path(given)
    files = made, made.with_suffix(".json"), made.with_suffix(".trace.json")
    if len(set(files)) < len(files):
        raise StateError(f"{made} would be both the page and its data", fix="give a name such as report.html")
    if not made.parent.is_dir():
        raise StateError(f"{made} cannot be written: there is no folder {made.parent}", fix="make it, or give another")
    return files


@dataclass(frozen=True)
class Report:
    """Everything about a training step that a person may want to look at.

    Attributes:
        document: plain data, as in ``report.json``.
    """

    document: Mapping[str, Any]

    def __repr__(self) -> str:
        plan = self.document["plan"]
        step, peak = show_s(plan["chosen"]["step_s"]), show_bytes(plan["chosen"]["peak_bytes"])
        return f"<Report of {plan['model']} on {plan['world_size']} x {plan['hardware']}: step {step}, peak {peak}>"

    def to_json(self) -> str:
        """The document; seconds and bytes are numbers."""
        return json.dumps(self.document, separators=(",", ":"), allow_nan=False)

    def to_html(self) -> str:
        """One page that opens from a disk and asks nothing of a network."""
        return page(self.document)

    def to_trace(self) -> str:
        """Predicted lanes in the format of Chrome's traces, which Perfetto opens."""
        return json.dumps(chrome_trace(self.document), separators=(",", ":"), allow_nan=False)

    def write(self, path: str | Path) -> tuple[Path, Path, Path]:
        """Write the page, and beside it the same as ``.json`` and ``.trace.json``.

        Args:
            path: of the page, such as ``report.html``.

        Returns:
            Where the three are.

        Raises:
            StateError: they cannot be written.
        """
        files = files_of(path)
        try:
            for file, text in zip(files, (self.to_html(), self.to_json(), self.to_trace()), strict=True):
                with beside(file) as partial:  # ranks that write the same file do not mix
                    partial.write_text(text, encoding="utf-8")
                    partial.replace(file)
        except OSError as error:
            raise StateError(
                f"{file} cannot be written: {error.strerror}",
                fix="give a path in a folder that exists and may be written to",
            ) from error
        return files

    @property
    def plan(self) -> Plan:
        """What the step is predicted to take, and what else was considered."""
        return Plan.from_json(json.dumps(self.document["plan"]))

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """A saved ``report.json``.

        Raises:
            StateError: it cannot be read, is something else, or is of another version.
        """
        again = "make it anew with model.report() or `zgraph report`"
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StateError(
                f"{path} cannot be read: {error.strerror}", fix="give the path of a report.json"
            ) from error
        except ValueError as error:
            raise StateError(
                f"{path} is not JSON: {first_line(error)}", fix="give the path of a report.json"
            ) from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise StateError(f"{path} is not a report: it has no schema {SCHEMA!r}", fix="give a report.json")
        if document.get("version") != VERSION:
            raise StateError(
                f"{path} is of version {document.get('version')!r}; this zgraph reads {VERSION}", fix=again
            )
        missing = [name for name in _REQUIRED if name not in document]
        if missing:
            raise StateError(f"{path} is damaged: it has no {missing[0]!r}", fix=again)
        return cls(document)


def make_report(
    recorder: Recorder,
    lowered: Lowered,
    plan: Plan,
    config: Config,
    hardware: Hardware,
    *,
    proved: bool,
    digest: bytes | None = None,
    notes: Sequence[str] = (),
    measured: Sequence[Measured] = (),
) -> Report:
    """The report of a step whose passes a recorder has seen.

    Args:
        recorder: which was the ``watch`` of ``zgraph.lower.lower``.
        lowered: what that gave.
        plan: what the step is predicted to take.
        config: its options.
        hardware: the machine that it is predicted for.
        proved: whether each pass was.
        digest: of the programs that ranks compared before they ran; of ``lowered`` if None.
        notes: what else a reader should know.
        measured: of each of the programs that ran; nothing if they were not.
    """
    recorder.add_records(lowered.records, proved=proved)
    mesh = lowered.last.mesh
    last, *micro = recorder.programs  # the last micro-batch's is made first, and runs last
    names = ("step",) if not micro else ("every micro-batch but the last", "last micro-batch")
    repeats = (config.accumulate - 1, 1)[-len(names) :]
    calls = [node for made in lowered.programs for node in made.graph.nodes if node.target in ops.TRANSFERS]
    tiers = sorted(set(map(ops.tier_of, calls)))
    updates_there = any(isinstance(node.target, HostKernel) for made in lowered.programs for node in made.graph.nodes)
    programs = [
        {
            "name": name,
            "repeats": times,
            **program,
            "if_faster": if_faster(made, hardware, tiers, updates_there=updates_there),
            "kernels": weighed_as_data(made),
        }
        for name, times, program, made in zip(names, repeats, (*micro, last), lowered.programs, strict=True)
    ]
    for program, ran in zip(programs if measured else [], measured, strict=True):
        program["measured"] = {
            "position": list(ran.numbers),
            "end_s": list(ran.ends),
            "steps_s": list(ran.steps),
        }
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "made_with": {"zgraph": version("zgraph-compiler"), "torch": torch.__version__},
        "plan": json.loads(plan.to_json()),
        "options": {name: _plain(value) for name, value in vars(config).items()},
        "machine": {
            "name": hardware.name,
            "device_type": hardware.device_type,
            "launch_s": hardware.launch_s,
            "runs_ahead": hardware.device_type != "cpu",
        },
        "mesh": {"size": mesh.size, "axes": mesh.axes},
        "digest": hashlib.sha256(digest if digest is not None else lowered.digest()).hexdigest(),
        "is_proved": proved,
        "notes": [*plan.notes, *notes],
        "would_free": would_free(config, mesh.size),
        "tables": recorder.tables(),
        "programs": programs,
    }
    return Report(document)


def if_faster(
    program: Program, hardware: Hardware, tiers: Sequence[str], *, updates_there: bool = False
) -> dict[str, float]:
    """Seconds that a program would take if one of computing, links, the host, and what it has to do with tiers were
    twice as fast.

    Args:
        program: one of a step.
        hardware: the machine.
        tiers: the lower ones that any program of the step moves something to or from.
        updates_there: whether the host's processors update anything in any of them.
    """
    costs = costs_of(program, hardware)

    def step_s(*, computing: float = 1.0, links: float = 1.0, host: float = 1.0, faster: str = "") -> float:
        transfers = {lane[tier]: 0.5 if tier == faster else 1.0 for lane in (INWARD, OUTWARD) for tier in lane}
        factors = {COMPUTE: computing, PROCESSORS: 0.5 if faster == PROCESSORS else 1.0, **transfers}

        def cost_of(node: fx.Node) -> Cost:
            cost = costs.of(node)
            return replace(cost, seconds=cost.seconds * factors.get(lane_of(node), links))

        return play(program, replace(hardware, launch_s=hardware.launch_s * host), cost_of=cost_of).step_s

    found = {"computing": step_s(computing=0.5), "links": step_s(links=0.5), "the host": step_s(host=0.5)}
    processors = {UPDATER: step_s(faster=PROCESSORS)} if updates_there else {}
    return {**found, **{MOVERS[tier]: step_s(faster=tier) for tier in tiers}, **processors}


def would_free(config: Config, world: int) -> dict[str, str]:
    """For each kind of bytes the options that would make them fewer, where there are any left."""
    found: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    if world > 1:
        if config.zero < 3:
            found[Kind.PARAMS].append(f"zero=3 divides them over {world} ranks")
        if config.zero < 2:
            found[Kind.GRADIENTS].append(f"zero=2 divides them over {world} ranks")
        if config.zero < 1:
            found[Kind.STATE].append(f"zero=1 divides it over {world} ranks")
        if config.keep_gathered:
            found[Kind.GATHERED].append("keep_gathered=False gathers them again for backward")
        if config.unshard:
            found[Kind.GATHERED].append("unshard=0 gathers all of them again for backward")
        if config.zero == 3:
            found[Kind.GATHERED].append("smaller bucket_bytes has fewer there at once")
            if config.in_flight != 0 and config.prefetch is None:
                found[Kind.GATHERED].append("in_flight=0 gathers nothing that would raise the peak")
        found[Kind.COMMUNICATION].append("smaller bucket_bytes sends less at once")
    if config.state_precision is None:
        found[Kind.STATE].append("state_precision='int8' takes about a fourth (it rounds)")
    if config.precision is None:
        for kind in (Kind.ACTIVATIONS, Kind.GATHERED):
            found[kind].append("precision='bf16' takes half (it rounds)")
    if config.recompute != "blocks" and config.recompute != 1:
        found[Kind.ACTIVATIONS].append("recompute='blocks', or a number up to 1, computes some again in backward")
    for kind in (Kind.ACTIVATIONS, Kind.TEMPORARIES):
        found[kind].append("more micro-batches (accumulate) or fewer rows in a batch")
    return {kind.value: "; ".join(ways) for kind, ways in found.items() if ways}


def _plain(value: Any) -> Any:
    """A value as JSON has it; what it has no form for as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


__all__ = ["SCHEMA", "VERSION", "Report", "if_faster", "make_report", "would_free"]
