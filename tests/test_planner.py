"""A plan is the fastest choice that fits, says what it will take, and is what compile then does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph import captures, choices, plans
from zgraph.capture import capture
from zgraph.config import BUCKET_BYTES, Config
from zgraph.decision import decide
from zgraph.errors import BudgetError, CaptureError, OptimizerError, OptionError, ZgraphError
from zgraph.footprint import Holding, Kind
from zgraph.lower import lower
from zgraph.machines import preset
from zgraph.planner import open_search
from zgraph.predict import predict
from zgraph.program import Mesh, Program
from zgraph.search import Search
from zgraph.which_hardware import find_hardware

WORLD = 4
ROWS, WIDTH = 4, 32
FIXED: dict[str, Any] = {
    "zero": 3, "bucket_bytes": "64KiB", "prefetch": 1, "accumulate": 1, "recompute": None, "unshard": 0.0,
}  # fmt: skip


class Stack(nn.Module):
    """Residual blocks, of which recomputation has something to choose."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of what ``x``, of shape (rows, tokens, WIDTH), becomes."""
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def rows(num: int = ROWS, device: str = "cpu") -> tuple[torch.Tensor]:
    return (torch.ones(num, 64, WIDTH, device=device),)


ON_H100S: dict[str, Any] = {"batch": rows(), "world_size": WORLD, "hardware": "h100"}


def planned(**given: Any) -> zgraph.Plan:
    """A plan of two blocks on four H100s."""
    return zgraph.plan(Stack, torch.optim.AdamW, **{**ON_H100S, **given})


def least_bytes(**given: Any) -> int:
    """What the choice takes that takes least memory; nobody looks for ways out."""
    search, _ = open_search(Stack, torch.optim.AdamW, **{**ON_H100S, **given})
    return search.least().estimate.reserved_bytes


@cache
def captured_rows(accumulate: int) -> Program:
    """A micro-batch's step, which passes leave as it is."""
    with torch.device("meta"):
        model: nn.Module = Stack()
    batch, config = rows(ROWS // accumulate), Config(accumulate=accumulate)
    return capture(model, torch.optim.AdamW(model.parameters()), batch, {}, config=config)


def predicted(**options: Any) -> tuple[float, int]:
    """Seconds and bytes, without the planner."""
    config, machine = Config.from_options(options), preset("H100")
    captured = captured_rows(config.accumulate)
    config = replace(config, bucket_bytes=config.bucket_bytes or BUCKET_BYTES)  # beside which the planner tries others
    lowered = lower(captured, config, Mesh(WORLD), None, (), hardware=machine, prove=False)
    made = predict(lowered, machine, config.accumulate)
    return made.step_s, made.reserved_bytes


@pytest.mark.slow
def test_of_all_choices_the_fastest_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "VARIED", {})
    of_all = [
        {"zero": zero, "accumulate": accumulate, **({"recompute": recompute} if recompute else {})}
        for zero in range(4)
        for accumulate in (1, 2, 4)
        for recompute in choices.LEVELS
    ]
    found = [predicted(**choice) for choice in of_all]
    search, _ = open_search(Stack, torch.optim.AdamW, **ON_H100S)  # works out each choice once, for all budgets
    for budget in sorted({taken for _, taken in found})[::4]:
        plan = decide(search, budget)
        assert plan.fits
        assert all(rejected.why for rejected in plan.rejected)
        assert plan.chosen.step_s == pytest.approx(min(step_s for step_s, taken in found if taken <= budget))


def test_options_that_are_given_are_taken_as_they_are() -> None:
    plan = planned(**FIXED)
    assert plan.config == Config.from_options(FIXED)
    assert (plan.chosen.step_s, plan.chosen.reserved_bytes) == predicted(**FIXED)
    assert plan.rejected == ()


def test_nodes_have_copies_where_links_between_them_are_slow() -> None:
    """With two nodes of two devices; where a node has room for all, state is divided inside of it."""
    slow = find_hardware("h100", devices_per_node=2, nic_bytes_per_s=1e8)
    given = {**FIXED, "hardware": slow}
    chosen = planned(**given)
    assert chosen.options["shard_size"] == 2
    divided = planned(**given, shard_size=None)
    assert chosen.chosen.step_s < divided.chosen.step_s
    assert chosen.chosen.reserved_bytes >= divided.chosen.reserved_bytes
    assert any(each.estimate.options.get("shard_size") is None for each in chosen.rejected)
    config = Config.from_options(chosen.options)
    with torch.device("meta"):
        model: nn.Module = Stack()
    captured = capture(model, torch.optim.AdamW(model.parameters()), rows(), {}, config=config)
    made = predict(lower(captured, config, Mesh(WORLD, shard=2), None, (), hardware=slow), slow)
    assert made.step_s == chosen.chosen.step_s


def test_on_one_node_there_is_nothing_to_copy_between() -> None:
    assert "shard_size" not in planned(**FIXED).options
    assert "shard_size" in planned(**FIXED, shard_size=2).options


@pytest.fixture(scope="module")
def too_small() -> zgraph.Plan:
    return planned(memory="100KiB", world_size=1)


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_what_is_in_the_way_and_what_helps(too_small: zgraph.Plan) -> None:
    plan = too_small
    assert not plan.fits
    assert plan.owners[0].num_bytes == max(owner.num_bytes for owner in plan.owners)
    assert sum(plan.by_kind.values()) == plan.chosen.peak_bytes
    shown = str(plan)
    assert "does not fit" in shown
    assert "in the way" in shown


class Normed(nn.Module):
    """Fails on a single row, as batch statistics of one are none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def test_micro_batches_on_which_a_model_fails_are_left_out_with_a_note() -> None:
    given: dict[str, Any] = {"batch": (torch.ones(4, 8),), "world_size": 2, "memory": "16KiB", "prefetch": 0}
    plan = zgraph.plan(Normed, torch.optim.AdamW, **given)
    assert any(note.startswith("accumulate=4 was not considered: ") for note in plan.notes)
    assert "more than 1 value per channel" in str(plan.refusal())
    with pytest.raises(CaptureError, match="more than 1 value per channel") as raised:
        zgraph.plan(Normed, torch.optim.AdamW, **given, accumulate=4)
    assert "check that one of the 4 micro-batches of the batch works eagerly" in str(raised.value)


def test_micro_batches_are_no_way_out_where_state_alone_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    beside = Search.beside

    def noted(search: Search, **given: Any) -> Search:
        asked.append(given["fixed"].get("accumulate"))
        return beside(search, **given)

    monkeypatch.setattr(Search, "beside", noted)
    given: dict[str, Any] = {"world_size": 1, "hardware": "cpu", "accumulate": 1, "zero": 0}
    assert not planned(memory="64KiB", **given).fits
    assert asked
    assert None not in asked
    asked.clear()
    planned(memory=least_bytes(**given) - 1, **given)
    assert None in asked


def test_a_refusal_names_what_an_arena_keeps_for_other_calls() -> None:
    owner = plans.owners_of([Holding("kept for other calls", Kind.UNUSED, 2**20, 0, 0)])[0]
    assert (owner.what, owner.kind, owner.num_bytes) == ("kept for other calls", "arena, not in use", 2**20)
    made = planned(hardware="cpu", world_size=1)
    unused = [owner for owner in made.owners if owner.kind == Kind.UNUSED.value]
    search, _ = open_search(Stack, torch.optim.AdamW, batch=rows(), world_size=1, hardware="cpu")
    peak = search.in_full(search.within(2**40).choice)[1].peak  # type: ignore[union-attr]
    assert sum(owner.num_bytes for owner in unused) == peak.peak_by_kind()[Kind.UNUSED]


def test_a_model_that_fails_on_all_micro_batches_that_were_asked_for_says_why() -> None:
    given: dict[str, Any] = {"batch": (torch.ones(2, 8),), "world_size": 2}
    with pytest.raises(CaptureError, match="more than 1 value per channel"):
        zgraph.plan(Normed, torch.optim.AdamW, **given, keep_gathered=True)


@pytest.mark.parametrize("given", [{"keep_gathered": True}, {"offload": {"gradients": "disk"}}], ids=str)
def test_what_needs_micro_batches_is_planned_with_some(given: dict[str, Any]) -> None:
    assert planned(hardware="cpu", world_size=2, **given).config.accumulate == 2
    with pytest.raises(OptionError, match="accumulate=1"):
        planned(hardware="cpu", world_size=2, **given, accumulate=1)


@pytest.mark.slow
def test_ways_out_fit_and_the_cheapest_comes_first() -> None:
    fixed = {**FIXED, "zero": 3}
    needed = planned(**fixed).chosen.reserved_bytes
    plan = planned(memory=needed - 1, **fixed)
    assert not plan.fits
    assert 1 <= len(plan.ways_out) <= 4
    assert [way.cost for way in plan.ways_out] == sorted(way.cost for way in plan.ways_out)
    for way in plan.ways_out:
        if not way.change.startswith(("hardware", "memory")):
            assert way.reserved_bytes <= plan.budget_bytes, way


@pytest.mark.slow
def test_a_way_out_is_what_planning_with_it_gives() -> None:
    plan = planned(memory="450KiB", **{**FIXED, "zero": 0})
    for way in plan.ways_out:
        if way.change.startswith("world_size"):
            world = int(way.change.partition("=")[2])
            assert planned(memory="450KiB", world_size=world, **{**FIXED, "zero": 0}).fits
    (needed,) = [way.change.split("'")[1] for way in plan.ways_out if way.change.startswith("memory=")]
    assert planned(memory=needed, **{**FIXED, "zero": 0}).fits


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, "auto"])
def test_a_smaller_batch_is_a_way_out_with_what_an_example_costs(accumulate: Any) -> None:
    fixed = {"zero": 0, "recompute": None, "bucket_bytes": 2**24, "memory_first": False}
    given = {"world_size": 1, "hardware": "cpu", "accumulate": accumulate, **fixed}
    plan = planned(memory=least_bytes(**given) - 1, **given)
    (smaller,) = [way for way in plan.ways_out if "rows in a batch" in way.change]
    num_rows = 2 if accumulate == 1 else 1  # of which a micro-batch is enough, where more of them do not help
    assert smaller.change == f"{num_rows} of {ROWS} rows in a batch"
    without = planned(batch=rows(num_rows), **{**given, "accumulate": 1})
    assert (smaller.step_s, smaller.reserved_bytes) == (without.chosen.step_s, without.chosen.reserved_bytes)
    assert smaller.cost == pytest.approx(smaller.step_s * ROWS / num_rows / plan.chosen.step_s)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_not_compiled(too_small: zgraph.Plan) -> None:
    model = Stack()
    with pytest.raises(BudgetError, match=r"no options fit: .* of the 100 KiB that each of"):
        zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), plan=too_small)
    assert type(model) is Stack


def test_compile_does_what_was_planned_and_says_so() -> None:
    batch = rows()
    plan = planned(world_size=1, hardware="cpu", batch=batch)
    model = Stack()
    compiled = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), plan=plan)
    compiled.train_step(*batch)
    assert compiled.plan.chosen.peak_bytes == plan.chosen.peak_bytes
    assert compiled.plan.chosen.step_s == pytest.approx(plan.chosen.step_s)
    assert compiled.plan.num_params == plan.num_params
    assert (compiled.plan.num_examples, compiled.plan.num_tokens) == (ROWS, 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_plan_counts_the_whole_batch(accumulate: int) -> None:
    plan = planned(**{**FIXED, "accumulate": accumulate})
    assert plan.num_examples == ROWS
    assert plan.examples_per_s == pytest.approx(ROWS * WORLD / plan.chosen.step_s)


def test_no_order_of_calls_takes_longer_than_the_one_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    more = planned(**FIXED).chosen.step_s * (1 + 1e-15)
    monkeypatch.setattr(plans, "least_s", lambda *_, **__: more)  # by rounding
    plan = planned(**FIXED)
    assert plan.least_s == plan.chosen.step_s
    assert ", 0.0% less" in str(plan)


def test_a_plan_for_other_ranks_or_with_other_options_is_refused() -> None:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(OptionError, match="the plan is for 4 ranks, and there are 1"):
        zgraph.compile(model, optimizer=optimizer, plan=planned(**FIXED))
    with pytest.raises(OptionError, match="zero=0, but the plan has zero=3"):
        zgraph.compile(model, optimizer=optimizer, plan=planned(**FIXED), zero=0)
    alone = planned(world_size=1, **FIXED)
    with pytest.raises(OptionError, match="accumulate=4, but the plan has accumulate=1"):
        zgraph.compile(model, optimizer=optimizer, plan=alone, accumulate=4)
    with pytest.raises(OptionError, match="precision='bf16', but the plan has precision=None"):
        zgraph.compile(model, optimizer=optimizer, plan=alone, precision="bf16")
    zgraph.compile(model, optimizer=optimizer, plan=alone, bucket_bytes="64KiB")  # the same in other words
    with pytest.raises(OptionError, match="the plan is for a Stack of 16,704 parameters, and this model has 25,056"):
        zgraph.compile(Stack(3), plan=alone)
    with pytest.raises(OptionError, match="plan is a dict"):
        zgraph.compile(model, optimizer=optimizer, plan={})  # type: ignore[arg-type]


def test_the_model_stays_as_it_was_and_may_have_values_or_none() -> None:
    model = Stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    real = zgraph.plan(model, optimizer, batch=rows(), world_size=WORLD, hardware="h100", **FIXED)
    assert not optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    on_meta = planned(batch=rows(device="meta"), **FIXED)
    assert real.chosen == on_meta.chosen


def test_json_has_all_of_it() -> None:
    plan = planned(**FIXED)
    found = json.loads(plan.to_json())
    assert found["fits"] is True
    assert found["chosen"]["peak_bytes"] == plan.chosen.peak_bytes
    assert found["chosen"]["options"]["zero"] == 3
    assert found["by_kind"] == dict(plan.by_kind)


def test_an_operator_of_no_family_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x @ self.weight)[1].square().mean()

    plan = zgraph.plan(Odd, torch.optim.SGD, batch=(torch.randn(8, 8),), world_size=1, hardware="h100", **FIXED)
    assert plan.unknown
    assert next(iter(plan.unknown)) in str(plan)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"world_size": 0}, OptionError, "world_size=0"),
        ({"world_size": True}, OptionError, "world_size=True"),
        ({"hardware": "h9000"}, OptionError, "H100"),
        ({"memory": "8 gibbons"}, OptionError, "memory='8 gibbons'"),
        ({"memory": -1}, OptionError, "memory=-1"),
        ({"batch": 3}, ZgraphError, "batch is a int"),
        ({"batch": (torch.zeros(2),)}, ZgraphError, "forward"),
        ({"clip_norm": "auto"}, OptionError, "clip_norm='auto'"),
        ({"zero": 4}, OptionError, "zero=4"),
        ({"shard_size": 3}, OptionError, "shard_size=3 does not divide the 4 ranks"),
        ({"shard_size": 2, "zero": 0}, OptionError, "divides nothing"),
        ({"nonsense": 4}, OptionError, "unknown option 'nonsense'"),
        ({"memroy": 4}, OptionError, "did you mean 'memory'?"),
        ({"passes": ()}, OptionError, "unknown option 'passes'"),
        ({"hardware": None}, OptionError, "hardware is a NoneType"),
        ({"precision": "fp16", "loss_scale": "dynamic"}, OptionError, "loss_scale='dynamic'"),
        ({"memory": "8 zettabytes"}, OptionError, "TiB"),
        ({"accumulate": 3}, ZgraphError, "3 micro-batches"),
    ],
)
def test_bad_input_is_refused_in_words(given: dict[str, Any], error: type[ZgraphError], words: str) -> None:
    with pytest.raises(error) as raised:
        planned(**given)
    assert words in str(raised.value)


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    with pytest.raises(OptionError, match="model is a int"):
        zgraph.plan(3, torch.optim.AdamW, batch=rows(), world_size=1)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="optimizer is a int"):
        zgraph.plan(Stack, 3, batch=rows(), world_size=1)  # type: ignore[arg-type]


def deep(depth: int = 11, **given: Any) -> zgraph.Plan:
    defaults: dict[str, Any] = {"batch": rows(), "world_size": WORLD, "hardware": "h100", "accumulate": 1}
    return zgraph.plan(lambda: Stack(depth), torch.optim.AdamW, **{**defaults, **given})


@pytest.mark.parametrize("tight", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_that_repeat_are_planned_as_if_all_were_captured(tight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "FEW", 0)  # a line is drawn through a few of them
    memory = deep(zero=3).chosen.reserved_bytes - 1 if tight else 2**30  # ZeRO-2 is as fast, to rounding
    folded = deep(zero=3, memory=memory)
    monkeypatch.setattr(captures, "SIZES", (100, 102))
    monkeypatch.setattr(choices, "LEVELS", choices.CHAINED["recompute"])
    whole = deep(zero=3, memory=memory)
    assert replace(folded, rejected=()) == replace(whole, rejected=())


def test_a_model_whose_blocks_are_not_alike_is_captured_whole_and_the_plan_says_so() -> None:
    class Uneven(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, block in enumerate(self.blocks):
                x = x + (block(x) if number % 2 else block(x).tanh())
            return x.square().mean()

    given = {"batch": rows(), "world_size": WORLD, "hardware": "h100", "memory": "1GiB", **FIXED}
    plan = zgraph.plan(lambda: Uneven(9), torch.optim.AdamW, **given)
    assert any("all 9 blocks were captured" in note for note in plan.notes)
    assert plan.num_params == sum(p.numel() for p in Uneven(9).parameters())
