"""Sarathi-Serve: decodes are never stalled, prompts fill the rest of the chunk."""

from __future__ import annotations

from itertools import islice

from pydantic import Field

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request, by_arrival
from vidur_simpy.replica_scheduler.batching import ContinuousBatching
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Ordering
from vidur_simpy.validation import configuration

__all__ = ["Sarathi", "SarathiScheduler"]


@configuration
class Sarathi:
    """Chunked prefill: all decodes, then pieces of prompts up to `chunk_size` tokens.

    Attributes
    ----------
    max_num_seqs : int
        Most requests that hold KV-cache blocks.
    chunk_size : int
        Tokens of an iteration; decodes count, but are never held back by it.
    ordering : str or callable
        Who goes first of those that wait: ``fcfs``, ``edf``, ``lrs``, ``sjf``, ``spt``,
        ``priority``, or a function of ``(request)`` or ``(request, now)``.

    Notes
    -----
    Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
    OSDI 2024, as re-stated by Vidur. Quirks that decide are kept: partial prefills are not counted
    against the batch limit when they continue, and a decode waits for a free block even when its
    step takes none. Unlike Vidur, a preempted partial prefill keeps its prompt.

    With sequence-pipeline parallelism (Agrawal et al., "Mnemosyne", 2024) the next chunk of a
    prompt enters the first stage while the one before is further down the pipeline.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    chunk_size: int = Field(default=512, ge=1)
    ordering: Ordering = "fcfs"

    def for_replica(self, resources: ReplicaResources) -> SarathiScheduler:
        """Make the scheduler of one replica."""
        return SarathiScheduler(self, resources)


class SarathiScheduler(ContinuousBatching):
    """The Sarathi scheduler of one replica."""

    # While nobody comes or goes its decodes go on alone.
    steady_steps = ContinuousBatching.steady_steps

    def __init__(self, policy: Sarathi, resources: ReplicaResources) -> None:
        super().__init__(resources, policy.max_num_seqs, policy.ordering)
        self.chunk_size = policy.chunk_size

    def schedule(self, now: float) -> Batch | None:
        """Take all decodes, continue partial prefills, admit new prompts."""
        decodes, prefills = self.take_decodes()
        chunks: list[PrefillChunk] = []
        if prefills or self.waiting or self.running:
            num_decodes = 0 if decodes is None else len(decodes.members)
            chunks = self.prompt_chunks(prefills, num_decodes, now)
        return None if decodes is None and not chunks else Batch(decodes, chunks)

    def take_decodes(self) -> tuple[DecodeSet | None, list[Request]]:
        """As :class:`ContinuousBatching`; of several decode sets, what is for later stays one.

        In a pipeline each stage has its own set. Two of them meet at times and are more than a
        batch takes; then only those move that fill up the first.
        """
        running, pool = self.running, self.pool
        if len(running) < 2 or pool.num_free <= self.max_batch_size:
            return super().take_decodes()  # somebody may have to give way
        decodes, prefills, self.running = self._first_decodes(running)
        if decodes is not None:
            pool.reserve(decodes.num_blocks_needed)
        return decodes, prefills

    def _first_decodes(
        self, running: list[DecodeSet | Request]
    ) -> tuple[DecodeSet | None, list[Request], list[DecodeSet | Request]]:
        """Return a batch's decodes, the unfinished prefills met on the way, and the rest."""
        decodes: DecodeSet | None = None
        prefills: list[Request] = []
        rest: list[DecodeSet | Request] = []
        left = self.max_batch_size
        for entry in running:
            if not left:
                rest.append(entry)
            elif isinstance(entry, DecodeSet):
                if decodes is None:
                    decodes = entry
                else:
                    decodes.absorb(list(islice(entry.members, left)))
                    if entry.members:
                        rest.append(entry)
                left = self.max_batch_size - len(decodes.members)
            elif entry.is_prefill_complete:
                if decodes is None:
                    decodes = DecodeSet(self.pool.block_size)
                decodes.join(entry)
                left -= 1
            else:
                prefills.append(entry)
        return decodes, prefills, rest

    def prompt_chunks(
        self, prefills: list[Request], num_decodes: int, now: float
    ) -> list[PrefillChunk]:
        """Continue `prefills` and admit new prompts beside so many decodes."""
        left = self.chunk_size - num_decodes
        chunks: list[PrefillChunk] = []

        skipped: list[Request] = []
        for request in prefills:
            num_tokens = request.prefill_target - request.num_scheduled_tokens
            if num_tokens > left:
                num_tokens = left
            if num_tokens > 0:
                chunks.append(request.schedule_chunk(num_tokens))
                left -= num_tokens
            else:
                skipped.append(request)
        if skipped or self.running:
            self._keep_for_later(skipped)

        waiting = self.waiting
        if waiting and left > 0:
            if not waiting.is_steady:
                waiting.order(now)
            # As in the reference, the batch limit stops admission only when it is met exactly:
            # continued prefills may have passed it already.
            while (
                waiting
                and left > 0
                and self.num_running != self.max_num_seqs
                and num_decodes + len(chunks) != self.max_batch_size
                and self.reserve_prompt(waiting[0])
            ):
                request = waiting.popleft()
                num_tokens = min(request.prefill_target, left)
                chunks.append(request.schedule_chunk(num_tokens))
                left -= num_tokens
        return chunks

    def _keep_for_later(self, skipped: list[Request]) -> None:
        """Put what got no tokens back beside what `take_decodes` left, in order of arrival."""
        if not skipped and len(self.running) == 1 and isinstance(self.running[0], DecodeSet):
            self.running[0].sort_by_arrival()
            return
        later = skipped.copy()
        for entry in self.running:
            if isinstance(entry, DecodeSet):
                members = list(entry.members)
                for request in members:
                    entry.leave(request)
                later += members
            else:
                later.append(entry)
        later.sort(key=by_arrival)
        self.running = list(later)
