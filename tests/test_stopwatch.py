"""A stopwatch notes each call of an emitted function once, and changes nothing else in it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch

import zgraph
from tests.programs import one_layer
from zgraph import stopwatch
from zgraph.codegen.emit import emit
from zgraph.config import Config
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Program, Role
from zgraph.stopwatch import Stopwatch


class NoComm:
    """What a step on one rank calls."""

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        return full

    def all_reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        return value

    def wait(self, started: torch.Tensor) -> torch.Tensor:
        return started


@pytest.fixture
def program() -> Program:
    return run(default_passes(Config(zero=0), Mesh(1)), one_layer()).program


def inputs(program: Program) -> list[Any]:
    values = [(node.meta["val"], what) for node, what in program.placeholders()]
    return [0.5 if what.role is Role.HYPER else torch.ones(val.shape, dtype=val.dtype) for val, what in values]


def test_every_call_is_noted_in_order(program: Program) -> None:
    watch = Stopwatch("cpu")
    timed = emit(program, watch=watch)
    results = timed.function(inputs(program), NoComm())
    torch.testing.assert_close(results, emit(program).function(inputs(program), NoComm()), rtol=0, atol=0)
    calls = [i for i, node in enumerate(program.graph.nodes) if node.op == "call_function"]
    made = watch.measured(len(calls))
    assert made is not None
    assert list(made.numbers) == calls
    assert list(made.ends) == sorted(made.ends)
    assert made.steps == (made.ends[-1],)


def test_without_one_the_source_does_not_know_of_it(program: Program) -> None:
    assert "watch" not in emit(program).source
    with_it = emit(program, watch=Stopwatch("cpu")).source.splitlines()
    without = [line for line in with_it if not line.strip().startswith("watch.")]
    assert without == emit(program).source.splitlines()


def test_steps_that_are_not_measured_run_the_very_function_that_they_ran_before() -> None:
    model: Any = torch.nn.Linear(4, 1)
    model = zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters()), loss=lambda y, _: y.square().mean())
    ran: list[Any] = []
    model.train_step(torch.ones(2, 4))
    runtime = model.__dict__["_zgraph"]
    executable = runtime.last().executable
    plain = executable.step.function

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "step" and frame.f_code.co_filename.startswith("<zgraph step"):
            ran.append(frame.f_code)

    model.profile(steps=2)
    sys.setprofile(look)
    try:
        for _ in range(4):
            model.train_step(torch.ones(2, 4))
    finally:
        sys.setprofile(None)
    measured, again, *behind = ran
    assert measured is again is not plain.__code__
    assert behind == [plain.__code__] * 2
    assert executable.step.function is plain
    assert not [value for value in plain.__globals__.values() if isinstance(value, Stopwatch)]
    assert "watch" not in plain.__code__.co_names


def test_of_several_runs_the_median_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0])  # of runs that take 5, 1 and 3 seconds
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: next(times))
    watch = Stopwatch("cpu")
    for _ in range(3):
        watch.begin([])
        watch.see(7)
    made = watch.measured(1)
    assert made is not None
    assert (made.numbers, made.ends, made.steps) == ((7,), (3.0,), (5.0, 1.0, 3.0))
    assert watch.measured(2) is None


class Recorded:
    """A device's event: how many milliseconds after the first it is reached; not to be read before it is over."""

    reached = iter([0.0, 250.0, 1000.0])

    def __init__(self, device: str, *, enable_timing: bool) -> None:
        assert (device, enable_timing) == ("cuda", True)
        self._at: float | None = None
        self._is_over = False

    def record(self) -> None:
        self._at = next(self.reached)

    def synchronize(self) -> None:
        self._is_over = True

    def elapsed_time(self, other: Recorded) -> float:
        assert self._at is not None
        assert other._at is not None
        assert other._is_over
        return other._at - self._at


def test_on_a_device_its_own_events_are_read_once_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Recorded)
    watch = Stopwatch("cuda")
    watch.begin([])
    watch.see(3)
    watch.see(5)
    made = watch.measured(2)
    assert made is not None
    assert (made.numbers, made.ends, made.steps) == ((3, 5), (0.25, 1.0), (1.0,))


def test_a_step_that_fails_is_not_measured() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.Linear(4, 1))
    model = zgraph.compile(model, optimizer=torch.optim.SGD(model.parameters()), loss=lambda y, _: y.square().mean())
    tokens, beyond = torch.zeros(2, dtype=torch.int64), torch.full((2,), 9)
    model.train_step(tokens)
    model.profile(steps=2)
    with pytest.raises(IndexError):
        model.train_step(beyond)
    assert "measured" not in model.report().document["programs"][0]
    model.train_step(tokens)
    program = model.report().document["programs"][0]
    assert len(program["measured"]["steps_s"]) == 1
    calls = [node for node in model.program.graph.nodes if node.op == "call_function"]
    assert len(program["measured"]["position"]) == len(calls)
