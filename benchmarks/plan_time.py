"""How long ``zgraph.plan`` takes as models get deeper and jobs get wider: seconds, choices and memory.

    python benchmarks/plan_time.py                    Llama-3 shapes of 8 to 128 layers; 2 to 1024 ranks; one stage
    python benchmarks/plan_time.py --models           a 70B model on 1,024 H100s, a 405B one on 4,096, searched
    python benchmarks/plan_time.py --plot FILE.svg    draw seconds over layers and ranks, too (needs matplotlib)

Every plan is made in a process of its own, so that its time and memory are its own. Both should grow with layers in a
line, and not with ranks. For that, the stage and what is recomputed are given, so that all plans try as many choices.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

LAYERS, WORLDS = (8, 16, 32, 64, 128), (2, 16, 128, 1024)
GIVEN = {"zero": 3, "recompute": "blocks", "accumulate": 1}
MODELS = (("llama3-70b", 80, 1024), ("llama3-405b", 126, 4096))


def measure(name: str, num_layers: int, world: int, given: dict[str, Any]) -> dict[str, Any]:
    """Plan one model in this process."""
    import zgraph
    from zgraph.presets import Decoder, find_model

    config = replace(find_model(name), layers=num_layers)
    tokens = torch.empty(1, 8192, dtype=torch.int64, device="meta")
    start = time.perf_counter()
    plan = zgraph.plan(
        lambda: Decoder(config),
        torch.optim.AdamW,
        batch=(tokens, tokens),
        world_size=world,
        hardware="h100",
        precision="bf16",
        clip_norm=1.0,
        **given,
    )
    return {
        "model": name,
        "layers": num_layers,
        "world": world,
        "plan_s": time.perf_counter() - start,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "fits": plan.fits,
        "options": plan.options,
        "step_s": plan.chosen.step_s,
    }


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Draw seconds over layers, and over ranks."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for axes, key, fixed, what in ((left, "layers", "world", "layers"), (right, "world", "layers", "ranks")):
        common = max({row[fixed] for row in rows}, key=[row[fixed] for row in rows].count)
        chosen = [row for row in rows if row[fixed] == common]
        axes.plot([row[key] for row in chosen], [row["plan_s"] for row in chosen], marker="o")
        axes.set(xlabel=what, ylim=(0, None))
    left.set(ylabel="seconds of a plan", xlim=(0, None))
    right.set(xscale="log")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Measure each plan in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true", help="the large models instead")
    parser.add_argument("--plot", metavar="FILE", help="an SVG of seconds over layers and over ranks")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "LAYERS", "WORLD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        name, num_layers, world = options.one
        print(json.dumps(measure(name, int(num_layers), int(world), {} if options.models else GIVEN)))
        return 0
    growth = [("llama3-8b", layers, 64) for layers in LAYERS] + [("llama3-8b", 32, world) for world in WORLDS]
    rows = []
    print(f"{'model':12} {'layers':>6} {'ranks':>6} {'plan s':>7} {'peak GB':>8}  chosen")
    for name, num_layers, world in MODELS if options.models else growth:
        command = [sys.executable, __file__, "--one", name, str(num_layers), str(world)]
        command += ["--models"] if options.models else []
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        chosen = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
        memory = row["peak_resident_bytes"] / 1e9
        print(f"{name:12} {num_layers:6} {world:6} {row['plan_s']:7.1f} {memory:8.2f}  {chosen}", flush=True)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
