"""The comments of an emitted step say truly on which lane each call starts or waits, and where it comes from."""

from __future__ import annotations

import re
from collections import Counter

from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples, one_layer
from tests.recipes import Recipe, build, recipes
from zgraph.codegen.emit import emit
from zgraph.config import Config
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Program

ON_DISK = {"optimizer": "disk", "parameters": "disk"}


def source(program: Program, config: Config, world: int) -> str:
    return emit(run(default_passes(config, config.mesh(world)), program).program).source


def lines(text: str, pattern: str) -> str:
    return "\n".join(line for line in text.splitlines() if re.search(pattern, line)) + "\n"


def test_lanes_buckets_and_phases_are_named_and_marked() -> None:
    text = source(one_layer(), Config(3, bucket_bytes=1, offload=ON_DISK), 2)
    assert_expected_inline(
        lines(text, "#"),
        """\
    # Lanes beside compute, where all calls run that name none:
    #   disk in: 2 reads
    #   data: 3 collectives between 2 ranks
    #   disk out: 2 writes
    # Buckets, in order of first use:
    #   bucket0: 32 elements, w
    # Inputs:
    #   v0: f64[16] is param:bucket0 on a disk
    #   v1: f64[16] is opt_state:bucket0:m on a disk
    #   v2: f64[4, 2] is batch:0
    #   v3: float is hyper:lr
    # ==== update bucket0 ====
    v4 = v1.load()  # starts on disk in
    # ==== forward bucket0 ====
    v5 = v0.load()  # starts on disk in
    # ==== update ====
    # ==== forward bucket0 ====
    v7 = v5.wait()  # waits for disk in
    v8 = comm.all_gather(v7)  # starts on data
    v9 = comm.wait(v8)  # waits for data
    # forward
    # ==== backward ====
    # backward bucket0
    v20 = comm.reduce_scatter(v19, 'avg')  # starts on data
    v21 = comm.wait(v20)  # waits for data
    # ==== update bucket0 ====
    v22 = v4.wait()  # waits for disk in
    v25 = v1.store(v24)  # starts on disk out
    v27 = v0.store(v26)  # starts on disk out
    # ==== forward ====
    v28 = comm.all_reduce(v13, 'avg')  # starts on data
    v29 = comm.wait(v28)  # waits for data
    # ==== update bucket0 ====
    v30 = v27.wait()  # waits for disk out
    v31 = v25.wait()  # waits for disk out
""",
    )


def test_groups_of_ranks_are_lanes_of_their_own() -> None:
    text = source(one_layer(), Config(3, shard_size=2), 6)
    assert_expected_inline(
        lines(text, "ranks$|starts|waits"),
        """\
    #   shard: 2 collectives between 2 ranks
    #   replica: 1 collective between 3 ranks
    #   data: 1 collective between 6 ranks
    v4 = comm.axes['shard'].all_gather(v0)  # starts on shard
    v6 = comm.axes['shard'].wait(v4)  # waits for shard
    v17 = comm.axes['shard'].reduce_scatter(v16, 'avg')  # starts on shard
    v18 = comm.axes['shard'].wait(v17)  # waits for shard
    v19 = comm.axes['replica'].all_reduce(v18, 'avg')  # starts on replica
    v20 = comm.axes['replica'].wait(v19)  # waits for replica
    v24 = comm.all_reduce(v10, 'avg')  # starts on data
    v25 = comm.wait(v24)  # waits for data
""",
    )


def test_a_step_whose_calls_all_compute_names_no_lane() -> None:
    text = emit(one_layer()).source
    assert "Lanes" not in text
    assert "starts on" not in text
    assert "Buckets" not in text  # there are none before bucketing


@few_examples(20)
@given(recipes(), st.integers(0, 3), st.sampled_from([None, ON_DISK]), st.sampled_from([1, 2, 4]))
def test_what_the_header_counts_starts_on_its_lane_and_is_waited_for(
    recipe: Recipe, zero: int, offload: dict[str, str] | None, world: int
) -> None:
    config = Config(zero, bucket_bytes=200, offload=offload)
    text = source(build(recipe), config, world)
    told = {name: int(count) for name, count in re.findall(r"#   ([\w ]+): (\d+) (?:collective|read|write)", text)}
    starts = re.findall(r"\.(\w+)\(.*  # starts on (.+)", text)
    waits = re.findall(r"\.wait\(.*\)  # waits for (.+)", text)
    assert Counter(lane for _, lane in starts) == told == Counter(waits)
    assert {lane for method, lane in starts if method == "load"} <= {"disk in"}
    assert {lane for method, lane in starts if method == "store"} <= {"disk out"}
    calls = re.findall(r"\.(?:all_gather|reduce_scatter|all_reduce|all_to_all|load|store|wait)\(", text)
    assert len(calls) == len(starts) + len(waits), "each is marked"
