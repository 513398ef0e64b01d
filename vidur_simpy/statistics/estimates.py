"""How sure a number of a result is, and whether two results differ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.series import numbers
from vidur_simpy.statistics.intervals import (
    Interval,
    difference_interval,
    mean_interval,
    quantile_interval,
)
from vidur_simpy.statistics.warm_up import is_half, warm_up_length

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from vidur_simpy.result import Result

    Results: TypeAlias = Result | Sequence[Result]

__all__ = ["interval", "paired_difference"]


def interval(
    results: Result | Sequence[Result],
    metric: str,
    quantile: float | None = None,
    *,
    confidence: float = 0.95,
    warm_up: float | None = None,
) -> Interval:
    """Return a metric's mean, or a quantile of it, and how sure that is.

    ``result.interval("ttft", 0.99)`` is ``interval(result, "ttft", 0.99)``. It says what luck the
    run had with its random numbers; `simulate_with_uncertainty` says how far execution times may
    be off.

    Parameters
    ----------
    results : Result or sequence of Result
        One run, or replications on independent seeds.
    metric : str
        A numeric column of ``result.requests``, or ``"itl"``, whose values are those of all gaps
        between tokens (needs ``record=("tokens",)``). Requests without a value are left out, and
        a note says how many.
    quantile : float, optional
        Between 0 and 1; None is the mean.
    confidence : float
    warm_up : float, optional
        Leave out what arrived before this many seconds; None cuts each run where
        `warm_up_length` says, unless `Result.after` did.

    Returns
    -------
    Interval
        Its notes say what makes it doubtful: too few requests for a p99, no steady state.

    Warns
    -----
    UserWarning
        With each note.

    Raises
    ------
    ConfigError
        If there is no such metric or no value of it, or a number is out of range.

    Examples
    --------
    >>> import vidur_simpy as vs
    >>> cluster = vs.Cluster(execution_time=vs.Linear())
    >>> workload = vs.Workload(vs.Poisson(9.0), vs.FixedLengths(512, 16), num_requests=2_000)
    >>> result = vs.simulate(cluster, workload)
    >>> result.interval("ttft")
    <Interval: 0.01893 (95 %: 0.01846 to 0.01936) from 2,000 values worth 1,063>
    >>> result.interval("ttft", 0.99)
    <Interval: 0.0402 (95 %: 0.03776 to 0.04249) from 2,000 values>
    """
    listed = _listed(results)
    series = [_values_of(result, metric) for result in listed]
    starts, warming_notes = _starts(listed, series, warm_up)
    runs = [each.values[start:] for each, start in zip(series, starts, strict=True)]
    if not sum(map(len, runs)):
        raise ConfigError(f"interval({metric!r}): no request has a value.")
    if quantile is None:
        made = mean_interval(runs, confidence=confidence)
    else:
        made = quantile_interval(runs, quantile, confidence=confidence)
    missing_notes = [each.note for each in series if each.note]
    notes = dict.fromkeys([*made.notes, *warming_notes, *missing_notes])
    for note in notes:
        warnings.warn(f"{metric}: {note}.", stacklevel=2)
    return replace(made, num_cut=sum(starts), notes=tuple(notes))


def paired_difference(
    first: Result | Sequence[Result],
    second: Result | Sequence[Result],
    metric: str,
    quantile: float | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Return by how much a metric of the second is greater, and how sure that is.

    The two ran the same requests (the same workload and seed), so that what luck they share drops
    out. An interval without 0 tells them apart.

    Parameters
    ----------
    first, second : Result or sequence of Result
        One run each, or replications in the same order of seeds.
    metric : str
        A numeric column of ``result.requests``. Only requests with a value in both count.
    quantile : float, optional
        Compare this quantile; None compares means, request by request.
    confidence : float

    Raises
    ------
    ConfigError
        If the two do not have the same requests, or nothing is left to compare.
    """
    sides = _listed(first), _listed(second)
    if len(sides[0]) != len(sides[1]):
        raise ConfigError(
            f"paired_difference(): {len(sides[0])} runs and {len(sides[1])}: expected as many of "
            "the one as of the other."
        )
    pairs = [_paired_values(*pair, metric) for pair in zip(*sides, strict=True)]
    if not sum(len(before) for before, _ in pairs):
        raise ConfigError(f"paired_difference({metric!r}): no request has a value in both.")
    befores, laters = zip(*pairs, strict=True)
    return difference_interval(befores, laters, quantile, confidence=confidence)


class _Series(NamedTuple):
    """The values of a metric in order of time, and what was left out."""

    instants: NDArray[np.float64]
    values: NDArray[np.float64]
    note: str = ""


def _values_of(result: Result, metric: str) -> _Series:
    if metric == "itl":
        tokens = result.tokens.sort_values("time", kind="stable")
        counts = tokens["num_tokens"].to_numpy(dtype=np.int64)
        instants = np.repeat(tokens["time"].to_numpy(np.float64), counts)
        return _Series(
            instants, np.repeat(tokens["inter_token_latency"].to_numpy(np.float64), counts)
        )
    requests = result.requests
    values = numbers(requests, metric)
    is_there = ~np.isnan(values)
    # A request of one output token has no TPOT, which is as it should be.
    num_missing = int((~is_there & requests["completed_at"].isna().to_numpy()).sum())
    note = f"{num_missing:,} of {len(requests):,} requests have no {metric}" if num_missing else ""
    instants = requests["arrived_at"].to_numpy(np.float64)
    return _Series(instants[is_there], values[is_there], note)


def _starts(
    results: list[Result], series: list[_Series], warm_up: float | None
) -> tuple[list[int], list[str]]:
    """Return how many values of each run to cut."""
    if warm_up is not None:
        return [int(np.searchsorted(each.instants, warm_up)) for each in series], []
    if any("measured_from" in result.info for result in results):
        return [0 for _ in series], []
    runs = [each.values for each in series]
    cut = warm_up_length(runs)
    notes = ["it grows through half of the run: no steady state"] if is_half(cut, runs) else []
    return [cut if len(run) else 0 for run in runs], notes


def _paired_values(
    first: Result, second: Result, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the values of the requests that have one in both."""
    ids = [result.requests["request_id"].to_numpy() for result in (first, second)]
    if not np.array_equal(ids[0], ids[1]):
        raise ConfigError(
            "paired_difference() needs runs of the same requests: give both the same workload and "
            "seed."
        )
    before, later = (numbers(result.requests, metric) for result in (first, second))
    is_there = ~np.isnan(before) & ~np.isnan(later)
    return before[is_there], later[is_there]


def _listed(results: Results) -> list[Result]:
    return list(results) if isinstance(results, Sequence) else [results]
