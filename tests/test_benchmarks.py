"""The benchmark's instruments measure what they say, and the whole of it runs on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import fx

from tests.scripts import BENCHMARKS, scripts
from zgraph import ops
from zgraph.stopwatch import Measured


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules by name."""
    with scripts(path.stem for path in BENCHMARKS.glob("*.py")) as modules:
        yield modules


def test_live_bytes_follow_each_allocation(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    library = bench["memory"].compile_malloc_counter(tmp_path)
    program = """if True:
        from memory import Meter
        meter = Meter()
        first, second = bytearray(3 << 20), bytearray(2 << 20)
        both = meter.read()
        first += bytes(4 << 20)
        del second
        one = meter.read()
        del first
        meter.restart_peaks()
        small = [bytes(1000) for _ in range(10000)]
        none = meter.read()
        for held in both, one, none:
            print(held.live_bytes >> 20, held.live_peak_bytes >> 20)
    """
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (both, both_peak), (one, one_peak), (none, none_peak) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert (both, both_peak) == (5, 5)
    assert one == 7
    assert one_peak >= 9  # before the second was freed
    assert (none, none_peak) == (0, 0)


def test_resident_peak_sees_pages_that_are_gone(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    library = bench["memory"].compile_malloc_counter(tmp_path)
    program = """if True:
        from memory import Meter
        meter = Meter()
        pages = bytearray(b"x") * (64 << 20)
        del pages
        held = meter.read()
        print(held.resident_bytes >> 20, held.resident_peak_bytes >> 20)
    """
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    resident, peak = map(int, done.stdout.split())
    assert resident < 8
    assert 63 <= peak < 72


def test_ratios_pair_rounds(bench: dict[str, ModuleType]) -> None:
    spread = bench["comparison"].Spread.of_pairs([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)


def test_losses_that_part_are_a_complaint(bench: dict[str, ModuleType]) -> None:
    results = []
    for name, losses in (("single", [2.0, 1.0]), ("ddp", [2.0, 1.0 + 1e-6]), ("fsdp2", [2.0, float("nan")])):
        result = bench["comparison"].Result(name, "", 10, losses=losses, step_s=[1.0], cpu_s=[1.0], live_peak_bytes=1)
        results.append(result)
    entries = bench["command"].parse_entries(["single", "ddp", "fsdp2"])
    _, _, complaints = bench["command"].report_steps(entries, results)
    assert [complaint.split(":")[0] for complaint in complaints] == ["fsdp2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "64,2,3,32,256,2"], "width 64 is not a multiple of heads 3"),
        (["--model", "huge"], "'huge' is neither tiny, small, medium, narrow nor 6 integers"),
        (["--cap", "2 XB"], "'2 XB' is not a number of bytes"),
        (["--ranks", "0"], "'0' is not a positive integer"),
        (["--quick", "--peers", "fsdp3"], "no peer is called 'fsdp3'"),
        (["--quick", "--peers", "ddp:prefetch=2"], "ddp takes no options"),
        (["--quick", "--peers", "zgraph-3:prefetch"], "'prefetch' in 'zgraph-3:prefetch' is not option=value"),
        (["--quick", "--slope"], "not allowed with argument"),
    ],
)
def test_bad_arguments_are_named(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench["command"].run(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


class Member:
    """What a rank serves in these tests."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def number(self) -> int:
        return self.rank

    def refuse(self) -> None:
        if self.rank == 1:
            raise ValueError("rank 1 refuses")

    def exit(self) -> None:
        os.write(1, b"last words\n")
        os._exit(3)

    def hoard(self) -> int:
        return len(b"x" * (256 << 20))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("refuse", "(?s)rank 1 failed during refuse.*ValueError: rank 1 refuses"),
        ("exit", "(?s)rank [01] exited with status 3 during exit\nlast words"),
    ],
)
def test_a_failing_rank_ends_all_with_its_reason(
    bench: dict[str, ModuleType], tmp_path: Path, method: str, message: str
) -> None:
    ranks = bench["ranks"].Ranks(Member, 2, tmp_path)
    assert ranks.ask("number", 30) == [0, 1]
    with pytest.raises(bench["ranks"].RankError, match=message):
        ranks.ask(method, 30)


def test_a_cap_kills_what_outgrows_it(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    try:
        cap = bench["cgroups"].MemoryCap(f"zgraph-test-{os.getpid()}", 64 << 20)
    except bench["cgroups"].CapError as error:
        pytest.skip(str(error))

    class Capped(Member):
        def __init__(self, rank: int) -> None:
            cap.enter()
            super().__init__(rank)

    ranks = bench["ranks"].Ranks(Capped, 1, tmp_path)
    try:
        assert ranks.ask("number", 30) == [0]
        assert not cap.killed
        with pytest.raises(bench["ranks"].RankError, match="rank 0 was ended by SIGKILL during hoard"):
            ranks.ask("hoard", 30)
        assert cap.killed
    finally:
        ranks.end()
        cap.remove()


ALL = ("local", "ddp", "zero-redundancy", "fsdp2", "zgraph-0", "zgraph-1", "zgraph-2", "zgraph-3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "peers", [("local", "fsdp2", "zgraph-3"), pytest.param(ALL, marks=pytest.mark.nightly)], ids="-".join
)
def test_quick_run_compares_peers(peers: tuple[str, ...], tmp_path: Path) -> None:
    lines = tmp_path / "results.jsonl"
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--quick", "--json", str(lines)]
    command += [] if peers == ALL else ["--peers", "single", *peers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {row["name"]: row for row in map(json.loads, lines.read_text().splitlines())}
    for name in peers:
        assert results[name]["problem"] is None
        assert len(results[name]["losses"]) == 4
        assert results[name]["live_peak_bytes"] > results[name]["live_bytes"] > 0
        assert name in done.stdout
        if name != "local":
            assert results[name]["collectives"]
            assert results[name]["losses"] == pytest.approx(results["single"]["losses"], rel=1e-5)
            if results[name]["settings"]["private_network"] and not name.startswith("zgraph"):  # whose ranks may read
                assert results[name]["wire_bytes"] > results[name]["num_parameters"] * 4


@pytest.mark.slow
def test_recomputation_is_no_worse_than_what_torch_chooses() -> None:
    command = [sys.executable, str(BENCHMARKS / "recompute.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n| 0.5 |") == 1


def test_compiling_is_what_a_first_step_takes_more_than_another(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    bench["kernels"].time_compiling(bench["models"].SHAPES["tiny"], "zgraph")
    seconds, of_processors = map(float, capsys.readouterr().out.split())
    assert seconds > 0
    assert of_processors > 0


@pytest.mark.slow
def test_a_step_starts_and_moves_less_than_inductors(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    bench["kernels"].count()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    moved = {(name, kernels): int(num_bytes.replace(",", "")) for name, kernels, _, num_bytes in rows}
    started = {(name, kernels): int(launches) for name, kernels, launches, _ in rows}
    for name in ("GPT", "Llama", "ViT"):
        for step in (name, f"{name}, clip_norm=1.0"):
            assert moved[step, "zgraph"] <= 0.9 * moved[step, "Inductor's"]
            assert moved[step, "zgraph"] < moved[step, "update"]
            assert started[step, "zgraph"] <= started[step, "Inductor's"]


@pytest.mark.slow
def test_state_on_a_disk_is_measured_beside_the_disk() -> None:
    command = [sys.executable, str(BENCHMARKS / "offload.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("disk alone s", "bound by", "predicted s", "activations on disk: each rank reads"):
        assert part in done.stdout
    assert ("DeepSpeed: skipped, " in done.stderr) != ("times as long as zgraph" in done.stdout)
    for name in ("state on disk", "all state on disk"):
        (read,) = re.findall(rf"^{name}: each rank reads ([\d.]+) MB", done.stdout, re.MULTILINE)
        assert float(read) > 0


def test_deepspeed_is_left_out_with_the_reason_where_it_cannot_run(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Builder:
        has_libaio, loaded = False, 0

        def is_compatible(self, verbose: bool) -> bool:
            return self.has_libaio

        def load(self, verbose: bool) -> None:
            Builder.loaded += 1

    operators = ModuleType("deepspeed.ops.op_builder")
    operators.AsyncIOBuilder = Builder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", operators)
    for found, has_libaio, reason in (
        (None, False, "deepspeed is not installed"),
        (True, False, "it finds no libaio to compile with: apt-get install libaio-dev"),
        (True, True, None),
    ):
        Builder.has_libaio = has_libaio
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=found: found)
        assert bench["offload"].prepare_deepspeed() == (reason is None)
        assert capsys.readouterr().err == ("" if reason is None else f"DeepSpeed: skipped, {reason}\n")
    assert Builder.loaded == 1


def test_a_model_and_its_batch_tell_what_they_were_built_by(bench: dict[str, ModuleType]) -> None:
    models = bench["models"]
    shape = models.Shape(width=12, layers=3, heads=4, tokens=5, vocabulary=7, sequences=6)
    batch = models.build_batch(shape, 2, range(1, 2))
    assert models.shape_of(models.build_model(shape, "meta"), batch) == shape


def test_what_trains_under_caps_is_drawn_with_what_may_be_more(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    def line(name: str, cap_bytes: int, trained: int | None, killed: int | None) -> str:
        held = None if trained is None else {"num_parameters": trained}
        return json.dumps({"name": name, "cap_bytes": cap_bytes, "trained": held, "killed": killed})

    lines = [
        line("a < b", 2**30, 64_000_000, 101_800_000),
        line("a < b", 2**29, 1, 2),  # measured again below
        line("on disk", 2**29, 253_000_000, None),
        line("large", 2**29, None, 26_300_000),
        line("a < b", 2**29, 26_300_000, 38_900_000),
    ]
    point = bench["trainable"].Point
    found = bench["trainable"].read(lines)
    assert found == {
        "a < b": [point(2**29, 26_300_000, False), point(2**30, 64_000_000, False)],
        "on disk": [point(2**29, 253_000_000, True)],
    }
    (tmp_path / "caps.jsonl").write_text("\n".join(lines))
    bench["trainable"].main(tmp_path / "caps.jsonl", tmp_path / "trainable.svg")
    drawn = ET.parse(tmp_path / "trainable.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert {title.text for title in drawn.iter(f"{svg}title")} == {
        "a < b: 26.3M in 512 MiB",
        "a < b: 64.0M in 1 GiB",
        "on disk: at least 253.0M in 512 MiB",
    }
    texts = [text.text for text in drawn.iter(f"{svg}text")]
    assert {"a < b", "on disk", "no larger one was tried", "512 MiB", "1 GiB", "100M"} <= {*texts}


@pytest.mark.slow
def test_measured_steps_take_turns_with_others_and_run_in_the_predicted_order(tmp_path: Path) -> None:
    page = tmp_path / "lanes.html"
    command = [sys.executable, str(BENCHMARKS / "profiling.py"), "--quick", "--json", "--report", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["same_order"]
    assert found["num_calls"] > 100
    assert len(found["ratios"]) == len(found["cpu_ratios"]) == 1
    (program,) = json.loads(page.with_suffix(".json").read_text())["programs"]
    assert program["measured"]["end_s"][-1] == found["measured_s"]
    assert len(program["measured"]["steps_s"]) == 4


def test_what_is_done_in_one_call_is_timed_beside_several(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        bench["kernels"].compare_eight_bits(2560, rounds=1)
        bench["kernels"].compare_losses(1, ((8, 5),))
    finally:
        torch.set_num_threads(threads)
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "ms" in line]
    assert set(rows) == {"quantize", "dequantize", "mean of two", "pack", "unpack", "8 x 5"}


def test_what_is_exposed_is_what_collectives_and_their_waits_take(bench: dict[str, ModuleType]) -> None:
    """A product of 1 s, a gather of 2, its wait of 3 and a product of 1, behind a placeholder, which takes none."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = [
        graph.call_function(target, args)
        for target, args in ((torch.mm, (x, x)), (ops.all_gather, (x, 2, "data")), (ops.wait, (x,)), (torch.mm, (x, x)))
    ]
    measured = Measured(tuple(range(1, 1 + len(calls))), (1.0, 3.0, 6.0, 7.0), (7.0,))
    runtime = mock.Mock()
    runtime.last().executable.program.graph = graph
    runtime.measured.return_value = measured
    assert bench["exposed"].seconds(runtime) == (7.0, 5.0)


@pytest.mark.slow
def test_exposed_communication_is_measured_beside_what_is_predicted() -> None:
    options = ["--models", "tiny", "--steps", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(BENCHMARKS / "exposed.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[1] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        step, exposed = (float(row[column].split()[0]) for column in (2, 4))
        assert 0 < exposed <= step + 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--convolutions", "--dtypes", "float32", "float64"]], ids=str)
def test_no_operator_works_in_more_than_is_said(options: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "scratch.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" MB |") > 150
