"""The numbers of a result, and how they are printed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.columns import COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = [
    "LATENCIES",
    "QUANTILES",
    "aligned",
    "as_html",
    "as_text",
    "band",
    "counts_text",
    "digits",
    "figures",
    "html_table",
    "latencies",
    "num_output_tokens",
    "ratio",
    "usual_refusal",
    "weighted_quantiles",
    "with_latencies",
]

LATENCIES = ("ttft", "tpot", "e2e", "scheduling_delay")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def latencies(result: Result) -> pd.DataFrame:
    """Return the statistics of each latency, as `Result.summary` describes them."""
    import pandas as pd

    rows = {name: _describe(result.requests[name].to_numpy()) for name in LATENCIES}
    if "tokens" in result.tables:
        gaps = result.tokens["inter_token_latency"].to_numpy()
        rows["itl"] = _describe(gaps, result.tokens["num_tokens"].to_numpy())
    return pd.DataFrame.from_dict(rows, orient="index")


def band(result: Result) -> pd.DataFrame:
    """Return the band of uncertainty, as `Result.uncertainty` describes it."""
    import pandas as pd

    low, high = (result.info["uncertainty"][end] for end in ("low", "high"))
    summary = result.summary()
    rows = {
        (latency, name): (low[latency][name], summary.loc[latency, name], high[latency][name])
        for latency in low
        for name in low[latency]
    }
    columns = ["low", "value", "high"]
    return pd.DataFrame.from_dict(rows, "index", np.float64, columns).set_axis(
        pd.MultiIndex.from_tuples(rows, names=["latency", "statistic"])
    )


def figures(result: Result) -> dict[str, float]:
    """Return the scalar figures, as `Result.figures` describes them."""
    requests, replicas = result.requests, result.replicas
    is_completed = requests["completed_at"].notna()
    is_refused = requests["refusal"] != ""
    completed = requests[is_completed]
    makespan = float(completed["completed_at"].max() - requests["arrived_at"].min())
    num_output = int(num_output_tokens(completed).sum())
    num_tokens = num_output + int(completed["num_prefill_tokens"].sum())
    return {
        "num_requests": len(requests),
        "completed": len(completed),
        "unfinished": int((~is_completed & ~is_refused).sum()),
        "refused": int(is_refused.sum()),
        "restarts": int(requests["num_restarts"].sum()),
        "makespan": makespan,
        "request_throughput": ratio(len(completed), makespan),
        "output_token_throughput": ratio(num_output, makespan),
        "total_token_throughput": ratio(num_tokens, makespan),
        "utilisation": _mean(replicas, "utilisation"),
        "kv_cache_usage_mean": _mean(replicas, "kv_cache_usage_mean"),
        "kv_cache_usage_peak": _max(replicas, "kv_cache_usage_peak"),
        "mfu": _mean(replicas, "mfu"),
        "mbu": _mean(replicas, "mbu"),
    }


def num_output_tokens(requests: pd.DataFrame) -> pd.Series[int]:
    """Return the output tokens of completed requests, some of which may have ended early."""
    return requests.get("num_output_tokens", requests["num_decode_tokens"])


def with_latencies(requests: pd.DataFrame) -> pd.DataFrame:
    """Add the derived columns to a table of requests, where `columns.COLUMNS` has them."""
    # On arrays: a sweep of short runs spends its time on tables.
    instants = ("arrived_at", "scheduled_at", "first_token_at", "completed_at")
    arrived_at, scheduled_at, first_token_at, completed_at = (
        requests[name].to_numpy(np.float64) for name in instants
    )
    num_later_tokens = num_output_tokens(requests).to_numpy() - 1
    tpot = np.full(len(requests), np.nan)
    ttft, e2e = first_token_at - arrived_at, completed_at - arrived_at
    np.divide(e2e - ttft, num_later_tokens, out=tpot, where=num_later_tokens > 0)
    derived = {
        "ttft": ttft,
        "tpot": tpot,
        "e2e": e2e,
        "scheduling_delay": scheduled_at - arrived_at,
    }
    made = requests.drop(columns=[name for name in derived if name in requests])
    known = [name for name in COLUMNS["requests"] if name in requests or name in derived]
    for place, name in enumerate(known):
        if name in derived:
            made.insert(place, name, derived[name])
    return made


def ratio(count: float, total: float) -> float:
    """Return ``count / total``, NaN where there is nothing to divide by."""
    return count / total if total > 0 else math.nan


def as_text(result: Result) -> str:
    """Return the summary and the figures as plain text."""
    table = [
        f"{name:<18}" + "".join(f"{cell:>10}" for cell in cells)
        for name, *cells in _latency_cells(result)
    ]
    scalars = [f"{name:<26}{value}" for name, value in _scalars(result)]
    return "\n".join([*table, "", *scalars])


def as_html(result: Result) -> str:
    """Return the summary and the figures as two html tables."""
    header, *rows = _latency_cells(result)
    return html_table(rows, header) + html_table(_scalars(result))


def counts_text(figures: Mapping[str, float]) -> str:
    """Return how many requests there were and what became of them."""
    kinds = ("completed", "unfinished", "refused")
    counts = ", ".join(f"{figures[kind]} {kind}" for kind in kinds)
    return f"{figures['num_requests']} requests, {counts}"


def _describe(
    values: NDArray[np.float64], counts: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Return the statistics of values, each of them there `counts` times."""
    if counts is None:
        counts = np.ones(len(values), dtype=np.int64)
    is_there = ~np.isnan(values) & (counts > 0)
    values, counts = values[is_there], counts[is_there]
    if not len(values):
        return dict.fromkeys(("mean", "std", *QUANTILES), math.nan) | {"count": 0}
    mean = np.average(values, weights=counts)
    std = math.sqrt(np.average((values - mean) ** 2, weights=counts))
    quantiles = weighted_quantiles(values, counts, np.array(list(QUANTILES.values())))
    described = dict(zip(QUANTILES, quantiles.tolist(), strict=True))
    return {"mean": float(mean), "std": std} | described | {"count": int(counts.sum())}


def weighted_quantiles(
    values: NDArray[np.float64], counts: NDArray[np.int64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return ``np.quantile(np.repeat(values, counts), shares)`` without repeating."""
    order = np.argsort(values)
    values, ends = values[order], np.cumsum(counts[order])
    position = shares * (ends[-1] - 1)
    below = values[np.searchsorted(ends, np.floor(position), side="right")]
    above = values[np.searchsorted(ends, np.ceil(position), side="right")]
    between: NDArray[np.float64] = below + (above - below) * (position % 1.0)
    return between


def _mean(table: pd.DataFrame, column: str) -> float:
    return float(table[column].mean()) if column in table else math.nan


def _max(table: pd.DataFrame, column: str) -> float:
    return float(table[column].max()) if column in table else math.nan


def _latency_cells(result: Result) -> list[list[str]]:
    """Return the rows of the printed summary, header first."""
    summary = result.summary()
    rows = [["latency (s)", *summary.columns]]
    for name, row in summary.iterrows():
        cells = [digits(row[column]) for column in summary.columns if column != "count"]
        rows.append([str(name), *cells, f"{row['count']:.0f}"])
    return rows


def _scalars(result: Result) -> list[tuple[str, str]]:
    """Return label and value of the lines below the printed summary."""
    figures = result.figures
    rows = [("requests", counts_text(figures).replace(" requests,", ":"))]
    if figures["refused"]:
        rows.append(("most often refused for", usual_refusal(result)))
    if "measured_from" in result.info:
        rows.append(("arrived from", f"{digits(result.info['measured_from'])} s on"))
    peak = f"{_percent(figures['kv_cache_usage_peak'])} peak"
    mbu = [("MBU", _percent(figures["mbu"]))] if not math.isnan(figures["mbu"]) else []
    return [
        *rows,
        ("makespan", f"{digits(figures['makespan'])} s"),
        ("request throughput", f"{digits(figures['request_throughput'])} requests/s"),
        ("output token throughput", f"{digits(figures['output_token_throughput'])} tokens/s"),
        ("total token throughput", f"{digits(figures['total_token_throughput'])} tokens/s"),
        ("restarts", str(figures["restarts"])),
        ("utilisation", _percent(figures["utilisation"])),
        ("KV-cache usage", f"{_percent(figures['kv_cache_usage_mean'])} mean, {peak}"),
        ("MFU", _percent(figures["mfu"])),
        *mbu,
        *_growing_queue(result),
    ]


def _growing_queue(result: Result) -> list[tuple[str, str]]:
    """Return a line that warns of a queue that grows without bound, if it does."""
    queue = result.saturation()
    if not queue.is_saturated:
        return []
    rates = f"{digits(queue.arrival_rate)} requests/s arrive, {digits(queue.service_rate)} leave it"
    return [("queue grows without bound", rates)]


def usual_refusal(result: Result) -> str:
    """Return an example of the most common reason; the numbers in it do not tell reasons apart."""
    refusal = result.requests["refusal"]
    refusal = refusal[refusal != ""]
    kind = refusal.str.replace(r"\d+", "#", regex=True)
    return str(refusal[kind == kind.mode()[0]].iloc[0])


def digits(value: float) -> str:
    """Return a number with four significant digits and no exponent; a dash for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    num_decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(num_decimals, 6)}f}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line of text for each row, with columns as wide as they need."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ("".join(map(str.ljust, row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def html_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return an html table whose rows begin with their name; every cell is escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
