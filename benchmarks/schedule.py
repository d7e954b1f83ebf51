"""Simulated: what communication zgraph's schedule leaves exposed on H100s, beside FSDP2's, of the same buckets.

    python benchmarks/schedule.py                          the table of docs/schedule.md
    python benchmarks/schedule.py --models llama3-8b --ranks 8

Nothing runs: each step is captured on the meta device with four blocks, written out with all of them, sharded, ordered
in two ways, and played on the lanes of ``zgraph.timeline``. Both have one bucket for each block, one for the embedding
and one for norm and head, gather in bfloat16, average gradients in float32 and compute each block again in backward.
FSDP2 gathers one block ahead, in forward and in backward, and waits for the average of one block's gradients when that
of the next is started. The copies that FSDP2 makes between buckets and parameters are left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tables import write_between_marks
from traces import UNLIMITED, in_half, layout_by_block

from zgraph.capture import capture
from zgraph.config import Config
from zgraph.footprint import footprint
from zgraph.machines import preset
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.presets import Decoder, find_model
from zgraph.program import Mesh, Program
from zgraph.repetition import KEPT, repeat_blocks
from zgraph.timeline import least_s, play

DOCUMENT = Path(__file__).parents[1] / "docs" / "schedule.md"
SCHEDULES = {"FSDP2's": {"prefetch": 1}, "zgraph's, 0": {"in_flight": 0}, "zgraph's, 2": {"in_flight": 2}}
TOKENS = (8192, 2048)
OPTIONS = {"zero": 3, "bucket_bytes": UNLIMITED, "recompute": "blocks"}


def captured(name: str, num_tokens: int) -> Program:
    """The step of one sequence, with all blocks."""
    shape = find_model(name)
    with torch.device("meta"):
        model = in_half(Decoder(shape, KEPT), torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
    config = Config.from_options(OPTIONS)
    program = capture(model, optimizer, (tokens, tokens), {}, config=config, device=torch.device("cpu"))
    return repeat_blocks(program, "layers", shape.layers)


def rows_of(name: str, num_tokens: int, ranks: list[int]) -> list[str]:
    """Lines of the table."""
    program = captured(name, num_tokens)
    hardware = preset("H100")
    rows = []
    for world in ranks:
        layout = layout_by_block(program, world)
        for schedule, options in SCHEDULES.items():
            config = Config.from_options({**OPTIONS, **options})
            made = run(default_passes(config, Mesh(world), layout, hardware=hardware), program, prove=False)
            seconds = next(record.time_s for record in made.records if record.name in ("Overlap", "Schedule"))
            timeline = play(made.program, hardware)
            gap = 1 - least_s(made.program, hardware) / timeline.step_s
            peak = footprint(made.program, staged=False).peak_bytes
            rows.append(
                f"| {name} | {num_tokens} | {world} | {schedule} | {timeline.step_s:.3f} | {timeline.exposed_s:.3f} | "
                f"{timeline.exposed_s / timeline.step_s:.1%} | {gap:.1%} | {peak / 2**30:.1f} |"
            )
            print(rows[-1], f"{made.program.num_nodes()} nodes, ordered in {seconds:.1f} s", flush=True)
    return rows


def main() -> int:
    """Print the table, and write it if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama3-8b", "llama3-70b"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    options = parser.parse_args()
    start = time.perf_counter()
    rows = [row for name in options.models for num_tokens in TOKENS for row in rows_of(name, num_tokens, options.ranks)]
    print(f"{time.perf_counter() - start:.0f} s")
    if options == parser.parse_args([]):
        names = (
            "model",
            "tokens",
            "H100s",
            "order",
            "step, s",
            "exposed, s",
            "of it",
            "gap to the bound",
            "live peak, GiB",
        )
        head = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
        write_between_marks(DOCUMENT, "\n".join([*head, *rows]), "table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
