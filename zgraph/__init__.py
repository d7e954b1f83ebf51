"""zgraph: train models that do not fit, by compiling the whole training step as one graph."""

from zgraph.batches import MicroBatches
from zgraph.compiler import compile  # noqa: A004
from zgraph.config import Config
from zgraph.errors import (
    CaptureError,
    OptimizerError,
    OptionError,
    RankError,
    StateError,
    VerifyError,
    ZgraphError,
)
from zgraph.pipeline import Pass
from zgraph.program import Program, Stage
from zgraph.simulate import SimulatedRanks, simulate_ranks
from zgraph.terms import Axiom

__all__ = [
    "Axiom",
    "CaptureError",
    "Config",
    "MicroBatches",
    "OptimizerError",
    "OptionError",
    "Pass",
    "Program",
    "RankError",
    "SimulatedRanks",
    "Stage",
    "StateError",
    "VerifyError",
    "ZgraphError",
    "compile",
    "simulate_ranks",
]
