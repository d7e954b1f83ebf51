"""``zgraph plan``: the command line of ``zgraph.plan``."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from zgraph.config import PRECISIONS, RECOMPUTE, parse_bytes
from zgraph.decision import AUTO, decide
from zgraph.errors import OptionError
from zgraph.functions import call_function, failed, find_function
from zgraph.planner import open_search
from zgraph.presets import Decoder, ModelConfig, find_model, from_hf
from zgraph.progress import roughly
from zgraph.search import Search
from zgraph.which_hardware import find_hardware

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}

EXAMPLES = """examples:
  zgraph plan --preset llama3-8b --world 8 --hardware h100 --batch 1 --seq 8192 --precision bf16
  zgraph plan --hf config.json --world 2 --hardware rtx4090 --memory 22GiB --batch 4 --seq 2048
  zgraph plan --model train:build_model --world 1 --hardware here --batch 8 --seq 512"""


def add_arguments(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare the arguments.

    Args:
        required: whether a model and a number of ranks must be given.
    """
    model = command.add_mutually_exclusive_group(required=required)
    model.add_argument("--preset", metavar="NAME", help="a model by name, such as gpt2, llama3-70b, mixtral-8x7b")
    model.add_argument("--hf", metavar="CONFIG.json", type=Path, help="a Hugging Face config.json")
    model.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function that returns a model, which is called with int64 tokens and labels of shape (batch, seq), "
        "or a pair of a model and its batch; it is given batch= and seq= if it takes them",
    )
    command.add_argument("--world", type=int, required=required, metavar="N", help="how many ranks")
    command.add_argument("--hardware", default="cpu", metavar="NAME", help="h100, a100-80, ..., cpu, or a calibration")
    command.add_argument("--devices-per-node", type=int, metavar="N", help="default: what is usual for the hardware")
    command.add_argument("--nic", metavar="BYTES", help="per second, device and direction between nodes, such as 50GB")
    command.add_argument(
        "--memory", metavar="BYTES", help="of one rank, such as 80GiB; default: the device's, less 6 %%"
    )
    command.add_argument("--batch", type=int, default=1, metavar="N", help="examples of one rank in a step; default: 1")
    command.add_argument("--seq", type=int, default=1024, metavar="N", help="tokens of an example; default: 1024")
    command.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adamw", help="default: %(default)s")
    command.add_argument("--precision", choices=sorted(PRECISIONS), help="default: float32")
    command.add_argument("--state-precision", choices=["int8"], help="default: as the optimizer makes it")
    command.add_argument("--bucket-bytes", default=AUTO, metavar="BYTES", help="such as 16MiB; default: searched")
    command.add_argument("--prefetch", default=AUTO, metavar="N", help="gathers ahead; default: by cost")
    command.add_argument("--clip-norm", type=float, metavar="X", help="default: no clipping")
    command.add_argument("--zero", default=AUTO, metavar="0-3", help="default: searched")
    command.add_argument(
        "--shard-size", default=AUTO, metavar="N", help="ranks that divide state, or none for all; default: searched"
    )
    command.add_argument(
        "--secondary-size", metavar="N", help="ranks that keep what forward has gathered for backward; default: none do"
    )
    command.add_argument("--accumulate", default=AUTO, metavar="N", help="micro-batches of a step; default: searched")
    command.add_argument(
        "--recompute", default=AUTO, metavar="HOW", help=f"none, {', '.join(RECOMPUTE)}, or 0 to 1; default: searched"
    )
    command.add_argument(
        "--offload", metavar="KIND=TIER,...", help="such as optimizer=disk,parameters=disk, or auto; default: nothing"
    )
    command.add_argument("--unshard", default=AUTO, metavar="0-1", help="part of parameters; default: searched")
    command.add_argument("--in-flight", default=AUTO, metavar="N", help="buckets, or none for any; default: searched")


def run(arguments: argparse.Namespace) -> bool:
    """Plan and print; whether the plan fits.

    Raises:
        ZgraphError: see ``zgraph.plan``.
    """
    search, budget = open_search(**asked(arguments), tell=Telling())
    made = decide(search, budget)
    if arguments.json:
        sys.stdout.write(made.to_json() + "\n")
    else:
        Console().print(made)
    return made.fits


class Telling:
    """Tells on standard error of a search that takes long: what was estimated, and how much there is left at most.

    Args:
        first_s, every_s: seconds until it tells first, and again.
    """

    def __init__(self, first_s: float = 3.0, every_s: float = 20.0) -> None:
        self._start = time.perf_counter()
        self._next, self._every_s = self._start + first_s, every_s

    def __call__(self, search: Search) -> None:
        """A search works something out."""
        now = time.perf_counter()
        if now < self._next or len(search.members) == 1:
            return
        self._next = now + self._every_s
        done, left = len(search.tried), len(search.members) - len(search.tried)
        most = f", {roughly((now - self._start) / done * left)} more at most" if done else ""
        sys.stderr.write(
            f"zgraph: searching options for {search.world} x {search.hardware.name}: {done} of at most "
            f"{len(search.members)} choices estimated, {roughly(now - self._start)} so far{most}\n"
        )


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``zgraph.plan`` is given.

    Raises:
        OptionError: an argument is out of range, or there is no such model or machine.
    """
    for name in ("batch", "seq"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name} {getattr(arguments, name)} is not a positive number")
    if arguments.memory is not None and arguments.memory.isdecimal() and int(arguments.memory) < 2**20:
        raise OptionError(f"--memory {arguments.memory} is bytes", fix=f"--memory {arguments.memory}GiB, with a unit")
    nic = float(parse_bytes(arguments.nic, "nic")) if arguments.nic is not None else None
    hardware = find_hardware(arguments.hardware, devices_per_node=arguments.devices_per_node, nic_bytes_per_s=nic)
    if hardware.device_type == "cpu" and (nic is not None or arguments.devices_per_node is not None):
        raise OptionError("--nic and --devices-per-node are for GPUs: all ranks of a CPU share one machine")
    options: dict[str, Any] = {
        "zero": _integer(arguments.zero, "zero"),
        "shard_size": None if arguments.shard_size == "none" else _integer(arguments.shard_size, "shard-size"),
        "accumulate": _integer(arguments.accumulate, "accumulate"),
        "prefetch": _integer(arguments.prefetch, "prefetch"),
        "bucket_bytes": arguments.bucket_bytes,
        "recompute": None if arguments.recompute == "none" else _number(arguments.recompute),
    }
    if arguments.secondary_size is not None:
        options["secondary_size"] = _integer(arguments.secondary_size, "secondary-size", is_searched=False)
    if arguments.offload is not None:
        options["offload"] = _offload(arguments.offload)
    if arguments.unshard != AUTO:
        options["unshard"] = _number(arguments.unshard)
    if arguments.in_flight != AUTO:
        options["in_flight"] = None if arguments.in_flight == "none" else _integer(arguments.in_flight, "in-flight")
    for name in ("precision", "state_precision", "clip_norm"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    model, batch = _model_and_batch(arguments)
    return {
        "model": model,
        "optimizer": OPTIMIZERS[arguments.optimizer],
        "batch": batch,
        "world_size": arguments.world,
        "hardware": hardware,
        "memory": arguments.memory,
        **options,
    }


def _offload(text: str) -> str | dict[str, str]:
    """Tiers by kind, of ``kind=tier,...``; a word alone as it is."""
    if "=" not in text:
        return text
    pairs = [each.partition("=") for each in text.split(",")]
    return {kind.strip(): tier.strip() for kind, _, tier in pairs}


def _number(text: str) -> float | str:
    """A number where a text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _integer(text: str, name: str, *, is_searched: bool = True) -> int | str:
    if text == AUTO and is_searched:
        return text
    if not text.isdecimal():
        fix = "give one, or leave it out" + (" to have it searched" if is_searched else "")
        raise OptionError(f"--{name} {text} is not a number", fix=fix)
    return int(text)


def _model_and_batch(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    tokens = torch.empty(arguments.batch, arguments.seq, dtype=torch.int64, device="meta")
    config: ModelConfig | None = None
    if arguments.preset is not None:
        config = find_model(arguments.preset)
    elif arguments.hf is not None:
        config = from_hf(arguments.hf)
    with torch.device("meta"):
        made = Decoder(config) if config is not None else _called(arguments)
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, (tokens, tokens))
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{arguments.model} returned a {type(model).__name__}", fix="return a model, or a pair of it and its batch"
        )
    return model, batch


def _called(arguments: argparse.Namespace) -> Any:
    """What the user's function returns, given the sizes that it takes."""
    function = find_function(arguments.model, "--model")
    sizes = {"batch": arguments.batch, "seq": arguments.seq}
    try:
        takes = inspect.signature(function).parameters
    except ValueError as error:  # a class of C, say
        raise failed(arguments.model, "--model", error) from error
    return call_function(function, arguments.model, "--model", **{name: sizes[name] for name in takes if name in sizes})
