"""Reports of small steps, for tests: one of them built node by node, with names that would break out of a page."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.programs import Builder, param
from tests.scripts import scripts
from zgraph.captures import Captures
from zgraph.config import Config
from zgraph.hardware import Hardware
from zgraph.lower import lower
from zgraph.machines import assumed_cpu, preset
from zgraph.plans import describe
from zgraph.predict import predict
from zgraph.presets import Decoder, find_model
from zgraph.program import Mesh, Origin, Phase, Program, Role
from zgraph.report import Recorder, Report, make_report

aten = torch.ops.aten

H100, CPU = preset("H100"), assumed_cpu(2, 2**33)

HOSTILE = '</script><img src=x onerror="window.hacked=1">\'"\n`${window.hacked=1}`&lt;%s'
"""What a module, file or parameter must never be called, and may be."""


class Blocks(nn.Module):
    """Residual blocks that are alike, between an embedding and a head."""

    def __init__(self, num: int = 5, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(num)
        )
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean square of the logits of tokens, int64 of shape ``[B, T]``."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).square().mean()


def report_of_blocks(
    world: int = 4, hardware: Hardware = H100, num: int = 5, width: int = 16, **options: Any
) -> Report:
    """The report of blocks on several ranks, in small buckets."""
    config = Config.from_options({"zero": 3, "bucket_bytes": "4KiB", **options})
    with torch.device("meta"):
        model = Blocks(num, width)
    batch = torch.zeros(config.accumulate * 2, 8, dtype=torch.int64)
    captures = Captures(model, torch.optim.AdamW(model.parameters()), ((batch,), {}))
    captured = captures.captured(config, captures.num_blocks)
    return report_of_program(captured, model, config, world, hardware)


def report_of_program(
    captured: Program,
    model: nn.Module,
    config: Config,
    world: int = 2,
    hardware: Hardware = H100,
    *,
    prove: bool = True,
) -> Report:
    """The report of a captured program on so many ranks."""
    recorder = Recorder(hardware)
    lowered = lower(captured, config, Mesh(world), None, (), hardware=hardware, prove=prove, watch=recorder)
    made = predict(lowered, hardware, config.accumulate)
    plan = describe(model, lowered, made, {"zero": config.zero}, hardware, 2**30)
    return make_report(recorder, lowered, plan, config, hardware, proved=prove)


def report_of_llama(num_layers: int, world: int = 1024) -> Report:
    """The report of a Llama of as many as 69 billion parameters, in 80 layers of 400 nodes each; nothing is proved."""
    config = Config(precision="bf16", recompute="blocks", bucket_bytes=64 * 2**20)
    with torch.device("meta"):
        model = Decoder(find_model("llama2-70b"), num_layers)
    tokens = torch.empty(1, 4096, dtype=torch.int64, device="meta")
    captures = Captures(model, torch.optim.AdamW(model.parameters()), ((tokens, tokens), {}))
    captured = captures.captured(config, captures.num_blocks)
    return report_of_program(captured, model, config, world, prove=False)


def report_of_gpt(world: int = 2) -> Report:
    """The report of the GPT of 135.6 million parameters that benchmarks train, on ranks of one CPU."""
    with scripts(["models"]) as found:
        models = found["models"]
        shape = models.SHAPES["medium"]
        model = models.build_model(shape, "meta")
    tokens = torch.empty(shape.sequences, shape.tokens, dtype=torch.int64, device="meta")
    captures = Captures(model, torch.optim.AdamW(model.parameters()), ((tokens, tokens), {}))
    config = Config(zero=3)
    return report_of_program(captures.captured(config, captures.num_blocks), model, config, world, CPU, prove=False)


def hostile_program() -> Program:
    """``loss = sum(x @ w)`` in a module, from a file and with a parameter of hostile names, trained by SGD."""
    b = Builder()
    w, x = b.input(Role.PARAM, HOSTILE, shape=[2, 3]), b.input(Role.BATCH, "0", shape=[4, 2])

    def call(phase: Phase, target: Any, *args: Any, **kwargs: Any) -> Any:
        origin = Origin(phase, HOSTILE, f"{HOSTILE}:3 ({HOSTILE})")
        return b.program.call(target, *args, origin=origin, before=b.program.output_node, **kwargs)

    y = call(Phase.FORWARD, aten.mm.default, x, w)
    loss = call(Phase.FORWARD, aten.sum.default, y)
    g = call(
        Phase.BACKWARD,
        aten.mm.default,
        call(Phase.BACKWARD, aten.t.default, x),
        call(Phase.BACKWARD, aten.ones_like.default, y),
    )
    new = call(Phase.UPDATE, aten.add.Tensor, w, g, alpha=-0.1)
    return b.finish({None: loss, param(HOSTILE): new})


__all__ = [
    "CPU",
    "H100",
    "HOSTILE",
    "Blocks",
    "hostile_program",
    "report_of_blocks",
    "report_of_gpt",
    "report_of_llama",
    "report_of_program",
]
