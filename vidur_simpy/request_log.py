"""What is kept of requests that are done: a row each, in columns."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.entities import Request

__all__ = ["RequestLog"]

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
_values_of = attrgetter(*_COLUMNS)
_EXECUTION_TIME = list(_COLUMNS).index("execution_time")
# Columns that take no memory while every request has the usual value, and are left out if all do.
_OPTIONAL = {
    "priority": 0,
    "deadline": None,
    "session_id": None,
    "num_cached_tokens": None,
    "refusal": "",
}

# Rows turned into arrays at a time.
_ROWS_AT_A_TIME = 4_096


class RequestLog:
    """A row for each request that is complete or refused, some 80 bytes each."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._parts: list[dict[str, NDArray[Any] | None]] = []
        self._num_rows_in_parts = 0

    def __len__(self) -> int:
        return self._num_rows_in_parts + len(self._rows)

    def append(self, request: Request) -> None:
        """Keep what the tables need of a request that is done."""
        self._rows.append(_row(request))
        if len(self._rows) == _ROWS_AT_A_TIME:
            self._pack()

    def extend(self, others: Iterable[RequestLog]) -> None:
        """Append the rows of other logs."""
        for other in others:
            other._pack()
            self._parts += other._parts
            self._num_rows_in_parts += len(other)

    def columns(self, unfinished: Iterable[Request]) -> dict[str, Any]:
        """Return the columns, in order of request id, with the `unfinished` requests among them."""
        self._pack()
        rest = [_row(request) for request in unfinished]
        parts = [*self._parts, _packed(rest)] if rest else self._parts
        if not parts:
            left_out = {*_OPTIONAL, "num_output_tokens"} - {"refusal"}
            return {name: [] for name in _COLUMNS if name not in left_out}
        sizes = [len(part["request_id"]) for part in parts]  # type: ignore[arg-type]
        table = {
            name: np.concatenate(
                [
                    np.full(size, fill, kind) if part[name] is None else part[name]
                    for part, size in zip(parts, sizes, strict=True)
                ]
            )
            for name, (kind, fill) in _COLUMNS.items()
            if name not in _OPTIONAL
            or name == "refusal"
            or any(part[name] is not None for part in parts)
        }
        if not _some_end_early(table):
            del table["num_output_tokens"]
        order = np.argsort(table["request_id"], kind="stable")
        return {name: column[order] for name, column in table.items()}

    def _pack(self) -> None:
        if self._rows:
            self._parts.append(_packed(self._rows))
            self._num_rows_in_parts += len(self._rows)
            self._rows = []


def _row(request: Request) -> tuple[Any, ...]:
    row: tuple[Any, ...] = _values_of(request)
    if request.decode_set is None:
        return row
    times = request.decode_set.times_of(request)
    return (*row[:_EXECUTION_TIME], *times, *row[_EXECUTION_TIME + 2 :])


def _packed(rows: list[tuple[Any, ...]]) -> dict[str, NDArray[Any] | None]:
    """Turn rows into arrays; None stands for a column that says nothing."""
    cells = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True))
    for name, usual in _OPTIONAL.items():
        if all(cell == usual for cell in cells[name]):
            del cells[name]
    return {
        name: _array(cells[name], kind, fill) if name in cells else None
        for name, (kind, fill) in _COLUMNS.items()
    }


def _some_end_early(table: dict[str, NDArray[Any]]) -> bool:
    """Whether a completed request got fewer output tokens than it asked for."""
    is_short = table["num_output_tokens"] < table["num_decode_tokens"]
    return bool((is_short & ~np.isnan(table["completed_at"])).any())


def _array(cells: tuple[Any, ...], kind: str, fill: Any) -> NDArray[Any]:
    if kind == "object":
        array = np.empty(len(cells), object)
        array[:] = cells
        return array
    return np.array([fill if cell is None else cell for cell in cells], kind)
