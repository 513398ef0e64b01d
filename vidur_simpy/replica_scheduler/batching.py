"""Continuous (iteration-level) batching: what vLLM, Sarathi, Orca and LightLLM share.

Two queues: `waiting`, and `running` for admitted requests that are in no batch at the moment. The
requests that decode together stay one :class:`DecodeSet` from batch to batch, so a step whose
decodes neither exceed the batch limit nor run short of blocks is formed by handing the set over.
Otherwise the requests are walked one by one, exactly as the reference does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import ConfigError
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Key, WaitingQueue, queue_of
from vidur_simpy.sums import Numbers

__all__ = ["ContinuousBatching", "longer_than_a_batch"]


class ContinuousBatching:
    """The queues and the block accounting of an iteration-level scheduler; add ``schedule``.

    Blocks cover the tokens processed so far, as in Vidur: a new request gets the blocks of its
    whole prompt when it is admitted, a decode one more whenever its last block is full.

    Parameters
    ----------
    resources : ReplicaResources
        What the replica has.
    max_num_seqs : int
        Most requests that hold blocks at a time; the pipeline stages share them evenly.
    ordering : str or callable
        Who goes first of those that wait: a name or a key, see `ordering`.

    Attributes
    ----------
    waiting : WaitingQueue
        Requests not admitted, or restarted; the head goes first.
    running : list of DecodeSet and Request
        Admitted requests in no batch, in order. A set stands for its members.
    max_batch_size : int
        Most decodes in one batch: ``max_num_seqs // pipeline_parallel_size``.
    num_running : int
        Requests that hold blocks.

    Raises
    ------
    ConfigError
        If a batch could hold no request.
    """

    def __init__(
        self, resources: ReplicaResources, max_num_seqs: int, ordering: str | Key = "fcfs"
    ) -> None:
        stages = resources.pipeline_parallel_size
        if max_num_seqs < stages:
            raise ConfigError(
                f"max_num_seqs = {max_num_seqs} leaves no request for each of the {stages} "
                f"pipeline stages: expected at least {stages}."
            )
        self.resources = resources
        self.pool = resources.pool
        self.max_num_seqs = max_num_seqs
        self.max_batch_size = max_num_seqs // stages
        self.waiting: WaitingQueue = queue_of(ordering, resources)
        self.running: list[DecodeSet | Request] = []
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Requests in `waiting`."""
        return len(self.waiting)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def refusal(self, request: Request) -> str:
        """Return why the request can never run here; an empty string if it can.

        Its prompt must fit beside the watermark, and all it will ever hold must fit at all; the
        last output token needs no slot.
        """
        pool = self.pool
        admissible = pool.num_blocks - pool.num_watermark_blocks
        prompt = pool.blocks_of(request.num_prefill_tokens)
        if prompt > admissible:
            return (
                f"its prompt of {request.num_prefill_tokens} tokens needs {prompt} KV-cache "
                f"blocks, {admissible} of {pool.num_blocks} may be used for admission"
            )
        most = pool.blocks_of(request.num_tokens - 1)
        if most > pool.num_blocks:
            return (
                f"its {request.num_tokens} tokens need {most} KV-cache blocks, the whole cache "
                f"has {pool.num_blocks}"
            )
        return ""

    # -- admission ---------------------------------------------------------------------------

    def reserve_prompt(self, request: Request) -> bool:
        """Reserve the blocks of the whole prompt, if they fit beside the watermark.

        A restarted prompt may have grown into the watermark; alone on the replica it may use it,
        or it would wait for ever.
        """
        pool = self.pool
        num_blocks = -(-request.prefill_target // pool.block_size)
        if pool.num_free - num_blocks < pool.num_watermark_blocks and not (
            request.num_restarts > 0 and pool.num_free == pool.num_blocks
        ):
            return False
        pool.reserve(num_blocks)
        self.num_running += 1
        return True

    # -- decodes -----------------------------------------------------------------------------

    def take_decodes(self) -> tuple[DecodeSet | None, list[Request]]:
        """Take the next batch's decodes out of `running` and reserve their blocks.

        Returns
        -------
        decodes : DecodeSet or None
            The first `max_batch_size` requests that decode. Whoever is still in `running`
            afterwards is for a later batch.
        prefills : list of Request
            The unfinished prefills met on the way, which are out of `running` too.
        """
        decodes, prefills, ahead = self._gather()
        if decodes is None:
            return None, prefills
        pool, num_blocks = self.pool, decodes.num_blocks_needed
        # An unfinished prefill behind the last decode of a full batch is not reached.
        all_reached = len(decodes.members) + bool(prefills) <= self.max_batch_size
        if all_reached and pool.num_free > num_blocks:
            if num_blocks:
                pool.reserve(num_blocks)
            return decodes, prefills
        queue = deque(_in_order(decodes, prefills, ahead))
        return self._walk(decodes, queue)

    def _gather(self) -> tuple[DecodeSet | None, list[Request], list[int]]:
        """Empty `running`: its decodes as one set, in order, and its unfinished prefills.

        For each of the prefills also return how many decodes stood ahead of it.
        """
        running = self.running
        self.running = []
        decodes: DecodeSet | None = None
        prefills: list[Request] = []
        ahead: list[int] = []
        for entry in running:
            if isinstance(entry, DecodeSet):
                if decodes is None:
                    decodes = entry
                else:
                    decodes.absorb(list(entry.members))
            elif entry.is_prefill_complete:
                if decodes is None:
                    decodes = DecodeSet(self.pool.block_size)
                decodes.join(entry)
            else:
                prefills.append(entry)
                ahead.append(len(decodes.members) if decodes is not None else 0)
        return decodes, prefills, ahead

    def _walk(
        self, decodes: DecodeSet, queue: deque[Request]
    ) -> tuple[DecodeSet | None, list[Request]]:
        """As `take_decodes`, one request after the other: somebody may have to give way."""
        prefills = []
        num_decodes = 0
        while queue and num_decodes < self.max_batch_size:
            request = queue.popleft()
            if not request.is_prefill_complete:
                prefills.append(request)
            elif self._make_room(request, queue):
                self._grow(request)
                num_decodes += 1
        for request in queue:
            if request.decode_set is not None:
                decodes.leave(request)
        self.running = list(queue)
        return (decodes if num_decodes else None), prefills

    def _grow(self, request: Request) -> None:
        """Reserve the block that the next step of a decoding request takes: its last is full."""
        self.pool.reserve((request.num_processed_tokens - 1) % self.pool.block_size == 0)

    def _make_room(self, request: Request, others: deque[Request]) -> bool:
        """Restart requests, the last of `others` first, until `request` may decode.

        As in the reference one block must be free even for a step that takes none. Returns False
        if the request itself had to go.
        """
        while self.pool.num_free < 1:
            victim = others.pop() if others else request
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def preempt(self, request: Request) -> None:
        """Free a request's blocks and send it back to `waiting`."""
        self.pool.free(self._num_blocks_held(request))
        self.num_running -= 1
        request.restart()
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """Let a restarted request wait ahead of the others, as far as the ordering leaves it."""
        self.waiting.appendleft(request)

    def _num_blocks_held(self, request: Request) -> int:
        """Blocks of a request between two batches; the newest token has no slot yet."""
        if request.is_prefill_complete:
            return self.pool.blocks_of(request.num_processed_tokens - 1)
        return self.pool.blocks_of(request.prefill_target)

    # -- runs of steps -----------------------------------------------------------------------

    def steady_steps(self, batch: Batch) -> int:
        """Return how many batches after this one will be its decodes, unless a request arrives.

        Whoever waits goes on waiting: nobody finishes meanwhile, and free blocks get fewer. A
        policy that decodes so says ``steady_steps = ContinuousBatching.steady_steps``; others step.
        """
        if batch.decodes is None or self.running:
            return 0
        if self.waiting and not self.waiting.is_steady:
            return 0
        return batch.decodes.num_steady_steps(self.pool.num_free)

    def skip_steps(self, batch: Batch, execution_times: Numbers, now: float) -> Numbers:
        """Take steady steps, the last of which ends at `now`; return the blocks that they take.

        Each took its time of `execution_times`, in seconds.
        The caller reserves them: those that each following step takes when it is formed.
        """
        assert batch.decodes is not None
        return batch.decodes.skip(execution_times, now)

    # -- the end of a batch ------------------------------------------------------------------

    def end_first_stage(self, batch: Batch) -> None:
        """With sequence-pipeline parallelism, let the next chunk of a prompt follow this one."""
        if not self.resources.sequence_pipeline_parallel:
            return
        for chunk in batch.prefills:
            request = chunk.request
            if chunk.is_current and request.num_scheduled_tokens < request.prefill_target:
                self.keep_partial(request)

    def keep_partial(self, request: Request) -> None:
        """Keep a request whose prompt goes on in a later batch."""
        self.running.append(request)

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Count the tokens, free the completed requests, put the others back into `running`."""
        running = self.running
        decodes = batch.decodes
        completed: Sequence[Request] = ()
        if decodes is not None:
            completed = decodes.advance(now, batch.execution_time)
            if decodes.members:
                running.append(decodes)
        if batch.prefills:
            completed_chunks = self._end_chunks(batch.prefills, now)
            if completed_chunks:
                completed = [*completed, *completed_chunks]
        if completed:
            self.pool.free(sum(map(self._num_blocks_held, completed)))
            self.num_running -= len(completed)
        return completed

    def _end_chunks(self, chunks: Sequence[PrefillChunk], now: float) -> list[Request]:
        """Count prompt tokens; return who is complete, put the others back into `running`."""
        completed: list[Request] = []
        for chunk in chunks:
            request = chunk.request
            if chunk.num_restarts != request.num_restarts:
                continue  # its memory was taken while it was in the pipeline
            is_complete = request.end_chunk(chunk.num_tokens)
            if request.is_prefill_complete:
                if request.first_token_at is None:
                    request.first_token_at = now
                (completed if is_complete else self.running).append(request)
            elif not self.resources.sequence_pipeline_parallel:
                self.keep_partial(request)
        return completed


def _in_order(
    decodes: DecodeSet, prefills: Sequence[Request], ahead: Sequence[int]
) -> list[Request]:
    """Put prefills back among the decodes, each behind the number of decodes `ahead` of it."""
    requests = list(decodes.members)
    for request, position in zip(reversed(prefills), reversed(ahead), strict=True):
        requests.insert(position, request)
    return requests


def longer_than_a_batch(request: Request, max_num_batched_tokens: int) -> str:
    """Return why a prompt that is batched whole never fits a batch; an empty string if it does."""
    if request.num_prefill_tokens <= max_num_batched_tokens:
        return ""
    return (
        f"its prompt of {request.num_prefill_tokens} tokens is longer than "
        f"max_num_batched_tokens = {max_num_batched_tokens}"
    )
