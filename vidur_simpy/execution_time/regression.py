"""Regressions of measured times on one or two sizes, with their cross-validated errors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time.cache import Arrays, cached
from vidur_simpy.execution_time.interpolation import Curve, Plane

__all__ = ["GRIDS", "Polynomial", "Regression", "Search", "Steps", "check_available", "fitted"]

Predict: TypeAlias = Callable[[Sequence[float]], float]
"""The time at a point, one size per feature."""

LAYOUT = 1
"""Changes with what is kept on disk, so that nothing older is read."""


class Search(NamedTuple):
    """The settings that cross-validation chooses from.

    Attributes
    ----------
    num_folds : int
    num_trees, max_depth, min_samples_split : tuple of int
        Of the random forest.
    degree : tuple of int
        Of the polynomial.
    """

    num_folds: int
    num_trees: tuple[int, ...]
    max_depth: tuple[int, ...]
    min_samples_split: tuple[int, ...]
    degree: tuple[int, ...] = (1, 2, 3, 4, 5)


GRIDS = {
    "fast": Search(5, (50,), (32,), (2, 5, 10)),
    "vidur": Search(10, (250, 500, 750), (8, 16, 32), (2, 5, 10)),
}
"""The grid that Vidur searches, and a small part of it that loses next to nothing."""


class Regression(NamedTuple):
    """A fit to measured times.

    Attributes
    ----------
    predict : callable
        Takes one size per feature and returns the time, in the unit of the times fitted to.
    error : float
        Mean absolute percentage error of points left out in cross-validation, as a fraction.
    settings : dict
        What the search chose.
    """

    predict: Predict
    error: float
    settings: dict[str, Any]


class Steps:
    """A function that is constant between steps, which is what a random forest is.

    A forest asks of a point only on which side of each of its thresholds it lies. One number per
    cell of the grid of all thresholds says as much as all its trees, and is found by bisection.

    Parameters
    ----------
    edges : sequence of ndarray of float
        Thresholds of each feature, ascending; a point at a threshold lies below it.
    values : ndarray of float, shape (len(edges[0]) + 1, ...)

    Examples
    --------
    >>> steps = Steps([np.array([10.0, 20.0])], np.array([1.0, 2.0, 3.0]))
    >>> steps([10.0]), steps([10.5]), steps([99.0])
    (1.0, 2.0, 3.0)
    """

    def __init__(self, edges: Sequence[NDArray[np.float64]], values: NDArray[np.float64]) -> None:
        self._edges = [thresholds.tolist() for thresholds in edges]
        self._values = values

    def __call__(self, point: Sequence[float]) -> float:
        """Return the value at a point."""
        cell = tuple(map(bisect_left, self._edges, point))
        return float(self._values[cell])


class Polynomial:
    """A polynomial in scaled sizes, never less than the least time it was fitted to.

    Parameters
    ----------
    scales : ndarray of float, shape (k,)
        Sizes are divided by these.
    powers : ndarray of int, shape (m, k)
        Exponents of each term.
    coefficients : ndarray of float, shape (m,)
    least : float

    Examples
    --------
    >>> square = Polynomial(np.array([2.0]), np.array([[0], [2]]), np.array([1.0, 4.0]), 0.5)
    >>> square([2.0]), square([3.0])
    (5.0, 10.0)
    """

    def __init__(
        self,
        scales: NDArray[np.float64],
        powers: NDArray[np.int64],
        coefficients: NDArray[np.float64],
        least: float,
    ) -> None:
        self._scales, self._powers = scales, powers
        self._coefficients, self._least = coefficients, least

    def __call__(self, point: Sequence[float]) -> float:
        """Return the value at a point."""
        terms = np.prod((np.asarray(point) / self._scales) ** self._powers, axis=1)
        return max(float(terms @ self._coefficients), self._least)


def fitted(
    name: str,
    points: NDArray[np.float64],
    times: NDArray[np.float64],
    regressor: str,
    grid: str = "fast",
) -> Regression:
    """Return a regressor fitted to times, with what cross-validation says about it.

    Times measured at the same point are averaged. The settings with the least mean absolute
    percentage error in cross-validation (folds drawn at random, always the same ones) are fitted
    to all points. Fits are kept on disk by the points, the settings and the version of
    scikit-learn; see `cached`. Interpolation is quick, needs no scikit-learn and is not kept.

    Parameters
    ----------
    name : str
        Of the operator, for people who look into the cache.
    points : ndarray of float, shape (n, k)
        One row per measurement, one column per feature.
    times : ndarray of float, shape (n,)
    regressor : str
        ``"random_forest"``, ``"polynomial"`` (least squares of relative deviations, degree
        searched) or ``"interpolation"``.
    grid : str
        A name in `GRIDS`.

    Raises
    ------
    ConfigError
        If scikit-learn is needed and not installed.

    Examples
    --------
    >>> sizes = np.arange(1.0, 30.0)[:, None]
    >>> line = fitted("line", sizes, 3 + 2 * sizes[:, 0], "interpolation")
    >>> line.predict([7.5])
    18.0
    """
    points, times = distinct(points, times)
    search = GRIDS[grid]
    if regressor == "interpolation":
        error = left_out_error(_interpolate, points, times, search.num_folds)
        return Regression(_interpolate(points, times), error, {})
    fit = {"random_forest": _fit_forest, "polynomial": _fit_polynomial}[regressor]
    key = {
        "layout": LAYOUT,
        "regressor": regressor,
        "search": search._asdict(),
        "scikit-learn": _version(),
        "rows": hashlib.sha256(np.column_stack([points, times]).tobytes()).hexdigest(),
    }
    arrays = cached(f"{name}-{regressor}", key, lambda: fit(points, times, search))
    settings = json.loads(str(arrays["settings"]))
    return Regression(_restored(regressor, arrays), float(arrays["error"]), settings)


def check_available(regressor: str) -> None:
    """Raise a ConfigError if a regressor needs what is not installed."""
    if regressor != "interpolation":
        _version()


def distinct(
    points: NDArray[np.float64], times: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distinct points in ascending order, with the mean of the times at each.

    >>> points, times = distinct(np.array([[2.0], [1.0], [2.0]]), np.array([3.0, 1.0, 5.0]))
    >>> points.tolist(), times.tolist()
    ([[1.0], [2.0]], [1.0, 4.0])
    """
    unique, place = np.unique(points, axis=0, return_inverse=True)
    place = place.reshape(-1)
    return unique, np.bincount(place, weights=times) / np.bincount(place)


def left_out_error(
    fit: Callable[[NDArray[np.float64], NDArray[np.float64]], Predict],
    points: NDArray[np.float64],
    times: NDArray[np.float64],
    num_folds: int,
) -> float:
    """Return the mean absolute percentage error at points left out, fold by fold."""
    errors = []
    for left_out in _folds(len(times), num_folds):
        kept = np.setdiff1d(np.arange(len(times)), left_out)
        predict = fit(points[kept], times[kept])
        errors += [abs(predict(points[row].tolist()) / times[row] - 1) for row in left_out]
    return float(np.mean(errors)) if errors else 0.0


def _folds(num_points: int, num_folds: int) -> Iterator[NDArray[np.int64]]:
    """Draw which points are left out together; none where there are too few to leave some out."""
    if num_points > 2:
        order = np.random.default_rng(0).permutation(num_points)
        yield from np.array_split(order, min(num_folds, num_points))


def _version() -> str:
    try:
        return importlib.metadata.version("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "Profile.regressor: random_forest and polynomial need scikit-learn; use "
            "interpolation, or pip install 'vidur-simpy[profile]'."
        ) from None


def _restored(regressor: str, arrays: Arrays) -> Predict:
    """Return the function that was kept as arrays."""
    if regressor == "polynomial":
        least = float(arrays["least"])
        return Polynomial(arrays["scales"], arrays["powers"], arrays["coefficients"], least)
    edges = [arrays[label] for label in sorted(arrays) if label.startswith("edges")]
    return Steps(edges, arrays["values"])


def _search(
    estimator: Any,
    settings: Mapping[str, Sequence[Any]],
    points: NDArray[np.float64],
    times: NDArray[np.float64],
    num_folds: int,
    **fit_settings: Any,
) -> tuple[Any, Arrays]:
    """Return the best estimator, fitted to all points, and what to keep about the search."""
    from sklearn.model_selection import GridSearchCV

    folds = list(_folds(len(times), num_folds))
    rows = np.arange(len(times))
    search = GridSearchCV(
        estimator,
        settings,
        scoring="neg_mean_absolute_percentage_error",
        cv=[(np.setdiff1d(rows, left_out), left_out) for left_out in folds],
        error_score="raise",
    )
    search.fit(points, times, **fit_settings)
    chosen = {label.rpartition("__")[2]: value for label, value in search.best_params_.items()}
    kept = {
        "settings": np.asarray(json.dumps(chosen)),
        "error": np.asarray(-search.best_score_),
    }
    return search.best_estimator_, kept


def _fit_forest(points: NDArray[np.float64], times: NDArray[np.float64], search: Search) -> Arrays:
    """Fit a random forest and tabulate it between its thresholds."""
    from sklearn.ensemble import RandomForestRegressor

    settings = {
        "n_estimators": search.num_trees,
        "max_depth": search.max_depth,
        "min_samples_split": search.min_samples_split,
    }
    estimator = RandomForestRegressor(random_state=0)
    forest, arrays = _search(estimator, settings, points, times, search.num_folds)
    trees = [tree.tree_ for tree in forest.estimators_]
    edges = [
        np.unique(np.concatenate([tree.threshold[tree.feature == axis] for tree in trees]))
        for axis in range(points.shape[1])
    ]
    # One point inside each cell: between thresholds, below the first, and above the last.
    inside = [
        np.concatenate([axis[:1] - 1, (axis[:-1] + axis[1:]) / 2, axis[-1:] + 1])
        if len(axis)
        else np.zeros(1)
        for axis in edges
    ]
    cells = np.stack(np.meshgrid(*inside, indexing="ij"), axis=-1)
    values = forest.predict(cells.reshape(-1, points.shape[1])).reshape(cells.shape[:-1])
    return arrays | {f"edges{axis}": row for axis, row in enumerate(edges)} | {"values": values}


def _fit_polynomial(
    points: NDArray[np.float64], times: NDArray[np.float64], search: Search
) -> Arrays:
    """Fit a polynomial to the times, weighted so that relative deviations count."""
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    scales = np.maximum(points.max(axis=0), 1e-300)
    # More terms than points to fit them to would fit anything.
    degrees = [degree for degree in search.degree if degree < len(times) // 2] or [1]
    line = LinearRegression(fit_intercept=False)
    pipeline, arrays = _search(
        make_pipeline(PolynomialFeatures(), line),
        {"polynomialfeatures__degree": degrees},
        points / scales,
        times,
        search.num_folds,
        linearregression__sample_weight=times**-2.0,
    )
    powers, coefficients = pipeline[0].powers_, pipeline[1].coef_
    terms = {"scales": scales, "powers": powers, "coefficients": coefficients}
    return arrays | terms | {"least": np.asarray(times.min())}


def _interpolate(points: NDArray[np.float64], times: NDArray[np.float64]) -> Predict:
    """Draw lines between points of one feature; of two, for each whole number of the first."""
    if points.shape[1] == 1:
        curve = Curve(points[:, 0].tolist(), times.tolist())
        return lambda point: curve(point[0])
    rows = {}
    for size in np.unique(points[:, 0]).tolist():
        here = points[:, 0] == size
        rows[int(size)] = Curve(points[here, 1].tolist(), times[here].tolist())
    plane = Plane(rows)
    return lambda point: plane(int(point[0]), point[1])
