"""The requests of a run: which numbers are taken, and who is under way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from math import inf
from typing import Any, SupportsFloat, SupportsIndex

from vidur_simpy.entities import Request
from vidur_simpy.errors import ConfigError
from vidur_simpy.workload import RequestArrays

__all__ = ["Expected", "Roster"]


class Expected:
    """The requests of a workload: live once they are made, or taken as columns.

    Parameters
    ----------
    table : RequestArrays
    live : dict of int to Request
        Where a request is noted when it is made.
    keep : callable
        Takes the columns of requests that are complete and were never made.
    watched : callable
        Returns whether somebody watches how far they are.

    Attributes
    ----------
    table : RequestArrays
    """

    def __init__(
        self,
        table: RequestArrays,
        live: dict[int, Request],
        keep: Callable[[Mapping[str, Any]], None],
        watched: Callable[[], bool],
    ) -> None:
        self.table = table
        self._watched = watched
        self.keep = keep
        self._live = live

    @property
    def is_watched(self) -> bool:
        """Whether somebody watches how far they are."""
        return self._watched()

    def made_from(self, first: int) -> Iterator[Request]:
        """Make each request from row `first` on when it is asked for."""
        return map(self._noted, self.table.iterate(first))

    def made(self, row: int) -> Request:
        """Make one request."""
        return self._noted(self.table.request(row))

    def _noted(self, request: Request) -> Request:
        self._live[request.request_id] = request  # type: ignore[index]
        return request


class Roster:
    """The requests that are expected or under way, and the numbers that no other may have.

    Attributes
    ----------
    live : dict of int to Request
        By number: those that were made and are neither complete nor refused. The next arrival of
        the workload is among them before it happens.
    num_expected : int
        Requests of the workload.
    num_submitted : int
        Requests that came otherwise.
    """

    def __init__(self) -> None:
        self.live: dict[int, Request] = {}
        self.num_expected = 0
        self._next_id = 0
        self._workload_ids: Container[int] = ()
        self._submitted_ids: set[int] = set()

    @property
    def num_submitted(self) -> int:
        """Requests that did not come from the workload."""
        return len(self._submitted_ids)

    def expect(
        self,
        table: RequestArrays,
        keep: Callable[[Mapping[str, Any]], None],
        watched: Callable[[], bool],
    ) -> Expected:
        """Take the numbers of a workload; return its requests, live once they are made.

        Parameters
        ----------
        table : RequestArrays
        keep, watched : callable
            See :class:`Expected`.
        """
        self.num_expected = len(table)
        if table.request_id is None:
            self._workload_ids = range(len(table))
            self._next_id = len(table)
        elif len(table):
            self._workload_ids = set(table.request_id.tolist())
            self._next_id = 1 + max(self._workload_ids)
        return Expected(table, self.live, keep, watched)

    def submit(self, request: Request, now: float) -> float:
        """Take a request that a user submits `now`; return when it arrives, in seconds.

        Raises
        ------
        ConfigError
            If it was submitted before, should have arrived in the past, or its number is taken.
        """
        if not isinstance(request, Request):
            raise ConfigError(f"submit({request!r}): expected a Request.")
        if request.done is not None or request.replica_id is not None:
            raise ConfigError(f"{request} was submitted before; expected a new request.")
        arrived_at = request.arrived_at = _checked_arrival(request.arrived_at, now)
        request_id = request.request_id = self._checked_id(request.request_id)
        self._next_id = max(self._next_id, request_id + 1)
        self._submitted_ids.add(request_id)
        self.live[request_id] = request
        return arrived_at

    def _checked_id(self, request_id: int | None) -> int:
        if request_id is None:
            return self._next_id
        if not (isinstance(request_id, SupportsIndex) and int(request_id) >= 0):
            raise ConfigError(f"Request.request_id = {request_id!r}: expected an integer >= 0.")
        if request_id in self._workload_ids or request_id in self._submitted_ids:
            raise ConfigError(
                f"Request.request_id = {request_id} is taken; leave it out, or use "
                f"{self._next_id} or more."
            )
        return int(request_id)

    def arrived(self, now: float, queued: list[Request]) -> list[Request]:
        """Return the live requests whose arrival was handled by `now` (seconds).

        Of those that arrive right now only they count that are `queued` at the router or mapped:
        the next one of a workload is made ahead of its arrival.
        """
        in_queue = set(map(id, queued))
        return [
            request
            for request in self.live.values()
            if request.arrived_at is not None
            and (
                request.arrived_at < now
                or request.replica_id is not None
                or id(request) in in_queue
            )
        ]


def _checked_arrival(arrived_at: float | None, now: float) -> float:
    if arrived_at is None:
        return now
    if not (isinstance(arrived_at, SupportsFloat) and now <= float(arrived_at) < inf):
        raise ConfigError(
            f"Request.arrived_at = {arrived_at!r} s: expected now ({now} s) or later."
        )
    return float(arrived_at)
