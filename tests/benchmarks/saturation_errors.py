"""How often `Result.saturation` is wrong: runs below capacity, above it, and bursts that drain.

    python tests/benchmarks/saturation_errors.py --seeds 40

Prints the share of runs that are flagged, in percent, by load (arrivals per second, divided by
what the server takes with a queue that never empties) and by number of requests. Below a load of 1
every flag is an error, above it every run without one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import vidur_simpy as vs
from vidur_simpy.workload import RequestArrays

LOADS = (0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5)
SIZES = (200, 1_000, 5_000)
LENGTHS = vs.LognormalLengths(
    prompt_median=300, prompt_sigma=1.0, output_median=60, output_sigma=0.8
)
CLUSTER = vs.Cluster(
    model="llama-3.1-8b",
    device="h100-80gb-sxm",
    max_model_len=8_192,
    replica_scheduler=vs.Sarathi(max_num_seqs=32, chunk_size=512),
    execution_time=vs.Linear(base=0.01, per_token=4e-5, per_context_token=1e-7),
)


class WithBurst:
    """A workload a tenth of whose requests come at one instant, at a share of the run."""

    def __init__(self, workload: vs.Workload, at: float) -> None:
        self.workload = workload
        self.at = at

    def requests(self, *generators: object) -> RequestArrays:
        """Return the requests in order of arrival."""
        table = self.workload.requests(*generators)
        size = len(table)
        arrived_at = table.arrived_at.copy()
        first = int(self.at * size)
        arrived_at[first : first + size // 10] = arrived_at[first]
        return dataclasses.replace(table, arrived_at=np.sort(arrived_at))


def workload_of(arrivals: object, num_requests: int) -> vs.Workload:
    """Return a workload whose requests all fit."""
    return vs.Workload(arrivals, LENGTHS, num_requests=num_requests, clip="prompt")


WORKLOADS: dict[str, Callable[[float, int], object]] = {
    "Poisson": lambda rate, size: workload_of(vs.Poisson(rate), size),
    "Gamma, cv 2": lambda rate, size: workload_of(vs.Gamma(rate=rate, cv=2.0), size),
    "a tenth at once, at 40 %": lambda rate, size: WithBurst(
        workload_of(vs.Poisson(rate), size), 0.4
    ),
    "a tenth at once, at 85 %": lambda rate, size: WithBurst(
        workload_of(vs.Poisson(rate), size), 0.85
    ),
}


def capacity_of(cluster: vs.Cluster) -> float:
    """Return the requests per second that leave a queue that never empties."""
    result = vs.simulate(cluster, workload_of(vs.AllAtOnce(), 4_000), progress=False)
    left_at = np.sort(result.requests["scheduled_at"].to_numpy())
    return float(3_000 / (left_at[3_499] - left_at[499]))


def flagged(workload: object, num_seeds: int) -> float:
    """Return the share of seeds whose run is called saturated."""
    runs = (vs.simulate(CLUSTER, workload, seed=seed, progress=False) for seed in range(num_seeds))
    return float(np.mean([run.saturation().is_saturated for run in runs]))


def rows(num_seeds: int, sizes: Sequence[int] = SIZES) -> Iterator[tuple[str, int, list[float]]]:
    """Yield the share that is flagged at each of `LOADS`, by kind of arrivals and size."""
    capacity = capacity_of(CLUSTER)
    for name, make in WORKLOADS.items():
        for size in sizes:
            workloads = [make(load * capacity, size) for load in LOADS]
            yield name, size, [flagged(workload, num_seeds) for workload in workloads]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    num_seeds = parser.parse_args().seeds
    print(f"{'flagged (%) at load':<26}{'requests':>9}" + "".join(f"{load:>7}" for load in LOADS))
    for name, size, shares in rows(num_seeds):
        cells = "".join(f"{100 * share:>7.0f}" for share in shares)
        print(f"{name:<26}{size:>9,}{cells}", flush=True)


if __name__ == "__main__":
    main()
