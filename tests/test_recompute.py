"""Backward computes again what it would have to be kept for: the same step, in less memory."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import zgraph
from tests.choices import in_turn
from tests.programs import Builder, assert_identical, assert_same_step, blocks, few_examples, param, values_for
from tests.ranks import Ranks
from tests.recomputing import OPTIONS, trained
from tests.reference import train_like_eager
from zgraph import ops
from zgraph.capture import capture
from zgraph.config import Config
from zgraph.liveness import alive_bytes, owners
from zgraph.lockstep import run_ranks
from zgraph.lower import lower
from zgraph.passes import RecomputeModules, Unshard, default_passes
from zgraph.passes.recompute import EXPENSIVE
from zgraph.pipeline import run
from zgraph.program import Mesh, Phase, Program, Role, phase_of

aten = torch.ops.aten
RECOMPUTED = RecomputeModules(("blocks.*",))


def made_again(program: Program) -> list[fx.Node]:
    """The calls that the pass has made."""
    calls = program.graph.nodes
    return [n for n in calls if n.op == "call_function" and n.meta["origin"].made_by == "RecomputeModules"]


# What the pass makes


def test_backward_makes_each_block_again_from_what_goes_in() -> None:
    text = RECOMPUTED(blocks()).text(origins=True).splitlines()
    first, last = (next(i for i, line in enumerate(text) if name in line) for name in ("ones_like", "operator.neg"))
    assert_expected_inline(
        "\n".join(line.replace(" (forward)", "").replace(" model.py:", " ") for line in text[6:last]),
        """\
%6: f64[4, 6] = aten.mm.default(%0, %1)  # forward blocks.0 7 [capture]
%7: f64[4, 6] = aten.tanh.default(%6)  # forward blocks.0 8 [capture]
%8: f64[4, 2] = aten.mm.default(%7, %2)  # forward blocks.0 9 [capture]
%9: f64[4, 2] = aten.add.Tensor(%0, %8, alpha=2)  # forward blocks.0 10 [capture]
%10: f64[4, 6] = aten.mm.default(%9, %3)  # forward blocks.1 11 [capture]
%11: f64[4, 6] = aten.tanh.default(%10)  # forward blocks.1 12 [capture]
%12: f64[4, 2] = aten.mm.default(%11, %4)  # forward blocks.1 13 [capture]
%13: f64[4, 2] = aten.add.Tensor(%9, %12, alpha=2)  # forward blocks.1 14 [capture]
%14: f64[] = aten.sum.default(%13)  # forward - 15 [capture]
%15: f64[] = aten.ones_like.default(%14)  # backward - 16 [capture]
%16: f64[4, 2] = aten.expand.default(%15, [4, 2])  # backward - 17 [capture]
%17: f64[4, 2] = aten.mul.Tensor(%16, 2)  # backward blocks.1 18 [capture]
%18: f64[4, 6] = aten.mm.default(%9, %3)  # backward blocks.1 11 [RecomputeModules]
%19: f64[4, 6] = aten.tanh.default(%18)  # backward blocks.1 12 [RecomputeModules]
%20: f64[6, 4] = aten.t.default(%19)  # backward blocks.1 19 [capture]
%21: f64[6, 2] = aten.mm.default(%20, %17)  # backward blocks.1 20 [capture]
%22: f64[2, 6] = aten.t.default(%4)  # backward blocks.1 21 [capture]
%23: f64[4, 6] = aten.mm.default(%17, %22)  # backward blocks.1 22 [capture]
%24: f64[4, 6] = aten.tanh_backward.default(%23, %19)  # backward blocks.1 23 [capture]
%25: f64[2, 4] = aten.t.default(%9)  # backward blocks.1 24 [capture]
%26: f64[2, 6] = aten.mm.default(%25, %24)  # backward blocks.1 25 [capture]
%27: f64[6, 2] = aten.t.default(%3)  # backward blocks.1 26 [capture]
%28: f64[4, 2] = aten.mm.default(%24, %27)  # backward blocks.1 27 [capture]
%29: f64[4, 2] = aten.add.Tensor(%16, %28)  # backward blocks.1 28 [capture]
%30: f64[4, 2] = aten.mul.Tensor(%29, 2)  # backward blocks.0 29 [capture]
%31: f64[4, 6] = aten.mm.default(%0, %1)  # backward blocks.0 7 [RecomputeModules]
%32: f64[4, 6] = aten.tanh.default(%31)  # backward blocks.0 8 [RecomputeModules]
%33: f64[6, 4] = aten.t.default(%32)  # backward blocks.0 30 [capture]
%34: f64[6, 2] = aten.mm.default(%33, %30)  # backward blocks.0 31 [capture]
%35: f64[2, 6] = aten.t.default(%2)  # backward blocks.0 32 [capture]
%36: f64[4, 6] = aten.mm.default(%30, %35)  # backward blocks.0 33 [capture]
%37: f64[4, 6] = aten.tanh_backward.default(%36, %32)  # backward blocks.0 34 [capture]
%38: f64[2, 4] = aten.t.default(%0)  # backward blocks.0 35 [capture]
%39: f64[2, 6] = aten.mm.default(%38, %37)  # backward blocks.0 36 [capture]""",
    )
    assert first > 6


def test_what_draws_random_numbers_is_kept() -> None:
    captured = blocks(3, dropout=True)
    program = RECOMPUTED(captured)
    assert [n.target for n in made_again(program)] == 3 * [aten.mm.default, aten.tanh.default, aten.mul.Tensor]
    draws = [n for n in program.graph.nodes if ops.is_random(n.target)]
    assert len(draws) == 3
    assert all(any(phase_of(user) is Phase.BACKWARD for user in mask.users) for mask in draws)


class Attends(nn.Module):
    """Something to compute before attention and something to keep behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return nn.functional.scaled_dot_product_attention(y, y.sin(), y.cos(), is_causal=True)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attends = Attends()

    def forward(self, x: Tensor) -> Tensor:
        return self.attends(x).exp().sum()


def test_attention_runs_again_where_it_does_not_draw() -> None:
    model = Outer()
    program = capture(model, torch.optim.SGD(model.parameters()), (torch.randn(1, 2, 4, 8),), {})
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    phases = [
        phase_of(node)
        for node in RecomputeModules(("attends",))(program).graph.find_nodes(op="call_function", target=attention)
    ]
    assert phases == [Phase.FORWARD, Phase.BACKWARD]


def test_a_clone_is_of_backward_and_of_the_module_and_line_that_it_repeats() -> None:
    program = RECOMPUTED(blocks(1))
    (mm, tanh) = made_again(program)
    forward = {n.target: n for n in program.graph.nodes if phase_of(n) is Phase.FORWARD and n.target is tanh.target}
    one, other = tanh.meta["origin"], forward[tanh.target].meta["origin"]
    assert (one.phase, one.module, one.source) == (Phase.BACKWARD, other.module, other.source)
    assert mm.users == {tanh: None}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [((), [aten.mm.default, aten.tanh.default]), (("aten.mm.default",), []), (("aten.tanh.default",), [])],
)
def test_what_is_to_be_kept_is_kept_and_nothing_is_made_again_for_no_gain(keep: tuple[str, ...], expected: Any) -> None:
    """A product that is kept so that its tanh can be made again takes as much memory as the tanh."""
    assert [n.target for n in made_again(RecomputeModules(("blocks.*",), keep)(blocks(1)))] == expected


def test_operands_of_what_backward_runs_are_kept_but_not_copies_of_parameters() -> None:
    """Of x, tanh(x @ w) and its negative, the product of backward reads the last, and tanh_backward the one before."""
    b = Builder()
    x, w, v = (
        b.input(role, name, shape=shape)
        for role, name, shape in ((Role.BATCH, "0", [64, 4]), (Role.PARAM, "w", [4, 4]), (Role.PARAM, "v", [4, 4]))
    )
    copy = b.forward(aten.clone.default, v, module="blocks.0")
    a = b.forward(aten.tanh.default, b.forward(aten.mm.default, x, w, module="blocks.0"), module="blocks.0")
    y = b.forward(aten.neg.default, a, module="blocks.0")
    z = b.forward(aten.mm.default, y, copy, module="blocks.0")
    loss = b.forward(aten.sum.default, z)
    gz = b.backward(aten.expand.default, b.backward(aten.ones_like.default, loss), [64, 4])
    transposed = b.backward(aten.t.default, copy, module="blocks.0")
    gy = b.backward(aten.mm.default, gz, transposed, module="blocks.0")
    ga = b.backward(aten.tanh_backward.default, gy, a, module="blocks.0")
    gv = b.backward(aten.mm.default, b.backward(aten.t.default, y, module="blocks.0"), gz, module="blocks.0")
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x, module="blocks.0"), ga, module="blocks.0")
    new = [b.call(Phase.UPDATE, aten.sub.Tensor, p, g, module=n) for p, g, n in ((w, gw, "w"), (v, gv, "v"))]
    program = b.finish({None: loss, param("w"): new[0], param("v"): new[1]})

    again = [n.target for n in made_again(RecomputeModules(("blocks.*",))(program))]
    assert again == [aten.clone.default, aten.mm.default, aten.tanh.default, aten.neg.default]
    again = [n.target for n in made_again(RecomputeModules(("blocks.*",), operands_of=("aten.mm.default",))(program))]
    assert again == [aten.clone.default, aten.mm.default, aten.tanh.default]


def test_blocks_are_found_without_names() -> None:
    assert RecomputeModules()(blocks(3)).text() == RecomputeModules(("blocks.[0-9]",))(blocks(3)).text()


def test_a_module_is_one_block_with_all_that_is_in_it() -> None:
    program = RecomputeModules(("blocks",))(blocks(3))
    assert [n.target for n in made_again(program)].count(aten.add.Tensor) == 2, "blocks read each other's"
    batch, *_ = (node for node, what in program.placeholders() if what.role is Role.BATCH)
    read = [n for n in program.graph.nodes if n.op == "call_function" and phase_of(n) is Phase.BACKWARD]
    sources = {source for node in read for source in node.all_input_nodes if phase_of(source) is Phase.FORWARD}
    assert [n.target for n in sources] == [aten.sum.default], "of forward only the loss"
    assert any(batch in node.all_input_nodes for node in read)


def called_twice() -> Program:
    """``blocks.0``, ``blocks.1`` and ``blocks.0`` again, of one weight each."""
    b = Builder()
    x, lr = b.input(Role.BATCH, "0", shape=[4, 4]), b.input(Role.HYPER, "lr")
    params = [b.input(Role.PARAM, name, shape=[4, 4]) for name in "vw"]
    saved = []
    for i in (0, 1, 0):
        at = {"module": f"blocks.{i}"}
        s = b.forward(aten.sin.default, x, **at)
        e = b.forward(aten.exp.default, s, **at)
        saved.append((i, x, s, e))
        x = b.forward(aten.mm.default, e, params[i], **at)
    loss = b.forward(aten.sum.default, x)
    g = b.backward(aten.expand.default, b.backward(aten.ones_like.default, loss), [4, 4])
    gradients: dict[int, Any] = {}
    for i, x, s, e in reversed(saved):
        at = {"module": f"blocks.{i}"}
        gw = b.backward(aten.mm.default, b.backward(aten.t.default, e, **at), g, **at)
        gradients[i] = b.backward(aten.add.Tensor, gradients[i], gw, **at) if i in gradients else gw
        g = b.backward(aten.mm.default, g, b.backward(aten.t.default, params[i], **at), **at)
        cosine = b.backward(aten.cos.default, b.backward(aten.add.Tensor, x, s, **at), **at)
        g = b.backward(aten.mul.Tensor, b.backward(aten.mul.Tensor, g, e, **at), cosine, **at)
    results: dict[Any, Any] = {None: loss}
    for i, name in enumerate("vw"):
        size = b.call(Phase.UPDATE, aten.mul.Tensor, gradients[i], lr, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.add.Tensor, params[i], size, module=name)
    return b.finish(results)


def test_a_module_that_is_called_again_behind_another_is_another_block() -> None:
    program = RECOMPUTED(called_twice())
    assert [n.target for n in made_again(program)] == 3 * [aten.sin.default, aten.exp.default]
    for world in (1, 2):
        lowered = run(default_passes(Config(3, recompute=("blocks.*",)), Mesh(world)), called_twice()).program
        assert_same_step(lowered, called_twice())


# Numbers


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("dropout", [False, True])
def test_ranks_compute_the_captured_step(zero: int, dropout: bool) -> None:
    captured = blocks(3, dropout=dropout)
    for world in (1, 3):
        program = run(default_passes(Config(zero, 100, recompute=("blocks.*",)), Mesh(world)), captured).program
        assert len(made_again(program)) == (9 if dropout else 6)
        for late in (False, True):
            assert_same_step(program, captured, late=late)


WITH_BLOCKS = ["gpt_dropout", "resnet", "gpt_tied", "llama"]
WITHOUT = ["recurrent", "experts", "unet"]
WAYS = [*itertools.product(WITH_BLOCKS, ["blocks", "operators", ["*"]]), *itertools.product(WITHOUT, [["*"]])]


@in_turn("case, recompute", WAYS, "options", list(OPTIONS), ("gpt_dropout", "blocks"))
def test_no_bit_changes(case: str, options: str, recompute: Any) -> None:
    if case == "recurrent" and OPTIONS[options].get("precision") == "fp16":
        pytest.skip("not every CPU has an LSTM in float16")
    found = []
    for what in (None, recompute):
        ranks, results = trained(case, what, OPTIONS[options])
        assert bool(made_again(ranks.program)) is (what is not None)
        found.append(results)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


ON_RANKS = [("gpt_dropout", "blocks"), ("gpt", "operators"), ("gpt_tied", "blocks"), ("resnet", "operators")]


@in_turn("case, recompute", [*ON_RANKS, ("resnet", "blocks")], "zero", [3, 0, 1, 2], ON_RANKS[0])
def test_it_equals_plain_pytorch_on_real_ranks(ranks: Ranks, case: str, zero: int, recompute: str) -> None:
    options = {"recompute": recompute, "bucket_bytes": "1KiB", "num_steps": 4, "check_collectives": True}
    ranks.run(train_like_eager, case, zero=zero, **options)


# Memory


class Residual(nn.Module):
    """Saves its input and, four times as wide each, what goes into its activation and what comes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((width, 4 * width), (4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@functools.cache
def captured_stack(depth: int, rows: int, width: int, precision: str | None = None) -> Program:
    with torch.device("meta"):
        model = nn.Sequential(*(Residual(width) for _ in range(depth)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = Config(precision=precision)
    return capture(model, optimizer, (torch.ones(rows, width),), {}, loss=lambda y, _: y.square().mean(), config=config)


def peak_bytes(depth: int, rows: int = 512, width: int = 8, **options: Any) -> int:
    config = Config.from_options({"bucket_bytes": 1, **options})
    program = lower(captured_stack(depth, rows, width), config, Mesh(1), None, ()).last
    return max(num_bytes for _, num_bytes in alive_bytes(program))


@pytest.mark.parametrize("depth", [2, 5, 9])
def test_a_block_more_takes_the_memory_of_what_goes_into_it(depth: int) -> None:
    """Without, it takes what goes in, what goes into its activation and what comes out of that."""
    activation = 512 * 8 * 4
    assert peak_bytes(depth + 1) - peak_bytes(depth) == (1 + 4 + 4) * activation
    assert peak_bytes(depth + 1, recompute="blocks") - peak_bytes(depth, recompute="blocks") == activation
    assert (
        peak_bytes(depth + 1, recompute="operators") - peak_bytes(depth, recompute="operators") == (1 + 4) * activation
    )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("zero", range(4))
def test_the_peak_falls_and_the_same_bytes_travel(zero: int, precision: str | None, world: int) -> None:
    """But for the first weight: backward reads it only to make its product again, so ZeRO-3 gathers it once more.

    Nor does what would stay for backward in the memory that is freed.
    """
    peaks, travelled = [], []
    for recompute in (None, "operators", "blocks"):
        config = Config(zero, 1000, precision=precision, recompute=recompute)
        passes = [
            p for p in default_passes(config, Mesh(world)) if not isinstance(p, Unshard)
        ]  # it fills what is freed
        program = run(passes, captured_stack(6, 512, 8, precision)).program
        peaks.append(max(num_bytes for _, num_bytes in alive_bytes(program)))
        starts = [n for n in program.graph.nodes if n.target in ops.STARTS]
        travelled.append(Counter((str(n.target), n.meta["val"].nbytes) for n in starts))
    assert peaks[2] < peaks[1] < peaks[0]
    assert travelled[0] == travelled[1]
    assert not travelled[1] - travelled[2]
    assert (travelled[2] - travelled[1]).total() == (zero == 3 and world == 2)


def test_what_is_needed_late_is_made_late() -> None:
    """Everything of a block is made behind the last read of the block that follows it."""
    program = RECOMPUTED(blocks(4))
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in made_again(program):
        later = f"blocks.{int(node.meta['origin'].module[-1]) + 1}"
        others = [n for n in order if phase_of(n) is Phase.BACKWARD and n.meta["origin"].module == later]
        assert order[node] > max(map(order.__getitem__, others), default=0)


# Random steps


def kept_bytes(program: Program) -> int:
    """Memory of forward that anything behind it reads."""
    owner = owners(program)
    late = [n for n in program.graph.nodes if n.op == "output" or phase_of(n) in (Phase.BACKWARD, Phase.UPDATE)]
    read = {owner[source] for n in late for source in n.all_input_nodes if phase_of(source) is Phase.FORWARD}
    return sum(memory.meta["val"].nbytes for memory in read if memory.op == "call_function")


UNARY = (aten.sin.default, aten.tanh.default, aten.t.default, aten.clone.default, aten.relu.default)
BINARY = (aten.mm.default, aten.add.Tensor, aten.mul.Tensor)


@st.composite
def random_steps(draw: Callable[..., Any]) -> Program:
    """Forward in modules that follow one another or come back; backward reads whatever it likes of it."""
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[3, 3]), b.input(Role.BATCH, "0", shape=[3, 3])
    modules = st.sampled_from(["blocks.0", "blocks.1", "blocks.1.inner", "blocks.10", "head", ""])

    def call(make: Any, values: list[Any], module: str) -> Any:
        kind, one = draw(st.sampled_from(["unary", "binary", "split", "draw"])), draw(st.sampled_from(values))
        if kind == "draw" and make == b.forward:
            return make(aten.bernoulli.p, one, 0.5, module=module)
        if kind == "split":
            chunks = make(aten.split.Tensor, one, draw(st.sampled_from([1, 2])), module=module)
            rows = make(operator.getitem, chunks, 0, module=module)
            return make(aten.mm.default, make(aten.t.default, rows, module=module), rows, module=module)
        if kind == "binary":
            return make(draw(st.sampled_from(BINARY)), one, draw(st.sampled_from(values)), module=module)
        return make(draw(st.sampled_from(UNARY)), one, module=module)

    values = [w, x]
    for _ in range(draw(st.integers(1, 4))):
        module = draw(modules)
        values += [value for _ in range(draw(st.integers(1, 5))) for value in [call(b.forward, values, module)]]
    loss = b.forward(aten.sum.default, values[-1])
    gradients = [b.backward(aten.expand.default, b.backward(aten.ones_like.default, loss), [3, 3])]
    for _ in range(draw(st.integers(1, 8))):
        gradients.append(call(b.backward, [*values, *gradients], draw(modules)))
    total = gradients[0]
    for gradient in gradients[1:]:
        total = b.backward(aten.add.Tensor, total, gradient)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, total, alpha=b.input(Role.HYPER, "lr"), module="w")
    return b.finish({None: loss, param("w"): new})


@given(
    random_steps(),
    st.sampled_from([(), EXPENSIVE, ("aten.tanh.default", "aten.split.Tensor")]),
    st.sampled_from([(), EXPENSIVE]),
)
@few_examples(150)
def test_any_step_is_the_same_and_keeps_no_more(
    captured: Program, keep: tuple[str, ...], operands_of: tuple[str, ...]
) -> None:
    paths = {n.meta["origin"].module.split(".")[0] for n in captured.graph.nodes if phase_of(n) is Phase.FORWARD}
    patterns = tuple(sorted(p for p in ("blocks.*", "head") if p.split(".")[0] in paths))
    if not patterns:
        return
    program = RecomputeModules(patterns, keep, operands_of=operands_of)(captured)
    draws = [sum(ops.is_random(n.target) for n in p.graph.nodes) for p in (captured, program)]
    assert draws[0] == draws[1]
    assert kept_bytes(program) <= kept_bytes(captured)
    assert all(n.users for n in made_again(program)), "nothing is made for nobody"
    inputs = values_for(captured)
    torch.manual_seed(0)
    expected = run_ranks(captured, inputs)
    torch.manual_seed(0)
    assert_identical(run_ranks(program, inputs), expected)


# Refusals


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("layers", "recompute='layers' is not known"),
        (3, "recompute=3 is out of range"),
        (-0.1, "recompute=-0.1 is out of range"),
        (float("nan"), "recompute=nan is out of range"),
        (True, "recompute=True is not a list of names"),
        ([], r"recompute=\[\] names no module"),
        (["a", ""], "names no module"),
        ([1], "is not a list of names"),
    ],
)
def test_what_is_no_choice_is_refused(value: Any, rule: str) -> None:
    with pytest.raises(zgraph.OptionError, match=rule):
        Config.from_options({"recompute": value})


def test_a_list_of_paths_may_be_any_iterable() -> None:
    assert Config.from_options({"recompute": iter(["a", "b.*"])}).recompute == ("a", "b.*")


@pytest.mark.parametrize(
    ("recompute", "rule", "fix"),
    [
        ("blocks", "no list or sequence of modules has two members that compute alike", "recompute="),
        (["head", "first", "lsat"], "recompute names 'head', but forward calls no module of that path", "such as"),
    ],
)
def test_a_model_without_such_modules_is_refused(recompute: Any, rule: str, fix: str) -> None:
    model = nn.Sequential()
    model.first, model.last = nn.Linear(4, 4), nn.Linear(4, 4)  # type: ignore[assignment]
    compiled = zgraph.compile(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=lambda y, _: y.square().mean(), recompute=recompute
    )
    with pytest.raises(zgraph.OptionError, match=rule) as caught:
        compiled.train_step(torch.ones(2, 4))
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_torch_are_refused_with_what_to_do_instead(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Residual(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)  # type: ignore[assignment]
            return x.square().mean()

    model = Net()
    plain = copy.deepcopy(model)
    compiled = zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(zgraph.CaptureError, match=r"calls torch\.utils\.checkpoint") as caught:
        compiled.train_step(torch.ones(2, 4))
    assert "use recompute= instead" in (caught.value.fix or "")
    assert "checkpoint(layer" in (caught.value.where or "")
    plain(torch.ones(2, 4, requires_grad=True)).backward()  # torch's own is as it was
