"""Runs in which everything happens, and what it means that two of them are equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pandas.testing import assert_frame_equal

import vidur_simpy as vs

RECORDS = ("batches", "stages", "events", "tokens")
TABLES = ("requests", *RECORDS, "replicas", "timeline")
WORKLOAD = vs.Workload(vs.Poisson(rate=2.0), vs.UniformLengths(20, 400, 8.0), num_requests=60)


def busy_cluster(**changes: Any) -> vs.Cluster:
    """A cluster so short of memory that requests are preempted."""
    settings = {
        "num_replicas": 2,
        "max_model_len": 512,
        "kv_cache": vs.KVCache(num_blocks=60),
        "replica_scheduler": vs.Sarathi(max_num_seqs=16, chunk_size=64),
        "execution_time": vs.Linear(base=0.1),
    }
    return vs.Cluster(**(settings | changes))


def assert_equal_tables(ours: vs.Result, theirs: vs.Result, names: Sequence[str] = TABLES) -> None:
    """Rows, order, types and bits."""
    for name in names:
        assert_frame_equal(getattr(ours, name), getattr(theirs, name), check_exact=True)
