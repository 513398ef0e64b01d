"""vLLM before chunked prefill, as Vidur models it: prefill-only batches first, then decodes."""

from __future__ import annotations

from pydantic import Field

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.replica_scheduler.batching import ContinuousBatching, longer_than_a_batch
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Ordering
from vidur_simpy.validation import configuration

__all__ = ["Vllm", "VllmScheduler"]


@configuration
class Vllm:
    """Prompts first, whole and alone; decodes of the earliest arrivals otherwise.

    Attributes
    ----------
    max_num_seqs : int
        Most requests that hold KV-cache blocks.
    max_num_batched_tokens : int
        Most prompt tokens in a batch; a longer prompt is refused at arrival.
    ordering : str or callable
        Who goes first of those that wait: ``fcfs``, ``edf``, ``lrs``, ``sjf``, ``spt``,
        ``priority``, or a function of ``(request)`` or ``(request, now)``.

    Notes
    -----
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", SOSP 2023, as re-stated by Vidur. One quirk that decides is kept: a decode
    waits for a free block even when its step takes none.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    max_num_batched_tokens: int = Field(default=4096, ge=1)
    ordering: Ordering = "fcfs"

    def for_replica(self, resources: ReplicaResources) -> VllmScheduler:
        """Make the scheduler of one replica."""
        return VllmScheduler(self, resources)


class VllmScheduler(ContinuousBatching):
    """The vLLM scheduler of one replica."""

    def __init__(self, policy: Vllm, resources: ReplicaResources) -> None:
        super().__init__(resources, policy.max_num_seqs, policy.ordering)
        self.max_num_batched_tokens = policy.max_num_batched_tokens
        self._was_preempted = False  # somebody, since the last attempt to admit

    def refusal(self, request: Request) -> str:
        """Return why the request can never run here; an empty string if it can."""
        too_long = longer_than_a_batch(request, self.max_num_batched_tokens)
        return too_long or super().refusal(request)

    def schedule(self, now: float) -> Batch | None:
        """Admit whole prompts while they fit; if there are none, decode."""
        chunks = self.admit_prompts(now)
        if chunks:
            return Batch(None, chunks)
        decodes, _ = self.take_decodes()
        if decodes is not None:
            return Batch(decodes)
        if self.waiting and not self.num_running:
            # The last request gave way to itself; no event would ever bring it back.
            chunks = self.admit_prompts(now)
        return Batch(None, chunks) if chunks else None

    def steady_steps(self, batch: Batch) -> int:
        """Return how many batches after this one will be its decodes, unless a request arrives.

        Not if decoding has just sent somebody back, whom the next batch may admit again.
        """
        return 0 if self._was_preempted else super().steady_steps(batch)

    def put_back(self, request: Request) -> None:
        """Let a restarted request wait ahead of the others, as far as the ordering leaves it."""
        super().put_back(request)
        self._was_preempted = True

    def admit_prompts(self, now: float) -> list[PrefillChunk]:
        """Admit whole prompts while they fit."""
        self._was_preempted = False
        self.waiting.order(now)
        chunks: list[PrefillChunk] = []
        num_tokens = 0
        while (
            self.waiting
            and self.num_running < self.max_num_seqs
            and len(chunks) < self.max_batch_size
        ):
            request = self.waiting[0]
            num_tokens += request.prefill_target
            # A restarted prompt may have outgrown the limit; then it goes alone.
            alone = request.num_restarts > 0 and not chunks
            if num_tokens > self.max_num_batched_tokens and not alone:
                break
            if not self.reserve_prompt(request):
                break
            chunks.append(self.waiting.popleft().schedule_chunk(request.prefill_target))
        return chunks

    def _gather(self) -> tuple[DecodeSet | None, list[Request], list[int]]:
        decodes, prefills, ahead = super()._gather()
        if decodes is not None:
            decodes.sort_by_arrival()
        return decodes, prefills, ahead
