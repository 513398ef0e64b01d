"""The same requests at another rate: what capacity and load curves vary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.streams import streams_of
from vidur_simpy.workload import Arrivals, Trace, Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ScaledArrivals",
    "has_rate",
    "is_random",
    "mean_rate",
    "num_requests_of",
    "with_rate",
    "with_share",
]


@dataclass(frozen=True)
class ScaledArrivals:
    """Arrivals stretched in time.

    Attributes
    ----------
    arrivals : Arrivals
    time_scale : float
        Factor on the times; 0.5 doubles the rate.
    """

    arrivals: Arrivals
    time_scale: float

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return the times, see :class:`vidur_simpy.workload.Arrivals`."""
        if duration is not None:
            duration = duration / self.time_scale
        return self.time_scale * self.arrivals.arrival_times(rng, num_requests, duration)


def mean_rate(workload: Workload | Trace, seed: int = 0) -> float:
    """Return the requests per second of a workload: as it says, or over the times it draws.

    Raises
    ------
    ConfigError
        If all its requests arrive at once.
    """
    rate = getattr(getattr(workload, "arrivals", None), "rate", None)
    if isinstance(rate, int | float) and rate > 0:
        return float(rate)
    arrived_at = _drawn(workload, seed)
    if not arrived_at.max(initial=0.0) > 0:
        raise ConfigError(
            f"{_arrivals_of(workload)!r} has no rate: expected requests that arrive one after "
            "another, such as Poisson(rate=1.0)."
        )
    return float(len(arrived_at) / arrived_at[-1])


def has_rate(workload: Workload | Trace, seed: int = 0) -> bool:
    """Return whether requests arrive one after another, rather than all at once."""
    try:
        return mean_rate(workload, seed) > 0
    except ConfigError:
        return False


def with_rate(workload: Workload | Trace, rate: float, *, seed: int = 0) -> Workload | Trace:
    """Return the same requests at another rate.

    Lengths and order stay and all times are stretched alike (common random numbers), so that runs
    at two rates differ by the rate only. A workload with a `duration` gets as many requests as it
    has at its own rate.

    Parameters
    ----------
    workload : Workload or Trace
    rate : float
        Requests per second, on average.
    seed : int
        Of the run whose arrivals say what the rate is, where the workload does not.

    Raises
    ------
    ConfigError
        If all requests arrive at once, which has no rate.

    Examples
    --------
    >>> from vidur_simpy import FixedLengths, Poisson
    >>> workload = Workload(Poisson(rate=2.0), FixedLengths(512, 16), num_requests=10)
    >>> with_rate(workload, 6.0).arrivals
    Poisson(rate=6.0)
    """
    own_rate = mean_rate(workload, seed)
    limit: dict[str, Any] = {}
    if workload.duration is not None:
        limit = {"num_requests": num_requests_of(workload, seed), "duration": None}
    if isinstance(workload, Trace):
        time_scale = workload.time_scale * own_rate / rate
        return dataclasses.replace(workload, time_scale=time_scale, **limit)
    arrivals: Any = workload.arrivals
    settings = getattr(arrivals, "__dataclass_fields__", ())
    if "rate" in settings:
        scaled: Any = dataclasses.replace(arrivals, rate=rate)
    elif "time_scale" in settings:
        time_scale = arrivals.time_scale * own_rate / rate
        scaled = dataclasses.replace(arrivals, time_scale=time_scale)
    else:
        scaled = ScaledArrivals(arrivals, own_rate / rate)
    return dataclasses.replace(workload, arrivals=scaled, **limit)


def num_requests_of(workload: Workload | Trace, seed: int = 0) -> int:
    """Return how many requests a workload has, with a seed where that matters."""
    return workload.num_requests or max(1, len(_drawn(workload, seed)))


def with_share(workload: Workload | Trace, share: float, *, seed: int = 0) -> Workload | Trace:
    """Return a workload with a share of its requests, at the same rate.

    Examples
    --------
    >>> from vidur_simpy import FixedLengths, Poisson
    >>> workload = Workload(Poisson(rate=2.0), FixedLengths(512, 16), num_requests=10)
    >>> with_share(workload, 0.5).num_requests
    5
    """
    if share >= 1:
        return workload
    count = max(1, round(share * num_requests_of(workload, seed)))
    return dataclasses.replace(workload, num_requests=count, duration=None)


def is_random(workload: Workload | Trace) -> bool:
    """Return whether two seeds give different requests; a replayed trace is what it is."""
    return not isinstance(workload, Trace)


def _drawn(workload: Workload | Trace, seed: int) -> NDArray[np.float64]:
    streams = streams_of(seed)
    return workload.requests(streams["arrivals"], streams["lengths"]).arrived_at


def _arrivals_of(workload: Workload | Trace) -> object:
    return getattr(workload, "arrivals", workload)
