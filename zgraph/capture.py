"""Capture a whole training step, forward, backward and optimizer update, as one CAPTURED ``Program``.

The user's model runs once on fake tensors, so no memory is used, ``meta`` models work, and no process group is needed.
Forward and backward are one trace, the optimizer's own ``step()`` is another; both are made functional and joined.
The user's model, optimizer and random state are as before, whatever happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from textwrap import shorten
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from zgraph import ops
from zgraph.attributes import ModuleAttributes, is_plain, is_same
from zgraph.averages import check_no_clash, without_averages
from zgraph.collector import collector_paused
from zgraph.config import Config
from zgraph.errors import CaptureError, OptimizerError, ZgraphError, first_line, quoted
from zgraph.functional import make_functional, own_memory_by_place
from zgraph.gradients import Gradients
from zgraph.metrics import Metric, evaluate
from zgraph.operands import check_operands
from zgraph.precision import low_precision
from zgraph.program import Input, Mesh, Origin, Phase, Program, Role, Stage, copy_node, describe, without_log
from zgraph.recipe import complete
from zgraph.scaling import LOSS_SCALE
from zgraph.tracing import Recorder, fake_mode, python_generators_kept, source_of_error, trace, user_source
from zgraph.update import StateSpec, Update, check_step, trace_update

aten = torch.ops.aten

log = logging.getLogger("zgraph")

LossFunction = Callable[..., torch.Tensor]
WeightFunction = Callable[..., torch.Tensor | float]


@collector_paused()
def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    loss: LossFunction | None = None,
    weight: WeightFunction | None = None,
    metrics: Mapping[str, Metric] | None = None,
    state: StateSpec | None = None,
    device: torch.device | None = None,
    config: Config | None = None,
) -> Program:
    """Capture one training step of ``model`` on a batch, the last micro-batch if it has several.

    Args:
        model: parameters may be on ``meta``; they are taken to live on ``device``.
        optimizer: holds (some of) the model's parameters.
        args, kwargs: the batch, passed to the model.
        loss: ``loss(output, *args, **kwargs)``; by default the output itself or its ``.loss``.
        weight: ``weight(*args, **kwargs)``: by how much this micro-batch counts; all alike by default.
        metrics: what to return besides the loss.
        state: optimizer state that exists already.
        device: where ``meta`` parameters will live; the batch's device by default.
        config: precision, and how gradients add up and are clipped; the rest of it is for the passes.

    Raises:
        CaptureError: control flow or shapes depend on tensor values, the loss is not a scalar, ...
        OptimizerError: see ``trace_update``.
    """
    config = config or Config()
    params = dict(model.named_parameters())
    device = device or batch_device((args, kwargs))
    check_optimizer(model, optimizer)
    mode = fake_mode(scalars=False)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensor_at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    buffers = dict(model.named_buffers())
    for name, tensor in [*params.items(), *buffers.items()]:
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise CaptureError(f"{name} is a {type(tensor).__name__}; only plain tensors can be captured")
        _check_dense(name, tensor)
    for i in tensor_at:
        _check_dense("a tensor of the batch", leaves[i])
    _check_memory({**params, **buffers})
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in params.items():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise CaptureError(
                f"{name} has a gradient hook, which a compiled step would not call",
                fix="remove the hook, or put what it does into the model or the optimizer",
            )
    wanted = [name for name, p in params.items() if p.requires_grad and id(p) in held]
    for name in wanted:
        if config.scales_loss and params[name].dtype is torch.float16:
            raise CaptureError(
                f"{name} is float16, and so would its gradient be, which cannot be unscaled",
                fix="leave parameters in float32: precision='fp16' casts what is read of them",
            )
    if not wanted:
        raise CaptureError(
            "there is nothing to train: the optimizer holds no parameter that requires a gradient",
            fix="pass model.parameters() to the optimizer and leave requires_grad=True on what should train",
        )
    with mode:
        # Parameters will be views of flat buffers, hence contiguous whatever they are now.
        fake_params = {
            name: torch.empty(p.shape, dtype=p.dtype, device=device if p.is_meta else p.device)
            for name, p in params.items()
        }
        fake_buffers = {name: _blank(b, device) for name, b in buffers.items()}
        fake_batch = [_blank(leaves[i], device) for i in tensor_at]
        fake_scale = [torch.empty((), device=device)] if config.scales_loss else []
    recorder = Recorder(Phase.FORWARD, {id(m): name for name, m in model.named_modules()})
    found: dict[str, Any] = {}

    def arguments(batch: list[torch.Tensor]) -> Any:
        whole = list(leaves)
        for i, tensor in zip(tensor_at, batch, strict=True):
            whole[i] = tensor
        return pytree.tree_unflatten(whole, spec)

    def run(
        params_in: dict[str, torch.Tensor],
        buffers_in: dict[str, torch.Tensor],
        batch: list[torch.Tensor],
        scales: list[torch.Tensor],
    ) -> Any:
        inner_args, inner_kwargs = arguments(batch)
        leaf = {name: t.detach().requires_grad_(params[name].requires_grad) for name, t in params_in.items()}
        swapped = {**leaf, **buffers_in}
        with low_precision(model, config, device):
            output = torch.func.functional_call(model, swapped, inner_args, inner_kwargs)
            value = _loss_of(output, loss, inner_args, inner_kwargs, where=quoted(recorder.last_source))
            vectors = evaluate(metrics or {}, output, inner_args, inner_kwargs, value)
        by = [] if weight is None else [_weight_of(weight, inner_args, inner_kwargs, value)]
        scaled = value
        for scale in scales:
            scaled = scaled * scale.to(scaled.device, scaled.dtype)
        recorder.enter_backward(scaled)
        grads: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            scaled, [leaf[name] for name in wanted], allow_unused=True
        )
        found["grads"] = [name for name, g in zip(wanted, grads, strict=True) if g is not None]
        for name, g in zip(wanted, grads, strict=True):
            if g is not None and g.layout is not torch.strided:
                raise CaptureError(
                    f"the gradient of {name} is {g.layout}, not a dense tensor",
                    fix="use dense gradients, e.g. nn.Embedding(..., sparse=False)",
                )
        for counts in by:
            grads = tuple(g if g is None else _weighted(g, counts) for g in grads)
            value = _weighted(value.detach().to(counts.dtype), counts)
            vectors = [(kind, _weighted(v, counts) if kind.is_mean else v) for kind, v in vectors]
        replaced = {name: swapped[name] for name in buffers_in if swapped[name] is not buffers_in[name]}
        found["replaced"] = list(replaced)
        found["metrics"] = [kind for kind, _ in vectors]
        told = [*by, *(vector for _, vector in vectors)]
        return [value.detach().reshape(()), *[g for g in grads if g is not None], *replaced.values(), *told]

    def call_again() -> None:
        with mode, torch.no_grad():
            torch.func.functional_call(model, {**fake_params, **fake_buffers}, *arguments(fake_batch))

    with (
        _untouched(model) as attributes,
        python_generators_kept() as drawn,
        without_log(),
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
    ):
        try:
            seeds_refused = mock.patch.object(torch, "manual_seed", _refuse_seed)
            with seeds_refused, _checkpoints_refused(), _recurrent_layers_by_steps(model):
                graph, constants = trace(run, (fake_params, fake_buffers, fake_batch, fake_scale), mode, recorder)
            _check_attributes(attributes, call_again)
        except ZgraphError:
            raise
        except Exception as error:
            raise _explain(error, config.accumulate) from error
    if drawn:
        raise CaptureError(
            f"forward draws numbers from {' and '.join(drawn)}, which would be the same in every step",
            fix="draw with torch, e.g. torch.rand(()), or pass what is drawn as a tensor of the batch",
        )
    inputs = [Input(Role.PARAM, name) for name in params]
    inputs += [Input(Role.BUFFER, name) for name in buffers]
    inputs += [Input(Role.BATCH, str(i)) for i in range(len(tensor_at))]
    inputs += [LOSS_SCALE for _ in fake_scale]
    for node, what in zip(graph.find_nodes(op="placeholder"), inputs, strict=False):
        node.meta["input"] = what
    _check_constants(graph, constants, params)
    check_operands(graph)
    graph, mutated = make_functional(graph, mode)
    own_memory_by_place(graph, mode)
    written = {node.meta["input"]: value for node, value in mutated.items()}
    for node in graph.nodes:
        if ops.draws(node) and node.meta["origin"].phase is Phase.BACKWARD:
            raise CaptureError(
                f"{node.target} draws random numbers in the backward pass, which only forward may do",
                where=quoted(node.meta["origin"].source),
                fix="draw in forward, and keep for backward what was drawn",
            )
    for what, new in written.items():
        if what.role in (Role.PARAM, Role.BATCH):
            raise CaptureError(
                f"forward writes to {what} in place",
                where=quoted(new.meta["origin"].source) if "origin" in new.meta else None,
                fix="only buffers may be changed by forward; clone a parameter or an input before writing to it",
            )
    if not found["grads"]:
        raise CaptureError(
            "there is nothing to train: the loss depends on no parameter that the optimizer holds",
            fix="check that the loss is computed from the model's output, without detach() on the way",
        )
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    num_grads = len(found["grads"])
    grads = dict(zip(found["grads"], results[1 : 1 + num_grads], strict=True))
    told = results[1 + num_grads + len(found["replaced"]) :]
    for name, value in zip(found["replaced"], results[1 + num_grads :], strict=False):
        written[Input(Role.BUFFER, name)] = value
        before, after = buffers[name], value.meta["val"]
        if before.shape != after.shape or before.dtype != after.dtype:
            raise CaptureError(
                f"forward replaces buffer {name}, {describe(before)}, by {describe(after)}",
                fix="keep the shape and dtype of buffers, e.g. self.x = new.to(self.x.dtype)",
            )
    update = trace_update(optimizer, params, found["grads"], without_averages(state or {}), device)
    if config.ema is not None:
        check_no_clash(key for entries in update.state.values() for key in entries)
    left = _left_alone(update)
    if len(left) == len(grads):
        raise CaptureError(
            f"there is nothing to train: {type(optimizer).__name__}.step() changes no parameter",
            fix="check which parameters it skips",
        )
    if left and (config.clip_norm is not None or config.scales_loss):
        raise OptimizerError(
            f"{type(optimizer).__name__}.step() leaves {min(left)} alone, whose gradient would be in no norm",
            fix="let it not require a gradient, or leave it out of the optimizer",
        )
    update.results = {what: result for what, result in update.results.items() if what.name not in left}
    asked = [results[0], *grads.values(), *told]
    program, (_, *in_program) = _join(graph, asked, grads, written, constants, update, mode, state or {})
    read = {name: node for name, node in zip(grads, in_program, strict=False) if name not in left}
    gradients = Gradients(program, read)
    told = in_program[len(grads) :]
    by = told.pop(0) if weight is not None else None
    complete(gradients, config, by, dict(zip(found["metrics"], told, strict=True)))
    return program


def _left_alone(update: Update) -> set[str]:
    """Parameters that have a gradient, but that the optimizer neither changes nor keeps state for."""
    changed = {
        what.name
        for what, result in update.results.items()
        if not isinstance(result, fx.Node) or result.meta.get("input") != what
    }
    return update.gradients.keys() - changed


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that holds parameters which are not the model's, or whose ``step()`` is not all it does.

    Raises:
        OptimizerError: with the group and shape of the first such parameter; or see ``check_step``.
    """
    check_step(optimizer)
    names = {id(p) for p in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise OptimizerError(
                    f"group {index} of the optimizer holds a parameter of shape {tuple(p.shape)} "
                    "that is not one of the model's",
                    fix="build the optimizer from model.parameters() of this model, after the model is complete",
                )


def _check_constants(graph: fx.Graph, constants: dict[str, torch.Tensor], params: dict[str, nn.Parameter]) -> None:
    """Refuse parameters that forward has read other than as attributes: they would be frozen without a word."""
    memory = {p.untyped_storage()._cdata: name for name, p in params.items()}
    for node in graph.find_nodes(op="placeholder"):
        what: Input | None = node.meta.get("input")
        if what is not None and what.role is Role.CONSTANT:
            name = memory.get(constants[what.name].untyped_storage()._cdata)
            if name is not None:
                user = next(iter(node.users))
                raise CaptureError(
                    f"forward reads {name} through a reference that is kept somewhere else than in its module",
                    where=quoted(user.meta["origin"].source) if "origin" in user.meta else None,
                    fix="read it as an attribute of the module, or keep such parameters in an nn.ParameterList",
                )


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise CaptureError(
            f"{name} is {tensor.layout}, not a dense tensor",
            fix="use tensor.to_dense(), or pass indices and values as tensors of their own",
        )


def _check_memory(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse distinct parameters and buffers with elements in common: writing to one would no longer change the other.

    Only real memory counts. Every parameter gets memory of its own, so views of one tensor that lie side by side may be
    parameters; tensors that are on meta have nothing to share.
    """
    real = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel()}
    near: list[str] = []  # those that reach beyond the start of this one
    for name, tensor in sorted(real.items(), key=lambda item: (str(item[1].device), item[1].data_ptr())):
        near = [o for o in near if real[o].device == tensor.device and _end(real[o]) > tensor.data_ptr()]
        for other in near:
            if real[other] is not tensor and _have_elements_in_common(real[other], tensor):
                raise CaptureError(
                    f"{other} and {name} share memory, but are not one tensor",
                    fix="make them the same object, which is trained once, or clone() one of them",
                )
        near.append(name)


def _end(tensor: torch.Tensor) -> int:
    """The address behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.itemsize


def _have_elements_in_common(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether some memory belongs to both; ``second`` does not start before ``first``."""
    offset, between = divmod(second.data_ptr() - first.data_ptr(), first.itemsize)
    if between or first.itemsize != second.itemsize:
        return True
    used = torch.zeros((max(_end(first), _end(second)) - first.data_ptr()) // first.itemsize, dtype=torch.bool)
    used.as_strided(first.shape, first.stride()).fill_(True)
    return bool(used.as_strided(second.shape, second.stride(), offset).any())


def _blank(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake tensor like ``tensor``; to be called inside the fake mode."""
    place = device if tensor.is_meta else tensor.device
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)


def batch_device(batch: Any) -> torch.device:
    """Where the first tensor of a batch is."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            return leaf.device
    return torch.device("cpu")


def _refuse_seed(seed: int) -> None:
    raise CaptureError(
        f"forward calls torch.manual_seed({seed}), which a captured step would not do",
        where=quoted(user_source()),
        fix="seed before the step, or pass what is drawn as a tensor of the batch",
    )


def _refuse_checkpoint(*_: Any, **__: Any) -> NoReturn:
    raise CaptureError(
        "forward calls torch.utils.checkpoint, which runs it again while backward is captured",
        where=quoted(user_source()),
        fix="use recompute= instead: zgraph.compile(..., recompute='blocks'), or the paths of modules in a list",
    )


@contextmanager
def _checkpoints_refused() -> Iterator[None]:
    """Refuse both kinds of activation checkpointing where they begin: what comes of them later misleads."""
    with (
        mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", _refuse_checkpoint),
        mock.patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", _refuse_checkpoint),
    ):
        yield


def _recurrent_layers_by_steps(model: nn.Module) -> AbstractContextManager[None]:
    """cuDNN's recurrent layers lay all weights of a module out in one buffer of their own, which no graph can hold."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def _loss_of(
    output: Any, loss: LossFunction | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, where: str | None
) -> torch.Tensor:
    value: Any
    if loss is not None:
        value = loss(output, *args, **kwargs)
    elif isinstance(output, torch.Tensor):
        value = output
    elif isinstance(output, dict) and "loss" in output:
        value = output["loss"]
    else:
        value = getattr(output, "loss", None)
    if not isinstance(value, torch.Tensor) and loss is not None:
        raise CaptureError(
            f"the loss function returned {value if value is None else type(value).__name__} instead of a tensor",
            fix="return the loss from loss(output, *args, **kwargs)",
        )
    if not isinstance(value, torch.Tensor):
        raise CaptureError(
            f"the model returned a {type(output).__name__} without a loss",
            where=where,
            fix="return the loss, return an object with a .loss tensor (pass labels=... to Hugging Face models), "
            "or give zgraph.compile(..., loss=callable)",
        )
    if value.numel() != 1 or not value.is_floating_point():
        raise CaptureError(
            f"the loss is not a scalar: it has shape {tuple(value.shape)} and dtype {value.dtype}",
            where=where,
            fix="reduce it to one floating-point number, e.g. loss.mean()",
        )
    if not value.requires_grad:
        raise CaptureError(
            "there is nothing to train: the loss does not depend on any parameter that requires a gradient",
            where=where,
            fix="check requires_grad of the parameters and that the loss is not detached",
        )
    return value


def _weighted(value: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``value`` times a weight; zero where the weight is, since the mean of nothing is NaN, and so is its gradient."""
    return torch.where(counts != 0, value * counts.to(value.dtype.to_real()), torch.zeros_like(value))


def _weight_of(
    weight: WeightFunction, args: tuple[Any, ...], kwargs: dict[str, Any], loss: torch.Tensor
) -> torch.Tensor:
    value: Any = weight(*args, **kwargs)
    dtype = torch.promote_types(loss.dtype, torch.float32)
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=dtype, device=loss.device)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a tensor {describe(value)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CaptureError(
            f"the weight of a micro-batch is {what}, not one number",
            fix="return the number of tokens, say, from weight(*args, **kwargs)",
        )
    return value.detach().clone().reshape(()).to(loss.device, dtype)


def _explain(error: Exception, accumulate: int) -> CaptureError:
    where = source_of_error(error)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        operator = getattr(error, "func", "an operator")
        what = (
            "control flow or an item() in forward depends on the value of a tensor"
            if operator in (aten._local_scalar_dense.default, aten.is_nonzero.default)
            else f"the shape of the result of {operator} depends on the value of a tensor"
        )
        return CaptureError(
            f"{what}, so the step is not one fixed graph",
            where=where,
            fix="use torch.where or masking instead of a Python branch or a data-dependent shape",
        )
    called = "the same call" if accumulate == 1 else f"one of the {accumulate} micro-batches of the batch"
    advice = "the operator at this line does not trace" if where else "it uses an operator that does not trace"
    return CaptureError(
        f"the training step cannot be captured: {type(error).__name__}: {first_line(error)}",
        where=where,
        fix=f"check that {called} works eagerly; if it does, {advice}",
    )


@contextmanager
def _untouched(model: nn.Module) -> Iterator[ModuleAttributes]:
    """Put back every attribute of every module afterwards: forward may store fake tensors on them."""
    attributes = ModuleAttributes(model)
    try:
        yield attributes
    finally:
        attributes.restore()


def _check_attributes(attributes: ModuleAttributes, call_again: Callable[[], Any]) -> None:
    """Refuse numbers that forward changes with every call: a graph has them as constants. Tell what else it sets.

    What comes out the same when forward is called again (``self.length = x.shape[1]``) does no harm.

    Raises:
        CaptureError: with the attribute and its values.
    """
    changes = attributes.changes()
    if not changes:
        return
    if any(is_plain(after) for _, after in changes.values()):
        call_again()
        later = attributes.changes()
        for name, (before, after) in changes.items():
            last = later[name][1] if name in later else before
            if is_plain(after) and is_plain(last) and not is_same(after, last):
                raise CaptureError(
                    f"forward changes {name} with every call, from {before!r} to {after!r} to {last!r}, "
                    "but a captured step would have it as a constant",
                    fix="keep it in a buffer, or pass it as an argument of train_step",
                )
    log.warning(
        "zgraph: forward sets %s; a compiled step leaves %s as before (what must last belongs into a buffer)",
        shorten(", ".join(changes), 300, placeholder=" ..."),
        "these attributes" if len(changes) > 1 else "this attribute",
    )


def _join(
    graph: fx.Graph,
    asked: list[fx.Node],
    grads: dict[str, fx.Node],
    written: dict[Input, fx.Node],
    constants: dict[str, torch.Tensor],
    update: Update,
    mode: FakeTensorMode,
    state: StateSpec,
) -> tuple[Program, list[fx.Node]]:
    """One graph: placeholders, forward and backward, update, output.

    Also says where in it each node that is ``asked`` for is; the first of these is the loss.
    """
    joined = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    by_input: dict[Input, fx.Node] = {}
    all_constants: dict[str, torch.Tensor] = {}

    known: dict[int, torch.Tensor] = {}  # of values, which nodes share

    def real(val: Any) -> Any:
        if not isinstance(val, torch.Tensor):
            return val
        if id(val) not in known:
            known[id(val)] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        return known[id(val)]

    def add_inputs(source: fx.Graph, values: dict[str, torch.Tensor], prefix: str, skip: set[fx.Node]) -> None:
        for node in source.find_nodes(op="placeholder"):
            if node in skip:
                continue
            what: Input = node.meta["input"]
            if what.role is Role.CONSTANT:
                all_constants[prefix + what.name] = values[what.name]
                what = replace(what, name=prefix + what.name)
            if what not in by_input:
                by_input[what] = joined.placeholder(what.role.value)
                by_input[what].meta.update(input=what, val=real(node.meta["val"]))
            copies[node] = by_input[what]

    gradient_nodes = {node: name for name, node in update.gradients.items()}
    with mode:
        add_inputs(graph, constants, "step.", set())
        add_inputs(update.graph, update.constants, "update.", set(gradient_nodes))
        for node in graph.nodes:
            if node.op == "call_function":
                copies[node] = copy_node(node, joined, copies)
        for node, name in gradient_nodes.items():
            copies[node] = copies[grads[name]]
        for node in update.graph.nodes:
            if node.op == "call_function":
                copy = copies[node] = copy_node(node, joined, copies)
                val = copy.meta.get("val")
                copy.meta["val"] = tuple(map(real, val)) if isinstance(val, (tuple, list)) else real(val)
    outputs: list[Input | None] = [None]
    results: list[Any] = [copies[asked[0]]]
    for what, value in [*written.items(), *update.results.items()]:
        if what.role is Role.CONSTANT:
            what = replace(what, name="step." + what.name)
        outputs.append(what)
        results.append(copies[value] if isinstance(value, fx.Node) else value)
    joined.output(results)
    owned: set[fx.Node] = set()
    for what, result in update.results.items():
        if isinstance(result, fx.Node):
            _own(copies[result], what.name, owned)
    init = dict(update.init or {})
    given: dict[str, Hashable] = {
        name: tuple(sorted((key, str(entry.dtype), entry.sample) for key, entry in entries.items()))
        for name, entries in state.items()
    }
    params = {what.name: tuple(node.meta["val"].shape) for what, node in by_input.items() if what.role is Role.PARAM}
    shapes = {
        name: {key: entry.shape for key, entry in entries.items() if entry.shape and entry.shape != params[name]}
        for name, entries in state.items()
    }
    program = Program(joined, Stage.CAPTURED, Mesh(1), outputs, mode, all_constants, init, given, shapes, update.guards)
    for node in joined.nodes:  # the update was traced on contiguous gradients, and not all are
        if node.op == "call_function" and node.meta["origin"].phase is Phase.UPDATE and _is_tensor(node):
            node.meta["val"] = program.infer(node)
    return program, [copies[node] for node in asked]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _own(result: Any, name: str, owned: set[fx.Node]) -> None:
    """Give the update's nodes the name of the parameter they serve, as their module."""
    stack = [result]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in owned or node.op != "call_function":
            continue
        origin: Origin = node.meta["origin"]
        if origin.phase is not Phase.UPDATE:
            continue
        owned.add(node)
        node.meta["origin"] = replace(origin, module=name)
        stack.extend(node.all_input_nodes)
