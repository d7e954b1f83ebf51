"""What a budget decides: a step that keeps to it, or a refusal that nothing there is would have made unnecessary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples, network
from tests.test_frontier import every_choice
from tests.test_recomputation import LAYERS, Case
from tests.test_search import H100, by_hand, search
from zgraph.config import Config
from zgraph.decision import decide
from zgraph.errors import BudgetError
from zgraph.footprint import footprint
from zgraph.lower import lower
from zgraph.plans import show_bytes
from zgraph.predict import predict
from zgraph.program import Program


def of_all_subsets(captured: Program, world: int) -> tuple[int, int] | None:
    """Live bytes at least, of any activations that are computed again, and with all kept; None where there are many."""
    found = []
    for zero in range(4):
        profile = Case(captured, Config(zero), world).profile
        if len(profile.candidates) <= 7:
            found.append((every_choice(profile)[-1].peak_bytes, profile.kept.peak_bytes))
    return min(found, default=None)


@pytest.mark.slow
@given(LAYERS, st.sampled_from([(4, 4), (4096, 1024), (65536, 256)]), st.sampled_from([1, 2, 4]), st.floats(-0.1, 1.1))
@few_examples(6)
def test_a_budget_is_kept_or_its_refusal_is_justified(
    layers: list[tuple[str, int]], size: tuple[int, int], world: int, part: float
) -> None:
    captured = network(layers, rows=size[0], width=size[1], dtype=torch.float32)
    steps = by_hand(captured, world)
    least, most = (pick(made.reserved_bytes for made in steps) for pick in (min, max))
    budget = int(least + part * (most - least))
    of = search(captured, world)
    plan = decide(of, budget)
    if plan.fits:
        config = Config.from_options(dict(plan.options))
        lowered = lower(captured, config, config.mesh(world), None, (), hardware=H100)
        assert footprint(lowered.last, staged=False).peak_bytes == plan.chosen.peak_bytes <= plan.chosen.reserved_bytes
        assert predict(lowered, H100).reserved_bytes <= budget
        return
    assert plan.chosen.reserved_bytes >= least > budget
    assert min(made.reserved_bytes for made in by_hand(captured, world, memory_first=True)) > budget
    if (subsets := of_all_subsets(captured, world)) is not None:
        lowest, kept = subsets
        assert min(made.peak_bytes for made in steps) <= lowest + (kept - lowest) / 3
    for way in plan.ways_out:
        assert way.reserved_bytes <= budget or "memory=" in way.change
    with pytest.raises(BudgetError, match=f"{show_bytes(plan.chosen.reserved_bytes - budget)} too much"):
        raise plan.refusal()
