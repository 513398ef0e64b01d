"""The columns a workload hands to the simulator: one row per request, in order of arrival."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidur_simpy.entities import Request
from vidur_simpy.errors import ConfigError

__all__ = ["MAX_TOKENS", "RequestArrays"]

#: Longest prompt or output. Products of two lengths then still fit 64 bits.
MAX_TOKENS = 2**30

# Rows turned from columns into numbers at a time.
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, eq=False)
class RequestArrays:
    """Requests as columns of equal length, in order of arrival.

    Attributes
    ----------
    arrived_at : ndarray of float64, shape (n,)
        Seconds from the start of the simulation, finite, >= 0, ascending.
    num_prefill_tokens, num_decode_tokens : ndarray of int64, shape (n,)
        Tokens of the prompt and of the output, both >= 1.
    request_id : ndarray of int64, shape (n,), optional
        Identifiers; without them requests are numbered in order of arrival.
    priority : ndarray of int64, shape (n,), optional
        Smaller is more urgent, as in vLLM.
    deadline : ndarray of float64, shape (n,), optional
        The instant by which a request should be done; NaN where it has none.
    session_id : ndarray of str, shape (n,), optional
        The conversation a request belongs to; empty where it belongs to none.
    hash_ids : sequence of ndarray of int64, optional
        For each request, one id per block of `hash_block_size` prompt tokens, the last block
        possibly short. Prompts share a prefix as far as their ids agree from the start.
    hash_block_size : int
        Prompt tokens behind one hash id.

    Raises
    ------
    ConfigError
        For columns of unequal length, times that are not ascending, lengths below one, or hash
        ids that do not fit the prompts.

    Examples
    --------
    >>> requests = RequestArrays([0.0, 0.5], [100, 200], [10, 20])
    >>> len(requests), requests.num_prefill_tokens.sum()
    (2, np.int64(300))
    """

    arrived_at: NDArray[np.float64]
    num_prefill_tokens: NDArray[np.int64]
    num_decode_tokens: NDArray[np.int64]
    request_id: NDArray[np.int64] | None = None
    priority: NDArray[np.int64] | None = None
    deadline: NDArray[np.float64] | None = None
    session_id: NDArray[np.str_] | None = None
    hash_ids: Sequence[NDArray[np.int64]] | None = None
    hash_block_size: int = 512

    def __post_init__(self) -> None:
        columns: dict[str, Any] = {
            "arrived_at": _instants(self.arrived_at),
            "num_prefill_tokens": _lengths(self.num_prefill_tokens, "num_prefill_tokens"),
            "num_decode_tokens": _lengths(self.num_decode_tokens, "num_decode_tokens"),
        }
        for name, values in columns.items():
            object.__setattr__(self, name, values)
        for name, values in self._columns().items():
            if len(values) != len(self):
                raise ConfigError(
                    f"{name} has {len(values)} rows, arrived_at has {len(self)}: expected as many."
                )
        if self.hash_ids is not None:
            _check_hash_ids(self.hash_ids, self.num_prefill_tokens, self.hash_block_size)

    def __len__(self) -> int:
        return len(self.arrived_at)

    def take(self, rows: NDArray[np.intp] | slice) -> RequestArrays:
        """Return the requests in `rows`, given as indices or a slice.

        >>> len(RequestArrays([0.0, 0.5], [100, 200], [10, 20]).take(slice(1)))
        1
        """
        columns: dict[str, Any] = {
            name: values[rows] for name, values in self._columns().items() if name != "hash_ids"
        }
        if self.hash_ids is not None:
            columns["hash_ids"] = [self.hash_ids[row] for row in np.arange(len(self))[rows]]
        return dataclasses.replace(self, **columns)

    def iterate(self, first: int = 0) -> Iterator[Request]:
        """Make each request from row `first` on when it is asked for; the others take no memory.

        >>> next(RequestArrays([0.5], [100], [10]).iterate())
        <Request 0: 0 of 100 + 10 tokens>
        """
        given = self._optional()
        for start in range(first, len(self), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            columns = (self.num_prefill_tokens, self.num_decode_tokens, self.arrived_at)
            numbers = zip(*(column[rows].tolist() for column in columns), strict=True)
            for index, (prefill, decode, arrived_at) in enumerate(numbers, start):
                yield self._made(index, prefill, decode, arrived_at, given)

    def request(self, row: int) -> Request:
        """Make the request of one row.

        >>> RequestArrays([0.5], [100], [10]).request(0)
        <Request 0: 0 of 100 + 10 tokens>
        """
        prefill, decode = int(self.num_prefill_tokens[row]), int(self.num_decode_tokens[row])
        return self._made(row, prefill, decode, float(self.arrived_at[row]), self._optional())

    def _made(
        self, row: int, prefill: int, decode: int, arrived_at: float, given: list[str]
    ) -> Request:
        request = Request(prefill, decode, arrived_at, request_id=row)
        for name in given:
            setattr(request, name, _plain(getattr(self, name)[row]))
        request.hash_block_size = self.hash_block_size
        return request

    def cells(self, name: str) -> list[Any]:
        """Return an optional column as the requests have it."""
        return [_plain(cell) for cell in getattr(self, name)]

    def _optional(self) -> list[str]:
        optional = ("request_id", "priority", "deadline", "session_id", "hash_ids")
        return [name for name in optional if getattr(self, name) is not None]

    def _columns(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]
        columns = {name: getattr(self, name) for name in names if name != "hash_block_size"}
        return {name: values for name, values in columns.items() if values is not None}


def _plain(cell: Any) -> Any:
    """Return a cell as a Python value; NaN and the empty text stand for None."""
    if isinstance(cell, np.ndarray):
        return cell.tolist()
    cell = cell.item() if isinstance(cell, np.generic) else cell
    return None if cell == "" or cell != cell else cell


def _instants(given: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(given, np.float64)
    if times.ndim != 1:
        raise ConfigError(f"arrived_at has shape {times.shape}, expected one time per request.")
    bad = ~(np.isfinite(times) & (times >= 0))
    bad[1:] |= times[1:] < times[:-1]
    if bad.any():
        row = int(bad.argmax())
        raise ConfigError(
            f"arrived_at[{row}] = {times[row]}: expected finite seconds >= 0 in ascending order."
        )
    return times


def _check_hash_ids(
    hash_ids: Sequence[NDArray[np.int64]], num_prefill_tokens: NDArray[np.int64], block_size: int
) -> None:
    if block_size < 1:
        raise ConfigError(f"hash_block_size = {block_size}: expected at least 1.")
    needed = -(-num_prefill_tokens // block_size)
    bad = needed != [len(ids) for ids in hash_ids]
    if bad.any():
        row = int(bad.argmax())
        raise ConfigError(
            f"hash_ids[{row}] has {len(hash_ids[row])} ids, expected {needed[row]} for a prompt of "
            f"{num_prefill_tokens[row]} tokens (hash_block_size = {block_size})."
        )


def _lengths(given: ArrayLike, name: str) -> NDArray[np.int64]:
    values = np.asarray(given)
    if values.ndim != 1:
        raise ConfigError(f"{name} has shape {values.shape}, expected one count per request.")
    if values.dtype.kind not in "iuf":
        raise ConfigError(f"{name} holds {values.dtype}, expected whole numbers of tokens.")
    bad = ~((values >= 1) & (values <= MAX_TOKENS) & (values == np.floor(values)))
    if bad.any():
        row = int(bad.argmax())
        raise ConfigError(
            f"{name}[{row}] = {values[row]}: expected a whole number from 1 to {MAX_TOKENS}."
        )
    return values.astype(np.int64)
