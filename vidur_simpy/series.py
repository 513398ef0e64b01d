"""What plots draw, computed as arrays from the tables of a result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.errors import unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = [
    "distribution",
    "distribution_steps",
    "load_of_requests",
    "load_samples",
    "numbers",
    "round_window",
    "sampled_load",
    "spans",
    "windowed_quantiles",
]

MAX_POINTS = 4_000
MAX_WINDOWS = 40
MIN_REQUESTS_PER_WINDOW = 25


def numbers(requests: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN where it has no finite one.

    Raises
    ------
    ConfigError
        If there is no numeric column of this name.
    """
    numeric = requests.select_dtypes("number")
    if metric not in numeric:
        raise unknown_name("metric", metric, [str(name) for name in numeric])
    values = numeric[metric].to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def distribution(result: Result, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the values of a metric in order, and the share that is at or below each of them."""
    if metric == "itl":
        tokens = result.tokens.sort_values("inter_token_latency")
        counts = tokens["num_tokens"].to_numpy(dtype=np.float64)
        values = tokens["inter_token_latency"].to_numpy(dtype=np.float64)
    else:
        values = numbers(result.requests, metric)
        values = np.sort(values[~np.isnan(values)])
        counts = np.ones(len(values))
    return values, np.cumsum(counts) / counts.sum() if len(counts) else counts


def distribution_steps(
    values: NDArray[np.float64], shares: NDArray[np.float64], *, complementary: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners of the distribution function, at most some thousands.

    Its steps rise at their left end; those of the complement (the share at or above) fall at
    their right end.
    """
    last = len(values) - 1
    kept = np.arange(last + 1)
    if last >= MAX_POINTS:
        # Evenly spaced ranks for the body, and ever closer ones towards both ends for the tails.
        tail = np.geomspace(1, last + 1, MAX_POINTS // 4).astype(np.int64) - 1
        body = np.linspace(0, last, MAX_POINTS // 2).astype(np.int64)
        kept = np.unique(np.concatenate((tail, body, last - tail)))
    if complementary:
        return values[kept], np.concatenate(([1.0], 1.0 - shares[:-1]))[kept]
    return np.append(values[0], values[kept]), np.append(0.0, shares[kept])


def round_window(arrived_at: NDArray[np.float64]) -> float:
    """Return 1, 2 or 5 times a power of ten seconds that divides arrivals into some windows."""
    span = float(arrived_at.max() - arrived_at.min()) or 1.0
    most = max(1, min(MAX_WINDOWS, len(arrived_at) // MIN_REQUESTS_PER_WINDOW))
    power = 10.0 ** math.floor(math.log10(span / most))
    return next((step * power for step in (1, 2, 5) if step * power * most >= span), 10 * power)


def windowed_quantiles(
    arrived_at: NDArray[np.float64],
    values: NDArray[np.float64],
    window: float,
    shares: list[float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the middle of each window, and a row for each quantile; NaN in empty windows."""
    import pandas as pd

    index = np.floor(arrived_at / window).astype(np.int64)
    table = pd.Series(values).groupby(index).quantile(np.array(shares)).unstack()
    table = table.reindex(range(index.min(), index.max() + 1))
    return (table.index.to_numpy() + 0.5) * window, table.to_numpy().T


def load_samples(result: Result) -> pd.DataFrame:
    """Return the samples of every replica, and one of nothing whenever a replica falls idle.

    Columns ``time``, ``replica_id``, ``running``, ``waiting`` and ``usage``, in order of time.
    """
    import pandas as pd

    names = {"num_running": "running", "num_waiting": "waiting", "kv_cache_usage": "usage"}
    samples = result.timeline.rename(columns=names)
    if "measured_from" not in result.info:  # else the requests before it are not known
        idle = _idle_instants(result.requests).assign(running=0, waiting=0, usage=0.0)
        samples = pd.concat([idle, samples])
    return samples.sort_values("time", kind="stable", ignore_index=True)


def sampled_load(result: Result) -> pd.DataFrame:
    """Return requests running and waiting on all replicas, and the mean share of KV cache in use.

    A row per instant at which any replica was sampled, the last sample of the others standing.
    """
    samples = load_samples(result)
    levels = samples[["running", "waiting", "usage"]].astype(np.float64)
    changes = levels.groupby(samples["replica_id"]).diff().fillna(levels)
    load = changes.cumsum().clip(lower=0.0)  # a sum of changes may end at -1e-17
    load["usage"] /= max(1, len(result.replicas))
    load.insert(0, "time", samples["time"])
    return load.drop_duplicates("time", keep="last", ignore_index=True)


def load_of_requests(requests: pd.DataFrame) -> pd.DataFrame:
    """Return requests waiting (arrival to first batch) and running (from there to the end).

    One whose first batch is not known, as in a measurement, counts as running from its arrival.
    """
    import pandas as pd

    accepted = requests[requests["refusal"] == ""]
    is_unknown = accepted["scheduled_at"].isna() & accepted["completed_at"].notna()
    started_at = accepted["scheduled_at"].mask(is_unknown, accepted["arrived_at"])
    accepted = accepted.assign(scheduled_at=started_at)
    moves = pd.concat(
        pd.DataFrame({"time": accepted[column].dropna(), "running": running, "waiting": waiting})
        for column, running, waiting in (
            ("arrived_at", 0, 1),
            ("scheduled_at", 1, -1),
            ("completed_at", -1, 0),
        )
    ).sort_values("time", kind="stable", ignore_index=True)
    moves[["running", "waiting"]] = moves[["running", "waiting"]].cumsum()
    return moves.drop_duplicates("time", keep="last", ignore_index=True)


def spans(
    time: NDArray[np.float64], value: NDArray[np.float64], num_spans: int
) -> tuple[NDArray[np.float64], ...]:
    """Return middle, time-weighted mean, least and greatest value of equal spans of a step line.

    Parameters
    ----------
    time, value : ndarray, shape (n,)
        Instants in order, and the value from each of them to the next.
    num_spans : int
    """
    edges = np.linspace(time[0], time[-1], num_spans + 1)
    integral = np.concatenate(([0.0], np.cumsum(value[:-1] * np.diff(time))))
    mean = np.diff(np.interp(edges, time, integral)) / np.diff(edges)
    held = value[np.searchsorted(time, edges[:-1], side="right") - 1]
    least, greatest = held.copy(), held.copy()
    span = np.searchsorted(edges[1:-1], time, side="right")
    np.minimum.at(least, span, value)
    np.maximum.at(greatest, span, value)
    return (edges[:-1] + edges[1:]) / 2, mean, least, greatest


def _idle_instants(requests: pd.DataFrame) -> pd.DataFrame:
    """Return when a replica finished the last request it had; it forms no batch then."""
    import pandas as pd

    accepted = requests[requests["replica_id"].notna() & (requests["refusal"] == "")]
    arrivals = pd.DataFrame({"time": accepted["arrived_at"], "change": 1})
    ends = pd.DataFrame({"time": accepted["completed_at"].dropna(), "change": -1})
    moves = pd.concat([arrivals, ends])
    moves["replica_id"] = accepted["replica_id"].astype(np.int64).loc[moves.index].to_numpy()
    moves = moves.sort_values("time", kind="stable")
    is_idle = moves.groupby("replica_id")["change"].cumsum() == 0
    return moves.loc[is_idle, ["time", "replica_id"]]
