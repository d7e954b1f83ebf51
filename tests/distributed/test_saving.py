"""What ranks save together is what each of them has of the whole; one rank's trouble is told on all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import zgraph
from tests.ranks import Ranks
from tests.test_saving import assert_as_torch_saves, trained
from zgraph.errors import OptionError, RankError, StateError

STATE = {"optimizer": "disk"}
ON_DISK = {**STATE, "parameters": "disk"}


def save_together(path: Path, zero: int, offload: dict[str, str] | None) -> None:
    model, optimizer = trained(zero=zero, offload=offload)
    zgraph.save(model, path, {"steps": 2})
    assert_as_torch_saves(path, model, optimizer, {"steps": 2})


@pytest.mark.parametrize(
    ("zero", "offload"),
    [(3, ON_DISK), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, None), (1, None), (0, STATE)))],
    ids=str,
)
def test_the_file_is_what_torch_writes_of_all_ranks(
    ranks: Ranks, tmp_path: Path, zero: int, offload: dict[str, str] | None
) -> None:
    ranks.run(save_together, tmp_path / "all.pt", zero, offload)


def save_where_that_cannot_be(path: Path) -> None:
    model, _ = trained(zero=3)
    with pytest.raises(StateError if dist.get_rank() == 0 else RankError, match="No such file or directory"):
        zgraph.save(model, path / "nowhere" / "all.pt")
    with pytest.raises(RankError, match=r"rank 0 has called zgraph\.save\(\), rank 1 .*model\.state_dict\(\)"):
        zgraph.save(model, path / "all.pt") if dist.get_rank() == 0 else model.state_dict()
    assert not list(path.iterdir())
    wrong = path if dist.get_rank() == 1 else path / "all.pt"
    with pytest.raises(OptionError if dist.get_rank() == 1 else RankError, match="is a directory"):
        zgraph.save(model, wrong)
    zgraph.save(model, path / "all.pt")
    assert torch.load(path / "all.pt").keys() == {"model", "optimizer"}


def test_all_ranks_are_told_why_a_file_cannot_be_written(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_where_that_cannot_be, tmp_path)
