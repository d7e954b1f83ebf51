"""Initialise a model built on the meta device, module by module, with the modules' own ``reset_parameters``.

The same calls in the same order on the whole model, from the same seed, give the same values and leave the random
generator in the same state. Where parameters are divided over ranks, each module's are whole only while it is being
initialised; tied parameters, and those of a child that its parent writes to, until their last module is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from zgraph.agreement import Agreement
from zgraph.eager import OnTouch
from zgraph.errors import StateError, ZgraphError
from zgraph.flat import FlatTensors, broadcast, place, without_memory
from zgraph.generators import random_state, set_random_state
from zgraph.tracing import source_of_error

_UNWRITTEN = 0xFE
"""Every byte of fresh memory: what still holds it everywhere after ``reset_parameters`` was not initialised. As a
float it is huge (or NaN), so that a part which was forgotten shows."""


@dataclass(frozen=True)
class MetaModule:
    """A module with parameters or buffers of its own on meta, by their local names."""

    path: str
    module: nn.Module
    params: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__})"

    def reset(self) -> None:
        """Call the module's ``reset_parameters`` (nn.MultiheadAttention spells it with an underscore).

        Raises:
            StateError: it raised something.
        """
        method = getattr(self.module, "reset_parameters", None) or getattr(self.module, "_reset_parameters", None)
        assert callable(method)
        try:
            method()
        except ZgraphError:
            raise
        except Exception as error:
            raise StateError(
                f"reset_parameters() of {self} raised {type(error).__name__}: {error}",
                where=source_of_error(error),
                fix="it must run again on a module that is built already, or build the model on a real device",
            ) from error


def find_meta_modules(
    model: nn.Module, *, except_for: Iterable[nn.Parameter] = (), loaded: Iterable[torch.Tensor] = ()
) -> list[MetaModule]:
    """Modules that need initialising, in the order of ``model.modules()``.

    Args:
        model: the model.
        except_for: parameters that are on meta because their values are stored elsewhere.
        loaded: parameters and buffers that are given values next: a module that has no others needs none before.

    Raises:
        StateError: some of them have no ``reset_parameters``.
    """
    known, waiting = {id(p) for p in except_for}, {id(tensor) for tensor in loaded}
    found, helpless = [], list[str]()
    for path, module in model.named_modules():
        params = {
            name: p for name, p in module._parameters.items() if p is not None and p.is_meta and id(p) not in known
        }
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        if not waiting.issuperset(map(id, (*params.values(), *buffers.values()))):
            found.append(MetaModule(path, module, params, buffers))
            if not any(callable(getattr(module, name, None)) for name in ("reset_parameters", "_reset_parameters")):
                missing = [name for name, each in (*params.items(), *buffers.items()) if id(each) not in waiting]
                unsaved = module._non_persistent_buffers_set
                told = (f"{name} (which no state_dict has)" if name in unsaved else name for name in missing)
                helpless.append(f"{found[-1]}: {', '.join(told)}")
    if helpless:
        listed = "; ".join(helpless[:5])
        more = f"; and {len(helpless) - 5} more" if len(helpless) > 5 else ""
        raise StateError(
            f"modules that have tensors on meta have no reset_parameters() to initialise them: {listed}{more}",
            fix="give each a reset_parameters() that fills all its parameters and buffers, or load all their values "
            "before the first step, or build the model on a real device",
        )
    return found


def initialise(
    modules: list[MetaModule],
    names: dict[int, str],
    params: FlatTensors,
    agreement: Agreement,
    group: dist.ProcessGroup | None,
) -> None:
    """Initialise parameters and buffers, storing this rank's part in ``params``.

    Parameters that are divided, or on a disk, are on meta again afterwards; others have become views of their bucket.

    Args:
        modules: from ``find_meta_modules``.
        names: canonical parameter names by ``id``.
        params: where the values go.
        agreement: of the ranks, all of which go on or raise.
        group: all ranks, also where some of them divide the parameters and the others have copies.

    Raises:
        StateError: a ``reset_parameters`` raised, left a tensor unwritten, or replaced a parameter.
        RankError: another rank raised that. Whatever is raised, the modules' tensors and the random generators are as
            before.
    """
    if not modules:
        return
    devices = {bucket.device for bucket in params.layout.buckets}
    tensors = _TensorsOnTouch(modules, names, params, agreement)
    with _generators_of_rank_0(devices, group):
        try:
            with agreement.together():
                for module in modules:
                    for tensor in (*module.params.values(), *module.buffers.values()):
                        tensors.touch(tensor)
                    with tensors:
                        module.reset()
                    tensors.check(module)
                    tensors.release(module)
        except BaseException:
            tensors.undo()
            raise


class _TensorsOnTouch(OnTouch):
    """While active, a tensor of the model gets its memory when a function is first given it.

    A module's own tensors are touched before it is reset; this is for those of others that it writes to.
    """

    def __init__(
        self, modules: list[MetaModule], names: dict[int, str], params: FlatTensors, agreement: Agreement
    ) -> None:
        super().__init__()
        self._modules, self._names, self._params, self._agreement = modules, names, params, agreement
        self._buffer_device = params.layout.buckets[0].device if params.layout.buckets else torch.device("cpu")
        self._waiting = {id(t): t for m in modules for t in (*m.params.values(), *m.buffers.values())}
        self._uses = Counter(id(p) for m in modules for p in m.params.values())
        self._whole: dict[int, torch.Tensor] = {}
        self._stored: set[int] = set()

    def touch(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta and self._waiting.get(id(tensor)) is tensor:
            self._materialise(tensor)
        return tensor

    def check(self, module: MetaModule) -> None:
        """Every tensor of the module must have been written, and its parameters be the same objects."""
        for name, param in module.params.items():
            if module.module._parameters.get(name) is not param:
                raise StateError(
                    f"reset_parameters() of {module} replaces parameter {name!r}, which the optimizer may hold",
                    fix="write to the existing parameter in place, e.g. with torch.nn.init",
                )
        unwritten = [name for name, p in module.params.items() if _is_unwritten(p)]
        for name in module.buffers:
            buffer = module.module._buffers.get(name)
            if buffer is not None and _is_unwritten(buffer):
                unwritten.append(name)
        if unwritten:
            raise StateError(
                f"reset_parameters() of {module} does not fill {', '.join(unwritten)}",
                fix="write every parameter and buffer of the module there, or build the model on a real device",
            )

    def release(self, module: MetaModule) -> None:
        """Store what no later module will initialise again."""
        self._uses.subtract(id(p) for p in module.params.values())
        for key, tensor in list(self._whole.items()):
            if self._uses[key] == 0:
                del self._whole[key]
                self._params.write(self._names[key], tensor)
                place(tensor, without_memory(tensor))
                self._stored.add(key)

    def undo(self) -> None:
        """Put every tensor back on meta."""
        for module in self._modules:
            module.module._buffers.update(module.buffers)
            module.module._parameters.update(module.params)
        for tensor in self._waiting.values():
            if not tensor.is_meta:
                place(tensor, without_memory(tensor))

    def _materialise(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        name = self._names.get(key)
        if name is None:
            place(tensor, _fresh(tensor, self._buffer_device))
            return
        bucket, _ = self._params.layout.find(name)
        self._params.allocate(bucket)
        if not self._params.is_away(name):
            view = self._params.read(name)
            _fill(view)
            place(tensor, view)
            return
        if key in self._stored:  # initialised before; a later module changes it all the same
            self._agreement.share_outcome(b"", None)
            place(tensor, self._params.read(name).clone())
        else:
            place(tensor, _fresh(tensor, bucket.device))
        self._whole[key] = tensor


def _fresh(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    _fill(fresh)
    return fresh


def _fill(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8).fill_(_UNWRITTEN)


def _is_unwritten(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:
        return True
    content = tensor.detach().reshape(-1).view(torch.uint8)
    head = content[: tensor.element_size()]
    return tensor.numel() > 0 and bool((head == _UNWRITTEN).all()) and bool((content == _UNWRITTEN).all())


@contextmanager
def _generators_of_rank_0(devices: set[torch.device], group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run with the random state of rank 0 on every rank.

    Afterwards a rank whose state was rank 0's has advanced, as it would have in eager code; one whose state was its
    own has that back. After an error every rank has its own.
    """
    places = [torch.device("cpu"), *(device for device in devices if device.type == "cuda")]
    own = {place: random_state(place) for place in places}
    differs = set()
    for place_, state in own.items():
        shared = state.clone()
        broadcast(shared, group)
        if not torch.equal(shared, state):
            differs.add(place_)
            set_random_state(place_, shared)
    try:
        yield
    except BaseException:
        differs = set(places)
        raise
    finally:
        for place_ in differs:
            set_random_state(place_, own[place_])
