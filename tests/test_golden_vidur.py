"""Our decisions, times and events are those that recorded runs of Vidur show."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from against_oracle import simulate_case
from oracle.golden import case_folders, read_case

FOLDERS = case_folders()
CASES = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
EVENT_CASES = pytest.mark.parametrize(
    "folder",
    [folder for folder in FOLDERS if folder.name.startswith("v26")],
    ids=lambda folder: folder.name,
)
needs_cases = pytest.mark.skipif(not FOLDERS, reason="no golden cases here or beside the checkout")


def close(ours: Any, theirs: Any) -> bool:
    return math.isclose(ours, theirs, rel_tol=0.0, abs_tol=1e-9)


def members(batch: dict[str, Any], *, in_order: bool) -> list[tuple[int, int]]:
    """Requests with their tokens; Vidur orders those of a mnemosyne batch by address."""
    pairs = list(zip(batch["request_ids"], batch["num_tokens"], strict=True))
    return pairs if in_order else sorted(pairs)


@needs_cases
@CASES
def test_requests_and_batches_match(folder: Path) -> None:
    """Same replicas, batches, restarts and times, in each event order given."""
    case, workload, expected = read_case(folder)
    in_order = case.scheduler != "mnemosyne"
    for event_order in expected.event_orders:
        result = simulate_case(
            replace(case, event_order=event_order), workload, record=("batches", "stages")
        )
        assert len(result.batches) == len(expected.batches)
        first_stage = result.stages[result.stages.stage_id == 0]
        batches = result.batches.merge(first_stage, on=["replica_id", "batch_index"])
        for ours, theirs in zip(batches.to_dict("records"), expected.batches, strict=True):
            assert ours["replica_id"] == theirs["replica_id"]
            assert ours["batch_index"] == theirs["batch_index"]
            assert members(ours, in_order=in_order) == members(theirs, in_order=in_order)
            assert close(ours["scheduled_at"], theirs["scheduled_at"])
            assert close(ours["started_at"], theirs["stage0_start"])
            assert close(ours["ended_at"], theirs["stage0_end"])
            assert close(ours["completed_at"], theirs["completed_at"])
        for ours, theirs in zip(result.requests.to_dict("records"), expected.requests, strict=True):
            assert all(close(ours[name], value) for name, value in theirs.items()), (ours, theirs)


@needs_cases
@EVENT_CASES
def test_events_match(folder: Path) -> None:
    """The event stream is Vidur's, event for event, in each order given."""
    case, workload, expected = read_case(folder)
    for event_order, theirs in expected.events.items():
        result = simulate_case(replace(case, event_order=event_order), workload, record=("events",))
        rows = result.events.head(len(theirs))
        ours = [
            (
                None
                if row.replica_id is None or row.replica_id != row.replica_id
                else int(row.replica_id),
                None if row.stage_id is None or row.stage_id != row.stage_id else int(row.stage_id),
            )
            for row in rows.astype(object).where(rows.notna(), None).itertuples()
        ]
        assert list(rows.event_type) == [event[1] for event in theirs]
        assert ours == [event[2:] for event in theirs]
        assert all(close(a, b[0]) for a, b in zip(rows.time, theirs, strict=True))
        assert len(result.events) >= len(theirs)
