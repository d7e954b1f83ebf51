"""Vectors on their way in 8 bits: off by no more than is said, and never finite where they were not."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.programs import few_examples
from zgraph import quantized
from zgraph.packed import BLOCK
from zgraph.quantized import dequantize, mean_of_quantized, quantize, quantized_numel

SMALLEST = 2.0**-149


def vectors(num_blocks: int = 4) -> st.SearchStrategy[Tensor]:
    """Blocks of many scales, down to the smallest numbers, with zeros and equal elements among them."""

    def made(seed: int, spread: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_blocks, BLOCK, generator=generator)
        x *= (spread * torch.randn(x.shape, generator=generator)).exp()
        x *= 10.0 ** -torch.randint(0, 45, (num_blocks, 1), generator=generator)
        x[0] *= seed % 3 - 1  # a block of zeros, now and then
        return x.view(-1)

    return st.builds(made, st.integers(0, 999), st.sampled_from([0.0, 1.0, 5.0]))


def largest(x: Tensor) -> Tensor:
    """Of each element's block."""
    return x.view(-1, BLOCK).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1).double()


@few_examples(100)
@given(vectors())
def test_an_element_is_off_by_a_254th_of_the_largest_of_its_block_at_most(x: Tensor) -> None:
    data = quantize(x)
    assert len(data) == quantized_numel(len(x)) == len(x) * 65 // 64
    y = dequantize(data)
    assert ((x.double() - y.double()).abs() <= largest(x) * (1 / 254 + 2**-20) + SMALLEST).all()
    exact = (x == 0) | (x.double().abs() == largest(x))
    assert torch.equal(x[exact], y[exact])
    assert torch.equal(quantize(y), data), "quantising again changes nothing"
    assert torch.equal(dequantize(data, torch.bfloat16), y.bfloat16())


@few_examples(20)
@given(vectors())
def test_parts_may_be_cut_out_and_put_together_at_blocks_and_how_much_is_done_at_once_is_not_seen(x: Tensor) -> None:
    parts = [quantize(part) for part in x.chunk(4)]
    assert torch.equal(torch.cat(parts), quantize(x))
    with mock.patch.object(quantized, "_BLOCKS_AT_ONCE", 3):
        assert torch.equal(quantize(x), torch.cat(parts))
        assert torch.equal(dequantize(torch.cat(parts)), dequantize(quantize(x)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_becomes_nan_and_no_other_does(value: float) -> None:
    x = torch.ones(3 * BLOCK)
    x[BLOCK + 3] = value
    y = dequantize(quantize(x)).view(3, BLOCK)
    assert y[1].isnan().all()
    assert torch.equal(y[0], x[:BLOCK])
    assert torch.equal(y[2], x[:BLOCK])


@few_examples(50)
@given(st.lists(vectors(2), min_size=1, max_size=4))
def test_a_mean_is_off_by_the_mean_of_what_each_is_off_by(each: list[Tensor]) -> None:
    found = mean_of_quantized(torch.cat([quantize(x) for x in each]), len(each))
    exact = torch.stack(each).double().mean(0)
    bound = torch.stack([largest(x) for x in each]).mean(0)
    assert ((found.double() - exact).abs() <= bound * (1 / 254 + 2**-20) + SMALLEST).all()
    total = dequantize(quantize(each[0]))
    for x in each[1:]:
        total += dequantize(quantize(x))
    assert torch.equal(found, total / len(each)), "added up in rank order"
