"""Random operators draw what eager draws: the same numbers, from the same generator, leaving it in the same state."""

from __future__ import annotations

import pytest
import torch

import zgraph
from tests.models import CASES
from tests.ranks import Ranks
from tests.reference import Eager, assert_equal, assert_same_state, slow, world


@pytest.mark.parametrize("case", ["gpt_dropout", *slow("unet")])
def test_losses_are_bit_equal_to_eager_on_one_rank(case: str) -> None:
    """With a learning rate of zero only the random numbers differ from step to step."""
    compiled, reference = CASES[case].model(), CASES[case].model()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.0)
    zgraph.compile(compiled, optimizer=optimizer)
    eager = Eager(CASES[case], reference, torch.optim.SGD(reference.parameters(), lr=0.0))
    (batch,) = CASES[case].batches(1)
    torch.manual_seed(5)
    expected, states = [], []
    for _ in range(4):
        expected.append(eager.step(batch).item())
        states.append(torch.get_rng_state())
    torch.manual_seed(5)
    for loss, state in zip(expected, states, strict=True):
        assert compiled.train_step(*batch.args, **batch.kwargs).item() == loss
        assert torch.equal(torch.get_rng_state(), state)
    assert len(set(expected)) == len(expected)  # else nothing random was tested


def follow_one_stream_per_rank(case_name: str, zero: int) -> None:
    case, (rank, num_ranks) = CASES[case_name], world()
    parts = [batch.part(rank, num_ranks) for batch in case.batches(6, dtype=torch.float64)]
    reference, model = case.model(torch.float64), case.model(torch.float64)
    eager = Eager(case, reference, torch.optim.AdamW(reference.parameters(), lr=1e-2), average=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zgraph.compile(model, optimizer=optimizer, zero=zero)
    torch.manual_seed(7 + rank)
    expected = [eager.step(part) for part in parts]
    torch.manual_seed(7 + rank)
    for step, part in enumerate(parts):
        loss = model.train_step(*part.args, **part.kwargs)
        assert_equal({"loss": loss}, {"loss": expected[step]}, f"step {step}")
    assert_same_state(model, optimizer, eager, "at the end")


@pytest.mark.parametrize("zero", [3, *slow(1)])
@pytest.mark.parametrize("case", ["unet", *slow("gpt_dropout")])
def test_each_rank_follows_its_own_stream(ranks: Ranks, case: str, zero: int) -> None:
    ranks.run(follow_one_stream_per_rank, case, zero)
