"""One pipeline stage as a SimPy resource, and what interrupts do to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from math import inf, nan
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

import simpy
from simpy.events import Event

from vidur_simpy.entities import Batch
from vidur_simpy.errors import SimulationError
from vidur_simpy.fast_forward import FastStage
from vidur_simpy.kernel import Environment, EventType, Signal, TypedEvent

if TYPE_CHECKING:
    from vidur_simpy.processes import Replica

__all__ = ["ProcessGenerator", "Stage", "pause"]

ProcessGenerator: TypeAlias = Generator[Event, Any, None]


class Stage(simpy.Resource):
    """One pipeline stage: a SimPy resource of capacity one that batches queue for.

    A batch under way is in `users` and those behind it in `queue`. A user's own process may
    ``request()`` the stage as any resource (a maintenance window, say): it gets it when the batch
    under way ends, and batches wait until it is released. Interrupting `process` with a number of
    seconds or an event as the cause stalls the batch under way for that long.

    Attributes
    ----------
    queue : deque of Batch
        Batches that have arrived and wait.
    users : list
        The batch under way, or the request of the user's process that holds the stage.
    busy_time : float
        Time spent on the batches that have ended, in seconds.
    process : simpy.Process
    """

    def __init__(
        self,
        env: Environment,
        replica: Replica,
        stage_id: int,
        stage_time: Callable[[Batch, int], float],
    ) -> None:
        super().__init__(env, capacity=1)
        self.env = env
        self.replica = replica
        self.stage_id = stage_id
        self.busy_time = 0.0
        self.queue: deque[Batch] = deque()
        self.users: list[Any] = []
        self.stage_time = stage_time
        self._is_first = stage_id == 0
        self._is_last = stage_id == replica.num_stages - 1
        self._is_alone = replica.num_stages == 1
        self._is_paused = False
        resources = getattr(replica.scheduler, "resources", None)
        self._has_pieces_elsewhere = getattr(resources, "sequence_pipeline_parallel", False)
        where = (replica.replica_id, stage_id)
        self.arrival = Signal(env, EventType.BATCH_STAGE_ARRIVAL, where, self._arrive)
        self.schedule = Signal(env, EventType.REPLICA_STAGE_SCHEDULE, where)
        self._idle_schedule = Signal(env, EventType.REPLICA_STAGE_SCHEDULE, where)
        self.end = Signal(env, EventType.BATCH_STAGE_END, where)
        self.fast = FastStage(replica, self)
        self.process = env.process(self._execute_batches())

    @property
    def is_busy(self) -> bool:
        """Whether a batch, or a process that requested the stage, has it."""
        return bool(self.users)

    def busy_time_until(self, now: float) -> float:
        """Time spent on batches, the one under way included, in seconds."""
        under_way = [user for user in self.users if isinstance(user, Batch)]
        return self.busy_time + sum(now - batch.stage_started_at for batch in under_way)

    def _arrive(self, event: TypedEvent) -> None:
        """At BATCH_STAGE_ARRIVAL: check that its memory is there, and queue the batch."""
        self.replica.pool.validate()
        self.queue.append(event._value)
        self.schedule.raise_now()

    def receive(self, batch: Batch, now: float) -> None:
        """As BATCH_STAGE_ARRIVAL and REPLICA_STAGE_SCHEDULE, when nobody listens to them."""
        self.replica.pool.validate()
        self.queue.append(batch)
        if not (self.users or self._is_paused):
            self.start_next(now)

    def start_next(self, now: float) -> None:
        """Execute the first batch queued, if a prompt cannot end elsewhere at this instant.

        With sequence-pipeline parallelism pieces of one prompt are on several stages, and the time
        that it waited depends on which of them has ended.
        """
        if self._has_pieces_elsewhere and not self.env.is_alone_at(now):
            self.schedule.raise_now()
        else:
            self.fast.start(now)

    def _do_put(self, event: Any) -> None:
        """Give the stage to a user's process, when the batch under way has ended."""
        self.fast.cut(self.env.now)
        super()._do_put(event)

    def _do_get(self, event: Any) -> None:
        """Release the stage, and let the batches behind go on."""
        super()._do_get(event)
        self.schedule.raise_now()

    def _execute_batches(self) -> ProcessGenerator:
        """Process: at each REPLICA_STAGE_SCHEDULE, if idle, execute the first batch queued."""
        env, schedule, users, queue = self.env, self.schedule, self.users, self.queue
        while True:
            try:
                yield schedule.wait()
            except simpy.Interrupt as interrupt:
                under_way = self.fast.take_over()
                if under_way is not None:
                    yield from self._stall(interrupt, *under_way)
                    continue
                self._is_paused = True
                yield from pause(env, interrupt)
                self._is_paused = False
                schedule.raise_now()
                continue
            if users or not queue:
                continue
            batch = queue.popleft()
            users.append(batch)
            duration = self.start(batch)
            ends_at = env._now + duration
            end = self.end.at(ends_at, batch)
            try:
                yield end
            except simpy.Interrupt as interrupt:
                env.cancel(end)
                yield from self._stall(interrupt, batch, ends_at, duration)
            else:
                self.finish(batch, duration)

    def _stall(
        self, interrupt: simpy.Interrupt | None, batch: Batch, ends_at: float, duration: float
    ) -> ProcessGenerator:
        """Part of a process: let a batch end later, by the time of each interrupt."""
        env = self.env
        while interrupt is not None:
            paused_at = env.now
            yield from pause(env, interrupt)
            paused_for = env.now - paused_at
            ends_at, duration = max(env.now, ends_at + paused_for), duration + paused_for
            end = self.end.at(ends_at, batch)
            try:
                yield end
                interrupt = None
            except simpy.Interrupt as another:
                env.cancel(end)
                interrupt = another
        self.finish(batch, duration)

    def start(self, batch: Batch) -> float:
        """Begin a batch; return how long the stage takes, in seconds."""
        now = self.env._now
        given = self.stage_time(batch, self.stage_id)
        duration = given if type(given) is float else _as_number(given)
        if not 0.0 <= duration < inf:
            raise SimulationError(
                f"the execution time of {batch} on stage {self.stage_id} is {given!r} s: "
                f"expected a finite number >= 0."
            )
        batch.stage_started_at = now
        for chunk in batch.prefills:
            request = chunk.request
            if request.scheduled_at is None:
                request.scheduled_at = now
            if request.last_stage_end is not None:
                request.preempted_time += now - request.last_stage_end
        return duration

    def note_end(self, batch: Batch, duration: float, now: float) -> None:
        """Count a batch that has ended."""
        self.busy_time += duration
        batch.execution_time += duration
        for chunk in batch.prefills:
            request = chunk.request
            request.execution_time += duration
            request.last_stage_end = now

    def finish(self, batch: Batch, duration: float) -> None:
        """At BATCH_STAGE_END: the stage is idle again and the batch goes its way."""
        env, replica = self.env, self.replica
        now = env._now
        self.users.clear()
        self.note_end(batch, duration, now)
        if self.put_queue:
            self._trigger_put(None)
        if self.queue or not self._is_alone:
            self.schedule.raise_now()
        elif not env.is_unobserved:
            # With one stage, a batch that arrives at this instant does so after the event: it
            # finds nothing to do, and nobody has to wait for it.
            self._idle_schedule.at(now)
        if self._is_last:
            replica.batch_end.raise_now(batch)
        else:
            replica.stages[self.stage_id + 1].arrival.at(now, batch)
        if self._is_first:
            replica.end_first_stage(batch)
            replica.schedule.raise_now()


def _as_number(given: Any) -> float:
    """Return a number of any kind as a float, all else as NaN: an array is no number."""
    return float(given) if isinstance(given, Real) else nan


def pause(env: Environment, interrupt: simpy.Interrupt) -> ProcessGenerator:
    """Wait for what an interrupt's cause says: seconds, or an event."""
    over = _end_of_pause(env, interrupt)
    while True:
        try:
            yield over
            return
        except simpy.Interrupt as another:
            over = over & _end_of_pause(env, another)


def _end_of_pause(env: Environment, interrupt: simpy.Interrupt) -> Event:
    cause = interrupt.cause
    if isinstance(cause, Event):
        return cause
    if isinstance(cause, SupportsFloat) and 0 <= float(cause) < inf:
        return env.timeout(float(cause))
    raise SimulationError(
        f"interrupted with {cause!r}: expected the length of the pause in seconds, or an event "
        f"that ends it."
    )
