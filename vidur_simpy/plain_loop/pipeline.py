"""One replica of several pipeline stages in the plain loop, under `sarathi`.

A stage is a recurrence: it begins a batch when the batch has come and the one before is done. So
all that happens to a batch is known when it is formed, and only two instants are left to come to:
the end of its first stage, when the next may be formed, and its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from math import inf, nan
from typing import TYPE_CHECKING, Any, TypeAlias

from vidur_simpy.entities import Batch
from vidur_simpy.plain_loop.cohorts import Cohort, Entry, Partial, gather, kept
from vidur_simpy.plain_loop.lane import END_ONLY, STUCK, Chunk, Lane
from vidur_simpy.plain_loop.leaving import BatchUnderWay, leave

if TYPE_CHECKING:
    pass

__all__ = ["PipelineLane"]


UnderWay: TypeAlias = tuple[
    float,
    Cohort | None,
    int,
    list[tuple[Partial, int]],
    float,
    list[float],
    list[float],
    tuple[float, ...],
    float,
]
"""A batch in the pipeline: when it ends; what decodes, and how many; prompts with the tokens of
each that are computed; when it was formed; when its stages end, and when those of the batch before
do; their durations, and the sum of them. Times in seconds."""


class PipelineLane(Lane):
    """The batches of a replica of several stages, as many at a time."""

    def _execute(self) -> Generator[float, float, None]:
        """Execute batches; closed, leave everything to the processes of the replica."""
        replica, horizon, waiting = self.replica, self._horizon, self.waiting
        env, pool, stages, timeline = replica.env, replica.pool, replica.stages, replica.timeline
        stage_time, index, num_stages = stages[0].stage_time, replica.replica_id, len(stages)
        scheduler: Any = replica.scheduler
        block_size, num_blocks = pool.block_size, pool.num_blocks
        watermark, chunk_size = pool.num_watermark_blocks, scheduler.chunk_size
        max_num_seqs, max_batch_size = scheduler.max_num_seqs, scheduler.max_batch_size
        members, ends = self._completions.members, self._completions.ends
        num_outstanding = self._completions.num_outstanding
        no_partials: list[Partial] = []
        numbers = range(num_stages)

        running: list[Entry] = []
        under_way: deque[UnderWay] = deque()
        batch: Any = Batch()  # the one to be formed, again and again
        spare = [Chunk() for _ in range(max_batch_size + num_stages)]
        free_at = [0.0] * num_stages  # when each stage is done with the last batch
        is_alike = getattr(stage_time, "is_alike_on_all_stages", False)
        busy, busy_time = [0.0] * num_stages, 0.0
        num_running = num_completed = 0
        num_due = 0  # REPLICA_SCHEDULE events of this instant, because of batches that ended
        free = least = num_blocks
        usage = usage_since = 0.0
        num_batches = num_context = num_pairs = num_prefill_tokens = num_decode_tokens = 0
        first_free_at = -inf
        now = yield inf
        try:
            while True:
                is_end_only = now == END_ONLY
                if is_end_only:
                    now = env._now
                while under_way and under_way[0][0] <= now:
                    # -- BATCH_END
                    (
                        _,
                        cohort,
                        num_decodes,
                        taken,
                        formed_at,
                        stage_ends,
                        ends_before,
                        durations,
                        executed,
                    ) = under_way.popleft()
                    usage += (num_blocks - free) * (now - usage_since)
                    usage_since = now
                    num_due += 1
                    num_batches += 1
                    if is_alike:
                        busy_time += durations[0]
                    else:
                        busy = [
                            time + duration for time, duration in zip(busy, durations, strict=True)
                        ]
                    if cohort is not None:
                        cohort.iteration += 1
                        cohort.processed += num_decodes
                        cohort.execution_time += executed
                        cohort.last_end = now
                        if cohort.iteration in cohort.finishing:
                            finished = cohort.finish()
                            for member in finished:
                                free -= -(member[1] + member[2] - 1) // block_size
                            members += finished
                            ends.append((now, cohort.execution_time, index, len(finished)))
                            num_running -= len(finished)
                            num_completed += len(finished)
                            num_outstanding[index] -= len(finished)
                        if cohort.members:
                            running.append(cohort)
                    for partial, length in taken:
                        gap, spent, end = partial.preempted_time, partial.execution_time, formed_at
                        if partial.num_tokens:
                            gap += formed_at - partial.last_stage_end
                        for duration, free_then, stage_end in zip(
                            durations, ends_before, stage_ends, strict=True
                        ):
                            if free_then > end:
                                gap += free_then - end
                            spent += duration
                            end = stage_end
                        partial.num_tokens += length
                        row = partial.row
                        if partial.num_tokens < row[1]:
                            partial.preempted_time, partial.execution_time = gap, spent
                            partial.last_stage_end = now
                            running.append(partial)
                            continue
                        num_left = row[2] - 1
                        member = (*row, partial.scheduled_at, now, spent, gap, now, 0.0, num_left)
                        if num_left:
                            running.append(member)
                            continue
                        free -= -row[1] // block_size
                        members.append(member)
                        ends.append((now, 0.0, index, 1))
                        num_running -= 1
                        num_completed += 1
                        num_outstanding[index] -= 1
                if is_end_only:
                    now = yield nan

                # -- REPLICA_SCHEDULE
                if first_free_at <= now and len(under_way) < num_stages:
                    if now != usage_since:
                        usage += (num_blocks - free) * (now - usage_since)
                        usage_since = now
                    cohort = None
                    partials = skipped = no_partials
                    if running:
                        if free <= max_batch_size:
                            env._now = now
                            yield STUCK  # soon somebody may have to give way
                            return
                        head = running[0]
                        if len(running) == 1 and isinstance(head, Cohort):
                            cohort, running = head, []
                        else:
                            cohort, partials, running = gather(running, max_batch_size, block_size)
                    num_decodes = context = 0
                    if cohort is not None:
                        num_decodes = len(cohort.members)
                        blocks = cohort.phases[cohort.iteration % block_size]
                        free -= blocks
                        context = cohort.processed + num_decodes
                    batch.num_decodes, batch.decode_context = num_decodes, context
                    pairs, num_tokens = context, num_decodes
                    room = chunk_size - num_decodes
                    taken = []
                    for partial in partials:
                        length = min(partial.row[1] - partial.num_tokens, room)
                        if length > 0:
                            taken.append((partial, length))
                            room -= length
                        else:
                            skipped = [*skipped, partial]
                    if skipped or running:
                        running = kept(skipped, running)
                    while (
                        waiting
                        and room > 0
                        and num_running != max_num_seqs
                        and num_decodes + len(taken) != max_batch_size
                    ):
                        row = waiting[0]
                        blocks = -(-row[1] // block_size)
                        if free - blocks < watermark:
                            break
                        waiting.popleft()
                        free -= blocks
                        num_running += 1
                        length = min(row[1], room)
                        room -= length
                        taken.append((Partial(row, now), length))
                    if cohort is not None or taken:
                        chunks = spare[: len(taken)]
                        for chunk, (partial, length) in zip(chunks, taken, strict=True):
                            chunk.num_tokens = length
                            chunk.context = done = partial.num_tokens + length
                            num_tokens += length
                            context += done
                            pairs += length * done - length * (length - 1) // 2
                        if free < least:
                            least = free
                        batch.prefills = chunks
                        batch.num_tokens, batch.total_context = num_tokens, context
                        batch.num_attention_pairs = pairs
                        if now >= timeline.next_at:
                            in_use = (num_blocks - free) / num_blocks
                            timeline.sample(now, num_running, len(waiting), in_use)
                        # -- BATCH_STAGE_ARRIVAL to BATCH_STAGE_END of all stages
                        num_decode_tokens += num_decodes
                        num_prefill_tokens += num_tokens - num_decodes
                        num_context += context
                        num_pairs += pairs
                        if is_alike:
                            durations = (stage_time(batch, 0),) * num_stages
                        else:
                            durations = tuple([stage_time(batch, stage) for stage in numbers])
                        ends_before = free_at
                        free_at = []
                        executed, end = 0.0, now
                        for duration, free_then in zip(durations, ends_before, strict=True):
                            if free_then > end:
                                end = free_then
                            end += duration
                            executed += duration
                            free_at.append(end)
                        under_way.append(
                            (
                                end,
                                cohort,
                                num_decodes,
                                taken,
                                now,
                                free_at,
                                ends_before,
                                durations,
                                executed,
                            )
                        )
                        first_free_at = free_at[0]
                        if not 0.0 < min(durations) <= end < inf:
                            env._now = now
                            yield STUCK  # nothing may end at once, and the stage says what is wrong
                            return
                    else:
                        first_free_at = -inf  # no more attempts at this instant
                    num_due = 0
                    self.arrived_at = -inf
                if under_way:
                    ends_at = under_way[0][0]
                    is_full = len(under_way) == num_stages
                    if not is_full and now < first_free_at < ends_at:
                        ends_at = first_free_at
                else:
                    ends_at, is_full = inf, False
                if ends_at < horizon[0] and not env.is_interrupted:
                    now = ends_at
                else:
                    self.is_open = first_free_at <= now and not is_full
                    env._now = now
                    now = yield ends_at
        finally:
            is_over = now == env._now
            now = env._now
            for _, cohort, num_decodes, taken, *_ in under_way:
                context = pairs = 0 if cohort is None else cohort.processed + num_decodes
                for partial, length in taken:
                    done = partial.num_tokens + length
                    context += done
                    pairs += length * done - length * (length - 1) // 2
                    num_prefill_tokens -= length
                num_decode_tokens -= num_decodes
                num_context -= context
                num_pairs -= pairs
            for stage, time in zip(
                stages, [busy_time] * num_stages if is_alike else busy, strict=True
            ):
                stage.busy_time = time
            self._note(
                free=free,
                least=least,
                usage=usage,
                usage_since=usage_since,
                num_batches=num_batches,
                num_prefill_tokens=num_prefill_tokens,
                num_decode_tokens=num_decode_tokens,
                num_pairs=num_pairs,
                num_context=num_context,
                num_completed=num_completed,
            )
            num_schedules = 0
            if first_free_at <= now and len(under_way) < num_stages:
                num_schedules = num_due + (first_free_at == now) + (self.arrived_at == now)
            batches = [
                BatchUnderWay(cohort, taken, formed_at, ends, ends_before, durations)
                for _, cohort, _, taken, formed_at, ends, ends_before, durations, _ in under_way
            ]
            leave(replica, waiting, running, batches, self._make, num_schedules, is_over=is_over)
