"""How sure a number is, and whether two runs differ: intervals, warm-up, paired differences."""

from __future__ import annotations

from vidur_simpy.statistics.estimates import interval, paired_difference
from vidur_simpy.statistics.intervals import Interval

__all__ = ["Interval", "interval", "paired_difference"]
