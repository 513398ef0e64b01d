"""Runs side by side: which of their differences are real, and which may be chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from vidur_simpy import plots
from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.plots.drawing import (
    COLOURS,
    as_label,
    legend_above,
    make_axes,
    say_empty,
    unit_of,
)
from vidur_simpy.result import NotAvailableError, Result
from vidur_simpy.statistics.differences import Pair, judge, why_not_paired
from vidur_simpy.statistics.resampling import MIN_BLOCKS
from vidur_simpy.summary import aligned, digits, html_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["Comparison", "ComparisonPlot", "compare"]

# Where differences reach this share, their axis is logarithmic beyond 10 %.
FAR = 2.0

_SHOWN_FIGURES = {
    "completed": "requests completed",
    "refused": "requests refused",
    "restarts": "restarts",
    "makespan": "makespan (s)",
    "request_throughput": "request throughput (requests/s)",
    "output_token_throughput": "output token throughput (tokens/s)",
    "utilisation": "utilisation (share)",
    "kv_cache_usage_peak": "KV-cache usage, peak (share)",
}


def compare(
    results: Mapping[str, Result],
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "e2e"),
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    confidence: float = 0.95,
    num_resamples: int = 1_000,
    seed: int = 0,
) -> Comparison:
    """Compare runs, simulated or measured, with the first of them.

    Where a run had the same requests as the first (equal lengths in the same order, arrivals
    within 10 ms), the two are compared request by request, so that what luck they share drops
    out; requests that only one of them served are left out. Otherwise it says why not, and the
    two are taken as independent.

    Parameters
    ----------
    results : mapping of str to Result
        Two or more runs with the names to show.
    metrics : sequence of str
        Numeric columns of ``result.requests``.
    quantiles : sequence of float
        Between 0 and 1; compared are the mean and these.
    confidence : float
        Of all intervals together: with this confidence each of them holds its true difference.
    num_resamples : int
        Draws behind the intervals; at least 100.
    seed : int
        Of the draws; equal seeds give equal intervals.

    Raises
    ------
    ConfigError
        If there are fewer than two runs, one is no Result, there is no such metric, or a number
        is out of range.

    Notes
    -----
    Blocks of neighbouring requests are drawn with replacement, as long as latencies resemble each
    other. This assumes that the run is in steady state and many blocks long (a note says where it
    is not), and that it is the luck of arrivals, lengths and timing that varies: nothing is said
    of other workloads or of errors in the model of execution times. A quantile with too few
    requests (368 for a p99 at 95 %) has no interval.

    Of 200 comparisons of like with like, 3 to 7 % found a difference, with 2,000 requests whose
    latencies correlate with the next by up to 0.9; 14 % at 0.97, and 15 to 33 % where 500 requests
    are too few and the note says so (``python tests/benchmarks/comparison_coverage.py``).

    Examples
    --------
    >>> import vidur_simpy as vs
    >>> workload = vs.Workload(vs.Poisson(6.0), vs.FixedLengths(400, 40), num_requests=100)
    >>> results = {
    ...     name: vs.simulate(vs.Cluster(replica_scheduler=scheduler), workload)
    ...     for name, scheduler in (("vLLM", vs.Vllm()), ("Sarathi", vs.Sarathi(chunk_size=128)))
    ... }
    >>> comparison = compare(results, quantiles=[0.5])
    >>> comparison.reasons  # none: request by request
    {}
    >>> comparison.table.loc[("ttft", "mean", "Sarathi"), "verdict"]
    'higher'
    """
    runs = _checked_runs(results)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    _check_numbers(quantiles, confidence, num_resamples)
    baseline, *others = runs
    reasons = {}
    rows: list[dict[str, Any]] = []
    differences = []
    too_short = []
    blocks_least = math.inf
    rng = np.random.default_rng(seed)
    for name in others:
        reason = why_not_paired(runs[baseline], runs[name])
        if reason:
            reasons[name] = reason
        pair = Pair(runs[baseline], runs[name], metrics, num_resamples, rng, not reason)
        for metric in metrics:
            made, drawn = pair.differences(metric, quantiles, confidence)
            place = {"metric": metric, "result": name}
            rows.extend(place | row for row in made)
            differences.append(drawn)
        blocks_least = min(blocks_least, pair.num_blocks)
        if pair.is_cut:
            too_short.append(repr(name))
    judge(rows, np.concatenate(differences, axis=1), int(blocks_least), confidence)
    notes = (_TOO_SHORT + ", ".join(too_short),) if too_short else ()
    return Comparison(runs, rows, reasons, confidence, notes)


_TOO_SHORT = (
    "latencies resemble each other over more than a "
    f"{MIN_BLOCKS}th of the run (overload, warm-up, or too few requests), so intervals are too "
    "narrow: those of "
)


class Comparison:
    """What `compare` found; shows itself as text and html.

    Attributes
    ----------
    results : dict of str to Result
        The runs, by name.
    baseline : str
        Name of the run that the others are compared with.
    reasons : dict of str to str
        Why a run is not compared request by request, for those that are not.
    confidence : float
        Of all intervals together.
    notes : tuple of str
        What makes intervals doubtful.
    table : DataFrame
        Indexed by metric, statistic and result: ``baseline`` and ``value`` in the unit of the
        metric, their ``difference`` with its interval from ``low`` to ``high`` and as a share of
        the baseline (``relative``), the ``count`` of requests behind it, ``is_real`` and the
        ``verdict``: lower, higher, not distinguishable, equal, or too few requests.
    figures : DataFrame
        The figures of each run (`Result.figures`), without intervals; a column per run.
    """

    def __init__(
        self,
        results: dict[str, Result],
        rows: Sequence[Mapping[str, Any]],
        reasons: dict[str, str],
        confidence: float,
        notes: tuple[str, ...],
    ) -> None:
        import pandas as pd

        self.results = results
        self.baseline = next(iter(results))
        self.reasons = reasons
        self.confidence = confidence
        self.notes = notes
        table = pd.DataFrame(list(rows)).set_index(["metric", "statistic", "result"])
        self.table = table[list(_COLUMNS)]
        self.figures = pd.DataFrame({name: run.figures for name, run in results.items()})

    def __repr__(self) -> str:
        num_real = int(self.table["is_real"].sum())
        return (
            f"<Comparison of {len(self.results)} results with {self.baseline!r}: "
            f"{num_real} of {len(self.table)} differences are real>"
        )

    def __str__(self) -> str:
        differences = aligned([_HEADER, *self._cells()])
        figures = aligned([["", *self.results], *self._figure_cells()])
        return "\n".join([self._heading(), "", *differences, "", *figures, "", *self._remarks()])

    def _repr_html_(self) -> str:
        """Return the same as html tables; names are escaped."""
        import html

        remarks = [self._heading(), *self._remarks()]
        paragraphs = [f"<p>{html.escape(remark)}</p>" for remark in remarks]
        differences = html_table(self._cells(), _HEADER)
        figures = html_table(self._figure_cells(), ["", *self.results])
        return paragraphs[0] + differences + figures + "".join(paragraphs[1:])

    @property
    def plot(self) -> ComparisonPlot:
        """Figures: ``comparison.plot.cdf("ttft")`` and ``comparison.plot.differences()``."""
        return ComparisonPlot(self)

    def _heading(self) -> str:
        return f"Differences from {self.baseline!r}, intervals of {self.confidence:.0%} together"

    def _remarks(self) -> list[str]:
        """Return how the runs were compared, and what makes that doubtful."""
        paired = [name for name in self.results if name not in (self.baseline, *self.reasons)]
        remarks = []
        if paired:
            names = ", ".join(map(repr, paired))
            remarks.append(f"Compared request by request: {names}.")
        remarks += [
            f"Not paired: {name!r} had another workload ({reason})."
            for name, reason in self.reasons.items()
        ]
        return remarks + [f"Note: {note}." for note in self.notes]

    def _cells(self) -> list[list[str]]:
        return [
            [
                f"{metric} {statistic}{_in_brackets(unit_of(metric))}",
                result,
                digits(row["baseline"]),
                digits(row["value"]),
                _signed(row["difference"], digits),
                f"{_signed(row['low'], digits)} to {_signed(row['high'], digits)}",
                _signed(row["relative"], lambda share: f"{share:.1%}"),
                row["verdict"],
            ]
            for (metric, statistic, result), row in zip(
                self.table.index, self.table.to_dict("records"), strict=True
            )
        ]

    def _figure_cells(self) -> list[list[str]]:
        return [
            [label, *(_plain(run.figures[name]) for run in self.results.values())]
            for name, label in _SHOWN_FIGURES.items()
        ]


class ComparisonPlot:
    """Figures of a comparison, each ``(..., ax=None) -> Axes``."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __getattr__(self, name: str) -> NoReturn:
        known = [each for each in dir(type(self)) if not each.startswith("_")]
        # An AttributeError, which is what copying and display hooks expect of a missing name.
        raise NotAvailableError(str(unknown_name("plot of a comparison", name, known)))

    def cdf(
        self,
        metric: str = "ttft",
        ax: Axes | None = None,
        *,
        complementary: bool = False,
        log: bool = False,
    ) -> Axes:
        """Draw the distributions of a metric in all runs, as `plots.cdf` does for one."""
        ax = make_axes(ax)
        for name, result in self._comparison.results.items():
            plots.cdf(
                result,
                metric,
                ax,
                complementary=complementary,
                log=log,
                label=as_label(name),
            )
        return ax

    def differences(self, ax: Axes | None = None) -> Axes:
        """Draw each difference as a share of the baseline, with its interval.

        Differences that are real have a filled mark, others a hollow one.
        """
        table = self._comparison.table.reset_index()
        labels = [f"{row.metric} {row.statistic}" for row in table.itertuples()]
        places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
        others = list(dict.fromkeys(table["result"]))
        ax = make_axes(ax, height=1.6 + 0.32 * max(1, len(places)) * max(1, len(others)) ** 0.5)
        place = np.array([places[label] for label in labels], dtype=np.float64)
        for index, name in enumerate(others):
            rows = (table["result"] == name).to_numpy()
            offset = 0.6 * ((index + 0.5) / len(others) - 0.5)
            _draw_differences(ax, table[rows], place[rows] + offset, index, name)
        if not table["relative"].notna().any():
            say_empty(ax, "there is nothing to compare")
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set_yticks(list(places.values()), list(places))
        ax.set_ylim(len(places) - 0.5, -0.5)
        ax.set_xlabel(f"difference from {as_label(self._comparison.baseline)} (%)")
        ax.set_title("Differences, filled where they are real")
        legend_above(ax)
        if (table["relative"].abs() > FAR).any():
            # A tenfold latency beside one that is 3 % longer.
            ax.set_xscale("symlog", linthresh=10)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.grid(axis="x", alpha=0.3)
        return ax


_HEADER = [
    "",
    "result",
    "baseline",
    "value",
    "difference",
    "interval",
    "relative",
    "verdict",
]
_COLUMNS = (
    "baseline",
    "value",
    "difference",
    "low",
    "high",
    "relative",
    "count",
    "is_real",
    "verdict",
)
_MARKERS = "os^Dv"


def _checked_runs(results: Mapping[str, Result]) -> dict[str, Result]:
    if not isinstance(results, Mapping) or len(results) < 2:
        raise ConfigError(
            'compare() needs two results or more with their names: compare({"vLLM": a, "Sarathi": '
            "b})."
        )
    for name, result in results.items():
        if not isinstance(result, Result):
            raise ConfigError(
                f"compare(): {name!r} is a {type(result).__name__}: expected a Result."
            )
    return {str(name): result for name, result in results.items()}


def _check_numbers(quantiles: Sequence[float], confidence: float, num_resamples: int) -> None:
    for name, value in (("confidence", confidence), *(("quantiles", q) for q in quantiles)):
        if not 0 < value < 1:
            raise ConfigError(f"compare(): {name} has {value!r}: expected between 0 and 1.")
    if num_resamples < 100:
        raise ConfigError(f"compare(): num_resamples = {num_resamples!r}: expected 100 or more.")


def _draw_differences(
    ax: Axes, rows: pd.DataFrame, place: NDArray[np.float64], index: int, name: str
) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
    relative = 100 * rows["relative"].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        half = 100 * (rows["high"] - rows["difference"]).to_numpy() / rows["baseline"].to_numpy()
    look: Any = {"fmt": "none", "ecolor": colour, "capsize": 3, "linewidth": 1.2}
    is_known = np.isfinite(half)
    ax.errorbar(relative[is_known], place[is_known], xerr=half[is_known], **look)
    is_real = rows["is_real"].to_numpy()
    for chosen, face in ((is_real, colour), (~is_real, "white")):
        ax.plot(relative[chosen], place[chosen], marker, color=colour, markerfacecolor=face)
    ax.plot([], [], marker, color=colour, label=as_label(name))


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else digits(value)


def _in_brackets(unit: str) -> str:
    return f" ({unit.strip()})" if unit else ""


def _signed(value: float, form: Callable[[float], str]) -> str:
    if math.isnan(value):
        return "-"
    return ("+" if value > 0 else "") + form(value)
