"""Laws: closed forms of queueing theory, and what no run may ever gain or lose."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from against_oracle import Given
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

import vidur_simpy as vs
from vidur_simpy import EventType, Simulation

# Closed forms

RATE = 7.0
SERVICE_TIME = 0.1
LOAD = RATE * SERVICE_TIME
REPLICATIONS, NUM_REQUESTS, WARM_UP = 20, 8000, 500


def one_slot(**changes):
    """A replica that serves one request after the other, in no more than one batch each."""
    settings = {
        "max_model_len": 200_000,
        "kv_cache": vs.KVCache(num_blocks=20_000),
        "replica_scheduler": vs.Sarathi(max_num_seqs=1, chunk_size=200_000),
        "execution_time": vs.Linear(base=0.0, per_token=1e-4, per_context_token=0.0),
    }
    return vs.Cluster(**(settings | changes))


def one_thousand_tokens(rng, num_requests):
    return np.full(num_requests, 1000), np.ones(num_requests, int)


def geometric_tokens(rng, num_requests):
    return rng.geometric(1 / 1000, num_requests), np.ones(num_requests, int)


def mean_waits(cluster, lengths, rate=RATE):
    """The mean wait of each independent replication, without its warm-up."""
    workload = vs.Workload(vs.Poisson(rate), lengths, num_requests=NUM_REQUESTS)
    waits = [
        vs.simulate(cluster, workload, seed=seed).requests.scheduling_delay[WARM_UP:].mean()
        for seed in range(REPLICATIONS)
    ]
    return np.array(waits)


def assert_mean(samples, expected, confidence=0.99):
    """The expected mean lies in the confidence interval of independent samples."""
    half_width = student.ppf(0.5 + confidence / 2, len(samples) - 1) * samples.std(ddof=1)
    half_width /= math.sqrt(len(samples))
    assert abs(samples.mean() - expected) <= half_width
    # An interval that allows anything shows nothing.
    assert half_width < 0.1 * expected


@pytest.mark.slow
def test_constant_service_waits_as_m_d_1():
    """Poisson arrivals, one slot, constant service: the mean wait is rho S / (2 (1 - rho))."""
    expected = LOAD * SERVICE_TIME / (2 * (1 - LOAD))
    assert_mean(mean_waits(one_slot(), one_thousand_tokens), expected)


@pytest.mark.slow
def test_exponential_service_waits_as_m_m_1():
    """With exponential service it is rho S / (1 - rho): twice as long."""
    expected = LOAD * SERVICE_TIME / (1 - LOAD)
    assert_mean(mean_waits(one_slot(), geometric_tokens), expected)


@pytest.mark.slow
def test_random_routing_splits_poisson_arrivals():
    """Two replicas with twice the traffic, routed at random, wait as one: M/D/1 each."""
    cluster = one_slot(num_replicas=2, global_scheduler="random")
    expected = LOAD * SERVICE_TIME / (2 * (1 - LOAD))
    assert_mean(mean_waits(cluster, one_thousand_tokens, 2 * RATE), expected)


def test_regular_arrivals_never_wait():
    """D/D/1 below saturation has no queue."""
    workload = vs.Workload(vs.Constant(RATE), vs.FixedLengths(1000, 1), num_requests=100)
    requests = vs.simulate(one_slot(), workload).requests
    assert (requests.scheduling_delay == 0).all()
    assert np.allclose(requests.e2e, SERVICE_TIME, rtol=1e-9)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_pipeline_fills_and_drains(stages):
    """So many batches through so many equal stages take (batches + stages - 1) stage times."""
    cluster = one_slot(
        pipeline_parallel_size=stages,
        replica_scheduler=vs.Sarathi(max_num_seqs=stages, chunk_size=1000),
        execution_time=lambda batch: 0.5,
    )
    workload = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(1000, 1), num_requests=12)
    result = vs.simulate(cluster, workload)
    assert result.figures["makespan"] == 0.5 * (12 + stages - 1)
    assert result.figures["utilisation"] == 12 / (12 + stages - 1)


# Conservation

POLICIES = {
    "vllm": vs.Vllm(max_num_seqs=8, max_num_batched_tokens=60),
    "sarathi": vs.Sarathi(max_num_seqs=8, chunk_size=16),
    "orca": vs.Orca(max_num_seqs=8),
    "faster_transformer": vs.FasterTransformer(max_num_seqs=8),
    "lightllm": vs.LightLLM(max_num_seqs=8, max_num_batched_tokens=60),
}
RECORDS = ("batches", "stages", "tokens")


class Run(NamedTuple):
    """A finished run, and the number of requests in the system integrated while it ran."""

    sim: Simulation
    result: vs.Result
    time_in_system: float

    @property
    def completed(self):
        requests = self.result.requests
        return requests[requests.completed_at.notna()]


@st.composite
def runs(draw):
    """A small cluster, short of memory or not, and random requests, some of them too long."""
    scheduler = draw(st.sampled_from(sorted(POLICIES)))
    is_lightllm = scheduler == "lightllm"
    block_size = 1 if is_lightllm else draw(st.sampled_from([4, 16]))
    num_tokens = draw(st.sampled_from([96, 128, 800]))
    cluster = vs.Cluster(
        num_replicas=draw(st.integers(1, 3)),
        pipeline_parallel_size=1 if is_lightllm else draw(st.sampled_from([1, 2, 4])),
        max_model_len=80,
        kv_cache=vs.KVCache(block_size=block_size, num_blocks=num_tokens // block_size),
        replica_scheduler=POLICIES[scheduler],
        global_scheduler=draw(
            st.sampled_from(["round_robin", "random", "least_outstanding_requests"])
        ),
        execution_time=vs.Linear(base=0.01, per_token=1e-3),
    )
    gaps = st.floats(0.0, 0.1) | st.just(0.0)
    rows = draw(
        st.lists(st.tuples(gaps, st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=8)
        | st.lists(
            st.tuples(gaps, st.integers(1, 30), st.integers(20, 50)), min_size=8, max_size=20
        )
    )
    arrived_at = np.cumsum([gap for gap, _, _ in rows]).tolist()
    workload = [(at, *lengths) for at, (_, *lengths) in zip(arrived_at, rows, strict=True)]
    return finished(Simulation(cluster, Given(workload), record=RECORDS))


def finished(sim):
    """Run to the end; look after every event at how many requests there are."""
    since, number, total = 0.0, 0, 0.0

    def look(event):
        nonlocal since, number, total
        total += number * (sim.env.now - since)
        since = sim.env.now
        number = len(sim.router.queue) + sum(replica.num_outstanding for replica in sim.replicas)

    for event_type in EventType:
        sim.on(event_type, look)
    sim.run()
    assert number == 0
    return Run(sim, sim.result(), total)


def law(max_examples=60):
    """A property of every run."""
    return settings(
        max_examples=max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@law()
@given(runs())
def test_littles_law(run):
    """Requests in the system, integrated over time, are the times in the system, added up."""
    assert math.isclose(run.time_in_system, run.completed.e2e.sum(), rel_tol=1e-9, abs_tol=1e-12)


@law()
@given(runs())
def test_every_request_is_completed_or_refused(run):
    """Nobody is lost, whoever is refused has a reason and never ran."""
    requests = run.result.requests
    refused = requests[requests.refusal != ""]
    assert len(run.completed) + len(refused) == len(requests) == run.sim.router.num_received
    assert refused[["scheduled_at", "first_token_at", "completed_at"]].isna().all(axis=None)
    assert refused.replica_id.isna().all()
    assert sum(run.result.replicas.num_requests) == len(run.completed)


@law()
@given(runs())
def test_tokens_in_are_tokens_out(run):
    """Every output token comes out once; prompts are computed once unless they are restarted."""
    completed, batches = run.completed, run.result.batches
    assert run.result.tokens.num_tokens.sum() == (completed.num_decode_tokens - 1).sum()
    computed = batches[["request_ids", "num_tokens"]].explode(["request_ids", "num_tokens"])
    computed = computed.groupby("request_ids").num_tokens.sum()
    needed = completed.set_index("request_id").eval("num_prefill_tokens + num_decode_tokens - 1")
    extra = computed.reindex(needed.index) - needed
    has_restarted = completed.set_index("request_id").num_restarts > 0
    assert (extra[~has_restarted] == 0).all()
    assert (extra[has_restarted] > 0).all()
    for name in ("num_prefill_tokens", "num_decode_tokens"):
        assert run.result.replicas[name].sum() == batches[name].sum()


@law()
@given(runs())
def test_blocks_reserved_are_freed(run):
    """At the end every block is free; on the way there were never more than there are."""
    for replica in run.sim.replicas:
        pool = replica.pool
        assert pool.num_free == pool.num_blocks
        assert 0 <= pool.num_free_least <= pool.num_blocks
        assert (replica.scheduler.num_running, replica.scheduler.num_waiting) == (0, 0)
    assert run.result.timeline.kv_cache_usage.between(0, 1).all()
    # Orca and FasterTransformer fill every batch in the pipeline.
    assert (run.result.timeline.num_running <= 8 * len(run.sim.replicas[0].stages)).all()


@law()
@given(runs())
def test_nothing_ends_before_it_starts(run):
    """Requests, batches and stages have their instants in order, and stages one batch at a time."""
    completed, batches, stages = run.completed, run.result.batches, run.result.stages
    assert (completed.arrived_at <= completed.scheduled_at).all()
    assert (completed.scheduled_at < completed.first_token_at).all()
    assert (completed.first_token_at <= completed.completed_at).all()
    assert (batches.scheduled_at < batches.completed_at).all()
    assert (stages.started_at < stages.ended_at).all()
    for _, stage in stages.groupby(["replica_id", "stage_id"]):
        assert (stage.started_at.to_numpy()[1:] >= stage.ended_at.to_numpy()[:-1]).all()
    for _, batch in stages.groupby(["replica_id", "batch_index"]):
        assert batch.stage_id.to_list() == list(range(len(run.sim.replicas[0].stages)))


@law()
@given(runs())
def test_every_second_of_a_request_is_accounted_for(run):
    """Waiting for the first batch, execution and waiting in between make up the whole."""
    completed = run.completed[run.completed.num_restarts == 0]
    parts = completed.scheduling_delay + completed.execution_time + completed.preempted_time
    assert np.allclose(parts, completed.e2e, rtol=0, atol=1e-9)
    assert (completed.preempted_time >= 0).all()


@law()
@given(runs())
def test_utilisation_is_the_busy_time_of_the_stages(run):
    """It is between 0 and 1 and equal to what the stages table adds up to."""
    stages, now = run.result.stages, run.result.info["simulated_time"]
    num_stages = len(run.sim.replicas[0].stages)
    for replica in run.result.replicas.itertuples():
        own = stages[stages.replica_id == replica.replica_id]
        busy_time = (own.ended_at - own.started_at).sum()
        assert 0 <= replica.utilisation <= 1 + 1e-12
        assert math.isclose(
            replica.utilisation * num_stages * now, busy_time, rel_tol=1e-9, abs_tol=1e-12
        )
        assert replica.num_batches == len(own) / num_stages


@law(20)
@given(runs())
def test_the_clock_stops_with_the_last_request(run):
    """A run ends with the last completion or refusal; nothing trails behind."""
    if len(run.completed):
        assert run.result.info["simulated_time"] == run.result.requests[
            ["arrived_at", "completed_at"]
        ].max(axis=None)
