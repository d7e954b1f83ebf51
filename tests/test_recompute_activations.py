"""Single activations are dropped and computed again, as far as a level says: the same step, at a lower peak."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import zgraph
from tests.choices import in_turn
from tests.models import GPT
from tests.programs import assert_identical, assert_same_step, blocks, few_examples, network, values_for
from tests.ranks import Ranks
from tests.recomputing import OPTIONS, trained
from tests.reference import train_like_eager
from tests.test_recomputation import H100, LAYERS
from tests.test_recompute import captured_stack
from zgraph import ops
from zgraph.config import Config
from zgraph.cost import Costs
from zgraph.footprint import footprint
from zgraph.lockstep import run_ranks
from zgraph.lower import lower
from zgraph.passes import Levels, default_passes
from zgraph.passes.recompute_activations import QUARTERS
from zgraph.pipeline import run
from zgraph.planner import open_search
from zgraph.predict import predict
from zgraph.program import Mesh, Program

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def made_again(program: Program) -> list[fx.Node]:
    """The calls that the pass has made."""
    calls = program.graph.nodes
    return [n for n in calls if n.op == "call_function" and n.meta["origin"].made_by == "RecomputeActivations"]


def lowered(
    captured: Program, level: float | None, world: int = 1, known: Levels | None = None, **options: Any
) -> Program:
    config = Config.from_options({"recompute": level, **options})
    return lower(captured, config, Mesh(world), None, (), hardware=H100, levels=known).last


def test_what_frees_most_for_its_seconds_goes_first() -> None:
    """At half the way it is the first of alike blocks, as its values are held longest."""
    program = run(default_passes(Config(0, 1, recompute=0.5), Mesh(1), hardware=H100)[:2], blocks(3)).program
    text = [line.replace(" (forward)", "") for line in program.text(origins=True).splitlines()]
    assert_expected_inline(
        "\n".join(line for line in text if "RecomputeActivations" in line),
        """\
%46: f64[4, 6] = aten.mm.default(%0, %1)  # backward blocks.0 model.py:9 [RecomputeActivations]
%47: f64[4, 6] = aten.tanh.default(%46)  # backward blocks.0 model.py:10 [RecomputeActivations]""",
    )


@pytest.mark.slow
@given(LAYERS, st.sampled_from([4, 64]), st.sampled_from([1, 200, 10**6]), st.sampled_from([(1, 3), (2, 3), (3, 1)]))
@few_examples(10)
def test_more_level_is_never_a_higher_peak_nor_less_to_compute(
    layers: list[tuple[str, int]], rows: int, bucket_bytes: int, ranks: tuple[int, int]
) -> None:
    world, zero = ranks
    check_levels(network(layers, rows=rows), LEVELS, world, zero=zero, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("world", [1, 2])
def test_more_level_of_a_model_is_never_a_higher_peak_nor_less_to_compute(world: int) -> None:
    check_levels(captured_stack(5, 64, 8), (0.0, 0.1, 0.5, 0.9, 1.0), world, bucket_bytes=1000)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 3, 128), (64, 2, 256)])
def test_a_higher_quarter_is_never_a_higher_peak_of_what_lies_on_a_cpu(size: tuple[int, int, int]) -> None:
    """Gaps of the arena and what operators work in included, which no choice foresees."""
    tokens = torch.zeros(12, 11, dtype=torch.long)
    on = {"batch": (tokens, tokens), "world_size": 2, "hardware": "cpu"}
    searched, _ = open_search(lambda: GPT(*size), torch.optim.AdamW, **on)
    known, peaks = Levels(), []
    for level in (0.0, *QUARTERS):
        config = Config(3, recompute=level)
        captured = searched.captures.captured(config, searched.captures.num_blocks)
        made = lower(captured, config, Mesh(2), None, (), hardware=searched.hardware, levels=known, prove=False)
        peaks.append(predict(made, searched.hardware).peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_what_was_worked_out_for_one_level_serves_the_others_and_no_other_passes() -> None:
    captured, known = captured_stack(5, 64, 8), Levels()
    for bucket_bytes in (1000, 10**6):
        for level in (1.0, 0.4, 0.7):
            again = lowered(captured, level, 2, known, bucket_bytes=bucket_bytes)
            assert again.text() == lowered(captured, level, 2, bucket_bytes=bucket_bytes).text()
    (worked_out,) = known.values()
    assert len(worked_out) == 2


def check_levels(captured: Program, levels: Sequence[float], world: int, **options: Any) -> None:
    """Peaks fall and seconds grow, and each level goes as far as it says."""
    found = []
    for level in levels:
        program = lowered(captured, level, world, **options)
        costs = Costs(program, H100)
        # What travels is left out: with more room, more buckets stay from forward to backward.
        each = [
            costs.of(node)
            for node in program.graph.nodes
            if node.op == "call_function" and node.target not in ops.STARTS
        ]
        seconds = sum(max(float(cost.seconds), float(cost.num_calls) * H100.launch_s) for cost in each)
        found.append((level, footprint(program, staged=False).peak_bytes, seconds))
    highest, lowest = found[0][1], found[-1][1]
    for (_, peak, seconds), (level, lower_peak, longer) in itertools.pairwise(found):
        assert lower_peak <= peak
        assert longer >= seconds * (1 - 1e-9)
        assert lower_peak <= highest - level * (highest - lowest)


@given(LAYERS, st.sampled_from([0.3, 1.0]), st.sampled_from([1, 2]))
@few_examples(15)
def test_any_step_is_the_same(layers: list[tuple[str, int]], level: float, world: int) -> None:
    captured = network(layers)
    passes = default_passes(Config(3, 200, recompute=level), Mesh(world), hardware=H100)
    program = run(passes[:2], captured).program
    num_draws = [sum(ops.is_random(n.target) for n in p.graph.nodes) for p in (captured, program)]
    assert num_draws[0] == num_draws[1]
    assert all(n.users for n in made_again(program)), "nothing is made for nobody"
    inputs = values_for(captured)
    torch.manual_seed(0)
    expected = run_ranks(captured, inputs)
    torch.manual_seed(0)
    assert_identical(run_ranks(program, inputs), expected)


@pytest.mark.parametrize("zero", range(4))
def test_ranks_compute_the_captured_step(zero: int) -> None:
    captured = blocks(3)
    for world in (1, 3):
        program = lowered(captured, 1.0, world, zero=zero, bucket_bytes=100)
        assert made_again(program)
        for late in (False, True):
            assert_same_step(program, captured, late=late)


def test_it_goes_below_blocks() -> None:
    captured = captured_stack(8, 512, 8)
    peaks = {
        how: footprint(lowered(captured, how, 2, bucket_bytes=1000), staged=False).peak_bytes
        for how in (None, "operators", "blocks", 1.0)
    }
    assert peaks[1.0] <= peaks["blocks"] < peaks["operators"] < peaks[None]


CASES = ["gpt_dropout", "resnet", "gpt_tied", "llama", "experts", "recurrent", "unet"]


@in_turn("case", CASES, "options", list(OPTIONS), "gpt_dropout")
def test_no_bit_changes(case: str, options: str) -> None:
    if case == "recurrent" and OPTIONS[options].get("precision") == "fp16":
        pytest.skip("not every CPU has an LSTM in float16")
    found = []
    for level in (None, 1.0):
        ranks, results = trained(case, level, OPTIONS[options], num_samples=32)  # enough for a peak of activations
        assert bool(made_again(ranks.program)) is bool(level) or case == "recurrent"
        found.append(results)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt_dropout", "resnet"])
def test_it_equals_plain_pytorch_on_real_ranks(ranks: Ranks, case: str) -> None:
    options = {"recompute": 1.0, "bucket_bytes": "1KiB", "num_steps": 4, "check_collectives": True}
    ranks.run(train_like_eager, case, zero=3, **options)


def test_it_repeats() -> None:
    """All ranks decide alike."""
    assert len({lowered(captured_stack(4, 64, 8), 0.5, 2).digest() for _ in range(3)}) == 1


def test_a_machine_that_is_not_known_is_refused() -> None:
    with pytest.raises(zgraph.OptionError, match=r"recompute=0\.5 weighs bytes against seconds") as caught:
        default_passes(Config(recompute=0.5), Mesh(2))
    assert "zgraph calibrate" in (caught.value.fix or "")


def test_nothing_is_dropped_at_level_zero() -> None:
    assert default_passes(Config(recompute=0.0), Mesh(2)) == default_passes(Config(), Mesh(2))
