"""The parts of a training recipe go together: each pair of options is trained on real ranks and equals PyTorch."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import nn
from torch.optim import AdamW

import zgraph
from tests.ranks import Ranks
from tests.reference import slow, train_like_eager, world

CHOICES: OrderedDict[str, list[Any]] = OrderedDict(
    case=["gpt_tied", "awkward", "partial"],
    optimizer=["adamw", "sgd_momentum", "lion", "adamw_groups", "rmsprop_centered", "muon_and_adam"],
    clip=[{}, {"clip_norm": 0.5}, {"clip_value": 0.01}],
    zero=[3, 2, 1, 0],
    accumulate=[1, 3],
    world=[2, 1, 3],
    bucket_bytes=["1KiB", "16MiB"],
    dtype=[torch.float64, torch.float32],
)
PAIRS = [dict(zip(CHOICES, values, strict=True)) for values in AllPairs(CHOICES.values())]


def _name(pair: dict[str, Any]) -> str:
    return "-".join(str(value) for value in pair.values())


def test_every_pair_of_options_is_there() -> None:
    for one in CHOICES:
        for other in CHOICES:
            if one != other:
                found = {(str(pair[one]), str(pair[other])) for pair in PAIRS}
                assert len(found) == len(CHOICES[one]) * len(CHOICES[other]), (one, other)


@pytest.mark.parametrize("pair", slow(*PAIRS), ids=_name)
def test_options_together_equal_eager(ranks: Ranks, pair: dict[str, Any]) -> None:
    options = {key: value for key, value in pair.items() if key not in ("case", "clip", "world")}
    ranks.run(
        train_like_eager, pair["case"], **options, **pair["clip"], num_steps=5, num_samples=18, world=pair["world"]
    )


def train_with_nan_on_one_rank(zero: int, accumulate: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The first step is as usual; in the second, there is NaN in the last rank's last micro-batch."""
    rank, num_ranks = world()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = AdamW(model.parameters())
    compiled = zgraph.compile(
        model, optimizer=optimizer, zero=zero, accumulate=accumulate, clip_norm=1.0, loss=lambda y, _: y.square().mean()
    )
    x = torch.ones(2 * accumulate, 5)
    compiled.train_step(x)
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    moments = optimizer.state_dict()["state"]
    if rank == num_ranks - 1:
        x[-1, 0] = math.nan
    compiled.train_step(x)
    for name, value in compiled.state_dict().items():
        assert torch.equal(value, before[name]), name
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, moments[index][key]), (index, key)
    stats = compiled.stats()
    assert math.isnan(stats["gradient_norm"])
    assert compiled.train_step(torch.ones(2 * accumulate, 5)).isfinite(), "what was added up is forgotten"
    return stats, compiled.state_dict()


@pytest.mark.parametrize("zero", [3, *slow(2, 1, 0)])
def test_nan_on_one_rank_skips_the_step_on_all(ranks: Ranks, zero: int) -> None:
    (stats, state), (others, other_state) = ranks.run(train_with_nan_on_one_rank, zero=zero, accumulate=2)
    assert stats["num_skipped_steps"] == others["num_skipped_steps"] == 1
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def train_in_another_order() -> str:
    rank, _ = world()
    model = nn.Linear(3, 2)
    compiled = zgraph.compile(
        model, optimizer=AdamW(model.parameters()), loss=lambda y, _: y.square().mean(), accumulate=3
    )
    lengths = (8, 3, 3) if rank == 0 else (3, 8, 3)
    try:
        compiled.train_step(zgraph.MicroBatches([(torch.ones(n, 3),) for n in lengths]))
    except zgraph.RankError as error:
        return str(error)
    return "no error"


def test_ranks_must_have_their_micro_batches_in_one_order(ranks: Ranks) -> None:
    for message in ranks.run(train_in_another_order):
        assert "the micro-batches" in message
        assert "(8, 3)" in message


def tell_another_metric() -> str:
    rank, _ = world()
    model = nn.Linear(3, 2)
    compiled = zgraph.compile(
        model,
        optimizer=AdamW(model.parameters()),
        loss=lambda y, _: y.square().mean(),
        metrics={f"metric{rank}": lambda y, _: y.mean()},
    )
    try:
        compiled.train_step(torch.ones(2, 3))
    except zgraph.RankError as error:
        return str(error)
    return "no error"


def test_ranks_must_have_the_same_metrics(ranks: Ranks) -> None:
    for message in ranks.run(tell_another_metric):
        assert "the metrics" in message
