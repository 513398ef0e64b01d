"""The benchmarks run; what they measure is for people to read."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import engines
import execution_time_rate
import sweep_rate


def test_engines_measures_both() -> None:
    """A tiny run gives figures for both engines; many requests take few bytes each."""
    made = {name: make for name, make in engines.workloads(20).items() if name[0] in "ae"}
    figures = engines.compared(made, repetitions=1)
    for row in figures.values():
        assert (
            0 < row["default"]["events_per_iteration"] < row["seven events"]["events_per_iteration"]
        )
    assert engines.of_many(2_000)["requests_per_s"] > 0


def test_execution_time_rate_measures_every_model() -> None:
    """A few calls give a figure for every model, number of chunks and length of a run."""
    for rows in (execution_time_rate.call_times(25), execution_time_rate.run_times(25)):
        assert all(len(row) == 1 + len(execution_time_rate.MODELS) for row in rows)
        assert all(value > 0 for row in rows for value in row.values())
    assert execution_time_rate.iterations_per_second("linear", num_requests=10) > 0


def test_sweep_rate_measures_every_way() -> None:
    """A few tiny runs give a time for every way to make them."""
    times = sweep_rate.run(num_runs=4, num_requests=5, repetitions=1)
    assert len(times) == 7
    assert all(wall > 0 and free > 0 for wall, free in times.values())
