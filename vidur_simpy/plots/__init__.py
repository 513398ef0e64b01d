"""One function per plot: ``(result, ax=None, **options) -> Axes``.

A function named in ``__all__`` is a plot of every result: ``result.plot.cdf("ttft")`` calls
``cdf(result, "ttft")``. Plots are readable in black and white: line styles, markers and hatches
differ as well as colours, which are those of Okabe and Ito (2008). No style setting is changed.
"""

from __future__ import annotations

from vidur_simpy.plots.activity import composition, timeline
from vidur_simpy.plots.breakdown_bars import breakdown
from vidur_simpy.plots.deadlines import deadline_misses
from vidur_simpy.plots.latency import cdf, quantiles
from vidur_simpy.plots.operator_bars import operators
from vidur_simpy.plots.replica_maps import heatmap
from vidur_simpy.plots.stages import gantt
from vidur_simpy.plots.trade_offs import ttft_tpot

__all__ = [
    "breakdown",
    "cdf",
    "composition",
    "deadline_misses",
    "gantt",
    "heatmap",
    "operators",
    "quantiles",
    "timeline",
    "ttft_tpot",
]
