"""The stacked bar of what an iteration's time is spent on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.plots.drawing import (
    ABOVE,
    BLUE,
    GREEN,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    make_axes,
    say_empty,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result

__all__ = ["mean_times", "operators"]

# Kinds of batches from the top, and what they are called.
KINDS = {"prefill": "prefill only", "mixed": "prefill and decode", "decode": "decode only"}

# Colour and hatch of the operators that take longest; all others are one white segment.
LOOKS = (
    (SKY_BLUE, ""),
    (ORANGE, "////"),
    (GREEN, ".."),
    (BLUE, "\\\\\\\\"),
    ("0.8", "xx"),
    (VERMILLION, "--"),
    ("#F0E442", "oo"),
)
OTHERS = ("white", "")

# A segment of at least this share of the axis bears its share of the bar.
LABELLED = 0.07


def operators(result: Result, ax: Axes | None = None) -> Axes:
    """Draw what the time of a mean iteration is spent on, as a stacked bar by kind of batch.

    Each bar is as long as an iteration takes on all stages together; segments bear their share of
    it. The seven operators that take longest over the run are told apart by colour and hatch.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("operators",)``.
    ax : Axes, optional

    Raises
    ------
    NotAvailableError
        If operators were not recorded.
    """
    means = 1e3 * mean_times(result.operators)
    ax = make_axes(ax, height=1.6 + 0.7 * max(len(means), 1))
    if len(means):
        _draw_segments(ax, means)
    else:
        say_empty(ax, "no batch was executed")
        ax.set_yticks([])
    ax.set_xlabel("mean time of an iteration (ms)")
    num_rows = -(-len(means.columns) // 4)
    ax.set_title("What iterations spend their time on", pad=12 + 15 * num_rows)
    return ax


def mean_times(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean time of an iteration by operator, in seconds.

    Parameters
    ----------
    table : DataFrame
        As `Result.operators`.

    Returns
    -------
    DataFrame
        A row per kind of batch, a column per operator, the one that takes longest first; beyond
        seven, the rest is the column ``others``.
    """
    order = table.groupby("operator")["execution_time"].sum().sort_values(ascending=False).index
    places = ["batch_kind", "stage_id"]
    num_batches = table.groupby([*places, "replica_id"])["num_batches"].max()
    times = table.groupby([*places, "operator"])["execution_time"].sum().unstack(fill_value=0)
    per_batch = times.div(num_batches.groupby(places).sum(), axis=0)
    means = per_batch.groupby("batch_kind").sum().reindex(columns=order)
    means = means.loc[[kind for kind in KINDS if kind in means.index]]
    if len(order) > len(LOOKS):
        shown = means[order[: len(LOOKS)]]
        means = shown.assign(others=means.sum(axis=1) - shown.sum(axis=1))
    return means.loc[:, means.sum() > 0]


def _draw_segments(ax: Axes, means: pd.DataFrame) -> None:
    rows = np.arange(len(means))
    totals = means.sum(axis=1).to_numpy()
    left = np.zeros(len(means))
    for operator, (colour, hatch) in zip(means, (*LOOKS, OTHERS), strict=False):
        width = means[operator].to_numpy()
        look: Any = {"color": colour, "hatch": hatch, "edgecolor": "0.2", "linewidth": 0.6}
        ax.barh(rows, width, 0.6, left, label=str(operator).replace("_", " "), **look)
        for row in np.flatnonzero(width > LABELLED * totals.max()).tolist():
            share, middle = width[row] / totals[row], left[row] + width[row] / 2
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            at: Any = {"ha": "center", "va": "center", "fontsize": 8, "bbox": box}
            ax.text(middle, row, f"{share:.0%}", **at)
        left += width
    for row, total in enumerate(totals):
        ax.text(total, row, f" {digits(total)} ms", va="center", fontsize="small")
    ax.set_yticks(rows, [KINDS[str(kind)] for kind in means.index])
    ax.set_ylim(len(means) - 0.5, -0.5)
    ax.set_xlim(0, 1.2 * totals.max())
    ax.legend(**ABOVE, ncols=min(4, len(means.columns)))
