"""A run fetches what the step reads, makes the state that is not there yet, and stores what the step returns."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
from torch import nn

import zgraph
from zgraph.program import Program


def refuse(_: Program) -> NoReturn:
    raise AssertionError("a run has to know its inputs already: to search the program takes longer with each of them")


def test_state_is_made_without_searching_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    zgraph.compile(model, optimizer=optimizer, bucket_bytes=1, loss=lambda y, _: y.square().mean())
    model.train_step(torch.ones(2, 4))
    before = optimizer.state_dict()["state"]
    runtime = model._zgraph
    for entries in runtime.state.opt.values():
        entries.clear()
    monkeypatch.setattr(Program, "placeholders", refuse)
    model.train_step(torch.ones(2, 4))
    assert str(optimizer.state_dict()["state"]) == str(before)
