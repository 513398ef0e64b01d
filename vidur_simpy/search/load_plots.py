"""Figures of runs under different loads: latency over throughput, and what is within limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.plots.drawing import (
    COLOURS,
    LINE_STYLES,
    as_label,
    legend_above,
    make_axes,
    make_axis_logarithmic,
    say_empty,
)
from vidur_simpy.search.run_tables import run_table, settings_of
from vidur_simpy.search.search_plots import (
    MARKERS,
    REACH,
    groups_of,
    named,
    with_numbers,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result
    from vidur_simpy.search.capacity_search import Capacity
    from vidur_simpy.search.sweeps import Sweep

__all__ = ["plot_attainment", "plot_throughput_latency"]

# More curves than this cannot be told apart.
MAX_CURVES = 24


def plot_throughput_latency(
    runs: Sweep | Capacity | pd.DataFrame | Mapping[Any, Result],
    latency: str = "ttft_p99",
    ax: Axes | None = None,
    *,
    throughput: str = "output_token_throughput",
    by: str | Sequence[str] | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw latency against throughput, a curve per configuration, a point per arrival rate.

    Parameters
    ----------
    runs : Sweep, Capacity, DataFrame, or mapping of results
        A sweep over rates (of replications, the mean counts), a search for a capacity, a table
        with a row per run, or results by arrival rate or by name; those by name are a point each.
    latency, throughput : str
        Columns with numbers, such as those of :func:`vidur_simpy.search.figures_of`.
    ax : Axes, optional
    by : str or sequence of str, optional
        Columns whose values make a curve each; by default the settings that differ, but for the
        rate. An empty list makes one curve of all.
    limit : float, optional
        Draw a limit on the latency, in seconds.

    Raises
    ------
    ConfigError
        If there is no such column, there are too many curves, or `runs` is something else.
    """
    table = run_table("plot_throughput_latency", runs)
    rates = _rates(table)
    columns = _told_apart_by(runs, table, by, rates)
    for column in (latency, throughput, *columns):
        if column not in table:
            raise unknown_name("column", column, map(str, table.columns))
    means = _means(table, [*columns, *rates], latency, throughput)
    shown = with_numbers(means, latency, throughput)
    curves = _curves("plot_throughput_latency", shown, columns)
    ax = make_axes(ax, height=4.5)
    for index, (name, rows) in enumerate(curves):
        rows = rows.sort_values([*rates, throughput])  # in overload more arrives, but no more ends
        ax.plot(rows[throughput], rows[latency], **_curve_look(index), label=as_label(name))
    if shown.empty:
        say_empty(ax, f"no row has a number in {latency} and {throughput}")
    else:
        make_axis_logarithmic(ax.yaxis, shown[latency].to_numpy(float))
    if limit is not None:
        ax.axhline(limit, color="0.2", linestyle="--", linewidth=1, label=f"limit {limit:g} s")
    ax.set_xlabel(named(throughput))
    ax.set_ylabel(named(latency))
    ax.set_title("Latency against throughput" + _told_by(columns))
    if columns or limit is not None:
        legend_above(ax)
    ax.grid(alpha=0.3)
    return ax


def plot_attainment(
    runs: Sweep | Capacity | pd.DataFrame | Mapping[Any, Result],
    ax: Axes | None = None,
    *,
    slo: Mapping[str, float] | None = None,
    load: str | None = None,
    by: str | Sequence[str] | None = None,
    goal: float | None = None,
) -> Axes:
    """Draw the share of requests that keep to all limits against the arrival rate.

    Of one configuration the shares that keep to each limit are drawn, too, so that one sees which
    limit gives way first; several have a curve each. Of several runs at one rate it is the mean,
    in a band from the least to the greatest.

    Parameters
    ----------
    runs : Sweep, Capacity, DataFrame, or mapping of results
        A sweep with ``slo``, a search for a capacity under an SLO with a ``fraction``, a table
        with the column ``slo_attainment``, or results by arrival rate or by name; those by name
        are a point each.
    ax : Axes, optional
    slo : mapping of str to float, optional
        Limits in seconds, as :meth:`vidur_simpy.Result.slo` takes them; needed for a mapping of
        results.
    load : str, optional
        Column of the x axis; by default the arrival rate.
    by : str or sequence of str, optional
        Columns whose values make a curve each; by default the settings that differ, but for
        `load`. An empty list makes one curve of all.
    goal : float, optional
        Share to draw a line at, 0 to 1; by default what a capacity search was asked for.

    Raises
    ------
    ConfigError
        If there is no such column, there are too many curves, or nothing says which share of
        requests kept to limits.
    """
    table, goal = _attainments(runs, slo, goal)
    load = load or _load_column(table)
    columns = _told_apart_by(runs, table, by, [load])
    for column in (load, *columns):
        if column not in table:
            raise unknown_name("column", column, map(str, table.columns))
    shown = with_numbers(table, "slo_attainment", load)
    curves = [
        ("slo_attainment", name, rows) for name, rows in _curves("plot_attainment", shown, columns)
    ]
    ax = make_axes(ax, height=4.5)
    if not columns:
        curves[0] = ("slo_attainment", "all limits", shown)
        limits = [name for name in ("ttft", "tpot", "e2e", "itl") if f"slo_{name}" in table]
        if len(limits) > 1:
            curves += [(f"slo_{name}", name.upper(), shown) for name in limits]
    for index, (column, name, rows) in enumerate(curves):
        shares = 100 * rows.groupby(load)[column].agg(["mean", "min", "max"])
        look = _curve_look(index)
        if len(curves) > 1 and name == "all limits":  # which often lies on the curve of a limit
            look |= {"markersize": 9, "markerfacecolor": "none"}
        ax.plot(shares.index, shares["mean"], **look, label=as_label(name))
        if (shares["max"] > shares["min"]).any():
            band: Any = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            ax.fill_between(shares.index, shares["min"], shares["max"], **band)
    if goal is not None:
        label = f"goal {100 * goal:g}%"
        ax.axhline(100 * goal, color="0.2", linestyle="--", linewidth=1, label=label)
    if shown.empty:
        say_empty(ax, f"no row has a number in slo_attainment and {load}")
    elif (shown[load] > 0).all() and shown[load].max() > REACH * shown[load].min():
        make_axis_logarithmic(ax.xaxis, shown[load].to_numpy(float))
    ax.set_ylim(0, 105)
    is_rate = load.rpartition(".")[2] == "rate"
    ax.set_xlabel("arrival rate (requests/s)" if is_rate else named(load))
    ax.set_ylabel("requests within limits (%)")
    ax.set_title("SLO attainment against load" + _told_by(columns))
    if ax.lines:
        legend_above(ax)
    ax.grid(alpha=0.3)
    return ax


def _attainments(
    runs: Any, slo: Mapping[str, float] | None, goal: float | None
) -> tuple[pd.DataFrame, float | None]:
    """Return a table with ``slo_attainment``, and the goal."""
    table = run_table("plot_attainment", runs, slo)
    if "fraction" in table and "slo_attainment" not in table:
        table = table.rename(columns={"fraction": "slo_attainment"})
        requirements = getattr(getattr(runs, "slo", None), "requirements", ())
        fractions = [each.quantile for each in requirements if each.name == "fraction"]
        goal = fractions[0] if goal is None and fractions else goal
    if "slo_attainment" not in table:
        advice = (
            "give slo={'ttft': 0.5, 'tpot': 0.05}, in seconds"
            if isinstance(runs, Mapping)
            else "let sweep() have slo={'ttft': 0.5}, or capacity() limits with a fraction"
        )
        raise ConfigError(f"plot_attainment(): no share of requests within limits: {advice}.")
    return table, goal


def _rates(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table if str(name).rpartition(".")[2] == "rate"]


def _load_column(table: pd.DataFrame) -> str:
    rates = _rates(table)
    if len(rates) != 1:
        found = f"has {', '.join(rates)}" if rates else "has no column 'rate'"
        raise ConfigError(f"plot_attainment(): the table {found}: say load=, a column with loads.")
    return rates[0]


def _told_apart_by(
    runs: Any, table: pd.DataFrame, by: str | Sequence[str] | None, loads: Sequence[str]
) -> list[str]:
    """Return the columns whose values make a curve each: those given, or settings that differ.

    Results by name are told apart by it; those by rate are one curve.
    """
    if by is not None:
        return [by] if isinstance(by, str) else list(by)
    if isinstance(runs, Mapping):
        return ["run"] if any(isinstance(name, str) for name in runs) else []
    return [
        name
        for name in settings_of(table)
        if name not in loads and table[name].nunique(dropna=False) > 1
    ]


def _curves(where: str, table: pd.DataFrame, columns: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each curve with its name."""
    curves = groups_of(table, columns)
    if len(curves) > MAX_CURVES:
        raise ConfigError(
            f"{where}(): {', '.join(columns)} make {len(curves)} curves: expected at most "
            f"{MAX_CURVES}, so say by=, one or some of these columns, or by=[] for one curve."
        )
    return curves


def _means(table: pd.DataFrame, columns: list[str], *numbers: str) -> pd.DataFrame:
    """Return the mean over the replications of each point of a sweep."""
    if "replication" not in table or not table["replication"].any():
        return table
    keys = dict.fromkeys([*columns, "point"])
    return table.groupby([*keys], sort=False, dropna=False)[[*numbers]].mean().reset_index()


def _told_by(columns: list[str]) -> str:
    names = ", ".join(named(column) for column in columns if column != "run")
    return f", by {names}" if names else ""


def _curve_look(index: int) -> dict[str, Any]:
    return {
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "color": COLOURS[index % len(COLOURS)],
        "markersize": 5,
    }
