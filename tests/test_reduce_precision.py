"""Gradients may be rounded before they are averaged: where the user says so, by so much, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import zgraph
from tests.mutants.steps import in_single_precision
from tests.programs import accumulated, one_layer
from tests.reference import assert_equal
from zgraph import ops
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.packed import BLOCK
from zgraph.passes import default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh, Stage, operand
from zgraph.quantized import dequantize, quantize

LOW = Config(reduce_precision="bf16")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.scale = nn.Linear(6, 9), nn.Linear(9, 2), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.inner(x)) * self.scale)
        return y.square().mean()


def rounded_mean(gradients: list[Tensor]) -> Tensor:
    """As ranks add bfloat16 up: in rank order."""
    total = gradients[0].bfloat16()
    for gradient in gradients[1:]:
        total = total + gradient.bfloat16()
    return (total / len(gradients)).float()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_the_mean_is_that_of_rounded_gradients_and_within_its_bound(world: int, zero: int) -> None:
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.5), world_size=world, zero=zero, reduce_precision="bf16"
    )
    optimizer = SGD(reference.parameters(), lr=0.5)
    for step in range(3):
        parts = torch.randn(6 * world, 6).chunk(world)
        ranks.train_step([(part,) for part in parts])
        params = list(reference.parameters())
        each = [torch.autograd.grad(reference(part), params) for part in parts]
        for param, *gradients in zip(params, *each, strict=True):
            param.grad = rounded_mean(gradients)
            exact = sum(g.double() for g in gradients) / world
            size = sum(g.double().abs() for g in gradients) / world
            assert ((param.grad - exact).abs() <= (world + 1.1) / 256 * size).all()
        optimizer.step()
        assert_equal(ranks.state_dict(), reference.state_dict(), f"step {step}")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_half_the_bytes_of_gradients_travel(zero: int) -> None:
    sent = {}
    for precision in (None, "bf16"):
        program = run(
            default_passes(Config(zero, reduce_precision=precision), Mesh(2)), accumulated(one_layer(), 2)
        ).program
        starts = [n for n in program.graph.nodes if n.target in (ops.all_reduce, ops.reduce_scatter)]
        sent[precision] = [operand(start).meta["val"] for start in starts if operand(start).meta["val"].dim()]
    assert [(low.shape, low.dtype) for low in sent["bf16"]] == [(high.shape, torch.bfloat16) for high in sent[None]]


def test_one_rank_rounds_nothing() -> None:
    program = run(default_passes(LOW, Mesh(1)), one_layer()).program
    assert program.text() == run(default_passes(Config(), Mesh(1)), one_layer()).program.text()
    assert not any(p.assumes for p in default_passes(LOW, Mesh(1)))


def test_the_proof_says_what_it_takes_on_trust() -> None:
    records = run(default_passes(LOW, Mesh(2)), one_layer()).records
    assert {record.name: record.assumes for record in records if record.assumes} == {
        "ReduceInLowPrecision": ("to(mean(to(g, bf16)), dtype of g) = mean(g)",)
    }


@dataclass(frozen=True)
class RoundWithoutReducing(Pass):
    """Let the update read this rank's gradient, rounded."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Any) -> None:
        for wait in program.graph.find_nodes(op="call_function", target=ops.wait):
            start = operand(wait)
            for user in list(wait.users):
                if start.target is ops.all_reduce and user.op == "call_function" and wait.meta["val"].dim():
                    user.replace_input_with(wait, operand(start))


@dataclass(frozen=True)
class RoundTheParameter(Pass):
    """Round what the update makes of a parameter, too."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Any) -> None:
        aten = torch.ops.aten
        results = program.results()
        for i, what in enumerate(program.outputs):
            if what is not None and results[i].meta["val"].dtype is torch.float64:
                origin = results[i].meta["origin"]
                for dtype in (torch.bfloat16, torch.float64):
                    results[i] = program.call(
                        aten._to_copy.default, results[i], dtype=dtype, origin=origin, before=program.output_node
                    )
        program.set_results(results, program.outputs)


@dataclass(frozen=True)
class RoundOtherMeans(Pass):
    """Round what is no gradient before it is averaged: the loss, or the weight of a batch."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Any) -> None:
        aten = torch.ops.aten
        for start in list(program.graph.find_nodes(op="call_function", target=ops.all_reduce)):
            value, origin = operand(start), start.meta["origin"]
            if value.meta["val"].dim():
                continue
            (wait,) = start.users
            low = program.call(aten._to_copy.default, value, dtype=torch.bfloat16, origin=origin, before=start)
            start.replace_input_with(value, low)
            for node in (start, wait):
                node.meta["val"] = program.infer(node)
            wide = program.call(
                aten._to_copy.default, wait, dtype=value.meta["val"].dtype, origin=wait.meta["origin"], before=wait.next
            )
            wait.replace_all_uses_with(wide, delete_user_cb=lambda user, own=wide: user is not own)


@pytest.mark.parametrize("mistake", [RoundWithoutReducing(), RoundTheParameter(), RoundOtherMeans()])
def test_a_mistake_beside_it_is_refused(mistake: Pass) -> None:
    config = Config(0, reduce_precision="bf16")
    for program in (one_layer(), accumulated(one_layer(), 2, weighted=True)):
        with pytest.raises(VerifyError, match=f"{mistake.name} changed what the step computes"):
            run(default_passes(config, Mesh(2), own=[mistake]), program)


# In 8 bits


def quantised_mean(gradients: list[Tensor]) -> Tensor:
    """As ranks add up what each has quantised: in rank order."""
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total += dequantize(quantize(gradient))
    return total / len(gradients)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_the_mean_is_that_of_quantised_gradients_and_within_its_bound(world: int, zero: int) -> None:
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.5), world_size=world, zero=zero, reduce_precision="int8"
    )
    optimizer = SGD(reference.parameters(), lr=0.5)
    params = dict(reference.named_parameters())
    for step in range(3):
        parts = torch.randn(6 * world, 6).chunk(world)
        ranks.train_step([(part,) for part in parts])
        assert ranks.layout is not None
        (bucket,) = ranks.layout.buckets
        flats = [torch.zeros(bucket.numel) for _ in parts]
        for flat, part in zip(flats, parts, strict=True):
            gradients = torch.autograd.grad(reference(part), list(params.values()))
            of = dict(zip(params, gradients, strict=True))
            for s in bucket.segments:
                flat[s.offset : s.offset + s.numel] = of[s.name].flatten()
        mean = quantised_mean(flats)
        exact = torch.stack(flats).double().mean(0)
        largest = torch.stack([flat.view(-1, BLOCK).abs().amax(1, keepdim=True) for flat in flats]).double().mean(0)
        assert ((mean - exact).view(-1, BLOCK).abs() <= largest * (1 / 254 + 2**-20)).all()
        for s in bucket.segments:
            params[s.name].grad = mean[s.offset : s.offset + s.numel].view(s.shape)
        optimizer.step()
        assert_equal(ranks.state_dict(), reference.state_dict(), f"step {step}")


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"precision": "fp16"}])
def test_a_gradient_that_is_not_finite_on_one_rank_is_found(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.5), world_size=3, reduce_precision="int8", accumulate=2, **options
    )
    before = ranks.state_dict() if ranks.layout else {n: p.detach().clone() for n, p in model.state_dict().items()}
    broken = torch.randn(4, 6)
    broken[3, 2] = torch.inf
    ranks.train_step([(torch.randn(4, 6),), (broken,), (torch.randn(4, 6),)])
    assert ranks.stats()["num_skipped_steps"] == 1
    assert all(torch.equal(before[name], value) for name, value in ranks.state_dict().items())
    ranks.train_step([(torch.randn(4, 6),) for _ in range(3)])
    assert not torch.equal(before["out.weight"], ranks.state_dict()["out.weight"])


def test_only_float32_gradients_are_quantised_and_the_proof_says_what_it_takes_on_trust() -> None:
    done = run(default_passes(Config(3, reduce_precision="int8"), Mesh(2)), in_single_precision())
    sent = {
        t: done.program.graph.find_nodes(op="call_function", target=t) for t in (ops.all_to_all, ops.reduce_scatter)
    }
    assert [operand(n).meta["val"].dtype for n in sent[ops.all_to_all]] == [torch.uint8]
    assert [operand(n).meta["val"].dtype for n in sent[ops.reduce_scatter]] == [torch.float64]
    assert {record.name: record.assumes for record in done.records if record.assumes} == {
        "ReduceQuantized": ("mean(all_to_all(quantize(g))) = shard(mean(g))",)
    }


@dataclass(frozen=True)
class ExchangeOnes(Pass):
    """Quantise and average what is no gradient."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Any) -> None:
        (data,) = program.graph.find_nodes(op="call_function", target=ops.quantize)
        gradient, ones = operand(data), torch.ops.aten.ones_like.default
        data.replace_input_with(gradient, program.call(ones, gradient, origin=data.meta["origin"], before=data))


@dataclass(frozen=True)
class DivideByMore(Pass):
    """Let each rank be sent what another is to own."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Any) -> None:
        (exchange,) = program.graph.find_nodes(op="call_function", target=ops.all_to_all)
        data, sizes, _, axis = exchange.args
        exchange.args = (data, [sizes[0] - 260, sizes[1] + 260], [sizes[0] + 260, sizes[1] - 260], axis)


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        (ExchangeOnes(), "ExchangeOnes left .* each rank must return its part of one vector"),
        (DivideByMore(), "sends parts that are not equal, or not for 2 ranks"),
    ],
)
def test_a_mistake_with_what_is_quantised_is_refused(mistake: Pass, rule: str) -> None:
    with pytest.raises(VerifyError, match=rule):
        run(default_passes(Config(3, reduce_precision="int8"), Mesh(2), own=[mistake]), in_single_precision())


def test_other_precisions_are_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="reduce_precision='fp8' is not known"):
        zgraph.compile(nn.Linear(2, 2), reduce_precision="fp8")
