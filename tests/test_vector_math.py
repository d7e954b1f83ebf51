"""Exponentials and the like in C++, beside those of float64."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from zgraph.codegen import library
from zgraph.codegen.vector_math import NAMES, SOURCE, ULPS

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")

LOOP = """\
extern "C" void all_{0}(long n, const float *x, float *y) {{
    #pragma omp simd
    for (long i = 0; i < n; i++) y[i] = {0}(x[i]);
}}
"""


@pytest.mark.parametrize("packet", ULPS, ids=str)
def test_results_are_as_near_to_exact_ones_as_is_said(packet: Any) -> None:
    """On every 4099th number of float32, of either sign, and what is none."""
    loops = "".join(LOOP.format(NAMES[each]) for each in ULPS)
    function = getattr(library.load(SOURCE + loops), f"all_{NAMES[packet]}")
    x = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 88.7, -103.9])])
    y = torch.empty_like(x)
    function(ctypes.c_long(len(x)), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    exact = packet(x.double())
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.float().isinf())
    is_normal = exact.isfinite() & (exact.abs() > 2.0**-126) & exact.float().isfinite()
    ulp = torch.exp2(exact[is_normal].abs().log2().floor() - 23)
    assert ((y.double() - exact)[is_normal].abs() / ulp).max() <= ULPS[packet]
    is_tiny = exact.abs() <= 2.0**-126
    assert (y.double() - exact)[is_tiny].abs().max() <= 2.0**-149


def test_what_lies_below_a_number_is_off_by_little_beside_one() -> None:
    function = library.load(SOURCE + LOOP.format("normal_below")).all_normal_below
    x = torch.cat([torch.linspace(-40, 40, 200_001), torch.tensor([-1e30, 1e30, float("nan")])])
    y = torch.empty_like(x)
    function(ctypes.c_long(len(x)), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    error = (y.double() - torch.special.ndtr(x.double())).abs()
    assert error[:-1].max() < 8e-8
    assert (error * x.abs())[:200_001].max() < 3e-7  # so is GELU
    assert y[-3:].tolist()[:2] == [0.0, 1.0]
    assert y[-1].isnan()
