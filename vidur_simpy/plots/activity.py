"""What happens over time: load, KV cache, and what batches are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.plots.drawing import (
    ABOVE,
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
    load_of_requests,
    sampled_load,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result

__all__ = ["composition", "timeline"]


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
