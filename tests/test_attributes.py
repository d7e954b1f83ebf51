"""What an object holds is compared by value where it is plain, by identity elsewhere, and put back in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zgraph.attributes import ModuleAttributes, contents, is_plain, is_same, plain_attributes


@pytest.mark.parametrize("value", [True, 3, -0.0, 1j, "relu", None, torch.float16, torch.device("cpu"), (1, None), ()])
def test_numbers_texts_and_tuples_of_them_are_plain(value: Any) -> None:
    assert is_plain(value)
    assert is_same(value, eval(repr(value), {"torch": torch, "device": torch.device}))


@pytest.mark.parametrize("value", [[1], {"a": 1}, torch.ones(1), object(), ((1,),), (torch.ones(1),)])
def test_objects_and_what_holds_them_are_not_plain(value: Any) -> None:
    assert not is_plain(value)


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0.0, -0.0), (1, None), ((1,), (True,)), ([1], [2])])
def test_values_of_another_kind_or_sign_are_not_the_same(one: Any, other: Any) -> None:
    assert not is_same(one, other)


def test_a_number_that_is_no_number_is_the_same_as_itself() -> None:
    assert is_same(float("nan"), float("nan"))


@pytest.mark.parametrize("make", [lambda: [object()], lambda: {"a": object()}, lambda: {object()}])
def test_containers_are_the_same_while_they_hold_the_same_objects(make: Any) -> None:
    value = make()
    kept = contents(value)
    assert is_same(value, kept)
    value.clear()
    assert not is_same(value, kept)


def test_plain_attributes_are_named_and_shown() -> None:
    assert ("in_features", "3") in plain_attributes(nn.Linear(3, 2))
    assert "_parameters" not in dict(plain_attributes(nn.Linear(3, 2)))


def test_changes_are_named_and_put_back_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    log = model.log = [1]
    weight = model[0].weight
    attributes = ModuleAttributes(model)
    assert attributes.changes() == {}
    model.log.append(2)
    model[1].p = 0.25
    model[0].note = "new"
    del model[0].weight
    model.late = nn.Identity()
    changes = attributes.changes()
    assert changes["1.p"] == (0.5, 0.25)
    assert changes["0.note"] == (None, "new")
    assert changes["0.weight"] == (weight, None)
    assert list(changes) == ["0.note", "0.weight", "1.p", "late", "log"]
    attributes.restore()
    assert attributes.changes() == {}
    assert model.log is log
    assert log == [1]
    assert model[0].weight is weight
    assert not hasattr(model[0], "note")
