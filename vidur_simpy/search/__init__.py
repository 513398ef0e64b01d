"""From one run to a decision: many runs through joblib, each made once."""

from __future__ import annotations

from vidur_simpy.search.grid import Grid, Point, points_of
from vidur_simpy.search.runs import Outcome, Run, figures_of, replication_seeds, run_all
from vidur_simpy.search.store import Store, open_store
from vidur_simpy.search.sweeps import Sweep, sweep

__all__ = [
    "Grid",
    "Outcome",
    "Point",
    "Run",
    "Store",
    "Sweep",
    "figures_of",
    "open_store",
    "points_of",
    "replication_seeds",
    "run_all",
    "sweep",
]
