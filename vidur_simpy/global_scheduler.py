"""Which replica gets a request: small policies, and the table of their names.

A policy makes a router, ``router(request, replicas) -> replica``, called for each request in order
of arrival. A plain function of that shape will do as a policy, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

import numpy as np

from vidur_simpy.entities import Request
from vidur_simpy.validation import configuration

__all__ = [
    "GLOBAL_SCHEDULERS",
    "GlobalScheduler",
    "LeastOutstandingRequests",
    "LeastWaitingRequests",
    "RandomRouting",
    "ReplicaState",
    "RoundRobin",
    "Route",
]


class ReplicaState(Protocol):
    """What a router may look at."""

    @property
    def replica_id(self) -> int:
        """Number of the replica."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests on the replica that wait to be admitted."""
        ...

    @property
    def num_outstanding(self) -> int:
        """Requests on the replica that are not complete."""
        ...


_num_outstanding = attrgetter("num_outstanding")
_num_waiting = attrgetter("num_waiting")

Replica = TypeVar("Replica", bound=ReplicaState)
Route = Callable[[Request, Sequence[Replica]], Replica]


class GlobalScheduler(Protocol):
    """A configuration from which the router of one simulation is made."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router; `rng` is its own source of randomness."""
        ...


def _only_counting(route: Route[ReplicaState]) -> Route[ReplicaState]:
    """Mark a router that looks at no more than :class:`ReplicaState` says."""
    route.only_counts_requests = True  # type: ignore[attr-defined]
    return route


@configuration
class RoundRobin:
    """One replica after the other."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""
        turn = 0

        def route(request: Request, replicas: Sequence[Replica]) -> Replica:
            nonlocal turn
            replica = replicas[turn % len(replicas)]
            turn += 1
            return replica

        return _only_counting(route)


@configuration
class RandomRouting:
    """Any replica, each as likely."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""

        def route(request: Request, replicas: Sequence[Replica]) -> Replica:
            return replicas[int(rng.integers(len(replicas)))]

        return _only_counting(route)


@configuration
class LeastOutstandingRequests:
    """The replica with the fewest requests that are not complete; ties to the lowest number."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""

        def route(request: Request, replicas: Sequence[Replica]) -> Replica:
            return min(replicas, key=_num_outstanding)

        return _only_counting(route)


@configuration
class LeastWaitingRequests:
    """The replica with the fewest waiting requests; ties to the lowest number.

    This is what Vidur calls ``lor``: requests in a batch or decoding do not count.
    """

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""

        def route(request: Request, replicas: Sequence[Replica]) -> Replica:
            return min(replicas, key=_num_waiting)

        return _only_counting(route)


GLOBAL_SCHEDULERS: dict[str, type] = {
    "round_robin": RoundRobin,
    "random": RandomRouting,
    "least_outstanding_requests": LeastOutstandingRequests,
    "least_waiting_requests": LeastWaitingRequests,
}
