"""``zgraph ckpt``: what is in a checkpoint, whether it is sound, and the same in another form."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zgraph import checkpoints
from zgraph.errors import StateError
from zgraph.plans import show_bytes

EXAMPLES = """examples:
  zgraph ckpt ls model.pt
  zgraph ckpt verify model.pt
  zgraph ckpt verify model.pt --against before.pt
  zgraph ckpt convert all.pt model.safetensors --only model --dtype bf16"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parts = command.add_subparsers(metavar="ls|verify|convert", required=True, dest="part")
    examples = [line.strip() for line in EXAMPLES.splitlines()]
    for name, words in (
        ("ls", "the tensors of a file, with dtype, shape and bytes"),
        ("verify", "read every tensor: is it as written, are all numbers finite, and is all state of a parameter?"),
        ("convert", "write another file, of torch.save or safetensors as its name says"),
    ):
        (example, *_) = (line for line in examples if line.startswith(f"zgraph ckpt {name} "))
        part = parts.add_parser(
            name, help=words, description=words.capitalize(), epilog=f"Example: {example}", allow_abbrev=False
        )
        part.add_argument("file", type=Path, help="that torch.save or safetensors wrote")
        if name == "verify":
            part.add_argument(
                "--against", type=Path, metavar="FILE", help="another that has to be the same, bit for bit"
            )
        if name == "convert":
            part.add_argument(
                "output",
                type=Path,
                help=f"the new file, which ends in {', '.join(checkpoints.TORCH)} for torch.save, or in "
                f"{checkpoints.SAFETENSORS}, which holds tensors alone",
            )
            part.add_argument("--force", action="store_true", help="replace the new file if there is one")
            part.add_argument("--only", default="", metavar="NAME", help="a part of it, such as model")
            part.add_argument("--dtype", choices=checkpoints.DTYPES, help="of floating-point tensors")
        part.add_argument("--json", action="store_true", help="print what was found as one JSON object")


def run(arguments: argparse.Namespace) -> bool:
    """Do it and print; whether nothing is wrong.

    Raises:
        ZgraphError: see ``zgraph.checkpoints``.
    """
    if arguments.part == "convert":
        count = checkpoints.convert(
            arguments.file, arguments.output, arguments.only, arguments.dtype, overwrites=arguments.force
        )
        told = {"file": str(arguments.output), "num_tensors": count, "bytes": arguments.output.stat().st_size}
        _say(json.dumps(told) if arguments.json else f"{arguments.output}: {_count(count, 'tensor')}")
        return True
    if arguments.part == "verify":
        return _verify(arguments)
    held = checkpoints.read(arguments.file)
    found = checkpoints.tensors(held)
    if arguments.json:
        rows = {n: {"dtype": str(t.dtype), "shape": list(t.shape), "bytes": t.nbytes} for n, t in found.items()}
        _say(json.dumps({"file": str(arguments.file), "tensors": rows}))
        return True
    table = Table("tensor", "form", "bytes", box=None, pad_edge=False)
    for name, tensor in found.items():
        table.add_row(checkpoints.printable(name), checkpoints.describe(tensor), show_bytes(tensor.nbytes))
    table.add_row(_count(len(found), "tensor"), "", show_bytes(sum(tensor.nbytes for tensor in found.values())))
    Console(soft_wrap=True).print(table, markup=False)
    return True


def _verify(arguments: argparse.Namespace) -> bool:
    wrong, count = list(checkpoints.damage(arguments.file)), 0
    try:
        held = checkpoints.read(arguments.file)
    except StateError as error:
        if not wrong:
            raise
        wrong.append(error.what)
    else:
        wrong += checkpoints.problems(held)
        if arguments.against is not None:
            wrong += checkpoints.differences(held, checkpoints.read(arguments.against))
        count = len(checkpoints.tensors(held))
    if arguments.json:
        _say(json.dumps({"file": str(arguments.file), "num_tensors": count, "problems": wrong}))
    else:
        told = f"{arguments.file}: {_count(count, 'tensor')}, {_count(len(wrong), 'problem')}"
        _say("\n".join([*map(checkpoints.printable, wrong), told]))
    return not wrong


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
