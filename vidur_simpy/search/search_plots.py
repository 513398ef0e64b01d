"""Figures of searches: latency over rate, and which configurations are worth considering."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import unknown_name
from vidur_simpy.plots.drawing import (
    ABOVE,
    BLUE,
    COLOURS,
    GREEN,
    VERMILLION,
    legend_above,
    make_axes,
    make_axis_logarithmic,
    say_empty,
)
from vidur_simpy.search.fronts import as_table, pareto
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result
    from vidur_simpy.search.capacity_search import Capacity
    from vidur_simpy.search.slo import Requirement

__all__ = [
    "MARKERS",
    "REACH",
    "capacity_curve",
    "groups_of",
    "named",
    "plot_front",
    "with_numbers",
]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LOOKS = {"meets": ("o", BLUE), "misses": ("X", VERMILLION), "cannot tell": ("s", "white")}
# Latencies that are further from the limit are not shown.
REACH = 30.0


def capacity_curve(
    found: Capacity, ax: Axes | None = None, *, requirement: str | None = None
) -> Axes:
    """Draw latency over rate, as `Capacity.plot` describes it."""
    chosen = _requirement(found, requirement)
    column, unit = _column(chosen), "ratio" if chosen.name == "fraction" else "s"
    curve = found.curve
    limit = 1.0 if chosen.name == "fraction" else chosen.scale
    ax = make_axes(ax)
    rate = curve["rate"].to_numpy()
    estimate = curve[column].to_numpy()
    # Ends that are infinite or far off end at the edge of the figure.
    shown = estimate[np.isfinite(estimate)]
    floor = min(limit, shown.min(initial=limit)) / 2
    ceiling = 2 * max(limit, min(limit * REACH, shown.max(initial=limit)))
    low, high, middle = (
        np.clip(curve[name].to_numpy(), floor, ceiling)
        for name in (f"{column}_low", f"{column}_high", column)
    )
    ax.plot(rate, middle, "-", color="0.6", linewidth=1, zorder=1)
    for verdict, (marker, face) in LOOKS.items():
        mask = (curve["verdict"] == verdict).to_numpy()
        if mask.any():
            bars = np.abs(np.stack([middle - low, high - middle])[:, mask])
            label = f"surely {verdict}" if verdict != "cannot tell" else verdict
            look: Any = {"markerfacecolor": face, "markeredgecolor": "0.2", "capsize": 2}
            ax.errorbar(
                rate[mask], middle[mask], bars, fmt=marker, ecolor="0.5", label=label, **look
            )
    ax.axhline(limit, color="0.2", linestyle="--", linewidth=1)
    ax.annotate(
        f"limit {limit:g} {unit}" if unit == "s" else "limit",
        (0.01, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize="small",
    )
    if 0 < found.rate < math.inf:
        ax.axvspan(max(found.low, rate.min()), min(found.high, rate.max()), color=GREEN, alpha=0.2)
        ax.axvline(
            found.rate, color=GREEN, linestyle="-.", label=f"{digits(found.rate)} requests/s"
        )
    make_axis_logarithmic(ax.xaxis, rate)
    make_axis_logarithmic(ax.yaxis, np.array([floor, ceiling]))
    ax.set_ylim(floor, ceiling)
    ax.set_xlabel("arrival rate (requests/s)")
    name = "worst ratio of latency to limit" if unit == "ratio" else f"{chosen.name} ({unit})"
    ax.set_ylabel(name)
    title = {"every rate": ": every rate meets it", "no rate": ": no rate meets it"}
    ax.set_title(f"Capacity under {chosen}{title.get(found.answer, '')}", pad=26, fontsize="medium")
    ax.legend(**ABOVE, ncols=4)
    ax.grid(alpha=0.3)
    return ax


def plot_front(
    table: pd.DataFrame | Mapping[str, Result] | Sequence[Result] | Any,
    x: str,
    y: str,
    ax: Axes | None = None,
    *,
    maximise: Collection[str] = (),
    by: str | None = None,
    label: str | Sequence[str] | None = None,
    eligible: Sequence[bool] | None = None,
) -> Axes:
    """Draw configurations as points, and the front of those that no other beats.

    Parameters
    ----------
    table : DataFrame, object with a `table`, or several Result
        A row per configuration, as :func:`vidur_simpy.pareto` takes them: a `Sweep`, a
        `Recommendation`, or results.
    x, y : str
        Columns with numbers. Less is better, except as `maximise` says.
    ax : Axes, optional
    maximise : collection of str
        Which of the two are better when greater.
    by : str, optional
        Column whose values give the points different markers and colours.
    label : str or sequence of str, optional
        Columns that are written at the points of the front.
    eligible : sequence of bool, optional
        Which rows may be on the front, such as those that meet an SLO; all if None.

    Raises
    ------
    ConfigError
        If there is no such column, or `table` is something else.
    """
    table = as_table(table)
    among = table if eligible is None else table.loc[np.asarray(eligible, dtype=bool)]
    front = pareto(among, x, y, maximise=maximise)
    ax = make_axes(ax, height=4.5)
    shown = with_numbers(table, x, y)
    if shown.empty:
        say_empty(ax, f"no row has a number in {x} and {y}")
        return ax
    groups = groups_of(shown, [] if by is None else [by])
    for index, (name, rows) in enumerate(groups):
        ax.plot(
            rows[x],
            rows[y],
            MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            alpha=0.75,
            markeredgecolor="0.2",
            markersize=5,
            label=name or "configurations",
        )
    # Between two points of the front, what can be had is the worse of both.
    worse_first = x in maximise
    where = "steps-pre" if worse_first else "steps-post"
    ax.plot(front[x], front[y], color="0.2", drawstyle=where, linewidth=1, zorder=0, label="front")
    ax.plot(front[x], front[y], "o", color="0.2", markersize=10, markerfacecolor="none")
    _write_labels(ax, front, x, y, [label] if isinstance(label, str) else list(label or ()))
    for axis, column in ((ax.xaxis, x), (ax.yaxis, y)):
        values = shown[column].to_numpy(float)
        if values.min() > 0 and values.max() > REACH * values.min():
            make_axis_logarithmic(axis, values)
    ax.set_xlabel(named(x))
    ax.set_ylabel(named(y))
    ax.set_title(f"{len(front)} of {len(shown)} configurations are not beaten")
    ax.margins(x=0.08)
    legend_above(ax)
    ax.grid(alpha=0.3)
    return ax


def _requirement(found: Capacity, name: str | None) -> Requirement:
    requirements = {each.name: each for each in found.slo.requirements}
    if name is not None:
        if name not in requirements:
            raise unknown_name("limit of the SLO", name, requirements)
        return requirements[name]
    # Of the rate closest to the answer, the limit that is closest to being missed.
    curve = found.curve
    goal = found.rate if 0 < found.rate < math.inf else float(curve["rate"].median())
    row = curve.iloc[int((curve["rate"] - goal).abs().argmin())]
    return max(requirements.values(), key=lambda each: row[_column(each)] / each.scale)


def _column(requirement: Requirement) -> str:
    return (
        requirement.name.replace(":", "_") if requirement.name != "fraction" else "fraction_ratio"
    )


def with_numbers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the rows that have a finite number in some columns."""
    is_there = np.isfinite(table[list(columns)].to_numpy(np.float64)).all(axis=1)
    kept: pd.DataFrame = table.loc[is_there]
    return kept


def groups_of(table: pd.DataFrame, columns: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each combination of some columns, with its name."""
    for column in columns:
        if column not in table:
            raise unknown_name("column", column, map(str, table.columns))
    if not columns:
        return [("", table)]
    groups = table.groupby(columns, sort=False, dropna=False)
    return [(", ".join(map(str, key)), rows) for key, rows in groups]


def named(column: str) -> str:
    """Return a column in words, with its unit."""
    words = column.rpartition(".")[2].split("_")
    units = {"ttft": "s", "tpot": "s", "itl": "s", "e2e": "s"}
    unit = next((unit for word, unit in units.items() if word in words), "")
    if "throughput" in words:
        unit = "requests/s" if "request" in words else "tokens/s"
    text = " ".join(word.upper() if word in units else word for word in words)
    return f"{text} ({unit})" if unit else text


def _write_labels(ax: Axes, front: pd.DataFrame, x: str, y: str, columns: list[str]) -> None:
    for column in columns:
        if column not in front:
            raise unknown_name("column", column, map(str, front.columns))
    for _, row in front.iterrows() if columns else ():
        text = ", ".join(str(row[column]) for column in columns)
        place: Any = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": "x-small"}
        ax.annotate(text, (float(row[x]), float(row[y])), **place)
