"""Recorded workloads: reads trace files, whose format is told from their columns.

========  =========================================================  =====================
format    columns                                                    times
========  =========================================================  =====================
vidur     arrived_at, num_prefill_tokens, num_decode_tokens          seconds
azure     TIMESTAMP, ContextTokens, GeneratedTokens                  dates; the first is 0
mooncake  timestamp, input_length, output_length                     milliseconds
========  =========================================================  =====================

Any of them may also carry ``request_id, priority, deadline, session_id, hash_ids``. A file holds
comma-separated values under a header or one JSON object per line, plain or gzipped.
"""

from __future__ import annotations

import difflib
import math
import operator
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import TraceError
from vidur_simpy.workload.requests import MAX_TOKENS, RequestArrays
from vidur_simpy.workload.tables import Table, read_table

__all__ = ["TraceFormat", "read_arrivals", "read_lengths", "read_trace"]

TraceFormat = Literal["auto", "vidur", "azure", "mooncake"]


def read_trace(
    path: str | Path, format: TraceFormat = "auto", *, hash_block_size: int = 512
) -> RequestArrays:
    """Read a trace with arrival times and lengths.

    Parameters
    ----------
    path : str or Path
        The file; see the module for what it may hold.
    format : {"auto", "vidur", "azure", "mooncake"}
        How the columns are named; "auto" tells it from the header.
    hash_block_size : int
        Prompt tokens behind one of the ``hash_ids``; Mooncake's traces have 512.

    Returns
    -------
    RequestArrays
        In order of arrival, rows of one instant in the order of the file.

    Raises
    ------
    TraceError
        A file that is missing or empty, columns of no known format, or an unusable value.

    Warns
    -----
    UserWarning
        If the rows were not in order of arrival, or an unknown column is nearly a known one.
    """
    table = read_table(path)
    names = _columns_of(table, format, ("arrived_at", "prompt", "output"))
    _warn_of_misspelt(table)
    num_prefill_tokens = _lengths(table, names.prompt)
    hash_ids = _hash_ids(table, num_prefill_tokens, hash_block_size)
    arrived_at, order = _arrivals(table, names)
    return RequestArrays(
        arrived_at=arrived_at,
        num_prefill_tokens=num_prefill_tokens[order],
        num_decode_tokens=_lengths(table, names.output)[order],
        request_id=_sorted(_request_ids(table), order),
        priority=_sorted(_optional(table, "priority", _whole, "a whole number"), order),
        deadline=_sorted(_optional(table, "deadline", _deadline, "seconds >= 0 or nothing"), order),
        session_id=_sorted(_optional(table, "session_id", _session, "a name or nothing"), order),
        hash_ids=None if hash_ids is None else [hash_ids[row] for row in order],
        hash_block_size=hash_block_size,
    )


def read_arrivals(path: str | Path, format: TraceFormat = "auto") -> NDArray[np.float64]:
    """Read only the arrival times of a trace, in seconds, ascending.

    Raises and warns as :func:`read_trace`; lengths are not looked at and may be missing.
    """
    table = read_table(path)
    return _arrivals(table, _columns_of(table, format, ("arrived_at",)))[0]


def read_lengths(
    path: str | Path, format: TraceFormat = "auto"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read only the prompt and output lengths of a trace, in tokens, in the order of the file.

    Raises as :func:`read_trace`; arrival times are not looked at and may be missing.
    """
    table = read_table(path)
    names = _columns_of(table, format, ("prompt", "output"))
    return _lengths(table, names.prompt), _lengths(table, names.output)


def _whole(cell: Any) -> int:
    if isinstance(cell, bool):
        raise ValueError
    if isinstance(cell, int):
        number = cell
    elif isinstance(cell, str) and cell.strip().lstrip("+-").isdecimal():
        number = int(cell)
    else:
        real = float(cell)
        if not real.is_integer():
            raise ValueError
        number = int(real)  # 512.0, as data frames write a whole number
    if not -(2**63) <= number < 2**63:
        raise ValueError
    return number


def _length(cell: Any) -> int:
    number = _whole(cell)
    if not 1 <= number <= MAX_TOKENS:
        raise ValueError
    return number


def _identifier(cell: Any) -> int:
    number = _whole(cell)
    if number < 0:
        raise ValueError
    return number


def _instant(cell: Any) -> float:
    number = float(cell)
    if isinstance(cell, bool) or not (math.isfinite(number) and number >= 0):
        raise ValueError
    return number


def _deadline(cell: Any) -> float:
    return math.nan if cell is None or cell == "" else _instant(cell)


def _session(cell: Any) -> str:
    if not isinstance(cell, str | int | None) or isinstance(cell, bool):
        raise ValueError
    return "" if cell is None else str(cell)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _microseconds(cell: Any) -> int:
    """Read a date; Azure's seventh fractional digit is always 0 and is dropped."""
    date = datetime.fromisoformat(cell.strip() if isinstance(cell, str) else cell)
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return (date - _EPOCH) // timedelta(microseconds=1)


def _integers(cell: Any) -> NDArray[np.int64]:
    """Read ``hash_ids``: a list of integers or a text with spaces between them."""
    if isinstance(cell, str):
        return np.array([int(part) for part in cell.split()], np.int64)
    return np.array([operator.index(part) for part in cell], np.int64)


class _Columns(NamedTuple):
    """How one format names its columns and writes its times."""

    arrived_at: str
    prompt: str
    output: str
    instant: Callable[[Any], float]
    instant_form: str
    ticks_per_second: int
    from_first_row: bool


_SECONDS = "finite seconds >= 0"
_FORMATS = {
    "vidur": _Columns(
        "arrived_at", "num_prefill_tokens", "num_decode_tokens", _instant, _SECONDS, 1, False
    ),
    "azure": _Columns(
        "TIMESTAMP",
        "ContextTokens",
        "GeneratedTokens",
        _microseconds,
        "a date like 2023-11-16 18:15:46.68",
        10**6,
        True,
    ),
    "mooncake": _Columns(
        "timestamp",
        "input_length",
        "output_length",
        _instant,
        "finite milliseconds >= 0",
        1000,
        False,
    ),
}


def _columns_of(table: Table, format: str, needed: Iterable[str]) -> _Columns:
    """Return the columns of `format`, or of the first format that has those `needed`."""
    candidates = list(_FORMATS) if format == "auto" else [format]
    wanted = {name: [getattr(_FORMATS[name], column) for column in needed] for name in candidates}
    for name, columns in wanted.items():
        if all(column in table.cells for column in columns):
            return _FORMATS[name]
    known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in wanted.items())
    hint = ""
    if any(c.prompt in table.cells and c.output in table.cells for c in _FORMATS.values()):
        hint = " It holds lengths: TraceLengths(path) takes them without arrival times."
    raise TraceError(
        f"{table.path} has the columns {', '.join(table.cells) or 'none'}; expected those of "
        f"{known}.{hint}"
    )


# Columns that a trace of any format may have.
_OPTIONAL = ("request_id", "priority", "deadline", "session_id", "hash_ids")


def _lengths(table: Table, column: str) -> NDArray[np.int64]:
    expected = f"a whole number of tokens from 1 to {MAX_TOKENS}"
    return np.array(table.parsed(column, _length, expected), np.int64)


def _arrivals(table: Table, names: _Columns) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return the ascending times in seconds, and the rows in that order."""
    ticks = np.array(table.parsed(names.arrived_at, names.instant, names.instant_form))
    late = np.flatnonzero(ticks < np.maximum.accumulate(ticks))
    if late.size:
        warnings.warn(
            f"{table.path}: {late.size} of {len(ticks)} rows arrive before a row above them, the "
            f"first in line {table.lines[late[0]]}; sorted by {names.arrived_at}.",
            stacklevel=3,
        )
    order = np.argsort(ticks, kind="stable")
    ticks = ticks[order]
    if names.from_first_row:
        ticks = ticks - ticks[0]
    return ticks / names.ticks_per_second, order


def _warn_of_misspelt(table: Table) -> None:
    """Warn of a column that nobody reads and that was probably meant to be one that is read."""
    absent = [name for name in _OPTIONAL if name not in table.cells]
    for given in table.cells:
        nearest = difflib.get_close_matches(given.lower(), absent, n=1, cutoff=0.8)
        if nearest and given not in _OPTIONAL:
            warnings.warn(
                f"{table.path}: nothing reads the column {given!r}; did you mean {nearest[0]!r}?",
                stacklevel=3,
            )


def _optional(
    table: Table, column: str, parse: Callable[[Any], Any], expected: str
) -> NDArray[Any] | None:
    if column not in table.cells:
        return None
    return np.array(table.parsed(column, parse, expected))


def _request_ids(table: Table) -> NDArray[np.int64] | None:
    ids = _optional(table, "request_id", _identifier, "a whole number >= 0")
    if ids is None:
        return None
    unique, first = np.unique(ids, return_index=True)
    if len(unique) < len(ids):
        row = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise TraceError(
            f"{table.path}, line {table.lines[row]}: request_id = {ids[row]} was given before, "
            "expected each once."
        )
    return ids


def _hash_ids(
    table: Table, num_prefill_tokens: NDArray[np.int64], block_size: int
) -> list[NDArray[np.int64]] | None:
    if "hash_ids" not in table.cells:
        return None
    hash_ids = table.parsed("hash_ids", _integers, "integers, one per block of the prompt")
    needed = -(-num_prefill_tokens // block_size)
    bad = np.flatnonzero(needed != [len(ids) for ids in hash_ids])
    if bad.size:
        row = int(bad[0])
        raise TraceError(
            f"{table.path}, line {table.lines[row]}: hash_ids has {len(hash_ids[row])} ids, "
            f"expected {needed[row]} for a prompt of {num_prefill_tokens[row]} tokens "
            f"(hash_block_size = {block_size})."
        )
    return hash_ids


def _sorted(column: NDArray[Any] | None, order: NDArray[np.intp]) -> NDArray[Any] | None:
    return None if column is None else column[order]
