"""Where the time of requests goes: stacked bars by group, and one request as a waterfall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidur_simpy.plots.drawing import (
    ABOVE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILLION,
    make_axes,
    name_of,
    say_empty,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result

__all__ = ["PARTS", "QUANTILES", "PartLook", "breakdown", "waterfall"]

QUANTILES = (0.5, 0.9, 0.99)

# A segment of at least this share of the axis bears its share of the bar.
LABELLED = 0.06

# Parts that are less than this share of every bar cannot be seen, and are left out.
SEEN = 0.005


class PartLook(NamedTuple):
    """How a part of a latency is called and drawn."""

    label: str
    phrase: str
    colour: str
    hatch: str


# The columns of the table of phases, then what stands for them where they were not recorded or
# where a part is all that is left.
PARTS = {
    "queue_time": PartLook("queue", "waiting in the queue", "0.8", ""),
    "prefill_time": PartLook("prefill", "computing its prompt", SKY_BLUE, "////"),
    "prefill_wait_time": PartLook(
        "waits in prefill", "waiting between pieces of its prompt", "white", "||"
    ),
    "decode_time": PartLook("decode", "decoding", ORANGE, ""),
    "decode_stall_time": PartLook(
        "slowed by prompts", "slowed down by prompts in its batches", VERMILLION, "\\\\\\"
    ),
    "decode_wait_time": PartLook("waits in decode", "waiting between decode steps", "white", "xx"),
    "restart_wait_time": PartLook("preempted", "waiting after it was preempted", PURPLE, ".."),
    "recomputation_time": PartLook(
        "recomputing", "computing again what preemptions threw away", GREEN, "--"
    ),
    "restart_time": PartLook("preemptions", "lost to preemptions", PURPLE, ".."),
    "first_token_time": PartLook(
        "first batch to first token",
        "between its first batch and its first token",
        SKY_BLUE,
        "////",
    ),
    "to_first_token_time": PartLook("to first token", "before its first token", SKY_BLUE, "////"),
    "output_time": PartLook(
        "first to last token", "between its first and its last token", ORANGE, ""
    ),
}


def breakdown(
    result: Result,
    metric: str = "e2e",
    ax: Axes | None = None,
    *,
    quantiles: Sequence[float] = QUANTILES,
    shares: bool = False,
) -> Axes:
    """Draw what the latency of fast and slow requests is made of, as stacked bars.

    Each bar is the mean of a group of requests, as `Result.breakdown` has it; large segments bear
    their share of the bar.

    Parameters
    ----------
    result : Result
        Best recorded with ``record=("phases",)``; else only the coarse parts are known.
    metric : str
        ``"e2e"``, ``"ttft"`` or ``"tpot"``.
    ax : Axes, optional
    quantiles : sequence of float
        Where one group ends and the next begins, between 0 and 1.
    shares : bool
        Draw bars of one length, in percent, so that what fast requests do is seen as well.

    Raises
    ------
    ConfigError
        If there is no such metric, or a quantile is out of range or out of order.
    """
    table = result.breakdown(metric, quantiles)
    parts = table[[name for name in table if name in PARTS]]
    totals = parts.sum(axis=1).to_numpy()
    parts = parts.loc[:, parts.gt(SEEN * totals, axis=0).any()]
    ax = make_axes(ax, height=1.9 + 0.55 * max(len(table), 1))
    if len(table):
        scale = 100 / np.where(totals > 0, totals, 1.0) if shares else np.ones(len(table))
        _draw_bars(ax, parts.mul(scale, axis=0), totals, is_share=shares)
        ax.set_yticks(range(len(table)), _row_names(table))
        ax.set_ylim(len(table) - 0.5, -0.5)
    else:
        say_empty(ax, f"no request has a value of {metric}")
        ax.set_yticks([])
    what = name_of(metric)
    ax.set_xlabel(f"share of the {what} (%)" if shares else f"mean {what} (s)")
    num_rows = -(-len(parts.columns) // 4)
    ax.set_title(f"What the {what} is made of", pad=10 + 16 * num_rows)
    return ax


def waterfall(parts: pd.Series, title: str, ax: Axes | None = None) -> Axes:
    """Draw parts one after the other, each from where the one before ends, and their sum.

    Parameters
    ----------
    parts : Series
        Seconds by part, a key of `PARTS`.
    title : str
    ax : Axes, optional
    """
    parts = parts[parts > 0]
    ax = make_axes(ax, height=1.4 + 0.42 * (len(parts) + 1))
    ends = parts.cumsum().to_numpy()
    total = float(ends[-1]) if len(parts) else 0.0
    for row, (name, seconds) in enumerate(parts.items()):
        look = PARTS[str(name)]
        start = float(ends[row]) - seconds
        ax.barh(row, seconds, 0.62, start, **_paint(look))
        ax.text(ends[row], row, f" {digits(seconds)} s, {_percent(seconds / total)}", va="center")
        ax.plot([ends[row]] * 2, [row + 0.31, row + 0.69], color="0.4", linewidth=0.8)
    ax.barh(len(parts), total, 0.62, color="0.3")
    ax.text(total, len(parts), f" {digits(total)} s", va="center")
    labels = [PARTS[str(name)].label for name in parts.index]
    ax.set_yticks(range(len(parts) + 1), [*labels, "together"])
    ax.set_ylim(len(parts) + 0.5, -0.5)
    ax.set_xlim(0, 1.28 * total or 1.0)
    ax.set_xlabel("time since its arrival, part by part (s)")
    ax.set_title(title)
    return ax


def _draw_bars(ax: Axes, parts: pd.DataFrame, totals: Any, *, is_share: bool) -> None:
    rows = np.arange(len(parts))
    lengths = parts.sum(axis=1).to_numpy()
    end = _end_of_axis(ax, (1.13 if is_share else 1.16) * (lengths.max() or 1.0))
    left = np.zeros(len(parts))
    for name in parts:
        width, look = parts[name].to_numpy(), PARTS[str(name)]
        ax.barh(rows, width, 0.62, left, label=look.label, **_paint(look))
        for row in np.flatnonzero(width > LABELLED * end).tolist():
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            at: Any = {"ha": "center", "va": "center", "fontsize": 8, "bbox": box, "clip_on": True}
            share = width[row] / lengths[row]
            ax.text(left[row] + width[row] / 2, row, f"{share:.0%}", **at)
        left += width
    for row, total in enumerate(totals):
        ax.text(
            lengths[row], row, f" {digits(total)} s", va="center", fontsize="small", clip_on=True
        )
    ax.set_xlim(0, end)
    if len(parts.columns):
        ax.legend(**ABOVE, ncols=min(4, len(parts.columns)))


def _end_of_axis(ax: Axes, needed: float) -> float:
    """Return where the x axis ends: behind the bars of all axes that share it."""
    others = (each for each in ax.get_shared_x_axes().get_siblings(ax) if each.containers)
    return max([needed, *(float(each.get_xlim()[1]) for each in others)])


def _row_names(table: pd.DataFrame) -> list[str]:
    counts = table["num_requests"].tolist()
    return [
        f"{group}\n{number:,} request{'s' if number > 1 else ''}"
        for group, number in zip(table.index, counts, strict=True)
    ]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _paint(look: PartLook) -> dict[str, Any]:
    return {
        "facecolor": look.colour,
        "hatch": look.hatch,
        "edgecolor": "0.2",
        "linewidth": 0.6,
    }
