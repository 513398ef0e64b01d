"""Observes where the time of each request goes, in phases that add up to its latency."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidur_simpy.columns import COLUMNS
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.kernel import Environment, EventType, TypedEvent
from vidur_simpy.record_columns import record_rows, recorded_columns
from vidur_simpy.replica_scheduler.kv_parallel import GroupedBatch

if TYPE_CHECKING:
    from vidur_simpy.execution_time.interface import StageTime

__all__ = ["PhaseLog"]

PHASES = list(COLUMNS["phases"])[2:]
QUEUE, PREFILL, PREFILL_WAIT, DECODE, DECODE_STALL, DECODE_WAIT, RESTART_WAIT, RECOMPUTATION = (
    range(len(PHASES))
)


class PhaseLog:
    """Observes requests: what each instant between arrival and completion was spent on.

    A step costs O(batch). For each mixed batch the execution-time model is asked once more, what
    the decodes alone would take: one that draws random numbers draws more of them.

    Parameters
    ----------
    env : Environment
    stage_time : callable
        ``stage_time(batch, stage_id)`` in seconds.
    users_of : callable
        ``users_of(replica_id, stage_id)``: what has a stage at the moment, as `Stage.users`.
    directory : Path, optional
        Of records, where rows go once a request and all that arrived before it are complete.
    """

    def __init__(
        self,
        env: Environment,
        stage_time: StageTime,
        users_of: Callable[[int, int], Sequence[Any]],
        directory: Path | None = None,
    ) -> None:
        self._env = env
        self._stage_time = stage_time
        self._users_of = users_of
        self._rows = record_rows("phases", directory)
        # Rows are kept in order of arrival, so one that is complete waits for those before it.
        self._waiting: deque[_Journey] = deque()
        self._journeys: dict[Request, _Journey] = {}
        self._flights: dict[Batch, _Flight] = {}
        # Requests that were in a batch and are in none, by replica: they may be preempted unseen.
        self._idle: defaultdict[int | None, dict[_Journey, None]] = defaultdict(dict)
        env.subscribe(EventType.REQUEST_ARRIVAL, self._arrived)
        env.subscribe(EventType.REPLICA_SCHEDULE, self._scheduled)
        env.subscribe(EventType.BATCH_STAGE_ARRIVAL, self._formed)
        env.subscribe(EventType.REPLICA_STAGE_SCHEDULE, self._started)
        env.subscribe(EventType.BATCH_STAGE_END, self._stage_ended)
        env.subscribe(EventType.BATCH_END, self._ended)

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting)

    def _arrived(self, event: TypedEvent) -> None:
        request = event.value
        if isinstance(request, Request) and not request.refusal:
            journey = self._journeys[request] = _Journey(request)
            self._waiting.append(journey)

    def _scheduled(self, event: TypedEvent) -> None:
        """At REPLICA_SCHEDULE: some of those that are in no batch may have been preempted."""
        idle = self._idle[event.replica_id]
        for journey in [each for each in idle if each.is_restarted]:
            del idle[journey]
            journey.restart(event.env.now)

    def _formed(self, event: TypedEvent) -> None:
        if event.stage_id != 0:
            return
        batch: Batch = event.value
        journeys, now = self._journeys, event.env.now
        decodes = [journeys[request] for request in batch.decoding()]
        chunks = [_Chunk(journeys[chunk.request], chunk, now) for chunk in batch.prefills]
        self._flights[batch] = flight = _Flight(batch, decodes, chunks)
        idle = self._idle[batch.replica_id]
        for journey in flight.journeys:
            idle.pop(journey, None)
            journey.num_batches += 1

    def _started(self, event: TypedEvent) -> None:
        """At REPLICA_STAGE_SCHEDULE: the stage may have taken a batch."""
        assert event.replica_id is not None
        assert event.stage_id is not None
        for user in self._users_of(event.replica_id, event.stage_id):
            flight = self._flights.get(user)
            if flight is not None and not flight.is_executing:
                flight.start(self._time_alone(flight.batch, event.stage_id))

    def _time_alone(self, batch: Batch, stage_id: int) -> float:
        """Return what the decodes of a batch would take without its prefill chunks, in seconds."""
        if batch.num_decodes and batch.prefills:
            return float(self._stage_time(_decodes_alone(batch), stage_id))
        return inf

    def _stage_ended(self, event: TypedEvent) -> None:
        self._flights[event.value].end_stage(event.env.now)

    def _ended(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        now = event.env.now
        flight = self._flights.pop(batch)
        for chunk in flight.chunks:
            chunk.end()
        for request in batch.prefilled():
            if request in self._journeys:
                self._journeys[request].end_prefill()
        idle = self._idle[batch.replica_id]
        for journey in flight.journeys:
            journey.num_batches -= 1
            if journey.is_restarted:
                journey.restart(now)
            if journey.request.completed_at is not None:
                self._journeys.pop(journey.request, None)
            elif not journey.num_batches and journey.wait != RESTART_WAIT:
                idle[journey] = None
        waiting = self._waiting
        while waiting and waiting[0].request.completed_at is not None:
            self._rows.append(waiting.popleft().row)

    def flush(self) -> None:
        """Write the rows of requests that are complete, if rows go to files."""
        self._rows.flush()

    def columns(self) -> Mapping[str, Any]:
        """Return the columns, in order of arrival; open phases end now."""
        now = self._env.now
        open_parts = {
            journey: parts
            for flight in self._flights.values()
            if flight.is_executing
            for journey, parts in flight.parts_until(now)
        }
        rows = []
        for journey in self._waiting:
            parts = journey.parts
            if journey.request.completed_at is None:
                parts = open_parts.get(journey) or journey.parts_until(now)
            rows.append((*journey.row[:2], *parts))
        return recorded_columns("phases", self._rows, rows)


class _Journey:
    """A request on its way, and what its time went into so far.

    Attributes
    ----------
    parts : list of float
        Seconds of each phase up to `mark`, an instant in seconds.
    wait : int
        The phase of its time off the stages, as it is now.
    num_batches, num_stages : int
        Batches that have it, and stages that execute one of them: with sequence-pipeline
        parallelism several chunks of a prompt are under way at a time.
    num_given : int
        Tokens of the present prefill that were given to batches.
    num_lost : float
        Tokens of it that preemptions threw away; infinite if that is all of them.
    share_again : float
        Share of the chunk under way that was computed before.
    """

    __slots__ = (
        "mark",
        "num_batches",
        "num_given",
        "num_lost",
        "num_restarts",
        "num_stages",
        "parts",
        "request",
        "share_again",
        "wait",
    )

    def __init__(self, request: Request) -> None:
        assert request.arrived_at is not None
        self.request = request
        self.mark = request.arrived_at
        self.parts = [0.0] * len(PHASES)
        self.wait = QUEUE
        self.num_batches = self.num_stages = 0
        self.num_given = self.num_restarts = 0
        self.num_lost = 0.0
        self.share_again = 0.0

    @property
    def is_restarted(self) -> bool:
        """Whether it was restarted since it was last looked at."""
        return self.num_restarts != self.request.num_restarts

    @property
    def row(self) -> tuple[Any, ...]:
        """What the table has of it."""
        return (self.request.request_id, self.request.arrived_at, *self.parts)

    def settle(self, now: float) -> None:
        """Count the time up to `now` into the phase that it is in."""
        elapsed = now - self.mark
        self.mark = now
        if self.num_stages:
            again = self.share_again * elapsed
            self.parts[RECOMPUTATION] += again
            self.parts[PREFILL] += elapsed - again
        else:
            self.parts[self.wait] += elapsed

    def parts_until(self, now: float) -> list[float]:
        """Return the parts up to `now`, which is not counted for good."""
        parts, mark = [*self.parts], self.mark
        self.settle(now)
        self.parts, settled = parts, self.parts
        self.mark = mark
        return settled

    def restart(self, now: float) -> None:
        """Note that it was preempted: what it has is to be computed again."""
        if not self.num_stages:
            self.settle(now)
        is_decoding = self.wait == DECODE_WAIT
        self.num_lost = inf if is_decoding else max(self.num_lost, self.num_given)
        if self.wait != QUEUE:
            self.wait = RESTART_WAIT
        self.num_given = 0
        self.num_restarts = self.request.num_restarts

    def start(self, now: float, share_again: float) -> None:
        """Begin a chunk on a stage."""
        self.settle(now)
        if self.wait == QUEUE:
            self.wait = RESTART_WAIT if self.num_restarts else PREFILL_WAIT
        self.num_stages += 1
        self.share_again = share_again

    def end_prefill(self) -> None:
        """Note that its prefill is complete, or would have been, had it not been preempted."""
        if self.request.is_prefill_complete:
            self.wait = DECODE_WAIT
            self.num_lost = 0.0
        else:
            self.num_lost = inf


class _Chunk:
    """A prefill chunk in a batch under way."""

    __slots__ = ("chunk", "end_token", "journey", "share_again")

    def __init__(self, journey: _Journey, chunk: PrefillChunk, now: float) -> None:
        if journey.is_restarted:
            journey.restart(now)
        self.journey = journey
        self.chunk = chunk
        # `chunk.context` counts from what had ended when it was formed; this, from the prompt.
        self.end_token = journey.num_given = chunk.request.num_scheduled_tokens
        first_new = min(journey.num_lost, self.end_token)
        num_again = first_new - (self.end_token - chunk.num_tokens)
        self.share_again = max(0.0, num_again) / chunk.num_tokens

    def end(self) -> None:
        """Note whether its request has again what it had before it was preempted."""
        journey = self.journey
        if (
            journey.wait == RESTART_WAIT
            and self.chunk.is_current
            and self.end_token >= journey.num_lost
        ):
            journey.wait = PREFILL_WAIT


class _Flight:
    """A batch under way."""

    __slots__ = ("batch", "chunks", "decodes", "is_executing", "journeys", "time_alone")

    def __init__(self, batch: Batch, decodes: list[_Journey], chunks: list[_Chunk]) -> None:
        self.batch = batch
        self.decodes = decodes
        self.chunks = chunks
        self.journeys = [*decodes, *(chunk.journey for chunk in chunks)]
        self.is_executing = False
        self.time_alone = inf

    def start(self, time_alone: float) -> None:
        """Begin on a stage, now; `time_alone` is what the decodes would take alone."""
        self.is_executing = True
        self.time_alone = time_alone
        now = self.batch.stage_started_at
        for chunk in self.chunks:
            chunk.journey.start(now, chunk.share_again)

    def end_stage(self, now: float) -> None:
        """End on a stage."""
        self.is_executing = False
        for chunk in self.chunks:
            chunk.journey.settle(now)
            chunk.journey.num_stages -= 1
        for journey in self.decodes:
            self._settle_decode(journey, now)

    def _settle_decode(self, journey: _Journey, now: float) -> None:
        """Count the time of a decode on a stage, and of the wait before it."""
        started_at = self.batch.stage_started_at
        elapsed = now - started_at
        alone = min(max(self.time_alone, 0.0), elapsed)
        parts = journey.parts
        parts[DECODE_WAIT] += started_at - journey.mark
        parts[DECODE] += alone
        parts[DECODE_STALL] += elapsed - alone
        journey.mark = now

    def parts_until(self, now: float) -> list[tuple[_Journey, list[float]]]:
        """Return the parts of the decodes up to `now`, which is not counted for good."""
        found = []
        for journey in self.decodes:
            parts, mark = [*journey.parts], journey.mark
            self._settle_decode(journey, now)
            found.append((journey, journey.parts))
            journey.parts, journey.mark = parts, mark
        return found


def _decodes_alone(batch: Batch) -> Batch:
    """Return a batch of the same decodes without prefill chunks."""
    if isinstance(batch, GroupedBatch):
        parts = [_decodes_alone(part) for part in batch.parts]
        alone: Batch = GroupedBatch(None, (), parts)
    else:
        alone = Batch()
    alone.num_decodes = alone.num_tokens = batch.num_decodes
    alone.decode_context = alone.total_context = batch.decode_context
    alone.num_attention_pairs = batch.decode_context
    alone.replica_id, alone.batch_index = batch.replica_id, batch.batch_index
    alone.scheduled_at = batch.scheduled_at
    return alone
