"""The command line of the benchmark: options in, one table and JSON lines out.

The exit status is 1 when a peer fails, or trains to other losses than the rest: times of different computations are
not worth comparing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from cgroups import CapError, MemoryCap
from comparison import Entry, Result, Settings, Spread, compare, loss_difference
from models import SHAPES, Shape
from network import enter_private_network
from peers import PEERS, parse_peer
from rich import box
from rich.console import Console
from rich.table import Table
from scaling import LAYERS_STEP, Reach, Slope, find_reach, measure_slopes

LOSS_TOLERANCE = 1e-4  # relative; summing float32 in another order makes about 1e-6
LARGE_MODEL_PARAMETERS = 50_000_000
LARGE_MODEL_PEERS = ["local", "fsdp2", "zgraph-3"]
CAP_PEERS = ["ddp", "fsdp2", "fsdp2-tuned", "zgraph-3", "zgraph-3-tuned:bucket_bytes=4MiB"]
REFERENCES = ["single", "fsdp2", "ddp"]  # the first that took part has the losses to equal
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Report = tuple[Table, list[dict[str, Any]], list[str]]
"""The table, a JSON line for each peer, and complaints."""


def run(arguments: Sequence[str]) -> int:
    """Do what the options ask for; the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    mode = "slope" if options.slope else "cap" if options.cap is not None else "step"
    shape = options.model or SHAPES["tiny" if options.quick else "small" if mode == "step" else "narrow"]
    rounds = options.rounds or (2 if options.quick or mode != "step" else 5)
    try:
        entries = parse_entries(options.peers or default_peers(mode, shape))
        if options.cap is not None:
            MemoryCap(f"zgraph-bench-{os.getpid()}", options.cap).remove()
    except (ValueError, CapError) as error:
        parser.error(str(error))

    settings = Settings(options.ranks, rounds, options.threads, options.timeout_s, enter_private_network())
    skipped = {entry.name: entry.peer.missing for entry in entries if entry.peer.missing is not None}
    entries = [entry for entry in entries if entry.name not in skipped]
    import_for_ranks(entries)
    if mode == "slope":
        table, rows, complaints = report_slopes(measure_slopes(entries, shape, settings))
    elif mode == "cap":
        table, rows, complaints = report_reach(
            [find_reach(entry, shape, settings, options.cap) for entry in entries], options.cap
        )
    else:
        table, rows, complaints = report_steps(entries, compare(entries, shape, settings))

    size = f"{shape.num_parameters / 1e6:.1f}M parameters" if mode == "step" else "deepened"
    title = f"GPT {shape} ({size}), {settings.num_ranks} gloo ranks, float32 AdamW"
    notes = [f"{name}: skipped, {reason}" for name, reason in skipped.items()] + complaints
    if not settings.private_network:
        notes.append("no wire bytes: a private network needs root; the collectives' payload is in the JSON lines")
    Console(width=None if os.isatty(1) else 180).print(title, table, *notes, sep="\n", markup=False, highlight=False)
    if options.json is not None:
        rows += [{"name": name, "skipped": reason} for name, reason in skipped.items()]
        common = {"mode": mode, "shape": asdict(shape), "settings": asdict(settings), "machine": describe_machine()}
        with options.json.open("a") as lines:
            lines.writelines(json.dumps({**common, **row}) + "\n" for row in rows)
    return 1 if complaints else 0


def make_parser() -> argparse.ArgumentParser:
    """The options, each with its default."""
    parser = argparse.ArgumentParser(
        prog="step.py",
        description="One training step of zgraph beside its peers: losses, time, memory and bytes moved, in one run.",
        epilog="peers:\n" + "\n".join(f"  {name:19} {peer.what}" for name, peer in PEERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="a tiny model and 2 rounds: does everything run?")
    modes.add_argument("--slope", action="store_true", help="bytes per parameter, between a depth and three times it")
    modes.add_argument(
        "--cap",
        type=_checked(_parse_bytes),
        metavar="BYTES",
        help=f"the deepest model, in steps of {LAYERS_STEP} layers, that trains under this cap per rank, such as 2GiB",
    )
    parser.add_argument(
        "--model",
        type=_checked(Shape.parse),
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or width,layers,heads,tokens,vocabulary,sequences"
        " (default: small; narrow with --slope and --cap)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        help="from the list below; zgraph takes options, as in zgraph-3:prefetch=2:bucket_bytes=4MiB; the same peer"
        " twice shows the noise (default: all that suit the mode and the model's size)",
    )
    parser.add_argument("--ranks", type=_checked(_parse_count), default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "--rounds", type=_checked(_parse_count), metavar="N", help="measured steps of each peer (default: 5, or 2)"
    )
    parser.add_argument("--threads", type=_checked(_parse_count), default=1, metavar="N", help="per rank; default: 1")
    parser.add_argument("--timeout-s", type=_checked(_parse_count), default=600, metavar="S", help="default: 600")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line for each peer")
    return parser


def default_peers(mode: str, shape: Shape) -> list[str]:
    """Those that suit the question, and fit into the machine together."""
    if mode == "cap":
        return CAP_PEERS
    if mode == "step" and shape.num_parameters > LARGE_MODEL_PARAMETERS:
        return LARGE_MODEL_PEERS
    quick = [name for name, peer in PEERS.items() if not peer.compiles_long]
    if mode == "slope":
        return [name for name in quick if not PEERS[name].whole_batch]
    return quick if shape == SHAPES["tiny"] else list(PEERS)


def parse_entries(names: Sequence[str]) -> list[Entry]:
    """Each peer under its own name, numbered where it repeats.

    Raises:
        ValueError: a peer or its options are unknown.
    """
    entries: list[Entry] = []
    for position, name in enumerate(names):
        repeat = names[:position].count(name)
        entries.append(Entry(f"{name}#{repeat + 1}" if repeat else name, parse_peer(name)))
    return entries


def report_steps(entries: Sequence[Entry], results: Sequence[Result]) -> Report:
    """Losses, times as ratios within rounds, memory, and what went over the wire."""
    table = _table(
        "peer", "last\nloss", "loss\ndiff", "step\ns", "step\n/ fsdp2", "step\n/ local", "cpu\n/ local",
        "live\npeak MB", "resident\npeak MB", "resident\n/ live", "kept\nB/param", "wire\nMB", "collec-\ntives",
        "first\nstep s",
    )  # fmt: skip
    finished = {result.name: result for result in results if result.problem is None}
    comparable = {entry.name for entry in entries if entry.peer.synchronous} & set(finished)
    reference = next((finished[name] for name in REFERENCES if name in comparable), None)
    fsdp2, local = finished.get("fsdp2"), finished.get("local")
    complaints = []
    for result in results:
        if result.problem is not None:
            complaints.append(_first_line(result.name, result.problem))
            table.add_row(result.name, "failed")
            continue
        difference = None
        if result.name in comparable and reference is not None and reference is not result:
            difference = loss_difference(result.losses, reference.losses)
            if not difference <= LOSS_TOLERANCE:
                complaints.append(
                    f"{result.name}: losses differ from {reference.name}'s by {difference:.1e}, more than"
                    f" {LOSS_TOLERANCE:.0e}: {result.losses} and {reference.losses}"
                )
        table.add_row(
            result.name,
            f"{result.losses[-1]:.5f}",
            "" if difference is None else f"{difference:.0e}",
            f"{median(result.step_s):.3f}",
            _spread(result, fsdp2, lambda of: of.step_s),
            _spread(result, local, lambda of: of.step_s),
            _spread(result, local, lambda of: of.cpu_s),
            f"{result.live_peak_bytes / 1e6:.1f}",
            f"{result.resident_peak_bytes / 1e6:.1f}",
            f"{result.resident_peak_bytes / result.live_peak_bytes:.2f}",
            f"{result.live_bytes / result.num_parameters:.2f}",
            "" if result.wire_bytes is None else f"{result.wire_bytes / 1e6:.2f}",
            str(sum(entry["count"] for entry in result.collectives.values())),
            f"{result.first_step_s:.2f}",
        )
    return table, [asdict(result) for result in results], complaints


def report_slopes(slopes: Sequence[Slope]) -> Report:
    """Bytes per parameter and rank of each figure that grows with the model."""
    figures = ["live_peak_bytes", "resident_peak_bytes", "live_bytes", "warmup_live_peak_bytes", "wire_bytes"]
    table = _table("B/param", "live\npeak", "resident\npeak", "kept", "warm-up\nlive peak", "wire")
    rows, complaints = [], []
    for slope in slopes:
        row: dict[str, Any] = asdict(slope)
        if slope.problem is not None:
            complaints.append(_first_line(slope.name, slope.problem))
            table.add_row(slope.name, "failed")
        else:
            measured = [figure for figure in figures if getattr(slope.deep, figure) is not None]
            row["bytes_per_parameter"] = {figure: slope.per_parameter(figure) for figure in measured}
            table.add_row(slope.name, *(f"{value:.2f}" for value in row["bytes_per_parameter"].values()))
        rows.append(row)
    return table, rows, complaints


def report_reach(reaches: Sequence[Reach], cap_bytes: int) -> Report:
    """The largest model of each peer."""
    table = _table("peer", f"trains under {cap_bytes / 2**30:.2f} GiB", "killed at", "layers", "resident peak MiB")
    complaints = [_first_line(reach.name, reach.problem) for reach in reaches if reach.problem is not None]
    for reach in reaches:
        trained = reach.trained
        table.add_row(
            reach.name,
            "none" if trained is None else f"{trained.num_parameters / 1e6:.1f}M",
            "" if reach.killed is None else f"{reach.killed / 1e6:.1f}M",
            "" if trained is None else str(reach.layers),
            "" if trained is None else f"{trained.resident_peak_bytes / 2**20:.0f}",
        )
    return table, [asdict(reach) | {"cap_bytes": cap_bytes} for reach in reaches], complaints


def describe_machine() -> dict[str, Any]:
    """What figures depend on besides the code."""
    processor = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": processor[1] if processor else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libc": " ".join(platform.libc_ver()),
    }


def import_for_ranks(entries: Sequence[Entry]) -> None:
    """Import once what ranks would import for themselves in their first steps, and share its memory."""
    needed = {entry.peer.optional_package for entry in entries if entry.peer.optional_package is not None}
    for name in ["torch._dynamo", "torch.fx.experimental.proxy_tensor", *sorted(needed)]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise write to, and so copy, every shared page


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table


def _first_line(name: str, problem: str) -> str:
    """All of it was shown when it happened, and is in the JSON lines."""
    return f"{name}: {problem.splitlines()[0]}"


def _spread(result: Result, reference: Result | None, figure: Callable[[Result], list[float]]) -> str:
    if reference is None:
        return ""
    spread = Spread.of_pairs(figure(result), figure(reference))
    return f"{spread.median:.2f} ({spread.low:.2f}..{spread.high:.2f})"


Parsed = TypeVar("Parsed")


def _checked(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """``argparse`` shows the message of its own error type only."""

    def parse_or_explain(text: str) -> Parsed:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a positive integer")
    return int(text)


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is not a number of bytes such as 2147483648, 2GiB or 512MiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
