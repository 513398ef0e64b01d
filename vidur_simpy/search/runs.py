"""Many runs and their figures: made wherever joblib says, each once, and kept in a store."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vidur_simpy.cluster import Cluster
from vidur_simpy.config import dump_config
from vidur_simpy.errors import ConfigError
from vidur_simpy.kernel import EventOrder
from vidur_simpy.parallel import as_completed
from vidur_simpy.progress import progress_bar
from vidur_simpy.search.observations import Values, values_of
from vidur_simpy.search.store import DamagedEntryError, Entry, Store, key_of, unstorable
from vidur_simpy.simulation import simulate
from vidur_simpy.workload import Trace, Workload

if TYPE_CHECKING:
    from vidur_simpy.result import Result

__all__ = [
    "Outcome",
    "Run",
    "completed",
    "figures_of",
    "outcomes_of",
    "replication_seeds",
    "run_all",
    "warn_of_nameless",
]

Task = TypeVar("Task")
Value = TypeVar("Value")

# How many words of a list a message shows.
SHOWN = 3

# Numbers that a sweep keeps of a run for an SLO, at most: some 5 MB. A larger run is made again.
MAX_KEPT = 500_000

# Far from the streams of one run, which are numbered from 0.
REPLICATION_STREAM = 2**31


@dataclass(frozen=True)
class Run:
    """What is to be simulated, and what of it is to be told.

    Attributes
    ----------
    cluster, workload, seed, event_order, until, record
        As :func:`vidur_simpy.simulate` takes them.
    slo : mapping of str to float
        Limits in seconds, as :meth:`vidur_simpy.Result.slo` takes them; empty for none.
    metrics : callable or None
        Further figures: ``metrics(result)`` is a mapping of names to numbers.
    """

    cluster: Cluster
    workload: Workload | Trace
    seed: int = 0
    event_order: EventOrder = "type"
    until: float | None = None
    record: tuple[str, ...] = ()
    slo: Mapping[str, float] = field(default_factory=dict)
    metrics: Callable[[Result], Mapping[str, float]] | None = None

    def described(self) -> dict[str, Any]:
        """Return plain data that says all that decides the figures."""
        return {
            **dump_config(
                cluster=self.cluster,
                workload=self.workload,
                seed=self.seed,
                event_order=self.event_order,
                until=self.until,
                record=sorted(self.record),
                metrics=self.metrics,
            ),
            "slo": {name: float(limit) for name, limit in sorted(self.slo.items())},
        }

    def simulate(self) -> Result:
        """Return the whole result."""
        return simulate(
            self.cluster,
            self.workload,
            seed=self.seed,
            event_order=self.event_order,
            until=self.until,
            record=self.record,
            progress=False,
        )


@dataclass(frozen=True)
class Outcome:
    """What came out of a run: its figures, or why there are none.

    Attributes
    ----------
    figures : dict of str to float
        See :func:`figures_of`; empty if it failed.
    error : str
        Kind and message of the exception; empty if it went well.
    values : mapping of str to float or ndarray
        See `vidur_simpy.search.observations.values_of`; empty if nobody needs them.
    is_reused : bool
        Whether it was taken from a store.
    is_kept : bool
        Whether whoever made it has seen to the store.
    """

    figures: dict[str, float]
    error: str = ""
    values: Values = field(default_factory=dict, compare=False, repr=False)
    is_reused: bool = field(default=False, compare=False)
    is_kept: bool = field(default=False, compare=False, repr=False)


def run_all(
    runs: Sequence[Run],
    *,
    store: Store | None = None,
    jobs: int | None = None,
    progress: bool | None = False,
) -> list[Outcome]:
    """Make runs, and return what came out of each, in their order.

    The outcome is the same, bit for bit, wherever and in whatever order the runs are made. With a
    store, those that are there are taken from it and the others kept as they finish; those that
    fail are not kept, since what they lacked (memory, a file) may be there the next time.

    Parameters
    ----------
    store : Store, optional
        Where finished runs are kept.
    jobs : int, optional
        Workers, see `vidur_simpy.parallel.as_completed`.
    progress : bool or None
        Show a progress bar; None shows one on a terminal or in a notebook after two seconds.

    Raises
    ------
    VidurError
        If a worker process died.
    """
    outcomes: dict[int, Outcome] = {}
    for number, outcome in outcomes_of(runs, store=store, jobs=jobs, progress=progress):
        outcomes[number] = replace(outcome, values={})
    return [outcomes[number] for number in range(len(runs))]


def outcomes_of(
    runs: Sequence[Run],
    *,
    store: Store | None = None,
    jobs: int | None = None,
    progress: bool | None = False,
    needs_values: bool = False,
) -> Iterator[tuple[int, Outcome]]:
    """Make runs as :func:`run_all` does; yield the number and the outcome of each as it is done.

    Parameters
    ----------
    needs_values : bool
        Whether the outcomes have to have their values; a stored run without them is made again.
    """
    pending = dict(enumerate(_jobs(runs, store, needs_values)))
    with progress_bar(len(runs), " runs", progress) as bar:
        for number, job in list(pending.items()):
            entry = _stored(job)
            if entry is not None:
                del pending[number]
                bar.update()
                yield number, _reused(entry)
        # Runs that somebody else is computing come last; by then most of them are stored.
        for function in (_run_if_free, _run_or_wait):
            numbers = list(pending)
            for position, outcome in completed(function, list(pending.values()), jobs):
                if outcome is not None:
                    job = pending.pop(numbers[position])
                    if not outcome.is_kept:
                        job.keep(outcome)
                    bar.update()
                    yield numbers[position], outcome


def completed(
    function: Callable[[Task], Value], tasks: Sequence[Task], jobs: int | None = None
) -> Iterator[tuple[int, Value]]:
    """Call a function with each task; yield the number of the task and what came out of it.

    As `vidur_simpy.parallel.as_completed`, but where nobody asks for workers joblib is not
    needed.
    """
    if jobs == 1 or (jobs is None and not find_spec("joblib")):
        return ((number, function(task)) for number, task in enumerate(tasks))
    return as_completed(function, tasks, jobs)


@dataclass(frozen=True)
class _Job:
    """A run, and where what comes out of it is kept, if anywhere."""

    run: Run
    store: Store | None = None
    key: str = ""
    needs_values: bool = False

    def entry(self) -> Entry | None:
        """Return what is stored, None if nothing is, or not enough.

        Raises
        ------
        DamagedEntryError
            If it is damaged.
        """
        entry = self.store.entry(self.key) if self.store is not None else None
        is_enough = entry is not None and (bool(entry.values) or not self.needs_values)
        return entry if is_enough else None

    def found(self) -> Entry | None:
        """Return what is stored, None if nothing is, or not enough, or it is damaged."""
        try:
            return self.entry()
        except DamagedEntryError:
            return None

    def keep(self, outcome: Outcome) -> None:
        """Store what came out, if that is something and not stored yet."""
        if self.store is not None and not outcome.error and self.found() is None:
            described = self.run.described()
            self.store.save(self.key, described, outcome.figures, outcome.values)

    def outcome(self) -> Outcome:
        """Make the run."""
        try:
            result = self.run.simulate()
            figures = figures_of(result, self.run.slo, self.run.metrics)
            return Outcome(figures, values=self._values_of(result))
        except Exception as error:  # whatever it is, the other runs go on and the row tells it
            return Outcome({}, f"{type(error).__name__}: {error}")

    def _values_of(self, result: Result) -> Values:
        if not self.needs_values and self.store is None:
            return {}
        values = values_of(result)
        is_large = sum(map(np.size, values.values())) > MAX_KEPT
        return {} if is_large and not self.needs_values else values


def _reused(entry: Entry) -> Outcome:
    return Outcome(entry.figures, values=entry.values, is_reused=True, is_kept=True)


def _stored(job: _Job) -> Entry | None:
    """Return what is stored, and warn about what is damaged."""
    try:
        return job.entry()
    except DamagedEntryError as error:
        warnings.warn(f"{error} The run is made again.", stacklevel=5)
        return None


def _jobs(runs: Sequence[Run], store: Store | None, needs_values: bool) -> list[_Job]:
    if store is None:
        return [_Job(run, needs_values=needs_values) for run in runs]
    jobs = []
    for run in runs:
        described = run.described()
        is_nameless = bool(unstorable(described))
        place = None if is_nameless else store
        jobs.append(_Job(run, place, "" if is_nameless else key_of(described), needs_values))
    return jobs


def warn_of_nameless(runs: Sequence[Run], what: str = "runs") -> None:
    """Warn of runs that a store cannot keep, since no name stands for some of their objects."""
    nameless = [unstorable(run.described()) for run in runs]
    names = list(dict.fromkeys(name for objects in nameless for name in objects))
    if names:
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        warnings.warn(
            f"{sum(map(bool, nameless))} of {len(runs)} {what} are made, but not stored: the store "
            f"tells runs by what a configuration file can say, which {shown} is not.",
            stacklevel=3,
        )


def _run_if_free(job: _Job) -> Outcome | None:
    """Make a run, unless somebody else is doing so."""
    return _run_claimed(job, wait=False)


def _run_or_wait(job: _Job) -> Outcome | None:
    """Make a run; if somebody else is doing so, wait for it."""
    return _run_claimed(job, wait=True)


def _run_claimed(job: _Job, *, wait: bool) -> Outcome | None:
    if job.store is None or not job.store.is_here:
        return job.outcome()
    with job.store.claim(job.key, wait=wait) as is_mine:
        if not is_mine:
            return None
        entry = job.found()
        if entry is not None:
            return _reused(entry)
        outcome = job.outcome()
        job.keep(outcome)
        values = outcome.values if job.needs_values else {}
        return replace(outcome, values=values, is_kept=True)


def figures_of(
    result: Result,
    slo: Mapping[str, float] | None = None,
    metrics: Callable[[Result], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Return the figures of a run as one flat row.

    Returns
    -------
    dict of str to float
        ``ttft_mean``, ``ttft_p99`` and so on, from :meth:`vidur_simpy.Result.summary`; the scalars
        of :attr:`vidur_simpy.Result.figures`; ``simulated_time`` in seconds; with `slo`,
        ``slo_ttft`` and so on, ``slo_attainment`` and ``goodput``; and those of `metrics`.

    Raises
    ------
    ConfigError
        If `metrics` gives something else than names and numbers.
    """
    summary = result.summary()
    row = {
        f"{latency}_{statistic}": float(value)
        for latency, values in zip(summary.index, summary.to_numpy().tolist(), strict=True)
        for statistic, value in zip(summary.columns, values, strict=True)
    }
    row |= {name: float(value) for name, value in result.figures.items()}
    row["simulated_time"] = float(result.info["simulated_time"])
    if slo:
        shares = result.slo(**slo).to_dict()
        goodput = shares.pop("goodput")
        row |= {f"slo_{name}": float(share) for name, share in shares.items()}
        row["goodput"] = float(goodput)
    if metrics is not None:
        row |= _numbers(metrics(result))
    return row


def _numbers(given: Mapping[str, float]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"metrics gave {given!r}: expected a mapping of names to numbers."
        ) from None


def replication_seeds(seed: int, replications: int) -> list[int]:
    """Return seeds of independent replications; the first is `seed` itself.

    The others are drawn from it with numpy's `SeedSequence`, so that replications of neighbouring
    seeds have no stream in common.

    Raises
    ------
    ConfigError
        If `seed` is no integer >= 0, or `replications` none >= 1.

    Examples
    --------
    >>> replication_seeds(0, 3)
    [0, 2740707028568530571, 7025925743403342867]
    """
    for name, value, least in (("seed", seed, 0), ("replications", replications, 1)):
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not (is_whole and value >= least):
            raise ConfigError(f"{name} = {value!r}: expected an integer >= {least}.")
    drawn = np.random.SeedSequence(int(seed), spawn_key=(REPLICATION_STREAM,))
    state = drawn.generate_state(replications - 1, np.uint64) >> np.uint64(1)
    return [int(seed), *state.tolist()]
