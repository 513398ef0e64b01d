"""Router, replicas and stages: what may be looked at, held up and interrupted while they run."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import EventType, Request, Simulation, SimulationError

SHIFTED = ("first_token_at", "completed_at")


def started(cluster, *lengths, **options):
    """A simulation with requests of these (prompt, output) lengths submitted at once."""
    sim = Simulation(cluster, **options)
    for prompt, output in lengths:
        sim.submit(Request(prompt, output))
    return sim


def after(sim, delay, action):
    """Start a process that does something after some seconds."""

    def process():
        yield sim.env.timeout(delay)
        action()

    sim.env.process(process())


# Looking


def test_a_stage_shows_who_has_it_and_who_waits(make_cluster):
    """`users`, `count`, `is_busy` and `queue` of a stage are those of a SimPy resource, live."""
    cluster = make_cluster(
        pipeline_parallel_size=2,
        replica_scheduler=vs.Sarathi(max_num_seqs=2),
        execution_time=lambda batch, stage_id: (1.0, 3.0)[stage_id],
    )
    sim = started(cluster, (10, 1), (10, 1))
    first, second = sim.replicas[0].stages
    sim.run(until=1.5)
    assert [batch.batch_index for batch in first.users] == [1]
    assert [batch.batch_index for batch in second.users] == [0]
    sim.run(until=2.5)
    assert (first.is_busy, first.count, len(first.queue)) == (False, 0, 0)
    assert (second.is_busy, second.count, len(second.queue)) == (True, 1, 1)
    assert second.queue[0].batch_index == 1
    sim.run()
    assert (second.is_busy, second.count, len(second.queue)) == (False, 0, 0)
    assert [stage.busy_time for stage in (first, second)] == [2.0, 6.0]


def test_a_replica_shows_its_load(make_cluster):
    """Requests outstanding, waiting and running, blocks and utilisation are there at any time."""
    sim = started(
        make_cluster(replica_scheduler=vs.Sarathi(max_num_seqs=1)), (32, 2), (32, 2), (32, 2)
    )
    replica = sim.replicas[0]
    sim.run(until=0.5)
    assert (replica.num_outstanding, replica.num_waiting, replica.scheduler.num_running) == (
        3,
        2,
        1,
    )
    assert replica.pool.num_free == replica.pool.num_blocks - 2
    assert replica.utilisation == 1.0
    assert repr(replica) == "<Replica 0: 2 waiting, 1 running, 0% of the KV cache>"
    sim.run()
    assert (replica.num_outstanding, replica.pool.num_free) == (0, 1000)


# Holding a stage


def held(cluster, at, seconds):
    """Run two requests while a user's process holds the first stage; tell when it had it."""
    sim = started(cluster, (10, 6), (700, 4))
    stage = sim.replicas[0].stages[0]
    had = []

    def maintenance():
        yield sim.env.timeout(at)
        with stage.request() as hold:
            yield hold
            had.append(sim.env.now)
            assert stage.is_busy
            assert stage.users == [hold]
            yield sim.env.timeout(seconds)

    if seconds:
        sim.env.process(maintenance())
    sim.run()
    return sim, had


def test_holding_a_stage_delays_batches_and_nothing_else(cluster):
    """The hold begins when the batch under way ends; all that comes later comes later by it."""
    plain = held(cluster, 2.5, 0.0)[0].result().requests
    sim, had = held(cluster, 2.5, 5.0)
    delayed = sim.result().requests
    assert had == [3.0]
    for name in SHIFTED:
        late = plain[name] > 3.0
        assert delayed[name].equals(plain[name] + 5.0 * late)
    assert delayed.execution_time.equals(plain.execution_time)
    assert delayed.preempted_time.equals(plain.preempted_time + 5.0)
    assert sim.replicas[0].stages[0].busy_time == 6.0


@settings(max_examples=50, deadline=None)
@given(at=st.sampled_from([0.0, 0.5, 1.0, 2.75, 4.0]), seconds=st.sampled_from([0.5, 1.0, 3.25]))
def test_a_hold_lengthens_the_run_by_itself(at, seconds):
    """Whenever it is asked for, also at the end of a batch, the whole takes that much longer."""
    cluster = vs.Cluster(execution_time=lambda batch: 1.0)
    sim, had = held(cluster, at, seconds)
    assert had[0] >= at
    assert sim.env.now == 6.0 + seconds
    assert sim.result().replicas.num_batches[0] == 6


def test_whoever_gives_up_waiting_leaves_no_trace(cluster):
    """A request for the stage that is given up before it is granted delays nothing."""
    sim = started(cluster, (10, 3))
    stage = sim.replicas[0].stages[0]

    def impatient():
        yield sim.env.timeout(0.5)
        with stage.request() as hold:
            yield hold | sim.env.timeout(0.25)
            assert not hold.triggered

    sim.env.process(impatient())
    sim.run()
    assert sim.env.now == 3.0
    assert not stage.is_busy


def test_holders_take_turns(cluster):
    """Two holders that ask during a batch get the stage one after the other, in order."""
    sim = started(cluster, (10, 2))
    log = []

    def holder(name):
        with sim.replicas[0].stages[0].request() as hold:
            yield hold
            log.append((name, sim.env.now))
            yield sim.env.timeout(2.0)

    after(sim, 0.5, lambda: sim.env.process(holder("a")))
    after(sim, 0.5, lambda: sim.env.process(holder("b")))
    sim.run()
    assert log == [("a", 1.0), ("b", 3.0)]
    assert sim.env.now == 6.0


# Interrupting a stage


def interrupted(cluster, *interrupts, lengths=((10, 2),)):
    """Run with interrupts of the first stage: (at, cause); tell the stages table."""
    sim = started(cluster, *lengths, record=("stages", "events"))
    for at, cause in interrupts:
        given_cause = cause(sim.env) if callable(cause) else cause
        after(sim, at, partial(sim.replicas[0].stages[0].process.interrupt, given_cause))
    sim.run()
    assert (sim.result().events.event_type == "BATCH_STAGE_END").sum() == len(sim.result().stages)
    return list(sim.result().stages[["started_at", "ended_at"]].itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("interrupts", "expected"),
    [
        ([(0.25, 2.0)], [(0.0, 3.0), (3.0, 4.0)]),
        ([(0.25, lambda env: env.timeout(2.25))], [(0.0, 3.0), (3.0, 4.0)]),
        ([(0.25, lambda env: env.timeout(0.0))], [(0.0, 1.0), (1.0, 2.0)]),
        ([(0.25, 0.0)], [(0.0, 1.0), (1.0, 2.0)]),
        # during a pause: shorter than what is left of it, longer, and twice
        ([(0.25, 2.0), (0.5, 0.5)], [(0.0, 3.0), (3.0, 4.0)]),
        ([(0.25, 1.0), (0.5, 3.0)], [(0.0, 4.25), (4.25, 5.25)]),
        ([(0.25, 1.0), (0.5, 3.0), (1.0, 5.0)], [(0.0, 6.75), (6.75, 7.75)]),
        # one after the other in one batch, and in two
        ([(0.25, 1.0), (1.5, 1.0)], [(0.0, 3.0), (3.0, 4.0)]),
        ([(0.25, 1.0), (2.5, 1.0)], [(0.0, 2.0), (2.0, 4.0)]),
        # at the very end of a batch, and at its very beginning
        ([(1.0, 2.0)], [(0.0, 3.0), (3.0, 4.0)]),
        ([(0.0, 2.0)], [(2.0, 3.0), (3.0, 4.0)]),
    ],
)
def test_an_interrupt_stalls_the_batch_under_way(cluster, interrupts, expected):
    """The batch takes that much longer; nested interrupts end with the last of them."""
    assert interrupted(cluster, *interrupts) == expected


def test_a_pause_of_no_length_changes_no_bit(make_cluster):
    """An interrupt of zero seconds leaves every instant exactly as it was."""
    cluster = make_cluster(execution_time=vs.Linear(base=0.1, per_token=1e-3 / 3))
    plain = interrupted(cluster, lengths=((10, 9), (77, 5)))
    pauses = [(0.0123 * number, 0.0) for number in range(1, 70)]
    assert interrupted(cluster, *pauses, lengths=((10, 9), (77, 5))) == plain


def test_an_idle_stage_that_is_interrupted_starts_late(cluster):
    """A batch that arrives during the pause waits for its end; one that comes later does not."""
    sim = Simulation(cluster)
    after(sim, 1.0, lambda: sim.replicas[0].stages[0].process.interrupt(3.0))
    during, later = (
        sim.submit(Request(10, 1, arrived_at=2.0)),
        sim.submit(Request(10, 1, arrived_at=9.0)),
    )
    assert sim.run(until=during).completed_at == 5.0
    assert sim.run(until=later).completed_at == 10.0


@pytest.mark.parametrize("cause", [None, -1.0, "a while", math.nan, math.inf])
def test_an_interrupt_needs_a_length(cluster, cause):
    """Anything but seconds or an event is refused, and the result so far is kept."""
    sim = started(cluster, (10, 2))
    after(sim, 0.5, lambda: sim.replicas[0].stages[0].process.interrupt(cause))
    with pytest.raises(SimulationError, match="expected the length of the pause") as caught:
        sim.run()
    assert len(caught.value.result.requests) == 1


# Interrupting a replica


def test_an_interrupted_replica_forms_no_batches(cluster):
    """The batch under way ends in time; the next is formed when the pause is over."""
    sim = started(cluster, (10, 3), record=("batches",))
    after(sim, 0.5, lambda: sim.replicas[0].process.interrupt(4.0))
    sim.run()
    batches = sim.result().batches
    assert batches.scheduled_at.to_list() == [0.0, 4.5, 5.5]
    assert batches.completed_at.to_list() == [1.0, 5.5, 6.5]


def test_a_replica_waits_for_an_event(cluster):
    """Interrupted with an event, it goes on when that happens, whoever makes it happen."""
    sim = started(cluster, (10, 2))
    repaired = sim.env.event()
    after(sim, 0.5, lambda: sim.replicas[0].process.interrupt(repaired))
    after(sim, 7.0, repaired.succeed)
    sim.run()
    assert sim.env.now == 8.0


def test_pauses_of_a_replica_nest(cluster):
    """A pause within a pause ends with the later of them."""
    sim = started(cluster, (10, 2))
    for at, seconds in ((0.5, 2.0), (1.0, 4.0), (1.5, 0.25)):
        after(sim, at, lambda seconds=seconds: sim.replicas[0].process.interrupt(seconds))
    sim.run()
    assert sim.result().requests.completed_at.to_list() == [6.0]


@pytest.mark.parametrize("arrived_at", [1.0, 2.0, 4.0, 6.0])
def test_an_idle_replica_wakes_up_after_its_pause(cluster, arrived_at):
    """Nobody is forgotten: not who came at its beginning, during it, at its end or later."""
    sim = Simulation(cluster)
    after(sim, 1.0, lambda: sim.replicas[0].process.interrupt(3.0))
    done = sim.submit(Request(10, 1, arrived_at=arrived_at))
    assert sim.run(until=done).scheduled_at == max(4.0, arrived_at)


def test_the_other_replicas_go_on(make_cluster):
    """An interrupt concerns one replica."""
    cluster = make_cluster(num_replicas=2)
    sim = started(cluster, (10, 3), (10, 3))
    after(sim, 0.5, lambda: sim.replicas[0].process.interrupt(4.0))
    sim.run()
    assert sim.result().requests.completed_at.to_list() == [6.5, 3.0]


# All at once


@st.composite
def disturbances(draw):
    """Pauses of stages and replicas, and holds: (kind, replica, stage, at, seconds)."""
    kinds = st.sampled_from(["stage", "replica", "hold"])
    numbers = st.integers(0, 1)
    times = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
    return draw(st.lists(st.tuples(kinds, numbers, numbers, times, times), max_size=8))


def disturb(sim, kind, replica_id, stage_id, at, seconds):
    """Start the process that disturbs a replica."""
    replica = sim.replicas[replica_id % len(sim.replicas)]
    stage = replica.stages[stage_id % len(replica.stages)]

    def hold():
        yield sim.env.timeout(at)
        with stage.request() as granted:
            yield granted
            yield sim.env.timeout(seconds)

    if kind == "hold":
        sim.env.process(hold())
    else:
        target = stage if kind == "stage" else replica
        after(sim, at, partial(target.process.interrupt, seconds))


@settings(max_examples=200, deadline=None)
@given(
    scheduler=st.sampled_from(
        [vs.Sarathi(chunk_size=32), vs.Vllm(), vs.Orca(max_num_seqs=4), vs.FasterTransformer()]
    ),
    num_replicas=st.sampled_from([1, 2]),
    stages=st.sampled_from([1, 2]),
    num_blocks=st.sampled_from([6, 100]),
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=8),
    disturbed=disturbances(),
    event_order=st.sampled_from(["type", "id"]),
)
def test_listening_changes_nothing_whatever_happens(
    scheduler, num_replicas, stages, num_blocks, lengths, disturbed, event_order
):
    """With pauses, holds and preemptions, requests go the same way whether events are heard."""
    cluster = vs.Cluster(
        num_replicas=num_replicas,
        pipeline_parallel_size=stages,
        max_model_len=80,
        kv_cache=vs.KVCache(num_blocks=num_blocks),
        replica_scheduler=scheduler,
        sequence_pipeline_parallel=isinstance(scheduler, vs.Sarathi),
        execution_time=lambda batch: 0.25 if batch.num_prefill_tokens else 0.125,
    )

    def listen_now_and_then(sim):
        for event_type in (*EventType, *EventType):
            yield sim.next(event_type)
            yield sim.env.timeout(0.25)

    tables = []
    for record, listens in (((), False), ((), True), (("events", "batches"), False)):
        sim = started(cluster, *lengths, record=record, event_order=event_order)
        for disturbance in disturbed:
            disturb(sim, *disturbance)
        if listens:
            sim.env.process(listen_now_and_then(sim))
        sim.run()
        tables.append(sim.result().requests)
        assert all(replica.pool.num_free == num_blocks for replica in sim.replicas)
    for table in tables[1:]:
        assert_frame_equal(table, tables[0], check_exact=True)


# Back-pressure and memory


@settings(max_examples=40, deadline=None)
@given(
    stages=st.sampled_from([1, 2, 4]),
    num_seqs=st.sampled_from([4, 16]),
    times=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=4, max_size=4),
    lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 6)), min_size=1, max_size=12),
)
def test_never_more_batches_than_stages(stages, num_seqs, times, lengths):
    """After every event, at most as many batches run as there are stages, one on each at most."""
    cluster = vs.Cluster(
        pipeline_parallel_size=stages,
        replica_scheduler=vs.Sarathi(max_num_seqs=num_seqs),
        execution_time=lambda batch, stage_id: times[stage_id],
    )
    sim = started(cluster, *lengths)
    replica = sim.replicas[0]
    most = 0

    def look(event):
        nonlocal most
        on_stages = [len(stage.users) + len(stage.queue) for stage in replica.stages]
        assert on_stages[0] <= 1
        assert all(len(stage.users) <= 1 for stage in replica.stages)
        assert sum(on_stages) <= replica.num_running_batches <= stages
        most = max(most, replica.num_running_batches)

    for event_type in EventType:
        sim.on(event_type, look)
    sim.run()
    assert 1 <= most <= stages
    assert replica.num_running_batches == 0


def test_memory_is_reserved_and_freed_where_the_table_says(cluster):
    """Blocks are taken when a batch is formed and given back at the end of the last one."""
    sim = started(cluster, (32, 17))
    pool = sim.replicas[0].pool
    log = []
    for event_type in (EventType.GLOBAL_SCHEDULE, EventType.REPLICA_SCHEDULE, EventType.BATCH_END):
        sim.on(event_type, lambda event: log.append((event.event_type.name, 1000 - pool.num_free)))
    sim.run()
    assert log[:3] == [("GLOBAL_SCHEDULE", 0), ("REPLICA_SCHEDULE", 2), ("BATCH_END", 2)]
    held_at_ends = [blocks for name, blocks in log if name == "BATCH_END"]
    # The prompt's two blocks are full, so the first decode takes the third and the last.
    assert held_at_ends == [2, *[3] * 15, 0]


def test_a_scheduler_that_overcommits_memory_is_found_out(make_cluster):
    """BATCH_STAGE_ARRIVAL validates what REPLICA_SCHEDULE reserved."""

    class Careless(vs.ContinuousBatching):
        def __init__(self, resources):
            super().__init__(resources, max_num_seqs=8)

        def schedule(self, now):
            chunks = [self.waiting.popleft().schedule_chunk(10) for _ in range(len(self.waiting))]
            self.pool.reserve(600 * len(chunks))
            return vs.Batch(None, chunks) if chunks else None

    sim = started(make_cluster(replica_scheduler=Careless), (10, 1), (10, 1))
    with pytest.raises(
        SimulationError, match="has 1000 blocks, but the replica scheduler holds 12"
    ):
        sim.run()


# Arrivals and routing


def test_requests_arrive_at_the_exact_instants(make_cluster):
    """Arrival times are those of the workload to the last bit."""
    workload = vs.Workload(vs.Poisson(rate=7.0), vs.FixedLengths(10, 1), num_requests=50)
    sim = Simulation(make_cluster(), workload, seed=3)
    seen = []
    sim.on(EventType.REQUEST_ARRIVAL, lambda event: seen.append(sim.env.now))
    sim.run()
    assert seen == sim.result().requests.arrived_at.to_list()


def test_requests_of_one_instant_are_mapped_together(make_cluster):
    """One GLOBAL_SCHEDULE maps all that are queued; the others find nothing and still happen."""
    sim = started(make_cluster(num_replicas=2), *[(10, 1)] * 3, record=("events",))
    mapped = []
    sim.on(EventType.GLOBAL_SCHEDULE, lambda _: mapped.append(len(sim.router.queue)))
    sim.run(until=0.5)
    assert mapped == [0, 0, 0]
    assert sim.router.num_received == 3
    assert [replica.num_requests for replica in sim.replicas] == [2, 1]
    counts = sim.result().events.event_type.value_counts()
    assert counts[["REQUEST_ARRIVAL", "GLOBAL_SCHEDULE"]].to_list() == [3, 3]
    assert counts["REPLICA_SCHEDULE"] == 2


def test_a_router_must_give_a_replica(make_cluster):
    """What is no replica is refused with the request that was routed."""
    sim = started(make_cluster(global_scheduler=lambda request, replicas: 0), (10, 1))
    with pytest.raises(SimulationError, match="the router gave 0 for <Request 0"):
        sim.run()
