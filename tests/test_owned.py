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
from tests.optimizers import OPTIMIZERS, Lamb, Shampoo, tensors_of
from tests.programs import Builder, accumulated, assert_same_step, clipped, param, rewritten
from tests.reference import assert_equal
from tests.updates import ByParameter
from zgraph import ops
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


def test_what_a_call_is_given_does_not_grow_with_the_number_of_parameters() -> None:
    """A constant that each parameter's update makes anew is one input."""

    def scaled(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
        one = b.call(Phase.UPDATE, aten.scalar_tensor.default, 1.0, dtype=torch.float64, module=name)
        step = b.call(Phase.UPDATE, aten.mul.Tensor, normalised(b, name, p, g), one, module=name)
        return b.call(Phase.UPDATE, aten.sub.Tensor, p, step, module=name)

    assert len(call_of(FormBuckets(2, 10**6)(two_matrices(scaled))).args) == 3


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"precision": "fp16"}])
def test_an_elementwise_update_is_not_mixed_by_what_comes_before_it(options: dict[str, Any]) -> None:
    model = Matrices()
    compiled: Any = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), **options)
    compiled.train_step(torch.ones(2, 6))
    assert not any(bucket.owners for bucket in compiled.program.layout.buckets)


def test_parameters_of_one_shape_have_one_body() -> None:
    call = call_of(FormBuckets(2, 10**6)(two_matrices(alike=True)))
    assert len({part.body for part in call.target.parts}) == 1


# Refusals


def draw(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
    noise = b.call(Phase.UPDATE, aten.bernoulli.p, g, 0.5, module=name)
    length = b.call(Phase.UPDATE, aten.linalg_vector_norm.default, noise, module=name)
    return b.call(Phase.UPDATE, aten.sub.Tensor, p, length, module=name)


def read_others(b: Builder, name: str, p: fx.Node, g: fx.Node) -> fx.Node:
    other = b.program.inputs(Role.PARAM)["w1", ""]
    length = b.call(Phase.UPDATE, aten.linalg_vector_norm.default, other, module=name)
    return b.call(Phase.UPDATE, aten.sub.Tensor, normalised(b, name, p, g), length, module=name)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (draw, "the update of w1 draws random numbers in aten.bernoulli.p"),
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


def of_another_size(update: OwnedUpdate) -> OwnedUpdate:
    """The rank's part would begin one element early, where the proof reads what lies at the offset."""
    first, second = update.parts
    places = [tuple(place and replace(place, numel=30) for place in second.takes)]
    places.append(tuple(replace(place, numel=30) for place in second.gives))
    return replace(update, parts=(first, replace(second, takes=places[0], gives=places[1])))


def with_fewer_inputs(update: OwnedUpdate) -> OwnedUpdate:
    return part(update, takes=update.parts[0].takes[:1])


def over_no_input(update: OwnedUpdate) -> OwnedUpdate:
    return replace(update, writes=(7,))


def with_a_method(update: OwnedUpdate) -> OwnedUpdate:
    copy = update.copy()
    body = copy.parts[0].body
    with body.inserting_before(body.output_node()):
        body.call_method("numpy", (body.find_nodes(op="placeholder")[0],))
    return copy


def giving_a_number(update: OwnedUpdate) -> OwnedUpdate:
    copy = update.copy()
    copy.parts[0].body.output_node().args = ([1.0],)
    return copy


def reading_transposed(update: OwnedUpdate) -> OwnedUpdate:
    copy = update.copy()
    given = copy.parts[0].body.find_nodes(op="placeholder")[0]
    val = given.meta["val"]
    with val.fake_mode:
        given.meta["val"] = torch.empty(val.shape[::-1], dtype=val.dtype).t()
    return copy


def communicating(update: OwnedUpdate) -> OwnedUpdate:
    copy = update.copy()
    body = copy.parts[0].body
    given = body.find_nodes(op="placeholder")[0]
    with body.inserting_after(given):
        shared = body.call_function(ops.max_over_ranks, (given,))
    shared.meta.update(given.meta)
    given.replace_all_uses_with(shared, delete_user_cb=lambda user: user is not shared)
    return copy


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
        (giving_a_number, "has a body with a result that is no tensor"),
        (of_another_size, "has w2 lie in tensors of another size"),
        (with_fewer_inputs, "is given 2 inputs for 1 results, but its parts have others"),
        (over_no_input, "writes two results over one input, or one over none"),
        (with_a_method, "has call_method in a body"),
        (reading_transposed, "is recorded as|is given other arguments than its body for w1 takes"),
        (communicating, "zgraph.max_over_ranks.default in a body"),
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


# Optimizers that people write


class Simple(ByParameter):
    """Calls ``change`` with each parameter that has a gradient, its state, and the learning rate."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        self.change(p, self.state[p], group["lr"])

    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        raise NotImplementedError


class OneMomentForMatrices(Simple):
    """Adam-mini's idea: one second moment for a matrix, one for each element of the rest, under the same key."""

    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        is_matrix = p.dim() == 2
        if not state:
            state["v"] = torch.zeros((), dtype=p.dtype) if is_matrix else torch.zeros_like(p)
        state["v"].lerp_(p.grad.square().mean() if is_matrix else p.grad.square(), 0.1)
        p.sub_(p.grad / (state["v"].sqrt() + 0.1), alpha=lr)


class SlowNorm(Simple):
    """Divides by a norm that moves slowly, which is as good a shape as any: it is read through a reshape."""

    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            state["norm"] = torch.zeros((), dtype=p.dtype)
        state["norm"].lerp_(p.grad.norm(), 0.1)
        p.sub_(p.grad / (1 + state["norm"].reshape(-1).sum()), alpha=lr)


class Largest(Simple):
    """``max`` of a number and a 0-dim tensor, as in the Adafactor of transformers."""

    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        state["rms"] = p.norm() / p.numel() ** 0.5
        p.sub_(p.grad * (max(lr, state["rms"]) * min(0.5, lr) / (1 + p.grad.norm())))


class Scaled(nn.Module):
    """Two matrices, a vector, and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)) * self.scale)
        return y.square().mean()


class ManyDtypes(Simple):
    """Keeps a moment in bfloat16, a count of each element in int64, and signs in int8."""

    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            state["moment"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["count"] = torch.zeros_like(p, dtype=torch.int64)
            state["sign"] = torch.zeros_like(p, dtype=torch.int8)
        state["moment"].lerp_(p.grad.to(torch.bfloat16), 0.5)
        state["count"].add_((p.grad.sign() == state["sign"]).to(torch.int64))
        state["sign"].copy_(p.grad.sign())
        p.sub_(state["moment"].to(p.dtype) * (lr / (1 + state["count"])))


KINDS: list[Callable[[Any], Optimizer]] = [
    Lamb, Shampoo, torch.optim.Adafactor, OneMomentForMatrices, SlowNorm, Largest, ManyDtypes,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_eager", [0, 2])
def test_state_of_any_shape_survives_another_batch_and_a_start_from_eager(
    kind: Callable[[Any], Optimizer], num_eager: int
) -> None:
    """The step is captured again for batches of another size, and state then is as a step has left it."""
    torch.manual_seed(0)
    model, reference = Scaled().double(), Scaled().double()
    reference.load_state_dict(model.state_dict())
    optimizer, eager = kind(model.parameters()), kind(reference.parameters())
    compiled: Any = None
    for step, num in enumerate((4, 4, 6, 4, 6)):
        x = torch.randn(num, 6, dtype=torch.float64)
        eager.zero_grad()
        reference(x).backward()
        eager.step()
        if step < num_eager:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            continue
        compiled = compiled or zgraph.compile(model, optimizer=optimizer)
        compiled.train_step(x)
        assert_equal(compiled.state_dict(), reference.state_dict(), f"step {step}")
        found, expected = tensors_of(optimizer), tensors_of(eager)
        assert {name: v.dtype for name, v in found.items()} == {name: v.dtype for name, v in expected.items()}
        assert_equal(*({name: v.double() for name, v in mine.items()} for mine in (found, expected)), f"step {step}")
    assert len(compiled.program.layout.buckets) <= 3, "numbers of each parameter's own do not part buckets"


def test_a_parameter_with_state_of_its_own_shape_can_be_frozen_and_thawed() -> None:
    torch.manual_seed(0)
    model, reference = Scaled().double(), Scaled().double()
    reference.load_state_dict(model.state_dict())
    optimizer, eager = torch.optim.Adafactor(model.parameters()), torch.optim.Adafactor(reference.parameters())
    compiled: Any = zgraph.compile(model, optimizer=optimizer)
    for step in range(6):
        for each in (model, reference):
            each.first.requires_grad_(step not in (2, 3))
        x = torch.randn(4, 6, dtype=torch.float64)
        eager.zero_grad()
        reference(x).backward()
        eager.step()
        compiled.train_step(x)
        assert_equal(compiled.state_dict(), reference.state_dict(), f"step {step}")
        assert_equal(tensors_of(optimizer), tensors_of(eager), f"state, step {step}")


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_skipped_step_asks_no_matrix_for_its_eigenvalues_that_has_none(options: dict[str, Any], zero: int) -> None:
    """What is not finite would make ``eigh`` fail on the one rank that owns the parameter."""
    torch.manual_seed(0)
    model = Matrices()
    ranks = zgraph.simulate_ranks(model, Shampoo(model.parameters()), world_size=2, zero=zero, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranks.train_step([(torch.full((2, 6), 1e30),), (torch.ones(2, 6),)])
    assert ranks.stats()["num_skipped_steps"] == 1
    assert_equal(ranks.state_dict(), before, "weights")
    ranks.train_step([(torch.ones(2, 6),)] * 2)
    assert not torch.equal(ranks.state_dict()["layers.0.weight"], before["layers.0.weight"])


class Flagged(Simple):
    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        state["known"] = True
        p.sub_(p.grad, alpha=lr)


class Assigning(Simple):
    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        p.data = p.data - lr * p.grad


class Counting(Simple):
    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        of_all: Any = self.state
        of_all["all"]["count"] = of_all["all"].get("count", 0) + 1
        p.sub_(p.grad, alpha=lr / of_all["all"]["count"])


class Strided(Simple):
    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        p.sub_(p.grad * p.as_strided([1], [1]), alpha=lr)


class Numbered(Simple):
    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        state["norm"] = p.grad.norm().item()
        p.sub_(p.grad, alpha=lr / (1 + state["norm"]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Flagged, "keeps a bool in its state, 'known' of layers.0.weight"),
        (Assigning, "assigns to the data of layers.0.weight"),
        (Counting, "keeps state for 'all', which is no parameter"),
        (Strided, "Strided.step.. reads memory by its place in aten.as_strided.default"),
        (Numbered, "norm in the state of layers.0.weight is a number that is computed from its elements"),
    ],
)
def test_what_a_graph_cannot_keep_is_refused(kind: type[Simple], message: str) -> None:
    model = Matrices()
    compiled: Any = zgraph.compile(model, optimizer=kind(model.parameters()))
    with pytest.raises(OptimizerError, match=message):
        compiled.train_step(torch.ones(2, 6))


def test_tracing_leaves_the_optimizers_module_as_it_was() -> None:
    before = dict(Largest.change.__globals__)
    model = Matrices()
    compiled: Any = zgraph.compile(model, optimizer=Largest(model.parameters()))
    compiled.train_step(torch.ones(2, 6))
    assert Largest.change.__globals__ == before


class OnlyMatrices(Simple):
    """Leaves all but matrices alone, though they have gradients."""

    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        if p.dim() == 2:
            p.sub_(p.grad, alpha=lr)


class Nothing(Simple):
    def change(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        pass


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"ema": 0.5}])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_parameter_that_the_optimizer_leaves_alone_stays(options: dict[str, Any], zero: int) -> None:
    torch.manual_seed(0)
    model, reference = Scaled().double(), Scaled().double()
    reference.load_state_dict(model.state_dict())
    ranks = zgraph.simulate_ranks(model, OnlyMatrices(model.parameters()), world_size=2, zero=zero, **options)
    eager = OnlyMatrices(reference.parameters())
    for step in range(2):
        x = torch.randn(4, 6, dtype=torch.float64)
        eager.zero_grad()
        reference(x).backward()
        eager.step()
        ranks.train_step([(part,) for part in x.chunk(2)])
        assert_equal(ranks.state_dict(), reference.state_dict(), f"step {step}")


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"precision": "fp16"}])
def test_a_gradient_that_no_norm_would_count_is_refused(options: dict[str, Any]) -> None:
    model = Scaled()
    compiled: Any = zgraph.compile(model, optimizer=OnlyMatrices(model.parameters()), **options)
    with pytest.raises(OptimizerError, match=r"leaves first.bias alone, whose gradient would be in no norm"):
        compiled.train_step(torch.ones(2, 6))


def test_an_optimizer_that_changes_nothing_is_refused() -> None:
    model = Matrices()
    compiled: Any = zgraph.compile(model, optimizer=Nothing(model.parameters()))
    with pytest.raises(zgraph.CaptureError, match=r"Nothing.step\(\) changes no parameter"):
        compiled.train_step(torch.ones(2, 6))
