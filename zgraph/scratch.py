"""What PyTorch's operators hold on a CPU besides operands and results.

Nothing of it is in a graph. It is what ``benchmarks/scratch.py`` measures, operator by operator, and as much as is said
here or less, but for what each thread works in, up to 2 MB. Of operators that are not here nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

PACKED_BYTES = 10 * 2**20
"""What libraries for products of matrices keep at most to pack an operand in; less where all are smaller.
Measured on GPTs (``benchmarks/accuracy.py --here``): 0.4 to 11 MB."""

_CHANNELS = 16
"""Of a block of oneDNN's: as many as a vector of AVX-512 has in float32; with AVX2 it is 8."""

_OF_ROWS = 2**18
"""What oneDNN works in besides, in 16 bits."""

_HALVES = (torch.bfloat16, torch.float16)

_Rule = Callable[[fx.Node], int]
_WORK: dict[Any, _Rule] = {}


def work_bytes(node: fx.Node) -> int:
    """Bytes that a call holds while it runs, beside what it reads and gives."""
    rule = _WORK.get(_operator(node))
    if rule is None:
        rule = _promoted if _is_pointwise(node.target) else None
    return 0 if rule is None or not _is_on_cpu(node) else rule(node)


def packed_bytes(node: fx.Node) -> int:
    """Bytes of what a product of matrices may lay out anew to read it in order, in memory that libraries keep.

    So may convolutions that PyTorch makes of products (``convolution_bytes``); 0 for other calls.
    """
    if _operator(node) in _CONVOLUTIONS:
        images, _, made, _ = _convolved(node)
        return 0 if _is_of_onednn(images) else max(_dense(images), _dense(made)) // max(images.shape[0], 1)
    index = _SECOND.get(_operator(node))
    if index is None:
        return 0
    val = _val(node, index)
    num_bytes = val.nbytes // (max(val.shape[0], 1) if val.dim() == 3 else 1)
    return num_bytes + (_OF_ROWS if val.dtype in _HALVES else 0)


def kept_bytes(call: fx.Node, index: int | None = None) -> int:
    """Bytes that a call's result, or one of several, has in memory beyond what its shape tells."""
    rule = _KEPT.get(_operator(call))
    return 0 if rule is None else rule(call, index)


def _operator(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _operands(node: fx.Node) -> list[torch.Tensor]:
    """Tensors among a call's positional arguments: not what it is given to store over."""
    vals = [arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node)]
    return [val for val in vals if isinstance(val, torch.Tensor)]


def _is_on_cpu(node: fx.Node) -> bool:
    return all(val.device.type == "cpu" for val in _operands(node))


def _works(*operators: Any) -> Callable[[_Rule], _Rule]:
    def add(rule: _Rule) -> _Rule:
        _WORK.update(dict.fromkeys(operators, rule))
        return rule

    return add


# -- what is copied --------------------------------------------------------------------------------------------


def _val(node: fx.Node, index: int = 0) -> torch.Tensor:
    return node.args[index].meta["val"]  # type: ignore[union-attr, no-any-return]


def _copied(*vals: torch.Tensor) -> int:
    """Of operands that are laid out anew if they do not lie in the order of their dimensions."""
    return sum(_dense(val) for val in vals if not val.is_contiguous())


def _dense(val: torch.Tensor) -> int:
    return val.numel() * val.element_size()


def _widened(val: torch.Tensor) -> int:
    """Of operands in 16 bits, which are computed with in 32."""
    return 4 * val.numel() if val.dtype in _HALVES else 0


@cache
def _is_pointwise(target: Any) -> bool:
    is_operator = isinstance(target, torch._ops.OpOverload)
    return is_operator and torch.Tag.pointwise in target.tags and target.overloadpacket not in _AS_THEY_ARE


_AS_THEY_ARE = (aten._to_copy, aten.copy, aten.copy_, aten.where, aten.masked_fill, aten.clone)
"""Elementwise operators that convert no operand before they compute, or nothing but on the way."""


def _promoted(node: fx.Node) -> int:
    """Copies of operands that are computed with in the dtype of others."""
    vals = [val for val in _operands(node) if val.dim()]
    if not vals:
        return 0
    common = reduce(torch.promote_types, (val.dtype for val in vals))
    return sum(val.numel() * common.itemsize for val in vals if val.dtype != common)


def _cast(node: fx.Node) -> int:
    """A copy of what is added up, multiplied or averaged in another dtype."""
    val, made = _val(node), node.meta["val"]
    return val.numel() * made.element_size() if made.dtype != val.dtype else 0


_works(aten.cumsum, aten.cumprod, aten.prod)(_cast)
_works(aten.kthvalue)(lambda node: _dense(_val(node)) + 8 * _val(node).numel())
_works(aten.soft_margin_loss_backward)(lambda node: 2 * _dense(node.meta["val"]))
_works(aten.count_nonzero)(lambda node: 9 * _val(node).numel())
_works(aten._softmax, aten._log_softmax, aten.native_layer_norm, aten.log_sigmoid_forward, aten.nll_loss_forward)(
    lambda node: _copied(_val(node))
)
_works(aten.index_select, aten.embedding_dense_backward, aten.upsample_bicubic2d_backward)(
    lambda node: _copied(_val(node))
)
_works(aten._softmax_backward_data, aten._log_softmax_backward_data, aten.native_layer_norm_backward)(
    lambda node: _copied(_val(node), _val(node, 1))
)
_works(aten.logsumexp, aten.native_dropout, aten.argsort, aten.median, aten.native_batch_norm_backward)(
    lambda node: _dense(_val(node))
)
_works(aten.im2col, aten.col2im)(lambda node: _dense(_val(node)) + _copied(_val(node)))
_works(aten.huber_loss)(lambda node: _dense(_val(node)) + _widened(_val(node)))
_works(aten.mean)(lambda node: max(_widened(_val(node)), _cast(node)))
_works(aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.index_add)(lambda node: _widened(_val(node)))
_works(aten.gather)(lambda node: _widened(node.meta["val"]))
_works(aten.binary_cross_entropy)(lambda node: 2 * _dense(_val(node)) + _widened(_val(node)))


@_works(aten.binary_cross_entropy_with_logits)
def _of_logits(node: fx.Node) -> int:
    return 3 * _dense(_val(node)) + _widened(_val(node)) // 2


@_works(aten.mse_loss, aten.smooth_l1_loss, aten.soft_margin_loss)
def _reduced(node: fx.Node) -> int:
    """Each element's loss is there before their mean."""
    return _dense(_val(node)) + _widened(_val(node)) if _kept_of_losses(node) else 0


@_works(aten.sum)
def _summed(node: fx.Node) -> int:
    """Converted at once, where the result is of another dtype or what is summed over does not follow each other."""
    val = _val(node)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    over: list[int] = sorted(dim % max(val.dim(), 1) for dim in dims or ())
    is_apart = any(b - a > 1 for a, b in pairwise(over))
    return max(_widened(val) if is_apart else 0, _cast(node))


@_works(aten.gelu_backward)
def _of_gelu(node: fx.Node) -> int:
    """Where its operands lie in unlike orders, oneDNN has copies of both."""
    gradient, x = _val(node), _val(node, 1)
    is_alike = gradient.stride() == x.stride() or x.dtype not in (torch.float32, torch.bfloat16)
    return 0 if is_alike else 2 * _dense(x)


@_works(aten.mm, aten.addmm, aten.mv)
def _of_product(node: fx.Node) -> int:
    """Copies of operands between whose elements there are gaps in either order; in 16 bits, in oneDNN's order, too."""
    first = _SECOND.get(_operator(node), 1) - 1
    operands = (_val(node, first), _val(node, first + 1))
    return sum(_dense(val) * (2 if val.dtype in _HALVES else 1) for val in operands if 1 not in val.stride())


@_works(aten.bmm, aten.baddbmm)
def _of_products(node: fx.Node) -> int:
    """In 16 bits, oneDNN reads matrices that follow each other, in either order; and a sum is made before it is added.

    What is packed besides is in ``packed_bytes``.
    """
    second = _SECOND[_operator(node)]
    operands = (_val(node, second - 1), _val(node, second))
    num_bytes = sum(_copied(val) for val in operands if val.dtype in _HALVES and not val.mT.is_contiguous())
    return num_bytes + (_dense(node.meta["val"]) if second > 1 else 0)


@_works(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _of_attention(node: fx.Node) -> int:
    """The gradient, of shape (batch, heads, tokens, width), if it does not lie as the result did: token by token."""
    return _copied(_val(node).transpose(1, 2))


_SECOND = {aten.mm: 1, aten.addmm: 2, aten.bmm: 1, aten.baddbmm: 2}


# -- convolutions ----------------------------------------------------------------------------------------------


_CONVOLUTIONS = (aten.convolution, aten.convolution_backward)


def _is_of_onednn(images: torch.Tensor) -> bool:
    """Whether oneDNN convolves them, as far as this CPU has it."""
    return images.dtype in (torch.float32, torch.bfloat16)


def _convolved(node: fx.Node) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """Images, weight, what forward makes of them, and the arguments that say how."""
    if _operator(node) is aten.convolution_backward:
        return _val(node, 1), _val(node, 2), _val(node), node.args[4:]
    return _val(node), _val(node, 1), node.meta["val"], node.args[3:]


@_works(*_CONVOLUTIONS)
def _convolution(node: fx.Node) -> int:
    images, weight, made, how = _convolved(node)
    is_backward = _operator(node) is aten.convolution_backward
    return convolution_bytes(images, weight, made, *how[:4], groups=how[5], is_backward=is_backward)


def convolution_bytes(
    images: torch.Tensor,
    weight: torch.Tensor,
    made: torch.Tensor,
    stride: Iterable[int],
    padding: Iterable[int],
    dilation: Iterable[int],
    is_transposed: bool,
    *,
    groups: int,
    is_backward: bool = False,
) -> int:
    """About what a convolution works in, forward or backward.

    Args:
        images, made: of shape (batch, channels, ...), what forward reads and what it makes.
        weight: as ``torch.convolution`` takes it, and all that follows.
    """
    if not images.numel() or not made.numel():
        return 0
    both = _dense(images) + _dense(made)
    of_onednn = 0
    if images.dtype is not torch.float64:
        of_onednn = _of_onednn(images, weight, made, max(stride), is_transposed=is_transposed) * (1 + is_backward)
        of_onednn += 2 * both // images.shape[0] if images.dtype is torch.bfloat16 else 0
    if _is_of_onednn(images):
        return of_onednn
    kernel = math.prod(weight.shape[2:])
    wide, places = (made, images) if is_transposed else (images, made)
    of_one = wide.shape[1] * kernel * math.prod(places.shape[2:]) * images.element_size()
    in_turns = is_backward if is_transposed else max(dilation) > 1
    columns = of_one if in_turns else of_one * images.shape[0]
    if kernel == 1 and max(stride) == 1 and max(padding) == 0 and not is_transposed:
        columns = 0
    if images.dtype is torch.float16:
        columns += 2 * of_one + 2 * max(_dense(images), _dense(made))
    in_groups = 0 if groups == 1 else max(_dense(images), _dense(made)) + both // groups
    own = columns // groups + in_groups + 2 * _dense(weight) + _copied(images, made)
    return max(own, of_onednn)


def _of_onednn(
    images: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, stride: int, *, is_transposed: bool
) -> int:
    """About what oneDNN lays out anew to convolve, in blocks of channels; backward it is twice that.

    What is read and what is made are laid out by turns, and at once where channels do not fill their blocks, where a
    1 x 1 convolution leaves some out, and where it is transposed. Where images lie by channels last, or weights are
    1 x 1, it is hardly anything.
    """
    sizes = [x.nbytes // x.shape[1] * -(-x.shape[1] // _CHANNELS) * _CHANNELS for x in (images, made)]
    weights = weight.nbytes // (weight.shape[0] * weight.shape[1])
    for num in weight.shape[:2]:
        weights *= -(-num // _CHANNELS) * _CHANNELS
    if is_transposed:
        return 2 * max(sizes) + weights
    fills = all(x.shape[1] % _CHANNELS == 0 for x in (images, made))
    leaves_out = stride > 1 and math.prod(weight.shape[2:]) == 1
    return (max(sizes) if fills and not leaves_out else sum(sizes)) + weights


# -- recurrent layers ------------------------------------------------------------------------------------------


@_works(aten.mkldnn_rnn_layer)
def _recurrent(node: fx.Node) -> int:
    """What all gates of all steps are given, and both weights in oneDNN's order."""
    return _gates(node) + _dense(_val(node, 1)) + _dense(_val(node, 2)) + _OF_LAYER


@_works(aten.mkldnn_rnn_layer_backward)
def _recurrent_backward(node: fx.Node) -> int:
    """And once more for the gradients of the weights, in 16 bits twice."""
    times = 3 if _val(node, 1).dtype in _HALVES else 2
    return _gates(node) + times * (_dense(_val(node, 1)) + _dense(_val(node, 2))) + _OF_LAYER


_OF_LAYER = 2**20
"""Beside what grows with the layer."""


def _gates(node: fx.Node, itemsize: int = 4) -> int:
    steps, batch, _ = _val(node).shape
    return steps * batch * _val(node, 1).shape[0] * itemsize


def _workspace(layer: fx.Node, index: int | None) -> int:
    """What a recurrent layer of oneDNN's keeps for backward: its fourth result, whose size torch takes for 0.

    Gates of all steps, and states of all steps and the one before, of what it reads (6 numbers for each of the wider of
    input and hidden) and what it hands on (5 for each hidden one, and in 16 bits 4 of the size of float32's).
    """
    if index != _WORKSPACE:
        return 0
    x = _val(layer)
    steps, batch, width = x.shape
    hidden: int = _val(layer, 2).shape[1]
    wide, narrow = (-(-num // 16) * 16 + 16 for num in (max(width, hidden), hidden))
    itemsize = x.element_size()
    of_states = 24 * wide + 20 * narrow if itemsize == 4 else 20 * wide + 16 * narrow
    return _gates(layer, itemsize) + (steps + 1) * batch * of_states + _PAGES


_WORKSPACE = 3
_PAGES = 8 * 4096


# -- losses ----------------------------------------------------------------------------------------------------


def _kept_of_losses(node: fx.Node, _: int | None = None) -> int:
    """A mean, or a sum, lies at the start of memory that has had each element's loss."""
    return _dense(_val(node)) if node.meta["val"].dim() == 0 and _val(node).dim() > 0 else 0


_KEPT: dict[Any, Callable[[fx.Node, int | None], int]] = {
    aten.mkldnn_rnn_layer: _workspace,
    aten.mse_loss: _kept_of_losses,
    aten.smooth_l1_loss: _kept_of_losses,
    aten.soft_margin_loss: _kept_of_losses,
    aten.binary_cross_entropy: _kept_of_losses,
}
