"""Every differentiable operator of torch's own test database, trained on two ranks in one process.

    python -m tests.operators              the whole database, as a table in Markdown (make sweep: docs/operators.md)
    python -m tests.operators add softmax  only operators whose names contain one of these

For each operator a model is made whose parameters are the operator's inputs. Its step goes through capture, ZeRO-3 on
two ranks and the verifier, and what the two ranks compute in one process is compared with eager PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from unittest import mock

import torch
from torch import nn
from torch.testing._internal import common_methods_invocations, common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo import core
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree

import zgraph

# For each operator, the database looks through the stack for a unittest.TestCase, which pytest's tests are none of:
# that took most of the time of all tests that go through it.
common_utils.extract_test_fn = core.extract_test_fn = lambda: None

MAX_SAMPLES = 12
"""Sample inputs that are looked through for one that can train: differentiable, not empty."""


@dataclass(frozen=True)
class Outcome:
    """What became of one operator.

    Attributes:
        name: as in torch's database, with its variant.
        result: "equal", "refused", or "skipped" if eager PyTorch itself cannot train it.
        reason: of a refusal or a skip, in one line.
    """

    name: str
    result: str
    reason: str = ""


class Operator(nn.Module):
    """Applies an operator to parameters; the loss is the sum of its results, weighted by the batch."""

    def __init__(self, op: OpInfo, sample: SampleInput, *, copies: bool) -> None:
        super().__init__()
        leaves, self._spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self._op, self._leaves, self._copies = op.op, leaves, copies
        self.inputs = nn.ParameterList(
            nn.Parameter(leaf.detach().clone())
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        )

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        params = iter(self.inputs)
        leaves = [
            self._given(next(params)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
            for leaf in self._leaves
        ]
        first, args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        results = [
            value
            for value in pytree.tree_leaves(self._op(first, *args, **kwargs))
            if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        if not results:
            raise NotDifferentiableError
        total = torch.stack([(value.abs() if value.is_complex() else value).sum().float() for value in results]).sum()
        return total * weight.sum()

    def _given(self, param: nn.Parameter) -> torch.Tensor:
        return param.clone() if self._copies else param


class NotDifferentiableError(Exception):
    """No result of the operator depends on a parameter."""


def differentiable() -> list[OpInfo]:
    """The entries of torch's database that have a gradient in float32."""
    return [op for op in op_db if op.supports_autograd and torch.float32 in op.supported_dtypes("cpu")]


def name_of(op: OpInfo) -> str:
    return op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")


def try_operator(op: OpInfo) -> Outcome:
    """Train one operator for a step, on two ranks and eagerly."""
    skipped = "no sample input of the database can train"
    samples = islice(op.sample_inputs("cpu", torch.float32, requires_grad=True), MAX_SAMPLES)
    # An operator that writes to its input takes no parameter itself, but a copy of one.
    for sample, copies in product(samples, (False, True)):
        try:
            torch.manual_seed(0)
            model = Operator(op, sample, copies=copies)
            loss = model(torch.ones(3))
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            grads = [grad for grad in found if grad is not None]
            if not loss.isfinite() or not grads or not all(grad.isfinite().all() for grad in grads):
                continue
            twin = copy.deepcopy(model)
        except NotDifferentiableError:
            continue
        except Exception as error:  # noqa: BLE001 -- eager PyTorch cannot do it, whatever the reason
            skipped = f"eager PyTorch: {_line(error)}"
            continue
        return _compare(op, model, twin)
    return Outcome(name_of(op), "skipped", skipped)


def _compare(op: OpInfo, model: Operator, eager: Operator) -> Outcome:
    """Two simulated ranks beside eager PyTorch, which averages what the two would compute."""
    name = name_of(op)
    batches = [torch.tensor([0.5, 1.0, 0.25]), torch.tensor([1.0, 0.5, 0.75])]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, eager)]
    params = list(eager.parameters())
    losses, gradients = [], []
    for rank, batch in enumerate(batches):
        torch.manual_seed(rank)
        losses.append(eager(batch))
        gradients.append(torch.autograd.grad(losses[-1], params, allow_unused=True))
    for p, each in zip(params, zip(*gradients, strict=True), strict=True):
        p.grad = None if each[0] is None else torch.stack(each).mean(0)
    optimizers[1].step()
    ranks = zgraph.simulate_ranks(model, optimizers[0], world_size=len(batches), zero=3, bucket_bytes=64)
    try:
        loss = ranks.train_step([(batch,) for batch in batches])
    except zgraph.VerifyError:
        raise  # a false alarm, or a mistake in a pass: both are ours
    except zgraph.ZgraphError as error:
        return Outcome(name, "refused", error.what.splitlines()[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean().detach(), rtol=1e-5, atol=1e-6, msg=name)
    state = ranks.state_dict()
    for key, value in eager.state_dict().items():
        bound = 1e-5 * float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(state[key], value, rtol=0, atol=bound + 1e-7, equal_nan=True, msg=f"{name}: {key}")
    return Outcome(name, "equal")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sweep(ops: Iterable[OpInfo]) -> Iterator[Outcome]:
    """Try each operator, in order."""
    # The database fixes the seed of random operators; here every rank must draw numbers of its own.
    unseeded = mock.patch.object(
        common_methods_invocations, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs)
    )
    with warnings.catch_warnings(), unseeded:
        warnings.simplefilter("ignore")
        for op in ops:
            yield try_operator(op)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all operators by default")
    options = parser.parse_args(argv)
    chosen = [op for op in differentiable() if not options.names or any(n in name_of(op) for n in options.names)]
    outcomes = []
    for outcome in sweep(chosen):
        outcomes.append(outcome)
        if sys.stderr.isatty():
            print(f"\r{len(outcomes)}/{len(chosen)} {outcome.name:60.60}", end="", file=sys.stderr, flush=True)
    print(table(outcomes), end="")
    return 0


def table(outcomes: Sequence[Outcome]) -> str:
    """How many there are of each result, and the reasons, in Markdown."""
    counts = Counter(outcome.result for outcome in outcomes)
    lines = [f"{len(outcomes)} operators: " + ", ".join(f"{n} {result}" for result, n in sorted(counts.items())) + "."]
    for result in ("refused", "skipped"):
        lines += ["", f"| {result} | because |", "| --- | --- |"]
        lines += [f"| `{o.name}` | {o.reason.replace('|', '/')} |" for o in outcomes if o.result == result]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
