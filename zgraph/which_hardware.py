"""Which machine is meant: by name, by a file that ``zgraph calibrate`` saved, or the one that this process runs on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from zgraph import calibration, machines
from zgraph.errors import OptionError
from zgraph.hardware import Hardware


def find_hardware(
    name: str | Hardware | Path,
    *,
    devices_per_node: int | None = None,
    nic_bytes_per_s: float | None = None,
    host_memory_bytes: int | None = None,
) -> Hardware:
    """The hardware of a name, or of a file that ``zgraph calibrate`` saved.

    Args:
        name: of a preset (``zgraph.machines.PRESETS``), in any case and with or without hyphens; ``"cpu"`` or
            ``"here"``, this machine, as calibrated if it was; a path.
        devices_per_node: instead of the usual number.
        nic_bytes_per_s: of the network, one direction, per device; instead of the usual.
        host_memory_bytes: of one node; instead of the usual.

    Raises:
        OptionError: there is no such name, or the numbers are not positive.
        StateError: the file cannot be read as a calibration.
    """
    given: object = name
    if not isinstance(given, (str, Path, Hardware)):
        raise OptionError(f"hardware is a {type(given).__name__}", fix="give a name, a path, or a zgraph.Hardware")
    if isinstance(name, Hardware):
        found = name
    elif isinstance(name, Path) or os.sep in name or name.endswith(".json"):
        found = calibration.load(Path(name))
    else:
        wanted = _plain(name)
        presets = {_plain(preset): preset for preset in machines.PRESETS}
        if wanted in ("cpu", "here"):
            saved = calibration.saved_path()
            found = calibration.load(saved) if saved is not None else machines.this_cpu()
        elif wanted in presets:
            found = machines.preset(presets[wanted])
        else:
            raise OptionError(
                f"hardware {name!r} is unknown",
                fix=f"one of {', '.join(machines.PRESETS)}, cpu, or a file that `zgraph calibrate` saved",
            )
    if devices_per_node is not None:
        if devices_per_node < 1:
            raise OptionError(f"devices_per_node={devices_per_node!r} is not a number of devices", fix="at least 1")
        found = replace(found, devices_per_node=devices_per_node)
    if nic_bytes_per_s is not None:
        if not nic_bytes_per_s > 0:
            raise OptionError(f"nic_bytes_per_s={nic_bytes_per_s!r} is not a rate", fix="bytes per second, above 0")
        found = replace(found, network=replace(found.network, bytes_per_s=nic_bytes_per_s))
    if host_memory_bytes is not None:
        if host_memory_bytes < 1:
            raise OptionError(f"host_memory_bytes={host_memory_bytes!r} is not a number of bytes", fix="at least 1")
        found = replace(found, host_memory_bytes=host_memory_bytes)
    return found


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def hardware_of(device: torch.device, world: int) -> Hardware:
    """The machine that this process runs on.

    Args:
        device: where it computes.
        world: ranks; on a CPU, all of them share this machine.

    Raises:
        OptionError: it is a GPU that is neither known nor calibrated.
        StateError: a calibration was saved, and cannot be read.
    """
    return told(tell(device), world)


def tell(device: torch.device) -> str:
    """The machine that this process runs on, in a text that other ranks can be told; raises as ``hardware_of``."""
    saved = calibration.saved_path()
    if saved is not None and (measured := calibration.read(saved)).device_type == device.type:
        return json.dumps({"calibration": measured.as_dict()})
    if device.type == "cpu":
        return json.dumps({"cores": machines.available_cores(), "memory_bytes": machines.available_memory()})
    properties = torch.cuda.get_device_properties(device)
    name = machines.preset_of(properties.name, properties.total_memory)
    if name is None:
        raise OptionError(f"{properties.name} is not a GPU that is known", fix="run `zgraph calibrate` to measure it")
    return json.dumps({"preset": name, "host_memory_bytes": machines.available_memory()})


def told(text: str, world: int) -> Hardware:
    """The machine that ``tell`` told, as each of so many ranks finds it."""
    about = json.loads(text)
    if "preset" in about:
        return replace(machines.preset(about["preset"]), host_memory_bytes=about["host_memory_bytes"])
    if "calibration" in about:
        return _calibrated(text).for_ranks(world)
    return machines.assumed_cpu(about["cores"], about["memory_bytes"]).for_ranks(world)


@lru_cache(maxsize=2)
def _calibrated(text: str) -> Hardware:
    """The machine of a calibration that was told. Curves are fitted to it, and every captured step asks for them."""
    return calibration.from_dict(json.loads(text)["calibration"], "what rank 0 has sent").hardware()
