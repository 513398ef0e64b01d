"""Interpolation between measured points, on one axis or several, however they are spaced."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ProfileError

__all__ = ["Curve", "Grid", "Plane", "leave_one_out_error"]


class Curve:
    """A straight line from each measured point to the next.

    Between two points it never leaves the range of their values, so that it rises wherever the
    measurements do. Below the first point it stays at the first value: less work than the least
    that was measured costs a kernel as much. Above the last one it goes on as between the last
    two, or at the last value if there the measurements happen to fall; the caller says whether it
    may (`limit`).

    Parameters
    ----------
    points : sequence of float
        Ascending, at least one.
    values : sequence of float
        As many.

    Examples
    --------
    >>> curve = Curve([1, 2, 4], [10.0, 12.0, 20.0])
    >>> curve(3), curve(0), curve(5)
    (16.0, 10.0, 24.0)
    """

    __slots__ = ("_arrays", "limit", "points", "slopes", "values")

    def __init__(self, points: Sequence[float], values: Sequence[float]) -> None:
        if not points or len(points) != len(values):
            raise ProfileError(f"{len(points)} points and {len(values)} values make no curve.")
        if any(a >= b for a, b in pairwise(points)):
            raise ProfileError(f"the points {list(points)} of a curve are not ascending.")
        self.points = list(points)
        self.values = list(values)
        pairs = pairwise(zip(self.points, self.values, strict=True))
        self.slopes = [(v - u) / (b - a) for (a, u), (b, v) in pairs]
        self.slopes.append(max(self.slopes[-1], 0.0) if self.slopes else 0.0)
        self.limit = self.points[-1]
        self._arrays: tuple[NDArray[np.float64], ...] | None = None

    def __call__(self, point: float) -> float:
        """Return the value at a point."""
        index = bisect_right(self.points, point) - 1
        if index < 0:
            return self.values[0]
        return self.values[index] + (point - self.points[index]) * self.slopes[index]

    def many(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values at many points, to the last bit those of as many calls."""
        if self._arrays is None:
            self._arrays = tuple(map(np.asarray, (self.points, self.values, self.slopes)))
        known, values, slopes = self._arrays
        index = np.maximum(known.searchsorted(points, side="right") - 1, 0)
        found: NDArray[np.float64] = values[index] + (points - known[index]) * slopes[index]
        return np.where(points < known[0], values[0], found)


class Plane:
    """Curves measured at some whole numbers; between two of them a mixture of both.

    The curve at a number is put together once and kept, which makes the second look-up at this
    number as fast as that of one curve.

    Parameters
    ----------
    rows : mapping of int to Curve

    Examples
    --------
    >>> plane = Plane({1: Curve([0, 8], [1.0, 9.0]), 3: Curve([0, 4], [3.0, 7.0])})
    >>> plane(2, 4), plane.at(2).points
    (6.0, [0, 4, 8])
    """

    __slots__ = ("_curves", "limit", "points", "rows")

    def __init__(self, rows: Mapping[int, Curve]) -> None:
        self.points = sorted(rows)
        self.rows = [rows[point] for point in self.points]
        self.limit = self.points[-1]
        self._curves: dict[int, Curve] = {}

    def __call__(self, number: int, point: float) -> float:
        """Return the value at a point of the curve at a number."""
        return self.at(number)(point)

    def at(self, number: int) -> Curve:
        """Return the curve at a number."""
        curve = self._curves.get(number)
        if curve is None:
            curve = self._curves[number] = self._mixed(number)
        return curve

    def _mixed(self, number: int) -> Curve:
        lower, upper, share = bracket(self.points, number)
        low, high = self.rows[lower], self.rows[upper]
        if not share:
            return low
        points = sorted({*low.points, *high.points})
        return Curve(points, [low(p) + share * (high(p) - low(p)) for p in points])


class Grid:
    """Curves, planes or grids measured at some numbers; between two of them a mixture of both.

    Each may have been measured at points of its own.

    Parameters
    ----------
    rows : mapping of int to Curve, Plane or Grid
    """

    __slots__ = ("limit", "points", "rows")

    def __init__(
        self, rows: Mapping[int, Curve] | Mapping[int, Plane] | Mapping[int, Grid]
    ) -> None:
        self.points = sorted(rows)
        self.rows = [rows[point] for point in self.points]
        self.limit = self.points[-1]

    def __call__(self, number: float, *rest: float) -> float:
        """Return the value at a number of the first axis and at points of the others."""
        lower, upper, share = bracket(self.points, number)
        low = self.rows[lower](*rest)  # type: ignore[arg-type]
        if not share:
            return low
        high = self.rows[upper](*rest)  # type: ignore[arg-type]
        return low + share * (high - low)


def bracket(points: Sequence[float], point: float) -> tuple[int, int, float]:
    """Return the neighbours of a point by their indices, and its way from one to the other.

    Below the first it is at the first, above the last beyond the last two.

    >>> bracket([1, 2, 4], 3), bracket([1, 2, 4], 2), bracket([1, 2, 4], 6), bracket([1], 6)
    ((1, 2, 0.5), (1, 2, 0.0), (1, 2, 2.0), (0, 0, 0.0))
    """
    last = len(points) - 1
    lower = min(bisect_right(points, point) - 1, last - 1)
    if lower < 0:
        return 0, 0, 0.0
    start = points[lower]
    return lower, lower + 1, (point - start) / (points[lower + 1] - start)


def leave_one_out_error(
    measured: Mapping[tuple[int, ...], float],
    relative_to: Mapping[tuple[int, ...], float] | None = None,
) -> float:
    """Return how far measured values are from the line between their neighbours, on average.

    Each point that has neighbours on both sides along an axis, all else being equal, is predicted
    from these two. So it is the error at twice the spacing that a look-up has: an upper bound
    where the grid is even.

    Parameters
    ----------
    measured : mapping of tuple to float
        Values by the coordinates of their points.
    relative_to : mapping of tuple to float, optional
        Values > 0 that the errors are shares of; `measured` itself if not given.

    Returns
    -------
    float
        Mean absolute relative error over all axes; nan if no point has such neighbours.

    Examples
    --------
    >>> leave_one_out_error({(1,): 1.0, (2,): 2.5, (3,): 3.0})
    0.2
    """
    scale = measured if relative_to is None else relative_to
    lines: dict[tuple[object, ...], list[tuple[float, float, float]]] = {}
    for point, value in measured.items():
        for axis, coordinate in enumerate(point):
            others = (axis, *point[:axis], *point[axis + 1 :])
            lines.setdefault(others, []).append((coordinate, value, scale[point]))
    errors = []
    for line in lines.values():
        line.sort()
        for (a, u, _), (b, v, whole), (c, w, _) in zip(line, line[1:], line[2:], strict=False):
            errors.append(abs(u + (w - u) * (b - a) / (c - a) - v) / whole)
    return math.fsum(errors) / len(errors) if errors else math.nan
