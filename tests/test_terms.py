"""Terms are equal exactly when they are the same object, whatever way the data has taken."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph.program import REPLICA, SHARD
from zgraph.terms import REPEATED, Axiom, Form, Term, Terms, literal, part, show

aten = torch.ops.aten
F32 = torch.float32


def tensors(terms: Terms, *shapes: tuple[int, ...]) -> list[Term]:
    return [terms.input(f"x{i}", shape, F32, varies=False) for i, shape in enumerate(shapes)]


def test_equal_terms_are_one_object_and_literals_keep_their_type() -> None:
    terms = Terms()
    (x,) = tensors(terms, (2, 3))
    made = [terms.make(aten.add.Tensor, (x, literal(value)), (2, 3), F32) for value in (1, 1, 1.0, True, -0.0, 0.0)]
    assert made[0] is made[1]
    assert len(set(made)) == 5


def test_a_parameter_survives_its_trip_through_a_bucket_a_shard_and_back() -> None:
    terms = Terms()
    w, b = tensors(terms, (2, 3), (4,))
    flat = terms.flat([(w, 0, 6), (terms.padding, REPEATED, 2), (b, 0, 4), (terms.padding, REPEATED, 4)], F32)
    gathered = terms.whole(terms.shard(flat, (8,)), (16,))
    assert gathered is flat
    assert terms.reshape(terms.slice(flat, 0, 6), (2, 3)) is w
    assert terms.slice(flat, 8, 12) is b
    assert show(flat) == "[x0, padding x2, x1, padding x4]"
    assert show(terms.slice(flat, 4, 10)) == "[x0[4:6], padding x2, x1[0:2]]"


def test_an_elementwise_operator_on_a_bucket_is_one_on_each_parameter() -> None:
    terms = Terms()
    w, b, gw, gb = tensors(terms, (2, 3), (4,), (2, 3), (4,))
    flat = terms.flat([(w, 0, 6), (b, 0, 4), (terms.padding, REPEATED, 6)], F32)
    zeros = terms.fill(literal(0.0), (6,), F32)
    gradient = terms.cat([terms.reshape(gw, (6,)), gb, zeros])
    updated = terms.elementwise(aten.sub.Tensor, (flat, gradient), (16,), F32)
    assert terms.reshape(terms.slice(updated, 0, 6), (2, 3)) is terms.elementwise(aten.sub.Tensor, (w, gw), (2, 3), F32)
    assert terms.slice(updated, 6, 10) is terms.elementwise(aten.sub.Tensor, (b, gb), (4,), F32)
    assert terms.slice(updated, 10, 16).args[0] is terms.padding, "padding stays padding"


def test_parts_that_do_not_belong_together_make_a_term_of_their_own() -> None:
    terms = Terms()
    w, gw = tensors(terms, (6,), (6,))
    shifted = terms.cat([terms.slice(gw, 1, 6), terms.slice(gw, 0, 1)])
    assert terms.elementwise(aten.sub.Tensor, (w, shifted), (6,), F32).target is Form.FLAT
    right = terms.elementwise(aten.sub.Tensor, (w, gw), (6,), F32)
    assert terms.elementwise(aten.sub.Tensor, (w, shifted), (6,), F32) is not right


def test_a_sum_divided_by_the_number_of_ranks_is_the_mean_and_no_other_quotient_is() -> None:
    terms = Terms()
    g = terms.input("g", (4,), F32, varies=True)
    for divisor, is_mean in ((3, True), (3.0, True), (2, False), (9, False)):
        quotient = terms.elementwise(aten.div.Tensor, (terms.sum(g, 3), literal(divisor)), (4,), F32)
        assert (quotient is terms.mean(g)) == is_mean
    assert terms.mean(terms.mean(g)) is not terms.mean(g)


def test_a_mean_inside_of_nodes_and_then_between_them_is_the_mean_and_neither_is_alone() -> None:
    terms = Terms()
    g = terms.input("g", (4,), F32, varies=True)
    inside, between = terms.mean(g, SHARD), terms.mean(g, REPLICA)
    assert terms.mean(inside, REPLICA) is terms.mean(g)
    assert terms.mean(between, SHARD) is terms.mean(g)
    assert inside.varies
    assert between.varies
    alike = [terms.mean(inside), terms.mean(inside, SHARD), terms.mean(between, REPLICA), inside, between, g]
    assert len({*alike, terms.mean(g)}) == 7, "the same axis twice, or one of them alone"


def test_a_sum_inside_of_nodes_and_then_between_them_counts_all_ranks() -> None:
    terms = Terms()
    g = terms.input("g", (4,), F32, varies=True)
    total = terms.sum(terms.sum(g, 3, SHARD), 2, REPLICA)
    assert total is terms.sum(g, 6)
    for divisor, of in ((6, total), (3, terms.sum(g, 3, SHARD)), (6, terms.sum(g, 3, SHARD))):
        quotient = terms.elementwise(aten.div.Tensor, (of, divisor), (4,), F32)
        assert (quotient is terms.mean(g)) == (of is total)
    assert terms.mean(terms.sum(g, 3, SHARD), REPLICA) is not terms.mean(g)


def test_the_part_of_a_mean_between_nodes_is_the_mean_of_the_parts() -> None:
    terms = Terms()
    g = terms.input("g", (4,), F32, varies=True)
    inside = terms.shard(terms.mean(g, SHARD), (2,), SHARD)
    assert terms.whole(inside, (4,), SHARD) is None, "every node has parts of another vector"
    mean = terms.mean(inside, REPLICA)
    assert mean is terms.shard(terms.mean(g), (2,), SHARD)
    assert terms.whole(mean, (4,), SHARD) is terms.mean(g)
    assert terms.whole(mean, (4,)) is None, "it is divided inside of nodes"
    assert terms.whole(mean, (4,), REPLICA) is None
    assert terms.mean(inside, SHARD) is not mean
    assert terms.mean(inside) is not mean


def test_parts_along_unlike_axes_do_not_go_together() -> None:
    terms = Terms()
    x, y = tensors(terms, (4,), (4,))
    ours, theirs = terms.shard(x, (2,), SHARD), terms.shard(y, (2,), REPLICA)
    total = terms.elementwise(aten.add.Tensor, (ours, theirs), (2,), F32)
    assert total.varies
    assert terms.whole(total, (4,), SHARD) is None


def test_shares_of_a_norm_add_up_along_the_axis_that_state_is_divided_along() -> None:
    terms = Terms()
    (w,) = tensors(terms, (4,))
    part = terms.shard(w, (2,), SHARD)
    share = terms.square_sum(part, SHARD)
    assert share is not None
    assert terms.square_sum(part) is None
    assert terms.sum(share, 2, SHARD) is terms.square_sum(w)
    assert terms.sum(share, 4, of_shares=False) is not terms.square_sum(w), "every node has all of it"


def test_only_what_is_the_same_on_all_ranks_can_be_put_together_from_its_shards() -> None:
    terms = Terms()
    local = terms.input("g", (4,), F32, varies=True)
    assert terms.whole(terms.shard(local, (2,)), (4,)) is None
    assert terms.whole(terms.shard(terms.mean(local), (2,)), (4,)) is terms.mean(local)
    norm = terms.make(aten.linalg_vector_norm.default, (terms.shard(terms.mean(local), (2,)),), (), F32)
    assert norm.varies, "each rank has the norm of its own part"


def test_a_slice_beside_a_number_of_another_dtype_is_the_slice_of_the_whole() -> None:
    terms = Terms()
    (x,) = tensors(terms, (4,))
    number = terms.fill(2.0, (), torch.float64)
    on_the_whole = terms.elementwise(aten.mul.Tensor, (x, number), (4,), F32)
    on_the_slice = terms.elementwise(aten.mul.Tensor, (terms.shard(x, (2,)), number), (2,), F32)
    assert on_the_slice is terms.shard(on_the_whole, (2,))


def test_an_axiom_makes_terms_equal_that_were_not() -> None:
    neg = aten.neg.default

    def cancel(_: Terms, term: Term) -> Term | None:
        inner = term.args[0]
        return inner.args[0] if inner.target is neg else None

    for axioms, same in (((), False), ((Axiom("neg(neg(a)) = a", neg, cancel),), True)):
        terms = Terms(axioms)
        (x,) = tensors(terms, (2, 3))
        once = terms.make(neg, (x,), (2, 3), F32)
        assert (terms.make(neg, (once,), (2, 3), F32) is x) == same


def test_the_place_where_two_terms_part_is_the_innermost_one() -> None:
    terms = Terms()
    x, y = tensors(terms, (2,), (2,))

    def build(inner: Term) -> Term:
        return terms.make(aten.mul.Tensor, (terms.make(aten.sin.default, (inner,), (2,), F32), x), (2,), F32)

    assert part(build(x), build(y)) == (x, y)
    assert show(build(y)) == "mul.Tensor(sin(x1), x0)"


@few_examples(100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_slices_put_together_again_are_the_whole(lengths: list[int], data: st.DataObject) -> None:
    terms = Terms()
    xs = tensors(terms, *((n,) for n in lengths))
    flat = terms.cat(xs)
    total = sum(lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    bounds = [0, *cuts, total]
    assert terms.cat([terms.slice(flat, a, b) for a, b in itertools.pairwise(bounds)]) is flat


@few_examples(100)
@given(st.permutations(range(3)), st.permutations(range(3)))
def test_a_permutation_undone_is_none(first: list[int], second: list[int]) -> None:
    terms = Terms()
    (x,) = tensors(terms, (2, 3, 4))
    twice = terms.permute(terms.permute(x, first), second)
    assert twice is terms.permute(x, [first[d] for d in second])
    assert terms.permute(terms.permute(x, first), [first.index(d) for d in range(3)]) is x


# Sums of squares


def test_a_sum_of_squares_is_the_same_whatever_the_way_of_adding_it_up() -> None:
    terms = Terms()
    w, b = tensors(terms, (2, 3), (4,))
    zeros = terms.fill(0, (6,), F32)
    flat = terms.cat([terms.reshape(w, (6,)), b, zeros])
    whole = terms.add_squares([terms.square_sum(b), terms.square_sum(w)], 2)
    assert whole is terms.square_sum(flat), "zeros add nothing"
    assert whole is terms.square_sum(terms.cat([b, zeros, terms.reshape(terms.permute(w, (1, 0)), (6,))]))
    halves = [terms.square_sum(terms.slice(flat, *ends)) for ends in ((0, 5), (5, 16))]
    assert terms.add_squares(halves, 2) is whole
    share = terms.square_sum(terms.shard(flat, (8,)))
    assert share.varies
    assert terms.sum(share, 2) is whole
    assert show(whole) == "squares(x1, x0)"
    assert show(share) == "share(x1, x0)"


def test_a_sum_of_squares_has_every_element_once_and_no_padding() -> None:
    terms = Terms()
    w, b = tensors(terms, (2, 3), (4,))
    padded = terms.flat([(w, 0, 6), (terms.padding, REPEATED, 2), (b, 0, 4), (terms.padding, REPEATED, 4)], F32)
    once, both = terms.square_sum(w), terms.add_squares([terms.square_sum(w), terms.square_sum(b)], 2)
    assert len({once, both, terms.add_squares([once, once], 2), terms.square_sum(padded)}) == 4


def test_shares_of_a_sum_are_added_up_over_the_ranks_once_and_only_of_what_all_have() -> None:
    terms = Terms()
    (w,) = tensors(terms, (4,))
    share, whole = terms.square_sum(terms.shard(w, (2,))), terms.square_sum(w)
    assert terms.sum(share, 2) is whole
    assert terms.mean(share) is not whole
    assert terms.sum(terms.sum(share, 2), 2) is not whole, "it was the sum already"
    assert terms.add_squares([share, whole], 2) is None, "a part of one and the whole of the other"
    local = terms.input("g", (4,), F32, varies=True)
    wrong = terms.sum(terms.square_sum(terms.shard(local, (2,))), 2)
    assert wrong is not terms.square_sum(local), "each rank has a part of another vector"


def test_a_repeated_value_is_counted_as_often_as_all_ranks_have_it() -> None:
    terms = Terms()
    (w,) = tensors(terms, (4,))
    ones = terms.fill(1, (6,), F32)
    part = terms.shard(ones, (3,))
    assert terms.sum(terms.square_sum(part), 2) is terms.square_sum(ones)
    shares = terms.add_squares([terms.square_sum(part), terms.square_sum(terms.shard(w, (2,)))], 2)
    assert shares is not None
    assert terms.sum(shares, 2) is terms.square_sum(terms.cat([w, ones]))
