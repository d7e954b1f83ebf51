"""What a step says of its kernels."""

from __future__ import annotations

import pytest
import torch

import zgraph
from zgraph.codegen import library
from zgraph.codegen.kernel import CPP, SLICE, SLICES
from zgraph.codegen.library import find_compiler


def trained(width: int) -> zgraph.compiler.CompiledModule:
    model = torch.nn.Linear(width, width, bias=False)
    compiled: zgraph.compiler.CompiledModule = zgraph.compile(
        model, optimizer=torch.optim.SGD(model.parameters(), momentum=0.9), loss=lambda y, _: y.square().mean()
    )
    for _ in range(2):
        compiled.train_step(torch.ones(2, width))
    return compiled


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
def test_a_kernel_says_what_it_computes_and_moves() -> None:
    (found,) = trained(300).kernels()
    num_bytes = 300 * 300 * 4
    assert (found.name, found.language, found.num_calls) == ("update_bucket0", CPP, 1)
    assert (found.read_bytes, found.written_bytes) == (3 * num_bytes, 2 * num_bytes)
    assert [operator.split(" = ")[1].split("(")[0] for operator in found.operators] == [
        "aten.mul.Tensor", "aten.add.Tensor", "aten.add.Tensor",
    ]  # fmt: skip
    assert found.source.startswith('extern "C" void kernel_')


def test_without_a_compiler_it_says_how_often_aten_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "there is no C++ compiler")
    (found,) = trained(300).kernels()
    assert (found.language, found.num_calls) == (SLICES, 3 * -(-300 * 300 // SLICE))
    assert found.source.startswith("def kernel(")
