"""What operators hold on a CPU besides operands and results, where no shape tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from zgraph import scratch

aten = torch.ops.aten
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def call(target: Any, *args: Any, result: Any = None) -> fx.Node:
    """A node of its own for a call of which only what its operands are like is read; and the result's, if it counts."""
    graph = fx.Graph()
    nodes = []
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            node = graph.placeholder(f"x{index}")
            node.meta["val"] = arg
            nodes.append(node)
        else:
            nodes.append(arg)
    made = graph.call_function(target, tuple(nodes))
    made.meta["val"] = args[0] if result is None else result
    return made


def matrix(rows: int, columns: int, dtype: torch.dtype = F32, *, is_transposed: bool = False) -> torch.Tensor:
    return torch.empty(columns, rows, dtype=dtype).t() if is_transposed else torch.empty(rows, columns, dtype=dtype)


X, T = matrix(8, 4), matrix(8, 4, is_transposed=True)
H = X.to(BF16)
Q = X.view(1, 2, 4, 4)
COUNT = torch.empty(8).long()
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SCALAR = torch.empty(())


AWKWARD = [torch.empty(shape, dtype=dtype) for shape in ((), (0,), (0, 4), (4, 0)) for dtype in (F32, BF16, F64)]
OF_ONE = [
    *(aten.mean.default, aten.sum.dim_IntList, aten.logsumexp.default, aten._softmax.default, aten.median.default),
    *(aten.index_select.default, aten.gather.default, aten.scatter.src, aten.native_layer_norm.default),
]
OF_TWO = [aten.mse_loss.default, aten.gelu_backward.default, aten.binary_cross_entropy.default, aten.huber_loss.default]


@pytest.mark.parametrize("target", [*OF_ONE, *OF_TWO], ids=str)
def test_of_operands_without_dimensions_or_elements_nothing_is_refused(target: Any) -> None:
    for x in AWKWARD:
        node = call(target, x, *([x] if target in OF_TWO else [[0]]))
        assert 0 <= scratch.work_bytes(node) + scratch.kept_bytes(node) <= 16


@pytest.mark.parametrize("shape", [(2, 4, 4), (0, 4, 4), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("num_added", [0, 1])
def test_a_product_of_a_matrix_with_itself_has_two_operands(shape: tuple[int, ...], num_added: int) -> None:
    x = torch.empty(shape)
    graph = fx.Graph()
    operand = graph.placeholder("x")
    target = (aten.bmm.default, aten.baddbmm.default)[num_added]
    product = graph.call_function(target, (operand,) * (2 + num_added))
    operand.meta["val"] = product.meta["val"] = x
    assert scratch.work_bytes(product) == num_added * x.nbytes
    assert scratch.packed_bytes(product) == x.nbytes // max(shape[0], 1)


def test_a_number_before_a_tensor_is_no_operand_that_lies_anywhere() -> None:
    graph = fx.Graph()
    number, x = graph.placeholder("beta"), graph.placeholder("x")
    number.meta["val"], x.meta["val"] = 0.9, X
    power = graph.call_function(aten.pow.Scalar, (number, x))
    assert scratch.work_bytes(power) == 0


def test_what_a_comparison_is_stored_over_is_no_operand() -> None:
    graph = fx.Graph()
    x, y, out = (graph.placeholder(name) for name in ("x", "y", "out"))
    x.meta["val"], y.meta["val"], out.meta["val"] = X, X, X > 0
    assert scratch.work_bytes(graph.call_function(aten.gt.Tensor_out, (x, y), {"out": out})) == 0


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_no_images_take_nothing(dtype: torch.dtype) -> None:
    none, weight = torch.empty(0, 4, 8, 8, dtype=dtype), torch.empty(4, 4, 3, 3, dtype=dtype)
    assert scratch.convolution_bytes(none, weight, none, [1, 1], [1, 1], [1, 1], False, groups=1) == 0


@pytest.mark.parametrize(
    ("node", "num_bytes"),
    [
        pytest.param(call(aten._softmax.default, X, 1, False), 0, id="softmax in order"),
        pytest.param(call(aten._softmax.default, T, 1, False), 128, id="softmax of a copy"),
        pytest.param(call(aten._softmax_backward_data.default, T, T, 1, F32), 256, id="copies of both"),
        pytest.param(call(aten.mean.dim, X, [0]), 0, id="mean"),
        pytest.param(call(aten.mean.dim, H, [0]), 128, id="mean in float32"),
        pytest.param(call(aten.sum.dim_IntList, H, [0, 1]), 0, id="sum as it lies"),
        pytest.param(call(aten.sum.dim_IntList, H, [0, 1], result=SCALAR), 128, id="sum in float32"),
        pytest.param(call(aten.sum.dim_IntList, H.view(2, 4, 4), [0, 2]), 128, id="sum over what lies apart"),
        pytest.param(call(aten.gelu_backward.default, T, T), 0, id="gelu, both alike"),
        pytest.param(call(aten.gelu_backward.default, T, X), 256, id="gelu, unlike"),
        pytest.param(call(aten.gelu_backward.default, T.double(), X.double()), 0, id="gelu in float64"),
        pytest.param(call(aten.mse_loss.default, X, X), 0, id="squares"),
        pytest.param(call(aten.mse_loss.default, X, X, result=SCALAR), 128, id="mean of squares"),
        pytest.param(call(aten.bmm.default, X[None], X[None].mT), 0, id="products"),
        pytest.param(call(aten.bmm.default, H.view(2, 4, 4).permute(1, 0, 2), H.view(4, 4, 2)), 64, id="rows apart"),
        pytest.param(call(aten.gather.default, X.to(F16), 1, X.long(), result=X.to(F16)), 128, id="gather"),
        pytest.param(call(aten.mm.default, X[:, ::2], T), 64, id="product of every second column"),
        pytest.param(call(ATTENTION, Q), 128, id="gradient by heads"),
        pytest.param(call(ATTENTION, Q.transpose(1, 2)), 0, id="gradient by tokens"),
        pytest.param(call(aten.relu.default, T), 0, id="relu"),
        pytest.param(call(aten.mul.Tensor, X, X > 0), 128, id="a mask that is multiplied with"),
        pytest.param(call(aten.mul.Tensor, X, SCALAR.double()), 0, id="a number of another dtype"),
        pytest.param(call(aten.where.self, X > 0, X, X), 0, id="a mask that is looked at"),
        pytest.param(call(aten.sum.dim_IntList, X > 0, [1], result=COUNT), 256, id="a mask that is counted"),
    ],
)
def test_what_a_call_works_in(node: fx.Node, num_bytes: int) -> None:
    assert scratch.work_bytes(node) == num_bytes


def test_nothing_is_said_of_other_devices() -> None:
    assert scratch.work_bytes(call(aten.logsumexp.default, torch.empty(8, 4, device="meta"), [0])) == 0


def test_of_products_in_a_batch_one_matrix_is_packed() -> None:
    assert scratch.packed_bytes(call(aten.mm.default, X, X.t())) == 128
    assert scratch.packed_bytes(call(aten.bmm.default, X.view(2, 4, 4), X.view(2, 4, 4))) == 64
    assert scratch.packed_bytes(call(aten.relu.default, X)) == 0


def convolve(dtype: torch.dtype, read: int, made: int, *how: Any, kernel: int = 3, **options: Any) -> int:
    """Of 2 images of 16 x 16, which stay as large."""
    stride, padding, dilation, is_transposed, groups = how
    images, result = torch.empty(2, read, 16, 16, dtype=dtype), torch.empty(2, made, 16, 16, dtype=dtype)
    weight = torch.empty(made, read // groups, kernel, kernel, dtype=dtype)
    rest = ([stride] * 2, [padding] * 2, [dilation] * 2, is_transposed)
    return scratch.convolution_bytes(images, weight, result, *rest, groups=groups, **options)


PLAIN = (1, 1, 1, False, 1)


@pytest.mark.parametrize(("read", "made", "num_bytes"), [(16, 32, 65_536), (4, 17, 32_768 + 65_536)])
def test_onednn_lays_out_anew_what_it_reads(read: int, made: int, num_bytes: int) -> None:
    """A channel has 2,048 bytes and 16 are a block: the larger of both, or both where some block is not full."""
    weights = 32 * 16 * 9 * 4
    assert convolve(F32, read, made, *PLAIN) == num_bytes + weights
    assert convolve(F32, read, made, *PLAIN, is_backward=True) == 2 * (num_bytes + weights)


def test_in_float64_a_convolution_multiplies_every_pixel_with_its_surroundings() -> None:
    """9 columns of each channel, 4,096 bytes each; of one image at a time where they are not next to each other."""
    columns, weights = 9 * 8 * 4096, 2 * 8 * 8 * 9 * 8
    assert convolve(F64, 8, 8, *PLAIN) == columns + weights
    assert convolve(F64, 8, 8, 1, 2, 2, False, 1) == columns // 2 + weights
    assert convolve(F64, 8, 8, 1, 0, 1, False, 1, kernel=1) == weights // 9


@pytest.mark.parametrize(("dtype", "num_bytes"), [(F32, 0), (F64, 8 * 2048)])
def test_of_a_convolution_by_products_an_image_is_packed(dtype: torch.dtype, num_bytes: int) -> None:
    x, weight = torch.empty(2, 4, 16, 16, dtype=dtype), torch.empty(8, 4, 3, 3, dtype=dtype)
    y, how = torch.empty(2, 8, 16, 16, dtype=dtype), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert scratch.packed_bytes(call(aten.convolution.default, x, weight, None, *how, result=y)) == num_bytes
    backward = call(aten.convolution_backward.default, y, x, weight, [8], *how, [True] * 3)
    assert scratch.packed_bytes(backward) == num_bytes


@given(*(st.integers(1, limit) for limit in (6, 5, 40, 40)))
def test_what_a_recurrent_layer_keeps_for_backward_is_no_more_than_is_said(
    steps: int, batch: int, width: int, hidden: int
) -> None:
    x, state = torch.randn(steps, batch, width), torch.zeros(batch, hidden)
    weights = (torch.randn(4 * hidden, width), torch.randn(4 * hidden, hidden))
    args = (x, *weights, torch.zeros(4 * hidden), torch.zeros(4 * hidden), state, state)
    how = (False, [], 2, hidden, 1, True, False, False, True)
    made = aten.mkldnn_rnn_layer.default(*args, *how)
    layer = call(aten.mkldnn_rnn_layer.default, *args, *how, result=made)
    assert made[3].nbytes <= scratch.kept_bytes(layer, 3) <= 2 * made[3].nbytes + 2**16
    assert scratch.kept_bytes(layer, 0) == 0


def test_a_mean_of_losses_lies_in_the_memory_of_all() -> None:
    loss = aten.mse_loss.default(torch.randn(8, 4), torch.randn(8, 4))
    assert scratch.kept_bytes(call(aten.mse_loss.default, X, X, result=loss)) == 128
    assert loss.untyped_storage().nbytes() == 128
