"""Where buckets end follows from what collectives cost and what hides them; the step stays the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zgraph
from tests.programs import assert_same_step, blocks, few_examples
from tests.recipes import Recipe, build, recipes
from zgraph.config import Config
from zgraph.curves import Collective
from zgraph.hardware import Hardware
from zgraph.layout import ParamSpec
from zgraph.machines import assumed_cpu, preset
from zgraph.passes import bounds as module
from zgraph.passes import default_passes
from zgraph.passes.bounds import LIMITS, MOST_ENDS, Bounds, Time, Times, _best, _parts
from zgraph.pipeline import run
from zgraph.program import Mesh, Program

MIB = 2**20


def machine(latency_s: float, bytes_per_s: float = 1e9) -> Hardware:
    """A GPU whose collectives all take so long, whatever their kind."""
    gpu = replace(preset("H100"), launch_s=0.0, in_step={})
    return replace(gpu, collectives=dict.fromkeys(gpu.collectives, Collective(latency_s, 0.0, bytes_per_s)))


def spec(index: int, num_bytes: int = MIB) -> ParamSpec:
    return ParamSpec(f"w{index}", (num_bytes // 4,), torch.float32, torch.device("cpu"), True)


def evenly(num: int, span_s: float) -> Times:
    """Parameters that are computed with one after the other, for so long in forward and twice as long in backward."""
    found = {f"w{i}": Time(i * span_s, 3 * num * span_s - 2 * i * span_s, 4) for i in range(num)}
    turn = num * span_s
    return Times(found, Time(turn, turn, 0), 3 * turn)


def sizes(hardware: Hardware, span_s: float, num: int = 16, zero: int = 3) -> list[int]:
    """How many parameters of 1 MiB each bucket has."""
    divided = Bounds(hardware, Mesh(4), zero).divide([spec(i) for i in range(num)], evenly(num, span_s))
    assert [index for bucket in divided for index in bucket] == list(range(num))
    return [len(bucket) for bucket in divided]


def test_without_latency_nothing_travels_together() -> None:
    assert sizes(machine(0.0), 1e-2) == [1] * 16


def test_what_is_hidden_travels_alone_however_long_it_takes() -> None:
    """Each parameter is computed with for longer than it travels; smaller buckets take less memory."""
    assert sizes(machine(1e-3, 1e10), 1e-2) == [1] * 16


def test_where_latency_is_exposed_parameters_share_it() -> None:
    short, long = sizes(machine(1e-3, 1e12), 1e-5), sizes(machine(1e-1, 1e12), 1e-5)
    assert len(short) <= 4
    assert len(long) <= len(short)


def test_the_first_bucket_is_small_where_only_its_own_way_is_exposed() -> None:
    """Nothing is computed before it is there, and nothing behind its reduction; a latency that is hidden costs none."""
    divided = sizes(machine(2e-2, 2e8), 1.2e-2)
    assert divided[0] < max(divided)


def test_on_a_cpu_nothing_hides_what_travels() -> None:
    cpu = replace(machine(1e-3), device_type="cpu")
    assert sizes(cpu, 1.0) == [1] * 16, "a thousandth of the step is more than all latencies"
    assert len(sizes(cpu, 1e-3)) == 1


@given(
    st.lists(st.sampled_from([MIB // 4, MIB, 3 * MIB]), min_size=1, max_size=7),
    st.sampled_from([1e-5, 1e-3, 1e-2]),
    st.sampled_from([1e8, 1e10]),
    st.lists(st.floats(1e-6, 1e-2), min_size=7, max_size=7),
    st.integers(0, 3),
    st.sampled_from(["cuda", "cpu"]),
)
@few_examples(60)
def test_no_other_buckets_within_a_limit_expose_less(
    num_bytes: list[int], latency_s: float, rate: float, spans: list[float], zero: int, device_type: str
) -> None:
    hardware = replace(machine(latency_s, rate), device_type=device_type)
    members = [spec(i, size) for i, size in enumerate(num_bytes)]
    clock = [0.0, *itertools.accumulate(spans[: len(members)])]
    found = {f"w{i}": Time(clock[i], 3 * clock[-1] - 2 * clock[i], 4) for i in range(len(members))}
    times = Times(found, Time(clock[-1], clock[-1], 0), 3 * clock[-1])
    bounds, parts = Bounds(hardware, Mesh(4), zero), _parts(members)
    assert parts == [range(i, i + 1) for i in range(len(members))]
    costs = [list(bounds._costs(members, parts, times, end)) for end in range(len(members))]
    for limit in (MIB, 4 * MIB, 2**30):
        least = min(
            sum(_cost(costs, start, end) for start, end in zip([0, *ends], ends, strict=False))
            for ends in every_way(len(members))
            if all(end - start == 1 or _size(members, start, end) <= limit for start, end in pairs(ends))
        )
        exposed, ends = _best(costs, limit)
        assert exposed == pytest.approx(least)
        assert exposed == pytest.approx(sum(_cost(costs, start, end) for start, end in pairs(ends)))


@given(st.lists(st.sampled_from([4, 4096, MIB, 64 * MIB]), min_size=MOST_ENDS + 1, max_size=900))
@few_examples(20)
def test_few_windows_of_many_parameters_are_weighed(num_bytes: list[int]) -> None:
    members = [spec(i, size) for i, size in enumerate(num_bytes)]
    parts = _parts(members)
    assert [i for part in parts for i in part] == list(range(len(members)))
    sizes = [4 * sum(members[i].room for i in part) for part in parts]
    share = min(sum(sizes), LIMITS[-1]) // MOST_ENDS
    assert all(size <= share for size, part in zip(sizes, parts, strict=True) if len(part) > 1)
    assert all(sum(pair) > share for pair in itertools.pairwise(sizes))
    bounds, times = Bounds(preset("H100"), Mesh(4), 3), evenly(len(members), 1e-5)
    windows = [len(list(bounds._costs(members, parts, times, end))) for end in range(len(parts))]
    assert max(windows) <= 2 * MOST_ENDS + 1
    assert [i for bucket in bounds.divide(members, times) for i in bucket] == list(range(len(members)))


def every_way(num: int) -> list[list[int]]:
    """All places where buckets of so many parameters may end."""
    inner = range(1, num)
    return [[*cuts, num] for count in range(num) for cuts in itertools.combinations(inner, count)]


def pairs(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends], ends, strict=False))


def _size(members: Sequence[ParamSpec], start: int, end: int) -> int:
    return sum(4 * member.room for member in members[start:end])


def _cost(costs: Any, start: int, end: int) -> float:
    return next(exposed for first, _, exposed in costs[end - 1] if first == start)


def lowered(captured: Program, hardware: Hardware, world: int, **options: Any) -> Program:
    config = Config.from_options({"bucket_bytes": "auto", **options})
    return run(default_passes(config, Mesh(world), hardware=hardware), captured).program


@given(recipes(), st.integers(0, 3), st.sampled_from([1, 2, 3]), st.sampled_from([1e-9, 1e-3]))
@few_examples(12)
def test_any_step_computes_the_same(recipe: Recipe, zero: int, world: int, latency_s: float) -> None:
    captured = build(recipe)
    programs = [lowered(captured, machine(latency_s), world, zero=zero) for _ in range(2)]
    assert programs[0].digest() == programs[1].digest()
    assert_same_step(programs[0], captured)


def test_buckets_of_a_step_follow_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMITS", (2**8, 2**12, 2**20))
    counts = []
    for latency_s in (0.0, 1.0):
        layout = lowered(blocks(3), machine(latency_s, 1e15), 2).layout
        assert layout is not None
        counts.append(len(layout.buckets))
    assert counts[0] > counts[1] == 1
    assert len(lowered(blocks(3), assumed_cpu(2, 2**34).for_ranks(2), 1).layout.buckets) == 1  # type: ignore[union-attr]


def test_a_machine_that_is_not_known_is_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="bucket_bytes='auto' weighs seconds") as caught:
        default_passes(Config(bucket_bytes="auto"), Mesh(2))
    assert "zgraph calibrate" in (caught.value.fix or "")
    assert default_passes(Config(bucket_bytes="auto"), Mesh(1))[1] == default_passes(Config(), Mesh(1))[1]


def test_other_words_are_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="bucket_bytes='much'"):
        Config.from_options({"bucket_bytes": "much"})
