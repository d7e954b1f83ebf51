"""Import benchmarks, which are scripts beside each other and no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def scripts(names: Iterable[str]) -> Iterator[dict[str, ModuleType]]:
    """Modules of ``benchmarks`` by name, which leave ``sys.modules`` after."""
    names = list(names)
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(BENCHMARKS))
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
