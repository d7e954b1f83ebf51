"""The comparison with published steps: what it reads and leaves out, and that blocks are repeated exactly."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import BENCHMARKS, scripts

ROW = {
    "id": "X-1", "category": "train", "model": "llama-tiny", "layers": "6", "hidden": "64", "heads": "4",
    "kv_heads": "2", "ffn": "128", "vocab": "256", "seq_len": "32", "micro_batch": "2", "grad_accum": "1",
    "precision": "bf16", "activation_ckpt": "full", "parallelism": "FSDP2 8", "shard_degree": "8",
    "gpu": "H100-80GB SXM",
    "n_gpus": "8", "n_nodes": "1", "software": "torchtitan Dec-2024 eager", "tokens_s_gpu": "30000",
    "peak_mem": "0.1",
    "peak_mem_unit": "GiB", "peak_mem_kind": "max_reserved (caching allocator)", "trust": "A", "source": "first",
}  # fmt: skip
"""A row that can be predicted."""

NOT_USED = {
    "X-2": ({"precision": "fp8 rowwise"}, "float8 or narrower"),
    "X-3": ({"parallelism": "FSDP4 TP2"}, "tensor, context, pipeline or expert parallel"),
    "X-4": ({"micro_batch": ""}, "incomplete configuration"),
    "X-5": ({"category": "bandwidth"}, "not a training step"),
    "X-6": ({"offload": "optimizer->CPU"}, "offload"),
    "X-7": ({"software": "something"}, "unknown software (something)"),
    "X-8": (
        {"tokens_s_gpu": "", "peak_mem_kind": "nvidia-smi used"},
        "neither throughput nor allocator's peak is given",
    ),
    "X-9": ({"trust": "C"}, "trust C was not asked for"),
    "X-10": ({"params": "1000000000"}, "shape and number of parameters do not agree"),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules by name."""
    with scripts(["peers_predicted", "traces", "predicted", "accuracy"]) as modules:
        yield modules


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "X-0", "activation_ckpt": "none", "grad_accum": "2", "source": "second"}]
    rows += [{**ROW, "id": name, **changed} for name, (changed, _) in NOT_USED.items()]
    table, lines = write(tmp_path / "table.csv", rows), tmp_path / "lines"
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- accuracy: begin -->\nold\n<!-- accuracy: end -->\nafter\n")
    command = [sys.executable, "accuracy.py", "--published", table, "--trust", "A", "--json", lines, "--processes", "1"]
    command += ["--markdown", document, "--plot", tmp_path / "plot.svg"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["id"] for row in told] == ["X-1", "X-0"]
    for row in told:
        assert row["time_error"] == pytest.approx(row["tokens_s"] / 30000 - 1)
        assert row["memory_error"] == pytest.approx(row["peak_gib"] / 0.1 - 1)
        assert row["peak_gib"] < 0.1
    assert all(reason in done.stdout for _, reason in NOT_USED.values())
    assert "2 rows were predicted; 9 were not used" in done.stdout
    assert "first\n" in done.stdout
    assert "second\n" in done.stdout
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| torchtitan eager | 2 |" in text
    assert (tmp_path / "plot.svg").read_text().count("<title>X-") == 4


def test_reasons(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = [{**ROW, "id": name, **changed} for name, (changed, _) in NOT_USED.items()]
    cases, reasons = bench["accuracy"].read(write(tmp_path / "table.csv", rows), "A")
    assert not cases
    assert reasons == {reason: 1 for _, reason in NOT_USED.values()}


@pytest.mark.parametrize(
    ("text", "devices", "rate"),
    [
        ("NVLink4 intra; 400Gb/s RDMA NIC per GPU inter", 8, 50e9),
        ("1600Gb/s RoCE per node", 8, 25e9),
        ("NVLink3 intra; 4x100Gb/s RoCE per node", 8, 6.25e9),
        ("NVLink3 intra; 4x100Gb/s RoCE per node", 4, 12.5e9),
        ("NVLink4", 8, None),
    ],
)
def test_network(bench: dict[str, ModuleType], text: str, devices: int, rate: float | None) -> None:
    assert bench["peers_predicted"]._nic(text, devices) == (rate, rate is not None)


def test_shape_follows_the_number_of_parameters(bench: dict[str, ModuleType]) -> None:
    peers = bench["peers_predicted"]
    row = {
        **ROW,
        "model": "qwen3-1.7b",
        "layers": "28",
        "hidden": "2048",
        "heads": "16",
        "kv_heads": "8",
        "ffn": "6144",
    }
    case = peers.case_of(peers.complete({**row, "vocab": "151936", "params": "1720574976"}))
    assert case.model.tied
    assert case.model.qk_norm


def test_ranks_of_ties(bench: dict[str, ModuleType]) -> None:
    assert bench["accuracy"].spearman([(1, 1), (2, 2), (2, 2), (3, 5)]) == pytest.approx(1)
    assert bench["accuracy"].spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert bench["accuracy"].spearman([(1, 3), (2, 2)]) is None


REST = [pytest.param(*each, marks=pytest.mark.nightly) for each in ((None, 3, 1), ("operators", 1, 1))]


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "zero", "accumulate"), [("blocks", 3, 2), *REST])
def test_blocks_are_repeated_exactly(
    bench: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    recompute: str | None,
    zero: int,
    accumulate: int,
) -> None:
    """Seven blocks made of four are what a capture of seven has: works in order, seconds, and bytes."""
    peers, traces = bench["peers_predicted"], bench["traces"]
    case = peers.case_of(peers.complete(ROW))
    software = replace(case.software, clip=False)  # to add up more squares is another call
    case = replace(
        case,
        software=software,
        recompute=recompute,
        zero=zero,
        accumulate=accumulate,
        model=replace(case.model, layers=7),
    )
    made: list[Any] = []
    for depth in (4, 7):
        monkeypatch.setattr(traces, "DEPTH", depth)
        made.append(traces._steps_of_group([case])[0])
    monkeypatch.setattr(traces, "DEPTH", 4)
    for program, whole in zip(made[0].whole, made[1].programs, strict=True):
        done, expected = ([call.works for call in made.calls if call.waits_for is None] for made in (program, whole))
        assert done == expected
        assert program.footprint.peak_bytes == whole.footprint.peak_bytes
        assert program.reserved_bytes() == whole.reserved_bytes()
        hardware = case.hardware()
        cost_of = bench["predicted"].costs_of(case, hardware, bench["predicted"].Constants())
        assert program.play(cost_of, hardware).step_s == whole.play(cost_of, hardware).step_s


@pytest.mark.slow
def test_torchtitan_gathers_the_last_block_once(bench: dict[str, ModuleType]) -> None:
    peers, traces = bench["peers_predicted"], bench["traces"]

    def num_gathers(software: str) -> int:
        case = peers.case_of(peers.complete({**ROW, "software": software}))
        (program,) = traces._steps_of_group([case])[0].whole
        return sum(work.collective == "all_gather" for call in program.calls for work in call.works)

    assert num_gathers("torchtitan eager") == num_gathers("torchtitan eager reshard=always") - 1


@pytest.mark.slow
def test_a_compiler_keeps_what_products_and_attention_of_backward_read(bench: dict[str, ModuleType]) -> None:
    """As torch's partitioner does, whose ``is_materialized_backwards`` is why (torch/_functorch/partitioners.py)."""
    peers, traces = bench["peers_predicted"], bench["traces"]
    row = {**ROW, "software": "torchtitan compile", "activation_ckpt": "none"}
    (program,) = traces._steps_of_group([peers.case_of(peers.complete(row))])[0].programs
    begins = next(run.start for run in program.runs if run.kind == "backward")
    kept = [h for h in program.holdings if h.first < begins <= h.last and h.module.startswith("layers.1")]
    tokens, width, ffn, keys = 2 * 32, 64, 128, 32
    inputs = 4 * width  # of the block, of its two norms' readers and of its second half
    attention = 2 * width + 2 * keys  # queries, keys, values and the result
    large = sum(h.num_bytes for h in kept if h.num_bytes >= 2 * tokens * keys)
    assert large == 2 * tokens * (inputs + attention + 3 * ffn)


def test_what_another_stream_used_waits_for_gathers_of_fsdp1(bench: dict[str, ModuleType]) -> None:
    traces = bench["traces"]
    mib = 2**20
    held = traces.Holding("w", traces.Kind.GATHERED, 20 * mib, 1, 9, traces.GATHER)
    gathered = tuple(replace(held, first=start + 1, last=start + 9) for start in range(0, 50, 10))
    trace = traces.Trace((), gathered, (traces.Run("forward", 0, 0, 60),), {})
    assert [replace(trace, ahead=ahead).reserved_bytes() // mib for ahead in range(4)] == [20, 20, 40, 60]


@pytest.mark.slow
def test_the_root_stays_gathered_and_optimizers_make_few_calls(bench: dict[str, ModuleType]) -> None:
    peers, traces = bench["peers_predicted"], bench["traces"]
    for software, parallelism in [("torchtitan eager", "FSDP1 8"), ("torchtitan eager reshard=always", "FSDP2 8")]:
        case = peers.case_of(peers.complete({**ROW, "software": software, "parallelism": parallelism}))
        (program,) = traces._steps_of_group([case])[0].programs
        ends = max(run.start for run in program.runs if run.kind == "backward")
        kept = [h for h in program.holdings if h.kind is traces.Kind.GATHERED and h.last >= ends]
        assert any(h.num_bytes == 2 * 256 * 64 for h in kept), "the embedding"
        assert {work.num_calls for call in program.calls if call.is_update for work in call.works} == {1}
