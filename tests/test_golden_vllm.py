"""Our steps, times and preemptions are those of the real vLLM V1 scheduler."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from against_vllm_v1 import cluster_of, simulation_of
from oracle.vllm_v1 import PlainVllmV1Step, read_vllm_v1_case
from shared_folder import SHARED

import vidur_simpy as vs

HERE = Path(__file__).resolve().parent
FOLDERS = {
    folder.parent.name: folder.parent
    for root in (SHARED / "golden" / "vllm", HERE / "golden" / "vllm")
    for folder in sorted(root.glob("*/case.json"))
}
# Sums of thousands of step times that are no exact doubles; they are integers of nanoseconds.
TOLERANCE = 1e-10
CASES = pytest.mark.parametrize("name", FOLDERS or ["none"])
needs_cases = pytest.mark.skipif(not FOLDERS, reason="no golden vLLM cases here or beside")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pairs(text: str) -> dict[int, int]:
    """Read ``4 7:16``: request 4 with one token, request 7 with sixteen."""
    parts = (part.partition(":") for part in text.split())
    return {int(request): int(count or 1) for request, _, count in parts}


def expected_steps(folder: Path) -> list[PlainVllmV1Step]:
    texts = ("scheduled", "hits", "preempted")
    return [
        PlainVllmV1Step(
            **{name: int(value) for name, value in row.items() if name not in texts},
            scheduled=pairs(row["scheduled"]),
            hits=pairs(row["hits"]),
            preempted=[int(request) for request in row["preempted"].split()],
        )
        for row in rows_of(folder / "steps.csv")
    ]


@needs_cases
@CASES
def test_steps_match(name: str) -> None:
    """The same requests and tokens in the same order, hits, preemptions, blocks and times."""
    simulation = simulation_of(*read_vllm_v1_case(FOLDERS[name]))
    simulation.run()
    steps = simulation.replicas[0].scheduler.steps
    theirs = expected_steps(FOLDERS[name])
    assert len(steps) == len(theirs)
    for ours, expected in zip(steps, theirs, strict=True):
        ours.assert_equals(expected, ticks=1e9, tolerance=TOLERANCE)


@needs_cases
@CASES
def test_tables_match(name: str) -> None:
    """The tables of the result say the same: requests, batches and stages."""
    case, workload = read_vllm_v1_case(FOLDERS[name])
    simulation = simulation_of(case, workload, record=("batches", "stages"))
    simulation.run()
    result = simulation.result()
    theirs = rows_of(FOLDERS[name] / "requests.csv")
    assert len(result.requests) == len(theirs)
    for ours, row in zip(result.requests.to_dict("records"), theirs, strict=True):
        assert ours["request_id"] == int(row["request_id"])
        for column, expected in (
            ("arrived_at", "arrival_ns"),
            ("scheduled_at", "first_scheduled_ns"),
            ("first_token_at", "first_token_ns"),
            ("completed_at", "finish_ns"),
        ):
            assert abs(ours[column] - int(row[expected]) / 1e9) < TOLERANCE, (column, ours, row)
        assert ours["num_restarts"] == int(row["num_preemptions"])
        assert ours.get("num_cached_tokens", 0) == int(row["cached_tokens_first_admission"])
        output = ours.get("num_output_tokens", ours["num_decode_tokens"])
        assert output == int(row["output_tokens"])
    steps = [step for step in expected_steps(FOLDERS[name]) if step.tokens]
    batches = result.batches.merge(result.stages, on=["replica_id", "batch_index"])
    assert len(batches) == len(steps)
    for ours, step in zip(batches.to_dict("records"), steps, strict=True):
        assert list(ours["request_ids"]) == list(step.scheduled)
        assert list(ours["num_tokens"]) == list(step.scheduled.values())
        for column, nanoseconds in (
            ("scheduled_at", step.sched_ns),
            ("started_at", step.start_ns),
            ("ended_at", step.end_ns),
        ):
            assert abs(ours[column] - nanoseconds / 1e9) < TOLERANCE


@needs_cases
def test_a_case_is_an_ordinary_configuration() -> None:
    """Nothing but public names: a cluster with `vllm_v1`, which a configuration can say."""
    case, _ = read_vllm_v1_case(next(iter(FOLDERS.values())))
    cluster = cluster_of(case)
    described = vs.dump_config(cluster=cluster)
    assert described["cluster"]["replica_scheduler"]["type"] == "vllm_v1"
    assert vs.load_config(described)["cluster"] == cluster
