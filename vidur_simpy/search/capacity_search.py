"""The highest arrival rate at which a cluster meets an SLO, and how sure that is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vidur_simpy.errors import ConfigError
from vidur_simpy.search import search_plots
from vidur_simpy.search.grid import Point, check_inputs
from vidur_simpy.search.runs import Run, replication_seeds, warn_of_nameless
from vidur_simpy.search.scaling import is_random, mean_rate, with_rate
from vidur_simpy.search.slo import Slo, read_slo
from vidur_simpy.search.store import open_store
from vidur_simpy.search.trials import (
    Trial,
    check_effort,
    columns_of,
    notes_of_length,
    raise_error,
    try_out,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.cluster import Cluster
    from vidur_simpy.workload import Trace, Workload

__all__ = ["Capacity", "capacity"]

Answer = Literal["found", "cannot tell", "every rate", "no rate"]

# Requests arrive at once for what they can tell, if the last one comes this early in the run.
AT_ONCE = 0.05
# Requests are alone for what they can tell, if so few are in the system on average.
ALONE = 0.05
# Rates are powers of two of the workload's own, of at most this exponent.
MAX_EXPONENT = 40


@dataclass(frozen=True, eq=False, repr=False)
class Capacity:
    """The highest arrival rate that meets an SLO.

    Attributes
    ----------
    rate : float
        Requests per second: where the estimates cross the limit. 0 if no rate meets the SLO,
        infinite if every rate does.
    low, high : float
        The highest rate that surely meets the SLO and the lowest one that surely misses it: there
        the whole interval lies on one side of the limit.
    answer : {"found", "cannot tell", "every rate", "no rate"}
        ``cannot tell`` if `low` and `high` are further apart than was asked for.
    curve : DataFrame
        The rates that were tried, in order: ``rate``; ``verdict``; ``num_runs``; for each limit as
        ``ttft_p99`` its estimate in seconds, ``ttft_p99_low`` and ``ttft_p99_high``; ``fraction``
        where that was required, the share of requests within all limits, with
        ``fraction_ratio`` and its ends, the ratio of latency to limit that has to be 1 at most;
        ``request_throughput``, ``output_token_throughput`` and ``utilisation``.
    slo : Slo
    notes : tuple of str
        What limits the answer.
    num_runs : int
        Simulations that the answer rests on.
    num_reused : int
        How many of them were taken from the store; the others were made.
    """

    rate: float
    low: float
    high: float
    answer: Answer
    curve: pd.DataFrame
    slo: Slo
    notes: tuple[str, ...]
    num_runs: int
    num_reused: int = 0

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        reused = f" ({self.num_reused} reused)" if self.num_reused else ""
        return f"<Capacity under {self.slo!r}: {self._said()}; {self.num_runs} runs{reused}{notes}>"

    def _said(self) -> str:
        if self.answer == "every rate":
            return "every rate meets it"
        if self.answer == "no rate":
            return "no rate meets it"
        if not (self.low > 0 and self.high < math.inf):
            return "cannot tell whether any rate, or which, meets it"
        bounds = f"surely met at {digits(self.low)}, surely missed at {digits(self.high)}"
        if self.answer == "found":
            return f"{digits(self.rate)} requests/s, {bounds}"
        return f"about {digits(self.rate)} requests/s, {bounds}, cannot tell closer"

    def plot(self, ax: Axes | None = None, *, requirement: str | None = None) -> Axes:
        """Draw what was tried: latency over rate with its intervals, the limit and the answer.

        Parameters
        ----------
        ax : Axes, optional
        requirement : str, optional
            Draw this limit, as ``"ttft:p99"``; by default the one that is closest at the answer.

        Raises
        ------
        ConfigError
            If the SLO has no such limit.
        """
        return search_plots.capacity_curve(self, ax, requirement=requirement)


def capacity(
    cluster: Cluster,
    workload: Workload | Trace,
    slo: Slo | Mapping[str, float] | Sequence[str],
    *,
    tolerance: float = 0.05,
    confidence: float = 0.95,
    max_replications: int = 32,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
) -> Capacity:
    """Find the highest arrival rate at which a cluster meets an SLO.

    The rate is doubled or halved until the SLO is surely missed and surely met, and then bisected.
    At each rate the same requests run (see `vidur_simpy.search.scaling.with_rate`), first
    with two seeds and then with twice as many, until the whole confidence interval lies on one
    side of the limit; all runs so far count. Where `max_replications` do not settle it, the search
    goes on beside that rate and ends when nothing closer can be told.

    Parameters
    ----------
    cluster : Cluster
    workload : Workload or Trace
        What arrives; its rate is where the search starts. Few requests make short runs that
        cannot be overloaded; a note says so. A `Trace` is no random sample: it runs once at each
        rate.
    slo : Slo, mapping or sequence of str
        As `Slo`, ``{"ttft:p99": 2.0}`` or ``["ttft:p99=2"]``.
    tolerance : float
        How far the rates that surely meet and surely miss may be apart, relative to the lower.
    confidence : float
        Chance that what is said of a rate is right; the looks at its interval share the error, so
        that of 32 replications each is of 99 %.
    max_replications : int
        Runs at one rate.
    seed : int
        Of the first replication, see :func:`vidur_simpy.search.replication_seeds`.
    store : path, optional
        Directory where each finished run is kept, as :func:`vidur_simpy.sweep` keeps them: a
        search that was killed goes on where it was, and another SLO, a closer tolerance, a
        recommendation or a sweep take from it what is the same run.
    jobs : int, optional
        Workers, -1 for one per core; None leaves it to ``joblib.parallel_config``. The answer is
        the same for any number.

    Returns
    -------
    Capacity

    Raises
    ------
    ConfigError
        If an argument is unusable, or the workload has no rate.
    VidurError
        If the store cannot be used, a run fails or a worker process died.

    Notes
    -----
    The SLO may have several limits and several rates lie close to the answer, each of which may be
    taken for another with a chance of ``(1 - confidence) / 2``.

    Examples
    --------
    >>> import vidur_simpy as vs
    >>> cluster = vs.Cluster(execution_time=vs.Linear())
    >>> workload = vs.Workload(vs.Poisson(8.0), vs.FixedLengths(512, 16), num_requests=500)
    >>> found = capacity(cluster, workload, {"ttft:p90": 0.1}, tolerance=0.2)
    >>> found.answer, 40 < found.low < found.rate < found.high < 70
    ('found', True)
    """
    check_inputs(cluster, workload)
    limits = read_slo(slo)
    check_effort("capacity", confidence, max_replications)
    if isinstance(tolerance, bool) or not (
        isinstance(tolerance, int | float) and 0 < tolerance < 1
    ):
        raise ConfigError(
            f"capacity(): tolerance = {tolerance!r}: expected a number above 0 and below 1."
        )
    if not is_random(workload):
        max_replications = 1
    seeds = replication_seeds(seed, max_replications)
    own_rate = mean_rate(workload, seed)
    kept_in = None if store is None else open_store(store)
    if kept_in is not None:
        warn_of_nameless([Run(cluster, workload)], "configurations")

    def trial_at(exponent: float) -> Trial:
        at_rate = with_rate(workload, own_rate * 2.0**exponent, seed=seed)
        point = Point({}, cluster, at_rate)
        (trial,) = try_out([point], limits, seeds, confidence=confidence, jobs=jobs, store=kept_in)
        if trial.error:
            raise_error(trial, point, seeds)
        return trial

    walk = _Walk(trial_at, math.log2(1 + tolerance))
    walk.bracket()
    walk.bisect()
    return walk.capacity(own_rate, limits)


@dataclass
class _Walk:
    """The rates that were tried, as exponents of two, and where to go next."""

    trial_at: Callable[[float], Trial]
    width: float
    trials: dict[float, Trial] = field(default_factory=dict)

    def visit(self, exponent: float) -> Trial:
        """Try a rate, unless that was done."""
        if exponent not in self.trials:
            self.trials[exponent] = self.trial_at(exponent)
        return self.trials[exponent]

    @property
    def low(self) -> float:
        """The highest rate that surely meets, below all that surely miss; or minus infinity."""
        high = self.high
        meets = (e for e, trial in self.trials.items() if trial.verdict == "meets" and e < high)
        return max(meets, default=-math.inf)

    @property
    def high(self) -> float:
        """The lowest rate that surely misses, or infinity."""
        misses = (e for e, trial in self.trials.items() if trial.verdict == "misses")
        return min(misses, default=math.inf)

    def bracket(self) -> None:
        """Double and halve the rate until one surely misses and one surely meets."""
        exponent = 0.0
        while self.high == math.inf and abs(exponent) <= MAX_EXPONENT:
            trial = self.visit(exponent)
            if trial.verdict != "misses" and trial.figure("arrival_share") < AT_ONCE:
                break
            exponent += 1
        exponent = min(0.0, self.high - 1)
        while self.low == -math.inf and abs(exponent) <= MAX_EXPONENT:
            trial = self.visit(exponent)
            if trial.verdict != "meets" and trial.figure("mean_in_system") < ALONE:
                break
            exponent -= 1

    def bisect(self) -> None:
        """Try rates in the middle of the widest gap until they are close enough."""
        while math.isfinite(self.low) and math.isfinite(self.high):
            low, high = self.low, self.high
            if high - low <= self.width:
                return
            unclear = [exponent for exponent in self.trials if low < exponent < high]
            # A rate that cannot be told splits the gap: what is sure can still come closer to it.
            ends = [(low, high)]
            if unclear:
                ends = [(low, min(unclear)), (max(unclear), high)]
            start, end = max(ends, key=lambda gap: gap[1] - gap[0])
            if unclear and end - start <= self.width / 2:
                # Nothing more is sure; the estimate still gets as close as was asked for.
                start, end, _ = self._crossed()
                if end - start <= self.width:
                    return
            self.visit((start + end) / 2)

    def crossing(self) -> float:
        """Return where the greatest ratio of a latency to its limit crosses 1, as an exponent."""
        below, above, share = self._crossed()
        return below + (above - below) * share if share else below

    def _crossed(self) -> tuple[float, float, float]:
        """Return the rates between which the ratio crosses 1, and at what share of the way."""
        low, high = self.low, self.high
        # Always between the same rates, whichever others were tried: a looser SLO is never
        # answered with a lower rate because of what lies between two of them.
        step = 2.0 ** math.floor(math.log2(self.width))
        ratio = {
            exponent: trial.worst
            for exponent, trial in sorted(self.trials.items())
            if exponent % step == 0 and low - step < exponent < high + step
        }
        # The ends are surely below and above; between them, the last estimate below counts.
        passed = [each for each in ratio if each <= low or (ratio[each] <= 1 and each < high)]
        below = max(passed, default=-math.inf)
        above = min((each for each in ratio if each > below), default=math.inf)
        if not (math.isfinite(below) and math.isfinite(above)):
            return below, above, 0.0
        lower, upper = math.log(max(ratio[below], 1e-9)), math.log(max(ratio[above], 1e-9))
        is_between = lower < 0 < upper < math.inf
        return below, above, -lower / (upper - lower) if is_between else 0.0

    def answer(self) -> Answer:
        """Return what is known."""
        first, last = self.trials[min(self.trials)], self.trials[max(self.trials)]
        if self.high - self.low <= self.width:
            return "found"
        if self.low == -math.inf and first.verdict == "misses":
            return "no rate"
        # Requests that arrive at once are one sample, but nothing faster can come.
        is_met = last.verdict == "meets" or all(each.attainment == 1 for each in last.assessments)
        return "every rate" if self.high == math.inf and is_met else "cannot tell"

    def capacity(self, own_rate: float, slo: Slo) -> Capacity:
        """Return the answer and what it rests on."""
        answer = self.answer()
        extremes = {"every rate": math.inf, "no rate": 0.0}
        return Capacity(
            rate=extremes.get(answer, own_rate * 2.0 ** self.crossing()),
            low=own_rate * 2.0**self.low,
            high=own_rate * 2.0**self.high,
            answer=answer,
            curve=_curve(self.trials, own_rate),
            slo=slo,
            notes=self.notes(answer),
            num_runs=sum(len(trial.observations) for trial in self.trials.values()),
            num_reused=sum(trial.num_reused for trial in self.trials.values()),
        )

    def notes(self, answer: Answer) -> tuple[str, ...]:
        """Return what limits the answer."""
        if answer == "every rate":
            return ("even when all requests arrive at once; use more requests or a stricter SLO",)
        crossing = self.crossing()
        at_answer = max((each for each in self.trials if each <= crossing), default=None)
        trial = self.trials[min(self.trials) if at_answer is None else at_answer]
        notes = [_refused(trial)] if trial.figure("refused") else []
        if answer == "no rate":
            return (*notes, _at_least(trial))
        if at_answer is not None:
            notes += notes_of_length(trial)
        if self.low > -math.inf:
            at_low = self.trials[self.low].assessments
            notes += [note for each in at_low for note in each.ratio.notes]
        if answer == "cannot tell":
            unclear = [each for each in self.trials.values() if each.verdict == "cannot tell"]
            few = {note for each in unclear for one in each.assessments for note in one.ratio.notes}
            notes += [*sorted(few)[:1], "use more requests or max_replications"]
        return tuple(dict.fromkeys(notes))


def _refused(trial: Trial) -> str:
    share = trial.figure("refused") / trial.figure("num_requests")
    return f"{share:.2%} of the requests are refused, at any rate"


def _at_least(trial: Trial) -> str:
    """Return which latency is too long however few requests arrive."""
    worst = max(trial.assessments, key=lambda each: each.ratio.estimate)
    requirement, ratio = worst.requirement, worst.ratio.estimate
    if not math.isfinite(ratio):
        return f"even when requests are alone, some never meet {requirement}"
    unit = " times the limit" if requirement.name == "fraction" else " s"
    got = digits(ratio * requirement.scale) + unit
    return f"even when requests are alone, {requirement.name} is {got}"


def _curve(trials: Mapping[float, Trial], own_rate: float) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for exponent, trial in sorted(trials.items()):
        row: dict[str, Any] = {
            "rate": own_rate * 2.0**exponent,
            "verdict": trial.verdict,
            "num_runs": len(trial.observations),
        }
        for each in trial.assessments:
            row |= columns_of(each)
        for name in ("request_throughput", "output_token_throughput", "utilisation"):
            row[name] = trial.figure(name)
        rows.append(row)
    return pd.DataFrame(rows)
