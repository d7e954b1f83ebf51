"""Parameters and optimizer state on a disk: the same step, proved, with no more of it in memory than is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import zgraph
from tests.models import CASES
from tests.mutants.steps import in_single_precision
from tests.offloading import EVERYTHING, ON_DISK, PARAMETERS, SUMS_TOO, Mistake, Speed, lowered, mean_square, nth
from tests.programs import Builder, accumulated, assert_same_step, blocks, clipped, few_examples, param, two_layers
from tests.recipes import Recipe, build, recipes
from zgraph import ops
from zgraph.accumulation import micro_step
from zgraph.codegen.host_kernel import HostKernel
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.footprint import Kind, footprint, state_on
from zgraph.liveness import held_bytes, lifetimes, owners
from zgraph.lower import Lowered, lower
from zgraph.machines import preset
from zgraph.passes import Offload, default_passes
from zgraph.passes.offload import AHEAD, IN_MEMORY, KEPT
from zgraph.passes.offload_gradients import IN_MEMORY as GRADIENTS_IN_MEMORY
from zgraph.pipeline import Pass, run
from zgraph.placement import place
from zgraph.predict import predict
from zgraph.program import Mesh, Phase, Program, Role, Stage, operand, phase_of
from zgraph.timeline import COMPUTE, least_s, play

aten = torch.ops.aten
H100 = preset("H100")


def momentum(num: int) -> Program:
    """``blocks`` trained by SGD with momentum."""
    program = blocks(num)
    results = dict(zip(program.outputs, program.results(), strict=True))
    for what in [what for what in results if what is not None]:
        update: Any = results[what]
        gradient = operand(update, 1)
        m = program.placeholder(replace(what, role=Role.OPT_STATE, key="m"), gradient.meta["val"])
        new = program.call(aten.add.Tensor, m, gradient, origin=update.meta["origin"], before=update)
        update.replace_input_with(gradient, new)
        results[m.meta["input"]] = new
    program.set_results(list(results.values()), list(results))
    return program


def transfers(program: Program) -> str:
    """The calls that move or update state, in order."""
    number = {}
    lines = []
    for node in program.graph.nodes:
        bucket = node.meta["origin"].module if node.op == "call_function" else ""
        if node.target in ops.TRANSFERS:
            number[node] = f"{node.target._opname} {bucket.removeprefix('bucket')}"
            lines.append(number[node])
        elif node.target is ops.wait and operand(node) in number:
            lines.append(f"wait for {number[operand(node)]}")
        elif hasattr(node.target, "writes"):
            where = " on the host" if isinstance(node.target, HostKernel) else ""
            lines.append(f"update {bucket.removeprefix('bucket')}{where}")
    return "\n".join(lines)


# Where it goes


def test_state_comes_while_the_bucket_before_is_updated_and_goes_before_the_third_from_it_comes() -> None:
    assert_expected_inline(
        transfers(lowered(momentum(2))),
        """\
load 3
load 2
wait for load 3
update 3
store 3
load 1
wait for load 2
update 2
store 2
wait for store 3
load 0
wait for load 1
update 1
store 1
wait for load 0
update 0
store 0
wait for store 2
wait for store 1
wait for store 0""",
    )


def test_parameters_come_for_forward_and_backward_and_stay_for_what_follows_at_once() -> None:
    """Of four, three stay where forward turns into backward, and each from backward to its update."""
    assert_expected_inline(
        transfers(lowered(blocks(2), offload=PARAMETERS)),
        """\
load 0
load 1
wait for load 0
load 2
wait for load 1
load 3
wait for load 2
wait for load 3
update 3
store 3
update 2
store 2
load 0
update 1
store 1
wait for load 0
update 0
store 0
wait for store 3
wait for store 2
wait for store 1
wait for store 0""",
    )


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize(("zero", "world"), [(0, 1), (0, 3), (1, 3), (3, 2)])
def test_no_more_buckets_have_parameters_in_memory_than_is_said(num: int, zero: int, world: int) -> None:
    program = lowered(blocks(num), zero, world, offload=PARAMETERS)
    assert program.layout is not None
    assert program.layout.on_tiers("parameters").keys() == {bucket.name for bucket in program.layout.buckets}
    loaded = [life for life in lifetimes(program) if life.node.target is ops.load]
    assert 2 * num <= len(loaded) <= 4 * num
    at_once = [sum(life.first <= at <= life.last for life in loaded) for at in range(program.num_nodes())]
    assert max(at_once) <= min(IN_MEMORY + AHEAD + 1, 2 * num)


def test_a_parameter_is_cast_anew_from_what_is_loaded() -> None:
    """One that is cast for forward is not kept for backward, but for buckets that stay as a whole."""
    case = CASES["gpt_tied"]
    model = case.model(torch.float32)
    zgraph.compile(
        model, torch.optim.SGD(model.parameters()), loss=case.loss, bucket_bytes=1, precision="bf16", offload=PARAMETERS
    )
    (batch,) = case.batches(1, 4, dtype=torch.float32)
    model.train_step(*batch.args)
    casts = [
        node
        for node in model.program.graph.find_nodes(op="call_function", target=aten._to_copy.default)
        if ops.root_of(operand(node)).target is ops.wait
    ]
    kept = {
        operand(operand(ops.root_of(operand(node)))).meta["input"].name
        for node in casts
        if any(phase_of(user) is Phase.BACKWARD for user in node.users) and phase_of(node) is Phase.FORWARD
    }
    assert len(casts) > 10 > KEPT >= len(kept)


def test_the_text_of_a_program_says_what_lies_on_a_disk() -> None:
    lines = [
        line for line in lowered(two_layers(), 3, 2).text().splitlines() if "opt_state" in line or "zgraph." in line
    ]
    assert_expected_inline(
        "\n".join(lines[:4]),
        """\
%1: f64[16] = input opt_state:bucket0:m on disk
%3: f64[16] = input opt_state:bucket1:m on disk
%7: f64[16] = zgraph.load.default(%3, 'disk')
%8: f64[16] = zgraph.load.default(%1, 'disk')""",
    )


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("norm", [False, True])
def test_no_more_buckets_have_state_in_memory_than_is_said(num: int, norm: bool) -> None:
    captured = clipped(momentum(num), 0.1) if norm else momentum(num)
    program = lowered(captured)
    assert program.layout is not None
    assert len(program.layout.buckets) == 2 * num
    loaded = [life for life in lifetimes(program) if life.node.target is ops.load]
    assert len(loaded) == 2 * num
    at_once = [sum(life.first <= at <= life.last for life in loaded) for at in range(program.num_nodes())]
    assert max(at_once) == min(IN_MEMORY, 2 * num)


def test_a_gradient_that_waits_for_the_norm_goes_behind_its_part_of_it_and_comes_for_its_update() -> None:
    """The first stays, for its update begins as soon as the norm is known."""
    program = lowered(clipped(momentum(3), 0.1), offload={"gradients": "disk"}, clip_norm=0.1)
    assert_expected_inline(
        transfers(program),
        """\
spill 4
spill 3
spill 2
wait for spill 4
spill 1
wait for spill 3
spill 0
load 4
update 5
wait for spill 2
wait for spill 1
wait for spill 0
load 3
wait for load 4
update 4
load 2
wait for load 3
update 3
load 1
wait for load 2
update 2
load 0
wait for load 1
update 1
wait for load 0
update 0""",
    )


@pytest.mark.parametrize(("zero", "world"), [(0, 1), (0, 3), (1, 3), (3, 2)])
@pytest.mark.parametrize("limit", [None, 0.1])
def test_few_gradients_are_in_memory_while_their_norm_is_not_known(zero: int, world: int, limit: float | None) -> None:
    captured = momentum(5) if limit is None else clipped(momentum(5), limit)
    program = lowered(captured, zero, world, offload=SUMS_TOO, clip_norm=0.1)
    assert_same_step(program, captured, late=True)
    spills = program.graph.find_nodes(op="call_function", target=ops.spill)
    assert len(spills) == (0 if limit is None else 2 * 5 - 1)
    owner = owners(program)
    gradients = {owner[operand(node)] for node in program.graph.find_nodes(op="call_function", target=ops.square_sum)}
    lives = [life for life in lifetimes(program) if life.node in gradients]
    at_once = [sum(life.first <= at <= life.last for life in lives) for at in range(program.num_nodes())]
    assert max(at_once, default=0) <= 1 + GRADIENTS_IN_MEMORY


class Tied(nn.Module):
    """The first parameter's gradient has memory from the start of backward on, and is whole at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
        self.head = nn.Linear(64, 512, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("kernels", ["zgraph", "auto", "eager"])
def test_gradients_wait_on_a_disk_whatever_order_they_are_made_in(kernels: str) -> None:
    found = []
    for offload in (None, SUMS_TOO):
        torch.manual_seed(0)
        model: Any = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        options: dict[str, Any] = {"clip_norm": 1.0, "bucket_bytes": 17000, "kernels": kernels, "offload": offload}
        zgraph.compile(model, optimizer, loss=mean_square, **options)
        losses = [model.train_step(torch.arange(64).view(4, 16)) for _ in range(2)]
        found.append((losses, model.state_dict()))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    assert model.stats()["spilled_bytes"] > 4 * 64 * 64 * 4


def test_few_gradients_wait_in_memory_and_the_plan_says_so() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters())
    zgraph.compile(model, optimizer, loss=mean_square, clip_norm=1.0, offload={"gradients": "disk"})
    model.train_step(torch.ones(2, 6))
    assert model.stats()["spilled_bytes"] == 0
    assert any("wait for their norm in memory" in note for note in model.plan.notes)


def unlike(num_kept: int = 1) -> tuple[Program, tuple[Program, Program]]:
    """Buckets of unlike sizes, beside so many numbers that are kept until the last but one is updated.

    Returns:
        The step, and its program with state on the host that comes one bucket ahead, or further.
    """
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[64])
    names, sizes = [f"w{i}" for i in range(7)], [64, 64, 8, 8, 8, 8, 64]
    params = {name: b.input(Role.PARAM, name, shape=[size]) for name, size in zip(names, sizes, strict=True)}
    m = {name: b.input(Role.OPT_STATE, name, "m", shape=[size]) for name, size in zip(names, sizes, strict=True)}
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, x, params["w0"]))
    large = b.forward(aten.new_ones.default, x, [num_kept])
    new = {}
    for name, size in reversed(list(zip(names, sizes, strict=True))):
        gradient = b.backward(aten.slice.Tensor, b.backward(aten.neg.default, x), 0, 0, size)
        if name == "w5":
            gradient = b.backward(aten.mul.Tensor, gradient, b.backward(aten.sum.default, large))
        kept = b.call(Phase.UPDATE, aten.add.Tensor, m[name], gradient, module=name)
        new[param(name)] = b.call(Phase.UPDATE, aten.sub.Tensor, params[name], kept, module=name)
        new[m[name].meta["input"]] = kept
    captured = b.finish({None: loss, **new})
    passes = default_passes(Config(0, 1), Mesh(1))
    near, far = (
        run((*passes, Offload((("optimizer", "host"),), H100, far)), captured).program for far in (False, True)
    )
    return captured, (near, far)


def test_state_that_comes_ahead_is_no_more_than_three_buckets_were_however_much_room_there_is() -> None:
    captured, (near, far) = unlike(num_kept=10_000)
    assert_same_step(far, captured)
    order = {node: i for i, node in enumerate(far.graph.nodes)}
    loads = far.graph.find_nodes(op="call_function", target=ops.load)
    used = {load: min(order[user] for wait in load.users for user in wait.users) for load in loads}
    for i in order.values():
        coming = sorted((load for load in loads if order[load] < i < used[load]), key=used.__getitem__)
        assert (
            sum(load.meta["val"].nbytes for load in coming[1:]) <= (64 + 64 + 16) * 8
        )  # a bucket has 16 elements or a multiple
    assert transfers(near) != transfers(far)


def test_state_on_the_host_comes_as_far_ahead_as_there_is_room_for() -> None:
    """Where the first bucket is large and is held at the peak, small ones that follow come together, and go so."""
    captured, (near, far) = unlike()
    assert_expected_inline(
        transfers(far),
        """\
load 6
load 5
load 4
load 3
wait for load 6
update 6
store 6
wait for load 5
update 5
store 5
wait for store 6
load 2
wait for load 4
update 4
store 4
wait for store 5
load 1
wait for load 3
update 3
store 3
wait for load 2
update 2
store 2
wait for store 4
wait for store 3
load 0
wait for load 1
update 1
store 1
wait for load 0
update 0
store 0
wait for store 2
wait for store 1
wait for store 0""",
    )
    held = [max(held_bytes(lifetimes(each), each.num_nodes())) for each in (near, far)]
    assert held[1] <= held[0]
    assert_same_step(far, captured)


def chain(rng: random.Random) -> Program:
    """Products of matrices of several sizes, trained by SGD with momentum."""
    b = Builder()
    sizes = [rng.choice((2, 4, 16)) for _ in range(rng.randint(4, 12))]
    hidden = [b.input(Role.BATCH, "0", shape=[rng.randint(1, 8), sizes[0]])]
    shapes = list(pairwise(sizes))
    weights = [b.input(Role.PARAM, f"w{i}", shape=shape) for i, shape in enumerate(shapes)]
    momenta = [b.input(Role.OPT_STATE, f"w{i}", "m", shape=shape) for i, shape in enumerate(shapes)]
    for weight in weights:
        hidden.append(b.forward(aten.tanh.default, b.forward(aten.mm.default, hidden[-1], weight)))
    loss = b.forward(aten.sum.default, hidden[-1])
    flow, gradients = b.backward(aten.ones_like.default, hidden[-1]), dict[int, fx.Node]()
    for i in reversed(range(len(weights))):
        flow = b.backward(aten.tanh_backward.default, flow, hidden[i + 1])
        gradients[i] = b.backward(aten.mm.default, b.backward(aten.t.default, hidden[i]), flow)
        flow = b.backward(aten.mm.default, flow, b.backward(aten.t.default, weights[i]))
    new = {}
    for i, gradient in gradients.items():
        kept = b.call(Phase.UPDATE, aten.add.Tensor, momenta[i], gradient, module=f"w{i}")
        new[param(f"w{i}")] = b.call(Phase.UPDATE, aten.sub.Tensor, weights[i], kept, module=f"w{i}")
        new[momenta[i].meta["input"]] = kept
    return b.finish({None: loss, **new})


def test_state_that_comes_far_ahead_raises_no_peak() -> None:
    num_unlike = 0
    for seed in range(60):
        rng = random.Random(seed)
        captured = chain(rng)
        zero, world = rng.choice([(0, 1), (1, 2), (3, 1), (3, 2)])
        accumulate, limit = rng.choice([1, 2]), rng.choice([None, 1.0])
        what = rng.choice([("optimizer",), ("optimizer", "parameters"), ("gradients", "optimizer")][: 1 + accumulate])
        if accumulate > 1:
            captured = accumulated(captured, 2, limit=limit)
        elif limit is not None:
            captured = clipped(captured, limit)
        passes = default_passes(Config(zero, rng.choice([1, 200, 1000]), 1, accumulate=accumulate), Mesh(world))
        near, far = (
            run((*passes, Offload(tuple((each, "host") for each in what), H100, far)), captured).program
            for far in (False, True)
        )
        held = [max(held_bytes(lifetimes(each), each.num_nodes())) for each in (near, far)]
        assert held[1] <= held[0], (seed, held)
        num_unlike += transfers(near) != transfers(far)
        if seed % 4 == 0 and accumulate == 1:
            assert_same_step(far, captured)
    assert num_unlike > 30


def test_the_first_loads_start_in_time_and_no_earlier() -> None:
    captured = momentum(3)
    starts = {}
    for read in (1e30, 1e8, 1.0):
        program = run(
            default_passes(Config(0, 1, offload=ON_DISK), Mesh(1), hardware=Speed(read).hardware()), captured
        ).program
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        first = next(i for i, node in enumerate(calls) if node.target is ops.load)
        update = next(i for i, node in enumerate(calls) if hasattr(node.target, "writes"))
        starts[read] = first
        waiting = play(program, Speed(read).hardware()).exposed_s
        assert first < update
        assert (waiting == 0) == (read == 1e30)
    assert starts[1e30] > starts[1e8] > starts[1.0] == 0


def test_what_is_computed_from_state_before_all_gradients_are_there_is_streamed_as_far_as_it_can_be() -> None:
    """State that a norm is made of is in memory from there on; nothing is stored before it is needed no more."""

    @dataclass(frozen=True)
    class ReadEarly(Pass):
        """Read all state in forward, too."""

        takes = gives = Stage.INPLACE

        def rewrite(self, program: Program) -> None:
            first = next(node for node in program.graph.nodes if node.op == "call_function")
            for what, node in program.inputs(Role.OPT_STATE).items():
                origin = replace(first.meta["origin"], module=what[0])
                program.call(aten.sum.default, node, origin=origin, before=first)

    passes = default_passes(Config(0, 1, 1), Mesh(1))
    program = run((*passes, ReadEarly(), Offload()), momentum(3)).program
    loaded = [life for life in lifetimes(program) if life.node.target is ops.load]
    assert len(loaded) == 6
    assert_same_step(program, momentum(3))


# The same step


@given(recipes(), st.booleans())
@few_examples(60)
def test_any_step_is_the_same(recipe: Recipe, late: bool) -> None:
    captured = build(recipe)
    assert_same_step(lowered(captured, 3, 2), captured, late=late)


@given(recipes(), st.booleans(), st.sampled_from([(0, 1), (1, 2), (3, 1), (3, 2)]))
@few_examples(60)
def test_any_step_is_the_same_with_all_on_the_disk(recipe: Recipe, late: bool, divided: tuple[int, int]) -> None:
    captured = build(recipe)
    assert_same_step(lowered(captured, *divided, offload=EVERYTHING), captured, late=late)


@pytest.mark.parametrize("offload", [ON_DISK, PARAMETERS, EVERYTHING], ids=" and ".join)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_is_the_same_however_much_of_it_is_divided(zero: int, offload: dict[str, str]) -> None:
    for captured in (momentum(3), clipped(momentum(3), 0.1)):
        assert_same_step(lowered(captured, zero, 3, offload=offload), captured, late=True)


@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_steps_that_add_gradients_up_on_a_disk_are_the_same(zero: int, limit: float | None) -> None:
    captured = accumulated(momentum(5), 2, limit=limit)
    config = Config(zero, 1, 1, accumulate=2, offload=SUMS_TOO, clip_norm=limit)
    both = lower(captured, config, Mesh(3), None, ())
    assert both.micro is not None
    assert both.layout.on_tiers("gradients").keys() == {bucket.name for bucket in both.layout.buckets}
    for program, reference in ((both.last, captured), (both.micro, micro_step(captured))):
        assert_same_step(program, reference, late=True)
        sums = [node for node, what in program.placeholders() if what.role is Role.GRADIENT]
        stores = program.graph.find_nodes(op="call_function", target=ops.store)
        assert {program.tier_of(node) for node in sums} == {"disk"}
        assert set(sums) <= {node.kwargs["out"] for node in stores}
        held = [life for life in lifetimes(program) if life.node.target is ops.load and operand(life.node) in sums]
        at_once = [sum(life.first <= at <= life.last for life in held) for at in range(program.num_nodes())]
        waits = limit is not None and program is both.last  # for the norm of all of them
        assert max(at_once) <= (1 + GRADIENTS_IN_MEMORY if waits else IN_MEMORY)


def test_micro_batches_have_the_same_buckets_on_disk() -> None:
    config = Config(3, 1, 1, accumulate=2, offload=EVERYTHING)
    both = lower(accumulated(momentum(2), 2), config, Mesh(2), None, ())
    assert both.micro is not None
    assert both.micro.layout == both.last.layout
    assert both.layout.on_tiers("optimizer").keys() == {bucket.name for bucket in both.layout.buckets}
    assert both.layout.on_tiers("parameters") == both.layout.on_tiers("optimizer")
    assert not any(node.target is ops.store for node in both.micro.graph.nodes)
    assert {node.meta["input"].role for node in loaded(both.micro)} == {Role.PARAM}


def loaded(program: Program) -> list[Any]:
    return [operand(node) for node in program.graph.find_nodes(op="call_function", target=ops.load)]


# What the verifier refuses


def at(node: Any) -> dict[str, Any]:
    return {"origin": node.meta["origin"], "before": node}


def store_before_it_is_loaded(program: Program) -> None:
    store = nth(program, ops.store)
    (arrived,) = nth(program, ops.load).users
    zeros = program.call(aten.zeros_like.default, program.inputs(Role.PARAM)["bucket1", ""], **at(arrived))
    store.replace_input_with(operand(store), zeros)
    arrived.prepend(store)


def load_what_is_still_written(program: Program) -> None:
    store = nth(program, ops.store)
    again = program.call(ops.load, store.kwargs["out"], "disk", **at(store.next))
    program.call(ops.wait, again, **at(again.next))


def write_over_what_is_still_stored(program: Program) -> None:
    first, second = nth(program, ops.store), nth(program, ops.store, -1)
    kernel = operand(operand(second))
    loaded = next(arg for arg in kernel.args if arg.target is ops.wait and operand(arg).target is ops.load)
    kernel.replace_input_with(loaded, operand(first))


def read_it_without_loading(program: Program) -> None:
    load = nth(program, ops.load)
    program.call(aten.neg.default, operand(load), **at(load))


def update_it_where_it_lies(program: Program) -> None:
    (arrived,) = nth(program, ops.load).users
    arrived.replace_all_uses_with(operand(operand(arrived)))


def load_what_is_in_memory(program: Program) -> None:
    load = nth(program, ops.load)
    again = program.call(ops.load, program.inputs(Role.PARAM)["bucket0", ""], "disk", **at(load))
    program.call(ops.wait, again, **at(again.next))


def read_before_it_has_arrived(program: Program) -> None:
    (arrived,) = nth(program, ops.load).users
    arrived.replace_all_uses_with(operand(arrived), delete_user_cb=lambda user: user.target is not ops.wait)


def never_wait_for_a_store(program: Program) -> None:
    store = nth(program, ops.store)
    (stored,) = store.users
    stored.replace_all_uses_with(operand(store))
    program.graph.erase_node(stored)


def of_bucket_0(program: Program, target: Any) -> list[Any]:
    calls = program.graph.find_nodes(op="call_function", target=target)
    return [node for node in calls if node.meta["origin"].module == "bucket0"]


def store_one_as_the_other(program: Program) -> None:
    one, two = of_bucket_0(program, ops.store)
    one.kwargs, two.kwargs = two.kwargs, one.kwargs
    results, outputs = program.results(), program.outputs
    i, j = (outputs.index(store.kwargs["out"].meta["input"]) for store in (one, two))
    results[i], results[j] = results[j], results[i]
    program.set_results(results, outputs)


def load_one_for_the_other(program: Program) -> None:
    one, two = of_bucket_0(program, ops.load)
    one.args, two.args = two.args, one.args


def forget_to_store(program: Program) -> None:
    store = nth(program, ops.store)
    (stored,) = store.users
    results = [store.kwargs["out"] if result is stored else result for result in program.results()]
    program.set_results(results, program.outputs)
    program.graph.erase_node(stored)
    program.graph.erase_node(store)


REFUSED: dict[Callable[[Program], None], str] = {
    store_before_it_is_loaded: r"writes over what load\w* is still sending",
    load_what_is_still_written: r"reads what store\w* has written over",
    read_it_without_loading: r"is given opt_state:bucket\d:\w, which lies on a disk",
    update_it_where_it_lies: r"is given opt_state:bucket\d:\w, which lies on a disk",
    load_what_is_in_memory: "is given param:bucket0, which is in memory",
    read_before_it_has_arrived: r"reads load\w* before it has arrived",
    never_wait_for_a_store: "is waited for 0 times",
    store_one_as_the_other: "changed what the step computes",
    load_one_for_the_other: "changed what the step computes",
    forget_to_store: "changed what the step computes",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_a_mistake_with_state_on_a_disk_is_refused(edit: Callable[[Program], None]) -> None:
    with pytest.raises(VerifyError, match=REFUSED[edit]):
        lowered(in_single_precision(), 0, 1, Mistake(edit))


def test_what_is_still_being_stored_may_not_be_written_over() -> None:
    with pytest.raises(VerifyError, match=r"writes over what store\w* is still sending"):
        lowered(two_layers(), 0, 1, Mistake(write_over_what_is_still_stored))


# What it takes


def test_a_parameter_that_is_not_stored_is_refused() -> None:
    with pytest.raises(VerifyError, match="changed what the step computes"):
        lowered(blocks(2), 0, 1, Mistake(forget_to_store), offload=PARAMETERS)


@pytest.mark.parametrize("zero", [0, 3])
def test_bytes_and_seconds_are_predicted(zero: int) -> None:
    program = lowered(momentum(3), zero, 2)
    state = sum(node.meta["val"].nbytes for _, node in program.inputs(Role.OPT_STATE).items())
    assert sum(state_on("disk", program).values()) == state
    held = footprint(program)
    largest = max(node.meta["val"].nbytes for node in program.inputs(Role.OPT_STATE).values())
    assert 0 < max(held.by_kind()[Kind.STATE]) <= IN_MEMORY * largest
    machine = Speed(1e3).hardware()
    timeline = play(program, machine)
    slow = 2 * state / 1e3 * machine.devices_per_node / 2
    assert timeline.busy_s["disk in"] == pytest.approx(slow)
    assert timeline.busy_s["disk out"] == pytest.approx(slow)
    assert slow < timeline.step_s < 2 * slow
    assert slow <= least_s(program, machine) <= timeline.step_s
    moved = [event for event in timeline.events if event.lane.startswith("disk")]
    assert sum(event.cost.num_bytes for event in moved) == 2 * state
    predicted = predict(Lowered(program, None, ()), machine)
    assert {lane: num for lane, num in predicted.moved_bytes.items() if num} == {"disk in": state, "disk out": state}
    fast = play(program, Speed(1e30).hardware())
    assert fast.busy_s[COMPUTE] == timeline.busy_s[COMPUTE]


def test_a_plan_says_what_lies_on_a_disk_and_needs_less_memory() -> None:
    def plan(**options: Any) -> zgraph.Plan:
        return zgraph.plan(
            lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))),
            torch.optim.AdamW,
            batch=(torch.empty(4, 64),),
            world_size=2,
            loss=mean_square,
            zero=3,
            bucket_bytes=1,
            accumulate=1,
            recompute=None,
            unshard=0.0,
            in_flight=0,
            **options,
        )

    plain, on_disk, everything = plan(), plan(offload=ON_DISK), plan(offload=EVERYTHING)
    state = 2 * 8 * 4 * (64 * 64 + 64) // 2
    saved = plain.chosen.peak_bytes - on_disk.chosen.peak_bytes
    assert state // 2 < saved < state
    assert not plain.notes
    assert on_disk.notes == (
        "130 KiB of each rank's optimizer state lie on a disk; a step reads 130 KiB and writes 130 KiB",
    )
    assert everything.notes[0].startswith("195 KiB of each rank's parameters and optimizer state lie on a disk;")
    assert state // 4 < on_disk.chosen.peak_bytes - everything.chosen.peak_bytes < state // 2
    assert zgraph.Plan.from_json(on_disk.to_json()).config.offload == ON_DISK


def test_loads_into_an_arena_begin_at_a_page_so_that_nothing_is_copied() -> None:
    layers = [nn.Linear(130, 130) for _ in range(4)]
    model = nn.Sequential(*layers)
    model = zgraph.compile(
        model, torch.optim.AdamW(model.parameters()), loss=mean_square, bucket_bytes=1, offload=ON_DISK
    )
    model.train_step(torch.randn(4, 130))
    placement = place(model.program)
    loads = [node for node in placement.places if node.target is ops.load]
    assert len(loads) == 2 * 4
    assert all(placement.places[node].start % 4096 == 0 for node in loads)
