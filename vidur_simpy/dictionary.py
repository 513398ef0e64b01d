"""What every column of every table and every figure of one run or several means, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidur_simpy.columns import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MEASURES", "metrics_dictionary"]

# What searches say of a configuration that was run several times under an SLO.
JUDGED: dict[str, tuple[str, str]] = {
    "verdict": ("", "meets or misses the SLO, or cannot tell; empty if not run in full"),
    "num_runs": ("", "runs behind the verdict, each with a seed of its own"),
    "<latency>_<statistic>": (
        "s",
        "as in summary: of all runs together if it is limited, else the mean over them",
    ),
    "<latency>_<statistic>_low": ("s", "lower end of its confidence interval, if it is limited"),
    "<latency>_<statistic>_high": ("s", "upper end of its confidence interval, if it is limited"),
    "fraction": ("", "share of requests within all limits, if the SLO asks for one, 0 to 1"),
    "fraction_ratio": ("", "latency over limit at the share asked for, at most 1 if it is met"),
    "fraction_ratio_low": ("", "lower end of its confidence interval"),
    "fraction_ratio_high": ("", "upper end of its confidence interval"),
}

# What results say besides their tables: where -> name -> (unit, meaning). A name with <latency>
# or <statistic> stands for one with each of those of ``summary``.
MEASURES: dict[str, dict[str, tuple[str, str]]] = {
    "requests": {
        "priority": ("", "as given, smaller is more urgent; there if any is not 0"),
        "deadline": ("s", "instant by which it should be done; there if any has one"),
        "session_id": ("", "conversation it belongs to; there if any does"),
    },
    "summary": {
        "ttft": ("s", "time to first token, over the requests that got one"),
        "tpot": ("s", "time per output token after the first, of requests with several"),
        "e2e": ("s", "end-to-end latency, over the completed requests"),
        "scheduling_delay": ("s", "wait for the first batch, over the requests that got into one"),
        "itl": ("s", "inter-token latency: all gaps of all requests, if tokens were recorded"),
        "mean": ("s", "arithmetic mean"),
        "std": ("s", "standard deviation of the population"),
        "p50": ("s", "median; quantiles are linear between order statistics"),
        "p90": ("s", "quantile 0.9"),
        "p95": ("s", "quantile 0.95"),
        "p99": ("s", "quantile 0.99"),
        "count": ("", "how many values there are"),
    },
    "figures": {
        "num_requests": ("", "requests that arrived"),
        "completed": ("", "requests that got their last token"),
        "unfinished": ("", "requests accepted, but not complete when the run ended"),
        "refused": ("", "requests refused at arrival, and why is in their refusal"),
        "restarts": ("", "preemptions by recomputation, of all requests"),
        "makespan": ("s", "from the first arrival to the last completion"),
        "request_throughput": ("1/s", "completed requests per second of makespan"),
        "output_token_throughput": ("tokens/s", "their output tokens per second of makespan"),
        "total_token_throughput": ("tokens/s", "their prompt and output tokens, likewise"),
        "utilisation": ("", "share of the time that stages were busy, mean over replicas, 0 to 1"),
        "kv_cache_usage_mean": ("", "share of KV-cache blocks in use, mean over time and replicas"),
        "kv_cache_usage_peak": ("", "largest share of KV-cache blocks in use on any replica"),
        "mfu": ("", "model FLOPs utilisation, mean over replicas, 0 to 1"),
        "mbu": ("", "model bandwidth utilisation, mean over replicas, 0 to 1"),
    },
    "slo": {
        "ttft": ("", "share of all requests that meet the limit on TTFT, 0 to 1"),
        "tpot": ("", "share that meets the limit on TPOT; one of a single token does"),
        "e2e": ("", "share that meets the limit on the end-to-end latency"),
        "itl": ("", "share of all gaps between tokens that meet the limit"),
        "attainment": ("", "share of requests that are complete and meet every limit but itl"),
        "goodput": ("1/s", "such requests per second of makespan"),
    },
    "energy": {
        "energy_kwh": ("kWh", "energy of all devices, busy or idle, by power.mean_power_w"),
        "mean_power_w": ("W", "mean power of all devices together"),
        "joules_per_output_token": ("J", "all the energy, per output token of completed requests"),
        "kwh_per_million_input_tokens": ("kWh", "all the energy, per million prompt tokens"),
        "kwh_per_million_output_tokens": ("kWh", "all the energy, per million output tokens"),
        "kwh_per_million_tokens": ("kWh", "all the energy, per million tokens of both kinds"),
    },
    "cost": {
        "gpu_hours": ("h", "devices times duration, busy or idle"),
        "cost": ("money", "gpu_hours times the price, in its currency"),
        "cost_per_million_input_tokens": ("money", "the whole cost, per million prompt tokens"),
        "cost_per_million_output_tokens": ("money", "the whole cost, per million output tokens"),
        "cost_per_million_tokens": ("money", "the whole cost, per million tokens of both kinds"),
    },
    "sweep": {
        "point": ("", "number of the point of the grid; its settings are columns, too"),
        "replication": ("", "number of the replication, from 0"),
        "seed": ("", "seed of the run"),
        "<latency>_<statistic>": ("s", "as in summary; a count has no unit"),
        "simulated_time": ("s", "instant at which the run ended"),
        "slo_<latency>": ("", "share that meets the limit, as in slo"),
        "slo_attainment": ("", "attainment, as in slo"),
        "goodput": ("1/s", "as in slo"),
        "error": ("", "why the run failed; empty if it did not"),
    },
    "capacity": {
        "rate": ("1/s", "arrival rate that was tried"),
        **JUDGED,
    },
    "recommend": {
        "num_devices": ("", "devices of all replicas"),
        **JUDGED,
        "simulated_time": ("s", "instant at which the run ended, mean over the runs"),
        "gpu_hours_per_million_tokens": ("h", "devices times duration, per million tokens"),
        "kwh_per_million_tokens": ("kWh", "all the energy, per million tokens of both kinds"),
        "mean_in_system": ("", "requests in the system while requests arrive, mean over time"),
        "arrival_share": ("", "share of the run until the last arrival, 0 to 1"),
        "cost_per_hour": ("money", "price of an hour of all devices, in its currency"),
        "cost_per_million_tokens": ("money", "the whole cost, per million tokens of both kinds"),
        "error": ("", "why it cannot run; empty if it can"),
    },
    "compare": {
        "metric": ("", "column of requests that is compared; part of the index, as the next two"),
        "statistic": ("", "mean or a quantile such as p99"),
        "result": ("", "name of the run that is compared with the baseline"),
        "baseline": ("", "statistic of the baseline, in the unit of the metric"),
        "value": ("", "statistic of the run, in the unit of the metric"),
        "difference": ("", "value - baseline, in the unit of the metric"),
        "low": ("", "lower end of its confidence interval, in the unit of the metric"),
        "high": ("", "upper end of its confidence interval, in the unit of the metric"),
        "relative": ("", "difference / baseline"),
        "count": ("", "requests behind it"),
        "is_real": ("", "whether the interval leaves out 0"),
        "verdict": ("", "lower, higher, not distinguishable, equal, or too few requests"),
    },
}


def metrics_dictionary(table: str | None = None) -> pd.DataFrame:
    """Return the meaning and the unit of every column and figure of a run, and of several.

    Parameters
    ----------
    table : str, optional
        Only the columns of this table of a `Result`, or what this method gives: ``summary``,
        ``figures``, ``slo``, ``energy``, ``cost``. Of several runs ``sweep``, ``capacity`` and
        ``recommend``, for the columns of `Sweep.table`, `Capacity.curve` and
        `Recommendation.table` that are no settings and not among the figures, and ``compare`` for
        `Comparison.table`.

    Returns
    -------
    DataFrame
        Columns ``table``, ``column``, ``unit`` (empty for shares and counts) and ``meaning``: the
        tables first, as `COLUMNS` has them, then the methods. A notebook shows all of it.

    Raises
    ------
    ConfigError
        If there is no such table.

    Examples
    --------
    >>> words = metrics_dictionary("requests").set_index("column")
    >>> words.loc["ttft"].to_list()
    ['requests', 's', 'time to first token: first_token_at - arrived_at']
    """
    import pandas as pd

    from vidur_simpy.errors import unknown_name

    if table is not None and table not in COLUMNS | MEASURES:
        raise unknown_name("table", table, COLUMNS | MEASURES)
    rows = [
        (name, column, unit, meaning)
        for name, columns in (*COLUMNS.items(), *MEASURES.items())
        if table in (None, name)
        for column, (unit, meaning) in columns.items()
    ]

    class Dictionary(pd.DataFrame):
        """A table that shows its texts in full."""

        @property
        def _constructor(self) -> type[pd.DataFrame]:
            return pd.DataFrame

        def _repr_html_(self) -> str:
            with pd.option_context("display.max_colwidth", None):
                return str(self.to_html(index=False, max_rows=None))

    return Dictionary(rows, columns=["table", "column", "unit", "meaning"])
