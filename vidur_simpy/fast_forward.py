"""The same outcome with fewer events, as long as nobody watches them.

The processes of `processes` are the specification; two shortcuts are taken when no event is
recorded or listened to, and simultaneous events are in their documented order.

*In place.* A batch on a stage is one event, its BATCH_STAGE_END. What follows at that instant (the
hop to the next stage, BATCH_END, the next REPLICA_SCHEDULE) is called instead of queued. Exact,
because the state between two instants is the one the processes leave behind, and a step whose
turn depends on other events of the instant is queued as ever unless nothing else is due. With one
stage even that one event is spared while nothing else is due before the batch ends.

*Runs.* When a batch only decodes and nothing can join, finish or run out of blocks for ``k``
iterations, they are one event at the end of the last. Durations come as a vector from the
execution-time model's ``decode_times``, instants and sums from the same left-to-right additions as
one by one. A request that arrives, an interrupt, a process that asks for the stage or a listener
cuts the run at the end of the iteration under way; whoever may look (a user's process, the end of
``run(until)``) finds the replica as if it had stepped, because the run is settled before.

Where batches are planned ahead, the one that waits behind the one under way moves along with it.

Iterations are taken one by one with several stages, with KV-parallel groups, under an
execution-time model without ``decode_times`` and under a replica scheduler without
``steady_steps``. `plain_loop` goes further for whole runs that nobody can look into.
"""

from __future__ import annotations

from bisect import bisect_left
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.entities import Batch
from vidur_simpy.errors import SimulationError
from vidur_simpy.kernel import EventType, Signal, TypedEvent
from vidur_simpy.sums import Numbers, added, running_sums

if TYPE_CHECKING:
    from vidur_simpy.processes import Replica, Stage

__all__ = ["LONGEST_RUN", "SHORTEST_RUN", "FastStage"]

# A run is planned for at most so many iterations; one that is cut leaves a shorter next one.
SHORTEST_RUN, LONGEST_RUN = 8, 4_096


class FastStage:
    """One pipeline stage in fewer events.

    Parameters
    ----------
    replica : Replica
    stage : Stage
        The stage whose state this one reads and leaves behind.
    """

    __slots__ = (
        "_decode_times",
        "_duration",
        "_durations",
        "_end",
        "_end_event",
        "_ends",
        "_env",
        "_is_alone",
        "_is_first",
        "_is_last",
        "_is_plain",
        "_limit",
        "_num_settled",
        "_replica",
        "_run",
        "_stage",
        "num_steps",
    )

    def __init__(self, replica: Replica, stage: Stage) -> None:
        env = stage.env
        self._env = env
        self._replica = replica
        self._stage = stage
        self._is_first = stage.stage_id == 0
        self._is_last = stage.stage_id == replica.num_stages - 1
        self._is_alone = replica.num_stages == 1
        # One batch after the other on one stage: the next begins where the last has ended.
        self._is_plain = self._is_alone and not replica.plans_ahead
        where = (replica.replica_id, stage.stage_id)
        self._end = Signal(env, EventType.BATCH_STAGE_END, where, self._ended)
        self._end_event: TypedEvent | None = None
        self._duration = 0.0
        self._decode_times: Any = None
        if self._is_alone and _knows_runs(replica.scheduler):
            self._decode_times = getattr(stage.stage_time, "decode_times", None)
        self._limit = SHORTEST_RUN
        self._durations: Numbers = ()
        self._ends: Numbers = ()
        self._num_settled = 0
        self._run = Batch()  # what iterates in the run under way
        self.num_steps = 0  # of the run under way

    # -- one batch -----------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Execute the first batch queued; the stage is idle."""
        stage = self._stage
        batch = stage.queue.popleft()
        if self._decode_times is None:  # runs are not known here
            self._duration = duration = stage.start(batch)
            stage.users.append(batch)
            self._end_event = self._end.at(now + duration, batch)
        else:
            self._wait_for_end(batch, self._begin(batch, now))

    def _begin(self, batch: Batch, now: float) -> float:
        """Execute a batch, or a run of which it is the first; return the instant of the end."""
        if self._is_plain and not batch.prefills and self.plan_run(batch, now):
            return self.run_ends_at
        self._duration = duration = self._stage.start(batch)
        return now + duration

    def resume(self, batch: Batch, duration: float) -> None:
        """Go on with a batch of so many seconds, or with the run under way."""
        self._duration = duration
        if self.num_steps:
            self._wait_for_end(batch, self.run_ends_at)
        elif 0.0 <= duration < inf:
            self._wait_for_end(batch, batch.stage_started_at + duration)
        else:  # which it has to be told about
            self._stage.queue.append(batch)
            self._stage.schedule.raise_now()

    def _wait_for_end(self, batch: Batch, ends_at: float) -> None:
        self._stage.users.append(batch)
        self._end_event = self._end.at(ends_at, batch)
        if self.num_steps:
            self._env.shortcuts[self] = None

    def _ended(self, event: TypedEvent) -> None:
        """At BATCH_STAGE_END: hand the batch on, take the next one, let the replica form one."""
        stage = self._stage
        batch: Batch = event._value
        self._end_event = None
        if self.num_steps:
            del self._env.shortcuts[self]
            self._duration = self.end_run()
        if not self._env.is_unobserved or stage.put_queue:
            stage.finish(batch, self._duration)
            return
        stage.users.clear()
        if self._is_plain:
            self._go_on(batch)
        else:
            self._hand_on(batch)

    def _go_on(self, batch: Batch) -> None:
        """End a batch, form the next, and so on until something else is due before its end."""
        env, stage, replica = self._env, self._stage, self._replica
        while True:
            now = env._now
            stage.note_end(batch, self._duration, now)
            replica.end_first_stage(batch)
            replica.end_batch(batch, now)
            if not (env.is_alone_at(now) and replica.may_form):
                replica.wake(2)
                return
            next_batch = replica.next_batch(now, 2)
            if next_batch is None:
                return
            batch = next_batch
            replica.pool.validate()
            ends_at = self._begin(batch, now)
            if env.is_interrupted or not env.is_alone_at(ends_at):
                replica.hold_first_stage()
                self._wait_for_end(batch, ends_at)
                return
            env._now = ends_at
            next(env._eid)  # the end that needed no event
            if self.num_steps:
                self._duration = self.end_run()

    def _hand_on(self, batch: Batch) -> None:
        """End a batch on one of several stages, or of a replica that plans ahead."""
        stage, now = self._stage, self._env._now
        stage.note_end(batch, self._duration, now)
        replica = self._replica
        if self._is_first:
            replica.end_first_stage(batch)
        num_wakes = int(self._is_first)
        if not self._is_last:
            replica.stages[stage.stage_id + 1].receive(batch, now)
        elif self._is_alone or self._env.is_alone_at(now):
            replica.end_batch(batch, now)
            num_wakes += 1
        else:
            replica.batch_end.raise_now(batch)
        if stage.queue:
            stage.start_next(now)
        if num_wakes:
            replica.wake(num_wakes)
        if self._decode_times is not None:
            self._run_ahead(now)

    def _run_ahead(self, now: float) -> None:
        """Let a batch that begins now be the first of a run, if the one behind it is planned."""
        stage = self._stage
        if not (stage.queue and self._end_event and not self.num_steps):
            return
        batch: Batch = self._end_event._value
        if batch.stage_started_at == now and not batch.prefills and self.plan_run(batch, now):
            self._env.cancel(self._end_event)
            self._end_event = self._end.at(self.run_ends_at, batch)
            self._env.shortcuts[self] = None

    def take_over(self) -> tuple[Batch, float, float] | None:
        """Leave the batch under way to the process; return it with its end and its duration."""
        event = self._end_event
        if event is None:
            return None
        if self.num_steps:
            self.cut(self._env._now)
            event = self._end_event
            assert event is not None
            ends_at = float(self._ends[self._num_settled])
            self._duration = float(self._durations[self._num_settled])
            self.num_steps = 0
            del self._env.shortcuts[self]
        else:
            ends_at = event._value.stage_started_at + self._duration
        batch: Batch = event._value
        self._env.cancel(event)
        self._end_event = None
        return batch, ends_at, self._duration

    # -- a run of iterations -------------------------------------------------------------------

    @property
    def run_ends_at(self) -> float:
        """End of the run under way, in seconds."""
        return float(self._ends[self.num_steps - 1])

    def plan_run(self, batch: Batch, now: float) -> bool:
        """Let one end stand for those of the next iterations, if they are known."""
        if self._decode_times is None:
            return False
        num_steps = 1 + min(self._replica.scheduler.steady_steps(batch), self._limit - 1)  # type: ignore[attr-defined]
        if num_steps < 3:
            return False
        durations = self._decode_times(batch.num_decodes, batch.decode_context, num_steps, 0)
        is_list = hasattr(durations, "__len__") and getattr(durations, "ndim", 1) == 1
        if not (is_list and len(durations) == num_steps):
            model, told = type(self._stage.stage_time).__name__, " ".join(repr(durations).split())
            raise SimulationError(
                f"{model}.decode_times() gave {told:.60} for {num_steps} iterations: "
                "expected as many seconds, in a list or an array of one dimension."
            )
        ends = running_sums(now, durations)
        shortest = durations.min() if isinstance(durations, np.ndarray) else min(durations)
        if not (shortest >= 0.0 and ends[-1] < inf):
            return False  # stepping says what is wrong
        batch.stage_started_at = now
        self._durations, self._ends = durations, ends
        self._run, self._num_settled, self.num_steps = batch, 0, num_steps
        return True

    def end_run(self) -> float:
        """Settle all iterations but the last one, which ends now; return its seconds."""
        last = self.num_steps - 1
        self._skip(last)
        if self.num_steps == self._limit:
            self._limit = min(2 * self._limit, LONGEST_RUN)
        self.num_steps = 0
        return float(self._durations[last])

    def settle(self, now: float) -> None:
        """Take the steps that ended before `now`, in seconds."""
        num_ended = bisect_left(self._ends, now, self._num_settled, self.num_steps - 1)
        if num_ended > self._num_settled:
            self._skip(num_ended)

    def show(self, now: float) -> None:
        """Settle, and let an iteration that ends right `now` end before a router looks."""
        self.settle(now)
        if self._ends[self._num_settled] == now:
            self.cut(now)

    def cut(self, now: float) -> None:
        """Let the run, if there is one, end with the iteration under way."""
        if self.num_steps and self.shorten(now):
            assert self._end_event is not None
            self._env.cancel(self._end_event)
            self._end_event = self._end.at(self.run_ends_at, self._run)

    def shorten(self, now: float) -> bool:
        """Take the iterations after the one under way from the run; return if there were any."""
        self.settle(now)
        num_steps = self._num_settled + 1
        self._limit = max(SHORTEST_RUN, 2 * num_steps)
        is_shorter = num_steps < self.num_steps
        self.num_steps = num_steps
        return is_shorter

    def _skip(self, num_ended: int) -> None:
        """Do what stepping to the end of the first `num_ended` iterations would have done."""
        first = self._num_settled
        num_steps = num_ended - first
        if not num_steps:
            return
        self._num_settled = num_ended
        stage, replica, batch = self._stage, self._replica, self._run
        durations, ends = self._durations[first:num_ended], self._ends[first:num_ended]
        started_at, ended_at = batch.stage_started_at, float(ends[-1])
        stage.busy_time = added(stage.busy_time, durations)
        blocks = replica.scheduler.skip_steps(batch, durations, ended_at)  # type: ignore[attr-defined]
        replica.skip(batch, ends, replica.pool.skip(blocks, started_at, ends))
        batch.stage_started_at = ended_at
        for planned in stage.queue:
            _move_along(planned, batch, ends)


def _move_along(planned: Batch, batch: Batch, ends: Numbers) -> None:
    """Let the batch planned behind `batch` be the one that is, after iterations with these ends."""
    num_steps, num_decodes = len(ends), batch.num_decodes
    batch.scheduled_at = float(ends[-2]) if num_steps > 1 else planned.scheduled_at
    planned.scheduled_at = float(ends[-1])
    planned.batch_index += num_steps
    planned.decode_context += num_steps * num_decodes
    planned.total_context += num_steps * num_decodes
    planned.num_attention_pairs += num_steps * num_decodes


def _knows_runs(scheduler: object) -> bool:
    """Whether `steady_steps` is about its own steps, not about those of a class it extends."""
    owners = [
        next((owner for owner in type(scheduler).__mro__ if name in vars(owner)), None)
        for name in ("steady_steps", "schedule", "end")
    ]
    knowing, *stepping = owners
    return knowing is not None and all(
        owner is not None and issubclass(knowing, owner) for owner in stepping
    )
