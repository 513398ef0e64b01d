"""What happens over time: load, KV cache, and what batches are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.plots.drawing import (
    ABOVE,
    BLACK,
    BLUE,
    GREEN,
    MAX_STEPS,
    NUM_SPANS,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    count,
    draw_steps,
    make_axes,
    say_empty,
)
from vidur_simpy.series import (
    check_windows,
    load_of_requests,
    preempted_at,
    round_window,
    sampled_load,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["composition", "timeline"]


def timeline(result: Result, ax: Axes | None = None) -> Axes:
    """Draw requests running and waiting, summed over replicas, and the share of KV cache in use.

    The lines hold each replica's last sample until its next one, or until no request is on it.
    Where there are too many steps to see, they are means over short spans of time, in a band from
    the least to the greatest value. If there are no samples they come from the requests, without
    the KV cache. Preemptions hang from the top, the longest bar where they were most frequent.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("batches",)`` if preemptions are to be seen; the title counts them
        in any case.
    ax : Axes, optional
        Gets a second y axis for the KV cache, mean over the replicas, in percent.
    """
    ax = make_axes(ax)
    has_samples = len(result.timeline) > 0
    load = sampled_load(result) if has_samples else load_of_requests(result.requests)
    time = load["time"].to_numpy()
    lines: list[Any] = [
        draw_steps(ax, time, load["running"].to_numpy(), "-", BLUE, "running"),
        draw_steps(ax, time, load["waiting"].to_numpy(), "--", VERMILLION, "waiting"),
    ]
    bars = []
    if len(load) and result.figures["restarts"] and "batches" in result.tables:
        bars = _hang_preemptions(ax, preempted_at(result), float(time[0]), float(time[-1]))
    lines += bars
    room = 1.2 if bars else 1.05
    if has_samples:
        right = ax.twinx()
        usage = 100 * load["usage"].to_numpy()
        lines.append(draw_steps(right, time, usage, ":", GREEN, "KV cache (right axis)"))
        right.set_ylim(0, 100 * room)
        right.set_yticks(range(0, 101, 20))
        right.set_ylabel("KV cache in use (%)")
    if not len(load):
        say_empty(ax, "every request was refused" if len(result.requests) else "no request arrived")
    # `dataLim` holds what an earlier call drew on the same axes, too.
    ax.set_ylim(0, room * max(1.0, ax.dataLim.y1))
    ax.set_xlabel("time (s)")
    ax.set_ylabel("requests")
    ax.set_title(_title_of_load(result, time), pad=26)
    ax.legend(handles=lines, **ABOVE, ncols=len(lines))
    ax.grid(alpha=0.3)
    return ax


def _title_of_load(result: Result, time: NDArray[np.float64]) -> str:
    title = f"Load of {count(len(result.replicas), 'replica')}"
    if result.figures["restarts"]:
        title += f", {count(int(result.figures['restarts']), 'preemption')}"
    if len(time) > MAX_STEPS:
        title += f", mean and range per {digits((time[-1] - time[0]) / NUM_SPANS)} s"
    return title


def _hang_preemptions(
    ax: Axes, instants: NDArray[np.float64], first: float, last: float
) -> list[Any]:
    """Draw how many there were in each short span of time, as bars that hang from the top.

    Returns what the legend shows of them, if there are any.
    """
    from matplotlib.lines import Line2D

    counts, edges = np.histogram(instants, bins=NUM_SPANS, range=(first, last))
    there = counts > 0
    if not there.any():
        return []
    length = 0.03 + 0.07 * counts[there] / counts.max()
    place: Any = {"transform": ax.get_xaxis_transform(), "color": BLACK, "linewidth": 1.5}
    middle = ((edges[:-1] + edges[1:]) / 2)[there]
    ax.vlines(middle, 1 - length, 1, **place)
    return [Line2D([], [], linestyle="", marker="|", color=BLACK, label="preemptions")]


def composition(result: Result, ax: Axes | None = None, *, window: float | None = None) -> Axes:
    """Draw what batches are made of over time: prompt and decode tokens of a mean batch.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("batches",)``.
    ax : Axes, optional
    window : float, optional
        Batches formed within so many seconds are averaged; by default a round number that makes
        at most 100 windows of five batches or more on average. Windows without one are gaps.

    Raises
    ------
    ConfigError
        If the window is not positive, or too short to be seen.
    NotAvailableError
        If batches were not recorded.
    """
    batches = result.batches
    formed_at = batches["scheduled_at"].to_numpy()
    check_windows("composition", window, formed_at)
    ax = make_axes(ax)
    title = "What batches are made of"
    if len(formed_at):
        window = window or round_window(formed_at, 100, 5)
        index = np.floor(formed_at / window).astype(np.int64)
        means = batches.groupby(index)[["num_prefill_tokens", "num_decode_tokens"]].mean()
        means = means.reindex(range(index.min(), index.max() + 1), fill_value=0.0)
        edges = window * np.arange(index.min(), index.max() + 2)
        decodes = means["num_decode_tokens"].to_numpy()
        total = decodes + means["num_prefill_tokens"].to_numpy()
        bars: Any = {"edgecolor": "0.2", "linewidth": 0.4, "fill": True}
        ax.stairs(
            total, edges, baseline=decodes, color=SKY_BLUE, hatch="////", label="prompt", **bars
        )
        ax.stairs(decodes, edges, color=ORANGE, label="decode", **bars)
        ax.legend(**ABOVE, ncols=2)
        ax.set_xlim(edges[0], edges[-1])
        title += f", by windows of {window:g} s"
    else:
        say_empty(ax, "no batch was formed")
    ax.set_xlabel("time (s)")
    ax.set_ylabel("tokens of a mean batch")
    ax.set_title(title, pad=26)
    ax.grid(alpha=0.3)
    return ax
