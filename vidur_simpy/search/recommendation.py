"""Which configuration to take: the cheapest, fastest or thriftiest that meets an SLO."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.hardware import Device
from vidur_simpy.search.candidates import Candidates
from vidur_simpy.search.fronts import pareto
from vidur_simpy.search.grid import Grid, Point, points_of
from vidur_simpy.search.narrowing import NUM_FINALISTS, least_share, proposed, successive_halving
from vidur_simpy.search.run_tables import cell
from vidur_simpy.search.runs import Run, replication_seeds, warn_of_nameless
from vidur_simpy.search.scaling import has_rate, is_random
from vidur_simpy.search.search_plots import plot_front
from vidur_simpy.search.slo import Slo, read_slo
from vidur_simpy.search.store import open_store
from vidur_simpy.search.trials import check_effort, notes_of_length
from vidur_simpy.statistics.intervals import Interval
from vidur_simpy.summary import LATENCIES, QUANTILES, digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.cluster import Cluster
    from vidur_simpy.workload import Trace, Workload

__all__ = ["Recommendation", "recommend"]

Method = Literal["auto", "grid", "halving", "optuna"]
METHODS = ("auto", "grid", "halving", "optuna")

# Columns of the table by which an objective may be called.
OBJECTIVES = {
    "cost": "cost_per_hour",
    "energy": "kwh_per_million_tokens",
    "throughput": "output_token_throughput",
}
# Grids with more points are halved, and with even more are left to Optuna.
MAX_GRID = 64
MAX_HALVED = 1024
SCALARS = (
    "makespan",
    "request_throughput",
    "output_token_throughput",
    "total_token_throughput",
    "utilisation",
    "mfu",
    "num_devices",
)


@dataclass(frozen=True, eq=False, repr=False)
class Recommendation:
    """The best configuration that meets an SLO, and all that were looked at.

    Attributes
    ----------
    best : int or None
        Row of `table`; None if no configuration may meet the SLO.
    table : DataFrame
        A row per configuration of the grid, in its order: a column for each setting;
        ``num_devices``; ``verdict``, ``meets`` or ``misses`` the SLO or ``cannot tell``, empty
        where it was not run in full; ``num_runs``; the limits of the SLO as in `Capacity.curve`;
        means over the runs of the figures of :func:`vidur_simpy.search.figures_of`;
        ``cost_per_hour`` and ``cost_per_million_tokens`` in the currency of the price (of prompt
        and output tokens together), ``kwh_per_million_tokens`` where the power of the
        device is known; ``error``, empty where there is none.
    points : list of Point
        The configurations, each with its `cluster` and `workload`.
    objective : str
        Column that is best.
    lead : Interval or None
        By how much the runner-up is worse, over the same seeds; None if there is none.
    runner_up : int or None
    slo : Slo
    notes : tuple of str
        What limits the answer.
    num_runs : int
        Simulations that the answer rests on.
    num_reused : int
        How many of them were taken from the store; the others were made.
    """

    best: int | None
    table: pd.DataFrame
    points: list[Point]
    objective: str
    lead: Interval | None
    runner_up: int | None
    slo: Slo
    notes: tuple[str, ...]
    num_runs: int
    num_reused: int = 0

    @property
    def cluster(self) -> Cluster:
        """The best cluster.

        Raises
        ------
        VidurError
            If no configuration may meet the SLO.
        """
        if self.best is None:
            raise VidurError(f"no configuration: {'; '.join(self.notes)}.")
        return self.points[self.best].cluster

    @property
    def settings(self) -> dict[str, Any]:
        """What the grid sets in the best configuration."""
        return {} if self.best is None else dict(self.points[self.best].settings)

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        reused = f" ({self.num_reused} reused)" if self.num_reused else ""
        runs = f"{self.num_runs} runs{reused} of {len(self.table)} configurations"
        if self.best is None:
            return f"<Recommendation under {self.slo!r}: none; {runs}{notes}>"
        value = digits(float(self.table[self.objective].iloc[self.best]))
        settings = ", ".join(f"{name}={cell(value)}" for name, value in self.settings.items())
        return (
            f"<Recommendation under {self.slo!r}: {settings or 'as given'}, {self.objective} "
            f"{value}; {runs}{notes}>"
        )

    def pareto(self, x: str, y: str, *, maximise: Sequence[str] = ()) -> pd.DataFrame:
        """Return the configurations that meet the SLO and that none of them beats.

        Parameters
        ----------
        x, y, maximise
            As :func:`vidur_simpy.pareto` takes them.
        """
        return pareto(self.table[self.table["verdict"] == "meets"], x, y, maximise=maximise)

    def plot(
        self, x: str | None = None, y: str = "ttft_p99", ax: Axes | None = None, **options: Any
    ) -> Axes:
        """Draw the configurations that were run in full, and the front of those that meet the SLO.

        Parameters
        ----------
        x, y : str
            Columns of `table`; x is the objective if None.
        ax : Axes, optional
        **options
            As :func:`vidur_simpy.search.search_plots.plot_front` takes them.
        """
        shown = self.table[self.table["verdict"] != ""]
        meets = (shown["verdict"] == "meets").to_list()
        options = {"by": "verdict", "eligible": meets} | options
        return plot_front(shown, x or self.objective, y, ax, **options)


def recommend(
    cluster: Cluster,
    workload: Workload | Trace,
    slo: Slo | Mapping[str, float] | Sequence[str],
    grid: Grid,
    *,
    objective: str = "cost",
    price_per_gpu_hour: float | Mapping[str, float] | None = None,
    where: Callable[[Cluster], bool] | None = None,
    method: Method = "auto",
    max_tried: int = 256,
    confidence: float = 0.95,
    max_replications: int = 8,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
) -> Recommendation:
    """Find the configuration that serves a workload best while it meets an SLO.

    All configurations get the same requests. Each runs with more and more seeds until its
    confidence intervals say whether it meets the SLO; then the best of those that surely do, and
    the runner-up, run with all seeds, so that their difference is told with its interval.

    Parameters
    ----------
    cluster, workload
        What the settings of the grid are applied to.
    slo : Slo, mapping or sequence of str
        As `Slo`, ``{"ttft:p99": 2.0}`` or ``["ttft:p99=2"]``.
    grid : mapping of str to iterable, or iterable of mappings
        As :func:`vidur_simpy.sweep` takes it.
    objective : str
        ``"cost"``, the price of an hour, which is what traffic that goes on for ever costs;
        ``"cost_per_million_tokens"``, for a job that ends, since the time until the last request
        is done counts; ``"energy"``, ``"throughput"``, a latency such as ``"ttft:p99"``, or
        another column of the table. Less is better, but more throughput, utilisation, MFU or MBU.
        Of equally good ones the one that stays furthest from its limits is best.
    price_per_gpu_hour : float or mapping of str to float, optional
        One price, or one for each device of the grid by its name, in any currency.
    where : callable, optional
        ``where(cluster)`` says which configurations count, as in ``lambda cluster:
        cluster.num_devices <= 16``; the others are left out.
    method : {"auto", "grid", "halving", "optuna"}
        ``grid`` runs all in full; ``halving`` runs all with few requests and ever fewer with more
        of them; ``optuna`` does so with those that Optuna proposes, as it learns where the good
        ones are. ``auto`` takes the first up to 64 points, the second up to 1,024, then the third.
    max_tried : int
        Configurations that ``optuna`` tries at most.
    confidence, max_replications, seed, store, jobs
        As :func:`vidur_simpy.capacity` takes them.

    Returns
    -------
    Recommendation

    Raises
    ------
    ConfigError
        If the grid is empty or names what does not exist, or another argument is unusable; if not
        one point makes a cluster.
    VidurError
        If the store cannot be used, or a worker process died.

    Notes
    -----
    Measured by ``tests/benchmarks/large_grids.py``, with ten seeds each. On five grids of 140 to
    216 configurations, halving found the best of all five, with 17 % of the effort of running all
    in full; halving 64 that Optuna proposes found it 49 times of 50, with 11 %; Optuna's own pruner
    by successive halving 48 times, with 18 %; its sampler with full runs 48 times, with 20 %. On
    one of 3,840, halving took 14 %, and 256 proposals took 1.4 % and found one as good each time.

    Examples
    --------
    >>> import vidur_simpy as vs
    >>> workload = vs.Workload(vs.Poisson(20.0), vs.FixedLengths(512, 16), num_requests=400)
    >>> advice = recommend(
    ...     vs.Cluster(execution_time=vs.Linear(base=0.02)),
    ...     workload,
    ...     {"ttft:p90": 0.08},
    ...     {"cluster.num_replicas": [1, 2, 4]},
    ...     price_per_gpu_hour=3.0,
    ... )
    >>> advice.table[["cluster.num_replicas", "verdict", "cost_per_hour"]]
       cluster.num_replicas verdict  cost_per_hour
    0                     1  misses            3.0
    1                     2   meets            6.0
    2                     4   meets           12.0
    >>> advice.cluster.num_replicas
    2
    """
    limits = read_slo(slo)
    column = _column_of(objective)
    check_effort("recommend", confidence, max_replications)
    points = _where(points_of(cluster, workload, grid), where)
    prices = [_price(point, price_per_gpu_hour) for point in points]
    if column.startswith("cost_") and price_per_gpu_hour is None:
        raise ConfigError(
            f"recommend(): the objective {objective!r} needs price_per_gpu_hour, which was not "
            "given."
        )
    if method not in METHODS:
        raise unknown_name("method of recommend()", method, METHODS)
    if isinstance(max_tried, bool) or not (isinstance(max_tried, int) and max_tried >= 1):
        raise ConfigError(f"recommend(): max_tried = {max_tried!r}: expected an integer >= 1.")
    kept_in = None if store is None else open_store(store)
    if kept_in is not None:
        possible = [point for point in points if point.error is None]
        warn_of_nameless([Run(each.cluster, each.workload) for each in possible], "configurations")
    candidates = Candidates(
        points,
        prices,
        limits,
        column,
        seeds=replication_seeds(seed, max_replications if is_random(workload) else 1),
        confidence=confidence,
        jobs=jobs,
        store=kept_in,
    )
    for batch in _batches(candidates, method, max_tried, seed):
        candidates.run(batch)
        if candidates.with_verdict("meets"):
            break
    candidates.compare()
    best, runner_up, lead = candidates.decision()
    return Recommendation(
        best,
        candidates.table(),
        points,
        column,
        lead,
        runner_up,
        limits,
        _notes(candidates, best, runner_up, lead),
        candidates.num_runs,
        candidates.num_reused,
    )


def _where(points: list[Point], where: Callable[[Cluster], bool] | None) -> list[Point]:
    if where is None:
        return points
    if not callable(where):
        raise ConfigError(f"recommend(): where = {where!r}: expected a function of a cluster.")
    kept = [point for point in points if point.error is not None or where(point.cluster)]
    if all(point.error is not None for point in kept):
        raise ConfigError(
            f"recommend(): none of the {len(points)} configurations is one that where() accepts."
        )
    return kept


def _batches(
    candidates: Candidates, method: Method, max_tried: int, seed: int
) -> Iterator[list[int]]:
    """Yield batches of points to run in full, the most promising first."""
    count = len(candidates.points)
    if method == "auto":
        method = "grid" if count <= MAX_GRID else "halving" if count <= MAX_HALVED else "optuna"
    if method == "grid":
        yield list(range(count))
        return
    share = least_share(candidates.num_requests)
    if method == "halving":
        order = successive_halving(range(count), candidates.ranks, share=share)
    else:
        settings = [point.settings for point in candidates.points]
        order = proposed(settings, candidates.ranks, share=share, num_tried=max_tried, seed=seed)
    for start in range(0, len(order), NUM_FINALISTS):
        yield order[start : start + NUM_FINALISTS]


def _notes(
    candidates: Candidates, best: int | None, runner_up: int | None, lead: Interval | None
) -> tuple[str, ...]:
    """Return how sure the answer is."""
    num_possible = len(candidates.points) - len(candidates.errors)
    notes = []
    if len(candidates.trials) < num_possible:
        notes.append(
            f"{len(candidates.tried):,} of {num_possible:,} configurations were tried, "
            f"{len(candidates.trials):,} in full"
        )
    if best is None:
        return (candidates.closest(), *notes)
    if candidates.trials[best].verdict != "meets":
        notes.append("whether it meets the SLO cannot be told: use more requests or replications")
    if lead is None or runner_up is None:
        notes.append("no other configuration meets the SLO")
    elif lead.low == lead.high == 0:
        notes.append(f"as good as row {runner_up}, but further from its limits")
    elif lead.low > 0:
        upto = f" to {lead.high:.3g}" if lead.high > lead.low else ""
        notes.append(f"surely better than row {runner_up}, by {lead.low:.3g}{upto}")
    else:
        notes.append(f"cannot be told from row {runner_up}: use more requests or replications")
    unclear = [index for index in candidates.with_verdict("cannot tell") if index != best]
    better = [index for index in unclear if candidates.value(index) < candidates.value(best)]
    if better and candidates.trials[best].verdict == "meets":
        first = min(better, key=candidates.value)
        notes.append(f"row {first} would be better, if it met the SLO, which cannot be told")
    trial = candidates.trials[best]
    if has_rate(candidates.points[best].workload):
        notes += notes_of_length(trial)
    notes += [note for each in trial.assessments for note in each.ratio.notes]
    return tuple(dict.fromkeys(notes))


def _column_of(objective: str) -> str:
    """Return the column that an objective names."""
    latencies = [f"{name}_{mark}" for name in (*LATENCIES, "itl") for mark in ("mean", *QUANTILES)]
    column = OBJECTIVES.get(objective, str(objective).replace(":", "_"))
    known = [*OBJECTIVES, *OBJECTIVES.values(), "cost_per_million_tokens", *latencies, *SCALARS]
    if column not in known:
        raise unknown_name("objective", objective, known)
    return column


def _price(point: Point, given: float | Mapping[str, float] | None) -> float:
    """Return the price of an hour of a device, NaN if none was given."""
    device = point.cluster.deployment.device
    price = given
    if isinstance(given, Mapping):
        prices = {Device.from_name(str(name)).name: price for name, price in given.items()}
        if device.name not in prices:
            raise ConfigError(
                f"price_per_gpu_hour has {', '.join(prices) or 'nothing'}, but no {device.name}."
            )
        price = prices[device.name]
    if price is None:
        return math.nan
    if isinstance(price, bool) or not (isinstance(price, int | float) and 0 <= price < math.inf):
        raise ConfigError(f"price_per_gpu_hour = {given!r}: expected numbers >= 0.")
    return float(price)
