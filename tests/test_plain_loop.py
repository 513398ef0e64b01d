"""A run that nobody can look into is one plain loop, and leaves what the processes leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import pandas as pd
import pytest
from against_oracle import Given
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy.execution_time.linear import LinearStageTime
from vidur_simpy.metrics import Timeline
from vidur_simpy.plain_loop import loop as plain_loop
from vidur_simpy.request_log import RequestLog

SCHEDULERS: dict[str, Any] = {
    "vllm": vs.Vllm(max_num_seqs=5, max_num_batched_tokens=200),
    "vllm_few": vs.Vllm(max_num_seqs=4),
    "sarathi": vs.Sarathi(max_num_seqs=6, chunk_size=64),
    "sarathi_narrow": vs.Sarathi(max_num_seqs=6, chunk_size=4),
}
EXECUTION_TIMES = {
    "linear": vs.Linear(),
    "ties": vs.Linear(base=0.25, per_token=0.0, per_context_token=0.0),
    "at_once": vs.Linear(base=0.0, per_token=0.0, per_context_token=0.0),
    "roofline": vs.Roofline(),
}
ROUTERS = ["round_robin", "random", "least_outstanding_requests", "least_waiting_requests"]


def cluster(**settings: Any) -> vs.Cluster:
    """A small cluster."""
    given = {"model": "llama-3-8b", "device": "a100-80gb-sxm", "max_model_len": 512}
    return vs.Cluster(**given | settings)


@st.composite
def clusters(draw: st.DrawFn) -> vs.Cluster:
    """Clusters that the loop knows, short of memory or not."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    longest = -(-512 // block_size)  # in blocks
    blocks = st.integers(longest + 2, 2 * longest) | st.just(50_000)
    return cluster(
        num_replicas=draw(st.integers(1, 3)),
        pipeline_parallel_size=draw(st.sampled_from([1, 1, 2, 4])),
        kv_cache=vs.KVCache(block_size=block_size, num_blocks=draw(blocks)),
        replica_scheduler=SCHEDULERS[draw(st.sampled_from(sorted(SCHEDULERS)))],
        global_scheduler=draw(st.sampled_from(ROUTERS)),
        execution_time=EXECUTION_TIMES[draw(st.sampled_from(sorted(EXECUTION_TIMES)))],
    )


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[float, int, int]]:
    """Arrivals, many at one instant or at the end of a batch; some that can never run."""
    gaps = st.sampled_from([0.0, 0.25, 0.01, 1.0, 3.5])
    made, now = [], 0.0
    lengths = st.tuples(gaps, st.integers(1, 500), st.integers(1, 200))
    for gap, prompt, output in draw(st.lists(lengths, min_size=1, max_size=25)):
        now += gap
        made.append((now, prompt, output))
    return made


def by_processes(cluster: vs.Cluster, rows: list[tuple[float, int, int]]) -> vs.Result:
    """Run by the processes alone."""
    with mock.patch.object(plain_loop, "_knows", return_value=False):
        return vs.simulate(cluster, Given(rows), seed=1)


def assert_equal(ours: vs.Result, theirs: vs.Result) -> None:
    """To the last bit."""
    for table in ("requests", "replicas", "timeline"):
        pd.testing.assert_frame_equal(
            getattr(ours, table), getattr(theirs, table), check_exact=True
        )
    assert ours.info["simulated_time"] == theirs.info["simulated_time"]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(cluster=clusters(), rows=rows())
def test_the_loop_equals_the_processes(
    cluster: vs.Cluster, rows: list[tuple[float, int, int]]
) -> None:
    """Requests, replicas and timeline are equal, also when blocks run short on the way."""
    assert_equal(vs.simulate(cluster, Given(rows), seed=1), by_processes(cluster, rows))


@contextmanager
def ctrl_c_at(instant: float) -> Iterator[None]:
    """Press ctrl-C once, at the first formation of a batch that is sampled from an instant on."""
    sample, is_pressed = Timeline.sample, False

    def sample_and_press(self: Timeline, now: float, *levels: Any) -> float:
        nonlocal is_pressed
        next_at = sample(self, now, *levels)
        if now >= instant and not is_pressed:
            is_pressed = True
            signal.raise_signal(signal.SIGINT)
        return next_at

    with mock.patch.object(Timeline, "sample", sample_and_press):
        yield


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cluster=clusters(),
    rows=rows(),
    instants=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=3),
)
def test_ctrl_c_leaves_the_rest_to_the_processes(
    cluster: vs.Cluster, rows: list[tuple[float, int, int]], instants: list[float]
) -> None:
    """It stops between two instants with all that was computed, and goes on to the same end."""
    sim = vs.Simulation(cluster, Given(rows), seed=1)
    for instant in sorted(instants):
        with ctrl_c_at(instant), suppress(KeyboardInterrupt):
            sim.run()
        held = sum(replica.num_outstanding for replica in sim.replicas)
        seen = sim.result().requests
        is_done = seen.completed_at.notna() | (seen.get("refusal", "") != "")
        assert len(seen) == held + len(sim.router.queue) + int(is_done.sum())
    sim.run()
    assert_equal(sim.result(), by_processes(cluster, rows))


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_ctrl_c_ends_the_loop_soon(scheduler: str) -> None:
    """In the middle of a run of iterations, too, whose rest is left as one batch under way."""
    settings = cluster(num_replicas=2, replica_scheduler=SCHEDULERS[scheduler])
    rows = [(0.3 * index, 10 * index + 1, 40) for index in range(20)]
    sim = vs.Simulation(settings, Given(rows), seed=1)
    with ctrl_c_at(2.0), pytest.raises(KeyboardInterrupt):
        sim.run()
    assert 2.0 <= sim.env.now < 2.5
    sim.run()
    assert_equal(sim.result(), by_processes(settings, rows))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cluster=clusters(), rows=rows(), until=st.sampled_from([0.25, 1.0, 2.3, 7.01]))
def test_the_loop_stops_where_the_run_does(
    cluster: vs.Cluster, rows: list[tuple[float, int, int]], until: float
) -> None:
    """At any instant the tables are those of the processes, and the rest of the run is."""
    ours, theirs = (vs.Simulation(cluster, Given(rows), seed=1) for _ in range(2))
    ours.run(until=until)
    with mock.patch.object(plain_loop, "_knows", return_value=False):
        theirs.run(until=until)
    assert_equal(ours.result(), theirs.result())
    ours.run()
    theirs.run()
    assert_equal(ours.result(), theirs.result())


@pytest.mark.parametrize("pipeline_parallel_size", [1, 2])
def test_an_error_of_the_execution_times_leaves_all_requests(pipeline_parallel_size: int) -> None:
    """Where the model fails, the run ends with every request that has arrived, each once."""
    given = cluster(
        num_replicas=2,
        pipeline_parallel_size=pipeline_parallel_size,
        replica_scheduler=SCHEDULERS["sarathi"],
        execution_time=vs.Linear(),
    )
    rows = [(0.01 * index, 50 + index, 20) for index in range(20)]
    call, num_calls = LinearStageTime.__call__, 0

    def fail_in_time(self: LinearStageTime, *arguments: Any) -> float:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 25:
            raise vs.ProfileError("outside of the profile")
        return call(self, *arguments)

    sim = vs.Simulation(given, Given(rows))
    with (
        mock.patch.object(LinearStageTime, "__call__", fail_in_time),
        pytest.raises(vs.ProfileError),
    ):
        sim.run()
    seen = sim.result().requests
    num_arrived = sum(arrived_at < sim.env.now for arrived_at, *_ in rows)
    assert seen.request_id.tolist() == list(range(num_arrived))
    assert seen.scheduled_at.dropna().le(sim.env.now).all()


@pytest.mark.parametrize("pipeline_parallel_size", [1, 2])
def test_an_impossible_time_is_said_by_the_stage(pipeline_parallel_size: int) -> None:
    """The error is that of the processes, and what was computed or had arrived is kept."""
    endless = cluster(
        num_replicas=2,
        pipeline_parallel_size=pipeline_parallel_size,
        execution_time=vs.Linear(base=1e308, per_token=1e308),
    )
    with pytest.raises(vs.SimulationError, match="expected a finite number >= 0") as raised:
        vs.simulate(endless, Given([(0.0, 10, 5), (0.0, 10, 5)]))
    assert raised.value.result.requests.replica_id.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scheduler", "pipeline_parallel_size"), [("vllm", 1), ("sarathi", 1), ("sarathi", 2)]
)
def test_who_gives_way_does_so_within_the_loop(scheduler: str, pipeline_parallel_size: int) -> None:
    """Short of memory, too, no event is needed; restarts are counted as the processes do."""
    scarce = cluster(
        pipeline_parallel_size=pipeline_parallel_size,
        kv_cache=vs.KVCache(num_blocks=33),
        replica_scheduler=SCHEDULERS[scheduler],
    )
    rows = [(0.05 * index, 60 + index, 90) for index in range(40)]
    sim = vs.Simulation(scarce, Given(rows), seed=1)
    sim.run()
    assert sim.env.num_events < 15
    assert sim.result().requests.num_restarts.sum() == sim.replicas[0].num_restarts > 5
    assert_equal(sim.result(), by_processes(scarce, rows))


def test_a_pipeline_raises_no_events() -> None:
    """Its stages are recurrences."""
    deep = cluster(pipeline_parallel_size=4, replica_scheduler=vs.Sarathi(max_num_seqs=16))
    rows = [(0.05 * index, 60 + index, 90) for index in range(40)]
    sim = vs.Simulation(deep, Given(rows), seed=1)
    sim.run()
    assert sim.env.num_events < 25
    assert_equal(sim.result(), by_processes(deep, rows))


def test_blocks_of_a_run_left_half_way_count_for_the_peak() -> None:
    """The step under way has taken its block, whatever happens next."""
    given = cluster(
        kv_cache=vs.KVCache(num_blocks=100), execution_time=vs.Linear(base=0.1, per_token=0.0)
    )
    rows = [(0.0, 10, 8), (0.76, 5, 1)]
    ours, theirs = vs.Simulation(given, Given(rows)), vs.Simulation(given, Given(rows))
    ours.run(until=0.78)
    with mock.patch.object(plain_loop, "_knows", return_value=False):
        theirs.run(until=0.78)
    assert_equal(ours.result(), theirs.result())
    assert theirs.result().replicas.kv_cache_usage_peak[0] == pytest.approx(0.02)


def test_requests_without_a_row_are_told() -> None:
    """An error before they arrived or were written is not forgotten by the next run."""
    sim = vs.Simulation(cluster(), Given([(0.1 * index, 10, 5) for index in range(30)]))
    with mock.patch.object(RequestLog, "append_columns", side_effect=vs.VidurError("disk full")):
        with pytest.raises(vs.VidurError, match="disk full"):
            sim.run()
        with pytest.raises(vs.SimulationError, match="30 requests are missing"):
            sim.run()


def test_the_loop_raises_no_events() -> None:
    """That is what it is for; a process of the user's has it step aside."""
    workload = vs.Workload(vs.Poisson(rate=2.0), vs.FixedLengths(100, 20), num_requests=50)
    settings = cluster(replica_scheduler=vs.Sarathi())
    alone = vs.Simulation(settings, workload)
    alone.run()
    watched = vs.Simulation(settings, workload)

    def watch() -> Any:
        yield watched.env.timeout(1.0)

    watched.env.process(watch())
    watched.run()
    assert alone.env.num_events < 15 < 100 < watched.env.num_events
    assert_equal(alone.result(), watched.result())
