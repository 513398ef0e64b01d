"""Many configurations, each run once or several times, as one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import TYPE_CHECKING, Any

from vidur_simpy.cluster import Cluster
from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.kernel import EventOrder
from vidur_simpy.search.grid import Grid, Point, check_inputs, points_of
from vidur_simpy.search.run_tables import cell, settings_of
from vidur_simpy.search.runs import (
    Outcome,
    Run,
    replication_seeds,
    run_all,
    warn_of_nameless,
)
from vidur_simpy.search.store import open_store
from vidur_simpy.simulation import Simulation
from vidur_simpy.summary import digits
from vidur_simpy.workload import Trace, Workload

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["Sweep", "sweep"]

LIMITS = ("ttft", "tpot", "e2e", "itl")

# Figures that are printed; the table has them all.
USUAL = (
    "ttft_p50",
    "ttft_p99",
    "tpot_p50",
    "tpot_p99",
    "slo_attainment",
    "request_throughput",
    "output_token_throughput",
    "utilisation",
)
# Those that are printed if they are not 0 everywhere.
UNUSUAL = ("refused", "unfinished")


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What a sweep leaves behind.

    Attributes
    ----------
    table : DataFrame
        A row per run, in order of point and replication: ``point`` (index into `points`); a column
        for each setting of the grid, by its dotted name; ``replication`` and ``seed``; the figures
        of :func:`vidur_simpy.search.figures_of` as float64, NaN where a run failed; and
        ``error``, empty where it did not.
    points : list of Point
        The configurations, each with its `cluster` and `workload`.
    runs : list of Run
        What each row was made from.
    num_reused : int
        Rows that were taken from the store.
    """

    table: pd.DataFrame
    points: list[Point]
    runs: list[Run]
    num_reused: int = 0

    def __repr__(self) -> str:
        num_failed = int((self.table["error"] != "").sum())
        reused = f", {self.num_reused} reused" if self.num_reused else ""
        return (
            f"<Sweep: {len(self.table)} runs of {len(self.points)} configurations, "
            f"{num_failed} failed{reused}>"
        )

    def __str__(self) -> str:
        """Return settings and the usual figures as plain text, as the command line prints them."""
        settings = settings_of(self.table)
        several = ["replication"] if self.table["replication"].any() else []
        usual = [name for name in USUAL if name in self.table]
        usual += [name for name in UNUSUAL if name in self.table and self.table[name].any()]
        failed = ["error"] if (self.table["error"] != "").any() else []
        shown = self.table[[*settings, *several, *usual, *failed]]
        return str(shown.to_string(index=False, float_format=digits, na_rep="-"))

    def __len__(self) -> int:
        return len(self.table)

    def _repr_html_(self) -> str:
        """Return the table as html."""
        return str(self.table.to_html(max_rows=20, max_cols=20, na_rep="-", notebook=True))

    def result(self, row: int) -> Result:
        """Make the run of a row again, and return the whole result.

        Raises
        ------
        ConfigError
            If there is no such row.
        VidurError
            If the run failed: why.
        """
        if not 0 <= row < len(self.runs):
            raise ConfigError(f"result({row!r}): expected a row from 0 to {len(self.runs) - 1}.")
        error = self.points[int(self.table["point"].iloc[row])].error
        if error is not None:
            raise error
        return self.runs[row].simulate()


def sweep(
    cluster: Cluster,
    workload: Workload | Trace,
    grid: Grid,
    *,
    replications: int = 1,
    seed: int = 0,
    event_order: EventOrder = "type",
    until: float | None = None,
    record: Collection[str] = (),
    slo: Mapping[str, float] | None = None,
    metrics: Callable[[Result], Mapping[str, float]] | None = None,
    store: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Run a workload on a cluster with every combination of some settings.

    All configurations get the same arrivals and lengths (common random numbers), so that they
    differ by their settings only; replications differ in every random number. The table is the
    same, bit for bit, however many workers there are and wherever they are::

        with joblib.parallel_config(backend="loky", n_jobs=2):  # or "dask", or "ray"
            vs.sweep(cluster, workload, {"cluster.num_replicas": [1, 2, 4]})

    Dask takes a ``distributed.Client`` before that, and Ray ``ray.util.joblib.register_ray()``. A
    run that fails is a row with its error. One ctrl-C ends the sweep.

    Parameters
    ----------
    cluster, workload
        What the settings are applied to.
    grid : mapping of str to iterable, or iterable of mappings
        Values by dotted name, ``{"cluster.num_replicas": [1, 2], "workload.arrivals.rate": [4.0,
        8.0]}``, of which all combinations run, the last name varying fastest. A list of mappings
        with one value per name runs just those. A value is an object, ``Sarathi(chunk_size=256)``,
        or what a configuration file would say, ``"vllm"`` or ``{"type": "sarathi", "chunk_size":
        256}``; ``"cluster"`` and ``"workload"`` themselves are names, too.
    replications : int
        How often each configuration runs, with the seeds of
        :func:`vidur_simpy.search.replication_seeds`.
    seed : int
        Seed of the first replication.
    event_order, until, record
        As :func:`simulate` takes them; ``record=("tokens",)`` adds inter-token latencies.
    slo : mapping of str to float, optional
        Limits in seconds as :meth:`vidur_simpy.Result.slo` takes them, such as
        ``{"ttft": 0.5, "tpot": 0.05}``; adds ``slo_ttft``, ..., ``slo_attainment`` and ``goodput``.
    metrics : callable, optional
        ``metrics(result)`` gives further columns, a mapping of names to numbers.
    store : path, optional
        Directory where each finished run is kept as soon as it is done, under a hash of its
        configuration and of this package; a sweep that was killed goes on where it was, and
        several processes may share it. It takes some 50 bytes per request, which are what lets
        :func:`vidur_simpy.capacity` and :func:`vidur_simpy.recommend` take the same runs from
        it. Runs with objects that a configuration file cannot name (a lambda, `metrics`) are made,
        but not stored, and a warning says so.
    jobs : int, optional
        Workers, -1 for one per core; None leaves it to ``joblib.parallel_config``, without which
        the runs are made here, one by one.
    progress : bool or None
        Show a progress bar; None shows one on a terminal or in a notebook after two seconds.

    Raises
    ------
    ConfigError
        If the grid is empty, names a field that does not exist, or another argument is unusable.
    VidurError
        If the store cannot be used, or a worker process died.

    Examples
    --------
    >>> from vidur_simpy import Constant, FixedLengths
    >>> workload = Workload(Constant(rate=2.0), FixedLengths(512, 16), num_requests=20)
    >>> grid = {"cluster.num_replicas": [1, 2], "cluster.replica_scheduler.chunk_size": [256, 512]}
    >>> runs = sweep(Cluster(), workload, grid)
    >>> runs
    <Sweep: 4 runs of 4 configurations, 0 failed>
    >>> runs.table["cluster.num_replicas"].to_list()
    [1, 1, 2, 2]
    """
    check_inputs(cluster, workload)
    _check(cluster, seed, event_order, until, record, slo)
    points = points_of(cluster, workload, grid)
    seeds = replication_seeds(seed, replications)
    run = Run(
        cluster,
        workload,
        event_order=event_order,
        until=until,
        record=(record,) if isinstance(record, str) else tuple(record),
        slo=dict(slo or {}),
        metrics=metrics,
    )
    runs = [
        replace(run, cluster=point.cluster, workload=point.workload, seed=each)
        for point in points
        for each in seeds
    ]
    errors = [point.error for point in points for _ in seeds]
    possible = [run for run, error in zip(runs, errors, strict=True) if error is None]
    kept_in = None if store is None else open_store(store)
    if kept_in is not None:
        warn_of_nameless(possible)
    done = iter(run_all(possible, store=kept_in, jobs=jobs, progress=progress))
    outcomes = [next(done) if error is None else _failed(error) for error in errors]
    num_reused = sum(outcome.is_reused for outcome in outcomes)
    return Sweep(_table(points, seeds, outcomes), points, runs, num_reused)


def _check(
    cluster: Cluster,
    seed: int,
    event_order: EventOrder,
    until: float | None,
    record: Collection[str],
    slo: Mapping[str, float] | None,
) -> None:
    """Refuse what would make every run fail."""
    Simulation(cluster, None, seed=seed, event_order=event_order, record=record)
    if until is not None and not (isinstance(until, Real) and 0 < until < inf):
        raise ConfigError(f"until = {until!r}: expected an instant in seconds, after 0.")
    for name, limit in (slo or {}).items():
        if name not in LIMITS:
            raise unknown_name("limit of slo", name, LIMITS)
        if isinstance(limit, bool) or not (isinstance(limit, Real) and limit > 0):
            raise ConfigError(f"slo {name} = {limit!r}: expected a positive number of seconds.")
    if slo and "itl" in slo and "tokens" not in record:
        raise ConfigError('slo itl needs record=("tokens",).')


def _failed(error: Exception) -> Outcome:
    return Outcome({}, f"{type(error).__name__}: {error}")


def _table(points: list[Point], seeds: list[int], outcomes: list[Outcome]) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    settings = list(dict.fromkeys(name for point in points for name in point.settings))
    columns: dict[str, Any] = {"point": np.repeat(np.arange(len(points)), len(seeds))}
    for name in settings:
        cells = [cell(point.setting(name)) for point in points for _ in seeds]
        columns[name] = pd.Series(cells, dtype=object).infer_objects()
    columns["replication"] = np.tile(np.arange(len(seeds)), len(points))
    columns["seed"] = np.tile(np.array(seeds, np.int64), len(points))
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    for name in names:
        columns[name] = np.array([outcome.figures.get(name, np.nan) for outcome in outcomes])
    columns["error"] = pd.Series([outcome.error for outcome in outcomes], dtype=str)
    return pd.DataFrame(columns)
