"""Updates in C++: what is written, and that it computes what its operators do, on however many threads."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from hypothesis import given

import zgraph
from tests.programs import Builder, few_examples
from tests.ranks import Ranks
from tests.test_kernel import Body, adam, bodies_of, inputs_of, make
from zgraph.codegen import library
from zgraph.codegen.cpp import CppWriter, compile_kernel
from zgraph.codegen.kernel import CPP, SLICE, SLICES, Kernel, region
from zgraph.files import PASSING
from zgraph.program import Phase, Role

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads a test sets is the number before again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_an_update_reads_and_writes_each_vector_once() -> None:
    assert_expected_inline(
        CppWriter(adam(4)).source(),
        """\
extern "C" void kernel_33379947e32053e2(long n, int threads, void **vectors, const double *numbers) {
    double *x0 = (double *)vectors[0];
    double *x1 = (double *)vectors[1];
    double *x2 = (double *)vectors[2];
    double *x3 = (double *)vectors[3];
    const double n0 = numbers[0];
    #pragma omp parallel for simd num_threads(threads) if (parallel: threads > 1)
    for (long i = 0; i < n; i++) {
        const double a0 = x0[i];
        const double a1 = x1[i];
        const double a2 = x2[i];
        const double v0 = __builtin_fma(0.1, (a1 - a0), a0);  // lerp
        const double v1 = __builtin_fabs(v0);  // abs
        const double v2 = __builtin_sqrt(v1);  // sqrt
        const double v3 = v0 / v2;  // div
        const double v4 = __builtin_fma((double)n0, v3, a2);  // add
        x2[i] = v4;
        x0[i] = v0;
        x3[i] = v2;
    }
}
""",
    )


def check(kernel: Kernel, inputs: list[Any], rtol: float) -> None:
    """In C++, a kernel computes what it does in slices, and writes over what it says."""
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    found, expected = compile_kernel(kernel)(*inputs), kernel._in_slices()(*copies)
    for mine, theirs, write in zip(found, expected, kernel.writes, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert write is None or mine is inputs[write]
        assert torch.allclose(mine, theirs, rtol=rtol, atol=rtol / 2, equal_nan=True), CppWriter(kernel).source()
    for index, (value, copy) in enumerate(zip(inputs, copies, strict=True)):
        if isinstance(value, torch.Tensor) and index not in kernel.writes:
            torch.testing.assert_close(value, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@few_examples(25)
@given(bodies_of(torch.float64, torch.float32, num_calls=5))
def test_any_body_is_computed_operator_by_operator(body: Body) -> None:
    kernel = make(body, 37)
    assert CppWriter.can_write(kernel.body)
    powers = [
        torch.exp2(x.sign()).copysign(x) * (x.abs() > 0.1) if isinstance(x, torch.Tensor) else x
        for x in inputs_of(kernel)
    ]
    check(kernel, powers, rtol=1e-6)  # powers of two, so that no comparison hangs on rounding


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("numel", [1, 7, SLICE + 3])
@pytest.mark.usefixtures("threads")
def test_threads_share_the_elements(num_threads: int, numel: int) -> None:
    torch.set_num_threads(num_threads)
    kernel = adam(numel)
    check(kernel, [x.abs() if isinstance(x, torch.Tensor) else x for x in inputs_of(kernel)], rtol=1e-12)


def test_values_that_are_no_numbers_go_where_they_would() -> None:
    b = Builder()
    x = b.input(Role.OPT_STATE, "bucket0", "m", shape=[4])
    clamped = b.call(Phase.UPDATE, aten.clamp.default, x, -1.0, math.inf)
    larger = b.call(Phase.UPDATE, aten.maximum.default, clamped, x)
    body, _ = region([clamped, larger], [clamped, larger])
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.5], dtype=torch.float64)
    check(Kernel("update", body, 1, (None, None)), [special], rtol=0)


@pytest.mark.parametrize("target", [aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne], ids=str)
def test_comparisons_are_made_in_what_their_operands_promote_to(target: Any) -> None:
    """Whichever comes first: a number, or the vector of fewer digits."""
    b = Builder()
    x, y = (b.input(Role.OPT_STATE, "bucket0", str(d), shape=[4], dtype=d) for d in (torch.float32, torch.float64))
    limit = b.input(Role.OPT_STATE, "bucket0", "limit", shape=[], dtype=torch.float32)
    masks = [b.call(Phase.UPDATE, target.Tensor, *pair) for pair in ((limit, x), (x, limit), (x, y), (y, x))]
    body, _ = region(masks, masks)
    values = [torch.tensor(0.3), torch.tensor([0.1, 0.3, 0.7, -2.0]), torch.tensor([0.1, 0.3, 0.7, -2.0]).double()]
    values[2][:2] = torch.tensor([0.1, 0.3], dtype=torch.float64)
    kernel = Kernel("update", body, 3, (None,) * 4)
    for mine, theirs in zip(compile_kernel(kernel)(*values), kernel._in_slices()(*values), strict=True):
        assert mine.tolist() == theirs.tolist()


def test_arguments_that_are_seldom_given_are_heeded() -> None:
    b = Builder()
    x, y = (b.input(Role.OPT_STATE, "bucket0", key, shape=[4]) for key in "xy")
    results = [
        b.call(Phase.UPDATE, aten.rsub.Scalar, x, 1.0, 2.0),
        b.call(Phase.UPDATE, aten.sub.Scalar, x, -1.0, -2.0),
        b.call(Phase.UPDATE, aten.copy.default, x, y, True),
    ]
    body, _ = region(results, results)
    kernel = Kernel("update", body, 2, (None,) * 3)
    check(kernel, inputs_of(kernel), rtol=1e-12)


def test_loading_kernels_leaves_small_numbers_as_they_are() -> None:
    compile_kernel(adam(1))
    tiny = torch.tensor([1e-310], dtype=torch.float64)
    assert (tiny * 1).item() == 1e-310 != 0


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Parameters after three steps of a model that is more than a slice, and what its kernels are written in."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1)).to(dtype)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)(model.parameters())
    zgraph.compile(model, optimizer=optimizer, loss=lambda y, _: y.square().mean(), **options)
    for _ in range(3):
        model.train_step(torch.ones(4, 300, dtype=dtype))
    found = [node.target for node in model.program.graph.nodes if isinstance(node.target, Kernel)]
    return model.state_dict(), {language for kernel in found for language in kernel._functions}


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1, "ema": 0.9}], ids=str)
def test_a_step_with_kernels_is_one_with_operators(options: dict[str, Any]) -> None:
    fast, plain = trained(**options), trained(kernels="eager", **options)
    assert (fast[1], plain[1]) == ({CPP}, {SLICES})
    exact, _ = trained(torch.float64, kernels="eager", **options)
    for name, value in exact.items():
        # Some gradients almost cancel out, and what they are off by grows from step to step, whoever computes it.
        found, expected = ((each[0][name] - value).abs().max().item() for each in (fast, plain))
        assert found <= 2 * expected + 1e-8, name


def train_where_one_rank_lacks_a_compiler() -> tuple[dict[str, torch.Tensor], set[str]]:
    missing = mock.patch.object(library, "problem", return_value="there is no C++ compiler")
    with missing if dist.get_rank() else nullcontext():
        return trained(zero=0)


def test_replicas_are_updated_alike_where_one_rank_lacks_a_compiler(ranks: Ranks) -> None:
    first, second = ranks.run(train_where_one_rank_lacks_a_compiler, timeout_s=120)
    assert first[1] == second[1] == {SLICES}
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name


def test_without_a_compiler_updates_run_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "there is no C++ compiler")
    assert trained()[1] == {SLICES}


def test_with_a_compiler_that_is_broken_updates_run_in_slices_and_it_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: cc1plus is gone' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setattr(library, "find_compiler", lambda: str(broken))
    for name in ("load", "problem"):
        monkeypatch.setattr(library, name, getattr(library, name).__wrapped__)
    assert trained()[1] == {SLICES}
    assert f"kernels run in slices, which takes longer, on all ranks: {broken} cannot compile kernels: " in caplog.text
    assert "cc1plus is gone" in caplog.text


def test_what_is_small_is_not_worth_a_compiler() -> None:
    small, large = (
        Kernel("update", adam(numel).body, 4, (2, 0, None), is_compiled=True) for numel in (SLICE, SLICE + 1)
    )
    assert (small.language("cpu"), large.language("cpu")) == (SLICES, CPP)


def test_exponentials_stay_with_aten() -> None:
    b = Builder()
    x = b.input(Role.OPT_STATE, "bucket0", "m", shape=[4])
    result = b.call(Phase.UPDATE, aten.exp.default, x)
    assert not CppWriter.can_write(region([result], [result])[0])


SOURCE = 'extern "C" int seven() { return 7; }\n'


def test_a_library_is_kept_and_one_that_was_cut_off_is_made_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = library.load.__wrapped__
    assert load(SOURCE).seven() == 7
    (made,) = library.cache_directory().glob("*.so")
    assert made.parent.stat().st_mode & 0o777 == 0o700
    before = made.stat().st_mtime_ns
    load(SOURCE)
    assert made.stat().st_mtime_ns == before
    made.unlink()  # what is loaded stays as it is
    made.write_bytes(b"half of it")
    assert load(SOURCE).seven() == 7
    assert made.stat().st_size > 1000


def test_what_a_run_left_that_was_killed_while_it_compiled_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *kernels.so*) kill -9 $PPID ;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = library.cache_directory()
    child = os.fork()
    if not child:
        library._load(SOURCE, str(compiler), directory)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = directory.iterdir()
    assert left.is_dir()
    assert library.load.__wrapped__(SOURCE).seven() == 7
    (made,) = directory.iterdir()
    assert made.suffix == ".so"


def test_a_directory_that_others_may_write_to_is_not_used(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = library.cache_directory()
    own.chmod(0o777)
    assert library.cache_directory() != own


def test_a_user_without_a_home_gets_a_directory_that_goes_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    program = "from zgraph.codegen.library import cache_directory; print(cache_directory())"
    own = library.cache_directory()
    assert own.stat().st_mode & 0o777 == 0o700
    without = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"} | {"HOME": "/proc/none"}
    said = subprocess.run([sys.executable, "-c", program], env=without, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()).name.startswith(PASSING)
    assert not Path(said.stdout.strip()).exists()


def test_a_library_that_asks_for_another_openmp_is_not_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.__wrapped__(SOURCE)
    (other,) = (Path(path) for path in library._openmp())
    renamed = tmp_path / "libgomp-1234.so.1"
    renamed.symlink_to(other)
    monkeypatch.setattr(library, "_openmp", lambda: [str(renamed)])
    library.load.__wrapped__(SOURCE)
    assert len(list(library.cache_directory().glob("*.so"))) == 2


def test_a_library_that_another_rank_takes_away_is_made_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.__wrapped__(SOURCE)
    digest = library._digest

    def too_late(path: Path) -> str:
        if path.parent == library.cache_directory():
            path.unlink()
        return digest(path)

    monkeypatch.setattr(library, "_digest", too_late)
    assert library.load.__wrapped__(SOURCE).seven() == 7


def test_a_disk_that_is_full_is_told_of_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(zgraph.errors.OptionError, match=r"No space left(.|\n)*XDG_CACHE_HOME"):
        library.load.__wrapped__(SOURCE + "// on a full disk\n")


def test_what_a_compiler_says_is_passed_on() -> None:
    with pytest.raises(zgraph.errors.OptionError, match=r"cannot compile kernels: .*error"):
        library.load("this is no C++")
