"""On a GPU: steps equal to eager's, memory as predicted, also on the host, and nothing that waits for the device.

Skipped without one.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from tests.models import CASES
from tests.optimizers import OPTIMIZERS, tensors_of
from tests.reference import assert_equal, train_like_eager
from tests.test_planner import Stack, rows
from zgraph.codegen.kernel import SLICES, TRITON, Kernel
from zgraph.codegen.region import Region
from zgraph.config import WAITED_FOR
from zgraph.footprint import spilled_bytes, state_on
from zgraph.host import Cuda, Host
from zgraph.machines import preset_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("case", ["gpt", "gpt_dropout", "awkward", "in_place", "recurrent", "experts", "resnet"])
def test_a_step_is_equal_to_eager(case: str, zero: int) -> None:
    train_like_eager(case, device="cuda", zero=zero, num_steps=3)


@pytest.mark.parametrize(
    "optimizer", ["sgd_foreach", "adamw", "adamw_foreach", "adamw_fused", "adafactor", "lamb", "muon_and_adam", "lion"]
)
def test_every_kind_of_update_is_equal_to_eager(optimizer: str) -> None:
    train_like_eager("gpt", device="cuda", optimizer=optimizer, zero=3, num_steps=3)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"clip_norm": 0.1},
        {"recompute": "blocks"},
        {"recompute": 1.0},
        {"bucket_bytes": 4096, "check_memory": True},
    ],
    ids=str,
)
def test_options_are_equal_to_eager(options: dict[str, Any]) -> None:
    train_like_eager("gpt", device="cuda", zero=3, num_steps=3, **options)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1, "ema": 0.9}], ids=str)
def test_an_update_in_triton_computes_what_its_operators_do(options: dict[str, Any]) -> None:
    states = []
    for kernels in ("update", "eager"):
        case = CASES["gpt"]
        model = case.model().to(GPU)
        zgraph.compile(model, optimizer=OPTIMIZERS["adamw_fused"](model), kernels=kernels, **options)
        for batch in case.batches(3):
            model.train_step(*batch.to("cuda").args)
        states.append(model.state_dict())
        found = [node.target for node in model.program.graph.nodes if isinstance(node.target, Kernel)]
        assert {key for kernel in found for key in kernel._functions} == {TRITON if kernels == "update" else SLICES}
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_step_with_regions_is_one_without_but_for_rounding() -> None:
    states = []
    for kernels in ("zgraph", "update"):
        case = CASES["gpt"]
        model = case.model().to(GPU)
        zgraph.compile(model, optimizer=OPTIMIZERS["sgd_foreach"](model), kernels=kernels)
        for batch in case.batches(3):
            model.train_step(*batch.to("cuda").args)
        states.append(model.state_dict())
        found = [node.target for node in model.program.graph.nodes if isinstance(node.target, Region)]
        assert {key for region in found for key in region._functions} == ({TRITON} if kernels == "zgraph" else set())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_ranks_simulated_on_a_gpu_train_like_one_process() -> None:
    case = CASES["gpt"]
    batches = [batch.to("cuda") for batch in case.batches(2, 8, dtype=torch.float64)]
    model, reference = (case.model(torch.float64).to(GPU) for _ in range(2))
    ranks = zgraph.simulate_ranks(model, OPTIMIZERS["adamw"](model), world_size=4, zero=3)
    optimizer = OPTIMIZERS["adamw"](reference)
    for batch in batches:
        loss = ranks.train_step([batch.part(rank, 4).args for rank in range(4)])
        optimizer.zero_grad()
        expected = reference(*batch.args)
        expected.backward()
        optimizer.step()
        assert_equal({"loss": loss}, {"loss": expected.detach()}, "loss")
    assert_equal(ranks.state_dict(), dict(reference.state_dict()), "after two steps")


def test_a_step_is_measured_by_events_of_the_device() -> None:
    case = CASES["gpt"]
    model = case.model().to(GPU)
    zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), zero=3)
    batches = [batch.to("cuda") for batch in case.batches(6)]
    for batch in batches[:3]:
        model.train_step(*batch.args)
    model.profile(steps=3)
    for batch in batches[3:]:
        model.train_step(*batch.args)
    (program,) = model.report().document["programs"]
    measured = program["measured"]
    calls = [i for i, node in enumerate(model.program.graph.nodes) if node.op == "call_function"]
    assert measured["position"] == calls
    assert 0 < measured["end_s"][0] <= measured["end_s"][-1] in measured["steps_s"]
    assert measured["end_s"] == sorted(measured["end_s"])


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """What a test says of waiting holds for it alone."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": "blocks"},
        {"accumulate": 2},
        {"kernels": "zgraph"},
        {"offload": {"optimizer": "host", "parameters": "host"}},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_waiting")
def test_a_step_never_waits_for_the_device(options: dict[str, Any]) -> None:
    case = CASES["gpt"]
    model = case.model().to(GPU)
    zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), zero=3, **options)
    batches = [batch.to("cuda") for batch in case.batches(4)]
    for batch in batches[:3]:
        model.train_step(*batch.args)
    torch.cuda.set_sync_debug_mode("error")
    model.train_step(*batches[3].args)


@pytest.mark.parametrize("options", [{}, {"recompute": "blocks"}, {"precision": "bf16"}, {"zero": 3}], ids=str)
def test_tensors_of_a_step_take_what_is_predicted(options: dict[str, Any]) -> None:
    torch.nn.functional.linear(torch.ones(8, 8, device=GPU), torch.ones(8, 8, device=GPU))  # cuBLAS takes a workspace
    gc.collect()  # what an earlier test left must not end in the middle of this one
    before = torch.cuda.memory_allocated(GPU)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(4)))
    model.to(GPU)
    zgraph.compile(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        loss=lambda output, _: output.square().mean(),
        **options,
    )
    x = torch.randn(8192, 1024, device=GPU)  # so much that what cuBLAS works in counts for nothing
    for _ in range(3):
        model.train_step(x)
    torch.cuda.reset_peak_memory_stats(GPU)
    model.train_step(x)
    measured = torch.cuda.max_memory_allocated(GPU) - before
    predicted = model.plan.chosen.peak_bytes
    assert abs(measured / predicted - 1) < 0.02, f"{measured:,} bytes, {predicted:,} predicted"


def needs_preset() -> None:
    """Skip a test of what goes by a machine's seconds where they are not known."""
    properties = torch.cuda.get_device_properties(GPU)
    if preset_of(properties.name, properties.total_memory) is None:
        pytest.skip(f"{properties.name} has no preset")


def test_memory_auto_takes_what_the_gpu_has_free() -> None:
    needs_preset()
    model = Stack().to(GPU)
    zgraph.compile(model, optimizer=torch.optim.AdamW(model.parameters()), memory="auto")
    losses = [model.train_step(*rows(device="cuda")).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model.plan.fits


def layers(num: int = 4) -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)) for _ in range(num))
    return nn.Sequential(*blocks).to(GPU)


def compiled_layers(**options: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"loss": lambda output, _: output.square().mean(), "bucket_bytes": "1MiB", **options}
    return zgraph.compile(model, optimizer, **options), optimizer


@pytest.mark.parametrize(
    "options",
    [{}, {"zero": 3, "bucket_bytes": "16MiB"}, {"precision": "bf16"}, {"accumulate": 2}, {"kernels": "zgraph"}],
    ids=str,
)
def test_gradients_are_made_in_the_flat_gradient_bit_for_bit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [torch.randn(256, 512, device=GPU) for _ in range(3)]
    options = {"bucket_bytes": "8MiB", **options}
    model, apart = (compiled_layers(**options)[0] for _ in range(2))
    losses = [model.train_step(batch) for batch in batches]
    assert model.stats()["copied_bytes"] == 0
    monkeypatch.setattr("zgraph.placement.SMALLEST_BYTES", 2**40)
    for batch, loss in zip(batches, losses, strict=True):
        assert torch.equal(apart.train_step(batch), loss)
    assert apart.stats()["copied_bytes"] > 2**24
    assert all(torch.equal(value, apart.state_dict()[name]) for name, value in model.state_dict().items())


SPILLED = {"activations": WAITED_FOR["host"]}
STATE = {"optimizer": "host", "parameters": "host"}
ON_DISK = {"optimizer": "disk", "parameters": "host", "activations": WAITED_FOR["disk"]}


@pytest.mark.parametrize(
    "options", [{}, {"zero": 3}, {"accumulate": 2}, {"precision": "bf16", "clip_norm": 0.1}], ids=str
)
@pytest.mark.parametrize(
    "offload", [{"optimizer": "host"}, {"parameters": "host"}, STATE, SPILLED, {**STATE, **SPILLED}], ids=" and ".join
)
def test_what_lies_on_the_host_trains_bit_for_bit_as_on_the_gpu(
    offload: dict[str, str], options: dict[str, Any]
) -> None:
    if "activations" in offload:
        needs_preset()
    ahead = {"load_ahead": True} if "optimizer" in offload and "activations" not in offload else {}
    torch.manual_seed(1)
    batches = [torch.randn(2048, 512, device=GPU) for _ in range(6)]
    (model, optimizer), (plain, theirs) = (
        compiled_layers(offload=offload, **ahead, **options),
        compiled_layers(**options),
    )
    for batch in batches:
        assert torch.equal(model.train_step(batch), plain.train_step(batch))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    for found, expected in zip(tensors_of(optimizer).values(), tensors_of(theirs).values(), strict=True):
        assert torch.equal(found, expected)
    stats = model.stats()
    assert stats["host_bytes"] == sum(state_on("host", model.program).values())
    assert (stats["host_bytes"] > 0) == ("optimizer" in offload or "parameters" in offload)
    assert (spilled_bytes(model.program, "host") > 0) == ("activations" in offload)


@pytest.mark.parametrize(
    "options", [{}, {"zero": 3}, {"accumulate": 2}, {"precision": "bf16", "clip_norm": 0.1}], ids=str
)
@pytest.mark.parametrize("gradients", [{}, {"gradients": "host"}], ids=str)
def test_the_hosts_processors_update_as_the_gpu_does(gradients: dict[str, str], options: dict[str, Any]) -> None:
    if gradients and "accumulate" not in options:
        pytest.skip("without micro-batches there are no sums of gradients")
    (model, optimizer), (plain, theirs) = (
        compiled_layers(offload={**STATE, **gradients}, host_updates=True, **options),
        compiled_layers(**options),
    )
    for batch in [torch.randn(2048, 512, device=GPU) for _ in range(6)]:
        torch.testing.assert_close(model.train_step(batch), plain.train_step(batch))
    on_host = [kernel.language for kernel in model.kernels() if kernel.name.endswith("on_host")]
    assert len(on_host) >= len(model.program.layout.buckets)
    assert "C++" in on_host
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    for found, expected in zip(tensors_of(optimizer).values(), tensors_of(theirs).values(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offload", [ON_DISK, {"optimizer": "host", "parameters": "disk"}], ids=str)
def test_what_lies_on_a_disk_trains_bit_for_bit_as_on_the_gpu(offload: dict[str, str]) -> None:
    if "activations" in offload:
        needs_preset()
    batches = [torch.randn(2048, 512, device=GPU) for _ in range(4)]
    (model, optimizer), (plain, theirs) = compiled_layers(offload=offload), compiled_layers()
    for batch in batches:
        assert torch.equal(model.train_step(batch), plain.train_step(batch))
    for found, expected in zip(tensors_of(optimizer).values(), tensors_of(theirs).values(), strict=True):
        assert torch.equal(found, expected)
    stats = model.stats()
    for tier in ("host", "disk"):
        assert stats[f"{tier}_bytes"] == sum(state_on(tier, model.program).values()) > 0
    assert (spilled_bytes(model.program, "disk") > 0) == ("activations" in offload)


def test_gradients_are_added_up_on_the_host_bit_for_bit_as_on_the_gpu() -> None:
    offload = {**STATE, "gradients": "host"}
    model, plain = (compiled_layers(accumulate=4, **options)[0] for options in ({"offload": offload}, {}))
    batch = torch.randn(256, 512, device=GPU)
    for _ in range(3):
        assert torch.equal(model.train_step(batch), plain.train_step(batch))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_state_on_the_host_stays_the_users() -> None:
    (model, optimizer), (plain, _) = compiled_layers(offload=STATE), compiled_layers()
    batch = torch.randn(256, 512, device=GPU)
    for each in (model, plain):
        each.train_step(batch)
    saved, progress = model.state_dict(), optimizer.state_dict()
    copied = copy.deepcopy(model)
    expected = [plain.train_step(batch) for _ in range(2)]
    assert all(torch.equal(model.train_step(batch), loss) for loss in expected)
    model.load_state_dict(saved)
    optimizer.load_state_dict(progress)
    assert all(torch.equal(model.train_step(batch), loss) for loss in expected)
    assert all(torch.equal(copied.train_step(batch), loss) for loss in expected)
    with torch.no_grad():
        assert torch.equal(model(batch), plain(batch))


def test_state_on_the_host_takes_no_memory_of_the_gpu() -> None:
    """Between steps there are batches, step counts and what libraries keep; in a step, what is predicted."""
    torch.nn.functional.linear(torch.ones(8, 8, device=GPU), torch.ones(8, 8, device=GPU))  # cuBLAS takes a workspace
    gc.collect()
    before = torch.cuda.memory_allocated(GPU)
    model, _ = compiled_layers(offload=STATE)
    x = torch.randn(256, 512, device=GPU)
    for _ in range(3):
        model.train_step(x)
    assert torch.cuda.memory_allocated(GPU) - before < x.nbytes + 2**24
    torch.cuda.reset_peak_memory_stats(GPU)
    model.train_step(x)
    measured = torch.cuda.max_memory_allocated(GPU) - before
    predicted = model.plan.chosen.peak_bytes
    assert abs(measured / predicted - 1) < 0.1, f"{measured:,} bytes, {predicted:,} predicted"


def test_copies_come_behind_what_is_computed_before_and_computing_behind_copies() -> None:
    """On a device that is behind: what is told to it is not done when it is told."""
    host = Host(GPU, Cuda(GPU))
    stored = host.allocate(2**22, torch.float32)
    assert stored._memory.is_pinned()
    values = [torch.full((2**22,), float(i), device=GPU) for i in range(3)]
    work = torch.zeros_like(values[0])
    for value in values:
        torch.cuda._sleep(10**8)
        work.copy_(value)
        going = stored.store(work)
        going.wait()
        work.fill_(-1.0)  # over what was still on its way, were computing not held up
        coming = stored.load(out=work)
        assert coming.wait() is work
        assert torch.equal(work, value)
        assert torch.equal(stored.read(), value)
    memory = stored._memory
    del stored, going, coming, host
    gc.collect()
    assert not memory.is_pinned()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 1000, 1024, 1025, 5003, 32768, 50257])
def test_softmaxes_and_their_gradients_are_the_same_over_an_operand(width: int, dtype: torch.dtype) -> None:
    """What ``zgraph.ops.may_overwrite`` takes from reading their kernels."""
    aten = torch.ops.aten
    backward = {torch.log_softmax: aten._log_softmax_backward_data, torch.softmax: aten._softmax_backward_data}
    forward = {torch.log_softmax: aten._log_softmax, torch.softmax: aten._softmax}
    for function, op in backward.items():
        (name,) = (argument.name for argument in op.out._schema.arguments if argument.is_out)
        for height in (3, 257):
            gradient, x = (torch.randn(height, width, device=GPU, dtype=dtype) for _ in range(2))
            result = function(x, 1)
            over = x.clone()
            forward[function].out(over, 1, False, out=over)
            assert torch.equal(over, result)
            expected = op.default(gradient, result, 1, dtype)
            for index in (0, 1):
                given = [gradient.clone(), result.clone()]
                op.out(*given, 1, dtype, **{name: given[index]})
                assert torch.equal(given[index], expected)
