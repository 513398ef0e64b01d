"""What is kept of requests that are done: a row each, in columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from vidur_simpy.entities import Request
from vidur_simpy.record_columns import LazyColumns, Part, Parts, Rows, array, joined

__all__ = ["RequestLog", "request_columns"]

# column -> (type of its array, value that stands for None). Others hold any object.
_COLUMNS: dict[str, tuple[str, Any]] = {
    "request_id": ("int64", -1),
    "replica_id": ("int32", -1),
    "arrived_at": ("float64", np.nan),
    "scheduled_at": ("float64", np.nan),
    "first_token_at": ("float64", np.nan),
    "completed_at": ("float64", np.nan),
    "num_prefill_tokens": ("int32", -1),
    "num_decode_tokens": ("int32", -1),
    "num_restarts": ("int32", 0),
    "execution_time": ("float64", np.nan),
    "preempted_time": ("float64", np.nan),
    "refusal": ("object", ""),
    "priority": ("object", 0),
    "deadline": ("float64", np.nan),
    "session_id": ("object", None),
    "num_cached_tokens": ("int32", -1),
    "num_output_tokens": ("int32", -1),
}
_values_of = attrgetter(*list(_COLUMNS)[:-1])
_EXECUTION_TIME = list(_COLUMNS).index("execution_time")
# Columns that take no memory while every request has the usual value, and are left out if all do.
_OPTIONAL = {
    "priority": 0,
    "deadline": None,
    "session_id": None,
    "num_cached_tokens": None,
    "refusal": "",
}


class RequestLog:
    """A row for each request that is complete or refused, some 80 bytes each.

    Parameters
    ----------
    directory : Path, optional
        Of records, where rows go as requests are done, else they stay in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._rows = Rows(self._packed, None if directory is None else directory / "requests")
        self._shown: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, request: Request) -> None:
        """Keep what the tables need of a request that is done."""
        self._rows.append(_row(request))

    def append_columns(self, columns: Mapping[str, Any]) -> None:
        """Keep the rows of many requests at once; a column left out has the usual value in all."""
        part: Part = dict.fromkeys(_COLUMNS)
        for name, cells in columns.items():
            kind, fill = _COLUMNS[name]
            if name not in _OPTIONAL:
                part[name] = cells.astype(kind, copy=False)
            elif any(cell != _OPTIONAL[name] for cell in cells):
                part[name] = array(cells, kind, fill)
        self._shown |= _shown(part)
        self._rows.append_part(part, len(columns["request_id"]))

    def extend(self, others: Iterable[RequestLog]) -> None:
        """Append the rows of other logs, which are in memory."""
        for other in others:
            self._rows.extend(other._rows)
            self._shown |= other._shown

    def flush(self) -> None:
        """Write all rows, if rows go to files."""
        self._rows.flush()

    def columns(self, unfinished: Iterable[Request]) -> Mapping[str, Any]:
        """Return the columns, in order of request id, with the `unfinished` requests among them.

        They are read lazily if some are in files.
        """
        rest = [_row(request) for request in unfinished]
        parts = self._rows.parts(_packed(rest)) if rest else self._rows.parts()
        shown = self._shown.union(*map(_shown, parts.held))
        if not parts.files:
            return _joined(shown, parts)
        return LazyColumns(list(_kinds(shown)), partial(_joined, shown, parts))

    def _packed(self, rows: list[tuple[Any, ...]]) -> Part:
        part = _packed(rows)
        self._shown |= _shown(part)
        return part


def request_columns(parts: Parts) -> dict[str, Any]:
    """Return the columns of requests that were read from files, in order of request id."""
    shown = set[str]()
    for part in parts:
        shown |= _shown(part)
    return _joined(shown, parts)


def _row(request: Request) -> tuple[Any, ...]:
    row: tuple[Any, ...] = (*_values_of(request), request.num_output_tokens)
    if request.decode_set is None:
        return row
    times = request.decode_set.times_of(request)
    return (*row[:_EXECUTION_TIME], *times, *row[_EXECUTION_TIME + 2 :])


def _packed(rows: list[tuple[Any, ...]]) -> Part:
    """Turn rows into arrays; None stands for a column that says nothing."""
    cells = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True))
    for name, usual in _OPTIONAL.items():
        if all(cell == usual for cell in cells[name]):
            del cells[name]
    return {
        name: array(cells[name], kind, fill) if name in cells else None
        for name, (kind, fill) in _COLUMNS.items()
    }


def _shown(part: Part) -> set[str]:
    """Return the columns that the table must have because of a part."""
    shown = {name for name, column in part.items() if column is not None}
    return shown if _some_end_early(part) else shown - {"num_output_tokens"}


def _some_end_early(part: Part) -> bool:
    """Whether a completed request got fewer output tokens than it asked for."""
    numbers: dict[str, Any] = part
    is_short = numbers["num_output_tokens"] < numbers["num_decode_tokens"]
    return bool((is_short & ~np.isnan(numbers["completed_at"])).any())


def _joined(shown: set[str], parts: Parts) -> dict[str, Any]:
    """Return the columns of all parts, in order of request id."""
    table = joined(_kinds(shown), parts, {name: fill for name, (_, fill) in _COLUMNS.items()})
    order = np.argsort(table["request_id"], kind="stable")
    return {name: column[order] for name, column in table.items()}


def _kinds(shown: set[str]) -> dict[str, str]:
    """Return the types of the columns of a table: those `shown` and those that always are."""
    sometimes = (_OPTIONAL.keys() - {"refusal"} | {"num_output_tokens"}) - shown
    return {name: kind for name, (kind, _) in _COLUMNS.items() if name not in sometimes}
