"""The benchmarks run; what they measure is for people to read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import iteration_rate


def test_iteration_rate_measures_every_workload() -> None:
    """A tiny run gives every figure for every workload."""
    figures = iteration_rate.run(num_requests=30, repetitions=1)
    assert len(figures) == 1 + 2 * len(iteration_rate.SCHEDULERS)
    assert all(value > 0 for row in figures.values() for value in row.values())
    assert figures["sarathi, 8 decoding"]["iterations"] == pytest.approx(30)
