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


Replica = TypeVar("Replica", bound=ReplicaState)
Route = Callable[[Request, Sequence[Replica]], Replica]


class GlobalScheduler(Protocol):
    """A configuration from which the router of one simulation is made."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router; `rng` is its own source of randomness."""
        ...


# What routers that are no mystery say of themselves, as attributes of the function:
#
# `only_counts_requests`: it looks at no more of a replica than `ReplicaState` says, at its counts
# only if it also has `fewest`: it takes the first replica with the least of this count;
# `ignores_requests`: it does not look at the request, either.


def _only_counting(route: Route[ReplicaState]) -> Route[ReplicaState]:
    """Mark a router that looks at no more than :class:`ReplicaState` says."""
    route.only_counts_requests = True  # type: ignore[attr-defined]
    return route


def _ignoring(route: Route[ReplicaState]) -> Route[ReplicaState]:
    """Mark a router that looks at nothing."""
    route.ignores_requests = True  # type: ignore[attr-defined]
    return _only_counting(route)


def _to_the_fewest(count: str) -> Route[ReplicaState]:
    """Return the router to the replica with the least of a count; its `fewest` says of which."""
    count_of = attrgetter(count)

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        return min(replicas, key=count_of)

    route.fewest = count  # type: ignore[attr-defined]
    return _only_counting(route)


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

        return _ignoring(route)


@configuration
class RandomRouting:
    """Any replica, each as likely."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""

        def route(request: Request, replicas: Sequence[Replica]) -> Replica:
            return replicas[int(rng.integers(len(replicas)))]

        return _ignoring(route)


@configuration
class LeastOutstandingRequests:
    """The replica with the fewest requests that are not complete; ties to the lowest number."""

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""
        return _to_the_fewest("num_outstanding")


@configuration
class LeastWaitingRequests:
    """The replica with the fewest waiting requests; ties to the lowest number.

    This is what Vidur calls ``lor``: requests in a batch or decoding do not count.
    """

    def router(self, rng: np.random.Generator) -> Route[ReplicaState]:
        """Make the router."""
        return _to_the_fewest("num_waiting")


GLOBAL_SCHEDULERS: dict[str, type] = {
    "round_robin": RoundRobin,
    "random": RandomRouting,
    "least_outstanding_requests": LeastOutstandingRequests,
    "least_waiting_requests": LeastWaitingRequests,
}
