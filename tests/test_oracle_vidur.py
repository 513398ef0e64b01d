"""The plain re-statement of the reference does what the reference did, and keeps the laws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle.golden import case_folders, golden_root, read_case
from oracle.vidur import run_plainly

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
