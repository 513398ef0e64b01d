"""How the plain loop leaves a replica to its processes, in the middle of whatever it does."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, Request
from vidur_simpy.plain_loop.cohorts import Cohort, Entry, Prompt
from vidur_simpy.plain_loop.completions import Member, Restart, Row

if TYPE_CHECKING:
    from vidur_simpy.processes import Replica

__all__ = ["BatchUnderWay", "leave"]

Make: TypeAlias = "Callable[[Row | Member], Request]"


@dataclass(frozen=True, slots=True)
class BatchUnderWay:
    """A batch in the pipeline; times in seconds.

    Attributes
    ----------
    cohort : Cohort or None
        What decodes.
    taken : sequence of Prompt
        Those of which a piece is computed.
    formed_at : float
    ends, ends_before : sequence of float
        When each stage is done with it, and with the batch before.
    durations : sequence of float
        Of its stages; what is no duration the stage has to be told.
    """

    cohort: Cohort | None
    taken: Sequence[Prompt]
    formed_at: float
    ends: Sequence[float]
    ends_before: Sequence[float]
    durations: Sequence[float]


def leave(
    replica: Replica,
    waiting: Iterable[Row],
    running: Sequence[Entry],
    batches: Sequence[BatchUnderWay],
    request_of: Callable[[int], Request],
    num_schedules: int,
    *,
    restarts: Mapping[int, Restart],
    is_over: bool = False,
) -> None:
    """Hand the requests of a replica over to its scheduler, and its batches to its stages.

    Parameters
    ----------
    running : sequence of Cohort, Member and Prompt
        What is between two batches, in order.
    batches : sequence of BatchUnderWay
        The oldest first.
    request_of : callable
        Makes the request of a row of the workload, given by its number.
    num_schedules : int
        REPLICA_SCHEDULE events that are due now.
    restarts : mapping of int to Restart
        By row, of requests that were restarted.
    is_over : bool
        Whether the ends of stages right now have happened; else they are still to come.
    """
    scheduler: Any = replica.scheduler

    def made(row: Row | Member) -> Request:
        request = request_of(row[0])
        request.replica_id = replica.replica_id
        if row[0] in restarts:
            restart = restarts[row[0]]
            request.prefill_target = row[1]
            request.scheduled_at = restart.scheduled_at
            request.first_token_at = restart.first_token_at
            request.execution_time = restart.execution_time
            request.preempted_time = restart.preempted_time
            request.last_stage_end = restart.last_stage_end
            request.num_restarts = restart.num_restarts
        return request

    def running_one(row: Row | Member) -> Request:
        scheduler.num_running += 1
        return made(row)

    for row in waiting:
        scheduler.waiting.append(made(row))
    for entry in running:
        if isinstance(entry, Cohort):
            scheduler.running.append(_decode_set(entry, running_one))
        elif isinstance(entry, Prompt):
            scheduler.running.append(_prefilling(entry, entry.context, running_one))
        else:
            scheduler.running.append(_decoding(entry, entry[-1], running_one))
    for batch in batches:
        _resume(replica, batch, running_one, is_over=is_over)
    for _ in range(num_schedules):
        replica.schedule.raise_now()


def _prefilling(prompt: Prompt, num_tokens: int, make: Make) -> Request:
    """Make a request of whose prompt so many tokens are computed."""
    request = make(prompt.row)
    request.scheduled_at = prompt.scheduled_at
    request.execution_time, request.preempted_time = prompt.execution_time, prompt.preempted_time
    request.last_stage_end = prompt.last_stage_end if num_tokens else None
    request._processed = request.num_scheduled_tokens = num_tokens
    return request


def _decoding(member: Member, num_left: int, make: Make) -> Request:
    """Make a request with so many tokens to come."""
    request = make(member)
    request.scheduled_at, request.first_token_at = member[4:6]
    request.execution_time, request.preempted_time, request.last_stage_end = member[6:9]
    request.num_scheduled_tokens = request.prefill_target
    request.is_prefill_complete = True
    request._processed = request.num_tokens - num_left
    return request


def _decode_set(cohort: Cohort, make: Make) -> DecodeSet:
    decodes = DecodeSet(len(cohort.phases))
    for member in cohort.members.values():
        joined, last = member[-2:]
        # How many steps it has taken is not known, but whether it has: the times say so (of steps
        # that took no time there is nothing to add).
        num_steps = int(cohort.execution_time != joined)
        decodes.iteration, decodes.execution_time = cohort.iteration - num_steps, joined
        decodes.join(_decoding(member, last - decodes.iteration, make))
        decodes.num_processed_tokens += num_steps
    decodes.iteration, decodes.execution_time = cohort.iteration, cohort.execution_time
    decodes.last_end = cohort.last_end
    return decodes


def _resume(replica: Replica, batch: BatchUnderWay, make: Make, *, is_over: bool) -> None:
    """Put a batch on the stage where it is, or ahead of it."""
    now = replica.env.now
    is_known = all(map(isfinite, batch.durations))
    find = bisect_right if is_over else bisect_left
    # Where stages take no time the batch may have passed them all at the instant it was formed.
    stage_id = find(batch.ends, now) if is_known and batch.formed_at < now else 0
    chunks = []
    for prompt in batch.taken:
        request = _prefilling(prompt, prompt.context - prompt.num_tokens, make)
        request.preempted_time += batch.formed_at - prompt.last_stage_end
        request.last_stage_end = None
        chunks.append(request.schedule_chunk(prompt.num_tokens))
    decodes = None if batch.cohort is None else _decode_set(batch.cohort, make)
    resumed = Batch(decodes, chunks)
    resumed.scheduled_at = started_at = batch.formed_at
    for number in range(stage_id):
        stage, duration, end = replica.stages[number], batch.durations[number], batch.ends[number]
        stage.note_end(resumed, duration, end)
        if number + 1 < stage_id or not replica.stages[stage_id].is_busy:
            started_at = max(end, batch.ends_before[number + 1])
            for chunk in chunks:
                chunk.request.preempted_time += started_at - end
    resumed.stage_started_at = started_at
    replica.resume(resumed, stage_id, batch.durations[stage_id])
