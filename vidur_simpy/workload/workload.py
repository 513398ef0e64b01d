"""What the simulator is given: synthetic workloads and replayed traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SkipValidation

from vidur_simpy.errors import ConfigError, TraceError
from vidur_simpy.validation import configuration
from vidur_simpy.workload.arrivals import AllAtOnce, Arrivals
from vidur_simpy.workload.lengths import Clip, Lengths, LengthsPair, clip_lengths, scale_lengths
from vidur_simpy.workload.requests import RequestArrays
from vidur_simpy.workload.traces import TraceFormat, read_trace

__all__ = ["RequestSource", "Trace", "Workload", "requests_of"]


class RequestSource(Protocol):
    """What a simulation takes its requests from: a workload, a trace, or what a user writes."""

    def requests(
        self,
        rng_arrivals: np.random.Generator,
        rng_lengths: np.random.Generator,
        max_model_len: int | None = None,
    ) -> RequestArrays:
        """Return the requests, as `Workload.requests` draws them."""


def requests_of(
    source: RequestSource, streams: Mapping[str, np.random.Generator], max_model_len: int
) -> RequestArrays:
    """Return the requests of a run with these streams of random numbers.

    Raises
    ------
    ConfigError
        If the source gives something else.
    """
    table = source.requests(streams["arrivals"], streams["lengths"], max_model_len)
    if not isinstance(table, RequestArrays):
        raise ConfigError(
            f"{type(source).__name__}.requests() gave a {type(table).__name__}: expected "
            "RequestArrays."
        )
    return table


@configuration
class Workload:
    """A synthetic workload: arrivals of one kind, lengths of another.

    Parameters
    ----------
    arrivals : Arrivals
        When requests arrive.
    lengths : Lengths or callable
        How long they are; a callable is ``(rng, num_requests) -> (prompt, output)``.
    num_requests : int, optional
        How many requests there are.
    duration : float, optional
        Instead of `num_requests`: all that arrive before this many seconds.
    clip : {"refuse", "prompt", "proportional"}
        What happens to requests longer than the model takes, see
        :func:`vidur_simpy.workload.clip_lengths`.

    Raises
    ------
    ConfigError
        Unless exactly one of `num_requests` and `duration` is given.

    Examples
    --------
    >>> from vidur_simpy.workload import FixedLengths, Poisson
    >>> workload = Workload(Poisson(rate=2.0), FixedLengths(512, 128), num_requests=3)
    >>> requests = workload.requests(np.random.default_rng(0), np.random.default_rng(1))
    >>> requests.arrived_at.round(2)
    array([0.34, 0.85, 0.86])
    """

    arrivals: Annotated[Arrivals, SkipValidation]
    lengths: Annotated[Lengths | Callable[[np.random.Generator, int], LengthsPair], SkipValidation]
    num_requests: int | None = Field(default=None, ge=1)
    duration: float | None = Field(default=None, gt=0)
    clip: Clip = "refuse"

    def __post_init__(self) -> None:
        if not isinstance(self.arrivals, Arrivals):
            raise _wrong_part("arrivals", self.arrivals, "arrivals such as Poisson(rate=1.0)")
        if not isinstance(self.lengths, Lengths) and not callable(self.lengths):
            raise _wrong_part("lengths", self.lengths, "lengths such as FixedLengths(512, 128)")
        for name, part in (("arrivals", self.arrivals), ("lengths", self.lengths)):
            if isinstance(part, type):
                raise _wrong_part(name, part, f"an object: {part.__name__}(...)")
        if (self.num_requests is None) == (self.duration is None):
            raise ConfigError(
                f"Workload.num_requests = {self.num_requests} and Workload.duration = "
                f"{self.duration}: expected exactly one of them."
            )
        if isinstance(self.arrivals, AllAtOnce) and self.num_requests is None:
            raise ConfigError("Workload with arrivals all_at_once needs num_requests.")

    def requests(
        self,
        rng_arrivals: np.random.Generator,
        rng_lengths: np.random.Generator,
        max_model_len: int | None = None,
    ) -> RequestArrays:
        """Draw the requests; equal generators give equal requests, bit for bit.

        Parameters
        ----------
        rng_arrivals, rng_lengths : numpy.random.Generator
            Randomness of the arrivals and of the lengths, apart, so that one can change alone.
        max_model_len : int, optional
            Longest prompt and output together, in tokens, for `clip`.

        Raises
        ------
        ConfigError
            If arrivals or lengths written by the user give unusable columns.
        TraceError
            If a trace among them cannot be used.
        """
        arrived_at = self.arrivals.arrival_times(
            rng_arrivals, num_requests=self.num_requests, duration=self.duration
        )
        # The constructor checks what a user's arrivals and lengths returned.
        drawn = RequestArrays(arrived_at, *self._draw_lengths(rng_lengths, len(arrived_at)))
        if self.num_requests not in (None, len(drawn)):
            raise ConfigError(
                f"{self.arrivals!r} gave {len(drawn)} arrivals, expected {self.num_requests}."
            )
        return _clipped(drawn, max_model_len, self.clip)

    def _draw_lengths(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        draw = self.lengths.sample if isinstance(self.lengths, Lengths) else self.lengths
        drawn = draw(rng, num_requests)
        try:
            prompt, output = drawn
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.lengths!r} returned {type(drawn).__name__}, expected (prompt, output)."
            ) from None
        return prompt, output


@configuration
class Trace:
    """A recorded workload, replayed.

    Parameters
    ----------
    path : str or Path
        The file, see :func:`vidur_simpy.workload.read_trace`.
    format : {"auto", "vidur", "azure", "mooncake"}
        How the file is read; "auto" tells it from the columns.
    time_scale : float
        Factor on the recorded times; 0.5 doubles the load. A deadline keeps its distance from
        the arrival.
    prefill_scale, decode_scale : float
        Factors on the lengths; the product is truncated, and at least 1. Prompts with
        ``hash_ids`` can only shrink: blocks added would have no ids.
    num_requests : int, optional
        Only the first so many requests.
    duration : float, optional
        Only the requests that arrive before this many seconds, after scaling.
    hash_block_size : int
        Prompt tokens behind one hash id.
    clip : {"refuse", "prompt", "proportional"}
        What happens to requests longer than the model takes, see
        :func:`vidur_simpy.workload.clip_lengths`.
    slo_by_priority : dict of int to float, optional
        Seconds from arrival to deadline for each class of requests, told by their `priority` (0
        where the trace has none). A deadline that is in the trace stays.

    Raises
    ------
    ConfigError
        If both `num_requests` and `duration` are given, or an SLO is not positive.
    """

    path: str | Path
    format: TraceFormat = "auto"
    time_scale: float = Field(default=1.0, gt=0)
    prefill_scale: float = Field(default=1.0, gt=0)
    decode_scale: float = Field(default=1.0, gt=0)
    num_requests: int | None = Field(default=None, ge=1)
    duration: float | None = Field(default=None, gt=0)
    hash_block_size: int = Field(default=512, ge=1)
    clip: Clip = "refuse"
    slo_by_priority: dict[int, float] | None = None

    def __post_init__(self) -> None:
        for priority, slo in (self.slo_by_priority or {}).items():
            if not slo > 0:
                raise ConfigError(
                    f"Trace.slo_by_priority[{priority}] = {slo}: expected a positive number of s."
                )
        if self.num_requests is not None and self.duration is not None:
            raise ConfigError(
                f"Trace.num_requests = {self.num_requests} and Trace.duration = "
                f"{self.duration}: expected at most one of them."
            )

    def requests(
        self,
        rng_arrivals: np.random.Generator | None = None,
        rng_lengths: np.random.Generator | None = None,
        max_model_len: int | None = None,
    ) -> RequestArrays:
        """Read the requests.

        Parameters
        ----------
        rng_arrivals, rng_lengths : numpy.random.Generator, optional
            Not used.
        max_model_len : int, optional
            Longest prompt and output together, in tokens, for `clip`.

        Raises
        ------
        ConfigError
            If a factor makes a request too long, or is more than 1 on prompts with hash ids.
        TraceError
            An unusable file, fewer requests in it than are asked for, or a request of a priority
            without an SLO.
        """
        recorded = read_trace(self.path, self.format, hash_block_size=self.hash_block_size)
        requests = self._with_deadlines(self._head(self._rescheduled(recorded)))
        if requests.hash_ids is not None and self.prefill_scale > 1:
            raise ConfigError(
                f"Trace.prefill_scale = {self.prefill_scale}: expected at most 1, because "
                f"{self.path} has hash_ids and blocks added to a prompt would have none."
            )
        prompt = scale_lengths(requests.num_prefill_tokens, self.prefill_scale, "prefill_scale")
        output = scale_lengths(requests.num_decode_tokens, self.decode_scale, "decode_scale")
        return _clipped(_with_lengths(requests, prompt, output), max_model_len, self.clip)

    def _rescheduled(self, recorded: RequestArrays) -> RequestArrays:
        if self.time_scale == 1:
            return recorded  # deadline - arrival + arrival would not be the deadline to the bit
        arrived_at = recorded.arrived_at * self.time_scale
        deadline = recorded.deadline
        if deadline is not None:
            deadline = arrived_at + (deadline - recorded.arrived_at)
        return dataclasses.replace(recorded, arrived_at=arrived_at, deadline=deadline)

    def _with_deadlines(self, requests: RequestArrays) -> RequestArrays:
        slos = self.slo_by_priority
        if slos is None:
            return requests
        count = len(requests)
        priority = np.zeros(count, np.int64) if requests.priority is None else requests.priority
        unknown = sorted(set(priority.tolist()) - slos.keys())
        if unknown:
            raise TraceError(
                f"{self.path} has requests of priority {unknown[0]}, slo_by_priority has "
                f"{', '.join(map(str, sorted(slos)))}: expected an SLO for every priority."
            )
        deadline = requests.arrived_at + np.array([slos[each] for each in priority.tolist()])
        if requests.deadline is not None:
            deadline = np.where(np.isnan(requests.deadline), deadline, requests.deadline)
        return dataclasses.replace(requests, deadline=deadline)

    def _head(self, requests: RequestArrays) -> RequestArrays:
        count = len(requests)
        if self.num_requests is not None:
            count = self.num_requests
        if self.duration is not None:
            count = int(np.searchsorted(requests.arrived_at, self.duration))
        if count > len(requests):
            raise TraceError(
                f"{self.path} has {len(requests)} requests, num_requests = {count} asks for more."
            )
        if count == 0:
            raise TraceError(
                f"{self.path} has no request before duration = {self.duration}; the first "
                f"arrives at {requests.arrived_at[0]}."
            )
        return requests.take(slice(count))


def _clipped(requests: RequestArrays, max_model_len: int | None, clip: Clip) -> RequestArrays:
    if clip == "refuse" or max_model_len is None:
        return requests
    prompt, output = clip_lengths(
        requests.num_prefill_tokens, requests.num_decode_tokens, max_model_len, clip
    )
    return _with_lengths(requests, prompt, output)


def _with_lengths(
    requests: RequestArrays, prompt: NDArray[np.int64], output: NDArray[np.int64]
) -> RequestArrays:
    """Replace the lengths; a shorter prompt drops its last hash ids."""
    hash_ids = requests.hash_ids
    if hash_ids is not None:
        needed = -(-prompt // requests.hash_block_size)
        hash_ids = [ids[:count] for ids, count in zip(hash_ids, needed, strict=True)]
    return dataclasses.replace(
        requests, num_prefill_tokens=prompt, num_decode_tokens=output, hash_ids=hash_ids
    )


def _wrong_part(name: str, given: Any, expected: str) -> ConfigError:
    return ConfigError(f"Workload.{name} = {given!r}: expected {expected}.")
