"""A small sweep in a process of its own: for tests that kill it, share its store, lend it workers.

``python -W error sweep_script.py BACKEND TABLE [STORE] [REQUESTS]`` writes the table as a pickle
and prints how many runs were made in that process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import joblib

import vidur_simpy as vs
from vidur_simpy.search import runs

GRID = {
    "cluster.num_replicas": [1, 2, 3],
    "cluster.replica_scheduler": ["vllm", vs.Sarathi(chunk_size=64)],
}
REPLICATIONS = 2
NUM_RUNS = 12


def small_sweep(*, num_requests: int = 30, **options: object) -> vs.Sweep:
    """Twelve runs of a few milliseconds, or of as many requests as one likes."""
    cluster = vs.Cluster(
        max_model_len=4096, kv_cache=vs.KVCache(num_blocks=1000), execution_time=vs.Linear()
    )
    lengths = vs.FixedLengths(num_prefill_tokens=100, num_decode_tokens=10)
    workload = vs.Workload(vs.Poisson(rate=20.0), lengths, num_requests=num_requests)
    return vs.sweep(cluster, workload, GRID, replications=REPLICATIONS, progress=False, **options)


@contextlib.contextmanager
def workers(backend: str):
    """Let joblib use a backend, started for this and ended with it."""
    with contextlib.ExitStack() as stack:
        if backend == "dask":
            from dask.distributed import Client, LocalCluster

            local = LocalCluster(
                n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
            )
            stack.enter_context(local)
            stack.enter_context(Client(local))
        if backend == "ray":
            os.environ["RAY_AUTH_MODE"] = "disabled"
            import ray
            from ray.util.joblib import register_ray

            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            stack.callback(ray.shutdown)
            register_ray()
        num_jobs = {"serial": 1, "dask": None}.get(backend, 2)
        if backend != "serial":
            stack.enter_context(joblib.parallel_config(backend=backend, n_jobs=num_jobs))
        yield


def main(backend: str, table: str, store: str | None = None, num_requests: int = 30) -> None:
    """Make the sweep."""
    num_made = 0
    simulate = runs.simulate

    def counted(*args, **kwargs):
        nonlocal num_made
        num_made += 1
        return simulate(*args, **kwargs)

    runs.simulate = counted
    with workers(backend):
        small_sweep(store=store, num_requests=num_requests).table.to_pickle(table)
    print(num_made)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
    assert Path(sys.argv[2]).exists()
