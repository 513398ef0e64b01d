"""What makes slow requests slow: the mean parts of a latency, by groups from fast to slow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.explanation.parts import parts_of

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["breakdown_of"]


def breakdown_of(result: Result, metric: str, quantiles: Sequence[float]) -> pd.DataFrame:
    """Return the mean parts of a metric by quantile group, as `Result.breakdown` describes them."""
    import pandas as pd

    edges = _checked(quantiles)
    parts = parts_of(result, metric)
    values = result.requests.loc[parts.index, metric].to_numpy()
    order = np.argsort(values, kind="stable")
    bounds = np.floor(np.array(edges) * len(order)).astype(int)
    rows, names = [], []
    for (low, high), (first, last) in zip(pairwise(edges), pairwise(bounds), strict=True):
        if last > first:
            members = order[first:last]
            means = parts.iloc[members].mean().to_dict()
            rows.append({"num_requests": last - first, metric: values[members].mean()} | means)
            names.append(_name(low, high))
    if len(names) == 1:
        names = ["all requests"]
    columns = list(dict.fromkeys(["num_requests", metric, *parts.columns]))
    index = pd.Index(names, name=f"by {metric}", dtype=str)
    return pd.DataFrame(rows, columns=columns, index=index)


def _checked(quantiles: Sequence[float]) -> list[float]:
    edges = [float(quantile) for quantile in quantiles]
    if any(not 0 < edge < 1 for edge in edges) or any(a >= b for a, b in pairwise(edges)):
        raise ConfigError(
            f"breakdown(): quantiles = {list(quantiles)!r}: expected rising numbers between 0 and "
            "1, such as 0.5, 0.9, 0.99."
        )
    return [0.0, *edges, 1.0]


def _name(low: float, high: float) -> str:
    """Return what a group of requests is called."""
    if low == 0.0:
        return f"fastest {100 * high:g} %"
    if high == 1.0:
        return f"slowest {100 * (1 - low):.6g} %"
    return f"p{100 * low:g} to p{100 * high:g}"
