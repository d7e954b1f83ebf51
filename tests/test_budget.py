"""A budget chooses the options of a step, or refuses it with what is in the way; what was given stays as it is."""

from __future__ import annotations

import inspect
import json
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from tests.test_planner import ROWS, Stack, least_bytes, planned, rows
from zgraph import captures
from zgraph.budget import Budget, free_bytes
from zgraph.config import ARGUMENTS, Config
from zgraph.errors import BudgetError, OptionError, RankError
from zgraph.planner import open_search

CPU = torch.device("cpu")


def compiled(memory: int | str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Stack()
    return zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), memory=memory, **options)


def need(num_rows: int = ROWS, **options: Any) -> int:
    """Bytes that a step takes, with these options fixed."""
    fixed = {"zero": 0, "accumulate": 1, "recompute": None, **options}
    return least_bytes(batch=rows(num_rows), world_size=1, hardware="cpu", **fixed)


@pytest.mark.slow
def test_ample_memory_chooses_as_a_plan_does_and_the_plan_says_so() -> None:
    model = compiled("1GiB")
    loss = model.train_step(*rows())
    plan = planned(world_size=1, hardware="cpu", memory="1GiB", accumulate=1)
    assert (model.plan.config, model.plan.budget_bytes) == (plan.config, 2**30)
    assert model.plan.chosen.peak_bytes == plan.chosen.peak_bytes
    torch.manual_seed(0)
    plain = Stack()
    assert torch.equal(loss, plain(*rows()).detach())


@pytest.mark.slow
def test_a_tight_budget_is_held_and_the_step_is_the_same() -> None:
    roomy, least = need(), need(recompute="blocks")
    assert least < roomy
    tight, ample = compiled(roomy - 1), compiled(roomy)
    for _ in range(2):
        assert torch.equal(tight.train_step(*rows()), ample.train_step(*rows()))
    assert ample.plan.config.recompute is None
    assert tight.plan.config.recompute is not None
    assert tight.plan.chosen.reserved_bytes < roomy
    for name, value in tight.state_dict().items():
        assert torch.equal(value, ample.state_dict()[name])


@pytest.mark.slow
def test_micro_batches_are_chosen_only_on_request() -> None:
    fixed = {"recompute": "blocks", "memory_first": False}
    smallest = need(**fixed)
    with pytest.raises(BudgetError, match="accumulate=2"):
        compiled(smallest - 1, **fixed).train_step(*rows())
    model = compiled(smallest - 1, accumulate="auto", **fixed)
    model.train_step(*rows())
    assert model.plan.config.accumulate > 1


@pytest.mark.slow
def test_a_refusal_says_what_is_in_the_way_and_changes_nothing() -> None:
    model = compiled("64KiB")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MemoryError) as raised:
        model.train_step(*rows())
    for part in (
        "no options fit: ",
        "of the 64 KiB",
        "too much",
        "test_planner.py",
        "module blocks.",
        "memory=",
        "example costs",
    ):
        assert part in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.optim.AdamW(model.parameters()).step()  # parameters are still the user's


@pytest.mark.slow
def test_a_larger_batch_that_does_not_fit_is_refused_and_smaller_ones_go_on() -> None:
    budget = need(recompute="blocks")
    model = compiled(budget)
    model.train_step(*rows())
    chosen, state = model.plan.config, model.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    with pytest.raises(BudgetError, match="too much") as raised:
        model.train_step(*rows(4 * ROWS))
    assert "state stays where the first batch has put it: zero=0, " in str(raised.value)
    assert model.plan.config == chosen
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train_step(*rows(2))
    assert model.plan.config == chosen  # it fits, so nothing else is chosen
    model.train_step(*rows())


def test_what_is_given_stays() -> None:
    model = compiled("1GiB", zero=2, bucket_bytes="64KiB", prefetch=0, accumulate=2, recompute="blocks", clip_norm=1.0)
    model.train_step(*rows())
    given = {"zero": 2, "bucket_bytes": 2**16, "prefetch": 0, "accumulate": 2, "recompute": "blocks", "clip_norm": 1.0}
    assert model.plan.config == zgraph.Config(**given)


@pytest.mark.slow
def test_micro_batches_of_the_user_are_planned_by_the_largest() -> None:
    small, large = compiled("1GiB", accumulate=2), compiled("1GiB", accumulate=2)
    small.train_step(zgraph.MicroBatches([rows(1), rows(1)]))
    large.train_step(zgraph.MicroBatches([rows(3), rows(1)]))
    predicted = [model.__dict__["_zgraph"]._last_decided.chosen.peak_bytes for model in (small, large)]
    assert predicted[1] > predicted[0]


def test_automatic_is_what_is_free_less_a_margin() -> None:
    model = compiled("auto")
    model.train_step(*rows())
    free = free_bytes(CPU, 1, ())
    assert 0.5 * free < model.plan.budget_bytes < 2 * free  # others allocate, too
    held = torch.empty(2**20)
    assert free_bytes(CPU, 1, [held, held.view(2, -1)]) - free < 2**30


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory": "8 gibbons"}, "memory='8 gibbons'"),
        ({"memory": 0}, "memory=0"),
        ({"memory": "1GiB", "clip_norm": "auto"}, "clip_norm='auto' is not searched"),
        ({"memory": "1GiB", "zero": 4}, "zero=4"),
        ({"zero": "auto"}, "zero='auto' is chosen by a budget"),
        ({"accumulate": "auto"}, "accumulate='auto' is chosen by a budget"),
    ],
)
def test_bad_input_is_refused_at_once(given: dict[str, Any], words: str) -> None:
    model = Stack()
    with pytest.raises(OptionError) as raised:
        zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), **given)
    assert words in str(raised.value)
    assert type(model) is Stack


def test_memory_beside_a_plan_is_refused() -> None:
    model: nn.Module = Stack()
    plan = planned(world_size=1, zero=0, accumulate=1, recompute=None)
    with pytest.raises(OptionError, match="memory beside a plan"):
        zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), plan=plan, memory="1GiB")


def test_nodes_are_not_chosen_by_a_budget() -> None:
    with pytest.raises(OptionError, match="process groups are made before a step is seen"):
        Budget.of("1GiB", {"shard_size": "auto"})
    assert Budget.of("1GiB", {"shard_size": 2}).config.shard_size == 2


def test_only_accumulate_is_fixed_unasked() -> None:
    assert Budget.of("1GiB", {}) == Budget(2**30, {"accumulate": 1})
    assert Budget.of("auto", {"accumulate": "auto", "zero": 1, "recompute": "auto"}) == Budget(None, {"zero": 1})


@pytest.mark.slow
def test_a_plan_comes_back_from_its_json() -> None:
    plan = planned(memory="64KiB", world_size=1, zero=0, accumulate=1)
    assert plan.ways_out
    assert type(plan).from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["owners"][0]["module"] == plan.owners[0].module
    for text in ("{}", "plan", "[]", plan.to_json().replace('"version": 1', '"version": 2')):
        with pytest.raises(zgraph.StateError, match="this is not a plan"):
            type(plan).from_json(text)


def train_within(memory: int, num_rows: int) -> tuple[dict[str, Any], int]:
    rank, _ = world()
    model = compiled(memory + rank)  # the smallest holds for all
    model.train_step(*rows(num_rows))
    return model.plan.options, model.plan.budget_bytes


@pytest.mark.slow
def test_all_ranks_take_what_the_first_one_chose(ranks: Ranks) -> None:
    found = ranks.run(train_within, 2**30, 2)
    assert found[0] == found[1]
    assert found[0][1] == 2**30


def refused_on_all_ranks() -> str:
    model = compiled(2**16)
    with pytest.raises(BudgetError) as raised:
        model.train_step(*rows(2))
    return str(raised.value)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_on_all_ranks_alike(ranks: Ranks) -> None:
    first, second = ranks.run(refused_on_all_ranks)
    assert first == second
    assert "that each of 2 x cpu" in first


def given_unlike_batches(num_before: int) -> str:
    rank, _ = world()
    model = compiled("1GiB")
    for _ in range(num_before):
        model.train_step(*rows(2))
    with pytest.raises(RankError) as raised:
        model.train_step(*rows(2 + rank))
    return str(raised.value)


@pytest.mark.slow
def test_batches_that_differ_between_ranks_are_told_by_their_names_and_shapes(ranks: Ranks) -> None:
    for told in ranks.run(given_unlike_batches, 1):
        assert "with a batch unlike those before (args[0]: torch.float32 (3, 64, 32)" in told
    for told in ranks.run(given_unlike_batches, 0):
        for rank, num_rows in ((0, 2), (1, 3)):
            assert f"rank {rank} has 'args[0]: torch.float32 ({num_rows}, 64, 32)" in told
        assert "TreeSpec" not in told


class LargeHead(nn.Module):
    """What is gathered of its head, and its gradient, are the most that there is at once."""

    def __init__(self, vocab: int = 4096, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.body = nn.Embedding(64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.body(self.tokens(tokens)))), targets)


def tokens_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(64, (8,), generator=generator), torch.randint(4096, (8,), generator=generator)


def trained_with(memory: int | None, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Options that were chosen, and parameters after two steps, with tiles of an eighth of the head or more."""
    rank, _ = world()
    torch.manual_seed(0)
    model = LargeHead()
    given = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.5), "bucket_bytes": 2**14, **options}
    with mock.patch.object(captures, "TILE_BYTES", 2**16):
        zgraph.compile(model, memory=memory, **given)
        for _ in range(2):
            model.train_step(*tokens_of(rank))
    return {} if memory is None else model.plan.options, dict(model.full_params())


@pytest.mark.slow
def test_a_budget_that_tiles_alone_meet_is_met_by_tiles_and_the_step_is_the_same(ranks: Ranks) -> None:
    given: dict[str, Any] = {"batch": tokens_of(0), "world_size": 2, "hardware": "cpu", "accumulate": 1}
    whole, _ = open_search(LargeHead, torch.optim.SGD, bucket_bytes=2**14, tile_bytes=None, **given)
    budget = whole.least().estimate.reserved_bytes - 1
    (options, params), _ = ranks.run(trained_with, budget)
    assert options["tile_bytes"] == 2**16
    (_, expected), _ = ranks.run(trained_with, None, zero=3)
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-5, atol=1e-7, msg=name)


def mean_square(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_a_model_whose_budget_was_refused_may_be_compiled_again_until_a_step_has_run() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"optimizer": optimizer, "loss": mean_square, "progress": False}
    zgraph.compile(model, memory="1KiB", **given)
    with pytest.raises(BudgetError, match=r"beside what is live: what compiling leaves"):
        model.train_step(torch.ones(4, 64))
    with pytest.raises(OptionError, match="zero=7"):
        zgraph.compile(model, zero=7, **given)
    with pytest.raises(OptionError, match="loss is a int"):
        zgraph.compile(model, **{**given, "loss": 1})
    with pytest.raises(BudgetError):  # it is compiled as before
        model.train_step(torch.ones(4, 64))
    assert type(zgraph.compile(model, memory="1GiB", **given)).__mro__[2] is nn.Linear
    model.train_step(torch.ones(4, 64))
    with pytest.raises(OptionError, match="compiled already"):
        zgraph.compile(model, **given)


def given_on(which: tuple[int, ...]) -> None:
    rank, _ = world()
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory: dict[str, Any] = {"memory": 2**70} if rank in which else {}
    zgraph.compile(model, optimizer, loss=mean_square, progress=False, **memory)
    if len(which) == 2:
        model.train_step(torch.ones(4, 4))
        return
    with pytest.raises(RankError, match=r"the ranks disagree on memory: .*given"):
        model.train_step(torch.ones(4, 4))


def test_memory_that_is_given_on_one_rank_is_what_the_ranks_disagree_on(ranks: Ranks) -> None:
    ranks.run(given_on, (1,))


def test_more_memory_than_any_machine_has_is_ample(ranks: Ranks) -> None:
    ranks.run(given_on, (0, 1))


def test_what_a_misspelt_option_may_have_meant_both_compile_and_plan_take() -> None:
    for function in (zgraph.compile, zgraph.plan):
        assert set(ARGUMENTS) <= inspect.signature(function).parameters.keys()
    with pytest.raises(OptionError) as raised:
        Config.from_options({"memory": "1GiB"})
    assert "'memory'" not in str(raised.value.fix)
