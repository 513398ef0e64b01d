"""LightLLM: token-granular memory, admission by the peak that the running requests will reach."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from pydantic import Field

from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import ConfigError
from vidur_simpy.replica_scheduler.batching import ContinuousBatching, longer_than_a_batch
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Ordering
from vidur_simpy.sums import Numbers
from vidur_simpy.validation import configuration

__all__ = ["LightLLM", "LightLLMScheduler"]


@configuration
class LightLLM:
    """Decode for a while, then admit prompts if memory lasts until everybody is done.

    Attributes
    ----------
    max_num_seqs : int
        Most requests that hold KV-cache blocks.
    max_num_batched_tokens : int
        Most prompt tokens in a batch; a longer prompt is refused at arrival.
    max_waiting_iterations : int
        Decode iterations after which admission is tried again.
    ordering : str or callable
        Who goes first of those that wait: ``fcfs``, ``edf``, ``lrs``, ``sjf``, ``spt``,
        ``priority``, or a function of ``(request)`` or ``(request, now)``.

    Notes
    -----
    The router of the LightLLM server, as re-stated by Vidur; for ``block_size = 1`` and one
    pipeline stage. Where Vidur fails for want of memory, the last running requests are preempted.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    max_num_batched_tokens: int = Field(default=4096, ge=1)
    max_waiting_iterations: int = Field(default=10, ge=0)
    ordering: Ordering = "fcfs"

    def for_replica(self, resources: ReplicaResources) -> LightLLMScheduler:
        """Make the scheduler of one replica."""
        return LightLLMScheduler(self, resources)


class LightLLMScheduler(ContinuousBatching):
    """The LightLLM scheduler of one replica."""

    def __init__(self, policy: LightLLM, resources: ReplicaResources) -> None:
        super().__init__(resources, policy.max_num_seqs, policy.ordering)
        if resources.pool.block_size != 1:
            raise ConfigError(
                f"lightllm manages memory by the token: kv_cache.block_size = "
                f"{resources.pool.block_size}, expected 1."
            )
        if resources.pipeline_parallel_size != 1:
            raise ConfigError(
                f"lightllm knows one pipeline stage: pipeline_parallel_size = "
                f"{resources.pipeline_parallel_size}, expected 1."
            )
        self.max_num_batched_tokens = policy.max_num_batched_tokens
        self.max_waiting_iterations = policy.max_waiting_iterations
        self.num_waiting_iterations = 0

    def refusal(self, request: Request) -> str:
        """Return why the request can never run here; an empty string if it can."""
        too_long = longer_than_a_batch(request, self.max_num_batched_tokens)
        if too_long:
            return too_long
        # Admission always counts the token that the prefill yields.
        most = max(request.num_tokens - 1, request.num_prefill_tokens + 1)
        if most >= self.pool.num_blocks:
            return (
                f"it needs {most} tokens of KV cache and one free, there are {self.pool.num_blocks}"
            )
        return ""

    def schedule(self, now: float) -> Batch | None:
        """Admit prompts when nothing runs or every `max_waiting_iterations`; else decode."""
        if not self.running or self.num_waiting_iterations >= self.max_waiting_iterations:
            chunks = self._admit_prompts(now)
            if chunks or self.running:
                self.num_waiting_iterations = 0
            if chunks or not self.running:
                return Batch(None, chunks) if chunks else None
        return self._decode()

    def steady_steps(self, batch: Batch) -> int:
        """Return how many batches after this one will be its decodes, if nobody waits.

        Who waits may be admitted by and by: what the others still need gets less.
        """
        return 0 if self.waiting else super().steady_steps(batch)

    def skip_steps(self, batch: Batch, execution_times: Numbers, now: float) -> Numbers:
        """Take steady steps, the last of which ends at `now`; return the blocks that they take."""
        # Counted from 1 up to the limit, and over again.
        period = max(1, self.max_waiting_iterations)
        since = self.num_waiting_iterations - 1 + len(execution_times)
        self.num_waiting_iterations = 1 + since % period
        return super().skip_steps(batch, execution_times, now)

    def _decode(self) -> Batch | None:
        decodes, _, _ = self._gather()
        if decodes is None:
            return None
        while self.pool.num_free < len(decodes.members):
            self.preempt(next(reversed(decodes.members)))
        if not decodes.members:
            return None
        self.pool.reserve(len(decodes.members))
        self.num_waiting_iterations += 1
        return Batch(decodes)

    def _admit_prompts(self, now: float) -> list[PrefillChunk]:
        self.waiting.order(now)
        chunks: list[PrefillChunk] = []
        num_tokens = 0
        futures = self._futures() if self.waiting else []
        while self.waiting and self.num_running < self.max_num_seqs:
            request = self.waiting[0]
            target = request.prefill_target
            num_tokens += target
            # A restarted prompt may have outgrown the limits; then it goes alone.
            alone = request.num_restarts > 0 and not chunks
            if num_tokens > self.max_num_batched_tokens and not alone:
                break
            futures.append((target + 1, max(0, request.num_tokens - target - 2)))
            is_empty = self.pool.num_free == self.pool.num_blocks
            if peak_tokens(futures) >= self.pool.num_blocks and not (alone and is_empty):
                break
            self.pool.reserve(target)
            self.num_running += 1
            chunks.append(self.waiting.popleft().schedule_chunk(target))
        return chunks

    def _futures(self) -> list[tuple[int, int]]:
        """Return tokens held now and tokens still to come, of everybody who runs."""
        decodes, _, _ = self._gather()
        if decodes is None:
            return []
        self.running.append(decodes)
        held = [(request.num_processed_tokens, request) for request in decodes.members]
        return [(tokens, request.num_tokens - tokens - 1) for tokens, request in held]


def peak_tokens(futures: Iterable[tuple[int, int]]) -> int:
    """Return the most tokens that requests will hold together, each freeing them when it ends.

    Parameters
    ----------
    futures : iterable of (int, int)
        Tokens held now and tokens still to come, of each request.

    Examples
    --------
    Two requests: after 2 more tokens each the first ends; then the other grows alone.

    >>> peak_tokens([(10, 2), (3, 5)])
    17
    """
    longest_first = sorted(futures, key=lambda future: -future[1])
    held = accumulate(now for now, _ in longest_first)
    return max(
        left * rank + tokens
        for rank, ((_, left), tokens) in enumerate(zip(longest_first, held, strict=True), start=1)
    )
