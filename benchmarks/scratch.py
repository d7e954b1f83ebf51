"""What PyTorch's operators hold on a CPU besides operands and results, beside what is said of it.

    python benchmarks/scratch.py                      operators, in all dtypes and layouts
    python benchmarks/scratch.py --convolutions       convolutions of many shapes

Bytes are those that a call allocated at most and had let go of when it returned, and those of results that their shapes
do not tell (``benchmarks/memory.py``). The exit status is 1 if a call took more than ``zgraph.scratch`` says, and
512 KiB for a thread's own working memory and the C library's notes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from memory import Meter, load_malloc_counter
from torch import fx

from zgraph.scratch import kept_bytes, packed_bytes, work_bytes

aten = torch.ops.aten

UNCOUNTED = 2**19
ROWS, WIDTH = 2048, 512
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class Convolution(NamedTuple):
    """Images of shape (batch, channels, size, ...), and square weights."""

    batch: int
    channels: int
    made: int
    size: int
    kernel: int = 3
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    is_transposed: bool = False
    num_dims: int = 2


CONVOLUTIONS = (
    Convolution(8, 64, 64, 32), Convolution(8, 3, 64, 32), Convolution(8, 64, 64, 32, kernel=1),
    Convolution(8, 64, 128, 32, stride=2), Convolution(8, 64, 64, 32, groups=64), Convolution(2, 256, 256, 56),
    Convolution(8, 32, 32, 32), Convolution(16, 48, 48, 24, kernel=5), Convolution(8, 17, 17, 32),
    Convolution(8, 1, 1, 28), Convolution(64, 1, 8, 28), Convolution(8, 64, 128, 32, kernel=1, stride=2),
    Convolution(8, 512, 2048, 7, kernel=1), Convolution(8, 64, 64, 32, dilation=2),
    Convolution(4, 64, 64, 16, kernel=4, stride=2, is_transposed=True),
    Convolution(4, 20, 12, 16, stride=2, is_transposed=True), Convolution(8, 24, 40, 20, kernel=5, groups=4),
    Convolution(8, 64, 32, 16, kernel=4, stride=2, groups=2, is_transposed=True), Convolution(8, 8, 8, 32),
    Convolution(8, 64, 64, 1024, num_dims=1), Convolution(4, 16, 16, 16, num_dims=3),
    Convolution(4, 16, 16, 16, dilation=2, num_dims=3),
)  # fmt: skip


class Call(NamedTuple):
    """An operator with its arguments."""

    what: str
    target: Any
    args: tuple[Any, ...]


def calls(dtype: torch.dtype) -> Iterator[Call]:
    """Operators, on operands that lie in the order of their dimensions and that do not."""
    x, g = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(ROWS, WIDTH).to(dtype)
    weight, images = torch.randn(WIDTH).to(dtype), torch.randn(8, 32, 64, 64).to(dtype)
    transposed = torch.randn(WIDTH, ROWS).to(dtype).t()
    columns, rows = torch.randint(0, WIDTH, (ROWS, WIDTH)), torch.randint(0, WIDTH, (ROWS,))
    for lies, y in (("in order", x), ("transposed", transposed)):
        for name in ("mean.dim", "sum.dim_IntList", "logsumexp.default"):
            yield Call(f"{name}, {lies}", _target(name), (y, [0]))
        for name in ("argsort.default", "median.dim"):
            yield Call(f"{name}, {lies}", _target(name), (y, 1))
        for name in ("_softmax.default", "_log_softmax.default"):
            yield Call(f"{name}, {lies}", _target(name), (y, 1, False))
        for name in ("_softmax_backward_data.default", "_log_softmax_backward_data.default"):
            yield Call(f"{name}, {lies}", _target(name), (y, y, 1, dtype))
        for name in ("gelu_backward", "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits"):
            yield Call(f"{name}, {lies}", _target(f"{name}.default"), (g, y))
        yield Call(f"binary_cross_entropy, {lies}", aten.binary_cross_entropy.default, (y.sigmoid(), g.sigmoid()))
        yield Call(f"native_layer_norm, {lies}", aten.native_layer_norm.default, (y, [WIDTH], weight, weight, 1e-5))
        yield Call(f"native_dropout, {lies}", aten.native_dropout.default, (y, 0.5, True))
        yield Call(f"log_sigmoid_forward, {lies}", aten.log_sigmoid_forward.default, (y,))
        yield Call(f"gather, {lies}", aten.gather.default, (y, 1, columns))
        yield Call(f"scatter.src, {lies}", aten.scatter.src, (y, 1, columns, g))
        yield Call(f"scatter.value, {lies}", aten.scatter.value, (y, 1, columns[:, :8], 1.0))
        yield Call(f"scatter_add, {lies}", aten.scatter_add.default, (y, 1, columns, g))
        yield Call(f"index_select, {lies}", aten.index_select.default, (y, 1, rows[:WIDTH]))
        args = (y, rows, ROWS, -1, False)
        yield Call(f"embedding_dense_backward, {lies}", aten.embedding_dense_backward.default, args)
        yield Call(f"nll_loss_forward, {lies}", aten.nll_loss_forward.default, (y, rows, None, 1, -100))
    for lies, y in (("in order", images), ("channels last", images.to(memory_format=torch.channels_last))):
        yield Call(f"mean over pixels, {lies}", aten.mean.dim, (y, [2, 3]))
        yield Call(f"sum to channels, {lies}", aten.sum.dim_IntList, (y, [0, 2, 3]))
        yield Call(f"im2col, {lies}", aten.im2col.default, (y, [3, 3], [1, 1], [1, 1], [1, 1]))
    matrices = torch.randn(8, 256, 256).to(dtype)
    pairs = {
        "in order": (matrices, matrices),
        "transposed": (matrices.mT, matrices),
        "rows of each apart": (matrices.permute(1, 0, 2), torch.randn(256, 256, 256).to(dtype)),
    }
    for lies, (a, b) in pairs.items():
        yield Call(f"bmm, {lies}", aten.bmm.default, (a, b))
    mask = x > 0
    yield Call("mask counted", aten.sum.dim_IntList, (mask, [1]))
    yield Call("mask multiplied with", aten.mul.Tensor, (x, mask))
    yield Call("compared with integers", aten.eq.Tensor, (x, columns))
    yield Call("cumsum of a mask", aten.cumsum.default, (mask, 1))
    yield Call("kthvalue", aten.kthvalue.default, (x, 3))
    yield Call("count_nonzero", aten.count_nonzero.dim_IntList, (x, [1]))
    yield Call("mm", aten.mm.default, (x.t(), g))
    yield Call("mm of every second column", aten.mm.default, (torch.randn(512, 1024).to(dtype)[:, ::2], g[:512]))
    if dtype is not torch.float16:
        yield from _attention(dtype)
    if dtype in (torch.float32, torch.bfloat16):
        for steps, batch, width, hidden in ((48, 16, 128, 256), (48, 16, 512, 256), (10, 3, 17, 33), (2, 16, 128, 256)):
            yield from _recurrent(dtype, steps, batch, width, hidden)


def _target(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload)


def _attention(dtype: torch.dtype) -> Iterator[Call]:
    """Forward, and backward where the gradient lies as the result did, and where it does not."""
    q = torch.randn(4, 256, 8, 64).to(dtype).transpose(1, 2)
    yield Call("attention", aten._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q, 0.0, True))
    y, sums = aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q, 0.0, True)
    for lies, gradient in (("token by token", torch.empty_like(y)), ("head by head", torch.empty_like(y).contiguous())):
        target = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        yield Call(f"gradient of attention, {lies}", target, (gradient, q, q, q, y, sums, 0.0, True))


def _recurrent(dtype: torch.dtype, steps: int, batch: int, width: int, hidden: int) -> Iterator[Call]:
    """A layer of an LSTM, and its gradient."""
    x = torch.randn(steps, batch, width).to(dtype)
    weights = (torch.randn(4 * hidden, width).to(dtype), torch.randn(4 * hidden, hidden).to(dtype))
    bias, state = torch.randn(4 * hidden).to(dtype), torch.randn(batch, hidden).to(dtype)
    how, what = (2, hidden, 1, True), f"of {steps} x {batch} x {width} to {hidden}"
    args = (x, *weights, bias, bias, state, state)
    yield Call(f"LSTM {what}", aten.mkldnn_rnn_layer.default, (*args, False, [], *how, False, False, True))
    y, last, cell, kept = aten.mkldnn_rnn_layer.default(*args, False, [], *how, False, False, True)
    gradients = (torch.randn_like(y), torch.randn_like(last), torch.randn_like(cell))
    rest = (False, 2, hidden, 1, True, True, False, [], False, kept)
    target = aten.mkldnn_rnn_layer_backward.default
    yield Call(f"gradient of LSTM {what}", target, (*args, y, last, cell, *gradients, *rest))


def convolutions(dtype: torch.dtype) -> Iterator[Call]:
    """All of ``CONVOLUTIONS``, forward and backward, in both layouts of images."""
    for case in CONVOLUTIONS:
        last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(case.num_dims)
        for layout in (torch.contiguous_format, *([last] if last is not None else [])):
            x = torch.randn(case.batch, case.channels, *[case.size] * case.num_dims).to(dtype, memory_format=layout)
            num = (case.channels, case.made) if case.is_transposed else (case.made, case.channels)
            w = torch.randn(num[0], num[1] // case.groups, *[case.kernel] * case.num_dims)
            w = w.to(dtype, memory_format=layout)
            of_dims = ([case.stride], [case.dilation * (case.kernel // 2)], [case.dilation])
            how = (*(each * case.num_dims for each in of_dims), case.is_transposed, [0] * case.num_dims, case.groups)
            lies = "in order" if layout is torch.contiguous_format else "channels last"
            what = f"{list(x.shape)} to {case.made}, {case.kernel}, {case.groups}, {case.stride}, {case.dilation}"
            what += f"{' transposed' if case.is_transposed else ''}, {lies}"
            yield Call(what, aten.convolution.default, (x, w, None, *how))
            gradient = torch.randn_like(aten.convolution.default(x, w, None, *how))
            args = (gradient, x, w, [case.made], *how, [True] * 3)
            yield Call(f"gradient of {what}", aten.convolution_backward.default, args)


def said_bytes(call: Call, result: Any) -> int:
    """What zgraph says that a call takes, of memory that no shape tells."""
    graph = fx.Graph()

    def operand(arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = arg
        return node

    node = graph.call_function(call.target, tuple(map(operand, call.args)))
    node.meta["val"] = result
    kept = sum(kept_bytes(node, index) for index in (range(len(result)) if isinstance(result, tuple) else (None,)))
    return work_bytes(node) + packed_bytes(node) + kept


def taken_bytes(meter: Meter, call: Call) -> tuple[int, Any]:
    """Of a call that has run before, what it allocates at most beside its results; and these."""
    call.target(*call.args)
    before = meter.read().live_bytes
    meter.restart_peaks()
    result = call.target(*call.args)
    peak = meter.read().live_peak_bytes - before
    results = [each for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, torch.Tensor)]
    own = {each.untyped_storage().data_ptr(): each for each in results}
    is_layer = call.target is aten.mkldnn_rnn_layer.default
    told = sum(each.nbytes for each in own.values() if not (is_layer and each.dtype is torch.uint8))
    return peak - told, result


def main() -> int:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convolutions", action="store_true", help="of many shapes, instead of other operators")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="all unless given")
    args = parser.parse_args()
    load_malloc_counter({"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    meter, above = Meter(), 0
    print("| call | dtype | takes | said |\n| --- | --- | --- | --- |")
    made = convolutions if args.convolutions else calls
    for dtype in map(DTYPES.__getitem__, args.dtypes):
        for call in made(dtype):
            taken, result = taken_bytes(meter, call)
            said = said_bytes(call, result)
            above = max(above, taken - said)
            mark = " **more**" if taken > said + UNCOUNTED else ""
            if max(taken, said) > UNCOUNTED:
                print(f"| {call.what} | {dtype} | {taken / 1e6:.2f} MB{mark} | {said / 1e6:.2f} MB |")
    return 1 if above > UNCOUNTED else 0


if __name__ == "__main__":
    sys.exit(main())
