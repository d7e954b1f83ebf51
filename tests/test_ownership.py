"""Whole parameters are dealt out so that little is padding, and then so that work is even."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from zgraph.layout import ALIGN, Bucket, ParamSpec, make_buckets
from zgraph.ownership import MAX_PADDING, deal, fill, fill_with_whole, padding

CPU = torch.device("cpu")


def whole(name: str, *shape: int, work: int = 1, states: dict[str, tuple[int, ...]] | None = None) -> ParamSpec:
    return ParamSpec(name, shape, torch.float32, CPU, True, work=work, states=tuple((states or {}).items()))


def owned_by(bucket: Bucket) -> dict[str, int]:
    return {segment.name: owner for segment, owner in zip(bucket.segments, bucket.owners, strict=True)}


def test_each_rank_has_whole_parameters_and_equal_parts() -> None:
    """Four of one size and two of twice that, as in a transformer's block: the sum is even, and nothing is padding."""
    specs = [whole(name, 32, 32) for name in ("q", "k", "v", "o")] + [whole(name, 32, 64) for name in ("up", "down")]
    (bucket,) = make_buckets(specs, 2, 10**6)
    assert bucket.numel == 4 * 32 * 32 + 2 * 32 * 64
    assert [(s.name, s.offset // 1024, owner) for s, owner in zip(bucket.segments, bucket.owners, strict=True)] == [
        ("q", 0, 0), ("v", 1, 0), ("up", 2, 0), ("k", 4, 1), ("o", 5, 1), ("down", 6, 1),
    ]  # fmt: skip


def test_work_is_even_where_bytes_are() -> None:
    """All take as many bytes; two of them ten times the work. Both buckets together are even."""
    specs = [whole(f"p{i}", 64, work=10 if i in (0, 1, 4) else 1) for i in range(8)]
    first, second = make_buckets(specs, 2, 4 * 64 * 4)
    work = [0, 0]
    for bucket in (first, second):
        for name, owner in owned_by(bucket).items():
            work[owner] += {spec.name: spec.work or 0 for spec in specs}[name]
    assert [len(first.segments), len(second.segments)] == [4, 4]
    assert sorted(work) == [13, 22]
    assert owned_by(first)["p0"] != owned_by(first)["p1"]


def test_a_bucket_that_would_be_half_empty_takes_in_the_next_parameters() -> None:
    specs = [whole(f"p{i}", 100, 100) for i in range(4)]
    assert [len(bucket.segments) for bucket in make_buckets(specs, 2, 1)] == [2, 2]
    assert [len(bucket.segments) for bucket in make_buckets(specs, 4, 1)] == [4]
    assert [len(bucket.segments) for bucket in make_buckets(specs, 1, 1)] == [1, 1, 1, 1]


def test_large_parameters_of_one_size_go_together_as_many_as_there_are_ranks() -> None:
    """Of four layers with two sizes, none of which fit a bucket for each rank, nothing is padding."""
    specs = [
        whole(f"{layer}.{kind}", 64, 64 * size) for layer in range(4) for kind, size in (("small", 1), ("large", 3))
    ]
    buckets = make_buckets(specs, 4, 2 * 64 * 64 * 4)
    assert [[segment.name for segment in bucket.segments] for bucket in buckets] == [
        [f"{layer}.small" for layer in range(4)],
        [f"{layer}.large" for layer in range(4)],
    ]
    assert sum(bucket.numel for bucket in buckets) == sum(spec.room for spec in specs)


def test_state_of_other_shapes_lies_with_its_owner() -> None:
    specs = [whole("a", 4, 8, states={"rows": (4, 1)}), whole("b", 40, 2, states={"rows": (40, 1)})]
    (bucket,) = make_buckets(specs, 2, 10**6)
    ((key, rows),) = bucket.states
    assert (key, rows.numel) == ("rows", 2 * 48)
    assert [(s.name, s.shape, s.offset) for s in rows.segments] == [("b", (40, 1), 0), ("a", (4, 1), 48)]
    assert owned_by(bucket) == {"b": 0, "a": 1}


sizes = st.lists(st.integers(0, 100).map(lambda n: ALIGN * n), min_size=1, max_size=12)
worlds = st.integers(1, 5)


@given(sizes, st.lists(st.integers(0, 1000), min_size=12, max_size=12), worlds)
def test_no_rank_stores_more_than_its_even_share_and_one_parameter(
    sizes: list[int], work: list[int], world: int
) -> None:
    loads = [0] * world
    owners = deal(sizes, work[: len(sizes)], loads)
    stored = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == r) for r in range(world)]
    assert max(stored) <= sum(sizes) / world + max(sizes)
    assert sum(loads) == sum(work[: len(sizes)])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), worlds)
def test_of_parameters_of_one_size_no_rank_works_more_than_its_share_and_one_update(
    work: list[int], world: int
) -> None:
    loads = [0] * world
    owners = deal([ALIGN] * len(work), work, loads)
    assert max(owners.count(rank) for rank in range(world)) == math.ceil(len(work) / world)
    assert max(loads) <= sum(work) / world + max(work) * (2 if len(work) % world else 1)


@given(sizes, st.integers(1, 4000), worlds)
def test_each_parameter_is_in_one_bucket(sizes: list[int], limit: int, world: int) -> None:
    buckets = fill_with_whole(sizes, limit, world)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(sizes)))
    assert [bucket[0] for bucket in buckets] == sorted(bucket[0] for bucket in buckets)
    assert all(bucket == sorted(bucket) for bucket in buckets)


@given(sizes, st.integers(1, 4000), worlds)
def test_buckets_are_filled_in_order(sizes: list[int], limit: int, world: int) -> None:
    ends = fill(sizes, limit, world)
    assert ends[-1] == len(sizes)
    assert sorted(set(ends)) == ends
    for start, end in zip([0, *ends], ends, strict=False):
        total = sum(sizes[start:end])
        assert total <= world * max(limit, sizes[start]) or end == start + 1
        is_full = end == len(sizes) or total + sizes[end] > limit
        assert is_full
        if world == 1:
            assert total <= limit or end == start + 1
        elif end < len(sizes) and sum(sizes[start : end + 1]) <= world * max(limit, sizes[start]):
            assert padding(sizes[start:end], world) <= max(MAX_PADDING, padding(sizes[start : end + 1], world))
