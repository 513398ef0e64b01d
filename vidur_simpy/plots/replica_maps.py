"""The load of each replica over time, as a map of colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import unknown_name
from vidur_simpy.plots.drawing import (
    COLOUR_MAP,
    MAX_ROW_LABELS,
    count,
    make_axes,
    say_empty,
)
from vidur_simpy.series import levels_of_replicas, span_means
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["heatmap"]

# Quantities: what the colour bar says, and the greatest value if it is always the same.
QUANTITIES: dict[str, tuple[str, float | None]] = {
    "running": ("requests running", None),
    "waiting": ("requests waiting", None),
    "kv_cache": ("KV cache in use (%)", 100.0),
    "utilisation": ("stages busy (%)", 100.0),
}
NUM_SPANS = 150
# Rows that a figure of usual height shows one by one; more replicas share rows.
MAX_ROWS = 256


def heatmap(result: Result, quantity: str = "running", ax: Axes | None = None) -> Axes:
    """Draw a quantity of each replica over time: a row per replica, brighter where it is greater.

    Each cell is the mean of a replica over a 150th of the run. It shows an imbalance between
    replicas (rows differ) apart from load that comes and goes (columns differ). Beyond 256
    replicas, neighbours share a row, whose cells show the greatest of their means.

    Parameters
    ----------
    result : Result
    quantity : str
        ``"running"`` or ``"waiting"`` (requests), ``"kv_cache"`` (share of the blocks in use) or
        ``"utilisation"`` (share of its stages that are busy; needs ``record=("stages",)``).
    ax : Axes, optional
        Gets a colour bar.

    Raises
    ------
    ConfigError
        If there is no such quantity.
    NotAvailableError
        If stages were not recorded.

    Notes
    -----
    Samples are taken when batches are formed. A long run keeps 64 to 1,024 of each replica, so
    that the map of many replicas is coarse in time.
    """
    if quantity not in QUANTITIES:
        raise unknown_name("quantity", quantity, QUANTITIES)
    label, greatest = QUANTITIES[quantity]
    levels = levels_of_replicas(result, quantity)
    num_replicas = max(len(result.replicas), int(levels["replica_id"].nunique()))
    ax = make_axes(ax, height=min(6.0, 2.4 + 0.15 * num_replicas))
    what = label.partition(" (")[0]
    title = f"{what[0].upper()}{what[1:]} on {count(num_replicas, 'replica')}"
    if len(levels):
        ids, cells, edges = _cells(result, levels)
        if greatest is not None:
            cells = 100 * cells
        elif len(ids) > 1 and cells.mean() > 0:
            ratio = cells.mean(axis=1).max() / cells.mean()
            title += f", the busiest {digits(ratio)} times the mean"
        _draw(ax, ids, cells, edges, label, greatest)
    else:
        say_empty(ax, f"there are no samples of {what}")
        ax.set_yticks([])
    ax.set_xlabel("time (s)")
    ax.set_ylabel("replica")
    ax.set_title(title)
    return ax


def _cells(
    result: Result, levels: pd.DataFrame
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the replicas, their means in spans of time (a row each), and the ends of the spans."""
    levels = levels.astype({"replica_id": np.int64, "level": np.float64})
    first, last = float(levels["time"].min()), float(levels["time"].max())
    edges = np.linspace(first, last if last > first else first + 1.0, NUM_SPANS + 1)
    means: dict[Any, NDArray[np.float64]] = {
        replica_id: span_means(rows["time"].to_numpy(), rows["level"].to_numpy(), edges)
        for replica_id, rows in levels.groupby("replica_id")
    }
    # A replica that never got a request has no sample.
    ids = np.union1d([*means], result.replicas["replica_id"].to_numpy()).astype(np.int64)
    nothing = np.zeros(NUM_SPANS)
    return ids, np.stack([means.get(replica_id, nothing) for replica_id in ids.tolist()]), edges


def _draw(
    ax: Axes,
    ids: NDArray[np.int64],
    cells: NDArray[np.float64],
    edges: NDArray[np.float64],
    label: str,
    greatest: float | None,
) -> None:
    group = -(-len(ids) // MAX_ROWS)
    rows = np.maximum.reduceat(cells, np.arange(0, len(ids), group), axis=0)
    look: Any = {"cmap": COLOUR_MAP, "vmin": 0.0, "vmax": greatest or max(1.0, rows.max())}
    # An image, which weighs little however many cells it has.
    extent = (edges[0], edges[-1], len(rows) - 0.5, -0.5)
    image = ax.imshow(rows, aspect="auto", interpolation="nearest", extent=extent, **look)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label(label)
    every = -(-len(rows) // (MAX_ROW_LABELS // 2))
    names = [str(replica_id) for replica_id in ids[::group]]
    ax.set_yticks(range(0, len(rows), every), names[::every])
    ax.ticklabel_format(axis="x", useOffset=False)
