"""The site builds strictly, with the README as its first page, and what its tables quote is what zgraph says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import zgraph
from tests.scripts import scripts

ROOT = Path(__file__).parent.parent


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site))
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the site is built from, in a folder that may be written to."""
    root = tmp_path / "checkout"
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    package = root / "build" / "types" / "zgraph"
    package.mkdir(parents=True)
    for path in [*(ROOT / "zgraph").iterdir(), ROOT / "passes", ROOT / "codegen"]:
        (package / path.name).symlink_to(path)
    return root


@pytest.mark.slow
def test_the_site_builds_and_has_all_that_is_public(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert "Use it" in (site / "index.html").read_text()
    api = (site / "api" / "index.html").read_text()
    errors = {name for name in zgraph.__all__ if name.endswith("Error")}
    for name in {*zgraph.__all__} - errors:
        assert f'id="zgraph.{name}"' in api, name
    for name in errors:
        assert f'id="zgraph.errors.{name}"' in api, name
    loaded = [
        found
        for page in site.rglob("*.html")
        for found in re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
    ]
    assert not loaded, "the site asks other hosts for something"
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "planted", "says"),
    [
        ("docs/quickstart.md", "[nowhere](nowhere.md)", "nowhere.md"),
        ("README.md", "[nowhere](docs/plan.md#nowhere)", "#nowhere"),
        ("docs/api.md", "::: zgraph.nowhere", "zgraph.nowhere"),
    ],
)
def test_what_leads_nowhere_stops_the_build(file: str, planted: str, says: str, checkout: Path, tmp_path: Path) -> None:
    with (checkout / file).open("a") as page:
        page.write(f"\n\n{planted}\n")
    done = build(checkout, tmp_path / "site")
    assert done.returncode != 0
    assert says in done.stderr


def test_every_page_of_docs_is_found_by_a_reader() -> None:
    listed = set(re.findall(r"^ *- (?:\w+: )?([\w]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= listed


def test_errors_are_quoted_as_zgraph_says_them() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## By what it says")[2]
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 12
    source = "\n".join(path.read_text() for folder in ("zgraph", "passes") for path in (ROOT / folder).rglob("*.py"))
    source += "\n".join(path.read_text() for path in (ROOT / "codegen").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    assert [part for part in quoted if part not in source] == []


def test_options_that_migration_names_exist() -> None:
    text = (ROOT / "docs" / "migration.md").read_text()
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", " ".join(rows)))
    options = set(vars(zgraph.Config())) | {"memory"}
    calls = {"train_step", "reset_parameters", "profile"}
    assert len(named & options) > 15
    assert named <= options | calls


@pytest.mark.slow
def test_pictures_are_drawn_of_lanes_before_and_after_scheduling(tmp_path: Path) -> None:
    with scripts(["pictures"]) as found:
        pictures = found["pictures"]
        timelines = pictures.timelines()
        before, after = timelines.values()
        assert list(timelines)[1] == "after Schedule"
        assert after.exposed_s < before.exposed_s
        pictures.main(tmp_path / "lanes.svg")
    drawn = ET.parse(tmp_path / "lanes.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) > 50
