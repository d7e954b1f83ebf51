"""When garbage is looked for, and among what."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import fx, nn

import zgraph
from zgraph.collector import collect_garbage, only_new_objects


class _Cycle:
    def __init__(self) -> None:
        self.me = self


def _garbage() -> weakref.ref[_Cycle]:
    return weakref.ref(_Cycle())


def _loss(y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """As in a program that freezes nothing: ``conftest.py`` does."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_a_part_of_compiling_leaves_is_collected_before_the_next() -> None:
    before = _garbage()
    with only_new_objects():
        left = _garbage()
        collect_garbage(fx.Graph())
        assert left() is None
        assert before() is not None, "it would take long to look at what was there before"
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with only_new_objects():
        pass
    assert 0 <= frozen - gc.get_freeze_count() < 100  # a thread that ends may free some of it meanwhile


def test_python_may_begin_with_a_few_that_are_frozen() -> None:
    """As 3.12 does."""
    with mock.patch.object(gc, "get_freeze_count", return_value=375), only_new_objects():
        left = _garbage()
        before = len(gc.get_objects())
        collect_garbage(fx.Graph())
        assert left() is None
        assert before < 10_000


def test_compiling_frees_what_was_dropped_before() -> None:
    """A compiled model is a cycle; the next one's first step needs its memory."""

    def compiled() -> nn.Module:
        model = nn.Linear(2, 1)
        return zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss=_loss)

    first = compiled()
    first.train_step(torch.ones(2, 2))
    dropped = weakref.ref(first)
    del first
    compiled().train_step(torch.ones(2, 2))
    assert dropped() is None


def test_compiling_thaws_what_it_froze_also_where_it_fails() -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise LookupError("nothing found")

    model = Fails(2, 2)
    compiled = zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(zgraph.CaptureError, match="nothing found"):
        compiled.train_step(torch.ones(2, 2))
    assert gc.get_freeze_count() == 0
