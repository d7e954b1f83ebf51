"""Parameters may travel in fewer bits: where the user says so, by so much, and what is updated keeps its precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import zgraph
from tests.mutants.steps import in_single_precision, read_in_low_precision
from tests.optimizers import OPTIMIZERS
from tests.programs import assert_same_step
from tests.ranks import Ranks
from tests.reference import assert_equal, world
from zgraph import ops
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.layout import Bucket
from zgraph.packed import BLOCK
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Phase, Program, Stage, operand
from zgraph.quantized import dequantize, quantize

aten = torch.ops.aten
OPTIONS = ["bf16", "int8"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(6, 90), nn.LayerNorm(90), nn.Linear(90, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(torch.tanh(self.inner(x))))
        return y.square().mean()


def arrives(bucket: Bucket, params: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """What forward and backward read of each parameter."""
    flat = torch.zeros(bucket.numel)
    for s in bucket.segments:
        flat[s.offset : s.offset + s.numel] = params[s.name].flatten()
    low = flat.bfloat16().float() if precision == "bf16" else dequantize(quantize(flat))
    return {s.name: low[s.offset : s.offset + s.numel].view(s.shape) for s in bucket.segments}


@pytest.mark.parametrize("precision", OPTIONS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_compute_with_what_arrives_and_update_what_is_stored(num_ranks: int, precision: str) -> None:
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.5), world_size=num_ranks, gather_precision=precision, bucket_bytes=2048
    )
    optimizer = SGD(reference.parameters(), lr=0.5)
    for step in range(3):
        parts = torch.randn(6 * num_ranks, 6).chunk(num_ranks)
        ranks.train_step([(part,) for part in parts])
        assert ranks.layout is not None
        params = {name: param.detach() for name, param in reference.named_parameters()}
        low = {}
        for bucket in ranks.layout.buckets:
            low.update(arrives(bucket, params, precision))
        for bucket in ranks.layout.buckets:
            largest = max(params[s.name].abs().max().item() for s in bucket.segments)
            for s in bucket.segments:
                off, size = (low[s.name] - params[s.name]).abs(), params[s.name].abs()
                assert (off <= (size / 256 if precision == "bf16" else largest / 253)).all()
        rounded = copy.deepcopy(reference)
        rounded.load_state_dict(low, strict=False)
        rounded(torch.cat(parts)).backward()
        for mine, theirs in zip(reference.parameters(), rounded.parameters(), strict=True):
            mine.grad = theirs.grad
        optimizer.step()
        assert_equal(ranks.state_dict(), reference.state_dict(), f"step {step}")


@pytest.mark.parametrize("precision", OPTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2, "clip_norm": 1.0, "unshard": 0.5},
        {"precision": "fp16", "state_precision": "int8", "ema": 0.9},
        {"precision": "bf16", "reduce_precision": "int8"},
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon_and_adam"])
def test_it_goes_with_the_rest_of_the_recipe(precision: str, options: dict[str, Any], optimizer: str) -> None:
    torch.manual_seed(0)
    model = Net()
    losses, weights = {}, {}
    for given in (None, precision):
        torch.manual_seed(1)
        mine = copy.deepcopy(model)
        ranks = zgraph.simulate_ranks(
            mine, OPTIMIZERS[optimizer](mine), world_size=2, gather_precision=given, bucket_bytes=2048, **options
        )
        batches = [[(torch.randn(8, 6),) for _ in range(2)] for _ in range(3)]
        losses[given] = torch.stack([ranks.train_step(batch) for batch in batches])
        weights[given] = ranks.state_dict()["inner.weight"]
    assert losses[None].isfinite().all()
    torch.testing.assert_close(losses[precision], losses[None], rtol=0.1, atol=0.01)
    assert not torch.equal(weights[precision], weights[None])


def test_what_is_kept_gathered_is_kept_in_half_the_bytes() -> None:
    config = Config(gather_precision="bf16", keep_gathered=True, accumulate=2)
    program = run(default_passes(config, Mesh(2)), in_single_precision()).program
    kept = [str(what) for _, what in program.placeholders() if what.role.value == "gathered"]
    assert kept == ["gathered:bucket0:bfloat16", "gathered:bucket1:float64"]
    assert not _gathers(program)


def test_other_dtypes_travel_as_they_are() -> None:
    captured = read_in_low_precision()  # of float64 parameters
    for precision in OPTIONS:
        program = run(default_passes(Config(gather_precision=precision), Mesh(2)), captured).program
        assert_same_step(program, captured)


@pytest.mark.parametrize(("precision", "assumed"), [
    ("bf16", ("GatherInLowPrecision", "to(to(w, bf16), f32) = w")),
    ("int8", ("GatherQuantized", "dequantize(gather(quantize(shard(w)))) = w")),
])  # fmt: skip
def test_the_proof_says_what_it_takes_on_trust(precision: str, assumed: tuple[str, str]) -> None:
    config = Config(gather_precision=precision)
    records = run(default_passes(config, Mesh(2)), in_single_precision()).records
    assert [(record.name, *record.assumes) for record in records if record.assumes] == [assumed]
    assert not any(p.assumes for p in default_passes(config, Mesh(1))), "one rank rounds nothing"


def _gathers(program: Program) -> list[Any]:
    starts = program.graph.find_nodes(op="call_function", target=ops.all_gather)
    return [start for start in starts if start.meta["origin"].phase is not Phase.UPDATE]


@dataclass(frozen=True)
class RoundTheUpdate(Pass):
    """Send the new value of a parameter through bfloat16, too."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        results = program.results()
        for i, what in enumerate(program.outputs):
            if what is not None and what.role.value == "param" and results[i].meta["val"].dtype is torch.float32:
                origin = results[i].meta["origin"]
                for dtype in (torch.bfloat16, torch.float32):
                    results[i] = program.call(
                        aten._to_copy.default, results[i], dtype=dtype, origin=origin, before=program.output_node
                    )
        program.set_results(results, program.outputs)


@dataclass(frozen=True)
class QuantizeGradients(Pass):
    """Send what is no parameter through 8 bits."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for start in program.graph.find_nodes(op="call_function", target=ops.reduce_scatter):
            gradient, origin = operand(start), start.meta["origin"]
            if gradient.meta["val"].dtype is torch.float32:
                data = program.call(ops.quantize, gradient, origin=origin, before=start)
                again = program.call(ops.dequantize, data, torch.float32, origin=origin, before=start)
                start.replace_input_with(gradient, again)


@pytest.mark.parametrize(
    ("precision", "mistake"), [("bf16", RoundTheUpdate()), ("int8", RoundTheUpdate()), ("int8", QuantizeGradients())]
)
def test_a_mistake_beside_it_is_refused(mistake: Pass, precision: str) -> None:
    config = Config(gather_precision=precision)
    with pytest.raises(VerifyError, match=f"{mistake.name} changed what the step computes"):
        run(default_passes(config, Mesh(2), own=[mistake]), in_single_precision())


def travel(options: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What a real step sends; its losses are those of simulated ranks."""
    rank, num_ranks = world()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(BLOCK, 2 * num_ranks, bias=False), nn.Linear(2 * num_ranks, BLOCK, bias=False))
    mine = copy.deepcopy(model)
    simulated = zgraph.simulate_ranks(
        mine, SGD(mine.parameters(), lr=0.1), world_size=num_ranks, loss=_loss, bucket_bytes=1, **options
    )
    compiled: Any = zgraph.compile(
        model, optimizer=SGD(model.parameters(), lr=0.1), loss=_loss, bucket_bytes=1, check_collectives=True, **options
    )
    for step in range(2):
        parts = torch.randn(2 * num_ranks, BLOCK).chunk(num_ranks)
        expected = simulated.train_step([(part,) for part in parts])
        with mock.patch("zgraph.runtime.may_share", return_value=False):  # as on several hosts
            assert_equal({"loss": compiled.train_step(parts[rank])}, {"loss": expected}, f"step {step}")
    assert_equal(compiled.state_dict(), simulated.state_dict(), "weights")
    found: dict[str, dict[str, int]] = compiled.stats()["collectives"]
    return found


def _loss(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).square().mean()


def test_half_and_a_quarter_of_the_bytes_travel(ranks: Ranks) -> None:
    numel = 2 * 2 * BLOCK  # of each of two buckets, on two ranks, each of which receives half
    plain, low, eight = (
        ranks.run(travel, options=options)[0]
        for options in ({}, {"gather_precision": "bf16"}, {"gather_precision": "int8", "reduce_precision": "int8"})
    )
    for found, num_bytes in ((plain, numel * 4), (low, numel * 2), (eight, numel * 65 // 64)):
        assert 2 <= found["all_gather"]["count"] <= 4
        assert found["all_gather"]["bytes"] == found["all_gather"]["count"] * num_bytes // 2
    assert plain["reduce_scatter"] == low["reduce_scatter"] == {"count": 2, "bytes": 2 * numel * 4 // 2}
    assert eight["all_to_all"] == {"count": 2, "bytes": 2 * numel * 65 // 64 // 2}
    assert "reduce_scatter" not in eight


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gather_precision": "fp8"}, "gather_precision='fp8' is not known"),
        ({"gather_precision": "bf16", "zero": 2}, "gather_precision='bf16' with zero=2"),
        ({"gather_precision": "int8", "keep_gathered": True, "accumulate": 2}, "'int8' with keep_gathered"),
        ({"reduce_precision": "int8", "zero": 1}, "reduce_precision='int8' with zero=1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(zgraph.OptionError, match=reason):
        zgraph.compile(Net(), **options)
