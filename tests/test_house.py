"""The package as a whole: what is in the wheel, what may be imported how, and what make does on a fresh machine."""

from __future__ import annotations

import email
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import zgraph

ROOT = Path(__file__).parent.parent
PACKAGES = {"zgraph": "zgraph", "passes": "zgraph/passes", "codegen": "zgraph/codegen"}


def copy_of_the_package(target: Path) -> Path:
    """What a wheel is built from, in a folder that may be written to."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def run(*command: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said; the caller judges its exit status."""
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without a network."""
    source = copy_of_the_package(tmp_path_factory.mktemp("source"))
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist")
    built = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("zgraph_compiler-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_at_its_import_name(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {"zgraph/__init__.py", "zgraph/passes/__init__.py", "zgraph/codegen/__init__.py"} <= expected
    modules = {name for name in wheel.namelist() if name.endswith(".py")}
    assert modules == expected
    files = {f"zgraph/report/assets/{path.name}" for path in (ROOT / "zgraph/report/assets").iterdir()}
    assert len(files) > 3
    assert {"zgraph/py.typed", *files} <= set(wheel.namelist())


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "zgraph-compiler"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    required = {re.split(r"\W", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {"torch", "click", "isal", "networkx", "numpy", "rich", "sympy", "triton"}
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_what_is_tested_is_this_checkout(folder: str, package: str) -> None:
    """An editable install of another checkout would lend its ``zgraph.passes`` to this one's ``zgraph``."""
    assert importlib.import_module(package.replace("/", ".")).__file__ == str(ROOT / folder / "__init__.py")


@pytest.mark.slow
def test_no_module_is_loaded_twice() -> None:
    """From the root, where ``import passes`` would work, everything comes in under its one name."""
    script = """
import importlib, pkgutil, sys
import zgraph, zgraph.passes, zgraph.codegen
for package in (zgraph, zgraph.passes, zgraph.codegen):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
loaded = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
files = [file for file in loaded if file.startswith(tuple(sys.argv[1:]))]
print(len(files), len(set(files)), "passes" in sys.modules, "codegen" in sys.modules)
"""
    folders = [f"{ROOT / folder}/" for folder in PACKAGES]  # others, as .venv may be, lie below the root too
    said = run(sys.executable, "-c", script, *folders, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    num_modules, num_files, *top_level = said.stdout.split()
    assert num_modules == num_files
    assert int(num_modules) > 20
    assert top_level == ["False", "False"]


@pytest.mark.parametrize("line", ["import {}", "from {} import anything", "from {}.anything import Thing"])
@pytest.mark.parametrize("folder", ["passes", "codegen"])
def test_the_linter_refuses_the_second_name(line: str, folder: str) -> None:
    ruff = (sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "tests/planted.py", "-")
    refused = run(*ruff, cwd=ROOT, stdin=line.format(folder) + "\n")
    assert refused.returncode == 1
    assert f"import zgraph.{folder}" in refused.stdout
    allowed = run(*ruff, cwd=ROOT, stdin=line.format(f"zgraph.{folder}") + "\n")
    assert allowed.returncode == 0, allowed.stdout


def test_the_type_checker_sees_every_package(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in PACKAGES:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text('"""Planted."""\n\n\ndef untyped(x):\n    return x\n')
    stamp = f"{sys.prefix}/for-lint"
    said = run("make", "types", f"PYTHON={sys.executable}", f"VENV={sys.prefix}", "-o", stamp, cwd=tmp_path)
    assert said.returncode != 0
    for package in PACKAGES.values():
        assert f"build/types/{package}/__init__.py:4: error: Function is missing a type annotation" in said.stdout


@pytest.mark.parametrize("name", zgraph.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    public = getattr(zgraph, name)
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}("), "a dataclass without a docstring gets its signature for one"
    for member_name, member in vars(public).items() if inspect.isclass(public) else ():
        if inspect.isfunction(member) and not member_name.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{member_name}"


@pytest.mark.parametrize("target", ["demo", "test", "quick", "lint", "bench"])
def test_make_installs_torch_before_what_depends_on_it(target: str, tmp_path: Path) -> None:
    planned = run("make", "--dry-run", target, f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", cwd=ROOT)
    assert planned.returncode == 0, planned.stderr
    torch, package = (line for line in planned.stdout.splitlines() if "pip install" in line)
    assert re.search(r"'torch(==2\.13\.0|>=2\.13)'$", torch)
    assert "--editable" in package
    assert ("[test]" in package) == (target in {"test", "quick"})


@pytest.mark.parametrize("answer", ["3.9", "3.14", ""])
def test_make_refuses_a_python_it_cannot_use(answer: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {answer}\n")
    python.chmod(0o755)
    said = run("make", "test", f"PYTHON={python}", f"VENV={tmp_path}/venv", cwd=ROOT)
    assert said.returncode == 2
    assert f"is Python '{answer}'; zgraph needs 3.10 to 3.13" in said.stderr


def test_continuous_integration_runs_every_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == ["make lint", "make test"]
