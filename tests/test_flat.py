"""Buckets at run time: what is written comes back, in memory or on a disk, and little of a disk is in memory."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph.disk import Disk, DiskTensor
from zgraph.flat import FlatTensors
from zgraph.layout import Layout, ParamSpec, make_buckets

CPU = torch.device("cpu")
SHAPES = [(3, 5), (), (7,), (2, 2), (17,)]
ACTIONS = st.tuples(st.sampled_from(["write", "read", "flush"]), st.integers(0, len(SHAPES) - 1))


def layout(bucket_bytes: int) -> Layout:
    specs = [ParamSpec(str(i), shape, torch.float32, CPU, True) for i, shape in enumerate(SHAPES)]
    return Layout(make_buckets(specs, 1, bucket_bytes), 1)


@given(st.lists(ACTIONS, max_size=20), st.sampled_from([1, 200]), st.integers(1, 3), st.sets(st.integers(0, 4)))
@few_examples(60)
def test_what_was_written_last_is_read(
    actions: list[tuple[str, int]], bucket_bytes: int, num_cached: int, away: set[int]
) -> None:
    made = layout(bucket_bytes)
    disk = Disk("/var/tmp")
    on_disk = {made.find(str(i))[0].name: "disk" for i in away}
    flat = FlatTensors(made, sharded=False, group=None, num_cached=num_cached, away=on_disk, tiers={"disk": disk})
    expected: dict[int, torch.Tensor] = {}
    for number, (action, i) in enumerate(actions):
        if action == "write":
            expected[i] = torch.full(SHAPES[i], float(number))
            flat.write(str(i), expected[i])
        elif action == "read" and i in expected:
            assert torch.equal(flat.read(str(i)), expected[i])
        elif action == "flush":
            flat.flush()
        assert len(flat._opened) <= num_cached
    flat.flush()
    assert not flat._opened
    kept: Any = flat.tensors
    assert all(isinstance(value, DiskTensor) is (name in on_disk) for name, value in kept.items())
    assert all(flat.is_away(str(i)) is (made.find(str(i))[0].name in on_disk) for i in range(len(SHAPES)))
    again = FlatTensors(made, sharded=False, group=None, tensors=kept, away=on_disk, tiers={"disk": disk})
    values = dict(again.copies())
    for i, value in expected.items():
        assert torch.equal(values[str(i)], value)
    for bucket in made.buckets:
        ends = [segment.offset + segment.numel for segment in bucket.segments]
        if bucket.name in kept:
            assert not again.allocate(bucket)[max(ends) :].any(), "padding is zero"
