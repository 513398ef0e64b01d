"""Clusters under a workload, run with several seeds until it is clear whether they meet an SLO."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np

from vidur_simpy.errors import ConfigError, SimulationError
from vidur_simpy.search.grid import Point
from vidur_simpy.search.observations import Observation, observation_of
from vidur_simpy.search.runs import Run, completed, outcomes_of, replication_seeds
from vidur_simpy.search.slo import Assessment, Slo, Verdict, assess, combined_verdict
from vidur_simpy.search.store import Store
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    from vidur_simpy.cluster import Cluster
    from vidur_simpy.result import Result
    from vidur_simpy.workload import Trace, Workload

__all__ = [
    "Trial",
    "check_effort",
    "columns_of",
    "confidence_of_a_look",
    "more_runs",
    "notes_of_length",
    "outcomes",
    "raise_error",
    "replicate",
    "try_out",
]

Task = TypeVar("Task")
Value = TypeVar("Value")

# Seeds are added in rounds that double, from this many on.
FIRST_ROUND = 2
# A run is too short if the cluster completes this much less than what arrives.
OVERLOADED = 0.8


@dataclass(frozen=True)
class Trial:
    """A cluster under a workload, run several times.

    Attributes
    ----------
    observations : list of Observation
        By replication.
    assessments : list of Assessment
        By requirement of the SLO.
    error : str
        Why a run failed; empty if none did.
    """

    observations: list[Observation]
    assessments: list[Assessment]
    error: str = ""

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the SLO is met."""
        return combined_verdict(self.assessments)

    @property
    def worst(self) -> float:
        """Greatest ratio of a latency to its limit."""
        return max(each.ratio.estimate for each in self.assessments)

    @property
    def is_settled(self) -> bool:
        """Whether more runs are not needed: a clear miss, meeting by values enough, a failure."""
        is_reliable = all(each.is_reliable for each in self.assessments)
        is_met = self.verdict == "meets" and is_reliable
        return bool(self.error) or self.verdict == "misses" or is_met

    @property
    def num_reused(self) -> int:
        """Runs that were taken from a store."""
        return sum(each.is_reused for each in self.observations)

    def figure(self, name: str) -> float:
        """Return the mean of a figure over the runs."""
        return float(np.mean([each.figures[name] for each in self.observations]))


def replicate(
    cluster: Cluster,
    workload: Workload | Trace,
    replications: int,
    *,
    seed: int = 0,
    record: Collection[str] = (),
    jobs: int | None = None,
) -> list[Result]:
    """Run a workload several times with independent random numbers.

    Parameters
    ----------
    cluster, workload, record
        As :func:`simulate` takes them.
    replications : int
    seed : int
        Of the first run; the others are those of :func:`vidur_simpy.search.replication_seeds`.
    jobs : int, optional
        Workers, -1 for one per core; None leaves it to ``joblib.parallel_config``.

    Returns
    -------
    list of Result
        In order of the seeds; the same for any number of workers.

    Examples
    --------
    >>> import vidur_simpy as vs
    >>> cluster = vs.Cluster(execution_time=vs.Linear())
    >>> workload = vs.Workload(vs.Poisson(9.0), vs.FixedLengths(512, 16), num_requests=500)
    >>> results = vs.replicate(cluster, workload, 4)
    >>> vs.interval(results, "ttft", 0.9).num_values
    2000
    """
    names = (record,) if isinstance(record, str) else tuple(record)
    runs = [
        Run(cluster, workload, seed=each, record=names)
        for each in replication_seeds(seed, replications)
    ]
    return outcomes(Run.simulate, runs, jobs)


def try_out(
    points: Sequence[Point],
    slo: Slo,
    seeds: Sequence[int],
    *,
    confidence: float = 0.95,
    jobs: int | None = None,
    store: Store | None = None,
) -> list[Trial]:
    """Run points with ever more seeds until it is clear which meet an SLO, or all seeds ran.

    Parameters
    ----------
    confidence : float
        Chance that a verdict is right, however often it was looked at; see
        :func:`confidence_of_a_look`.
    store : Store, optional
        Where finished runs are kept, and taken from.
    """
    trials = [Trial([], [])] * len(points)
    confidence = confidence_of_a_look(confidence, len(seeds))
    unsettled, upto = list(range(len(points))), 0
    while unsettled and upto < len(seeds):
        upto = min(max(FIRST_ROUND, 2 * upto), len(seeds))
        more = more_runs(
            [trials[index] for index in unsettled],
            [points[index] for index in unsettled],
            slo,
            seeds[:upto],
            confidence=confidence,
            jobs=jobs,
            store=store,
        )
        for index, trial in zip(unsettled, more, strict=True):
            trials[index] = trial
        unsettled = [index for index in unsettled if not trials[index].is_settled]
    return trials


def confidence_of_a_look(confidence: float, num_seeds: int) -> float:
    """Return the confidence of each interval of a trial that may be looked at after each round.

    The rounds share the error evenly (Bonferroni).

    Examples
    --------
    >>> round(confidence_of_a_look(0.95, 32), 3)  # after 2, 4, 8, 16 and 32 runs
    0.99
    """
    num_looks = 1 + max(0, math.ceil(math.log2(num_seeds / FIRST_ROUND)))
    return 1 - (1 - confidence) / num_looks


def more_runs(
    trials: Sequence[Trial],
    points: Sequence[Point],
    slo: Slo,
    seeds: Sequence[int],
    *,
    confidence: float = 0.95,
    jobs: int | None = None,
    store: Store | None = None,
) -> list[Trial]:
    """Return trials with a run for each seed; those they have are of the first ones."""
    missing = [
        (index, seed)
        for index, trial in enumerate(trials)
        for seed in seeds[len(trial.observations) :]
    ]
    runs = [
        Run(points[index].cluster, points[index].workload, seed=seed, record=slo.record)
        for index, seed in missing
    ]
    made: list[Observation | str] = [""] * len(runs)
    # Of each run only what this SLO needs is kept, as soon as it is done.
    for number, outcome in outcomes_of(runs, store=store, jobs=jobs, needs_values=True):
        made[number] = outcome.error or observation_of(
            slo, outcome.figures, outcome.values, is_reused=outcome.is_reused
        )
    found = [list(trial.observations) for trial in trials]
    errors = [""] * len(trials)
    for (index, _), one in zip(missing, made, strict=True):
        if isinstance(one, Observation):
            found[index].append(one)
        else:
            errors[index] = errors[index] or one
    return [
        _assessed(observations, slo, confidence, error)
        for observations, error in zip(found, errors, strict=True)
    ]


def _assessed(observations: list[Observation], slo: Slo, confidence: float, error: str) -> Trial:
    if error:
        return Trial(observations, [], error)
    assessments = [
        assess(requirement, [each.ratios[index] for each in observations], confidence)
        for index, requirement in enumerate(slo.requirements)
    ]
    return Trial(observations, assessments)


def notes_of_length(trial: Trial) -> list[str]:
    """Return why runs may be too short to tell how a cluster does in the long run."""
    notes = []
    if any(each.grows for each in trial.assessments):
        notes.append("latencies still grow when a run ends: use more requests")
    if trial.figure("arrival_share") < OVERLOADED:
        throughput = digits(trial.figure("request_throughput"))
        notes.append(
            f"runs are too short to overload the cluster, which completes {throughput} "
            "requests/s: use more requests"
        )
    return notes


def raise_error(trial: Trial, point: Point, seeds: Sequence[int]) -> NoReturn:
    """Raise what made a run fail; made again here, it shows where that happened."""
    for seed in seeds:
        Run(point.cluster, point.workload, seed=seed).simulate()
    raise SimulationError(trial.error)


def outcomes(
    function: Callable[[Task], Value], tasks: Sequence[Task], jobs: int | None = None
) -> list[Value]:
    """Call a function with each task, and return what comes out, in their order.

    Parameters
    ----------
    jobs : int, optional
        As :func:`vidur_simpy.search.runs.completed` takes it.
    """
    done = dict(completed(function, tasks, jobs))
    return [done[number] for number in range(len(tasks))]


def columns_of(assessment: Assessment) -> dict[str, float]:
    """Return an assessment as columns of a table, as `Capacity.curve` describes them."""
    requirement, ratio = assessment.requirement, assessment.ratio
    name = requirement.name.replace(":", "_")
    row = {}
    if name == "fraction":
        row, name = {name: assessment.attainment}, "fraction_ratio"
    ends = {"": ratio.estimate, "_low": ratio.low, "_high": ratio.high}
    return row | {name + end: value * requirement.scale for end, value in ends.items()}


def check_effort(function: str, confidence: float, max_replications: int) -> None:
    """Refuse a confidence or a number of replications that is none.

    Raises
    ------
    ConfigError
        If the confidence is not between 0 and 1, or the number not a whole one of 1 or more.
    """
    if isinstance(confidence, bool) or not (
        isinstance(confidence, int | float) and 0 < confidence < 1
    ):
        raise ConfigError(
            f"{function}(): confidence = {confidence!r}: expected a number above 0 and below 1."
        )
    is_whole = isinstance(max_replications, int) and not isinstance(max_replications, bool)
    if not (is_whole and max_replications >= 1):
        raise ConfigError(
            f"{function}(): max_replications = {max_replications!r}: expected an integer >= 1."
        )
