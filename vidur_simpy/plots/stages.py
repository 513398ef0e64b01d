"""Batches on their pipeline stages as bars."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.plots.drawing import (
    ABOVE,
    BATCH_KINDS,
    DEFAULT_BATCHES,
    MAX_BARS,
    MAX_NUMBERED_ROWS,
    MAX_ROW_LABELS,
    make_axes,
    say_empty,
)
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["gantt"]


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
