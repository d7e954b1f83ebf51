"""Whose memory values lie in and until when, by running emitted programs on real tensors that are counted."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.utils import _pytree as pytree

from tests.programs import Builder, few_examples, fewer_examples, one_layer, rewritten, two_layers
from tests.recipes import Recipe, build, recipes
from zgraph import ops
from zgraph.codegen.owned import OwnedUpdate
from zgraph.footprint import footprint
from zgraph.liveness import Lifetime, alive_bytes, last_uses, lifetimes, owners, shares_memory, values_of, written
from zgraph.lockstep import part_of
from zgraph.program import Input, Mesh, Program, Role, operand

aten = torch.ops.aten
F64 = torch.float64


def program_of(b: Builder, *results: fx.Node, world: int = 1) -> Program:
    """A program that returns the results, the first as its loss."""
    whats = [None, *(Input(Role.BUFFER, str(i)) for i in range(1, len(results)))]
    program = b.finish(dict(zip(whats, results, strict=True)))
    program.mesh = Mesh(world)
    return program


def at(program: Program, node: fx.Node) -> int:
    return list(program.graph.nodes).index(node)


def span(program: Program, node: fx.Node, *, staged: bool = True) -> tuple[int, int, int]:
    """Bytes of a call's memory, and how many calls after it the first and last are that need it."""
    (life,) = (life for life in lifetimes(program, staged=staged) if life.node is node and not life.is_beside)
    start = at(program, node)
    return life.num_bytes, life.first - start, life.last - start


# Whose memory


def test_views_lie_where_the_first_of_them_does() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 3])
    made = b.forward(aten.neg.default, x)
    views = [made]
    for target, *args in ((aten.t.default,), (aten.slice.Tensor, 0, 0, 2), (aten.detach.default,)):
        views.append(b.forward(target, views[-1], *args))
    halves = b.forward(aten.split.Tensor, views[-1], 2)
    views += [halves, b.forward(operator.getitem, halves, 0)]
    of_input = b.forward(aten.view.default, x, [12])
    owner = owners(program_of(b, made))
    assert {owner[view] for view in views} == {made}
    assert owner[of_input] is owner[x] is x
    assert not shares_memory(made)
    assert all(map(shares_memory, [*views[1:], of_input]))


def test_a_reshape_lies_in_its_source_only_if_it_need_not_copy() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 3])
    turned = b.forward(aten.t.default, x)
    part = b.forward(aten.slice.Tensor, x, 1, 0, 2)
    assert shares_memory(b.forward(aten.reshape.default, x, [12]))
    assert shares_memory(b.forward(aten.reshape.default, part, [2, 2, 2]))
    assert not shares_memory(b.forward(aten.reshape.default, turned, [12]))
    assert not shares_memory(b.forward(aten.reshape.default, part, [8]))
    repeated = b.forward(aten.expand.default, b.input(Role.BATCH, "1", shape=[1, 1, 7]), [3, 1, 7])
    assert not shares_memory(b.forward(aten.reshape.default, repeated, [21]))


def test_what_is_written_in_place_lies_where_it_is_written() -> None:
    program = rewritten(one_layer(), 0, 1)
    owner = owners(program)
    donated = [r for what, r in zip(program.outputs, program.results(), strict=True) if what is not None]
    assert [owner[result].meta["input"] for result in donated] == [what for what in program.outputs if what is not None]
    kernel = operand(donated[0])
    assert {owner[node] for node in written(kernel)} == {owner[result] for result in donated}


def test_operators_of_torch_that_write_over_an_argument_give_it_back() -> None:
    b = Builder()
    x, out = (b.input(Role.BATCH, name, shape=[4]) for name in "ab")
    for target, args, kwargs, expected in (
        (aten.exp_.default, (x,), {}, x),
        (aten.add.out, (x, x), {"out": out}, out),
        (aten.arange.out, (4,), {"out": out}, out),
        (ops.pack_state_into, (x,), {"out": out}, out),
    ):
        node = b.program.graph.call_function(target, args, kwargs)
        node.meta["val"] = x.meta["val"]
        assert owners(b.program)[node] is expected


def test_order_does_not_matter_to_who_owns_memory() -> None:
    b = Builder()
    x = b.forward(aten.neg.default, b.input(Role.BATCH, "0", shape=[4]))
    view = b.forward(aten.view.default, x, [2, 2])
    again = b.forward(aten.t.default, view)
    x.prepend(view)
    view.prepend(again)
    assert {owners(b.program)[node] for node in (x, view, again)} == {x}


# Until when


def test_memory_is_held_until_the_last_read_of_any_view_of_it() -> None:
    b = Builder()
    made = b.forward(aten.neg.default, b.input(Role.BATCH, "0", shape=[4, 3]))
    view = b.forward(aten.t.default, made)
    b.forward(aten.neg.default, made)
    loss = b.forward(aten.sum.default, view)
    later = b.forward(aten.neg.default, loss)
    program = program_of(b, later)
    assert span(program, made) == (96, 0, 3)
    assert span(program, loss) == (8, 0, 1)
    assert span(program, later) == (8, 0, 1)  # returned


def test_several_results_are_there_from_the_call_on_and_unread_ones_while_others_are_unpacked() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[6, 4])
    norm = b.forward(aten.native_layer_norm.default, x, [4], None, None, 1e-5)
    b.forward(aten.neg.default, x)
    out = b.forward(operator.getitem, norm, 0)
    b.forward(aten.neg.default, x)
    loss = b.forward(aten.sum.default, out)
    program = program_of(b, loss)
    assert span(program, out) == (6 * 4 * 8, -2, 2)
    assert span(program, norm) == (2 * 6 * 8, 0, 2)  # mean and inverse deviation


def test_a_result_that_is_unpacked_twice_is_there_once() -> None:
    b = Builder()
    norm = b.forward(aten.native_layer_norm.default, b.input(Role.BATCH, "0", shape=[6, 4]), [4], None, None, 1e-5)
    first, second = (b.forward(operator.getitem, norm, 0) for _ in range(2))
    loss = b.forward(aten.sum.default, b.forward(aten.t.default, second))
    program = program_of(b, loss)
    assert span(program, first) == (192, -1, 3)
    assert not [life for life in lifetimes(program) if life.node is second]


def test_memory_has_the_gaps_between_its_elements() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[6, 4])
    column = b.forward(aten.select.int, x, 1, 0)
    copied = b.forward(aten.copy.default, column, b.forward(aten.neg.default, column))
    program = program_of(b, b.forward(aten.sum.default, copied))
    real = aten.copy.default(torch.empty(6, 4, dtype=F64)[:, 0], torch.empty(6, dtype=F64))
    assert span(program, copied)[0] == real.untyped_storage().nbytes() > 6 * 8


def test_a_sparse_tensor_is_counted_as_a_dense_one() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[6, 4])
    sparse = b.forward(aten._to_sparse.default, x)
    assert sparse.meta["val"].layout is torch.sparse_coo
    program = program_of(b, b.forward(aten.sum.default, b.forward(aten._to_dense.default, sparse)))
    assert span(program, sparse) == (6 * 4 * 8, 0, 1)


def started(target: Any, *args: Any, world: int = 4) -> tuple[Program, fx.Node, fx.Node]:
    """A value that is sent, a call, the wait, two more calls: what is sent and what is started."""
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[8])
    sent = b.backward(aten.neg.default, x)
    start = b.backward(target, sent, *args)
    b.backward(aten.neg.default, x)
    wait = b.backward(ops.wait, start)
    b.backward(aten.neg.default, x)
    return program_of(b, b.backward(aten.sum.default, wait), world=world), sent, start


def test_what_is_gathered_is_there_from_the_start_and_what_is_sent_until_the_wait() -> None:
    program, sent, start = started(ops.all_gather, 4, "data")
    assert span(program, start) == (4 * 64, 0, 4)
    assert span(program, sent) == (64, 0, 3)


def test_an_all_reduce_sends_a_copy() -> None:
    program, sent, start = started(ops.all_reduce, "sum", "data")
    assert span(program, start) == (64, 0, 4)
    assert span(program, sent) == (64, 0, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_a_reduction_holds_what_it_receives_until_the_wait_where_it_is_staged(world: int) -> None:
    program, sent, start = started(ops.reduce_scatter, "sum", world, "data", world=world)
    part = 64 // world
    assert span(program, start) == span(program, start, staged=False) == (part, 0, 4)
    assert span(program, sent) == (64, 0, 3)
    received = [life for life in lifetimes(program) if life.is_beside]
    first = at(program, start)
    assert received == ([Lifetime(start, part * (world - 2), first, first + 2, True)] if world > 2 else [])
    assert not [life for life in lifetimes(program, staged=False) if life.is_beside]


def test_last_uses_say_what_dies_with_each_call() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4])
    a = b.forward(aten.neg.default, x)
    unread = b.forward(aten.exp.default, a)
    loss = b.forward(aten.sum.default, a)
    program = program_of(b, loss)
    assert last_uses(program.graph) == {a: [x], unread: [unread], loss: [a]}


# By running


class Counted:
    """Real tensors in place of a program's values, dropped as emitted code drops them, and their storages counted."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[Any] = []  # the caller's, which nobody drops
        self.given: set[int] = set()

    def storages(self) -> dict[int, int]:
        """Bytes of all storages that were not given, by where they are."""
        tensors = [leaf for leaf in pytree.tree_leaves(list(self.values.values())) if isinstance(leaf, torch.Tensor)]
        found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        return {place: size for place, size in found.items() if place not in self.given}

    def run(self) -> list[int]:
        """Bytes held while each node of the graph runs, its arguments and results included."""
        dying = last_uses(self.program.graph)
        counts = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._real(node.meta["val"])
                self.inputs.append(self.values[node])
                if isinstance(self.values[node], torch.Tensor):
                    self.given.add(self.values[node].untyped_storage()._cdata)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            counts.append(sum(self.storages().values()))
            for value in dying.get(node, ()):
                del self.values[value]
        return counts

    def _real(self, val: Any) -> Any:
        if not isinstance(val, torch.Tensor):
            return val
        size = val.untyped_storage().nbytes() // val.dtype.itemsize
        whole = torch.zeros(max(size, 1), dtype=val.dtype)
        return whole.as_strided(val.shape, val.stride(), val.storage_offset())

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        among = node.target in ops.STARTS or node.target is ops.shard
        world = self.program.mesh.axes[ops.axis_of(node)] if among else 0
        if node.target is ops.shard:
            return part_of(args[0], 0, world)
        if node.target is ops.all_gather:
            return Sent(torch.cat([args[0]] * world), [args[0]])
        if node.target is ops.all_gather_into:
            return Sent(kwargs["out"], [args[0]])
        if node.target is ops.all_reduce:
            return Sent(args[0].clone(), [])
        if node.target is ops.all_to_all:
            return Sent(args[0].clone(), [args[0]])
        if node.target is ops.reduce_scatter:
            parts = [part_of(args[0], rank, world).clone() for rank in range(1, world)]
            return Sent(parts[0], [args[0], *parts[1:]])
        if node.target is ops.wait:
            return args[0].result
        if isinstance(node.target, OwnedUpdate) and node.target.is_divided(args):
            kwargs = {"rank": 0}
        return node.target(*args, **kwargs)  # type: ignore[operator]


class Sent:
    """A transfer of ``zgraph.comm.PointToPointComm``, which holds what is sent and what has been received."""

    def __init__(self, result: torch.Tensor, held: Sequence[torch.Tensor]) -> None:
        self.result, self.held = result, held


pytree.register_pytree_node(Sent, lambda sent: ([sent.result, *sent.held], None), lambda leaves, _: leaves)


def assert_counts_agree(program: Program) -> None:
    counts = Counted(program).run()
    claimed = list(alive_bytes(program))
    wrong = [
        (node.format_node(), found, claimed)
        for (node, claimed), found in zip(claimed, counts, strict=True)
        if found + ops.scratch_bytes(node) != claimed  # what it has worked in is gone when it has run
    ]
    assert not wrong, wrong[0]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("zero", range(4))
def test_what_is_alive_in_a_lowered_step_is_what_running_it_holds(zero: int, world: int) -> None:
    assert_counts_agree(rewritten(two_layers(), zero, world))


@few_examples(25)
@given(recipes())
def test_what_is_alive_in_any_captured_step_is_what_running_it_holds(recipe: Recipe) -> None:
    assert_counts_agree(build(recipe))


@few_examples(15)
@given(recipes(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 200]))
def test_what_is_alive_in_any_lowered_step_is_what_running_it_holds(
    recipe: Recipe, zero: int, world: int, bucket_bytes: int
) -> None:
    assert_counts_agree(rewritten(build(recipe), zero, world, bucket_bytes))


CALLS = ["neg", "t", "view", "cat", "norm", "split", "half", "sum", "copy", "reshape", "maximum", "gather", "reduce"]


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Calls, each with which of the values before it is read."""
    return draw(st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 10)), min_size=1, max_size=20))


def made(chain: Sequence[tuple[str, int]]) -> Program:
    """Calls on matrices of four rows and any columns: views, several results that may not be unpacked, collectives."""
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 6])
    values = [x]
    for name, index in chain:
        value = values[-1 - index % len(values)]
        rows, columns = value.meta["val"].shape
        call = b.backward if index % 2 else b.forward
        if name == "neg":
            values.append(call(aten.neg.default, value))
        elif name == "t":
            values.append(call(aten.t.default, value))
        elif name == "view":
            values.append(call(aten.unsqueeze.default, call(aten.select.int, value, 0, 0), 0))
        elif name == "cat":
            values.append(call(aten.cat.default, [value, values[0], value] if columns == 6 else [value], 0))
        elif name == "norm":
            norm = call(aten.native_layer_norm.default, value, [columns], None, None, 1e-5)
            values += [call(operator.getitem, norm, i) for i in range(index % 3)]
            values = [v if v.meta["val"].dim() == 2 else x for v in values]
        elif name == "split":
            parts = call(aten.split.Tensor, value, max(rows // 2, 1))
            values.append(call(operator.getitem, parts, 0))
        elif name == "half":
            values.append(call(aten.slice.Tensor, value, 1, 0, max(columns // 2, 1)))
        elif name == "sum":
            values.append(call(aten.sum.dim_IntList, value, [1], True))
        elif name == "copy":
            values.append(call(aten.clone.default, value))
        elif name == "reshape":
            values.append(call(aten.reshape.default, value, [columns, rows]))
        elif name == "maximum":
            both = call(aten.max.dim, value, 1, True)
            values.append(call(operator.getitem, both, 0))
        else:
            flat = call(aten.reshape.default, call(aten.cat.default, [value, value], 0), [2 * rows * columns])
            is_gather = name == "gather"
            start = call(ops.all_gather, flat, 2, "data") if is_gather else call(ops.all_reduce, flat, "sum", "data")
            values.append(call(aten.neg.default, x))
            values.append(call(aten.view.default, call(ops.wait, start), [-1, columns]))
    return program_of(b, call(aten.sum.default, values[-1]), values[len(values) // 2], world=2)


@fewer_examples(0.2)
@given(chains())
def test_what_is_alive_in_any_chain_of_calls_is_what_running_it_holds(chain: list[tuple[str, int]]) -> None:
    program = made(chain)
    assert_counts_agree(program)
    given = program.inputs(Role.BATCH)["0", ""].meta["val"].nbytes
    held = footprint(program).alive_bytes
    assert list(held) == [num_bytes + given for _, num_bytes in alive_bytes(program)]


@fewer_examples(0.2)
@given(chains())
def test_lifetimes_come_in_order_and_end_after_they_begin(chain: list[tuple[str, int]]) -> None:
    program = made(chain)
    found = lifetimes(program)
    assert all(before.first <= after.first for before, after in itertools.pairwise(found))
    assert all(0 <= life.first <= life.last < program.num_nodes() for life in found)
    names = Counter(life.node for life in found if not life.is_beside)
    assert set(names.values()) <= {1}


def test_what_is_written_over_is_one_value_after_another_in_one_memory() -> None:
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[4, 6])
    product = b.forward(aten.mul.Tensor, x, x)
    y = b.forward(aten._softmax.default, b.forward(aten.view.default, product, [4, 6]), 1, False)
    y.target, y.kwargs = aten._softmax.out, {"out": operand(y)}
    other = b.forward(aten.neg.default, y)
    z = b.backward(aten.exp.default, y)
    z.target, z.kwargs = aten.exp.out, {"out": y}
    loss = b.forward(aten.sum.default, b.forward(aten.add.Tensor, other, z))
    program = b.finish({None: loss})
    found = [(v.node, v.num_bytes, v.last - v.first) for v in values_of(program, lifetimes(program))]
    assert found[:4] == [(product, 192, 1), (y, 192, 1), (z, 192, 1), (other, 192, 2)]
    change = [life for life in lifetimes(program) if life.node is product]
    assert [(v.first, v.last) for v in values_of(program, change)] == [(1, 2), (3, 4), (5, 6)]
