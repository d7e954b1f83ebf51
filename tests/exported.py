"""Run what ``model.export`` has written, here or in a process that cannot import zgraph."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

NAMES = ("step", "program", "earlier", "operators", "collectives", "runtime", "packed", "quantized")


def run_here(directory: Path, steps: int, *batches: Any, seed: int = 0) -> tuple[list[float], dict[str, Any]]:
    """Losses of so many steps, and the state after them, in this process."""
    kept = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        step = importlib.import_module("step").make_step()
        given = batches or step.example()
        torch.manual_seed(seed)
        return [step(*given).item() for _ in range(steps)], step.state
    finally:
        sys.path.remove(str(directory))
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def run_apart(directory: Path, world: int, *arguments: str) -> list[float]:
    """Losses that ``step.py`` prints, in processes that cannot import zgraph."""
    (directory / "zgraph.py").write_text("raise ImportError('zgraph is needed')\n")  # found before what is installed
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "localhost",
        "--nproc-per-node",
        str(world),
    ]
    command = [sys.executable, *(launch if world > 1 else []), str(directory / "step.py"), *arguments]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as tests have: sums are divided by them
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, env=threads)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.MULTILINE)]


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, NaN included."""
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        one, other = torch.as_tensor(found[name]), torch.as_tensor(value)
        assert one.dtype == other.dtype, name
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
