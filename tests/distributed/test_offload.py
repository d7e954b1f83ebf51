"""Parameters and state on disks of several ranks: the same step as in memory; one rank's trouble is told on all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zgraph
from tests.models import CASES
from tests.optimizers import OPTIMIZERS, tensors_of
from tests.ranks import Ranks
from tests.reference import slow, world
from zgraph.errors import DiskError, RankError, ZgraphError
from zgraph.footprint import state_on
from zgraph.plans import show_bytes
from zgraph.program import Role
from zgraph.tiers import padded

ON_DISK = {"optimizer": "disk"}
EVERYTHING = {**ON_DISK, "parameters": "disk"}


def train_both_ways(zero: int, optimizer: str, offload: dict[str, str], **options: Any) -> None:
    rank, num_ranks = world()
    case = CASES["gpt_tied" if optimizer == "muon_and_adam" else "awkward"]
    found: list[tuple[Any, ...]] = []
    for more in ({}, {"offload": offload}):
        model = case.model(torch.float32)
        made = OPTIMIZERS[optimizer](model)
        zgraph.compile(model, made, loss=case.loss, zero=zero, bucket_bytes="1KiB", **options, **more)
        losses = []
        for step, batch in enumerate(case.batches(3, 8, dtype=torch.float32)):
            torch.manual_seed(step)
            losses.append(model.train_step(*batch.part(rank, num_ranks).args))
            if step == 1:
                made.param_groups[0]["lr"] *= 0.5
        (batch,) = case.batches(1, 2, dtype=torch.float32)
        with torch.no_grad():
            losses.append(model(*batch.args))
        whole = dict(model.full_params())
        assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items() if name in whole)
        found.append((losses, model.state_dict(), tensors_of(made), model))
    (losses, params, state, plain), (same_losses, same_params, same_state, model) = found
    assert all(map(torch.equal, losses, same_losses))
    for expected, actual in ((params, same_params), (state, same_state)):
        assert list(expected) == list(actual)
        assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    stored, stats = state_on("disk", model.program), model.stats()
    on_disk = sum(num_bytes for what, num_bytes in stored.items() if what.role is not Role.GRADIENT)
    assert stats["disk_bytes"] == sum(stored.values()) > 0
    whats = ("param_bytes", "optimizer_state_bytes")
    assert on_disk == sum(plain.stats()[what] - stats[what] for what in whats)
    assert (stats["param_bytes"] == 0) == ("parameters" in offload)
    if options.get("accumulate", 1) == 1:
        moved = f"reads {show_bytes(stats['disk_read_bytes'])} and writes {show_bytes(stats['disk_written_bytes'])}"
        assert any(note.endswith(moved) for note in model.plan.notes), (moved, model.plan.notes)


@pytest.mark.parametrize(
    ("zero", "optimizer", "offload", "options"),
    [
        (3, "adamw", {**EVERYTHING, "gradients": "disk"}, {"accumulate": 2, "clip_norm": 0.1}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (0, "adamw", ON_DISK, {}),
                (1, "sgd_momentum", ON_DISK, {"clip_norm": 0.1}),
                (2, "adamw_groups", {**ON_DISK, "gradients": "disk"}, {"accumulate": 2}),
                (3, "muon_and_adam", ON_DISK, {}),
                (3, "adamw_fused_amsgrad", ON_DISK, {"state_precision": "int8", "precision": "bf16"}),
                (3, "lion", ON_DISK, {"check_collectives": True, "ema": 0.9}),
                (0, "adamw_groups", EVERYTHING, {}),
                (1, "adamw", EVERYTHING, {}),
                (3, "adamw", {**EVERYTHING, "gradients": "disk"}, {"clip_norm": 0.1, "check_memory": True}),
                (2, "sgd_momentum", {**ON_DISK, "gradients": "disk"}, {"precision": "fp16"}),
                (2, "sgd_momentum", EVERYTHING, {"accumulate": 2}),
                (3, "muon_and_adam", EVERYTHING, {"ema": 0.9, "precision": "bf16"}),
                (3, "adamw", EVERYTHING, {"accumulate": 2, "keep_gathered": True}),
                (3, "adamw", EVERYTHING, {"unshard": 1.0, "gather_precision": "int8"}),
            )
        ),
    ],
)
def test_ranks_train_bit_for_bit_as_in_memory(
    ranks: Ranks, zero: int, optimizer: str, offload: dict[str, str], options: dict[str, Any]
) -> None:
    ranks.run(train_both_ways, zero, optimizer, offload, **options)


def train_with_activations_on_disk() -> None:
    rank, num_ranks = world()
    batch = torch.linspace(-1, 1, 2048 * 128).view(2048, 128).chunk(num_ranks)[rank]
    found = []
    for offload in (None, {**EVERYTHING, "activations": "disk, waited for"}):
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)) for _ in range(3))
        model: Any = nn.Sequential(*blocks)
        optimizer = torch.optim.AdamW(model.parameters())
        zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), offload=offload)
        losses = [model.train_step(batch) for _ in range(3)]
        found.append((losses, model.state_dict()))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    assert model.stats()["spilled_bytes"] > 0


@pytest.mark.slow
def test_each_rank_spills_its_own_activations(ranks: Ranks) -> None:
    ranks.run(train_with_activations_on_disk)


X = torch.linspace(-1, 1, 48).view(8, 6)


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    return zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), offload=EVERYTHING, **options)


def refuse(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "refused")


def train_where_one_is_refused(model: Any, refused: int, function: str, reason: str) -> None:
    """A step in which the system refuses something to one rank: all stop, that one with what its disk has said."""
    rank, _ = world()
    with pytest.MonkeyPatch.context() as patch:
        if rank == refused:
            patch.setattr(os, function, refuse)
        with pytest.raises(ZgraphError, match=reason) as caught:
            model.train_step(X)
    assert isinstance(caught.value, DiskError if rank == refused else RankError)


def start_where_one_disk_is_full() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reason = r"cannot reserve .* bytes, .*: No space left on device"
    train_where_one_is_refused(model, 1, "posix_fallocate", reason)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_step(X)
    disk = model._zgraph.state.tiers["disk"]
    assert disk.num_bytes == sum(map(padded, state_on("disk", model.program).values()))


def test_a_full_disk_of_one_rank_is_refused_by_all_before_the_first_step(ranks: Ranks) -> None:
    ranks.run(start_where_one_disk_is_full)


def write_where_one_disk_fails() -> None:
    model = small()
    model.train_step(X)
    train_where_one_is_refused(model, 0, "pwritev", r"cannot write .* bytes .*: No space left on device")


def test_a_write_that_fails_on_one_rank_stops_all_with_the_reason(ranks: Ranks) -> None:
    ranks.run(write_where_one_disk_fails)


def read_where_one_disk_fails() -> None:
    rank, _ = world()
    model = small()
    model.train_step(X)
    if rank == 1:
        with (
            mock.patch("os.preadv", side_effect=OSError(errno.EIO, "no")),
            pytest.raises(DiskError, match="cannot read"),
        ):
            model.train_step(X)
        dist.destroy_process_group()  # as when the process ends
        return
    with pytest.raises(RankError, match=r"rank 1 failed: DiskError: cannot read .* bytes at .*: Input/output error"):
        model.train_step(X)
    with pytest.raises(RankError, match="rank 1 failed: DiskError: cannot read"):
        model.train_step(X)


def test_a_read_that_fails_on_one_rank_is_the_reason_of_all(ranks: Ranks) -> None:
    ranks.run(read_where_one_disk_fails, timeout_s=60)


def share_a_directory(path: str) -> None:
    model = small(offload_path=path)
    for _ in range(2):
        model.train_step(X)
    assert list(Path(path).iterdir()) == []


@pytest.mark.parametrize("world_size", slow(2))
def test_ranks_may_share_a_directory_and_leave_nothing(ranks: Ranks, disk_path: Path, world_size: int) -> None:
    ranks.run(share_a_directory, str(disk_path), world=world_size)
