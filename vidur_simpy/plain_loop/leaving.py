"""How the plain loop leaves a replica to its processes, in the middle of whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, Request
from vidur_simpy.plain_loop.completions import Member, Row

if TYPE_CHECKING:
    from vidur_simpy.processes import Replica

__all__ = ["Decodes", "Prefill", "leave"]


@dataclass(frozen=True, slots=True)
class Prefill:
    """A request whose prompt is not complete.

    Attributes
    ----------
    row : Row
    scheduled_at, execution_time, preempted_time : float
        So far, in seconds.
    last_stage_end : float or None
        In seconds.
    num_tokens : int
        Prompt tokens computed, before the batch under way.
    """

    row: Row
    scheduled_at: float
    execution_time: float
    preempted_time: float
    last_stage_end: float | None
    num_tokens: int

    def request(self, make: Callable[[int], Request]) -> Request:
        """Make it as the processes know it."""
        request = make(self.row[0])
        request.scheduled_at = self.scheduled_at
        request.execution_time, request.preempted_time = self.execution_time, self.preempted_time
        request.last_stage_end = self.last_stage_end
        request._processed = request.num_scheduled_tokens = self.num_tokens
        return request


@dataclass(frozen=True, slots=True)
class Decodes:
    """A decode set in numbers.

    Attributes
    ----------
    members : dict of int to list of Member
        By the iteration of their last token.
    iteration : int
    execution_time, last_end : float
        As in :class:`SharedSteps`.
    """

    members: dict[int, list[Member]]
    iteration: int
    execution_time: float
    last_end: float

    def decode_set(self, block_size: int, make: Callable[[int], Request]) -> DecodeSet:
        """Make it as the processes know it: first come, first served, in order of arrival."""
        decodes = DecodeSet(block_size)
        found = [(each, last) for last, bucket in self.members.items() for each in bucket]
        for member, last in sorted(found):
            row, prompt, output, scheduled_at, first_token_at, spent, gap, joined = member
            request = make(row)
            request.scheduled_at, request.first_token_at = scheduled_at, first_token_at
            request.execution_time, request.preempted_time = spent, gap
            request.last_stage_end = first_token_at
            request._processed = request.num_scheduled_tokens = prompt
            request.end_chunk(0)
            decodes.iteration, decodes.execution_time = last - output + 1, joined
            decodes.join(request)
            decodes.num_processed_tokens += self.iteration - decodes.iteration
        decodes.iteration, decodes.execution_time = self.iteration, self.execution_time
        decodes.last_end = self.last_end
        return decodes


@dataclass(frozen=True, slots=True)
class BatchUnderWay:
    """A batch on the stage.

    Attributes
    ----------
    has_decodes : bool
        Whether the decode set takes part.
    chunks : sequence of (Prefill, int)
        Prompts with the tokens of each that it computes.
    started_at, duration : float
        In seconds; NaN if the duration is none, which the stage has to be told.
    """

    has_decodes: bool
    chunks: Sequence[tuple[Prefill, int]]
    started_at: float
    duration: float

    def resume(
        self, replica: Replica, decodes: DecodeSet | None, make: Callable[[int], Request]
    ) -> None:
        """Let the stage go on with it."""
        chunks = []
        for prefill, num_tokens in self.chunks:
            chunks.append(prefill.request(make).schedule_chunk(num_tokens))
        batch = Batch(decodes if self.has_decodes else None, chunks)
        batch.scheduled_at = batch.stage_started_at = self.started_at
        replica.resume(batch, self.duration)


def leave(
    replica: Replica,
    *,
    waiting: Iterable[Row],
    decodes: Decodes,
    partial: Prefill | None,
    is_partial_first: bool,
    batch: BatchUnderWay | None,
    make: Callable[[int], Request],
) -> None:
    """Hand the requests of a replica over to its scheduler, and its batch to its stage.

    Parameters
    ----------
    waiting : iterable of Row
    decodes : Decodes
    partial : Prefill or None
        A prompt that goes on and is not in the batch under way.
    is_partial_first : bool
        Whether it stands ahead of the decodes.
    batch : BatchUnderWay or None
    make : callable
        Makes the request of a row.
    """
    scheduler: Any = replica.scheduler
    for row in waiting:
        request = make(row[0])
        request.replica_id = replica.replica_id
        scheduler.waiting.append(request)

    def made(row: int) -> Request:
        request = make(row)
        request.replica_id = replica.replica_id
        scheduler.num_running += 1
        return request

    decode_set = None
    if decodes.members:
        decode_set = decodes.decode_set(replica.pool.block_size, made)
        if batch is None or not batch.has_decodes:
            scheduler.running.append(decode_set)
    if partial is not None:
        scheduler.running.insert(0 if is_partial_first else 1, partial.request(made))
    if batch is not None:
        batch.resume(replica, decode_set, made)
    elif scheduler.waiting or scheduler.running:
        # As the end of the stage and that of the batch have it.
        replica.schedule.raise_now()
        replica.schedule.raise_now()
