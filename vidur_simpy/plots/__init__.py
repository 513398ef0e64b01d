"""One function per plot: ``(result, ax=None, **options) -> Axes``.

A function named in ``__all__`` is a plot of every result: ``result.plot.cdf("ttft")`` calls
``cdf(result, "ttft")``. Plots are readable in black and white: line styles, markers and hatches
differ as well as colours, which are those of Okabe and Ito (2008). No style setting is changed.
"""

from __future__ import annotations

from vidur_simpy.plots.activity import composition, timeline
from vidur_simpy.plots.latency import cdf, quantiles
from vidur_simpy.plots.operator_bars import operators
from vidur_simpy.plots.stages import gantt

__all__ = ["cdf", "composition", "gantt", "operators", "quantiles", "timeline"]
