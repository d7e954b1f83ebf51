"""``zgraph ckpt``: what is in files of training state, what is wrong with them, and the same in another form."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph import checkpoints, cli


def state() -> dict[str, Any]:
    """Of a model that has been trained for a step by zgraph, and of its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model = zgraph.compile(model, optimizer, loss=lambda y, _: y.square().mean(), progress=False)
    model.train_step(torch.randn(8, 4))
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "all.pt")
    return tmp_path / "all.pt"


def test_ls_names_every_tensor(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ckpt", "ls", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "model.0.weight" in shown
    assert "float32[3, 4]" in shown
    assert cli.main(["ckpt", "ls", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tensors"]
    assert found["model.1.bias"] == {"dtype": "torch.float32", "shape": [2], "bytes": 8}
    assert len(found) == 4 + 3 * 4


def test_verify_passes_what_zgraph_has_trained(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ckpt", "verify", str(saved), "--against", str(saved)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_verify_tells_what_is_wrong(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = torch.load(saved)
    held["model"]["0.weight"][1, 2] = float("nan")
    held["optimizer"]["state"][7] = {"step": torch.tensor(1.0)}
    broken = saved.with_name("broken.pt")
    torch.save(held, broken)
    assert cli.main(["ckpt", "verify", str(broken), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "model.0.weight: 1 of 12 elements are not finite",
        "optimizer: state of parameter 7, which is in no group",
    ]
    assert cli.main(["ckpt", "verify", str(saved), "--against", str(broken), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "model.0.weight: 1 of 12 elements differ",
        "optimizer.state.7.step: only in the second",
    ]


@pytest.mark.parametrize("entry", ["all/data/1", "all/data.pkl"])
def test_verify_finds_a_byte_that_has_changed(entry: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(saved) as archive:
        header = archive.getinfo(entry).header_offset
    written = bytearray(saved.read_bytes())
    names, extra = (int.from_bytes(written[header + at : header + at + 2], "little") for at in (26, 28))
    written[header + 30 + names + extra] ^= 1  # the first of what the entry holds
    saved.write_bytes(written)
    assert cli.main(["ckpt", "verify", str(saved)]) == 1
    assert f"{entry} in the file: its " in capsys.readouterr().out


def test_names_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "odd.pt")
    torch.save({"\x1b[31mred\nä [b]\\": torch.tensor([float("nan")]), "step": 1}, file)
    assert cli.main(["ckpt", "ls", file]) == 0
    assert cli.main(["ckpt", "verify", file]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\\x1b[31mred\\nä [b]\\") == 2
    assert "1 tensor " in printed
    assert printed.endswith("odd.pt: 1 tensor, 1 problem\n")
    assert cli.main(["ckpt", "convert", file, "x.pt", "--only", "none"]) == 2
    assert "\x1b" not in printed + capsys.readouterr().err


def test_what_a_file_is_not_is_said_in_words_of_our_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"x": torch.ones(1000)}
    torch.save(tensors, tmp_path / "whole.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("text", "text")
    for name, written, says in (
        ("text.pt", b"hello", "is not a checkpoint: no zip file"),
        ("empty.pt", b"", "is not a checkpoint: it is empty"),
        ("pickle.pt", pickle.dumps(os.getpid), "is not a checkpoint: no zip file"),
        ("half.pt", (tmp_path / "whole.pt").read_bytes()[:2000], "is damaged: it starts as torch.save starts one"),
        ("module.pt", None, "holds more than data, such as torch.nn.modules.linear.Linear: it is not loaded"),
        ("other.pt", None, "is a zip file, and not one of torch.save"),
    ):
        if written is not None:
            (tmp_path / name).write_bytes(written)
        assert cli.main(["ckpt", "ls", str(tmp_path / name)]) == 3
        said = capsys.readouterr().err
        assert f"{name} {says}" in said
        assert "mmap" not in said
        assert "weights_only" not in said


def test_verify_does_not_call_a_file_without_tensors_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save([1, 2], tmp_path / "numbers.pt")
    assert cli.main(["ckpt", "verify", str(tmp_path / "numbers.pt")]) == 1
    assert "there is no tensor in it" in capsys.readouterr().out


def test_what_differs_is_found_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64):
        one = torch.zeros(3, 2, dtype=dtype)
        two = one.clone()
        two[1, 1] = 1
        assert list(checkpoints.differences({"x": one}, {"x": one.clone()})) == []
        assert list(checkpoints.differences({"x": one}, {"x": two})) == ["x: 1 of 6 elements differ"]
    one = torch.tensor([0.0, float("nan")])
    assert list(checkpoints.differences([one], [one.clone()])) == []
    assert list(checkpoints.differences([one], [-one])) == ["0: 2 of 2 elements differ"], "signs of zeros, too"
    assert list(checkpoints.differences([one], [one.double()])) == [
        "0: float32[2] in the first, float64[2] in the second"
    ]


def test_tensors_without_elements_of_8_bits_and_in_old_files_are_verified(tmp_path: Path) -> None:
    held = {"none": torch.empty(0, 3), "some": torch.ones(2)}
    torch.save(held, tmp_path / "new.pt")
    torch.save(held, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    verify = ["ckpt", "verify", str(tmp_path / "new.pt"), "--against", str(tmp_path / "old.pt")]
    assert cli.main(verify) == 0
    small = torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)
    assert list(checkpoints.problems({"small": small})) == ["small: 1 of 2 elements are not finite"]


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"a.b": torch.tensor(float("nan")), "a": {"b": torch.tensor(1.0)}}, "two tensors are called a.b"),
        ({"a": torch.ones(2).to_sparse()}, "a is of torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "a is without values"),
    ],
)
def test_what_cannot_be_verified_is_not_said_to_be_sound(
    held: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(held, tmp_path / "odd.pt")
    for part in ("ls", "verify"):
        assert cli.main(["ckpt", part, str(tmp_path / "odd.pt")]) == 3
        assert says in capsys.readouterr().err


def test_a_part_goes_to_safetensors_and_back(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = saved.with_name("model.safetensors"), saved.with_name("model.pt")
    assert cli.main(["ckpt", "convert", str(saved), str(there), "--only", "model"]) == 0
    assert cli.main(["ckpt", "convert", str(there), str(back)]) == 0
    assert list(checkpoints.differences(torch.load(back), torch.load(saved)["model"])) == []
    assert cli.main(["ckpt", "convert", str(there), str(back), "--force", "--dtype", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_tensors"] == 4
    assert {tensor.dtype for tensor in torch.load(back).values()} == {torch.bfloat16}


def test_weights_that_are_tied_stay_so_with_torch_save_and_are_two_in_safetensors(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    torch.save({"in": weight, "out": weight}, tmp_path / "tied.pt")
    checkpoints.convert(tmp_path / "tied.pt", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt")
    assert again["in"].data_ptr() == again["out"].data_ptr()
    assert checkpoints.convert(tmp_path / "tied.pt", tmp_path / "tied.safetensors") == 2


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["ls", "absent.pt"], "absent.pt cannot be read", 3),
        (["ls", "text.pt"], "text.pt is not a checkpoint", 3),
        (["ls", "text.safetensors"], "text.safetensors is not a checkpoint", 3),
        (["verify", "."], "cannot be read", 3),
        (["convert", "all.pt", "x.pt", "--only", "weights"], "has no part 'weights'", 2),
        (["convert", "all.pt", "x.safetensors"], "such as optimizer.param_groups.0.lr", 2),
        (["convert", "all.pt", "absent/x.pt"], "absent/x.pt cannot be written", 3),
        (["convert", "all.pt", "x.pt", "--dtype", "int8"], "'int8' is not one of 'fp32', 'bf16', 'fp16'", 2),
        (["convert", "all.pt", "all.pt", "--force"], "all.pt is the checkpoint itself", 2),
        (
            ["convert", "all.pt", "text.pt"],
            "text.pt exists already (choose another name, or replace it with --force",
            2,
        ),
        (["convert", "all.pt", "x.gguf"], "end it in .pt, .pth, .bin, .ckpt or .safetensors", 2),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    arguments: list[str],
    says: str,
    status: int,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(saved.parent)
    for name in ("text.pt", "text.safetensors"):
        Path(name).write_text("text")
    before = {path: path.read_bytes() for path in saved.parent.iterdir()}
    assert cli.main(["ckpt", *arguments]) == status
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in saved.parent.iterdir()} == before
