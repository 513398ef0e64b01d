"""Two latencies against each other, and which requests keep to limits on both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.plots.drawing import (
    BLUE,
    COLOUR_MAP,
    VERMILLION,
    legend_above,
    make_axes,
    name_of,
    outline,
    plain_logarithmic,
    say_empty,
)
from vidur_simpy.summary import num_output_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["ttft_tpot"]

# With more points than this their number is shown by colour, in hexagons.
MAX_MARKERS = 2_000
NUM_HEXAGONS = 50
# Each side of a limit is at least so long, compared with the other side.
ROOM = 0.45


def ttft_tpot(
    result: Result,
    ax: Axes | None = None,
    *,
    ttft: float | None = None,
    tpot: float | None = None,
) -> Axes:
    """Draw the time per output token of requests against their time to first token.

    Limits divide the figure; the text in each part is the share of all requests that is there.
    These shares and that of requests that were not completed, in the title, add up to one, and
    the share that meets both limits is the attainment of :meth:`vidur_simpy.Result.slo`. A request
    of one output token has no point, but meets any limit on TPOT. More than 2,000 points are drawn
    as hexagons that are brighter the more requests they hold.

    Parameters
    ----------
    result : Result
    ax : Axes, optional
        Both axes become logarithmic.
    ttft, tpot : float, optional
        Limits in seconds, as :meth:`vidur_simpy.Result.slo` takes them.

    Raises
    ------
    ConfigError
        If a limit is not a positive number.
    """
    limits = {"ttft": ttft, "tpot": tpot}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if given:
        result.slo(**given)  # refuses what is no limit
    ax = make_axes(ax, height=4.5)
    requests = result.requests
    x, y = (requests[name].to_numpy(np.float64) for name in limits)
    is_completed = requests["completed_at"].notna().to_numpy()
    is_single = (num_output_tokens(requests) <= 1).to_numpy()
    # A limit that was not given is met by all; a TPOT that is not defined meets any limit.
    meets = np.stack([x <= given.get("ttft", np.inf), y <= given.get("tpot", np.inf)])
    meets[1] |= is_single | ("tpot" not in given)
    has_point = is_completed & (x > 0) & (y > 0)
    if has_point.any():
        x, y, good = x[has_point], y[has_point], (meets[0] & meets[1])[has_point]
        _set_up(ax, {"ttft": x, "tpot": y}, given)
        _draw_points(ax, x, y, good, bool(given))
        _draw_limits(ax, given)
    else:
        say_empty(ax, "no request has both latencies")
    for name, axis in (("ttft", ax.xaxis), ("tpot", ax.yaxis)):
        limit = f", limit {given[name]:g}" if name in given else ""
        axis.set_label_text(f"{name_of(name)} (s){limit}")
    title = f"TTFT and TPOT of {int(has_point.sum()):,} of {len(requests):,} requests"
    if not is_completed.all():
        title += f", {1 - is_completed.mean():.1%} not completed"
    ax.set_title(title)
    if ax.get_legend_handles_labels()[0]:
        legend_above(ax)
    if given and len(requests):
        _write_shares(ax, meets[:, is_completed], len(requests), given)
    ax.grid(alpha=0.3)
    return ax


def _draw_points(
    ax: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    good: NDArray[np.bool_],
    has_limits: bool,
) -> None:
    if len(x) > MAX_MARKERS:
        look: Any = {"xscale": "log", "yscale": "log", "bins": "log", "cmap": COLOUR_MAP}
        look["extent"] = np.log10([*ax.get_xlim(), *ax.get_ylim()])
        cells = ax.hexbin(x, y, gridsize=NUM_HEXAGONS, mincnt=1, linewidths=0.2, **look)
        ax.figure.colorbar(cells, ax=ax, pad=0.02).set_label("requests in a hexagon")
        return
    parts = [(good, "o", BLUE, "meets the limits"), (~good, "x", VERMILLION, "misses a limit")]
    for chosen, marker, colour, label in parts:
        style: Any = {"color": colour, "markersize": 4, "markerfacecolor": "none", "alpha": 0.7}
        style |= {"label": label} if has_limits else {}
        if chosen.any():
            ax.plot(x[chosen], y[chosen], marker, **style)


def _set_up(ax: Axes, values: dict[str, NDArray[np.float64]], limits: dict[str, float]) -> None:
    """Make both axes logarithmic, with room on either side of a limit for the shares."""
    for name in ("ttft", "tpot"):
        low, high = values[name].min() / 1.5, values[name].max() * 1.5
        if name in limits:
            middle = limits[name]
            low = min(low, middle * (middle / high) ** ROOM)
            high = max(high, middle * (middle / low) ** ROOM)
        (ax.set_xscale if name == "ttft" else ax.set_yscale)("log")
        (ax.set_xlim if name == "ttft" else ax.set_ylim)(low, high)


def _draw_limits(ax: Axes, limits: dict[str, float]) -> None:
    """Draw the limits, and plain numbers on the axes, which hexagons give none."""
    plain_logarithmic(ax.xaxis, *ax.get_xlim())
    plain_logarithmic(ax.yaxis, *ax.get_ylim())
    line: Any = {"color": "0.2", "linestyle": "--", "linewidth": 1.4}
    line["path_effects"] = outline()
    if "ttft" in limits:
        ax.axvline(limits["ttft"], **line)
    if "tpot" in limits:
        ax.axhline(limits["tpot"], **line)


def _write_shares(
    ax: Axes, meets: NDArray[np.bool_], num_requests: int, limits: dict[str, float]
) -> None:
    """Write into each part which share of all requests is there; `meets` has a column for each."""
    for met_ttft in (True, False) if "ttft" in limits else (True,):
        for met_tpot in (True, False) if "tpot" in limits else (True,):
            is_there = (meets[0] == met_ttft) & (meets[1] == met_tpot)
            missed = [
                name.upper()
                for name, is_met in (("ttft", met_ttft), ("tpot", met_tpot))
                if not is_met
            ]
            names = "both" if len(missed) == 2 else "".join(missed)
            what = f"{names} too long" if missed else "within limits"
            ax.text(
                0.02 if met_ttft else 0.98,
                0.03 if met_tpot else 0.97,
                f"{is_there.sum() / num_requests:.1%} {what}",
                ha="left" if met_ttft else "right",
                va="bottom" if met_tpot else "top",
                transform=ax.transAxes,
                fontsize="small",
                bbox={"facecolor": "white", "edgecolor": "0.6", "alpha": 0.9, "pad": 2.5},
            )
