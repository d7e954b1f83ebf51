"""Regions that Inductor compiles: what they compute, when they are chosen, and what happens where it fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.calibrations import made_up
from tests.programs import network
from tests.test_fuse import lowered, trained
from tests.test_region import add_and_norm, as_list, normal, region_of
from zgraph.codegen import inductor, library
from zgraph.codegen.inductor import InductorRegion, can_write
from zgraph.codegen.kernel import INDUCTOR, SLICES
from zgraph.codegen.listing import ATEN
from zgraph.codegen.region import Region
from zgraph.errors import OptionError
from zgraph.hardware import LoopRates

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")

MACHINE = made_up().hardware()


def inductors(function: Any, *args: Any) -> InductorRegion:
    plain = region_of(function, *args)
    return InductorRegion(plain.name, plain.body, plain.num_inputs, plain.writes, is_compiled=True)


@pytest.mark.slow
def test_a_region_stores_what_its_calls_give_where_it_is_told_to() -> None:
    x, y, *others = normal(6, 16), normal(6, 16), normal(16), normal(16)
    region = inductors(add_and_norm, x, y, *others)
    assert region.runs_in("cpu") == INDUCTOR
    out = torch.empty(6, 16)
    found = region(x, y, *others, outs=[None, out, None, None])
    assert found[1] is out
    for mine, theirs in zip(found, as_list(add_and_norm(x, y, *others)), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs)
    assert "cpp_fused" in region.text(INDUCTOR)


@pytest.mark.slow
def test_results_lie_as_atens_do() -> None:
    turned = normal(4, 3, 2, 16).transpose(1, 2)
    (found,) = inductors(lambda x, y: torch.sin(x) * y, turned, normal(3, 16))(turned, normal(3, 16))
    assert found.stride() == turned.stride()
    torch.testing.assert_close(found, torch.sin(turned) * normal(3, 16))


def test_single_numbers_and_other_devices_are_not_for_inductor() -> None:
    assert can_write(region_of(lambda x: (x * 2).exp(), torch.ones(4)).body, "cpu")
    assert not can_write(region_of(lambda x: (x * 2).exp(), torch.ones(4)).body, "cuda")
    assert not can_write(region_of(lambda x: (x * 2).exp(), torch.ones(())).body, "cpu")


@pytest.mark.slow
def test_a_step_with_inductors_regions_is_one_without_but_for_rounding() -> None:
    (fused, losses), (plain, expected) = trained(kernels="inductor"), trained()
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    listed = [each for each in fused.kernels() if each.name.startswith("fused")]
    assert {each.language for each in listed} - {ATEN} == {INDUCTOR}
    assert {each.why for each in listed if each.language == INDUCTOR} == {"asked for"}
    assert fused.explain()
    with pytest.raises(OptionError, match=r"kernels='inductor', of which .* cannot be exported yet"):
        fused.export("unused", batch=(torch.zeros(40, 16),))


def test_where_inductor_fails_regions_run_call_by_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("there is no compiler for it")

    monkeypatch.setattr(inductor, "_compile", fail)
    model, losses = trained(kernels="inductor")
    assert {each.language for each in model.kernels()} - {ATEN} == {SLICES}
    assert losses == trained()[1]
    assert "Inductor cannot compile fused" in caplog.text
    assert "there is no compiler for it" in caplog.text


def test_inductor_gets_what_zgraph_has_no_words_for_where_it_makes_up_for_compiling() -> None:
    captured = network([("wide", 0), ("sin", 0), ("sin", 0)], rows=64, dtype=torch.float32)
    slow = replace(MACHINE, launch_s=1e-2, loops=LoopRates(1e12, 1e12, launch_s=1e-2))
    fast = replace(MACHINE, launch_s=1e-5, loops=LoopRates(1e12, 1e12, launch_s=1e-5))

    def chosen(hardware: Any, kernels: str = "auto") -> list[str]:
        program = lowered(captured, kernels, hardware=hardware)
        targets = [node.target for node in program.graph.nodes if isinstance(node.target, Region)]
        return [target.name for target in targets if isinstance(target, InductorRegion)]

    assert chosen(slow)
    assert chosen(None, "inductor")
    assert not chosen(None, "zgraph")
    assert not chosen(fast)
    kept = [each for each in lowered(captured, "auto", hardware=fast).weighed if not each.is_kernel]
    assert kept
    assert all(each.kernel_s < each.calls_s < each.kernel_s + each.compiling_s for each in kept)  # type: ignore[operator]
