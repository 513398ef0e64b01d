"""Measured requests, simulated with the parameters of a calibrated execution time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time.calibrated import PARAMETERS, Calibrated
from vidur_simpy.measurements import Chunk, Iteration
from vidur_simpy.simulation import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.cluster import Cluster
    from vidur_simpy.execution_time import BatchCounts
    from vidur_simpy.execution_time.calibrated import CalibratedStageTime
    from vidur_simpy.measurements import MeasuredRequests
    from vidur_simpy.result import Result

__all__ = [
    "REQUEST_SPREAD",
    "START",
    "Replay",
    "design_of",
    "latency_slopes",
    "log_ratio",
    "lowest_of",
    "model_of",
    "prior_of",
]

# Without any correction, in the order of PARAMETERS.
START = np.array([0.0, 0.0, 1.0, 1.0])

SHORTEST = 1e-6
"""Seconds; latencies below count as such, so that their ratios exist."""

# For fits to requests: the spread that latencies have from run to run, and a bound on the work.
REQUEST_SPREAD = 0.2


def prior_of(least: float) -> NDArray[np.float64]:
    """Return how far from neutral the parameters may be expected."""
    return np.array([least, least, 1.0, 1.0])


def lowest_of(least: float) -> NDArray[np.float64]:
    """Return the least that the parameters may be; an overhead may save 90 % of the least time."""
    return np.array([-0.9 * least, 0.0, 0.0, 0.0])


def model_of(
    base: Any,
    fitted: NDArray[np.intp],
    values: NDArray[np.float64],
    covariance: NDArray[np.float64] | None = None,
    drift: float = 0.0,
) -> Calibrated:
    """Return the base with values, and their covariance, for the parameters fitted."""
    every, whole = START.copy(), np.zeros((len(START), len(START)))
    every[fitted] = values
    if covariance is not None:
        whole[np.ix_(fitted, fitted)] = covariance
    return Calibrated(
        base,
        **dict(zip(PARAMETERS, every.tolist(), strict=True)),
        covariance=() if covariance is None else whole.tolist(),
        drift=drift,
    )


def log_ratio(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm of one time over another."""
    ratio: NDArray[np.float64] = np.log(np.maximum(measured, SHORTEST))
    return ratio - np.log(np.maximum(predicted, SHORTEST))


class Replay:
    """The measured requests, simulated with parameters that are `steps` from neutral.

    Steps are in units of the prior.
    """

    def __init__(
        self, cluster: Cluster, base: Any, measured: MeasuredRequests, fitted: NDArray[np.intp]
    ) -> None:
        self._cluster, self._base = cluster, base
        self._measured, self._fitted = measured, fitted
        self._stage_time = Calibrated(base).for_replica(cluster.deployment)
        self._num_stages = cluster.pipeline_parallel_size
        least = sum(self._stage_time.least_time(stage) for stage in range(self._num_stages))
        self.prior = prior_of(least)[fitted]
        self.start = np.zeros(len(fitted))
        self.lowest = (lowest_of(least)[fitted] - START[fitted]) / self.prior
        self._last: tuple[bytes, list[Result]] = (b"", [])

    def values(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the parameters."""
        return START[self._fitted] + self.prior * steps

    def residuals(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the log ratios of TTFT and of E2E, and the steps as one more observation each."""
        ttft, e2e = self.latencies(steps)
        ratios = [log_ratio(ttft, self._measured.ttft), log_ratio(e2e, self._measured.e2e)]
        return np.concatenate([*ratios, REQUEST_SPREAD * steps])

    def jacobian(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return about how the residuals answer to the steps; see `latency_slopes`."""
        slopes = np.concatenate(
            [
                latency_slopes(result, self._stage_time, self._num_stages)
                for result in self._results(steps)
            ],
            axis=1,
        )
        relative = slopes / np.maximum(self.latencies(steps), SHORTEST)[:, :, None]
        rows = relative[:, :, self._fitted].reshape(-1, len(steps)) * self.prior
        return np.vstack([rows, REQUEST_SPREAD * np.eye(len(steps))])

    def latencies(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return TTFT and E2E of the measured requests, in seconds, shape (2, requests)."""
        columns = [result.requests[["ttft", "e2e"]].to_numpy() for result in self._results(steps)]
        return np.concatenate(columns).T

    def _results(self, steps: NDArray[np.float64]) -> list[Result]:
        """Return the simulation of each run; those of the last steps are kept."""
        key = steps.tobytes()
        if self._last[0] != key:
            model = model_of(self._base, self._fitted, self.values(steps))
            cluster = dataclasses.replace(self._cluster, execution_time=model)
            self._last = (key, [_simulated(cluster, run) for run in self._measured.split()])
        return self._last[1]


def _simulated(cluster: Cluster, run: MeasuredRequests) -> Result:
    result = simulate(cluster, run, record=("batches",), progress=False)
    refused = result.requests.loc[result.requests["refusal"] != "", "refusal"]
    if len(refused):
        raise ConfigError(
            f"the cluster refuses {len(refused)} of the {len(run)} requests measured in "
            f"{run.source}, the first one because of {refused.iloc[0]!r}: expected the model and "
            "the settings of the server."
        )
    return result


def design_of(
    stage_time: CalibratedStageTime, num_stages: int, iterations: Sequence[Iteration]
) -> NDArray[np.float64]:
    """Return what the base's least time, and a unit of each parameter, add to each iteration.

    An iteration is taken to last from the start of the first stage to the end of the last one.

    Returns
    -------
    ndarray of float, shape (n, 5)
        The product with ``(1, *parameters)`` is the time of each iteration, in seconds.
    """
    rows = []
    for iteration in iterations:
        batch = cast("BatchCounts", iteration)
        parts = [stage_time.parts(batch, stage_id) for stage_id in range(num_stages)]
        least, compute, context = (sum(part) for part in zip(*parts, strict=True))
        num_sequences = iteration.num_decodes + len(iteration.prefills)
        rows.append((least, 1.0, num_sequences, compute, context))
    return np.array(rows)


def latency_slopes(
    result: Result, stage_time: CalibratedStageTime, num_stages: int
) -> NDArray[np.float64]:
    """Return how TTFT and E2E answer to the parameters, if batches stay what they are.

    A latency is what the iterations take that go on meanwhile, those at its ends in part; with
    several pipeline stages, where iterations overlap, their mean. What is left out is that slower
    iterations meet more requests. (The derivative of the simulation itself would be of no use: up
    to the jump where an arrival just misses a batch, every wait grows with all iterations since
    the replica was idle.)

    Parameters
    ----------
    result : Result
        With ``record=("batches",)``, every request completed.
    stage_time : CalibratedStageTime
        Of any parameters over the same base.
    num_stages : int
        Pipeline stages.

    Returns
    -------
    ndarray of float, shape (2, requests, 4)
        Seconds per unit of each parameter: of TTFT, and of E2E.
    """
    requests, batches = result.requests, result.batches
    slopes = np.zeros((2, len(requests), len(PARAMETERS)))
    design = design_of(stage_time, num_stages, _iterations(requests, batches))[:, 1:]
    for replica_id in batches["replica_id"].unique():
        here = np.flatnonzero(batches["replica_id"] == replica_id)
        rows = np.flatnonzero(requests["replica_id"] == replica_id)
        started, ended = batches[["scheduled_at", "completed_at"]].to_numpy()[here].T
        columns = ["arrived_at", "first_token_at", "completed_at"]
        instants = requests[columns].to_numpy()[rows].T
        spent = _spent_until(instants, started, ended, design[here])
        slopes[:, rows] = spent[1:] - spent[0]
    return slopes


def _spent_until(
    instants: NDArray[np.float64],
    started: NDArray[np.float64],
    ended: NDArray[np.float64],
    design: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return what the iterations of a replica have added up to until each instant."""
    rates = design / (ended - started)[:, None]
    knots = np.concatenate([started, ended])
    order = np.argsort(knots, kind="stable")
    knots = knots[order]
    num_running = np.cumsum(np.repeat([1, -1], len(started))[order])[:-1]
    rate = np.cumsum(np.concatenate([rates, -rates])[order], axis=0)[:-1]
    rate = np.where(num_running[:, None], rate / np.maximum(num_running, 1)[:, None], 0.0)
    spent = np.zeros((len(knots), design.shape[1]))
    spent[1:] = np.cumsum(rate * np.diff(knots)[:, None], axis=0)
    return np.stack([np.interp(instants, knots, column) for column in spent.T], axis=-1)


def _iterations(requests: pd.DataFrame, batches: pd.DataFrame) -> list[Iteration]:
    """Return the batches as counts; a request decodes once its prompt is computed."""
    batch = np.repeat(np.arange(len(batches)), batches["request_ids"].str.len())
    ids = np.concatenate(batches["request_ids"].to_list())
    num_tokens = np.concatenate(batches["num_tokens"].to_list())
    order = np.lexsort((batch, ids))
    totals = np.cumsum(num_tokens[order])
    is_first = np.append(True, ids[order][1:] != ids[order][:-1])
    starts = np.where(is_first, totals - num_tokens[order], 0)
    context = np.empty_like(totals)
    context[order] = totals - np.maximum.accumulate(starts)
    prompt = requests.set_index("request_id")["num_prefill_tokens"].loc[ids].to_numpy()
    is_prefill = context - num_tokens < prompt
    size = len(batches)
    num_decodes = np.bincount(batch[~is_prefill], minlength=size).tolist()
    contexts = np.bincount(batch[~is_prefill], context[~is_prefill], size).astype(int).tolist()
    chunks: list[list[Chunk]] = [[] for _ in range(size)]
    for row in np.flatnonzero(is_prefill):
        chunks[batch[row]].append(Chunk(int(num_tokens[row]), int(context[row])))
    return [
        Iteration(count, context_sum, tuple(prefills))
        for count, context_sum, prefills in zip(num_decodes, contexts, chunks, strict=True)
    ]
