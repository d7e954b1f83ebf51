"""Regions of whole steps: which calls become one, that steps compute the same, and what a fusion must not do."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import zgraph
from tests.calibrations import made_up
from tests.programs import Builder, assert_same_step, few_examples, network, param
from tests.test_placement import assert_same_in_an_arena
from zgraph import ops, placement
from zgraph.codegen import library
from zgraph.codegen.kernel import CPP, SLICES
from zgraph.codegen.listing import ATEN
from zgraph.codegen.region import Region
from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.hardware import Hardware, LoopRates
from zgraph.liveness import Lifetime, held_bytes, lifetimes
from zgraph.passes import default_passes, fuse, overwrite
from zgraph.pipeline import run
from zgraph.program import Mesh, Phase, Program, Role, phase_of

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")


def lowered(
    captured: Program, kernels: str = "zgraph", zero: int = 0, world: int = 1, hardware: Hardware | None = None
) -> Program:
    config = Config(zero, bucket_bytes=200, kernels=kernels)
    return run(default_passes(config, Mesh(world), hardware=hardware), captured).program


def regions(program: Program) -> list[str]:
    """What each region computes, in order."""
    return [str(node.target) for node in program.graph.nodes if isinstance(node.target, Region)]


def normalised() -> Program:
    """``loss = sum(gelu(layer_norm(x @ w + x)))``, trained by SGD."""
    b = Builder()
    w, lr = b.input(Role.PARAM, "w", shape=[4, 4], dtype=torch.float32), b.input(Role.HYPER, "lr")
    x = b.input(Role.BATCH, "0", shape=[5, 4], dtype=torch.float32)
    hidden = b.forward(aten.add.Tensor, b.forward(aten.mm.default, x, w), x)
    norm = b.forward(aten.native_layer_norm.default, hidden, [4], None, None, 1e-5)
    y, mean, scale = (b.forward(ops.operator.getitem, norm, index) for index in range(3))
    loss = b.forward(aten.sum.default, b.forward(aten.gelu.default, y))
    g = b.backward(aten.expand.default, b.backward(aten.ones_like.default, loss), [5, 4])
    gy = b.backward(aten.gelu_backward.default, g, y)
    of_norm = b.backward(
        aten.native_layer_norm_backward.default, gy, hidden, [4], mean, scale, None, None, [True, False, False]
    )
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), b.backward(ops.operator.getitem, of_norm, 0))
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gw, lr, module="w")
    return b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")})


def test_what_feeds_each_other_is_one_kernel_until_a_matrix_product() -> None:
    # In a step this small every tensor is a part of the peak.
    with mock.patch.object(fuse, "_guilty", return_value=set()):
        found = regions(lowered(normalised()))
    assert_expected_inline(
        "\n".join(found).replace("; ", "\n    "),
        """\
fused_add_native_layer_norm_gelu_0{%2 = aten.add.Tensor(%0, %1)
    %3 = aten.native_layer_norm.default(%2, [4], None, None, 1e-05)
    %4 = operator.getitem(%3, 0)
    %5 = operator.getitem(%3, 1)
    %6 = operator.getitem(%3, 2)
    %7 = aten.gelu.default(%4)
    return [%2, %4, %5, %6, %7]}
fused_ones_like_gelu_backward_native_layer_norm_backward_1{%5 = aten.ones_like.default(%0)
    %6 = aten.expand.default(%5, [5, 4])
    %7 = aten.gelu_backward.default(%6, %1)
    %8 = aten.native_layer_norm_backward.default(%7, %2, [4], %3, %4, None, None, [True, False, False])
    %9 = operator.getitem(%8, 0)
    return [%9]}""",
    )


def test_by_default_only_updates_are_kernels() -> None:
    assert regions(lowered(normalised(), "update")) == regions(lowered(normalised(), "eager")) == []
    with pytest.raises(
        OptionError, match=r"kernels='fast' is not known\n.*'update', 'auto', 'zgraph', 'inductor', 'eager'"
    ):
        Config.from_options({"kernels": "fast"})


KINDS = ("wide", "narrow", "mul", "add", "dropout", "split", "sin")
LAYERS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2)), min_size=2, max_size=7)


@pytest.fixture
def _small_values_count() -> Iterator[None]:
    with mock.patch.object(placement, "SMALLEST_BYTES", 1):
        yield


@pytest.mark.slow
@few_examples(12)
@given(LAYERS, st.sampled_from([(0, 1), (0, 2), (3, 2)]))
def test_steps_compute_what_they_did(layers: Any, ranks: tuple[int, int]) -> None:
    """Bit for bit, where operators are elementwise and in float64."""
    captured = network([("wide", 0), *layers])
    assert_same_step(lowered(captured, "zgraph", *ranks), captured)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_values_count")
@few_examples(12)
@given(LAYERS)
def test_results_of_regions_lie_where_nothing_that_is_read_does(layers: Any) -> None:
    captured = network([("wide", 0), *layers])
    assert_same_in_an_arena(captured, lowered(captured))


@few_examples(12)
@given(LAYERS, st.sampled_from([(0, 1), (3, 2)]))
def test_no_fusion_raises_the_peak(layers: Any, ranks: tuple[int, int]) -> None:
    captured = network([("wide", 0), *layers])
    plain, fused = (
        max(held_bytes(lifetimes(program), len(program.graph.nodes)))
        for program in (lowered(captured, kernels, *ranks) for kernels in ("update", "zgraph"))
    )
    assert fused <= plain * (1 + fuse.MORE)


MACHINE = made_up().hardware()


def test_a_kernel_that_would_be_slower_than_its_calls_is_none() -> None:
    """Whichever takes as long is predicted, and both times are told."""
    captured = network([("wide", 0), ("tanh", 0), ("tanh", 0)], rows=64, dtype=torch.float32)
    fast, slow = (
        lowered(captured, "auto", hardware=replace(MACHINE, loops=LoopRates(rate, rate, launch_s=MACHINE.launch_s)))
        for rate in (1e12, 1e3)
    )
    assert regions(fast) == regions(lowered(captured)) != []
    assert regions(slow) == []
    assert [each.is_kernel for each in fast.weighed] == [True] * len(regions(fast))
    assert [each.is_kernel for each in slow.weighed] == [False] * len(regions(fast))
    for each in (*fast.weighed, *slow.weighed):
        assert each.kernel_s is not None
        assert each.calls_s is not None
        assert (each.kernel_s < each.calls_s) is each.is_kernel
    assert {each.calls_s for each in fast.weighed} == {each.calls_s for each in slow.weighed}


def test_what_is_faster_is_for_a_known_machine_to_say() -> None:
    with pytest.raises(OptionError, match=r"kernels='auto' weighs seconds, and this machine is not known\n.*calibrate"):
        lowered(normalised(), "auto")


@pytest.mark.slow
def test_a_plan_weighs_regions_as_the_step_does() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    plan = zgraph.plan(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        batch=(torch.empty(512, 64),),
        loss=lambda y, x: (y - x).square().mean(),
        world_size=1,
        hardware=MACHINE,
        kernels="auto",
    )
    assert plan.options["kernels"] == "auto"


def test_what_only_backward_needs_is_not_computed_in_forward() -> None:
    """``x * 2`` reads what forward has, and would have to be kept until backward if it were made with ``exp(x)``."""
    b = Builder()
    w, lr = b.input(Role.PARAM, "w", shape=[8, 8], dtype=torch.float32), b.input(Role.HYPER, "lr")
    x = b.forward(aten.mm.default, b.input(Role.BATCH, "0", shape=[8, 8], dtype=torch.float32), w)
    y = b.forward(aten.exp.default, b.forward(aten.neg.default, x))
    loss = b.forward(aten.sum.default, b.forward(aten.mm.default, y, w))
    gradient = b.backward(aten.mm.default, b.backward(aten.mul.Tensor, x, 2.0), y)
    size = b.call(Phase.UPDATE, aten.mul.Tensor, gradient, lr, module="w")
    captured = b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")})
    with mock.patch.object(fuse, "_guilty", return_value=set()):
        (found,) = regions(lowered(captured))
    assert "neg" in found
    assert "mul" not in found


def test_a_fusion_that_would_hold_more_is_undone() -> None:
    """Were ``b`` made where ``d`` is, its operands would be held until after the product."""
    b = Builder()
    w, lr = b.input(Role.PARAM, "w", shape=[8, 8], dtype=torch.float32), b.input(Role.HYPER, "lr")
    x = b.input(Role.BATCH, "0", shape=[8, 8], dtype=torch.float32)
    one, two, three = (b.forward(aten.mm.default, x, w) for _ in range(3))
    small = b.forward(
        aten.sum.dim_IntList, b.forward(aten.add.Tensor, b.forward(aten.mul.Tensor, one, two), three), [1], True
    )
    late = b.forward(aten.mm.default, b.forward(aten.mm.default, w, w), x)
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, late, small))
    size = b.call(Phase.UPDATE, aten.mul.Tensor, b.backward(aten.mul.Tensor, x, loss), lr, module="w")
    captured = b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")})
    assert not any("mul" in text and "sum" in text and text.count("mul") > 1 for text in regions(lowered(captured)))
    refused = [each for each in lowered(captured).weighed if not each.is_kernel]
    assert [each.raises_peak_by > 0 for each in refused] == [True] * len(refused) != []
    with mock.patch.object(fuse, "_guilty", return_value=set()):
        assert any(text.count("aten.mul") > 1 for text in regions(lowered(captured)))


@pytest.mark.parametrize(("part", "expected"), [(1, {0, 1, 9}), (2, {0, 1, 2, 3, 9}), (64, set(range(10)))])
def test_no_more_regions_are_refused_than_make_up_what_is_too_much(part: int, expected: set[int]) -> None:
    """Of nine that hold 10 bytes each where 20 are too many, two; and the one that is alive where 5 are."""
    graph = fx.Graph()
    calls = [graph.call_function(operator.neg, (1.0,)) for _ in range(10)]
    lives = [Lifetime(call, 10, 0, 0) for call in calls[:9]] + [Lifetime(calls[9], 10, 1, 1)]
    lowered = SimpleNamespace(program=None, lives=lives, twins={call: call for call in calls}, held=[100, 85])
    with mock.patch.object(fuse, "owners", return_value={call: call for call in calls}):
        assert fuse._guilty(lowered, calls, 80, part) == expected  # type: ignore[arg-type]
        assert fuse._guilty(lowered, calls, 100, part) == set()  # type: ignore[arg-type]


class Recurrent(nn.Module):
    """So many steps of a small cell, each of whose results backward reads."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.cell, self.num_steps = nn.GRUCell(8, 8), num_steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x
        for _ in range(self.num_steps):
            state = self.cell(x, state)
        return state.square().mean()


def test_regions_of_a_recurrent_layer_are_weighed_a_few_times() -> None:
    """Not once for each of its steps."""
    model = Recurrent(24)
    rounds = mock.Mock(wraps=fuse.groups)
    with mock.patch.object(fuse, "groups", rounds):
        compiled = zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), kernels="zgraph")
        compiled.train_step(torch.randn(4, 8))
    assert sum("raise the peak" in each.why for each in compiled.kernels()) > 10
    assert rounds.call_count <= 10


def test_no_collective_starts_after_more_calls_than_it_did() -> None:
    captured = network([("wide", 0), ("tanh", 0), ("narrow", 0), ("mul", 1), ("wide", 0), ("tanh", 0), ("mul", 0)])

    def before_starts(program: Program) -> list[int]:
        """The bytes that are computed before each collective starts."""
        total, found = 0, []
        for node in program.graph.nodes:
            if node.target in ops.STARTS:
                found.append(total)
            elif node.op == "call_function" and ops.view_of(node) is None and node.target is not ops.operator.getitem:
                inner = node.target.body.nodes if isinstance(node.target, Region) else [node]
                total += sum(n.op == "call_function" and ops.view_of(n) is None for n in inner)
        return found

    plain, fused = (before_starts(lowered(captured, kernels, 2, 2)) for kernels in ("update", "zgraph"))
    assert regions(lowered(captured, "zgraph", 2, 2))
    assert all(one <= other for one, other in zip(fused, plain, strict=True))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


def trained(**options: Any) -> tuple[Any, list[float]]:
    """A classifier after three steps, and their losses."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(16), Block(16), Block(16), nn.LayerNorm(16), nn.Linear(16, 11))
    zgraph.compile(
        model,
        torch.optim.SGD(model.parameters(), lr=0.3),
        loss=lambda scores, x: F.cross_entropy(scores, x.sum(-1).long().abs() % 11),
        zero=0,
        **options,
    )
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    return model, [model.train_step(x).item() for _ in range(3)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"accumulate": 2, "clip_norm": 1.0}, marks=pytest.mark.slow),
        pytest.param({"recompute": "blocks"}, marks=pytest.mark.slow),
        pytest.param({"recompute": 0.5}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_with_regions_is_one_without_but_for_rounding(options: dict[str, Any]) -> None:
    (fused, losses), (plain, expected) = trained(kernels="zgraph", **options), trained(**options)
    unit = 1e-3 if "precision" in options else 1e-6
    assert losses == pytest.approx(expected, rel=10 * unit)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=100 * unit, atol=10 * unit, msg=name)


def test_layers_that_are_alike_are_one_kernel() -> None:
    model, _ = trained(kernels="zgraph")
    targets = [node.target for node in model.program.graph.nodes if isinstance(node.target, Region)]
    assert len(set(targets)) < len(targets)
    assert sum("aten.gelu_backward" in str(target) for target in targets) > 1
    assert sum("aten.gelu_backward" in str(target) for target in set(targets)) == 1
    listed = [each for each in model.kernels() if each.name.startswith("fused") and each.language != ATEN]
    assert [each.name for each in listed] == [target.name for target in targets]
    assert {each.language for each in listed} == {CPP}
    assert {each.num_calls for each in listed} == {1}
    (loss,) = (each for each in listed if "nll_loss_forward" in each.name)
    assert loss.read_bytes == 40 * 11 * 4 + 40 * 8
    assert loss.written_bytes == 40 * 11 * 4 + 4 + 11 * 4  # the gradient of scores, the loss, the gradient of the bias
    assert any(each.module == "1.norm" for each in listed)
    assert {each.why for each in listed} == {"asked for"}


def test_a_model_says_which_kernels_were_chosen_and_why() -> None:
    model, _ = trained(kernels="auto")
    found = [each for each in model.kernels() if each.name.startswith("fused")]
    assert {each.language for each in found} <= {CPP, ATEN}
    assert all("call by call" in each.why or "would raise the peak by" in each.why for each in found)
    told = model.explain().as_dict()["Why these kernels?"]
    assert all("is one kernel: predicted" in each or "ATen's calls" in each or "others" in each for each in told)
    (program,) = model.report().document["programs"]
    assert sum(each["count"] for each in program["kernels"]) == len(found)
    assert {each["why"] for each in program["kernels"]} == {each.why for each in found}


def test_a_region_of_forward_writes_the_logarithms_of_a_softmax_over_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overwrite, "SMALLEST_BYTES", 1)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def loss(y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        chosen = F.log_softmax(y * 3, -1)
        return -(chosen.cumsum(0) * chosen.detach()).mean()

    found = []
    for kernels in ("zgraph", "update"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.3), loss=loss, kernels=kernels)
        model.train_step(x)
        found.append((model.state_dict(), model.program))
    (region,) = (
        n for n in found[0][1].graph.nodes if isinstance(n.target, Region) and "= aten._log_softmax" in str(n.target)
    )
    assert phase_of(region) is Phase.FORWARD
    assert region.target.writes == (0,)
    for name, value in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_without_a_compiler_regions_run_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "there is no C++ compiler")
    model, losses = trained(kernels="zgraph")
    assert {each.language for each in model.kernels()} - {ATEN} == {SLICES}
    assert losses == trained()[1]


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, _: y.mean(),
        lambda y, _: (y.mean(-1) ** 2).mean(),
        lambda y, x: F.cross_entropy(y * F.cross_entropy(y, x.sum(-1).long().abs() % 8), x.sum(-1).long().abs() % 8),
        lambda y, x: (F.cross_entropy(y, x.sum(-1).long().abs() % 8) * 2).sum(0),
        lambda y, _: (y * 2 + y.new_full(y.shape, 0.5)).exp().mean(),
    ],
    ids=["mean", "of rows", "loss in a loss", "sum of a number", "new_full"],
)
def test_losses_of_any_form_train_as_without_regions(loss: Any) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for kernels in ("zgraph", "update"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.3), loss=loss, kernels=kernels)
        model.train_step(x)
        found.append(model.state_dict())
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gates_of_a_recurrent_layer_train_in_regions() -> None:
    """Parts of one product between which there are gaps are written in place."""
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for kernels in ("zgraph", "update"):
        torch.manual_seed(0)
        model = nn.GRU(5, 4, bidirectional=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        zgraph.compile(model, optimizer, loss=lambda y, _: y[0].square().mean(), kernels=kernels)
        model.train_step(x)
        found.append(model.state_dict())
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6, msg=name)
