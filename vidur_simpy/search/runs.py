"""Many runs and their figures: made wherever joblib says, each once, and kept in a store."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.cluster import Cluster
from vidur_simpy.config import dump_config
from vidur_simpy.errors import ConfigError
from vidur_simpy.kernel import EventOrder
from vidur_simpy.parallel import as_completed, progress_bar
from vidur_simpy.search.store import DamagedEntryError, Store, key_of, unstorable
from vidur_simpy.simulation import simulate
from vidur_simpy.workload import Trace, Workload

if TYPE_CHECKING:
    from vidur_simpy.result import Result

__all__ = ["Outcome", "Run", "figures_of", "replication_seeds", "run_all"]

# How many words of a list a message shows.
SHOWN = 3

# Far from the streams of one run, which are numbered from 0.
REPLICATION_STREAM = 2**31


@dataclass(frozen=True)
class Run:
    """What is to be simulated, and what of it is to be told.

    Attributes
    ----------
    cluster, workload, seed, event_order, until, record
        As :func:`~vidur_simpy.simulate` takes them.
    slo : mapping of str to float
        Limits in seconds, as :meth:`Result.slo` takes them; empty for none.
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
    """

    figures: dict[str, float]
    error: str = ""


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
        Workers, see :func:`~vidur_simpy.parallel.as_completed`.
    progress : bool or None
        Show a progress bar; None shows one on a terminal or in a notebook after two seconds.

    Raises
    ------
    VidurError
        If a worker process died.
    """
    outcomes: list[Outcome | None] = [None] * len(runs)
    jobs_at = dict(enumerate(_stored_as(runs, store)))
    with progress_bar(len(runs), " runs", progress) as bar:
        for index, job in list(jobs_at.items()):
            figures = _stored_figures(job)
            if figures is not None:
                outcomes[index] = Outcome(figures)
                del jobs_at[index]
                bar.update()
        # Runs that somebody else is computing come last; by then most of them are stored.
        for function in (_run_if_free, _run_or_wait):
            pending = list(jobs_at)
            for number, outcome in as_completed(function, list(jobs_at.values()), jobs):
                if outcome is not None:
                    job = jobs_at.pop(pending[number])
                    job.keep(outcome)
                    outcomes[pending[number]] = outcome
                    bar.update()
    assert all(outcome is not None for outcome in outcomes), "every run has an outcome"
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass(frozen=True)
class _Job:
    """A run, and where its figures are kept, if anywhere."""

    run: Run
    store: Store | None = None
    key: str = ""

    def stored_figures(self) -> dict[str, float] | None:
        """Return what is stored, None if nothing is or it is damaged."""
        try:
            return self.store.load(self.key) if self.store is not None else None
        except DamagedEntryError:
            return None

    def keep(self, outcome: Outcome) -> None:
        """Store the figures, if there are any that are not stored yet."""
        if self.store is not None and not outcome.error and self.stored_figures() is None:
            self.store.save(self.key, self.run.described(), outcome.figures)


def _stored_figures(job: _Job) -> dict[str, float] | None:
    """Return what is stored, and warn about what is damaged."""
    try:
        return job.store.load(job.key) if job.store is not None else None
    except DamagedEntryError as error:
        warnings.warn(f"{error} The run is made again.", stacklevel=4)
        return None


def _stored_as(runs: Sequence[Run], store: Store | None) -> list[_Job]:
    if store is None:
        return [_Job(run) for run in runs]
    jobs, nameless = [], []
    for run in runs:
        described = run.described()
        objects = unstorable(described)
        nameless.append(objects)
        jobs.append(_Job(run) if objects else _Job(run, store, key_of(described)))
    names = list(dict.fromkeys(name for objects in nameless for name in objects))
    if names:
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        warnings.warn(
            f"{sum(map(bool, nameless))} of {len(runs)} runs are made, but not stored: the store "
            f"tells runs by what a configuration file can say, which {shown} is not.",
            stacklevel=4,
        )
    return jobs


def _run_if_free(job: _Job) -> Outcome | None:
    """Make a run, unless somebody else is doing so."""
    return _run_claimed(job, wait=False)


def _run_or_wait(job: _Job) -> Outcome | None:
    """Make a run; if somebody else is doing so, wait for it."""
    return _run_claimed(job, wait=True)


def _run_claimed(job: _Job, *, wait: bool) -> Outcome | None:
    if job.store is None or not job.store.is_here:
        return _outcome(job.run)
    with job.store.claim(job.key, wait=wait) as is_mine:
        if not is_mine:
            return None
        figures = job.stored_figures()
        if figures is not None:
            return Outcome(figures)
        outcome = _outcome(job.run)
        job.keep(outcome)
        return outcome


def _outcome(run: Run) -> Outcome:
    try:
        return Outcome(figures_of(run.simulate(), run.slo, run.metrics))
    except Exception as error:  # whatever it is, the other runs go on and the row tells it
        return Outcome({}, f"{type(error).__name__}: {error}")


def figures_of(
    result: Result,
    slo: Mapping[str, float] | None = None,
    metrics: Callable[[Result], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Return the figures of a run as one flat row.

    Returns
    -------
    dict of str to float
        ``ttft_mean``, ``ttft_p99`` and so on, from :meth:`Result.summary`; the scalars of
        :attr:`Result.figures`; ``simulated_time`` in seconds; with `slo`, ``slo_ttft`` and so on,
        ``slo_attainment`` and ``goodput``; and those of `metrics`.

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
