"""Distributions of a metric over requests, and quantiles over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.plots.drawing import (
    BLUE,
    COLOURS,
    LINE_STYLES,
    MARKS,
    ORANGE,
    VERMILLION,
    label_of,
    legend_above,
    make_axes,
    make_logarithmic,
    mark_look,
    marks_of,
    name_of,
    plain_logarithmic,
    say_empty,
    unit_of,
)
from vidur_simpy.series import (
    check_windows,
    distribution,
    distribution_steps,
    numbers,
    round_window,
    windowed_quantiles,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result

__all__ = ["cdf", "quantiles"]


def cdf(
    result: Result,
    metric: str = "ttft",
    ax: Axes | None = None,
    *,
    complementary: bool = False,
    log: bool = False,
    label: str | None = None,
) -> Axes:
    """Draw the distribution of a metric over the requests that have a value.

    Parameters
    ----------
    result : Result
    metric : str
        A numeric column of ``result.requests``, or ``"itl"`` (needs recorded tokens), whose
        distribution is over output tokens.
    ax : Axes, optional
        Where to draw; curves of several results fit on one. The title leaves room for the legend
        below it: whoever puts the legend elsewhere brings the title down with
        ``ax.set_title(ax.get_title())``.
    complementary : bool
        Draw the share that is at least x, on a logarithmic axis: it shows the tail.
    log : bool
        Make the x axis logarithmic; values that are not positive are then not seen.
    label : str, optional
        Name of the curve in the legend.

    Raises
    ------
    ConfigError
        If there is no such metric.
    """
    values, shares = distribution(result, metric)
    ax = make_axes(ax)
    if len(values):
        index = sum(line.get_gid() == "cdf" for line in ax.lines)
        colour = COLOURS[index % len(COLOURS)]
        style = LINE_STYLES[index % len(LINE_STYLES)]
        marks = marks_of(result, metric, values)
        listed = ", ".join(f"{name} {digits(value)}" for name, value in marks.items())
        x, y = distribution_steps(values, shares, complementary=complementary)
        drawstyle = "steps-pre" if complementary else "steps-post"
        (line,) = ax.plot(x, y, style, color=colour, drawstyle=drawstyle)
        line.set_gid("cdf")
        line.set_label(f"{label}: {listed}{unit_of(metric)}" if label else listed + unit_of(metric))
        at = np.array(list(marks.values()))
        below = np.searchsorted(values, at, side="left" if complementary else "right")
        heights = np.concatenate(([0.0], shares))[below]
        ax.plot(at, 1 - heights if complementary else heights, "o", **mark_look(colour))
    else:
        say_empty(ax, f"no request has a value of {metric}")
    what = "output tokens" if metric == "itl" else "requests"
    if complementary:
        _make_shares_logarithmic(ax)
        ax.set_ylabel(f"share of {what} at or above")
    else:
        ax.set_ylim(0, 1.03)
        ax.set_ylabel(f"share of {what} at or below")
    _fit_x(ax, log)
    ax.set_xlabel(label_of(metric))
    ax.set_title(f"Distribution of the {name_of(metric)}")
    curves = [line for line in ax.lines if line.get_gid() == "cdf"]
    if curves:
        legend_above(ax, curves, columns=1)
    ax.grid(alpha=0.3)
    return ax


def _fit_x(ax: Axes, log: bool) -> None:
    """Let the x axis hold every curve, from 0 on where it is linear and no value is negative."""
    drawn = np.concatenate([[], *(np.asarray(line.get_xdata(), float) for line in ax.lines)])
    if (log or ax.get_xscale() == "log") and (drawn > 0).any():
        make_logarithmic(ax)
    elif len(drawn) and drawn.min() >= 0:
        ax.set_xlim(left=0, auto=None)  # a curve that is drawn later still finds room on the right


def _make_shares_logarithmic(ax: Axes) -> None:
    """Make the y axis logarithmic, from below the least share drawn to a little above 1."""
    ax.set_yscale("log")
    plain_logarithmic(ax.yaxis, 1e-9, 1.0)
    drawn = np.concatenate([[0.2], *(np.asarray(line.get_ydata(), float) for line in ax.lines)])
    ax.set_ylim(drawn[drawn > 0].min() / 2, 1.5)


def quantiles(
    result: Result,
    metric: str = "ttft",
    ax: Axes | None = None,
    *,
    window: float | None = None,
) -> Axes:
    """Draw p50, p90 and p99 of a metric over time, by windows of arrival.

    Parameters
    ----------
    result : Result
    metric : str
        A numeric column of ``result.requests``.
    ax : Axes, optional
    window : float, optional
        Length of a window in seconds; by default a round number that makes at most 40 windows of
        25 requests or more on average. Windows without a value are gaps.

    Raises
    ------
    ConfigError
        If there is no such metric, or the window is not positive or too short to be seen.
    """
    if metric == "itl":
        raise ConfigError(
            "quantiles(): 'itl' belongs to tokens, not to requests: draw cdf('itl') or "
            "quantiles('tpot')."
        )
    values = numbers(result.requests, metric)
    arrived_at = result.requests["arrived_at"].to_numpy()[~np.isnan(values)]
    values = values[~np.isnan(values)]
    check_windows("quantiles", window, arrived_at)
    ax = make_axes(ax)
    ax.set_title(name_of(metric).capitalize())
    if len(values):
        window = window or round_window(arrived_at)
        middles, rows = windowed_quantiles(arrived_at, values, window, list(MARKS.values()))
        looks = (("p50", BLUE, "o-"), ("p90", ORANGE, "s--"), ("p99", VERMILLION, "^:"))
        for (name, colour, look), row in zip(looks, rows, strict=True):
            ax.plot(middles, row, look, color=colour, markersize=3.5, label=name)
        # Beside what an earlier call drew on the same axes.
        first, last = ax.dataLim.intervalx
        ax.set_xlim(min(middles[0], first) - window / 2, max(middles[-1], last) + window / 2)
        ax.set_ylim(bottom=min(0.0, ax.dataLim.y0), auto=None)
        ax.set_title(f"{name_of(metric).capitalize()}, by windows of {window:g} s")
        legend_above(ax)
    else:
        say_empty(ax, f"no request has a value of {metric}")
    ax.set_xlabel("arrival (s)")
    ax.set_ylabel(label_of(metric))
    ax.grid(alpha=0.3)
    return ax
