"""The parts that add up to a latency of each request, as far as they were recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import unknown_name
from vidur_simpy.summary import num_output_tokens

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["METRICS", "PHASES", "coarse_parts", "parts_of"]

PHASES = tuple(COLUMNS["phases"])[2:]
METRICS = ("e2e", "ttft", "tpot")

# The phases before and behind the first token, but for what preemptions cost there.
BEFORE = ("queue_time", "prefill_time", "prefill_wait_time")
BEHIND = ("decode_time", "decode_stall_time", "decode_wait_time")


def parts_of(result: Result, metric: str = "e2e") -> pd.DataFrame:
    """Return the parts of a latency, which add up to it: a row per request that has a value.

    Parameters
    ----------
    result : Result
    metric : str
        ``"e2e"``: the table of phases. ``"ttft"`` and ``"tpot"``: the phases before and behind
        the first token, and ``restart_time``, what preemptions cost there; those of ``tpot``
        divided by its number of tokens. If phases were not recorded, coarse parts: see
        `coarse_parts`.

    Returns
    -------
    DataFrame
        In seconds; its index is that of ``result.requests``.

    Raises
    ------
    ConfigError
        If there is no such metric.
    """
    if metric not in METRICS:
        raise unknown_name("metric of breakdown()", metric, METRICS)
    requests = result.requests
    requests = requests[requests[metric].notna() & requests["completed_at"].notna()]
    if "phases" not in result.tables:
        return coarse_parts(requests, metric)
    phases = result.phases.set_index("request_id").loc[requests["request_id"], list(PHASES)]
    phases = phases.set_axis(requests.index)
    if metric == "e2e":
        return phases
    shown = phases[list(BEFORE if metric == "ttft" else BEHIND)]
    whole = requests["ttft"] if metric == "ttft" else requests["e2e"] - requests["ttft"]
    rest = whole - shown.sum(axis=1)
    parts = shown.assign(restart_time=rest.where(rest > 1e-9, 0.0))
    if metric == "tpot":
        parts = parts.div(num_output_tokens(requests) - 1, axis=0)
    return parts


def coarse_parts(requests: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the parts that the table of requests tells: to the first batch, and first token.

    Where nobody knows when requests were in their first batch, as in a measurement, the first
    two are one.
    """
    import pandas as pd

    ttft = requests["ttft"].fillna(requests["e2e"])
    queue = requests["scheduling_delay"]
    before = {"to_first_token_time": ttft}
    if not queue.isna().any():
        before = {"queue_time": queue, "first_token_time": (ttft - queue).clip(lower=0.0)}
    output = {"output_time": requests["e2e"] - ttft}
    parts = {"e2e": before | output, "ttft": before, "tpot": output}[metric]
    frame = pd.DataFrame(parts, index=requests.index, dtype=np.float64)
    if metric == "tpot":
        frame = frame.div(num_output_tokens(requests) - 1, axis=0)
    return frame
