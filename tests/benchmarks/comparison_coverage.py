"""How often `compare` finds a difference where there is none.

Two series of latencies with the same distribution, whose neighbours resemble each other
(autoregressive, lognormal), are compared many times; the intervals of the mean and three quantiles
together should miss zero in 5 of 100 comparisons.

    python tests/benchmarks/comparison_coverage.py
"""

from __future__ import annotations

import argparse

import numpy as np

from vidur_simpy.statistics.resampling import Blocks, block_length, joint_intervals

QUANTILES = (0.5, 0.9, 0.99)


def latencies(count: int, correlation: float, rng: np.random.Generator) -> np.ndarray:
    """Return lognormal values, each of which resembles the one before."""
    steps = rng.normal(size=count + 200) * np.sqrt(1 - correlation**2)
    values = np.empty(len(steps))
    value = 0.0
    for index, step in enumerate(steps):
        value = correlation * value + step
        values[index] = value
    return np.exp(0.5 * values[200:])


def run(
    count: int, correlation: float, *, repetitions: int, num_resamples: int = 400, seed: int = 1
) -> tuple[float, float]:
    """Return the share of comparisons that find a difference, and of those a note warns of."""
    rng = np.random.default_rng(seed)
    found = warned = 0
    for _ in range(repetitions):
        pair = [latencies(count, correlation, rng) for _ in range(2)]
        blocks = [Blocks(count, block_length(each), num_resamples, rng) for each in pair]
        first, second = (
            one.statistics(each, QUANTILES) for one, each in zip(blocks, pair, strict=True)
        )
        least = min(one.num_blocks for one in blocks)
        _, half = joint_intervals(second - first, least, 0.95)
        found += bool((np.abs(second[0] - first[0]) > half).any())
        warned += any(one.is_cut for one in blocks)
    return found / repetitions, warned / repetitions


def main() -> None:
    """Print the shares for several lengths and correlations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    repetitions = parser.parse_args().repetitions
    print(f"{'correlation':>11}{'requests':>10}{'found':>8}{'warned':>8}")
    for correlation in (0.0, 0.5, 0.9, 0.97):
        for count in (500, 2_000):
            found, warned = run(count, correlation, repetitions=repetitions)
            print(f"{correlation:>11}{count:>10}{found:>8.1%}{warned:>8.1%}")


if __name__ == "__main__":
    main()
