"""Sums in the order of stepping: one value after the other, from the left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MANY", "Numbers", "added", "repeated", "running_sums"]

MANY = 32
"""From so many values on, an array is faster than a list."""

Numbers: TypeAlias = Sequence[float] | NDArray[np.float64] | NDArray[np.int64]
"""Few of them in a list, many in an array: each is faster so."""


def added(start: float, values: Numbers) -> float:
    """Add values to a number.

    >>> added(0.5, [1.0, 2.0])
    3.5
    """
    if isinstance(values, np.ndarray):
        return float(running_sums(start, values)[-1])
    for value in values:  # sum() compensates for rounding from Python 3.12 on
        start += value
    return start


def repeated(pattern: Sequence[int], first: int, count: int) -> Numbers:
    """Return `count` values of a pattern that goes round and round, from position `first` on.

    >>> repeated([1, 2, 3], first=1, count=4)
    [2, 3, 1, 2]
    """
    start = first % len(pattern)
    if count <= MANY:
        rounds = -(-(start + count) // len(pattern))
        return (list(pattern) * rounds)[start : start + count]
    return np.asarray(pattern)[np.arange(start, start + count) % len(pattern)]


def running_sums(start: float, values: Numbers) -> Numbers:
    """Return the sums of a number and the first one, two, ... of the values.

    >>> running_sums(0.5, [1.0, 2.0])
    [1.5, 3.5]
    """
    if isinstance(values, np.ndarray):
        terms = np.empty(len(values) + 1)
        terms[0] = start
        terms[1:] = values
        sums: NDArray[np.float64] = np.add.accumulate(terms)
        return sums[1:]
    sums_of_list = list(accumulate(values, initial=start))
    del sums_of_list[0]
    return sums_of_list
