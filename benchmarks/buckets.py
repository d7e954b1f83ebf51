"""Sizes of buckets, fixed and by cost, of steps on GPUs that are not there: seconds and bytes by the cost model.

    python benchmarks/buckets.py                      Llama-3 8B on H100s; writes the table into docs/schedule.md
    python benchmarks/buckets.py --layers 4           fewer blocks, in seconds; writes nothing

Nothing is measured. All programs are those that ``zgraph.compile`` would run, but for the sizes of their buckets.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import write_between_marks

from zgraph.capture import capture
from zgraph.config import Config
from zgraph.lower import lower
from zgraph.machines import preset
from zgraph.predict import predict
from zgraph.presets import Decoder, find_model
from zgraph.program import Program
from zgraph.repetition import KEPT, repeat_blocks

DOCUMENT = Path(__file__).parents[1] / "docs" / "schedule.md"
SIZES = (16 * 2**20, 64 * 2**20, 256 * 2**20, 2**30, "auto")
CASES = ((2048, 8), (2048, 64), (8192, 64), (8192, 512))
"""Tokens of a rank, and ranks."""


def captured(num_tokens: int, layers: int) -> Program:
    """The step of one sequence, with all blocks."""
    with torch.device("meta"):
        model = Decoder(replace(find_model("llama3-8b"), layers=min(layers, KEPT)))
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    config = Config.from_options({"precision": "bf16"})
    program = capture(model, torch.optim.AdamW(model.parameters()), (tokens, tokens), {}, config=config)
    return repeat_blocks(program, "layers", layers) if layers > KEPT else program


def row(program: Program, num_tokens: int, world: int, size: Any) -> str:
    """A line of the table."""
    hardware = preset("H100")
    config = Config.from_options({"precision": "bf16", "bucket_bytes": size})
    lowered = lower(program, config, config.mesh(world), None, (), hardware=hardware, prove=False)
    made = predict(lowered, hardware)
    cells = (
        num_tokens,
        world,
        size if isinstance(size, str) else f"{size >> 20} MiB",
        len(lowered.layout.buckets),
        f"{made.step_s:.4f}",
        f"{made.exposed_s:.4f}",
        f"{made.peak_bytes / 2**30:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Print the table, and write it if all blocks are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    rows = []
    for num_tokens in sorted({num_tokens for num_tokens, _ in CASES}):
        program = captured(num_tokens, options.layers)
        for world in (world for tokens, world in CASES if tokens == num_tokens):
            for size in SIZES:
                rows.append(row(program, num_tokens, world, size))
                print(rows[-1], flush=True)
    names = ("tokens", "H100s", "`bucket_bytes`", "buckets", "step, s", "exposed, s", "live peak, GiB")
    head = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    if options == parser.parse_args([]):
        write_between_marks(DOCUMENT, "\n".join([*head, *rows]), "buckets")
    return 0


if __name__ == "__main__":
    sys.exit(main())
