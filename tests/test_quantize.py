"""Optimizer state in 8 bits: off by no more than is said, in a fourth of the bytes, and the same wherever it lies."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import zgraph
from tests.models import CASES
from tests.mutants.steps import in_single_precision
from tests.programs import divide, few_examples, join, param, reference, state, values_for
from tests.reference import assert_equal
from zgraph import lockstep, ops
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.packed import BLOCK, pack, packed_numel, unpack, unpacked_numel
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Program, Role, Stage, operand

aten = torch.ops.aten
INT8 = Config(state_precision="int8")


def vectors() -> st.SearchStrategy[Tensor]:
    """Blocks of many scales, with zeros, tiny and equal elements among them."""

    def made(seed: int, num_blocks: int, spread: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_blocks * BLOCK, generator=generator)
        x *= (spread * torch.randn(len(x), generator=generator)).exp()
        x[torch.rand(len(x), generator=generator) < 0.1] = 0
        x[:BLOCK] *= seed % 3 - 1  # a block of zeros, now and then
        return x * 10.0 ** -(seed % 40)

    return st.builds(made, st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.0, 1.0, 5.0]))


@few_examples(100)
@given(vectors())
def test_a_fourth_root_is_off_by_half_a_level_at_most(x: Tensor) -> None:
    packed = pack(x)
    y = unpack(packed)
    scale = x.view(-1, BLOCK).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1).double()
    x = torch.where(scale < 2**-98, 0.0, x)
    scale = torch.where(scale < 2**-98, 0.0, scale)
    assert torch.equal(x == 0, y == 0)
    assert torch.equal(x.sign(), y.sign())
    roots = [torch.where(scale > 0, v.double().abs() / scale, 0) ** 0.25 for v in (x, y)]
    rounds_to_zero = (roots[0] > 0) & (roots[0] < 0.5 / 127)
    off = (roots[0] - roots[1]).abs()
    assert off[~rounds_to_zero].max() <= 1 / 254 + 1e-6
    assert off[rounds_to_zero].numel() == 0 or off[rounds_to_zero].max() < 1 / 127 + 1e-6
    largest = x.abs() == scale.float()
    assert torch.equal(x[largest], y[largest])
    assert torch.equal(pack(y), packed), "packing again changes nothing"
    assert len(packed) == packed_numel(len(x)) == len(x) * 65 // 64
    assert unpacked_numel(len(packed)) == len(x)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(2 * BLOCK)
    x[3] = torch.nan
    y = unpack(pack(x))
    assert y[:BLOCK].isnan().any()
    assert torch.equal(y[BLOCK:], x[BLOCK:])


# Programs


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
def test_ranks_compute_the_captured_step_on_state_that_was_packed(world: int, zero: int, late: bool) -> None:
    """Bit for bit, from state as it is stored to state as it is stored."""
    captured = in_single_precision()
    program = run(default_passes(Config(zero, state_precision="int8"), Mesh(world)), captured).program
    assert program.layout is not None
    stored = divide(program, values_for(captured, world=world))
    dtypes = {str(what): value.dtype for what, value in stored[0].items() if isinstance(value, Tensor)}
    assert dtypes["opt_state:bucket0:m"] is torch.uint8
    assert dtypes["opt_state:bucket1:m"] is torch.float64, "only float32 is packed"
    inputs = [
        {**whole, **{what: value for what, value in mine.items() if what in whole}}
        for whole, mine in zip(values_for(captured, world=world), join(program, stored), strict=True)
    ]
    expected = reference(captured, inputs)
    found = lockstep.run_ranks(program, stored, late=late)
    flat = [what for what in expected[0] if what is not None and what.role is Role.OPT_STATE]
    wanted = join(program, lockstep.divide(program.layout, expected, flat))
    for mine, theirs in zip(join(program, found), wanted, strict=True):
        for what, value in theirs.items():
            assert torch.equal(torch.as_tensor(mine[what]), torch.as_tensor(value)), what


def test_the_proof_says_what_it_takes_on_trust() -> None:
    records = run(default_passes(INT8, Mesh(2)), in_single_precision()).records
    assert {r.name: r.assumes for r in records if r.assumes} == {"QuantizeState": ("unpack(pack(x)) = x",)}


@dataclass(frozen=True)
class ExchangePacked(Pass):
    """Return two kinds of packed state as each other's."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        results, outputs = program.results(), program.outputs
        one, two = (outputs.index(state("bucket0", key)) for key in ("m", "s"))
        results[one], results[two] = results[two], results[one]
        program.set_results(results, outputs)


@dataclass(frozen=True)
class KeepPacked(Pass):
    """Return packed state as it was."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        inputs, results = program.inputs(Role.OPT_STATE), program.results()
        results[program.outputs.index(state("bucket0", "m"))] = inputs["bucket0", "m"]
        program.set_results(results, program.outputs)


@dataclass(frozen=True)
class PackAndUnpack(Pass):
    """Send something else through 8 bits, too."""

    what: str
    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        results, outputs = program.results(), program.outputs
        if not program.graph.find_nodes(op="call_function", target=ops.unpack_state):
            return
        if self.what == "gradient":
            node = next(n for n in program.graph.find_nodes(op="call_function", target=ops.wait) if len(n.meta["val"]))
        elif self.what == "state":
            node = operand(results[outputs.index(state("bucket0", "m"))])
        else:
            node = results[outputs.index(param("bucket0"))]
        origin, before = replace(node.meta["origin"], module="bucket0"), node.next
        packed = program.call(ops.pack_state, node, origin=origin, before=before)
        again = program.call(ops.unpack_state, packed, origin=origin, before=before)
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not packed)


@pytest.mark.parametrize("what", ["gradient", "state", "parameter"])
def test_nothing_but_given_state_may_go_through_8_bits(what: str) -> None:
    zero = Config(3, state_precision="int8")
    before = [p for p in default_passes(zero, Mesh(2)) if p.gives < Stage.SCHEDULED]
    with pytest.raises(VerifyError, match=r"PackAndUnpack (changed what the step computes|left the new value of)"):
        run([*before, PackAndUnpack(what)], in_single_precision())


@dataclass(frozen=True)
class ForgetPacked(Pass):
    """Say of one state that it lies whole."""

    takes = gives = Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        program.layout = replace(program.layout, packed=program.layout.packed[1:])


def test_what_lies_packed_may_not_change() -> None:
    with pytest.raises(VerifyError, match="ForgetPacked changed the buckets"):
        run(default_passes(INT8, Mesh(2), own=[ForgetPacked()]), in_single_precision())


@pytest.mark.parametrize("mistake", [ExchangePacked(), KeepPacked()])
def test_a_mistake_with_packed_state_is_refused(mistake: Pass) -> None:
    with pytest.raises(VerifyError, match=f"{mistake.name} changed what the step computes"):
        run(default_passes(INT8, Mesh(2), own=[mistake]), in_single_precision())


# Training


def test_state_takes_a_fourth_of_the_bytes() -> None:
    stats = {}
    for precision in (None, "int8"):
        model = nn.Linear(256, 256)
        compiled: Any = zgraph.compile(
            model, optimizer=AdamW(model.parameters()), loss=lambda y, _: y.square().mean(), state_precision=precision
        )
        compiled.train_step(torch.ones(2, 256))
        stats[precision] = compiled.stats()
    numel = 256 * 256 + 256
    assert stats["int8"]["optimizer_state_bytes"] == pytest.approx(2 * numel * 65 / 64, rel=1e-3)
    assert stats[None]["optimizer_state_bytes"] == pytest.approx(2 * numel * 4, rel=1e-3)


def test_training_goes_as_with_whole_state() -> None:
    """Fifty steps: the loss falls as far, to within two hundredths of the way."""
    case = CASES["gpt_tied"]
    torch.manual_seed(0)
    models = [case.model(torch.float32) for _ in range(2)]
    (batch,) = case.batches(1, 8)
    losses = []
    for model, precision in zip(models, (None, "int8"), strict=True):
        compiled: Any = zgraph.compile(model, optimizer=AdamW(model.parameters(), lr=1e-3), state_precision=precision)
        losses.append([compiled.train_step(*batch.args, **batch.kwargs).item() for _ in range(50)])
    exact, packed = losses
    assert exact[-1] < exact[0] - 0.5
    assert abs(packed[-1] - exact[-1]) < 0.02 * (exact[0] - exact[-1])


def test_state_is_saved_in_float32_and_loaded_without_a_change() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3, 20) for _ in range(4)]

    def compiled() -> tuple[Any, Any]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
        optimizer = Adam(model.parameters(), lr=0.1)
        loss = lambda y, _: y.square().mean()  # noqa: E731
        return zgraph.compile(model, optimizer=optimizer, loss=loss, state_precision="int8"), optimizer

    (model, optimizer), (other, others) = compiled(), compiled()
    for x in batches[:2]:
        model.train_step(x)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["exp_avg"].dtype is torch.float32
    other.load_state_dict(model.state_dict())
    others.load_state_dict(saved)
    for x in batches[2:]:
        for each in (model, other):
            each.train_step(x)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    assert model.stats()["num_captures"] == 1


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_simulated_ranks_have_one_state(zero: int) -> None:
    """With a skipped step, which leaves all bits, an average, which stays float32, and momentum that a step creates."""
    torch.manual_seed(0)
    model = nn.Linear(20, 7)
    ranks = zgraph.simulate_ranks(
        model,
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        world_size=2,
        zero=zero,
        loss=lambda y, _: y.square().mean(),
        clip_norm=0.5,
        ema=0.5,
        state_precision="int8",
    )
    for _ in range(3):
        ranks.train_step([(torch.randn(3, 20),) for _ in range(2)])
    before = ranks.optimizer_state()
    ranks.train_step([(torch.full((3, 20), torch.inf),) for _ in range(2)])
    assert ranks.stats()["num_skipped_steps"] == 1
    after = ranks.optimizer_state()
    for name, entries in before.items():
        assert set(entries) == {"momentum_buffer", "weight_ema"}
        assert_equal(after[name], entries, name)  # type: ignore[arg-type]
    assert ranks.layout is not None
    assert ranks.layout.packed == (("bucket0", "momentum_buffer"),)


@pytest.mark.parametrize("world", [1, 2])
def test_what_an_update_makes_of_padding_spoils_no_block(world: int) -> None:
    """Padding of parameters is NaN on simulated ranks, and decay carries it into the moment."""
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    exact = copy.deepcopy(model)
    options: dict[str, Any] = {"world_size": world, "loss": lambda y, _: (y - 1).square().mean()}
    ranks, reference = (
        zgraph.simulate_ranks(
            each, SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), state_precision=precision, **options
        )
        for each, precision in ((model, "int8"), (exact, None))
    )
    for _ in range(4):
        batches = [(torch.randn(4, 5),) for _ in range(world)]
        ranks.train_step(batches)
        reference.train_step(batches)
    torch.testing.assert_close(ranks.state_dict(), reference.state_dict(), rtol=0.02, atol=0.02)


def test_zero_divided_by_zero_in_padding_stays_there() -> None:
    """Adam without an epsilon, in one process: padding's gradient is zero, and so are its moments."""
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    optimizer = Adam(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.0)
    compiled: Any = zgraph.compile(
        model, optimizer=optimizer, loss=lambda y, _: (y - 1).square().mean(), state_precision="int8"
    )
    for _ in range(4):
        compiled.train_step(torch.randn(4, 5))
    assert compiled.state_dict()["weight"].isfinite().all()


def test_other_precisions_are_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="state_precision='fp4' is not known"):
        zgraph.compile(nn.Linear(2, 2), state_precision="fp4")


class Lookahead(SGD):
    """Has a slow copy of each parameter, which starts as the parameter does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["slow"] = p.clone()
            p.sub_(p.grad, alpha=0.1)
            state["slow"].lerp_(p, 0.5)
            p.copy_(state["slow"])


@pytest.mark.parametrize("world", [1, 2])
def test_state_that_starts_as_a_parameter_starts_without_its_padding(world: int) -> None:
    """Padding of parameters is NaN on simulated ranks."""
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    ranks = zgraph.simulate_ranks(
        model,
        Lookahead(model.parameters()),
        world_size=world,
        loss=lambda y, _: y.square().mean(),
        state_precision="int8",
    )
    for _ in range(3):
        ranks.train_step([(torch.randn(4, 5),) for _ in range(world)])
    assert all(value.isfinite().all() for value in ranks.state_dict().values())
