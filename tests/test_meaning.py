"""A program means what it computes on all ranks, and the verifier sees through every way of moving data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from tests.programs import Builder, one_layer, param, two_layers
from zgraph import Axiom
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.meaning import interpret
from zgraph.passes import FormBuckets, Tidy, default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Input, Mesh, Phase, Program, Role, Stage
from zgraph.terms import Terms, show
from zgraph.verify import Verifier, verify

aten = torch.ops.aten


def meaning(program: Program) -> str:
    results = interpret(program, Terms(), {}).results
    shown = [show(result, 5).replace("operator.", "") for result in results]
    return "\n".join(f"{what or 'loss'} = {text}" for what, text in zip(program.outputs, shown, strict=True))


def test_the_update_reads_mean_gradients_and_the_loss_is_a_mean() -> None:
    assert_expected_inline(
        meaning(one_layer()),
        """\
loss = mean(sum(mm(batch:0, param:w)))
param:w = reshape(add.Tensor(param:w, add.Tensor(opt_state:w:m, mean(mm(..., ...))), alpha=neg(hyper:lr)), [2, 3])
opt_state:w:m = reshape(add.Tensor(opt_state:w:m, mean(mm(permute(batch:0, [1, 0]), splat(..., [4, 3])))), [2, 3])""",
    )


def test_a_number_copied_into_a_bucket_is_that_number_in_each_place() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", shape=[])
    zero = b.call(Phase.UPDATE, aten.zeros.default, [], dtype=torch.float32, module="w")
    cleared = b.call(Phase.UPDATE, aten.copy.default, w, zero, module="w")
    new = b.call(Phase.UPDATE, aten.add.Tensor, cleared, b.backward(aten.sin.default, w), module="w")
    program = b.finish({None: b.forward(aten.cos.default, w), param("w"): new})
    run(default_passes(Config(3), Mesh(2)), program)


MOVES: list[tuple[str, Any]] = [
    ("view and back", lambda b, x: b.forward(aten.view.default, b.forward(aten.view.default, x, [6]), [2, 3])),
    ("transpose and back", lambda b, x: b.forward(aten.t.default, b.forward(aten.transpose.int, x, 0, 1))),
    ("unsqueeze, squeeze", lambda b, x: b.forward(aten.squeeze.dim, b.forward(aten.unsqueeze.default, x, 1), 1)),
    ("expand by nothing", lambda b, x: b.forward(aten.expand.default, x, [2, 3])),
    ("copies", lambda b, x: b.forward(aten.clone.default, b.forward(aten.copy.default, x, x))),
    ("a cast to the same dtype", lambda b, x: b.forward(aten._to_copy.default, x, dtype=torch.float64)),
    ("a slice of all", lambda b, x: b.forward(aten.slice.Tensor, x, 1, 0, 9223372036854775807)),
    (
        "flat, cut and joined",
        lambda b, x: b.forward(
            aten.view.default,
            b.forward(
                aten.cat.default,
                [
                    b.forward(aten.slice.Tensor, b.forward(aten.view.default, x, [6]), 0, 0, 4),
                    b.forward(aten.slice.Tensor, b.forward(aten.view.default, x, [6]), 0, -2, 6),
                ],
            ),
            [2, 3],
        ),
    ),
]


def loss_of(move: Any) -> Program:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[2, 3]), b.input(Role.BATCH, "0", shape=[2, 3])
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, w, move(b, x)))
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, b.backward(aten.sin.default, x), module="w")
    return b.finish({None: loss, param("w"): new})


@pytest.mark.parametrize(("name", "move"), MOVES, ids=[name.replace(" ", "_") for name, _ in MOVES])
def test_data_that_moves_and_comes_back_is_the_same(name: str, move: Any) -> None:
    verify(loss_of(move), after=name, reference=loss_of(lambda _, x: x))


LOSSY: list[tuple[str, Any]] = [
    ("a cast there and back", lambda b, x: b.forward(
        aten._to_copy.default, b.forward(aten._to_copy.default, x, dtype=torch.float32), dtype=torch.float64)),
    ("rows exchanged", lambda b, x: b.forward(aten.flip.default, x, [0])),
    ("reshaped across rows", lambda b, x: b.forward(
        aten.reshape.default, b.forward(aten.t.default, x), [2, 3])),
    ("a part twice", lambda b, x: b.forward(aten.view.default, b.forward(aten.cat.default, [
        b.forward(aten.slice.Tensor, b.forward(aten.view.default, x, [6]), 0, 0, 3)] * 2), [2, 3])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "move"), LOSSY, ids=[name.replace(" ", "_") for name, _ in LOSSY])
def test_what_does_not_come_back_whole_is_refused(name: str, move: Any) -> None:
    with pytest.raises(VerifyError, match=f"{name} changed what the step computes: the loss"):
        verify(loss_of(move), after=name, reference=loss_of(lambda _, x: x))


@dataclass(frozen=True)
class ScaleLoss(Pass):
    """A mistake to read about: the loss doubles."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        loss = program.results()[0]
        double = program.call(aten.mul.Tensor, loss, 2, origin=loss.meta["origin"], before=loss.next)
        program.set_results([double, *program.results()[1:]], program.outputs)


def test_an_error_shows_where_meaning_parted_what_was_expected_and_what_is_around() -> None:
    with pytest.raises(VerifyError) as refusal:
        run([Tidy(), ScaleLoss()], two_layers())
    assert_expected_inline(
        str(refusal.value),
        """\
ScaleLoss changed what the step computes: the loss
  node:     mul_tensor, made by ScaleLoss
  expected: sum(mm(mm(batch:0, param:w1), param:w2))
  found:    mul.Tensor(sum(mm(mm(batch:0, param:w1), param:w2)), 2)
  within:   mean(mul.Tensor(sum(...), 2))
  around:
      %8: f64[4, 1] = aten.mm.default(%7, %1)
      %9: f64[] = aten.sum.default(%8)
    > %10: f64[] = aten.mul.Tensor(%9, 2)
      %11: f64[4, 1] = aten.ones_like.default(%8)
      %12: f64[3, 4] = aten.t.default(%7)
  at:  model.py:6 (forward)
  fix: this is a mistake in the pass; nothing was run""",
    )


@dataclass(frozen=True)
class DropOnes(Pass):
    """Needs an equation of its own: mul(a, 1) = a."""

    takes = gives = Stage.CAPTURED
    assumes = (Axiom("mul(a, 1) = a", aten.mul.Tensor, lambda _, term: term.args[0] if term.args[1] == 1 else None),)

    def rewrite(self, program: Program) -> None:
        for node in program.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            if node.args[1] == 1:
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)


@dataclass(frozen=True)
class DropOnesUnsaid(DropOnes):
    """The same, without saying so."""

    assumes = ()


def times_one() -> Program:
    return loss_of(lambda b, x: b.forward(aten.mul.Tensor, x, 1))


def test_an_equation_of_a_pass_is_taken_on_trust_if_it_is_stated_and_only_then() -> None:
    result = run([DropOnes(), *default_passes(Config(3, 1), Mesh(2))], times_one())
    assert result.records[0].assumes == ("mul(a, 1) = a",)
    assert all(not record.assumes for record in result.records[1:])
    with pytest.raises(VerifyError, match="DropOnesUnsaid changed what the step computes"):
        run([DropOnesUnsaid()], times_one())


def test_a_verifier_that_goes_on_from_its_last_check_finds_what_a_new_one_does() -> None:
    captured = two_layers()
    verifier, program = Verifier(captured), captured.clone()
    for p in (Tidy(), FormBuckets(2, 1)):
        with program.made_by(p.name):
            p.rewrite(program)
        program.stage = p.gives
        verifier.check(program, after=p.name)
    kept = verifier._found
    assert kept is not None
    fresh = Verifier(captured)
    fresh.check(program, after="all")
    assert fresh._found is not None
    shown = [
        {node.name: show(found.values[node]) for node in program.graph.nodes if node.op != "output"}
        for found in (kept, fresh._found)
    ]
    assert shown[0] == shown[1]


def test_a_constant_that_only_the_update_reads_is_known_by_its_values() -> None:
    def program(value: float) -> Program:
        b = Builder()
        w = b.input(Role.PARAM, "w", shape=[2])
        c = b.input(Role.CONSTANT, "update.c", shape=[])
        b.program.constants["update.c"] = torch.tensor(value, dtype=torch.float64)
        loss = b.forward(aten.sum.default, w)
        g = b.backward(aten.sin.default, w)
        step = b.call(Phase.UPDATE, aten.mul.Tensor, g, c, module="w")
        return b.finish({None: loss, param("w"): b.call(Phase.UPDATE, aten.sub.Tensor, w, step, module="w")})

    verify(program(0.5), after="nothing", reference=program(0.5))
    with pytest.raises(VerifyError, match="the new value of param:w"):
        verify(program(0.25), after="something", reference=program(0.5))


def test_an_input_that_the_step_does_not_have_is_refused() -> None:
    program = two_layers()
    program.placeholder(Input(Role.HYPER, "momentum"), 0.5, before=next(iter(program.graph.nodes)))
    with pytest.raises(VerifyError, match="reads hyper:momentum, which is not an input of the step"):
        verify(program, after="MyPass", reference=two_layers())
