"""Rows that are written while a simulation runs, packed into columns in memory or in part files.

A directory of records has a folder per table with its rows, in order, in files of 4,096 rows::

    requests/part-00000.parquet, part-00001.parquet, ...
    batches/part-00000.parquet, ...
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.parquet import Column, check_pyarrow, read_columns, write_columns

__all__ = [
    "ROWS_PER_PART",
    "LazyColumns",
    "Part",
    "Parts",
    "Rows",
    "array",
    "joined",
    "new_directory",
    "read_records",
    "record_rows",
    "recorded_columns",
    "recorded_columns_of",
]

# A column is an array, or (offsets, values) of lists; None stands for one that says nothing.
Part: TypeAlias = "dict[str, Column | None]"

ROWS_PER_PART = 4_096

# Columns of recorded tables that are neither times (float64) nor integers (-1 if missing).
_LISTS = {("batches", "request_ids"), ("batches", "num_tokens")}
_OBJECTS = {"event_type"}


@dataclass(frozen=True)
class Parts:
    """Rows up to some instant, part by part: those in files are read as they are iterated.

    Parameters
    ----------
    files : sequence of Path
        Part files, which come first.
    held : sequence of dict
        Parts in memory.
    """

    files: Sequence[Path]
    held: Sequence[Part]

    def __iter__(self) -> Iterator[Part]:
        yield from map(read_part, self.files)
        yield from self.held


class Rows:
    """The rows of a table, in the order in which they were appended.

    Parameters
    ----------
    pack : callable
        Turns a list of rows into the columns of a part.
    folder : Path, optional
        Where each full part goes, so that memory holds less than one; else parts stay in memory.
    """

    def __init__(
        self, pack: Callable[[list[tuple[Any, ...]]], Part], folder: Path | None = None
    ) -> None:
        self._pack = pack
        self._folder = folder
        self._rows: list[tuple[Any, ...]] = []
        self._files: list[Path] = []
        self._held: list[Part] = []
        self._num_packed = 0
        self._num_flushed = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self._num_packed + len(self._rows)

    @property
    def num_held(self) -> int:
        """How many rows are in memory."""
        return len(self._rows) if self._folder is not None else len(self)

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a row; every so often, pack those that came since the last time."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_PART:
            self._keep_rows()

    def extend(self, other: Rows) -> None:
        """Add the rows of another table; both are in memory."""
        assert self._folder is None
        if self._rows:
            self._keep_rows()
        self._held += other.parts().held
        self._num_packed += len(other)

    def flush(self) -> None:
        """Write the part that is not full yet; it is written again when rows were added."""
        if self._folder is not None and self._rows and self._num_flushed < len(self):
            write_part(self._pack(self._rows), self._next_file())
            self._num_flushed = len(self)

    def parts(self, *later: Part) -> Parts:
        """Return the rows so far, and `later` ones, which stay as they are when rows are added."""
        rest = [self._pack(self._rows)] if self._rows else []
        return Parts(tuple(self._files), (*self._held, *rest, *later))

    def append_part(self, part: Part, num_rows: int) -> None:
        """Add many rows, packed."""
        if self._folder is None:
            self._held.append(part)
        else:
            write_part(part, self._next_file())
            self._files.append(self._next_file())
        self._num_packed += num_rows

    def _keep_rows(self) -> None:
        self.append_part(self._pack(self._rows), len(self._rows))
        self._rows = []

    def _next_file(self) -> Path:
        assert self._folder is not None
        return self._folder / f"part-{len(self._files):05d}.parquet"


class LazyColumns(Mapping[str, Any]):
    """The columns of a table, joined when the first of them is asked for.

    Parameters
    ----------
    names : sequence of str
    join : callable
        Returns the columns by name.
    """

    def __init__(self, names: Sequence[str], join: Callable[[], dict[str, Any]]) -> None:
        self._names = tuple(names)
        self._join = join
        self._columns: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if self._columns is None:
            self._columns = self._join()
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# Rows of the tables that observers write


def record_rows(table: str, directory: Path | None = None) -> Rows:
    """Return an empty table of the contract, with part files in `directory`, if there is one."""
    return Rows(partial(_packed, table), None if directory is None else directory / table)


def recorded_columns(
    table: str, rows: Rows, open_rows: Collection[Sequence[Any]] = ()
) -> Mapping[str, Any]:
    """Return the columns of a table, with `open_rows` last; lazily if some are in files."""
    parts = rows.parts(_packed(table, open_rows)) if open_rows else rows.parts()
    join = partial(recorded_columns_of, table, parts)
    return LazyColumns(list(_kinds(table)), join) if parts.files else join()


def recorded_columns_of(table: str, parts: Parts) -> dict[str, Any]:
    """Return the columns of a table from its parts."""
    return joined(_kinds(table), parts)


def _packed(table: str, rows: Collection[Sequence[Any]]) -> Part:
    cells = zip(*rows, strict=True)
    return {
        name: _flattened(column) if kind == "list" else array(column, kind, _fill(kind))
        for (name, kind), column in zip(_kinds(table).items(), cells, strict=True)
    }


def _kinds(table: str) -> dict[str, str]:
    return {name: _kind(table, name, unit) for name, (unit, _) in COLUMNS[table].items()}


def _kind(table: str, name: str, unit: str) -> str:
    if (table, name) in _LISTS:
        return "list"
    if name in _OBJECTS:
        return "object"
    return "float64" if unit == "s" else "int64"


def _fill(kind: str) -> Any:
    return {"float64": np.nan, "int64": -1}.get(kind)


# Columns and lists


def array(cells: Sequence[Any], kind: str, fill: Any) -> NDArray[Any]:
    """Return an array with `fill` in place of None, if it is not one of objects."""
    if kind == "object":
        objects = np.empty(len(cells), object)
        objects[:] = cells
        return objects
    return np.array([fill if cell is None else cell for cell in cells], kind)


def joined(
    kinds: Mapping[str, str], parts: Iterable[Part], fills: Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Return whole columns; a part without a column has what `fills` says of it.

    Parameters
    ----------
    kinds : mapping of str to str
        Of each column: a type of numpy, or ``"list"`` for an array of lists of integers.
    parts : iterable of dict
    fills : mapping of str to object, optional
    """
    pieces: dict[str, list[NDArray[Any]]] = {name: [] for name in kinds}
    for part in parts:
        size = next(_num_rows(column) for column in part.values() if column is not None)
        for name, kind in kinds.items():
            column = part.get(name)
            if column is None:
                pieces[name].append(np.full(size, (fills or {})[name], kind))
            elif isinstance(column, tuple):
                pieces[name].append(_lists(*column))
            else:
                pieces[name].append(column.astype(kind, copy=False))
    return {
        name: np.concatenate(pieces[name]) if pieces[name] else np.empty(0, _dtype(kind))
        for name, kind in kinds.items()
    }


def _dtype(kind: str) -> str:
    return "object" if kind == "list" else kind


def _num_rows(column: Column) -> int:
    return len(column[0]) - 1 if isinstance(column, tuple) else len(column)


def _flattened(lists: Sequence[Sequence[int]]) -> Column:
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(each) for each in lists], out=offsets[1:])
    return offsets, np.array([number for each in lists for number in each], np.int64)


def _lists(offsets: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    ends = offsets.tolist()
    numbers = values.tolist()
    lists = np.empty(len(ends) - 1, object)
    for row, start in enumerate(ends[:-1]):
        lists[row] = numbers[start : ends[row + 1]]
    return lists


# Files


def new_directory(directory: Any) -> Path:
    """Make a directory for records.

    Raises
    ------
    ConfigError
        If it is not empty, cannot be made, or pyarrow is not installed.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise ConfigError(f"record_to = {directory!r}: expected the path of a directory.")
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=path):
            pass  # it can be written
        names = sorted(each.name for each in path.iterdir())
    except OSError as error:
        raise ConfigError(f"record_to = {str(path)!r}: it cannot be written: {error}.") from error
    if names:
        raise ConfigError(
            f"record_to = {str(path)!r}: it holds {names[0]!r}; name a new or an empty directory."
        )
    check_pyarrow()
    return path


def write_part(part: Part, path: Path) -> None:
    """Write a part, wholly or not at all."""
    try:
        write_columns({name: cells for name, cells in part.items() if cells is not None}, path)
    except OSError as error:
        raise VidurError(f"cannot write records to {str(path)!r}: {error}.") from error


def read_part(path: Path) -> Part:
    """Return what `write_part` wrote."""
    try:
        return {**read_columns(path)}
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):  # which is a ValueError: pyarrow is not installed
            raise
        raise VidurError(f"{str(path)!r} is damaged or missing: {error}.") from error


def read_records(directory: str | os.PathLike[str], table: str) -> Parts:
    """Return the parts of a table in a directory of records.

    Raises
    ------
    VidurError
        If there is none, with the tables that are there.
    """
    if table not in COLUMNS:
        raise unknown_name("table", table, COLUMNS)
    folder = Path(directory) / table
    if not folder.is_dir():
        there = [name for name in COLUMNS if (Path(directory) / name).is_dir()]
        found = f"it has {', '.join(there)}" if there else "it holds no records"
        raise VidurError(f"{str(directory)!r} has no records of {table!r}: {found}.")
    return Parts(sorted(folder.glob("part-*.parquet"), key=_number_of), ())


def _number_of(file: Path) -> int:
    return int(file.stem.removeprefix("part-"))
