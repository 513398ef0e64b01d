"""Configurations that compete for an objective: run, ranked and compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.search.grid import Point
from vidur_simpy.search.narrowing import Rank
from vidur_simpy.search.observations import Observation
from vidur_simpy.search.run_tables import cell
from vidur_simpy.search.scaling import num_requests_of, with_share
from vidur_simpy.search.slo import Slo, Verdict
from vidur_simpy.search.store import Store
from vidur_simpy.search.trials import (
    Trial,
    columns_of,
    confidence_of_a_look,
    more_runs,
    try_out,
)
from vidur_simpy.statistics.intervals import Interval, mean_interval
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Candidates"]

# Words in the names of figures of which more is better.
GAINS = ("throughput", "utilisation", "mfu", "mbu", "goodput")
# Figures that are known without a run.
FIXED = ("cost_per_hour", "num_devices")


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
    store : Store or None
    trials : dict of int to Trial
        Of the points that were run in full.
    errors : dict of int to str
        Why a point could not run.
    tried : set of int
        Points that were run, in full or with few requests.
    num_runs, num_reused : int
        Runs, and how many of them were taken from the store.
    """

    points: list[Point]
    prices: list[float]
    slo: Slo
    column: str
    seeds: list[int]
    confidence: float
    jobs: int | None = None
    store: Store | None = None
    trials: dict[int, Trial] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)
    num_runs: int = 0
    num_reused: int = 0

    def __post_init__(self) -> None:
        for index, point in enumerate(self.points):
            if point.error is not None:
                self.errors[index] = f"{type(point.error).__name__}: {point.error}"

    @property
    def num_requests(self) -> int:
        """Requests of a full run, the most of any point."""
        return max(num_requests_of(point.workload, self.seeds[0]) for point in self.points)

    def run(self, indices: Sequence[int]) -> None:
        """Run points in full."""
        trials = self._try(indices, 1.0, self.seeds)
        self.trials |= {index: trial for index, trial in trials.items() if not trial.error}

    def ranks(self, indices: Sequence[int], share: float) -> list[Rank]:
        """Run points once with a share of their requests, and return how good they look."""
        trials = self._try(indices, share, self.seeds[:1])
        return [self._rank(index, trials.get(index)) for index in indices]

    def compare(self) -> None:
        """Run the best and the runner-up with all seeds, until they are the best with them."""
        while True:
            leaders = self._ordered()[:2]
            short = [
                index for index in leaders if len(self.trials[index].observations) < len(self.seeds)
            ]
            if not short:
                return
            before = [self.trials[index] for index in short]
            after = more_runs(
                before,
                [self.points[index] for index in short],
                self.slo,
                self.seeds,
                confidence=confidence_of_a_look(self.confidence, len(self.seeds)),
                jobs=self.jobs,
                store=self.store,
            )
            self._note(short, before, after)
            for index, trial in zip(short, after, strict=True):
                if trial.error:
                    del self.trials[index]
                else:
                    self.trials[index] = trial

    def decision(self) -> tuple[int | None, int | None, Interval | None]:
        """Return the best point, the runner-up, and by how much that is worse."""
        best, runner_up = [*self._ordered()[:2], None, None][:2]
        if best is None or runner_up is None:
            return best, None, None
        values = [self._values(index) for index in (best, runner_up)]
        count = min(map(len, values))
        differences = self._sign * (values[1][:count] - values[0][:count])
        if self.column in FIXED:
            difference = float(differences[0])
            lead = Interval(difference, difference, difference, self.confidence, 1, 1.0)
        else:
            lead = mean_interval(differences, confidence=self.confidence, is_correlated=False)
        return best, runner_up, lead

    def with_verdict(self, verdict: Verdict) -> list[int]:
        """Return the points with this verdict, in order."""
        return [index for index in sorted(self.trials) if self.trials[index].verdict == verdict]

    def closest(self) -> str:
        """Return which point came closest to the SLO."""
        if not self.trials:
            return f"no configuration could run: {next(iter(self.errors.values()), '')}"
        if any(self.with_verdict(verdict) for verdict in ("meets", "cannot tell")):
            return f"{self.column} is not known of any configuration that may meet the SLO"
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
        value = {index: self.value(index) for index in fit}
        return sorted(
            (index for index in fit if math.isfinite(value[index])),
            # Of those that are equally good, the one that stays furthest from its limits.
            key=lambda index: (value[index], self.trials[index].worst, index),
        )

    def value(self, index: int) -> float:
        """Return the objective of a point that was run in full, negative where more is better."""
        return self._value(index, self.trials[index])

    def _value(self, index: int, trial: Trial) -> float:
        figures = [self._figures(index, each)[self.column] for each in trial.observations]
        mean = float(np.mean(figures))
        return math.inf if math.isnan(mean) else self._sign * mean

    def _rank(self, index: int, trial: Trial | None) -> Rank:
        if trial is None or trial.error:
            return 2, 0.0
        if trial.worst > 1:
            return 1, trial.worst
        return 0, self._value(index, trial), trial.worst

    def _try(self, indices: Sequence[int], share: float, seeds: Sequence[int]) -> dict[int, Trial]:
        possible = [index for index in indices if index not in self.errors]
        points = [
            dataclasses.replace(
                self.points[index],
                workload=with_share(self.points[index].workload, share, seed=seeds[0]),
            )
            for index in possible
        ]
        trials = try_out(
            points, self.slo, seeds, confidence=self.confidence, jobs=self.jobs, store=self.store
        )
        self._note(possible, [Trial([], [])] * len(trials), trials)
        return dict(zip(possible, trials, strict=True))

    def _note(self, indices: Sequence[int], before: list[Trial], after: list[Trial]) -> None:
        """Count runs, and remember which points were tried and which failed."""
        self.tried |= set(indices)
        for index, old, new in zip(indices, before, after, strict=True):
            self.num_runs += len(new.observations) - len(old.observations)
            self.num_reused += new.num_reused - old.num_reused
            if new.error:
                self.errors[index] = new.error

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
        row: dict[str, Any] = {name: cell(point.setting(name)) for name in point.settings}
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
