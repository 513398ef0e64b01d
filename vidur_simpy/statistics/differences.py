"""Differences between two runs, request by request where they had the same requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.series import numbers
from vidur_simpy.statistics.intervals import name_of_quantile, num_values_needed
from vidur_simpy.statistics.resampling import MIN_BLOCKS, Blocks, block_length, joint_intervals
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["Pair", "judge", "why_not_paired"]

# A client that measures sends a request a little later than planned.
ARRIVAL_TOLERANCE = 0.01


class Pair:
    """A run and the one it is compared with, and the draws of both."""

    def __init__(
        self,
        first: Result,
        second: Result,
        metrics: Sequence[str],
        num_resamples: int,
        rng: np.random.Generator,
        is_paired: bool,
    ) -> None:
        self._is_paired = is_paired
        self._values = {
            metric: self._both(numbers(first.requests, metric), numbers(second.requests, metric))
            for metric in metrics
        }
        series = [self._series(side) for side in (0, 1)]
        if is_paired:
            series[0] = series[1] = [*series[0], *series[1], *self._gaps()]
        lengths = [max(map(block_length, each)) for each in series]
        sizes = [len(first.requests), len(second.requests)]
        made = Blocks(sizes[0], lengths[0], num_resamples, rng)
        other = made if is_paired else Blocks(sizes[1], lengths[1], num_resamples, rng)
        self._blocks = (made, other)
        self.num_blocks = min(made.num_blocks, other.num_blocks)
        self.is_cut = made.is_cut or other.is_cut

    def differences(
        self, metric: str, quantiles: Sequence[float], confidence: float
    ) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
        """Return a row for the mean and each quantile, and the differences of all draws."""
        first, second = self._values[metric]
        count = int(min(np.isfinite(first).sum(), np.isfinite(second).sum()))
        needed = [MIN_BLOCKS, *(num_values_needed(q, confidence) for q in quantiles)]
        estimates = [_statistics(values, quantiles) for values in (first, second)]
        names = ["mean", *(name_of_quantile(quantile) for quantile in quantiles)]
        rows = [
            {
                "statistic": name,
                "baseline": before,
                "value": after,
                "difference": after - before,
                "relative": (after - before) / before if before > 0 else math.nan,
                "count": count,
                "is_enough": count >= least,
            }
            for name, least, before, after in zip(names, needed, *estimates, strict=True)
        ]
        draws = [
            blocks.statistics(values, quantiles)
            for blocks, values in zip(self._blocks, (first, second), strict=True)
        ]
        return rows, draws[1] - draws[0]

    def _both(
        self, first: NDArray[np.float64], second: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Leave out, of pairs, what only one of them has."""
        if not self._is_paired:
            return first, second
        is_there = np.isfinite(first) & np.isfinite(second)
        return np.where(is_there, first, np.nan), np.where(is_there, second, np.nan)

    def _series(self, side: int) -> list[NDArray[np.float64]]:
        return [values[side] for values in self._values.values()]

    def _gaps(self) -> list[NDArray[np.float64]]:
        return [second - first for first, second in self._values.values()]


def why_not_paired(first: Result, second: Result) -> str:
    """Return in what two workloads differ; empty if they are the same."""
    before, after = first.requests, second.requests
    if len(before) != len(after):
        return f"{len(after)} requests, not {len(before)}"
    is_served = (before["completed_at"].notna() & after["completed_at"].notna()).to_numpy()
    everywhere = np.ones(len(before), dtype=bool)
    # A measurement knows the output of what was served only.
    for column, what, known in (
        ("num_prefill_tokens", "prompt tokens", everywhere),
        ("num_decode_tokens", "output tokens", is_served),
    ):
        old, new = before[column].to_numpy(), after[column].to_numpy()
        differ = np.flatnonzero((old != new) & known)
        if len(differ):
            row = differ[0]
            return f"request {row} has {new[row]} {what}, not {old[row]}"
    starts = [table["arrived_at"].to_numpy() for table in (before, after)]
    late = np.abs((starts[1] - starts[1][:1]) - (starts[0] - starts[0][:1]))
    if len(late) and late.max() > ARRIVAL_TOLERANCE:
        row = int(np.argmax(late > ARRIVAL_TOLERANCE))
        return f"request {row} arrives {digits(float(late[row]))} s earlier or later"
    return ""


def _statistics(values: NDArray[np.float64], quantiles: Sequence[float]) -> list[float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return [math.nan] * (1 + len(quantiles))
    return [float(values.mean()), *np.quantile(values, list(quantiles)).tolist()]


def judge(
    rows: list[dict[str, Any]],
    differences: NDArray[np.float64],
    num_blocks: int,
    confidence: float,
) -> None:
    """Add interval and verdict to each row, all intervals being of one family."""
    is_enough = np.array([row.pop("is_enough") for row in rows], dtype=bool)
    half = np.full(len(rows), math.nan)
    _, half[is_enough] = joint_intervals(differences[:, is_enough], num_blocks, confidence)
    for row, width in zip(rows, half.tolist(), strict=True):
        difference = row["difference"]
        row["low"], row["high"] = difference - width, difference + width
        row["is_real"] = bool(row["low"] > 0 or row["high"] < 0)
        row["verdict"] = _verdict(difference, width, row["is_real"])


def _verdict(difference: float, width: float, is_real: bool) -> str:
    if math.isnan(width):
        return "too few requests"
    if is_real:
        return "higher" if difference > 0 else "lower"
    return "equal" if difference == 0 and width == 0 else "not distinguishable"
