"""Attention of one layer as it was measured: decodes, prefill chunks, and both in one kernel."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ProfileError
from vidur_simpy.execution_time.interpolation import Curve, Grid, Plane, leave_one_out_error

if TYPE_CHECKING:
    from vidur_simpy.execution_time.interface import BatchCounts
    from vidur_simpy.execution_time.operator_files import Measured, Skew

__all__ = ["MeasuredAttention", "Range", "curve", "nested"]

Row = TypeVar("Row")


def nested(measured: Measured, row: Callable[[Measured], Row]) -> dict[int, Row]:
    """Group measured points by their first coordinate, and turn each group into a row."""
    groups: dict[int, Measured] = {}
    for (first, *rest), value in measured.items():
        groups.setdefault(first, {})[tuple(rest)] = value
    return {first: row(group) for first, group in groups.items()}


def curve(measured: Mapping[tuple[int, ...], float]) -> Curve:
    """Return the curve through points of one coordinate."""
    points = sorted(measured)
    return Curve([point[0] for point in points], [measured[point] for point in points])


def plane(measured: Measured) -> Plane:
    """Return the plane through points of two coordinates."""
    return Plane(nested(measured, curve))


class Range:
    """What sizes an operator was measured for, and what batches asked for beyond.

    Parameters
    ----------
    extrapolate : bool
        Whether to go on beyond, with one warning per operator and size, instead of refusing.

    Attributes
    ----------
    beyond : dict of (str, str) to (float, float)
        By operator and size: the largest asked for, and the largest measured.
    """

    def __init__(self, extrapolate: bool) -> None:
        self.beyond: dict[tuple[str, str], tuple[float, float]] = {}
        self._extrapolate = extrapolate

    def check(self, operator: str, size: str, value: float, limit: float) -> None:
        """Note a size beyond the largest that was measured.

        Raises
        ------
        ProfileError
            If nothing may be extrapolated.
        """
        if value <= limit:
            return
        message = (
            f"{operator} was measured for {size} up to {limit:g}, a batch asks for {value:.6g}"
        )
        if not self._extrapolate:
            raise ProfileError(
                f"{message}; measure further, keep batches and contexts within what was measured, "
                "or set Profile.extrapolate."
            )
        seen = self.beyond.get((operator, size))
        if seen is None:
            warnings.warn(f"{message}: extrapolating.", stacklevel=5)
        self.beyond[operator, size] = max(value, seen[0] if seen else value), limit


class MeasuredAttention:
    """The attention of one layer over a batch, between the points that were measured.

    All decodes are taken to be as long as their mean, unless `longest` says otherwise. Prefill
    chunks are taken for one of all their tokens, after the context that gives it as many
    query-key pairs; if even without any context it had more, for a shorter one.

    The time of a batch with both rises steeply where the caches of its decodes outgrow the
    device's own cache. So at first the plane over the decodes alone is looked up that was measured
    at most points (with one small chunk, as a rule), then what other chunks take more: that is
    smooth, and errors of interpolation are half as large.

    Parameters
    ----------
    measured : Measured
        Seconds by prefill chunk, its context before, number of decodes, and context of each.
    skew : Skew or None
        What uneven decodes cost; used for batches that only decode. In others its factors have
        either sign: there it says where caches overflow rather than how lengths differ.
    longest : float
        The longest context of the decodes, as a multiple of their mean.
    range : Range
        Where to ask whether sizes may be beyond what was measured.
    """

    def __init__(self, measured: Measured, skew: Skew | None, longest: float, range: Range) -> None:
        decodes = {point[2:]: time for point, time in measured.items() if not point[0]}
        prefills = {point[:2]: time for point, time in measured.items() if not point[2]}
        mixed = {point: time for point, time in measured.items() if point[0] and point[2]}
        for name, found in (("decodes", decodes), ("prefills", prefills), ("both", mixed)):
            if not found:
                raise ProfileError(f"attention was not measured for batches of {name}.")
        self._range = range
        self._longest = longest
        self._decodes = plane(decodes)
        self._prefills = Grid(nested(prefills, curve))
        most = Counter(point[:2] for point in mixed).most_common(1)[0][0]
        self._both = plane({p[2:]: time for p, time in mixed.items() if p[:2] == most})
        more = {p: time - self._both(p[2], p[3]) for p, time in mixed.items()}
        self._more = Grid(nested(more, lambda chunk: Grid(nested(chunk, plane))))
        self._max_context = max(point[3] for point in measured)
        self._max_prefix = max(point[1] for point in measured)
        self._penalties = {} if skew is None or longest == 1 else _penalties(skew, longest)
        self._measured = decodes, prefills, mixed, more

    @property
    def errors(self) -> dict[str, float]:
        """Mean relative error of each kind of batch, each point from its neighbours."""
        decodes, prefills, mixed, more = self._measured
        return {
            "attention of decodes": leave_one_out_error(decodes),
            "attention of prefills": leave_one_out_error(prefills),
            # Of the differences, but relative to the times.
            "attention of both": leave_one_out_error(more, mixed),
        }

    def decode_curve(self, num_decodes: int) -> Curve:
        """Return the seconds of so many decodes by the mean of their contexts."""
        self._range.check("attention", "n_decode", num_decodes, self._decodes.limit)
        return self._decodes.at(num_decodes)

    def decode_time(self, num_decodes: int, context: int) -> float:
        """Return the seconds of decodes alone, by their contexts' sum."""
        mean = context / num_decodes
        self._range.check("attention", "kv_decode", mean * self._longest, self._max_context)
        times = self.decode_curve(num_decodes)
        time = times(mean)
        if self._penalties and num_decodes > 1:
            edges, alphas = self._penalty(num_decodes)
            alpha = alphas[bisect_left(edges, mean * self._longest)]
            time += alpha * (times(mean * self._longest) - time)
        return time

    def decode_times(self, num_decodes: int, contexts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what as many calls of `decode_time` would, to the last bit."""
        means = contexts / num_decodes
        longest = means * self._longest
        self._range.check("attention", "kv_decode", float(longest[-1]), self._max_context)
        times = self.decode_curve(num_decodes)
        found = times.many(means)
        if self._penalties and num_decodes > 1:
            edges, alphas = self._penalty(num_decodes)
            alpha = np.asarray(alphas)[np.searchsorted(edges, longest, side="left")]
            found = found + alpha * (times.many(longest) - found)
        return found

    def time(self, batch: BatchCounts) -> float:
        """Return the seconds of a batch with prefill chunks."""
        num_decodes, context = batch.num_decodes, batch.decode_context
        num_tokens = batch.num_tokens - num_decodes
        pairs = batch.num_attention_pairs - context
        chunk: float = num_tokens
        # A chunk of c tokens after p has c * p + c * (c + 1) / 2 pairs.
        prefix = pairs / num_tokens - (num_tokens + 1) / 2
        if prefix < 0:
            chunk, prefix = (math.sqrt(8 * pairs + 1) - 1) / 2, 0.0
        check = self._range.check
        check("attention", "prefill_chunk", chunk, self._prefills.limit)
        check("attention", "kv_prefill", prefix, self._max_prefix)
        if not num_decodes:
            return self._prefills(chunk, prefix)
        mean = context / num_decodes
        check("attention", "n_decode with a prefill", num_decodes, self._both.limit)
        check("attention", "kv_decode", mean, self._max_context)
        # Where neighbours differ much, a difference can be less than what is there at all.
        least = self._prefills(chunk, prefix)
        return max(
            self._both(num_decodes, mean) + self._more(chunk, prefix, num_decodes, mean), least
        )

    def _penalty(self, num_decodes: int) -> tuple[list[float], list[float]]:
        """Return the upper edges of longest contexts, and the factor between them."""
        numbers = list(self._penalties)
        return self._penalties[numbers[min(bisect_left(numbers, num_decodes), len(numbers) - 1)]]


def _penalties(skew: Skew, longest: float) -> dict[float, tuple[list[float], list[float]]]:
    """Return the factors of batches that only decode: by number of decodes, then by the longest.

    They were binned by the mean's way from the shortest to the longest. The shortest is taken to be
    shorter than the mean by the factor that the longest is longer.
    """
    rate = (1 - 1 / longest) / (longest - 1 / longest)
    edges, labels = skew.axes["skew_rate"]
    rate_label = labels[bisect_left(edges, rate)]
    no_prefill = skew.axes["kp"][1][0]
    kv_edges, kv_labels = skew.axes["kv_big"]
    return {
        number: (
            kv_edges[:-1],
            [
                skew.alphas.get((0, label, rate_label, kv_label, no_prefill), skew.default)
                for kv_label in kv_labels
            ],
        )
        for number, label in zip(*skew.axes["n"], strict=True)
    }
