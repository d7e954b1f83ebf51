"""The calls of a published step, in the order in which they are issued, with what each does: all that times depend on.

A step is captured with a few blocks, rewritten by zgraph's own passes as its trainer works (``peers_predicted``), and
kept as plain numbers, so that it can be played on a machine in milliseconds, as often as a fit needs. ``repeated`` puts
in as many blocks as the model has. The passes' proofs are left out for speed.
"""

from __future__ import annotations

import multiprocessing
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peers_predicted import Case
from torch import fx, nn

from zgraph import ops
from zgraph.accumulation import micro_step
from zgraph.allocator import reserved_bytes
from zgraph.capture import capture
from zgraph.codegen.kernel import Kernel
from zgraph.config import Config
from zgraph.cost import Cost
from zgraph.errors import CaptureError, ZgraphError
from zgraph.footprint import Footprint, Holding, Kind, footprint
from zgraph.fusion import any_call, fuse
from zgraph.hardware import Hardware
from zgraph.layout import Layout, make_buckets
from zgraph.passes import JoinLossBackward, OverwriteOperands, RecomputeModules, Unshard, default_passes
from zgraph.passes.bucket import param_specs
from zgraph.passes.recompute import EXPENSIVE
from zgraph.passes.tidy import remove_dead
from zgraph.passes.updates import Updates
from zgraph.pipeline import Pass
from zgraph.presets import Decoder
from zgraph.program import FlatGradient, Mesh, Phase, Program, Stage, operand, phase_of
from zgraph.timeline import COMPUTE, Issued, Timeline, play_issued
from zgraph.work import NOTHING, Work, num_bytes_of, works

DEPTH = 4
"""Blocks that a step is captured with. The first and the last differ from those in between, of which ``repeated`` needs
two: one to repeat, and one to see that it is like its neighbour."""

ATTENTION_BACKWARD = tuple(name.replace(".default", "_backward.default") for name in EXPENSIVE if "attention" in name)

GATHER, REDUCE = "gather", "reduce"
"""Streams of communication, whose memory is of pools of their own; named as the module of what is held."""

REPEATED = 1
"""The block that stands for all that are left out."""

UNLIMITED = 2**60


class _Half:
    """A module as its own ``forward`` finds it, with parameters in 16 bits."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._module, self._cast = module, {name for name, p in module._parameters.items() if p is not None}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if name in self._cast else value


def in_half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let every module cast its parameters where it reads them, as FSDP's mixed precision and DeepSpeed have it."""
    for module in model.modules():
        if module._parameters:
            module.forward = partial(type(module).forward, _Half(module, dtype))
    return model


class Adam(torch.optim.Optimizer):
    """What any AdamW reads and writes, in few calls: two moments of each parameter, and no count of steps."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].mul_(0.95).addcmul_(p.grad, p.grad, value=0.05)
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(1e-8), value=-1e-3)


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        position: in the program's graph.
        works: what it does.
        is_start: whether it starts a collective.
        waits_for: of a wait, the position of the call that starts what it waits for.
        is_update: whether it belongs to the optimizer's update.
    """

    position: int
    works: tuple[Work, ...]
    is_start: bool = False
    waits_for: int | None = None
    is_update: bool = False


@dataclass(frozen=True)
class Run:
    """Positions of a program that follow each other and belong to one block in one phase; to none if it is -1."""

    kind: str
    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Trace:
    """A program as calls, bytes and runs, in order of position.

    ``blocks`` says which block a bucket is of; ``ahead`` is that of ``peers_predicted.Software``.
    """

    calls: tuple[Call, ...]
    holdings: tuple[Holding, ...]
    runs: tuple[Run, ...]
    blocks: Mapping[str, int]
    ahead: int = 0

    @property
    def footprint(self) -> Footprint:
        """What it holds."""
        return Footprint(self.holdings, self.runs[-1].stop)

    def reserved_bytes(self) -> int:
        """What the caching allocator takes: a stream uses nothing that is free in another stream's segments."""
        last = self.runs[-1].stop - 1
        ends = Holding("end", Kind.BUFFERS, 0, last, last)
        pools: dict[str, list[Holding]] = {}
        gathers = [held.first for held in self.holdings if held.module == GATHER]
        for held in self.holdings:
            if held.module in (GATHER, REDUCE):
                later = gathers[bisect_right(gathers, held.last) :][: self.ahead]
                usable = replace(held, last=later[-1] - 1) if later else held
                pools.setdefault(held.module, []).append(usable)
            else:
                pools.setdefault("", []).append(held)
        return sum(reserved_bytes([*pool, ends]) for pool in pools.values())

    def play(self, cost_of: Callable[[tuple[Work, ...], bool], Cost], hardware: Hardware) -> Timeline:
        """Run it on a machine, where works, of the update or not, cost so much."""
        index = {call.position: i for i, call in enumerate(self.calls) if call.is_start}
        calls = [
            Issued(
                call,
                cost_of(call.works, call.is_update),
                "data" if call.is_start else COMPUTE,
                None if call.waits_for is None else index[call.waits_for],
            )
            for call in self.calls
        ]
        return play_issued(calls, hardware)


@dataclass(frozen=True)
class Step:
    """The programs of a step and how often each runs, of few blocks; ``layers`` is how many the model has."""

    programs: tuple[Trace, ...]
    repeats: tuple[int, ...]
    layers: int

    @property
    def whole(self) -> tuple[Trace, ...]:
        """The programs with all blocks."""
        return tuple(repeated(program, self.layers) for program in self.programs)

    def whole_step(self) -> Step:
        """The same, with all blocks in place already."""
        return replace(self, programs=self.whole)


def repeated(trace: Trace, layers: int) -> Trace:
    """A program of ``DEPTH`` blocks as one of ``layers`` blocks.

    What block ``REPEATED`` does is done again and again. What it makes for a block behind it or before it, a copy makes
    for that many copies later or earlier, and so is what is held between them; but what the first block makes for the
    last one is for the last of all.
    """
    run_of = [run for run in trace.runs for _ in range(run.start, run.stop)]
    if layers <= 1 + max(run.block for run in trace.runs):
        return trace
    by_name = {(run.kind, run.block): run for run in trace.runs}
    copies = layers - DEPTH + 1
    new: dict[tuple[int, int], int] = {}
    runs: list[Run] = []
    for run in trace.runs:
        times = range(copies) if run.block == REPEATED else range(1)
        if run.block == REPEATED:
            neighbour = by_name[run.kind, REPEATED + 1]
            times = times if neighbour.start > run.start else reversed(times)
        for copy in times:
            start = len(new)
            new |= {(position, copy): start + i for i, position in enumerate(range(run.start, run.stop))}
            block = run.block + copy if run.block <= REPEATED else run.block + copies - 1
            runs.append(Run(run.kind, block, start, len(new)))

    def beside(position: int, copy: int, other: int) -> int:
        """Where ``other`` is, seen from a copy of ``position``."""
        here, there = run_of[position], run_of[other]
        before = here.block + (copy if here.block == REPEATED else copies - 1 if here.block > REPEATED else 0)
        meant = before + there.block - here.block  # which block of the whole model
        block = min(max(meant - copies + 1, REPEATED), meant)
        target = by_name.get((there.kind, block))
        if min(here.block, there.block) < 0 or abs(there.block - here.block) == DEPTH - 1 or target is None:
            return new[other, 0]  # the first or the last block, or what belongs to none
        offset = min(other - there.start, target.stop - target.start - 1)
        return new[target.start + offset, meant - REPEATED if block == REPEATED else 0]

    def times(position: int) -> range:
        return range(copies) if run_of[position].block == REPEATED else range(1)

    calls = [
        replace(
            call,
            position=new[call.position, copy],
            waits_for=None if call.waits_for is None else beside(call.position, copy, call.waits_for),
        )
        for call in trace.calls
        for copy in times(call.position)
    ]
    whole = len(run_of) - 1
    kept = [
        replace(held, last=len(new) - 1)
        for held in trace.holdings
        if held.first == 0 and held.last == whole
        for _ in range(copies if trace.blocks.get(held.module) == REPEATED else 1)
    ]
    holdings = kept + [
        replace(held, first=new[held.first, copy], last=max(beside(held.first, copy, held.last), new[held.first, copy]))
        for held in trace.holdings
        if held.first or held.last < whole
        for copy in times(held.first)
    ]
    calls.sort(key=lambda call: call.position)
    holdings.sort(key=lambda held: held.first)
    return replace(trace, calls=tuple(calls), holdings=tuple(holdings), runs=tuple(runs))


def steps_of(cases: Sequence[Case], processes: int = 2) -> tuple[list[Step], dict[str, str]]:
    """The step of every case that can be captured, in order, and why the others cannot, by id.

    Cases of one capture go to one process.
    """
    alike: dict[Any, list[int]] = {}
    for index, case in enumerate(cases):
        alike.setdefault(_capture_key(case), []).append(index)
    groups = sorted(alike.values(), key=len, reverse=True)
    work = [[cases[index] for index in group] for group in groups]
    made: dict[int, Step] = {}
    failed: dict[str, str] = {}

    def take(results: Iterable[list[Step] | str]) -> None:
        for group, result in zip(groups, results, strict=True):
            if isinstance(result, str):
                failed.update({cases[index].id: result for index in group})
            else:
                made.update(zip(group, result, strict=True))

    if processes == 1 or len(groups) == 1:
        take(map(_attempt, work))
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            take(pool.imap(_attempt, work))
    return [made[index] for index in range(len(cases)) if index in made], failed


def _attempt(cases: Sequence[Case]) -> list[Step] | str:
    """Steps of cases that are captured alike, or why there are none."""
    try:
        steps = _steps_of_group(cases)
        for step in steps:
            _check_alike(step)
    except ZgraphError as error:
        return f"zgraph refuses it: {error.what}"
    return steps


def _check_alike(step: Step) -> None:
    """Refuse a step whose blocks cannot be repeated."""
    for program in step.programs:
        lengths = {(run.kind, run.block): run.stop - run.start for run in program.runs}
        for (kind, block), length in lengths.items():
            if block == REPEATED and step.layers > DEPTH and lengths.get((kind, REPEATED + 1)) != length:
                raise CaptureError(f"blocks {REPEATED} and {REPEATED + 1} differ in {kind}")


def _capture_key(case: Case) -> Any:
    return replace(case.model, layers=0), case.batch, case.seq, case.accumulate > 1, case.software.clip, case.dtype


def _steps_of_group(cases: Sequence[Case]) -> list[Step]:
    """Steps of cases that are captured alike."""
    torch.set_num_threads(1)
    depth = min(DEPTH, cases[0].model.layers)
    captured = _captured(cases[0], depth)
    known: dict[Any, tuple[Trace, ...]] = {}
    steps = []
    for case in cases:
        key = (case.software, case.zero, case.world, case.ranks, case.recompute, case.keeps_gathered)
        if key not in known:
            known[key] = _traces(captured, case)
        steps.append(Step(known[key], (case.accumulate - 1, 1)[-len(known[key]) :], case.model.layers))
    return steps


def _traces(captured: Program, case: Case) -> tuple[Trace, ...]:
    programs = list(_lowered(captured, case))
    return tuple(_trace(program, case, is_last=program is programs[-1]) for program in programs)


def _captured(case: Case, depth: int) -> Program:
    with torch.device("meta"):
        model = in_half(Decoder(case.model, depth), getattr(torch, case.dtype))
    optimizer = Adam(model.parameters())
    tokens = torch.empty(case.batch, case.seq, dtype=torch.int64)
    return capture(model, optimizer, (tokens, tokens), {}, config=_config(case), device=torch.device("cpu"))


def _config(case: Case) -> Config:
    return Config.from_options(
        {
            "zero": case.zero,
            "clip_norm": 1.0 if case.software.clip else None,
            "accumulate": min(case.accumulate, 2),  # more are alike
            "bucket_bytes": UNLIMITED,
            "prefetch": 0 if case.zero == 3 else None,  # see docs/accuracy.md
            "reduce_precision": "bf16" if case.software.reduce == "bfloat16" and case.world > 1 else None,
        }
    )


def _lowered(captured: Program, case: Case) -> Iterator[Program]:
    """The programs of a step as the case's software would run it: its micro-batches but the last, and the last."""
    config, mesh = _config(case), Mesh(case.world)
    programs = [captured] if case.accumulate == 1 else [micro_step(captured), captured]
    layout = layout_by_block(captured, case.world)
    for program in programs:
        program = program.clone()
        # What others' software gathers twice, it gathers twice: it does not look for room at the peak. Nor does
        # autograd join its operators, or write over what they read.
        own = (Unshard, JoinLossBackward, OverwriteOperands)
        first, *passes = (p for p in default_passes(config, mesh, layout) if not isinstance(p, own))
        parts = {bucket.name: _part_of(bucket.segments[0].name) for bucket in layout.buckets}
        last_block = str(max(int(part) for part in parts.values() if part.isdecimal()))
        kept = [
            name
            for name, part in parts.items()
            if case.keeps_gathered
            or (case.software.keeps_last and part == last_block)
            or (case.software.keeps_root and not part.isdecimal())
        ]
        if kept:
            passes.insert([one.name for one in passes].index("Overlap"), GatherOnce(tuple(kept)))
        if case.zero == 3 and not case.keeps_gathered:
            passes.insert([one.name for one in passes].index("Overlap") + 1, GatherInBackward())
        for one in (first, *_recomputation(case), *passes):
            with program.made_by(one.name):
                one.rewrite(program)
            program.stage = one.gives
        yield program


@dataclass(frozen=True)
class GatherOnce(Pass):
    """Let backward read what forward has gathered of these buckets; of all of them, it is FSDP's SHARD_GRAD_OP."""

    buckets: tuple[str, ...]

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        gathered: dict[fx.Node, fx.Node] = {}
        for wait in program.graph.find_nodes(op="call_function", target=ops.wait):
            shard = operand(operand(wait))
            if operand(wait).target is ops.all_gather and phase_of(wait) is not Phase.UPDATE:
                source = operand(shard) if shard.target is torch.ops.aten._to_copy.default else shard
                if source.op == "placeholder" and source.meta["input"].name not in self.buckets:
                    continue
                first = gathered.setdefault(source, wait)
                if first is not wait:
                    wait.replace_all_uses_with(first)
        remove_dead(program)


@dataclass(frozen=True)
class GatherInBackward(Pass):
    """Let what backward reads be gathered from its first call in a module on: FSDP and DeepSpeed start in its hooks."""

    takes, gives = Stage.SCHEDULED, Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        early: list[fx.Node] = []
        for node in program.graph.nodes:
            if node.op != "call_function" or phase_of(node) is not Phase.BACKWARD:
                continue
            if node.target is ops.all_gather:
                early.append(node)
            elif node.target is ops.wait and operand(node) in early:
                return  # it is read by the first calls of all
            elif node.meta["origin"].module and node.target is not ops.wait:
                for start in early:
                    node.prepend(start)
                return


def _recomputation(case: Case) -> Iterator[RecomputeModules]:
    if case.recompute == "blocks":
        yield RecomputeModules()
    elif case.recompute is not None:
        second = ("aten.mm.default",) if case.recompute == "operators" and case.software.every_second else ()
        # torch's partitioner makes nothing again that products and attention of backward read.
        read_in_backward = (*EXPENSIVE, *ATTENTION_BACKWARD) if case.recompute == "compiler" else ()
        yield RecomputeModules(keep=EXPENSIVE, every_second=second, operands_of=read_in_backward)


def layout_by_block(program: Program, world: int) -> Layout:
    """A bucket for each block, one for the embeddings, and one for what comes behind the blocks."""
    specs = param_specs(program, Updates(program))
    grouped = [replace(spec, group=(spec.group, _part_of(spec.name))) for spec in specs]
    return Layout(make_buckets(grouped, world, UNLIMITED), world)


def _part_of(name: str) -> str:
    found = re.search(r"layers\.(\d+)\.", name)
    return found[1] if found else "embedding" if re.search("embed|places", name) else "head"


def _trace(program: Program, case: Case, *, is_last: bool) -> Trace:
    software = case.software
    choices = {"all": any_call, "blocks": _is_of_block_or_copy_in, "": _is_copy_in}
    fusion = fuse(program, choices[software.fused])
    calls: list[Call] = []
    holdings = []
    nodes = list(program.graph.nodes)
    runs = _runs(program)
    until = (
        _cached(nodes, runs) if software.every_second and not software.fused and case.recompute == "operators" else {}
    )
    blocks = _blocks(program)
    end_of_backward = max((i for i, node in enumerate(nodes) if phase_of(node) is Phase.BACKWARD), default=0)
    for held in footprint(program, staged=False, fusion=fusion).holdings:
        node = nodes[held.first]
        if held.first == 0 and node.op == "placeholder":
            bucket = re.search(r"bucket\d+", held.what)
            holdings.append(replace(held, module=bucket[0] if bucket else held.module))
        elif node.target is ops.all_gather and phase_of(node) is not Phase.UPDATE:
            # What is gathered is memory of the stream that gathers; FSDP2 copies it from there to each parameter.
            arrived = next(i for i in range(held.first, held.last + 1) if nodes[i] in node.users)
            last = held.last
            if software.keeps_root and blocks[held.module] < 0:
                last = max(last, end_of_backward)
            if software.copies_out:
                holdings += [replace(held, module=GATHER, last=arrived), replace(held, first=arrived, last=last)]
            else:
                holdings.append(replace(held, module=GATHER, last=last))
        elif isinstance(node.meta.get("holds"), FlatGradient) or node.target is ops.reduce_scatter:
            holdings.append(replace(held, module=REDUCE))
        else:
            holdings.append(replace(held, last=max(held.last, until.get(held.first, 0))))
    position = {node: i for i, node in enumerate(nodes)}
    for node, place in position.items():
        if node.op != "call_function":
            continue
        is_update = phase_of(node) is Phase.UPDATE
        if node.target is ops.wait:
            start = operand(node)
            if not is_last and software.reduces_last and start.target is not ops.all_gather:
                continue
            calls.append(Call(place, (), waits_for=position[start]))
            if software.copies_out and start.target is ops.all_gather and not is_update:
                size = num_bytes_of(node.meta["val"])
                calls.append(Call(place, (Work("copy", read_bytes=size, written_bytes=size),)))
            continue
        done = fusion.works.get(node) or works(node, case.world)
        if isinstance(node.target, Kernel):  # of the optimizer, which these trainers run in few calls
            done = tuple(replace(work, num_operators=1, sliced_numel=0) for work in done)
        if node.target in ops.STARTS:
            if is_last or not software.reduces_last or node.target is ops.all_gather:
                calls.append(Call(place, tuple(_as_sent(work, node, case) for work in done), is_start=True))
        elif any(work.unit != NOTHING for work in done):
            calls.append(Call(place, done, is_update=is_update))
    holdings.sort(key=lambda holding: holding.first)
    return Trace(tuple(calls), tuple(holdings), tuple(runs), blocks, software.ahead)


def _cached(nodes: Sequence[fx.Node], runs: Sequence[Run]) -> dict[int, int]:
    """Positions of the products whose results eager selective checkpointing keeps, and until when.

    It keeps every second one until its block is computed again, whether backward reads it or not.
    """
    begins = {run.block: run.start for run in runs if run.kind == "backward"}
    counts: Counter[int] = Counter()
    until: dict[int, int] = {}
    for position, node in enumerate(nodes):
        if node.target is torch.ops.aten.mm.default and phase_of(node) is Phase.FORWARD:
            block = _block_of(node.meta["origin"].module)
            counts[block] += 1
            if block in begins and block >= 0 and counts[block] % 2:
                until[position] = begins[block]
    return until


def _runs(program: Program) -> list[Run]:
    """Where blocks begin: with their first own call in forward, in backward and in the update."""
    blocks = _blocks(program)
    nodes = list(program.graph.nodes)
    begins: dict[tuple[str, int], int] = {}
    late = max((i for i, n in enumerate(nodes) if n.op == "call_function" and phase_of(n) is Phase.BACKWARD), default=0)
    for index, node in enumerate(nodes):
        if node.op != "call_function" or node.target in (*ops.STARTS, ops.wait):
            continue
        phase, module = phase_of(node), node.meta["origin"].module
        if phase is Phase.UPDATE:
            if index > late and isinstance(node.target, Kernel):
                begins.setdefault(("update", blocks.get(module, -1)), index)
        elif phase is not None and module in blocks:
            continue
        elif phase is not None and module:
            block = _block_of(module)
            kind = phase.name.lower()
            if block >= 0 or ("forward", 0) in begins:
                begins.setdefault((kind, block), index)
    order = sorted((index, kind, block) for (kind, block), index in begins.items())
    runs = [Run("start", -1, 0, order[0][0])]
    for (index, kind, block), (stop, _, _) in zip(order, [*order[1:], (len(nodes), "", 0)], strict=True):
        runs.append(Run(kind, block, index, stop))
    return runs


def _blocks(program: Program) -> dict[str, int]:
    assert program.layout is not None
    return {bucket.name: _block_of(bucket.segments[0].name) for bucket in program.layout.buckets}


def _block_of(name: str) -> int:
    found = re.search(r"layers\.(\d+)(\.|$)", name)
    return int(found[1]) if found else -1


def _as_sent(work: Work, node: fx.Node, case: Case) -> Work:
    """A collective among the ranks that it is among, in the dtype in which the software sends."""
    if work.collective == "all_gather":
        is_whole = case.software.gathers_half and node.meta["val"].dtype is torch.float32
        return replace(work, read_bytes=work.read_bytes // 2) if is_whole else work
    # What is averaged over all ranks, though states are shared by some: in a group of nodes, and then between groups.
    return replace(work, world=case.ranks, collective="all_reduce" if case.ranks != case.world else work.collective)


def _is_copy_in(node: fx.Node) -> bool:
    """Whether a call is part of copying gradients into a flat buffer, which eager trainers do in one kernel, too."""
    if isinstance(node.meta.get("holds"), FlatGradient):
        return True
    return node.target is torch.ops.aten._to_copy.default and all(_goes_in(user) for user in node.users)


def _is_of_block_or_copy_in(node: fx.Node) -> bool:
    return _block_of(node.meta["origin"].module) >= 0 or _is_copy_in(node)


def _goes_in(user: fx.Node) -> bool:
    if isinstance(user.meta.get("holds"), FlatGradient):
        return True
    return ops.view_of(user) is not None and bool(user.users) and all(_goes_in(reader) for reader in user.users)
