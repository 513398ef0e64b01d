"""The fast engine leaves what stepping through every event leaves, to the last bit."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from against_oracle import Given
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy.kernel import EventType

SCHEDULERS: dict[str, Any] = {
    "vllm": vs.Vllm(max_num_seqs=6),
    "sarathi": vs.Sarathi(max_num_seqs=6, chunk_size=64),
    "sarathi_sjf": vs.Sarathi(max_num_seqs=4, chunk_size=64, ordering="sjf"),
    "sarathi_by_age": vs.Sarathi(
        max_num_seqs=4,
        chunk_size=64,
        ordering=lambda request, now: (request.arrived_at - now) * request.num_prefill_tokens,
    ),
    "orca": vs.Orca(max_num_seqs=6),
    "faster_transformer": vs.FasterTransformer(max_num_seqs=4),
    "lightllm": vs.LightLLM(max_num_seqs=6, max_waiting_iterations=3),
    "mnemosyne": vs.Mnemosyne(max_num_seqs=6, chunk_size=64, target_batch_time=None),
    "vllm_v1": vs.VllmV1(max_num_seqs=6, max_num_batched_tokens=64),
    "vllm_v1_async": vs.VllmV1(max_num_seqs=6, max_num_batched_tokens=64, async_scheduling=True),
    "vllm_v1_cached": vs.VllmV1(max_num_seqs=6, enable_prefix_caching=True),
}
EXECUTION_TIMES = {
    "linear": vs.Linear(),
    "ties": vs.Linear(base=0.25, per_token=0.0, per_context_token=0.0),
    "roofline": vs.Roofline(),
}


def by_most_free_blocks(request: vs.Request, replicas: Any) -> Any:
    """A router that looks into the KV caches."""
    return max(replicas, key=lambda replica: replica.pool.num_free)


def run(
    cluster: vs.Cluster, rows: list[tuple[float, int, int]], stops: list[float], is_watched: bool
) -> tuple[vs.Result, list[Any]]:
    """Run with or without a listener, and look at the replicas at some instants."""
    sim = vs.Simulation(cluster, Given(rows), progress=False)
    if is_watched:
        sim.on(EventType.BATCH_END, lambda event: None)
    seen: list[Any] = []

    def look() -> None:
        for replica in sim.replicas:
            running = [batch.decode_context for batch in replica.stages[0].users]
            seen.append((replica.num_batches, replica.pool.num_free, replica.utilisation, running))

    def looking() -> Any:
        while True:
            yield sim.env.timeout(1.61)
            look()

    sim.env.process(looking())
    for stop in sorted({stop for stop in stops if stop > 0}):
        sim.run(until=stop)
        look()
        seen.append(sim.result().requests.to_dict("records"))
    sim.run(until=300.0)
    return sim.result(), seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fast_engine_equals_stepping(scheduler: str, data: st.DataObject) -> None:
    """Requests, replicas, timeline and what is seen on the way are equal, whatever happens."""
    gaps = st.sampled_from([0.0, 0.25, 0.01, 1.0, 3.5])
    rows, now = [], 0.0
    for gap, prompt, output in data.draw(
        st.lists(st.tuples(gaps, st.integers(1, 90), st.integers(1, 400)), min_size=1, max_size=12)
    ):
        now += gap
        rows.append((now, prompt, output))
    block_size = 1 if scheduler == "lightllm" else data.draw(st.sampled_from([1, 4, 16]))
    longest = -(-512 // block_size)  # in blocks
    cluster = vs.Cluster(
        model="llama-3-8b",
        device="a100-80gb-sxm",
        num_replicas=data.draw(st.integers(1, 2)),
        max_model_len=512,
        kv_cache=vs.KVCache(
            block_size=block_size,
            num_blocks=data.draw(st.integers(longest + 2, 2 * longest) | st.just(50_000)),
        ),
        replica_scheduler=SCHEDULERS[scheduler],
        global_scheduler=data.draw(
            st.sampled_from(["round_robin", "least_outstanding_requests", by_most_free_blocks])
        ),
        execution_time=EXECUTION_TIMES[data.draw(st.sampled_from(sorted(EXECUTION_TIMES)))],
    )
    stops = data.draw(st.lists(st.sampled_from([0.3, 1.0, 2.25, 4.1]), max_size=2))
    fast, seen = run(cluster, rows, stops, is_watched=False)
    stepped, expected = run(cluster, rows, stops, is_watched=True)
    for table in ("requests", "replicas", "timeline"):
        ours, theirs = getattr(fast, table), getattr(stepped, table)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert str(seen) == str(expected)


def test_a_run_is_one_event() -> None:
    """A lone request with a long output takes a handful of events, and says so."""
    cluster = vs.Cluster(model="llama-3-8b", execution_time=vs.Linear(), max_model_len=8_192)
    fast = vs.simulate(cluster, Given([(0.0, 100, 5_000)]))
    stepped = vs.simulate(cluster, Given([(0.0, 100, 5_000)]), record=("batches",))
    assert int(fast.replicas.num_batches[0]) == len(stepped.batches) == 5_000
    assert fast.info["num_events"] < 50 < 5_000 < stepped.info["num_events"]


def test_pieces_of_a_prompt_that_end_together_wait_as_in_the_processes() -> None:
    """Stage after stage ends at one instant; the last piece waits since the one before it."""
    waits = []
    for is_watched in (False, True):
        cluster = vs.Cluster(
            replica_scheduler=vs.Sarathi(chunk_size=4, max_num_seqs=64),
            pipeline_parallel_size=4,
            sequence_pipeline_parallel=True,
            execution_time=vs.Linear(base=0.0, per_token=0.0, per_context_token=1e-4),
            kv_cache=vs.KVCache(num_blocks=1000, watermark=0.0),
            max_model_len=512,
        )
        sim = vs.Simulation(cluster)
        sim.submit(vs.Request(20, 1))
        sim.submit(vs.Request(11, 1))
        if is_watched:
            sim.on(vs.EventType.BATCH_END, lambda event: None)
        sim.run()
        waits.append(sim.result().requests.preempted_time.to_list())
    assert waits[0] == waits[1]
    assert waits[0] == pytest.approx([0.0, 1e-4])
