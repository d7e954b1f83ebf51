"""What recomputation costs in seconds at each peak: zgraph's choices beside those of torch's min-cut partitioner.

    python benchmarks/recompute.py            three models, torch's activation_memory_budget from 1 down to 0
    python benchmarks/recompute.py --quick    one tiny model

torch chooses on the same captured graph. Both choices are rewritten by the same pass, sharded and scheduled by the same
passes, and their bytes counted by the same accounting (``zgraph.footprint``); seconds are those that the cost model
predicts of the calls that run again. So only the choices differ. Nothing is measured: the machine is simulated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import GPT, SHAPES, build_batch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition

from zgraph import ops
from zgraph.capture import capture
from zgraph.config import Config
from zgraph.footprint import footprint
from zgraph.frontier import frontier
from zgraph.machines import preset
from zgraph.passes import Unshard, default_passes
from zgraph.passes.again import make_again
from zgraph.pipeline import run
from zgraph.presets import Decoder, find_model
from zgraph.program import Mesh, Phase, Program, phase_of
from zgraph.recomputation import Profile, marked

BUDGETS = tuple(tenths / 10 for tenths in range(10, -1, -1))
WORLD = 2
HARDWARE = "H100"


class ConvNet(nn.Module):
    """Residual blocks of two convolutions, each normalised over the batch; classifies images."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
            )
            for _ in range(num_blocks)
        )  # fmt: skip
        self.head = nn.Linear(width, 1000)

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of ``classes`` given ``images`` of shape (batch, 3, height, width)."""
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = torch.relu(hidden + block(hidden))
        return nn.functional.cross_entropy(self.head(hidden.mean((2, 3))), classes)


def gpt(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A GPT of ``benchmarks/models.py`` and its batch."""
    return GPT(SHAPES[name]), build_batch(SHAPES[name], 1, range(1))


def conv_net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Eight residual blocks on small images."""
    return ConvNet(64, 8), (torch.empty(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64))


def llama() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Llama-3 8B with four of its blocks."""
    tokens = torch.zeros(1, 2048, dtype=torch.int64)
    return Decoder(replace(find_model("llama3-8b"), layers=4)), (tokens, tokens)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "GPT, 135.6M": lambda: gpt("medium"),
    "conv net": conv_net,
    "Llama-3, 4 blocks": llama,
}


@dataclass(frozen=True)
class Point:
    """Peak of the whole schedule, and seconds of what runs again."""

    peak_bytes: int
    seconds: float


class Case:
    """A model's step, and what becomes of it with some of its forward made again."""

    def __init__(self, build: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]) -> None:
        with torch.device("meta"):
            model, _ = build()
        batch = tuple(torch.empty_like(tensor, device="cpu") for tensor in build_batch_of(build))
        captured = capture(model, torch.optim.AdamW(model.parameters()), batch, {}, config=Config())
        tidy, *self._then = (p for p in default_passes(Config(), Mesh(WORLD)) if not isinstance(p, Unshard))
        self.program = run([tidy], captured, prove=False).program
        scheduled = run(self._then, marked(self.program), prove=False).program
        self.profile = Profile(self.program, scheduled, preset(HARDWARE))

    def point(self, again: set[fx.Node]) -> Point:
        """What the step takes where backward has these made again, as far as it needs them."""
        copy = self.program.clone()
        copies = dict(zip(self.program.graph.nodes, copy.graph.nodes, strict=True))
        before = set(copy.graph.nodes)
        make_again(copy, {copies[node] for node in again})
        originals = {(node.target, self.program.call_key(node)): node for node in self.program.graph.nodes}
        new = [node for node in copy.graph.nodes if node not in before]
        seconds = sum(self.profile.seconds_of(originals[node.target, copy.call_key(node)]) for node in new)
        tried = run(self._then, copy, prove=False).program
        return Point(footprint(tried, staged=False).peak_bytes, seconds)


def build_batch_of(build: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]) -> tuple[torch.Tensor, ...]:
    """The batch alone."""
    with torch.device("meta"):
        return build()[1]


def chosen_by_torch(program: Program, budget: float) -> set[fx.Node]:
    """The calls of forward whose results torch does not save."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    forward: list[fx.Node] = []
    gradients: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if any(phase_of(user) in (Phase.FORWARD, Phase.BACKWARD) for user in node.users):
                copies[node] = graph.placeholder(f"primals_{len(copies) + 1}")
                copies[node].meta["val"] = node.meta["val"]
        elif phase_of(node) in (Phase.FORWARD, Phase.BACKWARD):
            late = any(user.op == "output" or phase_of(user) is Phase.UPDATE for user in node.users)
            if late:
                (forward if phase_of(node) is Phase.FORWARD else gradients).append(node)
    loss = program.results()[0]
    seed = next(node for node in program.graph.nodes if phase_of(node) is Phase.BACKWARD and loss in node.args)
    copies[seed] = graph.placeholder("tangents_1")
    copies[seed].meta["val"] = seed.meta["val"]
    for node in program.graph.nodes:
        if node.op == "call_function" and phase_of(node) in (Phase.FORWARD, Phase.BACKWARD) and node is not seed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in (*forward, *gradients)])
    joint = fx.GraphModule({}, graph)
    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    with functorch_config.patch(activation_memory_budget=budget), program.fake_mode:
        first, _ = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=len(forward))
    results: Any = first.graph.output_node().args[0]
    saved = {node.name for node in results}
    return {
        node
        for node in program.graph.nodes
        if node.op == "call_function" and phase_of(node) is Phase.FORWARD and copies[node].name not in saved
        and ops.can_run_again(node)
    }  # fmt: skip


def rows(case: Case, budgets: tuple[float, ...]) -> Iterator[tuple[float, Point, Point, Point]]:
    """For each budget of torch: what it takes, ours within the same bytes, and ours within the same seconds."""
    choices = frontier(case.profile)
    for budget in budgets:
        theirs = case.point(chosen_by_torch(case.program, budget))
        within = next((c for c in choices if c.peak_bytes <= theirs.peak_bytes), choices[-1])
        as_fast = [c for c in choices if c.seconds <= theirs.seconds * (1 + 1e-9)][-1:] or choices[:1]
        points = [case.point(set(case.profile.again(c.dropped))) for c in (within, *as_fast)]
        yield budget, theirs, points[0], points[1]


def main() -> int:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny GPT, three budgets")
    options = parser.parse_args()
    models = {"tiny GPT": lambda: gpt("tiny")} if options.quick else MODELS
    is_worse = False
    for name, build in models.items():
        case = Case(build)
        kept = case.profile.kept.peak_bytes
        lowest = frontier(case.profile)[-1]
        print(f"\n{name}: {WORLD} x {HARDWARE} (simulated), ZeRO-3; {kept / 1e6:.1f} MB with all kept,")
        print(f"at least {lowest.peak_bytes / 1e6:.1f} MB with {lowest.seconds * 1e3:.3f} ms more\n")
        print("| torch's budget | its peak, MB | its time, ms | ours within its peak, ms | ours within its time, MB |")
        print("| --- | --- | --- | --- | --- |")
        for budget, theirs, within, as_fast in rows(case, (1.0, 0.5, 0.0) if options.quick else BUDGETS):
            mark = ""
            if within.peak_bytes > theirs.peak_bytes or within.seconds > theirs.seconds * (1 + 1e-9):
                mark, is_worse = " (worse)", True
            found = f"| {budget:.1f} | {theirs.peak_bytes / 1e6:.1f} | {theirs.seconds * 1e3:.3f} "
            print(found + f"| {within.seconds * 1e3:.3f}{mark} | {as_fast.peak_bytes / 1e6:.1f} |", flush=True)
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
