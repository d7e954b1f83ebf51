"""A captured step is the user's step: every operator in order, traced to its line, and nothing of theirs is touched."""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import tests.models
import zgraph
from tests.models import CASES, GPT, Batch, Case
from zgraph.capture import capture
from zgraph.errors import CaptureError, OptimizerError
from zgraph.lockstep import Values, run_ranks
from zgraph.passes import Tidy
from zgraph.program import Input, Phase, Program, Role, Stage, describe

aten = torch.ops.aten


class Line(nn.Module):
    """y = w x + b, and the mean of its squares as the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


def captured(model: nn.Module, *args: Any, optimizer: Optimizer | None = None, **kwargs: Any) -> Program:
    return capture(model, optimizer or SGD(model.parameters(), lr=0.1), args, kwargs)


def operators(program: Program) -> list[Any]:
    """The calls of the user's step, without the profiler's marks around the optimizer's."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and getattr(node.target, "namespace", "aten") != "profiler"
    ]


def test_a_linear_step() -> None:
    program = captured(Line(), torch.randn(4, 3))
    assert (program.stage, program.mesh.size, program.layout) == (Stage.CAPTURED, 1, None)
    assert_expected_inline(
        Tidy()(program).text(),
        """\
%0: f32[2, 3] = input param:layer.weight
%1: f32[2] = input param:layer.bias
%2: f32[4, 3] = input batch:0
%3: float = input hyper:group0.lr
%4: f32[3, 2] = aten.t.default(%0)
%5: f32[4, 2] = aten.addmm.default(%1, %2, %4)
%6: f32[4, 2] = aten.pow.Tensor_Scalar(%5, 2)
%7: f32[] = aten.mean.default(%6)
%8: f32[] = aten.ones_like.default(%7, memory_format=torch.preserve_format, pin_memory=False)
%9: f32[4, 2] = aten.expand.default(%8, [4, 2])
%10: f32[4, 2] = aten.div.Scalar(%9, 8)
%11: f32[4, 2] = aten.pow.Tensor_Scalar(%5, 1.0)
%12: f32[4, 2] = aten.mul.Scalar(%11, 2.0)
%13: f32[4, 2] = aten.mul.Tensor(%10, %12)
%14: f32[2, 4] = aten.t.default(%13)
%15: f32[2, 3] = aten.mm.default(%14, %2)
%16: f32[1, 2] = aten.sum.dim_IntList(%13, [0], True)
%17: f32[2] = aten.view.default(%16, [2])
%18: float = operator.neg(%3)
%19: f32[2, 3] = aten.add.Tensor(%0, %15, alpha=%18)
%20: f32[2] = aten.add.Tensor(%1, %17, alpha=%18)
return [%7, %19, %20]  # loss, param:layer.weight, param:layer.bias""",
    )


@pytest.fixture(scope="module")
def gpt() -> Program:
    torch.manual_seed(0)
    model = GPT()
    batch = CASES["gpt"].make_batch(2)
    return capture(model, AdamW(model.parameters(), lr=1e-3), batch.args, batch.kwargs)


def test_nodes_are_in_the_order_forward_backward_update(gpt: Program) -> None:
    phases = [node.meta["origin"].phase for node in operators(gpt)]
    assert phases == sorted(phases, key=list(Phase).index)
    assert set(phases) == set(Phase)


def test_most_operators_are_traced_to_a_line_of_the_models_file(gpt: Program) -> None:
    ours = [node for node in operators(gpt) if node.meta["origin"].phase is not Phase.UPDATE]
    sources = [node.meta["origin"].source or "" for node in ours]
    share = sum(source.startswith(tests.models.__file__) for source in sources) / len(sources)
    assert share >= 0.85, f"only {share:.0%} of {len(sources)} operators have a line in {tests.models.__file__}"


def test_an_operator_is_traced_to_the_line_that_called_it(gpt: Program) -> None:
    lines = Path(tests.models.__file__).read_text().splitlines()
    for target, code in (
        (aten.gelu.default, "F.gelu("),
        (aten.gelu_backward.default, "F.gelu("),
        (aten.native_layer_norm_backward.default, "norm"),
        (aten.nll_loss_forward.default, "F.cross_entropy("),
        (aten.embedding_dense_backward.default, "self.tokens(tokens) + self.positions("),
    ):
        found = gpt.graph.find_nodes(op="call_function", target=target)
        assert found, target
        for node in found:
            _, _, number = node.meta["origin"].source.partition(" ")[0].rpartition(":")
            assert code in lines[int(number) - 1], node.meta["origin"].source


def test_module_paths_are_those_of_the_model(gpt: Program) -> None:
    names = {name for name, _ in GPT().named_modules()}
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert {node.meta["origin"].module for node in operators(gpt) if node.meta["origin"].phase is phase} <= names
    where = Counter(
        (node.meta["origin"].phase, node.meta["origin"].module)
        for node in operators(gpt)
        if node.target in (aten.mm.default, aten.addmm.default)
    )
    for layer in ("blocks.0.qkv", "blocks.0.proj", "blocks.1.fc", "blocks.1.out", "head"):
        assert where[Phase.FORWARD, layer] == 1
        assert where[Phase.BACKWARD, layer] == 2
    assert sum(where.values()) == 3 * (4 * 2 + 1)


def test_the_update_belongs_to_the_parameter_that_it_serves(gpt: Program) -> None:
    names = {name for name, _ in gpt.inputs(Role.PARAM)}
    modules = Counter(
        node.meta["origin"].module for node in operators(gpt) if node.meta["origin"].phase is Phase.UPDATE
    )
    assert set(modules) <= names | {""}
    assert all(modules[name] > 5 for name in names)
    update = next(node for node in operators(gpt) if node.meta["origin"].phase is Phase.UPDATE)
    assert "optim" in update.meta["origin"].source


def test_hyperparameters_and_step_counts_are_inputs() -> None:
    programs = []
    for lr in (1e-3, 0.5):
        torch.manual_seed(0)
        model = Line()
        optimizer = Adam(model.parameters(), lr=lr, betas=(lr, 0.9), weight_decay=lr)
        programs.append(captured(model, torch.randn(4, 3), optimizer=optimizer))
    assert programs[0].digest() == programs[1].digest()
    hypers = {name for name, _ in programs[0].inputs(Role.HYPER)}
    assert {"group0.lr", "group0.betas[0]", "group0.betas[1]", "group0.eps", "group0.weight_decay"} <= hypers
    steps = [node for (_, key), node in programs[0].inputs(Role.OPT_STATE).items() if key == "step"]
    assert [describe(node.meta["val"]) for node in steps] == ["f32[]", "f32[]"]
    assert all(node.users for node in steps)


# Meaning


def eager_step(case: Case, model: nn.Module, optimizer: Optimizer, batch: Batch) -> Values:
    """The step in plain PyTorch, as the captured program would return it."""
    names = {p: name for name, p in model.named_parameters()}
    torch.manual_seed(0)
    output = model(*batch.args, **batch.kwargs)
    loss = case.loss(output, *batch.args, **batch.kwargs) if case.loss else output
    loss.backward()
    trained = [name for p, name in names.items() if p.grad is not None]
    optimizer.step()
    results: Values = {None: loss.detach()}
    for name, p in model.named_parameters():
        if name in trained:
            results[Input(Role.PARAM, name)] = p.detach()
            for key, value in optimizer.state[p].items():
                results[Input(Role.OPT_STATE, name, key)] = value
    results.update({Input(Role.BUFFER, name): value for name, value in model.named_buffers()})
    return results


def inputs_of(program: Program, model: nn.Module, optimizer: Optimizer, batch: Batch) -> Values:
    """Real values for the inputs of a captured first step."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    leaves = [*batch.args, *batch.kwargs.values()]
    values: Values = {}
    for node, what in program.placeholders():
        match what.role:
            case Role.PARAM:
                values[what] = params[what.name].detach()
            case Role.BUFFER:
                values[what] = buffers[what.name]
            case Role.BATCH:
                values[what] = leaves[int(what.name)]
            case Role.CONSTANT:
                values[what] = program.constants[what.name]
            case Role.HYPER:
                key, _, index = what.name.partition(".")[2].rstrip("]").partition("[")
                value = optimizer.param_groups[0][key]
                values[what] = value[int(index)] if index else value
            case Role.OPT_STATE:
                start = program.init[what]
                val = node.meta["val"]
                assert start.fill is not None
                values[what] = torch.full(val.shape, start.fill, dtype=val.dtype)
    return values


_QUICK = ("gpt_tied", "gpt_dropout", "counting", "in_place", "resnet", "partial")


@pytest.mark.parametrize(
    "name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in list(CASES)[:12]]
)
def test_the_captured_step_replayed_is_bitwise_the_eager_step(name: str) -> None:
    """Dropout included: the same draws, in the same order."""
    case = CASES[name]
    model = case.model()
    batch = case.batches(1)[0]
    optimizer = AdamW(model.parameters(), lr=1e-2)
    program = capture(model, optimizer, batch.args, batch.kwargs, loss=case.loss)
    found = run_ranks(program, [inputs_of(program, model, optimizer, batch)])[0]
    expected = eager_step(case, model, optimizer, batch)
    for what, value in expected.items():
        if what in found:
            assert torch.equal(torch.as_tensor(found[what]), torch.as_tensor(value)), what or "loss"
        else:
            assert what is not None
            assert what.role is Role.BUFFER, f"{what} is missing"
    assert set(found) <= set(expected)


class Drops(nn.Module):
    """Dropout on channels-last and transposed memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.leave = nn.Conv2d(3, 5, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.conv(x.to(memory_format=torch.channels_last)), 0.3)
        return self.leave(F.dropout(x.flatten(2).mT, 0.5).mT.flatten(1)[:, :6]).square().mean()


def test_dropout_draws_in_the_order_of_memory() -> None:
    model = Drops()
    x = torch.randn(2, 3, 6, 6)
    optimizer = SGD(model.parameters(), lr=0.1)
    program = captured(model, x)
    found = run_ranks(program, [inputs_of(program, model, optimizer, Batch((x,), {}))])[0]
    expected = eager_step(Case(Drops, lambda _: Batch((x,), {})), model, optimizer, Batch((x,), {}))
    assert torch.equal(torch.as_tensor(found[None]), torch.as_tensor(expected[None]))
    new = Input(Role.PARAM, "conv.weight")
    assert torch.equal(torch.as_tensor(found[new]), torch.as_tensor(expected[new]))


# What is in it


def test_tied_parameters_are_one_input_with_one_gradient() -> None:
    model = GPT(tied=True)
    batch = CASES["gpt"].make_batch(2)
    program = captured(model, *batch.args)
    assert ("tokens.weight", "") in program.inputs(Role.PARAM)
    assert ("head.weight", "") not in program.inputs(Role.PARAM)
    assert program.outputs.count(Input(Role.PARAM, "tokens.weight")) == 1


def test_frozen_and_unused_parameters_are_inputs_that_stay() -> None:
    case = CASES["partial"]
    model = case.model()
    batch = case.make_batch(4)
    optimizer = AdamW(model.parameters(), lr=0.1)
    program = capture(model, optimizer, batch.args, batch.kwargs, loss=case.loss)
    updated = {what.name for what in program.outputs if what is not None}
    assert updated == {"trained.weight", "trained.bias", "half_frozen.weight"}
    assert {name for name, _ in program.inputs(Role.PARAM)} == {name for name, _ in model.named_parameters()}
    assert not Tidy()(program).inputs(Role.PARAM)["unused.weight", ""].users


def test_a_parameter_that_the_optimizer_does_not_hold_is_not_updated() -> None:
    model = Line()
    program = captured(model, torch.randn(4, 3), optimizer=SGD([model.layer.bias], lr=0.1))
    assert program.outputs == [None, Input(Role.PARAM, "layer.bias")]


def test_buffers_that_forward_writes_or_assigns_are_results() -> None:
    case = CASES["counting"]
    batch = case.make_batch(4)
    model = case.model()
    program = capture(model, SGD(model.parameters(), lr=0.1), batch.args, {}, loss=case.loss)
    assert {what.name for what in program.outputs if what and what.role is Role.BUFFER} == {"steps", "warmth"}
    assert {name for name, _ in program.inputs(Role.BUFFER)} == {"steps", "warmth", "offsets"}
    program = capture(model.eval(), SGD(model.parameters(), lr=0.1), batch.args, {}, loss=case.loss)
    assert not [what for what in program.outputs if what and what.role is Role.BUFFER]


def test_batch_norm_updates_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = SGD(model.parameters(), lr=0.1)
    program = capture(model, optimizer, (torch.randn(4, 3),), {}, loss=lambda y, _: y.square().mean())
    updated = {what.name for what in program.outputs if what and what.role is Role.BUFFER}
    assert updated == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


class Constants(Line):
    """Tensors that are neither parameters nor buffers: a literal, an attribute, and one that forward writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.count = torch.arange(2.0), torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return (self.layer(x) * torch.tensor([1.5, 2.5]) + self.offset / self.count).square().mean()


def test_other_tensors_are_constants_and_written_ones_are_results() -> None:
    model = Constants()
    program = captured(model, torch.randn(4, 3))
    values = [value.tolist() for value in program.constants.values()]
    assert sorted(values) == [[0.0, 0.0], [0.0, 1.0], [1.5, 2.5]]
    (written,) = (what for what in program.outputs if what and what.role is Role.CONSTANT)
    assert program.constants[written.name].tolist() == [0.0, 0.0]
    assert model.count.tolist() == [0.0, 0.0]


def test_arguments_are_tensors_of_the_batch_or_constants() -> None:
    class Nested(Line):
        def forward(self, inputs: dict[str, Any], *, factor: float, flag: bool = False) -> Tensor:
            x = inputs["xs"][1] * factor
            return super().forward(-x if flag else x)

    x = torch.randn(4, 3)
    program = captured(Nested(), {"xs": [torch.ones(1), x], "name": "train"}, factor=2.5)
    assert [describe(node.meta["val"]) for node in program.inputs(Role.BATCH).values()] == ["f32[1]", "f32[4, 3]"]
    assert ", 2.5)" in program.text()


# Memory


def test_a_model_on_meta_is_captured_like_a_real_one() -> None:
    batch = CASES["gpt"].make_batch(2)
    real = GPT(dropout=0.1)
    with torch.device("meta"):
        blank = GPT(dropout=0.1)
    texts = [captured(model, *batch.args, optimizer=AdamW(model.parameters())).text() for model in (real, blank)]
    assert texts[0] == texts[1]
    assert all(p.is_meta for p in blank.parameters())


def peak_bytes_of(function: Callable[[], Any]) -> int:
    """How far resident memory rises above what it is now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def test_ten_billion_parameters_are_captured_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(40_000, 40_000) for _ in range(7)))
    assert sum(p.numel() for p in model.parameters()) > 10**10
    x = torch.randn(1, 40_000)
    optimizer = AdamW(model.parameters())
    rise = peak_bytes_of(lambda: capture(model, optimizer, (x,), {}, loss=lambda y, _: y.square().mean()))
    assert rise < 100 * 2**20, f"resident memory rose by {rise / 2**20:.0f} MiB"


# The user's things


class Careless(nn.Module):
    """Keeps what it computes, replaces its own attributes, draws random numbers; fails if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(()))
        self.length, self.history = 0, ["start"]
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor, fail: str = "") -> Tensor:
        self.length = len(x)
        self.history = [*self.history, "forward"]
        self.hidden = F.dropout(self.norm(self.layer(x)), 0.5)
        self.outputs.append(self.hidden)
        self.seen = self.seen + self.hidden.detach().sum()
        self.layer.scratch = torch.ones(3)
        self.late = nn.Linear(2, 2, bias=False)
        if fail == "branch" and self.hidden.sum() > 0:
            return self.hidden.sum()
        if fail == "raise":
            raise KeyError("forward")
        return self.hidden if fail == "loss" else self.hidden.square().mean()


@pytest.mark.parametrize("fail", ["", "branch", "raise", "loss"])
def test_capture_touches_nothing_even_if_it_fails(fail: str) -> None:
    model = Careless()
    optimizer = Adam(model.parameters(), lr=0.1)
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    inner = {name: (dict(m._parameters), dict(m._buffers), dict(m._modules)) for name, m in model.named_modules()}
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    generator = torch.get_rng_state()
    if fail:
        with pytest.raises(CaptureError):
            captured(model, torch.randn(4, 3, generator=torch.Generator()), fail, optimizer=optimizer)
    else:
        captured(model, torch.randn(4, 3, generator=torch.Generator()), optimizer=optimizer)
    assert {name: m.__dict__ for name, m in model.named_modules()} == attributes
    assert not model.outputs
    assert {n: (m._parameters, m._buffers, m._modules) for n, m in model.named_modules()} == inner
    for name, value in model.state_dict(keep_vars=True).items():
        original, before = tensors[name]
        assert value is original
        assert value.grad is None
        assert torch.equal(value, before), name
    assert not optimizer.state
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert torch.equal(torch.get_rng_state(), generator)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "zgraph"]


def test_attributes_that_forward_sets_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    captured(Careless(), torch.randn(4, 3))
    (warning,) = warnings_of(caplog)
    assert "forward sets hidden, history, late, layer.scratch, length, outputs;" in warning


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_in_16_bits_stay_in_16_bits(dtype: torch.dtype) -> None:
    """torch infers float32 for them, and gives 16 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(dtype)
    plain, x = copy.deepcopy(model), torch.randn(8, 5).to(dtype)
    zgraph.compile(model, SGD(model.parameters(), lr=0.1), loss=lambda y, _: y.float().square().sum())
    model.train_step(x)
    plain(x)
    for name, buffer in plain.named_buffers():
        assert buffer.dtype == model.get_buffer(name).dtype
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0, msg=name)


def test_a_recurrent_layer_gives_its_biases_one_gradient_however_often_torch_has_seen_it() -> None:
    """oneDNN gives the same tensor twice, and torch's memory of operators makes two of them later."""
    model, batch = nn.LSTM(5, 7), (torch.randn(3, 2, 5),)
    optimizer = torch.optim.SGD(model.parameters())
    made = [capture(model, optimizer, batch, {}, loss=lambda y, _: y[0].sum()) for _ in range(3)]
    assert made[0].text() == made[1].text() == made[2].text()
    (backward,) = made[0].graph.find_nodes(op="call_function", target=torch.ops.aten.mkldnn_rnn_layer_backward.default)
    read = [user.args[1] for user in backward.users if user.users]
    assert read.count(3) == 1
    assert 4 not in read


@pytest.mark.parametrize("name", ["gpt", "counting", "recurrent", "resnet"])
def test_models_that_keep_nothing_but_buffers_give_no_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    model, batch = case.model(), case.make_batch(2)
    capture(model, SGD(model.parameters(), lr=0.1), batch.args, batch.kwargs, loss=case.loss)
    assert not warnings_of(caplog)


# Refusals that need no ranks; the rest are in distributed/test_refusals.py


class Writes(Line):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return super().forward(x)


class WholeLoss(Line):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).long()


class Fails(Line):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ x)


class DrawsFromItsOwn(Line):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand(4, 3, generator=self.generator))


@pytest.mark.parametrize(
    ("model", "says", "line"),
    [
        (DrawsFromItsOwn, r"aten.rand.generator is given a Generator", "generator=self.generator)"),
        (Writes, r"forward writes to batch:0 in place", "x.add_(1)"),
        (WholeLoss, r"not a scalar: it has shape \(\) and dtype torch.int64", ".long()"),
        (Fails, r"cannot be captured: RuntimeError", "super().forward(x @ x)"),
    ],
)
def test_bad_models_are_refused_with_their_line(model: Callable[[], nn.Module], says: str, line: str) -> None:
    with pytest.raises(CaptureError, match=says) as refusal:
        captured(model(), torch.randn(4, 3))
    assert line in (refusal.value.where or "")
    assert refusal.value.fix


def test_a_refusal_is_all_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would log its own traceback of a product whose shapes do not fit."""
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handle", told.append)
    with pytest.raises(CaptureError, match="must have same reduction dim"):
        captured(Fails(), torch.randn(4, 3))
    assert told == []


class KeepsReference(Line):
    """Reads its weight through a list, where eager would train it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weights[0].t() + self.layer.bias).square().mean()


class Counts(Line):
    """Has a number that falls with every call, which a tensor could keep and a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.inner.temperature *= 0.5
        return super().forward(x) * self.inner.temperature


class Alternates(Line):
    negative = False

    def forward(self, x: Tensor) -> Tensor:
        self.negative = not self.negative
        return super().forward(-x if self.negative else x)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Counts, r"forward changes inner.temperature with every call, from 1.0 to 0.5 to 0.25"),
        (Alternates, r"forward changes negative with every call, from None to True to False"),
    ],
)
def test_numbers_that_change_with_every_call_are_refused_with_their_name(kind: Callable[[], Line], says: str) -> None:
    model = kind()
    before = dict(vars(model))
    with pytest.raises(CaptureError, match=says):
        captured(model, torch.randn(4, 3))
    assert vars(model) == before


class DrawsInPython(Line):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class DrawsInNumpy(Line):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize(("kind", "name"), [(DrawsInPython, "random"), (DrawsInNumpy, "numpy.random")])
def test_numbers_drawn_outside_of_torch_are_refused_and_not_used_up(kind: Callable[[], Line], name: str) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with pytest.raises(CaptureError, match=rf"forward draws numbers from {name}, which would be the same"):
        captured(kind(), torch.randn(4, 3))
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


class SetsTheSeed(Line):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return super().forward(x + torch.rand_like(x))


def test_a_seed_set_by_forward_is_refused_and_not_set() -> None:
    model, x = SetsTheSeed(), torch.randn(4, 3)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"forward calls torch.manual_seed\(1\)") as refusal:
        captured(model, x)
    assert "torch.manual_seed(1)" in (refusal.value.where or "")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_that_is_read_past_its_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"forward reads layer.weight through a reference") as refusal:
        captured(KeepsReference(), torch.randn(4, 3))
    assert "self.weights[0].t()" in (refusal.value.where or "")


def shares_data(model: Line) -> None:
    model.layer.bias = nn.Parameter(model.layer.weight.data[:, 1])


def buffer_in_a_parameter(model: Line) -> None:
    model.register_buffer("row", model.layer.weight.data[1])


def buffer_in_a_buffer(model: Line) -> None:
    model.register_buffer("seen", torch.zeros(4))
    model.register_buffer("part", model.seen[1:3])


def buffer_in_other_units(model: Line) -> None:
    model.register_buffer("bits", model.layer.bias.data.view(torch.int16))


def buffer_in_shared_array(model: Line) -> None:
    array = np.zeros(4, dtype=np.float32)
    model.register_buffer("seen", torch.from_numpy(array))
    model.register_buffer("again", torch.from_numpy(array))


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (shares_data, {"layer.weight", "layer.bias"}),
        (buffer_in_a_parameter, {"layer.weight", "row"}),
        (buffer_in_a_buffer, {"seen", "part"}),
        (buffer_in_other_units, {"layer.bias", "bits"}),
        (buffer_in_shared_array, {"seen", "again"}),
    ],
)
def test_tensors_that_share_memory_without_being_one_are_refused_with_both_names(
    share: Callable[[Line], None], names: set[str]
) -> None:
    model = Line()
    share(model)
    with pytest.raises(CaptureError, match="share memory, but are not one tensor") as refusal:
        captured(model, torch.randn(4, 3))
    assert (
        set(str(refusal.value).splitlines()[0].removesuffix(" share memory, but are not one tensor").split(" and "))
        == names
    )


def test_tensors_that_lie_side_by_side_in_one_memory_are_not_shared() -> None:
    model = Line()
    whole = torch.randn(2, 6)  # its columns in turn
    model.layer.weight = nn.Parameter(whole[:, ::2])
    model.register_buffer("between", whole[:, 1::2])
    model.register_buffer("empty", whole[:0])
    model.register_buffer("expanded", torch.zeros(1).expand(5))
    model.register_buffer("tied", model.expanded)
    captured(model, torch.randn(4, 3))


def test_a_sparse_tensor_in_batch_or_buffers_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"a tensor of the batch is torch.sparse_coo, not a dense tensor"):
        captured(Line(), torch.eye(3).to_sparse())
    model = Line()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(CaptureError, match=r"graph is torch.sparse_coo, not a dense tensor"):
        captured(model, torch.randn(4, 3))


def test_tensor_subclasses_are_refused() -> None:
    class Special(nn.Parameter):
        pass

    model = Line()
    model.layer.bias = Special(torch.zeros(2))
    with pytest.raises(CaptureError, match=r"layer.bias is a Special; only plain tensors"):
        captured(model, torch.randn(4, 3))


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"group 0 of the optimizer holds a parameter of shape \(5, 7\)"):
        captured(Line(), torch.randn(4, 3), optimizer=SGD(nn.Linear(7, 5).parameters(), lr=0.1))
