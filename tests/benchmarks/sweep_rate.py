"""What a sweep costs beside its runs, and what a second worker brings.

Run it by hand, best on a machine with nothing else to do::

    python tests/benchmarks/sweep_rate.py [--runs 200] [--requests 100] [--repetitions 3]

Each repetition times, in turn, the bare runs in a loop, the same with the figures of their tables,
and as a sweep in this process and on two worker processes that were started before, with and
without a store. Figures are the shortest times: others on the machine only lengthen them. Where
others take the cores, the processor time of each process still tells what two free ones would do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from joblib.externals.loky import reusable_executor

import vidur_simpy as vs
from vidur_simpy.search import figures_of


def settings(num_runs: int, num_requests: int) -> tuple[vs.Cluster, vs.Workload, list[dict]]:
    """So many different rates on one small cluster."""
    cluster = vs.Cluster(num_replicas=2, max_model_len=8192)
    lengths = vs.PublishedLengths("azure-conv-2023")
    workload = vs.Workload(vs.Poisson(rate=5.0), lengths, num_requests=num_requests)
    grid = [{"workload.arrivals.rate": 2.0 + 4.0 * index / num_runs} for index in range(num_runs)]
    return cluster, workload, grid


def processor_times() -> list[float]:
    """Processor time so far of this process and of each worker, in seconds (Linux)."""
    executor = reusable_executor._executor
    times = [time.process_time()]
    for pid in sorted(executor._processes) if executor is not None else []:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            times.append((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))
    return times


def measured(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock time of a call, and how long it would take on free cores: both in seconds.

    The second is the processor time of this process and that of its busiest worker.
    """
    before, started = processor_times(), time.perf_counter()
    function()
    wall = time.perf_counter() - started
    here, *workers = [after - start for start, after in zip(before, processor_times(), strict=True)]
    return wall, here + max(workers, default=0.0)


def run(num_runs: int, num_requests: int, repetitions: int) -> dict[str, tuple[float, float]]:
    """Return the shortest times in seconds, as `measured` gives them."""
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

    times: dict[str, list[tuple[float, float]]] = {}
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
                times.setdefault(name, []).append(measured(function))
    return {
        name: (min(wall for wall, _ in rows), min(free for _, free in rows))
        for name, rows in times.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    times = run(arguments.runs, arguments.requests, arguments.repetitions)
    for number, clock in enumerate(("wall clock", "processor time, as on free cores")):
        print(f"{clock:<40} {'s':>8} {'ms/run':>8} {'beside the run, ms':>20} {'speed-up':>9}")
        for name, row in times.items():
            total = row[number]
            beside = (total - times["bare"][number]) / arguments.runs * 1e3
            speed_up = times["sweep, here"][number] / total
            print(
                f"{name:<40} {total:>8.2f} {total / arguments.runs * 1e3:>8.2f} {beside:>20.2f} "
                f"{speed_up:>9.2f}"
            )


if __name__ == "__main__":
    main()
