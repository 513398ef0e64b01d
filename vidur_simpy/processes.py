"""The simulation's main loop: arrivals, router, replicas and stages as SimPy processes.

Read the `yield` statements: they are the seven events. A request arrives (REQUEST_ARRIVAL), the
router maps it to a replica (GLOBAL_SCHEDULE), the replica forms a batch (REPLICA_SCHEDULE), which
goes from stage to stage (BATCH_STAGE_ARRIVAL, REPLICA_STAGE_SCHEDULE, BATCH_STAGE_END) until its
memory is freed and its requests are complete or wait for their next batch (BATCH_END).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from vidur_simpy.entities import Batch, Request, by_arrival
from vidur_simpy.errors import SimulationError
from vidur_simpy.global_scheduler import Route
from vidur_simpy.kernel import Environment, EventType, Signal
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.metrics import Timeline
from vidur_simpy.plain_loop import ExpectedRequests, after_plain_loop
from vidur_simpy.replica_scheduler.interface import ReplicaScheduler
from vidur_simpy.stage import ProcessGenerator, Stage, pause
from vidur_simpy.sums import Numbers

__all__ = ["Replica", "Router", "Stage", "arrivals"]


def arrivals(env: Environment, requests: ExpectedRequests, router: Router) -> ProcessGenerator:
    """Process: bring each request to the router at the exact instant it arrives."""
    arrival = Signal(env, EventType.REQUEST_ARRIVAL)
    previous: Request | None = None
    for request in after_plain_loop(requests, router, env):
        assert request.arrived_at is not None
        # The next arrival is in the queue before this one is handled: it may be simultaneous.
        event = arrival.at(request.arrived_at, request)
        if previous is not None:
            router.receive(previous)
        yield event
        previous = request
    if previous is not None:
        router.receive(previous)


class Router:
    """Maps the requests in the global queue to replicas.

    Parameters
    ----------
    route : callable
        ``route(request, replicas) -> replica``.
    refusal : callable
        ``refusal(request) -> str``: why no replica can ever run it, or an empty string.
    on_refused : callable
        Called with each request that is refused.

    Attributes
    ----------
    queue : list of Request
        Requests that have arrived and are not mapped yet.
    route, refusal : callable
    num_received : int
        Requests that have arrived, refused ones included.
    may_look : bool
        Whether the policy may look at more of a replica than its counts of requests.
    """

    def __init__(
        self,
        env: Environment,
        replicas: Sequence[Replica],
        route: Route[Replica],
        refusal: Callable[[Request], str],
        on_refused: Callable[[Request], None],
    ) -> None:
        self.env = env
        self.replicas = replicas
        self.queue: list[Request] = []
        self.num_received = 0
        self.route = route
        self.refusal = refusal
        self._on_refused = on_refused
        # A router of the user's own may look at anything.
        self.may_look = not getattr(route, "only_counts_requests", False)
        self.schedule = Signal(env, EventType.GLOBAL_SCHEDULE)
        self.process = env.process(self._run())

    def receive(self, request: Request) -> None:
        """Queue a request that has arrived; one that can never run is refused with a reason."""
        if not self.admits(request):
            return
        self.queue.append(request)
        env = self.env
        if self.may_look:
            env.show()
        if env.is_unobserved and env.is_alone_at(env._now):
            self._map_requests()
        else:
            self.schedule.raise_now()

    def admits(self, request: Request) -> bool:
        """Count a request that has arrived; return whether it can ever run."""
        self.num_received += 1
        request.refusal = self.refusal(request)
        if request.refusal:
            self._on_refused(request)
            return False
        return True

    def _run(self) -> ProcessGenerator:
        """Process: at each GLOBAL_SCHEDULE map the queued requests."""
        while True:
            yield self.schedule.wait()
            self._map_requests()

    def _map_requests(self) -> None:
        """Map all queued requests to replicas, in order of arrival."""
        requests, self.queue = self.queue, []
        if len(requests) == 1:
            self._map(requests[0]).wake()
            return
        requests.sort(key=by_arrival)
        affected = {replica.replica_id: replica for replica in map(self._map, requests)}
        for replica_id in sorted(affected):
            affected[replica_id].wake()

    def _map(self, request: Request) -> Replica:
        replica = self.choose(request)
        replica.add(request)
        return replica

    def choose(self, request: Request) -> Replica:
        """Return the replica that the policy gives a request to."""
        replica = self.route(request, self.replicas)
        if not isinstance(replica, Replica):
            raise SimulationError(
                f"the router gave {replica!r} for {request}: expected one of the replicas."
            )
        return replica


class Replica:
    """One copy of the model: forms batches and sends them through its pipeline stages.

    Interrupting `process` with a number of seconds or an event as the cause keeps the replica from
    forming batches until that has passed; the batches under way go on.

    Attributes
    ----------
    replica_id : int
    num_stages : int
    stages : list of Stage
    scheduler : ReplicaScheduler
    pool : BlockPool
    timeline : Timeline
        Its load so far.
    plans_ahead : bool
        Whether the next batch queues at the first stage while that is taken.
    num_running_batches : int
        Batches between their formation and their BATCH_END; at most one per stage, unless the
        scheduler has `max_running_batches`.
    num_outstanding : int
        Requests routed here that are not complete.
    num_batches_formed : int
        The `batch_index` of the next.
    num_requests, num_batches, num_restarts, num_prefill_tokens, num_decode_tokens : int
        What it has done so far: requests routed, batches ended, preemptions of its completed
        requests, tokens processed.
    num_attention_pairs : int
        Query-key pairs so far: every token with each token of its context.
    num_context_tokens : int
        Tokens in the KV cache so far, summed over the requests of each batch: what was read.
    process : simpy.Process
    """

    def __init__(
        self,
        env: Environment,
        replica_id: int,
        scheduler: ReplicaScheduler,
        pool: BlockPool,
        stage_time: Callable[[Batch, int], float],
        num_stages: int,
        on_completed: Callable[[Request], None],
        timeline: Timeline,
    ) -> None:
        self.env = env
        self.replica_id = replica_id
        self.scheduler = scheduler
        self.pool = pool
        self.timeline = timeline
        self.num_running_batches = 0
        self.num_outstanding = 0
        self.num_requests = 0
        self.num_batches_formed = 0
        self.num_batches = 0
        self.num_restarts = 0
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self.num_attention_pairs = 0
        self.num_context_tokens = 0
        self.num_stages = num_stages
        self._on_completed = on_completed
        self._first_stage_taken = False
        self._is_paused = False
        self._max_running_batches = getattr(scheduler, "max_running_batches", num_stages)
        # More batches than stages: the next one queues at the first stage while it is taken.
        self.plans_ahead = self._max_running_batches > num_stages
        self.schedule = Signal(env, EventType.REPLICA_SCHEDULE, (replica_id, None))
        self.batch_end = Signal(env, EventType.BATCH_END, (replica_id, None))
        self.stages = [Stage(env, self, stage_id, stage_time) for stage_id in range(num_stages)]
        self.process = env.process(self._form_batches())
        env.process(self._end_batches())

    def __repr__(self) -> str:
        return (
            f"<Replica {self.replica_id}: {self.num_waiting} waiting, "
            f"{self.scheduler.num_running} running, {self.pool.usage:.0%} of the KV cache>"
        )

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be admitted."""
        return self.scheduler.num_waiting

    @property
    def utilisation(self) -> float:
        """Share of the time so far that the stages were busy with batches, mean over them."""
        now = self.env.now
        busy_time = sum(stage.busy_time_until(now) for stage in self.stages)
        return busy_time / (len(self.stages) * now) if now else 0.0

    def add(self, request: Request) -> None:
        """Take a request that was routed here."""
        if self.env.shortcuts:
            self.stages[0].fast.cut(self.env._now)
        request.replica_id = self.replica_id
        self.num_outstanding += 1
        self.num_requests += 1
        self.scheduler.add(request)

    def _form_batches(self) -> ProcessGenerator:
        """Process: at each REPLICA_SCHEDULE form at most one batch, if the first stage is free."""
        schedule = self.schedule
        while True:
            try:
                yield schedule.wait()
            except simpy.Interrupt as interrupt:
                self._is_paused = True
                self.stages[0].fast.cut(self.env._now)
                yield from pause(self.env, interrupt)
                self._is_paused = False
                schedule.raise_now()
                continue
            # The same event again: a preemption may have made room meanwhile.
            num_attempts, schedule.num_merged = 1 + schedule.num_merged, 0
            if not self._first_stage_taken:
                self.form_batch(num_attempts)

    def form_batch(self, num_attempts: int = 1) -> None:
        """Form a batch and send it to the first stage, if it is free and there is any."""
        env = self.env
        while not self._first_stage_taken and self.num_running_batches < self._max_running_batches:
            now = env._now
            batch = self.next_batch(now, num_attempts)
            if batch is None:
                return
            self._first_stage_taken = not self.plans_ahead
            if env.is_unobserved:
                self.stages[0].receive(batch, now)
            else:
                self.stages[0].arrival.at(now, batch)
            if not self.plans_ahead:
                return
            num_attempts = 1
            if not env.is_unobserved or not env.is_alone_at(now):
                self.schedule.raise_now()
                return

    @property
    def may_form(self) -> bool:
        """Whether no interrupt keeps it from forming batches."""
        return not self._is_paused

    def resume(self, batch: Batch, stage_id: int, duration: float) -> None:
        """Go on with a batch that began elsewhere and takes so many seconds on a stage.

        It queues there if the stage is busy.
        """
        batch.replica_id = self.replica_id
        batch.batch_index = self.num_batches_formed
        self.num_batches_formed += 1
        self.num_running_batches += 1
        stage = self.stages[stage_id]
        if stage_id == 0:
            self.hold_first_stage()
        if stage.is_busy:
            stage.queue.append(batch)
        else:
            stage.fast.resume(batch, duration)

    def hold_first_stage(self) -> None:
        """Form no batch until the first stage is done with the one it has."""
        self._first_stage_taken = True

    def wake(self, num_times: int = 1) -> None:
        """Raise REPLICA_SCHEDULE so often; in place, if nothing else is due and nobody listens."""
        env = self.env
        if env.is_unobserved and env.is_alone_at(env._now):
            if not self._is_paused:
                self.form_batch(num_times)
        else:
            for _ in range(num_times):
                self.schedule.raise_now()

    def next_batch(self, now: float, num_attempts: int) -> Batch | None:
        """Form the next batch, if there is any."""
        pool, scheduler = self.pool, self.scheduler
        pool.tick(now)
        batch = scheduler.schedule(now)
        while batch is None and num_attempts > 1:
            num_attempts -= 1
            batch = scheduler.schedule(now)
        if batch is None:
            return None
        if not isinstance(batch, Batch) or not batch.num_tokens:
            raise SimulationError(
                f"{type(scheduler).__name__}.schedule() gave {batch!r}: expected a Batch with "
                "tokens to compute, or None."
            )
        batch.replica_id = self.replica_id
        batch.batch_index = self.num_batches_formed
        batch.scheduled_at = now
        self.num_batches_formed += 1
        self.num_running_batches += 1
        timeline = self.timeline
        if now >= timeline.next_at:
            timeline.sample(now, scheduler.num_running, scheduler.num_waiting, pool.usage)
        return batch

    def end_first_stage(self, batch: Batch) -> None:
        """Let the next batch enter: the first stage is done with this one."""
        self._first_stage_taken = False
        if batch.prefills:
            self.scheduler.end_first_stage(batch)

    def _end_batches(self) -> ProcessGenerator:
        """Process: at each BATCH_END end the batch, and schedule again."""
        env, batch_end, schedule = self.env, self.batch_end, self.schedule
        while True:
            batch: Batch = yield batch_end.wait()
            self.end_batch(batch, env._now)
            schedule.raise_now()

    def end_batch(self, batch: Batch, now: float) -> None:
        """Free memory, and complete requests."""
        self.pool.tick(now)
        self.num_running_batches -= 1
        self.num_batches += 1
        self.num_prefill_tokens += batch.num_prefill_tokens
        self.num_decode_tokens += batch.num_decodes
        self.num_attention_pairs += batch.num_attention_pairs
        self.num_context_tokens += batch.total_context
        for request in self.scheduler.end(batch, now):
            self.complete(request, now)

    def complete(self, request: Request, now: float) -> None:
        """Let a request go that has its last token."""
        request.completed_at = now
        self.num_outstanding -= 1
        self.num_restarts += request.num_restarts
        self._on_completed(request)

    def skip(self, batch: Batch, ends: Numbers, num_used_blocks: Numbers) -> None:
        """Count iterations of one set of decodes, `batch` the first, that ended one after another.

        Parameters
        ----------
        batch : Batch
            Left as the iteration that follows.
        ends : sequence of float
            Ends of the iterations, in seconds.
        num_used_blocks : sequence of int
            Blocks in use once the iteration that follows each of them was formed.
        """
        num_steps, num_decodes = len(ends), batch.num_decodes
        self.num_batches += num_steps
        self.num_batches_formed += num_steps
        self.num_decode_tokens += num_steps * num_decodes
        added = num_steps * num_decodes
        context = num_steps * batch.decode_context + (num_steps - 1) * added // 2
        self.num_attention_pairs += context
        self.num_context_tokens += context
        batch.decode_context += added
        batch.total_context += added
        batch.num_attention_pairs += added
        batch.batch_index += num_steps
        batch.scheduled_at = float(ends[-1])
        if ends[-1] >= self.timeline.next_at:
            scheduler, num_blocks = self.scheduler, self.pool.num_blocks
            self.timeline.sample_run(
                ends, scheduler.num_running, scheduler.num_waiting, num_used_blocks, num_blocks
            )
