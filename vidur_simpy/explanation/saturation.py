"""Whether the queue of a run grows without bound."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["Saturation", "saturation_of"]

NUM_SPANS = 20
# Student's t for 19 degrees of freedom, one-sided, 1 %.
CRITICAL = 2.539
LEAST_REQUESTS = 100
LEAST_BACKLOG = 10
# Arrivals must last so many times as long as a request is served, or they are a burst.
LEAST_TURNOVERS = 5.0
# A queue that got this share of its length in the first half only has stopped to grow.
LEAST_LATE_SHARE = 0.1


@dataclass(frozen=True, repr=False)
class Saturation:
    """Whether requests arrive faster than they are served; `Result.saturation` makes it.

    Attributes
    ----------
    is_saturated : bool
    text : str
        One sentence.
    arrival_rate : float
        Requests that arrived per second, refused ones left out, between first and last arrival.
    service_rate : float
        How many of them left the queue per second.
    num_waiting : int
        Requests in the queue at the last arrival.
    score : float
        Mean growth of the queue in a twentieth of the run, in standard errors; NaN if the run is
        too short to tell. It is saturated above 2.54.
    """

    is_saturated: bool
    text: str
    arrival_rate: float = math.nan
    service_rate: float = math.nan
    num_waiting: int = 0
    score: float = math.nan

    def __repr__(self) -> str:
        return f"<Saturation: {self.text}>"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"


def saturation_of(result: Result) -> Saturation:
    """Judge a run, as `Result.saturation` describes it."""
    requests = result.requests
    requests = requests[requests["refusal"] == ""]
    arrived_at = np.sort(requests["arrived_at"].to_numpy(np.float64))
    too_short = _why_too_short(requests, arrived_at)
    if too_short:
        return Saturation(False, f"Too short to tell whether the queue grows: {too_short}.")
    first, last = arrived_at[0], arrived_at[-1]
    left_at = np.sort(_left_queue_at(requests))  # NaN, still waiting, comes last
    instants = np.linspace(first, last, NUM_SPANS + 1)
    num_arrived = np.searchsorted(arrived_at, instants, side="right")
    num_left = np.searchsorted(left_at, instants, side="right")
    backlog = num_arrived - num_left
    score = _score(np.diff(backlog))
    num_waiting, halfway = int(backlog[-1]), int(backlog[NUM_SPANS // 2])
    is_saturated = (
        score > CRITICAL
        and num_waiting >= LEAST_BACKLOG
        and num_waiting - halfway >= LEAST_LATE_SHARE * num_waiting
    )
    rates = num_arrived[-1] / (last - first), num_left[-1] / (last - first)
    text = _text(is_saturated, rates, num_waiting)
    return Saturation(is_saturated, text, *rates, num_waiting=num_waiting, score=score)


def _why_too_short(requests: pd.DataFrame, arrived_at: NDArray[np.float64]) -> str:
    if len(arrived_at) < LEAST_REQUESTS:
        return f"{len(arrived_at)} of the {LEAST_REQUESTS} requests that it takes arrived"
    duration = float(arrived_at[-1] - arrived_at[0])
    served = (requests["completed_at"] - _left_queue_at(requests)).median()
    if math.isnan(served):
        return "no request was completed"
    if duration <= LEAST_TURNOVERS * served:
        return (
            f"requests arrived for {digits(duration)} s, and one takes {digits(served)} s when it "
            "is served: they are a burst"
        )
    return ""


def _left_queue_at(requests: pd.DataFrame) -> pd.Series:
    """Return when each request left the queue; by its first token, where that is all one knows."""
    if requests["scheduled_at"].isna().all():
        return requests["first_token_at"]
    return requests["scheduled_at"]


def _score(growth: NDArray[np.int64]) -> float:
    """Return Student's t of the mean growth."""
    mean, spread = float(growth.mean()), float(growth.std(ddof=1))
    if not spread:
        return math.inf if mean > 0 else 0.0
    return mean / (spread / math.sqrt(len(growth)))


def _text(is_saturated: bool, rates: tuple[float, float], num_waiting: int) -> str:
    arriving, leaving = map(digits, rates)
    if is_saturated:
        return (
            f"The queue grows without bound: {arriving} requests/s arrive, {leaving} are taken "
            f"from the queue, and {num_waiting:,} wait when the last one arrives. Latencies only "
            "tell how long the run is."
        )
    return f"The queue does not grow without bound: {arriving} requests/s arrive and are served."
