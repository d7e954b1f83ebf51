"""Four ranks as two nodes of two: what real processes compute is what the simulation says, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import zgraph
from tests.optimizers import OPTIMIZERS
from tests.ranks import Ranks
from tests.reference import nightly, slow, world
from tests.test_hybrid import Net, batches, made
from zgraph import flat
from zgraph.errors import OptionError, RankError
from zgraph.groups import axis_group, open_axes
from zgraph.program import REPLICA, SHARD, Mesh
from zgraph.which_comm import make_comm

Trained = tuple[list[Tensor], dict[str, Tensor], dict[str, dict[str, Any]], dict[str, dict[str, int]]]
"""Losses, parameters, optimizer state by parameter, and what was communicated."""


def train(optimizer: str, options: dict[str, Any]) -> Trained:
    rank, num_ranks = world()
    model, mine, _, _ = made(optimizer, torch.float32)
    torch.manual_seed(rank)  # as the simulation draws
    compiled = zgraph.compile(model, optimizer=mine, **options)
    losses = [compiled.train_step(*parts[rank]) for parts in batches(num_ranks, dtype=torch.float32)]
    ordered = {id(p): name for name, p in model.named_parameters()}
    names = [ordered[id(p)] for group in mine.param_groups for p in group["params"]]
    state = {names[index]: entries for index, entries in mine.state_dict()["state"].items()}
    return losses, dict(model.state_dict()), state, compiled.stats()["collectives"]


def train_on_hosts(optimizer: str, options: dict[str, Any]) -> Trained:
    """Where no memory is shared."""
    with mock.patch("zgraph.runtime.may_share", return_value=False):
        return train(optimizer, options)


def train_as_simulated(
    ranks: Ranks, optimizer: str, options: dict[str, Any], training: Callable[..., Trained] = train
) -> list[dict[str, dict[str, int]]]:
    """Train on four ranks in two nodes, and simulate it; what each rank has communicated."""
    options = {**options, **({} if "secondary_size" in options else {"shard_size": 2})}
    found = ranks.run(training, optimizer, options, world=4)
    _, _, other, theirs = made(optimizer, torch.float32)
    simulated = zgraph.simulate_ranks(other, theirs, world_size=4, **options)
    expected = [simulated.train_step(parts) for parts in batches(4, dtype=torch.float32)]
    params, named = simulated.state_dict(), simulated.optimizer_state()
    for losses, its_params, its_state, _ in found:
        torch.testing.assert_close(losses, expected)  # an all-reduce of four adds up in an order of its own
        torch.testing.assert_close(its_params, params, rtol=0, atol=0)
        assert its_state.keys() == named.keys()
        for name, entries in its_state.items():
            for key, value in entries.items():
                torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(named[name][key]), rtol=0, atol=0)
    return [collectives for *_, collectives in found]


CHOICES: list[tuple[str, dict[str, Any]]] = [
    *slow(
        (
            "adamw",
            {"zero": 3, "clip_norm": 0.1, "accumulate": 2, "keep_gathered": True, "bucket_bytes": 256, "ema": 0.9},
        ),
        ("adamw", {"zero": 3, "secondary_size": 2, "accumulate": 2, "precision": "bf16", "bucket_bytes": 256}),
        ("muon_and_adam", {"zero": 3, "bucket_bytes": 256}),
        ("muon_and_adam", {"zero": 2, "check_collectives": True}),
        ("adamw", {"zero": 3, "precision": "fp16", "bucket_bytes": 256, "clip_norm": 0.1}),
        ("adamw", {"zero": 2, "state_precision": "int8"}),
    ),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join([choice[0], *map(str, choice[1])]))
def test_two_nodes_of_two_ranks_compute_what_is_simulated(ranks: Ranks, choice: tuple[str, dict[str, Any]]) -> None:
    train_as_simulated(ranks, *choice)


@pytest.mark.slow
def test_bytes_are_counted_by_axis(ranks: Ranks) -> None:
    whole = 64 + 16 + 80 + 16 + 32 + 16  # elements of the only bucket, each parameter padded to a multiple of 16
    for found in train_as_simulated(ranks, "adamw", {"zero": 3}, train_on_hosts):
        assert found["all_gather along shard"] == {"count": 1, "bytes": whole // 2 * 4}
        assert found["reduce_scatter along shard"] == {"count": 1, "bytes": whole // 2 * 4}
        assert found["all_reduce along replica"] == {"count": 1, "bytes": whole // 2 * 4}
        assert found["all_reduce"]["count"] == 1


@pytest.mark.slow
def test_with_secondary_shards_backward_gathers_inside_of_nodes(ranks: Ranks) -> None:
    whole = 256  # elements of the only bucket, padded for four ranks to multiples of 16
    for found in train_as_simulated(ranks, "adamw", {"zero": 3, "secondary_size": 2}, train_on_hosts):
        assert found["all_gather"] == {"count": 1, "bytes": whole * 3 // 4 * 4}
        assert found["all_gather along secondary"] == {"count": 1, "bytes": whole // 2 * 4}


def save_and_go_on(shard_size: int | None) -> None:
    """What two nodes have saved goes on as it would have there, in as many ranks as one or as two nodes."""
    rank, num_ranks = world()
    model, optimizer, other, theirs = made("adamw")
    first = zgraph.compile(model, optimizer=optimizer, shard_size=2)
    second = zgraph.compile(other, optimizer=theirs, shard_size=shard_size)
    before, *after = batches(num_ranks)
    first.train_step(*before[rank])
    second.train_step(*after[0][rank])  # of what it has learnt nothing is left
    second.load_state_dict(first.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    for parts in after:
        torch.testing.assert_close(second.train_step(*parts[rank]), first.train_step(*parts[rank]))
    torch.testing.assert_close(second.state_dict(), first.state_dict())
    copies = [None] * num_ranks
    dist.all_gather_object(copies, {name: value.sum().item() for name, value in first.state_dict().items()})
    assert copies == copies[:1] * num_ranks


@pytest.mark.parametrize("shard_size", [*slow(2, None), *nightly(1)])
def test_what_nodes_have_saved_goes_on_in_other_nodes(ranks: Ranks, shard_size: int | None) -> None:
    ranks.run(save_and_go_on, shard_size, world=4)


def start_on_meta() -> None:
    rank, num_ranks = world()
    torch.manual_seed(0)
    expected = Net()
    torch.manual_seed(rank)  # rank 0's is that of all
    with torch.device("meta"):
        model = Net()
    optimizer = OPTIMIZERS["adamw"](model)
    compiled = zgraph.compile(model, optimizer=optimizer, shard_size=2)
    reference = copy.deepcopy(expected)
    plain = OPTIMIZERS["adamw"](reference)
    [parts] = batches(num_ranks, 1, torch.float32)
    loss = reference(*map(torch.cat, zip(*parts, strict=True)))
    loss.backward()
    plain.step()
    torch.testing.assert_close(compiled.train_step(*parts[rank]), loss.detach())
    torch.testing.assert_close(compiled.state_dict(), reference.state_dict())
    state = compiled.__dict__["_zgraph"].state
    assert dist.get_world_size(state.shard_group) == 2
    [mine] = state.params.values()
    between = axis_group(dist.group.WORLD, state.mesh, REPLICA)
    copies = flat.gather(mine, between).chunk(2)
    assert torch.equal(*copies), "nodes have the same"
    with torch.no_grad():
        torch.testing.assert_close(compiled(*parts[0]), reference(*parts[0]))


@pytest.mark.slow
def test_a_model_on_meta_starts_alike_in_every_node_and_is_gathered_inside_of_each(ranks: Ranks) -> None:
    ranks.run(start_on_meta, world=4)


def use_axes() -> None:
    rank, _ = world()
    group, mesh = dist.group.WORLD, Mesh(4, shard=2)
    open_axes(group, mesh)
    known = [axis_group(group, mesh, axis) for axis in (SHARD, REPLICA)]
    open_axes(group, mesh)
    assert [axis_group(group, mesh, axis) for axis in (SHARD, REPLICA)] == known, "they are made once"
    comm = make_comm(group, {"cpu"}, mesh)
    inside, between = comm.axes[SHARD], comm.axes[REPLICA]
    assert (inside.rank, between.rank) == (rank % 2, rank // 2)
    node = 2 * (rank // 2)
    for numel in (4, 2**14):  # what ranks send each other, and what they read
        value = torch.full([numel], float(rank))
        whole = inside.wait(inside.all_gather(value))
        assert whole.view(2, -1).unique(dim=1).tolist() == [[node], [node + 1]]
        assert between.wait(between.all_reduce(value, "avg")).unique().tolist() == [rank % 2 + 1.0]
        assert inside.wait(inside.reduce_scatter(value.clone(), "sum")).unique().tolist() == [2.0 * node + 1]
        assert comm.wait(comm.all_reduce(value, "sum")).unique().tolist() == [6.0]
    assert sorted(comm.traffic.count) == [
        "all_gather along shard", "all_reduce", "all_reduce along replica", "reduce_scatter along shard"
    ]  # fmt: skip
    del known
    dist.destroy_process_group()
    with pytest.raises(RankError, match="was destroyed"):
        inside.wait(inside.all_gather(value))


def test_each_axis_has_process_groups_of_its_own_that_end_with_that_of_all(ranks: Ranks) -> None:
    ranks.run(use_axes, world=4)


def disagree() -> str:
    rank, num_ranks = world()
    model, optimizer, _, _ = made("adamw")
    compiled = zgraph.compile(model, optimizer=optimizer, shard_size=2 if rank else None)
    [parts] = batches(num_ranks, 1)
    with pytest.raises(RankError) as raised:
        compiled.train_step(*parts[rank])
    return str(raised.value)


def refuse() -> str:
    model, optimizer, _, _ = made("adamw")
    with pytest.raises(OptionError) as raised:
        zgraph.compile(model, optimizer=optimizer, shard_size=2)
    return raised.value.what


def test_ranks_that_disagree_on_nodes_stop_before_they_make_groups(ranks: Ranks) -> None:
    for said in ranks.run(disagree, world=4):
        assert "the ranks disagree on zgraph options" in said


def test_nodes_that_are_not_full_are_refused(ranks: Ranks) -> None:
    assert ranks.run(refuse, world=3) == ["shard_size=2 does not divide the 3 ranks"] * 3
