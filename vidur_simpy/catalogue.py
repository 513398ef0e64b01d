"""Sheets of models and devices: a row of a CSV file is an object, known by several names."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection
from importlib import resources
from typing import Any, Protocol, TypeVar

__all__ = ["rows", "short"]


class _Named(Protocol):
    @property
    def name(self) -> str:
        """Full name, with the organisation before a slash if it has one."""


Row = TypeVar("Row", bound=_Named)


def rows(file: str, make: Callable[..., Row], fields: Collection[str]) -> dict[str, Row]:
    """Return the rows of a sheet of the package by each of their names, in lower case.

    Parameters
    ----------
    file : str
        Name of the CSV file among the package's data. Its column ``aliases`` has further names.
    make : callable
        Makes a row from the cells of `fields` by keyword, read as JSON where they are such.
    fields : collection of str
        An empty cell stands for the field's default; other columns are for readers only.
    """
    text = (resources.files("vidur_simpy") / "data" / file).read_text(encoding="utf-8")
    by_name: dict[str, Row] = {}
    cells: dict[str, str]
    for cells in csv.DictReader(text.splitlines()):
        row = make(**{field: _value(cells[field]) for field in fields if cells[field]})
        organisation = row.name.lower().rpartition("/")[0]
        for name in (short(row.name), *cells["aliases"].split()):
            by_name[name] = by_name[f"{organisation}/{name}".lstrip("/")] = row
    return by_name


def short(name: str) -> str:
    """Return a name without its organisation, in lower case.

    >>> short("meta-llama/Llama-3.1-8B")
    'llama-3.1-8b'
    """
    return name.rpartition("/")[2].lower()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
