"""Reads the golden cases: what the reference did with given workloads."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_folder import REPOSITORY, SHARED

from .vidur import PlainCase

__all__ = ["Expected", "case_folders", "golden_root", "read_case"]

Event = tuple[float, str, int | None, int | None]


@dataclass(frozen=True)
class Expected:
    """Rows with the column names of `PlainRun`; events per event order."""

    requests: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    events: dict[str, list[Event]]
    event_orders: tuple[str, ...]  # those under which requests and batches are as given
    case: dict[str, Any] = field(repr=False)  # case.json


def golden_root() -> Path | None:
    """The folder of all golden cases beside the repository, else of those in it, else None."""
    for folder in (SHARED / "golden" / "vidur", REPOSITORY / "tests" / "golden" / "vidur"):
        if folder.is_dir():
            return folder
    return None


def case_folders() -> list[Path]:
    """Every golden case, in order of name; empty where there are none."""
    root = golden_root()
    return sorted(path.parent for path in root.glob("*/case.json")) if root else []


def read_case(folder: Path) -> tuple[PlainCase, list[tuple[float, int, int]], Expected]:
    """The case (with event order "type" where it holds), its workload, and what came out."""
    described = json.loads((folder / "case.json").read_text())
    orders = {"documented": "type", "as_shipped": "id"}
    event_orders = tuple(orders[name] for name in orders if name in described["ordering"])
    workload = [
        (float(row["arrived_at"]), int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
        for row in rows(folder / "workload.csv")
    ]
    expected = Expected(
        requests=[request_row(row) for row in rows(folder / "requests.csv")],
        batches=[batch_row(row) for row in rows(folder / "batches.csv")],
        events=read_events(folder, event_orders),
        event_orders=event_orders,
        case=described,
    )
    return plain_case(described, event_orders[0]), workload, expected


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_events(folder: Path, event_orders: tuple[str, ...]) -> dict[str, list[Event]]:
    first = [event_row(row) for row in rows(folder / "events.csv")]
    if len(event_orders) == 1:
        return {event_orders[0]: first}
    second = [event_row(row) for row in rows(folder / "events_documented.csv")]
    return {"id": first, "type": second}


def event_row(row: dict[str, str]) -> Event:
    replica_id = int(row["replica_id"]) if row["replica_id"] else None
    stage_id = int(row["stage_id"]) if row["stage_id"] else None
    return float(row["time"]), row["event_type"], replica_id, stage_id


def request_row(row: dict[str, str]) -> dict[str, Any]:
    names = {"prefill_completed_at": "first_token_at"}
    whole = ("request_id", "replica_id", "num_restarts")
    return {
        names.get(name, name): int(value) if name in whole else float(value)
        for name, value in row.items()
    }


def batch_row(row: dict[str, str]) -> dict[str, Any]:
    return {
        "replica_id": int(row["replica_id"]),
        "batch_index": int(row["batch_index"]),
        "scheduled_at": float(row["schedule_time"]),
        "stage0_start": float(row["stage0_start"]),
        "stage0_end": float(row["stage0_end"]),
        "completed_at": float(row["end"]),
        "request_ids": [int(text) for text in row["request_ids"].split()],
        "num_tokens": [int(text) for text in row["num_q_tokens"].split()],
    }


def plain_case(described: dict[str, Any], event_order: str) -> PlainCase:
    """A case.json in the package's words."""
    scheduler: dict[str, Any] = dict(described["replica_scheduler"])
    name, _, ordering = scheduler.pop("kind").partition("_")
    if name == "faster":
        name, ordering = "faster_transformer", ""
    cap = scheduler.pop("batch_size_cap")
    if name in ("orca", "faster_transformer"):
        cap = described["resolved"]["max_batch_size"]
    renamed = {
        "max_tokens_in_batch": "max_num_batched_tokens",
        "max_waiting_iters": "max_waiting_iterations",
        "long_request_kv_cache_len_threshold": "long_request_threshold",
    }
    settings = {renamed.get(key, key): value for key, value in scheduler.items()}
    if "deadline_multiplier" in settings:
        settings["deadline_multiplier"] = 1.0  # E1: it has no effect in the reference
    if name == "mnemosyne":
        settings["ordering"] = ordering.removesuffix("_fixed_chunk")
    policies = {"lor": "least_waiting_requests"}
    execution_time = described["execution_time"]
    return PlainCase(
        scheduler=name,
        max_num_seqs=cap,
        **settings,
        kv_parallel_size=described["kv_parallel_size"],
        max_num_tokens_per_kvp_group=described["max_num_tokens_per_kvp_group"],
        global_scheduler=policies.get(described["global_scheduler"], described["global_scheduler"]),
        num_replicas=described["num_replicas"],
        pipeline_parallel_size=described["num_pipeline_stages"],
        sequence_pipeline_parallel=described["enable_sequence_pipeline_parallel"],
        block_size=described["cache"]["block_size"],
        num_blocks=described["resolved"]["num_blocks"],
        watermark=described["cache"]["watermark_blocks_fraction"],
        max_model_len=described["max_tokens"],
        base=execution_time["base"],
        per_token=execution_time["per_token"],
        per_context_token=execution_time["per_kv_token"],
        event_order=event_order,
    )
