"""Which bytes a step holds, of what kind and when: by hand, and of a captured step on every stage of sharding."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.models import CASES
from tests.programs import Builder, param, rewritten, two_layers
from tests.reference import slow
from zgraph import ops, placement
from zgraph.capture import capture
from zgraph.config import Config
from zgraph.footprint import Footprint, Holding, Kind, footprint, with_scratch
from zgraph.liveness import alive_bytes, held_bytes
from zgraph.lower import Lowered, lower
from zgraph.machines import preset, this_cpu
from zgraph.placement import place
from zgraph.predict import compiled_bytes, predict
from zgraph.program import OF_PARAMETERS, Input, Mesh, Program, Role

aten = torch.ops.aten


def given_bytes(program: Program) -> int:
    """Bytes of all inputs."""
    vals = (node.meta["val"] for node, _ in program.placeholders())
    return sum(val.nbytes for val in vals if isinstance(val, torch.Tensor))


def test_bytes_at_every_position_are_those_worked_out_by_hand() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4])  # 32 bytes, throughout
    a = b.forward(aten.neg.default, x)
    view = b.forward(aten.view.default, a, [2, 2])
    c = b.forward(aten.exp.default, x)
    loss = b.forward(aten.sum.default, view)
    program = b.finish({None: loss, Input(Role.BUFFER, "c"): c})
    assert footprint(program).alive_bytes == [32, 64, 64, 96, 104, 72]
    assert footprint(program).peak_bytes == 104
    assert footprint(program).peak_position == 4
    assert [h.what for h in footprint(program).held_at(4)] == [
        "batch:0",
        "aten.neg.default",
        "aten.exp.default",
        "aten.sum.default",
    ]


def test_one_of_several_results_is_called_what_made_it() -> None:
    b = Builder()
    norm = b.forward(aten.native_layer_norm.default, b.input(Role.BATCH, "0", shape=[6, 4]), [4], None, None, 1e-5)
    loss = b.forward(aten.sum.default, b.forward(operator.getitem, norm, 0), module="top")
    found = footprint(b.finish({None: loss})).holdings
    assert [(h.what, h.num_bytes) for h in found[1:]] == [
        ("aten.native_layer_norm.default", 96),
        ("aten.native_layer_norm.default", 192),
        ("aten.sum.default", 8),
    ]
    assert found[-1].module == "top"
    assert found[-1].source == "model.py:4 (forward)"


def test_what_is_written_over_its_input_needs_no_memory_of_its_own() -> None:
    program = rewritten(two_layers(), 0, 1)
    found = footprint(program)
    assert not [h for h in found.holdings if h.what == "update"]
    assert found.alive_bytes[0] == given_bytes(program)


def test_what_other_ranks_send_is_communication_and_their_sum_a_gradient() -> None:
    program = rewritten(two_layers(), 3, 4)
    for staged in (True, False):
        of = footprint(program, staged=staged).holdings
        reductions = [h for h in of if h.what == "_c10d_functional.reduce_scatter_tensor.default"]
        gradients = [h for h in reductions if h.kind is Kind.GRADIENTS]
        received = [h for h in reductions if h.kind is Kind.COMMUNICATION]
        assert len(gradients) == len(program.layout.buckets)  # type: ignore[union-attr]
        assert len(reductions) == len(gradients) + len(received)
        assert sum(h.num_bytes for h in received) == (2 * sum(h.num_bytes for h in gradients) if staged else 0)
        assert all(h.last < g.last for h, g in zip(received, gradients, strict=False))


def test_a_value_that_backward_reads_is_an_activation_and_one_that_it_does_not_is_none() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", shape=[3]), b.input(Role.BATCH, "0", shape=[3])
    kept, passing = b.forward(aten.sin.default, x), b.forward(aten.cos.default, x)
    loss = b.forward(aten.sum.default, b.forward(aten.mul.Tensor, passing, kept))
    new = b.backward(aten.mul.Tensor, w, kept)
    kinds = {h.what: h.kind for h in footprint(b.finish({None: loss, param("w"): new})).holdings}
    assert kinds["aten.sin.default"] is Kind.ACTIVATIONS
    assert kinds["aten.cos.default"] is Kind.TEMPORARIES
    assert kinds["param:w"] is Kind.PARAMS
    assert kinds["batch:0"] is Kind.BUFFERS


# Captured steps

OPTIONS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero": stage} for stage in range(4)},
    "bf16": {"zero": 3, "precision": "bf16"},
    "clipped": {"zero": 3, "clip_norm": 1.0},
    "accumulated": {"zero": 2, "accumulate": 2},
    "kept": {"zero": 3, "accumulate": 2, "keep_gathered": True},
}
WORLD = 4


@functools.cache
def lowered(name: str) -> Lowered:
    case = CASES["gpt"]
    config = Config.from_options({"bucket_bytes": "8KiB", **OPTIONS[name]})
    model, batch = case.model(), case.batches(1)[0]
    captured = capture(model, torch.optim.AdamW(model.parameters()), *batch, config=config)
    return lower(captured, config, Mesh(WORLD), None, ())


def at_start(found: Footprint, kind: Kind) -> int:
    return sum(
        h.num_bytes for h in found.holdings if h.kind is kind and h.first == 0 and h.last == len(found.alive_bytes) - 1
    )


names = pytest.mark.parametrize("name", ["zero 3", "kept", *slow(*(n for n in OPTIONS if n not in ("zero 3", "kept")))])


@names
def test_kinds_add_up_to_what_is_alive_and_that_is_inputs_and_temporaries(name: str) -> None:
    for program, staged in itertools.product(lowered(name).programs, (True, False)):
        found = footprint(program, staged=staged)
        by_kind = [sum(at) for at in zip(*found.by_kind().values(), strict=True)]
        assert by_kind == list(found.alive_bytes)
        temporaries = [num_bytes for _, num_bytes in alive_bytes(program, staged=staged)]
        assert by_kind == [given_bytes(program) + num_bytes for num_bytes in temporaries]
        assert sum(found.peak_by_kind().values()) == found.peak_bytes == max(by_kind)
        assert [h.first for h in found.holdings] == sorted(h.first for h in found.holdings)


@names
def test_stored_bytes_are_exactly_those_of_the_layout(name: str) -> None:
    made = lowered(name)
    layout = made.layout
    total = sum(bucket.numel * bucket.dtype.itemsize for bucket in layout.buckets)
    for program in made.programs:
        found = footprint(program)
        assert at_start(found, Kind.PARAMS) == (total // WORLD if layout.shard_params else total)
    of_state = sum(
        node.meta["val"].nbytes
        for node, what in made.last.placeholders()
        if what.role is Role.OPT_STATE and isinstance(node.meta["val"], torch.Tensor)
    )
    assert at_start(footprint(made.last), Kind.STATE) == of_state


@names
def test_gathered_buckets_gradients_and_activations_are_told_apart(name: str) -> None:
    made = lowered(name)
    for program in made.programs:
        found = footprint(program, staged=False)
        gathers = {node: node.meta["val"].nbytes for node in program.graph.nodes if node.target is ops.all_gather}
        temporary = [h for h in found.holdings if h.first > 0]
        assert sum(h.num_bytes for h in temporary if h.kind is Kind.GATHERED) == sum(gathers.values())
        flat = [node.meta["val"].nbytes for node in program.graph.nodes if "holds" in node.meta]
        assert flat
        assert sum(h.num_bytes for h in temporary if h.kind is Kind.GRADIENTS) >= sum(flat)
        assert any(h.kind is Kind.ACTIVATIONS and "mm" in h.what for h in temporary)
        roles = {what.role for _, what in program.placeholders()}
        assert (at_start(found, Kind.GATHERED) > 0) == (Role.GATHERED in roles)
        assert (at_start(found, Kind.GRADIENTS) > 0) == (Role.GRADIENT in roles)
        assert OF_PARAMETERS & roles


@names
def test_the_loss_of_all_ranks_is_no_gradient(name: str) -> None:
    found = footprint(lowered(name).last)
    small = [h for h in found.holdings if "all_reduce" in h.what and h.num_bytes <= 8]
    assert not [h for h in small if h.kind is Kind.GRADIENTS]


def test_ranks_of_a_cpu_that_read_each_others_memory_hold_nothing_that_was_received() -> None:
    kinds, scratch = [], []
    for reads_peers in (True, False):
        made = predict(lowered("zero 3"), replace(this_cpu(), reads_peers=reads_peers))
        found = made.footprints[-1].holdings
        kinds.append(sum(h.kind is Kind.COMMUNICATION and "reduce_scatter" in h.what for h in found))
        scratch.append(sum(h.kind is Kind.SCRATCH for h in found))
    assert kinds[0] == 0 < kinds[1]
    assert scratch == [1, 1]


def test_a_prediction_says_what_is_held_at_the_peak_and_by_what() -> None:
    made = predict(lowered("zero 3"), preset("H100"))
    owners = made.peak.peak_holdings[:3]
    assert isinstance(owners[0], Holding)
    assert [h.num_bytes for h in owners] == sorted((h.num_bytes for h in owners), reverse=True)
    assert made.peak_bytes == made.peak.peak_bytes == sum(made.peak.peak_by_kind().values())
    assert made.reserved_bytes >= made.peak_bytes


@pytest.mark.parametrize("name", ["zero 3", *slow("accumulated")])
def test_on_a_cpu_the_arena_is_held_as_a_whole_and_the_rest_comes_and_goes(name: str) -> None:
    with mock.patch.object(placement, "SMALLEST_BYTES", 2**10):
        lowered_step = lowered(name)
        arenas = [place(program) for program in lowered_step.programs]
        made = predict(lowered_step, replace(preset("H100"), device_type="cpu"))
    num_bytes = max(arena.num_bytes for arena in arenas)
    for found, arena, program in zip(made.footprints, arenas, lowered_step.programs, strict=True):
        assert found.arena_bytes == num_bytes
        assert sum(h.in_arena for h in found.holdings) == len(arena.inside) > 0
        outside = [h for h in found.holdings if not h.in_arena]
        given = given_bytes(program) + sum(h.num_bytes for h in outside if h.kind is Kind.SCRATCH)
        read = {str(what) for _, what in program.placeholders()}  # by a micro-batch; the last one's state is there, too
        given += sum(h.num_bytes for h in outside if h.what.startswith("opt_state:") and h.what not in read)
        rest = max(held_bytes(arena.elsewhere, found.num_positions))
        assert found.peak_bytes == given + rest + num_bytes
        assert sum(found.peak_by_kind().values()) == found.peak_bytes
    num_nodes = max(len(program.graph.nodes) for program in lowered_step.programs)
    assert made.reserved_bytes == made.peak_bytes + compiled_bytes(num_nodes)
    assert made.peak.peak_by_kind()[Kind.UNUSED] < 0.2 * made.peak_bytes


def test_compiling_leaves_more_the_larger_the_graph_is_up_to_a_limit() -> None:
    assert [compiled_bytes(num_nodes) for num_nodes in (0, 520, 1000, 2000)] == [
        2_000_000,
        2_000_000,
        22_080_000,
        40_000_000,
    ]


def test_what_calls_work_in_is_held_while_they_run() -> None:
    """In float64 a convolution has 9 columns of 4 channels, 2,048 bytes each; a softmax copies what lies across."""
    b = Builder()
    images = b.input(Role.BATCH, "0", shape=[1, 4, 16, 16])
    weight = b.input(Role.PARAM, "w", shape=[17, 4, 3, 3])
    y = b.forward(aten.convolution.default, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    across = b.forward(aten.permute.default, y, [0, 2, 3, 1])
    loss = b.forward(aten.sum.default, b.forward(aten._softmax.default, across, 3, False))
    program = b.finish({None: loss})
    found = {h.what: h for h in with_scratch(footprint(program), program).holdings if h.kind is Kind.SCRATCH}
    assert found["aten.convolution.default"].num_bytes == 9 * 4 * 2048 + 2 * 17 * 4 * 9 * 8
    assert found["aten._softmax.default"].num_bytes == 17 * 2048
    assert all(held.first == held.last for what, held in found.items() if what != "matrix products")
