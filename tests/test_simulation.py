"""A live simulation: clients, waits, callbacks, looks in between, and runs that repeat exactly."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from busy_runs import RECORDS, WORKLOAD, assert_equal_tables, busy_cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import ConfigError, EventType, Request, Simulation, SimulationError

# Clients on the clock


def test_a_client_submits_waits_and_submits_the_next(cluster):
    """A closed loop: each request is submitted when the one before is complete."""
    sim = Simulation(cluster)
    log = []

    def client(num_requests):
        for _ in range(num_requests):
            request = yield sim.submit(Request(100, 3))
            log.append((request.request_id, sim.env.now))

    sim.env.process(client(3))
    sim.run()
    assert log == [(0, 3.0), (1, 6.0), (2, 9.0)]
    assert sim.result().requests.arrived_at.to_list() == [0.0, 3.0, 6.0]


def test_clients_with_think_time_share_a_replica(cluster):
    """Several clients think between their requests, and decode together in between."""
    sim = Simulation(cluster)

    def client(think_time):
        for _ in range(2):
            yield sim.submit(Request(100, 2))
            yield sim.env.timeout(think_time)

    for think_time in (0.5, 4.0):
        sim.env.process(client(think_time))
    sim.run()
    requests = sim.result().requests
    assert requests.arrived_at.to_list() == [0.0, 0.0, 2.5, 6.0]
    assert requests.completed_at.to_list() == [2.0, 2.0, 4.5, 8.0]


def test_clients_are_other_arrivals_than_the_workload(cluster):
    """Requests of a workload and of clients run side by side, with ids of their own."""
    workload = vs.Workload(vs.Constant(rate=1.0), vs.FixedLengths(10, 1), num_requests=3)
    sim = Simulation(cluster, workload)
    done = sim.submit(Request(10, 1))
    assert sim.run(until=done).request_id == 3
    sim.run()
    assert sim.result().requests.arrived_at.to_list() == [1.0, 2.0, 3.0, 0.0]


def test_a_request_may_arrive_later(cluster):
    """Submitted with a future `arrived_at`, it arrives at exactly that instant."""
    sim = Simulation(cluster)
    done = sim.submit(Request(10, 1, arrived_at=0.1 + 0.2))
    sim.run(until=0.2)
    assert len(sim.result().requests) == 0
    request = sim.run(until=done)
    assert (request.arrived_at, request.scheduled_at) == (0.1 + 0.2, 0.1 + 0.2)


def test_a_refused_request_is_done_with_a_reason(cluster):
    """Its event happens at arrival, with the request and why it was refused; others go on."""
    sim = Simulation(cluster)
    log = []

    def client():
        for prompt in (10_000, 10):
            request = yield sim.submit(Request(prompt, 1))
            log.append((sim.env.now, request.refusal))

    sim.env.process(client())
    sim.run()
    assert log == [(0.0, "its 10000 + 1 tokens are more than max_model_len = 4096"), (1.0, "")]
    figures = sim.result().figures
    assert (figures["completed"], figures["refused"], figures["unfinished"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("a prompt", "submit('a prompt'): expected a Request"),
        (
            Request(1, 1, arrived_at=1.0),
            "Request.arrived_at = 1.0 s: expected now (2.0 s) or later",
        ),
        (Request(1, 1, arrived_at=float("nan")), "Request.arrived_at = nan s: expected now"),
        (Request(1, 1, arrived_at="soon"), "Request.arrived_at = 'soon' s: expected now"),
        (Request(1, 1, request_id=0), "Request.request_id = 0 is taken; leave it out, or use 3"),
        (Request(1, 1, request_id=1), "Request.request_id = 1 is taken"),
        (Request(1, 1, request_id=-1), "Request.request_id = -1: expected an integer >= 0"),
        (Request(1, 1, request_id="a"), "Request.request_id = 'a': expected an integer >= 0"),
    ],
)
def test_what_cannot_be_submitted(cluster, request_, message):
    """Each mistake is told when it is made, not when the simulation stumbles over it."""
    workload = vs.Workload(vs.Constant(rate=0.2), vs.FixedLengths(10, 1), num_requests=2)
    sim = Simulation(cluster, workload)
    sim.submit(Request(10, 1, request_id=2))
    sim.run(until=2.0)
    with pytest.raises(ConfigError) as caught:
        sim.submit(request_)
    assert message in str(caught.value)


def test_a_request_is_submitted_once(cluster):
    """A second time, also when it is complete, needs a new request."""
    sim = Simulation(cluster)
    request = Request(10, 1)
    sim.submit(request)
    sim.run()
    with pytest.raises(ConfigError, match="was submitted before; expected a new request"):
        sim.submit(request)


# Waiting for events, and hearing of them


def test_a_process_waits_for_the_next_batch_end(cluster):
    """`next` is an event to yield; its value says what happened and where."""
    sim = Simulation(cluster)
    sim.submit(Request(10, 3))
    log = []

    def watcher():
        while True:
            event = yield sim.next(EventType.BATCH_END)
            log.append((sim.env.now, event.replica_id, event.value.batch_index))

    sim.env.process(watcher())
    sim.run()
    assert log == [(1.0, 0, 0), (2.0, 0, 1), (3.0, 0, 2)]


def test_several_wait_for_the_same_event(cluster):
    """Everybody who waits is told, and only of the next one."""
    sim = Simulation(cluster)
    sim.submit(Request(10, 3))
    waits = [sim.next(EventType.BATCH_END) for _ in range(3)]
    assert sim.run(until=waits[0]) is waits[1].value
    sim.run()
    assert {wait.value.value.batch_index for wait in waits} == {0}


def test_a_process_may_act_on_what_it_waited_for(cluster):
    """A request submitted at a BATCH_END is in the next batch, which is formed after it."""
    sim = Simulation(cluster, record=("batches",))
    sim.submit(Request(10, 2))

    def reaction():
        yield sim.next(EventType.BATCH_END)
        yield sim.submit(Request(10, 1))

    sim.env.process(reaction())
    sim.run()
    assert sim.result().batches.request_ids.to_list() == [[0], [0, 1]]


def test_callbacks_hear_every_event_of_their_type(cluster):
    """`on` calls a function with each event, after it was handled."""
    sim = Simulation(cluster)
    sim.submit(Request(10, 3))
    completed = []
    sim.on(EventType.BATCH_END, lambda event: completed.append(event.env.now))
    sim.run()
    assert completed == [1.0, 2.0, 3.0]


def test_a_run_may_end_with_an_event(cluster):
    """A run until something happens returns its value; state is that of the instant."""
    sim = Simulation(cluster)
    first, second = sim.submit(Request(10, 2)), sim.submit(Request(10, 4))
    assert sim.run(until=first).completed_at == 2.0
    assert sim.replicas[0].num_outstanding == 1
    event = sim.run(until=sim.next(EventType.BATCH_END))
    assert (sim.env.now, event.event_type) == (3.0, EventType.BATCH_END)
    assert sim.run(until=second).completed_at == 4.0


def test_what_a_client_raises_comes_out_of_run(cluster):
    """A mistake in a user's process is not swallowed, and what was computed stays."""
    sim = Simulation(cluster)

    def client():
        yield sim.submit(Request(10, 1))
        raise ZeroDivisionError("in the client")

    sim.env.process(client())
    with pytest.raises(ZeroDivisionError, match="in the client"):
        sim.run()
    assert sim.result().figures["completed"] == 1


# Policies of the user's own


class OneByOne(vs.ContinuousBatching):
    """First come, first served, nobody beside anybody else."""

    def __init__(self, resources):
        super().__init__(resources, max_num_seqs=1)

    def schedule(self, now):
        decodes, _ = self.take_decodes()
        if decodes is not None:
            return vs.Batch(decodes)
        if self.waiting and self.num_running == 0 and self.reserve_prompt(self.waiting[0]):
            request = self.waiting.popleft()
            return vs.Batch(None, [request.schedule_chunk(request.prefill_target)])
        return None


def test_a_scheduler_of_the_users_own(make_cluster):
    """A class with `schedule` is a policy as it is: no registration."""
    sim = Simulation(make_cluster(replica_scheduler=OneByOne))
    for _ in range(3):
        sim.submit(Request(10, 2))
    sim.run()
    assert sim.result().requests.completed_at.to_list() == [2.0, 4.0, 6.0]
    assert sim.result().config["cluster"]["replica_scheduler"] == {
        "type": "python",
        "object": "OneByOne",
    }


def test_a_scheduler_that_starves_requests_is_told(make_cluster):
    """The error names the requests that can never go on, and holds all that was computed."""

    class Picky(OneByOne):
        def schedule(self, now):
            while self.waiting and self.waiting[0].num_prefill_tokens == 13:
                self.waiting.rotate(-1)
                if all(request.num_prefill_tokens == 13 for request in self.waiting):
                    return vs.Batch(self.take_decodes()[0]) if self.running else None
            return super().schedule(now)

    sim = Simulation(make_cluster(replica_scheduler=Picky))
    for prompt in (10, 13, 10, 13):
        sim.submit(Request(prompt, 2))
    with pytest.raises(SimulationError) as caught:
        sim.run()
    assert "2 requests are not complete: 1, 3. Does the replica scheduler Picky" in str(
        caught.value
    )
    result = caught.value.result
    assert result.requests.completed_at.notna().to_list() == [True, False, True, False]
    assert result.figures["unfinished"] == 2


def test_a_router_is_a_function(make_cluster):
    """A function of a request and the replicas routes; it may look at their state."""

    def by_size(request, replicas):
        return replicas[0] if request.num_prefill_tokens > 50 else replicas[1]

    sim = Simulation(make_cluster(num_replicas=2, global_scheduler=by_size))
    for prompt in (10, 100, 20, 200):
        sim.submit(Request(prompt, 1))
    sim.run()
    assert sim.result().requests.replica_id.to_list() == [1, 0, 1, 0]


def test_an_execution_time_is_a_function_of_the_batch(make_cluster):
    """It sees the batch as counts."""
    cluster = make_cluster(
        execution_time=lambda batch: 0.25 * batch.num_decodes + 0.5 * len(batch.prefills)
    )
    sim = Simulation(cluster, record=("stages",))
    for _ in range(2):
        sim.submit(Request(10, 3))
    sim.run()
    assert sim.result().stages.ended_at.to_list() == [1.0, 1.5, 2.0]


def test_an_execution_time_may_differ_by_stage(make_cluster):
    """With two parameters it is also told the stage."""
    cluster = make_cluster(
        pipeline_parallel_size=2, execution_time=lambda batch, stage_id: 1.0 + stage_id
    )
    sim = Simulation(cluster)
    assert sim.run(until=sim.submit(Request(10, 2))).completed_at == 6.0


def test_lengths_are_a_function(cluster):
    """A function of a generator and a number draws prompts and outputs."""

    def lengths(rng, num_requests):
        return rng.integers(1, 9, num_requests), np.full(num_requests, 2)

    workload = vs.Workload(vs.Constant(rate=1.0), lengths, num_requests=20)
    requests = vs.simulate(cluster, workload, seed=1).requests
    assert set(requests.num_prefill_tokens) <= set(range(1, 9))
    assert set(requests.num_decode_tokens) == {2}


def test_arrivals_are_any_object_with_arrival_times(cluster):
    """No base class: the method is enough."""

    class EveryMorning:
        def arrival_times(self, rng, num_requests=None, duration=None):
            return 86_400.0 * np.arange(num_requests)

    workload = vs.Workload(EveryMorning(), vs.FixedLengths(10, 1), num_requests=3)
    requests = vs.simulate(cluster, workload).requests
    assert requests.arrived_at.to_list() == [0.0, 86_400.0, 172_800.0]
    assert requests.completed_at.to_list() == [1.0, 86_401.0, 172_801.0]


def test_a_policy_class_instead_of_an_object_is_told():
    """A forgotten pair of parentheses is named."""
    with pytest.raises(ConfigError, match=r"Cluster.replica_scheduler = .*write Sarathi\(\.\.\.\)"):
        vs.Cluster(replica_scheduler=vs.Sarathi)
    with pytest.raises(ConfigError, match=r"Cluster.global_scheduler = .*write RoundRobin\("):
        vs.Cluster(global_scheduler=vs.RoundRobin)
    with pytest.raises(ConfigError, match=r"Cluster.execution_time = .*write Linear\("):
        vs.Cluster(execution_time=vs.Linear)


def test_a_scheduler_must_have_its_methods():
    """What lacks one is refused when the cluster is made, not in the middle of a run."""
    with pytest.raises(ConfigError, match="which has no 'schedule': expected num_waiting"):
        vs.Cluster(replica_scheduler=lambda resources: vs.ContinuousBatching(resources, 4))


def test_a_workload_must_give_requests(cluster):
    """Arrivals alone are no workload."""
    with pytest.raises(ConfigError, match="expected a Workload, a Trace or None"):
        Simulation(cluster, vs.Poisson(rate=1.0))
    with pytest.raises(ConfigError, match=r"cluster = 'h100': expected a Cluster"):
        Simulation("h100", WORKLOAD)


# Looking in between


def test_a_result_is_there_at_any_time(cluster):
    """Before anything, in the middle and at the end, with what is unfinished in it."""
    workload = vs.Workload(vs.Constant(rate=1.0), vs.FixedLengths(10, 3), num_requests=4)
    sim = Simulation(cluster, workload)
    assert len(sim.result().requests) == 0
    sim.run(until=2.5)
    figures = sim.result().figures
    assert (figures["num_requests"], figures["completed"], figures["unfinished"]) == (2, 0, 2)
    requests = sim.result().requests
    assert requests.scheduled_at.to_list() == [1.0, 2.0]
    assert requests.first_token_at.iloc[0] == 2.0
    assert requests.execution_time.to_list() == [1.0, 0.0]
    sim.run()
    assert sim.result().figures["completed"] == 4


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 1000), max_size=12),
    looks=st.booleans(),
    stages=st.sampled_from([1, 2]),
    record=st.sampled_from([(), RECORDS]),
)
def test_runs_in_pieces_equal_one_run(cuts, looks, stages, record):
    """Bit for bit, wherever the run is cut, at the instants of events too, looked at or not."""
    cluster = busy_cluster(pipeline_parallel_size=stages)
    whole = vs.simulate(cluster, WORKLOAD, seed=5, record=record)
    events = vs.simulate(cluster, WORKLOAD, seed=5, record=("events",)).events
    times = np.concatenate([events.time, np.linspace(0.01, events.time.max(), 500)])
    sim = Simulation(cluster, WORKLOAD, seed=5, record=record)
    for instant in sorted({float(times[cut * len(times) // 1001]) for cut in cuts}):
        if instant > sim.env.now:
            sim.run(until=instant)
            if looks:
                partial = sim.result()
                assert (partial.requests.completed_at.dropna() < instant).all()
                assert partial.summary().shape == (5 if record else 4, 7)
    sim.run()
    result = sim.result()
    assert whole.figures["restarts"] > 0
    assert_equal_tables(result, whole, ("requests", "replicas", "timeline", *record))
    assert result.config == whole.config
    # How many events were queued depends on how often somebody could look.
    assert result.info | {"num_events": 0} == whole.info | {"num_events": 0}


def test_a_cut_run_is_the_beginning_of_the_whole():
    """Up to the cut, `until` gives the events of the whole run."""
    whole = vs.simulate(busy_cluster(), WORKLOAD, seed=5, record=("events",))
    part = vs.simulate(busy_cluster(), WORKLOAD, seed=5, record=("events",), until=10.0)
    assert part.config["until"] == 10.0
    before = whole.events[whole.events.time < 10.0]
    assert_frame_equal(part.events, before, check_exact=True)


def test_a_user_process_that_only_watches_changes_nothing():
    """Sampling the state once a second leaves every table as it is."""
    plain = vs.simulate(busy_cluster(), WORKLOAD, seed=5, record=RECORDS)
    sim = Simulation(busy_cluster(), WORKLOAD, seed=5, record=RECORDS)
    samples = []

    def watch():
        for _ in range(100):
            yield sim.env.timeout(1.0)
            samples.append(sum(replica.num_outstanding for replica in sim.replicas))

    sim.env.process(watch())
    sim.run()
    assert max(samples) > 1
    assert_equal_tables(sim.result(), plain, ("requests", "batches", "stages", "events", "tokens"))


# The same again


@pytest.mark.parametrize("event_order", ["type", "id"])
@pytest.mark.parametrize("scheduler", ["vllm", "sarathi", "orca", "faster_transformer"])
def test_equal_seeds_give_equal_tables(scheduler, event_order):
    """Every table is equal to the last bit, with randomness in arrivals, lengths and routing."""
    cluster = busy_cluster(replica_scheduler=scheduler, global_scheduler="random")
    runs = [
        vs.simulate(cluster, WORKLOAD, seed=5, event_order=event_order, record=RECORDS)
        for _ in range(2)
    ]
    assert_equal_tables(*runs)
    assert runs[0].info == runs[1].info


def test_other_seeds_give_other_requests():
    """The seed moves arrivals and lengths."""
    ours, theirs = (vs.simulate(busy_cluster(), WORKLOAD, seed=seed).requests for seed in (1, 2))
    assert not (ours.arrived_at == theirs.arrived_at).any()
    assert not ours.num_prefill_tokens.equals(theirs.num_prefill_tokens)


def test_recording_changes_nothing():
    """Whatever is recorded, the requests and the other tables are the same."""
    everything = vs.simulate(busy_cluster(), WORKLOAD, seed=5, record=RECORDS)
    for number in range(len(RECORDS)):
        for record in combinations(RECORDS, number):
            result = vs.simulate(busy_cluster(), WORKLOAD, seed=5, record=record)
            assert_equal_tables(result, everything, ("requests", "replicas", "timeline", *record))


def test_sources_of_randomness_are_independent():
    """Random routing moves neither arrivals nor lengths; other lengths do not move arrivals."""
    columns = ["arrived_at", "num_prefill_tokens", "num_decode_tokens"]
    in_turn = vs.simulate(busy_cluster(), WORKLOAD, seed=5).requests
    at_random = vs.simulate(busy_cluster(global_scheduler="random"), WORKLOAD, seed=5).requests
    assert_frame_equal(in_turn[columns], at_random[columns], check_exact=True)
    assert not in_turn.replica_id.equals(at_random.replica_id)
    others = vs.Workload(vs.Poisson(rate=2.0), vs.FixedLengths(100, 10), num_requests=60)
    assert vs.simulate(busy_cluster(), others, seed=5).requests.arrived_at.equals(
        in_turn.arrived_at
    )


def test_the_global_generator_is_left_alone():
    """A run neither reads nor moves numpy's global state."""
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    first = vs.simulate(busy_cluster(global_scheduler="random"), WORKLOAD, seed=5)
    assert np.random.random() == expected  # noqa: NPY002
    second = vs.simulate(busy_cluster(global_scheduler="random"), WORKLOAD, seed=5)
    assert_equal_tables(first, second, ("requests",))


def test_progress_is_shown_on_demand(cluster, capsys):
    """A bar counts the requests that are done; without asking, a test sees none."""
    workload = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(10, 1), num_requests=7)
    vs.simulate(cluster, workload)
    assert capsys.readouterr().err == ""
    vs.simulate(cluster, workload, progress=True)
    assert "7/7" in capsys.readouterr().err
