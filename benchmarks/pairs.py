"""Predictions beside measurements on this machine: seconds and bytes of real steps.

Every pair of a model and options is trained for some rounds on real ranks, and planned with the same options fixed.
Seconds are medians over rounds; bytes are the largest that a rank held, above imports and process group.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from comparison import Entry, Settings, compare, note
from models import GPT, SHAPES, Shape, build_batch
from network import enter_private_network
from peers import ADAMW, parse_peer
from tables import spearman, write_between_marks, write_expected

import zgraph
from zgraph.choices import searched
from zgraph.config import Config
from zgraph.machines import available_cores


@dataclass(frozen=True)
class Pair:
    """A model and options.

    Attributes:
        shape: of a GPT, and of one rank's batch.
        peer: as ``benchmarks/step.py`` takes it: ``zgraph-3:precision=bf16``.
        num_ranks: on this machine.
    """

    shape: Shape
    peer: str
    num_ranks: int


WIDE = Shape(width=512, layers=6, heads=8, tokens=128, vocabulary=4096, sequences=4)

PAIRS = (
    *(Pair(SHAPES["small"], f"zgraph-{zero}", 2) for zero in range(4)),
    Pair(SHAPES["small"], "zgraph-3:precision=bf16", 2),
    Pair(SHAPES["small"], "zgraph-3:clip_norm=1.0", 2),
    Pair(SHAPES["small"], "zgraph-3:accumulate=2", 2),
    Pair(SHAPES["small"], "zgraph-3:recompute=blocks", 2),
    Pair(SHAPES["small"], "zgraph-0", 1),
    Pair(SHAPES["small"], "zgraph-0:recompute=operators", 1),
    *(Pair(WIDE, f"zgraph-{zero}", 2) for zero in (0, 2, 3)),
    Pair(WIDE, "zgraph-0", 1),
    Pair(SHAPES["narrow"], "zgraph-3", 2),
    Pair(SHAPES["medium"], "zgraph-3", 2),
    Pair(SHAPES["medium"], "zgraph-0", 1),
)
QUICK_PAIRS = (Pair(SHAPES["tiny"], "zgraph-3", 2), Pair(SHAPES["tiny"], "zgraph-0", 1))


@dataclass(frozen=True)
class Row:
    """What was predicted and what was measured of a pair."""

    model: str
    options: str
    num_ranks: int
    predicted_s: float
    measured_s: float
    predicted_live_bytes: int
    measured_live_bytes: int
    predicted_resident_bytes: int
    measured_resident_bytes: int

    @property
    def time_error(self) -> float:
        """Relative error of the predicted seconds; likewise of bytes below."""
        return self.predicted_s / self.measured_s - 1

    @property
    def live_error(self) -> float:
        return self.predicted_live_bytes / self.measured_live_bytes - 1

    @property
    def resident_error(self) -> float:
        return self.predicted_resident_bytes / self.measured_resident_bytes - 1


def rows(pairs: Sequence[Pair], rounds: int, timeout_s: float) -> Iterable[Row]:
    """Measure pairs, those of one model and number of ranks in turns, and predict them.

    Raises:
        RuntimeError: a pair does not train.
    """
    private = enter_private_network()
    alike: dict[tuple[Shape, int], list[Pair]] = {}
    for pair in pairs:
        alike.setdefault((pair.shape, pair.num_ranks), []).append(pair)
    for (shape, num_ranks), together in alike.items():
        settings = Settings(num_ranks, rounds, max(available_cores() // num_ranks, 1), timeout_s, private)
        entries = [Entry(pair.peer, parse_peer(pair.peer)) for pair in together]
        for pair, result in zip(together, compare(entries, shape, settings), strict=True):
            if result.problem is not None:
                raise RuntimeError(f"{pair.peer} on {shape}: {result.problem}")
            made = predict(pair)
            note(f"{shape} {pair.peer} on {num_ranks}: {made.chosen.step_s:.3f} s, took {median(result.step_s):.3f} s")
            yield Row(
                model=str(shape),
                options=pair.peer,
                num_ranks=num_ranks,
                predicted_s=made.chosen.step_s,
                measured_s=median(result.step_s),
                predicted_live_bytes=made.chosen.peak_bytes,
                measured_live_bytes=result.live_peak_bytes,
                predicted_resident_bytes=made.chosen.reserved_bytes,
                measured_resident_bytes=result.resident_peak_bytes,
            )


def predict(pair: Pair) -> zgraph.Plan:
    """The plan of a pair, its options fixed."""
    peer = parse_peer(pair.peer)
    options = dict(peer.build.keywords)  # type: ignore[attr-defined]
    as_compiled = searched(Config.from_options(options))
    return zgraph.plan(
        lambda: GPT(pair.shape),
        lambda params: torch.optim.AdamW(params, **ADAMW),
        batch=build_batch(pair.shape, 1, range(1)),
        world_size=pair.num_ranks,
        hardware="here",
        **{**as_compiled, **options},
    )


def report(options: argparse.Namespace) -> int:
    """Measure, predict and tell; see ``benchmarks/here.py``."""
    pairs, timeout_s = (QUICK_PAIRS, 120.0) if options.quick else (PAIRS, 600.0)
    found = list(rows(pairs, options.rounds, timeout_s))
    text = as_markdown(found)
    print(text)
    if options.json is not None:
        options.json.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in found))
    if options.markdown is not None:
        write_between_marks(options.markdown, text, "here")
    if options.write:
        write_expected(
            "cpu",
            "pairs of GPTs and options on one calibrated CPU",
            live=[row.live_error for row in found],
            reserved=[row.resident_error for row in found],
            time=[row.time_error for row in found],
        )
    return 0


def as_markdown(found: Sequence[Row]) -> str:
    """A table of pairs, and their errors together."""
    columns = "width, layers, heads, tokens, vocabulary, sequences | options | ranks | step | measured | error"
    columns += " | live peak | measured | error | resident | measured | error"
    lines = [f"| {columns} |", f"| {' | '.join(['---'] * (columns.count('|') + 1))} |"]
    for row in found:
        cells = [row.model, row.options, str(row.num_ranks), f"{row.predicted_s:.3f} s", f"{row.measured_s:.3f} s"]
        cells.append(f"{row.time_error:+.0%}")
        for predicted, measured, error in (
            (row.predicted_live_bytes, row.measured_live_bytes, row.live_error),
            (row.predicted_resident_bytes, row.measured_resident_bytes, row.resident_error),
        ):
            cells += [f"{predicted / 1e6:.0f} MB", f"{measured / 1e6:.0f} MB", f"{error:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = [(row.predicted_s, row.measured_s) for row in found]
    told = {
        "step": [row.time_error for row in found],
        "live peak": [row.live_error for row in found],
        "resident peak": [row.resident_error for row in found],
    }
    lines.append("")
    for name, errors in told.items():
        sizes = sorted(map(abs, errors))
        lines.append(f"* {name}: median error {median(sizes):.1%}, largest {sizes[-1]:.1%}")
    rank = spearman(seconds)
    lines.append(f"* rank correlation of steps (Spearman): {rank:.3f}" if rank is not None else "")
    return "\n".join(lines)
