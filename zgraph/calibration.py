"""What ``zgraph calibrate`` saved: where it is, what is in it, and the hardware that it describes."""

from __future__ import annotations

import os
from pathlib import Path

from zgraph.errors import StateError
from zgraph.hardware import Hardware


def default_path() -> Path:
    """``$ZGRAPH_HARDWARE``, or ``zgraph/hardware.json`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("ZGRAPH_HARDWARE")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(cache) / "zgraph" / "hardware.json"


def load(path: Path) -> Hardware:
    """The hardware of a saved calibration."""
    raise StateError(f"{path} cannot be read", fix="run `zgraph calibrate`")
