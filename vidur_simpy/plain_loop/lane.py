"""One replica of one stage in the plain loop: its numbers are the local variables of a generator.

A request is a `Row` of the workload's table. One that decodes is a `Member`; its future is known
when it joins, so that it is written into the bucket of the iteration of its last token and not
touched until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from heapq import heappop, heappush
from itertools import chain
from math import inf, nan
from typing import TYPE_CHECKING, Any

from vidur_simpy.entities import Batch
from vidur_simpy.plain_loop.cohorts import Cohort, Entry, Partial
from vidur_simpy.plain_loop.completions import Completions, Member, Row
from vidur_simpy.plain_loop.leaving import BatchUnderWay, leave
from vidur_simpy.plain_loop.runs import DecodeRun
from vidur_simpy.replica_scheduler.sarathi import SarathiScheduler

if TYPE_CHECKING:
    from vidur_simpy.entities import Request
    from vidur_simpy.processes import Replica

__all__ = ["END_ONLY", "STUCK", "Lane"]

# What is sent to a lane instead of the present instant: end the batch under way, and wait, since
# requests that arrive right now come before the next one is formed.
END_ONLY = -1.0

# What a lane answers instead of the instant at which its batch ends: the processes have to go on.
STUCK = -1.0


class Chunk:
    """A piece of a prompt, as execution-time models see it."""

    __slots__ = ("context", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = self.context = 0


class Lane:
    """The batches of one replica.

    Attributes
    ----------
    waiting : deque of Row
        Not admitted yet, in order of arrival.
    run : DecodeRun
        The run of decodes under way, if there is one.
    """

    def __init__(
        self,
        replica: Replica,
        completions: Completions,
        horizon: list[float],
        make: Callable[[int], Request],
    ) -> None:
        self.replica = replica
        self.waiting: deque[Row] = deque()
        self.run = DecodeRun(replica)
        self.is_open = False
        self.arrived_at = -inf
        self._make = make
        self._completions = completions
        self._horizon = horizon
        self._batches = self._execute()
        next(self._batches)
        self.send = self._batches.send

    def note_arrival(self, now: float) -> bool:
        """Have the run under way heed a request that arrives `now`; return if it ends earlier."""
        run = self.run
        if self.waiting:
            # Who waits already cannot be admitted, so that who comes behind cannot.
            run.arrivals.append(now)
            return False
        num_steps = run.num_steps
        run.cut(now)
        return run.num_steps < num_steps

    def close(self) -> None:
        """Leave everything to the processes of the replica."""
        self._batches.close()

    def _execute(self) -> Generator[float, float, None]:
        """Execute batches.

        Sent the present instant, end the batch under way if there is one, form the next and
        answer when that ends: infinity if there is none. What ends before the horizon is not
        answered; it goes on.
        """
        replica, run, horizon, waiting = self.replica, self.run, self._horizon, self.waiting
        env, pool, stage, timeline = replica.env, replica.pool, replica.stages[0], replica.timeline
        stage_time, index = stage.stage_time, replica.replica_id
        scheduler: Any = replica.scheduler
        block_size, num_blocks, watermark = (
            pool.block_size,
            pool.num_blocks,
            pool.num_watermark_blocks,
        )
        max_num_seqs, max_batch_size = scheduler.max_num_seqs, scheduler.max_batch_size
        is_mixed = isinstance(scheduler, SarathiScheduler)  # decodes and prompts in one batch
        max_tokens = scheduler.chunk_size if is_mixed else scheduler.max_num_batched_tokens
        members, ends = self._completions.members, self._completions.ends
        num_outstanding, many = self._completions.num_outstanding, self._completions.many

        finishing: dict[int, list[Member]] = {}
        finishes: list[int] = []
        phases = [0] * block_size
        size = iteration = processed = 0  # of the decode set: members, steps, tokens
        executed = last_end = 0.0
        is_partial = is_partial_taken = is_partial_skipped = False
        partial, done, scheduled_at, spent, gap, since = (0, 0, 0, 0.0), 0, 0.0, 0.0, 0.0, 0.0
        batch: Any = Batch()  # the one under way, again and again
        chunks: list[Chunk] = []
        spare: list[Chunk] = []  # used again and again
        whole: list[tuple[Row, float, float, float]] = []  # whose prompt ends in this batch
        num_decodes = num_tokens = num_running = context = pairs = 0
        duration = 0.0
        is_formed = False
        free = least = num_blocks
        busy = usage = usage_since = 0.0
        num_completed = num_batches = num_context = num_pairs = 0
        num_prefill_tokens = num_decode_tokens = 0
        now = yield inf
        try:
            while True:
                if is_formed:
                    # -- BATCH_STAGE_END and BATCH_END
                    is_formed = False
                    is_end_only = now == END_ONLY
                    if is_end_only:
                        now = env._now
                    if run.num_steps:
                        num_steps = run.num_steps
                        blocks, executed, busy, usage = run.end(num_steps, usage)
                        free -= blocks
                        if free < least:
                            least = free
                        iteration += num_steps
                        processed += num_steps * size
                        num_batches += num_steps
                        num_steps -= 1  # the first was counted when it was formed
                        num_decode_tokens += num_steps * size
                        context = num_steps * context + num_steps * (num_steps + 1) // 2 * size
                        num_context += context
                        num_pairs += context
                    else:
                        busy += duration
                        usage += (num_blocks - free) * (now - usage_since)
                        num_batches += 1
                        if num_decodes:
                            iteration += 1
                            processed += num_decodes
                            executed += duration
                    usage_since = now
                    if num_decodes:
                        last_end = now
                        if iteration in finishing:
                            finished = finishing.pop(iteration)
                            for member in finished:
                                length = member[1] + member[2]
                                phases[(iteration + 1 - length) % block_size] -= 1
                                processed -= length
                                free -= -(length - 1) // block_size
                            size -= len(finished)
                            num_outstanding[index] -= len(finished)
                            num_completed += len(finished)
                            members += finished
                            ends.append((now, executed, index, len(finished)))
                            if len(members) >= many:
                                horizon[0] = -inf  # come back, so that they can be taken away
                            while finishes and finishes[0] <= iteration:
                                heappop(finishes)
                    if chunks:
                        if is_partial_taken:
                            spent += duration
                            since = now
                        for row, at, before, waited in whole:
                            before += duration
                            _, prompt, output, _ = row
                            if output == 1:
                                free -= -prompt // block_size
                                members.append((*row, at, now, before, waited, now, executed, 0))
                                ends.append((now, executed, index, 1))
                                num_outstanding[index] -= 1
                                num_completed += 1
                                continue
                            if not size:
                                iteration = processed = 0
                                executed = 0.0
                            size += 1
                            processed += prompt + 1
                            phases[(iteration - prompt) % block_size] += 1
                            last = iteration + output - 1
                            member = (*row, at, now, before, waited, now, executed, last)
                            if last in finishing:
                                finishing[last].append(member)
                            else:
                                finishing[last] = [member]
                                heappush(finishes, last)
                    if is_end_only:
                        now = yield nan

                # -- REPLICA_SCHEDULE
                if now != usage_since:
                    usage += (num_blocks - free) * (now - usage_since)
                    usage_since = now
                num_running = size + is_partial
                num_decodes = size
                if (
                    not is_mixed
                    and waiting
                    and num_running < max_num_seqs
                    and free - -(-waiting[0][1] // block_size) >= watermark
                ):
                    num_decodes = 0  # prompts go first, and alone
                left, room = max_tokens, max_batch_size
                context = 0
                if num_decodes:
                    blocks = phases[iteration % block_size]
                    if size + is_partial > room or free <= blocks:
                        env._now = now
                        yield STUCK  # somebody has to wait or to give way
                        return
                    free -= blocks
                    context = processed + size
                    left -= size
                    room -= size
                num_tokens = num_decodes
                batch.decode_context = pairs = context
                chunks.clear()
                whole.clear()
                is_partial_taken = False
                is_partial_skipped = is_partial and left <= 0
                while left > 0:
                    if is_partial:
                        gap += now - since
                        length = min(partial[1] - done, left)
                    elif waiting and room and num_running != max_num_seqs:
                        partial = waiting[0]
                        length = partial[1]
                        blocks = -(-length // block_size)
                        if free - blocks < watermark:
                            break
                        if length > left:
                            if not is_mixed:
                                break
                            length = left
                        waiting.popleft()
                        free -= blocks
                        num_running += 1
                        scheduled_at, spent, gap, done = now, 0.0, 0.0, 0
                    else:
                        break
                    done += length
                    left -= length
                    room -= 1
                    num_tokens += length
                    context += done
                    pairs += length * done - length * (length - 1) // 2
                    if len(chunks) == len(spare):
                        spare.append(Chunk())
                    chunk = spare[len(chunks)]
                    chunk.num_tokens, chunk.context = length, done
                    chunks.append(chunk)
                    is_partial = is_partial_taken = done < partial[1]
                    if not is_partial:
                        whole.append((partial, scheduled_at, spent, gap))
                if not num_tokens:
                    env._now = now
                    now = yield inf
                    continue
                is_formed = True
                if free < least:
                    least = free
                num_prefill_tokens += num_tokens - num_decodes
                num_decode_tokens += num_decodes
                num_pairs += pairs
                num_context += context
                batch.prefills = chunks
                batch.num_decodes = num_decodes
                batch.num_tokens = num_tokens
                batch.total_context = context
                batch.num_attention_pairs = pairs
                if now >= timeline.next_at:
                    timeline.sample(
                        now, num_running, len(waiting), (num_blocks - free) / num_blocks
                    )

                # -- REPLICA_STAGE_SCHEDULE
                is_planned = False
                if num_decodes and not chunks and not is_partial:
                    num_steps = 1 + block_size * max(0, (free - 1) // num_decodes)
                    num_steps = min(finishes[0] - iteration, num_steps)
                    state = (
                        num_decodes,
                        context,
                        iteration,
                        executed,
                        busy,
                        phases,
                        num_blocks - free,
                        num_running,
                        len(waiting),
                    )
                    is_planned = run.plan(now, num_steps, state)
                if is_planned:
                    ends_at = run.ends[run.num_steps - 1]
                else:
                    duration = nan
                    duration = stage_time(batch, 0)
                    if not 0.0 <= duration < inf:
                        env._now = now
                        yield STUCK  # the stage says what is wrong
                        return
                    ends_at = now + duration
                if ends_at < horizon[0] and not env.is_interrupted:
                    now = ends_at
                else:
                    env._now = now
                    now = yield ends_at
        finally:
            batches = []
            cohort = Cohort(block_size)
            if is_formed:
                # Of the batch under way nothing counts before its end.
                num_prefill_tokens -= num_tokens - num_decodes
                num_decode_tokens -= num_decodes
                num_context -= context
                num_pairs -= pairs
                started_at = now
                if run.num_steps:
                    num_steps, started_at, duration = run.under_way(env._now)
                    run.num_steps = 0
                    if num_steps:
                        blocks, executed, busy, usage = run.end(num_steps, usage)
                        free -= blocks + phases[(iteration + num_steps) % block_size]
                        if started_at >= timeline.next_at:
                            num_waiting = run.num_waiting_at(started_at)
                            in_use = (num_blocks - free) / num_blocks
                            timeline.sample(started_at, num_running, num_waiting, in_use)
                        usage_since = last_end = started_at
                        iteration += num_steps
                        num_batches += num_steps
                        num_decode_tokens += num_steps * size
                        context = num_steps * context + num_steps * (num_steps - 1) // 2 * size
                        num_context += context
                        num_pairs += context
                prefills = list(whole)
                if is_partial_taken:
                    prefills.append((partial, scheduled_at, spent, gap))
                taken = []
                for prefill, chunk in zip(prefills, chunks, strict=True):
                    num_tokens = chunk.context - chunk.num_tokens
                    taken.append((Partial(*prefill, started_at, num_tokens), chunk.num_tokens))
                end = started_at + duration
                in_batch = cohort if num_decodes else None
                batches = [
                    BatchUnderWay(in_batch, taken, started_at, [end], [started_at], [duration])
                ]
            cohort.members = {
                member[0]: member for member in sorted(chain.from_iterable(finishing.values()))
            }
            cohort.phases, cohort.iteration, cohort.processed = phases, iteration, processed
            cohort.execution_time, cohort.last_end = executed, last_end
            pool.num_free, pool.num_free_least = free, least
            pool._usage_integral, pool._usage_since = usage, usage_since
            stage.busy_time = busy
            replica.num_batches = replica.num_batches_formed = num_batches
            replica.num_prefill_tokens = num_prefill_tokens
            replica.num_decode_tokens = num_decode_tokens
            replica.num_attention_pairs, replica.num_context_tokens = num_pairs, num_context
            replica.num_outstanding = num_outstanding[index]
            replica.num_requests = num_outstanding[index] + num_completed
            running: list[Entry] = []
            if size and not (is_formed and num_decodes):
                running.append(cohort)
            if is_partial and not (is_formed and is_partial_taken):
                left = Partial(partial, scheduled_at, spent, gap, since, done)
                running.insert(0 if is_partial_skipped else 1, left)
            # Else as the end of the stage and that of the batch have it.
            num_schedules = 0 if is_formed or not (waiting or running) else 2
            leave(replica, waiting, running, batches, self._make, num_schedules)
