"""What is saved tensor by tensor is what torch.save writes of both state_dict, and all or nothing."""

from __future__ import annotations

import io
import os
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import zgraph
from tests.offloading import EVERYTHING, X, mean_square, small
from zgraph import checkpoints
from zgraph.errors import OptionError, StateError, ZgraphError
from zgraph.flat import FlatTensors


class Mixed(nn.Module):
    """Tied, frozen and expanded tensors, buffers, and one that state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.arange(6.0), requires_grad=False)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.ones(1, 6, dtype=torch.bool).expand(3, 6))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x))) + self.frozen


def trained(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.AdamW([{"params": [model.first.weight], "lr": 0.1}, {"params": model.norm.parameters()}])
    optimizer.add_param_group({"params": [model.first.bias, model.second.bias], "weight_decay": 0.0})
    model = zgraph.compile(model, optimizer, loss=mean_square, bucket_bytes=1, **options)
    for _ in range(2):
        model.train_step(X)
    return model, optimizer


def assert_as_torch_saves(path: Path, model: Any, optimizer: Any, others: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **others}, buffer)
    buffer.seek(0)
    expected, found = torch.load(buffer), torch.load(path, mmap=True)
    assert list(found) == list(expected)
    assert type(found["model"]) is type(expected["model"])
    assert list(found["model"]) == list(expected["model"])
    assert found["model"]._metadata == expected["model"]._metadata
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not list(checkpoints.damage(path))
    assert not list(checkpoints.problems(checkpoints.read(path)))


@pytest.mark.parametrize("options", [{}, {"offload": EVERYTHING}, {"state_precision": "int8", "ema": 0.9}], ids=str)
def test_the_file_is_what_torch_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    model, optimizer = trained(**options)
    others = {"steps": 2, "half": torch.ones(3, dtype=torch.bfloat16), "small": torch.ones(2).to(torch.float8_e4m3fn)}
    zgraph.save(model, tmp_path / "all.pt", others)
    assert_as_torch_saves(tmp_path / "all.pt", model, optimizer, others)
    assert os.listdir(tmp_path) == ["all.pt"]
    held = torch.load(tmp_path / "all.pt", mmap=True)["model"]
    assert held["first.weight"].data_ptr() == held["second.weight"].data_ptr()  # tied ones are there once


def test_training_goes_on_from_the_file(tmp_path: Path) -> None:
    model, _ = small(offload=EVERYTHING)
    model.train_step(X)
    zgraph.save(model, str(tmp_path / "all.pt"))
    (again, optimizer), saved = small(offload=EVERYTHING), torch.load(tmp_path / "all.pt", mmap=True)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert all(torch.equal(again.train_step(X), model.train_step(X)) for _ in range(2))


@pytest.mark.parametrize("offload", [None, EVERYTHING], ids=str)
def test_no_more_than_a_bucket_of_each_kind_is_in_memory(tmp_path: Path, offload: dict[str, str] | None) -> None:
    model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    zgraph.compile(model, optimizer, loss=mean_square, bucket_bytes=1, offload=offload)
    model.train_step(torch.ones(2, 50))
    held: dict[int, set[str]] = {}

    def watched(flat: FlatTensors, bucket: Any) -> torch.Tensor:
        value = opened(flat, bucket)
        held[id(flat)] = set(flat._opened) | set(flat._gathered)
        assert sum(map(len, held.values())) <= 3
        return value

    opened = FlatTensors._whole
    with mock.patch.object(FlatTensors, "_whole", watched):
        zgraph.save(model, tmp_path / "all.pt")
    assert len(held) == (2 if offload is None else 3)


# What cannot be


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    model, _ = small(offload=EVERYTHING)
    with pytest.raises(ZgraphError, match="nothing is compiled yet"):
        zgraph.save(model, tmp_path / "all.pt")
    model.train_step(X)
    zgraph.save(model, tmp_path / "all.pt")
    before = (tmp_path / "all.pt").read_bytes()
    with pytest.raises(StateError, match=r"cannot be written: .*No such file or directory"):
        zgraph.save(model, tmp_path / "nowhere" / "all.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(StateError, match=r"cannot be written: .*File too large"):
            zgraph.save(model, tmp_path / "all.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with (
        mock.patch.object(FlatTensors, "read", side_effect=ValueError("broken")),
        pytest.raises(ValueError, match="broken"),
    ):
        zgraph.save(model, tmp_path / "all.pt")
    assert (tmp_path / "all.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["all.pt"]


def test_what_cannot_be_saved_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    model, _ = small(offload=EVERYTHING)
    model.train_step(X)
    for given, error, match in (
        ((nn.Linear(2, 2), tmp_path / "a"), OptionError, "a Linear is no model that zgraph.compile gave"),
        ((model, tmp_path / "a", {"model": 1}), OptionError, "others='model' is what the file has of the model"),
        ((model, tmp_path / "a", 3), OptionError, "others=3 has no names"),
        ((model, nn.Linear(2, 2), "a"), OptionError, "a file cannot be at a Linear"),
        ((model, tmp_path), OptionError, "is a directory"),
        ((model, tmp_path / "a", {"f": lambda: 0}), StateError, "cannot be pickled"),
        ((model, tmp_path / "a", {"t": torch.ones(2, device="meta")}), StateError, "a tensor is on meta"),
    ):
        with pytest.raises(error, match=match):
            zgraph.save(*given)
    assert not os.listdir(tmp_path)


def test_hooks_that_compute_what_is_saved_do_so_or_are_refused(tmp_path: Path) -> None:
    (away, optimizer), (here, _) = small(offload=EVERYTHING), small()
    hook = optimizer.register_state_dict_post_hook(lambda _, found: _to_cpu(found))  # comes before zgraph's own
    for model in (away, here):
        model.train_step(X)
        model.register_state_dict_post_hook(lambda _, found, *__: found.update(twice=2 * found["0.weight"].detach()))
    zgraph.save(here, tmp_path / "a")
    assert torch.equal(torch.load(tmp_path / "a")["model"]["twice"], here.state_dict()["twice"])
    with pytest.raises(StateError, match="a hook of the model decides what is saved, and would see parameters without"):
        zgraph.save(away, tmp_path / "b")
    away._state_dict_hooks.clear()
    with pytest.raises(StateError, match=r"optimizer.state_dict\(\) failed where tensors are not read yet: .*'to'"):
        zgraph.save(away, tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]
    assert torch.equal(away.train_step(X), here.train_step(X))
    hook.remove()
    zgraph.save(away, tmp_path / "b")


def _to_cpu(found: dict[str, Any]) -> None:
    for entries in found["state"].values():
        entries.update({key: value.to("cpu") for key, value in entries.items()})


def test_values_that_parameters_were_given_are_saved(tmp_path: Path) -> None:
    model, _ = small()
    model.train_step(X)
    model[0].weight.data = torch.full_like(model[0].weight, 7)
    zgraph.save(model, tmp_path / "a")
    assert torch.equal(torch.load(tmp_path / "a")["model"]["0.weight"], model[0].weight)


def test_a_link_stays_one_and_a_file_as_private_as_it_was(tmp_path: Path) -> None:
    model, _ = small()
    model.train_step(X)
    (tmp_path / "real").touch(mode=0o600)
    (tmp_path / "link").symlink_to("real")
    zgraph.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    assert torch.load(tmp_path / "real").keys() == {"model", "optimizer"}
