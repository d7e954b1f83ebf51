"""``zgraph.simulate_ranks``: a job of many ranks, played in one process, to be debugged in a test.

The step is captured and rewritten as ``zgraph.compile`` does it on that many ranks, under the same verifier. Then
every rank's state is kept here, and each step runs for all of them together. No process group is needed, and the
user's model and optimizer stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.agreement import Agreement
from zgraph.batches import Call, MicroBatches, call_of, micro_batches, name_of
from zgraph.capture import capture
from zgraph.compiler import check_arguments
from zgraph.config import Config, check_numbers
from zgraph.errors import OptimizerError, OptionError, RankError, StateError, ZgraphError
from zgraph.execute import initial_state, initial_value, without_unmade
from zgraph.facts import Facts, fact_of, hold, state_spec
from zgraph.generators import RandomStream
from zgraph.layout import Layout
from zgraph.lockstep import Value, Values, divide, join, part_of, run_ranks
from zgraph.lower import Lowered, check_same_buckets, lower
from zgraph.metrics import Metric, by_name, check_metrics
from zgraph.optimizer_state import Forms, OptimizerState, check_agreement, forms_by_parameter, stored_form
from zgraph.pipeline import Pass
from zgraph.program import OF_PARAMETERS, Input, Program, Role, describe
from zgraph.runtime import functions_by_name
from zgraph.skipping import NUM_SKIPPED, report
from zgraph.tracing import forget
from zgraph.update import check_step, hyperparameters
from zgraph.which_hardware import hardware_of


def simulate_ranks(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    world_size: int,
    loss: Callable[..., torch.Tensor] | None = None,
    weight: Callable[..., torch.Tensor | float] | None = None,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    passes: Sequence[Pass] = (),
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> SimulatedRanks:
    """Train on ``world_size`` ranks, all of them in this process.

    Every rank starts from the values that parameters, buffers and optimizer state have now. They are copied; the
    user's are never changed, but for the mark by which torch's schedulers see that the optimizer has made a step.
    Read anew at each step, as in a real job, are hyperparameters, so that schedulers work, and ``requires_grad``,
    parameter groups and training mode, after whose change the step is captured again.

    What is computed is exactly what real ranks compute, operator by operator. Means over ranks are summed in rank
    order, as zgraph does between gloo ranks where each receives a part (gradients of ZeRO 2 and 3). In an all-reduce
    (the loss; gradients of ZeRO 0 and 1) backends have an order of their own: from three ranks on, the last bits
    may differ.

    Args:
        model, optimizer, loss, weight, metrics, passes, options: as for ``zgraph.compile``. The model must have values.
        world_size: how many ranks.
        seed: rank r draws what a process draws after ``torch.manual_seed(seed + r)``, from step to step, whatever
            else draws in this process; or a seed for each rank.

    Raises:
        OptionError: an unknown option, or one out of range; a pass that cannot be placed.
        OptimizerError: the optimizer is missing, or holds parameters that are not the model's.
        CaptureError: there is nothing to train.
        StateError: the model is on meta, or the optimizer's state cannot be stored.
    """
    config = Config.from_options(options)
    check_arguments(model, optimizer, loss, weight, passes, config)
    if optimizer is None:
        raise OptimizerError("ranks need an optimizer to train with", fix="pass optimizer=torch.optim.AdamW(...)")
    if not _is_whole(world_size) or world_size < 1:
        raise OptionError(f"world_size={world_size!r} is not a number of ranks", fix="give a positive integer")
    config.mesh(world_size)  # or refuse
    seeds: Any = [seed + rank for rank in range(world_size)] if isinstance(seed, int) else seed
    if isinstance(seed, bool) or not isinstance(seeds, (list, tuple)) or not all(map(_is_whole, seeds)):
        raise OptionError(f"seed={seed!r} is no seed", fix="give an integer, or a list of one for each rank")
    if len(seeds) != world_size:
        raise OptionError(f"seed has {len(seeds)} seeds for {world_size} ranks", fix="give one for each, or an integer")
    ranks = [RandomStream(one) for one in seeds]
    return SimulatedRanks(model, optimizer, loss, weight, check_metrics(metrics), config, tuple(passes), ranks)


class SimulatedRanks:
    """Ranks that train together in one process; made by ``zgraph.simulate_ranks``.

    Attributes:
        layout: the buckets; None before the first step.
        recipe: numbers of the recipe by option (``ema``), read anew in each step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., torch.Tensor] | None,
        weight: Callable[..., torch.Tensor | float] | None,
        metrics: dict[str, Metric],
        config: Config,
        passes: tuple[Pass, ...],
        streams: list[RandomStream],
    ) -> None:
        self._model, self._optimizer, self._loss, self._weight = model, optimizer, loss, weight
        self._metrics = metrics
        self._config, self._passes, self._streams = config, passes, streams
        values = values_of(model, optimizer)
        # Tensors in here are replaced, never written to, so that ranks may have them in common.
        self._values: list[Values] = [dict(values) for _ in streams]
        self._given = OptimizerState(optimizer, Agreement(None)).forms(dict(model.named_parameters()))
        self._constants: dict[Hashable, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self.layout: Layout | None = None
        self.recipe = config.numbers()
        self._shapes = _shapes(model)
        self._programs: dict[str, list[Lowered]] = {}
        self._program: Program | None = None
        self._facts = Facts(model, optimizer, self, functions_by_name(loss, weight, metrics))

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self._values)

    @property
    def program(self) -> Program:
        """The program of the last step, after all passes: the same on all ranks."""
        if self._program is None:
            raise ZgraphError(
                "nothing is compiled yet", fix="call train_step once: the batch is part of what is compiled"
            )
        return self._program

    def train_step(self, batches: Sequence[Any]) -> Any:
        """One training step of all ranks.

        Args:
            batches: one for each rank, in rank order. A batch is what the model is called with: a tuple or list of
                positional arguments, a dictionary of keyword arguments, or a pair of such a tuple and dictionary.
                (A model that takes just a tuple and a dictionary is given ``((a_tuple, a_dict), {})``.) With
                ``accumulate`` it is divided, or a ``MicroBatches``.

        Returns:
            What ``train_step`` of a compiled model does: the loss averaged over the ranks, a 0-dim tensor, and metrics.

        Raises:
            ZgraphError: every rank's state is as before; a ``RankError`` names the rank whose batch does not fit or
                whose operator failed, with the line of the model.
        """
        calls = self._calls(batches)
        self._check_model()
        check_numbers(self.recipe, self._config)
        hypers = {**hyperparameters(self._optimizer), **self._config.inputs(self.recipe, self.world_size)}
        check_step(self._optimizer)
        forms = self.state_forms()
        made: list[tuple[Call, Lowered]] = []
        lowered = [self._lowered(calls[-1][0], hypers, forms, made)]
        layout = lowered[0].layout
        lowered[:0] = [self._lowered(of_all[0], hypers, forms, made, layout) for of_all in calls[:-1]]
        self._commit(layout, forms)
        before, streams = [dict(mine) for mine in self._values], [stream.copy() for stream in self._streams]
        constants = {memory: (constant, list(each)) for memory, (constant, each) in self._constants.items()}
        try:
            for i, (of_all, programs) in enumerate(zip(calls, lowered, strict=True)):
                program = programs.last if i + 1 == len(calls) else programs.programs[0]
                results = self._run(program, of_all, hypers, streams)
        except BaseException:
            self._values, self._constants = before, constants  # nothing was written to
            raise
        self._streams, self._program = streams, lowered[-1].last
        for call, programs in made:
            if programs.last.reads_all_state():  # what created its state reads it from now on
                self._facts.read(call)
                self._programs.setdefault(self._facts.key, []).append(programs)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # as after optimizer.step(), for schedulers
        loss = results[0][None]
        return (loss, by_name(self._metrics, self._recipe(), self.world_size)) if self._metrics else loss

    def state_dict(self, rank: int = 0) -> dict[str, Any]:
        """Full parameters, and the buffers of one rank, as the model's own ``state_dict`` names them.

        Raises:
            RankError: a parameter that every rank stores whole is not the same on all.
        """
        if not _is_whole(rank) or not 0 <= rank < self.world_size:
            raise OptionError(f"rank={rank!r} is not one of {self.world_size} ranks", fix="count ranks from 0")
        values = self._whole(Role.PARAM)[rank]
        inputs = {id(p): Input(Role.PARAM, name) for name, p in self._model.named_parameters()}
        inputs.update({id(b): Input(Role.BUFFER, name) for name, b in self._model.named_buffers()})
        found: dict[str, Any] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in inputs:
                raise StateError(
                    f"the model's state_dict has {name!r}, which is neither a parameter nor a buffer of its modules",
                    fix="take out the state_dict hook that makes it, for the simulation",
                )
            found[name] = _copy(values[inputs[id(tensor)]]) if isinstance(tensor, torch.Tensor) else tensor
        return found

    def optimizer_state(self) -> dict[str, dict[str, Value]]:
        """Parameter name -> state key -> full tensor or number, of the parameters that have state.

        Raises:
            RankError: state that every rank stores whole is not the same on all.
        """
        found: dict[str, dict[str, Value]] = {}
        for what, value in self._whole(Role.OPT_STATE)[0].items():
            if what is not None and what.role is Role.OPT_STATE:
                found.setdefault(what.name, {})[what.key] = _copy(value)
        return found

    def stats(self) -> dict[str, Any]:
        """``gradient_norm``, ``num_skipped_steps`` and ``loss_scale``, where a compiled model has them."""
        return report(self._recipe())

    def _recipe(self) -> dict[str, Value]:
        """What the steps count and report, the same on all ranks."""
        return {what.name: v for what, v in self._values[0].items() if what and what.role is Role.RECIPE}

    # -- a step -----------------------------------------------------------------------------------------------

    def _calls(self, batches: Any) -> list[list[Call]]:
        """What each rank's model is called with, for each micro-batch; alike in all but the tensors' values."""
        if not isinstance(batches, Sequence) or isinstance(batches, str):
            raise ZgraphError(
                f"train_step was given a {type(batches).__name__}", fix="give a list of batches, one for each rank"
            )
        if len(batches) != self.world_size:
            raise ZgraphError(
                f"train_step was given {len(batches)} batches for {self.world_size} ranks",
                fix="give a list of batches, one for each rank",
            )
        each = []
        for rank, batch in enumerate(batches):
            whole: Call = ((batch,), {}) if isinstance(batch, MicroBatches) else call_of(batch, _of_rank(rank))
            each.append(micro_batches(*whole, self._config.accumulate))
        calls = [list(of_all) for of_all in zip(*each, strict=True)]
        for of_all in calls:
            _check_alike(of_all)
        return calls

    def _check_model(self) -> None:
        shapes = _shapes(self._model)
        for name in [*self._shapes, *shapes]:
            if shapes.get(name) != self._shapes.get(name):
                raise StateError(
                    f"the model has changed since simulate_ranks: {name} is {shapes.get(name, 'gone')}, "
                    f"and was {self._shapes.get(name, 'not there')}",
                    fix="call simulate_ranks again after changing the model",
                )

    def _lowered(
        self,
        call: Call,
        hypers: dict[str, float],
        forms: Forms,
        made: list[tuple[Call, Lowered]],
        layout: Layout | None = None,
    ) -> Lowered:
        """The programs for a call, in these buckets if it is said which; new ones are added to ``made``."""
        self._facts.read(call)
        stored = {w: value for w, value in self._values[0].items() if w is not None and isinstance(value, (int, float))}
        numbers = {**{Input(Role.HYPER, path): value for path, value in hypers.items()}, **stored}
        known = self._programs.setdefault(self._facts.key, [])
        fitting = (programs for programs in known if layout is None or programs.layout == layout)
        lowered = next((programs for programs in fitting if hold(programs.last.guards, numbers)), None)
        if lowered is None:
            lowered = self._compile(*call, forms, layout or self.layout)
            check_same_buckets(layout or lowered.layout, lowered.layout)
            self._facts.settle()
            known.append(lowered)
            made.append((call, lowered))
        return lowered

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any], forms: Forms, layout: Layout | None) -> Lowered:
        captured = capture(
            self._model,
            self._optimizer,
            args,
            kwargs,
            loss=self._loss,
            weight=self._weight,
            metrics=self._metrics,
            state=state_spec(self._model, forms),
            config=self._config,
        )
        mesh = self._config.mesh(self.world_size)
        # As on several hosts, where parameters are gathered: nothing is shared that each rank could write to.
        machine = replace(hardware_of(torch.device("cpu"), self.world_size), reads_peers=False)
        lowered = lower(captured, self._config, mesh, layout, self._passes, hardware=machine)
        for program in lowered.programs:
            forget(program.graph)
        return lowered

    def _run(
        self, program: Program, calls: Sequence[Call], hypers: dict[str, float], streams: Sequence[RandomStream]
    ) -> list[Values]:
        """What all ranks' results are, stored."""
        leaves = [pytree.tree_leaves(call) for call in calls]
        tensors = [[leaf for leaf in mine if isinstance(leaf, torch.Tensor)] for mine in leaves]
        inputs = [self._inputs(program, rank, mine, hypers) for rank, mine in enumerate(tensors)]
        results = run_ranks(program, inputs, streams=streams)
        self._store(program, inputs, results)
        return results

    def _inputs(
        self, program: Program, rank: int, tensors: list[torch.Tensor], hypers: dict[str, float]
    ) -> dict[Input | None, Value]:
        mine = self._values[rank]
        inputs: Values = {}
        for node, what in program.placeholders():
            if what.role is Role.GATHERED:
                continue  # all ranks together have it
            if what.role is Role.BATCH:
                inputs[what] = tensors[int(what.name)]
            elif what.role is Role.HYPER:
                inputs[what] = hypers[what.name]
            elif what.role is Role.CONSTANT:
                inputs[what] = self._constant(program, what)[rank]
            elif what in mine:
                inputs[what] = mine[what]
            elif what.role in (Role.RECIPE, Role.GRADIENT):
                inputs[what] = initial_value(program, what, node.meta["val"])
            else:
                param = mine[Input(Role.PARAM, what.name)]
                assert isinstance(param, torch.Tensor)
                start = program.init[what]
                assert program.layout is not None
                shard = partial(part_of, rank=rank, world=program.layout.world)
                bucket = program.layout.by_name[what.name]
                inputs[what] = initial_state(start, node.meta["val"], param, shard, bucket)
        return inputs

    def _constant(self, program: Program, what: Input) -> list[torch.Tensor]:
        """What each rank has of a tensor that is no buffer; forward may write to it all the same."""
        constant = program.constants[what.name]
        memory = constant.untyped_storage()._cdata, constant.storage_offset(), constant.shape, constant.stride()
        _, each = self._constants.setdefault(memory, (constant, [constant] * self.world_size))
        return each

    def _store(self, program: Program, inputs: list[Values], results: list[Values]) -> None:
        for rank, mine in enumerate(self._values):
            mine.update({w: v for w, v in inputs[rank].items() if w is not None and w.role in OF_PARAMETERS})
            count = inputs[rank].get(NUM_SKIPPED)
            for what, value in without_unmade(inputs[rank], count, results[rank]).items():
                if what is None:
                    continue
                if what.role is Role.CONSTANT:
                    each = self._constant(program, what)
                    each[rank] = _like(each[rank], value)
                else:
                    mine[what] = _like(mine[what], value) if what.role is Role.BUFFER else value

    # -- state ------------------------------------------------------------------------------------------------

    def state_forms(self) -> Forms:
        """The optimizer state that exists, by parameter name and key."""
        forms = self._given
        if self.layout is not None:
            stored: dict[str, dict[str, Any]] = {bucket.name: {} for bucket in self.layout.buckets}
            for what, value in self._values[0].items():
                if what is not None and what.role is Role.OPT_STATE:
                    packed = self.layout.packs(what.name, what.key)
                    stored[what.name][what.key] = stored_form(value, packed=packed)
            forms = forms_by_parameter(self.layout, stored)
        return {name: dict(sorted(entries.items())) for name, entries in forms.items()}

    def stored_forms(self) -> Forms:
        """The same: the user's optimizer keeps its own."""
        return self.state_forms()

    def _commit(self, layout: Layout, forms: Forms) -> None:
        """Store parameters and optimizer state as ``layout`` says."""
        if layout == self.layout:
            return
        check_agreement(layout, forms)
        whole = self._values if self.layout is None else join(self.layout, self._values)
        flat = {
            Input(Role.OPT_STATE, name, key)
            for name, entries in forms.items()
            for key, form in entries.items()
            if form.flat or layout.find(name)[0].keeps(key)
        }
        self.layout, self._values = layout, divide(layout, whole, flat)

    def _whole(self, role: Role) -> list[Values]:
        """Every rank's full values; those of ``role`` must be the same on all."""
        whole = self._values if self.layout is None else join(self.layout, self._values)
        for what, value in whole[0].items():
            if what is None or what.role is not role:
                continue
            for rank, values in enumerate(whole):
                if not _is_same(values[what], value):
                    raise RankError(
                        f"{what} has another value on rank {rank} than on rank 0",
                        fix="look for a pass whose axioms do not hold on all ranks, or an operator that gives another "
                        "result when it is run again",
                    )
        return whole


def _of_rank(rank: int) -> str:
    return f"the batch of rank {rank}"


def _check_alike(calls: Sequence[Call]) -> None:
    """Every rank's call has what that of rank 0 has."""
    flat = [pytree.tree_flatten_with_path(call) for call in calls]
    first = {name_of(path): fact_of(leaf) for path, leaf in flat[0][0]}
    for rank, (named, spec) in enumerate(flat):
        mine = {name_of(path): fact_of(leaf) for path, leaf in named}
        for name in [*first, *mine]:
            if mine.get(name) != first.get(name):
                found, expected = mine.get(name, "nothing"), first.get(name, "nothing")
                raise RankError(
                    f"{_of_rank(rank)} differs from that of rank 0: {name} is {found}, not {expected}",
                    fix="give every rank the same arguments, with tensors of equal shape, dtype and strides",
                )
        if spec != flat[0][1]:
            raise RankError(
                f"{_of_rank(rank)} is built otherwise than that of rank 0: {spec}, not {flat[0][1]}",
                fix="give every rank the same arguments in the same containers",
            )


def values_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Copies of all that a model and its optimizer store.

    Raises:
        StateError: something is on meta.
    """
    values: Values = {}
    for name, param in model.named_parameters():
        values[Input(Role.PARAM, name)] = param.detach()
        for key, value in optimizer.state.get(param, {}).items():
            values[Input(Role.OPT_STATE, name, key)] = value
    for name, buffer in model.named_buffers():
        values[Input(Role.BUFFER, name)] = buffer.detach()
    for what, value in values.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise StateError(
                f"{what} is on meta, where it has no value to give to the ranks",
                fix="build a model of this size on a real device before the optimizer; or, if it is too large, a "
                "smaller one",
            )
    return {what: _copy(value) for what, value in values.items()}


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _shapes(model: nn.Module) -> dict[str, str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: describe(tensor) for name, tensor in tensors}


def _like(old: Value, new: Value) -> torch.Tensor:
    """The new value in memory of its own, laid out as the old one: what the step was captured with."""
    assert isinstance(old, torch.Tensor)
    assert isinstance(new, torch.Tensor)
    return torch.empty_like(old).copy_(new)


def _copy(value: Value) -> Value:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_same(value: Value, other: Value) -> bool:
    """Bit for bit, NaN included."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(value == other)
    if value.data_ptr() == other.data_ptr():
        return True
    one, two = (t.contiguous().view(-1).view(torch.uint8) for t in (value, other))
    return torch.equal(one, two)
