"""What a sweep costs beside its runs, and what a second worker brings.

Run it by hand, on a machine with nothing else to do::

    python tests/benchmarks/sweep_rate.py [--runs 200] [--requests 100] [--repetitions 3]

Each repetition times, in turn, the bare runs in a loop, the same with the figures of their tables,
and as a sweep in this process and on two worker processes that were started before, with and
without a store. Figures are medians of wall-clock times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import vidur_simpy as vs
from vidur_simpy.search import figures_of


def settings(num_runs: int, num_requests: int) -> tuple[vs.Cluster, vs.Workload, list[dict]]:
    """So many different rates on one small cluster."""
    cluster = vs.Cluster(num_replicas=2, max_model_len=8192)
    lengths = vs.PublishedLengths("azure-conv-2023")
    workload = vs.Workload(vs.Poisson(rate=5.0), lengths, num_requests=num_requests)
    grid = [{"workload.arrivals.rate": 2.0 + 4.0 * index / num_runs} for index in range(num_runs)]
    return cluster, workload, grid


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run(num_runs: int, num_requests: int, repetitions: int) -> dict[str, float]:
    """Return median times in seconds."""
    cluster, workload, grid = settings(num_runs, num_requests)
    workloads = [
        vs.Workload(vs.Poisson(row["workload.arrivals.rate"]), workload.lengths, num_requests)
        for row in grid
    ]

    def bare() -> None:
        for each in workloads:
            vs.simulate(cluster, each, progress=False)

    def told() -> None:
        for each in workloads:
            figures_of(vs.simulate(cluster, each, progress=False))

    def swept(jobs: int | None = None, store: str | None = None) -> Callable[[], object]:
        return lambda: vs.sweep(cluster, workload, grid, jobs=jobs, store=store, progress=False)

    times: dict[str, list[float]] = {}
    for _ in range(repetitions):
        # Workers are started, and have imported what they need, before the clock runs.
        vs.sweep(cluster, workload, grid[:4], jobs=2, progress=False)
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            for name, function in {
                "bare": bare,
                "bare, with their figures": told,
                "sweep, here": swept(),
                "sweep, here, stored": swept(store=first),
                "sweep, here, all found in the store": swept(store=first),
                "sweep, two workers": swept(jobs=2),
                "sweep, two workers, stored": swept(jobs=2, store=second),
            }.items():
                times.setdefault(name, []).append(seconds(function))
    return {name: statistics.median(measured) for name, measured in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    times = run(arguments.runs, arguments.requests, arguments.repetitions)
    print(f"{'':<40} {'total s':>8} {'ms/run':>8} {'beside the run, ms':>20} {'here / this':>12}")
    for name, total in times.items():
        beside = (total - times["bare"]) / arguments.runs * 1e3
        print(
            f"{name:<40} {total:>8.2f} {total / arguments.runs * 1e3:>8.2f} {beside:>20.2f} "
            f"{times['sweep, here'] / total:>12.2f}"
        )


if __name__ == "__main__":
    main()
