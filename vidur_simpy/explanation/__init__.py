"""Why a result is as it is: where requests spend their time, and what limits the run."""

from __future__ import annotations

from vidur_simpy.explanation.bottleneck import Bottleneck
from vidur_simpy.explanation.methods import Explanations
from vidur_simpy.explanation.request import Explanation
from vidur_simpy.explanation.saturation import Saturation

__all__ = ["Bottleneck", "Explanation", "Explanations", "Saturation"]
