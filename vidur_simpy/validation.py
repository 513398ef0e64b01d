"""Public objects are frozen, checked when made, and are their own configuration.

`configuration` turns a class with annotated fields into such an object: a frozen dataclass whose
types and ranges pydantic checks, with one clear :class:`vidur_simpy.ConfigError` instead of a
report.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

import numpy as np
import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from vidur_simpy.errors import ConfigError, VidurError, unknown_name

__all__ = ["configuration", "field_names", "readable", "takes"]

Class = TypeVar("Class")

_SETTINGS = pydantic.ConfigDict(
    extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
)


@dataclass_transform(frozen_default=True, field_specifiers=(pydantic.Field,))
def configuration(cls: type[Class]) -> type[Class]:
    """Make a frozen dataclass whose fields are checked at construction.

    Numpy scalars are taken as the Python numbers they stand for; booleans and strings are not
    taken as numbers.

    Raises
    ------
    ConfigError
        From the constructor: an unknown field (with the nearest known one), a value of the wrong
        type or out of range.

    Examples
    --------
    >>> from pydantic import Field
    >>> @configuration
    ... class Limits:
    ...     max_num_seqs: int = Field(default=128, ge=1)
    >>> Limits(max_num_seqs=8)
    Limits(max_num_seqs=8)
    >>> Limits(max_num_seqs=0)
    Traceback (most recent call last):
    ...
    vidur_simpy.errors.ConfigError: Limits.max_num_seqs = 0: expected greater than or equal to 1.
    """
    checked: Any = pydantic_dataclass(frozen=True, config=_SETTINGS)(cls)
    construct = checked.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        args = tuple(_plain(value) for value in args)
        kwargs = {name: _plain(value) for name, value in kwargs.items()}
        try:
            construct(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise readable(error, cls.__name__, field_names(checked)) from None

    _show_fields(init, checked)
    checked.__init__ = init
    return cast(type[Class], checked)


def _show_fields(init: Any, cls: type) -> None:
    """Let a constructor say what it takes to help() and to the API reference."""
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(cls).parameters.values()
    init.__signature__ = inspect.Signature([itself, *parameters])
    init.__module__, init.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    init.__name__ = "__init__"


def field_names(cls: type) -> list[str]:
    """Return the names of the fields of a `configuration` class."""
    return list(cls.__dataclass_fields__)  # type: ignore[attr-defined]


def readable(error: pydantic.ValidationError, where: str, known: list[str]) -> VidurError:
    """Turn pydantic's report into one sentence about its first finding."""
    findings = error.errors(include_url=False)
    # A misspelt field is missing, too; its misspelling is what to tell.
    first = min(findings, key=lambda finding: finding["type"] != "unexpected_keyword_argument")
    # The rest of a place says which member of a union was tried.
    place = first["loc"][0] if first["loc"] else ""
    if isinstance(place, int) and place < len(known):
        place = known[place]
    kind = first["type"]
    if kind == "unexpected_keyword_argument":
        return unknown_name(f"setting of {where}", place, known)
    if kind in ("missing", "missing_argument"):
        return ConfigError(f"{where} needs {place!r}, which was not given.")
    if kind == "unexpected_positional_argument":
        return ConfigError(f"{where} takes at most {len(known)} values: {', '.join(known)}.")
    if kind == "value_error":
        cause = first["ctx"]["error"]
        return cause if isinstance(cause, VidurError) else ConfigError(str(cause))
    expected = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    path = f"{where}.{place}" if place else where
    return ConfigError(f"{path} = {first['input']!r}: expected {expected}.")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def takes(function: Callable[..., Any], *arguments: str) -> bool:
    """Whether a function can be called with so many arguments by position.

    Of one that does not tell its signature it is taken to be so.

    >>> takes(lambda request, now=0.0: 1.0, "request"), takes(lambda: 1.0, "request")
    (True, False)
    """
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:
        return True
    except TypeError:
        return False
    return True
