"""Who goes first of those that wait, under every scheduler that has a queue."""

from __future__ import annotations

import csv
from operator import attrgetter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy import Request
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.replica_scheduler import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import (
    LoneTimes,
    ResortedQueue,
    SortedQueue,
    WaitingQueue,
    edf,
    fcfs,
    lrs,
    priority,
    queue_of,
    sjf,
)
from vidur_simpy.workload import RequestArrays

POLICIES = {
    "vllm": vs.Vllm,
    "sarathi": vs.Sarathi,
    "orca": vs.Orca,
    "faster_transformer": vs.FasterTransformer,
    "lightllm": vs.LightLLM,
}


class Table:
    """A workload of given columns."""

    def __init__(self, *columns, **optional):
        self.table = RequestArrays(*map(np.asarray, columns), **optional)

    def requests(self, *_):
        return self.table


def one_at_a_time(policy, **changes):
    """A replica that serves one request after the other, a second per batch."""
    is_lightllm = isinstance(policy, vs.LightLLM)
    settings = {
        "max_model_len": 1000,
        "kv_cache": vs.KVCache(num_blocks=2000, block_size=1 if is_lightllm else 16),
        "replica_scheduler": policy,
        "execution_time": lambda batch: 1.0,
    }
    return vs.Cluster(**(settings | changes))


def served(cluster, workload):
    """Request ids in the order in which they were first scheduled."""
    requests = vs.simulate(cluster, workload).requests
    assert requests.completed_at.notna().all()
    return requests.sort_values("scheduled_at", kind="stable").request_id.to_list()


def queued(queue, *requests):
    for request in requests:
        queue.append(request)
    return queue


def resources(**changes):
    return ReplicaResources(pool=BlockPool(100, 16), max_model_len=1000, **changes)


# Queues


@given(st.lists(st.tuples(st.sampled_from(["new", "back", "take", "drop"]), st.integers(1, 5))))
def test_a_sorted_queue_is_a_stable_sort(steps):
    """New requests go behind their equals, those that come back ahead of them."""
    queue, plain = SortedQueue(attrgetter("num_prefill_tokens")), []
    for step, number in steps:
        if step == "new":
            plain.append(Request(number, 1))
            queue.append(plain[-1])
        elif step == "back":
            plain.insert(0, Request(number, 1))
            queue.appendleft(plain[0])
        elif step == "take" and plain:
            assert queue.popleft() is plain.pop(0)
        elif plain:
            position = number % len(plain)
            del queue[position], plain[position]
        plain.sort(key=attrgetter("num_prefill_tokens"))
        assert list(queue) == plain


def test_first_come_first_served_is_a_plain_queue():
    """No key is looked at, and who comes back after a preemption goes to the head."""
    queue = queue_of("fcfs", resources())
    assert type(queue) is WaitingQueue
    first, second, back = Request(1, 1), Request(1, 1), Request(1, 1)
    queued(queue, first, second).appendleft(back)
    queue.order(1.0)
    assert list(queue) == [back, first, second]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (lambda request: 0, SortedQueue),
        (lambda request, now: 0, ResortedQueue),
        (lambda request, *, factor=2: 0, SortedQueue),
        (attrgetter("priority"), SortedQueue),
        ("edf", SortedQueue),
        ("sjf", SortedQueue),
        ("spt", SortedQueue),
        ("priority", SortedQueue),
        ("lrs", ResortedQueue),
    ],
)
def test_a_key_that_takes_the_time_is_resorted(key, kind):
    """A key of the request alone keeps its queue sorted by insertion."""
    assert type(queue_of(key, resources())) is kind


def test_a_key_of_time_is_evaluated_at_every_formation():
    """The order of two requests may turn while they wait."""
    early, late = Request(1, 1, 0.0, priority=0), Request(1, 1, 5.0, priority=1)
    queue = queued(
        queue_of(lambda request, now: abs(now - request.arrived_at), resources()), early, late
    )
    for now, head in ((1.0, early), (9.0, late), (0.0, early)):
        queue.order(now)
        assert queue[0] is head


# Keys


def test_keys_of_requests():
    """Arrival, deadline, prompt and urgency decide; the number of the request breaks ties."""
    request = Request(30, 5, 2.0, request_id=7, priority=-1, deadline=4.5)
    assert fcfs(request) == (2.0, 7)
    assert edf(request) == (4.5, 7)
    assert sjf(request) == (30, 7)
    assert priority(request) == (-1, 2.0, 7)


def test_slack_is_a_share_of_the_time_given():
    """Ten seconds were given, four have gone and two are needed: 40 % are left."""
    key = lrs(lambda request: 2.0)
    assert key(Request(1, 1, 1.0, deadline=11.0), 5.0) == pytest.approx(0.4)
    assert key(Request(1, 1, 1.0, deadline=1.0), 5.0) == float("-inf")


def test_lone_times_add_prefill_and_decode_steps():
    """Predicted by the replica's own execution times, over all pipeline stages."""
    times = LoneTimes(
        resources(
            pipeline_parallel_size=2,
            stage_time=lambda batch, stage_id: batch.num_tokens + batch.total_context / 1000,
        )
    )
    assert times.prefill(Request(100, 9)) == 2 * (100 + 0.1)
    # Two decode steps, with 102 and 103 tokens of context.
    assert times.processing(Request(100, 3)) == pytest.approx(2 * 100.1 + 2 * 2 * 1.103, abs=0.01)
    assert times.processing(Request(100, 1)) == times.prefill(Request(100, 1))


def test_predictions_need_execution_times():
    """A scheduler made by hand, without them, is told so."""
    queue = queue_of("spt", resources())
    queue.append(Request(1, 1))
    with pytest.raises(vs.ConfigError, match=r"ReplicaResources\.stage_time is None"):
        queue.append(Request(2, 1))


# Under every scheduler

COLUMNS = {
    "arrived_at": [0.0, 0.5, 0.5, 0.5],
    "num_prefill_tokens": [10, 30, 10, 20],
    "num_decode_tokens": [4, 3, 8, 1],
    "priority": [0, 0, 0, -3],
    "deadline": [9.0, 6.0, 100.0, 7.0],
}
ORDERS = {
    "fcfs": [0, 1, 2, 3],
    "edf": [0, 1, 3, 2],
    "lrs": [0, 1, 3, 2],
    "sjf": [0, 2, 3, 1],
    "spt": [0, 3, 1, 2],
    "priority": [0, 3, 1, 2],
}


@pytest.mark.parametrize("ordering", ORDERS)
@pytest.mark.parametrize("name", POLICIES)
def test_each_ordering_under_each_scheduler(name, ordering):
    """One request runs; the three that wait behind it go in the order asked for."""
    cluster = one_at_a_time(POLICIES[name](max_num_seqs=1, ordering=ordering))
    assert served(cluster, Table(**COLUMNS)) == ORDERS[ordering]


@pytest.mark.parametrize("name", POLICIES)
def test_a_function_of_ones_own(name):
    """Longest output first, and last come first served: a line in a notebook cell."""
    longest = POLICIES[name](max_num_seqs=1, ordering=lambda request: -request.num_decode_tokens)
    assert served(one_at_a_time(longest), Table(**COLUMNS)) == [0, 2, 1, 3]
    newest = POLICIES[name](
        max_num_seqs=1, ordering=lambda request, now: (-request.arrived_at, -request.request_id)
    )
    assert served(one_at_a_time(newest), Table(**COLUMNS)) == [0, 3, 2, 1]


def test_a_deadline_per_class():
    """A key derives deadlines from classes that the workload names."""
    slo = {0: 60.0, -3: 1.0}
    policy = vs.Sarathi(
        max_num_seqs=1, ordering=lambda request: request.arrived_at + slo[request.priority]
    )
    assert served(one_at_a_time(policy), Table(**COLUMNS)) == [0, 3, 1, 2]


def test_deadlines_from_a_trace(tmp_path):
    """A column of the file orders the requests and is a column of the result."""
    path = tmp_path / "trace.csv"
    names = ["arrived_at", "num_prefill_tokens", "num_decode_tokens", "deadline"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *zip(*(COLUMNS[name] for name in names), strict=True)])
    cluster = one_at_a_time(vs.Vllm(max_num_seqs=1, ordering="edf"))
    result = vs.simulate(cluster, vs.Trace(path=str(path)))
    assert result.requests.deadline.to_list() == COLUMNS["deadline"]
    assert result.requests.scheduled_at.sort_values().index.to_list() == ORDERS["edf"]


def test_a_preempted_request_comes_back_by_its_key():
    """Under memory pressure as well the shortest prompts go first, and everybody completes."""
    cluster = one_at_a_time(
        vs.Sarathi(ordering="sjf", max_num_seqs=8),
        max_model_len=80,
        kv_cache=vs.KVCache(num_blocks=24, block_size=4, watermark=0.0),
    )
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 40, (2, 30))
    result = vs.simulate(cluster, Table(np.sort(rng.random(30)), *lengths))
    assert result.requests.completed_at.notna().all()
    assert result.requests.num_restarts.sum() > 0


# Properties


@st.composite
def alike(draw):
    """Requests of one length with deadlines, that arrive in heaps."""
    lengths = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    rows = draw(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]), st.integers(0, 30)),
            min_size=2,
            max_size=20,
        )
    )
    arrived_at = np.cumsum([gap for gap, _ in rows])
    return Table(
        arrived_at,
        np.full(len(rows), lengths[0]),
        np.full(len(rows), lengths[1]),
        deadline=arrived_at + np.array([float(given) for _, given in rows]),
    )


def assert_urgent_first(requests):
    """At the instant that somebody is served nobody waits whose deadline is earlier."""
    for row in requests.itertuples():
        waits = (requests.arrived_at <= row.scheduled_at) & (
            requests.scheduled_at > row.scheduled_at
        )
        assert not (requests.deadline[waits] < row.deadline).any(), row


@pytest.mark.parametrize("name", [*POLICIES, "mnemosyne"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_later_deadline_overtakes(name, data):
    """Under EDF with equal lengths no later deadline is served before an earlier that waits."""
    if name == "mnemosyne":
        # Time is short, not memory: who got that keeps it, as in Vidur.
        policy = vs.Mnemosyne(ordering="edf", target_batch_time=data.draw(st.floats(0.5, 2.0)))
    else:
        policy = POLICIES[name](ordering="edf", max_num_seqs=data.draw(st.integers(1, 4)))
    requests = vs.simulate(one_at_a_time(policy), data.draw(alike())).requests
    assert requests.completed_at.notna().all()
    assert_urgent_first(requests)


@pytest.mark.parametrize("name", ["vllm", "sarathi"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_later_deadline_overtakes_when_memory_is_short(name, data):
    """Nor when requests are preempted: they come back by their deadline, too."""
    cluster = one_at_a_time(
        POLICIES[name](ordering="edf"),
        max_model_len=64,
        kv_cache=vs.KVCache(num_blocks=data.draw(st.integers(17, 40)), block_size=4),
    )
    requests = vs.simulate(cluster, data.draw(alike())).requests
    assert_urgent_first(requests[requests.refusal == ""])


@pytest.mark.parametrize("name", [*POLICIES, "mnemosyne"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nobody_starves_under_fcfs(name, data):
    """All complete, and nobody is served for the first time after one who came later."""
    lengths = st.tuples(st.integers(1, 40), st.integers(1, 40))
    rows = data.draw(st.lists(lengths, min_size=1, max_size=25))
    arrived_at = np.arange(len(rows)) * data.draw(st.sampled_from([0.0, 0.3, 2.0]))
    policies = POLICIES | {"mnemosyne": vs.Mnemosyne}
    is_small = name not in ("orca", "faster_transformer", "lightllm")
    cluster = one_at_a_time(
        policies[name](max_num_seqs=data.draw(st.integers(1, 6))),
        max_model_len=80,
        kv_cache=vs.KVCache(
            num_blocks=data.draw(st.integers(21, 60)) if is_small else 160,
            block_size=1 if name == "lightllm" else 4,
            watermark=0.0,
        ),
    )
    requests = vs.simulate(cluster, Table(arrived_at, *np.array(rows).T)).requests
    assert requests.completed_at.notna().all()
    if name != "mnemosyne":  # which lets up to ten be passed over when memory is short
        assert requests.scheduled_at.is_monotonic_increasing


# Bad input


@pytest.mark.parametrize("ordering", ["edf", "lrs"])
@pytest.mark.parametrize("policy", [vs.Vllm, vs.Sarathi])
def test_a_missing_deadline_is_named(policy, ordering):
    """One sentence with the request and what to give; a row without deadline among others, too."""
    columns = COLUMNS | {"deadline": [9.0, float("nan"), 5.0, 7.0]}
    message = f"request 1 has no deadline, which the ordering '{ordering}' needs: give the trace a"
    with pytest.raises(vs.SimulationError, match=message):
        vs.simulate(one_at_a_time(policy(ordering=ordering)), Table(**columns))


@pytest.mark.parametrize(
    ("ordering", "message"),
    [
        ("edff", r"unknown ordering 'edff': did you mean 'edf'\? Known: edf, fcfs, lrs, "),
        ("st", "which only mnemosyne does: expected 'lrs' for the same order"),
        (5, r"ordering = 5: expected a function of \(request\) or \(request, now\)"),
        (lambda: 0, "expected a function of"),
        (lambda request, now, more: 0, "expected a function of"),
    ],
)
def test_a_bad_ordering_is_told(ordering, message):
    """At construction, with what is known."""
    for policy in POLICIES.values():
        with pytest.raises(vs.ConfigError, match=message):
            policy(ordering=ordering)


def test_orderings_in_configurations():
    """A name can be written down and read; a function is told, not stored."""
    config = {"cluster": {"replica_scheduler": {"type": "sarathi", "ordering": "edf"}}}
    cluster = vs.load_config(config)["cluster"]
    assert cluster.replica_scheduler == vs.Sarathi(ordering="edf")
    dumped = vs.dump_config(cluster=cluster)
    assert vs.load_config(dumped)["cluster"] == cluster
    dumped = vs.dump_config(cluster=one_at_a_time(vs.Sarathi(ordering=sjf)))
    assert dumped["cluster"]["replica_scheduler"]["ordering"] == {"type": "python", "object": "sjf"}
    with pytest.raises(vs.ConfigError, match=r"ordering was the Python object sjf"):
        vs.load_config({"cluster": {"replica_scheduler": dumped["cluster"]["replica_scheduler"]}})
    with pytest.raises(vs.ConfigError, match="unknown ordering 'fifo'"):
        vs.load_config({"cluster": {"replica_scheduler": {"type": "vllm", "ordering": "fifo"}}})
