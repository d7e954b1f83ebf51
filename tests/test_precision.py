"""Forward and backward compute in low precision as in autocast; what is read of a parameter travels as it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import zgraph
from tests.models import CASES
from tests.mutants.steps import read_in_low_precision
from tests.programs import assert_same_step, few_examples
from tests.recipes import Recipe, build, recipes
from tests.reference import slow
from zgraph import ops
from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.passes import CastBeforeGather, default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Program, Role, operand

BF16 = torch.bfloat16


def gathers(program: Program) -> list[tuple[str, torch.dtype]]:
    """What travels of each bucket, in order."""
    found = []
    for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
        source = operand(start)
        while source.op != "placeholder":
            source = operand(source)
        found.append((source.meta["input"].name, start.meta["val"].dtype))
    return found


def test_what_is_read_of_a_bucket_in_one_low_precision_travels_in_it() -> None:
    captured = read_in_low_precision()
    program = run(default_passes(Config(3, 10**6), Mesh(2)), captured).program
    assert program.layout is not None
    names = {bucket.name: [s.name for s in bucket.segments] for bucket in program.layout.buckets}
    assert names == {"bucket0": ["u", "v"], "bucket1": ["w", "z"]}, "w is read as it is, too"
    assert set(gathers(program)) == {("bucket0", torch.float32), ("bucket1", torch.float64)}
    assert_same_step(program, captured)


@pytest.mark.parametrize("prefetch", [1, 2])
def test_a_slice_is_cast_as_early_as_its_gather_starts(prefetch: int) -> None:
    program = run(default_passes(Config(3, 10**6, prefetch=prefetch), Mesh(2)), read_in_low_precision()).program
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    cast = [node for node in calls if node.target is ops.all_gather and operand(node).op == "call_function"]
    assert any(start.next not in start.users for start in cast)


def test_a_slice_is_cast_and_the_casts_of_what_was_gathered_are_gone() -> None:
    passes = default_passes(Config(3, 1, prefetch=0), Mesh(2))[:8]
    program = run(passes, read_in_low_precision()).program
    lines = program.text().splitlines()
    at = next(i for i, line in enumerate(lines) if "all_gather" in line)
    assert_expected_inline(
        "\n".join(lines[at - 1 : at + 5]),
        """\
%11: f32[16] = aten._to_copy.default(%0, dtype=torch.float32)
%12: f32[32] = _c10d_functional.all_gather_into_tensor.default(%11, 2, 'data')
%13: f32[32] = _c10d_functional.wait_tensor.default(%12)
%14: f32[9] = aten.slice.Tensor(%13, 0, 0, 9)
%15: f32[3, 3] = aten.view.default(%14, [3, 3])
%16: f32[3, 3] = aten.mm.default(%10, %15)""",
    )


@few_examples(40)
@given(recipes(), st.integers(1, 4), st.sampled_from([1, 200, 10**6]), st.booleans())
def test_any_step_is_the_same_and_casting_twice_is_casting_once(
    recipe: Recipe, world: int, bucket_bytes: int, late: bool
) -> None:
    captured = build(recipe)
    passes = default_passes(Config(3, bucket_bytes), Mesh(world))
    once = run(passes[:8], captured).program
    assert isinstance(passes[7], CastBeforeGather)
    assert CastBeforeGather()(once).text() == once.text()
    assert_same_step(run(passes[8:], once).program, captured, late=late)


# Against autocast


def test_one_rank_computes_what_autocast_computes() -> None:
    case = CASES["gpt_tied"]
    model, reference = case.model(), case.model()
    optimizer, eager = SGD(model.parameters(), lr=0.1), SGD(reference.parameters(), lr=0.1)
    compiled = zgraph.compile(model, optimizer=optimizer, precision="bf16")
    for batch in case.batches(3):
        found = compiled.train_step(*batch.args, **batch.kwargs)
        eager.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = reference(*batch.args, **batch.kwargs)
        loss.backward()
        eager.step()
        assert torch.equal(found, loss.detach())
    for name, value in reference.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name


@pytest.mark.parametrize("world", [2, *slow(1, 3)])
@pytest.mark.parametrize("case_name", ["gpt_tied", *slow("gpt", "recommender")])
def test_bf16_stays_as_near_to_float64_as_autocast_does_for_fifty_steps(case_name: str, world: int) -> None:
    case = CASES[case_name]
    model, reference, exact = case.model(), case.model(), case.model(torch.float64)
    makes = [AdamW(m.parameters(), lr=1e-3) for m in (model, reference, exact)]
    ranks = zgraph.simulate_ranks(model, makes[0], world_size=world, loss=case.loss, precision="bf16", zero=3)
    batches = case.batches(50)
    torch.manual_seed(0)
    off = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        parts = [batch.part(rank, world) for rank in range(world)]
        mine = ranks.train_step([(part.args, part.kwargs) for part in parts])
        losses = []
        for m, optimizer, low in ((reference, makes[1], True), (exact, makes[2], False)):
            optimizer.zero_grad()
            given_ = batch if low else batch.to(torch.float64)
            with torch.autocast("cpu", BF16, enabled=low):
                output = m(*given_.args, **given_.kwargs)
                loss = output if case.loss is None else case.loss(output, *given_.args, **given_.kwargs)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        off += torch.stack([(mine.double() - losses[1]).abs(), (losses[0] - losses[1]).abs()])
    away = [_distance(state, exact.state_dict()) for state in (ranks.state_dict(), reference.state_dict())]
    print(f"losses: zgraph {off[0] / 50:.2e}, autocast {off[1] / 50:.2e}; weights: {away[0]:.3e}, {away[1]:.3e}")
    assert off[0] <= 1.25 * off[1], "each rank rounds its own sums"
    assert away[0] <= 1.25 * away[1]


def _distance(state: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The root of the mean square of what floating-point tensors are off by, relative to the exact ones."""
    pairs = [(state[name].double(), value) for name, value in exact.items() if value.is_floating_point()]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


# What stays in float32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)).square().mean()


@pytest.mark.parametrize("name", ["head", "head.weight"])
def test_a_module_that_is_kept_in_float32_gets_float32(name: str) -> None:
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    before = dict(vars(model.head))
    options: dict[str, Any] = {"precision": "bf16", "keep_float32": [name], "bucket_bytes": 1, "zero": 3}
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=2, **options)
    found = ranks.train_step([(torch.ones(4, 8),)] * 2)
    with torch.autocast("cpu", BF16):
        hidden = reference.inner(torch.ones(4, 8))
    assert torch.equal(found, reference.head(hidden.float()).square().mean())
    layout = ranks.program.layout
    assert layout is not None
    travels = {s.name: dtype for b, dtype in gathers(ranks.program) for s in layout.by_name[b].segments}
    expected = {"inner.weight": BF16, "inner.bias": BF16, "head.weight": torch.float32, "head.bias": torch.float32}
    assert travels == {name: expected[name] for name in travels}
    assert vars(model.head).keys() == before.keys(), "the module is as it was"


def test_parameters_state_and_means_of_gradients_stay_float32() -> None:
    model = Net()
    ranks = zgraph.simulate_ranks(
        model, AdamW(model.parameters()), world_size=2, precision="bf16", zero=3, accumulate=2, clip_norm=1.0
    )
    ranks.train_step([(torch.ones(4, 8),)] * 2)
    reduced = [n for n in ranks.program.graph.nodes if n.target is ops.reduce_scatter]
    stored = [n for n, what in ranks.program.placeholders() if what.role in (Role.PARAM, Role.OPT_STATE, Role.GRADIENT)]
    assert {node.meta["val"].dtype for node in [*reduced, *stored]} == {torch.float32}
    assert {value.dtype for value in ranks.state_dict().values()} == {torch.float32}


# Refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "fp8"}, "precision='fp8' is not known"),
        ({"precision": ["bf16"]}, r"precision=\['bf16'\] is not known"),
        ({"keep_float32": ["head"]}, "keep_float32 without a precision"),
        ({"precision": "bf16", "keep_float32": "head"}, "is not a list of names"),
        ({"precision": "bf16", "keep_float32": [1]}, "is not a list of names"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        Config.from_options(options)


def test_a_name_of_nothing_is_refused_and_nothing_has_changed() -> None:
    model = Net()
    compiled = zgraph.compile(
        model, optimizer=SGD(model.parameters(), lr=0.1), precision="bf16", keep_float32=["inner", "tail"]
    )
    with pytest.raises(OptionError, match="keep_float32 names 'tail'"):
        compiled.train_step(torch.ones(4, 8))
    assert "forward" not in vars(model.inner)


class Holding(nn.Module):
    """Modules in containers, one that is never called, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head, self.offset = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(x + self.offset, self.head.weight).square().mean()


def test_a_container_that_is_kept_keeps_what_it_contains() -> None:
    model = Holding()
    options: dict[str, Any] = {"precision": "bf16", "zero": 3, "bucket_bytes": 1}
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.1), world_size=2, keep_float32=["blocks"], **options
    )
    ranks.train_step([(torch.ones(4, 8),)] * 2)
    layout = ranks.program.layout
    assert layout is not None
    travels = {s.name: dtype for b, dtype in gathers(ranks.program) for s in layout.by_name[b].segments}
    assert {dtype for name, dtype in travels.items() if name.startswith("blocks")} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("head", "forward does not call that module"),
        ("offset", "would keep the whole model in float32"),
        ("", "would keep the whole model in float32"),
    ],
)
def test_a_name_that_would_do_nothing_or_everything_is_refused(name: str, reason: str) -> None:
    model = Holding()
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1), precision="bf16", keep_float32=[name])
    with pytest.raises(OptionError, match=reason):
        compiled.train_step(torch.ones(4, 8))


class BothWays(nn.Module):
    """Reads one weight as it is and transposed, as a tied output layer that is written ``x @ w.T`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.inner(x)) @ self.inner.weight.T
        return y.square().mean()


def test_a_cast_of_a_transposed_weight_is_the_transpose_of_its_cast() -> None:
    torch.manual_seed(0)
    states = []
    for world in (1, 2):
        torch.manual_seed(0)
        model = BothWays()
        ranks = zgraph.simulate_ranks(
            model, torch.optim.SGD(model.parameters(), lr=0.1), world_size=world, precision="bf16"
        )
        ranks.train_step([(torch.ones(2, 6),)] * world)
        states.append(ranks.state_dict()["inner.weight"])
    torch.testing.assert_close(*states)
