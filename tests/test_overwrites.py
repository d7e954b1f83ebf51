"""A replay finds every mistake that is planted in lifetimes, in who shares memory with whom, and in offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import fx

from tests.programs import Builder, rewritten, two_layers
from zgraph import liveness, ops, placement
from zgraph.errors import VerifyError
from zgraph.liveness import Lifetime, lifetimes
from zgraph.offsets import Offsets
from zgraph.overwrites import check_overwrites
from zgraph.placement import Placement, place
from zgraph.program import Program, Role

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _small_values_count() -> Iterator[None]:
    """Values of programs that are built by hand are small."""
    with mock.patch.object(placement, "SMALLEST_BYTES", 1):
        yield


def chain() -> Program:
    """Values that are read through views, reshapes that are views, and one that copies."""
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 6])
    y = b.forward(aten.exp.default, x)
    for _ in range(3):
        turned = b.forward(aten.t.default, b.forward(aten.neg.default, y))
        copied = b.forward(aten.reshape.default, turned, [4, 6])
        part = b.forward(aten.slice.Tensor, copied, 0, 0, 4)
        same = b.forward(aten.reshape.default, b.forward(aten.view.default, part, [24]), [4, 6])
        y = b.forward(aten.mul.Tensor, b.forward(aten.sin.default, same), same)
    program = b.finish({None: b.forward(aten.sum.default, y)})
    laid_out = rewritten(two_layers(), 0, 1)
    program.layout = laid_out.layout
    return program


PROGRAMS: dict[str, Callable[[], Program]] = {
    "chain": chain,
    "zero 0": lambda: rewritten(two_layers(), 0, 2),
    "zero 3": lambda: rewritten(two_layers(), 3, 2, bucket_bytes=1),
}
programs = pytest.mark.parametrize("name", PROGRAMS)


def placed_wrongly(program: Program, wrong: Mapping[fx.Node, Lifetime]) -> Placement:
    """Where values lie if some lifetimes are others than they should be."""
    told = [wrong.get(life.node, life) if not life.is_beside else life for life in lifetimes(program)]
    with mock.patch.object(placement, "lifetimes", return_value=told):
        return place(program)


@programs
def test_what_is_right_passes(name: str) -> None:
    program = PROGRAMS[name]()
    made = place(program)
    assert len(made.places) > 3
    check_overwrites(program, made)


@programs
def test_lifetimes_that_end_one_call_too_early_are_found(name: str) -> None:
    """All of them at once; one alone may do no harm, if nothing comes to lie there."""
    program = PROGRAMS[name]()
    early = {life.node: replace(life, last=max(life.last - 1, life.first)) for life in lifetimes(program)}
    with pytest.raises(VerifyError, match=r"reads \w+, which \w+ has written over"):
        check_overwrites(program, placed_wrongly(program, early))


@pytest.mark.parametrize("target", [aten.t.default, aten.view.default, aten.slice.Tensor], ids=str)
def test_a_view_that_is_taken_for_memory_of_its_own_is_found(target: torch._ops.OpOverload) -> None:
    program = chain()
    lies_in = liveness._lies_in
    with (
        mock.patch.object(liveness, "_lies_in", lambda node: None if node.target is target else lies_in(node)),
        pytest.raises(VerifyError, match="has written over"),
    ):
        check_overwrites(program, place(program))


def test_what_is_sent_must_stay_until_it_has_arrived() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[16])
    sent = b.forward(aten.exp.default, x)
    start = b.forward(ops.reduce_scatter, sent, "sum", 2, "data")
    meanwhile = b.forward(aten.neg.default, x)
    done = b.forward(ops.wait, start)
    sums = [b.forward(aten.sum.default, each) for each in (done, meanwhile)]
    program = b.finish({None: b.forward(aten.mul.Tensor, *sums)})
    program.layout = rewritten(two_layers(), 0, 1).layout
    check_overwrites(program, place(program))
    early = {life.node: replace(life, last=life.first + 1) for life in lifetimes(program) if life.node is sent}
    with pytest.raises(VerifyError, match=f"reads {sent}, which {meanwhile} has written over"):
        check_overwrites(program, placed_wrongly(program, early))


def _all_over_each_other(held: list[liveness.Held], *_: int) -> Offsets:
    return Offsets((0,) * len(held), max(h.num_bytes for h in held), 0)


@programs
def test_offsets_that_overlap_or_lie_outside_are_found(name: str) -> None:
    program = PROGRAMS[name]()
    made = place(program)
    with mock.patch.object(placement, "assign_offsets", _all_over_each_other), pytest.raises(VerifyError):
        check_overwrites(program, place(program))
    with pytest.raises(VerifyError, match="lies at bytes"):
        check_overwrites(program, replace(made, num_bytes=max(each.stop for each in made.places.values()) - 1))


def test_a_gradient_that_is_not_where_its_bucket_has_it_is_found() -> None:
    program = rewritten(two_layers(), 0, 1, bucket_bytes=200)
    made = place(program)
    cat = next(iter(made.copied))
    part = next(p for p in made.places if p is not cat and made.places[p].start == made.places[cat].start)
    moved = {**made.places, part: replace(made.places[part], start=made.places[part].start + 64)}
    with pytest.raises(VerifyError, match=r"belongs at bytes .* and is not there"):
        check_overwrites(program, replace(made, places=moved))


def test_a_vector_that_is_converted_when_it_is_put_together_is_found() -> None:
    program = rewritten(two_layers(), 0, 1, bucket_bytes=200)
    made = place(program)
    cat = next(iter(made.copied))
    cat.meta["val"] = cat.meta["val"].to(torch.float32)
    with pytest.raises(VerifyError, match="is converted by"):
        check_overwrites(program, made)


def test_a_result_in_the_arena_is_found() -> None:
    program = chain()
    made = place(program)
    (loss,) = program.results()
    with pytest.raises(VerifyError, match="is returned"):
        check_overwrites(program, replace(made, places={**made.places, loss: next(iter(made.places.values()))}))
