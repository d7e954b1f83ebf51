"""Updates overwrite the state they replace, and still compute what they did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import Builder, assert_same_step, divide, few_examples, param, two_layers, values_for
from tests.recipes import Recipe, Reshuffle, build, recipes
from zgraph import ops
from zgraph.config import Config
from zgraph.lockstep import run_ranks
from zgraph.passes import default_passes
from zgraph.pipeline import Pass
from zgraph.pipeline import run as run_passes
from zgraph.program import Input, Mesh, Phase, Program, Role, Stage

aten = torch.ops.aten


def lowered(program: Program, zero: int, world: int, bucket_bytes: int = 1, prefetch: int = 1) -> Program:
    return run_passes(default_passes(Config(zero, bucket_bytes, prefetch), Mesh(world)), program).program


def updates(program: Program) -> str:
    """The update and what is returned, kernels' bodies indented."""
    lines = zip(program.text().splitlines(), program.graph.nodes, strict=True)
    kept = [line for line, n in lines if n.op != "call_function" or n.meta["origin"].phase is Phase.UPDATE]
    return "\n".join(kept).replace("{", "{\n    ").replace("; ", "\n    ").replace("}(", "\n}(")


def test_a_bucket_is_updated_by_one_kernel_that_writes_over_its_state() -> None:
    assert_expected_inline(
        updates(lowered(two_layers(), zero=3, world=2)),
        """\
%0: f64[16] = input param:bucket0
%1: f64[16] = input opt_state:bucket0:m
%2: f64[16] = input param:bucket1
%3: f64[16] = input opt_state:bucket1:m
%4: f64[4, 2] = input batch:0
%5: float = input hyper:group_of_w1.lr
%6: float = input hyper:group_of_w2.lr
%7: float = operator.neg(%5)
%8: float = operator.neg(%6)
%38: (f64[16], f64[16]) = update_bucket1{
    %4 = aten.add.Tensor(%0, %1)
    %5 = aten.add.Tensor(%2, %4, alpha=%3)
    return [%4, %5] over [0, 2]
}(%3, %37, %2, %8)
%39: f64[16] = operator.getitem(%38, 0)
%40: f64[16] = operator.getitem(%38, 1)
%42: (f64[16], f64[16]) = update_bucket0{
    %4 = aten.add.Tensor(%0, %1)
    %5 = aten.add.Tensor(%2, %4, alpha=%3)
    return [%4, %5] over [0, 2]
}(%1, %41, %0, %7)
%43: f64[16] = operator.getitem(%42, 0)
%44: f64[16] = operator.getitem(%42, 1)
return [%46, %44, %43, %40, %39]  # loss, param:bucket0, opt_state:bucket0:m, param:bucket1, opt_state:bucket1:m""",
    )


def test_updated_parameters_are_gathered_into_the_buffer_that_they_live_in() -> None:
    program = lowered(two_layers(), zero=1, world=2)
    params = program.inputs(Role.PARAM)
    for node in program.graph.find_nodes(op="call_function", target=ops.all_gather_into):
        assert node.kwargs == {"out": params[node.meta["origin"].module, ""]}
    assert not program.graph.find_nodes(op="call_function", target=ops.all_gather)


def test_a_kernel_stands_behind_the_last_read_of_what_it_writes_over() -> None:
    @dataclass(frozen=True)
    class UpdateFirst(Pass):
        """Issue the update as soon as its gradient is there."""

        takes, gives = Stage.SCHEDULED, Stage.SCHEDULED

        def rewrite(self, program: Program) -> None:
            calls = [node for node in program.graph.nodes if node.op == "call_function"]
            needed = {program.results()[1]}
            for node in reversed(calls):
                if node in needed:
                    needed.update(node.all_input_nodes)
            for node in sorted(calls, key=lambda node: node not in needed):
                program.output_node.prepend(node)

    for zero, world in ((0, 1), (0, 2), (1, 2)):
        program = run_passes(default_passes(Config(zero), Mesh(world), own=[UpdateFirst()]), two_layers()).program
        assert_same_step(program, two_layers())


def test_any_order_will_do_to_start_from() -> None:
    for seed in range(10):
        for zero in range(4):
            own = [Reshuffle(stage, stage, seed) for stage in (Stage.SCHEDULED, Stage.INPLACE)]
            program = run_passes(default_passes(Config(zero, 1), Mesh(2), own=own), two_layers()).program
            assert_same_step(program, two_layers())


def test_a_view_of_an_updated_vector_may_stand_amid_the_update() -> None:
    @dataclass(frozen=True)
    class ViewUpdate(Pass):
        """View a bucket's new momentum right behind it, before the parameter that it moves."""

        read: bool

        takes, gives = Stage.SCHEDULED, Stage.SCHEDULED

        def rewrite(self, program: Program) -> None:
            moment = program.results()[program.outputs.index(Input(Role.OPT_STATE, "bucket0", "m"))]
            origin = replace(moment.meta["origin"], module="")
            view = program.call(aten.view.default, moment, [2, -1], origin=origin, before=moment.next)
            if self.read:
                program.call(aten.sum.default, view, origin=origin, before=view.next)

    for read in (False, True):
        for zero in range(4):
            passes = default_passes(Config(zero, 1), Mesh(2), own=[ViewUpdate(read)])
            assert_same_step(run_passes(passes, two_layers()).program, two_layers())


def test_results_that_lie_in_an_input_become_copies_of_it() -> None:
    b = Builder()
    w, x, old = (
        b.input(role, name, shape=[3]) for role, name in ((Role.PARAM, "w"), (Role.BATCH, "0"), (Role.BUFFER, "last"))
    )
    kept, _ = (b.input(Role.BUFFER, name, shape=[3]) for name in ("kept", "seen"))
    new = b.call(Phase.UPDATE, aten.add.Tensor, w, b.backward(aten.sin.default, w), module="w")
    results: dict[Input | None, Any] = {None: b.forward(aten.select.int, old, 0, 0), param("w"): new}
    results |= {Input(Role.BUFFER, "last"): b.forward(aten.detach.default, x), Input(Role.BUFFER, "kept"): kept}
    results[Input(Role.BUFFER, "seen")] = b.forward(aten.view.default, w, [3])
    program = b.finish(results)
    for zero, world in ((0, 1), (0, 2), (3, 2)):
        after = lowered(program, zero, world)
        assert_same_step(after, program)
        by_name = {what and what.name: result for what, result in zip(after.outputs, after.results(), strict=True)}
        assert by_name["last"].target is aten.clone.default
        assert by_name["kept"] is after.inputs(Role.BUFFER)["kept", ""]


steps = st.tuples(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200]), st.integers(0, 3))


@few_examples(25)
@given(steps, st.booleans())
def test_any_step_in_place_is_the_captured_one_whenever_messages_travel(
    drawn: tuple[Recipe, int, int, int, int], late: bool
) -> None:
    recipe, *options = drawn
    captured = build(recipe)
    assert_same_step(lowered(captured, *options), captured, late=late)


@few_examples(15)
@given(steps)
def test_new_state_lies_where_the_old_one_lay(drawn: tuple[Recipe, int, int, int, int]) -> None:
    recipe, *options = drawn
    captured = build(recipe)
    program = lowered(captured, *options)
    inputs = divide(program, values_for(captured, world=program.mesh.size))
    results = run_ranks(program, inputs, overwrite=True)
    for mine, theirs in zip(results, inputs, strict=True):
        for what, value in mine.items():
            if what is not None and what.role in (Role.PARAM, Role.OPT_STATE) and what in theirs:
                old = theirs[what]
                assert isinstance(value, torch.Tensor)
                assert isinstance(old, torch.Tensor)
                assert value.dim() == 0 or value.data_ptr() == old.data_ptr(), f"{what} is new memory"
