"""When requests arrive: processes that give sorted times from zero.

All but :class:`AllAtOnce` and :class:`TraceArrivals` are renewal processes: the first request
comes after one gap, like every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vidur_simpy.errors import ConfigError, TraceError
from vidur_simpy.validation import configuration
from vidur_simpy.workload.traces import TraceFormat, read_arrivals

__all__ = ["AllAtOnce", "Arrivals", "Constant", "Gamma", "Poisson", "TraceArrivals"]


@runtime_checkable
class Arrivals(Protocol):
    """Anything that can say when requests arrive."""

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return arrival times in seconds from 0, ascending, as float64 of shape (n,).

        Exactly one of `num_requests` (how many) and `duration` (all times below it) is given;
        `rng` is the only source of randomness.
        """
        ...


@configuration
class Poisson:
    """Independent arrivals: exponential gaps with mean 1 / `rate`.

    Vidur caps a gap at 3 / rate, which raises the effective rate by 5 %; here nothing is cut.

    Parameters
    ----------
    rate : float
        Requests per second.

    Examples
    --------
    >>> Poisson(rate=2.0).arrival_times(np.random.default_rng(0), num_requests=3).round(2)
    array([0.34, 0.85, 0.86])
    """

    rate: float = Field(gt=0)

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return the times, see :class:`vidur_simpy.workload.Arrivals`."""

        def draw_gaps(size: int) -> NDArray[np.float64]:
            return rng.exponential(1 / self.rate, size)

        return _renewals(draw_gaps, self.rate, num_requests, duration)


@configuration
class Gamma:
    """Arrivals in bursts: gamma-distributed gaps with mean 1 / `rate`.

    The shape is 1 / cv² and the scale cv² / rate. A `cv` of 1 is Poisson, above 1 burstier,
    below 1 more regular; `burstiness` of ``vllm bench serve`` is the shape.

    Parameters
    ----------
    rate : float
        Requests per second.
    cv : float
        Coefficient of variation of the gaps, up to 100.

    Examples
    --------
    >>> Gamma(rate=2.0, cv=4.0).arrival_times(np.random.default_rng(0), duration=100.0).size
    127
    """

    rate: float = Field(gt=0)
    cv: float = Field(gt=0, le=100)

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return the times, see :class:`vidur_simpy.workload.Arrivals`."""
        shape, scale = self.cv**-2, self.cv**2 / self.rate

        def draw_gaps(size: int) -> NDArray[np.float64]:
            return rng.gamma(shape, scale, size)

        return _renewals(draw_gaps, self.rate, num_requests, duration)


@configuration
class Constant:
    """A steady beat: request k (from 1) arrives at exactly k / `rate`.

    Parameters
    ----------
    rate : float
        Requests per second.

    Examples
    --------
    >>> Constant(rate=4.0).arrival_times(np.random.default_rng(0), duration=1.0)
    array([0.25, 0.5 , 0.75])
    """

    rate: float = Field(gt=0)

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return the times, see :class:`vidur_simpy.workload.Arrivals`; `rng` is not used."""
        num_requests, duration = _one_limit(num_requests, duration)
        most = num_requests if duration is None else math.ceil(self.rate * duration) + 1
        times = np.arange(1, most + 1) / self.rate
        return times if duration is None else times[times < duration]


@configuration
class AllAtOnce:
    """Every request is there at time 0: an offline batch.

    Examples
    --------
    >>> AllAtOnce().arrival_times(np.random.default_rng(0), num_requests=2)
    array([0., 0.])
    """

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return the times, see :class:`vidur_simpy.workload.Arrivals`; `rng` is not used.

        Raises
        ------
        ConfigError
            For a `duration`, which says nothing about how many requests there are.
        """
        if num_requests is None:
            raise ConfigError(
                f"all_at_once needs num_requests; duration = {duration} does not say how many."
            )
        return np.zeros(num_requests)


@configuration
class TraceArrivals:
    """The recorded arrival times of a trace; its lengths, if any, are not used.

    Parameters
    ----------
    path : str or Path
        A file with a column of times, see :func:`vidur_simpy.workload.read_trace`.
    time_scale : float
        Factor on the recorded times; 0.5 doubles the load.
    format : {"auto", "vidur", "azure", "mooncake"}
        How the file is read; "auto" tells it from the columns.

    Raises
    ------
    TraceError
        When read: an unusable file, or fewer rows than `num_requests`.
    """

    path: str | Path
    time_scale: float = Field(default=1.0, gt=0)
    format: TraceFormat = "auto"

    def arrival_times(
        self,
        rng: np.random.Generator,
        num_requests: int | None = None,
        duration: float | None = None,
    ) -> NDArray[np.float64]:
        """Return the times, see :class:`vidur_simpy.workload.Arrivals`; `rng` is not used.

        A trace that ends before `duration` gives all its rows.
        """
        num_requests, duration = _one_limit(num_requests, duration)
        times = read_arrivals(self.path, self.format) * self.time_scale
        if duration is not None:
            return times[: np.searchsorted(times, duration)]
        if num_requests > len(times):
            raise TraceError(
                f"{self.path} has {len(times)} requests, num_requests = {num_requests} asks for "
                "more."
            )
        return times[:num_requests]


def _renewals(
    draw: Callable[[int], NDArray[np.float64]],
    rate: float,
    num_requests: int | None,
    duration: float | None,
) -> NDArray[np.float64]:
    """Add up gaps until the limit, the same way however they are cut into chunks."""
    num_requests, duration = _one_limit(num_requests, duration)
    if duration is None:
        return np.cumsum(draw(num_requests))
    chunk = int(rate * duration) + 16
    chunks = [np.cumsum(draw(chunk))]
    while chunks[-1][-1] < duration:
        gaps = draw(chunk)
        gaps[0] += chunks[-1][-1]
        chunks.append(np.cumsum(gaps))
    times = np.concatenate(chunks)
    return times[: np.searchsorted(times, duration)]


def _one_limit(num_requests: int | None, duration: float | None) -> tuple[int, float | None]:
    """Check that one limit is given; the number is 0 where the duration decides."""
    if (num_requests is None) == (duration is None):
        raise ConfigError(
            f"num_requests = {num_requests} and duration = {duration}: expected exactly one."
        )
    return (0, duration) if num_requests is None else (num_requests, None)
