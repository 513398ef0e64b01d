"""What a simulation shows of itself between two runs, as text and as html."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from vidur_simpy.kernel import TypedEvent
from vidur_simpy.summary import aligned, html_table

if TYPE_CHECKING:
    from vidur_simpy.processes import Replica
    from vidur_simpy.simulation import Simulation

__all__ = ["as_html", "as_line", "as_text"]

# Replicas shown one by one.
MAX_ROWS = 16

_HEADER = [
    *("replica", "routed", "done", "running", "waiting", "batches", "KV cache", "utilisation"),
]


def as_line(simulation: Simulation) -> str:
    """Return instant and requests in one line."""
    return f"<Simulation at {_instant(simulation)}: {_counts(simulation).text()}>"


def as_text(simulation: Simulation) -> str:
    """Return the state as plain text."""
    replicas = aligned([_HEADER, *_replica_cells(simulation)])
    return "\n".join([_heading(simulation), *aligned(_lines(simulation)), "", *replicas])


def as_html(simulation: Simulation) -> str:
    """Return the state as html tables; every cell is escaped."""
    about = html_table(_lines(simulation), [_heading(simulation)])
    return about + html_table(_replica_cells(simulation), _HEADER)


class _Counts(NamedTuple):
    """Where the requests are that have arrived."""

    arrived: int
    done: int
    running: int
    waiting: int
    refused: int

    def text(self) -> str:
        parts = (f"{value:,} {name}" for name, value in self._asdict().items())
        return ", ".join(parts)


def _counts(simulation: Simulation) -> _Counts:
    replicas, router = simulation.replicas, simulation.router
    return _Counts(
        arrived=router.num_received,
        done=sum(map(_num_done, replicas)),
        running=sum(replica.scheduler.num_running for replica in replicas),
        waiting=len(router.queue) + sum(replica.num_waiting for replica in replicas),
        refused=simulation.num_refused,
    )


def _heading(simulation: Simulation) -> str:
    return f"Simulation at {_instant(simulation)}"


def _instant(simulation: Simulation) -> str:
    env = simulation.env
    if env.now == 0 and not simulation.router.num_received:
        state = ", not started"
    else:
        state = ", nothing left to happen" if env.peek() == inf else ""
    return f"{env.now:.9g} s{state}"


def _lines(simulation: Simulation) -> list[tuple[str, str]]:
    """Return label and text of what is said about the whole."""
    cluster = simulation.cluster
    deployment, policy = cluster.deployment, cluster.replica_scheduler
    lines = [
        (
            "cluster",
            f"{cluster.num_replicas} x {deployment.model.name} on {cluster.num_devices} x "
            f"{deployment.device.name}, {getattr(policy, '__name__', type(policy).__name__)}",
        ),
        ("requests", _counts(simulation).text()),
    ]
    if simulation.num_expected:
        lines.append(("expected", f"{simulation.num_expected:,} requests of the workload"))
    if simulation.last_refusal:
        lines.append(("refused last for", simulation.last_refusal))
    return [*lines, ("next event", _next_event(simulation)), ("recorded", _recorded(simulation))]


def _next_event(simulation: Simulation) -> str:
    entry = simulation.env.next_entry
    if entry is None or entry[0] == inf:
        return "none"
    instant, _, _, event = entry
    if isinstance(event, TypedEvent):
        return f"{event.event_type.name} at {instant:.9g} s"
    return f"{type(event).__name__} of a process at {instant:.9g} s"


def _recorded(simulation: Simulation) -> str:
    names = ["requests", "replicas", "timeline", *simulation.logs]
    folder = simulation.record_to
    return ", ".join(names) + (f"; rows go to {str(folder)!r}" if folder is not None else "")


def _replica_cells(simulation: Simulation) -> list[list[str]]:
    replicas = simulation.replicas
    rows = [list(_cells(replica)) for replica in replicas[:MAX_ROWS]]
    if len(replicas) > MAX_ROWS:
        rows.append([f"... and {len(replicas) - MAX_ROWS:,} more", *[""] * (len(_HEADER) - 1)])
    return rows


def _cells(replica: Replica) -> Iterator[str]:
    counts = (
        replica.replica_id,
        replica.num_requests,
        _num_done(replica),
        replica.scheduler.num_running,
        replica.num_waiting,
        replica.num_batches,
    )
    yield from (f"{count:,}" for count in counts)
    yield from (f"{share:.1%}" for share in (replica.pool.usage, replica.utilisation))


def _num_done(replica: Replica) -> int:
    return replica.num_requests - replica.num_outstanding
