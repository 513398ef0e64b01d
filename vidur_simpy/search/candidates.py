"""Configurations that compete for an objective: run, ranked, halved and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import VidurError
from vidur_simpy.search.grid import Point
from vidur_simpy.search.scaling import num_requests_of, with_share
from vidur_simpy.search.slo import Slo, Verdict
from vidur_simpy.search.trials import (
    Observation,
    Trial,
    columns_of,
    confidence_of_a_look,
    more_runs,
    outcomes,
    try_out,
)
from vidur_simpy.statistics.intervals import Interval, mean_interval
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Candidates", "successive_halving"]

# Words in the names of figures of which more is better.
GAINS = ("throughput", "utilisation", "mfu", "mbu", "goodput")
# Each round of halving keeps one in so many, with so many times the requests.
ETA = 3
# Halving ends when so few are left.
NUM_FINALISTS = 8
# Shorter runs say too little to choose by.
MIN_REQUESTS = 100

Rank = tuple[int, float]


def successive_halving(
    count: int, rank: Callable[[list[int], float], list[Rank]], *, least_share: float
) -> list[int]:
    """Return candidates, the most promising first, after ever more effort on ever fewer of them.

    Parameters
    ----------
    count : int
        Candidates, numbered from 0.
    rank : callable
        ``rank(candidates, share)`` gives a rank for each, lower for better, with a share of the
        full effort.
    least_share : float
        Effort of the first round.

    Returns
    -------
    list of int
        All candidates: those of the last round first, in the order of their last ranks.

    Notes
    -----
    Jamieson and Talwalkar (2016), Non-stochastic best arm identification and hyperparameter
    optimization.

    Examples
    --------
    >>> successive_halving(50, lambda numbers, share: [(0, abs(n - 7)) for n in numbers],
    ...     least_share=0.1)[:3]
    [7, 6, 8]
    """
    kept, share = list(range(count)), least_share
    dropped: list[int] = []
    while share < 1 and len(kept) > NUM_FINALISTS:
        ranks = dict(zip(kept, rank(kept, share), strict=True))
        ordered = sorted(kept, key=lambda number: (ranks[number], number))
        num_kept = max(NUM_FINALISTS, math.ceil(len(kept) / ETA))
        kept, dropped = ordered[:num_kept], ordered[num_kept:] + dropped
        share *= ETA
    return kept + dropped


@dataclass
class Candidates:
    """The points of a grid, and what is known of them.

    Attributes
    ----------
    points : list of Point
    prices : list of float
        Of an hour of a device of each point; NaN if it was not given.
    slo : Slo
    column : str
        What is to be best.
    seeds : list of int
    confidence : float
    jobs : int or None
    trials : dict of int to Trial
        Of the points that were run in full.
    errors : dict of int to str
        Why a point could not run.
    num_runs : int
    """

    points: list[Point]
    prices: list[float]
    slo: Slo
    column: str
    seeds: list[int]
    confidence: float
    jobs: int | None
    trials: dict[int, Trial] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    num_runs: int = 0

    def __post_init__(self) -> None:
        for index, point in enumerate(self.points):
            if point.error is not None:
                self.errors[index] = _told(point.error)

    def run(self, indices: Sequence[int]) -> None:
        """Run points in full."""
        tasks = [index for index in indices if index not in self.errors]
        trials = self._try(tasks, 1.0, self.seeds)
        self.trials |= {index: trial for index, trial in trials.items() if trial is not None}

    def halved(self) -> Iterator[list[int]]:
        """Yield batches of points to run in full, the most promising first."""
        whole = max(num_requests_of(point.workload, self.seeds[0]) for point in self.points)
        order = successive_halving(
            len(self.points), self._ranks, least_share=min(1.0, max(MIN_REQUESTS / whole, ETA**-3))
        )
        for start in range(0, len(order), NUM_FINALISTS):
            yield order[start : start + NUM_FINALISTS]

    def compare(self) -> None:
        """Run the best and the runner-up with all seeds, until they are the best with them."""
        while True:
            leaders = self._ordered()[:2]
            short = [
                index for index in leaders if len(self.trials[index].observations) < len(self.seeds)
            ]
            if not short:
                return
            for index in short:
                point, trial = self.points[index], self.trials[index]
                self.num_runs += len(self.seeds) - len(trial.observations)
                self.trials[index] = more_runs(
                    trial,
                    point.cluster,
                    point.workload,
                    self.slo,
                    self.seeds,
                    confidence=confidence_of_a_look(self.confidence, len(self.seeds)),
                    jobs=self.jobs,
                )

    def decision(self) -> tuple[int | None, int | None, Interval | None]:
        """Return the best point, the runner-up, and by how much that is worse."""
        best, runner_up = [*self._ordered()[:2], None, None][:2]
        if best is None or runner_up is None:
            return best, None, None
        values = [self._values(index) for index in (best, runner_up)]
        count = min(map(len, values))
        differences = self._sign * (values[1][:count] - values[0][:count])
        lead = mean_interval(differences, confidence=self.confidence, is_correlated=False)
        return best, runner_up, lead

    def with_verdict(self, verdict: Verdict) -> list[int]:
        """Return the points with this verdict, in order."""
        return [index for index in sorted(self.trials) if self.trials[index].verdict == verdict]

    def closest(self) -> str:
        """Return which point came closest to the SLO."""
        if not self.trials:
            return f"no configuration could run: {next(iter(self.errors.values()), '')}"
        index = min(sorted(self.trials), key=lambda each: self.trials[each].worst)
        times = self.trials[index].worst
        told = f"{digits(times)} times" if math.isfinite(times) else "infinitely"
        return f"no configuration meets the SLO; row {index} comes closest, {told} over its limit"

    def table(self) -> pd.DataFrame:
        """Return a row per point, as `Recommendation.table` describes it."""
        import pandas as pd

        rows = [self._row(index) for index in range(len(self.points))]
        table = pd.DataFrame(rows)
        last = table.pop("error")
        return table.assign(error=last)

    @property
    def _sign(self) -> float:
        """1 if less is better, -1 if more is."""
        return -1.0 if any(word in self.column.split("_") for word in GAINS) else 1.0

    def _ordered(self) -> list[int]:
        """Return the points that surely meet the SLO, or else may, the best first."""
        fit = self.with_verdict("meets") or self.with_verdict("cannot tell")
        return sorted(fit, key=lambda index: (self._rank(index, self.trials[index]), index))

    def _rank(self, index: int, trial: Trial | None) -> Rank:
        if trial is None:
            return 2, 0.0
        if trial.worst > 1:
            return 1, trial.worst
        value = float(
            np.mean([self._figures(index, each)[self.column] for each in trial.observations])
        )
        return 0, math.inf if math.isnan(value) else self._sign * value

    def _ranks(self, indices: list[int], share: float) -> list[Rank]:
        tasks = [index for index in indices if index not in self.errors]
        trials = self._try(tasks, share, self.seeds[:1])
        return [self._rank(index, trials.get(index)) for index in indices]

    def _try(
        self, indices: Sequence[int], share: float, seeds: Sequence[int]
    ) -> dict[int, Trial | None]:
        function = partial(_trial_of, self.slo, share, seeds, self.confidence)
        points = [self.points[index] for index in indices]
        trials: dict[int, Trial | None] = {}
        for index, outcome in zip(indices, outcomes(function, points, self.jobs), strict=True):
            if isinstance(outcome, str):
                self.errors[index], trials[index] = outcome, None
            else:
                self.num_runs += len(outcome.observations)
                trials[index] = outcome
        return trials

    def _values(self, index: int) -> Any:
        """Return the objective of each run."""
        observations = self.trials[index].observations
        return np.array([self._figures(index, each)[self.column] for each in observations])

    def _figures(self, index: int, observation: Observation) -> dict[str, float]:
        """Return the figures of a run, and what it cost."""
        figures, num_devices = observation.figures, self.points[index].cluster.num_devices
        price = self.prices[index]
        return figures | {
            "num_devices": num_devices,
            "cost_per_hour": price * num_devices,
            "cost_per_million_tokens": price * figures["gpu_hours_per_million_tokens"],
        }

    def _row(self, index: int) -> dict[str, Any]:
        point, trial = self.points[index], self.trials.get(index)
        row: dict[str, Any] = {name: _cell(point.setting(name)) for name in point.settings}
        row["num_devices"] = None if index in self.errors else point.cluster.num_devices
        row |= {"verdict": "", "num_runs": 0, "error": self.errors.get(index, "")}
        if trial is None:
            return row
        row |= {"verdict": trial.verdict, "num_runs": len(trial.observations)}
        for each in trial.assessments:
            row |= columns_of(each)
        figures = [self._figures(index, each) for each in trial.observations]
        means = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
        return row | {name: value for name, value in means.items() if name not in row}


def _trial_of(
    slo: Slo, share: float, seeds: Sequence[int], confidence: float, point: Point
) -> Trial | str:
    """Run a point; or say why that is not possible."""
    workload = with_share(point.workload, share, seed=seeds[0])
    try:
        return try_out(point.cluster, workload, slo, seeds, confidence=confidence, jobs=1)
    except VidurError as error:
        return _told(error)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _cell(value: Any) -> Any:
    """Return a setting as a table shows it: numbers and texts as they are, objects as code."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or repr(value)
