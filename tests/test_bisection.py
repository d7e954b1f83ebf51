"""``zgraph.bisect`` names the pass that makes a check fail, and what that pass has made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph import cli
from zgraph.bisection import Rewritten, Step
from zgraph.program import Program, Stage

aten = torch.ops.aten


class Small(nn.Module):
    """Two layers, of sizes that divide by nothing, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def asked(num: int = 8) -> tuple[nn.Module, torch.optim.Optimizer, tuple[torch.Tensor]]:
    model = Small().double()
    return model, torch.optim.AdamW(model.parameters()), (torch.randn(num, 3, dtype=torch.float64),)


@dataclass(frozen=True)
class Halve(zgraph.Pass):
    """A planted mistake: tanh becomes half of it."""

    stage: Stage = Stage.CAPTURED
    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        for node in program.graph.find_nodes(op="call_function", target=aten.tanh.default):
            half = program.call(aten.mul.Tensor, node, 0.5, origin=node.meta["origin"], before=node.next)
            node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)


class HalveSharded(Halve):
    """The same mistake, at the stage where collectives are."""

    takes = gives = Stage.SHARDED


@dataclass(frozen=True)
class Claim(Halve):
    """The same mistake, which it states to be an equation, so that the verifier has to believe it."""

    assumes = (zgraph.Axiom("half of tanh is tanh", aten.mul.Tensor, lambda _, term: term.args[0]),)


@dataclass(frozen=True)
class Fail(zgraph.Pass):
    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        raise RuntimeError("planted")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("options", [{"zero": 0}, {"zero": 3}, {"zero": 3, "accumulate": 2, "clip_norm": 1.0}], ids=str)
def test_no_pass_is_to_blame_where_all_are_right(world: int, options: dict[str, Any]) -> None:
    found = zgraph.bisect(*asked(), world_size=world, **options)
    assert found.culprit is None
    assert found.steps[0].name == "capture"
    assert {step.micro_batch for step in found.steps} == ({"last", "earlier"} if "accumulate" in options else {"last"})
    assert "no pass is to blame" in str(found)


@pytest.mark.parametrize("planted", [Halve(), HalveSharded()])
def test_a_planted_mistake_is_found_by_proof_and_by_numbers(planted: zgraph.Pass) -> None:
    found = zgraph.bisect(*asked(), world_size=2, passes=[planted])
    culprit = found.culprit
    assert culprit is not None
    assert culprit.name == planted.name
    assert all(step.is_good for step in found.steps[:-1])
    assert culprit.proof.startswith(planted.name)
    assert "of its largest element" in (culprit.check or "")
    assert any("aten.mul.Tensor" in line and "[" + planted.name + "]" in line for line in found.made)
    assert f"the first pass to fail: {planted.name}" in str(found)


def test_numbers_find_what_the_verifier_was_told_to_believe() -> None:
    found = zgraph.bisect(*asked(), world_size=2, passes=[Claim()])
    assert found.culprit is not None
    assert (found.culprit.name, found.culprit.proof) == ("Claim", "")
    assert "(bound 1e-10)" in (found.culprit.check or "")
    assert found.assumes == ("half of tanh is tanh",)


def test_a_pass_that_raises_is_the_one_to_blame() -> None:
    found = zgraph.bisect(*asked(), passes=[Fail()])
    assert found.culprit is not None
    assert found.culprit.name == "Fail"
    assert "planted" in found.culprit.proof
    assert found.culprit.check is None


def test_a_check_of_ones_own_sees_every_program() -> None:
    seen: list[tuple[str | None, Stage]] = []

    def looks(rewritten: Rewritten) -> None:
        seen.append((rewritten.after and rewritten.after.name, rewritten.program.stage))

    def is_whole(rewritten: Rewritten) -> None:
        assert rewritten.program.stage < Stage.SHARDED, "sharded already"

    found = zgraph.bisect(*asked(), looks, world_size=2)
    assert [name or "capture" for name, _ in seen] == [step.name for step in found.steps]
    assert (seen[0], seen[-1][1]) == ((None, Stage.CAPTURED), Stage.INPLACE)
    found = zgraph.bisect(*asked(), is_whole, world_size=2, zero=0)
    assert found.culprit == Step("AverageGradients", "last", "", "AssertionError: sharded already")


def test_a_captured_program_that_fails_blames_no_pass() -> None:
    found = zgraph.bisect(*asked(), lambda _: False)
    assert found.steps == (Step("capture", "last", "", "the check fails"),)
    assert "the captured program fails the check already" in str(found)


def test_rounding_on_request_needs_a_larger_bound() -> None:
    given = asked()
    given[0].float()
    batch = (given[2][0].float(),)
    options: dict[str, Any] = {"world_size": 2, "reduce_precision": "bf16"}
    found = zgraph.bisect(*given[:2], batch, **options)
    assert found.culprit is not None
    assert found.culprit.name == "ReduceInLowPrecision"
    assert not found.culprit.proof
    assert found.assumes
    assert zgraph.bisect(*given[:2], batch, bound=1.0, **options).culprit is None


def test_the_model_stays_as_it_is() -> None:
    model, optimizer, batch = asked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zgraph.bisect(model, optimizer, batch, world_size=2)
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"world_size": 0}, "world_size=0 is not a number of ranks"),
        ({"world_size": 3}, "the batch cannot be divided into 3 parts, one for each rank: "),
        ({"accumulate": 3}, "the batch cannot be divided into 3 micro-batches of a rank: "),
        ({"bound": -1.0}, "bound=-1.0 is not a share"),
        ({"bound": 1.0, "check": print}, "bound beside a check"),
        ({"zero": 4}, "zero=4"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(zgraph.ZgraphError, match=says):
        zgraph.bisect(*asked(), **options)


TRAIN = """
import torch
from tests.test_bisection import Halve, asked

def build():
    return asked()

def planted():
    return [Halve()]

def check(rewritten):
    return rewritten.after is None or rewritten.after.name != "Tidy"

def never(rewritten):
    return False
"""


@pytest.mark.parametrize(
    ("arguments", "status", "culprit"),
    [
        (["--world", "2", "--option", "zero=2"], 0, None),
        (["--passes", "train_of_bisect:planted", "--option", "precision=bf16"], 1, "Halve"),
        (["--check", "train_of_bisect:check"], 1, "Tidy"),
        (["--check", "train_of_bisect:never"], 1, "capture"),
    ],
    ids=str,
)
def test_the_command_says_the_same(
    arguments: list[str], status: int, culprit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "train_of_bisect.py").write_text(TRAIN)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["bisect", "--model", "train_of_bisect:build", *arguments]
    assert cli.main([*command, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["culprit"] == culprit


def test_help_says_that_the_captured_program_may_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bisect", "--help"]) == 0
    assert "or if the captured program fails the check already" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere"], "--model nowhere has no colon"),
        (["--model", "os:getcwd"], "--model os:getcwd returned a str"),
        (["--model", "os:getcwd", "--option", "zero"], "--option zero is not NAME=VALUE"),
        (["--model", "tests.test_bisection:asked", "--world", "3"], "or another number of ranks"),
    ],
)
def test_bad_command_lines_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bisect", *arguments]) == 2
    assert says in capsys.readouterr().err
