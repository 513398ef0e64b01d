"""In which order waiting requests are looked at: keys, and the queues that they keep in order.

An ordering is a name of the tables below, or a key function of your own: the smallest goes first.
A key of the request alone, ``key(request)``, must not change while the request waits; the queue is
then kept in order by insertion. A key that also takes the time, ``key(request, now)``, is evaluated
for the whole queue whenever a batch is formed. First come, first served needs no key at all.
"""

from __future__ import annotations

import inspect
from bisect import insort_left, insort_right
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator

from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import ConfigError, SimulationError, unknown_name
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.validation import takes

__all__ = [
    "ORDERINGS",
    "PREDICTIVE_ORDERINGS",
    "Key",
    "LoneTimes",
    "Ordering",
    "Predictor",
    "ResortedQueue",
    "SortedQueue",
    "WaitingQueue",
    "checked",
    "edf",
    "fcfs",
    "lrs",
    "priority",
    "queue_of",
    "sjf",
    "sorted_by",
    "spt",
]

Key: TypeAlias = Callable[[Request], Any] | Callable[[Request, float], Any]
"""What a queue is sorted by, smallest first: ``key(request)`` or ``key(request, now)``."""

Predictor: TypeAlias = Callable[[Request], float]
"""Seconds that a request still needs, as predicted."""


# -- keys --------------------------------------------------------------------------------------


def fcfs(request: Request) -> tuple[float, int]:
    """First come, first served: the instant of arrival, then the request's number."""
    assert request.arrived_at is not None
    return request.arrived_at, _number(request)


def edf(request: Request) -> tuple[float, int]:
    """Earliest deadline first.

    Raises
    ------
    SimulationError
        If the request has no deadline.
    """
    if request.deadline is None:
        raise _no_deadline(request, "edf")
    return request.deadline, _number(request)


def sjf(request: Request) -> tuple[int, int]:
    """Shortest job first: the length of the prompt, whatever was already computed of it."""
    return request.num_prefill_tokens, _number(request)


def priority(request: Request) -> tuple[int, float, int]:
    """Most urgent first: the request's `priority`, smaller is more urgent, then its arrival."""
    return request.priority, *fcfs(request)


def lrs(remaining_time: Predictor) -> Callable[[Request, float], float]:
    """Least remaining slack first, as a fraction of the time that the request was given.

    The slack is what would be left until the deadline if the request went on now and alone.

    Parameters
    ----------
    remaining_time : callable
        Predicts the seconds that the rest of a request's prefill takes.

    Returns
    -------
    callable
        The key; it raises a SimulationError for a request without deadline.
    """

    def slack_fraction(request: Request, now: float) -> float:
        deadline = request.deadline
        if deadline is None:
            raise _no_deadline(request, "lrs")
        given = request.deadline_time
        if given is None:
            assert request.arrived_at is not None
            given = deadline - request.arrived_at
        if given <= 0.0:
            return float("-inf")
        return (deadline - now - remaining_time(request)) / given

    return slack_fraction


def spt(processing_time: Predictor) -> Callable[[Request], tuple[float, int]]:
    """Shortest processing time first: the predicted seconds of the whole request, alone.

    The prediction sees the true output length, so this is what a perfect one could gain.
    """

    def key(request: Request) -> tuple[float, int]:
        return processing_time(request), _number(request)

    return key


def _number(request: Request) -> int:
    return -1 if request.request_id is None else request.request_id


def _no_deadline(request: Request, ordering: str) -> SimulationError:
    return SimulationError(
        f"request {request.request_id} has no deadline, which the ordering {ordering!r} needs: "
        f"give the trace a column 'deadline' or the Request a deadline, take Mnemosyne, which "
        f"derives them, or a key of your own such as lambda request: request.arrived_at + 2.0."
    )


ORDERINGS: dict[str, Key] = {"fcfs": fcfs, "edf": edf, "sjf": sjf, "priority": priority}
"""The orderings that look at nothing but the request."""

PREDICTIVE_ORDERINGS: dict[str, Callable[[Predictor], Key]] = {"lrs": lrs, "spt": spt}
"""The orderings that are made from a prediction of execution times."""


class LoneTimes:
    """Predicts how long requests take alone on a replica, prompts computed at once.

    Every length is predicted once and kept.

    Raises
    ------
    ConfigError
        At the first prediction, if the replica has no execution times to predict with.
    """

    def __init__(self, resources: ReplicaResources) -> None:
        self._resources = resources
        self._seconds: dict[tuple[int, int], float] = {}

    def prefill(self, request: Request) -> float:
        """Return the seconds of the prefill, of the whole prompt."""
        return self._alone(request.prefill_target, request.prefill_target)

    def processing(self, request: Request) -> float:
        """Return the seconds of the prefill and of the decode steps that follow it."""
        prompt = request.prefill_target
        num_steps = request.num_tokens - prompt - 1
        # Context grows by a token a step; a step with the mean one stands for all.
        mean_context = prompt + 1 + (num_steps + 1) // 2
        return self._alone(prompt, prompt) + num_steps * self._alone(1, mean_context)

    def _alone(self, num_tokens: int, context: int) -> float:
        seconds = self._seconds.get((num_tokens, context))
        if seconds is None:
            stage_time = self._resources.stage_time
            if stage_time is None:
                raise ConfigError(
                    "this ordering predicts execution times: ReplicaResources.stage_time is None, "
                    "expected a function of (batch, stage_id)."
                )
            batch = Batch(None, [PrefillChunk(Request(num_tokens, 1), num_tokens, context)])
            seconds = stage_time(batch, 0) * self._resources.pipeline_parallel_size
            self._seconds[num_tokens, context] = seconds
        return seconds


# -- queues ------------------------------------------------------------------------------------


class WaitingQueue(deque[Request]):
    """Waiting requests, first come, first served; the head goes first.

    ``append`` queues a new request, ``appendleft`` one that comes back after a preemption.

    Attributes
    ----------
    is_steady : bool
        Whether the order stays as it is while nobody comes or goes.
    """

    is_steady = True

    def order(self, now: float) -> None:
        """Bring the queue in order; it already is."""


class SortedQueue(WaitingQueue):
    """Waiting requests in order of a key that does not change while they wait.

    Of equals a new request goes behind and one that comes back ahead.

    Examples
    --------
    >>> queue = SortedQueue(sjf)
    >>> for num_prefill_tokens in (30, 10, 20):
    ...     queue.append(Request(num_prefill_tokens, 1))
    >>> [request.num_prefill_tokens for request in queue]
    [10, 20, 30]
    """

    def __init__(self, key: Callable[[Request], Any]) -> None:
        super().__init__()
        self._key = key

    def append(self, request: Request, /) -> None:
        """Insert a new request: O(log n) comparisons, none to speak of where keys ascend."""
        if not self or self._key(self[-1]) <= self._key(request):
            super().append(request)
        else:
            insort_right(self, request, key=self._key)

    def appendleft(self, request: Request, /) -> None:
        """Insert a request that comes back."""
        insort_left(self, request, key=self._key)


class ResortedQueue(WaitingQueue):
    """Waiting requests in order of a key that changes with time: sorted at every formation."""

    is_steady = False

    def __init__(self, key: Callable[[Request, float], Any]) -> None:
        super().__init__()
        self._key = key

    def order(self, now: float) -> None:
        """Sort the queue by the keys of this instant; equals keep their order. O(n log n)."""
        if self:
            ordered = sorted(self, key=lambda request: self._key(request, now))
            self.clear()
            self.extend(ordered)


def queue_of(ordering: str | Key, resources: ReplicaResources) -> WaitingQueue:
    """Make the waiting queue of a scheduler.

    Parameters
    ----------
    ordering : str or callable
        A name or a key, as checked by :data:`Ordering`.
    resources : ReplicaResources
        What the replica has; its `stage_time` predicts, for the orderings that need it.
    """
    if ordering == "fcfs":
        return WaitingQueue()
    if isinstance(ordering, str):
        times = LoneTimes(resources)
        if ordering in ORDERINGS:
            ordering = ORDERINGS[ordering]
        else:
            predictor = times.prefill if ordering == "lrs" else times.processing
            ordering = PREDICTIVE_ORDERINGS[ordering](predictor)
    return sorted_by(ordering)


def sorted_by(key: Key) -> WaitingQueue:
    """Make an empty queue in the order of `key`, resorted with time if it takes the time."""
    return ResortedQueue(key) if takes_time(key) else SortedQueue(key)  # type: ignore[arg-type]


def takes_time(key: Key) -> bool:
    """Whether a key is one of ``(request, now)``, and not of the request alone."""
    try:
        parameters = inspect.signature(key).parameters.values()
    except ValueError:
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional for parameter in parameters) >= 2


def checked(ordering: Any, further: tuple[str, ...] = ()) -> Any:
    """Return an ordering if it is a known name, one of `further` ones, or a key function.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    known = (*ORDERINGS, *PREDICTIVE_ORDERINGS, *further)
    if isinstance(ordering, str):
        if ordering == "st" and ordering not in known:
            raise ConfigError(
                "ordering 'st' shares the time of a batch between long and short prompts, which "
                "only mnemosyne does: expected 'lrs' for the same order."
            )
        if ordering not in known:
            raise unknown_name("ordering", ordering, known)
    elif not callable(ordering) or not _is_key(ordering):
        raise ConfigError(
            f"ordering = {ordering!r}: expected a function of (request) or (request, now), or one "
            f"of {', '.join(known)}."
        )
    return ordering


def _is_key(function: Callable[..., Any]) -> bool:
    return takes(function, *(("request", "now") if takes_time(function) else ("request",)))


Ordering: TypeAlias = Annotated[Any, AfterValidator(checked)]
"""The type of a policy's field `ordering`: a name, or a :data:`Key`."""
