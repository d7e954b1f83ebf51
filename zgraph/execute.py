"""Run an emitted step: fetch its inputs, call it, and store the new state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from zgraph import ops
from zgraph.agreement import CheckedComm
from zgraph.arena import Arena
from zgraph.codegen.emit import Step
from zgraph.comm import Comm
from zgraph.heap import release_free_memory
from zgraph.layout import Bucket
from zgraph.packed import pack, unpacked_numel
from zgraph.program import Input, Program, Role, StateInit
from zgraph.skipping import NUM_SKIPPED
from zgraph.spilled import SpillRooms
from zgraph.state import TrainingState
from zgraph.tiers import Stored


class Executable:
    """A lowered program bound to the state it updates and the ranks it runs on."""

    def __init__(
        self, program: Program, step: Step, state: TrainingState, comm: Comm, arena: Arena, spill_rooms: SpillRooms
    ) -> None:
        self.program, self.step = program, step
        self._state, self._comm, self._arena, self._spill_rooms = state, comm, arena, spill_rooms
        self._divided: Comm = comm.axes.get(program.mesh.shard_axis, comm)  # among the ranks that divide state
        self._values = {what: node.meta["val"] for node, what in program.placeholders()}

    def run(self, batch: Sequence[torch.Tensor], hypers: dict[str, float]) -> torch.Tensor:
        """One training step.

        Args:
            batch: the tensors of the batch, in flattening order.
            hypers: float hyperparameters by path.

        Returns:
            The loss, averaged over the ranks: a 0-dim tensor.
        """
        with torch.no_grad():
            inputs = [self._fetch(what, batch, hypers) for what in self._values]
            arena = (self._arena.tensors(self.step),) if self.step.places else ()
            room = (self._spill_rooms.tensors(self.step),) if self.step.spilled else ()
            # In grad mode, as in eager: nn.LSTM's operator keeps what its backward needs only there. No input requires
            # a gradient, so autograd records nothing.
            try:
                with torch.enable_grad():
                    loss, *new = self.step.function(inputs, self._comm, *arena, *room)
            finally:
                for tier in self._state.tiers.values():
                    tier.finish()  # a step that failed must not have its memory written to by and by
            results = dict(zip(self.program.outputs[1:], new, strict=True))
            count = self._state.recipe.get(NUM_SKIPPED.name)
            for what, value in without_unmade(self._values, count, results).items():
                assert what is not None
                self._store(what, value)
        assert isinstance(loss, torch.Tensor)
        return loss

    def state(self) -> dict[str, Any]:
        """What a step reads besides its batch and hyperparameters, by name, in memory of its own."""
        found = {}
        for what in self._values:
            if what.role not in (Role.BATCH, Role.HYPER):
                value = self._fetch(what, (), {})
                found[str(what)] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return found

    def _fetch(self, what: Input, batch: Sequence[torch.Tensor], hypers: dict[str, float]) -> Any:
        if what.role is Role.PARAM:
            return self._state.params[what.name]
        if what.role is Role.GATHERED:
            if what not in self._state.gathered:
                part = self._stored_param(what.name).to(self._values[what].dtype)
                gather: Callable[..., Any] = self._divided.all_gather
                tags = {"tag": str(what)} if isinstance(self._comm, CheckedComm) else {}
                self._state.gathered[what] = self._divided.wait(gather(part, **tags))
            return self._state.gathered[what]
        if what.role is Role.OPT_STATE:
            entries = self._state.opt.get(what.name, {})
            if what.key not in entries:
                start, val = self.program.init[what], self._values[what]
                param = self._stored_param(what.name) if start.fill is None else None
                assert self.program.layout is not None
                bucket = self.program.layout.by_name[what.name]
                shard = self._divided.shard
                stored = self._state.keep(what.name, what.key, initial_state(start, val, param, shard, bucket))
                if isinstance(stored, Stored):
                    release_free_memory()  # small blocks would come to lie there, and leave no room for the next one
                return stored
            return entries[what.key]
        if what.role is Role.BUFFER:
            return self._state.buffer(what.name).detach()
        if what.role is Role.BATCH:
            return batch[int(what.name)].detach()
        if what.role is Role.HYPER:
            return hypers[what.name]
        if what.role is Role.RECIPE:
            if what.name not in self._state.recipe:
                self._state.recipe[what.name] = initial_value(self.program, what, self._values[what])
            return self._state.recipe[what.name]
        if what.role is Role.GRADIENT:
            if what.name not in self._state.gradients:
                return self._state.keep_gradient(what.name, initial_value(self.program, what, self._values[what]))
            return self._state.gradients[what.name]
        return self.program.constants[what.name]

    def _stored_param(self, bucket: str) -> torch.Tensor:
        """What this rank stores of a bucket's parameters, in memory."""
        stored = self._state.params[bucket]
        return stored.read() if isinstance(stored, Stored) else stored

    def _store(self, what: Input, value: Any) -> None:
        if what.role is Role.OPT_STATE:
            old = self._state.opt.get(what.name, {}).get(what.key)
            if isinstance(old, torch.Tensor) and old.dim() == 1:
                _copy(old, value)
            elif value is not old:  # the step has not stored it on a lower tier
                self._state.keep(what.name, what.key, value)
        elif what.role is Role.PARAM:
            param = self._state.params[what.name]
            if isinstance(param, torch.Tensor):  # or the step has stored it on a lower tier
                _copy(param, value)
        elif what.role is Role.BUFFER:
            _copy(self._state.buffer(what.name), value)
        elif what.role is Role.RECIPE:
            self._state.recipe[what.name] = value
        elif what.role is Role.GRADIENT:
            total = self._state.gradients[what.name]
            if isinstance(total, torch.Tensor):  # or the step has stored it on a lower tier
                _copy(total, value)
        else:
            _copy(self.program.constants[what.name], value)


def initial_state(
    start: StateInit,
    val: Any,
    param: torch.Tensor | None,
    shard: Callable[[torch.Tensor], torch.Tensor],
    bucket: Bucket,
) -> torch.Tensor | int | float:
    """Optimizer state of a bucket that does not exist yet, as one rank stores it.

    Args:
        start: what it starts from.
        val: the value of the program's input for it: shape, dtype and device.
        param: what the rank stores of the bucket's parameters; not needed where state starts from a number.
        shard: gives the rank's part of a whole bucket.
        bucket: where parameters lie in it; where state is packed, there are zeros between them.
    """
    if start.dtype is None:
        assert start.fill is not None
        return start.fill
    is_packed = val.dtype is torch.uint8 and start.dtype is torch.float32
    shape = (unpacked_numel(len(val)),) if is_packed else val.shape
    if start.fill is None:
        assert param is not None
        state = (param if param.shape == shape else shard(param)).to(start.dtype, copy=True)
    else:
        state = torch.full(shape, start.fill, dtype=start.dtype, device=val.device)
    if not is_packed:
        return state
    inside = ops.elements(*bucket.ranges(), bucket.numel, device=state.device)
    return pack(torch.where(inside if len(inside) == len(state) else shard(inside), state, 0.0))


def without_unmade(
    given: Collection[Input | None], num_skipped: Any, results: dict[Input | None, Any]
) -> dict[Input | None, Any]:
    """The results but for state that the step would have created, had it not been skipped: a later one creates it.

    Args:
        given: the step's inputs.
        num_skipped: before the step.
    """
    made = {what for what in results if what is not None and what.role is Role.OPT_STATE and what not in given}
    if not made or NUM_SKIPPED not in results or int(results[NUM_SKIPPED]) == int(num_skipped):
        return results
    return {what: value for what, value in results.items() if what not in made}


def initial_value(program: Program, what: Input, val: Any) -> torch.Tensor:
    """What a RECIPE or GRADIENT input starts from, whose shape, dtype and device ``val`` has: zeros if not said."""
    value = torch.zeros(val.shape, dtype=val.dtype, device=val.device)
    start = program.init.get(what)
    return value if start is None or start.fill is None else value.fill_(start.fill)


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    """Store a result, unless the step has written it there already."""
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)
