"""Every Python block of the README and of the guides runs, in order and as written, in one process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks("README.md")

GUIDES = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if blocks(f"docs/{path.name}"))


def test_the_readme_and_guides_show_code() -> None:
    assert len(BLOCKS) >= 3
    assert "zgraph.compile(" in BLOCKS[0]
    assert {"recipe", "plan", "troubleshooting"} <= set(GUIDES)


@pytest.mark.slow
def test_the_readme_runs_as_written(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(BLOCKS))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bytes of parameters on this rank" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_as_written(guide: str, tmp_path: Path) -> None:
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks(f"docs/{guide}.md")))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
