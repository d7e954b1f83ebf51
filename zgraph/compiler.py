"""``zgraph.compile``: capture, passes, code, execution. The table of contents of the project.

``compile`` itself only checks its arguments and gives the model a ``train_step``. The first ``train_step`` knows the
batch, so there the step is captured, rewritten, verified and emitted, all ranks agree on it, and only then do the
parameters move into their buckets. Until that moment the user's model and optimizer are untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from zgraph.budget import Budget, refuse_open_options
from zgraph.capture import check_optimizer
from zgraph.codegen.listing import KernelInfo, kernels_of
from zgraph.config import Config
from zgraph.errors import CaptureError, OptionError, StateError
from zgraph.explain import Explanation, explain
from zgraph.groups import process_group
from zgraph.inspection import export, plan_of, report_of, stats_of
from zgraph.metrics import check_metrics
from zgraph.pipeline import Pass
from zgraph.plans import Plan
from zgraph.program import Program
from zgraph.report import Report, files_of
from zgraph.runtime import Runtime


def compile(  # noqa: A001
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable[..., torch.Tensor] | None = None,
    weight: Callable[..., torch.Tensor | float] | None = None,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    passes: Sequence[Pass] = (),
    plan: Plan | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Give ``model`` a ``train_step`` that runs forward, backward, communication and update as one graph.

    The model stays the same object; like FSDP2's ``fully_shard``, this swaps its class for a subclass.

    Args:
        model: any module; parameters may be on ``meta`` and are then initialised by each module's own
            ``reset_parameters``, every rank keeping only its part.
        optimizer: the user's; it stays the source of hyperparameters.
        loss: ``loss(output, *args, **kwargs)`` of the model's output and arguments. By default the output
            itself, or its ``.loss``.
        weight: ``weight(*args, **kwargs)`` of the model's arguments: by how much a (micro-)batch counts, the number
            of its tokens say. Loss and gradients are then those of ``sum(weight * loss) / sum(weight)`` over
            micro-batches and ranks, which is the mean over all tokens where each loss is the mean over its own. By
            default all count alike.
        metrics: what ``train_step`` returns besides the loss: by name, a ``function(output, *args, **kwargs)`` of one
            number, whose mean over micro-batches and ranks is taken; or a pair of such a function and ``"sum"``,
            ``"max"`` or ``"min"``.
        passes: of your own. Each runs after the last of zgraph's that gives the stage it takes, under the same
            verifier; it must leave the stage as it was.
        plan: of ``zgraph.plan``, whose options are taken. It must be for as many ranks as there are, and fit.
        memory: what one rank may take: bytes, a string such as ``"8GiB"``, or ``"auto"`` for what its device has free,
            less 6 %. The first step then takes the fastest options whose predicted peak is within it, as
            ``zgraph.plan`` finds them, or is refused. Options that are given stay as they are; those that
            ``zgraph.choices`` lists are chosen if they are ``"auto"`` or not given. But ``accumulate`` is 1 unless it
            is ``"auto"``: micro-batches change results where the loss is no mean over the rows of a batch; and nothing
            goes to a disk unless ``offload`` is ``"auto"``. ``model.plan`` says what was chosen.
        progress: on a terminal, rank 0 shows what compiling is at; False does not.
        options: see ``zgraph.config.Config``.

    Returns:
        ``model`` itself, now also a ``CompiledModule``. (Python cannot spell the type that is both, hence ``Any``.)

    Raises:
        OptionError: an unknown option, or one out of range; a pass that cannot be placed; a step of the model has run
            already (until then, a refused budget say, it may be compiled again).
        OptimizerError: the optimizer holds parameters that are not the model's, or has step hooks.
        CaptureError: there is nothing to train, or a lazy module has not been called yet.
    """
    budget = None
    if memory is None:
        refuse_open_options(options)
        config = Config.from_options(_with_plan(plan, options))
    elif plan is not None:
        raise OptionError("memory beside a plan, which has a budget of its own", fix="give memory to zgraph.plan")
    else:
        budget = Budget.of(memory, options)
        config = budget.config
    with _as_it_was(model):
        check_arguments(model, optimizer, loss, weight, passes, config)
        for name in vars(CompiledModule):
            if not hasattr(nn.Module, name) and hasattr(model, name):
                raise OptionError(
                    f"the model has an attribute {name!r}, which zgraph.compile would hide", fix="rename the attribute"
                )
        group = process_group()
        if plan is not None:
            _check_plan(plan, group, model)
        runtime = Runtime(
            model, optimizer, loss, weight, check_metrics(metrics), config, group, tuple(passes), budget, progress
        )
    model.__class__ = type(f"Compiled{type(model).__name__}", (CompiledModule, type(model)), {})
    model.__dict__["_zgraph"] = runtime
    return model


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """A compiled model of which nothing has been moved, since no step has run, is taken to be not compiled yet.

    If something fails within, it is compiled as before.
    """
    if not isinstance(model, CompiledModule) or model.__dict__["_zgraph"].state.layout is not None:
        yield
        return
    compiled, runtime = type(model), model.__dict__.pop("_zgraph")
    model.__class__ = compiled.__bases__[1]
    try:
        yield
    except BaseException:
        model.__class__, model.__dict__["_zgraph"] = compiled, runtime
        raise


class CompiledModule(nn.Module):
    """What a compiled model can do besides being the module it was."""

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """One training step on a batch.

        Args:
            args, kwargs: passed to the model. With ``accumulate=k``, every tensor is divided along its first
                dimension into k parts, one for each micro-batch; or all there is is a ``zgraph.MicroBatches``.

        Returns:
            The loss averaged over micro-batches and ranks, detached: a 0-dim tensor. With ``metrics``, a pair of it and
            a dictionary of 0-dim float64 tensors by name.

        Raises:
            ZgraphError: on all ranks, before anything is communicated or changed. An error inside the running step is
                torch's own; buffers may then be as an earlier micro-batch has left them.
        """
        return self.__dict__["_zgraph"].train_step(args, kwargs)

    def stats(self) -> dict[str, Any]:
        """Bytes this rank stores, collectives it issued, and what compiling cost.

        Returns:
            ``param_bytes``, ``optimizer_state_bytes``, ``buffer_bytes``; ``disk_bytes`` of parameters and optimizer
            state that lie on a disk instead, ``spilled_bytes`` that activations have there, and gradients with
            ``host_updates``, and ``disk_read_bytes`` and ``disk_written_bytes`` of the last step; ``host_bytes`` and so
            on likewise of the host beside a GPU;
            ``arena_bytes`` that temporaries of all steps share on a CPU, and ``copied_bytes`` that the last step copied
            to put gradients side by side, as they could not be made there; ``collectives`` of the last step:
            operation -> ``count`` and ``bytes`` received or, for all_reduce, received and sent; ``num_nodes``,
            ``num_captures``, ``capture_s``, ``passes_s``; with ``clip_norm`` or float16 also ``gradient_norm`` of the
            last step, before it was clipped, and ``num_skipped_steps`` since the model was compiled; with float16
            ``loss_scale`` of the next step.
        """
        return stats_of(self.__dict__["_zgraph"])

    @property
    def recipe(self) -> dict[str, float]:
        """Numbers of the recipe by option (``ema``), read anew in each step; all ranks change them alike."""
        return self.__dict__["_zgraph"].numbers  # type: ignore[no-any-return]

    @property
    def program(self) -> Program:
        """The program of the last step, after all passes."""
        return self.__dict__["_zgraph"].last().executable.program  # type: ignore[no-any-return]

    @property
    def source(self) -> str:
        """The Python that the last step ran, on its last micro-batch: all ranks run the same.

        Comments say what its inputs and buckets hold, which phase and module each part is of, and on which lane a call
        starts what another waits for.
        """
        return self.__dict__["_zgraph"].last().executable.step.source  # type: ignore[no-any-return]

    def kernels(self) -> list[KernelInfo]:
        """The kernels of the last step: what each computes, reads and writes, what it is written in, and its text."""
        return kernels_of(self.program)

    @property
    def plan(self) -> Plan:
        """What the last step is predicted to take on this machine, as ``zgraph.plan`` tells it.

        Raises:
            OptionError: this kind of GPU is not known; ``zgraph calibrate`` measures it.
        """
        return plan_of(self.__dict__["_zgraph"])

    def report(self, path: str | Path | None = None) -> Report:
        """See inside the last step: what each pass did, what it costs, what is held when, and why.

        The step is captured and rewritten once more for it, in this process alone, so that training pays nothing for
        reports that nobody asks for. Numbers are predictions for this machine, as those of ``plan`` are.

        Args:
            path: where to write a page, such as ``"report.html"``. It is one file, which asks nothing of a network;
                its data goes beside it (``report.json``), and a trace that Perfetto opens (``report.trace.json``).
                Nothing is written if None.

        Raises:
            StateError: the files cannot be written.
            OptionError: this kind of GPU is not known; ``zgraph calibrate`` measures it.
        """
        if path is not None:
            files_of(path)
        made = report_of(self.__dict__["_zgraph"])
        if path is not None:
            made.write(path)
        return made

    def export(self, directory: str | Path, batch: Any = None) -> list[Path]:
        """Write the step that ran last, with its kernels and state, to run without zgraph: ``python step.py``.

        It computes bit for bit what the next steps would compute here, on CPUs whose ranks share a host. All ranks call
        it: rank 0 writes the programs, and each rank the part of the state that it stores.

        Args:
            directory: where to; it is made if it is not there.
            batch: of this rank, to go with it: what the model is called with, as a tuple of positional arguments, a
                dictionary of keyword arguments, or a pair of these. If None, ``step.py`` makes one up.

        Returns:
            The files that this rank has written.

        Raises:
            OptionError: the step cannot be exported yet, or the batch is not one that it takes.
            StateError: a file cannot be written.
        """
        return export(self.__dict__["_zgraph"], Path(directory), batch)

    def profile(self, steps: int = 3) -> None:
        """Measure the next steps, call by call; ``report`` then shows what was measured beside what was predicted.

        A step that is measured runs the same calls, and reads the clock after each; those behind run as before.

        Args:
            steps: how many. Of them, the one of median length is shown.

        Raises:
            OptionError: no such number of steps, or the model is compiled with ``check_memory``.
        """
        self.__dict__["_zgraph"].profile(steps)

    def explain(self) -> Explanation:
        """Why the last step takes what it takes: sentences with numbers, to be printed.

        Raises:
            OptionError: this kind of GPU is not known; ``zgraph calibrate`` measures it.
        """
        return explain(self.report())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["_zgraph"].eager():
            return super().__call__(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Full parameters under their original names. All ranks call it together."""
        return self.__dict__["_zgraph"].state.state_dict(super().state_dict, *args, **kwargs)

    def full_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter's name and full value, bucket by bucket: to save what is larger than memory.

        A value is a copy. Tied parameters come once. All ranks go through them together, to the end.

        Raises:
            ZgraphError: no step has been compiled yet.
            RankError: parameters are divided, and another rank has called something else.
        """
        yield from self.__dict__["_zgraph"].full_params()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load full parameters; each rank stores its part."""
        return self.__dict__["_zgraph"].state.load_state_dict(super().load_state_dict, *args, **kwargs)

    def ema_state_dict(self) -> dict[str, Any]:
        """What ``state_dict`` gives, with the averages of trained weights in their place.

        All ranks call it together. What an average is saved in, and loaded from, is ``optimizer.state_dict()``.

        Raises:
            OptionError: the model was compiled without ``ema``.
        """
        return self.__dict__["_zgraph"].ema_state_dict()  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            "a compiled model cannot be pickled: it holds generated code and, on several ranks, a part of the state",
            fix="save model.state_dict(), which has the whole parameters under their original names",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with an optimizer of its own, as plain modules and their optimizers have when copied together."""
        runtime = self.__dict__["_zgraph"]
        if runtime.state.group is not None:
            raise StateError(
                "a compiled model cannot be copied while its process group is part of it",
                fix="build another model and load_state_dict(model.state_dict())",
            )
        # The copy captures a step of its own.
        memo |= {id(runtime.cache): [], id(runtime.timed): {}, id(runtime._last): None}
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.__dict__["_zgraph"].state.has_been_copied()
        return copied


def _with_plan(plan: Plan | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a plan and those that are given beside it."""
    if plan is None:
        return options
    given: Any = plan
    if not isinstance(given, Plan):
        raise OptionError(f"plan is a {type(given).__name__}", fix="pass what zgraph.plan returns")
    wanted, planned = Config.from_options({**plan.options, **options}), plan.config
    for name in options:
        if getattr(wanted, name) != getattr(planned, name):
            raise OptionError(
                f"{name}={options[name]!r}, but the plan has {name}={getattr(planned, name)!r}",
                fix=f"leave it out, or give {name}={options[name]!r} to zgraph.plan",
            )
    return {**plan.options, **options}


def _check_plan(plan: Plan, group: dist.ProcessGroup | None, model: nn.Module) -> None:
    world = 1 if group is None else dist.get_world_size(group)
    if plan.world_size != world:
        raise OptionError(
            f"the plan is for {plan.world_size} ranks, and there are {world}", fix=f"plan with world_size={world}"
        )
    num_params = sum(p.numel() for p in model.parameters())
    if plan.num_params != num_params:
        raise OptionError(
            f"the plan is for a {plan.model} of {plan.num_params:,} parameters, and this model has {num_params:,}",
            fix="plan with this model",
        )
    if not plan.fits:
        raise plan.refusal()


def check_arguments(model: Any, optimizer: Any, loss: Any, weight: Any, passes: Sequence[Any], config: Config) -> None:
    """Refuse what cannot be trained.

    Raises:
        OptionError, OptimizerError, CaptureError: see ``compile``.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}", fix="pass a torch.nn.Module")
    if loss is not None and not callable(loss):
        raise OptionError(f"loss is a {type(loss).__name__}", fix="pass a function loss(output, *args, **kwargs)")
    if weight is not None and not callable(weight):
        raise OptionError(f"weight is a {type(weight).__name__}", fix="pass a function weight(*args, **kwargs)")
    if weight is not None and config.gradient_noise is not None:
        raise OptionError("gradient_noise with a weight, which would weigh it, too", fix="leave one of them out")
    params: Iterable[tuple[str, Any]] = model.named_parameters()
    lazy = [name for name, p in params if is_lazy(p)]
    if lazy:
        raise CaptureError(
            f"{lazy[0]} has no shape yet",
            fix="call the model once on a batch before zgraph.compile, as lazy modules need",
        )
    if isinstance(model, CompiledModule):
        raise OptionError(
            "this model is compiled already, and a step of it has run", fix="compile each model once, or build it anew"
        )
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptionError(f"optimizer is a {type(optimizer).__name__}", fix="pass a torch.optim.Optimizer")
        check_optimizer(model, optimizer)
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise CaptureError(
                "there is nothing to train: no parameter of the optimizer requires a gradient",
                fix="leave requires_grad=True on what should train",
            )
    if not isinstance(passes, Sequence):
        raise OptionError(f"passes is a {type(passes).__name__}", fix="give a list of passes")
    for p in passes:
        if not isinstance(p, Pass):
            raise OptionError(f"passes holds a {type(p).__name__}", fix="pass instances of subclasses of zgraph.Pass")
        if p.takes is not p.gives:
            raise OptionError(
                f"{p.name} takes a {p.takes.name} program and gives a {p.gives.name} one",
                fix="leave the stage as it was: takes and gives must be equal for a pass of your own",
            )
