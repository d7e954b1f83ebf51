"""A step returns what the user asks for besides its loss, over all its micro-batches and ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import zgraph
from tests.ranks import Ranks
from tests.reference import world
from zgraph import ops
from zgraph.errors import CaptureError, OptionError


def accuracy(output: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return (output.argmax(-1) == y).double().mean()


def num_right(output: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return (output.argmax(-1) == y).sum()


def size(output: Tensor, _: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001 -- what metrics are called with
    return output.square().mean()


def class_loss(output: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y)


def largest(output: Tensor, _: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    return output.max()


def smallest(output: Tensor, _: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    return output.min()


METRICS: dict[str, Any] = {
    "accuracy": accuracy,
    "smallest": (smallest, "min"),
    "right": (num_right, "sum"),
    "size": (size, "mean"),
    "largest": (largest, "max"),
}


class Classifier(nn.Linear):
    def forward(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        return super().forward(x)


def a_model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(4, 3).double()


def a_batch(num: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(num, 4, dtype=torch.float64), torch.randint(3, (num,))


def expected(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return of_output(a_model()(x).detach(), x, y)


def of_output(output: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {name: (m[0] if isinstance(m, tuple) else m)(output, x, y).double() for name, m in METRICS.items()}


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_metrics_are_those_of_the_whole_batch(accumulate: int, num_ranks: int, zero: int) -> None:
    model, (x, y) = a_model(), a_batch()
    ranks = zgraph.simulate_ranks(
        model,
        SGD(model.parameters(), lr=0.1),
        world_size=num_ranks,
        zero=zero,
        loss=class_loss,
        metrics=METRICS,
        accumulate=accumulate,
    )
    for _ in range(2):  # what adds up begins anew
        model.load_state_dict(ranks.state_dict() if ranks.layout is not None else model.state_dict())
        output = model(x).detach()
        batches = list(zip(x.chunk(num_ranks), y.chunk(num_ranks), strict=True))
        loss, found = ranks.train_step(batches)
        torch.testing.assert_close(loss, class_loss(output, x, y))
        torch.testing.assert_close(found, of_output(output, x, y))
        assert list(found) == list(METRICS)
    vectors = [n for n in ranks.program.graph.nodes if n.target is ops.all_reduce and n.meta["val"].dim()]
    vectors = [n for n in vectors if n.meta["val"].dtype is torch.float64 and len(n.meta["val"]) < 3]
    largest = ranks.program.graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)
    assert (len(vectors), len(largest)) == ((2, 1) if num_ranks > 1 else (0, 0)), "one vector for each reduction"


def test_a_mean_is_weighted_as_the_loss_is_and_a_sum_is_not() -> None:
    model, (x, y) = a_model(), a_batch(6)
    compiled = zgraph.compile(
        model,
        optimizer=SGD(model.parameters(), lr=0.1),
        loss=class_loss,
        metrics=METRICS,
        accumulate=3,
        weight=lambda _, y: (y > 0).sum(),
    )
    _, found = compiled.train_step(x, y)
    parts = [expected(*part) for part in zip(x.chunk(3), y.chunk(3), strict=True)]
    counts = [(part > 0).sum() for part in y.chunk(3)]
    mean = sum(count * part["size"] for count, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(found["size"], mean)
    torch.testing.assert_close(found["right"], expected(x, y)["right"])


def train_with_metrics() -> dict[str, float]:
    (rank, num_ranks), model, (x, y) = world(), a_model(), a_batch()
    compiled = zgraph.compile(
        model, optimizer=SGD(model.parameters(), lr=0.1), loss=class_loss, metrics=METRICS, accumulate=2, clip_norm=1.0
    )
    _, found = compiled.train_step(x.chunk(num_ranks)[rank], y.chunk(num_ranks)[rank])
    return {name: value.item() for name, value in found.items()}


def test_real_ranks_return_the_same(ranks: Ranks) -> None:
    first, second = ranks.run(train_with_metrics)
    assert first == second == pytest.approx({name: value.item() for name, value in expected(*a_batch()).items()})


def train_with_nan() -> list[float]:
    """The largest and smallest output, with NaN on each rank in turn."""
    rank, num_ranks = world()
    found = []
    for odd in range(num_ranks):
        model = a_model()
        compiled = zgraph.compile(
            model,
            optimizer=SGD(model.parameters(), lr=0.1),
            loss=lambda output, x: output.mean(),  # noqa: ARG005
            metrics={"largest": (lambda _, x: x.max(), "max"), "smallest": (lambda _, x: x.min(), "min")},
        )
        x = torch.full((2, 4), math.nan if rank == odd else 1.0, dtype=torch.float64)
        _, told = compiled.train_step(x)
        found += [told["largest"].item(), told["smallest"].item()]
    return found


def test_nan_on_any_rank_is_the_largest_and_the_smallest(ranks: Ranks) -> None:
    assert all(math.isnan(value) for values in ranks.run(train_with_nan) for value in values)


def test_without_metrics_a_step_returns_its_loss() -> None:
    model = a_model()
    compiled = zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1), loss=class_loss)
    assert isinstance(compiled.train_step(*a_batch()), Tensor)


@pytest.mark.parametrize("metrics", [[accuracy], {"accuracy": 1}, {"right": (num_right, "product")}, {1: accuracy}])
def test_what_is_no_metric_is_refused(metrics: Any) -> None:
    model = a_model()
    with pytest.raises(OptionError, match="metrics"):
        zgraph.compile(model, optimizer=SGD(model.parameters(), lr=0.1), loss=class_loss, metrics=metrics)


@pytest.mark.parametrize(("value", "reason"), [(torch.ones(2), r"a tensor of shape \(2,\)"), (None, "NoneType")])
def test_a_metric_is_one_number(value: Any, reason: str) -> None:
    model = a_model()
    compiled = zgraph.compile(
        model,
        optimizer=SGD(model.parameters(), lr=0.1),
        loss=class_loss,
        metrics={"odd": lambda _, x, y: value},  # noqa: ARG005 -- what metrics are called with
    )
    with pytest.raises(CaptureError, match=f"the metric 'odd' is {reason}"):
        compiled.train_step(*a_batch())
