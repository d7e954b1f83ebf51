"""What goes wrong with state on a disk: it is told, and no state is lost that need not be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.offloading import EVERYTHING, ON_DISK, X, small
from zgraph.errors import DiskError, OptionError, StateError
from zgraph.footprint import state_on
from zgraph.tiers import padded

REPO = Path(__file__).parents[1]


def test_a_model_that_was_interrupted_on_its_way_to_the_disk_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small(offload=EVERYTHING)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zgraph.disk.DiskTensor.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.train_step(X)
    for call in (lambda: model.train_step(X), model.state_dict):
        with pytest.raises(StateError, match="left in parts when moving its state failed: KeyboardInterrupt"):
            call()


def test_optimizer_state_that_torch_cannot_load_leaves_the_parameters_as_they_are() -> None:
    (model, optimizer), (plain, _) = small(offload=EVERYTHING), small()
    for each in (model, plain):
        each.train_step(X)
    progress = optimizer.state_dict()
    for entries in progress["state"].values():
        entries.update({key: value.to("meta") for key, value in entries.items() if value.dim()})
    with pytest.raises(NotImplementedError):
        optimizer.load_state_dict(progress)
    assert torch.equal(model.train_step(X), plain.train_step(X))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"offload": "disk"}, "offload='disk' does not say what lies where"),
        ({"offload": {}}, "offload={} does not say"),
        ({"offload": "auto"}, "offload='auto' is chosen by a budget, and none was given"),
        (
            {"offload": {"batch": "disk"}},
            "'batch' is none of what can be moved: 'optimizer', 'parameters', 'gradients'",
        ),
        (
            {"offload": {"gradients": "disk"}},
            "gradients with accumulate=1 and without clip_norm, where each dies in the update of its bucket",
        ),
        ({"offload": {"optimizer": "tape"}}, "'optimizer' can lie on 'host' or 'disk', not on 'tape'"),
        ({"offload": {"optimizer": "host"}, "offload_path": "/tmp"}, "offload_path, and .* nothing lies on a disk"),
        ({"offload_path": "/tmp"}, "offload_path without offload"),
        (
            {"load_ahead": True},
            "load_ahead with offload=None: it is for optimizer state on the host",
        ),
        ({"load_ahead": True, "offload": {"optimizer": "disk"}}, "load_ahead with offload={'optimizer': 'disk'}"),
        ({"load_ahead": True, "offload": {"parameters": "host"}}, "load_ahead with offload={'parameters': 'host'}"),
        (
            {"load_ahead": True, "offload": {"optimizer": "host", "activations": "host"}},
            "where no activations go there",
        ),
        ({"offload": ON_DISK, "offload_path": 3}, "offload_path=3 is no path"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        small(**options)


def test_a_directory_may_be_a_path(disk_path: Path) -> None:
    model, _ = small(offload=ON_DISK, offload_path=disk_path)
    model.train_step(X)
    assert model._zgraph.state.tiers["disk"].path == disk_path


def test_a_directory_may_be_below_the_users(disk_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(disk_path.parent))
    model, _ = small(offload=ON_DISK, offload_path=f"~/{disk_path.name}")
    model.train_step(X)
    assert model._zgraph.state.tiers["disk"].path == disk_path


@pytest.mark.parametrize(
    ("offload", "fix"),
    [
        ({"optimiser": "disk"}, "say 'optimizer'"),
        ({"activation": "disk"}, "say 'activations'"),
        ({"parameters": "dsk"}, "say 'disk'"),
        ({"activations": "disk waited for"}, "say 'disk, waited for'"),
        ({"parameters": "tape"}, "say one of them for 'parameters': 'disk' on a CPU"),
        ({"everything": "disk"}, "give offload={'optimizer': 'disk', 'parameters': 'disk'}, or one of them, or None"),
    ],
)
def test_what_may_be_misspelt_has_a_way_out_of_its_own(offload: dict[str, str], fix: str) -> None:
    with pytest.raises(OptionError) as refusal:
        small(offload=offload)
    assert refusal.value.fix == fix


def test_a_directory_that_is_not_there_is_refused_before_anything_changes(disk_path: Path) -> None:
    model, _ = small(offload=ON_DISK, offload_path=str(disk_path / "missing"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DiskError, match=f"cannot make a file in {disk_path}/missing: No such file or directory"):
        model.train_step(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (disk_path / "missing").mkdir()
    model.train_step(X)


def test_a_disk_without_room_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small(offload=ON_DISK)
    asked = []

    def full(*args: int) -> None:
        asked.append(args[-1])
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskError, match=r"cannot reserve .* bytes, .*: No space left on device\n.*make room there"):
            model.train_step(X)
    model.train_step(X)
    assert asked == [sum(padded(size) for size in state_on("disk", model.program).values())]


def test_a_block_that_has_changed_stops_the_step_that_reads_it() -> None:
    model, _ = small(offload=ON_DISK)
    model.train_step(X)
    disk = model._zgraph.state.tiers["disk"]
    with open(f"/proc/self/fd/{disk._fd}", "r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(DiskError, match="gave back other bytes than were written"):
        model.train_step(X)


def test_what_cannot_be_written_stops_the_step_and_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small(offload=ON_DISK)
    model.train_step(X)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(DiskError, match=r"cannot write .*: Input/output error"):
            model.train_step(X)
    for use in (lambda: model.train_step(X), optimizer.state_dict):
        with pytest.raises(DiskError, match="never been written completely"):
            use()


@pytest.mark.parametrize("num", [4, pytest.param(50, marks=pytest.mark.nightly)])
@pytest.mark.slow
def test_runs_that_are_killed_leave_nothing_to_the_next_but_what_they_saved(disk_path: Path, num: int) -> None:
    """Each at a moment of its own; a checkpoint is old or new, and runs and files beside it are as ever."""
    command = [sys.executable, "-m", "tests.killing", str(disk_path), str(num)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
