"""The package decides as the plain oracle does, on random small workloads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from against_oracle import simulate_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.vidur import PlainCase, run_plainly

REQUEST_TIMES = (
    "arrived_at",
    "scheduled_at",
    "first_token_at",
    "completed_at",
    "execution_time",
    "preempted_time",
)


@st.composite
def cases(draw: st.DrawFn, scheduler: str) -> tuple[PlainCase, list[tuple[float, int, int]]]:
    """A small cluster, short of memory or not, and requests that often arrive together."""
    stages = 1 if scheduler == "lightllm" else draw(st.sampled_from([1, 2, 4]))
    block_size = 1 if scheduler == "lightllm" else draw(st.sampled_from([1, 2, 4, 16]))
    longest = draw(st.sampled_from([8, 24, 60]))
    max_model_len = 2 * longest
    each = max(1, max_model_len // block_size)
    num_blocks = draw(st.integers(each, 4 * each))
    case = PlainCase(
        scheduler=scheduler,
        max_num_seqs=draw(st.integers(stages, 12)),
        chunk_size=draw(st.integers(1, 40)),
        max_num_batched_tokens=draw(st.integers(longest // 2, 3 * longest)),
        max_waiting_iterations=draw(st.integers(0, 4)),
        global_scheduler=draw(
            st.sampled_from(["round_robin", "least_waiting_requests", "least_outstanding_requests"])
        ),
        num_replicas=draw(st.integers(1, 3)),
        pipeline_parallel_size=stages,
        sequence_pipeline_parallel=scheduler == "sarathi" and draw(st.booleans()),
        block_size=block_size,
        num_blocks=num_blocks,
        watermark=draw(st.sampled_from([0.0, 0.01, 0.1])),
        max_model_len=max_model_len,
        # Powers of two make equal sums, and so ties, frequent.
        base=draw(st.sampled_from([0.25, 0.004])),
        per_token=draw(st.sampled_from([0.0, 0.0625, 2e-5])),
        per_context_token=draw(st.sampled_from([0.0, 5e-8])),
        event_order=draw(st.sampled_from(["type", "id"])),
    )
    gaps = st.sampled_from([0.0, 0.0, 0.125, 0.25, 0.01, 1.0])
    lengths = st.integers(1, longest)
    rows = draw(st.lists(st.tuples(gaps, lengths, lengths), min_size=1, max_size=24))
    now = 0.0
    workload = []
    for gap, prefill, decode in rows:
        now += gap
        workload.append((now, prefill, decode))
    return case, workload


def same(ours: Any, theirs: Any) -> bool:
    if theirs is None or (isinstance(theirs, float) and math.isnan(theirs)):
        return ours is None or ours != ours
    return math.isclose(ours, theirs, rel_tol=0.0, abs_tol=1e-9)


def assert_same(case: PlainCase, workload: list[tuple[float, int, int]]) -> None:
    expected = run_plainly(case, workload)
    result = simulate_case(case, workload, record=("batches", "events"))
    unrecorded = simulate_case(case, workload)
    pd.testing.assert_frame_equal(unrecorded.requests, result.requests, check_exact=True)
    ours = result.requests.astype(object).where(result.requests.notna(), None)
    for row, theirs in zip(ours.to_dict("records"), expected.requests, strict=True):
        assert bool(row["refusal"]) == bool(theirs["refusal"]), (row, theirs)
        if theirs["refusal"]:
            continue
        assert row["replica_id"] == theirs["replica_id"]
        assert row["num_restarts"] == theirs["num_restarts"], (row, theirs)
        for name in REQUEST_TIMES:
            assert same(row[name], theirs[name]), (name, row, theirs)
        assert same(row.get("deadline"), theirs["deadline"]), (row, theirs)
    batches = result.batches.to_dict("records")
    assert len(batches) == len(expected.batches)
    for row, theirs in zip(batches, expected.batches, strict=True):
        assert list(row["request_ids"]) == theirs["request_ids"], (row, theirs)
        assert list(row["num_tokens"]) == theirs["num_tokens"], (row, theirs)
        assert same(row["completed_at"], theirs["completed_at"])
    assert list(result.events.event_type) == [event[1] for event in expected.events]
    assert all(same(a, b[0]) for a, b in zip(result.events.time, expected.events, strict=True))


@pytest.mark.parametrize("scheduler", ["vllm", "sarathi", "orca", "faster_transformer", "lightllm"])
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_package_equals_oracle(scheduler: str, data: st.DataObject) -> None:
    """Requests, batches and events are equal, preemptions, ties and refusals included."""
    assert_same(*data.draw(cases(scheduler)))


@st.composite
def mnemosyne_cases(
    draw: st.DrawFn, ordering: str
) -> tuple[PlainCase, list[tuple[float, int, int]]]:
    """As the others, with chunks of fixed size or sized by time, and one group or several."""
    case, workload = draw(cases("sarathi"))
    is_fixed = ordering == "fcfs" and draw(st.booleans())
    # From what no batch can keep to what every prompt fits into.
    slowest = case.base + (case.per_token + case.per_context_token) * case.max_model_len
    target = draw(st.sampled_from([0.5 * case.base, 1.25 * case.base, 0.6 * slowest, 2 * slowest]))
    case = replace(
        case,
        scheduler="mnemosyne",
        ordering=ordering,
        chunk_size=case.chunk_size if is_fixed else None,
        target_batch_time=target,
        deadline_multiplier=draw(st.sampled_from([1.0, 3.0])),
        min_deadline=draw(st.sampled_from([0.125, 1.0, 8.0])),
        long_request_threshold=draw(st.integers(1, 40)),
        watermark=draw(st.sampled_from([0.0, 0.01, 0.1, 0.6])),
    )
    num_groups = draw(st.sampled_from([1, 1, 2, 3]))
    if num_groups == 1 or case.num_blocks == 1:
        return case, workload
    # Groups are smaller than the longest request, or nothing would be shared.
    num_blocks_each = draw(st.integers(1, case.num_blocks - 1))
    return replace(
        case,
        num_blocks=max(num_blocks_each + 1, case.num_blocks // num_groups),
        kv_parallel_size=num_groups,
        max_num_tokens_per_kvp_group=num_blocks_each * case.block_size,
    ), workload


@pytest.mark.parametrize("ordering", ["fcfs", "edf", "lrs", "st"])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mnemosyne_equals_oracle(ordering: str, data: st.DataObject) -> None:
    """Each ordering decides as the plain oracle, its deadlines included."""
    assert_same(*data.draw(mnemosyne_cases(ordering)))
