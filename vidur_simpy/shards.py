"""One big run cut into shards: some of the replicas each, anywhere, and the same tables in the end.

A router that never looks at the state of a replica can be asked beforehand, request by request,
where each will go. What happens on a replica then depends on its own requests alone, so that a
shard is a run of the whole cluster to which only the requests of some replicas arrive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.cluster import Cluster
from vidur_simpy.config import dump_config
from vidur_simpy.entities import Request
from vidur_simpy.errors import ConfigError, SimulationError
from vidur_simpy.journal import Journal, merged_order, run_and_note
from vidur_simpy.kernel import EventOrder
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.metrics import Timeline, replica_columns, timeline_columns
from vidur_simpy.parallel import as_completed
from vidur_simpy.processes import Replica
from vidur_simpy.progress import progress_bar
from vidur_simpy.request_log import RequestLog
from vidur_simpy.result import Result
from vidur_simpy.streams import streams_of
from vidur_simpy.workload import RequestArrays, RequestSource, requests_of

if TYPE_CHECKING:
    from vidur_simpy.simulation import Simulation

__all__ = ["simulate_in_shards"]


def simulate_in_shards(
    simulation: type[Simulation],
    cluster: Cluster,
    workload: RequestSource,
    shards: int,
    *,
    seed: int = 0,
    event_order: EventOrder = "type",
    until: float | None = None,
    record: Collection[str] = (),
    progress: bool | None = None,
) -> Result:
    """Run a workload in shards; the tables are those of a single run, to the last bit and row.

    The count of events, ``info["num_events"]``, is that of all shards: simultaneous events of
    several replicas are merged or not as they meet.

    Parameters
    ----------
    simulation : type
        :class:`Simulation`, which lies above this module.
    shards : int
        How many; at most one per replica is used.
    cluster, workload, seed, event_order, until, record, progress
        As :func:`simulate` takes them.

    Raises
    ------
    ConfigError
        If the router looks at the state of replicas, so that they are not independent.
    SimulationError
        If a shard cannot go on; its `result` keeps what all of them computed.
    """
    if isinstance(shards, bool) or not (isinstance(shards, (int, np.integer)) and shards >= 1):
        raise ConfigError(f"shards = {shards!r}: expected an integer >= 1.")
    whole = simulation(
        cluster, None, seed=seed, event_order=event_order, record=record, progress=False
    )
    settings = {"seed": seed, "event_order": event_order, "record": record, "progress": False}
    parts = _cut(whole, _requests(whole, workload), shards, settings, until)
    outcomes: list[Any] = [None] * len(parts)
    with progress_bar(len(parts), " shards", progress) as bar:
        for number, outcome in as_completed(_run, parts, usual_jobs=-1):
            outcomes[number] = outcome
            bar.update()
    config = dump_config(
        cluster=cluster,
        workload=workload,
        seed=whole.seed,
        event_order=event_order,
        until=None if until is None else float(until),
        record=list(outcomes[0].logs) or None,
    )
    result = _merged(cluster, outcomes, config, whole.result().info)
    for part, outcome in zip(parts, outcomes, strict=True):
        if outcome.failure:
            first, last = part.own[0], part.own[-1]
            raise SimulationError(f"replicas {first} to {last}: {outcome.failure}", result)
    return result


# Before: who goes where


class _Unseen:
    """What a router sees of a replica beforehand: its number."""

    def __init__(self, replica_id: int, router: object) -> None:
        self.replica_id = replica_id
        self._router = router

    def __getattr__(self, name: str) -> NoReturn:
        raise ConfigError(
            f"shards: the router {self._router!r} looks at {name!r} of replicas, so what happens "
            "on one depends on the others and they cannot be simulated apart. Leave out shards, "
            "or use a router that does not look at replicas, as round_robin and random."
        )


def _requests(whole: Simulation, workload: RequestSource) -> RequestArrays:
    """Return the requests that the single run would get, numbered."""
    if not hasattr(workload, "requests"):
        raise ConfigError(f"workload = {workload!r}: expected a Workload or a Trace.")
    table = requests_of(workload, streams_of(whole.seed), whole.cluster.max_tokens)
    if table.request_id is not None:
        return table
    return dataclasses.replace(table, request_id=np.arange(len(table)))


def _routed(whole: Simulation, requests: RequestArrays) -> NDArray[np.int64]:
    """Return the replica of each request; those to be refused, which no router sees, go to 0."""
    router = whole.router
    unseen = [
        _Unseen(replica.replica_id, whole.cluster.global_scheduler) for replica in whole.replicas
    ]
    replica_ids = np.zeros(len(requests), np.int64)
    for row, request in enumerate(requests.iterate()):
        if router.refusal(request):
            continue
        chosen: Any = router.route(request, unseen)  # type: ignore[arg-type]
        if not isinstance(chosen, _Unseen):
            raise SimulationError(
                f"the router gave {chosen!r} for {request}: expected one of the replicas."
            )
        replica_ids[row] = chosen.replica_id
    return replica_ids


def _cut(
    whole: Simulation,
    requests: RequestArrays,
    shards: int,
    settings: dict[str, Any],
    until: float | None,
) -> list[_Shard]:
    """Give each shard some neighbouring replicas and their requests."""
    replica_ids = _routed(whole, requests)
    made = []
    for ids in np.array_split(np.arange(len(whole.replicas)), shards):
        if len(ids):
            own = range(int(ids[0]), int(ids[-1]) + 1)
            rows = np.flatnonzero((replica_ids >= own.start) & (replica_ids < own.stop))
            made.append(
                _Shard(
                    type(whole),
                    whole.cluster,
                    requests.take(rows),
                    replica_ids[rows],
                    rows,
                    own,
                    settings,
                    until,
                )
            )
    return made


# A shard


@dataclass(frozen=True)
class _Shard:
    """A run of the cluster to which the requests of some replicas arrive.

    Attributes
    ----------
    replica_ids, rows : ndarray of int, shape (n,)
        Of its requests: where each goes, and its place among all requests.
    own : range
        The replicas they go to.
    """

    simulation: type[Simulation]
    cluster: Cluster
    requests: RequestArrays
    replica_ids: NDArray[np.int64]
    rows: NDArray[np.intp]
    own: range
    settings: dict[str, Any]
    until: float | None


@dataclass(frozen=True)
class _Outcome:
    """What a shard leaves: rows and counters that the tables are made from."""

    requests: RequestLog
    replicas: list[SimpleNamespace]
    logs: dict[str, Mapping[str, Sequence[Any]]]
    journal: Journal | None
    now: float
    num_events: int
    failure: str


class _Arriving:
    """The requests of a shard, in place of the workload that they come from."""

    def __init__(self, requests: RequestArrays) -> None:
        self._requests = requests

    def requests(self, *_: Any) -> RequestArrays:
        return self._requests


def _run(shard: _Shard) -> _Outcome:
    ids = shard.requests.request_id
    assert ids is not None, "requests of a shard are numbered"
    replica_of = dict(zip(ids.tolist(), shard.replica_ids.tolist(), strict=True))

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        assert request.request_id is not None
        return replicas[replica_of[request.request_id]]

    route.only_counts_requests = True  # type: ignore[attr-defined]
    simulation = shard.simulation(
        dataclasses.replace(shard.cluster, global_scheduler=route),
        _Arriving(shard.requests),
        **shard.settings,
    )
    journal = Journal(shard.rows.tolist()) if simulation.logs else None
    failure = ""
    try:
        if journal is not None:
            run_and_note(simulation.env, simulation.logs, journal, shard.until)
        simulation.run(shard.until)
    except SimulationError as error:
        failure = str(error)
    return _outcome(shard, simulation, journal, failure)


def _outcome(
    shard: _Shard, simulation: Simulation, journal: Journal | None, failure: str
) -> _Outcome:
    requests = simulation.request_log
    for request in simulation.under_way():
        requests.append(request)
    return _Outcome(
        requests=requests,
        replicas=[_counters(simulation.replicas[replica_id]) for replica_id in shard.own],
        logs={name: log.columns() for name, log in simulation.logs.items()},
        journal=journal,
        now=simulation.env.now,
        num_events=simulation.env.num_events,
        failure=failure,
    )


def _counters(replica: Replica) -> SimpleNamespace:
    """Return what is left of a replica without its processes: all that the tables need."""
    kept = (int, float, BlockPool, Timeline)
    counters: dict[str, Any] = {
        name: value for name, value in vars(replica).items() if isinstance(value, kept)
    }
    now = replica.env.now
    return SimpleNamespace(
        **counters,
        busy_time=sum(stage.busy_time_until(now) for stage in replica.stages),
        scheduler=SimpleNamespace(figures=getattr(replica.scheduler, "figures", {})),
    )


# Afterwards: one table again


def _merged(
    cluster: Cluster, outcomes: Sequence[_Outcome], config: dict[str, Any], info: dict[str, Any]
) -> Result:
    now = max(outcome.now for outcome in outcomes)
    replicas: Any = [replica for outcome in outcomes for replica in outcome.replicas]
    for replica in replicas:
        # As Replica.utilisation, at the end of the last shard.
        busy_time = replica.busy_time
        replica.utilisation = busy_time / (replica.num_stages * now) if now else 0.0
    log = RequestLog()
    log.extend(outcome.requests for outcome in outcomes)
    tables: dict[str, Any] = {
        "requests": log.columns([]),
        "replicas": replica_columns(replicas, cluster.deployment, now),
        "timeline": timeline_columns(replicas),
    }
    orders = merged_order([each.journal for each in outcomes if each.journal is not None])
    for name, order in orders.items():
        logs = [outcome.logs[name] for outcome in outcomes]
        tables[name] = {
            column: _joined([each[column] for each in logs], order) for column in logs[0]
        }
    num_events = sum(outcome.num_events for outcome in outcomes)
    return Result(
        tables,
        config=config,
        info=info | {"simulated_time": now, "num_events": num_events},
    )


def _joined(parts: Sequence[Sequence[Any]], order: NDArray[np.intp]) -> Sequence[Any]:
    """Return the cells of all parts, put in order."""
    if all(isinstance(part, np.ndarray) for part in parts):
        joined: Any = np.concatenate(parts)[order]
        return joined  # type: ignore[no-any-return]
    cells = [cell for part in parts for cell in part]
    return [cells[row] for row in order.tolist()]
