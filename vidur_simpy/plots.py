"""One function per plot: ``(result, ax=None, **options) -> Axes``.

A function named in ``__all__`` is a plot of every result: ``result.plot.cdf("ttft")`` calls
``cdf(result, "ttft")``. Plots are readable in black and white: line styles, markers and hatches
differ as well as colours, which are those of Okabe and Ito (2008). No style setting is changed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import ConfigError
from vidur_simpy.series import (
    distribution,
    distribution_steps,
    load_of_requests,
    numbers,
    round_window,
    sampled_load,
    spans,
    windowed_quantiles,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["cdf", "gantt", "quantiles", "timeline"]

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY_BLUE, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, VERMILLION, GREEN, BLACK, PURPLE, ORANGE, SKY_BLUE)
LINE_STYLES = ("-", "--", "-.", ":")
NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end-to-end latency",
    "num_prefill_tokens": "prompt length",
    "num_decode_tokens": "output length",
}
MARKS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Kinds of batches: colour and hatch of their bars.
BATCH_KINDS = {
    "prefill only": (SKY_BLUE, "////"),
    "prefill and decode": (GREEN, ".."),
    "decode only": (ORANGE, ""),
}
MAX_STEPS = 1_000
NUM_SPANS = 300
MAX_BARS = 50_000
DEFAULT_BATCHES = 60
MAX_ROW_LABELS = 40
MAX_NUMBERED_ROWS = 24
# A legend between the title and the axes, where it hides no line.
_ABOVE: Any = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "frameon": False,
    "fontsize": "small",
}


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
        Where to draw; curves of several results fit on one.
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
    ax = _axes(ax)
    if len(values):
        index = sum(line.get_gid() == "cdf" for line in ax.lines)
        colour = COLOURS[index % len(COLOURS)]
        style = LINE_STYLES[index % len(LINE_STYLES)]
        marks = _marks(result, metric, values)
        listed = ", ".join(f"{name} {digits(value)}" for name, value in marks.items())
        x, y = distribution_steps(values, shares, complementary=complementary)
        drawstyle = "steps-pre" if complementary else "steps-post"
        (line,) = ax.plot(x, y, style, color=colour, drawstyle=drawstyle)
        line.set_gid("cdf")
        line.set_label(f"{label}: {listed}{_unit(metric)}" if label else listed + _unit(metric))
        at = np.array(list(marks.values()))
        below = np.searchsorted(values, at, side="left" if complementary else "right")
        heights = np.concatenate(([0.0], shares))[below]
        ax.plot(at, 1 - heights if complementary else heights, "o", **_mark_look(colour))
        ax.legend(loc="upper right" if complementary else "lower right", fontsize="small")
    else:
        _say_empty(ax, f"no request has a value of {metric}")
    what = "output tokens" if metric == "itl" else "requests"
    if complementary:
        ax.set_yscale("log")
        ax.set_ylabel(f"share of {what} at or above")
    else:
        ax.set_ylim(0, 1.03)
        ax.set_ylabel(f"share of {what} at or below")
    if log and len(values) and values[-1] > 0:
        _make_logarithmic(ax)
    elif len(values) and values[0] >= 0:
        ax.set_xlim(left=0)
    ax.set_xlabel(_label(metric))
    ax.set_title(f"Distribution of the {_name(metric)}")
    ax.grid(alpha=0.3)
    return ax


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
        If there is no such metric, or the window is not positive.
    """
    if window is not None and not window > 0:
        raise ConfigError(f"quantiles(): window = {window!r}: expected a positive number of s.")
    values = numbers(result.requests, metric)
    arrived_at = result.requests["arrived_at"].to_numpy()[~np.isnan(values)]
    values = values[~np.isnan(values)]
    ax = _axes(ax)
    if len(values):
        window = window or round_window(arrived_at)
        middles, rows = windowed_quantiles(arrived_at, values, window, list(MARKS.values()))
        looks = (("p50", BLUE, "o-"), ("p90", ORANGE, "s--"), ("p99", VERMILLION, "^:"))
        for (name, colour, look), row in zip(looks, rows, strict=True):
            ax.plot(middles, row, look, color=colour, markersize=3.5, label=name)
        ax.set_ylim(bottom=min(0.0, float(values.min())))
        ax.legend(fontsize="small")
        ax.set_title(f"{_name(metric).capitalize()}, by windows of {window:g} s")
    else:
        _say_empty(ax, f"no request has a value of {metric}")
        ax.set_title(_name(metric).capitalize())
    ax.set_xlabel("arrival (s)")
    ax.set_ylabel(_label(metric))
    ax.grid(alpha=0.3)
    return ax


def timeline(result: Result, ax: Axes | None = None) -> Axes:
    """Draw requests running and waiting, summed over replicas, and the share of KV cache in use.

    The lines hold each replica's last sample until its next one, or until no request is on it.
    Where there are too many steps to see, they are means over short spans of time, in a band from
    the least to the greatest value. If there are no samples they come from the requests, without
    the KV cache.

    Parameters
    ----------
    result : Result
    ax : Axes, optional
        Gets a second y axis for the KV cache, mean over the replicas, in percent.
    """
    ax = _axes(ax)
    has_samples = len(result.timeline) > 0
    load = sampled_load(result) if has_samples else load_of_requests(result.requests)
    time = load["time"].to_numpy()
    lines = [
        _draw_steps(ax, time, load["running"].to_numpy(), "-", BLUE, "running"),
        _draw_steps(ax, time, load["waiting"].to_numpy(), "--", VERMILLION, "waiting"),
    ]
    if has_samples:
        right = ax.twinx()
        usage = 100 * load["usage"].to_numpy()
        lines.append(_draw_steps(right, time, usage, ":", GREEN, "KV cache (right axis)"))
        right.set_ylim(0, 105)
        right.set_ylabel("KV cache in use (%)")
    if not len(load):
        _say_empty(ax, "no request arrived")
    ax.set_ylim(0, 1.05 * max(1.0, load["running"].max(), load["waiting"].max()))
    ax.set_xlabel("time (s)")
    ax.set_ylabel("requests")
    title = f"Load of {_count(len(result.replicas), 'replica')}"
    if len(time) > MAX_STEPS:
        title += f", mean and range per {digits((time[-1] - time[0]) / NUM_SPANS)} s"
    ax.set_title(title, pad=26)
    ax.legend(handles=lines, **_ABOVE, ncols=len(lines))
    ax.grid(alpha=0.3)
    return ax


def gantt(
    result: Result,
    ax: Axes | None = None,
    *,
    start: float | None = None,
    duration: float | None = None,
    replica_id: int | None = None,
) -> Axes:
    """Draw the batches on each pipeline stage as bars; gaps between them are idle time.

    Bars of batches with prompt tokens only, with prompt and decode tokens, and with decode tokens
    only differ in colour and hatch; a bar that has room bears the index of its batch.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("stages",)``.
    ax : Axes, optional
    start : float, optional
        Start of the window in seconds; by default the first batch.
    duration : float, optional
        Length of the window in seconds; by default about 60 batches of a replica.
    replica_id : int, optional
        Show this replica only.

    Raises
    ------
    ConfigError
        If there is no such replica, or the window has too many bars to see.
    NotAvailableError
        If stages were not recorded.
    """
    stages = result.stages
    if replica_id is not None:
        known = sorted(set(stages["replica_id"]))
        if replica_id not in known:
            raise ConfigError(f"gantt(): replica_id = {replica_id!r}: expected one of {known}.")
        stages = stages[stages["replica_id"] == replica_id]
    # A batch that was on its stage when the run stopped has no end yet.
    end_of_run = result.info.get("simulated_time", stages["ended_at"].max())
    stages = stages.assign(ended_at=stages["ended_at"].fillna(end_of_run))
    first, last = _window(stages, start, duration)
    shown = stages[(stages["ended_at"] > first) & (stages["started_at"] < last)]
    if len(shown) > MAX_BARS:
        raise ConfigError(
            f"gantt(): the window of {digits(last - first)} s has {len(shown)} bars: expected at "
            f"most {MAX_BARS}; give a shorter duration or one replica_id."
        )
    places = stages[["replica_id", "stage_id"]].drop_duplicates()
    rows = sorted(zip(places["replica_id"], places["stage_id"], strict=True))
    ax = _axes(ax, height=min(12.0, 1.8 + 0.35 * len(rows)))
    ax.set_xlim(first, last)
    _draw_bars(ax, shown, rows)
    is_deep = bool((stages["stage_id"] > 0).any())
    names = [f"replica {r}, stage {s}" if is_deep else f"replica {r}" for r, s in rows]
    every = math.ceil(len(rows) / MAX_ROW_LABELS) or 1
    ax.set_yticks(range(0, len(rows), every), names[::every])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("time (s)")
    ax.set_title("Batches on their stages", pad=26)
    return ax


def _axes(ax: Axes | None, height: float = 4.0) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.0, height), layout="constrained")[1]


def _say_empty(ax: Axes, message: str) -> None:
    ax.text(0.5, 0.5, message, ha="center", va="center", transform=ax.transAxes)


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _unit(metric: str) -> str:
    """Return the unit with a space before it, or nothing."""
    unit = "s" if metric == "itl" else COLUMNS["requests"].get(metric, ("", ""))[0]
    return f" {unit}" if unit else ""


def _label(metric: str) -> str:
    unit = _unit(metric).strip()
    return f"{_name(metric)} ({unit})" if unit else _name(metric)


def _marks(result: Result, metric: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Return the quantiles that the legend of `cdf` lists."""
    if metric == "itl":
        summary = result.summary()
        return {name: summary[name].to_dict()["itl"] for name in MARKS}
    return dict(zip(MARKS, np.quantile(values, list(MARKS.values())).tolist(), strict=True))


def _mark_look(colour: str) -> dict[str, Any]:
    return {"color": colour, "markersize": 4, "markerfacecolor": "white"}


def _make_logarithmic(ax: Axes) -> None:
    """Make the x axis logarithmic with plain numbers, which do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    drawn = np.concatenate([np.asarray(line.get_xdata(), float) for line in ax.lines])
    positive = drawn[drawn > 0]
    # A curve drawn before may have set the left end to 0, which has no place on this axis.
    ax.set_xlim(positive.min() / 1.1, positive.max() * 1.1)
    low, high = ax.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_steps(
    ax: Axes,
    time: NDArray[np.float64],
    value: NDArray[np.float64],
    style: str,
    colour: str,
    label: str,
) -> Line2D:
    """Draw a step line, or where it has too many steps to see, its mean and its range."""
    if len(time) <= MAX_STEPS:
        return ax.plot(time, value, style, color=colour, drawstyle="steps-post", label=label)[0]
    middle, mean, least, greatest = spans(time, value, NUM_SPANS)
    ax.fill_between(middle, least, greatest, color=colour, alpha=0.2, linewidth=0)
    return ax.plot(middle, mean, style, color=colour, label=label)[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _window(
    stages: pd.DataFrame, start: float | None, duration: float | None
) -> tuple[float, float]:
    """Return start and end of what `gantt` shows, in seconds."""
    if duration is not None and not duration > 0:
        raise ConfigError(f"gantt(): duration = {duration!r}: expected a positive number of s.")
    if start is None:
        start = float(stages["started_at"].min()) if len(stages) else 0.0
    if duration is not None:
        return start, start + duration
    later = stages[stages["ended_at"] > start]
    if later.empty:
        return start, start + 1.0
    one = later[later["replica_id"] == later["replica_id"].iloc[0]]
    batch = one["batch_index"]
    return start, float(one.loc[batch < batch.min() + DEFAULT_BATCHES, "ended_at"].max())


def _draw_bars(ax: Axes, stages: pd.DataFrame, rows: list[tuple[int, int]]) -> None:
    from matplotlib.collections import PolyCollection

    left, right = stages["started_at"].to_numpy(), stages["ended_at"].to_numpy()
    places = zip(stages["replica_id"], stages["stage_id"], strict=True)
    number = {row: index for index, row in enumerate(rows)}
    middle = np.array([number[place] for place in places], dtype=np.float64)
    top, bottom = middle - 0.35, middle + 0.35
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1)
    has_prefill = stages["num_prefill_tokens"].to_numpy() > 0
    has_decode = stages["num_decode_tokens"].to_numpy() > 0
    chosen = (has_prefill & ~has_decode, has_prefill & has_decode, ~has_prefill)
    for (kind, (colour, hatch)), mask in zip(BATCH_KINDS.items(), chosen, strict=True):
        if mask.any():
            shapes: Any = corners[mask].reshape(-1, 4, 2)
            look: Any = {"facecolor": colour, "hatch": hatch, "edgecolor": "0.2", "linewidth": 0.4}
            ax.add_collection(PolyCollection(shapes, label=kind, **look))
    if len(stages):
        ax.legend(**_ABOVE, ncols=len(BATCH_KINDS))
    else:
        _say_empty(ax, "no batch in this window")
    if len(rows) <= MAX_NUMBERED_ROWS:
        _number_bars(ax, left, right, middle, stages["batch_index"].to_numpy())


def _number_bars(
    ax: Axes,
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    middle: NDArray[np.float64],
    batch_index: NDArray[np.int64],
) -> None:
    """Write the index of its batch on each bar that is wide enough."""
    first, last = ax.get_xlim()
    left, right = np.maximum(left, first), np.minimum(right, last)
    width = ax.get_window_extent().width / ax.figure.dpi * 72  # of the axes, in points
    room = (right - left) / (last - first) * width
    for index in np.flatnonzero(room > 6 + 5 * np.char.str_len(batch_index.astype(str))):
        ax.text(
            (left[index] + right[index]) / 2,
            middle[index],
            str(batch_index[index]),
            ha="center",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
