"""Batches on their pipeline stages as bars, and the bubbles between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.plots.drawing import (
    BATCH_KINDS,
    DEFAULT_BATCHES,
    MAX_BARS,
    MAX_NUMBERED_ROWS,
    MAX_ROW_LABELS,
    MAX_ROWS,
    MAX_VECTOR_BARS,
    MIN_BATCHES,
    legend_above,
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

BUBBLE: Any = {"facecolor": "0.9", "hatch": "xxxx", "edgecolor": "0.6", "linewidth": 0.0}


def gantt(
    result: Result,
    ax: Axes | None = None,
    *,
    start: float | None = None,
    duration: float | None = None,
    replica_id: int | None = None,
) -> Axes:
    """Draw the batches on each pipeline stage as bars, and the bubbles between them.

    Bars of batches with prompt tokens only, with prompt and decode tokens, and with decode tokens
    only differ in colour and hatch; a bar that has room bears the index of its batch. While a
    stage has no batch but another stage of its replica has one, that is a bubble, drawn as a thin
    grey bar; while no stage has one, the replica is idle. The right axis tells the share of either
    in the window, stage by stage, and the title that of all stages.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("stages",)``.
    ax : Axes, optional
    start : float, optional
        Start of the window in seconds; by default the first batch.
    duration : float, optional
        Length of the window in seconds; by default about 60 batches of a replica, fewer where
        there are so many stages that bars would get too narrow.
    replica_id : int, optional
        Show this replica only; else all, or as many as have room (the title says how many).

    Raises
    ------
    ConfigError
        If there is no such replica, or the window has too many bars to see.
    NotAvailableError
        If stages were not recorded.
    """
    stages, which = _chosen(result.stages, replica_id)
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
    gaps = _gaps(shown, rows, first, last)
    _draw_bars(ax, shown, rows)
    _draw_bubbles(ax, gaps)
    is_deep = bool((stages["stage_id"] > 0).any())
    _name_rows(ax, rows, is_deep)
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.set_xlabel("time (s)")
    title = "Batches on their stages"
    has_ended = first >= end_of_run
    if shown.empty:
        ended = f": the run ended at {digits(end_of_run)} s" if has_ended else ""
        say_empty(ax, f"no batch in this window{ended}")
    if rows and not has_ended:
        _tell_shares(ax, gaps, is_deep)
        said = [f"{gaps.bubble_share.mean():.1%} bubbles"] if is_deep else []
        title += ": " + ", ".join([*said, f"{gaps.idle_share.mean():.1%} idle"])
    ax.set_title(title + which)
    legend_above(ax)
    return ax


def _chosen(stages: pd.DataFrame, replica_id: int | None) -> tuple[pd.DataFrame, str]:
    """Return the stages of one replica or of the first ones, and how to say so in the title."""
    ids = stages["replica_id"]
    known = sorted(set(ids))
    if replica_id is not None:
        if replica_id not in known:
            listed = str(known) if len(known) <= 20 else f"{known[0]}, {known[1]}, ..., {known[-1]}"
            raise ConfigError(f"gantt(): replica_id = {replica_id!r}: expected one of {listed}.")
        return stages[ids == replica_id], ""
    num_stages = stages["stage_id"].nunique() or 1
    num_replicas = max(1, MAX_ROWS // num_stages)
    if len(known) <= num_replicas:
        return stages, ""
    which = f"\nfirst {num_replicas:,} of {len(known):,} replicas"
    return stages[ids <= known[num_replicas - 1]], which


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
    num_rows = len(stages[["replica_id", "stage_id"]].drop_duplicates())
    num_batches = max(MIN_BATCHES, min(DEFAULT_BATCHES, MAX_VECTOR_BARS // num_rows))
    batch = one["batch_index"]
    return start, float(one.loc[batch < batch.min() + num_batches, "ended_at"].max())


def _draw_bars(ax: Axes, stages: pd.DataFrame, rows: list[tuple[int, int]]) -> None:
    left, right = stages["started_at"].to_numpy(), stages["ended_at"].to_numpy()
    places = zip(stages["replica_id"], stages["stage_id"], strict=True)
    number = {row: index for index, row in enumerate(rows)}
    middle = np.array([number[place] for place in places], dtype=np.float64)
    has_prefill = stages["num_prefill_tokens"].to_numpy() > 0
    has_decode = stages["num_decode_tokens"].to_numpy() > 0
    chosen = (has_prefill & ~has_decode, has_prefill & has_decode, ~has_prefill)
    for (kind, (colour, hatch)), mask in zip(BATCH_KINDS.items(), chosen, strict=True):
        look = {"facecolor": colour, "hatch": hatch, "edgecolor": "0.2", "linewidth": 0.4}
        _add_boxes(ax, left[mask], right[mask], middle[mask], 0.35, label=kind, **look)
    if len(rows) <= MAX_NUMBERED_ROWS:
        _number_bars(ax, left, right, middle, stages["batch_index"].to_numpy())


def _draw_bubbles(ax: Axes, gaps: _Gaps) -> None:
    _add_boxes(ax, gaps.left, gaps.right, gaps.row, 0.15, label="bubble", **BUBBLE)


def _add_boxes(
    ax: Axes,
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    middle: NDArray[np.float64],
    half_height: float,
    **look: Any,
) -> None:
    """Draw boxes as one path; as pixels where they are too many for a small vector file."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if len(left):
        top, bottom = middle - half_height, middle + half_height
        corners = [left, top, right, top, right, bottom, left, bottom, left, top]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
        boxes = Path(np.stack(corners, axis=1).reshape(-1, 2), np.tile(codes, len(left)))
        ax.add_patch(PathPatch(boxes, rasterized=len(left) > MAX_VECTOR_BARS, **look))


def _name_rows(ax: Axes, rows: list[tuple[int, int]], is_deep: bool) -> None:
    names = [f"replica {r}, stage {s}" if is_deep else f"replica {r}" for r, s in rows]
    every = _every(len(rows))
    ax.set_yticks(range(0, len(rows), every), names[::every])
    ax.set_ylim(len(rows) - 0.4, -0.6)


def _tell_shares(ax: Axes, gaps: _Gaps, is_deep: bool) -> None:
    """Tell on the right how long each row had no batch."""
    shares = np.column_stack([gaps.bubble_share, gaps.idle_share][not is_deep :])
    every = _every(len(shares))
    texts = [" + ".join(f"{share:.0%}" for share in row) for row in shares[::every]]
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(0, len(shares), every), texts, fontsize="small")
    right.set_ylabel("bubbles + idle" if is_deep else "idle")


def _every(num_rows: int) -> int:
    """Return how many rows share a label, so that labels have room."""
    return math.ceil(num_rows / MAX_ROW_LABELS) or 1


class _Gaps(NamedTuple):
    """Bubbles in a window, and the share of it that each row spent in bubbles and idle."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    row: NDArray[np.float64]
    bubble_share: NDArray[np.float64]
    idle_share: NDArray[np.float64]


def _gaps(
    stages: pd.DataFrame, rows: Sequence[tuple[int, int]], first: float, last: float
) -> _Gaps:
    boxes = [np.empty((3, 0))]
    shares = np.empty((len(rows), 2))
    of_row = dict(list(stages.groupby(["replica_id", "stage_id"])))
    of_replica = dict(list(stages.groupby("replica_id")))
    for index, row in enumerate(rows):
        work = of_replica.get(row[0], stages[:0])
        ends = np.concatenate([work["started_at"], work["ended_at"], [first, last]])
        edges = np.unique(np.clip(ends, first, last))
        is_busy = _covered(of_row.get(row, stages[:0]), edges)
        is_working = _covered(work, edges)
        is_bubble = is_working & ~is_busy
        length = np.diff(edges) / (last - first)
        shares[index] = length[is_bubble].sum(), length[~is_working].sum()
        turns = np.flatnonzero(np.diff(np.concatenate([[False], is_bubble, [False]])))
        left, right = edges[turns[::2]], edges[turns[1::2]]
        boxes.append(np.stack([left, right, np.full(len(left), index)]))
    return _Gaps(*np.concatenate(boxes, axis=1), *shares.T)


def _covered(stages: pd.DataFrame, edges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return between which edges some batch is on a stage."""
    num_started, num_ended = (
        np.searchsorted(np.sort(stages[column].to_numpy()), edges[:-1], side="right")
        for column in ("started_at", "ended_at")
    )
    return num_started > num_ended


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
