"""Simulations that say how sure they are, as far as the calibration of their times tells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.calibration.replay import lowest_of
from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time import Calibrated
from vidur_simpy.execution_time.calibrated import PARAMETERS
from vidur_simpy.simulation import simulate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.cluster import Cluster
    from vidur_simpy.result import Result
    from vidur_simpy.workload import Trace, Workload

__all__ = ["simulate_with_uncertainty"]

LATENCIES = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p95", "p99")


def simulate_with_uncertainty(
    cluster: Cluster,
    workload: Workload | Trace,
    *,
    seed: int = 0,
    level: float = 0.9,
    num_pairs: int = 8,
    **options: Any,
) -> Result:
    """Run a workload on a calibrated cluster, with the band in which its latencies are expected.

    The workload is simulated again on ``2 * num_pairs`` machines that the calibration takes for as
    likely: their parameters are drawn from its `covariance`, and all their times are multiplied by
    one factor drawn from its `drift`, as wide as the blocks of the measurement differed. So the
    band is meant for a run about as long as such a block; the mean of many runs is closer. The
    draws come in pairs mirrored about the fit, their factors at even quantiles. From the
    logarithms of a statistic over that of the fit follows its band, as if they were normal.

    It holds what the calibration knows: the fit and the machine's drift, which enters both, so that
    it is rather too wide. That requests may come otherwise, or a load differ in kind from what was
    measured, is not in it. Fitted to a low load of a real vLLM server and applied to a high one,
    the band of 90 % held 70 of 72 measured means, medians and 95th percentiles of single runs
    (``tests/benchmarks/calibration_vllm_cpu.py``).

    Parameters
    ----------
    cluster : Cluster
        With a :class:`vidur_simpy.Calibrated` execution time that has a `covariance`.
    workload : Workload or Trace
        The same requests in all simulations.
    seed : int
        Of the simulations, and of the draws.
    level : float
        Share of machines within the band, between 0 and 1.
    num_pairs : int
        Half the number of simulations besides the first.
    **options
        Passed to :func:`vidur_simpy.simulate`; what is recorded, is of the first.

    Returns
    -------
    Result
        That of the fit itself; `Result.uncertainty` gives the band.

    Raises
    ------
    ConfigError
        If the cluster is not calibrated, or `level` or `num_pairs` is out of range.
    """
    model = cluster.execution_time
    if not isinstance(model, Calibrated) or not (model.covariance or model.drift):
        raise ConfigError(
            f"Cluster.execution_time = {model!r}: expected a Calibrated one with the covariance "
            "that calibrate() gives."
        )
    if not 0 < level < 1 or num_pairs < 1:
        raise ConfigError(
            f"level = {level}, num_pairs = {num_pairs}: expected a share between 0 and 1, and at "
            "least one pair."
        )
    result = simulate(cluster, workload, seed=seed, **options)
    others = {name: value for name, value in options.items() if name in ("event_order", "until")}
    center = _statistics(result)
    spreads = []
    for machine in _machines(cluster, model, seed, num_pairs):
        drawn = simulate(machine, workload, seed=seed, progress=False, **others)
        with np.errstate(invalid="ignore", divide="ignore"):
            spreads.append(np.log(_statistics(drawn) / center))
    width = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(np.mean(np.square(spreads), axis=0))
    result.info["uncertainty"] = {
        "level": level,
        "num_simulations": 2 * num_pairs + 1,
        "low": _table(center * np.exp(-width)),
        "high": _table(center * np.exp(width)),
    }
    return result


def _machines(cluster: Cluster, model: Calibrated, seed: int, num_pairs: int) -> Iterator[Cluster]:
    """Return the cluster with each of the machines drawn."""
    # A stream of its own, whatever streams a simulation has.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(b"uncertainty")))
    stage_time = model.for_replica(cluster.deployment)
    least = sum(stage_time.least_time(stage) for stage in range(cluster.pipeline_parallel_size))
    lowest = lowest_of(least)
    values = np.array([getattr(model, name) for name in PARAMETERS])
    factors = rng.permutation(_even_normal(num_pairs))
    for factor in factors.tolist():
        change = _root(model) @ rng.standard_normal(len(PARAMETERS))
        for sign in (-1, 1):
            drawn = np.maximum(values + sign * change, lowest).tolist()
            time_scale = model.time_scale * math.exp(sign * model.drift * factor)
            machine = dataclasses.replace(
                model, **dict(zip(PARAMETERS, drawn, strict=True)), time_scale=time_scale
            )
            yield dataclasses.replace(cluster, execution_time=machine)


def _root(model: Calibrated) -> NDArray[np.float64]:
    """Return a matrix whose product with independent normal numbers has the covariance."""
    if not model.covariance:
        return np.zeros((len(PARAMETERS), len(PARAMETERS)))
    # In units of the standard errors, so that none is lost beside another.
    covariance = np.array(model.covariance)
    errors = np.sqrt(np.diag(covariance))
    scale = np.where(errors > 0, errors, 1.0)
    variances, directions = np.linalg.eigh(covariance / np.outer(scale, scale))
    root: NDArray[np.float64] = scale[:, None] * directions * np.sqrt(np.maximum(variances, 0.0))
    return root


def _even_normal(num_pairs: int) -> NDArray[np.float64]:
    """Return the upper half of so many pairs of normal numbers, evenly spread, of variance 1."""
    normal = NormalDist()
    shares = (np.arange(num_pairs) + num_pairs + 0.5) / (2 * num_pairs)
    numbers = np.array([normal.inv_cdf(share) for share in shares.tolist()])
    scaled: NDArray[np.float64] = numbers / np.sqrt(np.mean(numbers**2))
    return scaled


def _statistics(result: Result) -> NDArray[np.float64]:
    """Return the statistics of each latency, in seconds."""
    statistics = result.summary().loc[list(LATENCIES), list(STATISTICS)]
    return statistics.to_numpy(np.float64)


def _table(values: NDArray[np.float64]) -> dict[str, dict[str, float | None]]:
    """Return values by latency and statistic, as JSON has them."""
    return {
        latency: {
            name: value if math.isfinite(value) else None
            for name, value in zip(STATISTICS, row, strict=True)
        }
        for latency, row in zip(LATENCIES, values.tolist(), strict=True)
    }
