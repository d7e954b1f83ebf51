"""Plain PyTorch training to hold zgraph against, and what "equal" means.

Equal to a tolerance: no element of a tensor is off by more than the tolerance times the largest magnitude in that
tensor. Per element would be meaningless, since sums that cancel leave elements with no correct digit in eager either;
per model would hide a small tensor that is wrong. The tolerance follows the tensor's dtype: float32 is summed in
another order on N ranks, float64 shows that only the order differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import zgraph
from tests.models import CASES, Batch, Case
from tests.optimizers import OPTIMIZERS, tensors_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def slow(*values: Any) -> list[Any]:
    """Parameters of a test that are left out of the quick lane."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def nightly(*values: Any) -> list[Any]:
    """Parameters of a test that only ``make nightly`` tries: one more combination of what is tested already."""
    return [pytest.param(value, marks=[pytest.mark.slow, pytest.mark.nightly]) for value in values]


def world() -> tuple[int, int]:
    """This rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's ``value``."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class Eager:
    """A training step in plain PyTorch: one process, or ``DistributedDataParallel`` over the ranks with ``average``.

    Args:
        clip: gradients before the update.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        average: bool = False,
        clip: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.case, self.model, self.optimizer, self.clip = case, model, optimizer, clip
        self.average = average and dist.is_initialized()
        self.call = DistributedDataParallel(model, broadcast_buffers=False) if self.average else model

    def step(self, batch: Batch) -> Tensor:
        """Train on a batch; returns its loss, averaged over ranks where gradients are."""
        self.optimizer.zero_grad()
        loss = loss_of(self.case, self.call(*batch.args, **batch.kwargs), batch)
        loss.backward()
        if self.clip is not None:
            self.clip(self.model)
        self.optimizer.step()
        return mean_over_ranks(loss.detach()) if self.average else loss.detach()


def clip_as(
    *, clip_norm: float | None = None, clip_value: float | None = None, **_: Any
) -> Callable[[nn.Module], object] | None:
    """How torch clips gradients, by the options of ``zgraph.compile``."""
    if clip_norm is not None:
        return lambda model: nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if clip_value is not None:
        return lambda model: nn.utils.clip_grad_value_(model.parameters(), clip_value)
    return None


def loss_of(case: Case, output: Any, batch: Batch) -> Tensor:
    """The loss as zgraph finds it: ``case.loss``, the output itself, or its ``.loss``."""
    if case.loss is not None:
        return case.loss(output, *batch.args, **batch.kwargs)
    return output if isinstance(output, Tensor) else output.loss


def assert_equal(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, *, vanishing: Iterable[str] = ()
) -> None:
    """Assert that two sets of named tensors are equal: names in order, shapes, dtypes, values to ``TOLERANCE``.

    Args:
        vanishing: names of tensors that hold nothing but rounding; they are measured by the largest of all tensors.
    """
    assert list(actual) == list(expected), (
        f"{what}: names differ: missing {[n for n in expected if n not in actual]}, "
        f"unexpected {[n for n in actual if n not in expected]}, or their order"
    )
    sizes = {
        name: max((t.abs().max().item() for t in [tensor] if t.numel()), default=0) for name, tensor in expected.items()
    }
    for name, b in expected.items():
        a = actual[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"{what}: {name} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        )
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{what}: {name} is {a}, not {b}"
        elif b.numel():
            size = max(sizes.values()) if name in vanishing else sizes[name]
            error = (a - b).abs().max().item()
            allowed = TOLERANCE[b.dtype] * size
            assert error <= allowed, (  # also when it is NaN
                f"{what}: {name} {tuple(b.shape)} is off by {error:.3g}, allowed {allowed:.3g} "
                f"(largest element {size:.3g}); it starts {a.flatten()[:4].tolist()}, not {b.flatten()[:4].tolist()}"
            )


def assert_same_state(model: nn.Module, optimizer: Optimizer, eager: Eager, what: str) -> None:
    """Assert that every parameter, buffer and optimizer-state entry equals eager's."""
    substring = eager.case.vanishing
    names = {id(p): name for name, p in eager.model.named_parameters()}
    vanishing = {name for name in names.values() if substring is not None and substring in name}
    assert_equal(model.state_dict(), eager.model.state_dict(), what, vanishing=vanishing)
    actual, expected = tensors_of(optimizer), tensors_of(eager.optimizer)
    ordered = [names[id(p)] for group in eager.optimizer.param_groups for p in group["params"]]
    zero = {key for key in expected if ordered[int(key.split("[")[1].rstrip("]"))] in vanishing}
    assert sorted(actual) == sorted(expected), f"{what}: optimizer state has {sorted(actual)}, not {sorted(expected)}"
    for kind in {key.rsplit("[", 1)[1] for key in expected}:  # one kind at a time: exp_avg is no measure of exp_avg_sq
        of_kind = [key for key in expected if key.endswith("[" + kind)]
        subset = {key: actual[key] for key in of_kind}
        assert_equal(subset, {key: expected[key] for key in of_kind}, what, vanishing=zero)


def train_like_eager(
    case_name: str,
    *,
    optimizer: str = "adamw",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    num_steps: int = 10,
    num_samples: int = 6,
    change: Callable[[nn.Module, Optimizer], Callable[[int], Any]] | None = None,
    num_recaptures: int = 0,
    **options: Any,
) -> None:
    """Train a case with zgraph on this rank's part of each batch, and in plain PyTorch; assert equality at every step.

    The reference is one process on the whole batch, or ``DistributedDataParallel`` where the case says so.

    Args:
        device: where the model and its batches are.
        num_samples: in the batch of all ranks together.
        change: gives a function to call after each step, the same for zgraph and for the reference: a learning-rate
            schedule, say.
        num_recaptures: how often the step may be captured again. The second step always may, since there the
            optimizer has state for the first time.
        options: of ``zgraph.compile``.
    """
    case, (rank, num_ranks) = CASES[case_name], world()
    batches = [batch.to(device) for batch in case.batches(num_steps, num_samples, dtype=dtype)]
    parts = [batch.part(rank, num_ranks) for batch in batches]
    model = case.model(dtype).to(device)
    model_optimizer = OPTIMIZERS[optimizer](model)
    compiled = zgraph.compile(model, optimizer=model_optimizer, loss=case.loss, **options)
    assert compiled is model
    reference = case.model(dtype).to(device)
    eager = Eager(case, reference, OPTIMIZERS[optimizer](reference), average=case.per_rank, clip=clip_as(**options))
    changes = [change(compiled, model_optimizer), change(reference, eager.optimizer)] if change else []
    num_captures = 0
    for step in range(num_steps):
        torch.manual_seed(100 * step + rank)
        loss = compiled.train_step(*parts[step].args, **parts[step].kwargs)
        torch.manual_seed(100 * step + rank)
        expected = eager.step(parts[step] if case.per_rank else batches[step])
        assert_equal({"loss": loss}, {"loss": expected}, f"step {step}")
        assert_same_state(compiled, model_optimizer, eager, f"after step {step}")
        for each in changes:
            each(step)
        if step == 1:
            num_captures = compiled.stats()["num_captures"]
            assert num_captures <= 2, f"two steps were captured {num_captures} times"
    found = compiled.stats()["num_captures"] - num_captures
    assert found <= num_recaptures, f"the step was captured again {found} times, not {num_recaptures} at most"
