"""One training step on GPUs, zgraph beside PyTorch: losses, seconds, bytes; and what zgraph predicted of its own.

    python benchmarks/gpu.py                                      a GPT of 354M parameters on one GPU
    torchrun --nproc-per-node 8 benchmarks/gpu.py                 on eight
    python benchmarks/gpu.py --shape 2048,24,16,1024,50304,4      another: width, layers, heads, tokens, ...
    python benchmarks/gpu.py --peers eager zgraph-3:recompute=blocks --json OUT
    python benchmarks/gpu.py --peers fsdp2-offload zgraph-3:offload=optimizer+parameters:load_ahead=1
    python benchmarks/gpu.py --peers fsdp2-offload zgraph-3:offload=optimizer+parameters:host_updates=1

All train in bfloat16 on float32 parameters: autocast, FSDP2's mixed precision, zgraph's ``precision="bf16"``. Peers run
one after the other, in turns; seconds are medians of steps timed by the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from models import GPT, Shape, build_batch, build_model
from peers import ADAMW, parse_peer
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

import zgraph
from zgraph.errors import ZgraphError

GPT2_MEDIUM = Shape(width=1024, layers=24, heads=16, tokens=1024, vocabulary=50304, sequences=8)

Batch = tuple[Tensor, Tensor]


@dataclass
class Result:
    """Of one peer, over all turns.

    Attributes:
        losses: of the first steps of the first turn, averaged over ranks.
        step_s: of each timed step.
        live_bytes, reserved_bytes: the most that tensors held, and the allocator took, in timed steps.
        predicted: seconds, live and reserved bytes, of zgraph.
    """

    peer: str
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    live_bytes: int = 0
    reserved_bytes: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


def _torch_step(model: torch.nn.Module, batch: Batch) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = model(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _compiled(model: GPT, batch: Batch) -> Callable[[], Tensor]:
    model.compile()
    return _torch_step(model, batch)


def _fsdp2(model: GPT, batch: Batch, *, compiled: bool = False, offload: bool = False) -> Callable[[], Tensor]:
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, **options)
    fully_shard([model.token_embedding, model.position_embedding], **options)
    fully_shard([model.norm, model.head], **options)
    fully_shard(model, **options)
    return _torch_step(model, batch)


PEERS: dict[str, Callable[[GPT, Batch], Callable[[], Tensor]]] = {
    "eager": _torch_step,
    "compiled": _compiled,
    "fsdp2": _fsdp2,
    "fsdp2-compiled": lambda model, batch: _fsdp2(model, batch, compiled=True),
    "fsdp2-offload": lambda model, batch: _fsdp2(model, batch, offload=True),
}
"""Besides those of zgraph, which are named as ``benchmarks/step.py`` names them."""


def options_of(name: str) -> dict[str, Any]:
    """What a peer's name says of how zgraph compiles; ``offload=optimizer+parameters`` puts those on the host."""
    options: dict[str, Any] = {"precision": "bf16", **parse_peer(name).build.keywords}  # type: ignore[attr-defined]
    if options.get("offload", "auto") != "auto":
        options["offload"] = dict.fromkeys(options["offload"].split("+"), "host")
    for switch in {"host_updates", "load_ahead"} & options.keys():
        options[switch] = bool(options[switch])
    return options


def take_turn(name: str, shape: Shape, rounds: int, result: Result) -> None:
    """Train a fresh model, and add what was measured to ``result``."""
    device = torch.device("cuda", torch.cuda.current_device())
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    before = torch.cuda.memory_allocated(device)
    model: Any = build_model(shape, str(device))
    tokens, targets = (each.to(device) for each in build_batch(shape, world, range(rank, rank + 1)))
    if name in PEERS:
        step = PEERS[name](model, (tokens, targets))
    else:
        model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters(), **ADAMW), **options_of(name))

        def step() -> Tensor:
            loss: Tensor = model.train_step(tokens, targets)
            return loss

    losses = [step() for _ in range(4)]
    if not result.losses:
        for loss in losses:
            if world > 1:
                dist.all_reduce(loss, op=dist.ReduceOp.AVG)
        result.losses = [loss.item() for loss in losses]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    result.step_s += [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    result.live_bytes = max(result.live_bytes, torch.cuda.max_memory_allocated(device) - before)
    result.reserved_bytes = max(result.reserved_bytes, torch.cuda.max_memory_reserved(device))
    if name not in PEERS and not result.predicted:
        plan = model.plan.chosen
        result.predicted = {"step_s": plan.step_s, "live": plan.peak_bytes, "reserved": plan.reserved_bytes}


def compare(names: Sequence[str], shape: Shape, turns: int, rounds: int, path: Path | None) -> list[Result]:
    """Each peer in turn, so many times; what is known after each turn goes to a file, if there is to be one."""
    results = {name: Result(name) for name in names}
    for name in [name for _ in range(turns) for name in names]:
        if results[name].problem is not None:
            continue
        try:
            take_turn(name, shape, rounds, results[name])
        except (ZgraphError, torch.OutOfMemoryError) as error:
            results[name].problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        if not dist.is_initialized() or dist.get_rank() == 0:
            if path is not None:
                path.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in results.values()))
            print(f"{name}: {results[name].problem or f'{median(results[name].step_s) * 1e3:.1f} ms'}", file=sys.stderr)
    return list(results.values())


def as_table(results: Sequence[Result]) -> str:
    """Markdown: each peer, its step as a ratio to the first's, and predictions with their errors."""
    columns = ["peer", "step", "ratio", "live peak", "reserved", "largest difference of losses", "predicted"]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    done = [result for result in results if result.problem is None]
    for result in results:
        if result.problem is not None:
            lines.append(f"| {result.peer} | {result.problem} |")
            continue
        step_s, first_s = median(result.step_s), median(done[0].step_s)
        difference = max(abs(a - b) / abs(b) for a, b in zip(result.losses, done[0].losses, strict=True))
        measured = {"step_s": step_s, "live": result.live_bytes, "reserved": result.reserved_bytes}
        errors = ", ".join(f"{key} {value / measured[key] - 1:+.1%}" for key, value in result.predicted.items())
        cells = [result.peer, f"{step_s * 1e3:.1f} ms", f"{step_s / first_s:.2f}", f"{result.live_bytes / 1e9:.2f} GB"]
        cells += [f"{result.reserved_bytes / 1e9:.2f} GB", f"{difference:.1e}", errors]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["eager", "compiled", "fsdp2", "fsdp2-compiled", "zgraph-0", "zgraph-3"]
    parser.add_argument("--peers", nargs="+", default=default, metavar="PEER")
    parser.add_argument("--shape", type=Shape.parse, default=GPT2_MEDIUM, metavar="SHAPE")
    parser.add_argument("--turns", type=int, default=2, help="of all peers (default: 2)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of a turn (default: 20)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="every figure of every peer, one JSON object a line")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: there is no GPU here; benchmarks/step.py compares on a CPU", file=sys.stderr)
        return 2
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # fully_shard needs a process group, also of one rank.
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29507"}
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    try:
        results = compare(options.peers, options.shape, options.turns, options.rounds, options.json)
        if dist.get_rank() == 0:
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dist.get_world_size()} GPU(s)")
            print(as_table(results))
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
