"""From one run to a decision: sweeps, capacity, Pareto fronts, the best configuration."""

from __future__ import annotations

from vidur_simpy.search.capacity_search import Capacity, capacity
from vidur_simpy.search.fronts import pareto
from vidur_simpy.search.grid import Grid, Point, points_of
from vidur_simpy.search.load_plots import plot_attainment, plot_throughput_latency
from vidur_simpy.search.recommendation import Recommendation, recommend
from vidur_simpy.search.runs import Outcome, Run, figures_of, replication_seeds, run_all
from vidur_simpy.search.search_plots import plot_front
from vidur_simpy.search.slo import Slo
from vidur_simpy.search.store import Store, open_store
from vidur_simpy.search.sweeps import Sweep, sweep
from vidur_simpy.search.trials import replicate

__all__ = [
    "Capacity",
    "Grid",
    "Outcome",
    "Point",
    "Recommendation",
    "Run",
    "Slo",
    "Store",
    "Sweep",
    "capacity",
    "figures_of",
    "open_store",
    "pareto",
    "plot_attainment",
    "plot_front",
    "plot_throughput_latency",
    "points_of",
    "recommend",
    "replicate",
    "replication_seeds",
    "run_all",
    "sweep",
]
