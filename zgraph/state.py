"""Where a compiled model's parameters, optimizer state and buffers live at run time.

``TrainingState`` moves them from the user's objects into the flat buckets of a ``Layout``, and back out for
``state_dict``. The user's ``nn.Parameter`` objects stay the same objects: views of a bucket where each rank stores
whole buckets, on meta (a shape without memory) where buckets are divided or lie on a lower tier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zgraph import shared_memory
from zgraph.accumulation import ADD_UP
from zgraph.agreement import Agreement
from zgraph.errors import StateError
from zgraph.flat import FlatTensors, broadcast, place, without_memory
from zgraph.groups import HeldGroup, axis_group, open_axes
from zgraph.initialise import find_meta_modules, initialise
from zgraph.layout import Layout
from zgraph.loading import Waiting, copies_of
from zgraph.optimizer_state import Forms, OptimizerState, Value, check_agreement
from zgraph.program import Input, Mesh
from zgraph.tiers import Stored, Tier
from zgraph.unread import Unread


class TrainingState:
    """Parameters, optimizer state and buffers of one model on one rank.

    Creating one has no effect; ``commit`` takes the user's values over. All that reads full values is a collective
    where buckets are divided: all ranks do it together.

    Args:
        model: the user's model; parameters may be on meta.
        optimizer: the user's optimizer, if there is one.
        group: the ranks; None for a single process.
        mesh: which of them divide state; all if None.

    Attributes:
        layout: the buckets; None before the first ``commit``.
        params: bucket name -> this rank's flat parameters, in memory or on a lower tier.
        gradients: bucket name -> this rank's part of what micro-batches add up; zeros between steps.
        gathered: whole buckets of parameters that a step has gathered for all of its micro-batches; none between steps.
        recipe: what the steps count and report, by name; the same on all ranks.
        agreement: of the ranks.
    """

    group = HeldGroup()

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        group: dist.ProcessGroup | None,
        mesh: Mesh | None = None,
    ) -> None:
        self.model, self.optimizer, self.group = model, optimizer, group
        self.mesh = mesh or Mesh(1 if group is None else dist.get_world_size(group))
        self.layout: Layout | None = None
        self.params: dict[str, torch.Tensor | Stored] = {}
        self.gradients: dict[str, torch.Tensor | Stored] = {}
        self.gathered: dict[Input, torch.Tensor] = {}
        self.recipe: dict[str, torch.Tensor] = {}
        self.agreement = Agreement(group)
        self._optimizer_state = OptimizerState(optimizer, self.agreement)
        if any(param.is_meta for param in model.parameters()):
            self._optimizer_state.lend_to_load()
        self._placed: dict[str, nn.Parameter] = {}
        self._interrupted: BaseException | None = None  # while values moved, of which some may be nowhere now
        self._memory: dict[str, tuple[int, bool] | None] = {}
        self._to_load: list[Waiting] = []  # until there is memory for it

    def has_been_copied(self) -> None:
        """This state is one of a copy of the model, whose optimizer is a copy, too."""
        self._optimizer_state.has_been_copied()

    @property
    def divided(self) -> bool:
        """Whether a rank has no more than its part of the parameters, and reading them takes all ranks."""
        return self.layout is not None and self.layout.shard_params and self.layout.world > 1

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that divide state among them, once there are buckets."""
        return axis_group(self.group, self.mesh, self.mesh.shard_axis)

    @property
    def opt(self) -> dict[str, dict[str, Value]]:
        """Bucket name -> state key -> this rank's flat state, a 0-dim tensor, or a number.

        Whoever runs the first step adds what it creates, with ``keep``.
        """
        return self._optimizer_state.stored

    @property
    def tiers(self) -> dict[str, Tier]:
        """By name, those where parameters and optimizer state lie that are not in memory."""
        return self._optimizer_state.tiers

    def open_tier(self, name: str, opened: Callable[[], Tier]) -> Tier:
        """The lower tier of a name that there is, or else one that is opened now."""
        if name not in self.tiers:
            self.tiers[name] = opened()
        return self.tiers[name]

    def keep(self, bucket: str, key: str, value: Value) -> Value:
        """Store optimizer state where the layout has it; as it is stored."""
        return self._optimizer_state.keep(bucket, key, value)

    def keep_gradient(self, bucket: str, value: torch.Tensor) -> torch.Tensor | Stored:
        """Store what micro-batches are to be added up in, where the layout has it; as it is stored."""
        assert self.layout is not None
        stored = self._optimizer_state.placed(self.layout.tier_of("gradients", bucket), value)
        assert isinstance(stored, (torch.Tensor, Stored))
        self.gradients[bucket] = stored
        return stored

    def replaced(self) -> list[str]:
        """Parameters that are not as ``commit`` left them: other objects, or (``param.data = ...``) other memory."""
        self.check_whole()
        self._optimizer_state.take_back()
        return [
            name
            for name, param in self.model.named_parameters()
            if self._placed.get(name) is not param or self._memory[name] != _memory(param)
        ]

    @torch.no_grad()
    def commit(self, layout: Layout, *, in_shared_memory: bool = False) -> None:
        """Move parameters and optimizer state into the buckets of ``layout``, and initialise what is on meta.

        What ``load_state_dict`` was given for what was on meta is loaded then; a module all of whose values are given
        so is not initialised.

        The first call makes rank 0's parameters and buffers those of all ranks. A later one, with another layout,
        keeps every value; rank 0's values of parameters that have been ``replaced`` become those of all ranks.
        Gradients are dropped: a compiled step makes its own.

        Args:
            layout: of which a rank stores its part.
            in_shared_memory: parameters lie where the ranks that divide them share memory.

        Raises:
            StateError: a module cannot be initialised, or optimizer state does not fit.
            RankError: it was so on another rank, or one cannot share so much memory. Nothing has changed then, on any
                rank.
        """
        open_axes(self.group, self.mesh)
        current = dict(self.model.named_parameters())
        assert current.keys() == {s.name for b in layout.buckets for s in b.segments}, "the layout of another model"
        replaced = self.replaced()
        if layout == self.layout and all(self._placed[n] is current[n] and not current[n].is_meta for n in replaced):
            with self._moving():
                self._take_in(replaced)
            return
        kept = current.keys() - set(replaced)
        if self.layout is None:
            given = [sorted(each.values) for each in self._to_load]
            self.agreement.check("model.train_step()", {"what load_state_dict was given before it": repr(given)})
        with self.agreement.together():
            for each in self._to_load:
                each.check()
            loaded = [tensor for each in self._to_load for tensor in each.targets]
            meta_modules = find_meta_modules(self.model, except_for=[current[name] for name in kept], loaded=loaded)
            forms = self._optimizer_state.forms(current)
            check_agreement(layout, forms)

        new = self._params_in(layout, self._shared(layout) if in_shared_memory else {}, num_cached=2)
        names = {id(param): name for name, param in current.items()}
        initialise(meta_modules, names, new, self.agreement, self.group)
        initialised = {id(param) for module in meta_modules for param in module.params.values()}
        with self._moving():
            moving = {name: param for name, param in current.items() if id(param) not in initialised}
            self._move(new, moving, kept)
            new.flush()
            self._optimizer_state.move(layout, current, forms, self.shard_group)
            if self.layout is None:
                self._share_buffers(layout)
        self.layout, self.params, self._placed, self.gradients = layout, new.tensors, current, {}
        self._memory = {name: _memory(param) for name, param in current.items()}
        with self._moving():
            while self._to_load:
                waiting = self._to_load.pop(0)
                self._load(
                    waiting.original, waiting.values, waiting.strict, only={id(each) for each in waiting.targets}
                )

    def _shared(self, layout: Layout) -> dict[str, torch.Tensor]:
        """This rank's part of each bucket, in memory that the ranks share that divide them."""
        assert self.shard_group is not None
        sizes = {bucket.name: (bucket.numel // layout.world, bucket.dtype) for bucket in layout.buckets}
        return shared_memory.allocate(sizes, self.shard_group)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Around what leaves values neither where they were nor where they are to be, if it fails."""
        try:
            with self.agreement.no_return():
                yield
        except BaseException as error:
            self._interrupted = error
            raise

    def check_whole(self) -> None:
        """Refuse to go on with a model whose values may be gone.

        Raises:
            StateError: moving them has failed.
        """
        if self._interrupted is not None:
            raise StateError(
                f"the model was left in parts when moving its state failed: {self._interrupted!r}",
                fix="build the model again, and load what was saved last",
            ) from self._interrupted

    def check_loaded(self, operation: str) -> None:
        """Refuse to read what has been loaded, but is not there before the first step.

        Raises:
            StateError: it is so.
        """
        if self._to_load:
            raise StateError(
                f"{operation} before the first step, which loads what load_state_dict was given for a model on meta",
                fix="call train_step before, or build the model on a real device",
            )

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        """A step; what its micro-batches have added up is dropped if it fails, and what it has gathered in any case."""
        try:
            yield
        except BaseException:
            self.gradients = {}
            for what in ADD_UP:
                self.recipe.pop(what.name, None)
            raise
        finally:
            self.gathered = {}

    def _move(self, new: FlatTensors, params: Mapping[str, nn.Parameter], kept: Collection[str]) -> None:
        """Store parameters, and have those of them that are not ``kept`` be rank 0's."""
        old = None if self.layout is None else self.stored_params(num_cached=2)
        for bucket in new.layout.buckets:
            new.allocate(bucket)
            for segment in bucket.segments:
                param = params.get(segment.name)
                if param is None:
                    continue
                if param.is_meta and segment.name not in kept:  # its value is loaded next
                    if not new.is_away(segment.name):
                        place(param, new.read(segment.name))
                    continue
                if old is not None and segment.name in kept and old.is_away(segment.name):
                    value = old.read(segment.name)
                else:
                    value = param.detach()
                    if segment.name not in kept:
                        value = value.contiguous()  # an expanded one has elements in common: no receiving it
                        broadcast(value, self.group)
                new.write(segment.name, value)
                place(param, without_memory(param) if new.is_away(segment.name) else new.read(segment.name))

    def _share_buffers(self, layout: Layout) -> None:
        """Make rank 0's buffers those of all ranks; those on meta, whose values are loaded next, have memory then."""
        for buffer in self.model.buffers():
            if buffer.is_meta:
                place(buffer, torch.empty(buffer.shape, dtype=buffer.dtype, device=layout.buckets[0].device))
                continue
            if not buffer.is_contiguous():
                buffer.data = buffer.data.contiguous()  # an expanded one has elements in common: no receiving it
            broadcast(buffer, self.group)

    def _take_in(self, names: list[str]) -> None:
        """Store the values of parameters that have got other memory, and give them their place back."""
        stored = self.stored_params()
        values = []
        for name in names:  # all of them before any is written: one may lie in the place of another
            values.append(self._placed[name].detach().clone(memory_format=torch.contiguous_format))
            broadcast(values[-1], self.group)
        for name, value in zip(names, values, strict=True):
            param = self._placed[name]
            stored.write(name, value)
            place(param, without_memory(param) if stored.is_away(name) else stored.read(name))
        stored.flush()

    def buffer(self, name: str) -> torch.Tensor:
        """The module's buffer as it is now."""
        return self.model.get_buffer(name)

    def full_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's full value, in memory of its own, gathered bucket by bucket."""
        return self.stored_params().copies()

    def optimizer_state(self, key: str) -> dict[int, Value]:
        """Full values of one kind of optimizer state, by the ``id`` of the parameter; a collective if it is divided."""
        return self._optimizer_state.full(key)

    def state_forms(self) -> Forms:
        """The optimizer state that exists, by parameter name and key. Involves no other rank.

        Parameters may share a bucket only if their forms are equal: one that was frozen until now, for one, has no
        step count where its neighbour has.
        """
        return self._optimizer_state.forms(dict(self.model.named_parameters()))

    def stored_forms(self) -> Forms:
        """The optimizer state in the buckets, by bucket name and key: ``state_forms`` if the optimizer holds none."""
        return self._optimizer_state.stored_forms()

    def state_dict(self, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the module's own ``state_dict`` method, ``original``, gives when parameters are whole.

        Parameters that are divided, or on a lower tier, are fresh full tensors (with ``keep_vars`` too). Others, and
        buffers, are references to live memory, as in plain PyTorch.

        Raises:
            RankError: parameters are divided, and another rank has called something else.
            StateError: values were loaded for what is on meta, and no step has been made that has them.
        """
        self.check_whole()
        self.check_loaded("state_dict()")
        self._optimizer_state.take_back()
        if self.layout is None or not any(map(self.stored_params().is_away, self._placed)):
            return original(*args, **kwargs)
        if self.divided:
            self.agreement.check("model.state_dict()")
        with torch.no_grad(), self.agreement.no_return(), self._whole():
            result = original(*args, **kwargs)
            result.update({key: value.detach() for key, value in result.items() if isinstance(value, nn.Parameter)})
        return result

    def unread(self, original: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What the model's ``state_dict`` and the optimizer's give, with what is to be read in the place of tensors.

        Args:
            original: the module's own ``state_dict``.

        Raises:
            StateError: the model, or a hook, computes what is saved, and parameters have no memory meanwhile; or the
                optimizer's ``state_dict`` has failed.
        """
        self.check_whole()
        self._optimizer_state.take_back()
        assert self.layout is not None
        params, order = self.stored_params(), self.layout.order
        unread = {
            id(param): Unread(tuple(param.shape), param.dtype, partial(params.read, name), order[name])
            for name, param in self._placed.items()
            if params.is_away(name)
        }
        if unread and (computing := _computing(self.model)):
            raise StateError(
                f"{computing} decides what is saved, and would see parameters without memory",
                fix="save model.state_dict() and optimizer.state_dict() with torch.save",
            )
        found = original(keep_vars=True)
        for key, value in found.items():
            if id(value) in unread:
                found[key] = unread[id(value)]
        return {"model": found, "optimizer": self._optimizer_state.unread()}

    def load_state_dict(
        self,
        original: Callable[..., Any],
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
    ) -> Any:
        """Run the module's own ``load_state_dict`` method, ``original``; each rank stores its part.

        Nothing is written unless all of torch's checks pass, so hooks that run after loading see the values from
        before. Involves no other rank. Values for what is still on meta are checked now, and written when the first
        step has initialised the model; all ranks give them then.

        Raises:
            StateError: ``assign=True``; or a value for what is on meta, without an optimizer, or on meta itself.
            RuntimeError: torch's own, listing missing and unexpected keys and mismatched shapes.
        """
        self._optimizer_state.take_back()
        if self.layout is None:
            named = (
                *self.model.named_parameters(remove_duplicate=False),
                *self.model.named_buffers(remove_duplicate=False),
            )
            waiting = [name for name, tensor in named if tensor.is_meta and name in state_dict]
            if not waiting or (assign and self.optimizer is None):
                return original(state_dict, strict=strict, assign=assign)
            if self.optimizer is None:
                raise StateError(
                    f"{waiting[0]} is on meta, where there is no memory to load a value into",
                    fix="give assign=True, or build the model on a real device",
                )
            if assign:
                raise StateError(
                    f"load_state_dict(assign=True) would replace {waiting[0]}, which the optimizer holds",
                    fix="leave assign out: the values are loaded when the first step has initialised the model",
                )
            for name in waiting:
                if isinstance(value := state_dict[name], torch.Tensor) and value.is_meta:
                    raise StateError(f"the value of {name} is on meta, so there is none", fix="load real tensors")
            result, copies = copies_of(self.model, original, state_dict, strict)
            with torch.no_grad():
                for target, value in copies:
                    if not target.is_meta:
                        target.copy_(value)
            targets = tuple(target for target, _ in copies if target.is_meta)
            self._to_load.append(Waiting(original, copy.copy(state_dict), strict, targets))
            return result
        if assign:
            raise StateError(
                "load_state_dict(assign=True) would replace the model's parameters, which are stored in buckets",
                fix="leave assign out: values are copied to where each rank stores them",
            )
        return self._load(original, state_dict, strict)

    def _load(
        self,
        original: Callable[..., Any],
        state_dict: Mapping[str, Any],
        strict: bool,
        only: Collection[int] | None = None,
    ) -> Any:
        """Store this rank's part of what the module's own method loads; of these tensors alone, by ``id``, if said."""
        stored = self.stored_params()
        names = {id(param): name for name, param in self._placed.items() if stored.is_away(name)}
        result, copies = copies_of(self.model, original, state_dict, strict)
        with torch.no_grad():
            for target, value in copies:
                if only is not None and id(target) not in only:
                    continue
                if id(target) in names:
                    stored.write(names[id(target)], value)
                else:
                    target.copy_(value)
            stored.flush()
        return result

    def stored_params(self, num_cached: int = 1) -> FlatTensors:
        """The parameters as they are stored; see ``FlatTensors`` for ``num_cached``."""
        assert self.layout is not None, "nothing is stored before commit"
        return self._params_in(self.layout, self.params, num_cached)

    def _params_in(self, layout: Layout, tensors: dict[str, Any], num_cached: int) -> FlatTensors:
        return FlatTensors(
            layout,
            sharded=layout.shard_params,
            group=self.shard_group,
            tensors=tensors,
            num_cached=num_cached,
            away=layout.on_tiers("parameters"),
            tiers=self.tiers,
        )

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Parameters that are divided, or on a lower tier, have their full values for a while."""
        stored = self.stored_params()
        away = {name: param for name, param in self._placed.items() if stored.is_away(name)}
        try:
            for name, value in stored.copies():
                if name in away:
                    place(away[name], value)
            yield
        finally:
            for param in away.values():
                place(param, without_memory(param))


def _computing(model: nn.Module) -> str:
    """What else than torch's own ``state_dict`` has a part in the model's, in words."""
    for path, module in model.named_modules():
        own = "_save_to_state_dict" if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict else ""
        if path and type(module).state_dict is not nn.Module.state_dict:
            own = "state_dict"
        if module._state_dict_hooks or module._state_dict_pre_hooks:
            own = "a hook"
        if own:
            return f"{own} of {path or 'the model'}"
    return ""


def _memory(param: torch.Tensor) -> tuple[int, bool] | None:
    """Where the elements are; None for those that are nowhere."""
    return None if param.is_meta else (param.data_ptr(), param.is_contiguous())
