"""Columns of a measurement by any of their names, in seconds and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import TraceError
from vidur_simpy.workload.requests import MAX_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.workload.tables import Table

__all__ = ["UNITS", "find", "length", "needed", "runs", "times", "whole"]

UNITS = {"": 1.0, "_s": 1.0, "_ms": 1e-3, "_us": 1e-6, "_ns": 1e-9}
"""Ends of the names of columns of times, with their seconds."""

NO_UNITS = {"": 1.0}
RUN = ("segment", "run")


def find(
    table: Table, names: tuple[str, ...], units: Mapping[str, float] = NO_UNITS
) -> tuple[str, float] | None:
    """Return the first of the columns that is there, and the seconds of its unit."""
    for name in names:
        for suffix, factor in units.items():
            if name + suffix in table.cells:
                return name + suffix, factor
    return None


def needed(
    table: Table, names: tuple[str, ...], units: Mapping[str, float] = NO_UNITS
) -> tuple[str, float]:
    """As `find`; raise a TraceError if none is there."""
    found = find(table, names, units)
    if found is None:
        given = ", ".join(table.cells)
        raise TraceError(f"{table.path} has no column {' or '.join(names)}; it has {given}.")
    return found


def times(table: Table, column: str, factor: float) -> NDArray[np.float64]:
    """Return a column in seconds; NaN where the cell is empty."""
    return factor * np.array(table.parsed(column, _time, "a finite number >= 0"))


def runs(table: Table) -> NDArray[np.intp]:
    """Return the number of the run of each row, in order of their names' appearance."""
    found = find(table, RUN)
    if found is None:
        return np.zeros(len(table.lines), np.intp)
    numbers: dict[Any, int] = {}
    cells = table.cells[found[0]]
    return np.array([numbers.setdefault(cell, len(numbers)) for cell in cells], np.intp)


def _time(cell: Any) -> float:
    if cell is None or cell == "":
        return math.nan
    time = float(cell)
    if isinstance(cell, bool) or not 0 <= time < math.inf:
        raise ValueError
    return time


def whole(cell: Any) -> int:
    """Parse a whole number, 0 or more."""
    number = float(cell)
    if isinstance(cell, bool) or not (number.is_integer() and 0 <= number <= MAX_TOKENS):
        raise ValueError
    return int(number)


def length(cell: Any) -> int:
    """Parse a whole number of tokens, 1 or more."""
    num_tokens = whole(cell)
    if num_tokens < 1:
        raise ValueError
    return num_tokens
