"""The plain vLLM V1 engine repeats what the real scheduler did, and keeps its own laws."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.vllm_v1 import (
    VLLM_VERSIONS,
    PlainVllmV1Case,
    PlainVllmV1Request,
    PlainVllmV1Run,
    PlainVllmV1Scheduler,
    read_vllm_v1_case,
    run_plainly,
)
from shared_folder import SHARED

HERE = Path(__file__).resolve().parent
FOLDERS = {
    folder.parent.name: folder.parent
    for root in (SHARED / "golden" / "vllm", HERE / "golden" / "vllm")
    for folder in sorted(root.glob("*/case.json"))
}
STEP_COLUMNS = {
    *("step", "sched_ns", "start_ns", "end_ns", "tokens", "kv_tokens"),
    *("running", "waiting", "free_blocks", "free_blocks_end"),
}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def written_steps(run: PlainVllmV1Run) -> list[dict[str, str]]:
    return [
        {name: str(getattr(step, name)) for name in STEP_COLUMNS}
        | {
            "scheduled": " ".join(
                f"{request}" if count == 1 else f"{request}:{count}"
                for request, count in step.scheduled.items()
            ),
            "hits": " ".join(f"{request}:{count}" for request, count in step.hits.items()),
            "preempted": " ".join(str(request) for request in step.preempted),
        }
        for step in run.steps
    ]


def written_requests(run: PlainVllmV1Run) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in vars(row).items()} for row in run.requests]


@pytest.mark.skipif(not FOLDERS, reason="no golden vLLM cases beside the tests or the repository")
@pytest.mark.parametrize("name", FOLDERS or ["none"])
def test_repeats_the_real_scheduler(name: str) -> None:
    """Every step and every request is as the real vLLM scheduler had it, to the nanosecond."""
    run = run_plainly(*read_vllm_v1_case(FOLDERS[name]))
    assert written_steps(run) == read_rows(FOLDERS[name] / "steps.csv")
    assert written_requests(run) == read_rows(FOLDERS[name] / "requests.csv")


# ---- the rules that no golden case pins, each as a story worked out by hand ------------------


def engine(**changes: object) -> PlainVllmV1Case:
    """Blocks of four tokens, four of them usable, one request may fill them."""
    settings_of_story = {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
        "num_gpu_blocks": 5,
        "max_model_len": 16,
        "block_size": 4,
        "enable_prefix_caching": False,
        "scheduler_reserve_full_isl": False,
    }
    return PlainVllmV1Case(**(settings_of_story | changes))


def requests(*lines: tuple[int, ...]) -> list[PlainVllmV1Request]:
    """Lines of (arrival, prompt tokens, output tokens[, priority])."""
    return [
        PlainVllmV1Request(
            request_id=index,
            arrival_ns=line[0],
            num_prompt_tokens=line[1],
            num_output_tokens=line[2],
            priority=line[3] if len(line) > 3 else 0,
        )
        for index, line in enumerate(lines)
    ]


@pytest.mark.parametrize(
    ("version", "plan"),
    [
        ("0.9.2", {1: 1}),
        ("0.11.2", {1: 1, 2: 2}),
        ("0.27.1", {1: 1, 2: 2}),
        ("0.32.0", {1: 1, 2: 2}),
    ],
)
def test_a_planned_victim_gives_its_tokens_back(version: str, plan: dict[int, int]) -> None:
    """A victim planned in this very call returns its token: the prefill behind gets two."""
    case = engine(policy="priority", max_num_batched_tokens=3, vllm_version=version)
    workload = requests((0, 3, 9, 2), (1, 2, 9, 0), (1_030_001, 10, 2, 1))
    step = run_plainly(case, workload).steps[4]
    assert (step.scheduled, step.preempted) == (plan, [0])


@pytest.mark.parametrize(("version", "plan"), [("0.27.1", {1: 1}), ("0.32.0", {1: 1, 2: 2})])
def test_an_unplanned_victim_moves_the_scan_back(version: str, plan: dict[int, int]) -> None:
    """A victim whose last token is in flight shifts the list; since 0.32 nobody is skipped."""
    case = engine(
        policy="priority", max_num_batched_tokens=3, async_scheduling=True, vllm_version=version
    )
    workload = requests((0, 3, 5, 2), (1, 2, 9, 0), (1_030_001, 10, 2, 1))
    run = run_plainly(case, workload)
    assert (run.steps[5].scheduled, run.steps[5].preempted) == (plan, [0])
    victim = run.requests[0]
    assert (victim.output_tokens, victim.scheduled_tokens_total) == (5, 7)


def test_among_equals_the_earliest_running_is_the_victim() -> None:
    """Three alike: the second one's block comes from the first."""
    run = run_plainly(engine(policy="priority"), requests((0, 3, 9), (0, 3, 9), (0, 3, 9)))
    assert (run.steps[2].scheduled, run.steps[2].preempted) == ({1: 1, 2: 1}, [0])


def test_its_own_victim_stops_the_scan() -> None:
    """The least urgent one runs first and yields: a step without tokens takes no time."""
    run = run_plainly(engine(policy="priority"), requests((0, 3, 9, 5), (1, 12, 3, 0)))
    empty, following = run.steps[2:4]
    assert (empty.scheduled, empty.preempted, following.scheduled) == ({}, [0], {1: 1})
    assert empty.start_ns == empty.end_ns == following.start_ns


def test_equal_priorities_are_served_by_arrival_then_id() -> None:
    """The heap's order is (priority, arrival, id), whatever the order of the lines."""
    workload = requests((0, 2, 1, 1), (0, 2, 1, 1), (0, 2, 1, 0))[::-1]
    run = run_plainly(engine(policy="priority", max_num_seqs=1), workload)
    assert [list(step.scheduled) for step in run.steps] == [[2], [0], [1]]


@pytest.mark.parametrize(("version", "admitted"), [("0.11.2", [2, 4]), ("0.15.1", [])])
def test_without_chunks_a_long_head_blocks(version: str, admitted: list[int]) -> None:
    """A prompt above the budget stops the scan; 0.11.2 tries the ones behind it."""
    case = engine(enable_chunked_prefill=False, num_gpu_blocks=50, vllm_version=version)
    workload = requests((0, 2, 9), (0, 2, 9), (1, 1, 1), (1, 15, 1), (1, 1, 1))
    workload = [workload[0], workload[1], workload[3], workload[2], workload[4]]
    run = run_plainly(case, workload)
    assert list(run.steps[1].scheduled) == [0, 1, *admitted]


def test_fewer_may_be_active_than_the_runner_has_places_for() -> None:
    """`max_num_active_seqs` replaces `max_num_seqs` at admission."""
    run = run_plainly(engine(max_num_active_seqs=1), requests((0, 2, 3), (0, 2, 3)))
    assert max(step.running for step in run.steps) == 1


def test_the_watermark_keeps_blocks_free_unless_nothing_runs() -> None:
    """Half of eleven blocks: the first needs none of them spare, the third finds too few."""
    case = engine(num_gpu_blocks=11, max_model_len=40, max_num_batched_tokens=40, watermark=0.5)
    run = run_plainly(case, requests((0, 8, 2), (0, 8, 2), (0, 8, 2), (10**9, 30, 2)))
    assert run.steps[0].scheduled == {0: 8, 1: 8}
    assert run.requests[3].first_scheduled_ns == 10**9


@pytest.mark.parametrize(
    ("version", "adaptive", "num_requests", "count"),
    [
        ("0.32.0", True, 3, 4),
        ("0.32.0", False, 3, 2),
        ("0.32.0", False, 1, 9),
        ("0.27.1", False, 1, 2),
    ],
)
def test_the_long_prefill_cap(version: str, adaptive: bool, num_requests: int, count: int) -> None:
    """The cap rises to a fair share in adaptive mode and is lifted for one request alone."""
    case = engine(
        num_gpu_blocks=20,
        max_num_batched_tokens=12,
        long_prefill_token_threshold=2,
        long_prefill_token_threshold_adaptive=adaptive,
        vllm_version=version,
    )
    run = run_plainly(case, requests(*[(0, 9, 1)] * num_requests))
    assert run.steps[0].scheduled == dict.fromkeys(range(num_requests), count)


@pytest.mark.parametrize(("version", "plan"), [("0.15.1", {0: 7, 1: 1}), ("0.19.1", {0: 7})])
def test_the_gate_wants_the_whole_prompt_to_fit(version: str, plan: dict[int, int]) -> None:
    """Three blocks of prompt and two free: older releases start on the first token."""
    case = engine(max_num_batched_tokens=8, scheduler_reserve_full_isl=True, vllm_version=version)
    run = run_plainly(case, requests((0, 7, 2), (0, 12, 1)))
    assert run.steps[0].scheduled == plan


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_generated_tokens_are_cached_too(async_scheduling: bool) -> None:
    """A preempted request finds its first block, its last token being an output, on return."""
    case = engine(enable_prefix_caching=True, async_scheduling=async_scheduling)
    run = run_plainly(case, requests((0, 3, 8), (0, 3, 8)))
    assert [step.hits for step in run.steps if step.hits] == [{1: 4}]
    assert run.requests[1].num_preemptions == 1


@pytest.mark.parametrize(
    ("version", "async_scheduling", "num_outputs", "hits"),
    [
        ("0.19.1", False, 1, 0),
        ("0.23.0", False, 1, 4),
        ("0.32.0", False, 2, 0),
        ("0.32.0", True, 2, 0),
    ],
)
def test_freed_blocks_without_content_are_reused_first(
    version: str, async_scheduling: bool, num_outputs: int, hits: int
) -> None:
    """Since 0.23 a half-filled block goes before a cached one; one that an output fills waits."""
    case = engine(
        enable_prefix_caching=True,
        hash_block_size=5,
        async_scheduling=async_scheduling,
        vllm_version=version,
    )
    lines = [(5, 1), (3, num_outputs), (12, 1), (5, 1)]  # the first prompt comes again
    workload = [
        PlainVllmV1Request(
            request_id=index,
            arrival_ns=index * 10**9,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            hash_ids=(7,) if num_prompt_tokens == 5 else (10 + index, 20 + index, 30 + index),
        )
        for index, (num_prompt_tokens, num_output_tokens) in enumerate(lines)
    ]
    assert run_plainly(case, workload).requests[3].cached_tokens_first_admission == hits


def test_equals_may_evict_one_another_for_ever() -> None:
    """Without the gate two alike in priority and arrival undo each other's prefills: an error."""
    case = engine(
        policy="priority",
        block_size=2,
        num_gpu_blocks=4,
        max_model_len=6,
        long_prefill_token_threshold=1,
    )
    with pytest.raises(RuntimeError, match="evict one another"):
        run_plainly(case, requests((0, 2, 3), (0, 3, 3)))


def test_the_context_limit_ends_a_request_ahead_of_its_outputs() -> None:
    """The asynchronous engine plans no token beyond max_model_len."""
    run = run_plainly(engine(async_scheduling=True), requests((0, 3, 100)))
    row = run.requests[0]
    assert (row.output_tokens, row.scheduled_tokens_total) == (13, 15)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vllm_version": "0.10.0"}, "none of"),
        ({"policy": "sjf"}, "neither"),
        ({"max_model_len": 17}, "do not fit"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 15}, "chunked"),
        ({"watermark": 0.1, "vllm_version": "0.23.0"}, "no watermark"),
        ({"max_num_active_seqs": 2, "vllm_version": "0.27.1"}, "no active limit"),
    ],
)
def test_refuses_what_vllm_would_refuse(changes: dict[str, object], reason: str) -> None:
    """An engine that vLLM would not start, or a setting its release lacks, is an error."""
    with pytest.raises(ValueError, match=reason):
        engine(**changes)


# ---- laws, on random engines and workloads ---------------------------------------------------


@st.composite
def engines(draw: st.DrawFn, **fixed: object) -> PlainVllmV1Case:
    block_size = draw(st.integers(1, 4))
    max_model_len = draw(st.integers(4, 24))
    num_gpu_blocks = 1 - (-max_model_len // block_size) + draw(st.integers(0, 8))
    choices: dict[str, object] = {
        "vllm_version": draw(st.sampled_from(VLLM_VERSIONS)),
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "async_scheduling": draw(st.booleans()),
        "enable_prefix_caching": draw(st.booleans()),
        "enable_chunked_prefill": draw(st.booleans()),
    } | fixed
    newest = choices["vllm_version"] == "0.32.0"
    least = 1 if choices["enable_chunked_prefill"] else max_model_len
    return PlainVllmV1Case(
        **choices,
        block_size=block_size,
        max_model_len=max_model_len,
        num_gpu_blocks=num_gpu_blocks,
        max_num_batched_tokens=draw(st.integers(least, max(least, 30))),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_active_seqs=draw(st.none() | st.integers(1, 4)) if newest else None,
        long_prefill_token_threshold=draw(st.integers(0, 5)),
        long_prefill_token_threshold_adaptive=newest and draw(st.booleans()),
        scheduler_reserve_full_isl=draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.1, 0.4])) if newest else 0.0,
        base_ns=5,
        per_token_ns=2,
        per_kv_ns=1,
        hash_block_size=2,
    )


@st.composite
def workloads(draw: st.DrawFn, case: PlainVllmV1Case) -> list[PlainVllmV1Request]:
    lines = []
    # equals may evict one another for ever under the priority policy
    least_gap = 1 if case.policy == "priority" else 0
    for index in range(draw(st.integers(1, 10))):
        num_prompt_tokens = draw(st.integers(1, case.max_model_len - 1))
        num_ids = -(-num_prompt_tokens // 2)
        line = PlainVllmV1Request(
            request_id=index,
            arrival_ns=(lines[-1].arrival_ns if lines else 0) + draw(st.integers(least_gap, 40)),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=draw(st.integers(1, 20)),
            priority=draw(st.integers(0, 2)),
            hash_ids=tuple(draw(st.lists(st.integers(0, 1), min_size=num_ids, max_size=num_ids))),
        )
        lines.append(line)
    return lines


@st.composite
def runs(draw: st.DrawFn, **fixed: object) -> tuple[PlainVllmV1Case, list[PlainVllmV1Request]]:
    case = draw(engines(**fixed))
    return case, draw(workloads(case))


def check_blocks(scheduler: PlainVllmV1Scheduler) -> None:
    pool, case = scheduler.pool, scheduler.case
    held = [block for state in scheduler.running for block in state.blocks]
    assert pool.references == {block: held.count(block) for block in pool.references}
    assert sorted(pool.free) == [block for block, count in pool.references.items() if count == 0]
    assert len(pool.free) + len(set(held)) == pool.num_usable == case.num_gpu_blocks - 1
    assert not any(state.blocks for state in scheduler.waiting)
    for state in scheduler.running:
        assert len(state.blocks) == case.blocks_for(state.computed)
        registered = state.blocks[: state.num_registered]
        assert [pool.key_of[block] for block in registered] == state.keys[: len(registered)]
    for block, key in pool.key_of.items():
        assert pool.blocks_of[key].count(block) == 1
    assert sum(len(blocks) for blocks in pool.blocks_of.values()) == len(pool.key_of)


@given(runs())
@settings(max_examples=150, deadline=None)
def test_blocks_never_leak(given_run: tuple[PlainVllmV1Case, list[PlainVllmV1Request]]) -> None:
    """At any time a block's references are its holders, and the others are free."""
    schedulers: list[PlainVllmV1Scheduler] = []
    run_plainly(*given_run, watch=lambda now: (check_blocks(now), schedulers.append(now)))
    assert schedulers[-1].pool.num_free == schedulers[-1].pool.num_usable


@given(runs())
@settings(max_examples=150, deadline=None)
def test_every_request_finishes(
    given_run: tuple[PlainVllmV1Case, list[PlainVllmV1Request]],
) -> None:
    """Each gets its tokens, computing all but the last one; steps run one after the other."""
    case, workload = given_run
    run = run_plainly(case, workload)
    for request, row in zip(workload, run.requests, strict=True):
        room = case.max_model_len - request.num_prompt_tokens
        assert row.output_tokens == min(request.num_output_tokens, room)
        assert row.arrival_ns <= row.first_scheduled_ns < row.first_token_ns <= row.finish_ns
        once = request.num_prompt_tokens + row.output_tokens - 1
        hits = sum(step.hits.get(row.request_id, 0) for step in run.steps)
        again = row.scheduled_tokens_total + hits - once
        assert again == 0 or (again > 0 and row.num_preemptions > 0)
    for before, after in zip(run.steps, run.steps[1:], strict=False):
        assert before.end_ns <= after.start_ns
        assert max(before.tokens, after.tokens) <= case.max_num_batched_tokens


@given(runs(policy="fcfs", vllm_version="0.32.0"))
@settings(max_examples=150, deadline=None)
def test_fcfs_starves_nobody(
    given_run: tuple[PlainVllmV1Case, list[PlainVllmV1Request]],
) -> None:
    """All stand in order of arrival, and the oldest gets tokens in every step, never preempted."""
    case, workload = given_run

    def in_order_of_arrival(now: PlainVllmV1Scheduler) -> None:
        ids = [state.request_id for state in now.running + now.waiting]
        assert ids == sorted(ids)

    run = run_plainly(case, workload, watch=in_order_of_arrival)
    for step in run.steps:
        oldest = next(
            row
            for row in run.requests
            if row.arrival_ns <= step.sched_ns and row.finish_ns > step.sched_ns
        )
        last_token_in_flight = oldest.finish_ns <= step.start_ns
        assert (oldest.request_id in step.scheduled) != last_token_in_flight
        assert oldest.request_id not in step.preempted
