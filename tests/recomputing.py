"""Models trained with and without recomputation, which must not change a bit."""

from __future__ import annotations

from typing import Any

import torch

import zgraph
from tests.models import CASES

OPTIONS: dict[str, dict[str, Any]] = {
    "ZeRO-3": {"zero": 3},
    "ZeRO-2": {"zero": 2, "precision": "bf16"},
    "ZeRO-1": {"zero": 1, "accumulate": 2, "clip_norm": 0.5, "reduce_precision": "bf16"},
    "ZeRO-0": {"zero": 0, "precision": "fp16", "accumulate": 2},
    "kept gathered": {"zero": 3, "precision": "bf16", "accumulate": 2, "keep_gathered": True, "ema": 0.9},
    "packed": {"zero": 3, "bucket_bytes": "1KiB", "state_precision": "int8", "gradient_noise": 0.01},
}
"""Options that go together, one of each."""


def trained(
    case: str, recompute: Any, options: dict[str, Any], *, num_samples: int = 8
) -> tuple[zgraph.SimulatedRanks, tuple[Any, ...]]:
    """Three steps of a model on two ranks: the ranks, and losses, weights and optimizer state."""
    model = CASES[case].model()
    rule = torch.optim.AdamW if "state_precision" in options else torch.optim.SGD  # which is traced in no time
    ranks = zgraph.simulate_ranks(
        model,
        rule(model.parameters(), lr=1e-2),
        world_size=2,
        loss=CASES[case].loss,
        metrics={"ones": (lambda *_, **__: torch.ones(()), "sum")},
        recompute=recompute,
        **options,
    )
    steps = [
        ranks.train_step([batch.part(rank, 2) for rank in range(2)])
        for batch in CASES[case].batches(3, num_samples=num_samples)
    ]
    return ranks, ([loss for loss, _ in steps], ranks.state_dict(), ranks.optimizer_state())
