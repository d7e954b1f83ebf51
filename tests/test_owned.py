"""An update that mixes the elements of a parameter runs on the rank that owns the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.optim import Muon, Optimizer

import zgraph
from tests.models import CASES
from tests.optimizers import OPTIMIZERS, Lamb, tensors_of
from tests.programs import Builder, accumulated, assert_same_step, clipped, param, rewritten
from tests.reference import assert_equal
from zgraph.codegen.emit import emit
from zgraph.codegen.owned import OwnedUpdate
from zgraph.errors import OptimizerError, VerifyError
from zgraph.passes import FormBuckets
from zgraph.program import Input, Phase, Program, Role
from zgraph.verify import verify

aten = torch.ops.aten
Update = Callable[..., fx.Node]


def normalised(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
    """``p - g / |g|``."""
    length = b.call(Phase.UPDATE, aten.linalg_vector_norm.default, g, module=name)
    step = b.call(Phase.UPDATE, aten.div.Tensor, g, length, module=name)
    return b.call(Phase.UPDATE, aten.sub.Tensor, p, step, module=name)


def two_matrices(update: Update = normalised, *, alike: bool = False) -> Program:
    """``loss = sum(x @ w1 @ w2)``; both are trained by ``update``."""
    b = Builder()
    shapes = {"w1": [2, 2], "w2": [2, 2]} if alike else {"w1": [2, 3], "w2": [3, 1]}
    w1, w2 = (b.input(Role.PARAM, name, shape=shape) for name, shape in shapes.items())
    x = b.input(Role.BATCH, "0", shape=[4, 2])
    h = b.forward(aten.mm.default, x, w1)
    y = b.forward(aten.mm.default, h, w2)
    loss = b.forward(aten.sum.default, y)
    gy = b.backward(aten.ones_like.default, y)
    gw2 = b.backward(aten.mm.default, b.backward(aten.t.default, h), gy)
    gh = b.backward(aten.mm.default, gy, b.backward(aten.t.default, w2))
    gw1 = b.backward(aten.mm.default, b.backward(aten.t.default, x), gh)
    results: dict[Input | None, Any] = {None: loss}
    for name, w, g in (("w1", w1, gw1), ("w2", w2, gw2)):
        results[param(name)] = update(b, name, w, g)
    return b.finish(results)


def call_of(program: Program) -> fx.Node:
    """The first owned update."""
    return next(node for node in program.graph.nodes if isinstance(node.target, OwnedUpdate))


def test_each_rank_computes_what_it_owns() -> None:
    call = call_of(FormBuckets(2, 10**6)(two_matrices()))
    assert_expected_inline(
        str(call.target).replace("; ", "\n"),
        """\
update_bucket0{body0 = %2 = aten.linalg_vector_norm.default(%0)
%3 = aten.div.Tensor(%0, %2)
%4 = aten.sub.Tensor(%1, %3)
return [%4]
body1 = %2 = aten.linalg_vector_norm.default(%0)
%3 = aten.div.Tensor(%0, %2)
%4 = aten.sub.Tensor(%1, %3)
return [%4]
rank 0: 0:[2, 3] = body0(0:[2, 3], 0:[2, 3])
rank 1: 16:[3, 1] = body1(16:[3, 1], 16:[3, 1]) over [None]}""",
    )


def test_what_a_rank_owns_is_written_over_and_the_rest_is_never_seen() -> None:
    program = rewritten(two_matrices(), 3, 2, 10**6)
    call = call_of(program)
    assert call.target.writes == (1,)
    g, p = torch.arange(1.0, 17, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    kept = p.clone()
    (new,) = call.target(g, p, rank=1)
    assert new.data_ptr() == p.data_ptr()
    assert torch.equal(p[:3], kept[:3] - g[:3] / g[:3].norm())
    assert torch.equal(p[3:], kept[3:]), "padding stays as it is"
    assert "rank=comm.rank" in emit(program).source
    assert "rank=" not in emit(rewritten(two_matrices(), 0, 2)).source, "where all is whole, all ranks do the same"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_compute_the_captured_step(world: int, zero: int) -> None:
    for make in (two_matrices, lambda: clipped(two_matrices(), 0.1), lambda: accumulated(two_matrices(), 3, limit=0.1)):
        for late in (False, True):
            captured = make()
            assert_same_step(rewritten(captured, zero, world, 10**6), captured, late=late)


def test_parameters_of_one_shape_have_one_body() -> None:
    call = call_of(FormBuckets(2, 10**6)(two_matrices(alike=True)))
    assert len({part.body for part in call.target.parts}) == 1


# Refusals


def draw(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
    noise = b.call(Phase.UPDATE, aten.bernoulli.p, g, 0.5, module=name)
    length = b.call(Phase.UPDATE, aten.linalg_vector_norm.default, noise, module=name)
    return b.call(Phase.UPDATE, aten.sub.Tensor, p, length, module=name)


def read_by_place(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
    first = b.call(Phase.UPDATE, aten.as_strided.default, p, [1], [1], 0, module=name)
    return b.call(
        Phase.UPDATE, aten.sub.Tensor, p, b.call(Phase.UPDATE, aten.mul.Tensor, g, first, module=name), module=name
    )


def read_others(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
    other = b.program.inputs(Role.PARAM)["w1", ""]
    length = b.call(Phase.UPDATE, aten.linalg_vector_norm.default, other, module=name)
    return b.call(Phase.UPDATE, aten.sub.Tensor, normalised(b, name, p, g), length, module=name)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (draw, "the update of w1 draws random numbers in aten.bernoulli.p"),
        (read_by_place, "the update of w1 reads memory by its place in aten.as_strided.default"),
        (read_others, "the update of w2 reads another parameter's value, gradient or state"),
    ],
)
def test_an_update_that_no_owner_can_compute_is_refused(update: Update, message: str) -> None:
    with pytest.raises(OptimizerError, match=message) as refusal:
        FormBuckets(2, 10**6)(two_matrices(update))
    assert refusal.value.where is not None


def part(update: OwnedUpdate, **changes: Any) -> OwnedUpdate:
    first, *others = update.parts
    return replace(update, parts=(replace(first, **changes), *others))


def shifted(update: OwnedUpdate) -> OwnedUpdate:
    return part(update, gives=tuple(replace(place, offset=place.offset + 8) for place in update.parts[0].gives))


def of_another_rank(update: OwnedUpdate) -> OwnedUpdate:
    return part(update, owner=1)


def twice(update: OwnedUpdate) -> OwnedUpdate:
    return replace(update, parts=(*update.parts, update.parts[0]))


def for_more_ranks(update: OwnedUpdate) -> OwnedUpdate:
    return replace(update, world=4)


def giving_an_input(update: OwnedUpdate) -> OwnedUpdate:
    copy = update.copy()
    body = copy.parts[0].body
    body.output_node().args = ([body.find_nodes(op="placeholder")[1]],)
    return copy


def writing_in_its_body(update: OwnedUpdate) -> OwnedUpdate:
    copy = update.copy()
    next(n for n in copy.parts[0].body.nodes if n.target is aten.sub.Tensor).target = aten.sub_.Tensor
    return copy


def with_other_shapes(update: OwnedUpdate) -> OwnedUpdate:
    takes = tuple(place and replace(place, shape=place.shape[::-1]) for place in update.parts[0].takes)
    return part(update, takes=takes)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (shifted, "writes what it has for w1 over something else"),
        (of_another_rank, "has rank 1 compute w1, which lies elsewhere"),
        (twice, "writes two parts over element 0"),
        (for_more_ranks, "is for 4 ranks of a mesh of 2"),
        (giving_an_input, "gives an input as a result"),
        (writing_in_its_body, "aten.sub_.Tensor in a body"),
        (with_other_shapes, "is given other arguments than its body for w1 takes"),
    ],
)
def test_a_broken_owned_update_is_refused(spoil: Callable[[OwnedUpdate], OwnedUpdate], rule: str) -> None:
    program = rewritten(two_matrices(), 3, 2, 10**6)
    call = call_of(program)
    call.target = spoil(call.target)
    with pytest.raises(VerifyError, match=rule):
        verify(program, after="test")


# Optimizers


@pytest.mark.parametrize("name", ["muon_and_adam", "lamb"])
def test_state_of_any_shape_is_saved_and_loaded(name: str) -> None:
    """Half of the steps, then the other half with another model and optimizer that load what the first ones saved."""
    case = CASES["gpt_tied"]

    def compiled() -> tuple[Any, Optimizer]:
        model = case.model(torch.float64)
        optimizer = OPTIMIZERS[name](model)
        return zgraph.compile(model, optimizer=optimizer), optimizer

    batches = case.batches(6, 4, dtype=torch.float64)
    (model, optimizer), (first, its_optimizer) = compiled(), compiled()
    for batch in batches:
        model.train_step(*batch.args, **batch.kwargs)
    for batch in batches[:3]:
        first.train_step(*batch.args, **batch.kwargs)
    other, others = compiled()
    other.load_state_dict(first.state_dict())
    others.load_state_dict(its_optimizer.state_dict())
    for batch in batches[3:]:
        other.train_step(*batch.args, **batch.kwargs)
    assert_equal(other.state_dict(), model.state_dict(), "parameters")
    assert_equal(tensors_of(others), tensors_of(optimizer), "state")


def test_state_of_another_shape_is_not_loaded() -> None:
    model = nn.Linear(3, 5, bias=False)
    optimizer = torch.optim.Adafactor(model.parameters())
    compiled: Any = zgraph.compile(model, optimizer=optimizer, loss=lambda y, _: y.square().mean())
    compiled.train_step(torch.ones(2, 3))
    saved = optimizer.state_dict()
    saved["state"][0]["row_var"] = torch.zeros(4, 1)
    with pytest.raises(zgraph.StateError, match=r"'row_var' of 'weight' has shape \(4, 1\), not \(5, 1\)"):
        optimizer.load_state_dict(saved)
    compiled.train_step(torch.ones(2, 3))


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in ((6, 8), (8, 8), (8, 4))))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x).square().mean()
        return y


@pytest.mark.parametrize("world", [1, 2, 3])
def test_muon_with_one_and_with_four_micro_batches_gives_the_same_weights(world: int) -> None:
    """Muon orthogonalises the gradient once for a step, not once for a micro-batch."""
    models = {}
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = Matrices().double()
        ranks = zgraph.simulate_ranks(model, Muon(model.parameters(), lr=0.1), world_size=world, accumulate=accumulate)
        for _ in range(5):
            ranks.train_step([(torch.randn(12, 6, dtype=torch.float64),) for _ in range(world)])
        models[accumulate] = ranks.state_dict()
    assert_equal(models[4], models[1], "weights")


def test_what_torch_writes_with_min_and_max_of_numbers_needs_no_guard() -> None:
    """Adafactor's step size is ``min(lr, 1 / sqrt(step))``: one captured step for all."""
    torch.manual_seed(0)
    model, reference = Matrices().double(), Matrices().double()
    reference.load_state_dict(model.state_dict())
    optimizer, eager = (torch.optim.Adafactor(m.parameters(), lr=0.6) for m in (model, reference))
    compiled: Any = zgraph.compile(model, optimizer=optimizer)
    for step in range(5):
        x = torch.randn(3, 6, dtype=torch.float64)
        eager.zero_grad()
        reference(x).backward()
        eager.step()
        compiled.train_step(x)
        assert_equal(compiled.state_dict(), reference.state_dict(), f"step {step}")
    assert compiled.stats()["num_captures"] == 1


def test_a_number_of_each_parameters_own_is_its_state() -> None:
    """LAMB's ratio differs between parameters of one bucket, whose step counts are one number."""
    model = Matrices()
    optimizer = Lamb(model.parameters())
    compiled: Any = zgraph.compile(model, optimizer=optimizer)
    for _ in range(2):
        compiled.train_step(torch.randn(3, 6))
    ratios = {entries["ratio"].item() for entries in optimizer.state_dict()["state"].values()}
    assert len(ratios) == 3
    (stored,) = compiled.program.layout.buckets
    assert [key for key, _ in stored.states] == ["ratio"]
