"""The schedulers of Mnemosyne: with one KV-parallel group, and with several."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import ConfigError
from vidur_simpy.replica_scheduler.batching import ContinuousBatching
from vidur_simpy.replica_scheduler.chunk_sizing import (
    MOST_TRIED,
    Draft,
    GrowingBatch,
    PrefillTimes,
    tokens_for_time,
)
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.kv_parallel import (
    GroupedBatch,
    GroupedDraft,
    KVParallelBlocks,
)
from vidur_simpy.replica_scheduler.ordering import (
    WaitingQueue,
    fcfs,
    lrs,
    queue_of,
    sorted_by,
)

if TYPE_CHECKING:
    from vidur_simpy.replica_scheduler.mnemosyne import Mnemosyne

__all__ = ["KVParallelMnemosyneScheduler", "MnemosyneScheduler"]

MOST_SKIPPED = 10  # requests passed over in each queue at a formation
FULL = 0.9  # share of the target time from which on nobody else joins
MOST_YIELDED = 0.5  # of the target time, by a long request with plenty of slack

DEADLINE_ORDERINGS = ("edf", "lrs", "st")


class MnemosyneScheduler(ContinuousBatching):
    """The Mnemosyne scheduler of one replica, with one KV-parallel group.

    Attributes
    ----------
    partial : WaitingQueue
        Requests with some, but not all, of their prompt given to batches.
    num_running_batches : int
        Batches that were formed and have not ended.
    """

    def __init__(self, policy: Mnemosyne, resources: ReplicaResources) -> None:
        super().__init__(resources, policy.max_num_seqs)
        self.policy = policy
        self.most_tokens_together = min(  # of one request in one group
            resources.max_model_len, self.pool.num_blocks * self.pool.block_size
        )
        self.num_running_batches = 0
        self._admitted: set[Request] = set()  # hold blocks, but found no room in a batch yet
        self._long_decodes: dict[Request, None] = {}  # those that will pass the threshold
        self._lone_request = Request(1, 1)
        self._prefill_times = PrefillTimes(
            self._next_lone_chunk, max(MOST_TRIED, policy.chunk_size or 0)
        )
        # With sequence-pipeline parallelism each stage has a chunk of the same prompt.
        self._chunks_at_once = (
            resources.pipeline_parallel_size if resources.sequence_pipeline_parallel else 1
        )
        self._slack_fraction = lrs(self.remaining_time)
        self.waiting = self._queue()
        self.partial = self._queue()

    def _queue(self) -> WaitingQueue:
        ordering = self.policy.ordering
        if ordering == "fcfs":
            return sorted_by(fcfs)  # a prompt that goes on may have arrived before the others
        if ordering in ("lrs", "st"):
            return sorted_by(self._slack_fraction)
        return queue_of(ordering, self.resources)

    @property
    def num_waiting(self) -> int:
        """Requests whose prompt is not completely given to batches."""
        return len(self.waiting) + len(self.partial)

    def add(self, request: Request) -> None:
        """Queue a new request; it gets a deadline if the ordering needs one and it has none."""
        if request.deadline is None and self.policy.ordering in DEADLINE_ORDERINGS:
            assert request.arrived_at is not None
            request.deadline_time = max(
                self.remaining_time(request) * self.policy.deadline_multiplier,
                self.policy.min_deadline,
            )
            request.deadline = request.arrived_at + request.deadline_time
        super().add(request)

    # -- predictions -------------------------------------------------------------------------

    def predicted_time(self, batch: Batch) -> float:
        """Predict how long a batch takes through all pipeline stages, in seconds."""
        stage_time = self.resources.stage_time
        if stage_time is None:
            raise ConfigError(
                "mnemosyne predicts execution times: ReplicaResources.stage_time is None, expected "
                "a function of (batch, stage_id)."
            )
        return stage_time(batch, 0) * self.resources.pipeline_parallel_size

    def remaining_time(self, request: Request) -> float:
        """Predict how long the rest of a request's prefill takes alone, in seconds."""
        done, target = request.num_scheduled_tokens, request.prefill_target
        return self._prefill_times.between(done, target) / self._chunks_at_once

    def _next_lone_chunk(self, num_left: int, num_done: int) -> tuple[int, float]:
        resident = min(num_done, self.most_tokens_together)
        batch = GrowingBatch()

        def time_of(num_tokens: int) -> float:
            batch.push(PrefillChunk(self._lone_request, num_tokens, resident + num_tokens))
            seconds = self.predicted_time(batch)
            batch.pop()
            return seconds

        if self.policy.chunk_size is not None:
            num_tokens = min(num_left, self.policy.chunk_size)
            return num_tokens, time_of(num_tokens)
        assert self.policy.target_batch_time is not None
        return tokens_for_time(num_left, self.policy.target_batch_time, time_of)

    # -- forming a batch ---------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """Take all decodes, go on with prompts under way, admit new ones: in order, each."""
        decodes, _ = self.take_decodes()
        draft = self._draft(decodes)
        if self.partial or self.waiting:
            self.partial.order(now)
            self.waiting.order(now)
            self._join_from(self.partial, draft, now, MOST_SKIPPED)
            self._join_from(self.waiting, draft, now, MOST_SKIPPED)
            if not draft.num_requests and not self.num_running_batches:
                # Ten that need memory may stand before one that has it; no event would come.
                self._join_from(self.waiting, draft, now, len(self.waiting))
        if not draft.num_requests:
            return None
        self.num_running_batches += 1
        return draft.finish()

    def _draft(self, decodes: DecodeSet | None) -> Draft:
        return Draft(
            decodes,
            self.predicted_time,
            self.policy.long_request_threshold,
            self._long_decodes,
        )

    def _join_from(self, queue: WaitingQueue, draft: Draft, now: float, most_skipped: int) -> None:
        """Let the requests of a queue join in order; those that cannot are passed over."""
        skipped = 0
        while (
            skipped < len(queue)
            and skipped < most_skipped
            and draft.num_requests < self.max_batch_size
        ):
            request = queue[skipped]
            if self._holds_blocks(request) and self._join(request, draft, now):
                del queue[skipped]
                self._admitted.discard(request)
            else:
                skipped += 1

    def _holds_blocks(self, request: Request) -> bool:
        """Whether the request has the blocks of its prompt, reserved now if they are there."""
        if request.num_scheduled_tokens or request in self._admitted:
            return True
        if self.num_running == self.max_num_seqs or not self.reserve_prompt(request):
            return False
        self._admitted.add(request)
        return True

    def _join(self, request: Request, draft: Draft, now: float) -> bool:
        """Add as much of the request's prompt as the batch should take; False if none."""
        num_left = request.prefill_target - request.num_scheduled_tokens
        if self.policy.chunk_size is not None:
            room = self.policy.chunk_size - draft.num_tokens_beside(request)
            num_tokens, time = min(num_left, room), 0.0
        else:
            target_time = self._target_time(request, draft, now)
            if target_time is None or draft.predicted_beside(request) > FULL * target_time:
                return False
            num_tokens, time = tokens_for_time(
                num_left, target_time, lambda num_tokens: draft.time_with(request, num_tokens)
            )
        if num_tokens <= 0:
            return False
        draft.add(request, num_tokens, time)
        return True

    def _target_time(self, request: Request, draft: Draft, now: float) -> float | None:
        """Seconds that the batch should take if this request joins; None if it must not."""
        target_time = self.policy.target_batch_time
        assert target_time is not None
        threshold = self.policy.long_request_threshold
        if self.policy.ordering != "st" or request.num_scheduled_tokens < threshold:
            return target_time
        if draft.has_long_beside(request):
            return None
        slack = min(MOST_YIELDED, max(0.0, self._slack_fraction(request, now)))
        return target_time * (1 - slack)

    def steady_steps(self, batch: Batch) -> int:
        """Return how many batches after this one will be its decodes, if no prompt is left."""
        return 0 if self.partial or self.waiting else super().steady_steps(batch)

    # -- the life of a request ---------------------------------------------------------------

    def put_back(self, request: Request) -> None:
        """Queue a restarted request again, by its key like any other."""
        self._long_decodes.pop(request, None)
        self.waiting.append(request)

    def keep_partial(self, request: Request) -> None:
        """Queue a request whose prompt goes on in a later batch."""
        self.partial.append(request)

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Count the tokens, free the completed requests, put the others back into their queues."""
        self.num_running_batches -= 1
        completed = super().end(batch, now)
        if self.policy.ordering == "st":
            threshold = self.policy.long_request_threshold
            for chunk in batch.prefills:
                if chunk.request.is_prefill_complete and chunk.request.num_tokens > threshold:
                    self._long_decodes[chunk.request] = None
            for request in completed:
                self._long_decodes.pop(request, None)
        return completed


class KVParallelMnemosyneScheduler(MnemosyneScheduler):
    """The Mnemosyne scheduler of one replica with several KV-parallel groups.

    Attributes
    ----------
    blocks : KVParallelBlocks
        Who holds which blocks of which group; `pool` counts those of all groups together.
    """

    def __init__(self, policy: Mnemosyne, resources: ReplicaResources) -> None:
        super().__init__(policy, resources)
        assert policy.max_num_tokens_per_kvp_group is not None
        self.most_tokens_together = policy.max_num_tokens_per_kvp_group
        self.blocks = KVParallelBlocks(
            self.pool, policy.kv_parallel_size, policy.max_num_tokens_per_kvp_group
        )
        self._past_first_stage: dict[Request, int] = {}

    def refusal(self, request: Request) -> str:
        """Return why the request can never run here; an empty string if it can."""
        blocks = self.blocks
        prompt = min(self.pool.blocks_of(request.num_prefill_tokens), blocks.num_blocks_each)
        admissible = blocks.num_blocks - blocks.num_watermark_blocks
        if prompt > admissible:
            return (
                f"its prompt of {request.num_prefill_tokens} tokens needs {prompt} KV-cache blocks "
                f"in a group, {admissible} of {blocks.num_blocks} may be used for admission"
            )
        most = blocks.num_groups * blocks.num_tokens_each
        if request.num_tokens - 1 > most:
            return (
                f"its {request.num_tokens} tokens do not fit the {blocks.num_groups} KV-parallel "
                f"groups of {blocks.num_tokens_each} tokens"
            )
        return ""

    def reserve_prompt(self, request: Request) -> bool:
        """Reserve the blocks of the whole prompt, if enough groups have them."""
        if not self.blocks.reserve_prompt(request):
            return False
        self.pool.reserve(self.blocks.num_held(request))
        self.num_running += 1
        return True

    def take_decodes(self) -> tuple[DecodeSet | None, list[Request]]:
        """Take the next batch's decodes out of `running`, one by one: groups fill unevenly."""
        decodes, prefills, _ = self._gather()
        if decodes is None:
            return None, prefills
        return self._walk(decodes, deque(decodes.members))

    def _draft(self, decodes: DecodeSet | None) -> GroupedDraft:
        return GroupedDraft(
            decodes, self.predicted_time, self.policy.long_request_threshold, self.blocks
        )

    def _make_room(self, request: Request, others: deque[Request]) -> bool:
        """Restart requests of the same group, the last first, until `request` may decode there."""
        group = self.blocks.last_group(request)
        while not self.blocks.num_free[group]:
            sharing = (other for other in reversed(others) if self.blocks.is_in(group, other))
            victim = next(sharing, request)
            self.preempt(victim)
            if victim is request:
                return False
            others.remove(victim)
        return True

    def steady_steps(self, batch: Batch) -> int:
        """Return 0: each step is walked, because the groups fill unevenly."""
        return 0

    def _grow(self, request: Request) -> None:
        self.pool.reserve(self.blocks.grow(request))

    def _num_blocks_held(self, request: Request) -> int:
        return self.blocks.num_held(request)

    def preempt(self, request: Request) -> None:
        """Free a request's blocks and queue it again."""
        super().preempt(request)
        self.blocks.free(request)

    def end_first_stage(self, batch: Batch) -> None:
        """With sequence-pipeline parallelism, let the next chunk of a prompt follow this one."""
        super().end_first_stage(batch)
        for chunk in batch.prefills:
            self._past_first_stage[chunk.request] = chunk.context

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Count the tokens, free the completed requests, put the others back into their queues."""
        completed = super().end(batch, now)
        for request in completed:
            self.blocks.free(request)
        assert isinstance(batch, GroupedBatch)
        for group, part in enumerate(batch.parts):
            if part.prefills:
                request = part.prefills[-1].request
                num_done = self._num_done(request)
                self.blocks.pending_work[group] = request.prefill_target**2 - num_done**2
        for chunk in batch.prefills:
            if chunk.request.is_prefill_complete:
                self._past_first_stage.pop(chunk.request, None)
        return completed

    def _num_done(self, request: Request) -> int:
        """Tokens done as the pending work counts them: past the first stage, while some are not."""
        past = self._past_first_stage.get(request, 0)
        if self.resources.sequence_pipeline_parallel and past < request.prefill_target:
            return past
        return request.num_processed_tokens
