"""What plots draw, computed as arrays from the tables of a result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidur_simpy.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = [
    "Steps",
    "check_windows",
    "distribution",
    "distribution_steps",
    "levels_of_replicas",
    "load_of_requests",
    "load_samples",
    "numbers",
    "preempted_at",
    "round_window",
    "sampled_load",
    "span_means",
    "spans",
    "steps_of",
    "windowed_quantiles",
]

MAX_POINTS = 4_000
MAX_WINDOWS = 40
# Windows that were asked for; more than this cannot be seen.
MOST_WINDOWS = 2_000
MIN_REQUESTS_PER_WINDOW = 25


def numbers(requests: pd.DataFrame, metric: str, *others: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN where it has no finite one.

    Raises
    ------
    ConfigError
        If there is no numeric column of this name; it lists those, and the `others`.
    """
    numeric = requests.select_dtypes("number")
    if metric not in numeric:
        raise unknown_name("metric", metric, [*map(str, numeric), *others])
    values = numeric[metric].to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def distribution(result: Result, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the values of a metric in order, and the share that is at or below each of them."""
    if metric == "itl":
        tokens = result.tokens.sort_values("inter_token_latency")
        counts = tokens["num_tokens"].to_numpy(dtype=np.float64)
        values = tokens["inter_token_latency"].to_numpy(dtype=np.float64)
    else:
        values = numbers(result.requests, metric, "itl")
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


def round_window(
    instants: NDArray[np.float64],
    most: int = MAX_WINDOWS,
    least_count: int = MIN_REQUESTS_PER_WINDOW,
) -> float:
    """Return 1, 2 or 5 times a power of ten seconds that divides instants into some windows.

    Parameters
    ----------
    instants : ndarray, shape (n,)
    most : int
        Most windows.
    least_count : int
        Least instants of a window on average.
    """
    span = float(instants.max() - instants.min()) or 1.0
    most = max(1, min(most, len(instants) // least_count))
    power = 10.0 ** math.floor(math.log10(span / most))
    return next((step * power for step in (1, 2, 5) if step * power * most >= span), 10 * power)


def check_windows(where: str, window: float | None, instants: NDArray[np.float64]) -> None:
    """Refuse a window without length, or one so short that nobody sees it.

    Raises
    ------
    ConfigError
        If it is not positive, or makes more than `MOST_WINDOWS`.
    """
    if window is None:
        return
    if not window > 0:
        raise ConfigError(f"{where}(): window = {window!r}: expected a positive number of s.")
    span = float(instants.max() - instants.min()) if len(instants) else 0.0
    if span > MOST_WINDOWS * window:
        raise ConfigError(
            f"{where}(): window = {window!r} makes {span / window:.0f} windows: expected at most "
            f"{MOST_WINDOWS}, so {span / MOST_WINDOWS:.3g} s or more."
        )


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

    Samples of a long run are far apart. Where a replica gets busy again before its next one, its
    last one stands again, so that a short pause is not taken for a long one.

    Columns ``time``, ``replica_id``, ``running``, ``waiting`` and ``usage``, in order of time.
    """
    import pandas as pd

    names = {"num_running": "running", "num_waiting": "waiting", "kv_cache_usage": "usage"}
    samples = result.timeline.rename(columns=names)
    if "measured_from" in result.info:  # the requests before it are not known
        return samples.sort_values("time", kind="stable", ignore_index=True)
    idle, busy = _pauses(result.requests)
    by_time = samples.sort_values("time", kind="stable")
    again = pd.merge_asof(busy, by_time, on="time", by="replica_id").dropna()
    idle = idle.assign(running=0, waiting=0, usage=0.0)
    rows = pd.concat([idle, again.astype(idle.dtypes), samples])
    rows = rows.sort_values("time", kind="stable", ignore_index=True)
    return rows.drop_duplicates(["time", "replica_id"], keep="last", ignore_index=True)


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


def levels_of_replicas(result: Result, quantity: str) -> pd.DataFrame:
    """Return a quantity of each replica as steps: columns ``time``, ``replica_id`` and ``level``.

    Parameters
    ----------
    result : Result
    quantity : str
        ``"running"`` or ``"waiting"`` (requests; from the requests where there are no samples),
        ``"kv_cache"`` (share of the blocks in use) or ``"utilisation"`` (share of the stages that
        are busy; needs recorded stages).
    """
    if quantity == "utilisation":
        return _busy_stages(result)
    column = "usage" if quantity == "kv_cache" else quantity
    if len(result.timeline) or quantity == "kv_cache":
        levels = load_samples(result) if len(result.timeline) else result.timeline
    else:
        import pandas as pd

        requests = result.requests
        loads = [
            load_of_requests(rows).assign(replica_id=replica_id)
            for replica_id, rows in requests.groupby("replica_id")
        ]
        levels = pd.concat(loads) if loads else result.timeline
    levels = levels.rename(columns={column: "level"})
    return levels.reindex(columns=["time", "replica_id", "level"])


def _busy_stages(result: Result) -> pd.DataFrame:
    """Return the share of the stages of each replica that are busy, as steps."""
    import pandas as pd

    stages = result.stages
    num_stages = stages.groupby("replica_id")["stage_id"].nunique()
    change = 1 / stages["replica_id"].map(num_stages)
    starts = {"time": stages["started_at"], "level": change}
    ends = {"time": stages["ended_at"], "level": -change}
    moves = pd.concat(
        pd.DataFrame(each | {"replica_id": stages["replica_id"]}) for each in (starts, ends)
    )
    moves = moves.dropna().sort_values("time", kind="stable", ignore_index=True)
    moves["level"] = moves.groupby("replica_id")["level"].cumsum().clip(0.0, 1.0)
    return moves


class Steps(NamedTuple):
    """What batches did for requests: a row per request and batch.

    Attributes
    ----------
    request_id, time, num_tokens, is_decode : ndarray, shape (n,)
        The request, the end of the batch in seconds (NaN if it has none yet), the tokens computed,
        and whether it is a decode.
    """

    request_id: NDArray[np.int64]
    time: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    is_decode: NDArray[np.bool_]

    def take(self, rows: slice | NDArray[np.intp] | NDArray[np.bool_]) -> Steps:
        """Return some of the rows."""
        return Steps(
            self.request_id[rows], self.time[rows], self.num_tokens[rows], self.is_decode[rows]
        )

    def by_request(self) -> Steps:
        """Return the rows by request, then by time."""
        return self.take(np.lexsort((self.time, self.request_id)))


def steps_of(result: Result) -> Steps:
    """Return what recorded batches did, in their order."""
    batches = result.batches
    sizes = batches["request_ids"].map(len).to_numpy(dtype=np.int64)
    request_id, num_tokens = (
        np.fromiter(chain.from_iterable(batches[name]), dtype=np.int64, count=int(sizes.sum()))
        for name in ("request_ids", "num_tokens")
    )
    time = np.repeat(batches["completed_at"].to_numpy(), sizes)
    # In a batch the decodes, of one token each, come before the prefill chunks.
    position = np.arange(len(request_id)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_decode = position < np.repeat(batches["num_decode_tokens"].to_numpy(), sizes)
    return Steps(request_id, time, num_tokens, is_decode)


def preempted_at(result: Result) -> NDArray[np.float64]:
    """Return when requests were preempted, in seconds and in order.

    The batches say so: a request that computes its prompt once more was preempted after the last
    batch it had been part of, at whose end it is counted.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("batches",)``.
    """
    restarted = result.requests.loc[result.requests["num_restarts"] > 0]
    prompts = dict(zip(restarted["request_id"], restarted["num_prefill_tokens"], strict=True))
    steps = steps_of(result)
    steps = steps.take(np.isin(steps.request_id, list(prompts))).by_request()
    edges = np.append(np.flatnonzero(np.diff(steps.request_id, prepend=-1)), len(steps.time))
    found = [np.empty(0)]
    for begin, end in pairwise(edges.tolist()):
        own = steps.take(slice(begin, end))
        chunks = zip(own.num_tokens.tolist(), own.is_decode.tolist(), strict=True)
        restarts = list(_restarts(list(chunks), prompts[own.request_id[0]]))
        found.append(own.time[np.array(restarts, dtype=np.int64) - 1])
    return np.sort(np.concatenate(found))


def _restarts(steps: list[tuple[int, bool]], prompt: int) -> Iterator[int]:
    """Yield the steps of a request before which it was restarted.

    A step is its number of tokens, and whether it is a decode.
    """
    target = prompt  # and, after a restart, the output so far
    is_complete = False
    first, done = 0, 0  # step and tokens of the prefill under way
    for index, (num_tokens, is_decode) in enumerate(steps):
        if is_decode:
            # A prefill that the prefix cache shortened ended unnoticed, with a token of its own.
            target += 1 if is_complete else 2
            is_complete = True
            continue
        if is_complete:
            yield index
            is_complete = False
            first, done = index, 0
        done += num_tokens
        if done > target:  # a restart within the prefill: what came first was lost
            while done > target:
                done -= steps[first][0]
                first += 1
            yield first
        if done == target:
            is_complete = True
            target += 1


def span_means(
    time: NDArray[np.float64], value: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the time-weighted mean of a step line in each span between two edges.

    Parameters
    ----------
    time, value : ndarray, shape (n,)
        Instants in order, and the value from each of them to the next; 0 before the first.
    edges : ndarray, shape (m + 1,)
        In order.
    """
    until = np.append(time, max(time[-1], edges[-1]))
    integral = np.concatenate(([0.0], np.cumsum(value * np.diff(until))))
    means: NDArray[np.float64] = np.diff(np.interp(edges, until, integral)) / np.diff(edges)
    return means


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
    mean = span_means(time, value, edges)
    held = value[np.searchsorted(time, edges[:-1], side="right") - 1]
    least, greatest = held.copy(), held.copy()
    span = np.searchsorted(edges[1:-1], time, side="right")
    np.minimum.at(least, span, value)
    np.maximum.at(greatest, span, value)
    return (edges[:-1] + edges[1:]) / 2, mean, least, greatest


def _pauses(requests: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return when replicas finished the last request they had, and when they got one again.

    Both with columns ``time`` and ``replica_id``, in order of time. An idle replica forms no
    batch, and so is not sampled.
    """
    import pandas as pd

    accepted = requests[requests["replica_id"].notna() & (requests["refusal"] == "")]
    arrivals = pd.DataFrame({"time": accepted["arrived_at"], "change": 1})
    ends = pd.DataFrame({"time": accepted["completed_at"].dropna(), "change": -1})
    moves = pd.concat([arrivals, ends])
    moves["replica_id"] = accepted["replica_id"].astype(np.int64).loc[moves.index].to_numpy()
    moves = moves.sort_values("time", kind="stable", ignore_index=True)
    num_there = moves.groupby("replica_id")["change"].cumsum()
    is_idle = num_there == 0
    is_busy_again = (num_there == 1) & (moves["change"] == 1)
    columns = ["time", "replica_id"]
    return moves.loc[is_idle, columns], moves.loc[is_busy_again, columns]
