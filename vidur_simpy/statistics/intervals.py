"""Intervals for means and quantiles of values that resemble their neighbours.

Latencies of neighbouring requests resemble each other, so a run of 10,000 requests tells as much
as fewer independent ones; `mean_error` says how much. Several runs on independent seeds
(replications) are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.statistics.mean_error import batches, error_of_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "MIN_EFFECTIVE",
    "Interval",
    "Runs",
    "difference_interval",
    "mean_interval",
    "name_of_quantile",
    "num_values_needed",
    "quantile_interval",
]

Runs: TypeAlias = "NDArray[np.float64] | Sequence[NDArray[np.float64]]"

# Below it, intervals for queues were measured to cover less than they say.
MIN_EFFECTIVE = 100


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the true value with some confidence.

    Attributes
    ----------
    estimate, low, high : float
        In the unit of the values; an end is infinite where there are too few values to bound it.
    confidence : float
        Chance that an interval made this way holds the true value.
    num_values : int
        Values that were used.
    num_effective : float
        As many independent values would tell the same.
    num_cut : int
        Values cut as warm-up.
    notes : tuple of str
        Why the interval may be wrong, if it may.

    Examples
    --------
    >>> Interval(1.5, 1.25, 1.75, 0.95, 1000, 240.0)
    <Interval: 1.5 (95 %: 1.25 to 1.75) from 1,000 values worth 240>
    >>> 1.3 in Interval(1.5, 1.25, 1.75, 0.95, 1000, 240.0)
    True
    """

    estimate: float
    low: float
    high: float
    confidence: float
    num_values: int
    num_effective: float
    num_cut: int = 0
    notes: tuple[str, ...] = ()

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __repr__(self) -> str:
        bounds = f"({100 * self.confidence:g} %: {self.low:.4g} to {self.high:.4g})"
        worth = f" worth {self.num_effective:,.0f}" if self.num_effective < self.num_values else ""
        cut = f", {self.num_cut:,} cut as warm-up" if self.num_cut else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"<Interval: {self.estimate:.4g} {bounds} from {self.num_values:,} values{worth}"
            f"{cut}{notes}>"
        )


def num_values_needed(quantile: float, confidence: float = 0.95) -> int:
    """Return how many independent values an interval for a quantile takes at least.

    Fewer have no order statistic that bounds it from both sides.

    Examples
    --------
    >>> [num_values_needed(quantile) for quantile in (0.5, 0.9, 0.95, 0.99)]
    [6, 36, 72, 368]
    """
    _check(quantile, confidence)
    tail = max(quantile, 1 - quantile)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(tail))


def mean_interval(runs: Runs, *, confidence: float = 0.95, is_correlated: bool = True) -> Interval:
    """Return the mean of all values with Student's interval.

    Parameters
    ----------
    runs : ndarray, or sequence of ndarray
        Values of one run, or of several independent ones, in order of time.
    confidence : float
    is_correlated : bool
        Whether neighbouring values may resemble each other.

    Returns
    -------
    Interval
        Corrected for skewness. All infinite if a value is.

    Raises
    ------
    ConfigError
        If there is no value, or the confidence does not lie between 0 and 1.

    Notes
    -----
    Skewness as Willink (2005), A confidence interval and test for the mean of an asymmetric
    distribution; correlation as :func:`vidur_simpy.statistics.mean_error.error_of_mean`.

    Examples
    --------
    >>> mean_interval(np.array([4.0, 5.0, 6.0]), is_correlated=False)
    <Interval: 5 (95 %: 2.516 to 7.484) from 3 values>
    """
    _check(0.5, confidence)
    arrays = _arrays(runs)
    values = np.concatenate(arrays)
    if np.isinf(values).any():
        return Interval(math.inf, math.inf, math.inf, confidence, len(values), 0.0)
    estimate, count = float(values.mean()), len(values)
    made = error_of_mean(arrays, is_correlated=is_correlated)
    if made.num_batches < 2:
        few = f"{count} values are too few for an interval"
        return Interval(estimate, -math.inf, math.inf, confidence, count, 0.0, notes=(few,))
    student = _student(made.freedom, confidence)
    low, high = (
        estimate - _unskewed(bound, made.skewness, made.num_batches) * made.error
        for bound in (student, -student)
    )
    num_effective = float(count)
    if is_correlated and made.error > 0:
        num_effective = min(num_effective, float(values.var()) / made.error**2)
    notes = _notes_of_length(num_effective) if is_correlated else ()
    return Interval(estimate, low, high, confidence, count, num_effective, notes=notes)


def quantile_interval(
    runs: Runs, quantile: float, *, confidence: float = 0.95, is_correlated: bool = True
) -> Interval:
    """Return a quantile of all values with an interval between two order statistics.

    Parameters
    ----------
    runs : ndarray, or sequence of ndarray
        Values of one run, or of several independent ones, in order of time; infinite ones are
        allowed (a request that was never served).
    quantile : float
        Between 0 and 1.
    confidence : float
    is_correlated : bool
        Whether neighbouring values may resemble each other.

    Returns
    -------
    Interval
        Its ends are values; infinite where there are too few.

    Raises
    ------
    ConfigError
        If there is no value, or the quantile or the confidence does not lie between 0 and 1.

    Notes
    -----
    Woodruff (1952), Confidence intervals for medians and other position measures: the share of
    values below the quantile has an interval, and its ends are the ranks. That interval is the
    binomial one (exact for independent values) for as many independent values as the error of the
    share says; that this error is itself an estimate widens it as in Korn and Graubard (1998),
    Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data.

    Examples
    --------
    >>> quantile_interval(np.arange(1000.0), 0.9, is_correlated=False)
    <Interval: 899.1 (95 %: 880 to 918) from 1,000 values>
    """
    _check(quantile, confidence)
    arrays = _arrays(runs)
    values = np.sort(np.concatenate(arrays))
    estimate, count = _quantile(values, quantile), len(values)
    num_effective = num_sure = float(count)
    if is_correlated:
        num_effective, freedom = _num_effective_of_share(arrays, estimate)
        num_sure = num_effective * (_normal(confidence) / _student(freedom, confidence)) ** 2
    low, high = _ranks(quantile, num_sure, count, confidence)
    return Interval(
        estimate,
        float(values[low - 1]) if low >= 1 else -math.inf,
        float(values[high - 1]) if high <= count else math.inf,
        confidence,
        count,
        num_effective,
        notes=_notes_of_quantile(quantile, confidence, count, num_sure)
        or (_notes_of_length(num_effective) if is_correlated else ()),
    )


def difference_interval(
    first: Runs, second: Runs, quantile: float | None = None, *, confidence: float = 0.95
) -> Interval:
    """Return by how much the mean or a quantile of the second values is greater than of the first.

    Parameters
    ----------
    first, second : ndarray, or sequence of ndarray
        Values that belong together in pairs: of the same requests, in order of time.
    quantile : float, optional
        Between 0 and 1; None compares means.
    confidence : float

    Raises
    ------
    ConfigError
        If there are no values, or not as many of the one as of the other.

    Notes
    -----
    For a mean, the interval is that of the differences. For a quantile it is Student's around the
    difference of the quantiles, with the spread of the same difference over batches, or over
    replications ("sectioning": Asmussen and Glynn, Stochastic Simulation, 2007, section III.5).

    Examples
    --------
    >>> before = np.arange(100.0)
    >>> difference_interval(before, before + 2.0)
    <Interval: 2 (95 %: 2 to 2) from 100 values>
    """
    befores, laters = _arrays(first), _arrays(second)
    if [len(array) for array in befores] != [len(array) for array in laters]:
        raise ConfigError("a difference needs as many values of the one as of the other.")
    pairs = list(zip(befores, laters, strict=True))
    if quantile is None:
        return mean_interval([later - before for before, later in pairs], confidence=confidence)
    _check(quantile, confidence)
    estimate = _gap(np.concatenate(befores), np.concatenate(laters), quantile)
    gaps = [
        _gap(*section, quantile)
        for before, later in pairs
        for section in zip(batches(before, len(pairs)), batches(later, len(pairs)), strict=True)
    ]
    half, count = math.inf, sum(len(before) for before in befores)
    if len(gaps) > 1:
        squares = sum((gap - estimate) ** 2 for gap in gaps) / (len(gaps) - 1)
        half = _student(len(gaps) - 1, confidence) * math.sqrt(squares / len(gaps))
    notes = _notes_of_quantile(quantile, confidence, count, count)
    return Interval(
        estimate, estimate - half, estimate + half, confidence, count, float(count), notes=notes
    )


def name_of_quantile(quantile: float) -> str:
    """Return a quantile as people write it.

    >>> name_of_quantile(0.99), name_of_quantile(0.999)
    ('p99', 'p99.9')
    """
    return f"p{100 * quantile:.10g}"


def _gap(before: NDArray[np.float64], later: NDArray[np.float64], quantile: float) -> float:
    """Return by how much a quantile of the later values is greater."""
    return _quantile(np.sort(later), quantile) - _quantile(np.sort(before), quantile)


def _check(quantile: float, confidence: float) -> None:
    for name, value in (("quantile", quantile), ("confidence", confidence)):
        if not (isinstance(value, int | float) and 0 < value < 1):
            raise ConfigError(f"{name} = {value!r}: expected a number between 0 and 1.")


def _arrays(runs: Any) -> list[NDArray[np.float64]]:
    is_one = isinstance(runs, np.ndarray) or not len(runs) or np.ndim(runs[0]) == 0
    arrays = [np.asarray(run, np.float64) for run in ([runs] if is_one else runs)]
    arrays = [array for array in arrays if len(array)]
    if not arrays:
        raise ConfigError("an interval needs at least one value, there is none.")
    return arrays


def _unskewed(quantile: float, skewness: float, count: int) -> float:
    """Return Student's quantile as it is for a skewed distribution."""
    slant = skewness / (6 * math.sqrt(count))
    if abs(slant) < 1e-6:
        return quantile
    return (math.cbrt(1 + 6 * slant * (quantile - slant)) - 1) / (2 * slant)


def _num_effective_of_share(
    arrays: Sequence[NDArray[np.float64]], limit: float
) -> tuple[float, int]:
    """Return what the share of values up to a limit is worth, and its degrees of freedom."""
    is_below = [
        (array <= limit if math.isfinite(limit) else array < limit).astype(np.float64)
        for array in arrays
    ]
    made = error_of_mean(is_below)
    pooled = np.concatenate(is_below)
    if made.num_batches < 2:
        return 0.0, 1
    if made.error == 0:
        return float(len(pooled)), made.freedom
    return min(float(len(pooled)), float(pooled.var()) / made.error**2), made.freedom


def _quantile(ordered: NDArray[np.float64], quantile: float) -> float:
    """Return what `numpy.quantile` does, with infinite values allowed."""
    position = quantile * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return float(below if below == above else below + (above - below) * (position % 1.0))


def _ranks(
    quantile: float, num_effective: float, num_values: int, confidence: float
) -> tuple[int, int]:
    """Return the ranks, from 1, of the values that bound a quantile; outside if none does."""
    if num_effective < 1:
        return 0, num_values + 1
    tail = (1 - confidence) / 2
    low = _binomial(tail, num_effective, quantile)
    high = _binomial(1 - tail, num_effective, quantile)
    stretch = num_values / num_effective
    return math.floor(low * stretch) + 1, math.ceil((high + 1) * stretch)


def _binomial(share: float, num_trials: float, chance: float) -> float:
    """Return the count, between whole ones, that has a share of the distribution up to it; or -1.

    Its ends are counts of an exact test, so a root that is whole but for rounding is whole.
    """
    special = _special()
    if (1 - chance) ** num_trials > share:
        return -1.0
    return round(float(special.bdtrik(share, num_trials, chance)), 9)


def _student(freedom: int, confidence: float) -> float:
    return float(_special().stdtrit(freedom, (1 + confidence) / 2))


def _normal(confidence: float) -> float:
    return float(_special().ndtri((1 + confidence) / 2))


def _notes_of_length(num_effective: float) -> tuple[str, ...]:
    if num_effective >= MIN_EFFECTIVE:
        return ()
    return (
        f"worth only {num_effective:.0f} independent values: the interval may be too narrow, use "
        "more requests",
    )


def _notes_of_quantile(
    quantile: float, confidence: float, count: int, num_effective: float
) -> tuple[str, ...]:
    needed = num_values_needed(quantile, confidence)
    if num_effective >= needed:
        return ()
    worth = f" worth {num_effective:.0f} independent ones" if num_effective < count else ""
    name = name_of_quantile(quantile)
    return (f"too few values for a {name}: {count}{worth}, expected at least {needed}",)


def _special() -> Any:
    try:
        from scipy import special
    except ImportError:
        raise ConfigError(
            "intervals need scipy, which is not installed: pip install 'vidur-simpy[statistics]'."
        ) from None
    return special
