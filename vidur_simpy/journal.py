"""The order of events across shards that were run apart: what would have come first in one run.

An event's place among simultaneous ones is its serial number, which it got when the event that
raised it was handled. So a shard notes for each event how many numbers had been given when it was
done, and the numbers of a single run are given again afterwards, event by event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.kernel import FIRST_ARRIVAL_ID, Environment, EventType, TypedEvent

__all__ = ["Journal", "merged_order", "run_and_note"]


@dataclass
class Journal:
    """What a shard notes while it runs.

    Attributes
    ----------
    arrivals : list of int
        For each request of the shard, in order of arrival, its place among all requests.
    events : list of (float, int, int, int or None)
        Of each event handled: its instant, priority, serial number and type.
    given : list of int
        How many serial numbers had been given before the first event, and after each.
    rows : dict of str to list of int
        For each row of each table recorded, the number of the event that wrote it.
    """

    arrivals: list[int]
    events: list[tuple[float, int, int, int | None]] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)


def run_and_note(
    env: Environment, logs: Mapping[str, Any], journal: Journal, until: float | None
) -> None:
    """Handle all events before `until` (seconds), noting each."""
    journal.rows.update((name, []) for name in logs)
    journal.given.append(env.next_id)
    end = inf if until is None else until
    while (entry := env.next_entry) and entry[0] < end:
        time, priority, number, event = entry
        env.step()
        event_type = int(event.event_type) if isinstance(event, TypedEvent) else None
        for name, log in logs.items():
            rows = journal.rows[name]
            rows.extend([len(journal.events)] * (len(log) - len(rows)))
        journal.events.append((time, int(priority), number, event_type))
        journal.given.append(env.next_id)


def merged_order(journals: Sequence[Journal]) -> dict[str, NDArray[np.intp]]:
    """Return for each recorded table the order of its rows in a single run.

    The rows are those of the first shard, then those of the second, and so on.
    """
    ranks = _ranks(journals)
    return {
        name: np.argsort(
            np.concatenate(
                [rank[journal.rows[name]] for rank, journal in zip(ranks, journals, strict=True)]
            ),
            kind="stable",
        )
        for name in (journals[0].rows if journals else ())
    }


class _Shard:
    """A journal that is read from its first event to its last, with the numbers of a single run."""

    def __init__(self, index: int, journal: Journal) -> None:
        self.index = index
        self.journal = journal
        self.position = 0
        self.rank = np.zeros(len(journal.events), np.int64)
        # Events that were there before the first one was handled come in the order of shards.
        self.numbers = [-1] * journal.given[-1]
        self.num_arrivals = 0
        self.routing_at: dict[float, int] = {}
        for event, (time, _, _, event_type) in enumerate(journal.events):
            if event_type == EventType.GLOBAL_SCHEDULE:
                self.routing_at.setdefault(time, event)

    def key(self) -> tuple[float, int, int, int]:
        """Return what orders its next event among those of other shards."""
        time, priority, number, event_type = self.journal.events[self.position]
        if event_type == EventType.REQUEST_ARRIVAL:
            # Arrivals are numbered before all others.
            number = self.journal.arrivals[self.num_arrivals] + FIRST_ARRIVAL_ID
        else:
            number = self.numbers[number]
        return time, priority, number, self.index

    def number_raised_by(self, event: int, first: int) -> int:
        """Give numbers to what an event raised, from `first` on; return the next one."""
        start, end = self.journal.given[event : event + 2]
        self.numbers[start:end] = range(first, first + end - start)
        return first + end - start


def _ranks(journals: Sequence[Journal]) -> list[NDArray[np.int64]]:
    """Return the place of each event of each shard among all events of a single run."""
    shards = [_Shard(index, journal) for index, journal in enumerate(journals)]
    heads = [shard.key() for shard in shards if shard.journal.events]
    heapify(heads)
    next_number, num_handled, routed_at = 0, 0, -inf
    while heads:
        time, _, _, index = heappop(heads)
        shard = shards[index]
        event = shard.position
        event_type = shard.journal.events[event][3]
        if event_type != EventType.GLOBAL_SCHEDULE:
            next_number = shard.number_raised_by(event, next_number)
        elif time != routed_at:
            # The first one of an instant maps all requests, and tells replicas in their order.
            routed_at = time
            for each in shards:
                if time in each.routing_at:
                    next_number = each.number_raised_by(each.routing_at[time], next_number)
        shard.num_arrivals += event_type == EventType.REQUEST_ARRIVAL
        shard.rank[event] = num_handled
        num_handled += 1
        shard.position += 1
        if shard.position < len(shard.journal.events):
            heappush(heads, shard.key())
    return [shard.rank for shard in shards]
