"""``zgraph plan``: the command line of ``zgraph.plan``."""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import nn

from zgraph.command_line import PATH, Command, Integer, is_given, json_option, literal
from zgraph.config import PRECISIONS, RECOMPUTE, parse_bytes
from zgraph.decision import decide
from zgraph.errors import OptionError
from zgraph.functions import call_function, failed, find_function
from zgraph.planner import open_search
from zgraph.presets import Decoder, find_model, from_hf
from zgraph.progress import roughly
from zgraph.search import Search
from zgraph.which_hardware import find_hardware

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}

EXAMPLES = """\b
Examples:
  zgraph plan --preset llama3-8b --world 8 --hardware h100 --batch 1 --seq 8192 --precision bf16
  zgraph plan --hf config.json --world 2 --hardware rtx4090 --memory 22GiB --batch 4 --seq 2048
  zgraph plan --model train:build_model --world 1 --hardware here --batch 8 --seq 512"""

_NONE = "none"


def _value(text: str) -> Any:
    """Of an option of ``zgraph.compile``, which says itself what it cannot be."""
    return None if text == _NONE else literal(text)


def _offload(text: str) -> str | dict[str, str] | None:
    """Tiers by kind, of ``kind=tier,...``; nothing of ``none``, and another word as it is."""
    if "=" not in text:
        return None if text == _NONE else text
    pairs = [each.partition("=") for each in re.split(r",(?=[^,]*=)", text)]  # a tier may have words behind a comma
    return {kind.strip(): tier.strip() for kind, _, tier in pairs}


_OPTIONS = (
    click.option("--preset", metavar="NAME", help="a model by name, such as gpt2, llama3-70b, mixtral-8x7b"),
    click.option("--hf", type=PATH, metavar="CONFIG.json", help="a Hugging Face config.json"),
    click.option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function that returns a model, which is called with int64 tokens and labels of shape (batch, seq), "
        "or a pair of a model and its batch; it is given batch= and seq= if it takes them",
    ),
    click.option("--world", type=int, metavar="N", help="how many ranks"),
    click.option("--hardware", default="cpu", metavar="NAME", help="h100, a100-80, ..., cpu, or a calibration"),
    click.option("--devices-per-node", type=int, metavar="N", show_default="what is usual for the hardware"),
    click.option("--nic", metavar="BYTES", help="per second, device and direction between nodes, such as 50GB"),
    click.option("--host-memory", metavar="BYTES", help="of a node of GPUs, such as 64GiB; as is usual if not given"),
    click.option("--memory", metavar="BYTES", show_default="the device's, less 6 %", help="of one rank, such as 80GiB"),
    click.option("--batch", type=Integer(1), default=1, metavar="N", help="examples of one rank in a step"),
    click.option("--seq", type=Integer(1), default=1024, metavar="N", help="tokens of an example"),
    click.option("--optimizer", type=click.Choice(sorted(OPTIMIZERS)), default="adamw"),
    click.option("--precision", type=click.Choice(sorted(PRECISIONS)), show_default="float32"),
    click.option("--state-precision", type=click.Choice(["int8"]), show_default="as the optimizer makes it"),
    click.option("--bucket-bytes", metavar="BYTES", show_default="searched", help="such as 16MiB"),
    click.option("--prefetch", type=_value, metavar="N", show_default="by cost", help="gathers ahead"),
    click.option("--clip-norm", type=float, metavar="X", show_default="no clipping"),
    click.option("--zero", type=_value, metavar="0-3", show_default="searched"),
    click.option(
        "--shard-size",
        type=_value,
        metavar="N",
        show_default="searched",
        help="ranks that divide state, or none for all",
    ),
    click.option(
        "--secondary-size",
        type=_value,
        metavar="N",
        show_default="none do",
        help="ranks that keep what forward has gathered for backward",
    ),
    click.option("--accumulate", type=_value, metavar="N", show_default="searched", help="micro-batches of a step"),
    click.option(
        "--recompute",
        type=_value,
        metavar="HOW",
        show_default="searched",
        help=f"{_NONE}, {', '.join(RECOMPUTE)}, or 0 to 1",
    ),
    click.option(
        "--offload",
        type=_offload,
        metavar="KIND=TIER,...",
        show_default="nothing",
        help="such as optimizer=disk,parameters=disk, or with host on GPUs, or auto",
    ),
    click.option(
        "--host-updates",
        type=_value,
        metavar="True|False",
        show_default="searched",
        help="on a GPU's host, of its state",
    ),
    click.option(
        "--load-ahead", type=_value, metavar="True|False", show_default="searched", help="of state on a GPU's host"
    ),
    click.option("--unshard", type=_value, metavar="0-1", show_default="searched", help="part of parameters"),
    click.option("--tile-bytes", metavar="BYTES", show_default="searched", help="of large matrices at a time"),
    click.option("--in-flight", type=_value, metavar="N", show_default="searched", help="buckets, or none for any"),
)


def options_of_a_plan(function: Callable[..., bool]) -> Callable[..., bool]:
    """What ``search_for`` is given, as a decorator."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command("plan", cls=Command, short_help="will it fit, and how fast will it be?", epilog=EXAMPLES)
@options_of_a_plan
@json_option("the plan")
def command(*, as_json: bool, **asked: Any) -> bool:
    """Predict memory and time of a training step on machines that need not be there, and choose options.

    The model is one of --preset, --hf and --model, on --world ranks. Exits with status 1 if nothing fits.
    """
    made = decide(*search_for(**asked))
    if as_json:
        click.echo(made.to_json())
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
        self._search: Search | None = None  # the one at work, and since when; others ask about other machines
        self._began = self._start

    def __call__(self, search: Search) -> None:
        """A search works something out."""
        now = time.perf_counter()
        if search is not self._search:
            self._search, self._began = search, now
        if now < self._next or len(search.members) == 1:
            return
        self._next = now + self._every_s
        done, left = len(search.tried), len(search.members) - len(search.tried)
        most = f", {roughly((now - self._began) / done * left)} more at most" if done else ""
        sys.stderr.write(
            f"zgraph: searching options for {search.world} x {search.hardware.name}: {done} of at most "
            f"{len(search.members)} choices estimated, {roughly(now - self._start)} so far{most}\n"
        )


def search_for(
    *,
    preset: str | None,
    hf: Path | None,
    model: str | None,
    world: int | None,
    hardware: str,
    devices_per_node: int | None,
    nic: str | None,
    host_memory: str | None,
    memory: str | None,
    batch: int,
    seq: int,
    optimizer: str,
    **options: Any,
) -> tuple[Search, int]:
    """Among what a plan is chosen, and how many bytes a rank may take.

    Args:
        options: those of ``zgraph.compile``, of which those count that are given.

    Raises:
        OptionError: an argument is missing or out of range, or there is no such model or machine.
        ZgraphError: see ``zgraph.plan``.
    """
    models = [name for name in ("preset", "hf", "model") if is_given(name)]
    if len(models) > 1:
        raise OptionError(f"--{models[0]} and --{models[1]} name a model each", fix="leave one of them out")
    if not models or world is None:
        context = click.get_current_context()
        saved = "a report.json, or " if "saved" in context.params else ""
        raise OptionError(
            f"{context.command_path} needs {'--world' if models else 'a model'}",
            fix=f"give {saved}--preset, --hf or --model with --world",
        )
    if memory is not None and memory.isdecimal() and int(memory) < 2**20:
        raise OptionError(f"--memory {memory} is bytes", fix=f"--memory {memory}GiB, with a unit")
    rate = float(parse_bytes(nic, "nic")) if nic is not None else None
    on_host = parse_bytes(host_memory, "host_memory") if host_memory is not None else None
    machine = find_hardware(
        hardware, devices_per_node=devices_per_node, nic_bytes_per_s=rate, host_memory_bytes=on_host
    )
    if machine.device_type == "cpu" and {nic, devices_per_node, host_memory} != {None}:
        raise OptionError(
            "--nic, --devices-per-node and --host-memory are for GPUs: all ranks of a CPU share one machine"
        )
    tokens = torch.empty(batch, seq, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        if model is not None:
            made = _called(model, {"batch": batch, "seq": seq})
        elif hf is not None:
            made = Decoder(from_hf(hf))
        else:
            assert preset is not None
            made = Decoder(find_model(preset))
    built, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, (tokens, tokens))
    if not isinstance(built, nn.Module):
        raise OptionError(
            f"{model} returned a {type(built).__name__}", fix="return a model, or a pair of it and its batch"
        )
    return open_search(
        built,
        OPTIMIZERS[optimizer],
        batch=inputs,
        world_size=world,
        hardware=machine,
        memory=memory,
        tell=Telling(),
        **{name: value for name, value in options.items() if is_given(name)},
    )


def _called(text: str, sizes: dict[str, int]) -> Any:
    """What the user's function returns, given the sizes that it takes."""
    function = find_function(text, "--model")
    try:
        takes = inspect.signature(function).parameters
    except ValueError as error:  # a class of C, say
        raise failed(text, "--model", error) from error
    return call_function(function, text, "--model", **{name: sizes[name] for name in takes if name in sizes})
