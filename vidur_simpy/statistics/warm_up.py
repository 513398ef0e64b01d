"""How long a run takes to settle: where to cut its warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["is_half", "mser5", "warm_up_length"]


def mser5(values: NDArray[np.float64]) -> int:
    """Return how many values to cut at the start by the rule MSER-5.

    The cut is where the standard error of the mean of the rest, from means of five values, is
    least; at most half of the values are cut.

    Notes
    -----
    White, Cobb and Spratt (2000), A comparison of five steady-state truncation heuristics for
    simulation.

    Examples
    --------
    >>> mser5(np.array([0.0] * 20 + [9.0, 11.0] * 40))
    20
    """
    num_batches = len(values) // 5
    if num_batches < 2:
        return 0
    # Sums over the rest for each possible cut, from the end.
    means = np.asarray(values[: 5 * num_batches], np.float64).reshape(-1, 5).mean(axis=1)[::-1]
    means = means - means.mean()  # sums of squares of large close numbers would cancel
    count = np.arange(1, num_batches + 1)
    squares = np.cumsum(means**2) - np.cumsum(means) ** 2 / count
    errors = (squares / count**2)[::-1]
    return 5 * int(np.argmin(errors[: num_batches // 2 + 1]))


def warm_up_length(runs: Sequence[NDArray[np.float64]]) -> int:
    """Return how many values to cut at the start of each run: MSER-5, where they are low.

    Several runs are averaged first, value by value. A simulation starts empty, so that its
    latencies warm up from below. MSER-5 alone also cuts runs that happen to start with a busy
    spell, which belongs to what is measured: on M/M/1 that made means up to 12 % too low
    (``tests/benchmarks/interval_coverage.py --warm-up mser5``).

    Parameters
    ----------
    runs : sequence of ndarray
        Values of each run in order of time; an infinite one counts as the greatest finite one.

    Examples
    --------
    >>> warm_up_length([np.array([1.0] * 20 + [9.0, 11.0] * 40)])
    20
    >>> warm_up_length([np.array([19.0] * 20 + [9.0, 11.0] * 40)])
    0
    """
    arrays = [array for array in runs if len(array)]
    if not arrays:
        return 0
    shortest = min(len(array) for array in arrays)
    average = np.mean([_finite(array[:shortest]) for array in arrays], axis=0)
    cut = mser5(average)
    return cut if cut and average[:cut].mean() < average[cut:].mean() else 0


def is_half(cut: int, runs: Sequence[NDArray[np.float64]]) -> bool:
    """Return whether a cut is the longest that :func:`mser5` makes: the runs have not settled."""
    shortest = min((len(run) for run in runs if len(run)), default=0)
    return cut > 0 and cut >= 5 * (shortest // 5 // 2)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    is_finite = np.isfinite(values)
    if is_finite.all():
        return values
    return np.where(is_finite, values, values[is_finite].max(initial=0.0))
