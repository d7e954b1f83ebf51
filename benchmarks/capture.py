"""Capture, rewrite and prove Llama-shaped models of growing depth on the meta device: seconds, nodes and memory.

    python benchmarks/capture.py                    10, 20, 40 and 80 layers (up to 65B parameters)
    python benchmarks/capture.py --layers 4 8       smaller
    python benchmarks/capture.py --gpt medium       a GPT of step.py instead
    python benchmarks/capture.py --plot FILE.svg    draw seconds over nodes, too (needs matplotlib)

Nothing is trained and no process group is needed; each depth runs in a process of its own, so that its peak memory is
its own. ``passes`` is what the passes take, ``proofs`` the verification after each of them together, ``text`` the
program's text and digest, which the ranks compare, and the source of the step. ``share`` is the proofs' part of all
that compiling does, as in ``zgraph.compile``; the collection of what capture leaves behind is included. ``check`` is
one proof of the finished program from nothing: the captured and the rewritten step evaluated and compared. All should
grow with nodes and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, HIDDEN, VOCABULARY, TOKENS = 8192, 64, 22016, 32000, 2048


class Norm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (x.float() * scale).to(x.dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The quarter turn of rotary position embedding (Su et al., 2021)."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Block(nn.Module):
    """Attention with rotary positions, then a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = Norm(), Norm()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.attention_norm(x)
        query, key, value = (
            project(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        query, key = query * cos + rotate(query) * sin, key * cos + rotate(key) * sin
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A decoder whose output is its loss."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_layers))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("cos", torch.ones(TOKENS, WIDTH // HEADS))
        self.register_buffer("sin", torch.ones(TOKENS, WIDTH // HEADS))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def measure(num_layers: int, world: int, gpt: str | None) -> dict[str, float]:
    """Capture and rewrite one model in this process."""
    from models import GPT, SHAPES

    from zgraph.capture import capture
    from zgraph.codegen.emit import emit
    from zgraph.collector import collect_garbage
    from zgraph.config import Config
    from zgraph.passes import default_passes
    from zgraph.pipeline import run
    from zgraph.program import Mesh
    from zgraph.tracing import forget
    from zgraph.verify import Verifier

    with torch.device("meta"):
        model: nn.Module = Llama(num_layers) if gpt is None else GPT(SHAPES[gpt])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    num_tokens = TOKENS if gpt is None else SHAPES[gpt].tokens
    tokens = torch.zeros(1, num_tokens, dtype=torch.long)
    start = time.perf_counter()
    program = capture(model, optimizer, (tokens, tokens), {})
    collect_garbage(program.graph)
    captured = time.perf_counter()
    result = run(default_passes(Config(zero=3), Mesh(world)), program)
    rewritten = time.perf_counter()
    result.program.digest()
    emit(result.program)
    written = time.perf_counter()
    Verifier(program).check(result.program, after="all passes")
    checked = time.perf_counter()
    forget(result.program.graph)
    gc.collect()
    done = time.perf_counter()
    return {
        "layers": num_layers if gpt is None else SHAPES[gpt].layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes_captured": program.num_nodes(),
        "nodes_rewritten": result.program.num_nodes(),
        "capture_s": captured - start,
        "passes_s": sum(record.time_s for record in result.records),
        "proofs_s": sum(record.verify_s for record in result.records),
        "text_s": written - rewritten,
        "compile_s": written - start + done - checked,
        "check_s": checked - written,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def plot(rows: list[dict[str, float]], file: str) -> None:
    """Draw what the passes, their proofs and one whole proof take, over the nodes of the program."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    nodes = [row["nodes_rewritten"] for row in rows]
    for key, label in (("proofs_s", "all proofs"), ("passes_s", "all passes"), ("check_s", "one proof from nothing")):
        axes.plot(nodes, [row[key] for row in rows], marker="o", label=label)
    axes.set(xlabel="nodes of the sharded step", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Measure each depth in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--world", type=int, default=8, help="ranks to shard over (default: 8)")
    parser.add_argument("--gpt", metavar="SHAPE", help="a GPT of benchmarks/models.py, such as medium (135.6M)")
    parser.add_argument("--plot", metavar="FILE", help="an SVG of seconds over nodes")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.layers[0], options.world, options.gpt)))
        return 0
    rows = []
    print(
        f"{'layers':>6} {'params':>8} {'nodes':>7} {'capture s':>10} {'passes s':>9} {'proofs s':>9} {'text s':>7} "
        f"{'share':>6} {'check s':>8} {'us/node':>8} {'peak GB':>8}"
    )
    for num_layers in options.layers if options.gpt is None else [0]:
        command = [sys.executable, __file__, "--one", "--layers", str(num_layers), "--world", str(options.world)]
        command += ["--gpt", options.gpt] if options.gpt is not None else []
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print(
            f"{row['layers']:6} {row['parameters'] / 1e9:7.1f}B {row['nodes_rewritten']:7} {row['capture_s']:10.1f} "
            f"{row['passes_s']:9.2f} {row['proofs_s']:9.2f} {row['text_s']:7.2f} "
            f"{row['proofs_s'] / row['compile_s']:6.1%} {row['check_s']:8.2f} "
            f"{row['check_s'] / row['nodes_rewritten'] * 1e6:8.1f} {row['peak_resident_bytes'] / 1e9:8.2f}",
            flush=True,
        )
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
