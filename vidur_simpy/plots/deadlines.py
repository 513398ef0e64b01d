"""Which deadlines were missed, over time or by the time that was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import unknown_name
from vidur_simpy.plots.drawing import (
    BLACK,
    ORANGE,
    legend_above,
    make_axes,
    outline,
    plain_logarithmic,
    say_empty,
)
from vidur_simpy.series import check_windows, round_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["deadline_misses"]

DUE = {"first_token_at": "first tokens", "completed_at": "completions"}
MAX_BINS = 20
MIN_REQUESTS_PER_BIN = 25


def deadline_misses(
    result: Result,
    ax: Axes | None = None,
    *,
    by: str = "deadline",
    due: str = "first_token_at",
    window: float | None = None,
) -> Axes:
    """Draw the share of deadlines that were missed, and how many deadlines there were.

    A request that was refused missed its deadline, and so did one that was not done when the run
    stopped behind it; one whose deadline is still to come then is left out.

    Parameters
    ----------
    result : Result
        With a column ``deadline`` in ``result.requests``: from the trace, or set by a scheduler,
        such as ``Mnemosyne(ordering="edf")``.
    ax : Axes, optional
        Gets a second y axis for the number of deadlines.
    by : {"deadline", "slack"}
        Over time, by windows of the deadlines; or by the time from arrival to deadline, which
        tells whether the short or the generous ones are missed.
    due : {"first_token_at", "completed_at"}
        What has to happen until the deadline. Schedulers order prefills by deadlines, so it is
        the first token if nothing else is said.
    window : float, optional
        Length of a window of time in seconds; by default a round number that makes at most 40
        windows of 25 deadlines or more on average.

    Raises
    ------
    ConfigError
        If `by` or `due` is something else, or the window is not positive or too short to be seen.
    """
    if by not in ("deadline", "slack"):
        raise unknown_name("way to order deadlines", by, ["deadline", "slack"])
    if due not in DUE:
        raise unknown_name("instant that is due", due, DUE)
    deadline, slack, is_missed = _deadlines(result, due)
    check_windows("deadline_misses", window, deadline)
    ax = make_axes(ax)
    title = "Deadlines missed"
    if len(deadline):
        values = deadline if by == "deadline" else slack
        edges = _windows(values, window) if by == "deadline" else _bins(values)
        _draw(ax, values, is_missed, edges)
        if by == "slack" and len(edges) > 2:
            ax.set_xscale("log")
            plain_logarithmic(ax.xaxis, edges[0], edges[-1])
        ax.set_xlim(edges[0], edges[-1])
        title = f"{is_missed.mean():.1%} of {len(deadline):,} {DUE[due]} after their deadline"
    else:
        say_empty(ax, "no request has a deadline")
    ax.set_xlabel("deadline (s)" if by == "deadline" else "time from arrival to deadline (s)")
    ax.set_ylabel("deadlines missed (%)")
    ax.set_title(title)
    if len(deadline):
        legend_above(ax, [*ax.patches, *ax.figure.axes[-1].lines])
    ax.grid(alpha=0.3)
    return ax


def _deadlines(
    result: Result, due: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return deadlines, the time that was given, and which were missed, of those that are known."""
    requests = result.requests
    if "deadline" not in requests:
        return np.empty(0), np.empty(0), np.empty(0, dtype=bool)
    deadline = requests["deadline"].to_numpy(np.float64, na_value=np.nan)
    done_at = requests[due].to_numpy(np.float64, na_value=np.nan)
    is_refused = (requests["refusal"] != "").to_numpy()
    ended_at = float(result.info.get("simulated_time", np.inf))
    is_missed = is_refused | (done_at > deadline) | (np.isnan(done_at) & (deadline < ended_at))
    is_known = ~np.isnan(deadline) & (is_missed | ~np.isnan(done_at))
    slack = deadline - requests["arrived_at"].to_numpy()
    return deadline[is_known], slack[is_known], is_missed[is_known]


def _windows(deadline: NDArray[np.float64], window: float | None) -> NDArray[np.float64]:
    window = window or round_window(deadline)
    first, last = np.floor(deadline.min() / window), np.floor(deadline.max() / window)
    edges: NDArray[np.float64] = window * np.arange(first, last + 2)
    return edges


def _bins(slack: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ends of bins that are equally wide on a logarithmic axis."""
    low, high = float(slack.min()), float(slack.max())
    if not 0 < low < 0.999 * high:
        return np.array([low - 0.5 * abs(low) - 1e-3, high + 0.5 * abs(high) + 1e-3])
    num_bins = max(1, min(MAX_BINS, len(slack) // MIN_REQUESTS_PER_BIN))
    return np.geomspace(low * 0.999, high * 1.001, num_bins + 1)


def _draw(
    ax: Axes,
    values: NDArray[np.float64],
    is_missed: NDArray[np.bool_],
    edges: NDArray[np.float64],
) -> None:
    totals, _ = np.histogram(values, edges)
    missed, _ = np.histogram(values[is_missed], edges)
    shares = np.divide(100.0 * missed, totals, out=np.zeros(len(totals)), where=totals > 0)
    look: Any = {"color": ORANGE, "hatch": "////", "edgecolor": "0.2", "linewidth": 0.6}
    ax.stairs(shares, edges, fill=True, label="missed", **look)
    ax.set_ylim(0, max(1.0, 1.1 * shares.max()))
    right = ax.twinx()
    heights = np.append(totals, totals[-1])
    dots: Any = {"color": BLACK, "drawstyle": "steps-post", "linewidth": 1.4}
    dots["path_effects"] = outline()
    right.plot(edges, heights, ":", label="deadlines (right axis)", **dots)
    right.set_ylim(bottom=0)
    right.set_ylabel("deadlines")
