"""Every rule, broken by hand: the error names the pass to blame, the node, and the user's line."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from tests.programs import Builder, param, state, two_layers
from zgraph import ops
from zgraph.codegen.kernel import Kernel
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Input, Mesh, Origin, Phase, Program, Role, Stage, operand
from zgraph.verify import verify

aten = torch.ops.aten


def lowered(zero: int = 3) -> Program:
    """A program with everything that rules are about."""
    return run(default_passes(Config(zero, 1), Mesh(2)), two_layers()).program


def first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def kernel_of(program: Program, index: int) -> fx.Node:
    return [node for node in program.graph.nodes if isinstance(node.target, Kernel)][index]


def read_too_early(program: Program) -> None:
    node = first(program, aten.mm.default)
    node.append(operand(node))


def forget_meaning(program: Program) -> None:
    del next(iter(program.graph.nodes)).meta["input"]


def forget_value(program: Program) -> None:
    del first(program, aten.mm.default).meta["val"]


def forget_origin(program: Program) -> None:
    del first(program, aten.mm.default).meta["origin"]


def hold_an_attribute(program: Program) -> None:
    with program.graph.inserting_before(first(program, aten.mm.default)):
        program.graph.create_node("get_attr", "weight")


def never_wait(program: Program) -> None:
    wait = program.results()[0]
    program.set_results([operand(operand(wait)), *program.results()[1:]], program.outputs)
    program.graph.erase_node(wait)


def wait_twice(program: Program) -> None:
    node = first(program, ops.wait)
    program.call(ops.wait, operand(node), origin=node.meta["origin"], before=node.next)


def read_before_arrival(program: Program) -> None:
    node = first(program, ops.all_gather)
    program.call(aten.neg.default, node, origin=node.meta["origin"], before=node.next)


def return_before_arrival(program: Program) -> None:
    results = program.results()
    program.set_results([operand(results[0]), *results[1:]], program.outputs)


def wait_for_nothing(program: Program) -> None:
    node = first(program, aten.mm.default)
    program.call(ops.wait, node, origin=node.meta["origin"], before=node.next)


def send(program: Program, *views: tuple[Any, ...]) -> None:
    node = first(program, ops.all_gather)
    for view, *args in views:
        made = program.call(view, operand(node), *args, origin=node.meta["origin"], before=node)
        node.replace_input_with(operand(node), made)


def send_what_has_gaps(program: Program) -> None:
    send(program, (aten.slice.Tensor, 0, 0, 2**62, 2))


def send_what_lies_in_another_order(program: Program) -> None:
    send(program, (aten.view.default, [2, -1]), (aten.t.default,))


def read_what_is_overwritten(program: Program) -> None:
    kernel = kernel_of(program, 0)
    flat = program.inputs(Role.PARAM)["bucket1", ""]
    program.call(aten.neg.default, flat, origin=kernel.meta["origin"], before=program.output_node)


def read_a_view_of_what_is_overwritten(program: Program) -> None:
    kernel = kernel_of(program, 0)
    flat = program.inputs(Role.PARAM)["bucket1", ""]
    view = program.call(aten.slice.Tensor, flat, 0, 0, 2, origin=kernel.meta["origin"], before=kernel)
    program.call(aten.neg.default, view, origin=kernel.meta["origin"], before=program.output_node)


def return_what_is_overwritten(program: Program) -> None:
    old = program.inputs(Role.OPT_STATE)["bucket1", "m"]
    program.set_results([*program.results(), old], [*program.outputs, state("bucket1", "older")])


BROKEN: dict[Callable[[Program], None], tuple[str, bool]] = {
    read_too_early: (r"mm\w* \(aten.mm.default\) reads \w+ before it is computed", True),
    forget_meaning: (r"param\w* \(placeholder\) is an input without a meaning", True),
    forget_value: (r"mm\w* \(aten.mm.default\) has no recorded value or origin", True),
    forget_origin: (r"mm\w* \(aten.mm.default\) has no recorded value or origin", True),
    hold_an_attribute: (r"weight \(get_attr\) is a get_attr", False),
    never_wait: (r"all_reduce.* is waited for 0 times instead of once", True),
    wait_twice: (r"all_gather.* is waited for 2 times instead of once", True),
    read_before_arrival: (r"neg\w* \(aten.neg.default\) reads all_gather\w+ before it has arrived", True),
    return_before_arrival: (r"output \(output\) reads all_reduce\w* before it has arrived", False),
    wait_for_nothing: (r"waits for a value that no collective and no transfer produces", True),
    send_what_has_gaps: (r"all_gather.* sends f64\[\d+\] with strides \[2\], not contiguous", True),
    send_what_lies_in_another_order: (
        r"all_gather.* sends f64\[\d+, 2\] with strides \[1, \d+\], not contiguous",
        True,
    ),
    read_what_is_overwritten: (r"neg\w* \(aten.neg.default\) reads what update_bucket1 has written over", True),
    read_a_view_of_what_is_overwritten: (
        r"neg\w* \(aten.neg.default\) reads what update_bucket1 has written over",
        True,
    ),
    return_what_is_overwritten: (r"update_bucket1.* writes over what is returned as opt_state:bucket1:older", True),
}


@pytest.mark.parametrize("break_rule", BROKEN, ids=lambda function: function.__name__)
def test_a_broken_rule_is_refused_with_pass_node_and_line(break_rule: Callable[[Program], None]) -> None:
    says, has_line = BROKEN[break_rule]
    program = lowered()
    break_rule(program)
    with pytest.raises(VerifyError, match=rf"MyPass left a program that breaks a rule: .*{says}") as refusal:
        verify(program, after="MyPass")
    assert (refusal.value.where or "").startswith("model.py:") == has_line
    assert refusal.value.fix


def test_what_a_gather_writes_over_may_not_be_read_later() -> None:
    program = lowered(zero=1)
    flat = program.inputs(Role.PARAM)["bucket1", ""]
    verify(program, after="MyPass")
    node = program.call(aten.neg.default, flat, origin=Origin(Phase.UPDATE), before=program.output_node)
    with pytest.raises(VerifyError, match=rf"{node.name} .*reads what \w+ has written over"):
        verify(program, after="MyPass")


def test_results_fit_what_they_replace() -> None:
    def results_of(what: Input, shape: list[int] | None, dtype: torch.dtype = torch.float64) -> Program:
        b = Builder()
        w, lr = b.input(Role.PARAM, "w", shape=[3]), b.input(Role.HYPER, "lr")
        loss = b.forward(aten.sum.default, w)
        if shape is None:
            return b.finish({None: loss, what: b.call(Phase.UPDATE, operator.neg, lr)})
        return b.finish({None: loss, what: b.call(Phase.UPDATE, aten.full.default, shape, 1, dtype=dtype)})

    verify(results_of(param("w"), [3]), after="MyPass")
    verify(results_of(state("w", "created"), [7]), after="MyPass")
    for program, says in (
        (results_of(param("w"), [4]), r"MyPass: the new value of param:w is f64\[4\], but it is f64\[3\]"),
        (results_of(param("w"), [3], torch.float32), r"the new value of param:w is f32\[3\], but it is f64\[3\]"),
        (results_of(param("w"), None), r"the new value of param:w is float, but it is f64\[3\]"),
        (results_of(Input(Role.HYPER, "lr"), None), "a result is the new value of hyper:lr, which is not state"),
        (results_of(Input(Role.BATCH, "0"), [3]), "a result is the new value of batch:0, which is not state"),
    ):
        with pytest.raises(VerifyError, match=says):
            verify(program, after="MyPass")


def test_results_are_as_many_as_declared_and_each_another_state() -> None:
    program = two_layers()
    program.set_results(program.results()[:-1], program.outputs)
    with pytest.raises(VerifyError, match="MyPass: 4 results for 5 declared outputs"):
        verify(program, after="MyPass")
    program = two_layers()
    program.set_results(program.results(), [*program.outputs[:-1], param("w1")])
    with pytest.raises(VerifyError, match="MyPass: two results are the new value of param:w1"):
        verify(program, after="MyPass")


@pytest.mark.parametrize("stage", [Stage.BUCKETED, Stage.SHARDED, Stage.SCHEDULED, Stage.INPLACE])
def test_a_program_in_buckets_has_a_layout(stage: Stage) -> None:
    program = two_layers()
    program.stage = stage
    with pytest.raises(VerifyError, match=f"MyPass: the program is {stage.name} but has no layout"):
        verify(program, after="MyPass")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_the_passes_leave_is_in_order_at_every_stage(zero: int) -> None:
    program = two_layers()
    verify(program, after="capture")
    for p in default_passes(Config(zero, 1), Mesh(2)):
        program = p(program)
        verify(program, after=p.name)
