"""``zgraph ckpt``: what is in a checkpoint, whether it is sound, and the same in another form."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from zgraph import checkpoints
from zgraph.command_line import PATH, Group, json_option
from zgraph.errors import StateError
from zgraph.plans import show_bytes

EXAMPLES = """\b
Examples:
  zgraph ckpt ls model.pt
  zgraph ckpt verify model.pt
  zgraph ckpt verify model.pt --against before.pt
  zgraph ckpt convert all.pt model.safetensors --only model --dtype bf16"""


@click.group(
    "ckpt",
    cls=Group,
    no_args_is_help=False,
    short_help="what is in a checkpoint, and is it sound?",
    epilog=EXAMPLES,
)
def command() -> None:
    """List the tensors of a file that torch.save or safetensors wrote, verify them, or write them in another form.

    Exits with status 1 if something is wrong with them.
    """


@command.command(
    "ls", short_help="the tensors of a file, with dtype, shape and bytes", epilog="Example: zgraph ckpt ls model.pt"
)
@click.argument("file", type=PATH)
@json_option("what was found")
def _ls(file: Path, *, as_json: bool) -> bool:
    """List the tensors of a FILE that torch.save or safetensors wrote, with dtype, shape and bytes."""
    found = checkpoints.tensors(checkpoints.read(file))
    if as_json:
        rows = {n: {"dtype": str(t.dtype), "shape": list(t.shape), "bytes": t.nbytes} for n, t in found.items()}
        click.echo(json.dumps({"file": str(file), "tensors": rows}))
        return True
    table = Table("tensor", "form", "bytes", box=None, pad_edge=False)
    for name, tensor in found.items():
        table.add_row(checkpoints.printable(name), checkpoints.describe(tensor), show_bytes(tensor.nbytes))
    table.add_row(_count(len(found), "tensor"), "", show_bytes(sum(tensor.nbytes for tensor in found.values())))
    Console(soft_wrap=True).print(table, markup=False)
    return True


@command.command(
    "verify",
    short_help="read every tensor: is it as written, are all numbers finite, and is all state of a parameter?",
    epilog="Example: zgraph ckpt verify model.pt",
)
@click.argument("file", type=PATH)
@click.option("--against", type=PATH, metavar="FILE", help="another that has to be the same, bit for bit")
@json_option("what was found")
def _verify(file: Path, against: Path | None, *, as_json: bool) -> bool:
    """Read every tensor of a FILE that torch.save or safetensors wrote: is it as written, are all numbers finite, and
    is all state of a parameter?
    """
    wrong, count = list(checkpoints.damage(file)), 0
    try:
        held = checkpoints.read(file)
    except StateError as error:
        if not wrong:
            raise
        wrong.append(error.what)
    else:
        wrong += checkpoints.problems(held)
        if against is not None:
            wrong += checkpoints.differences(held, checkpoints.read(against))
        count = len(checkpoints.tensors(held))
    if as_json:
        click.echo(json.dumps({"file": str(file), "num_tensors": count, "problems": wrong}))
    else:
        told = f"{file}: {_count(count, 'tensor')}, {_count(len(wrong), 'problem')}"
        click.echo("\n".join([*map(checkpoints.printable, wrong), told]))
    return not wrong


@command.command(
    "convert",
    short_help="write another file, of torch.save or safetensors as its name says",
    epilog="Example: zgraph ckpt convert all.pt model.safetensors --only model --dtype bf16",
)
@click.argument("file", type=PATH)
@click.argument("output", type=PATH)
@click.option("--force", is_flag=True, help="replace the new file if there is one")
@click.option("--only", default="", metavar="NAME", show_default="all", help="a part of it, such as model")
@click.option("--dtype", type=click.Choice(list(checkpoints.DTYPES)), help="of floating-point tensors")
@json_option("what was found")
def _convert(file: Path, output: Path, only: str, dtype: str | None, *, force: bool, as_json: bool) -> bool:
    """Write what is in FILE to another, by torch.save if the name of OUTPUT ends in .pt, .pth, .bin or .ckpt, or by
    safetensors, which holds tensors alone, if it ends in .safetensors.
    """
    count = checkpoints.convert(file, output, only, dtype, overwrites=force)
    told = {"file": str(output), "num_tensors": count, "bytes": output.stat().st_size}
    click.echo(json.dumps(told) if as_json else f"{output}: {_count(count, 'tensor')}")
    return True


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"
