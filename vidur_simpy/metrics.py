"""Observers that append rows while a simulation runs; recording is listening to its events."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidur_simpy.columns import COLUMNS
from vidur_simpy.entities import Batch, Request
from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time.interface import HasOperators
from vidur_simpy.kernel import Environment, EventType, TypedEvent
from vidur_simpy.phase_log import PhaseLog
from vidur_simpy.power import mean_power_w
from vidur_simpy.record_columns import record_rows, recorded_columns
from vidur_simpy.sums import Numbers

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time.interface import StageTime
    from vidur_simpy.processes import Replica

__all__ = [
    "RECORDS",
    "BatchLog",
    "EventLog",
    "OperatorLog",
    "StageLog",
    "Timeline",
    "TokenLog",
    "replica_columns",
    "timeline_columns",
]


class Timeline:
    """Samples of a replica's load when batches are formed, in a bounded number of rows.

    Every batch is sampled until `capacity` rows are full; then every other row goes and samples
    are taken half as often, so that memory stays flat however long the run.

    Parameters
    ----------
    capacity : int
        Most rows kept.

    Attributes
    ----------
    next_at : float
        Instant from which the next sample is taken, in seconds.
    """

    __slots__ = ("_interval", "capacity", "next_at", "rows")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[tuple[float, int, int, float]] = []
        self.next_at = 0.0
        self._interval = 0.0

    def sample(self, now: float, num_running: int, num_waiting: int, usage: float) -> float:
        """Append a row; return the instant from which the next is taken, in seconds."""
        self.rows.append((now, num_running, num_waiting, usage))
        if len(self.rows) >= self.capacity:
            self._thin(now)
        self.next_at = next_at = now + self._interval
        return next_at

    def sample_run(
        self,
        instants: Numbers,
        num_running: int,
        num_waiting: int,
        num_used_blocks: Numbers,
        num_blocks: int,
        arrivals: Sequence[float] = (),
    ) -> None:
        """Append the rows that are due of batches formed one after the other.

        Parameters
        ----------
        instants : sequence of float
            When they were formed, in seconds.
        num_running, num_waiting : int
            Requests, the latter before the `arrivals`.
        num_used_blocks : sequence of int
            Blocks in use once each batch was formed.
        num_blocks : int
            Blocks in all.
        arrivals : sequence of float
            When further requests came to wait, in seconds, in ascending order.
        """
        next_at = self.next_at
        position, waiting = bisect_left(instants, next_at), num_waiting
        while position < len(instants):
            now = float(instants[position])
            if arrivals:
                waiting = num_waiting + bisect_right(arrivals, now)
            usage = float(num_used_blocks[position]) / num_blocks
            self.rows.append((now, num_running, waiting, usage))
            if len(self.rows) >= self.capacity:
                self._thin(now)
            next_at = now + self._interval
            position = bisect_left(instants, next_at, position + 1)
        self.next_at = next_at

    def _thin(self, now: float) -> None:
        """Let every other row go, and take samples half as often."""
        span = now - self.rows[0][0]
        self._interval = max(2.0 * self._interval, 2.0 * span / self.capacity)
        del self.rows[1::2]


def replica_columns(
    replicas: Sequence[Replica], deployment: Deployment, now: float
) -> dict[str, list[Any]]:
    """Return what each replica has done up to `now` (seconds), by column."""
    rows = [_replica_row(replica, deployment, now) for replica in replicas]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _replica_row(replica: Replica, deployment: Deployment, now: float) -> dict[str, Any]:
    pool = replica.pool
    return {
        "replica_id": replica.replica_id,
        "num_requests": replica.num_requests,
        "num_batches": replica.num_batches,
        "num_restarts": replica.num_restarts,
        "num_prefill_tokens": replica.num_prefill_tokens,
        "num_decode_tokens": replica.num_decode_tokens,
        "num_blocks": pool.num_blocks,
        "utilisation": replica.utilisation,
        "kv_cache_usage_mean": pool.mean_usage(now),
        "kv_cache_usage_peak": 1 - pool.num_free_least / pool.num_blocks,
        **_device_figures(replica, deployment, now),
        # A scheduler may have figures of its own, such as a prefix cache's hit rate.
        **getattr(replica.scheduler, "figures", {}),
    }


def _device_figures(replica: Replica, deployment: Deployment, now: float) -> dict[str, float]:
    """Return how busy the matrix units and the memory of the devices were, and their energy."""
    num_tokens = replica.num_prefill_tokens + replica.num_decode_tokens
    flops = deployment.flops(num_tokens, replica.num_attention_pairs)
    num_bytes = deployment.bytes_read(replica.num_batches, num_tokens, replica.num_context_tokens)
    device, device_time = deployment.device, deployment.num_devices * now
    shares = {"mfu": 0.0, "mbu": 0.0}
    if device_time:
        shares["mfu"] = flops / (deployment.peak_flops * device_time)
        shares["mbu"] = num_bytes / (device.memory_bandwidth_gbps * 1e9 * device_time)
    tdp_w = nan if device.tdp_w is None else device.tdp_w
    power_w = mean_power_w(tdp_w, utilisation=replica.utilisation, **shares)
    return shares | {
        "num_devices": deployment.num_devices,
        "tdp_w": tdp_w,
        "energy_kwh": power_w * device_time / 3.6e6,
    }


def timeline_columns(replicas: Sequence[Replica]) -> dict[str, list[Any]]:
    """Return the samples of all replicas by column, in order of time."""
    rows = sorted(
        (now, replica.replica_id, running, waiting, usage)
        for replica in replicas
        for now, running, waiting, usage in replica.timeline.rows
    )
    return _columns("timeline", rows)


class BatchLog:
    """Observes batches: when each was formed and ended, with whom and how many tokens.

    Parameters
    ----------
    env : Environment
    directory : Path, optional
        Of records, as for the other logs: where rows go as they come, else they stay in memory.
    """

    def __init__(self, env: Environment, directory: Path | None = None) -> None:
        # Rows are kept in order of formation, so one that has ended waits for those before it.
        self._ended_rows = record_rows("batches", directory)
        self._waiting: deque[list[Any]] = deque()
        self._under_way: dict[tuple[int, int], list[Any]] = {}
        env.subscribe(EventType.BATCH_STAGE_ARRIVAL, self._formed)
        env.subscribe(EventType.BATCH_END, self._ended)

    def __len__(self) -> int:
        return len(self._ended_rows) + len(self._waiting)

    def _formed(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        if event.stage_id != 0:
            return
        requests = batch.requests()
        row = [
            batch.replica_id,
            batch.batch_index,
            batch.scheduled_at,
            nan,
            [request.request_id for request, _ in requests],
            [num_tokens for _, num_tokens in requests],
            batch.num_prefill_tokens,
            batch.num_decodes,
        ]
        self._under_way[batch.replica_id, batch.batch_index] = row
        self._waiting.append(row)

    def _ended(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        self._under_way.pop((batch.replica_id, batch.batch_index))[3] = event.env.now
        waiting = self._waiting
        while waiting and not isnan(waiting[0][3]):
            self._ended_rows.append(tuple(waiting.popleft()))

    def flush(self) -> None:
        """Write the rows of batches that have ended, if rows go to files."""
        self._ended_rows.flush()

    def columns(self) -> Mapping[str, Any]:
        """Return the columns, in order of formation."""
        return recorded_columns("batches", self._ended_rows, self._waiting)


class StageLog:
    """Observes pipeline stages: a row for each batch on each stage."""

    def __init__(self, env: Environment, directory: Path | None = None) -> None:
        self._rows = record_rows("stages", directory)
        env.subscribe(EventType.BATCH_STAGE_END, self._ended)

    def _ended(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        self._rows.append(
            (
                batch.replica_id,
                batch.batch_index,
                event.stage_id,
                batch.stage_started_at,
                event.env.now,
                batch.num_prefill_tokens,
                batch.num_decodes,
            )
        )

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self) -> None:
        """Write all rows, if rows go to files."""
        self._rows.flush()

    def columns(self) -> Mapping[str, Any]:
        """Return the columns, in order of end."""
        return recorded_columns("stages", self._rows)


class EventLog:
    """Observes every typed event, in the order in which they are handled."""

    def __init__(self, env: Environment, directory: Path | None = None) -> None:
        self._rows = record_rows("events", directory)
        for event_type in EventType:
            env.subscribe(event_type, self._happened)

    def _happened(self, event: TypedEvent) -> None:
        subject = event.value
        self._rows.append(
            (
                event.env.now,
                event.event_type.name,
                event.replica_id,
                event.stage_id,
                subject.batch_index if isinstance(subject, Batch) else None,
                subject.request_id if isinstance(subject, Request) else None,
            )
        )

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self) -> None:
        """Write all rows, if rows go to files."""
        self._rows.flush()

    def columns(self) -> Mapping[str, Any]:
        """Return the columns."""
        return recorded_columns("events", self._rows)


class TokenLog:
    """Observes output tokens: how many came with which latency since the one before."""

    def __init__(self, env: Environment, directory: Path | None = None) -> None:
        self._rows = record_rows("tokens", directory)
        self._decoding: dict[tuple[int, int], list[Request]] = {}
        self._previous_at: dict[Request, float] = {}
        env.subscribe(EventType.BATCH_STAGE_ARRIVAL, self._formed)
        env.subscribe(EventType.BATCH_END, self._ended)

    def _formed(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        if event.stage_id == 0 and batch.num_decodes:
            self._decoding[batch.replica_id, batch.batch_index] = batch.decoding()

    def _ended(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        producers = self._decoding.pop((batch.replica_id, batch.batch_index), [])
        producers += batch.prefilled()
        now = event.env.now
        latencies: Counter[float] = Counter()
        for request in producers:
            if request in self._previous_at:
                latencies[now - self._previous_at[request]] += 1
            if request.completed_at is None:
                self._previous_at[request] = now
            else:
                self._previous_at.pop(request, None)
        for latency, num_tokens in latencies.items():
            self._rows.append((now, batch.replica_id, latency, num_tokens))

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self) -> None:
        """Write all rows, if rows go to files."""
        self._rows.flush()

    def columns(self) -> Mapping[str, Any]:
        """Return the columns, in order of time."""
        return recorded_columns("tokens", self._rows)


class OperatorLog:
    """Observes what the operators of all batches took, in sums by stage and kind of batch.

    Times are those of the execution-time model; that a stage was stalled does not count.
    """

    def __init__(self, env: Environment, stage_time: StageTime) -> None:
        if not isinstance(stage_time, HasOperators):
            raise ConfigError(
                "record = 'operators': these execution times are not broken down by operator; "
                "those that are have a method operators(batch, stage_id), as Roofline() has."
            )
        self._operators: Callable[[Batch, int], dict[str, float]] = stage_time.operators
        self._rows: dict[tuple[int, int, str, str], list[Any]] = {}
        env.subscribe(EventType.BATCH_STAGE_END, self._ended)

    def _ended(self, event: TypedEvent) -> None:
        batch: Batch = event.value
        stage_id = event.stage_id
        assert stage_id is not None
        kind = ("mixed" if batch.num_decodes else "prefill") if batch.prefills else "decode"
        for operator, seconds in self._operators(batch, stage_id).items():
            sums = self._rows.setdefault((batch.replica_id, stage_id, kind, operator), [0, 0.0])
            sums[0] += 1
            sums[1] += seconds

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self) -> None:
        """Do nothing: sums change to the end, so they are no rows for files."""

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns, in order of first occurrence."""
        of_stage: Counter[tuple[int, int]] = Counter()
        for place, (_, seconds) in self._rows.items():
            of_stage[place[:2]] += seconds
        rows = [
            (*place, *sums, sums[1] / (of_stage[place[:2]] or 1.0))
            for place, sums in self._rows.items()
        ]
        return _columns("operators", rows)


RECORDS: dict[str, Callable[..., Any]] = {
    "batches": BatchLog,
    "stages": StageLog,
    "events": EventLog,
    "tokens": TokenLog,
    "operators": OperatorLog,
    "phases": PhaseLog,
}


def _columns(table: str, rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Turn rows into the named columns of a table."""
    names = list(COLUMNS[table])
    columns = [list(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns or [[] for _ in names], strict=True))
