"""An exported step needs no zgraph, and computes bit for bit what the model would have computed next."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from tests.exported import assert_same_state, run_apart, run_here
from tests.ranks import Ranks
from zgraph import export, ops, standalone
from zgraph.codegen import kernel, library
from zgraph.codegen.kernel import SLICE
from zgraph.codegen.region import Region
from zgraph.passes import overwrite


class Model(nn.Module):
    """A table, batch norm, dropout, and a bucket that is large enough for a kernel in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.layers = nn.Sequential(
            nn.Linear(24, 1000), nn.GELU(), nn.BatchNorm1d(1000), nn.Dropout(0.1), nn.Linear(1000, 50)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.layers(self.table(tokens[:, :-1]).flatten(0, 1))
        return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


BATCH = torch.arange(36).view(4, 9) % 50
ADAMW = torch.optim.AdamW
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trained(optimizer: Any = ADAMW, batch: torch.Tensor = BATCH, **options: Any) -> Any:
    model = Model()
    model = zgraph.compile(model, optimizer=optimizer(model.parameters()), **options)
    for _ in range(2):
        model.train_step(batch)
    return model


def assert_goes_on_alike(model: Any, directory: Path, batch: torch.Tensor = BATCH) -> None:
    model.export(directory / "exported", (batch,))
    losses, state = run_here(directory / "exported", 3, seed=7)
    torch.manual_seed(7)
    assert losses == [model.train_step(batch).item() for _ in range(3)]
    model.export(directory / "after")
    assert_same_state(state, torch.load(directory / "after" / "state-0.pt", weights_only=True))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (ADAMW, {}),
        (ADAMW, {"kernels": "eager"}),
        (MOMENTUM, {}),
        (MOMENTUM, {"precision": "fp16", "bucket_bytes": 4096}),
        (ADAMW, {"precision": "bf16", "clip_norm": 0.1}),
        (ADAMW, {"accumulate": 2, "clip_norm": 1.0, "ema": 0.9}),
        (ADAMW, {"state_precision": "int8", "recompute": 1.0}),
        (ADAMW, {"kernels": "zgraph", "clip_norm": 0.1}),
        (ADAMW, {"kernels": "zgraph", "precision": "bf16", "accumulate": 2}),
    ],
    ids=str,
)
def test_it_computes_what_the_model_would_have_computed(optimizer: Any, options: Any, tmp_path: Path) -> None:
    assert_goes_on_alike(trained(optimizer, **options), tmp_path)


def test_the_program_is_the_one_that_ran_and_names_no_zgraph(tmp_path: Path) -> None:
    model = trained(clip_norm=1.0)
    files = model.export(tmp_path)
    assert model.source in (tmp_path / "program.py").read_text()
    assert "kernel_" in (tmp_path / "kernels.cpp").read_text(), "the bucket is too small for a kernel"
    assert model.stats()["param_bytes"] > 4 * SLICE
    for path in files:
        if path.suffix == ".py":
            text = path.read_text()
            assert not re.search(r"^\s*(import|from) zgraph|torch\.ops\.zgraph|zgraph\.\w+\(", text, re.MULTILINE), path
    assert {path.name for path in files} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_gradient_of_logits_is_computed_a_few_rows_at_a_time_there_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ops.AT_ONCE_BYTES, "cpu", 1000)
    monkeypatch.setattr(overwrite, "SMALLEST_BYTES", 1)
    model = trained()
    assert_goes_on_alike(model, tmp_path)
    operators = (tmp_path / "exported" / "operators.py").read_text()
    assert "def _cross_entropy_backward_into(" in operators
    assert "AT_ONCE_BYTES = {'cpu': " in operators


def test_it_runs_where_zgraph_cannot_be_imported(tmp_path: Path) -> None:
    model = trained(partial(torch.optim.AdamW, lr=1e-3))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a process draws from a seed of its own
    model.train_step(BATCH)
    model.export(tmp_path, (BATCH,))
    assert run_apart(tmp_path, 1, "--steps", "3", "--save") == [model.train_step(BATCH).item() for _ in range(3)]
    model.export(tmp_path / "after")
    states = [torch.load(path / "state-0.pt", weights_only=True) for path in (tmp_path, tmp_path / "after")]
    assert_same_state(*states)


def test_without_a_batch_one_is_made_up(tmp_path: Path) -> None:
    trained().export(tmp_path)
    assert not (tmp_path / "batch-0.pt").exists()
    losses, _ = run_here(tmp_path, 2)
    assert all(loss > 0 for loss in losses)


def test_a_hyperparameter_may_be_changed(tmp_path: Path) -> None:
    model = trained(MOMENTUM)
    model.export(tmp_path, (BATCH,))
    text = (tmp_path / "step.py").read_text()
    assert "'group0.lr': 0.1," in text
    (tmp_path / "step.py").write_text(text.replace("'group0.lr': 0.1,", "'group0.lr': 0.05,"))
    losses, _ = run_here(tmp_path, 2, seed=3)
    model.__dict__["_zgraph"].optimizer.param_groups[0]["lr"] = 0.05
    torch.manual_seed(3)
    assert losses == [model.train_step(BATCH).item() for _ in range(2)]


def test_micro_batches_are_counted(tmp_path: Path) -> None:
    trained(accumulate=2).export(tmp_path)
    with pytest.raises(ValueError, match="1 micro-batches, and a step has 2"):
        run_here(tmp_path, 1, [BATCH])


# What is refused


class Whole(torch.optim.Optimizer):
    """Its update mixes the elements of a parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / (p.grad.norm() + 1))


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        (ADAMW, {"check_memory": True}, "check_memory cannot be exported yet"),
        (ADAMW, {"offload": {"optimizer": "disk"}}, "offload cannot be exported yet"),
        (Whole, {}, "an update of whole parameters cannot be exported yet"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused(optimizer: Any, options: Any, says: str, tmp_path: Path) -> None:
    model = trained(optimizer, **options)
    with pytest.raises(zgraph.OptionError, match=says):
        model.export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_batch_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(zgraph.OptionError, match=re.escape("the batch is i64[4, 8], and the step takes i64[4, 9]")):
        trained().export(tmp_path, (BATCH[:, :-1],))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(zgraph.StateError, match="file cannot be written: "):
        trained().export(tmp_path / "file")


def test_nothing_has_been_compiled_yet(tmp_path: Path) -> None:
    model = Model()
    with pytest.raises(zgraph.ZgraphError, match="nothing is compiled yet"):
        zgraph.compile(model, optimizer=ADAMW(model.parameters())).export(tmp_path)


# Several ranks


def export_and_go_on(directory: str, options: dict[str, Any]) -> list[float]:
    rank = torch.distributed.get_rank()
    batch = (BATCH + 5 * rank) % 50
    torch.manual_seed(0)
    model = Model().eval()  # without dropout: each process of the export draws from a seed of its own
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), **options)
    for _ in range(2):
        model.train_step(batch)
    model.export(Path(directory) / "exported", (batch,))
    losses = [model.train_step(batch).item() for _ in range(3)]
    model.export(Path(directory) / "after")
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"zero": 3, "clip_norm": 1.0}),
        (2, {"zero": 2, "accumulate": 2}),
        (2, {"zero": 3, "gather_precision": "int8", "reduce_precision": "int8"}),
        (2, {"zero": 3, "bucket_bytes": 1, "tile_bytes": 1024}),
        (3, {"zero": 1}),
    ],
    ids=str,
)
def test_ranks_of_an_export_compute_what_the_models_ranks_would(
    world: int, options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    losses, *_ = ranks.run(export_and_go_on, str(tmp_path), options, world=world)
    assert run_apart(tmp_path / "exported", world, "--steps", "3", "--save") == losses
    for rank in range(world):
        states = [torch.load(tmp_path / name / f"state-{rank}.pt", weights_only=True) for name in ("exported", "after")]
        assert_same_state(*states)


def export_a_mesh(directory: str) -> str:
    model = Model().eval()
    model = zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), check_collectives=True)
    model.train_step(BATCH)
    with pytest.raises(zgraph.OptionError) as refusal:
        model.export(directory)
    return str(refusal.value)


@pytest.mark.slow
def test_collectives_that_are_checked_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(export_a_mesh, str(tmp_path), world=2):
        assert said.startswith("check_collectives cannot be exported yet")


def test_kernels_are_compiled_as_zgraph_compiles_them() -> None:
    assert standalone.FLAGS == library.FLAGS


class Normed(nn.Module):
    """Two layers that are alike, with norms and a residual, and a loss over classes."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))  # noqa: E731
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(32, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x), torch.arange(len(x)) % 50)


@pytest.mark.parametrize("has_compiler", [True, False])
def test_regions_of_forward_and_backward_are_exported(
    has_compiler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_compiler:
        monkeypatch.setattr(kernel, "_why_not", lambda _: "there is none")
    model, x = Normed(), torch.randn(16, 32)
    zgraph.compile(model, ADAMW(model.parameters()), kernels="zgraph")
    model.train_step(x)  # type: ignore[operator]
    model.train_step(x)  # type: ignore[operator]
    assert any(isinstance(node.target, Region) for node in model.program.graph.nodes)  # type: ignore[union-attr]
    assert_goes_on_alike(model, tmp_path, x)
    files = {each.name: each.read_text() for each in (tmp_path / "exported").glob("*.cpp")}
    if has_compiler:
        functions = re.findall(r"long (region_\w+)\(", files["kernels.cpp"])
        assert functions
        assert len(functions) == len(set(functions)), "layers that are alike share one"
    else:
        assert "kernels.cpp" not in files


def test_another_export_does_not_run_on_the_batch_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "batch-0.pt").write_bytes(b"of another model")
    model = nn.Linear(4, 1)
    zgraph.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=lambda y, _: y.square().mean())
    model.train_step(torch.ones(2, 4))
    model.export(tmp_path)
    assert not (tmp_path / "batch-0.pt").exists()


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(export, "beside", lambda _: nullcontext(tmp_path / "full"))
    with pytest.raises(zgraph.StateError, match="cannot be written: "):
        trained().export(tmp_path)
