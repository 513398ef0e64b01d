"""Results as the files that benchmark tools write: ``vllm bench serve`` and AIPerf."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import ConfigError
from vidur_simpy.exchange.files import new_file
from vidur_simpy.exchange.token_times import gaps_between_tokens
from vidur_simpy.summary import num_output_tokens, ratio, weighted_quantiles

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["write_aiperf_csv", "write_vllm_bench"]

ITEMS_AT_ONCE = 10_000
NOT_COMPLETED = "not completed when the run stopped"

# What AIPerf 0.13 writes of each metric.
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_STATISTICS = ("avg", "min", "max", "sum", *(f"p{share}" for share in _PERCENTILES), "std")


def write_vllm_bench(
    result: Result,
    path: str | os.PathLike[str],
    *,
    metric_percentiles: Sequence[float] = (99,),
    slo: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the JSON that ``vllm bench serve --save-detailed`` saves.

    `Result.to_vllm_bench` describes it.
    """
    for percentile in metric_percentiles:
        if not 0 <= percentile <= 100:
            raise ConfigError(f"metric_percentiles has {percentile!r}: expected 0 to 100.")
    completed = _completed(result)
    gaps = gaps_between_tokens(result)
    known = _gaps_of(completed, gaps)
    entries = {
        **_setup(result),
        **_totals(result, completed, slo),
        **_lists(result, gaps),
        **_peaks(completed, known),
    }
    for name, column in (("ttft", "ttft"), ("tpot", "tpot"), ("e2el", "e2e")):
        values = completed[column].dropna().to_numpy()
        counts = np.ones(len(values), dtype=np.int64)
        entries |= _statistics(name, values, counts, metric_percentiles)
    entries |= _gap_statistics(result, completed, known, metric_percentiles)
    with new_file(path, overwrite=overwrite) as file:
        file.writelines(_object(entries))


def write_aiperf_csv(
    result: Result,
    path: str | os.PathLike[str],
    *,
    slo: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the tables of AIPerf's ``profile_export_aiperf.csv``.

    `Result.to_aiperf_csv` describes it.
    """
    completed = _completed(result)
    gaps = _gaps_of(completed, gaps_between_tokens(result))
    rows = sorted(_aiperf_metrics(completed, gaps or []).items())
    values = sorted(_aiperf_values(result, completed, slo).items())
    with new_file(path, overwrite=overwrite) as file:
        writer = csv.writer(file)
        writer.writerow(["Metric", *_STATISTICS])
        for _, (name, sample) in rows:
            if len(sample):
                shares = np.percentile(sample, _PERCENTILES)
                ends = (sample.mean(), sample.min(), sample.max(), sample.sum())
                writer.writerow([name, *map(_cell, (*ends, *shares, sample.std()))])
        writer.writerow([])
        writer.writerow(["Metric", "Value"])
        writer.writerows([name, _cell(value)] for _, (name, value) in values)


def _completed(result: Result) -> pd.DataFrame:
    """Return the requests that were served, with `num_output_tokens`."""
    requests = result.requests
    requests = requests.assign(num_output_tokens=num_output_tokens(requests))
    return requests[requests["completed_at"].notna()]


def _setup(result: Result) -> dict[str, Any]:
    """Return what the tool says about its command line, null where there is no such thing.

    There is no date: one result gives the same bytes whenever it is written.
    """
    config = result.config or {}
    model = (config.get("cluster") or {}).get("model")
    arrivals = (config.get("workload") or {}).get("arrivals") or {}
    kind, rate = arrivals.get("type"), arrivals.get("rate")
    shape = {"poisson": 1.0, "gamma": 1 / arrivals.get("cv", 1.0) ** 2}
    return {
        "date": None,
        "endpoint_type": "vidur_simpy",  # an older name of the next
        "backend": "vidur_simpy",
        "label": None,
        "model_id": model if isinstance(model, str) else None,
        "tokenizer_id": None,
        "num_prompts": len(result.requests),
        "request_rate": "inf" if kind == "all_at_once" else rate,
        "burstiness": shape.get(str(kind)),
        "max_concurrency": None,
    }


def _totals(
    result: Result, completed: pd.DataFrame, slo: Mapping[str, float] | None
) -> dict[str, Any]:
    figures = result.figures
    return {
        "duration": figures["makespan"],
        "completed": len(completed),
        "failed": len(result.requests) - len(completed),
        "total_input_tokens": int(completed["num_prefill_tokens"].sum()),
        "total_output_tokens": int(completed["num_output_tokens"].sum()),
        "request_throughput": figures["request_throughput"],
        "request_goodput": float(result.slo(**slo)["goodput"]) if slo else None,
        "output_throughput": figures["output_token_throughput"],
        "total_token_throughput": figures["total_token_throughput"],
    }


def _lists(result: Result, gaps: Sequence[NDArray[np.float64] | None]) -> dict[str, Any]:
    """Return an entry per request in each list; what failed has zeros, as in the tool."""
    requests = result.requests
    is_completed = requests["completed_at"].notna()
    reasons = requests["refusal"].where(requests["refusal"] != "", NOT_COMPLETED)
    waits = requests["scheduling_delay"]
    return {
        "input_lens": requests["num_prefill_tokens"].tolist(),
        "output_lens": num_output_tokens(requests).where(is_completed, 0).tolist(),
        "ttfts": requests["ttft"].where(is_completed, 0.0).tolist(),
        "itls": ([] if known is None else known.tolist() for known in gaps),
        "latencies": requests["e2e"].where(is_completed, 0.0).tolist(),
        "start_times": requests["arrived_at"].tolist(),
        "queue_times": [0.0] * len(requests),  # the simulated client never holds one back
        "generated_texts": [""] * len(requests),
        "errors": reasons.where(~is_completed, "").tolist(),
        "server_queue_times": waits.tolist(),
        "server_ttfts": requests["ttft"].where(is_completed).tolist(),
    }


def _peaks(completed: pd.DataFrame, gaps: Sequence[NDArray[np.float64]] | None) -> dict[str, Any]:
    """Return most requests at a time, and most tokens in one second where their times are known."""
    moves = np.concatenate((completed["arrived_at"], completed["completed_at"]))
    change = np.repeat((1, -1), len(completed))
    concurrency = np.cumsum(change[np.lexsort((change, moves))])  # a leaver makes room
    most_tokens = None
    if gaps is not None and len(completed):
        first_token_at = completed["first_token_at"].to_numpy()
        later = [first + np.cumsum(row) for first, row in zip(first_token_at, gaps, strict=True)]
        seconds = np.concatenate((first_token_at, *later)) - completed["arrived_at"].min()
        most_tokens = float(np.bincount(seconds.astype(np.int64)).max())
    return {
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": int(concurrency.max(initial=0)),
        "rtfx": 0.0,
    }


def _statistics(
    name: str,
    values: NDArray[np.float64],
    counts: NDArray[np.int64],
    percentiles: Sequence[float],
) -> dict[str, float | None]:
    """Return mean, median, std and percentiles of values in ms; unknown without any."""
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std")]
    keys += [f"p{percentile:g}_{name}_ms" for percentile in percentiles]
    if not len(values):
        return dict.fromkeys(keys)
    mean = np.average(values, weights=counts)
    std = math.sqrt(np.average((values - mean) ** 2, weights=counts))
    shares = np.array([50.0, *percentiles]) / 100
    median, *others = weighted_quantiles(values, counts, shares).tolist()
    return {
        key: 1e3 * float(value)
        for key, value in zip(keys, (mean, median, std, *others), strict=True)
    }


def _gap_statistics(
    result: Result,
    completed: pd.DataFrame,
    gaps: Sequence[NDArray[np.float64]] | None,
    percentiles: Sequence[float],
) -> dict[str, float | None]:
    """Return the statistics of the ITL; without recorded tokens only its mean is known."""
    if gaps is not None:
        values = np.concatenate((np.zeros(0), *gaps))
        return _statistics("itl", values, np.ones(len(values), dtype=np.int64), percentiles)
    if "tokens" in result.tables:
        tokens = result.tokens
        values = tokens["inter_token_latency"].to_numpy()
        return _statistics("itl", values, tokens["num_tokens"].to_numpy(), percentiles)
    unknown = _statistics("itl", np.zeros(0), np.zeros(0, dtype=np.int64), percentiles)
    num_gaps = (completed["num_output_tokens"] - 1).sum()
    total = (completed["e2e"] - completed["ttft"]).sum()
    return unknown | {"mean_itl_ms": _json_number(1e3 * ratio(total, num_gaps))}


def _gaps_of(
    completed: pd.DataFrame, gaps: Sequence[NDArray[np.float64] | None]
) -> list[NDArray[np.float64]] | None:
    """Return the gaps of the requests that were served, or None if any are not known."""
    rows = [gaps[row] for row in completed.index.tolist()]
    known = [row for row in rows if row is not None]
    return known if len(known) == len(rows) else None


def _object(entries: Mapping[str, Any]) -> Iterator[str]:
    """Return the text of a JSON object whose lists may be long."""
    separator = "{\n"
    for name, value in entries.items():
        yield f"{separator}{json.dumps(name)}: "
        separator = ",\n"
        if isinstance(value, Iterable) and not isinstance(value, str):
            yield "["
            items, inner = iter(value), ""
            while chunk := [_json_number(item) for item in islice(items, ITEMS_AT_ONCE)]:
                yield inner + json.dumps(chunk)[1:-1]
                inner = ", "
            yield "]"
        else:
            yield json.dumps(_json_number(value))
    yield "\n}\n"


def _json_number(value: Any) -> Any:
    """Return null for NaN, which JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _aiperf_metrics(
    completed: pd.DataFrame, gaps: Sequence[NDArray[np.float64]]
) -> dict[str, tuple[str, NDArray[np.float64]]]:
    """Return tag, name and values of the metrics of requests."""
    pooled = np.concatenate((np.zeros(0), *gaps))
    second = np.array([row[0] for row in gaps if len(row)])
    # What AIPerf calls inter-token latency is one value per request, the TPOT of vLLM.
    tpot = completed["tpot"].dropna().to_numpy()
    prompt = completed["num_prefill_tokens"].to_numpy(dtype=np.float64)
    ttft = completed["ttft"].to_numpy()
    with np.errstate(divide="ignore"):
        rates = {"output": 1 / tpot, "prefill": prompt / ttft}
    return {
        "inter_chunk_latency": ("Inter Chunk Latency (ms)", 1e3 * pooled),
        "inter_token_latency": ("Inter Token Latency (ms)", 1e3 * tpot),
        "input_sequence_length": ("Input Sequence Length (tokens)", prompt),
        "output_sequence_length": (
            "Output Sequence Length (tokens)",
            completed["num_output_tokens"].to_numpy(dtype=np.float64),
        ),
        "output_token_throughput_per_user": (
            "Output Token Throughput Per User (tokens/sec/user)",
            rates["output"][np.isfinite(rates["output"])],
        ),
        "prefill_throughput_per_user": (
            "Prefill Throughput Per User (tokens/sec/user)",
            rates["prefill"][np.isfinite(rates["prefill"])],
        ),
        "request_latency": ("Request Latency (ms)", 1e3 * completed["e2e"].to_numpy()),
        "time_to_first_token": ("Time to First Token (ms)", 1e3 * ttft),
        "time_to_second_token": ("Time to Second Token (ms)", 1e3 * second),
    }


def _aiperf_values(
    result: Result, completed: pd.DataFrame, slo: Mapping[str, float] | None
) -> dict[str, tuple[str, float]]:
    """Return tag, name and value of the metrics of the run."""
    figures = result.figures
    num_requests = len(result.requests)
    values: dict[str, tuple[str, float]] = {
        "benchmark_duration": ("Benchmark Duration (sec)", figures["makespan"]),
        "error_request_count": ("Error Request Count", num_requests - len(completed)),
        "output_token_throughput": (
            "Output Token Throughput (tokens/sec)",
            figures["output_token_throughput"],
        ),
        "request_count": ("Request Count", len(completed)),
        "request_throughput": (
            "Request Throughput (requests/sec)",
            figures["request_throughput"],
        ),
        "total_token_throughput": (
            "Total Token Throughput (tokens/sec)",
            figures["total_token_throughput"],
        ),
    }
    if slo:
        met = result.slo(**slo)
        num_good = round(met["attainment"] * num_requests)
        values |= {
            "good_request_count": ("Good Request Count", num_good),
            "good_request_fraction": ("GoodRequestFraction (ratio)", float(met["attainment"])),
            "goodput": ("Goodput (requests/sec)", float(met["goodput"])),
        }
    return values


def _cell(value: float) -> str:
    """Return a number as AIPerf writes it, but for its digits; nothing for NaN."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.6f}" if math.isfinite(value) else ""
