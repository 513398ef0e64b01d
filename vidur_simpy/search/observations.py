"""What has to be known of a run to judge it by any SLO: latencies by request, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.power import mean_power_w
from vidur_simpy.search.slo import Slo, ratios
from vidur_simpy.summary import LATENCIES, num_output_tokens, ratio

if TYPE_CHECKING:
    from vidur_simpy.result import Result

__all__ = ["Observation", "Values", "observation_of", "values_of"]

Values = Mapping[str, float | NDArray[np.float64]]


@dataclass(frozen=True)
class Observation:
    """What is kept of a run to judge it by one SLO.

    Attributes
    ----------
    ratios : list of ndarray
        For each requirement of the SLO, what `slo.ratios` gives.
    figures : dict of str to float
        See :func:`vidur_simpy.search.figures_of`, and the numbers of :func:`values_of`.
    is_reused : bool
        Whether the run was taken from a store.
    """

    ratios: list[NDArray[np.float64]]
    figures: dict[str, float]
    is_reused: bool = False


def values_of(result: Result) -> dict[str, float | NDArray[np.float64]]:
    """Return what an SLO, a capacity and a recommendation need of a run beside its figures.

    Returns
    -------
    dict of str to float or ndarray
        ``ttft``, ``tpot``, ``e2e`` and ``scheduling_delay``: seconds by request, in order of
        arrival; infinite for a request that is refused or unfinished; a TPOT of 0 where there is
        one output token. With recorded tokens ``itl``, a value per gap, in order of time. Besides
        the numbers ``gpu_hours_per_million_tokens`` and ``kwh_per_million_tokens``, of prompt and
        output tokens together (NaN if the power of the device is not known); ``mean_in_system``,
        the requests in the system on average over the times of arrival; and ``arrival_share``, the
        share of the run until the last arrival.
    """
    requests = result.requests
    is_completed = requests["completed_at"].notna().to_numpy()
    values: dict[str, float | NDArray[np.float64]] = {
        name: np.where(is_completed, requests[name].to_numpy(np.float64), np.inf)
        for name in LATENCIES
    }
    is_single = num_output_tokens(requests).to_numpy() <= 1
    values["tpot"] = np.where(is_completed & is_single, 0.0, values["tpot"])
    if "tokens" in result.tables:
        tokens = result.tokens.sort_values("time", kind="stable")
        gaps = tokens["inter_token_latency"].to_numpy(np.float64)
        values["itl"] = np.repeat(gaps, tokens["num_tokens"].to_numpy(np.int64))
    arrived_at = requests["arrived_at"].to_numpy(np.float64)
    arriving = float(arrived_at.max() - arrived_at.min())
    e2e = np.where(is_completed, requests["e2e"].to_numpy(np.float64), 0.0)
    end = float(requests["completed_at"].max() - arrived_at.min())
    return (
        values
        | _per_million_tokens(result)
        | {
            "mean_in_system": float(e2e.sum()) / max(arriving, 1e-12),
            "arrival_share": arriving / max(end, 1e-12),
        }
    )


def _per_million_tokens(result: Result) -> dict[str, float]:
    """Return what tokens take, as `Result.cost` and `Result.energy` do, but in a tenth of the time.

    A sweep with a store asks after each of its runs.
    """
    columns = ("num_devices", "tdp_w", "utilisation", "mfu", "mbu")
    rows = list(zip(*(result.replicas[name].tolist() for name in columns), strict=True))
    num_devices = sum(row[0] for row in rows)
    watts = sum(
        number * mean_power_w(peak, utilisation=utilisation, mfu=mfu, mbu=mbu)
        for number, peak, utilisation, mfu, mbu in rows
    )
    tokens = result.figures["total_token_throughput"] * result.figures["makespan"]
    hours = float(result.info["simulated_time"]) / 3600
    return {
        "gpu_hours_per_million_tokens": ratio(1e6 * hours * num_devices, tokens),
        "kwh_per_million_tokens": ratio(1e6 * hours * watts / 1000, tokens),
    }


def observation_of(
    slo: Slo, figures: Mapping[str, float], values: Values, *, is_reused: bool = False
) -> Observation:
    """Return what is kept of a run to judge it by an SLO."""
    arrays = {name: value for name, value in values.items() if not isinstance(value, float)}
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    judged = [ratios(arrays, each) for each in slo.requirements]
    return Observation(judged, {**figures, **numbers}, is_reused)
