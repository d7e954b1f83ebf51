"""``zgraph.compile``: capture, passes, code, execution. The table of contents of the project.

``compile`` itself only checks its arguments and gives the model a ``train_step``. The first ``train_step`` knows the
batch, so there the step is captured, rewritten, verified and emitted, all ranks agree on it, and only then do the
parameters move into their buckets. Until that moment the user's model and optimizer are untouched.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.capture import capture, check_optimizer
from zgraph.codegen.emit import emit
from zgraph.comm import Comm, default_backend, make_comm
from zgraph.config import Config
from zgraph.eager import GatherOnUse
from zgraph.errors import CaptureError, OptimizerError, OptionError, StateError, ZgraphError
from zgraph.execute import Executable
from zgraph.heap import release_free_memory
from zgraph.passes import default_passes
from zgraph.pipeline import PassRecord, run
from zgraph.program import Guard, Input, Mesh, Program, Role, in_words
from zgraph.state import TrainingState
from zgraph.tracing import forget
from zgraph.update import StateEntry, StateSpec, hyperparameters, structure, unnamed

log = logging.getLogger("zgraph")

STEP_COUNTS = "the optimizer's step counts"
"""The one fact that ranks must agree on although a captured step does not depend on it."""

NUM_KEPT_STEPS = 8
"""Compiled steps that are kept, those used last: each holds a graph of its own. Who needs more is told so."""


def compile(  # noqa: A001
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable[..., torch.Tensor] | None = None,
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
        options: see ``zgraph.config.Config``.

    Returns:
        ``model`` itself, now also a ``CompiledModule``. (Python cannot spell the type that is both, hence ``Any``.)

    Raises:
        OptionError: an unknown option, or one out of range.
        OptimizerError: the optimizer holds parameters that are not the model's.
        CaptureError: there is nothing to train.
    """
    config = Config.from_options(options)
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}", fix="pass a torch.nn.Module")
    if isinstance(model, CompiledModule):
        raise OptionError("this model is compiled already", fix="compile each model once")
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptionError(f"optimizer is a {type(optimizer).__name__}", fix="pass a torch.optim.Optimizer")
        check_optimizer(model, optimizer)
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise CaptureError(
                "there is nothing to train: no parameter of the optimizer requires a gradient",
                fix="leave requires_grad=True on what should train",
            )
    for name in ("train_step", "stats", "program", "source"):
        if hasattr(model, name):
            raise OptionError(
                f"the model has an attribute {name!r}, which zgraph.compile would hide", fix="rename the attribute"
            )
    group = _process_group()
    runtime = _Runtime(model, optimizer, loss, config, group)
    model.__class__ = type(f"Compiled{type(model).__name__}", (CompiledModule, type(model)), {})
    model.__dict__["_zgraph"] = runtime
    return model


class CompiledModule(nn.Module):
    """What a compiled model can do besides being the module it was."""

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One training step on a batch.

        Args:
            args, kwargs: passed to the model.

        Returns:
            The loss averaged over the ranks, detached: a 0-dim tensor.

        Raises:
            ZgraphError: on all ranks, before anything is communicated or changed.
        """
        return self.__dict__["_zgraph"].train_step(args, kwargs)  # type: ignore[no-any-return]

    def stats(self) -> dict[str, Any]:
        """Bytes this rank stores, collectives it issued, and what compiling cost.

        Returns:
            ``param_bytes``, ``optimizer_state_bytes``, ``buffer_bytes``; ``collectives`` of the last step: operation
            -> ``count`` and ``bytes`` received or, for all_reduce, received and sent; ``num_nodes``,
            ``num_captures``, ``capture_s``, ``passes_s``.
        """
        return self.__dict__["_zgraph"].stats()  # type: ignore[no-any-return]

    @property
    def program(self) -> Program:
        """The program of the last step, after all passes."""
        return self.__dict__["_zgraph"].last().executable.program  # type: ignore[no-any-return]

    @property
    def source(self) -> str:
        """The Python that the last step ran."""
        return self.__dict__["_zgraph"].last().executable.step.source  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["_zgraph"].eager():
            return super().__call__(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Full parameters under their original names. All ranks call it together."""
        return self.__dict__["_zgraph"].state.state_dict(super().state_dict, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load full parameters; each rank stores its part."""
        return self.__dict__["_zgraph"].state.load_state_dict(super().load_state_dict, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            "a compiled model cannot be pickled: it holds generated code and, on several ranks, a part of the state",
            fix="save model.state_dict(), which has the whole parameters under their original names",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with an optimizer of its own, as plain modules and their optimizers have when copied together."""
        runtime = self.__dict__["_zgraph"]
        if runtime.group is not None:
            raise StateError(
                "a compiled model cannot be copied while its process group is part of it",
                fix="build another model and load_state_dict(model.state_dict())",
            )
        memo[id(runtime.cache)], memo[id(runtime._last)] = [], None  # the copy captures a step of its own
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@dataclass(eq=False)
class _Compiled:
    """A step compiled for one kind of batch.

    ``keys`` are of the facts that it was captured under, and of those that its own first run led to.
    """

    keys: set[str]
    executable: Executable
    comm: Comm
    guards: tuple[Guard, ...]
    records: tuple[PassRecord, ...]
    capture_s: float


@dataclass
class _Runtime:
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss: Callable[..., torch.Tensor] | None
    config: Config
    group: dist.ProcessGroup | None
    cache: list[_Compiled] = field(default_factory=list)  # in order of last use
    _num_captures: int = 0
    _num_changes: Counter[str] = field(default_factory=Counter)
    _last: _Compiled | None = None
    _facts_seen: dict[str, str] = field(default_factory=dict)
    _met: list[Any] = field(default_factory=list)
    _capturing: bool = False

    def __post_init__(self) -> None:
        self.state = TrainingState(self.model, self.optimizer, self.group)
        self.agreement = self.state.agreement

    # -- a step ---------------------------------------------------------------------------------------------

    def train_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if self.optimizer is None:
            raise OptimizerError(
                "train_step needs an optimizer", fix="zgraph.compile(model, optimizer=torch.optim.AdamW(...))"
            )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        hypers: dict[str, float] = {}
        facts: dict[str, str] = {}
        replaced: list[str] = []
        num_met = len(self._met)
        error: Exception | None = None
        try:
            hypers = hyperparameters(self.optimizer)
            facts = {**self._facts(leaves, spec), **self._objects()}
            replaced = self.state.replaced()
        except Exception as caught:  # noqa: BLE001 -- another rank may not have it, and is told before this one stops
            error = caught
        others = {
            "hyperparameters": repr(hypers),
            "zgraph options": repr(self.config),
            "which parameters have been given other values": repr(replaced),
        }
        try:
            self.agreement.check("model.train_step()", {**facts, **others}, error)
        except Exception:
            del self._met[num_met:]  # a refused step is no step: ranks would count differently from now on
            raise
        key = self._key(facts)
        values = self._guarded_values(hypers)
        compiled = next((c for c in self.cache if key in c.keys and _hold(c.guards, values)), None)
        is_new = compiled is None
        if compiled is None:
            if self._last is not None:
                self._warn(key, facts)
            compiled = self._compile(key, args, kwargs)
        layout = compiled.executable.program.layout
        assert layout is not None
        if replaced or layout != self.state.layout:
            self.state.commit(layout)
        self._keep(compiled)
        compiled.comm.traffic.clear()
        with self.agreement.no_return():
            loss = compiled.executable.run([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], hypers)
        if is_new:
            facts = {**self._facts(leaves, spec), **self._objects()}
            if compiled.executable.reads_all_state():  # what created its state reads it from now on
                compiled.keys.add(self._key(facts))
        self._facts_seen = facts
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # as after optimizer.step(), for schedulers
        return loss

    def _keep(self, compiled: _Compiled) -> None:
        """Count the step as used last; of all steps those used last are kept. All ranks decide alike."""
        if compiled in self.cache:
            self.cache.remove(compiled)
        else:
            self._num_captures += 1
        self.cache.append(compiled)
        del self.cache[:-NUM_KEPT_STEPS]
        self._last = compiled

    def _compile(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Compiled:
        assert self.optimizer is not None
        error: Exception | None = None
        digest = b""
        self._capturing = True
        try:
            start = time.perf_counter()
            program = capture(
                self.model,
                self.optimizer,
                args,
                kwargs,
                loss=self.loss,
                state=self._state_spec(),
                device=self._device(),
            )
            capture_s = time.perf_counter() - start
            mesh = Mesh(self.agreement.world)
            result = run(default_passes(self.config, mesh, self.state.layout), program)
            digest = result.program.digest()
            assert result.program.layout is not None
            comm = make_comm(self.group, {bucket.device.type for bucket in result.program.layout.buckets})
            executable = Executable(result.program, emit(result.program), self.state, comm)
            del program
        except Exception as caught:  # noqa: BLE001 -- whatever it is, the other ranks are told before this one stops
            error = caught
        finally:
            self._capturing = False
        self.agreement.share_outcome(digest, error)
        forget()
        gc.collect()  # graphs are full of cycles; what capture left behind is gone before the first step
        release_free_memory()
        return _Compiled({key}, executable, comm, result.program.guards, result.records, capture_s)

    def _device(self) -> torch.device | None:
        """Where parameters without memory live; None before they have a place."""
        return self.state.layout.buckets[0].device if self.state.layout is not None else None

    def _state_spec(self) -> StateSpec:
        """Optimizer state that exists now, for capture."""
        params = dict(self.model.named_parameters())
        spec: StateSpec = {}
        for name, forms in self.state.state_forms().items():
            entries = {
                key: StateEntry(tuple(params[name].shape) if form.elementwise else (), form.dtype, form.value)
                for key, form in forms.items()
            }
            if entries:
                spec[name] = entries
        return spec

    # -- what a compiled step depends on --------------------------------------------------------------------

    def _facts(self, leaves: list[Any], spec: pytree.TreeSpec) -> dict[str, str]:
        """Everything a captured step is specialised on, in words."""
        assert self.optimizer is not None
        params = list(self.model.named_parameters())
        names = {id(p): name for name, p in params}
        batch = [_fact_of(leaf) for leaf in leaves]
        members = [[names.get(id(p), "?") for p in group["params"]] for group in self.optimizer.param_groups]
        modes = [
            f"{device}: {torch.get_autocast_dtype(device)}"
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]
        # Step counts themselves change every step; which parameters share one is what buckets depend on.
        counts: dict[Any, int] = {}
        state = []
        for name, forms in self.state.state_forms().items():
            numbers = tuple((key, form.value) for key, form in forms.items() if form.value is not None)
            kinds = [(key, form.elementwise, str(form.dtype)) for key, form in forms.items()]
            state.append((name, kinds, counts.setdefault(numbers, len(counts))))
        return {
            "the arguments' structure": str(spec),
            "the arguments' shapes and values": repr(batch),
            "the model's parameters": repr([(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in params]),
            "the model's buffers": repr([(n, tuple(b.shape), str(b.dtype)) for n, b in self.model.named_buffers()]),
            "training mode": "".join("t" if m.training else "e" for m in self.model.modules()),
            "the optimizer": repr((structure(self.optimizer), members)),
            "the optimizer's state": repr(state),
            STEP_COUNTS: repr(list(counts)),
            "autocast and defaults": repr(
                (modes, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
            ),
        }

    def _objects(self) -> dict[str, str]:
        """Objects among the optimizer's options, by the order in which this runtime met them.

        So that one put in the place of another counts as a change, and yet ranks that do the same say the same.
        """
        assert self.optimizer is not None
        numbers = []
        for value in unnamed(self.optimizer):
            number = next((i for i, seen in enumerate(self._met) if seen is value), len(self._met))
            if number == len(self._met):
                self._met.append(value)
            numbers.append(number)
        return {"the objects among the optimizer's options": repr(numbers)}

    def _key(self, facts: dict[str, str]) -> str:
        return repr({name: fact for name, fact in facts.items() if name != STEP_COUNTS})

    def _warn(self, key: str, facts: dict[str, str]) -> None:
        """Say why the step is captured again, and once when one cause recurs."""
        changed = [name for name in facts if name != STEP_COUNTS and facts[name] != self._facts_seen.get(name)]
        if any(key in compiled.keys for compiled in self.cache):
            why = "a hyperparameter crossed a condition in the optimizer's step()"
        elif changed:
            why = f"{' and '.join(changed)} changed"
        else:
            why = "the optimizer's first step has created its state, and later ones read it"
        log.warning("zgraph: capturing the training step again, because %s", why)
        self._num_changes.update(changed)
        for name in changed:
            if self._num_changes[name] == NUM_KEPT_STEPS:
                log.warning(
                    "zgraph: %s changed %d times, and each time the step was captured again; only %d captured steps "
                    "are kept. Pass numbers that change as tensors, and batches in few shapes",
                    name,
                    NUM_KEPT_STEPS,
                    NUM_KEPT_STEPS,
                )

    def _guarded_values(self, hypers: dict[str, float]) -> dict[Input, float]:
        values = {Input(Role.HYPER, path): value for path, value in hypers.items()}
        for bucket, entries in self.state.opt.items():
            for key, value in entries.items():
                if isinstance(value, (int, float)):
                    values[Input(Role.OPT_STATE, bucket, key)] = value
        return values

    # -- around steps ---------------------------------------------------------------------------------------

    def eager(self) -> Any:
        """Context in which the model may be called as a plain module."""
        if self._capturing:
            return nullcontext()
        if torch.is_grad_enabled() and self.state.layout is not None:
            raise ZgraphError(
                "a compiled model trains through train_step; calling it would record gradients that are never used",
                fix="call model.train_step(...), or wrap evaluation in torch.no_grad()",
            )
        if self.state.layout is None:
            return nullcontext()
        if self.state.divided:
            self.agreement.check("model()")
        return GatherOnUse(self.state)

    def last(self) -> _Compiled:
        if self._last is None:
            raise ZgraphError(
                "nothing is compiled yet", fix="call train_step once: the batch is part of what is compiled"
            )
        return self._last

    def stats(self) -> dict[str, Any]:
        last = self.last()
        states = [v for entries in self.state.opt.values() for v in entries.values() if isinstance(v, torch.Tensor)]
        return {
            "param_bytes": sum(t.nbytes for t in self.state.params.values()),
            "optimizer_state_bytes": sum(t.nbytes for t in states),
            "buffer_bytes": sum(b.nbytes for b in self.model.buffers()),
            "collectives": last.comm.traffic.as_dict(),
            "num_nodes": last.executable.program.num_nodes(),
            "num_captures": self._num_captures,
            "capture_s": last.capture_s,
            "passes_s": sum(record.time_s + record.verify_s for record in last.records),
        }


def _hold(guards: tuple[Guard, ...], values: dict[Input, float]) -> bool:
    return all(
        all(what in values for what in guard.inputs) and guard.holds(*(values[what] for what in guard.inputs))
        for guard in guards
    )


def _fact_of(leaf: Any) -> str:
    """What a captured step depends on of one leaf of its arguments.

    Raises:
        CaptureError: the leaf is an object whose content would silently become a constant of the graph.
    """
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype} {tuple(leaf.shape)} {tuple(leaf.stride())} {leaf.device.type}"
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return in_words(leaf)
    raise CaptureError(
        f"an argument of train_step holds a {type(leaf).__name__}, which would become a constant of the graph",
        fix="pass tensors (torch.from_numpy for arrays), numbers and strings, in lists, tuples and dictionaries",
    )


def _process_group() -> dist.ProcessGroup | None:
    """The default group, made from torchrun's environment if need be; None for a single process."""
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return None
        dist.init_process_group(default_backend())
    group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None
