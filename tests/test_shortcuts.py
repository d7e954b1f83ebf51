"""A trace with shortcuts is the trace that torch makes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.optim import Optimizer

from tests.optimizers import OPTIMIZERS, Lion
from tests.updates import CPU, ByParameter
from zgraph import shortcuts
from zgraph.program import Phase, Role, describe
from zgraph.tracing import Recorder, fake_mode, trace
from zgraph.update import Update, trace_update


class Alike(nn.Module):
    """Three matrices of one shape, one of another with as many elements, vectors, numbers; and other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 2), (3, 2), (5,), (2, 3), (), (3, 2), (5,), ()]
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        self.half = nn.ParameterList(nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16)) for _ in range(2))


@contextmanager
def whole_traces() -> Iterator[None]:
    """Every call goes through all of torch's tracer."""
    with mock.patch("zgraph.tracing.Shortcuts") as stub:
        stub.return_value.attached = nullcontext
        yield


def update_of(make: Callable[[nn.Module], Optimizer], model: nn.Module) -> Update:
    """The update of all parameters, none of them copied from another."""
    optimizer, params = make(model), dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with mock.patch(
        "zgraph.update.representatives", lambda _, __, trained, ___: dict(zip(trained, trained, strict=True))
    ):
        return trace_update(optimizer, params, [name for name, p in params.items() if id(p) in held], {}, CPU)


def both_ways(made: Callable[[], Any]) -> tuple[Any, Any]:
    """What is made with shortcuts and without; once more, by what the first trace has seen, it is the same."""
    with mock.patch.dict(shortcuts._SEEN, clear=True):
        found = made()
        assert made() == found
    with whole_traces():
        return found, made()


class Expressions:
    """Nodes as numbers that are equal for equal expressions, between graphs, too."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def of(self, update: Update) -> dict[str, Any]:
        """What an update computes, and all that it says of it."""
        named = {node: f"gradient {name}" for name, node in update.gradients.items()}
        found: dict[fx.Node, int] = {}
        for node in update.graph.nodes:
            what: Any = named.get(node)
            if what is None and node.op == "placeholder":
                what = node.meta["input"]
                if what.role is Role.CONSTANT:
                    what = repr(update.constants[what.name])
            if what is None:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"%{found[n]}")
                what = (node.target, repr(args), repr(kwargs), describe(node.meta.get("val")))
            found[node] = self.known.setdefault(what, len(self.known))
        results = {
            str(what): found[result] if isinstance(result, fx.Node) else result
            for what, result in update.results.items()
        }
        guards = {(guard.inputs, guard.text) for guard in update.guards}
        sources: dict[int, str | None] = {}  # of the first node that is so
        for node in update.graph.nodes:
            if "origin" in node.meta:
                sources.setdefault(found[node], node.meta["origin"].source)
        return {"results": results, "guards": guards, "init": update.init, "state": update.state, "sources": sources}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_what_torch_traces_by_itself(name: str) -> None:
    torch.manual_seed(0)
    model, expressions = Alike(), Expressions()
    quick, whole = both_ways(lambda: expressions.of(update_of(OPTIMIZERS[name], model)))
    assert quick == whole


class ByPlace(ByParameter):
    """Every other parameter moves faster, and one is left as it is."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if i != 2:
                    p.sub_(p.grad * (i % 2 + 1), alpha=group["lr"] / (i // 3 + 1))


class Normed(ByParameter):
    """Gradients are divided by the norm of them all."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm().double() for p in group["params"]]).norm()
            for p in group["params"]:
                p.addcdiv_(p.grad, norm.to(p.dtype), value=-group["lr"])


class Chained(ByParameter):
    """Each parameter takes the gradient of the one before, too."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            before: dict[torch.dtype, Tensor] = {}
            for p in group["params"]:
                p.sub_(p.grad + before.get(p.dtype, 0.0), alpha=group["lr"])
                before[p.dtype] = p.grad.sum()


class Signed(ByParameter):
    """A zero has a sign."""

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        for zero in (0.0, -0.0):
            p.add_(p.grad, alpha=group["lr"] + zero)  # type: ignore[arg-type]


LIBRARY = torch.library.Library("zgraph_shortcuts", "FRAGMENT")
LIBRARY.define("power(Tensor x, Scalar exponent) -> Tensor")


@torch.library.impl(LIBRARY, "power", "Meta")
def _(x: Tensor, exponent: float) -> Tensor:
    return x.clone() if exponent > 1 else x.contiguous().clone()


class Powers(ByParameter):
    """What is decided by each of several numbers, where torch computes shapes, is a condition on each."""

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        for _ in range(2):
            p.sub_(torch.ops.zgraph_shortcuts.power(p.grad, group["power"]), alpha=group["lr"])


def in_groups(model: nn.Module) -> Optimizer:
    params = list(model.parameters())
    groups = [{"params": params[i::3], "power": power} for i, power in enumerate((2.5, 3.5, 1.5))]
    return Powers(groups, {"lr": 0.1})


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda model, kind=kind: kind(model.parameters(), {"lr": 0.1})
            for kind in (ByPlace, Normed, Chained, Signed)
        ),
        in_groups,
        lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2]),
        lambda model: torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9),
        lambda model: torch.optim.Adam(model.parameters(), capturable=True),
    ],
    ids=["by_place", "normed", "chained", "signed", "powers", "muon", "tensor_lr", "capturable"],
)
def test_what_is_decided_for_each_parameter_by_itself_is_in_the_graph(make: Callable[[nn.Module], Optimizer]) -> None:
    torch.manual_seed(0)
    model, expressions = Alike(), Expressions()
    quick, whole = both_ways(lambda: expressions.of(update_of(make, model)))
    assert quick == whole


def literals(x: Tensor, y: Tensor) -> list[Tensor]:
    return (
        [a.mul(factor).add(term) for a in (x, y) for factor, term in ((1, 0.0), (1.0, -0.0), (True, 0), (1, 0.0))]
        + [a.to(dtype) for a in (x, y) for dtype in (torch.float64, torch.float16, torch.int64)]
        + [torch.ones(3, dtype=torch.int64) * factor for factor in (1, 1.0, True, 1.5)]
    )


def layouts(x: Tensor, y: Tensor) -> list[Tensor]:
    parts = [part for a in (x, y) for part in (a, a.t(), a[1:], a[:, 1:], a[1:].clone(), a[:1].expand(3, 3))]
    parts += [part for a in (x, y) for part in (a[:2].clone().view(6), a[:2].view(6))]
    return [part * 2 for part in parts] + [torch.zeros_like(part) for part in parts]


def aliases(x: Tensor, y: Tensor) -> list[Tensor]:
    views = [a.view(-1) for a in (x, y)]
    for a in (x, y, *views):
        a.add_(1)
    detached = [a.detach() for a in (x, y)]
    return [a * 2 for a in (*views, *detached, x, y)]


def forms_that_change(x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = x[:2].clone(), y[:2].clone()
    for a in (x, y):
        a.t_().add_(1)
        a.unsqueeze_(0).mul_(2)
    return [x, y, x.sum((0, 2)), y.sum((0, 2))]


def factories(x: Tensor, y: Tensor) -> list[Tensor]:
    made = [make(3, dtype=dtype) for make in (torch.zeros, torch.ones, torch.rand) for dtype in (None, x.dtype, None)]
    return [*made, torch.tensor(1.0) * x, torch.tensor(2.0) * y, torch.bernoulli(x), torch.bernoulli(y)]


def several(x: Tensor, y: Tensor) -> list[Tensor]:
    x.copy_(y).copy_(x.half())
    joined = [torch.cat(pair) for pair in ([x, y], [y, x], [x, y, x])]
    return [*joined, *x.split(1), *y.split(1), *torch.var_mean(x), *torch.var_mean(y), torch.where(x > y, x, 0.0)]


@pytest.mark.parametrize("function", [literals, layouts, aliases, forms_that_change, factories, several])
@pytest.mark.parametrize("fold_literals", [True, False])
def test_a_graph_is_the_one_that_torch_traces_by_itself(
    function: Callable[[Tensor, Tensor], list[Tensor]], fold_literals: bool
) -> None:
    def traced() -> list[str]:
        mode = fake_mode(scalars=True)
        with mode:
            args = (torch.empty(3, 3), torch.empty(3, 3))
        graph, constants = trace(
            lambda x, y: function(x + 0, y + 0), args, mode, Recorder(Phase.UPDATE), fold_literals=fold_literals
        )
        vals = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        return [
            str(graph),
            *(
                f"{describe(val)} {val.stride()} {val.storage_offset()} {val.untyped_storage().nbytes()}"
                for val in vals
            ),
            repr(constants),
        ]

    quick, whole = both_ways(traced)
    assert quick == whole


def test_results_have_memory_of_their_own() -> None:
    memory: list[int] = []

    def add(*tensors: Tensor) -> list[Tensor]:
        results = [tensor + 1 for tensor in tensors]
        memory.extend(tensor.untyped_storage()._cdata for tensor in (*tensors, *results))
        return results

    mode = fake_mode(scalars=False)
    with mode:
        args = tuple(torch.empty(3) for _ in range(4))
    trace(add, args, mode, Recorder(Phase.UPDATE))
    assert len(set(memory)) == 8


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that go through torch's tracer."""
    found: list[Any] = []
    whole = ProxyTorchDispatchMode.__torch_dispatch__

    def counted(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # each constant is an input of its own
            found.append(func)
        return whole(self, func, *args, **kwargs)

    monkeypatch.setattr(ProxyTorchDispatchMode, "__torch_dispatch__", counted)
    return found


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Lion])
def test_torch_traces_no_more_of_many_parameters_of_one_kind_than_of_two(
    kind: Callable[[Any], Optimizer], traced: list[Any]
) -> None:
    num_calls = []
    for num in (2, 20):
        traced.clear()
        model = nn.ParameterList(nn.Parameter(torch.zeros(3, 2)) for _ in range(num))
        with mock.patch.dict(shortcuts._SEEN, clear=True):
            update = update_of(lambda m: kind(m.parameters()), model)
        assert {what.name for what in update.results if what.role is Role.PARAM} == {str(i) for i in range(num)}
        num_calls.append(len(traced))
    assert num_calls[0] == num_calls[1]


def test_a_later_trace_asks_torch_for_views_and_numbers_alone(traced: list[Any]) -> None:
    def once() -> set[str]:
        traced.clear()
        mode = fake_mode(scalars=True)
        with mode:
            args = (torch.empty(3, 3), torch.empty(3, 3))
        trace(lambda x, y: [(x + y).mul_(2).t() + y, *torch.var_mean(x)], args, mode, Recorder(Phase.UPDATE))
        return {func.overloadpacket.__name__ for func in traced}

    with mock.patch.dict(shortcuts._SEEN, clear=True):
        assert once() == {"add", "mul_", "t", "var_mean"}
        assert once() == {"t"}


def test_what_was_seen_with_another_default_dtype_is_not_known() -> None:
    found = []
    with mock.patch.dict(shortcuts._SEEN, clear=True):
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            mode = fake_mode(scalars=False)
            with mode:
                x = torch.empty(2, dtype=torch.int64)
            graph, _ = trace(lambda x: torch.full((2,), 1.0) * (x * 0.5), (x,), mode, Recorder(Phase.UPDATE))
            found.append({node.meta["val"].dtype for node in graph.nodes if node.op == "call_function"})
    assert found == [{torch.float32}, {torch.float64}]


def test_what_is_computed_of_hyperparameters_is_computed_once_for_all_parameters() -> None:
    update = update_of(lambda m: torch.optim.AdamW(m.parameters()), Alike())
    inputs = [node for node in update.graph.find_nodes(op="placeholder") if "input" in node.meta]
    hypers = {node for node in inputs if node.meta["input"].role is Role.HYPER}
    calls = [node for node in update.graph.nodes if node.all_input_nodes and hypers >= {*node.all_input_nodes}]
    assert len(calls) == len({(call.target, call.args) for call in calls}) == 3  # lr * weight_decay, 1 - beta of each
