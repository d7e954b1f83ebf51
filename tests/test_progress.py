"""What is shown of compiling and training: on a terminal alone, by rank 0 alone, and in files where asked for."""

from __future__ import annotations

import errno
import json
import math
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from rich.console import Console
from torch import nn

import zgraph
from tests.programs import one_layer
from tests.ranks import Ranks
from zgraph import progress as shown
from zgraph.compile_times import CAPTURE, known, path
from zgraph.progress import PASSES, Phases, Progress


def compiled(**options: Any) -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    return zgraph.compile(
        model, optimizer=torch.optim.AdamW(model.parameters()), loss=lambda y, *_: y.square().mean(), **options
    )


def train(model: Any, progress: Progress, steps: int, **scalars: Any) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model.train_step(torch.randn(8, 4))
        progress.step(loss, tokens=32, **scalars)
        losses.append(loss.item())
    return losses


def test_scalars_are_written_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    model, path = compiled(clip_norm=1.0), tmp_path / "run.jsonl"
    with Progress(model, steps=7, every=3, jsonl=path) as progress:
        losses = train(model, progress, 7, lr=1e-3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["loss"] for line in lines] == [losses[2], losses[5], losses[6]]
    for line in lines:
        assert line["tokens_per_s"] == pytest.approx(32 / line["step_s"], rel=1e-9)
        assert line["lr"] == 1e-3
        assert line["budget_bytes"] == model.plan.budget_bytes
        assert line["predicted_step_s"] == model.plan.chosen.step_s
        assert 0 <= line["predicted_exposed_s"] <= line["predicted_step_s"]
        assert 10**7 < line["memory_bytes"] < line["budget_bytes"]
    assert lines[-1]["gradient_norm"] == model.stats()["gradient_norm"]
    assert lines[0]["time_s"] < lines[1]["time_s"] < lines[2]["time_s"]


def test_the_budget_is_the_one_that_options_were_chosen_for(tmp_path: Path) -> None:
    model, path = compiled(memory="1GiB"), tmp_path / "run.jsonl"
    with Progress(model, every=1, jsonl=path) as progress:
        train(model, progress, 1)
    assert json.loads(path.read_text())["budget_bytes"] == 2**30


def test_a_step_that_is_not_told_reads_nothing(tmp_path: Path) -> None:
    class Unread(torch.Tensor):
        def item(self) -> float:
            raise AssertionError("the device was waited for")

    model = compiled()
    model.train_step(torch.randn(8, 4))
    loss = torch.zeros([]).as_subclass(Unread)
    with Progress(model, every=2, jsonl=tmp_path / "run.jsonl") as progress:
        progress.step(loss)
        with pytest.raises(AssertionError, match="waited for"):
            progress.step(loss)
    with Progress(model, every=1) as quiet:  # nothing is shown and nothing written, so nothing is read
        quiet.step(loss)


def test_a_file_that_cannot_be_written_any_more_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled()
    with Progress(model, every=1, jsonl=tmp_path / "run.jsonl", show=False) as progress:
        train(model, progress, 1)

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("zgraph.progress._Jsonl.tell", full)
        train(model, progress, 2)
    assert caplog.text.count("No space left") == 1


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    model, path = compiled(), tmp_path / "run.jsonl"
    model.train_step(torch.randn(8, 4))
    with Progress(model, every=1, jsonl=path) as progress:
        progress.step(torch.tensor(math.nan), extra=torch.tensor(math.inf))
    line = json.loads(path.read_text(), parse_constant=lambda _: pytest.fail("no JSON"))
    assert (line["loss"], line["extra"]) == (None, None)


def test_a_file_is_continued(tmp_path: Path) -> None:
    model, path = compiled(), tmp_path / "run.jsonl"
    for _ in range(2):
        with Progress(model, every=1, jsonl=path) as progress:
            train(model, progress, 1)
    assert len(path.read_text().splitlines()) == 2


def test_weights_and_biases_and_tensorboard_get_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, sorted(values)))

        def finish(self) -> None:
            told.append("finished")

    class Writer:
        def __init__(self, directory: str) -> None:
            told.append(directory)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((step, name))

        def close(self) -> None:
            told.append("closed")

    def init(**arguments: Any) -> Run:
        told.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    model = compiled()
    with Progress(model, every=1, tensorboard=tmp_path, wandb={"project": "p"}) as progress:
        train(model, progress, 1)
    assert told[:2] == [str(tmp_path), {"project": "p"}]
    assert (1, "loss") in told
    assert any("loss" in names for _, names in (each for each in told if isinstance(each, tuple)))
    assert sorted(told[-2:]) == ["closed", "finished"]


@pytest.mark.slow
def test_tensorboard_itself_reads_what_was_written(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = compiled()
    with Progress(model, every=2, tensorboard=tmp_path) as progress:
        losses = train(model, progress, 4, odd=math.nan)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert {"loss", "step_s", "tokens_per_s", "memory_bytes", "odd"} <= set(read.Tags()["scalars"])
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [(2, losses[1]), (4, losses[3])]


@pytest.mark.slow
def test_weights_and_biases_itself_keeps_what_was_told(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    model = compiled()
    arguments = {"project": "p", "mode": "offline", "dir": str(tmp_path)}
    with Progress(model, every=2, wandb=arguments) as progress:
        losses = train(model, progress, 4, odd=math.nan)
    assert wandb.run is None, "it is finished"
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    text = kept.read_bytes()  # protocol buffers, whose values are JSON
    for told in ("loss", repr(losses[1]), repr(losses[3]), "tokens_per_s", "memory_bytes", "NaN"):
        assert told.encode() in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"every": 0}, "every=0 is not a number of steps"),
        ({"steps": True}, "steps=True is not a number of steps"),
        ({"jsonl": "/nowhere/run.jsonl"}, "/nowhere/run.jsonl cannot be written: No such file or directory"),
        ({"wandb": {}}, "Weights & Biases is not installed"),
        ({"tensorboard": "runs"}, "TensorBoard is not installed"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(zgraph.ZgraphError, match=re.escape(says)):
        Progress(compiled(), **given)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(zgraph.OptionError, match="a Linear, is not compiled"):
        Progress(nn.Linear(2, 2))


def ranks_train(directory: str) -> list[str]:
    model = compiled()
    with Progress(model, every=1, jsonl=Path(directory) / "run.jsonl") as progress:
        train(model, progress, 2)
    return (Path(directory) / "run.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_rank_0_alone_writes_and_counts_the_tokens_of_all(ranks: Ranks, tmp_path: Path) -> None:
    (lines, _) = ranks.run(ranks_train, str(tmp_path), world=2)
    assert len(lines) == 2
    line = json.loads(lines[0])
    assert line["tokens_per_s"] == pytest.approx(2 * 32 / line["step_s"], rel=1e-9)


# On a terminal

SCRIPT = """
import sys, torch, zgraph
model = torch.nn.Linear(4, 1)
model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), loss=lambda y, x: y.square().mean(),
                       progress="off" not in sys.argv)
with zgraph.Progress(model, steps=4, every=2, show="off" not in sys.argv) as progress:
    for _ in range(4):
        progress.step(model.train_step(torch.randn(8, 4)), tokens=8)
"""


def on_terminal(*arguments: str) -> str:
    """What a process writes to a terminal of 200 columns that is its standard error."""
    ours, theirs = pty.openpty()
    cache = str(Path(tempfile.gettempdir(), "zgraph-tests", "cache"))  # how long this takes is of no use to the user
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm", "XDG_CACHE_HOME": cache}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end was closed
                break
            written += part
        assert process.wait() == 0, written
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


@pytest.mark.slow
def test_a_terminal_is_shown_phases_and_steps() -> None:
    text = on_terminal()
    assert re.search(r"zgraph: compiled in [\d.]+ m?s: capture .* passes .* proofs .* kernels ", text)
    assert re.search(r"passes: \d+ done, \w+ the last; \d+ nodes|zgraph: capture", text)
    assert re.search(r"loss \d\.\d{4}, .* a step, .* tokens/s, .* of .*, waits \d+% of it \(predicted\)", text)
    assert "4/4" in text


@pytest.mark.slow
def test_a_terminal_is_shown_nothing_if_it_is_not_asked_for() -> None:
    assert "zgraph" not in on_terminal("off")


def test_nothing_is_written_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    model = compiled()
    with Progress(model, every=1) as progress:
        train(model, progress, 2)
    assert capfd.readouterr() == ("", "")


TOLD = {
    "loss": 4.12345, "step_s": 0.2034, "tokens_per_s": 40123.0, "memory_bytes": 447.7 * 2**20,
    "budget_bytes": 22.13 * 2**30, "predicted_step_s": 0.2, "predicted_exposed_s": 0.05, "num_skipped_steps": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("width", [36, 40, 60, 80, 100, 120, 160, 200])
@pytest.mark.parametrize("steps", [None, 100_000])
def test_a_line_of_a_terminal_leaves_out_what_matters_least_and_cuts_nothing(
    width: int, steps: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COLUMNS", str(width)), ("TERM", "xterm"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    line = shown._Terminal(steps)
    line.tell(99_999, TOLD)
    line.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    drawn = text[text.rindex("loss") :].strip()
    assert len(drawn) <= width
    found = re.fullmatch(r"(.*?) (?:━*╸* )? ?99999/(?:100000|\?) 0:00:00", drawn)
    assert found is not None, drawn
    parts = found[1].split(", ")
    whole = [part for part in shown.in_one_line(TOLD).split(", ") if width > 60 or not part.startswith("waits")]
    assert set(parts) <= {*whole, "447.7 MiB"}
    assert parts[0] == "loss 4.1235"
    if width >= 160:
        assert parts == whole


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A file that is written to as a terminal is; compiles are remembered nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with (tmp_path / "terminal").open("w+") as file:
        yield file


def compiling(terminal: TextIO, names: list[str], left: list[float | None]) -> None:
    """A compile by passes of these names; what is left before it, after each of them, and at its end."""
    program = one_layer()
    phases = Phases(Console(force_terminal=True, file=terminal, width=200))
    with phases.shown("compiled", nn.Linear(2, 2), is_first=True, asked=True):
        left.append(phases.left_s())
        with phases.phase(CAPTURE):
            time.sleep(0.002)
        phases.captured(program.num_nodes())
        with phases.phase(PASSES):
            phases.watch(None, program)
            for name in names:
                phases.watch(type(name, (zgraph.Pass,), {})(), program)
                left.append(phases.left_s())
        with phases.phase("kernels"):
            pass
        left.append(phases.left_s())


def test_the_second_compile_is_told_how_much_is_left_and_each_part_is_remembered(terminal: TextIO) -> None:
    left: list[float | None] = []
    compiling(terminal, ["Tidy", "Bucket"], left)
    assert left == [None] * 4, "nothing is known before the first"
    (first,) = known(path())
    assert [name for name, _ in first.parts] == ["capture", "Tidy", "Bucket", "kernels"]
    assert (first.what, first.is_first, first.num_modules) == ("compiled", True, 1)
    assert first.num_nodes == one_layer().num_nodes()
    left.clear()
    compiling(terminal, ["Tidy", "Bucket"], left)
    assert left[0] is not None
    assert 0 < left[0] <= sum(seconds for _, seconds in first.parts)
    assert left[-1] is None
    assert len(known(path())) == 2
    terminal.seek(0)
    text = terminal.read()
    assert "about 1 s left" in text
    assert text.count("compiled in") == 2


def test_a_compile_that_fails_is_not_remembered(terminal: TextIO) -> None:
    phases = Phases(Console(force_terminal=True, file=terminal))
    with (
        pytest.raises(ZeroDivisionError),
        phases.shown("compiled", nn.Linear(2, 2), is_first=True, asked=True),
        phases.phase(CAPTURE),
    ):
        1 / 0  # noqa: B018
    assert known(path()) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.02, "1 s"), (1.4, "1 s"), (37, "40 s"), (94, "90 s"), (96, "2 min"), (3700, "60 min")]
)
def test_what_is_left_is_told_to_one_digit(seconds: float, text: str) -> None:
    assert shown.roughly(seconds) == text


def test_phases_tell_proofs_apart_from_passes() -> None:
    phases = Phases()
    with phases.phase(PASSES):
        pass
    record = zgraph.pipeline.PassRecord("Tidy", 0.5, 0.25, 1, 1)
    phases.seconds[PASSES] = 1.0
    phases.divide((record, record))
    assert phases.seconds == {PASSES: 0.5, "proofs": 0.5}


def test_a_bar_that_is_shown_keeps_compiling_quiet(monkeypatch: pytest.MonkeyPatch, terminal: TextIO) -> None:
    monkeypatch.setattr(shown, "_live", [object()])
    compiling(terminal, [], [])
    terminal.seek(0)
    assert not terminal.read()
    assert known(path()) == []
