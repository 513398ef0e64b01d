"""Values of a function that are kept once computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Lookup"]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Lookup(dict[Key, Value], Generic[Key, Value]):
    """The values of a function, each computed when it is first asked for.

    When there are `capacity` of them, all are forgotten.

    Examples
    --------
    >>> squares = Lookup(lambda number: number**2)
    >>> squares[3], squares
    (9, {3: 9})
    """

    def __init__(self, function: Callable[[Key], Value], capacity: float = math.inf) -> None:
        super().__init__()
        self._function = function
        self._capacity = capacity

    def __missing__(self, key: Key) -> Value:
        if len(self) >= self._capacity:
            self.clear()
        value = self[key] = self._function(key)
        return value
