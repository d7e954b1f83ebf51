"""A budget takes the fastest choice that fits it, and what is not looked at could not have been taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.programs import assert_same_step, blocks, few_examples, network
from tests.test_liveness import assert_counts_agree
from tests.test_planner import Stack, rows
from tests.test_recomputation import LAYERS
from tests.test_recompute import random_steps
from zgraph.captures import Captures
from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.liveness import held_bytes, lifetimes
from zgraph.lower import lower
from zgraph.machines import assumed_cpu, preset
from zgraph.predict import Prediction, predict
from zgraph.program import Program
from zgraph.search import Search

H100 = preset("H100")
CPU = assumed_cpu(4, 2**34).for_ranks(4)
"""Its allocator does not round."""


class Given:
    """Stands for ``Captures``: the same program, whatever the options."""

    notes: tuple[str, ...] = ()
    num_rows, num_blocks, sizes, is_long, tile_bytes = 1, 1, (1,), False, None
    model = nn.Module()

    def __init__(self, program: Program) -> None:
        self.program = program

    def captured(self, config: Config, num_blocks: int) -> Program:
        return self.program

    def check_blocks(self, config: Config) -> None: ...


def search(program: Program, world: int = 2, **fixed: Any) -> Search:
    return Search(Given(program), H100, world, fixed)  # type: ignore[arg-type]


def by_hand(program: Program, world: int, **fixed: Any) -> list[Prediction]:
    """What all members take, each worked out on its own."""
    found = []
    for choice in search(program, world, **fixed).members:
        mesh = choice.config.mesh(world)
        try:
            found.append(predict(lower(program, choice.config, mesh, None, (), hardware=H100, prove=False), H100))
        except OptionError:
            continue  # nothing to recompute
    return found


@pytest.mark.slow
@given(random_steps(), st.sampled_from([1, 2, 4]), st.floats(0, 1.2))
@few_examples(4)
def test_the_fastest_that_fits_is_taken_or_none_fits(captured: Program, world: int, part: float) -> None:
    found = by_hand(captured, world)
    budget = int(part * max(made.reserved_bytes for made in found))
    fitting = [made.step_s for made in found if made.reserved_bytes <= budget]
    taken = search(captured, world).within(budget)
    if taken is None:
        assert not fitting
    else:
        assert taken.estimate.reserved_bytes <= budget
        assert taken.estimate.step_s == pytest.approx(min(fitting))


@pytest.mark.parametrize("reads_peers", [False, True])
def test_choices_that_are_estimated_once_make_the_same_programs(reads_peers: bool) -> None:
    world = 2
    captured = network([("wide", 0), ("narrow", 1), ("wide", 2), ("narrow", 3)], rows=4, dtype=torch.float32)
    hardware = replace(CPU.for_ranks(world), reads_peers=reads_peers)
    of = Search(Given(captured), hardware, world, {"recompute": None})  # type: ignore[arg-type]
    alike: dict[Config, dict[bytes, Prediction]] = {}
    num_merged = 0
    for choice in of.members:
        lowered = lower(captured, choice.config, choice.config.mesh(world), None, (), hardware=hardware, prove=False)
        known = alike.setdefault(of._alike(choice.config), {})
        num_merged += bool(known)
        known[lowered.digest()] = predict(lowered, hardware)
    assert num_merged > 10
    for known in alike.values():
        assert len(known) == 1


GIVEN: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"recompute": st.sampled_from([None, 0.5]), "zero": st.sampled_from([1, 2, 3, 3])},
    optional={
        "bucket_bytes": st.just(1),
        "unshard": st.sampled_from([0.0, 0.4, 1.0]),
        "in_flight": st.just(1),
        "shard_size": st.sampled_from([None, 2]),
        "secondary_size": st.just(2),
        "gather_precision": st.sampled_from(["bf16", "int8"]),
        "reduce_precision": st.sampled_from(["bf16", "int8"]),
        "state_precision": st.just("int8"),
    },
)
"""Options of the user's; what is not given is searched."""


def can_be(given: dict[str, Any]) -> bool:
    try:
        Config.from_options(given)
    except OptionError:
        return False
    return True


@pytest.mark.slow
@given(LAYERS, st.sampled_from([4, 64]), GIVEN.filter(can_be), st.floats(0, 1.2), st.booleans())
@few_examples(8)
def test_whatever_is_given_the_fastest_that_fits_is_taken_and_what_it_runs_holds_no_more(
    layers: list[tuple[str, int]], rows: int, fixed: dict[str, Any], part: float, late: bool
) -> None:
    captured, world = network(layers, rows=rows, dtype=torch.float32), 4
    found = by_hand(captured, world, **fixed)
    most, least = (pick(made.reserved_bytes for made in found) for pick in (max, min))
    budget = int(least + (part - 0.1) * (most - least))
    fitting = [made.step_s for made in found if made.reserved_bytes <= budget]
    of = search(captured, world, **fixed)
    taken = of.within(budget)
    if taken is None:
        assert not fitting
        return
    assert taken.estimate.reserved_bytes <= budget
    assert taken.estimate.step_s == pytest.approx(min(fitting))
    program = of.in_full(taken.choice)[0].last
    assert max(held_bytes(lifetimes(program, staged=False), len(program.graph.nodes))) <= taken.estimate.peak_bytes
    assert_counts_agree(program)
    if not any(name.endswith("precision") for name in fixed):
        assert_same_step(program, captured, late=late)


@pytest.mark.slow
@given(random_steps(), st.sampled_from([1, 2, 4]))
@few_examples(4)
def test_nothing_takes_less_than_what_must_be_held(captured: Program, world: int) -> None:
    of = search(captured, world)
    for choice in of.members:
        tried = of.estimated(choice)
        assert tried is None or of.least_bytes(choice) <= tried.estimate.peak_bytes


@pytest.mark.slow
@given(random_steps(), st.sampled_from([2, 4]))
@few_examples(4)
def test_recomputation_is_never_faster(captured: Program, world: int) -> None:
    of = search(captured, world)
    for choice in of.members:
        for milder in choice.milder:
            both = of.estimated(choice), of.estimated(milder)
            if all(both):
                assert both[0].estimate.step_s >= both[1].estimate.step_s * (1 - 1e-9)  # type: ignore[union-attr]


def of_two_rows() -> Search:
    with torch.device("meta"):
        model = Stack()
    return Search(Captures(model, torch.optim.AdamW(model.parameters()), (rows(2), {})), CPU, 4, {})


@pytest.fixture(scope="module")
def of_stack() -> Search:
    return of_two_rows()


@pytest.mark.slow
def test_more_memory_is_never_slower_and_less_never_takes_more(of_stack: Search) -> None:
    along = list(of_stack.frontier())
    assert len(along) > 3
    seconds, num_bytes = [t.estimate.step_s for t in along], [t.estimate.reserved_bytes for t in along]
    assert seconds == sorted(seconds)
    assert num_bytes == sorted(num_bytes, reverse=True)
    for budget in range(num_bytes[-1], num_bytes[0] + 4096, (num_bytes[0] - num_bytes[-1]) // 20):
        expected = next(tried for tried in along if tried.estimate.reserved_bytes <= budget)
        assert of_stack.within(budget) == expected
    assert of_stack.within(num_bytes[-1] - 1) is None
    assert of_stack.least().estimate.peak_bytes <= along[-1].estimate.peak_bytes


@pytest.mark.slow
def test_an_answer_does_not_depend_on_what_was_asked_before(of_stack: Search) -> None:
    budget = list(of_stack.frontier())[1].estimate.reserved_bytes
    found, anew = of_stack.within(budget), of_two_rows().within(budget)
    assert found is not None
    assert anew is not None
    assert (found.choice.options, found.estimate) == (anew.choice.options, anew.estimate)


def test_what_cannot_be_taken_is_not_looked_at() -> None:
    ample = search(blocks(3), 2)
    ample.within(2**40)
    assert {choice.config.recompute for choice in ample.tried} == {None}
    short = search(blocks(3), 2)
    assert short.within(1) is None
    assert not short.tried


@pytest.mark.slow
@pytest.mark.parametrize("unbounded", [False, True])
def test_what_is_left_out_makes_no_difference(unbounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, whole = search(blocks(4), 4), search(blocks(4), 4)
    monkeypatch.setattr(whole, "least_bytes", lambda _: 0)
    monkeypatch.setattr(whole, "_leaner", lambda _: ())
    monkeypatch.setattr(whole, "_alike", lambda config: config)
    if unbounded:
        for choice in whole.members:
            choice.milder.clear()
        whole._more_milder = {choice: [] for choice in whole.members}
    estimates = [tried.estimate for tried in map(whole.estimated, whole.members) if tried is not None]
    taken_bytes = {each for made in estimates for each in (made.peak_bytes, made.reserved_bytes)}
    taken_bytes |= {pruned.least_bytes(choice) for choice in pruned.members}
    for budget in sorted({each - less for each in taken_bytes for less in (0, 1)}):  # all that tell choices apart
        taken, expected = pruned.within(budget), whole.within(budget)
        assert (taken and taken.choice.options) == (expected and expected.choice.options)
    assert pruned.least().choice.options == whole.least().choice.options


class Headed(nn.Module):
    """A head much larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 512), nn.Linear(512, 32768, bias=False)
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(4))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return F.cross_entropy(self.head(x), targets)


def of_headed(num_rows: int = 8, **fixed: Any) -> Search:
    with torch.device("meta"):
        model = Headed()
    tokens = torch.zeros(num_rows, dtype=torch.long)
    captures = Captures(model, torch.optim.AdamW(model.parameters()), ((tokens, tokens), {}))
    return Search(captures, H100, 8, fixed)


@pytest.mark.slow
def test_options_that_save_memory_are_taken_together_where_none_does_alone() -> None:
    """Found by hand: one of small buckets, none ahead and tiles takes 70 MiB, all three 50."""
    taken = of_headed(accumulate=1, recompute=None, zero=3).within(50 * 2**20)
    assert taken is not None
    together = {"bucket_bytes": 4 * 2**20, "in_flight": 0, "tile_bytes": 8 * 2**20}
    assert taken.choice.options.items() >= together.items()


@pytest.mark.slow
def test_that_nothing_fits_is_found_out_without_looking_at_most() -> None:
    of = of_headed()
    assert of.within(30 * 2**20) is None
    looked_at = len(of.tried)
    least = of.least()
    assert of.within(least.num_bytes) is not None
    assert looked_at <= 60 < len(of.members) / 5
