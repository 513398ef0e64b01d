"""The replicas of a cluster, their router and what observes them, made on a clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidur_simpy.cluster import Cluster
from vidur_simpy.entities import Request
from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.kernel import Environment
from vidur_simpy.metrics import RECORDS, Timeline
from vidur_simpy.processes import Replica, Router

__all__ = ["checked_record", "make_log", "make_replicas", "make_router"]

# Rows of the timeline, shared by the replicas, and the least and the most that each has.
TIMELINE_ROWS = 8_192
MIN_ROWS, MAX_ROWS = 64, 1_024


def make_replicas(
    env: Environment, cluster: Cluster, on_completed: Callable[[Request], None]
) -> list[Replica]:
    """Make the replicas; each tells `on_completed` the requests that are complete."""
    stage_time = cluster.stage_time()
    capacity = min(MAX_ROWS, max(MIN_ROWS, TIMELINE_ROWS // cluster.num_replicas))
    replicas = []
    for replica_id in range(cluster.num_replicas):
        pool = cluster.make_pool()
        replicas.append(
            Replica(
                env,
                replica_id,
                cluster.make_scheduler(pool, stage_time),
                pool,
                stage_time,
                cluster.pipeline_parallel_size,
                on_completed,
                Timeline(capacity),
            )
        )
    return replicas


def make_router(
    env: Environment,
    cluster: Cluster,
    replicas: Sequence[Replica],
    rng: np.random.Generator,
    on_refused: Callable[[Request], None],
) -> Router:
    """Make the router; it tells `on_refused` the requests that no replica can ever run."""
    policy = cluster.global_scheduler
    route = policy.router(rng) if hasattr(policy, "router") else policy
    scheduler = replicas[0].scheduler
    longest = cluster.max_tokens
    truncates = getattr(scheduler, "truncates_outputs", False)

    def refusal(request: Request) -> str:
        if request.num_tokens > longest and not truncates:
            return (
                f"its {request.num_prefill_tokens} + {request.num_decode_tokens} tokens are more "
                f"than max_model_len = {longest}"
            )
        return scheduler.refusal(request)

    return Router(env, replicas, route, refusal, on_refused)


def checked_record(record: Collection[str]) -> list[str]:
    """Return the names of the tables to record, in their usual order.

    Raises
    ------
    ConfigError
        If one is unknown.
    """
    if not isinstance(record, Collection):
        raise ConfigError(f"record = {record!r}: expected some of {', '.join(RECORDS)}.")
    names = [record] if isinstance(record, str) else list(record)
    for name in names:
        if name not in RECORDS:
            raise unknown_name("record", name, RECORDS)
    return [name for name in RECORDS if name in names]


def make_log(
    name: str,
    env: Environment,
    cluster: Cluster,
    users_of: Callable[[int, int], Sequence[Any]],
    directory: Path | None,
) -> Any:
    """Make the observer that keeps a table, in `directory` if there is one.

    ``users_of(replica_id, stage_id)`` tells who has a stage.
    """
    kind = RECORDS[name]
    if name == "operators":
        return kind(env, cluster.stage_time())
    if name == "phases":
        return kind(env, cluster.stage_time(), users_of, directory)
    return kind(env, directory)
