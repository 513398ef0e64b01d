"""Least squares with few parameters, and how sure their result is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ROBUST_AT",
    "Fit",
    "averaged_least_squares",
    "blocks_of",
    "covariance_of",
    "drift_of",
    "robust_least_squares",
]

NUM_BLOCKS = 8
"""Pieces that rows are taken in to see how much they share, unless there are runs enough."""

ROBUST_AT = 3.0
"""Relative residuals beyond so many times their spread count less (Huber)."""

# A search goes on while steps leave less than this share of the cost; it ends after so many that
# do not, and averages over further ones.
MUCH_LESS = 0.9
MAX_VAIN = 2
NUM_AVERAGED = 10


class Fit(NamedTuple):
    """Where a fit ended, and what its errors follow from.

    Attributes
    ----------
    values : ndarray of float, shape (k,)
        The parameters.
    residuals : ndarray of float, shape (n,)
        Relative.
    jacobian : ndarray of float, shape (n, k)
        What a unit of each parameter adds to the prediction behind each residual.
    prior : ndarray of float, shape (k,)
        How far from its start each was expected.
    """

    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    jacobian: NDArray[np.float64]
    prior: NDArray[np.float64]


def covariance_of(fit: Fit, blocks: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the covariance of the parameters: of independent rows, and of what blocks share.

    The first part is that of least squares; the second adds up the residuals of each block before
    it squares them ("cluster robust"), so that a block in which the machine was slow counts once.

    Parameters
    ----------
    fit : Fit
        Of k parameters to n rows.
    blocks : ndarray of int, shape (n,)
        As `blocks_of` gives them.
    """
    variance = max(float(np.mean(fit.residuals**2)), 1e-12)
    jacobian = fit.jacobian * fit.prior
    inverse = np.linalg.inv(jacobian.T @ jacobian + variance * np.eye(len(fit.prior)))
    scores = jacobian * fit.residuals[:, None]
    num_blocks = int(blocks.max()) + 1
    sums = np.zeros((num_blocks, len(fit.values)))
    np.add.at(sums, blocks, scores)
    sums -= sums.mean(axis=0)
    shared = inverse @ (sums.T @ sums) @ inverse * num_blocks / max(num_blocks - 1, 1)
    scaled = variance * inverse + shared
    covariance: NDArray[np.float64] = (scaled + scaled.T) / 2 * np.outer(fit.prior, fit.prior)
    return covariance


def blocks_of(runs: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the block of each row: its run, or a piece of its run where there are few.

    >>> blocks_of(np.array([0, 0, 0, 0])).tolist(), blocks_of(np.array([5, 5, 1, 2, 3])).tolist()
    ([0, 1, 2, 3], [3, 3, 0, 1, 2])
    """
    names, run, counts = np.unique(runs, return_inverse=True, return_counts=True)
    pieces = -(-NUM_BLOCKS // len(names)) if len(names) < NUM_BLOCKS // 2 else 1
    order = np.argsort(run, kind="stable")
    place = np.empty(len(runs), np.intp)
    place[order] = np.concatenate([np.arange(count) for count in counts])
    piece = place * pieces // counts[run]
    blocks: NDArray[np.intp] = np.unique(run * pieces + piece, return_inverse=True)[1]
    return blocks


def drift_of(
    measured: NDArray[np.float64], predicted: NDArray[np.float64], blocks: NDArray[np.intp]
) -> float:
    """Return the standard deviation, over blocks, of log(measured time / predicted time)."""
    sums = [np.bincount(blocks, weights=times) for times in (measured, predicted)]
    is_there = (sums[0] > 0) & (sums[1] > 0)
    ratios = np.log(sums[0][is_there] / sums[1][is_there])
    return float(ratios.std(ddof=1)) if len(ratios) > 1 else 0.0


def robust_least_squares(
    design: NDArray[np.float64],
    target: NDArray[np.float64],
    start: NDArray[np.float64],
    prior: NDArray[np.float64],
    lowest: NDArray[np.float64],
) -> Fit:
    """Fit ``design @ values`` to a target, by relative errors.

    They are relative to what is predicted, not to the target, which would favour small
    predictions; rows beyond `ROBUST_AT` spreads weigh less. Both need a few rounds.

    Parameters
    ----------
    design : ndarray of float, shape (n, 1 + k)
        What is added to each row by a constant, and by a unit of each parameter.
    target : ndarray of float, shape (n,)
        What is to be met, > 0.
    start, prior, lowest : ndarray of float, shape (k,)
        The neutral values, to which the parameters are held as if by one more row with an error of
        `prior`; and the least they may be.
    """
    constant, design = design[:, 0] + design[:, 1:] @ start, design[:, 1:] * prior
    steps, bounds = np.zeros(len(prior)), (lowest - start) / prior
    for _ in range(50):
        predicted = np.maximum(constant + design @ steps, 1e-3 * target)
        relative = (target - predicted) / predicted
        spread = max(1.4826 * float(np.median(np.abs(relative))), 1e-9)
        weights = np.sqrt(np.minimum(1.0, ROBUST_AT * spread / np.maximum(abs(relative), 1e-12)))
        scaled = weights / predicted
        before = steps
        steps = _bounded_least_squares(
            np.vstack([design * scaled[:, None], spread * np.eye(len(prior))]),
            np.concatenate([(target - constant) * scaled, np.zeros(len(prior))]),
            bounds,
        )
        if np.all(np.abs(steps - before) <= 1e-9):
            break
    predicted = np.maximum(constant + design @ steps, 1e-3 * target)
    residuals = weights * (target - predicted) / predicted
    return Fit(start + prior * steps, residuals, design * scaled[:, None] / prior, prior)


def averaged_least_squares(
    residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    jacobian: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    lowest: NDArray[np.float64],
    *,
    far: float,
) -> NDArray[np.float64]:
    """Return the steps from zero at which residuals are orthogonal to their slopes on average.

    Made for residuals that jump, as those of a simulation do, and an approximate Jacobian. It goes
    down by Levenberg and Marquardt's method as long as that gains much. Then it averages: further
    steps of Gauss and Newton, the k-th shortened to 1 / (k + 1/2) of its length (Robbins and
    Monro). The lowest sum of squares found would be no good answer: it is a lucky jump, and
    longer latencies have smaller relative jumps.

    Parameters
    ----------
    residuals, jacobian : callable
        Of steps, shape (k,).
    lowest : ndarray of float, shape (k,)
        The least that the steps may be.
    far : float
        Residuals beyond count by their size instead of its square (Huber).
    """
    steps = np.zeros(len(lowest))
    rows, slopes = residuals(steps), jacobian(steps)
    cost, damping, num_vain = _huber(rows, far), 0.01, 0
    while num_vain < MAX_VAIN:
        trial = np.maximum(steps - _newton_step(rows, slopes, far, damping), lowest)
        trial_rows = residuals(trial)
        trial_cost = _huber(trial_rows, far)
        num_vain += trial_cost >= MUCH_LESS * cost
        if trial_cost < cost:
            steps, rows, cost, damping = trial, trial_rows, trial_cost, damping / 5
            slopes = jacobian(steps)
        else:
            damping *= 5
    for count in range(1, NUM_AVERAGED + 1):
        change = _newton_step(rows, slopes, far, 0.0)
        steps = steps + (np.maximum(steps - change, lowest) - steps) / (count + 0.5)
        rows, slopes = residuals(steps), jacobian(steps)
    return steps


def _newton_step(
    rows: NDArray[np.float64], slopes: NDArray[np.float64], far: float, damping: float
) -> NDArray[np.float64]:
    weighted = slopes * (far / np.maximum(np.abs(rows), far))[:, None]
    normal = slopes.T @ weighted
    damped = normal + damping * np.diag(np.diag(normal))
    return np.asarray(np.linalg.solve(damped, weighted.T @ rows), np.float64)


def _huber(residuals: NDArray[np.float64], far: float) -> float:
    size = np.abs(residuals)
    return float(np.where(size < far, size**2, far * (2 * size - far)).sum())


def _bounded_least_squares(
    design: NDArray[np.float64], target: NDArray[np.float64], lowest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Solve least squares; what would be below its bound is fixed there."""
    values = lowest.copy()
    is_free = np.full(len(lowest), True)
    while is_free.any():
        rest = target - design[:, ~is_free] @ lowest[~is_free]
        solved = np.linalg.lstsq(design[:, is_free], rest, rcond=None)[0]
        values[is_free] = solved
        is_below = is_free & (values < lowest)
        if not is_below.any():
            break
        values[is_below] = lowest[is_below]
        is_free &= ~is_below
    return values
