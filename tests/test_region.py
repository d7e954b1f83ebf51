"""Regions in C++: they compute what their calls do, no worse than ATen does, on however many threads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tests.programs import Builder, few_examples
from zgraph.codegen import library
from zgraph.codegen.ir import CannotWriteError, may_overwrite
from zgraph.codegen.kernel import CPP, SLICES
from zgraph.codegen.lowering import lower
from zgraph.codegen.region import Region
from zgraph.codegen.region_cpp import ROWS_TOGETHER, RegionCppWriter
from zgraph.liveness import alive_bytes
from zgraph.program import Role

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")


def region_of(function: Callable[..., Any], *args: Any) -> Region:
    """What a function calls, as a region."""
    graph = make_fx(function, tracing_mode="fake")(*args).graph
    output = graph.output_node()
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    output.args = (list(results),)
    return Region("region", graph, len(args), (None,) * len(results), is_compiled=True)


def as_list(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


def check(function: Callable[..., Any], *args: Any, least: float = 3e-7) -> None:
    """In C++, results are as near to those in float64 as ATen's are, twice over, or within ``least`` of the largest."""
    region = region_of(function, *args)
    assert region.runs_in("cpu") == CPP
    found, eager = region(*args), as_list(function(*args))
    exact = as_list(
        function(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args))
    )
    for mine, theirs, want in zip(found, eager, exact, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        scale = want.abs().max()
        error, of_eager = ((x.double() - want).abs().max() / scale for x in (mine, theirs))
        assert error <= max(2 * of_eager, least), (error, of_eager, region.text(CPP))


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * scale


def add_and_norm(x: Any, y: Any, weight: Any, bias: Any) -> Any:
    hidden = x + y
    return (hidden, *aten.native_layer_norm(hidden, [x.shape[-1]], weight, bias, 1e-5))


def norm_backward(gradient: Any, x: Any, mean: Any, scale: Any, weight: Any, bias: Any, rest: Any) -> Any:
    of_x, *others = aten.native_layer_norm_backward(
        gradient, x, [x.shape[-1]], mean, scale, weight, bias, [True, True, True]
    )
    hidden = rest + of_x
    return hidden, *others, hidden.view(-1, x.shape[-1]).sum([0], keepdim=True)


def cross_entropy(scores: Any, targets: Any) -> Any:
    y = aten._log_softmax(scores, 1, False)
    loss, count = aten.nll_loss_forward(y, targets, None, 1, -100)
    gradient = aten.nll_loss_backward(torch.ones_like(loss), y, targets, None, 1, -100, count)
    return loss, aten._log_softmax_backward_data(gradient, y, 1, scores.dtype)


def gelu_backward_and_sum(gradient: Any, x: Any) -> Any:
    found = aten.gelu_backward(gradient, x)
    return found, found.sum([0], keepdim=True)


def test_a_residual_and_its_norm_read_and_write_each_tensor_once() -> None:
    region = region_of(add_and_norm, normal(2, 3, 8), normal(3, 8), normal(8), normal(8))
    text = region.text(CPP)
    assert_expected_inline(
        text[text.index("{") :],
        """\
{
    const float *ia0 = (const float *)inputs[0];
    const float *ia1 = (const float *)inputs[1];
    const float *ia2 = (const float *)inputs[2];
    const float *ia3 = (const float *)inputs[3];
    float *o0 = (float *)outputs[0];
    float *o1 = (float *)outputs[1];
    float *o2 = (float *)outputs[2];
    float *o3 = (float *)outputs[3];
    long wrong = 0;
    #pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+:wrong)
    for (long r = 0; r < 6; r++) {
        const float *xa0 = ia0 + (r / 3) * 24 + (r % 3) * 8;
        const float *xa1 = ia1 + (r % 3) * 8;
        const float *xa2 = ia2;
        const float *xa3 = ia3;
        float *y0 = o0 + r * 8;
        float *y1 = o1 + r * 8;
        float v1 = 0;
        #pragma omp simd reduction(+:v1)
        for (int c = 0; c < 8; c++) {
            const float a0 = xa0[c];
            const float a1 = xa1[c];
            const float v0 = a0 + a1;  // add
            v1 += v0;
            y0[c] = v0;
        }
        const float v2 = v1 / 8.0f;  // div
        float v5 = 0;
        #pragma omp simd reduction(+:v5)
        for (int c = 0; c < 8; c++) {
            const float a0 = xa0[c];
            const float a1 = xa1[c];
            const float v0 = a0 + a1;  // add
            const float v3 = v0 - v2;  // sub
            const float v4 = v3 * v3;  // mul
            v5 += v4;
        }
        const float v6 = v5 / 8.0f;  // div
        const float v7 = v6 + 1e-05f;  // add
        const float v8 = 1.0f / __builtin_sqrtf(v7);  // rsqrt
        #pragma omp simd
        for (int c = 0; c < 8; c++) {
            const float a0 = xa0[c];
            const float a1 = xa1[c];
            const float v0 = a0 + a1;  // add
            const float v3 = v0 - v2;  // sub
            const float v9 = v3 * v8;  // mul
            const float a2 = xa2[c];
            const float v10 = v9 * a2;  // mul
            const float a3 = xa3[c];
            const float v11 = v10 + a3;  // add
            y1[c] = v11;
        }
        o2[r] = v2;
        o3[r] = v8;
    }
    return wrong;
}
""",
    )


@pytest.mark.parametrize("shape", [(2, 3, 8), (70, 33), (4, 256)], ids=str)
def test_norms_and_what_lies_around_them(shape: tuple[int, ...]) -> None:
    x, y, weight, bias = normal(*shape), normal(*shape[1:]), normal(shape[-1]), normal(shape[-1])
    check(add_and_norm, x, y, weight, bias)
    _, mean, scale = aten.native_layer_norm(x, [shape[-1]], weight, bias, 1e-5)
    check(norm_backward, normal(*shape, scale=3), x, mean, scale, weight, bias, y)


def test_rms_norms() -> None:
    """As the one operator that they are on a GPU, and as the many that they are on a CPU."""
    x, weight, gradient = normal(5, 7, 16), normal(16), normal(7, 5, 16).transpose(0, 1).contiguous()
    check(lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w, x, weight)
    x.requires_grad_()
    weight.requires_grad_()
    y, scale = torch.ops.aten._fused_rms_norm(x, [16], weight, 1e-6)
    wanted = torch.autograd.grad(y, (x, weight), gradient)
    with torch.no_grad():
        found = of_call(aten._fused_rms_norm.default, 2, x, [16], weight, 1e-6)
        of_x, of_weight = of_call(
            aten._fused_rms_norm_backward.default, 2, gradient, x, [16], scale, weight, [True, True], like=(x, weight)
        )
    torch.testing.assert_close(found, [y, scale])
    torch.testing.assert_close((of_x, of_weight), wanted)


def of_call(target: Any, num_results: int, *args: Any, like: Any = None) -> list[torch.Tensor]:
    """Results of one call as a region, as large as those of torch, or as other tensors."""
    graph = fx.Graph()
    nodes = []
    for index, arg in enumerate(args):
        nodes.append(graph.placeholder(f"x{index}") if isinstance(arg, torch.Tensor) else arg)
        if isinstance(arg, torch.Tensor):
            nodes[-1].meta["val"] = arg
    call = graph.call_function(target, tuple(nodes))
    call.meta["val"] = tuple(like or target(*args))
    results = [graph.call_function(operator.getitem, (call, index)) for index in range(num_results)]
    for result, val in zip(results, call.meta["val"], strict=True):
        result.meta["val"] = val
    graph.output(results)
    region = Region("region", graph, len(nodes), (None,) * num_results, is_compiled=True)
    assert region.runs_in("cpu") == CPP
    return region(*(arg for arg in args if isinstance(arg, torch.Tensor)))


@pytest.mark.parametrize("num_classes", [5, 1000])
def test_a_loss_and_its_gradient_are_one_region(num_classes: int) -> None:
    targets = torch.arange(70) % num_classes
    targets[3:9] = -100
    check(cross_entropy, normal(70, num_classes, scale=4), targets, least=2e-6)


def test_gradients_of_logits_may_lie_over_these_as_targets_are_picked_before() -> None:
    """Of each row the target's logarithm is read before the loop that stores."""
    x, targets = normal(70, 33, scale=4), torch.arange(70) % 33
    targets[3:9] = -100
    region = region_of(cross_entropy, x, targets)
    expected = region(x, targets)
    places = [i for i, each in enumerate(expected) if each.shape == x.shape]
    assert places
    for place in places:
        assert region.may_overwrite(place, 0)
        over = tuple(0 if i == place else None for i in range(len(expected)))
        found = region.writing_over(over)(given := x.clone(), targets)
        assert found[place] is given
        assert all(map(torch.equal, found, expected))


def test_a_target_that_is_no_class_is_an_error() -> None:
    region = region_of(cross_entropy, normal(4, 5), torch.arange(4))
    with pytest.raises(IndexError, match="1 targets are out of bounds: there are 5 classes"):
        region(normal(4, 5), torch.tensor([0, 1, 5, -100]))


ACTIVATIONS_AND_SUMS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: aten.gelu(x) * 2,
    lambda x: aten.gelu(x, approximate="tanh") * 2,
    lambda x: aten.silu(x) * x,
    lambda x: torch.tanh(x) + torch.sigmoid(x),
    lambda x: torch.where(x > 0.5, x, -x) / (x.abs() + 1),
    lambda x: aten._softmax(x * 0.3, -1, False),
    lambda x: aten._log_softmax(x * 3, -1, False),
    lambda x: (x * 2).sum([0, 1]),
]
"""That every language has."""


@pytest.mark.parametrize(
    "function",
    [
        *ACTIVATIONS_AND_SUMS,
        lambda x: torch.relu(x) - x.exp(),
        lambda x: torch.erf(x) + x**3,
        lambda x: x - x.mean(-1, keepdim=True),
    ],
)
def test_activations_and_sums(function: Any) -> None:
    check(function, normal(9, 5, 37, scale=2))


@pytest.mark.parametrize(
    "function",
    [
        gelu_backward_and_sum,
        lambda g, x: aten.gelu_backward(g, x, approximate="tanh") * 1.5,
        lambda g, x: aten.silu_backward(g, x) * x,
        lambda g, x: aten.tanh_backward(g, x) + aten.sigmoid_backward(g, x),
        lambda g, x: aten.threshold_backward(g, x, 0) * 2,
        lambda g, x: aten._softmax_backward_data(g, x, -1, torch.float32) * 0.3,
        lambda g, x: aten._log_softmax_backward_data(g, x, -1, torch.float32),
    ],
)
def test_gradients(function: Any) -> None:
    check(function, normal(70, 37, scale=2), normal(37, 70).t().contiguous(), least=5e-7)


def halves(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return normal(*shape, scale=scale).bfloat16()


@pytest.mark.parametrize(
    "function",
    [
        *ACTIVATIONS_AND_SUMS[1:6],
        lambda x: (x * x.neg() + x) * 0.1 - torch.full_like(x, 0.3),
        lambda x: torch.where(x > 0.1, x, -x) * (x.float() * 1.1).bfloat16(),
        lambda x: x.exp() + torch.tanh(x),
        lambda x: aten.gelu_backward(x * 0.5, x),
        lambda x: aten.threshold_backward(x, x - 1, 0) * 2,
        lambda x: aten._softmax_backward_data(x, x * 0.1, -1, torch.bfloat16) * 0.3,
    ],
)
def test_in_bfloat16_every_operator_rounds_once_as_atens_does(function: Any) -> None:
    """Rounded bit for bit alike, but where float32 before it is off by a unit near the middle of two numbers."""
    x = halves(9, 5, 37)
    region = region_of(function, x)
    assert region.runs_in("cpu") == CPP
    (found,), expected = region(x), function(x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    apart = (found.float() - expected.float()).abs()
    assert (apart == 0).float().mean() > 0.9
    assert bool((apart <= 2**-7 * expected.float().abs() + 2**-15 * expected.float().abs().max()).all())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 0.3) * x,
        lambda x: aten.add(x, x * x, alpha=0.3) * x,
        lambda x: aten.sub(x, x * x, alpha=0.3) * x,
        lambda x: aten.rsub(x, 0.7) * x,
        lambda x: aten.threshold_backward(x * x, x, 0.1) * 2,
        lambda x: torch.where(x <= 0.1, x * 0.3, -x),
    ],
)
def test_in_bfloat16_numbers_are_rounded_where_aten_rounds_them(function: Any) -> None:
    x = torch.cat([halves(64, 509), torch.full((64, 3), 0.1, dtype=torch.bfloat16)], 1)
    (found,) = region_of(function, x)(x)
    assert torch.equal(found, function(x))


def test_norms_in_bfloat16_are_within_one_rounding() -> None:
    x, y, weight, bias = halves(70, 33), halves(70, 33), halves(33), halves(33)
    _, mean, scale = aten.native_layer_norm(x, [33], weight, bias, 1e-5)
    for function, args in (
        (add_and_norm, (x, y, weight, bias)),
        (norm_backward, (halves(70, 33, scale=3), x, mean, scale, weight, bias, y)),
        (gelu_backward_and_sum, (y, x)),
        (lambda x: aten._log_softmax(x * 3, -1, False), (x,)),
        (lambda x: (x * 2).sum([0]), (x,)),
    ):
        check(function, *args, least=2**-8)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3.3895e38, 1e-40, -0.0])
def test_bfloat16_keeps_what_is_no_ordinary_number(value: float) -> None:
    """Among them the largest float32 that rounds to infinity, and a subnormal one."""
    x = torch.full((4, 6), value)
    (found,) = region_of(lambda x: (x + 0.0).bfloat16(), x)(x)
    assert found.isnan().all() if value != value else torch.equal(found, (x + 0.0).bfloat16())


def test_what_lies_otherwise_is_read_where_it_lies() -> None:
    turned = normal(4, 3, 2, 16).transpose(1, 2)
    check(lambda x, y, z: (x * y + z).contiguous(), turned, normal(2, 1, 16), normal(4, 2, 3, 16))


@few_examples(15)
@given(st.permutations(range(3)), st.permutations(range(3)), st.sampled_from([(3, 2, 5, 16), (2, 1, 5, 4)]))
def test_results_lie_as_atens_do(order: list[int], other: list[int], shape: tuple[int, ...]) -> None:
    """An operator on a transposed tensor gives one that lies as its argument does: as rotary embeddings have it."""

    def laid_out(order: list[int]) -> torch.Tensor:
        back = sorted(range(3), key=order.__getitem__)
        return normal(*(shape[i] for i in (*order, 3))).permute(*back, 3)

    x, y = laid_out(order), laid_out(other)
    check(lambda x, y, cos, z: (x * cos + y) * z, x, y, normal(shape[2], shape[3]), normal(shape[1], 1, 1))
    region = region_of(lambda x, y: x * 2 + y, x, y)
    assert may_overwrite(lower(region.body, RegionCppWriter), 0, 0)
    (found,) = region.writing_over((0,))(over := x.clone(), y)
    assert found is over
    assert torch.equal(found, x * 2 + y)


def test_what_an_operator_gives_otherwise_than_it_says_is_laid_out_anew() -> None:
    x, y = normal(6, 16), normal(6, 16)
    region = region_of(lambda x, y: x * 2 + y, x, y)
    torch.testing.assert_close(region(x.t().contiguous().t(), y)[0], x * 2 + y)


def test_sums_of_rows_have_room_whatever_the_defaults_are() -> None:
    x, gradient = normal(70, 37), normal(70, 37, scale=2)
    region = region_of(gelu_backward_and_sum, gradient, x)
    expected = region(gradient, x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = region(gradient, x)
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, found, expected))


def test_results_go_where_they_are_told_to() -> None:
    x, y, *others = normal(6, 16), normal(6, 16), normal(16), normal(16)
    region = region_of(add_and_norm, x, y, *others)
    out = torch.empty(6, 16)
    for language in (CPP, SLICES):
        found = region._function(language)(x, y, *others, outs=[None, out, None, None])
        assert found[1] is out
        torch.testing.assert_close(out, add_and_norm(x, y, *others)[1])


def test_a_result_lies_where_nothing_is_read_later() -> None:
    """A sum is stored before its row is read once more; what is normalised, in the last loop."""
    x, y, weight, bias = normal(70, 33), normal(70, 33), normal(33), normal(33)
    loops = lower(region_of(add_and_norm, x, y, weight, bias).body, RegionCppWriter)
    assert [[may_overwrite(loops, place, index) for index in range(4)] for place in range(4)] == [
        [False, False, False, False],
        [True, True, False, False],
        [False, False, False, False],
        [False, False, False, False],
    ]
    expanded = lower(region_of(lambda x, y: (x + y) * 2, x, normal(70, 1)).body, RegionCppWriter)
    assert may_overwrite(expanded, 0, 0)
    assert not may_overwrite(expanded, 0, 1)


def test_results_over_inputs_are_those_beside_them() -> None:
    x, y, weight, bias = normal(70, 33), normal(70, 33), normal(33), normal(33)
    _, mean, scale = aten.native_layer_norm(x, [33], weight, bias, 1e-5)
    args = [normal(70, 33, scale=3), x, mean, scale, weight, bias, y]
    region = region_of(norm_backward, *args)
    expected = region(*args)
    over = next(index for index in (0, 6) if region.may_overwrite(0, index))
    for language in (CPP, SLICES):
        writing = region.writing_over((over, None, None, None))
        given = [each.clone() for each in args]
        found = writing._function(language)(*given)
        assert found[0] is given[over]
        if language == CPP:
            assert all(map(torch.equal, found, expected))
        torch.testing.assert_close(found[0], expected[0])


def test_loops_count_what_they_compute() -> None:
    """A sum and a square for the moments, then the rest: what is cheap is computed in every loop that needs it."""
    x, y, weight, bias = normal(6, 8), normal(6, 8), normal(8), normal(8)
    first, second, third = 3, 5, 9  # loads are operations, too
    assert region_of(add_and_norm, x, y, weight, bias).operations == ((first + second + third) * 48, 0)
    _, functions = region_of(lambda x: aten._softmax(x, -1, False), x).operations or (0, 0)
    assert functions == 48  # exponentials are kept


def test_what_sums_of_rows_add_up_in_is_held_while_a_region_runs() -> None:
    """One row of float32 for each 32 rows."""
    region = region_of(gelu_backward_and_sum, normal(70, 48), normal(70, 48))
    assert region.workspace_bytes == 3 * 48 * 4
    b = Builder()
    x = b.input(Role.BATCH, "0", shape=[70, 48], dtype=torch.float32)
    both = b.backward(region, x, x)
    b.backward(operator.getitem, both, 0)
    total = b.backward(operator.getitem, both, 1)
    b.program.set_results([total], [None])
    results = 70 * 48 * 4 + 48 * 4
    assert dict(alive_bytes(b.program))[both] == results + region.workspace_bytes
    assert dict(alive_bytes(b.program))[b.program.output_node] == 48 * 4


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads a test sets is the number before again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_depend_on_no_number_of_threads() -> None:
    x, gradient = normal(3 * ROWS_TOGETHER + 5, 40), normal(3 * ROWS_TOGETHER + 5, 40, scale=2)
    region = region_of(gelu_backward_and_sum, gradient, x)
    found = []
    for num in (1, 2, 3):
        torch.set_num_threads(num)
        found.append(region(gradient, x))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_values_that_are_no_numbers_go_where_they_would() -> None:
    x = torch.tensor(
        [[0.0, float("nan"), 1.0, 2.0], [float("-inf"), 0.0, 1.0, float("inf")], [-200.0, 0.0, 200.0, 1e30]]
    )
    for function in (lambda x: aten._softmax(x + 1, -1, False), lambda x: torch.erf(x) + torch.tanh(x) + x.exp()):
        torch.testing.assert_close(region_of(function, x)(x)[0], function(x), equal_nan=True, rtol=2e-6, atol=1e-6)


@few_examples(15)
@given(st.lists(st.sampled_from([1, 2, 3, 5, 16]), min_size=2, max_size=4), st.data())
def test_any_broadcasting_is_followed(shape: list[int], data: st.DataObject) -> None:
    """Of loops alone, whatever they are printed in: each load has the strides of what is broadcast."""
    if torch.Size(shape).numel() < 2:
        return
    other = [size if data.draw(st.booleans()) else 1 for size in shape][data.draw(st.integers(0, 1)) :]
    x, y = torch.arange(torch.Size(shape).numel()).view(shape).float(), torch.rand(other)
    region = region_of(lambda x, y: x * 2 + y, x, y)
    try:
        loops = lower(region.body, RegionCppWriter)
    except CannotWriteError:
        return
    (of_y,) = (node for node, index in loops.inputs.items() if index == 1)
    expanded = y.expand(shape)
    sizes, strides = loops.sizes, loops.strides[of_y]
    assert torch.equal(y.as_strided(sizes, strides).reshape(shape), expanded)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: aten._softmax(x, 0, False) * 2, "rows are not those of the last dimension"),
        (lambda x: aten._softmax(x, -1, False).view(3, 4, 2).sum(-1), "rows of"),
        (lambda x: torch.cumsum(x, 0) * 2, "there is no aten.cumsum"),
        (lambda x: (x * 2)[:, 1:] + 1, "of what is not in memory"),
        (lambda x: x.double().exp() * 2, "there is no aten.exp"),
        (lambda x: torch.sinh(x) * 2, "there is no aten.sinh"),
    ],
)
def test_what_loops_have_no_words_for_is_refused(function: Any, reason: str) -> None:
    region = region_of(function, normal(3, 8))
    assert region.runs_in("cpu") == SLICES
    with pytest.raises(CannotWriteError, match=reason):
        lower(region.body, RegionCppWriter)
    torch.testing.assert_close(region(normal(3, 8))[0], function(normal(3, 8)))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: (x * 1.0).sum(-1, dtype=torch.float64), "adds up in torch.float64"),
        (lambda x: (x > torch.full((), 0.1, dtype=torch.float64)) * x, "compares dtypes that differ"),
        (lambda x: ((x.mean(-1, keepdim=True) * 1.0).expand(4, 6).sum([0]), x * 2), "adds up"),
        (lambda x: torch.full_like(x, 2**53 + 1, dtype=torch.int64), "there is no aten.full_like.default"),
    ],
)
def test_what_would_be_another_number_is_not_written(function: Any, says: str) -> None:
    with pytest.raises(CannotWriteError, match=says):
        lower(region_of(function, torch.ones(4, 6)).body, RegionCppWriter)


def test_zeros_of_either_sign_are_told_apart() -> None:
    positive, negative = region_of(lambda x: (x / 0.0, x / -0.0), torch.ones(4, 6))(torch.ones(4, 6))
    assert (positive == torch.inf).all()
    assert (negative == -torch.inf).all()
