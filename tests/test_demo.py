"""The demo: its text and batches are the same everywhere, its ranks fail loudly, and it ends well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from zgraph import demo
from zgraph.errors import RankError, ZgraphError


def test_the_text_is_the_start_of_the_standard_library() -> None:
    text = demo.read_text(limit_bytes=100_000)
    future = Path(sysconfig.get_paths()["stdlib"], "__future__.py").read_bytes()
    assert bytes(text[: len(future)].tolist()) == future
    assert text.numel() == 100_000
    assert torch.equal(text, demo.read_text(limit_bytes=100_000))


def test_a_missing_standard_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ZgraphError, match=f"found 0 bytes of Python source in {tmp_path}"):
        demo.read_text()


def test_targets_are_the_bytes_that_follow() -> None:
    text = torch.arange(demo.TOKENS + 50).to(torch.uint8)
    inputs, targets = demo.sample(text, step=3, num_sequences=7)
    assert inputs.shape == targets.shape == (7, demo.TOKENS)
    assert torch.equal(targets, (inputs + 1) % 256)


def test_batches_depend_on_the_step_alone() -> None:
    text = demo.read_text(limit_bytes=100_000)
    first = demo.sample(text, step=0, num_sequences=2)[0]
    torch.rand(1)
    assert torch.equal(first, demo.sample(text, step=0, num_sequences=2)[0])
    assert not torch.equal(first, demo.sample(text, step=1, num_sequences=2)[0])


def test_the_model_has_about_ten_million_parameters() -> None:
    with torch.device("meta"):
        assert 9.5e6 < sum(parameter.numel() for parameter in demo.GPT().parameters()) < 10.5e6


def fail_on_rank_one(_options: demo.Options) -> None:
    """Stands in for ``demo.train``: rank 1 fails while the others wait for it."""
    if os.environ["RANK"] == "1":
        raise ZgraphError("no room for the third bucket", fix="use more ranks")
    time.sleep(300)


@pytest.mark.slow
def test_a_failed_rank_ends_the_demo_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", fail_on_rank_one)
    with pytest.raises(RankError, match=r"rank 1 of 2 failed: ZgraphError: no room for the third bucket\n  fix: use"):
        demo.launch(demo.Options())


def ranks_of(group: int) -> int:
    """How many ranks there are in a group of processes, whatever they have imported so far."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found += os.getpgid(int(path.parent.name)) == group and b"spawn_main" in path.read_bytes()
    return found


@pytest.mark.slow
def test_a_demo_that_is_interrupted_while_its_ranks_start_says_so_in_one_line() -> None:
    command = [sys.executable, "-c", "import sys; from zgraph.cli import main; sys.exit(main())", "demo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while ranks_of(process.pid) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)  # so that they import something
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "zgraph: interrupted\n")
    assert not ranks_of(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "zero"), [(2, 3), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((1, 0), (3, 2)))]
)
def test_the_demo_agrees_with_plain_pytorch(ranks: int, zero: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from zgraph.cli import main; sys.exit(main())"]
    options = ["demo", "--steps", "2", "--ranks", str(ranks), "--zero", str(zero), "--json"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert max(report["differences"]) <= report["bound"] == 1e-4
    num_bytes = 4 * report["num_parameters"]
    param_parts, state_parts = (ranks if zero == 3 else 1), (ranks if zero >= 1 else 1)
    assert report["zgraph"]["param_bytes"] == pytest.approx(num_bytes / param_parts, rel=0.01)
    assert report["zgraph"]["optimizer_state_bytes"] == pytest.approx(2 * num_bytes / state_parts, rel=0.01)
    assert "step 2/2: loss" in done.stderr
