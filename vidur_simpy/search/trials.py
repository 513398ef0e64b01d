"""A cluster under a workload, run with several seeds until it is clear whether it meets an SLO."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.parallel import as_completed
from vidur_simpy.search.runs import Run, figures_of, replication_seeds
from vidur_simpy.search.slo import Assessment, Slo, Verdict, assess, combined_verdict, ratios

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.cluster import Cluster
    from vidur_simpy.result import Result
    from vidur_simpy.workload import Trace, Workload

__all__ = [
    "Observation",
    "Trial",
    "columns_of",
    "confidence_of_a_look",
    "more_runs",
    "observe",
    "outcomes",
    "replicate",
    "try_out",
]

Task = TypeVar("Task")
Value = TypeVar("Value")

# Seeds are added in rounds that double, from this many on.
FIRST_ROUND = 2


@dataclass(frozen=True)
class Observation:
    """What is kept of a run.

    Attributes
    ----------
    ratios : list of ndarray
        For each requirement, what `slo.ratios` gives.
    figures : dict of str to float
        See :func:`~vidur_simpy.search.figures_of`; besides, ``gpu_hours_per_million_tokens`` and
        ``kwh_per_million_tokens`` of prompt and output tokens together (NaN if the power of the
        device is not known); ``mean_in_system``, the requests in the system on average over the
        times of arrival; and ``arrival_share``, the share of the run until the last arrival.
    """

    ratios: list[NDArray[np.float64]]
    figures: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """A cluster under a workload, run several times.

    Attributes
    ----------
    observations : list of Observation
        By replication.
    assessments : list of Assessment
        By requirement of the SLO.
    """

    observations: list[Observation]
    assessments: list[Assessment]

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
        """Whether more runs are not needed: a clear miss, or meeting by values enough."""
        is_reliable = all(each.is_reliable for each in self.assessments)
        return self.verdict == "misses" or (self.verdict == "meets" and is_reliable)

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
        Of the first run; the others are those of :func:`~vidur_simpy.search.replication_seeds`.
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
    cluster: Cluster,
    workload: Workload | Trace,
    slo: Slo,
    seeds: Sequence[int],
    *,
    confidence: float = 0.95,
    jobs: int | None = None,
) -> Trial:
    """Run a workload with ever more seeds until it is clear whether it meets an SLO, or all ran.

    Parameters
    ----------
    confidence : float
        Chance that the verdict is right, however often it was looked at; see
        :func:`confidence_of_a_look`.
    """
    trial = Trial([], [])
    confidence = confidence_of_a_look(confidence, len(seeds))
    while len(trial.observations) < len(seeds):
        upto = max(FIRST_ROUND, 2 * len(trial.observations))
        trial = more_runs(
            trial, cluster, workload, slo, seeds[:upto], confidence=confidence, jobs=jobs
        )
        if trial.is_settled:
            break
    return trial


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
    trial: Trial,
    cluster: Cluster,
    workload: Workload | Trace,
    slo: Slo,
    seeds: Sequence[int],
    *,
    confidence: float = 0.95,
    jobs: int | None = None,
) -> Trial:
    """Return a trial with a run for each seed; those it has are of the first ones."""
    done = trial.observations
    runs = [Run(cluster, workload, seed=seed, record=slo.record) for seed in seeds[len(done) :]]
    observations = [*done, *observe(runs, slo, jobs)]
    assessments = [
        assess(requirement, [each.ratios[index] for each in observations], confidence)
        for index, requirement in enumerate(slo.requirements)
    ]
    return Trial(observations, assessments)


def observe(runs: Sequence[Run], slo: Slo, jobs: int | None = None) -> list[Observation]:
    """Make runs, and return what is kept of each, in their order."""
    return outcomes(partial(_observation, slo), runs, jobs)


def outcomes(
    function: Callable[[Task], Value], tasks: Sequence[Task], jobs: int | None = None
) -> list[Value]:
    """Call a function with each task, and return what comes out, in their order.

    Parameters
    ----------
    jobs : int, optional
        As :func:`~vidur_simpy.parallel.as_completed` takes it; where nobody asks for workers,
        joblib is not needed.
    """
    if jobs == 1 or (jobs is None and not find_spec("joblib")):
        return [function(task) for task in tasks]
    done = dict(as_completed(function, tasks, jobs))
    return [done[number] for number in range(len(tasks))]


def _observation(slo: Slo, run: Run) -> Observation:
    result = run.simulate()
    requests = result.requests
    first, last = requests["arrived_at"].min(), requests["arrived_at"].max()
    end = requests["completed_at"].max()
    figures = figures_of(result)
    figures["gpu_hours_per_million_tokens"] = result.cost(1.0)["cost_per_million_tokens"]
    figures["kwh_per_million_tokens"] = _energy(result)
    figures["mean_in_system"] = float(requests["e2e"].sum()) / max(last - first, 1e-12)
    figures["arrival_share"] = float((last - first) / max(end - first, 1e-12))
    return Observation([ratios(result, each) for each in slo.requirements], figures)


def _energy(result: Result) -> float:
    try:
        return float(result.energy()["kwh_per_million_tokens"])
    except ConfigError:  # the data sheet does not say
        return math.nan


def columns_of(assessment: Assessment) -> dict[str, float]:
    """Return an assessment as columns of a table, as `Capacity.curve` describes them."""
    requirement, ratio = assessment.requirement, assessment.ratio
    name = requirement.name.replace(":", "_")
    row = {}
    if name == "fraction":
        row, name = {name: assessment.attainment}, "fraction_ratio"
    ends = {"": ratio.estimate, "_low": ratio.low, "_high": ratio.high}
    return row | {name + end: value * requirement.scale for end, value in ends.items()}
