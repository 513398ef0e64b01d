"""A whole run as one plain loop, as long as nobody else is on the clock.

`processes` is the specification; this is the same in the fewest steps that Python can take, for
what most runs are: a workload from its beginning, replicas of one stage under `sarathi` or `vllm`,
first come, first served, behind a router that counts requests. Nothing is recorded or listened to
and no process of the user's exists, so that nobody can look before the end. Then no event has to
be queued: the next thing to happen is the next arrival or the first end of a batch.

Each replica is a generator whose local variables are its hot numbers. Requests, queues, decode sets
and the block pool are the real ones, so that the loop can stop at any instant and leave the rest
to the processes. It does when a block is missing (somebody has to give way) and at a ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from heapq import heappop, heappush, heapreplace
from itertools import chain
from math import inf, nan
from typing import TYPE_CHECKING, Any, TypeAlias

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.replica_scheduler.ordering import WaitingQueue
from vidur_simpy.replica_scheduler.sarathi import SarathiScheduler
from vidur_simpy.replica_scheduler.vllm import VllmScheduler

if TYPE_CHECKING:
    from vidur_simpy.kernel import Environment
    from vidur_simpy.processes import Replica, Router

__all__ = ["after_plain_loop"]

Lane: TypeAlias = Generator[float, float, None]

# What is sent to a lane instead of the present instant: end the batch under way, and wait, since
# requests that arrive right now come before the next one is formed.
_END_ONLY = -1.0

# What a lane answers instead of the instant at which its batch ends: the processes have to go on.
_STUCK = -1.0


def after_plain_loop(
    requests: Iterator[Request], router: Router, env: Environment
) -> Iterator[Request]:
    """Run as far as the loop can, from instant 0 on; return the requests that are left."""
    is_alone = not env._queue and env.is_unobserved and not router.may_look
    if not (is_alone and all(map(_knows, router.replicas))):
        return requests
    lanes = [_lane(replica) for replica in router.replicas]
    for lane in lanes:
        next(lane)
    arrivals = _Arrivals(requests)
    try:
        _loop(env, router, arrivals, [lane.send for lane in lanes])
    finally:
        for lane in lanes:
            lane.close()
    return arrivals.left()


def _knows(replica: Replica) -> bool:
    """Whether the loop knows a replica's policy, its queue and its execution times."""
    scheduler: Any = replica.scheduler
    stage_time = replica.stages[0].stage_time
    return (
        type(scheduler) in (SarathiScheduler, VllmScheduler)
        and type(scheduler.waiting) is WaitingQueue
        and not scheduler.resources.sequence_pipeline_parallel
        and replica.num_stages == 1
        and hasattr(stage_time, "decode_times")
        and str(stage_time.__module__).startswith("vidur_simpy.")
    )


class _Arrivals:
    """The requests to come, the next of which is known."""

    __slots__ = ("_requests", "at", "next")

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests
        self.next: Any = None
        self.advance()

    def advance(self) -> Request:
        """Return the next request, and look at the one after it."""
        request: Request = self.next
        self.next = next(self._requests, None)
        self.at = inf if self.next is None else self.next.arrived_at
        return request

    def left(self) -> Iterator[Request]:
        """Return all requests that have not arrived."""
        return iter(()) if self.next is None else chain([self.next], self._requests)


def _loop(
    env: Environment, router: Router, arrivals: _Arrivals, sends: list[Callable[[float], float]]
) -> None:
    """Handle one instant after the other: ends of batches, arrivals, formations."""
    replicas = router.replicas
    # When the batch under way of each replica ends; in the heap those that have one. An entry of
    # the heap is void when a run was cut, since its replica has an earlier one then.
    ends = [inf] * len(replicas)
    heap: list[tuple[float, int]] = []
    while not env.is_interrupted:
        arrives_at = arrivals.at
        while heap and heap[0][0] < arrives_at:
            now, index = heap[0]
            if now != ends[index]:
                heappop(heap)
                continue
            env._now = now
            ends[index] = ends_at = sends[index](now)
            if ends_at == inf:
                heappop(heap)
            elif ends_at == _STUCK:
                return
            else:
                heapreplace(heap, (ends_at, index))
            if env.is_interrupted:
                return
        if arrives_at == inf:
            return
        env._now = now = arrives_at
        to_form = []
        while heap and heap[0][0] == now:
            _, index = heappop(heap)
            if ends[index] == now:
                ends[index] = sends[index](_END_ONLY)  # not a number: between two batches
                to_form.append(index)
        while arrivals.at == now:
            request = arrivals.advance()
            if not router.admits(request):
                continue
            replica = router.choose(request)
            index = replica.replica_id
            fast = replica.stages[0].fast
            if ends[index] == inf:
                ends[index] = nan
                to_form.append(index)
            elif fast.num_steps and fast.shorten(now):
                ends[index] = fast.run_ends_at
                heappush(heap, (ends[index], index))
            replica.add(request)
        for index in to_form:
            ends[index] = ends_at = sends[index](now)
            if ends_at == _STUCK:
                return
            if ends_at != inf:
                heappush(heap, (ends_at, index))


def _lane(replica: Replica) -> Lane:
    """Execute the batches of one replica.

    Sent the present instant, it ends the batch under way if there is one, forms the next and
    answers when that ends: infinity if there is none. Closed, it leaves its batch to the stage.
    """
    env, pool, stage, timeline = replica.env, replica.pool, replica.stages[0], replica.timeline
    fast, stage_time, complete = stage.fast, stage.stage_time, replica.complete
    scheduler: Any = replica.scheduler
    waiting, block_size, num_blocks = scheduler.waiting, pool.block_size, pool.num_blocks
    max_batch_size = scheduler.max_batch_size
    is_sarathi = isinstance(scheduler, SarathiScheduler)

    decodes: DecodeSet | None = None
    size = iteration = processed = 0  # of the decode set: members, steps, tokens
    executed = 0.0
    partials: list[Request] = []  # whose prompts go on
    batch = Batch()  # the one under way, again and again
    chunks: list[PrefillChunk] = []
    num_decodes = num_tokens = context = pairs = 0  # of it
    started_at = duration = 0.0
    is_formed = False
    num_skipped = 0  # of the partials, those that got no tokens in the batch
    num_batches = num_prefill_tokens = num_decode_tokens = num_pairs = num_context = 0
    try:
        now = yield inf
        while True:
            if is_formed:
                # -- BATCH_STAGE_END and BATCH_END
                is_formed = False
                is_end_only = now == _END_ONLY
                if is_end_only:
                    now = env._now
                if fast.num_steps:
                    duration = fast.end_run()
                    assert decodes is not None
                    iteration, processed = decodes.iteration, decodes.num_processed_tokens
                    executed = decodes.execution_time
                    context = pairs = batch.total_context
                stage.busy_time += duration
                pool._usage_integral += (num_blocks - pool.num_free) * (now - pool._usage_since)
                pool._usage_since = now
                num_batches += 1
                num_decode_tokens += num_decodes
                num_prefill_tokens += num_tokens - num_decodes
                num_pairs += pairs
                num_context += context
                completed: list[Request] = []
                if num_decodes:
                    assert decodes is not None
                    iteration += 1
                    processed += num_decodes
                    executed += duration
                    decodes.last_end = now
                    if iteration in decodes._finishing:
                        decodes.iteration, decodes.num_processed_tokens = iteration, processed
                        decodes.execution_time = executed
                        completed = decodes.finish()
                        processed, size = decodes.num_processed_tokens, len(decodes.members)
                        if not size:
                            decodes = None
                if chunks:
                    if decodes is None:
                        decodes = DecodeSet(block_size)
                        iteration = processed = 0
                        executed = 0.0
                    decodes.iteration, decodes.num_processed_tokens = iteration, processed
                    decodes.execution_time = executed
                    for chunk in chunks:
                        request = chunk.request
                        request.execution_time += duration
                        request.last_stage_end = now
                        request._processed += chunk.num_tokens
                        if request._processed < request.prefill_target:
                            partials.append(request)
                            continue
                        request.is_prefill_complete = True
                        request._processed += 1
                        request.first_token_at = now
                        if request._processed == request.num_tokens:
                            completed.append(request)
                        else:
                            decodes.join(request)
                    processed, size = decodes.num_processed_tokens, len(decodes.members)
                    if not size:
                        decodes = None
                if completed:
                    for request in completed:
                        pool.num_free += -(-(request._processed - 1) // block_size)
                        complete(request, now)
                    scheduler.num_running -= len(completed)
                if is_end_only:
                    now = yield nan

            # -- REPLICA_SCHEDULE
            if now != pool._usage_since:
                pool.tick(now)
            chunks = [] if is_sarathi or not waiting else scheduler.admit_prompts(now)
            num_decodes = 0 if chunks else size
            num_tokens, context = num_decodes, 0
            if num_decodes:
                assert decodes is not None
                blocks = decodes._block_phases[iteration % block_size]
                if size + bool(partials) > max_batch_size or pool.num_free <= blocks:
                    yield _STUCK  # somebody has to wait or to give way
                    return
                if blocks:
                    pool.reserve(blocks)
                context = processed + size
            if is_sarathi and (partials or waiting):
                chunks = scheduler.prompt_chunks(partials, num_decodes, now)
                if partials:
                    partials, scheduler.running = scheduler.running, []
            num_skipped = len(partials)
            batch.decode_context = pairs = context
            for chunk in chunks:
                length, chunk_context = chunk.num_tokens, chunk.context
                num_tokens += length
                context += chunk_context
                pairs += length * chunk_context - length * (length - 1) // 2
                request = chunk.request
                if request.scheduled_at is None:
                    request.scheduled_at = now
                elif request.last_stage_end is not None:
                    request.preempted_time += now - request.last_stage_end
            if not num_tokens:
                now = yield inf
                continue
            is_formed = True
            batch.decodes = decodes if num_decodes else None
            batch.prefills = chunks
            batch.num_decodes = num_decodes
            batch.num_prefill_tokens = num_tokens - num_decodes
            batch.num_tokens = num_tokens
            batch.total_context = context
            batch.num_attention_pairs = pairs
            if now >= timeline.next_at:
                timeline.sample(now, scheduler.num_running, len(waiting), pool.usage)

            # -- REPLICA_STAGE_SCHEDULE
            if not chunks and not partials:
                assert decodes is not None
                decodes.iteration, decodes.num_processed_tokens = iteration, processed
                decodes.execution_time = executed
                batch.scheduled_at = now
                if fast.plan_run(batch, now):
                    now = yield fast.run_ends_at
                    continue
            started_at, duration = now, nan
            duration = stage_time(batch, 0)
            if not 0.0 <= duration < inf:
                yield _STUCK  # the stage says what is wrong
                return
            now = yield now + duration
    finally:
        if decodes is not None and not fast.num_steps:
            decodes.iteration, decodes.num_processed_tokens = iteration, processed
            decodes.execution_time = executed
        replica.num_batches += num_batches
        replica.num_batches_formed += num_batches
        replica.num_prefill_tokens += num_prefill_tokens
        replica.num_decode_tokens += num_decode_tokens
        replica.num_attention_pairs += num_pairs
        replica.num_context_tokens += num_context
        apart = [] if decodes is None or (is_formed and num_decodes) else [decodes]
        scheduler.running = [*partials[:num_skipped], *apart, *partials[num_skipped:]]
        if is_formed:
            if not fast.num_steps:
                batch.scheduled_at = batch.stage_started_at = started_at
            replica.resume(batch, duration)
        elif waiting or scheduler.running:
            replica.schedule.raise_now()
            replica.schedule.raise_now()
