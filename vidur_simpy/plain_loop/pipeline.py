"""One replica of several pipeline stages in the plain loop, under `sarathi`.

A stage is a recurrence: it begins a batch when the batch has come and the one before is done. So
all that happens to a batch is known when it is formed, and only two instants are left to come to:
the end of its first stage, when the next may be formed, and its end.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import accumulate, chain, repeat
from math import inf, nan
from typing import Any, TypeAlias

from vidur_simpy.entities import Batch
from vidur_simpy.plain_loop.cohorts import Cohort, Entry, Prompt, gather, kept
from vidur_simpy.plain_loop.completions import Row
from vidur_simpy.plain_loop.lane import END_ONLY, STUCK, Lane
from vidur_simpy.plain_loop.leaving import BatchUnderWay, leave
from vidur_simpy.plain_loop.shortage import take_scarce

__all__ = ["PipelineLane"]

# So many equal numbers add up, one after the other, to their product: to the last bit.
_SUM_IS_PRODUCT = 5


UnderWay: TypeAlias = tuple[
    float, Cohort | None, list[Prompt], float, list[float], float, tuple[float, ...], float
]
"""A batch in the pipeline: when it ends; what decodes; prompts; when it was formed; when its stages
end; their duration if they are alike, else 0, and their durations if they are not; the sum of the
durations. Times in seconds."""


class PipelineLane(Lane):
    """The batches of a replica of several stages, as many at a time."""

    def _execute(self) -> Generator[float, float, None]:
        """Execute batches; closed, leave everything to the processes of the replica."""
        replica, horizon, waiting = self.replica, self._horizon, self.waiting
        env, pool, stages, timeline = replica.env, replica.pool, replica.stages, replica.timeline
        stage_time, index, num_stages = stages[0].stage_time, replica.replica_id, len(stages)
        scheduler: Any = replica.scheduler
        block_size, num_blocks = pool.block_size, pool.num_blocks
        admissible, chunk_size = num_blocks - pool.num_watermark_blocks, scheduler.chunk_size
        max_num_seqs, max_batch_size = scheduler.max_num_seqs, scheduler.max_batch_size
        scarce_from, restarts = num_blocks - max_batch_size, self._restarts
        members, ends = self._completions.members, self._completions.ends
        num_outstanding, many = self._completions.num_outstanding, self._completions.many
        is_alike = getattr(stage_time, "is_alike_on_all_stages", False)
        numbers, factor = range(num_stages), float(num_stages)

        running: list[Entry] = []
        under_way: list[UnderWay] = []  # few: a list is faster than a deque
        batch: Any = Batch()  # the one to be formed, again and again
        no_prompts: list[Prompt] = []
        duration = 0.0
        durations: tuple[float, ...] = ()
        # When each stage is done with the batch formed last, and when it was with the one ended.
        free_at = stage_ends = [0.0] * num_stages
        busy, busy_time = [0.0] * num_stages, 0.0
        num_running = num_completed = 0
        used = most_used = 0
        usage = usage_since = 0.0
        num_batches = num_context = num_pairs = num_prefill_tokens = num_decode_tokens = 0
        sample_at = timeline.next_at
        ended_at = first_free_at = -inf
        is_formed = False  # a batch that is not under way yet
        ends_at, is_full = inf, False  # of the oldest batch; whether each stage may have one
        now = -inf
        try:
            now = yield inf
            is_end_only, until = False, horizon[0]
            while True:
                while ends_at <= now:
                    # -- BATCH_END
                    free_before = stage_ends
                    (
                        ended_at,
                        cohort,
                        taken,
                        formed_at,
                        stage_ends,
                        duration,
                        durations,
                        executed,
                    ) = under_way.pop(0)
                    ends_at, is_full = under_way[0][0] if under_way else inf, False
                    usage += used * (ended_at - usage_since)
                    usage_since = ended_at
                    num_batches += 1
                    if is_alike:
                        busy_time += duration
                    else:
                        busy = [
                            time + duration for time, duration in zip(busy, durations, strict=True)
                        ]
                    if cohort is not None:
                        cohort.execution_time += executed
                        cohort.last_end = ended_at
                        if cohort.iteration in cohort.finishing:
                            finished = cohort.finish()
                            for member in finished:
                                used += -(member[1] + member[2] - 1) // block_size
                            members += finished
                            ends.append((ended_at, cohort.execution_time, index, len(finished)))
                            num_running -= len(finished)
                            num_completed += len(finished)
                            num_outstanding[index] -= len(finished)
                            if len(members) >= many:
                                until = -inf  # come back, so that they can be taken away
                        if cohort.members:
                            running.append(cohort)
                    for prompt in taken:
                        gap = prompt.preempted_time + (formed_at - prompt.last_stage_end)
                        spent, end = prompt.execution_time, formed_at
                        times = durations or (duration,) * num_stages
                        for stage in numbers:
                            free_then = free_before[stage]
                            if free_then > end:
                                gap += free_then - end
                            spent += times[stage]
                            end = stage_ends[stage]
                        row = prompt.row
                        if prompt.context < row[1]:
                            prompt.preempted_time, prompt.execution_time = gap, spent
                            prompt.last_stage_end = ended_at
                            running.append(prompt)
                            continue
                        num_left = row[2] - 1
                        first: Any = ended_at
                        if row[0] in restarts and restarts[row[0]].first_token_at is not None:
                            first = restarts[row[0]].first_token_at
                        member = (
                            *row,
                            prompt.scheduled_at,
                            first,
                            spent,
                            gap,
                            ended_at,
                            0.0,
                            num_left,
                        )
                        if num_left:
                            running.append(member)
                            continue
                        used += -row[1] // block_size
                        members.append(member)
                        ends.append((ended_at, 0.0, index, 1))
                        num_running -= 1
                        num_completed += 1
                        num_outstanding[index] -= 1
                if is_end_only:
                    now = yield nan
                    is_end_only = False

                # -- REPLICA_SCHEDULE
                if first_free_at <= now and not is_full:
                    if now != usage_since:
                        usage += used * (now - usage_since)
                        usage_since = now
                    cohort, taken = None, no_prompts
                    num_decodes = context = 0
                    room = chunk_size
                    if running:
                        head, prompts, is_scarce = running[0], no_prompts, used >= scarce_from
                        if is_scarce:  # somebody may have to give way
                            cohort, prompts, running, victims, free, fewest = take_scarce(
                                running, max_batch_size, num_blocks - used, block_size
                            )
                            used, most_used = num_blocks - free, max(most_used, num_blocks - fewest)
                            num_running -= len(victims)
                            waiting.extendleft(map(self._restart, victims))
                        elif len(running) == 1 and type(head) is Cohort:
                            cohort = head
                            running.clear()
                        else:
                            cohort, prompts, running = gather(running, max_batch_size, block_size)
                        if cohort is not None:
                            num_decodes = len(cohort.members)
                            iteration = cohort.iteration
                            if not is_scarce:
                                used += cohort.phases[iteration % block_size]
                            # Nobody looks at a cohort under way: it is as after the step.
                            cohort.iteration = iteration + 1
                            cohort.processed = context = cohort.processed + num_decodes
                            room -= num_decodes
                        if prompts:
                            taken, skipped = [], []
                            for prompt in prompts:
                                length = min(prompt.row[1] - prompt.context, room)
                                if length > 0:
                                    prompt.num_tokens = length
                                    prompt.context += length
                                    taken.append(prompt)
                                    room -= length
                                else:
                                    skipped.append(prompt)
                            if skipped or running:
                                running = kept(skipped, running)
                        elif running:
                            running = kept([], running)
                    while (
                        waiting
                        and room > 0
                        and num_running != max_num_seqs
                        and num_decodes + len(taken) != max_batch_size
                    ):
                        row = waiting[0]
                        blocks = -(-row[1] // block_size)
                        restart = restarts.get(row[0])
                        if used + blocks > admissible and (restart is None or used):
                            break
                        waiting.popleft()
                        used += blocks
                        num_running += 1
                        length = min(row[1], room)
                        room -= length
                        prompt = Prompt(row, now, length)
                        if restart is not None:
                            prompt.take_up(restart)
                        taken = [*taken, prompt]
                    if cohort is not None or taken:
                        batch.num_decodes = batch.num_tokens = num_decodes
                        batch.decode_context = batch.total_context = context
                        batch.num_attention_pairs = context
                        batch.prefills = taken
                        num_decode_tokens += num_decodes
                        num_context += context
                        if taken:
                            num_tokens = done = pairs = 0
                            for prompt in taken:
                                length, context = prompt.num_tokens, prompt.context
                                num_tokens += length
                                done += context
                                pairs += length * context - length * (length - 1) // 2
                            batch.num_tokens += num_tokens
                            batch.total_context += done
                            batch.num_attention_pairs += pairs
                            num_prefill_tokens += num_tokens
                            num_context += done
                            num_pairs += pairs - done
                        if used > most_used:
                            most_used = used
                        if now >= sample_at:
                            sample_at = timeline.sample(
                                now, num_running, len(waiting), used / num_blocks
                            )
                        # -- BATCH_STAGE_ARRIVAL to BATCH_STAGE_END of all stages
                        is_formed = True
                        ends_before, free_at = free_at, []
                        end = now
                        if is_alike:
                            try:
                                duration = shortest = stage_time(batch, 0)
                            except Exception:  # which the stage runs into, too
                                duration = shortest = nan
                            for free_then in ends_before:
                                if free_then > end:
                                    end = free_then
                                end += duration
                                free_at.append(end)
                            if num_stages <= _SUM_IS_PRODUCT:
                                executed = factor * duration
                            else:
                                *_, executed = accumulate(repeat(duration, num_stages))
                        else:
                            try:
                                durations = tuple(map(stage_time, repeat(batch), numbers))
                            except Exception:  # which the stage runs into, too
                                durations = (nan,) * num_stages
                            shortest, executed = min(durations), 0.0
                            for time, free_then in zip(durations, ends_before, strict=True):
                                if free_then > end:
                                    end = free_then
                                end += time
                                executed += time
                                free_at.append(end)
                        under_way.append(
                            (end, cohort, taken, now, free_at, duration, durations, executed)
                        )
                        is_formed = False
                        first_free_at = free_at[0]
                        if ends_at == inf:
                            ends_at = end
                        is_full = len(under_way) == num_stages
                        # Refused: what is no time (NaN, negative, infinite), a time of zero, and
                        # one so small beside the clock that half of it is lost, so that two ends
                        # would fall together. `free_then` is the last stage's.
                        if not free_then < end < end + 0.5 * shortest < inf:
                            env._now = now
                            yield STUCK  # nothing may end at once, and the stage says what is wrong
                            return
                    else:
                        first_free_at = ended_at = self.arrived_at = -inf  # no more attempts now

                if is_full:
                    next_at = ends_at if ends_at > first_free_at else first_free_at
                else:
                    next_at = first_free_at if first_free_at > now else ends_at
                if next_at < until and not env.is_interrupted:
                    now = next_at  # what ends before is seen by nobody until then
                elif ends_at < until and not env.is_interrupted:
                    now = ends_at
                else:
                    self.is_open = first_free_at <= now and not is_full
                    env._now = now
                    now = yield min(next_at, ends_at)
                    until, is_end_only = horizon[0], now == END_ONLY
                    if is_end_only:
                        now = env._now
        finally:
            if is_formed:  # and its execution time could not be told: now the stage says why
                env._now = now
                under_way.append((nan, cohort, taken, now, [nan], nan, (), nan))
            is_over = now == env._now
            now = env._now
            batches, counted = _left_half_way(under_way, stage_ends)
            num_prefill_tokens -= counted[0]
            num_decode_tokens -= counted[1]
            num_context -= counted[2]
            num_pairs -= counted[3]
            for each, time in zip(
                stages, [busy_time] * num_stages if is_alike else busy, strict=True
            ):
                each.busy_time = time
            self._note(
                free=num_blocks - used,
                least=num_blocks - most_used,
                usage=usage,
                usage_since=usage_since,
                num_batches=num_batches,
                num_prefill_tokens=num_prefill_tokens,
                num_decode_tokens=num_decode_tokens,
                num_pairs=num_context + num_pairs,
                num_context=num_context,
                num_completed=num_completed,
            )
            num_schedules = 0
            if first_free_at <= now and not is_full:
                num_schedules = (ended_at, first_free_at, self.arrived_at).count(now)
            replica.num_restarts = self._num_restarts(_rows_of(waiting, running, under_way))
            leave(
                replica,
                waiting,
                running,
                batches,
                self._make,
                num_schedules,
                is_over=is_over,
                restarts=restarts,
            )


def _left_half_way(
    under_way: list[UnderWay], ends_before: list[float]
) -> tuple[list[BatchUnderWay], tuple[int, int, int, int]]:
    """Return the batches in the pipeline, as the processes go on with them.

    Nothing of them counts before their ends. So return, too, what was counted when they were
    formed: prompt tokens, decodes, tokens of context, and pairs beyond these.
    """
    num_prefill_tokens = num_decodes = num_context = num_pairs = 0
    batches, num_stages = [], len(ends_before)
    for _, cohort, taken, formed_at, ends, duration, durations, _ in under_way:
        if cohort is not None:
            size = len(cohort.members)
            num_decodes += size
            num_context += cohort.processed
            cohort.iteration -= 1
            cohort.processed -= size
        for prompt in taken:
            num_prefill_tokens += prompt.num_tokens
            num_context += prompt.context
            num_pairs += prompt.num_pairs() - prompt.context
        times = durations or (duration,) * num_stages
        batches.append(BatchUnderWay(cohort, taken, formed_at, ends, ends_before, times))
        ends_before = ends
    return batches, (num_prefill_tokens, num_decodes, num_context, num_pairs)


def _rows_of(
    waiting: Iterable[Row], running: list[Entry], under_way: list[UnderWay]
) -> Iterator[int]:
    """Yield the rows of all requests that are not complete."""
    for row in waiting:
        yield row[0]
    for entry in chain(running, *((each[1], *each[2]) for each in under_way)):
        if isinstance(entry, Cohort):
            yield from entry.members
        elif entry is not None:
            yield entry.row[0] if isinstance(entry, Prompt) else entry[0]
