"""Buckets hold every parameter once, aligned, in order, and divide evenly over the ranks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zgraph.layout import ALIGN, Bucket, Layout, ParamSpec, make_buckets

CPU = torch.device("cpu")


@st.composite
def params(draw: st.DrawFn) -> list[ParamSpec]:
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=12))
    return [
        ParamSpec(
            f"p{index}",
            shape,
            draw(st.sampled_from([torch.float32, torch.bfloat16])),
            draw(st.sampled_from([CPU, torch.device("meta")])),
            draw(st.booleans()),
            draw(st.sampled_from(["decay", "no decay"])),
        )
        for index, shape in enumerate(shapes)
    ]


worlds = st.integers(1, 7)
sizes = st.integers(1, 4096)


def aligned_bytes(bucket: Bucket) -> int:
    return sum(-(-segment.numel // ALIGN) * ALIGN * bucket.dtype.itemsize for segment in bucket.segments)


@given(params(), worlds, sizes)
def test_every_parameter_is_in_exactly_one_bucket_with_its_shape(specs, world, bucket_bytes):
    buckets = make_buckets(specs, world, bucket_bytes)
    held = [(segment.name, segment.shape) for bucket in buckets for segment in bucket.segments]
    assert sorted(held) == sorted((spec.name, spec.shape) for spec in specs)


@given(params(), worlds, sizes)
def test_segments_are_aligned_and_disjoint_and_inside_the_bucket(specs, world, bucket_bytes):
    for bucket in make_buckets(specs, world, bucket_bytes):
        end = 0
        for segment in bucket.segments:
            assert segment.offset % ALIGN == 0
            assert segment.offset >= end
            end = segment.offset + segment.numel
        assert end <= bucket.numel


@given(params(), worlds, sizes)
def test_a_bucket_divides_into_aligned_shards_with_less_than_one_shard_row_of_padding(specs, world, bucket_bytes):
    for bucket in make_buckets(specs, world, bucket_bytes):
        assert bucket.numel > 0
        assert bucket.numel % (world * ALIGN) == 0
        assert bucket.numel * bucket.dtype.itemsize - aligned_bytes(bucket) <= world * ALIGN * bucket.dtype.itemsize


@given(params(), worlds, sizes)
def test_only_a_single_parameter_may_be_larger_than_the_bucket_size(specs, world, bucket_bytes):
    for bucket in make_buckets(specs, world, bucket_bytes):
        assert len(bucket.segments) == 1 or aligned_bytes(bucket) <= bucket_bytes


@given(params(), worlds, sizes)
def test_order_is_kept_between_buckets_and_within(specs, world, bucket_bytes):
    position = {spec.name: index for index, spec in enumerate(specs)}
    buckets = make_buckets(specs, world, bucket_bytes)
    for bucket in buckets:
        within = [position[segment.name] for segment in bucket.segments]
        assert within == sorted(within)
    firsts = [position[bucket.segments[0].name] for bucket in buckets]
    assert firsts == sorted(firsts)
    assert [bucket.name for bucket in buckets] == [f"bucket{index}" for index in range(len(buckets))]


@given(params(), worlds, sizes)
def test_parameters_of_one_bucket_are_alike(specs, world, bucket_bytes):
    by_name = {spec.name: spec for spec in specs}
    for bucket in make_buckets(specs, world, bucket_bytes):
        members = [by_name[segment.name] for segment in bucket.segments]
        assert {(m.dtype, m.device, m.trainable) for m in members} == {(bucket.dtype, bucket.device, bucket.trainable)}
        assert len({m.group for m in members}) == 1


@given(params(), worlds, st.booleans(), st.booleans())
def test_ranks_together_store_a_divided_bucket_once(specs, world, shard_params, shard_state):
    layout = Layout(make_buckets(specs, world, 256), world, shard_params, shard_state)
    for bucket in layout.buckets:
        assert layout.param_numel(bucket) * (world if shard_params else 1) == bucket.numel
        assert layout.state_numel(bucket) * (world if shard_state else 1) == bucket.numel
        for segment in bucket.segments:
            assert layout.find(segment.name) == (bucket, segment)
    assert list(layout.by_name.items()) == [(bucket.name, bucket) for bucket in layout.buckets]


def test_parameters_fill_a_bucket_before_the_next_is_opened():
    specs = [ParamSpec(f"p{i}", (16,), torch.float32, CPU, True) for i in range(5)]
    buckets = make_buckets(specs, 1, 128)
    assert [[s.name for s in bucket.segments] for bucket in buckets] == [["p0", "p1"], ["p2", "p3"], ["p4"]]
