"""The package decides as the plain vLLM V1 engine does, keeps its laws, and says what is wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
from against_vllm_v1 import Given, cluster_of, simulation_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.vllm_v1 import (
    PlainVllmV1Case,
    PlainVllmV1Request,
    PlainVllmV1Run,
    run_plainly,
)
from oracle.vllm_v1_blocks import PlainBlockPool
from test_oracle_vllm_v1 import engine, requests, runs, workloads

import vidur_simpy as vs
from vidur_simpy.replica_scheduler.vllm_v1_release import VLLM_VERSIONS

ANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

Run = tuple[PlainVllmV1Case, list[PlainVllmV1Request]]


# -- against the plain engine ---------------------------------------------------------------------


def run_and_count_evictions(*run: Any) -> tuple[PlainVllmV1Run, int]:
    evicted = []

    def evict(pool: PlainBlockPool, block: int, really: Any = PlainBlockPool._evict) -> None:
        evicted.append(block in pool.key_of)
        really(pool, block)

    with mock.patch.object(PlainBlockPool, "_evict", evict):
        return run_plainly(*run), sum(evicted)


def assert_same_run(case: PlainVllmV1Case, workload: list[PlainVllmV1Request]) -> None:
    expected, num_evicted = run_and_count_evictions(case, workload)
    simulation = simulation_of(case, workload, ticks=1.0, record=("tokens",))
    simulation.run()
    steps = simulation.replicas[0].scheduler.steps
    for ours, theirs in zip(steps, expected.steps, strict=False):
        ours.assert_equals(theirs, ticks=1.0, tolerance=0.0)
    assert len(steps) == len(expected.steps)
    result = simulation.result()
    assert_same_rows(result, case, expected)
    if case.enable_prefix_caching:
        (replica,) = result.replicas.to_dict("records")
        assert replica["num_evicted_blocks"] == num_evicted
        hits = sum(sum(step.hits.values()) for step in expected.steps)
        assert replica["num_cached_tokens"] == hits


def assert_same_rows(result: vs.Result, case: PlainVllmV1Case, expected: PlainVllmV1Run) -> None:
    executed: Counter[int] = Counter()
    for step in expected.steps:
        for request_id in step.scheduled:
            executed[request_id] += step.end_ns - step.start_ns
    theirs = sorted(expected.requests, key=lambda row: row.request_id)
    for ours, row in zip(result.requests.to_dict("records"), theirs, strict=True):
        assert ours["scheduled_at"] == row.first_scheduled_ns, (ours, row)
        assert ours["first_token_at"] == row.first_token_ns, (ours, row)
        assert ours["completed_at"] == row.finish_ns, (ours, row)
        assert ours["num_restarts"] == row.num_preemptions, (ours, row)
        assert ours["execution_time"] == executed[row.request_id], (ours, row)
        waited = row.finish_ns - row.first_scheduled_ns - executed[row.request_id]
        assert ours["preempted_time"] == waited, (ours, row)
        output = ours.get("num_output_tokens", ours["num_decode_tokens"])
        assert output == row.output_tokens, (ours, row)
        if case.enable_prefix_caching:
            assert ours["num_cached_tokens"] == row.cached_tokens_first_admission, (ours, row)
    assert result.tokens.num_tokens.sum() == sum(row.output_tokens - 1 for row in theirs)


@given(runs())
@settings(ANY, max_examples=500)
def test_package_equals_the_plain_engine(given_run: Run) -> None:
    """Any release, policy, knob and memory: each step, each request, every eviction."""
    assert_same_run(*given_run)


@st.composite
def longer_runs(draw: st.DrawFn, **fixed: Any) -> Run:
    """More requests for longer: many go in lockstep, blocks of any size, prompts that repeat."""
    size = draw(st.sampled_from([1, 3, 4, 16]))
    max_model_len = draw(st.integers(30, 120))
    hash_size = draw(st.sampled_from([1, 3, 4, 32]))
    case = engine(
        block_size=size,
        max_model_len=max_model_len,
        num_gpu_blocks=1 - (-max_model_len // size) + draw(st.integers(0, 60)),
        max_num_batched_tokens=draw(st.sampled_from([9, 20, 150])),
        max_num_seqs=draw(st.integers(2, 30)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        async_scheduling=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 3, 7])),
        scheduler_reserve_full_isl=draw(st.booleans()),
        hash_block_size=hash_size,
        base_ns=5,
        per_token_ns=2,
        per_kv_ns=1,
        **fixed,
    )
    now, workload = 0, []
    for index in range(draw(st.integers(5, 25))):
        now += draw(st.sampled_from([1, 1, 30, 200]))
        length = draw(st.integers(1, max_model_len - 1))
        ids = [0] * draw(st.integers(0, 6)) + [index + 1] * max_model_len
        workload.append(
            PlainVllmV1Request(
                request_id=index,
                arrival_ns=now,
                num_prompt_tokens=length,
                num_output_tokens=draw(st.integers(1, 90)),
                priority=draw(st.integers(0, 2)),
                hash_ids=tuple(ids[: -(-length // hash_size)]),
            )
        )
    return case, workload


@given(longer_runs())
@settings(ANY, max_examples=150)
def test_package_equals_the_plain_engine_for_longer(given_run: Run) -> None:
    """The steps that are planned at once are those that a walk would plan."""
    assert_same_run(*given_run)


def with_ids(*lines: tuple[int, int, int, int, list[int]]) -> list[PlainVllmV1Request]:
    """Lines of (arrival, prompt tokens, output tokens, priority, hash ids)."""
    return [
        PlainVllmV1Request(
            request_id=index,
            arrival_ns=line[0],
            num_prompt_tokens=line[1],
            num_output_tokens=line[2],
            priority=line[3],
            hash_ids=tuple(line[4]),
        )
        for index, line in enumerate(lines)
    ]


def test_a_prompt_that_goes_on_lets_its_twin_in() -> None:
    """A block that a chunk fills, and does not take, is one less for the twin that waits."""
    case = engine(
        max_model_len=40,
        num_gpu_blocks=11,
        enable_prefix_caching=True,
        scheduler_reserve_full_isl=True,
        long_prefill_token_threshold=6,
        hash_block_size=4,
    )
    workload = with_ids((0, 36, 2, 0, [*range(9)]), (0, 39, 1, 0, [*range(10)]))
    assert [step.hits for step in run_plainly(case, workload).steps[:2]] == [{}, {1: 12}]
    assert_same_run(case, workload)


def test_who_was_skipped_finds_the_token_known_since() -> None:
    """Request 3 sits out a step, so that its next one fills a block with nothing in flight."""
    case = engine(
        max_num_batched_tokens=15,
        max_num_seqs=4,
        num_gpu_blocks=13,
        max_model_len=15,
        block_size=3,
        long_prefill_token_threshold=3,
        enable_chunked_prefill=False,
        policy="priority",
        enable_prefix_caching=True,
        async_scheduling=True,
        base_ns=5,
        per_token_ns=2,
        per_kv_ns=1,
        hash_block_size=2,
        vllm_version="0.9.2",
    )
    workload = with_ids(
        (1, 8, 7, 0, [0, 0, 0, 0]),
        (32, 1, 4, 1, [0]),
        (33, 11, 3, 0, [0, 1, 0, 0, 0, 0]),
        (34, 3, 5, 0, [0, 0]),
    )
    assert run_plainly(case, workload).steps[10].hits == {3: 6}
    assert_same_run(case, workload)


@given(st.data())
@settings(ANY, max_examples=100)
def test_equals_may_evict_one_another_here_too(data: st.DataObject) -> None:
    """Requests alike in priority and arrival: the same run, or an error where the plain one has."""
    case, _ = data.draw(runs(policy="priority"))
    workload = data.draw(workloads(case))
    alike = [
        PlainVllmV1Request(**(vars(request) | {"arrival_ns": 0, "priority": 0}))
        for request in workload
    ]
    try:
        run_plainly(case, alike)
    except RuntimeError:
        with pytest.raises(vs.SimulationError, match="evict one another"):
            simulation_of(case, alike, ticks=1.0).run()
    else:
        assert_same_run(case, alike)


# -- laws -----------------------------------------------------------------------------------------


def check_blocks(scheduler: Any) -> None:
    """A block's references are its holders, and every other block is free."""
    pool, cache = scheduler.pool, scheduler.blocks.cache
    num_counted = 0
    held: set[Any] = set()
    for state in scheduler.running:
        num_blocks = pool.blocks_of(scheduler.num_computed(state))
        if state.holder is not None:
            runs = state.holder.runs
            assert state.holder.num_blocks == sum(run.stop - run.first for run in runs)
            assert all(state.holder in run.holders for run in runs)
            num_blocks -= state.holder.num_blocks
            held.update(runs)
        assert num_blocks >= 0
        num_counted += num_blocks
    num_shared = sum(run.stop - run.first for run in held)
    assert pool.num_free == pool.num_blocks - 1 - num_shared - num_counted
    holders = [scheduler._states[request].holder for request in scheduler.waiting]
    assert not any(holder.runs or holder.num_blocks for holder in holders if holder)
    if cache is not None:
        free = [run for run in queued(cache) if run.spans]
        assert not any(run.holders for run in free)
        assert all(run.first < run.stop for run in free)
        cached = Counter((prefix, run) for prefix, runs in cache._runs.items() for run in runs)
        named = Counter((prefix, run) for run in (*held, *free) for prefix, _, _ in run.spans)
        assert cached == named
        num_queued = sum(run.stop - run.first for run in queued(cache))
        assert num_queued == cache._num_queued <= pool.num_free


def queued(cache: Any) -> list[Any]:
    """The runs of free blocks, the one that is reused first ahead."""
    runs, run = [], cache._queue.next
    while run is not cache._queue:
        assert run.previous.next is run
        runs.append(run)
        run = run.next
    return runs


@given(runs())
@ANY
def test_blocks_never_leak(given_run: Run) -> None:
    """Through preemption, caching and steps in flight, and when all is over."""
    simulation = simulation_of(*given_run, ticks=1.0)
    scheduler = simulation.replicas[0].scheduler
    for event_type in (vs.EventType.REPLICA_SCHEDULE, vs.EventType.BATCH_END):
        simulation.on(event_type, lambda event: check_blocks(scheduler))
    simulation.run()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks - 1
    assert not scheduler.running
    assert not scheduler.prefills
    assert not scheduler._states
    assert (scheduler.lockstep.num_members, scheduler.lockstep.context) == (0, 0)


@given(runs(policy="fcfs", vllm_version="0.32.0"))
@ANY
def test_fcfs_starves_nobody(given_run: Run) -> None:
    """In every step the oldest request gets tokens, and it is never preempted."""
    simulation = simulation_of(*given_run, ticks=1.0)
    simulation.run()
    rows = simulation.result().requests.to_dict("records")
    for step in simulation.replicas[0].scheduler.steps:
        there = [row for row in rows if row["arrived_at"] <= step.sched < row["completed_at"]]
        oldest = min(row["request_id"] for row in there)
        is_over = rows[oldest]["completed_at"] <= step.start
        assert not step.tokens or is_over or oldest in step.scheduled
        assert oldest not in step.preempted


@given(runs(), st.lists(st.integers(0, 400), max_size=5))
@settings(ANY, max_examples=100)
def test_a_run_can_be_looked_at(given_run: Run, instants: list[int]) -> None:
    """At any instant the live requests say how far they are; the run ends as it would have."""
    case, workload = given_run
    whole = simulation_of(case, workload, ticks=1.0)
    whole.run()
    simulation = simulation_of(case, workload, ticks=1.0)
    for instant in sorted(set(instants) - {0}):
        if instant > simulation.env.now:
            simulation.run(until=instant)
            ended = [step for step in simulation.replicas[0].scheduler.steps if step.end < instant]
            for request in simulation._live.values():
                steps = sum(request.request_id in step.scheduled for step in ended)
                assert 0 <= request.num_output_tokens <= steps
                assert request.num_processed_tokens <= case.max_model_len
            rows = simulation.result().requests
            assert (rows.execution_time <= instant).all()
    simulation.run()
    assert simulation.result().requests.equals(whole.result().requests)


@given(
    settings=st.fixed_dictionaries(
        {
            "async_scheduling": st.booleans(),
            "enable_prefix_caching": st.booleans(),
            "scheduler_reserve_full_isl": st.booleans(),
            "max_num_batched_tokens": st.sampled_from([20, 100, 260]),
            "long_prefill_token_threshold": st.sampled_from([0, 30]),
            "vllm_version": st.sampled_from(["0.11.2", "0.32.0"]),
        }
    ),
    rate=st.sampled_from([0.1, 0.8, 4.0]),
    num_blocks=st.sampled_from([66, 90, 400]),
    instants=st.lists(st.floats(0.05, 12.0), max_size=4),
)
@settings(ANY, max_examples=100)
def test_steps_taken_at_once_leave_the_steps_in_flight(
    settings: dict[str, Any], rate: float, num_blocks: int, instants: list[float]
) -> None:
    """At any instant the steps planned are those that stepping would have planned by then."""
    is_chunked = settings["max_num_batched_tokens"] < 256
    policy = vs.VllmV1(max_num_seqs=6, enable_chunked_prefill=is_chunked, **settings)
    simulations = []
    for is_watched in (False, True):
        simulation = vs.Simulation(
            cluster(
                max_model_len=256,
                kv_cache=vs.KVCache(block_size=4, num_blocks=num_blocks),
                replica_scheduler=policy,
                execution_time=vs.Linear(),
            ),
            vs.Workload(
                vs.Poisson(rate=rate),
                vs.UniformLengths(min_tokens=20, max_tokens=256, prefill_to_decode_ratio=0.3),
                num_requests=12,
            ),
            progress=False,
        )
        if is_watched:
            simulation.on(vs.EventType.BATCH_END, lambda event: None)
        simulations.append(simulation)
    for instant in sorted(set(instants)):
        for simulation in simulations:
            simulation.run(until=instant)
        fast, stepped = (in_flight(simulation) for simulation in simulations)
        assert fast == stepped
    for simulation in simulations:
        simulation.run()
    fast, stepped = (simulation.result() for simulation in simulations)
    for table in ("requests", "replicas", "timeline"):
        assert getattr(fast, table).equals(getattr(stepped, table))


def in_flight(simulation: vs.Simulation) -> list[Any]:
    """What can be seen of the steps under way and planned."""
    (replica,) = simulation.replicas
    scheduler: Any = replica.scheduler
    steps = [
        (
            *(step.batch_index, step.scheduled_at, step.number, step.is_ahead, step.num_decodes),
            *(step.decode_context, step.total_context, step.num_attention_pairs),
            [request.request_id for request in step.decoding()],
        )
        for step in scheduler.in_flight
    ]
    queued = [batch.batch_index for batch in (*replica.stages[0].users, *replica.stages[0].queue)]
    started_at = [batch.stage_started_at for batch in replica.stages[0].users]
    lockstep = scheduler.lockstep
    counts = (lockstep.num_planned, lockstep.iteration, lockstep.context, scheduler.pool.num_free)
    return [steps, queued, started_at, counts, replica.num_batches_formed]


# -- stories --------------------------------------------------------------------------------------


def cluster(**changes: Any) -> vs.Cluster:
    """One replica with blocks of four tokens, on which every step takes a second."""
    settings: dict[str, Any] = {
        "max_model_len": 32,
        "kv_cache": vs.KVCache(block_size=4, num_blocks=100),
        "replica_scheduler": "vllm_v1",
        "execution_time": lambda batch: 1.0,
    }
    return vs.Cluster(**(settings | changes))


def submitted(simulation: vs.Simulation, *lengths: tuple[int, int]) -> list[vs.Request]:
    made = [vs.Request(*pair) for pair in lengths]
    for request in made:
        simulation.submit(request)
    return made


def test_a_request_ends_at_max_model_len() -> None:
    """30 + 10 tokens in a context of 32: two outputs, and the result says so; 32 are refused."""
    simulation = vs.Simulation(cluster())
    long, too_long, short = submitted(simulation, (30, 10), (32, 1), (5, 3))
    simulation.run()
    assert (long.completed_at, long.num_output_tokens) == (2.0, 2)
    assert "no room for an output token within max_model_len = 32" in too_long.refusal
    rows = simulation.result().requests
    assert rows.num_output_tokens.to_list() == [2, 0, 3]
    assert rows.num_decode_tokens.to_list() == [10, 1, 3]
    assert rows.tpot[0] == 1.0
    assert simulation.result().figures["output_token_throughput"] == 5 / short.completed_at


def test_outputs_are_not_counted_where_none_is_cut() -> None:
    """The column is there only if a request ended early, also while some are not complete."""
    simulation = vs.Simulation(cluster())
    submitted(simulation, (5, 9))
    simulation.run(until=2.5)
    assert "num_output_tokens" not in simulation.result().requests
    assert simulation.replicas[0].scheduler.num_running == 1


def test_two_steps_are_in_flight_when_asynchronous() -> None:
    """The second step is planned with the first, and queues until that has ended."""
    asynchronous = vs.VllmV1(async_scheduling=True)
    simulation = vs.Simulation(
        cluster(replica_scheduler=asynchronous), record=("batches", "stages", "events")
    )
    (request,) = submitted(simulation, (5, 4))
    simulation.run(until=0.5)
    assert simulation.replicas[0].num_running_batches == 2
    assert [len(simulation.replicas[0].stages[0].queue), request.num_output_tokens] == [1, 0]
    simulation.run()
    result = simulation.result()
    assert result.batches.scheduled_at.to_list() == [0.0, 0.0, 1.0, 2.0]
    assert result.stages.started_at.to_list() == [0.0, 1.0, 2.0, 3.0]
    assert (request.scheduled_at, request.completed_at) == (0.0, 4.0)
    assert set(result.events.event_type) == {event_type.name for event_type in vs.EventType}


def test_an_arrival_waits_for_two_steps_when_asynchronous() -> None:
    """It arrives while the first step runs; the second one is planned, the third has it."""
    simulation = vs.Simulation(cluster(replica_scheduler=vs.VllmV1(async_scheduling=True)))
    submitted(simulation, (5, 9))
    late = vs.Request(5, 2, arrived_at=0.5)
    simulation.submit(late)
    simulation.run()
    assert (late.scheduled_at, late.first_token_at) == (2.0, 3.0)


def test_events_in_either_order_give_the_same_run() -> None:
    """The order of simultaneous events changes nothing when arrivals are apart from steps."""
    case = engine(async_scheduling=True, enable_prefix_caching=True)
    workload = requests((0, 3, 8), (1, 7, 5), (2, 9, 4))
    rows = []
    for event_order in ("type", "id"):
        simulation = vs.Simulation(
            cluster_of(case), Given(workload, None, 1e9), event_order=event_order, progress=False
        )
        simulation.run()
        rows.append(simulation.result().requests)
    assert rows[0].equals(rows[1])
    assert rows[0].num_restarts.sum() > 0


def test_other_orderings_admit_in_their_order() -> None:
    """The policy may be any ordering or key function; who gives way is the one admitted last."""
    for policy in ("sjf", lambda request: request.num_prefill_tokens):
        simulation = vs.Simulation(
            cluster(replica_scheduler=vs.VllmV1(max_num_seqs=1, policy=policy))
        )
        long, short = submitted(simulation, (20, 1), (10, 1))
        simulation.run()
        assert (short.scheduled_at, long.scheduled_at) == (0.0, 1.0)


def test_cached_tokens_are_told() -> None:
    """The same prompt twice: the second starts behind its first full blocks."""
    simulation = vs.Simulation(cluster())
    for at in (0.0, 5.0):
        simulation.submit(vs.Request(9, 2, at, hash_ids=[1, 2, 3], hash_block_size=4))
    simulation.run()
    result = simulation.result()
    assert result.requests.num_cached_tokens.to_list() == [0, 8]
    (replica,) = result.replicas.to_dict("records")
    assert (replica["num_cached_tokens"], replica["prefix_cache_hit_rate"]) == (8, 8 / 18)
    assert replica["num_prefill_tokens"] == 9 + 1
    assert replica["num_evicted_blocks"] == 0


def test_without_caching_nothing_is_told_of_it() -> None:
    """No column where there is nothing to say."""
    simulation = vs.Simulation(cluster(replica_scheduler=vs.VllmV1(enable_prefix_caching=False)))
    submitted(simulation, (9, 2))
    simulation.run()
    result = simulation.result()
    assert "num_cached_tokens" not in result.requests
    assert "prefix_cache_hit_rate" not in result.replicas


def test_a_saved_result_keeps_the_columns(tmp_path: Any) -> None:
    """Refused requests have no cached tokens; they stay missing."""
    simulation = vs.Simulation(cluster())
    submitted(simulation, (9, 2), (40, 1))
    simulation.run()
    result = simulation.result()
    result.save(tmp_path / "saved")
    loaded = vs.load_result(tmp_path / "saved")
    assert loaded.requests.equals(result.requests)
    assert loaded.requests.num_cached_tokens.isna().to_list() == [False, True]
    assert loaded.replicas.equals(result.replicas)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_version": "0.31"}, "unknown vllm_version '0.31': did you mean '0.32.0'"),
        ({"policy": "prio"}, "unknown ordering 'prio': did you mean 'priority'"),
        ({"watermark": 0.1, "vllm_version": "0.23.0"}, "watermark = 0.1: vLLM 0.23.0 does not"),
        ({"max_num_active_seqs": 2, "vllm_version": "0.27.1"}, "max_num_active_seqs = 2: vLLM"),
        (
            {"long_prefill_token_threshold_adaptive": True, "vllm_version": "0.9.2"},
            "long_prefill_token_threshold_adaptive = True: vLLM 0.9.2",
        ),
        ({"max_num_seqs": 0}, "max_num_seqs = 0: expected greater than or equal to 1"),
        ({"max_num_batch_tokens": 4}, "did you mean 'max_num_batched_tokens'"),
    ],
)
def test_unusable_settings(settings: dict[str, Any], message: str) -> None:
    """One sentence that names the setting, its value and what was expected."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.VllmV1(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size = 2: expected 1"),
        ({"kv_cache": vs.KVCache(block_size=4, num_blocks=8)}, "needs 8 .* vLLM can use 7 of 8"),
        (
            {
                "replica_scheduler": vs.VllmV1(
                    enable_chunked_prefill=False, max_num_batched_tokens=31
                )
            },
            "max_num_batched_tokens = 31 .* at least max_model_len = 32",
        ),
    ],
)
def test_replicas_on_which_vllm_would_not_start(changes: dict[str, Any], message: str) -> None:
    """They are told when the cluster is made."""
    with pytest.raises((vs.ConfigError, vs.CapacityError), match=message):
        cluster(**changes)


def test_every_known_release_can_be_asked_for() -> None:
    """By configuration file, too."""
    for version in VLLM_VERSIONS:
        config = {"cluster": {"replica_scheduler": {"type": "vllm_v1", "vllm_version": version}}}
        assert vs.load_config(config)["cluster"].replica_scheduler.vllm_version == version
