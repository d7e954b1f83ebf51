"""What kernels refuse although shape inference accepts it: found while capturing, not in the middle of a step.

torch's fake kernels do not look at every dtype. A batch of float64 would pass through the trace of a float32 model and
stop the running step, with some collectives done and others not.
"""

from __future__ import annotations

import torch
from torch import fx

from zgraph.errors import CaptureError, quoted
from zgraph.program import describe, target_name

aten = torch.ops.aten

_ONE_DTYPE = frozenset(
    {
        aten.mm.default, aten.addmm.default, aten.mv.default, aten.linear.default, aten.index_add.default,
        aten.index_put.default, aten._prelu_kernel.default, aten.nll_loss_forward.default,
        aten.binary_cross_entropy.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_flash_attention.default,
    }
)  # fmt: skip
"""Their floating-point arguments must have one dtype."""

_NORMS = frozenset({aten.native_layer_norm.default, aten.native_group_norm.default, aten.native_batch_norm.default})
"""The same, except that half-precision inputs go with float32 weights."""

_HALF = frozenset({torch.float16, torch.bfloat16})


def check_operands(graph: fx.Graph) -> None:
    """Refuse calls that their kernels will refuse.

    Raises:
        CaptureError: with the operator, its arguments and the user's line.
    """
    for node in graph.nodes:
        if node.target not in _ONE_DTYPE and node.target not in _NORMS:
            continue
        vals = [source.meta.get("val") for source in node.all_input_nodes]
        floats = [val for val in vals if isinstance(val, torch.Tensor) and val.is_floating_point()]
        dtypes = {val.dtype for val in floats}
        if node.target in _NORMS and dtypes - _HALF == {torch.float32}:
            continue
        if len(dtypes) > 1:
            raise CaptureError(
                f"{target_name(node.target)} takes arguments of one dtype, not {' and '.join(map(describe, floats))}",
                where=quoted(node.meta["origin"].source) if "origin" in node.meta else None,
                fix="convert the batch to the model's dtype, e.g. x.float() for an array of numpy's, which is float64",
            )
