"""One big run in shards: the tables are those of the single run, to the last bit and row."""

from __future__ import annotations

import dataclasses

import joblib
import numpy as np
import pandas as pd
import pytest
from against_oracle import Given, cluster_of
from against_vllm_v1 import Given as RequestsOfVllm
from against_vllm_v1 import cluster_of as cluster_of_vllm
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.golden import case_folders, read_case
from oracle.vllm_v1 import read_vllm_v1_case
from test_golden_vllm import FOLDERS as VLLM_FOLDERS

import vidur_simpy as vs
from vidur_simpy.workload import RequestArrays

RECORDS = ("batches", "stages", "events", "tokens")
FOLDERS = case_folders()


def same(ours, theirs):
    """Tables with their rows, order, types and bits; configuration and time."""
    assert ours.tables == theirs.tables
    for name in ours.tables:
        pd.testing.assert_frame_equal(
            getattr(ours, name), getattr(theirs, name), check_exact=True, obj=name
        )
    assert ours.config == theirs.config
    assert ours.info["simulated_time"] == theirs.info["simulated_time"]
    return True


def in_shards(cluster, workload, shards, **options):
    """The same, here instead of in worker processes."""
    with joblib.parallel_config(n_jobs=1):
        return vs.simulate(cluster, workload, shards=shards, progress=False, **options)


@pytest.fixture
def cluster():
    """Replicas whose batches end at the same instants again and again."""
    return vs.Cluster(
        num_replicas=5,
        pipeline_parallel_size=2,
        max_model_len=512,
        kv_cache=vs.KVCache(num_blocks=60),
        execution_time=vs.Linear(base=0.125, per_token=0.0, per_context_token=0.0),
    )


@pytest.fixture
def workload():
    """Enough to keep them busy."""
    lengths = vs.UniformLengths(min_tokens=20, max_tokens=300, prefill_to_decode_ratio=8.0)
    return vs.Workload(vs.Poisson(rate=30.0), lengths, num_requests=120)


# Exactly equal


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="no golden cases here or beside the checkout")
@pytest.mark.parametrize(
    ("router", "event_order", "record"),
    [("round_robin", "type", ()), ("random", "type", RECORDS), ("random", "id", RECORDS)],
)
def test_every_golden_case_is_the_same_in_shards(router, event_order, record):
    """All their workloads and schedulers, on four replicas."""
    options = {"event_order": event_order, "record": record}
    for folder in FOLDERS:
        case, rows, _ = read_case(folder)
        cluster = dataclasses.replace(cluster_of(case), num_replicas=4, global_scheduler=router)
        requests = Given(rows)
        single = vs.simulate(cluster, requests, **options)
        assert same(in_shards(cluster, requests, 4, **options), single), folder.name


@pytest.mark.skipif(not FOLDERS, reason="no golden cases here or beside the checkout")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_golden_case_is_the_same_as_it_is(folder):
    """On the replicas that it has, if its own router does not look at them; else it is refused."""
    case, rows, expected = read_case(folder)
    cluster, requests = cluster_of(case), Given(rows)
    if case.global_scheduler != "round_robin":
        with pytest.raises(vs.ConfigError, match="cannot be simulated apart"):
            in_shards(cluster, requests, 4)
        return
    for event_order in expected.event_orders:
        options = {"event_order": event_order, "record": RECORDS}
        single = vs.simulate(cluster, requests, **options)
        assert same(in_shards(cluster, requests, 4, **options), single)


@pytest.mark.slow
@pytest.mark.skipif(not VLLM_FOLDERS, reason="no golden vLLM cases here or beside the checkout")
@pytest.mark.parametrize("record", [(), RECORDS])
def test_golden_vllm_cases_are_the_same_in_shards(record):
    """The engine of vLLM with prefix caching, preemptions and asynchronous steps, four times."""
    for name, folder in VLLM_FOLDERS.items():
        case, rows = read_vllm_v1_case(folder)
        cluster = cluster_of_vllm(case, num_replicas=4)
        requests = RequestsOfVllm(rows, case.hash_block_size, 1e9)
        single = vs.simulate(cluster, requests, record=record)
        assert same(in_shards(cluster, requests, 4, record=record), single), name


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(2, 8),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=1, max_size=25),
    st.sampled_from(["round_robin", "random"]),
    st.sampled_from(["type", "id"]),
    st.sampled_from([None, 1.25, 2.75]),
    st.sampled_from([1, 2]),
)
def test_ties_come_in_the_order_of_the_single_run(
    num_replicas, shards, times, router, event_order, until, num_stages
):
    """Simultaneous arrivals and equal durations, some requests too long: events and all."""
    cluster = vs.Cluster(
        num_replicas=num_replicas,
        pipeline_parallel_size=num_stages,
        max_model_len=200,
        kv_cache=vs.KVCache(num_blocks=20),
        global_scheduler=router,
        execution_time=lambda batch: 0.5,
    )
    sizes = np.random.default_rng(len(times)).integers(1, 120, (2, len(times)))
    requests = RequestArrays(np.sort(times), sizes[0], sizes[1] // 8 + 1)
    options = {"event_order": event_order, "until": until, "record": RECORDS}

    class Requests:
        def requests(self, *_):
            return requests

        def __repr__(self):
            return "requests"

    workload = Requests()
    single = vs.simulate(cluster, workload, **options)
    assert same(in_shards(cluster, workload, shards, **options), single)


@pytest.mark.parametrize("router", ["round_robin", "random"])
@pytest.mark.parametrize("until", [None, 2.1])
def test_any_number_of_shards_is_the_same(cluster, workload, router, until):
    """Also more than there are replicas, and when the run is stopped with batches under way."""
    cluster = dataclasses.replace(cluster, global_scheduler=router)
    single = vs.simulate(cluster, workload, until=until, seed=3)
    for shards in (1, 2, 5, 9):
        assert same(in_shards(cluster, workload, shards, until=until, seed=3), single)


def test_columns_that_only_some_shards_have_are_merged(cluster):
    """A deadline, a priority or a session that few requests have; identifiers of one's own."""
    num_requests = 40
    deadline = np.full(num_requests, np.nan)
    deadline[3] = 9.0
    requests = RequestArrays(
        np.arange(num_requests) * 0.1,
        np.full(num_requests, 100),
        np.full(num_requests, 5),
        request_id=np.arange(num_requests)[::-1] * 10,
        priority=np.eye(1, num_requests, 7, dtype=np.int64)[0],
        deadline=deadline,
        session_id=np.array(["a"] + [""] * (num_requests - 1)),
    )
    workload = Given([])
    workload.requests = lambda *_: requests
    single = vs.simulate(cluster, workload, record=RECORDS)
    assert {"priority", "deadline", "session_id"} <= set(single.requests)
    assert same(in_shards(cluster, workload, 3, record=RECORDS), single)


def test_outputs_that_end_early_are_merged():
    """A scheduler that cuts outputs at max_model_len, in one shard only."""
    cluster = vs.Cluster(
        num_replicas=4,
        max_model_len=200,
        kv_cache=vs.KVCache(num_blocks=100),
        replica_scheduler="vllm_v1",
        execution_time=vs.Linear(),
    )
    outputs = np.array([5, 5, 150, 5, 5, 5, 5, 5])
    requests = RequestArrays(np.arange(8) * 0.1, np.full(8, 100), outputs)
    workload = Given([])
    workload.requests = lambda *_: requests
    assert same(in_shards(cluster, workload, 4), vs.simulate(cluster, workload))


def test_prefix_caches_are_merged():
    """A replica's own figures are in its row."""
    cluster = vs.Cluster(num_replicas=3, replica_scheduler="vllm_v1", execution_time=vs.Linear())
    blocks = [np.array([1, 2, 3 + row % 2]) for row in range(12)]
    requests = RequestArrays(
        np.arange(12) * 0.05, np.full(12, 1500), np.full(12, 8), hash_ids=blocks
    )
    workload = Given([])
    workload.requests = lambda *_: requests
    single = vs.simulate(cluster, workload)
    assert single.replicas["num_cached_tokens"].sum() > 0
    assert same(in_shards(cluster, workload, 3), single)


def test_operators_are_merged():
    """Sums by stage and kind of batch, in order of their first occurrence."""
    cluster = vs.Cluster(num_replicas=3, pipeline_parallel_size=2, max_model_len=4096)
    workload = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(600, 4), num_requests=7)
    single = vs.simulate(cluster, workload, record="operators")
    assert same(in_shards(cluster, workload, 2, record="operators"), single)


def test_worker_processes_and_many_replicas():
    """64 replicas on two workers."""
    cluster = vs.Cluster(
        num_replicas=64, max_model_len=8192, global_scheduler="random", execution_time=vs.Linear()
    )
    lengths = vs.PublishedLengths("azure-conv-2023")
    workload = vs.Workload(vs.Poisson(rate=250.0), lengths, num_requests=1000)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        ours = vs.simulate(cluster, workload, shards=4)
    assert same(ours, vs.simulate(cluster, workload))


@pytest.mark.slow
def test_a_thousand_replicas():
    """1,024 replicas in four shards on two workers."""
    cluster = vs.Cluster(
        num_replicas=1024, max_model_len=8192, global_scheduler="random", execution_time=vs.Linear()
    )
    lengths = vs.PublishedLengths("azure-conv-2023")
    workload = vs.Workload(vs.Poisson(rate=4000.0), lengths, num_requests=10_000)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        ours = vs.simulate(cluster, workload, shards=4)
    assert same(ours, vs.simulate(cluster, workload))


# Who may


@pytest.mark.parametrize(
    ("router", "looked_at"),
    [
        ("least_outstanding_requests", "num_outstanding"),
        ("least_waiting_requests", "num_waiting"),
        (lambda request, replicas: max(replicas, key=lambda each: each.pool.num_free), "pool"),
    ],
)
def test_a_router_that_looks_is_refused(cluster, workload, router, looked_at):
    """The message says at what, why that matters, and what to do."""
    cluster = dataclasses.replace(cluster, global_scheduler=router)
    with pytest.raises(vs.ConfigError, match=f"looks at '{looked_at}'.*cannot be simulated apart"):
        in_shards(cluster, workload, 2)


def test_a_router_of_the_users_own_that_does_not_look_will_do(cluster, workload):
    """By the length of the prompt, say."""

    def by_length(request, replicas):
        return replicas[request.num_prefill_tokens % len(replicas)]

    cluster = dataclasses.replace(cluster, global_scheduler=by_length)
    single = vs.simulate(cluster, workload, record=RECORDS)
    assert same(in_shards(cluster, workload, 3, record=RECORDS), single)


def test_a_router_that_names_no_replica_is_told(cluster, workload):
    """As in a single run."""
    cluster = dataclasses.replace(cluster, global_scheduler=lambda request, replicas: 3)
    with pytest.raises(vs.SimulationError, match="the router gave 3 for <Request 0"):
        in_shards(cluster, workload, 2)


@pytest.mark.parametrize("shards", [0, -1, 1.5, "two"])
def test_a_number_of_shards_is_a_number(cluster, workload, shards):
    """At least one."""
    with pytest.raises(vs.ConfigError, match=r"shards = .*: expected an integer >= 1"):
        in_shards(cluster, workload, shards)


def test_a_shard_that_fails_keeps_what_all_computed(cluster, workload):
    """The message names its replicas, the result has every shard's rows."""

    def fails_late(batch, stage_id):
        return -1.0 if batch.replica_id == 4 and batch.batch_index > 10 else 0.125

    cluster = dataclasses.replace(cluster, execution_time=fails_late)
    with pytest.raises(vs.SimulationError, match="replicas 3 to 4: the execution time") as failed:
        in_shards(cluster, workload, 2)
    requests = failed.value.result.requests
    assert requests.loc[requests["replica_id"] < 3, "completed_at"].notna().all()
    assert requests.loc[requests["replica_id"] == 4, "completed_at"].isna().any()
