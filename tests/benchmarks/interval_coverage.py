"""How often intervals hold the true value, on queues whose answers are known.

Run it by hand::

    python tests/benchmarks/interval_coverage.py [--replications 1000] [--requests 10000]

Times in system of M/M/1 come from Lindley's recursion; their mean is 1 / (1 - load) and their
quantiles are those of an exponential distribution, in units of the mean service time. The run
starts empty. Intervals of nominally 95 % should hold the truth in 92 to 98 % of the replications;
where the values are worth less than 100 independent ones they may do so less often, and a note says
so in the share `noted`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.statistics.intervals import Interval, mean_interval, quantile_interval
from vidur_simpy.statistics.warm_up import mser5, warm_up_length

WARM_UPS: dict[str, Callable[[list[NDArray[np.float64]]], int]] = {
    "guarded": warm_up_length,
    "mser5": lambda runs: mser5(np.mean(runs, axis=0)),
    "none": lambda runs: 0,
}


def times_in_system(
    rng: np.random.Generator, load: float, num_requests: int, *, is_constant: bool = False
) -> NDArray[np.float64]:
    """Waits plus service times of a queue with one server that starts empty; service is 1."""
    gaps = rng.exponential(1 / load, num_requests)
    service = np.ones(num_requests) if is_constant else rng.exponential(1.0, num_requests)
    return lindley(np.cumsum(gaps), service)


def lindley(arrived_at: NDArray[np.float64], service: NDArray[np.float64]) -> NDArray[np.float64]:
    """Times in system of a queue with one server: its wait is what is left of the one before."""
    steps = np.concatenate(([0.0], service[:-1] - np.diff(arrived_at)))
    walk = np.cumsum(steps)
    return walk - np.minimum.accumulate(walk) + service


def coverage(
    load: float,
    num_requests: int,
    replications: int,
    *,
    num_runs: int = 1,
    warm_up: str = "guarded",
    seed: int = 0,
) -> dict[str, float]:
    """Share of the intervals that hold the truth, their relative width, and the relative bias."""
    rng = np.random.default_rng([seed, num_requests, num_runs, round(1000 * load)])
    cut = WARM_UPS[warm_up]
    made: dict[str, list[Interval]] = {"mean": [], "p50": [], "p90": [], "p99": []}
    for _ in range(replications):
        runs = [times_in_system(rng, load, num_requests // num_runs) for _ in range(num_runs)]
        num_cut = cut(runs)
        runs = [run[num_cut:] for run in runs]
        made["mean"].append(mean_interval(runs))
        for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            made[name].append(quantile_interval(runs, quantile))
    mean = 1 / (1 - load)
    truth = {"mean": mean} | {
        name: -math.log(1 - quantile) * mean
        for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    row: dict[str, float] = {}
    for name, intervals in made.items():
        row[name] = float(np.mean([truth[name] in each for each in intervals]))
    row["width"] = float(np.mean([each.high - each.low for each in made["mean"]])) / mean
    row["bias"] = float(np.mean([each.estimate for each in made["mean"]])) / mean - 1
    row["worth"] = float(np.mean([each.num_effective for each in made["mean"]]))
    row["noted"] = float(np.mean([bool(each.notes) for each in made["mean"]]))
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm-up", choices=sorted(WARM_UPS), default="guarded")
    arguments = parser.parse_args()
    print(
        f"{'load':>4} {'requests':>9} {'runs':>4} {'mean':>6} {'p50':>6} {'p90':>6} {'p99':>6}",
        end="",
    )
    print(f" {'width':>6} {'bias':>7} {'worth':>6} {'noted':>6}")
    for load in (0.3, 0.5, 0.7, 0.8, 0.9):
        for num_requests, num_runs in (
            (arguments.requests // 5, 1),
            (arguments.requests, 1),
            (arguments.requests, 4),
            (5 * arguments.requests, 1),
            (5 * arguments.requests, 20),
        ):
            row = coverage(
                load,
                num_requests,
                arguments.replications,
                num_runs=num_runs,
                warm_up=arguments.warm_up,
            )
            print(f"{load:>4} {num_requests:>9,} {num_runs:>4}", end="")
            print("".join(f" {row[name]:>6.1%}" for name in ("mean", "p50", "p90", "p99")), end="")
            print(f" {row['width']:>6.3f} {row['bias']:>+7.2%} {row['worth']:>6.0f}", end="")
            print(f" {row['noted']:>6.1%}", flush=True)


if __name__ == "__main__":
    main()
