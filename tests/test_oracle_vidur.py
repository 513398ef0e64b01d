"""The plain re-statement of the reference does what the reference did, and keeps the laws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from oracle.golden import case_folders, read_case
from oracle.vidur import PlainCase, PlainRun, run_plainly

Workload = list[tuple[float, int, int]]
FOLDERS = case_folders()
NO_CASES = pytest.mark.skipif(not FOLDERS, reason="no golden cases beside the repository")
TIMES = ("scheduled_at", "stage0_start", "stage0_end", "completed_at")


def members(batch: dict[str, Any], *, in_order: bool) -> list[tuple[int, int]]:
    pairs = list(zip(batch["request_ids"], batch["num_tokens"], strict=True))
    return pairs if in_order else sorted(pairs)


@NO_CASES
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_requests_and_batches_are_those_of_the_reference(folder: Path) -> None:
    """Same decisions, same times, under every event order the case was recorded with."""
    case, workload, expected = read_case(folder)
    in_order = case.scheduler != "mnemosyne"
    for event_order in expected.event_orders:
        run = run_plainly(replace(case, event_order=event_order), workload)
        assert len(run.batches) == len(expected.batches)
        for ours, theirs in zip(run.batches, expected.batches, strict=True):
            assert ours["replica_id"] == theirs["replica_id"]
            assert ours["batch_index"] == theirs["batch_index"]
            assert members(ours, in_order=in_order) == members(theirs, in_order=in_order)
            assert [ours[name] for name in TIMES] == pytest.approx(
                [theirs[name] for name in TIMES], abs=1e-9, rel=0
            )
        for ours, theirs in zip(run.requests, expected.requests, strict=True):
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-9, rel=0)
        assert not any(request["refusal"] for request in run.requests)


@NO_CASES
@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f.name.startswith("v26")], ids=lambda folder: folder.name
)
def test_events_are_handled_in_the_order_of_the_reference(folder: Path) -> None:
    """Event for event, in the shipped and in the documented order."""
    case, workload, expected = read_case(folder)
    for event_order, theirs in expected.events.items():
        ours = run_plainly(replace(case, event_order=event_order), workload).events[: len(theirs)]
        assert [event[1:] for event in ours] == [event[1:] for event in theirs]
        assert [event[0] for event in ours] == pytest.approx(
            [event[0] for event in theirs], abs=1e-9, rel=0
        )


def tight_case(draw: st.DrawFn, scheduler: str) -> PlainCase:
    """A replica with few blocks, whatever its policy."""
    block_size = 1 if scheduler == "lightllm" else draw(st.sampled_from([1, 2, 4]))
    stages = draw(st.sampled_from([1, 1, 2, 3]))
    chunked = scheduler in ("sarathi", "mnemosyne")
    max_model_len = draw(st.sampled_from([16, 24, 30]))
    num_blocks = draw(st.integers(20, 60)) // block_size
    if scheduler in ("orca", "faster_transformer"):
        num_blocks = max(num_blocks, max_model_len // block_size)
    ordering = draw(st.sampled_from(["fcfs", "edf", "lrs", "st"]))
    fixed = scheduler == "sarathi" or (ordering == "fcfs" and draw(st.booleans()))
    groups = draw(st.integers(1, 3)) if scheduler == "mnemosyne" else 1
    return PlainCase(
        scheduler=scheduler,
        max_num_seqs=draw(st.sampled_from([stages, 6, 12])),
        max_num_batched_tokens=draw(st.integers(8, 40)),
        chunk_size=draw(st.integers(1, 40)) if fixed else None,
        max_waiting_iterations=draw(st.integers(0, 10)),
        ordering=ordering,
        target_batch_time=draw(st.sampled_from([0.001, 0.0042, 0.0045, 0.005, 0.012])),
        deadline_multiplier=draw(st.sampled_from([1.0, 3.0])),
        min_deadline=draw(st.sampled_from([0.01, 0.1])),
        long_request_threshold=draw(st.integers(1, 30)),
        kv_parallel_size=groups,
        max_num_tokens_per_kvp_group=block_size * draw(st.integers(2, num_blocks - 1)),
        global_scheduler=draw(
            st.sampled_from(["round_robin", "least_waiting_requests", "least_outstanding_requests"])
        ),
        num_replicas=draw(st.integers(1, 2)),
        pipeline_parallel_size=stages,
        sequence_pipeline_parallel=chunked and draw(st.booleans()),
        block_size=block_size,
        num_blocks=num_blocks,
        watermark=draw(st.sampled_from([0.0, 0.05, 0.1, 0.4])),
        max_model_len=max_model_len,
        event_order=draw(st.sampled_from(["type", "id"])),
    )


@st.composite
def tight_runs(draw: st.DrawFn, scheduler: str) -> tuple[PlainCase, Workload]:
    """A tight case and requests that arrive close together."""
    case = tight_case(draw, scheduler)
    gap = st.sampled_from([0.0, 0.0, 0.001, 0.004, 0.02])
    rows = st.lists(st.tuples(gap, st.integers(1, 12), st.integers(1, 20)), min_size=5, max_size=16)
    now, workload = 0.0, []
    for wait, num_prefill_tokens, num_decode_tokens in draw(rows):
        now += wait
        workload.append((now, num_prefill_tokens, num_decode_tokens))
    return case, workload


SCHEDULERS = ["vllm", "sarathi", "orca", "faster_transformer", "lightllm", "mnemosyne"]


def check_requests(run: PlainRun, workload: Workload, stages: int) -> None:
    """Who is not refused completes, in due order, with all its tokens computed."""
    tokens: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    for batch in run.batches:
        for request_id, num_tokens in members(batch, in_order=True):
            tokens[request_id] += num_tokens
            seconds[request_id] += (batch["stage0_end"] - batch["stage0_start"]) * stages
    for request, (arrived_at, prefill, decode) in zip(run.requests, workload, strict=True):
        request_id = request["request_id"]
        if request["refusal"]:
            assert request_id not in tokens
            continue
        first, last = request["first_token_at"], request["completed_at"]
        assert arrived_at <= request["scheduled_at"] < first <= last
        wasted = tokens[request_id] - (prefill + decode - 1)
        assert wasted >= 0 if request["num_restarts"] else wasted == 0
        assert request["execution_time"] == pytest.approx(seconds[request_id], abs=1e-9)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_short_of_memory_everybody_is_served(scheduler: str, data: st.DataObject) -> None:
    """Whoever is not refused completes, tokens add up, and no block stays behind."""
    case, workload = data.draw(tight_runs(scheduler))
    run = run_plainly(case, workload)
    event(f"restarts: {any(request['num_restarts'] for request in run.requests)}")
    check_requests(run, workload, case.pipeline_parallel_size)
    for replica_scheduler in run.schedulers:
        assert not replica_scheduler.blocks
        assert not replica_scheduler.everybody()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_stage_zero_does_one_batch_at_a_time(scheduler: str, data: st.DataObject) -> None:
    """A batch is formed when the one before has left stage 0, and starts at once."""
    case, workload = data.draw(tight_runs(scheduler))
    run = run_plainly(case, workload)
    free_at = [0.0] * case.num_replicas
    for batch in run.batches:
        assert free_at[batch["replica_id"]] <= batch["scheduled_at"] == batch["stage0_start"]
        free_at[batch["replica_id"]] = batch["stage0_end"]


def test_a_request_that_can_never_fit_is_refused_before_it_is_routed() -> None:
    """V2: it arrives, and that is all."""
    run = run_plainly(PlainCase("vllm", num_blocks=4, watermark=0.0), [(1.0, 65, 1)])
    assert run.requests[0]["refusal"]
    assert run.events == [(1.0, "REQUEST_ARRIVAL", None, None)]


def test_a_chunk_of_a_restarted_request_is_of_no_account() -> None:
    """R1: with its first chunk still in the pipe the second request restarts, and loses it."""
    case = PlainCase(
        "sarathi",
        max_num_seqs=8,
        chunk_size=4,
        pipeline_parallel_size=2,
        sequence_pipeline_parallel=True,
        block_size=1,
        num_blocks=16,
        watermark=0.0,
        max_model_len=64,
    )
    run = run_plainly(case, [(0.0, 2, 10), (0.026, 8, 2)])
    assert run.requests[1]["num_restarts"] == 1
    computed = [n for b in run.batches for i, n in members(b, in_order=True) if i == 1]
    assert computed == [4, 4, 4, 1]  # the first one is lost
