"""Every differentiable operator in torch's database trains equal to eager PyTorch, or is on a list with its reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.operators import Outcome, differentiable, name_of, sweep, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "operators.md"

REFUSED = {
    "combinations": "masked_select",
    "corrcoef": "aten.equal",
    "cov": "aten.equal",
    "linalg.lstsq": "linalg_lstsq",
    "linalg.lstsq.grad_oriented": "linalg_lstsq",
    "masked_select": "masked_select",
    "nn.functional.ctc_loss": "_ctc_loss",
    "nn.functional.gaussian_nll_loss": "item()",
}
"""What their step depends on: the value of a tensor decides a shape or a branch."""

SKIPPED = {"sparse.mm.reduce": "SparseCsr", "sparse.sampled_addmm": "memory format"}
"""Eager PyTorch cannot make parameters of their inputs."""


def check(outcome: Outcome) -> None:
    listed = REFUSED if outcome.result == "refused" else SKIPPED if outcome.result == "skipped" else {}
    if outcome.result == "equal":
        assert outcome.name not in {**REFUSED, **SKIPPED}
    else:
        assert listed.get(outcome.name, "not listed") in outcome.reason, outcome


def test_some_operators() -> None:
    chosen = ("softmax", "nn.functional.linear", "sgn", "masked_select", "nn.functional.dropout")
    outcomes = list(sweep(op for op in differentiable() if name_of(op) in chosen))
    assert {outcome.name for outcome in outcomes} == set(chosen)
    for outcome in outcomes:
        check(outcome)


@pytest.mark.slow
def test_every_sixth_operator_and_those_listed_train_equal_to_eager_or_are_refused_for_their_reason() -> None:
    listed = [op for op in differentiable() if name_of(op) in {**REFUSED, **SKIPPED}]
    assert {name_of(op) for op in listed} == {*REFUSED, *SKIPPED}
    for outcome in sweep([*list(differentiable())[::6], *listed]):
        check(outcome)
    rows = re.findall(r"^\| `([\w.]+)` \| ", DOCUMENT.read_text(), re.MULTILINE)
    assert set(rows) == {*REFUSED, *SKIPPED}


@pytest.mark.slow
@pytest.mark.nightly
def test_every_operator_trains_equal_to_eager_or_is_listed() -> None:
    outcomes = list(sweep(differentiable()))
    for outcome in outcomes:
        check(outcome)
    assert {o.name for o in outcomes if o.result != "equal"} == {*REFUSED, *SKIPPED}
    assert DOCUMENT.read_text().endswith(table(outcomes)), "write the document anew: make sweep"
