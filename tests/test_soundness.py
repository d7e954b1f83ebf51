"""Programs that look right and are not: each was once accepted, and is refused now."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import fx, nn

import zgraph
from tests.programs import Builder, accumulated, assert_same_step, param, state, two_layers
from zgraph import ops
from zgraph.codegen.kernel import Kernel
from zgraph.config import Config
from zgraph.errors import OptimizerError, VerifyError
from zgraph.passes import AverageGradients, FormBuckets, Tidy, default_passes
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass, run
from zgraph.program import Input, Mesh, Origin, Phase, Program, Role, Stage, operand
from zgraph.terms import Terms
from zgraph.verify import Verifier, verify

aten = torch.ops.aten
HERE = Origin(Phase.FORWARD, "", "model.py:1 (forward)")


@dataclass(frozen=True)
class Edited(Pass):
    """Does something to a captured program."""

    edit: Callable[[Program], None]
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        self.edit(program)


class EditedBuckets(Edited):
    """Does something to a program in buckets."""

    takes: ClassVar[Stage] = Stage.BUCKETED
    gives: ClassVar[Stage] = Stage.BUCKETED


class EditedLast(Edited):
    """Does something to a finished program."""

    takes: ClassVar[Stage] = Stage.INPLACE
    gives: ClassVar[Stage] = Stage.INPLACE


def step(forward: Callable[[Builder, fx.Node], fx.Node], dtype: torch.dtype = torch.float64) -> Program:
    """The loss is the sum of what ``forward`` makes of the batch, [3, 3]."""
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[2]), b.input(Role.BATCH, "0", shape=[3, 3], dtype=dtype)
    loss = b.forward(aten.sum.default, forward(b, x))
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, b.backward(aten.sin.default, w), module="w")
    return b.finish({None: loss, param("w"): new})


def target(program: Program, op: Any) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is op)


def refused(program: Program, edit: Callable[[Program], None], says: str) -> None:
    """As the first pass, and after another one, when only what was touched is looked at again."""
    for passes in ([Edited(edit)], [Tidy(), Edited(edit)]):
        with pytest.raises(VerifyError, match=says):
            run(passes, program)


def test_a_literal_of_another_type_is_another_literal() -> None:
    program = step(lambda b, x: b.forward(aten.div.Tensor, x, 0.0))

    def negative_zero(program: Program) -> None:
        node = target(program, aten.div.Tensor)
        node.args = (node.args[0], -0.0)

    refused(program, negative_zero, "changed what the step computes: the loss")


def test_a_phase_that_a_pass_changes_is_looked_at() -> None:
    def relabel(program: Program) -> None:
        for node in program.graph.nodes:
            if node.op == "call_function" and node.meta["origin"].phase is Phase.BACKWARD:
                node.meta["origin"] = Origin(Phase.UPDATE, "w1", "model.py:1 (forward)")

    refused(two_layers(), relabel, "changed what the step computes: the new value of")


def test_a_broadcast_sum_is_not_the_sum_of_vectors() -> None:
    def grid(b: Builder, x: fx.Node) -> fx.Node:
        row, column = b.forward(aten.sum.dim_IntList, x, [0], True), b.forward(aten.sum.dim_IntList, x, [1], True)
        flat = [b.forward(aten.view.default, part, [3]) for part in (row, column)]
        vector = b.forward(aten.add.Tensor, *flat)
        return b.forward(aten.mul.Tensor, b.forward(aten.add.Tensor, row, column), b.forward(aten.sum.default, vector))

    def use_vector(program: Program) -> None:
        outputs = {program.output_node}
        vector, broadcast = (n for n in program.graph.nodes if n.target is aten.add.Tensor and n.users.keys() - outputs)
        mul = target(program, aten.mul.Tensor)
        mul.replace_input_with(broadcast, vector)
        mul.meta["val"] = program.infer(mul)

    refused(step(grid), use_vector, "changed what the step computes: the loss")


def test_an_argument_by_name_is_read_as_one_by_position() -> None:
    def exchanged(program: Program) -> None:
        node = target(program, aten.transpose.int)
        node.args, node.kwargs = (node.args[0],), {"dim0": 0, "dim1": 0}

    def named(program: Program) -> None:
        node = target(program, aten.transpose.int)
        node.args, node.kwargs = (node.args[0],), {"dim0": 0, "dim1": 1}

    program = step(lambda b, x: b.forward(aten.cumsum.default, b.forward(aten.transpose.int, x, 0, 1), 0))
    refused(program, exchanged, "changed what the step computes|is recorded as")
    run([Edited(named)], program)


def test_a_default_may_be_written_out() -> None:
    program = step(lambda b, x: b.forward(aten.add.Tensor, x, b.forward(aten.sin.default, x)))

    def write_out(program: Program) -> None:
        target(program, aten.add.Tensor).kwargs = {"alpha": 1}

    run([Edited(write_out)], program)


def test_strides_that_no_longer_are_are_noticed() -> None:
    def forward(b: Builder, x: fx.Node) -> fx.Node:
        turned = b.forward(aten.clone.default, b.forward(aten.t.default, x), memory_format=torch.contiguous_format)
        return b.forward(aten.view.default, b.forward(aten.neg.default, turned), [9])

    def drop_clone(program: Program) -> None:
        node = target(program, aten.clone.default)
        node.replace_all_uses_with(node.args[0])

    refused(step(forward), drop_clone, "neg.* is recorded as")


def test_memory_is_read_by_its_place_only_from_its_start() -> None:
    def forward(b: Builder, x: fx.Node) -> fx.Node:
        return b.forward(aten.as_strided.default, b.forward(aten.sin.default, x), [2], [1], 4)

    def of_a_part(program: Program) -> None:
        node = target(program, aten.as_strided.default)
        part = program.call(aten.slice.Tensor, node.args[0], 0, 1, 3, origin=HERE, before=node)
        node.args = (part, [2], [1], 1)

    refused(step(forward), of_a_part, "reads memory by its place")


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.arange(1.0, 5.0))
        self.w = nn.Parameter(torch.arange(10.0, 18.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = torch.as_strided(self.w[2:], (3, 2), (2, 1))
        return (
            (self.a * x.sum()).sum()
            + (torch.as_strided(self.w, (3,), (2,), 1) ** 2).sum() * x[1:].as_strided((2,), (1,), 0).sum()
            + part.sum()
        )


@pytest.mark.parametrize("zero", [0, 3])
def test_a_parameter_read_by_its_place_trains_as_in_eager(zero: int) -> None:
    model, eager = Strided(), Strided()
    x = torch.tensor([0.5, 0.25, 2.0])
    ranks = zgraph.simulate_ranks(model, torch.optim.SGD(model.parameters(), lr=0.1), world_size=2, zero=zero)
    loss = ranks.train_step([(x,), (x,)])
    expected = eager(x)
    expected.backward()
    torch.optim.SGD(eager.parameters(), lr=0.1).step()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(ranks.state_dict(), dict(eager.state_dict()))


def test_a_number_beside_a_vector_is_computed_in_another_dtype() -> None:
    """In bfloat16 0.1 and 0.10001 are equal; in float32, where a 0-dim parameter is compared, they are not.

    FormBuckets says so; were it not to look, the verifier would.
    """
    b = Builder()
    p, q = (b.input(Role.PARAM, name, shape=[], dtype=torch.bfloat16) for name in ("p", "q"))
    limit = b.input(Role.OPT_STATE, "p", "limit", shape=[], dtype=torch.float32)
    other = b.input(Role.OPT_STATE, "q", "limit", shape=[], dtype=torch.float32)
    results: dict[Input | None, Any] = {None: b.forward(aten.add.Tensor, p, q)}
    for name, value, bound in (("p", p, limit), ("q", q, other)):
        g = b.backward(aten.sin.default, value)
        above = b.call(Phase.UPDATE, aten.ge.Tensor, value, bound, module=name)
        results[param(name)] = b.call(Phase.UPDATE, aten.where.self, above, g, value, module=name)
        results[state(name, "limit")] = b.call(Phase.UPDATE, aten.add.Tensor, bound, 1, module=name)
    program = b.finish(results)
    with pytest.raises(OptimizerError, match="a single number, computes"):
        run([FormBuckets(1, 10**6)], program)
    with (
        mock.patch("zgraph.passes.updates.Updates._check_promotion"),
        pytest.raises(VerifyError, match=r"FormBuckets changed what the step computes: the new value of"),
    ):
        run([FormBuckets(1, 10**6)], program)


def kernel_step() -> Program:
    """A program of the last stage in which kernels may be planted."""
    return run(default_passes(Config(0, 1), Mesh(1)), two_layers()).program


def plant(
    program: Program,
    make: Callable[[Builder, fx.Node, fx.Node], list[fx.Node]],
    writes: tuple[int | None, ...],
    *args: fx.Node,
) -> None:
    """Call a kernel on values of the program, at its end."""
    inner = Builder()
    inner.program.fake_mode = program.fake_mode
    inputs = [
        inner.input(Role.BUFFER, f"in{i}", shape=a.meta["val"].shape, dtype=a.meta["val"].dtype)
        for i, a in enumerate(args)
    ]
    results = make(inner, *inputs) if len(inputs) > 1 else make(inner, inputs[0], inputs[0])
    inner.program.graph.output_node().args = (results,)
    kernel = Kernel("planted", inner.program.graph, len(args), writes)
    with program.graph.inserting_before(program.output_node):
        call = program.graph.call_function(kernel, args)
    call.meta.update(val=tuple(r.meta["val"] for r in results), origin=HERE)


def reverse(b: Builder, x: fx.Node, _: fx.Node) -> list[fx.Node]:
    return [b.forward(aten.flip.default, x, [0])]


def two_results(b: Builder, x: fx.Node, _: fx.Node) -> list[fx.Node]:
    return [b.forward(aten.sin.default, x), b.forward(aten.cos.default, x)]


def narrower(b: Builder, x: fx.Node, _: fx.Node) -> list[fx.Node]:
    return [b.forward(aten._to_copy.default, x, dtype=torch.float32)]


def one_result(b: Builder, x: fx.Node, _: fx.Node) -> list[fx.Node]:
    return [b.forward(aten.sin.default, x)]


PLANTED: dict[Any, tuple[tuple[int | None, ...], str]] = {
    reverse: ((None,), r"aten.flip.default in its body, which is not elementwise"),
    two_results: ((0, 0), "writes two results over one input"),
    narrower: ((0,), "over an input of another form"),
    one_result: ((0,), "reads what update_bucket. has written over|does not return its new value|what is returned"),
}


@pytest.mark.parametrize("make", PLANTED, ids=lambda make: make.__name__)
def test_a_kernel_that_is_not_what_it_seems_is_refused(make: Any) -> None:
    writes, says = PLANTED[make]
    program = kernel_step()
    verify(program, after="nothing")
    momentum = next(node for (_, key), node in program.inputs(Role.OPT_STATE).items() if key == "m")
    plant(program, make, writes, momentum)
    with pytest.raises(VerifyError, match=says):
        verify(program, after="Planted")


def test_a_kernel_is_not_given_what_it_writes_over_a_second_time() -> None:
    program = kernel_step()
    batch = program.inputs(Role.BATCH)["0", ""]
    value = program.call(aten.sin.default, batch, origin=HERE, before=program.output_node)
    value = program.call(aten.view.default, value, [8], origin=HERE, before=program.output_node)
    again = program.call(aten._unsafe_view.default, value, [8], origin=HERE, before=program.output_node)
    plant(program, lambda b, x, y: [b.forward(aten.add.Tensor, x, y)], (0,), value, again)
    with pytest.raises(VerifyError, match="which lies in what it writes over"):
        verify(program, after="Alias")


def test_the_recorded_value_inside_a_kernel_is_checked() -> None:
    program = kernel_step()
    kernel = next(node for node in program.graph.nodes if isinstance(node.target, Kernel))
    inner = next(node for node in kernel.target.body.nodes if node.op == "call_function")
    with program.fake_mode:
        inner.meta["val"] = torch.empty(3)
    with pytest.raises(VerifyError, match="is recorded as"):
        verify(program, after="Lie")


def test_a_value_that_is_recorded_to_lie_otherwise_than_it_does_is_told_by_its_strides() -> None:
    program = kernel_step()
    kernel = next(node for node in program.graph.nodes if isinstance(node.target, Kernel))
    inner = next(node for node in kernel.target.body.nodes if node.op == "call_function")
    val = inner.meta["val"]
    with program.fake_mode:
        inner.meta["val"] = val.new_empty_strided(val.shape, tuple(2 * stride for stride in val.stride()))
    with pytest.raises(VerifyError, match=r"with strides \(2,\) but gives .* with strides \(1,\)"):
        verify(program, after="Lie")


def test_created_state_is_as_long_as_the_layout_says() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", shape=[3])
    g = b.backward(aten.sin.default, w)
    zeros = b.call(Phase.UPDATE, aten.zeros.default, [3], dtype=torch.float64, module="w")
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, g, module="w")
    program = b.finish({None: b.forward(aten.sum.default, w), param("w"): new, state("w", "m"): zeros})
    bucketed = FormBuckets(1, 1)(program)
    short = bucketed.clone()
    node = target(short, aten.zeros.default)
    node.args = ([3],)
    node.meta["val"] = short.infer(node)
    with pytest.raises(VerifyError, match="each rank must return 16 elements"):
        verify(short, after="Short", reference=program)


def change_mesh(program: Program) -> None:
    program.mesh = Mesh(7)


def change_given(program: Program) -> None:
    program.given["w1"] = (("m", "torch.float64", 3.0),)


def change_batch(program: Program) -> None:
    node = program.inputs(Role.BATCH)["0", ""]
    node.meta["val"] = program.empty([8, 2], torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (change_mesh, "the mesh changed"),
        (change_given, "given at capture has changed"),
        (change_batch, "batch:0|is recorded"),
    ],
)
def test_facts_are_not_a_passes_to_change(edit: Callable[[Program], None], says: str) -> None:
    program = two_layers()
    given = dict(program.given)
    refused(program, edit, says)
    assert program.given == given


def test_a_constant_is_not_written_to() -> None:
    b = Builder()
    w, c = b.input(Role.PARAM, "w", shape=[2]), b.input(Role.CONSTANT, "step.c", shape=[2])
    b.program.constants["step.c"] = torch.ones(2, dtype=torch.float64)
    loss = b.forward(aten.dot.default, w, c)
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, b.backward(aten.sin.default, w), module="w")
    program = b.finish({None: loss, param("w"): new})

    def triple(program: Program) -> None:
        program.constants["step.c"].mul_(3)

    with pytest.raises(VerifyError, match=r"wrote to the constant step\.c"):
        run([Edited(triple)], program)


@dataclass(frozen=True)
class LessRanks(Pass):
    """Says that there is one rank, and drops what the others would send."""

    takes: ClassVar[Stage] = Stage.SHARDED
    gives: ClassVar[Stage] = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        program.mesh = Mesh(1)


@dataclass(frozen=True)
class GoesBack(LessRanks):
    """Gives a stage before the one it takes."""

    gives: ClassVar[Stage] = Stage.BUCKETED


def test_ranks_and_stages_do_not_become_fewer() -> None:
    before = [FormBuckets(2, 1), AverageGradients(Mesh(2))]
    with pytest.raises(VerifyError, match="the layout is for 2 ranks of a mesh of 1"):
        run([*before, LessRanks()], two_layers())
    with pytest.raises(VerifyError, match="GoesBack gives a BUCKETED program, which is a stage before SHARDED"):
        run([*before, GoesBack()], two_layers())


def test_a_pass_that_raises_is_named() -> None:
    with pytest.raises(VerifyError, match="Edited failed: KeyError: 'x'"):
        run([Edited(lambda _: {}["x"])], two_layers())
    assert_same_step(run(default_passes(Config(3, 1), Mesh(2)), two_layers()).program, two_layers())


def test_a_kernel_whose_body_a_later_pass_changed_is_looked_at() -> None:
    def lie(program: Program) -> None:
        kernel = next(node for node in program.graph.nodes if isinstance(node.target, Kernel))
        inner = next(node for node in kernel.target.body.nodes if node.op == "call_function")
        with program.fake_mode:
            inner.meta["val"] = torch.empty(3)

    with pytest.raises(VerifyError, match="is recorded as"):
        run([EditedLast(lie)], kernel_step())


def test_what_was_refused_once_is_refused_again() -> None:
    """A verifier goes on from what it has accepted, not from what it has seen."""
    captured = two_layers()
    verifier = Verifier(captured)
    program = verifier.copy()
    loss = program.results()[0]
    double = program.call(aten.mul.Tensor, loss, 2, origin=HERE, before=program.output_node)
    program.set_results([double, *program.results()[1:]], program.outputs)
    for _ in range(2):
        with pytest.raises(VerifyError, match="changed what the step computes: the loss"):
            verifier.check(program, after="Double")
    double.replace_all_uses_with(loss)
    verifier.check(program, after="Halve")


def test_a_reader_is_looked_at_though_its_source_does_not_list_it() -> None:
    def chain(b: Builder, x: fx.Node) -> fx.Node:
        return b.forward(aten.neg.default, b.forward(aten.exp.default, b.forward(aten.sinh.default, x)))

    def change_unseen(program: Program) -> None:
        node = target(program, aten.sinh.default)
        node.users.clear()
        node.target = aten.tanh.default

    refused(step(chain), change_unseen, "changed what the step computes: the loss")


def test_inputs_that_trade_places_are_seen_though_they_have_an_origin() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", shape=[2])
    batch = [b.input(Role.BATCH, str(i), shape=[3]) for i in range(2)]
    for node in batch:
        node.meta["origin"] = HERE
    loss = b.forward(aten.sum.default, b.forward(aten.div.Tensor, *batch))
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, b.backward(aten.sin.default, w), module="w")

    def trade(program: Program) -> None:
        first, second = program.inputs(Role.BATCH).values()
        first.meta["input"], second.meta["input"] = second.meta["input"], first.meta["input"]

    refused(b.finish({None: loss, param("w"): new}), trade, "changed what the step computes: the loss")


def test_a_call_that_becomes_another_kind_of_node_is_seen() -> None:
    def retype(program: Program) -> None:
        target(program, aten.exp.default).op = "get_attr"

    refused(step(lambda b, x: b.forward(aten.exp.default, x)), retype, "is a get_attr")


def test_a_pass_that_edits_a_kernel_edits_its_own_copy_and_is_refused() -> None:
    program = kernel_step()
    before = program.text()

    def subtract(program: Program) -> None:
        kernel = next(node.target for node in program.graph.nodes if isinstance(node.target, Kernel))
        for node in kernel.body.nodes:
            if node.target is aten.add.Tensor:
                node.target = aten.sub.Tensor

    with pytest.raises(VerifyError, match="changed what the step computes"):
        run([EditedLast(subtract)], program)
    assert program.text() == before


def test_a_sum_is_of_as_many_ranks_as_the_mesh_has_now() -> None:
    def sum_of_losses(program: Program) -> None:
        loss, output, here = program.results()[0], program.output_node, Origin(Phase.UPDATE, "")
        start = program.call(ops.all_reduce, loss, "sum", "data", origin=HERE, before=output)
        arrived = program.call(ops.wait, start, origin=here, before=output)
        one = program.call(aten.div.Tensor, arrived, 1, origin=here, before=output)
        program.set_results([one, *program.results()[1:]], program.outputs)

    with pytest.raises(VerifyError, match="changed what the step computes: the loss"):
        run([Edited(sum_of_losses), FormBuckets(2, 1), AveragedButForTheLoss()], two_layers())


def test_a_value_that_was_edited_is_found_by_a_proof_from_nothing() -> None:
    program = step(lambda b, x: b.forward(aten.exp.default, x))
    edited = run([Tidy()], program).program
    target(edited, aten.exp.default).meta["val"].unsqueeze_(0)
    with pytest.raises(VerifyError, match="is recorded as"):
        verify(edited, after="an edit", reference=program)


@dataclass(frozen=True)
class AveragedButForTheLoss(Pass):
    takes: ClassVar[Stage] = Stage.BUCKETED
    gives: ClassVar[Stage] = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        loss = program.results()[0]
        AverageGradients(Mesh(2)).rewrite(program)
        program.set_results([loss, *program.results()[1:]], program.outputs)
        remove_dead(program)


def norm_step() -> Program:
    """Two parameters in one bucket with padding between, whose gradients are clipped by their norm."""
    return accumulated(two_layers(), 2, limit=0.1)


@pytest.mark.parametrize(
    "what",
    [
        lambda p, zero: p.call(aten.add.Tensor, zero, 1.0, origin=HERE, before=zero.next),
        lambda p, zero: p.call(aten.div.Tensor, zero, zero, origin=HERE, before=zero.next),
        lambda p, zero: p.call(aten.mul.Tensor, zero, math.inf, origin=HERE, before=zero.next),
        lambda p, zero: p.call(aten.div.Tensor, zero, 0, origin=HERE, before=zero.next),
    ],
    ids=["plus one", "zero by zero", "times infinity", "by zero"],
)
def test_padding_between_gradients_is_zero_and_not_something_made_of_it(what: Any) -> None:
    def spoil(program: Program) -> None:
        zero = target(program, aten.full.default)
        made = what(program, zero)
        for user in [user for user in zero.users if user is not made]:
            user.replace_input_with(zero, made)

    with pytest.raises(VerifyError, match=r"gradient_norm|must stay zero"):
        run([FormBuckets(2, 10**6), EditedBuckets(spoil)], norm_step())


def test_a_part_of_a_part_is_not_put_together_to_the_part() -> None:
    terms = Terms()
    x = terms.input("x", (8,), torch.float32, varies=False)
    part = terms.shard(x, (4,))
    assert terms.whole(terms.shard(part, (2,)), (4,)) is None
    assert terms.whole(terms.shard(terms.reshape(terms.reshape(part, (2, 2)), (4,)), (2,)), (4,)) is None


def test_a_choice_that_always_falls_on_one_is_that_one_only_if_it_is_as_large() -> None:
    """``where(True, x[1], y[4])`` has four elements, and their sum is four times the one."""
    b = Builder()
    p, x = b.input(Role.PARAM, "p", shape=[1]), b.input(Role.BATCH, "0", shape=[4])
    always = b.forward(aten.full.default, [], True, dtype=torch.bool)
    chosen = b.forward(aten.where.self, always, p, x)
    loss = b.forward(aten.sum.default, chosen)
    g = b.backward(aten.mul.Tensor, p, loss)
    new = b.call(Phase.UPDATE, aten.sub.Tensor, p, g, module="p")
    captured = b.finish({None: loss, param("p"): new})
    wrong = captured.clone()
    (total,) = wrong.graph.find_nodes(op="call_function", target=aten.sum.default)
    total.replace_input_with(operand(total), wrong.inputs(Role.PARAM)["p", ""])
    with pytest.raises(VerifyError, match="changed what the step computes"):
        verify(wrong, after="test", reference=captured)
    right = captured.clone()
    verify(right, after="test", reference=captured)
