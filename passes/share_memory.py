"""Read parameters where the ranks of one host have them, instead of gathering copies of them."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph import ops
from zgraph.pipeline import Pass
from zgraph.program import Program, Stage
from zgraph.sharing import Reads


@dataclass(frozen=True)
class ShareMemory(Pass):
    """Read parameters where the ranks of one host have them, instead of gathering copies of them.

        w = wait(all_gather(p))    ->    w = wait(share(p))

    A bucket's parts lie one after the other in memory that all ranks map (``zgraph.shared_memory``), so that the whole
    takes no more memory and no copy: only word that every rank has written its part. Updates come behind a collective
    in which all ranks take part after they have read the bucket, as the reduction of its gradients; where there is
    none (``zgraph.sharing``), and of what is computed before it is sent, a gather stays a gather.
    """

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        reads = Reads(program)
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            if reads.why_not(start) is None:
                start.target = ops.share
