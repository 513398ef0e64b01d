"""Traces of a run for viewers: the Trace Event Format of Chrome and Perfetto, and plain events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vidur_simpy.exchange.files import new_file
from vidur_simpy.series import load_samples

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["write_chrome_trace", "write_event_trace"]

Event = dict[str, Any]

# Process 0 is the idle task to viewers. The first stage has the number of its process, which makes
# it the main thread; no thread has the number of another.
ROUTER = 1
FIRST_REPLICA = 1000

# Counter and its series: column of the samples.
_COUNTERS = {
    "requests": {"running": "running", "waiting": "waiting"},
    "KV cache": {"share in use": "usage"},
}


def write_chrome_trace(
    result: Result, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the trace that `Result.to_chrome_trace` describes, event by event."""
    stages = result.stages
    about = {"tool": "vidur_simpy"} | {
        name: value for name, value in result.info.items() if isinstance(value, str | int | float)
    }
    head = {"displayTimeUnit": "ms", "otherData": {key: _plain(about[key]) for key in about}}
    with new_file(path, overwrite=overwrite) as file:
        file.write(json.dumps(head)[:-1] + ', "traceEvents": ')
        file.writelines(_array(_events(result, stages)))
        file.write("}\n")


def write_event_trace(
    result: Result, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the table of events as JSON, an object per line, as `Result.to_event_trace` says."""
    events = result.events
    with new_file(path, overwrite=overwrite) as file:
        file.writelines(_array(_arguments(row) for row in _rows(events)))
        file.write("\n")


def _events(result: Result, stages: pd.DataFrame) -> Iterator[Event]:
    """Return the events of the trace; viewers sort them by time."""
    end_of_run = float(result.info.get("simulated_time", stages["ended_at"].max()))
    yield from _names(result, stages)
    yield from _slices(result, stages, end_of_run)
    yield from _arrows(stages)
    yield from _counters(result)
    for request in _rows(result.requests):
        yield from _life(request, end_of_run)


def _names(result: Result, stages: pd.DataFrame) -> Iterator[Event]:
    """Name the router, the replicas and their stages, in the order in which they are shown."""
    replica_ids = result.replicas["replica_id"].tolist()
    processes = {ROUTER: "router"} | {_process(r): f"replica {r}" for r in replica_ids}
    for pid, name in processes.items():
        yield _named("process_name", arguments={"name": name}, pid=pid)
        yield _named("process_sort_index", arguments={"sort_index": pid}, pid=pid)
    places = stages[["replica_id", "stage_id"]].drop_duplicates()
    for replica_id, stage_id in sorted(places.itertuples(index=False)):
        place = _thread(replica_id, stage_id)
        yield _named("thread_name", arguments={"name": f"stage {stage_id}"}, **place)
        yield _named("thread_sort_index", arguments={"sort_index": stage_id}, **place)


def _slices(result: Result, stages: pd.DataFrame, end_of_run: float) -> Iterator[Event]:
    """Return a complete event for each batch on each stage."""
    if "batches" in result.tables:
        members = result.batches[["replica_id", "batch_index", "request_ids", "num_tokens"]]
        stages = stages.merge(members, how="left", on=["replica_id", "batch_index"])
    for row in _rows(stages):
        start = _nanoseconds(row["started_at"])
        end = _nanoseconds(end_of_run if math.isnan(row["ended_at"]) else row["ended_at"])
        arguments = {
            "batch": row["batch_index"],
            "prompt tokens": row["num_prefill_tokens"],
            "decode tokens": row["num_decode_tokens"],
        }
        if isinstance(row.get("request_ids"), list):
            # As text: viewers make a row of each element of a list.
            arguments["requests"] = " ".join(map(str, row["request_ids"]))
            arguments["tokens of each"] = " ".join(map(str, row["num_tokens"]))
        yield {
            "ph": "X",
            "cat": "batch",
            "name": _kind(row["num_prefill_tokens"], row["num_decode_tokens"]),
            **_thread(row["replica_id"], row["stage_id"]),
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": arguments,
        }


def _arrows(stages: pd.DataFrame) -> Iterator[Event]:
    """Return the flow of each batch that was on several stages, from one to the next."""
    batches = stages.groupby(["replica_id", "batch_index"])
    flows = stages.assign(
        flow=batches.ngroup(),
        first=batches["stage_id"].transform("min"),
        last=batches["stage_id"].transform("max"),
    )
    for row in _rows(flows[flows["first"] < flows["last"]]):
        is_last = row["stage_id"] == row["last"]
        phase = "f" if is_last else "t"
        yield {
            "ph": "s" if row["stage_id"] == row["first"] else phase,
            "cat": "pipeline",
            "name": "next stage",
            "id": row["flow"],
            **_thread(row["replica_id"], row["stage_id"]),
            "ts": _nanoseconds(row["started_at"]) / 1000,
            # The arrow ends at the slice around this instant, not at the one after it.
            **({"bp": "e"} if is_last else {}),
        }


def _counters(result: Result) -> Iterator[Event]:
    """Return a sample of each counter for each row of the timeline, and zeros while idle."""
    for row in _rows(load_samples(result)):
        for counter, columns in _COUNTERS.items():
            yield {
                "ph": "C",
                "name": counter,
                "pid": _process(row["replica_id"]),
                "ts": _nanoseconds(row["time"]) / 1000,
                "args": {name: row[column] for name, column in columns.items()},
            }


def _life(request: Mapping[str, Any], end_of_run: float) -> Iterator[Event]:
    """Return the life of a request, and its phases within."""
    replica_id, arrived_at = request["replica_id"], request["arrived_at"]
    pid = ROUTER if replica_id is None else _process(replica_id)
    about = {name: value for name, value in request.items() if name not in _TIMES}
    if request["refusal"]:
        refused = _of_life("i", request, ROUTER, "refused", arrived_at) | {"s": "p"}
        yield refused | {"args": _arguments(about)}
        return
    instants = [arrived_at] + [request[column] for column in _PHASES.values()]
    known = [instant for instant in instants if not math.isnan(instant)]
    ends = [*known[1:], end_of_run] if len(known) < len(instants) else known[1:]
    yield _of_life("b", request, pid, "request", known[0]) | {"args": _arguments(about)}
    for name, start, end in zip(_PHASES, known, ends, strict=False):
        if end > start:
            yield _of_life("b", request, pid, name, start)
            yield _of_life("e", request, pid, name, end)
    yield _of_life("e", request, pid, "request", ends[-1])


# The phases of a request, with the instant at which each ends.
_PHASES = {"waiting": "scheduled_at", "prefill": "first_token_at", "decode": "completed_at"}
_TIMES = {"replica_id", "arrived_at", *_PHASES.values()}


def _of_life(phase: str, request: Mapping[str, Any], pid: int, name: str, time: float) -> Event:
    """Return the begin or the end of a slice that belongs to a request, not to a thread."""
    return {
        "ph": phase,
        "cat": "request",
        "id2": {"local": str(request["request_id"])},
        "name": name,
        "pid": pid,
        "tid": pid,
        "ts": _nanoseconds(time) / 1000,
    }


def _kind(num_prefill_tokens: int, num_decode_tokens: int) -> str:
    """Return what a batch does; viewers give each of these a colour."""
    if not num_decode_tokens:
        return "prefill"
    return "prefill and decode" if num_prefill_tokens else "decode"


def _process(replica_id: int) -> int:
    return (int(replica_id) + 1) * FIRST_REPLICA


def _thread(replica_id: int, stage_id: int) -> dict[str, int]:
    pid = _process(replica_id)
    return {"pid": pid, "tid": pid + int(stage_id)}


def _named(kind: str, *, arguments: Event, **place: int) -> Event:
    return {"ph": "M", "name": kind, **place, "args": arguments}


def _nanoseconds(time: float) -> int:
    """Return an instant as a whole number: what ends and what begins then do not overlap."""
    return round(time * 1e9)


def _rows(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Return the rows of a table as plain values, None where an id is missing."""
    import pandas as pd

    columns = []
    for name in table.columns:
        column = table[name]
        if isinstance(column.dtype, pd.Int64Dtype):
            column = column.astype(object).where(column.notna(), None)
        columns.append(column.tolist())
    for values in zip(*columns, strict=True):
        yield dict(zip(table.columns, values, strict=True))


def _arguments(row: Mapping[str, Any]) -> Event:
    """Return what is known of a row."""
    values = {str(name): _plain(value) for name, value in row.items()}
    return {name: value for name, value in values.items() if value is not None and value != ""}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it; None for NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | list) or value is None else str(value)


def _array(items: Iterable[Event]) -> Iterator[str]:
    """Return the text of a JSON array, a line for each item."""
    separator = "[\n"
    for item in items:
        yield separator + json.dumps(item)
        separator = ",\n"
    yield "[]" if separator == "[\n" else "\n]"
