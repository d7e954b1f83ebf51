"""Ranks that read each other's parameters where they lie: right at any pace, or left to gathers, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import fx

from tests.programs import Builder, assert_identical, blocks, few_examples, param, two_layers, values_for
from tests.recipes import Recipe, build, recipes
from zgraph import ops
from zgraph.config import Config
from zgraph.cost import Costs
from zgraph.errors import VerifyError
from zgraph.footprint import Kind, footprint
from zgraph.generators import RandomStream
from zgraph.hardware import Hardware
from zgraph.lockstep import Values, _evaluate, _reduced, part_of, run_ranks
from zgraph.machines import assumed_cpu, preset
from zgraph.passes import ShareMemory, default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Input, Mesh, Phase, Program, Role, Stage, operand
from zgraph.reference import divide, join
from zgraph.sharing import shares

aten = torch.ops.aten
HOST = replace(assumed_cpu(2, 2**34).for_ranks(2), reads_peers=True)


def lowered(captured: Program, world: int, **options: Any) -> Program:
    """With all passes."""
    config = Config(3, **{"bucket_bytes": 200, **options})
    return run(default_passes(config, Mesh(world), hardware=HOST), captured).program


class Paced:
    """Ranks of which each goes on by itself, as far as what it waits for allows.

    Parameters are parts of one vector that all ranks have; what is waited for of ``share`` is that vector.
    """

    def __init__(self, program: Program, inputs: Sequence[Values], seed: int) -> None:
        self.program, self.nodes, self.random = program, list(program.graph.nodes), Random(seed)
        ranks = range(len(inputs))
        self.whole: dict[Input, torch.Tensor] = {}
        self.env: list[dict[fx.Node, Any]] = [{} for _ in ranks]
        self.streams = [RandomStream(rank) for rank in ranks]
        self.position = [0 for _ in ranks]
        self.sent: dict[fx.Node, dict[int, torch.Tensor]] = {}
        for node, what in program.placeholders():
            if what.role is Role.PARAM:
                whole = self.whole[what] = torch.cat([mine[what] for mine in inputs])  # type: ignore[misc]
            for rank in ranks:
                value = part_of(whole, rank, len(ranks)) if what.role is Role.PARAM else inputs[rank][what]
                self.env[rank][node] = value.clone() if what.role is Role.OPT_STATE and _is_tensor(value) else value

    def run(self) -> list[Values]:
        waiting = list(range(len(self.env)))
        while waiting:
            able = [rank for rank in waiting if self._can_go_on(rank)]
            rank = self.random.choice(able)
            for _ in range(self.random.choice([1, 5, len(self.nodes)])):  # now and then as far as it can
                if self.nodes[self.position[rank]].op == "output":
                    waiting.remove(rank)
                    break
                if not self._can_go_on(rank):
                    break
                self._step(rank)
        outputs = list(zip(self.program.outputs, self.program.results(), strict=True))
        return [{what: mine[n] if isinstance(n, fx.Node) else n for what, n in outputs} for mine in self.env]

    def _can_go_on(self, rank: int) -> bool:
        node = self.nodes[self.position[rank]]
        return node.target is not ops.wait or len(self.sent[operand(node)]) == len(self.env)

    def _step(self, rank: int) -> None:
        node, mine = self.nodes[self.position[rank]], self.env[rank]
        self.position[rank] += 1
        if node.op == "placeholder":
            return
        if node.target in ops.STARTS:
            sent = mine[operand(node)]
            self.sent.setdefault(node, {})[rank] = sent if node.target is ops.share else sent.clone()
        elif node.target is ops.wait:
            mine[node] = self._received(operand(node), rank)
        else:
            mine[node] = _evaluate(node, mine, rank, self.program.mesh, len(self.env), self.streams[rank])

    def _received(self, start: fx.Node, rank: int) -> torch.Tensor:
        sent = [self.sent[start][each] for each in range(len(self.env))]
        if start.target is ops.share:
            return self.whole[operand(start).meta["input"]]
        if start.target is ops.all_gather:
            return torch.cat(sent)
        reduced = _reduced(sent, start.args[1])
        return reduced if start.target is ops.all_reduce else part_of(reduced, rank, len(sent)).clone()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@dataclass(frozen=True)
class ReadLater(Pass):
    """Read what is gathered once more, somewhere behind, and add that to the loss."""

    seed: int
    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        random, nodes = Random(self.seed), list(program.graph.nodes)
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            (wait,) = start.users
            behind = nodes[nodes.index(wait) + 1 :]
            here, origin = random.choice(behind), wait.meta["origin"]
            numbers = program.call(aten.nan_to_num.default, wait, origin=origin, before=here)  # padding is NaN
            late = program.call(aten.sum.default, numbers, origin=origin, before=here)
            loss, *others = program.results()
            loss = program.call(aten.add.Tensor, loss, late, origin=origin, before=program.output_node)
            program.set_results([loss, *others], program.outputs)


@given(recipes(), st.sampled_from([2, 3]), st.sampled_from([1, 200]), st.integers(0, 2**32))
@few_examples(60)
def test_whatever_is_shared_is_right_at_any_pace(recipe: Recipe, world: int, bucket_bytes: int, seed: int) -> None:
    passes = default_passes(Config(3, bucket_bytes), Mesh(world), hardware=HOST)
    at = next(i for i, each in enumerate(passes) if isinstance(each, ShareMemory))
    captured = build(recipe)
    gathered = run(passes[:at], captured).program
    ReadLater(seed).rewrite(gathered)
    shared = gathered.clone()
    ShareMemory().rewrite(shared)
    num_left = len(shared.graph.find_nodes(op="call_function", target=ops.all_gather))
    event(f"{len(shares(shared))} shared, {num_left} gathered")
    inputs = divide(gathered, values_for(captured, world=world))
    assert_identical(join(shared, Paced(shared, inputs, seed).run()), join(gathered, run_ranks(gathered, inputs)))


def gather_by_hand(edit: Callable[[Program], None]) -> Program:
    """Two layers without the pass, changed, and then shared whatever the pass would say."""
    program = run(default_passes(Config(3, 1), Mesh(2)), two_layers()).program
    edit(program)
    for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
        start.target = ops.share
    return program


def read_behind_reductions(program: Program) -> None:
    """Read a bucket once more when its update has nothing left to wait for."""
    gathered = next(n for n in program.graph.nodes if n.target is ops.wait and operand(n).target is ops.all_gather)
    update = next(n for n in program.graph.nodes if getattr(n.target, "name", "") == "update_bucket0")
    loss = program.results()[0]
    origin = gathered.meta["origin"]
    more = program.call(aten.sum.default, gathered, origin=origin, before=update)
    both = program.call(aten.add.Tensor, loss, more, origin=origin, before=program.output_node)
    program.set_results([both, *program.results()[1:]], program.outputs)


def test_a_part_that_is_written_while_others_read_it_is_refused_and_would_be_wrong() -> None:
    run((Unchanged(),), gather_by_hand(lambda _: None))
    program = gather_by_hand(read_behind_reductions)
    inputs = divide(program, values_for(two_layers(), world=2))
    losses = [[float(mine[None]) for mine in Paced(program, inputs, seed).run()] for seed in range(20)]
    assert len(set(map(tuple, losses))) > 1
    with pytest.raises(VerifyError, match=r"is read by others, and this rank writes its part again without a coll"):
        run((Unchanged(),), program)


@dataclass(frozen=True)
class Unchanged(Pass):
    """Nothing."""

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        pass


def test_shared_parameters_take_no_memory_and_the_time_of_a_message() -> None:
    captured = blocks(2)
    plain = run(default_passes(Config(3, 200), Mesh(2), hardware=replace(HOST, reads_peers=False)), captured).program
    program = lowered(captured, 2)
    assert len(shares(program)) > 4
    assert not program.graph.find_nodes(op="call_function", target=ops.all_gather)
    gathered = [footprint(each, staged=False).by_kind().get(Kind.GATHERED, [0]) for each in (plain, program)]
    assert max(gathered[0]) > 0
    assert max(gathered[1]) == 0
    costs = Costs(program, HOST)
    assert {costs.of(start).seconds for start in shares(program)} == {HOST.collective_s("all_gather", 0, 2)}


def frozen(*, with_loss: bool) -> Program:
    """A parameter that is read and never written, beside one that is trained."""
    b = Builder()
    w, f = (b.input(Role.PARAM, name, shape=[2, 2]) for name in ("w", "f"))
    lr = b.input(Role.HYPER, "lr")
    y = b.forward(aten.mm.default, b.forward(aten.mm.default, b.input(Role.BATCH, "0", shape=[2, 2]), f), w)
    loss = b.forward(aten.sum.default, y)
    size = b.call(Phase.UPDATE, aten.mul.Tensor, b.backward(aten.ones_like.default, y), lr, module="w")
    new = b.call(Phase.UPDATE, aten.sub.Tensor, w, size, module="w")
    return b.finish({None: loss if with_loss else b.forward(aten.zeros_like.default, loss), param("w"): new})


def test_what_is_never_written_is_shared_if_a_collective_ends_the_step() -> None:
    program = lowered(frozen(with_loss=True), 2, bucket_bytes=1)
    assert {str(operand(start).meta["input"]) for start in shares(program)} == {"param:bucket0", "param:bucket1"}


@pytest.mark.parametrize(
    ("hardware", "options"),
    [
        (HOST, {"zero": 2}),
        (HOST, {"offload": {"parameters": "disk"}}),
        (replace(HOST, reads_peers=False), {}),
        (preset("H100"), {}),
        (None, {}),
    ],
)
def test_only_ranks_of_one_host_share_parameters_that_they_divide(
    hardware: Hardware | None, options: dict[str, Any]
) -> None:
    passes = default_passes(Config(**options), Mesh(2), hardware=hardware)
    assert not any(isinstance(each, ShareMemory) for each in passes)
    assert any(isinstance(each, ShareMemory) for each in default_passes(Config(), Mesh(2), hardware=HOST))


def test_a_cast_is_gathered_as_ever() -> None:
    program = lowered(two_layers(), 2, gather_precision="bf16")
    gathers = program.graph.find_nodes(op="call_function", target=ops.all_gather)
    assert all(operand(start).op != "placeholder" for start in gathers)


def test_before_the_last_lowering_nothing_is_shared() -> None:
    passes = default_passes(Config(3, 1), Mesh(2))
    program = run([each for each in passes if each.gives <= Stage.SHARDED], two_layers()).program
    with pytest.raises(VerifyError, match="shares memory, which comes with the last lowering only"):
        run((Early(),), program)


@dataclass(frozen=True)
class Early(Pass):
    """Share before state is written in place."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            start.target = ops.share
