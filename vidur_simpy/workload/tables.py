"""A trace file as raw cells: comma-separated values or lines of JSON, plain or gzipped."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidur_simpy.errors import TraceError

__all__ = ["Table", "read_table"]


class Table(NamedTuple):
    """The cells of a file by column: texts, or what JSON holds (None where a key is missing).

    Attributes
    ----------
    path : Path
        The file.
    lines : sequence of int
        The line of each row, from 1, as an editor shows it.
    cells : dict of str to sequence
        The column names, and one cell per row.
    """

    path: Path
    lines: Sequence[int]
    cells: dict[str, Sequence[Any]]

    def parsed(self, column: str, parse: Callable[[Any], Any], expected: str) -> list[Any]:
        """Parse every cell of a column.

        Raises
        ------
        TraceError
            At the first cell for which `parse` raises; it says what was `expected`.
        """
        values = []
        for line, cell in zip(self.lines, self.cells[column], strict=True):
            try:
                values.append(parse(cell))
            except (ValueError, TypeError, OverflowError):
                given = "is missing" if cell is None or cell == "" else f"= {cell!r}"
                raise TraceError(
                    f"{self.path}, line {line}: {column} {given}, expected {expected}."
                ) from None
        return values


def read_table(path: str | Path) -> Table:
    """Read a file whose first row names the columns, or whose lines are JSON objects.

    Raises
    ------
    TraceError
        A file that is missing, unreadable, empty or has a header only; a row with too few or too
        many values, or a line that is no JSON object.
    """
    path = Path(path)
    text = _read_text(path)
    if not text.strip():
        raise TraceError(f"{path} is empty, expected a header and rows, or lines of JSON.")
    if text.lstrip().startswith(("[", "PAR1")):
        raise TraceError(
            f"{path} starts with {text.lstrip()[:4]!r}, expected a header and rows, or a JSON "
            "object on each line."
        )
    is_json = text.lstrip().startswith("{")
    table = _json_table(path, text) if is_json else _csv_table(path, text)
    if not table.lines:
        raise TraceError(f"{path} has a header but no rows, expected at least one request.")
    return table


def _csv_table(path: Path, text: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise TraceError(f"{path}, line {reader.line_num}: {error}.") from None
    header = [name.strip() for name in rows[0][1]]
    if len(set(header)) < len(header):
        raise TraceError(f"{path} has the columns {', '.join(header)}, expected each once.")
    for line, row in rows[1:]:
        if len(row) < len(header):
            missing = header[len(row)]
            raise TraceError(
                f"{path}, line {line}: {missing} is missing, expected {len(header)} values."
            )
        if len(row) > len(header):
            raise TraceError(
                f"{path}, line {line}: {row[len(header)]!r} is one value too many, expected "
                f"{len(header)}: {', '.join(header)}."
            )
    columns = zip(*(row for _, row in rows[1:]), strict=True)
    return Table(path, [line for line, _ in rows[1:]], dict(zip(header, columns, strict=False)))


def _json_table(path: Path, text: str) -> Table:
    lines, rows = [], []
    for line, row_text in enumerate(text.split("\n"), start=1):
        if not row_text.strip():
            continue
        try:
            row = json.loads(row_text)
        except ValueError as error:
            raise TraceError(f"{path}, line {line}: not a JSON object ({error}).") from None
        if not isinstance(row, dict):
            raise TraceError(f"{path}, line {line}: {row_text[:40]!r}, expected a JSON object.")
        lines.append(line)
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, lines, {name: [row.get(name) for row in rows] for name in names})


def _read_text(path: Path) -> str:
    """Return the text of a file, unpacked if it is gzipped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TraceError(f"{path} does not exist.{_nearest_file(path)}") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error):
        raise TraceError(f"{path} is not a whole gzip file; fetch it again.") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not a text file: {error}.") from None


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor does the folder {path.parent}."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
