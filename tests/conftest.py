"""Fixtures every test may ask for, and how many programs property tests try: HYPOTHESIS_PROFILE chooses."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.ranks import Ranks
from zgraph.disk import DEFAULT_PATH

settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=300, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=25_000, deadline=None, print_blob=True)
# What was measured of this machine must not decide what is tested.
os.environ["ZGRAPH_HARDWARE"] = str(Path(tempfile.gettempdir()) / "zgraph-tests" / "no-hardware.json")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
# pytest listens to loggers that do not propagate. Nothing reaches this one unless somebody listens; then torch takes
# down the stack of each of its events, which made every capture half as slow again.
logging.getLogger("torch.__trace").propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--sample N``: about one in N tests of each module, the same ones each time."""
    parser.addoption("--sample", type=int, default=1, metavar="N", help="about one in N tests, always the same")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of the sample."""
    one_in = config.getoption("--sample")
    left_out = [item for item in items if zlib.crc32(item.nodeid.encode()) % one_in]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """Modules stay: nobody needs to look through their millions of objects for garbage after every compiled step."""
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A pool of ranks: ``ranks.run(function, *args, world=2)`` calls a top-level function on each."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A new directory on a disk, where ``tmp_path`` may be in memory."""
    with tempfile.TemporaryDirectory(dir=DEFAULT_PATH, ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same random state, one thread and float32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
