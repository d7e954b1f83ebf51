"""zgraph: train models that do not fit, by compiling the whole training step as one graph."""

from zgraph.batches import MicroBatches
from zgraph.bisection import bisect
from zgraph.compiler import compile  # noqa: A004
from zgraph.config import Config
from zgraph.errors import (
    BudgetError,
    CaptureError,
    DiskError,
    HostError,
    OptimizerError,
    OptionError,
    RankError,
    StateError,
    VerifyError,
    ZgraphError,
)
from zgraph.hardware import Hardware
from zgraph.pipeline import Pass
from zgraph.planner import plan
from zgraph.plans import Plan
from zgraph.program import Program, Stage
from zgraph.progress import Progress
from zgraph.saving import save
from zgraph.simulate import SimulatedRanks, simulate_ranks
from zgraph.terms import Axiom
from zgraph.which_hardware import find_hardware

__all__ = [
    "Axiom",
    "BudgetError",
    "CaptureError",
    "Config",
    "DiskError",
    "Hardware",
    "HostError",
    "MicroBatches",
    "OptimizerError",
    "OptionError",
    "Pass",
    "Plan",
    "Program",
    "Progress",
    "RankError",
    "SimulatedRanks",
    "Stage",
    "StateError",
    "VerifyError",
    "ZgraphError",
    "bisect",
    "compile",
    "find_hardware",
    "plan",
    "save",
    "simulate_ranks",
]
