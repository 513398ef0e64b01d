"""One function per plot: ``(result, ax=None, **options) -> Axes``.

A function named in ``__all__`` is a plot of every result: ``result.plot.cdf("ttft")`` calls
``cdf(result, "ttft")``. Plots are readable in black and white: line styles, markers and hatches
differ as well as colours, which are those of Okabe and Ito (2008). No style setting is changed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.drawing import (
    ABOVE,
    BATCH_KINDS,
    BLUE,
    COLOURS,
    DEFAULT_BATCHES,
    GREEN,
    LINE_STYLES,
    MARKS,
    MAX_BARS,
    MAX_NUMBERED_ROWS,
    MAX_ROW_LABELS,
    MAX_STEPS,
    NUM_SPANS,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    count,
    draw_steps,
    label_of,
    make_axes,
    make_logarithmic,
    mark_look,
    marks_of,
    name_of,
    say_empty,
    unit_of,
)
from vidur_simpy.errors import ConfigError
from vidur_simpy.operator_plot import operators
from vidur_simpy.series import (
    distribution,
    distribution_steps,
    load_of_requests,
    numbers,
    round_window,
    sampled_load,
    windowed_quantiles,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["cdf", "composition", "gantt", "operators", "quantiles", "timeline"]


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
        ax.legend(loc="upper right" if complementary else "lower right", fontsize="small")
    else:
        say_empty(ax, f"no request has a value of {metric}")
    what = "output tokens" if metric == "itl" else "requests"
    if complementary:
        ax.set_yscale("log")
        ax.set_ylabel(f"share of {what} at or above")
    else:
        ax.set_ylim(0, 1.03)
        ax.set_ylabel(f"share of {what} at or below")
    if log and len(values) and values[-1] > 0:
        make_logarithmic(ax)
    elif len(values) and values[0] >= 0:
        ax.set_xlim(left=0)
    ax.set_xlabel(label_of(metric))
    ax.set_title(f"Distribution of the {name_of(metric)}")
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
    ax = make_axes(ax)
    if len(values):
        window = window or round_window(arrived_at)
        middles, rows = windowed_quantiles(arrived_at, values, window, list(MARKS.values()))
        looks = (("p50", BLUE, "o-"), ("p90", ORANGE, "s--"), ("p99", VERMILLION, "^:"))
        for (name, colour, look), row in zip(looks, rows, strict=True):
            ax.plot(middles, row, look, color=colour, markersize=3.5, label=name)
        ax.set_ylim(bottom=min(0.0, float(values.min())))
        ax.legend(fontsize="small")
        ax.set_title(f"{name_of(metric).capitalize()}, by windows of {window:g} s")
    else:
        say_empty(ax, f"no request has a value of {metric}")
        ax.set_title(name_of(metric).capitalize())
    ax.set_xlabel("arrival (s)")
    ax.set_ylabel(label_of(metric))
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
    ax = make_axes(ax)
    has_samples = len(result.timeline) > 0
    load = sampled_load(result) if has_samples else load_of_requests(result.requests)
    time = load["time"].to_numpy()
    lines = [
        draw_steps(ax, time, load["running"].to_numpy(), "-", BLUE, "running"),
        draw_steps(ax, time, load["waiting"].to_numpy(), "--", VERMILLION, "waiting"),
    ]
    if has_samples:
        right = ax.twinx()
        usage = 100 * load["usage"].to_numpy()
        lines.append(draw_steps(right, time, usage, ":", GREEN, "KV cache (right axis)"))
        right.set_ylim(0, 105)
        right.set_ylabel("KV cache in use (%)")
    if not len(load):
        say_empty(ax, "no request arrived")
    ax.set_ylim(0, 1.05 * max(1.0, load["running"].max(), load["waiting"].max()))
    ax.set_xlabel("time (s)")
    ax.set_ylabel("requests")
    title = f"Load of {count(len(result.replicas), 'replica')}"
    if len(time) > MAX_STEPS:
        title += f", mean and range per {digits((time[-1] - time[0]) / NUM_SPANS)} s"
    ax.set_title(title, pad=26)
    ax.legend(handles=lines, **ABOVE, ncols=len(lines))
    ax.grid(alpha=0.3)
    return ax


def composition(result: Result, ax: Axes | None = None, *, window: float | None = None) -> Axes:
    """Draw what batches are made of over time: prompt and decode tokens of a mean batch.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("batches",)``.
    ax : Axes, optional
    window : float, optional
        Batches formed within so many seconds are averaged; by default a hundredth of the run.

    Raises
    ------
    ConfigError
        If the window is not positive.
    NotAvailableError
        If batches were not recorded.
    """
    batches = result.batches
    if window is not None and not window > 0:
        raise ConfigError(f"composition(): window = {window!r}: expected a positive number of s.")
    ax = make_axes(ax)
    formed_at = batches["scheduled_at"].to_numpy()
    if len(formed_at):
        width = window or max(formed_at[-1] - formed_at[0], 1e-9) / 100
        index = ((formed_at - formed_at[0]) // width).astype(int)
        means = batches.groupby(index)[["num_prefill_tokens", "num_decode_tokens"]].mean()
        means = means.reindex(range(index[-1] + 1), fill_value=0.0)
        edges = formed_at[0] + width * np.arange(len(means) + 1)
        decodes = means["num_decode_tokens"].to_numpy()
        total = decodes + means["num_prefill_tokens"].to_numpy()
        bars: Any = {"edgecolor": "0.2", "linewidth": 0.4, "fill": True}
        ax.stairs(
            total, edges, baseline=decodes, color=SKY_BLUE, hatch="////", label="prompt", **bars
        )
        ax.stairs(decodes, edges, color=ORANGE, label="decode", **bars)
        ax.legend(**ABOVE, ncols=2)
    else:
        say_empty(ax, "no batch was formed")
    ax.set_xlabel("time (s)")
    ax.set_ylabel("tokens of a mean batch")
    ax.set_title("What batches are made of", pad=26)
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
    ax = make_axes(ax, height=min(12.0, 1.8 + 0.35 * len(rows)))
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
        ax.legend(**ABOVE, ncols=len(BATCH_KINDS))
    else:
        say_empty(ax, "no batch in this window")
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
