"""How long a batch takes on a pipeline stage: the shape of such a model, and the known ones.

A model is any object with ``for_replica(deployment)`` that returns a function of a batch and a
stage, or that function itself; see :func:`stage_time_of`.
"""

from __future__ import annotations

from vidur_simpy.execution_time.aiconfigurator import AIConfigurator
from vidur_simpy.execution_time.calibrated import Calibrated
from vidur_simpy.execution_time.interface import (
    BatchCounts,
    ExecutionTime,
    HasDecodeTimes,
    HasOperators,
    StageTime,
    stage_time_of,
)
from vidur_simpy.execution_time.linear import Linear
from vidur_simpy.execution_time.profile import Profile
from vidur_simpy.execution_time.roofline import Roofline, RooflineFactors

__all__ = [
    "EXECUTION_TIMES",
    "AIConfigurator",
    "BatchCounts",
    "Calibrated",
    "ExecutionTime",
    "HasDecodeTimes",
    "HasOperators",
    "Linear",
    "Profile",
    "Roofline",
    "RooflineFactors",
    "StageTime",
    "stage_time_of",
]

EXECUTION_TIMES: dict[str, type[ExecutionTime]] = {
    "aiconfigurator": AIConfigurator,
    "calibrated": Calibrated,
    "linear": Linear,
    "profile": Profile,
    "roofline": Roofline,
}
"""The models by the name that configurations use."""
