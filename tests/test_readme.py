"""Every Python block of the README and of the guides runs, in order and as written."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import Ranks

ROOT = Path(__file__).parent.parent


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks("README.md")

GUIDES = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if blocks(f"docs/{path.name}"))


def test_the_readme_and_guides_show_code() -> None:
    assert len(BLOCKS) >= 3
    assert "zgraph.compile(" in BLOCKS[0]
    assert {"recipe", "plan", "troubleshooting"} <= set(GUIDES)


def run_as_written(file: str, folder: str) -> None:
    """Run a document's blocks as a script, in a folder."""
    script = Path(folder, "document.py")
    script.write_text("\n".join(blocks(file)))
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_the_readme_runs_as_written(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(BLOCKS))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bytes of parameters on this rank" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_as_written(ranks: Ranks, guide: str, tmp_path: Path) -> None:
    ranks.run(run_as_written, f"docs/{guide}.md", str(tmp_path), world=1, timeout_s=550)  # a warm process


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    defined = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= defined


def test_every_file_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:zgraph|passes|codegen|tests)/[\w/.]*)`|\]\(([\w/.]+)\)", text)
    assert named
    missing = [name for pair in named for name in pair if name and not (ROOT / name).exists()]
    assert not missing
