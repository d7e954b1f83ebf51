"""Options, batches and ways to start change how a step runs, never what it computes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allpairspy import AllPairs
from torch import Tensor, nn

import zgraph
from tests.calibrations import made_up
from tests.choices import in_turn
from tests.models import CASES, GPT
from tests.optimizers import OPTIMIZERS
from tests.ranks import Ranks
from tests.reference import Eager, assert_equal, assert_same_state, nightly, slow, train_like_eager, world


@in_turn("bucket_bytes", ["1KiB", 1, "1GiB"], "zero", [3, 2, 0])
def test_any_bucket_size_equals_eager(ranks: Ranks, bucket_bytes: int | str, zero: int) -> None:
    ranks.run(train_like_eager, "gpt_tied", bucket_bytes=bucket_bytes, zero=zero, num_steps=3)


@pytest.mark.parametrize("prefetch", [*slow(0, 64), *nightly(2)])
def test_any_prefetch_equals_eager(ranks: Ranks, prefetch: int) -> None:
    ranks.run(train_like_eager, "gpt", bucket_bytes="1KiB", prefetch=prefetch, zero=3, num_steps=3)


@pytest.mark.parametrize("zero", slow(0, 3))
def test_a_group_of_one_rank_equals_eager(ranks: Ranks, zero: int) -> None:
    ranks.run(train_like_eager, "gpt_tied", zero=zero, num_steps=3, world=1, group=True)


def compile_where_machines_differ(saved: str) -> None:
    rank, num_ranks = world()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZGRAPH_HARDWARE", saved if rank else os.devnull + ".json")
        model = CASES["gpt"].model(torch.float32)
        zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))
        model.train_step(*CASES["gpt"].batches(1)[0].part(rank, num_ranks).args)
        assert model.plan.hardware == "cpu"  # as rank 0 finds it; rank 1 has calibrated


def test_all_ranks_schedule_for_the_machine_of_the_first(ranks: Ranks, tmp_path: Path) -> None:
    made_up().save(tmp_path / "hardware.json")
    ranks.run(compile_where_machines_differ, str(tmp_path / "hardware.json"))


def train_on_two_lengths(zero: int) -> None:
    rank, num_ranks = world()
    model, reference = CASES["gpt"].model(torch.float64), CASES["gpt"].model(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zgraph.compile(model, optimizer=optimizer, zero=zero)
    eager = Eager(CASES["gpt"], reference, torch.optim.AdamW(reference.parameters(), lr=1e-2))
    for step, batch in enumerate(CASES["gpt"].batches(6)):
        length = (7, 4)[step % 2]
        batch = batch._replace(args=tuple(t[:, :length] for t in batch.args))
        loss = model.train_step(*batch.part(rank, num_ranks).args)
        assert_equal({"loss": loss}, {"loss": eager.step(batch)}, f"step {step}")
        assert model.stats()["num_captures"] == min(step + 1, 2)
    assert_same_state(model, optimizer, eager, "at the end")


@pytest.mark.parametrize("zero", slow(3, 1))
def test_a_new_shape_is_captured_once_and_keeps_the_state(ranks: Ranks, zero: int) -> None:
    ranks.run(train_on_two_lengths, zero)


class Flagged(nn.Module):
    """Takes numbers, flags and nested tensors beside plain ones; its output is an object with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, inputs: dict[str, Tensor], *, power: int = 1, double: bool = False) -> dict[str, Tensor]:
        x = torch.tanh(self.enter(inputs["x"])) ** power
        loss = F.cross_entropy(self.leave(x), inputs["target"])
        return {"loss": 2 * loss if double else loss, "hidden": x}


def test_numbers_and_flags_are_constants_of_the_captured_step(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Flagged()
    reference = Flagged()
    reference.load_state_dict(model.state_dict())
    optimizer, eager = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(reference.parameters(), lr=0.1)
    zgraph.compile(model, optimizer=optimizer)
    batch = {"x": torch.randn(6, 7), "target": torch.randint(3, (6,))}
    calls: list[dict[str, Any]] = [{}, {"power": 2}, {"power": 3, "double": True}, {"power": 2}, {}]
    for kwargs in calls:
        loss = model.train_step(batch, **kwargs)
        eager.zero_grad()
        expected = reference(batch, **kwargs)["loss"]
        expected.backward()
        eager.step()
        assert_equal({"loss": loss}, {"loss": expected.detach()}, str(kwargs))
    assert model.stats()["num_captures"] == 3
    told = [record for record in caplog.records if record.name.startswith("zgraph")]
    assert len(told) == 2, told  # once for each capture after the first
    assert all("arguments" in record.getMessage() for record in told)


class MixedPrecision(nn.Module):
    """Parameters of two dtypes, which no one bucket can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(7, 5).double(), nn.Linear(5, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.leave(torch.tanh(self.enter(x.double())).float()), target)


def train_mixed_precision(zero: int) -> None:
    rank, num_ranks = world()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(MixedPrecision())
    optimizer, other = (torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models)
    zgraph.compile(models[0], optimizer=optimizer, zero=zero)
    case = CASES["partial"]
    eager = Eager(case.__class__(MixedPrecision, case.make_batch), models[1], other)
    for batch in case.batches(5):
        loss = models[0].train_step(*batch.part(rank, num_ranks).args)
        assert_equal({"loss": loss}, {"loss": eager.step(batch)}, "loss")
    expected = {name: t.float() for name, t in models[1].state_dict().items()}  # float32 took part in every gradient
    assert_equal({name: t.float() for name, t in models[0].state_dict().items()}, expected, "at the end")
    assert models[0].state_dict()["enter.weight"].dtype == torch.float64


@pytest.mark.parametrize("zero", slow(3, 1))
def test_parameters_of_two_dtypes_train_together(ranks: Ranks, zero: int) -> None:
    ranks.run(train_mixed_precision, zero)


def build_on_meta(zero: int, learning_rate: float) -> None:
    case, (rank, num_ranks) = CASES["gpt_tied"], world()
    batches = case.batches(3)
    reference = GPT(tied=True).double()
    torch.manual_seed(3)
    for module in reference.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    generator = torch.get_rng_state()
    eager = Eager(case, reference, torch.optim.AdamW(reference.parameters(), lr=learning_rate))
    with torch.device("meta"):
        model = GPT(tied=True).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    torch.manual_seed(3)
    zgraph.compile(model, optimizer=optimizer, zero=zero)
    for step, batch in enumerate(batches):
        loss = model.train_step(*batch.part(rank, num_ranks).args)
        assert_equal({"loss": loss}, {"loss": eager.step(batch)}, f"step {step}")
        assert torch.equal(torch.get_rng_state(), generator)
    assert_same_state(model, optimizer, eager, "at the end")
    if learning_rate == 0.0:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, reference.state_dict()[name]), f"{name} is not initialised as in plain PyTorch"


@in_turn("world, zero", [(2, 3), (1, 3), (3, 1), (2, 0)], "learning_rate", [0.0, 1e-2])
def test_a_model_on_meta_is_initialised_as_a_real_one(
    ranks: Ranks, world: int, zero: int, learning_rate: float
) -> None:
    ranks.run(build_on_meta, zero, learning_rate, world=world)


SCRIPT = """
import atexit, json, torch, zgraph
from tests.models import CASES
case = CASES["gpt_tied"]
losses = []

@atexit.register
def report():
    if rank == 0:
        print(json.dumps([world, losses, torch.distributed.is_initialized()]))

model = case.model(torch.float64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model = zgraph.compile(model, optimizer=optimizer, zero=3)
distributed = torch.distributed.is_initialized()
rank = torch.distributed.get_rank() if distributed else 0
world = torch.distributed.get_world_size() if distributed else 1
losses += [model.train_step(*batch.part(rank, world).args).item() for batch in case.batches(3)]
"""


@pytest.mark.slow
def test_the_same_script_runs_alone_and_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    results = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    (alone, losses, _), (together, same, still_initialized) = results
    assert (alone, together) == (1, 2)
    assert not still_initialized, "a process that ends with its group aborts now and then"
    assert same == pytest.approx(losses, rel=1e-10)


CHOICES: OrderedDict[str, list[Any]] = OrderedDict(
    zero=[3, 2, 1, 0],
    optimizer=["adamw", "sgd_momentum", "muon_and_adam", "adafactor"],
    reduce_precision=["bf16", None],
    state_precision=["int8", None],
    precision=[None, "bf16", "fp16"],
    accumulate=[1, 2],
    clip=[{}, {"clip_norm": 0.5}, {"clip_value": 0.01}],
    ema=[0.5, None],
    recompute=[["0"], None],
)
PAIRS = [dict(zip(CHOICES, values, strict=True)) for values in AllPairs(CHOICES.values())]


def train_like_simulated_ranks(optimizer: str, clip: dict[str, float], **options: Any) -> None:
    """Train on all ranks; weights and state are, bit for bit, those of simulated ranks."""
    rank, num_ranks = world()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    simulated = copy.deepcopy(model)
    options.update(loss=lambda y, _: y.square().mean(), **clip)
    its_optimizer = OPTIMIZERS[optimizer](model)
    compiled = zgraph.compile(model, optimizer=its_optimizer, **options)
    ranks = zgraph.simulate_ranks(simulated, OPTIMIZERS[optimizer](simulated), world_size=num_ranks, **options)
    for _ in range(3):
        parts = torch.randn(4 * num_ranks, 5).chunk(num_ranks)
        loss = compiled.train_step(parts[rank])
        assert torch.equal(loss, ranks.train_step([(part,) for part in parts]))
    state, entries_of = compiled.state_dict(), its_optimizer.state_dict()["state"]
    assert all(torch.equal(state[name], value) for name, value in ranks.state_dict().items())
    order = {id(p): i for i, p in enumerate(p for group in its_optimizer.param_groups for p in group["params"])}
    numbers = {name: order[id(p)] for name, p in model.named_parameters()}
    for name, entries in ranks.optimizer_state().items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(entries_of[numbers[name]][key]), torch.as_tensor(value)), (name, key)
        if options["ema"] is not None:
            assert torch.equal(compiled.ema_state_dict()[name], entries["weight_ema"])


@pytest.mark.parametrize("pair", [*PAIRS[:2], *slow(*PAIRS[2:])], ids=lambda pair: "-".join(map(str, pair.values())))
def test_options_together_are_the_same_on_real_ranks_as_on_simulated_ones(ranks: Ranks, pair: dict[str, Any]) -> None:
    ranks.run(train_like_simulated_ranks, **pair)


def train_with_tiles(**options: Any) -> None:
    rank, num_ranks = world()
    tokens = torch.arange(8 * 9 * num_ranks).view(-1, 9).remainder(64).chunk(num_ranks)[rank]
    found = []
    for tile_bytes in (None, 1024):
        torch.manual_seed(0)
        model = GPT(width=32, vocab=64).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        zgraph.compile(model, optimizer, zero=3, bucket_bytes=4096, tile_bytes=tile_bytes, **options)
        losses = [model.train_step(tokens[:, :-1], tokens[:, 1:]) for _ in range(4)]
        found.append({"loss": torch.stack(losses), **model.state_dict()})
        assert ("product_columns" in model.source) == (tile_bytes is not None and num_ranks > 1)
    assert_equal(found[1], found[0], "with tiles")


@pytest.mark.parametrize("options", [{}, *slow({"clip_norm": 0.1, "accumulate": 2}, {"kernels": "zgraph"})])
def test_tiles_of_large_matrices_compute_the_same(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.run(train_with_tiles, **options)
