"""What can go wrong, as one tree.

::

    VidurError
    ├── ConfigError (a ValueError)    a setting that is unknown, of the wrong type or out of range
    ├── CapacityError (a ValueError)  a model or a request that does not fit its memory
    ├── ProfileError                  an execution-time model asked for what it does not know
    ├── TraceError (a ValueError)     a trace file that is missing, empty or has an unusable row
    ├── NotAvailableError             a table that was not recorded (`vidur_simpy.result`)
    ├── DamagedEntryError             an entry of a store that cannot be read (`search.store`)
    └── SimulationError               a run that cannot go on; ``result`` keeps what was computed

Catch :class:`VidurError` to catch them all. Every message names the place, the value, what was
expected and, for names, the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidur_simpy.result import Result

__all__ = [
    "CapacityError",
    "ConfigError",
    "ProfileError",
    "SimulationError",
    "TraceError",
    "VidurError",
    "unknown_name",
]


class VidurError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(VidurError, ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


class CapacityError(VidurError, ValueError):
    """A model or a request that does not fit the memory it is given."""


class ProfileError(VidurError):
    """An execution-time model was asked for something it has no data for."""


class TraceError(VidurError, ValueError):
    """A trace file that is missing, empty or holds an unusable row."""


class SimulationError(VidurError):
    """A run that cannot go on.

    Attributes
    ----------
    result : Result or None
        Everything computed up to that point, so that nothing is lost.
    """

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result


def unknown_name(what: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error for a `name` that is not among the `known` ones, with the nearest.

    >>> print(unknown_name("device", "h10", ["a100", "h100"]))
    unknown device 'h10': did you mean 'h100'? Known: a100, h100.
    """
    names = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in names}
    nearest = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.5)
    hint = f" did you mean {lowered[nearest[0]]!r}?" if nearest else ""
    return ConfigError(f"unknown {what} {name!r}:{hint} Known: {', '.join(names) or 'none'}.")
