"""How far statistics of two runs differ by chance, from resampling blocks of their requests.

Latencies of neighbouring requests resemble each other: they wait in the same queue. So blocks of
neighbours are drawn with replacement, not single requests (Carlstein, Annals of Statistics 14,
1986), and one draw serves every statistic of a run, which tells how they vary together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MIN_BLOCKS", "Blocks", "block_length", "joint_intervals"]

MIN_BLOCKS = 20
MAX_BLOCKS = 1_000
GRID = 400


def block_length(values: NDArray[np.float64]) -> float:
    """Return how many neighbours a block should have, at least 1.

    It is the rule of Politis and White (Econometric Reviews 23, 2004; corrected by Patton, Politis
    and White, 28, 2009) for circular blocks: the more values resemble later ones, the longer.

    Parameters
    ----------
    values : ndarray, shape (n,)
        In order of time; NaN are left out.
    """
    values = values[~np.isnan(values)]
    count = len(values)
    if count < MIN_BLOCKS or np.ptp(values) == 0:
        return 1.0
    covariance = _autocovariance(values, int(math.sqrt(count)) + 10)
    bound = 2 * math.sqrt(math.log10(count) / count)
    quiet = max(5, int(math.sqrt(math.log10(count))))
    is_small = np.abs(covariance[1:] / covariance[0]) < bound
    runs = np.convolve(is_small, np.ones(quiet), mode="valid") == quiet
    first = int(np.argmax(runs)) if runs.any() else len(is_small)
    if first == 0:
        return 1.0
    lags = np.arange(1, min(2 * first, len(covariance) - 1) + 1)
    window = np.minimum(1.0, 2.0 * (1.0 - lags / lags[-1]))
    weighted = window * covariance[lags]
    spread = covariance[0] + 2 * weighted.sum()
    bend = 2 * (lags * weighted).sum()
    if spread <= 0:
        return 1.0
    return max(1.0, float((1.5 * bend**2 / spread**2 * count) ** (1 / 3)))


class Blocks:
    """The requests of a run in blocks of neighbours, and how often each draw takes each block.

    Parameters
    ----------
    num_requests : int
    length : float
        Requests in a block; brought within bounds, so that there are 20 to 1,000 blocks.
    num_resamples : int
    rng : Generator

    Attributes
    ----------
    length : int
        Requests in a block.
    is_cut : bool
        Whether blocks are shorter than asked for, as the run is too short.
    """

    def __init__(
        self, num_requests: int, length: float, num_resamples: int, rng: np.random.Generator
    ) -> None:
        longest = max(1, num_requests // MIN_BLOCKS)
        self.is_cut = length > longest
        self.length = max(min(math.ceil(length), longest), math.ceil(num_requests / MAX_BLOCKS))
        self._block = np.arange(num_requests) // self.length
        self.num_blocks = int(self._block[-1]) + 1 if num_requests else 1
        drawn = rng.multinomial(
            self.num_blocks, np.full(self.num_blocks, 1 / self.num_blocks), size=num_resamples
        )
        # The first row is the run as it is.
        self._weights = np.vstack((np.ones((1, self.num_blocks)), drawn))

    def statistics(
        self, values: NDArray[np.float64], quantiles: Sequence[float]
    ) -> NDArray[np.float64]:
        """Return the mean and the quantiles of the run (first) and of each draw.

        Parameters
        ----------
        values : ndarray, shape (num_requests,)
            NaN are left out.
        quantiles : sequence of float

        Returns
        -------
        ndarray, shape (1 + num_resamples, 1 + number of quantiles)
        """
        is_there = ~np.isnan(values)
        block, values = self._block[is_there], values[is_there]
        grid = _grid(values, quantiles, self.length)
        cell = np.searchsorted(grid, values, side="left")
        counts = np.bincount(block * len(grid) + cell, minlength=self.num_blocks * len(grid))
        below = counts.reshape(self.num_blocks, len(grid)).cumsum(axis=1)
        sums = np.bincount(block, weights=values, minlength=self.num_blocks)
        drawn_below = self._weights @ below
        totals = np.maximum(drawn_below[:, -1], 1.0)
        means = self._weights @ sums / totals
        shares = drawn_below / totals[:, np.newaxis]
        return np.column_stack([means, *(_inverse(shares, grid, q) for q in quantiles)])


def joint_intervals(
    differences: NDArray[np.float64], num_blocks: int, confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the standard error of each difference, and how far its interval reaches.

    All intervals hold together with this confidence: their common width, in standard errors, is
    what the largest deviation of a draw stays within (the "max-T" bootstrap).

    Parameters
    ----------
    differences : ndarray, shape (1 + num_resamples, k)
        The estimates first, then those of each draw.
    num_blocks : int
        Blocks of the shortest run.
    confidence : float

    Returns
    -------
    tuple of ndarray, shape (k,)
        Standard errors, and half widths: intervals reach as far to either side.
    """
    deviations = differences[1:] - differences[0]
    errors = np.sqrt((deviations**2).mean(axis=0) * num_blocks / max(1, num_blocks - 1))
    varies = errors > 0
    if not varies.any():
        return errors, errors
    largest = np.abs(deviations[:, varies] / errors[varies]).max(axis=1)
    reach = np.quantile(largest, confidence)
    # From few blocks errors are not well known: as Student's quantile exceeds the normal one.
    reach *= 1 + (reach**2 + 1) / (4 * max(1, num_blocks - 1))
    return errors, errors * reach


def _autocovariance(values: NDArray[np.float64], num_lags: int) -> NDArray[np.float64]:
    """Return the autocovariance of lags 0 to `num_lags`, by Fourier transform."""
    centred = values - values.mean()
    transform = np.fft.rfft(centred, 2 * len(values))
    products = np.fft.irfft(transform * transform.conj())[: num_lags + 1]
    covariance: NDArray[np.float64] = products / len(values)
    return covariance


def _grid(
    values: NDArray[np.float64], quantiles: Sequence[float], length: int
) -> NDArray[np.float64]:
    """Return the values at which the distribution is looked up: all, or those near quantiles."""
    ordered = np.sort(values)
    last = len(ordered) - 1
    if last < GRID * len(quantiles):
        return np.unique(ordered) if len(ordered) else np.zeros(1)
    ranks = [np.array([0, last])]
    for quantile in quantiles:
        # As far as the quantile of a draw may lie, were the values of a block all alike.
        reach = 6 * math.sqrt(quantile * (1 - quantile) * length / len(ordered))
        near = np.linspace(max(0.0, quantile - reach), min(1.0, quantile + reach), GRID)
        ranks.append(np.rint(near * last).astype(np.int64))
    return np.unique(ordered[np.concatenate(ranks)])


def _inverse(
    shares: NDArray[np.float64], grid: NDArray[np.float64], quantile: float
) -> NDArray[np.float64]:
    """Return where each distribution, a row of `shares` over the grid, reaches the quantile."""
    upper = np.argmax(shares >= quantile, axis=1)
    lower = np.maximum(upper - 1, 0)
    rows = np.arange(len(shares))
    low, high = shares[rows, lower], shares[rows, upper]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(high > low, (quantile - low) / (high - low), 1.0)
    found: NDArray[np.float64] = grid[lower] + np.clip(part, 0.0, 1.0) * (grid[upper] - grid[lower])
    return found
