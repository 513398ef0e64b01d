"""Tables and columns as Parquet files, which need pyarrow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Column",
    "check_pyarrow",
    "read_columns",
    "read_parquet",
    "write_columns",
    "write_parquet",
]

# Cells of one column: an array, or the offsets and values of lists of integers.
Column: TypeAlias = "NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]"


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table; lists of integers stay lists.

    Raises
    ------
    ConfigError
        If pyarrow is not installed.
    """
    pyarrow = _pyarrow()
    content = pyarrow.Table.from_pandas(table, preserve_index=False)
    pyarrow.parquet.write_table(content, path, compression="zstd")


def read_parquet(path: Path) -> pd.DataFrame:
    """Return a table that `write_parquet` wrote.

    Raises
    ------
    ConfigError
        If pyarrow is not installed.
    """
    table: pd.DataFrame = _pyarrow().parquet.read_table(path).to_pandas()
    return table


def write_columns(columns: Mapping[str, Column], path: Path) -> None:
    """Write columns of one length; the file is there when it is complete.

    Raises
    ------
    ConfigError
        If pyarrow is not installed.
    """
    pyarrow = _pyarrow()
    table = pyarrow.table({name: _arrow(pyarrow, column) for name, column in columns.items()})
    aside = path.with_name(f".{path.name}")
    pyarrow.parquet.write_table(table, aside, compression="zstd")
    os.replace(aside, path)


def read_columns(path: Path) -> dict[str, Column]:
    """Return columns that `write_columns` wrote.

    Raises
    ------
    ConfigError
        If pyarrow is not installed.
    """
    # A single file: read_table() would take columns from folder names such as "rate=2".
    with _pyarrow().parquet.ParquetFile(path) as file:
        table = file.read()
    return {name: _column(table[name].combine_chunks()) for name in table.column_names}


def check_pyarrow() -> None:
    """Do nothing if pyarrow is installed.

    Raises
    ------
    ConfigError
        If it is not.
    """
    _pyarrow()


def _arrow(pyarrow: Any, column: Column) -> Any:
    """Return a column as pyarrow has it; objects of several types become text."""
    if isinstance(column, tuple):
        return pyarrow.ListArray.from_arrays(*column)
    if column.dtype != object:
        return pyarrow.array(column)
    cells = column.tolist()
    try:
        return pyarrow.array(cells)
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.array([None if cell is None else str(cell) for cell in cells])


def _column(cells: Any) -> Column:
    if hasattr(cells, "flatten") and hasattr(cells, "offsets"):
        return cells.offsets.to_numpy(), cells.flatten().to_numpy()
    kind = str(cells.type)
    if not cells.null_count and kind in ("int64", "int32", "double"):
        return cells.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    objects = np.empty(len(cells), object)
    objects[:] = cells.to_pylist()
    return objects


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet needs pyarrow, which is not installed: pip install 'vidur-simpy[parquet]'."
        ) from None
    return pyarrow
