"""One replica of one stage in the plain loop, under `sarathi` or `vllm`.

A request is a `Row` of the workload's table. One that decodes is a `Member`; its future is known
when it joins, so that it is written into the bucket of the iteration of its last token and not
touched until then.
"""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappop, heappush
from math import inf, isnan, nan
from typing import Any

from vidur_simpy.entities import Batch
from vidur_simpy.plain_loop.cohorts import Cohort, Entry, Prompt
from vidur_simpy.plain_loop.completions import Row
from vidur_simpy.plain_loop.lane import END_ONLY, STUCK, Lane
from vidur_simpy.plain_loop.leaving import BatchUnderWay, leave
from vidur_simpy.plain_loop.shortage import leave_scarce
from vidur_simpy.replica_scheduler.sarathi import SarathiScheduler

__all__ = ["SingleStageLane"]


class Chunk:
    """A piece of a prompt, as execution-time models see it."""

    __slots__ = ("context", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = self.context = 0


class SingleStageLane(Lane):
    """The batches of a replica of one stage, one after the other."""

    def _execute(self) -> Generator[float, float, None]:
        """Execute batches; closed, leave everything to the processes of the replica."""
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
        completed, ends = self._completions.members, self._completions.ends
        num_outstanding, many = self._completions.num_outstanding, self._completions.many

        restarts = self._restarts
        cohort = Cohort(block_size)  # whose numbers are variables here
        decoding, finishing, phases = cohort.members, cohort.finishing, cohort.phases
        # Of the decode set: members, steps, tokens; time of its steps and when the last one ended.
        # Of a prompt that goes on: the tokens computed; when it was first scheduled; its execution
        # and preempted time before the batch under way; when its last batch ended.
        finishes: list[int] = []
        size = iteration = processed = 0
        executed = last_end = 0.0
        is_partial = is_partial_taken = is_partial_skipped = False
        partial: Row = (0, 0, 0, 0.0)
        done, scheduled_at, spent, gap, since = 0, 0.0, 0.0, 0.0, 0.0
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
        try:
            now = yield inf
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
                                del decoding[member[0]]
                                length = member[1] + member[2]
                                phases[(iteration + 1 - length) % block_size] -= 1
                                processed -= length
                                free -= -(length - 1) // block_size
                            size -= len(finished)
                            num_outstanding[index] -= len(finished)
                            num_completed += len(finished)
                            completed += finished
                            ends.append((now, executed, index, len(finished)))
                            if len(completed) >= many:
                                horizon[0] = -inf  # come back, so that they can be taken away
                            while finishes and finishes[0] <= iteration:
                                heappop(finishes)
                    if chunks:
                        if is_partial_taken:
                            spent += duration
                            since = now
                        for row, at, before, waited in whole:
                            before += duration
                            number, prompt, output, _ = row
                            first: Any = now
                            if number in restarts and restarts[number].first_token_at is not None:
                                first = restarts[number].first_token_at
                            if output == 1:
                                free -= -prompt // block_size
                                completed.append(
                                    (*row, at, first, before, waited, now, executed, 0)
                                )
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
                            member = (*row, at, first, before, waited, now, executed, last)
                            decoding[number] = member
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
                num_decodes = size
                if (
                    not is_mixed
                    and waiting
                    and size < max_num_seqs
                    and self._fits(waiting[0], free)
                ):
                    num_decodes = 0  # prompts go first, and alone
                context = 0
                is_short = False
                if num_decodes:
                    blocks = phases[iteration % block_size]
                    if free > blocks:
                        free -= blocks
                    else:
                        # Not enough for all: the last give way, one request after the other.
                        is_short = True
                        cohort.iteration, cohort.processed = iteration, processed
                        cohort.execution_time, cohort.last_end = executed, last_end
                        partly = None
                        if is_partial:
                            partly = Prompt(partial, scheduled_at, done).with_times(
                                spent, gap, since
                            )
                        position = 0 if is_partial_skipped else size
                        victims, free, fewest = leave_scarce(
                            cohort, partly, position, free, max_batch_size
                        )
                        waiting.extendleft(map(self._restart, victims))
                        is_partial = is_partial and partly not in victims
                        least = min(least, fewest)
                        processed = cohort.processed
                        num_decodes = size = len(decoding)
                    context = processed + size
                num_running = size + is_partial
                # Decodes of vllm are alone, whoever has room now.
                left = max_tokens - num_decodes if is_mixed or not num_decodes else 0
                room = max_batch_size - num_decodes
                num_tokens = num_decodes
                batch.decode_context = pairs = context
                chunks.clear()
                whole.clear()
                is_partial_taken = False
                is_partial_skipped = is_partial and left <= 0
                while left > 0:
                    if is_partial:
                        gap += now - since
                        length = partial[1] - done
                        if length > left:
                            length = left
                    elif waiting and room and num_running != max_num_seqs:
                        partial = waiting[0]
                        length = partial[1]
                        blocks = -(-length // block_size)
                        restart = restarts.get(partial[0])
                        if free - blocks < watermark and (restart is None or free != num_blocks):
                            break
                        if length > left:
                            if is_mixed:
                                length = left
                            elif chunks or restart is None:
                                break  # only a restarted prompt may have outgrown the limit
                        waiting.popleft()
                        free -= blocks
                        num_running += 1
                        scheduled_at, spent, gap, done = now, 0.0, 0.0, 0
                        if restart is not None:
                            scheduled_at, _, spent, gap, since, _ = restart
                            gap += now - since
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
                if num_decodes and not (chunks or is_partial or is_short):
                    while finishes[0] not in finishing:
                        heappop(finishes)
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
                    ends_at = run.ends_at
                else:
                    try:
                        duration = stage_time(batch, 0)
                    except Exception:  # which the stage runs into, too
                        duration = nan
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
            prefills = []
            if is_formed:
                # Of the batch under way nothing counts before its end.
                num_prefill_tokens -= num_tokens - num_decodes
                num_decode_tokens -= num_decodes
                num_context -= context
                num_pairs -= pairs
                started_at = now
                if isnan(duration):  # it could not be told: now the stage says why
                    env._now = now
                if run.num_steps:
                    num_steps, blocks, executed, busy, usage = run.stop(env._now, usage)
                    started_at, duration = run.under_way
                    free -= blocks
                    if num_steps:
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
                taken = _pieces(prefills, chunks, started_at)
                end = started_at + duration
                in_batch = cohort if num_decodes else None
                batches = [
                    BatchUnderWay(in_batch, taken, started_at, [end], [started_at], [duration])
                ]
            cohort.iteration, cohort.processed = iteration, processed
            cohort.execution_time, cohort.last_end = executed, last_end
            stage.busy_time = busy
            self._note(
                free=free,
                least=min(least, free),
                usage=usage,
                usage_since=usage_since,
                num_batches=num_batches,
                num_prefill_tokens=num_prefill_tokens,
                num_decode_tokens=num_decode_tokens,
                num_pairs=num_pairs,
                num_context=num_context,
                num_completed=num_completed,
            )
            running: list[Entry] = []
            if size and not (is_formed and num_decodes):
                running.append(cohort)
            if is_partial and not (is_formed and is_partial_taken):
                entry = Prompt(partial, scheduled_at, done).with_times(spent, gap, since)
                running.insert(0 if is_partial_skipped else 1, entry)
            # Else as the end of the stage and that of the batch have it.
            num_schedules = 0 if is_formed or not (waiting or running) else 2
            live = {row[0] for row in waiting} | decoding.keys()
            live |= {prefill[0][0] for prefill in prefills}
            replica.num_restarts = self._num_restarts(live | {partial[0]} if is_partial else live)
            leave(replica, waiting, running, batches, self._make, num_schedules, restarts=restarts)

    def _fits(self, row: Row, free: int) -> bool:
        """Whether so many free blocks are enough to admit a prompt; see `reserve_prompt`."""
        pool = self.replica.pool
        left = free - -(-row[1] // pool.block_size)
        return left >= pool.num_watermark_blocks or (
            row[0] in self._restarts and free == pool.num_blocks
        )


def _pieces(
    prefills: list[tuple[Row, float, float, float]], chunks: list[Chunk], started_at: float
) -> list[Prompt]:
    """Return the prompts of the batch under way, whose last stage ended as it was formed."""
    taken = []
    for (row, at, before, waited), chunk in zip(prefills, chunks, strict=True):
        piece = Prompt(row, at, chunk.num_tokens)
        piece.context = chunk.context
        taken.append(piece.with_times(before, waited, started_at))
    return taken
