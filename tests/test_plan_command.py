"""``zgraph plan``: models by name, config or function, a table or JSON, and exit statuses that scripts rely on."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from zgraph import cli, plan_command

FIXED = ["--zero", "3", "--accumulate", "1", "--recompute", "none"]
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODULE = """
import torch

class Model(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).square().mean()

def build(batch):
    return Model(16, 16), (torch.empty(batch, 16),)

def nothing():
    return None

def three():
    return 1, 2, 3

def boom():
    raise ValueError("no such thing")

def needs(what):
    return what
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_a_config_is_planned_as_a_table(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--hf", config, "--world", "4", "--hardware", "h100", "--batch", "2", "--seq", "16", *FIXED]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    for part in ("4 x H100", "fits, with", "live peak", "tokens/s on each", "optimizer state"):
        assert part in printed.out
    assert all(line.startswith("zgraph: searching options") for line in printed.err.splitlines())


def test_a_search_that_takes_long_says_so(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_command, "Telling", partial(plan_command.Telling, 0.0, 0.0))
    arguments = ["plan", "--hf", config, "--world", "2", "--hardware", "h100", "--seq", "16", "--zero", "3", "--json"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fits"]
    told = r"searching options for 2 x H100: [1-9] of at most \d+ choices estimated, \d+ s so far, \d+ \w+ more at"
    assert re.search(told, printed.err)


def test_options_of_the_command_are_those_of_the_plan(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--state-precision", "int8", "--bucket-bytes", "1MiB", "--prefetch", "2"]
    arguments = ["plan", "--hf", config, "--world", "4", "--hardware", "h100", "--seq", "16", *FIXED, *given, "--json"]
    assert cli.main(arguments) == 0
    options = json.loads(capsys.readouterr().out)["chosen"]["options"]
    assert (options["state_precision"], options["bucket_bytes"], options["prefetch"]) == ("int8", 2**20, 2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--shard-size", "2"], {"shard_size": 2}),
        (["--shard-size", "none"], {"shard_size": None}),
        (["--shard-size", "none", "--secondary-size", "2"], {"shard_size": None, "secondary_size": 2}),
    ],
)
def test_nodes_are_given_to_a_plan_by_their_ranks(
    given: list[str], expected: dict[str, object], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--hf", config, "--world", "4", "--hardware", "h100", "--seq", "16", *FIXED, *given, "--json"]
    assert cli.main([*arguments, "--devices-per-node", "2"]) == 0
    options = json.loads(capsys.readouterr().out)["chosen"]["options"]
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(("memory", "fits"), [("64GiB", True), ("1MiB", False)])
def test_the_memory_of_the_host_says_what_fits_there(
    memory: str, fits: bool, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--hf", config, "--world", "1", "--hardware", "h100", "--seq", "16", *FIXED, "--json"]
    assert cli.main([*arguments, "--offload", "optimizer=host", "--host-memory", memory]) == (0 if fits else 1)
    found = json.loads(capsys.readouterr().out)
    assert (found["chosen"]["host_bytes"] <= found["host_budget_bytes"]) is fits


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--offload", "optimizer=disk", "--in-flight", "none"], {"offload": {"optimizer": "disk"}, "in_flight": None}),
        (["--offload", "optimizer=disk,parameters=disk"], {"offload": {"optimizer": "disk", "parameters": "disk"}}),
        (
            ["--offload", "activations=disk, waited for,optimizer=disk"],
            {"offload": {"activations": "disk, waited for", "optimizer": "disk"}},
        ),
        (["--zero", "3", "--unshard", "0.5"], {"unshard": 0.5}),
    ],
)
def test_what_a_plan_prints_of_options_can_be_asked_for(
    given: list[str], expected: dict[str, object], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--hf", config, "--world", "2", "--hardware", "h100", "--seq", "16", *FIXED, *given, "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found["chosen"]["options"][name] for name in expected} == expected
    assert any("lie on a disk" in note for note in found["notes"]) == ("offload" in expected)


def test_a_plan_that_does_not_fit_has_a_status_of_its_own(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--hf", config, "--world", "1", "--hardware", "h100", "--seq", "16", "--memory", "1MiB"]
    assert cli.main([*arguments, "--json", *FIXED]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["num_tokens"] == 16


def test_a_function_gives_a_model_and_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    arguments = ["--world", "1", "--hardware", "h100", "--batch", "6", *FIXED]
    assert cli.main(["plan", "--model", "given_model:build", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_params"], found["num_examples"]) == (16 * 16 + 16, 6)
    for name, says in (
        ("nothing", "returned a NoneType"),
        ("absent", "no function 'absent'"),
        ("three", "returned a tuple"),
        ("boom", "ValueError: no such thing at"),
        ("needs", "missing 1 required positional argument"),
    ):
        assert cli.main(["plan", "--model", f"given_model:{name}", *arguments]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "gpt9", "--world", "1"], "gpt2"),
        (["--preset", "gpt2", "--world", "0"], "world_size=0"),
        (["--preset", "gpt2", "--world", "1", "--hardware", "h9000"], "H100"),
        (["--preset", "gpt2", "--world", "1", "--memory", "much"], "memory='much'"),
        (["--preset", "gpt2", "--world", "1", "--memory", "80"], "--memory 80GiB"),
        (["--preset", "gpt2", "--world", "1", "--memory", "-5GiB"], "memory='-5GiB' is not a positive number of bytes"),
        (["--preset", "gpt2", "--world", "1", "--nic", "-.5GB"], "nic='-.5GB' is not a positive number of bytes"),
        (["--preset", "gpt2", "--world", "1", "--offload", "state"], "offload"),
        (["--preset", "gpt2", "--world", "1", "--batch", "0"], "'--batch': 0 is not in the range x>=1"),
        (["--preset", "gpt2", "--world", "1", "--seq", "4096"], "1024 positions"),
        (
            ["--preset", "gpt2", "--world", "1", "--zero", "three"],
            "zero='three' is out of range (give an integer from 0 to 3)",
        ),
        (["--preset", "gpt2", "--world", "4", "--shard-size", "all"], "shard_size='all'"),
        (["--preset", "gpt2", "--world", "4", "--shard-size", "3"], "shard_size=3 does not divide the 4 ranks"),
        (["--preset", "gpt2", "--world", "4", "--secondary-size", "auto"], "secondary_size='auto'"),
        (["--preset", "gpt2", "--world", "1", "--nic", "fast"], "nic='fast'"),
        (["--preset", "gpt2", "--world", "1", "--nic", "1GB"], "--nic"),
        (["--preset", "gpt2", "--world", "1", "--host-memory", "64GiB"], "--host-memory"),
        (["--preset", "gpt2", "--world", "1", "--host-memory", "much"], "host_memory='much'"),
        (["--preset", "gpt2", "--world", "1", "--devices-per-node", "2"], "--devices-per-node"),
        (["--hf", "absent.json", "--world", "1"], "absent.json"),
        (["--hf", "absent.json", "--preset", "gpt2", "--world", "1"], "--preset and --hf name a model each (leave one"),
        ([], "zgraph plan needs a model (give --preset, --hf or --model with --world)"),
        (["--preset", "gpt2"], "zgraph plan needs --world"),
        (["--preset", "gpt2", "--world", "many"], "Invalid value for '--world': 'many' is not a valid integer"),
        (["--preset", "--world", "1"], "'--preset' requires an argument"),
        (["--model", "absent_module:build", "--world", "1"], "absent_module"),
        (["--model", "no_colon", "--world", "1"], "no colon"),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
