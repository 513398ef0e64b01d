"""Orca: iteration-level scheduling with memory for the longest request set aside for each."""

from __future__ import annotations

from pydantic import Field

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import CapacityError
from vidur_simpy.replica_scheduler.batching import ContinuousBatching
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Key, Ordering
from vidur_simpy.sums import Numbers, repeated
from vidur_simpy.validation import configuration

__all__ = ["Orca", "OrcaScheduler", "ReservingBatching"]


class ReservingBatching(ContinuousBatching):
    """Continuous batching that sets `max_model_len` tokens of memory aside for each request.

    Nobody is ever preempted, and every batch may hold `max_num_seqs` requests, whatever the
    number of pipeline stages.

    Attributes
    ----------
    num_blocks_each : int
        Blocks that each request holds for life.

    Raises
    ------
    CapacityError
        If the replica cannot hold even one such request.
    """

    def __init__(
        self, resources: ReplicaResources, max_num_seqs: int, ordering: str | Key = "fcfs"
    ) -> None:
        super().__init__(resources, max_num_seqs, ordering)
        self.max_batch_size = max_num_seqs
        pool = resources.pool
        self.num_blocks_each = max(1, resources.max_model_len // pool.block_size)
        if self.num_blocks_each > pool.num_blocks:
            raise CapacityError(
                f"one request of max_model_len = {resources.max_model_len} tokens needs "
                f"{self.num_blocks_each} KV-cache blocks of {pool.block_size} tokens, the replica "
                f"has {pool.num_blocks}; use max_model_len <= {pool.num_blocks * pool.block_size}."
            )

    def refusal(self, request: Request) -> str:
        """Return an empty string: whatever `max_model_len` allows fits what is set aside."""
        return ""

    def admit_prompts(self, num_decodes: int, now: float) -> list[PrefillChunk]:
        """Admit whole prompts while there is memory and room beside `num_decodes` decodes."""
        self.waiting.order(now)
        chunks: list[PrefillChunk] = []
        while (
            self.waiting
            and num_decodes + len(chunks) < self.max_batch_size
            and self.pool.num_free >= self.num_blocks_each
        ):
            request = self.waiting.popleft()
            self.pool.reserve(self.num_blocks_each)
            self.num_running += 1
            chunks.append(request.schedule_chunk(request.prefill_target))
        return chunks

    def steady_steps(self, batch: Batch) -> int:
        """Return how many batches after this one will be its decodes: no step takes a block."""
        if batch.decodes is None or self.running or not self.waiting.is_steady:
            return 0
        return batch.decodes.num_steps_to_finish - 1

    def skip_steps(self, batch: Batch, execution_times: Numbers, now: float) -> Numbers:
        """Take steady steps, the last of which ends at `now`; they take no blocks."""
        super().skip_steps(batch, execution_times, now)
        return repeated([0], 0, len(execution_times))

    def _num_blocks_held(self, request: Request) -> int:
        return self.num_blocks_each


@configuration
class Orca:
    """All running requests decode; new prompts join whole while slots and memory last.

    Attributes
    ----------
    max_num_seqs : int
        Most requests in one batch.
    ordering : str or callable
        Who goes first of those that wait: ``fcfs``, ``edf``, ``lrs``, ``sjf``, ``spt``,
        ``priority``, or a function of ``(request)`` or ``(request, now)``.

    Notes
    -----
    Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models",
    OSDI 2022. Unlike in Vidur, the context of a newly admitted prompt counts.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    ordering: Ordering = "fcfs"

    def for_replica(self, resources: ReplicaResources) -> OrcaScheduler:
        """Make the scheduler of one replica."""
        return OrcaScheduler(resources, self.max_num_seqs, self.ordering)


class OrcaScheduler(ReservingBatching):
    """The Orca scheduler of one replica."""

    # While nobody comes or goes its decodes go on alone.
    steady_steps = ReservingBatching.steady_steps

    def schedule(self, now: float) -> Batch | None:
        """Decode all that fits into a batch, then admit prompts into what is left of it."""
        decodes = self._take_decodes()
        chunks = self.admit_prompts(0 if decodes is None else len(decodes.members), now)
        if decodes is None and not chunks:
            return None
        return Batch(decodes, chunks)

    def _take_decodes(self) -> DecodeSet | None:
        decodes, _, _ = self._gather()
        if decodes is not None and len(decodes.members) > self.max_batch_size:
            later = list(decodes.members)[self.max_batch_size :]
            for request in later:
                decodes.leave(request)
            self.running = list(later)
        return decodes
