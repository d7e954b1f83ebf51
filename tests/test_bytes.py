"""What a rank needs at most, in bytes per parameter: a claim about memory that needs no measuring.

The program says what is stored and what is alive after each call (``zgraph.liveness``); ``benchmarks/step.py --slope``
measures the same on real ranks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.models import GPT
from tests.reference import slow
from zgraph.captures import Captures
from zgraph.config import Config
from zgraph.liveness import alive_bytes
from zgraph.lower import lower
from zgraph.program import OF_PARAMETERS, Mesh, Program

WORLD = 2
EVERYTHING = {"optimizer": "disk", "parameters": "disk", "gradients": "disk"}


def peak_bytes(program: Program) -> int:
    """State that is stored in memory, and the most that is alive of temporary values."""
    stored = sum(
        node.meta["val"].nbytes
        for node, what in program.placeholders()
        if what.role in OF_PARAMETERS and isinstance(node.meta["val"], torch.Tensor) and program.tier_of(node) is None
    )
    return stored + max(num_bytes for _, num_bytes in alive_bytes(program))


@cache
def deep_gpt(num_micro_batches: int) -> Captures:
    """The step of a deep GPT on few tokens, captured once for all options that only passes read."""
    with torch.device("meta"):
        model = GPT(width=128, depth=12)
    tokens = torch.zeros(num_micro_batches, 2, dtype=torch.long)
    return Captures(model, torch.optim.AdamW(model.parameters()), ((tokens, tokens), {}))


def bytes_per_parameter(**options: Any) -> float:
    """At the peak of the step, sharded over two ranks and updated by AdamW."""
    config = Config.from_options({"zero": 3, "bucket_bytes": "64KiB", **options})
    captures = deep_gpt(config.accumulate)
    captured = captures.captured(config, captures.num_blocks)
    programs = lower(captured, config, Mesh(WORLD), None, (), prove=False).programs  # tests of passes prove theirs
    return max(map(peak_bytes, programs)) / sum(p.numel() for p in captures.model.parameters())


@pytest.mark.parametrize(
    "claim",
    slow(
        ({}, 6.5),
        ({"clip_norm": 1.0}, 8.3),
        ({"precision": "bf16"}, 7.5),
        ({"state_precision": "int8"}, 6.5 - 8 / WORLD + 2 * 65 / 64 / WORLD),
        ({"state_precision": "int8", "clip_norm": 1.0}, 8.3 - 8 / WORLD + 2 * 65 / 64 / WORLD),
        ({"ema": 0.999}, 6.5 + 4 / WORLD),
        ({"gradient_noise": 0.1, "reduce_precision": "bf16"}, 6.5),
        ({"accumulate": 2, "clip_norm": 1.0}, 6.5 + 4 / WORLD),
        ({"offload": {"optimizer": "disk"}}, 2.6),
        ({"offload": {"optimizer": "disk", "parameters": "disk"}}, 0.6),
        ({"offload": EVERYTHING, "accumulate": 2}, 0.8),
        ({"offload": EVERYTHING, "accumulate": 2, "clip_norm": 1.0}, 0.8),
        ({"offload": EVERYTHING, "clip_norm": 1.0}, 0.8),
    ),
    ids=str,
)
def test_a_rank_needs_no_more_than_so_many_bytes_per_parameter(claim: tuple[dict[str, Any], float]) -> None:
    options, limit = claim
    found = bytes_per_parameter(**options)
    print(f"{options}: {found:.2f}")
    least = 0.0 if "offload" in options else 3.0 if "state_precision" in options else 6.0
    assert least <= found <= limit
