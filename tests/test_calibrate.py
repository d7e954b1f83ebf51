"""Measuring this machine: what is saved, read, refused and printed, and that the whole of it runs."""

from __future__ import annotations

import csv
import json
import math
import runpy
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fit_hardware
from tests.calibrations import CPU_MATMUL, GPU_MATMUL, LAUNCH_S, made_up
from zgraph import calibrate, calibration, cli, fitted, machines
from zgraph.calibration import Calibration
from zgraph.errors import OptionError, StateError
from zgraph.fitting import fit
from zgraph.machines import preset
from zgraph.which_hardware import find_hardware

F32 = torch.float32


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_is_saved_is_read(device_type: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "machine.json"
    saved = made_up(device_type)
    saved.save(path)
    assert calibration.read(path) == saved
    assert [each.name for each in path.parent.iterdir()] == ["machine.json"]
    saved.save(path)  # over the old one
    assert calibration.read(path) == saved


def test_of_a_calibration_of_before_loops_are_assumed(tmp_path: Path) -> None:
    data = made_up().as_dict()
    for run in data["runs"].values():
        del run["loops"]
    (tmp_path / "hardware.json").write_text(json.dumps(data))
    loops = calibration.load(tmp_path / "hardware.json").loops
    assert loops is not None
    assert loops.launch_s == 4 * LAUNCH_S


def test_hardware_takes_as_long_as_was_measured() -> None:
    machine = made_up().hardware()
    assert machine.device_type == "cpu"
    assert machine.launch_s == LAUNCH_S
    assert machine.memory_s(2**20) == pytest.approx(2**20 / 4e9)
    assert machine.memory_s(2**20, in_place=True) == pytest.approx(2**20 / 1e10)
    assert machine.vector_s(F32, 1e9) == pytest.approx(0.1)
    assert machine.transcendental_s(2**20) == pytest.approx(2**20 / 1e9)
    assert machine.loops is not None
    assert machine.loops.operations == pytest.approx(2e10)
    assert machine.loops.functions == pytest.approx(1e9)
    assert machine.loops.launch_s == LAUNCH_S + 2**12 / 2e10
    assert machine.gather_s(2**25) == pytest.approx(2**25 / 3e9)
    assert machine.attention_s(F32, 2**29, 1) == pytest.approx(2**29 / 5e10)
    assert machine.transfer_s("host", "disk", 2**26) == pytest.approx(4 * 2**26 / 1e9, rel=0.01)
    for ranks, slower in ((1, 1), (2, 2)):
        of_rank = machine.for_ranks(ranks)
        expected = slower * CPU_MATMUL.seconds(1, 300, 700, 200)
        assert of_rank.matmul_s(F32, 1, 300, 700, 200) == pytest.approx(expected, rel=0.03)
    two = machine.for_ranks(2)
    # The made-up seconds are those of twice the bytes, and of the full tensor.
    assert two.collective_s("all_gather", 2**20, 2) == pytest.approx(LAUNCH_S + 2 * 2**20 / 1e9)
    assert two.collective_s("all_to_all", 2**20, 2) == two.collective_s("all_gather", 2**20, 2)


def test_gpus_are_not_slower_for_being_several() -> None:
    machine = made_up("cuda").hardware()
    assert machine.for_ranks(2) is machine
    assert machine.devices_per_node == 2
    expected = GPU_MATMUL.seconds(1, 3000, 3000, 3000)
    assert machine.matmul_s(F32, 1, 3000, 3000, 3000) == pytest.approx(expected, rel=0.03)
    # Nothing of a launch is in what a GPU has played back.
    assert machine.memory_s(2**20) == pytest.approx(2**20 / 4e9)
    assert machine.transfer_s("device", "host", 2**26) == pytest.approx(2**26 / 2e10, rel=0.01)
    assert machine.transfer_s("device", "host", 2**26, pinned=False) == pytest.approx(2**26 / 1e10, rel=0.01)
    assert machine.collective_s("all_gather", 2**26, 2) == pytest.approx(2**26 / 1e9)


def test_links_that_are_not_measured_are_those_of_the_preset_of_a_gpu() -> None:
    known = replace(made_up("cuda"), device="NVIDIA H100 80GB HBM3", memory_bytes=79 * 2**30)
    alone = replace(known, runs={1: known.runs[1]})
    assert known.hardware().network == alone.hardware().network == preset("H100").network
    assert alone.hardware().collectives == preset("H100").collectives
    assert made_up("cuda").hardware().network == preset("L40S").network, "unknown: without fast links"


def damaged(change: Callable[[dict[str, Any]], object]) -> str:
    data = made_up().as_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON: Expecting value"),
        ("{", "is not JSON"),
        ("[]", "is not a calibration: it has no schema"),
        ("{}", "is not a calibration: it has no schema"),
        (damaged(lambda data: data.update(schema=1)), "is of schema 1; this zgraph reads 3"),
        (damaged(lambda data: data.pop("runs")), "is damaged: no 'runs'"),
        (damaged(lambda data: data.update(runs={})), "is damaged: runs is empty"),
        (damaged(lambda data: data.update(runs=[])), "is damaged: runs is not an object"),
        (damaged(lambda data: data.update(device_type="tpu")), "is damaged: device_type is 'tpu'"),
        (damaged(lambda data: data.update(devices=0)), "is damaged: devices is 0, not a positive number"),
        (damaged(lambda data: data["runs"].update(x=data["runs"]["1"])), "is damaged: invalid literal"),
        (damaged(lambda data: data["runs"]["1"].pop("gather")), "is damaged: no 'gather'"),
        (damaged(lambda data: data["runs"]["1"].update(launch_s=True)), "runs.1.launch_s is True"),
        (damaged(lambda data: data["runs"]["2"].update(reads_peers=1)), "runs.2.reads_peers is 1, not true or false"),
        (damaged(lambda data: data["runs"]["1"].update(memory=[])), "runs.1.memory is not a list of points"),
        (damaged(lambda data: data["runs"]["1"].update(memory=[[1]])), r"runs.1.memory has a point that is not 2 numb"),
        (damaged(lambda data: data["runs"]["2"]["memory"].append([1, -1])), "runs.2.memory is -1, not a positive"),
        (damaged(lambda data: data["runs"]["2"]["memory"].append([1, math.nan])), "runs.2.memory is nan, not a pos"),
        (damaged(lambda data: data["runs"]["1"]["disk"].pop("read")), "no disk.read in the run of 1"),
        (damaged(lambda data: data["runs"]["1"]["matmul"].update(float32=[[1, 2]])), r"matmul.float32 has a point"),
    ],
)
def test_a_file_that_is_not_a_calibration_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(StateError, match=says) as caught:
        find_hardware(path)
    assert caught.value.what.startswith(str(path))
    assert "zgraph calibrate" in str(caught.value)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[calibrate.Options]:
    """Makes ``zgraph calibrate`` find a machine at once; what it was asked for."""
    asked: list[calibrate.Options] = []

    def measure(options: calibrate.Options) -> Calibration:
        asked.append(options)
        return made_up()

    monkeypatch.setattr(calibrate, "measure", measure)
    return asked


def test_calibrate_saves_and_prints_a_table(
    measured: list[calibrate.Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "machine.json"
    assert cli.main(["calibrate", "--ranks", "3", "--output", str(path), "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for part in ("made up", "1 rank(s) of 4 thread(s)", "2 rank(s) of 2", "2.0 us", "all_gather", "disk, write"):
        assert part in printed.out
    assert "measuring for about 45 s, longer where cores are busy; " in printed.err
    assert f"it will be saved to {path}\n" in printed.err
    assert f"measured in 12 s; saved to {path}" in printed.err
    assert calibration.read(path) == made_up()
    assert measured == [calibrate.Options(3, 45, tmp_path)]


def test_calibrate_saves_where_find_hardware_looks(
    measured: list[calibrate.Options],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ZGRAPH_HARDWARE", str(tmp_path / "here.json"))
    assert cli.main(["calibrate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "here.json").read_text())
    assert find_hardware("cpu").name == "cpu, calibrated"
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "0"], "0 is not in the range 1<=x<=64"),
        (["--budget", "0"], "0 is not in the range 1<=x<=3600"),
        (["--output"], "requires an argument"),
        (["extra"], "extra"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_what_cannot_be_saved_is_not_measured(
    measured: list[calibrate.Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x.json", "Not a directory|File exists")):
        assert cli.main(["calibrate", "--output", str(path)]) == 3
        said = capsys.readouterr().err
        assert any(f"zgraph: {path} cannot be written: {reason}" in said for reason in why.split("|"))
        assert "fix: choose another --output" in said
    assert not measured


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no file can be written in .*missing"):
        calibrate.measure(calibrate.Options(1, directory=tmp_path / "missing"))


def test_no_pass_begins_where_those_before_took_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[float] = []

    def a_pass(*_: Any) -> calibration.Run:
        passes.append(1.0)
        now[0] += 10
        return made_up().runs[1]

    now = [0.0]
    monkeypatch.setattr(calibrate, "_pass", a_pass)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    for budget, expected in ((1.0, 1), (9.0, 2), (60.0, 3)):
        passes.clear()
        assert calibrate._rank(calibrate._Effort(1, budget, 3, calibrate.MIB), tmp_path) == made_up().runs[1]
        assert len(passes) == expected
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "1 rank(s), pass 1 of 3: done after 10 s, which is all"
    assert told[1:3] == [
        "1 rank(s), pass 1 of 3: done after 10 s",
        "1 rank(s), pass 2 of 3: done after 20 s, which is all",
    ]


def test_what_takes_long_is_made_ready_for_no_longer_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], list[int]()

    def make() -> Callable[[], None]:
        made.append(1)
        return lambda: now.__setitem__(0, now[0] + 0.6)

    bench = calibrate._Bench(calibrate._Effort(1, 1.0, 1, 128 * calibrate.MIB))
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    assert bench.seconds(make, calibrate.MIB) == pytest.approx(0.6)
    assert len(made) == 2
    now[0], calls = 0.0, []

    def slow() -> None:
        calls.append(1)
        now[0] += 0.6

    assert bench.seconds_of_collective(slow, calibrate.KIB) == pytest.approx(0.6)
    assert len(calls) == 5, "one to begin with, one to see how long it takes, and three to be measured"


def test_the_median_of_passes_is_kept() -> None:
    first = made_up().runs[1]
    thirds = [[[1.0, 5.0], [2.0, 3.0]], [[1.0, 4.0], [2.0, 6.0]], [[1.0, 9.0], [2.0, 1.0]]]
    runs = [replace(first, memory=rows, launch_s=float(i)) for i, rows in enumerate(thirds, 1)]
    assert calibrate.middle(runs) == replace(first, memory=[[1.0, 5.0], [2.0, 3.0]], launch_s=2.0)


def test_the_hosts_memory_is_measured_on_all_cores_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    rows = calibrate._host_memory()
    assert torch.get_num_threads() == threads
    assert [num_bytes for num_bytes, _ in rows] == [3 * 4 * 2**20, 3 * 64 * 2**20]
    assert all(seconds > 0 for _, seconds in rows)


def test_a_gpus_host_is_as_fast_as_was_measured_and_as_its_table_says_where_it_was_not() -> None:
    measured = made_up("cuda")
    assert measured.hardware().host_bandwidth == pytest.approx(6e10)
    alone = replace(measured.runs[1], host_memory=[])
    assumed = replace(measured, runs={**measured.runs, 1: alone}).hardware()
    assert assumed.host_bandwidth == preset("L40S").host_bandwidth
    assert measured.hardware().host_s(6e8) == pytest.approx(0.02, rel=0.01)  # of two devices at once


def test_the_file_that_a_disk_is_measured_by_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "DISK_BYTES", 2 * calibrate.MIB)
    move, seen = calibrate._move_all, []

    def watched(*args: Any) -> None:
        move(*args)
        seen.extend(tmp_path.iterdir())

    monkeypatch.setattr(calibrate, "_move_all", watched)
    found = calibrate._disk(tmp_path)
    assert [size for size, _ in found["write"]] == [4 * calibrate.KIB, 2 * calibrate.MIB]
    assert seen == []


@pytest.mark.slow
def test_this_machine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, going over little memory once in next to no time; what it finds has to be a machine."""
    monkeypatch.setattr(calibrate, "PASSES", 1)
    monkeypatch.setattr(calibrate, "COLD_BYTES", calibrate.MIB)
    monkeypatch.setenv("ZGRAPH_HARDWARE", str(tmp_path / "here.json"))
    assert cli.main(["calibrate", "--budget", "1", "--ranks", "2", "--json", "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["runs"].keys() == {"1", "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]
    machine = find_hardware("cpu")
    assert machine.devices_per_node == machines.available_cores()
    for ranks in (1, 2):
        of_rank = machine.for_ranks(ranks)
        assert 1e8 < 2 * 512**3 / of_rank.matmul_s(F32, 1, 512, 512, 512) < 1e13
        assert 1e8 < 2**24 / of_rank.memory_s(2**24) < 1e12
        assert 1e-7 < of_rank.launch_s < 1e-3
    assert 1e6 < 2**22 / machine.for_ranks(2).collective_s("all_gather", 2**22, 2) < 1e11
    assert 1e6 < machine.disk.write < 1e11


def test_a_fit_finds_parameters_in_spite_of_outliers() -> None:
    sizes = [10.0**i for i in range(12)]
    measured = [(2e-5 + size / 3e8) * (10 if i == 4 else 1) for i, size in enumerate(sizes)]

    def times(parameters: Any) -> list[float]:
        return [parameters[0] + size / parameters[1] for size in sizes]

    latency, rate = fit(times, measured, (1e-3, 1e6), ((1e-9, 1), (1, 1e12)))
    assert latency == pytest.approx(2e-5, rel=0.05)
    assert rate == pytest.approx(3e8, rel=0.05)


def test_a_fit_stays_within_its_bounds() -> None:
    low, high = fit(lambda p: [p[0] * p[1], p[1]], [1e-3, 50.0], (1, 1), ((0.1, 10), (0.1, 10)))
    assert low == pytest.approx(0.1)
    assert 0.1 <= high <= 10


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Tables of measurements as they would be if the fitted models were right."""
    with (tmp_path / "xla_gemm.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["device_key", "b", "m", "n", "k", "dtypes", "TFLOPS"])
        keys = {gpu: key for key, gpu in fit_hardware.GPUS.items()}
        for (gpu, kinds), (dtype, *_) in fit_hardware.MATMULS.items():
            model = fitted.MATMULS[gpu, dtype]
            for shape in ((b, m, n, k) for b in (1, 4) for m in (256, 4096) for n in (512, 2048) for k in (256, 4096)):
                table.writerow([keys[gpu], *shape, kinds, 2 * math.prod(shape) / model.seconds(*shape) / 1e12])
    with (tmp_path / "xla_collectives.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["device_key", "collective", "group_size", "tensor_bytes(full/unsharded)", "time_us"])
        for key, gpu in fit_hardware.GPUS.items():
            for name, kind in fit_hardware.KINDS.items():
                inside = fitted.COLLECTIVES[gpu, kind]
                for size, world in ((2**i, n) for i in range(10, 32, 2) for n in (2, 4, 8)):
                    table.writerow([key, name, world, size, inside.seconds(size, world, world) * 1e6])
    with (tmp_path / "published.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "gpu", "n_gpus", "n_nodes", "metric", "value"])
        for number in range(1, 58):
            gpu, world, nodes = ("A100", 8, 1) if number < 13 else ("H200", 8, 1) if number < 24 else ("B200", 32, 4)
            gpu, world, nodes = ("H100", 16, 2) if number > 51 else (gpu, world, nodes)
            table.writerow([f"BW-{number:03}", gpu, world, nodes, f"x @ {4 ** (number % 7)}MiB", 10 + number % 7])
    return tmp_path


@pytest.mark.slow
def test_the_fit_of_tables_finds_the_models_that_made_them(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "fitted.py"
    monkeypatch.setattr(fit_hardware, "TARGET", written)
    monkeypatch.setattr("sys.argv", ["fit_hardware.py", "--facts", str(facts), "--write"])
    assert fit_hardware.main() == 0
    assert "H100    bfloat16" in capsys.readouterr().out
    found = runpy.run_path(str(written))
    for key, model in found["MATMULS"].items():
        errors = [
            abs(model.seconds(*shape) / fitted.MATMULS[key].seconds(*shape) - 1)
            for shape in ((1, 1024, 1024, 1024), (2, 512, 4096, 1024), (4, 4096, 4096, 4096))
        ]
        assert statistics.median(errors) < 0.03, key
    for gpu in fit_hardware.GPUS.values():
        model, expected = found["COLLECTIVES"][gpu, "all_gather"], fitted.COLLECTIVES[gpu, "all_gather"]
        for size in (2**16, 2**24, 2**30):
            assert model.seconds(size, 8, 8) == pytest.approx(expected.seconds(size, 8, 8), rel=0.05)


def test_the_fit_says_which_table_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fit_hardware.py", "--facts", str(tmp_path)])
    assert fit_hardware.main() == 2
    assert "xla_gemm.csv" in capsys.readouterr().err
