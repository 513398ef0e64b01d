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
    horizon = [inf]
    lanes = [_lane(replica, horizon) for replica in router.replicas]
    for lane in lanes:
        next(lane)
    try:
        return _loop(env, router, requests, [lane.send for lane in lanes], horizon)
    finally:
        for lane in lanes:
            lane.close()


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


def _loop(
    env: Environment,
    router: Router,
    requests: Iterator[Request],
    sends: list[Callable[[float], float]],
    horizon: list[float],
) -> Iterator[Request]:
    """Handle one instant after the other: ends of batches, arrivals, formations.

    Until `horizon` the lane that was sent the present instant may go on by itself.
    """
    replicas = router.replicas
    longest_prompt, longest = _admitted_lengths(replicas[0])
    # When the batch under way of each replica ends; in the heap those that have one. An entry of
    # the heap is void when a run was cut, since its replica has an earlier one then.
    ends = [inf] * len(replicas)
    heap: list[tuple[float, int]] = []
    upcoming = next(requests, None)
    while not env.is_interrupted:
        arrives_at: Any = inf if upcoming is None else upcoming.arrived_at
        while heap and heap[0][0] < arrives_at:
            now, index = heap[0]
            if now != ends[index]:
                heappop(heap)
                continue
            horizon[0] = (
                min(arrives_at, *[entry[0] for entry in heap[1:3]]) if heap[1:] else arrives_at
            )
            ends[index] = ends_at = sends[index](now)
            if ends_at == inf:
                heappop(heap)
            elif ends_at == _STUCK:
                return _with(upcoming, requests)
            else:
                heapreplace(heap, (ends_at, index))
            if env.is_interrupted:
                return _with(upcoming, requests)
        if upcoming is None:
            break
        env._now = now = horizon[0] = arrives_at
        to_form = []
        while heap and heap[0][0] == now:
            _, index = heappop(heap)
            if ends[index] == now:
                ends[index] = sends[index](_END_ONLY)  # not a number: between two batches
                to_form.append(index)
        while upcoming is not None and upcoming.arrived_at == now:
            request, upcoming = upcoming, next(requests, None)
            is_short = (
                request.num_prefill_tokens <= longest_prompt and request.num_tokens <= longest
            )
            if is_short:
                router.num_received += 1
            elif not router.admits(request):
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
                return _with(upcoming, requests)
            if ends_at != inf:
                heappush(heap, (ends_at, index))
    return _with(upcoming, requests)


def _admitted_lengths(replica: Replica) -> tuple[int, int]:
    """Return up to which prompt and up to which length a request is not refused, in tokens.

    Of longer ones the router knows, and says why.
    """
    pool, scheduler = replica.pool, replica.scheduler
    prompt = (pool.num_blocks - pool.num_watermark_blocks) * pool.block_size
    if isinstance(scheduler, VllmScheduler):
        prompt = min(prompt, scheduler.max_num_batched_tokens)
    assert isinstance(scheduler, SarathiScheduler | VllmScheduler)
    return prompt, min(scheduler.resources.max_model_len, pool.num_blocks * pool.block_size + 1)


def _with(upcoming: Request | None, requests: Iterator[Request]) -> Iterator[Request]:
    return requests if upcoming is None else chain([upcoming], requests)


def _lane(replica: Replica, horizon: list[float]) -> Lane:
    """Execute the batches of one replica.

    Sent the present instant, it ends the batch under way if there is one, forms the next and
    answers when that ends: infinity if there is none. What ends before the horizon it does not
    answer but goes on. Closed, it leaves its batch to the stage.
    """
    env, pool, stage, timeline = replica.env, replica.pool, replica.stages[0], replica.timeline
    fast, stage_time, complete = stage.fast, stage.stage_time, replica.complete
    scheduler: Any = replica.scheduler
    waiting, block_size, num_blocks = scheduler.waiting, pool.block_size, pool.num_blocks
    max_num_seqs, max_batch_size = scheduler.max_num_seqs, scheduler.max_batch_size
    watermark = pool.num_watermark_blocks
    is_mixed = isinstance(scheduler, SarathiScheduler)  # decodes and prompts in one batch
    max_tokens = scheduler.chunk_size if is_mixed else scheduler.max_num_batched_tokens

    decodes: DecodeSet | None = None
    members: dict[Request, None] = {}
    finishing: dict[int, list[Request]] = {}
    finishes: list[int] = []
    phases: list[int] = []
    size = iteration = processed = 0  # of the decode set: members, steps, tokens
    executed = last_end = 0.0
    partial: Request | None = None  # whose prompt goes on
    is_partial_skipped = False  # by the batch under way
    batch = Batch()  # the one under way, again and again
    chunks: list[PrefillChunk] = []
    spare: list[PrefillChunk] = []  # used again and again
    num_decodes = num_tokens = context = pairs = 0  # of the batch
    started_at = duration = 0.0
    is_formed = False
    num_batches = num_prefill_tokens = num_decode_tokens = num_pairs = num_context = 0
    now = yield inf
    try:
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
                blocks = 0  # freed
                completed = None
                if num_decodes:
                    iteration += 1
                    processed += num_decodes
                    executed += duration
                    last_end = now
                    completed = finishing.pop(iteration, None)
                    if completed is not None:
                        for request in completed:
                            joined_at = request._joined_at_iteration
                            phases[(1 - request._processed + joined_at) % block_size] -= 1
                            del members[request]
                            own = executed - request._joined_at_execution_time
                            waited = now - request.last_stage_end - own  # type: ignore[operator]
                            request.execution_time += own
                            if waited > 0.0:
                                request.preempted_time += waited
                            request.decode_set = None
                            request._processed = length = request.num_tokens
                            processed -= length
                            blocks -= -(length - 1) // block_size
                            complete(request, now)
                        size = len(members)
                        while finishes and finishes[0] <= iteration:
                            heappop(finishes)
                        scheduler.num_running -= len(completed)
                for chunk in chunks:
                    request = chunk.request
                    request.execution_time += duration
                    request.last_stage_end = now
                    length = chunk.context
                    if length < request.num_prefill_tokens:
                        request._processed = request.num_scheduled_tokens = length
                        partial = request
                        continue
                    request.num_scheduled_tokens = length
                    request._processed = length + 1
                    request.is_prefill_complete = True
                    request.first_token_at = now
                    if request.num_decode_tokens == 1:
                        blocks -= -length // block_size
                        scheduler.num_running -= 1
                        complete(request, now)
                        continue
                    if not size:
                        decodes = DecodeSet(block_size)
                        members, phases = decodes.members, decodes._block_phases
                        finishing, finishes = decodes._finishing, decodes._finishes
                        iteration = processed = 0
                        executed = last_end = 0.0
                    assert decodes is not None
                    request.decode_set = decodes
                    request._joined_at_iteration = iteration
                    request._joined_at_execution_time = executed
                    members[request] = None
                    size += 1
                    processed += length + 1
                    phases[(iteration - length) % block_size] += 1
                    last = iteration + request.num_decode_tokens - 1
                    if last in finishing:
                        finishing[last].append(request)
                    else:
                        finishing[last] = [request]
                        heappush(finishes, last)
                    if request.arrived_at < decodes.latest_arrival:  # type: ignore[operator]
                        decodes.is_sorted = False
                    else:
                        decodes.latest_arrival = request.arrived_at  # type: ignore[assignment]
                pool.num_free += blocks
                if is_end_only:
                    now = yield nan

            # -- REPLICA_SCHEDULE
            if now != pool._usage_since:
                pool.tick(now)
            num_decodes = size
            if waiting and not is_mixed and scheduler.num_running < max_num_seqs:
                blocks = -(-waiting[0].num_prefill_tokens // block_size)
                if pool.num_free - blocks >= watermark:
                    num_decodes = 0  # prompts go first, and alone
            left, room = max_tokens, max_batch_size
            num_tokens, context = num_decodes, 0
            if num_decodes:
                blocks = phases[iteration % block_size]
                if size + (partial is not None) > room or pool.num_free <= blocks:
                    env._now = now
                    yield _STUCK  # somebody has to wait or to give way
                    return
                if blocks:
                    pool.reserve(blocks)
                context = processed + size
                left -= size
                room -= size
            batch.decode_context = pairs = context
            chunks = []
            is_partial_skipped = partial is not None and left <= 0
            while left > 0:
                if partial is not None:
                    request, partial = partial, None
                    done = request._processed
                    request.preempted_time += now - request.last_stage_end  # type: ignore[operator]
                    length = min(request.num_prefill_tokens - done, left)
                elif waiting and room and scheduler.num_running != max_num_seqs:
                    request, done = waiting[0], 0
                    length = request.num_prefill_tokens
                    blocks = -(-length // block_size)
                    if pool.num_free - blocks < watermark:
                        break
                    if length > left:
                        if not is_mixed:
                            break
                        length = left
                    waiting.popleft()
                    pool.reserve(blocks)
                    scheduler.num_running += 1
                    request.scheduled_at = now
                else:
                    break
                done += length
                left -= length
                room -= 1
                num_tokens += length
                context += done
                pairs += length * done - length * (length - 1) // 2
                if len(chunks) == len(spare):
                    spare.append(PrefillChunk(request, length, done))
                chunk = spare[len(chunks)]
                chunk.request, chunk.num_tokens, chunk.context = request, length, done
                chunks.append(chunk)
            if not num_tokens:
                env._now = now
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
            ends_at = nan
            if not chunks and partial is None:
                assert decodes is not None
                decodes.iteration, decodes.num_processed_tokens = iteration, processed
                decodes.execution_time, decodes.last_end = executed, last_end
                batch.scheduled_at = now
                if fast.plan_run(batch, now):
                    ends_at = fast.run_ends_at
            if not fast.num_steps:
                started_at, duration = now, nan
                duration = stage_time(batch, 0)
                if not 0.0 <= duration < inf:
                    env._now = now
                    yield _STUCK  # the stage says what is wrong
                    return
                ends_at = now + duration
            if ends_at < horizon[0] and not env.is_interrupted:
                now = ends_at
            else:
                env._now = now
                now = yield ends_at
    finally:
        if decodes is not None and not fast.num_steps:
            decodes.iteration, decodes.num_processed_tokens = iteration, processed
            decodes.execution_time, decodes.last_end = executed, last_end
        replica.num_batches += num_batches
        replica.num_batches_formed += num_batches
        replica.num_prefill_tokens += num_prefill_tokens
        replica.num_decode_tokens += num_decode_tokens
        replica.num_attention_pairs += num_pairs
        replica.num_context_tokens += num_context
        if size and decodes is not None and not (is_formed and num_decodes):
            scheduler.running.append(decodes)
        if partial is not None:
            scheduler.running.insert(0 if is_partial_skipped else 1, partial)
        if is_formed:
            for chunk in chunks:
                chunk.request.num_scheduled_tokens = chunk.context
            if not fast.num_steps:
                batch.scheduled_at = batch.stage_started_at = started_at
            replica.resume(batch, duration)
        elif waiting or scheduler.running:
            replica.schedule.raise_now()
            replica.schedule.raise_now()
