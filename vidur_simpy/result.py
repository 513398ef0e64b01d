"""What a simulation leaves behind: tables, their summary, objectives, figures, and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy import plots
from vidur_simpy.columns import COLUMNS
from vidur_simpy.economics import Economics
from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.exchange.exports import Exports
from vidur_simpy.explanation import Explanations
from vidur_simpy.frames import frame
from vidur_simpy.statistics.estimates import interval
from vidur_simpy.storage import write_result
from vidur_simpy.summary import (
    as_html,
    as_text,
    band,
    counts_text,
    figures,
    latencies,
    num_output_tokens,
    ratio,
    with_latencies,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.frames import Columns

__all__ = [
    "NotAvailableError",
    "Plot",
    "Result",
]

ALWAYS_RECORDED = ("requests", "replicas", "timeline")

# Columns that everything below is computed from.
_NEEDED = (
    "arrived_at",
    "scheduled_at",
    "first_token_at",
    "completed_at",
    "num_prefill_tokens",
    "num_decode_tokens",
    "num_restarts",
    "refusal",
)

# The column that says whether a row lies before or after an instant.
_INSTANTS = {
    "requests": "arrived_at",
    "batches": "scheduled_at",
    "stages": "started_at",
    "events": "time",
    "tokens": "time",
    "timeline": "time",
    "phases": "arrived_at",
}


class NotAvailableError(VidurError, AttributeError):
    """A table that was not recorded, or a plot that does not exist."""


class Result(Exports, Economics, Explanations):
    """What a simulation leaves behind.

    Parameters
    ----------
    tables : mapping of str to mapping of str to sequence, or to DataFrame
        Columns of each table, as `columns.COLUMNS` defines them. ``requests``, ``replicas`` and
        ``timeline`` must be there; of ``requests`` only the columns that are not derived. Further
        columns are kept.
    config : mapping or None
        What reproduces the run; None where that is not known.
    info : mapping
        ``simulated_time`` in seconds, ``num_events``, ``version`` and ``seed``.

    Attributes
    ----------
    config : mapping or None
        As given.
    info : dict
        As given; after `after`, also ``measured_from`` in seconds.

    Raises
    ------
    VidurError
        If a table or a column is missing, unknown or of the wrong length.

    Examples
    --------
    >>> requests = {
    ...     "request_id": [0, 1],
    ...     "replica_id": [0, None],
    ...     "arrived_at": [0.0, 1.0],
    ...     "scheduled_at": [0.0, None],
    ...     "first_token_at": [0.5, None],
    ...     "completed_at": [2.0, None],
    ...     "num_prefill_tokens": [100, 9000],
    ...     "num_decode_tokens": [4, 20],
    ...     "num_restarts": [0, 0],
    ...     "refusal": ["", "9020 tokens, max_model_len is 4096"],
    ... }
    >>> tables = {"requests": requests, "replicas": {}, "timeline": {}}
    >>> result = Result(tables, config=None, info={"simulated_time": 2.0})
    >>> result
    <Result: 2 requests, 1 completed, 0 unfinished, 1 refused>
    >>> result.requests.loc[0, ["ttft", "tpot", "e2e"]].to_list()
    [0.5, 0.5, 2.0]
    >>> result.slo(ttft=1.0).to_dict()
    {'ttft': 0.5, 'attainment': 0.5, 'goodput': 0.5}
    """

    def __init__(
        self,
        tables: Mapping[str, Columns],
        *,
        config: Mapping[str, Any] | None,
        info: Mapping[str, Any],
    ) -> None:
        for name in tables:
            if name not in COLUMNS:
                raise unknown_name("table", name, COLUMNS)
        for name in ALWAYS_RECORDED:
            if name not in tables:
                raise VidurError(f"Result needs the table {name!r}, which was not given.")
        for column in _NEEDED:
            if len(tables["requests"].keys()) and column not in tables["requests"]:
                raise VidurError(f"table 'requests' needs the column {column!r}: it is not given.")
        self.config = config
        self.info = dict(info)
        self._columns = dict(tables)
        self._frames: dict[str, pd.DataFrame] = {}

    def __repr__(self) -> str:
        return f"<Result: {counts_text(self.figures)}>"

    def __str__(self) -> str:
        return self.summary_text()

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that were recorded."""
        return tuple(name for name in COLUMNS if name in self._columns)

    @property
    def requests(self) -> pd.DataFrame:
        """A row per request, in order of arrival; latencies of what did not happen are NaN.

        ``tpot`` is NaN for requests of one output token; ``replica_id`` is missing for requests
        that never reached a replica.
        """
        return self._table("requests")

    @property
    def replicas(self) -> pd.DataFrame:
        """A row per replica, over the whole run: utilisation, KV cache, MFU, MBU, energy."""
        return self._table("replicas")

    @property
    def timeline(self) -> pd.DataFrame:
        """A row each time a replica forms a batch: requests running, waiting, KV cache."""
        return self._table("timeline")

    @property
    def batches(self) -> pd.DataFrame:
        """A row per batch, if ``record=("batches",)``."""
        return self._table("batches")

    @property
    def stages(self) -> pd.DataFrame:
        """A row per batch and pipeline stage, if ``record=("stages",)``."""
        return self._table("stages")

    @property
    def events(self) -> pd.DataFrame:
        """A row per event, if ``record=("events",)``."""
        return self._table("events")

    @property
    def tokens(self) -> pd.DataFrame:
        """Inter-token latencies and how often each occurred, if ``record=("tokens",)``."""
        return self._table("tokens")

    @property
    def operators(self) -> pd.DataFrame:
        """Execution time by stage, kind of batch and operator, if ``record=("operators",)``."""
        return self._table("operators")

    @property
    def phases(self) -> pd.DataFrame:
        """What the time of each request went into, if ``record=("phases",)``."""
        return self._table("phases")

    @property
    def plot(self) -> Plot:
        """Figures: ``result.plot.cdf("ttft")`` draws `plots.cdf`, and so on."""
        return Plot(self)

    def summary(self) -> pd.DataFrame:
        """Return the distribution of each latency, in seconds.

        Returns
        -------
        DataFrame
            Rows ``ttft``, ``tpot``, ``e2e``, ``scheduling_delay`` and, if tokens were recorded,
            ``itl`` (inter-token latency, all gaps of all requests pooled); columns ``mean``,
            ``std`` (of the population), ``p50``, ``p90``, ``p95``, ``p99`` (linear between order
            statistics) and ``count``. A request counts in every row for which it has a value,
            also if it is not completed. TPOT and ITL are what ``vllm bench serve`` calls so.
        """
        return latencies(self)

    @cached_property
    def figures(self) -> dict[str, float]:
        """Scalar figures of the run; NaN where there is nothing to compute one from.

        ``num_requests``, ``completed``, ``unfinished``, ``refused``, ``restarts``: counts.
        ``makespan``: first arrival to last completion, in seconds.
        ``request_throughput``, ``output_token_throughput``, ``total_token_throughput``: completed
        requests, their output tokens, their prompt and output tokens, per second of makespan.
        ``utilisation``, ``kv_cache_usage_mean``, ``mfu``, ``mbu``: means over the replicas, 0 to
        1, and ``kv_cache_usage_peak`` the largest; over the whole run, also after `after`.
        """
        return figures(self)

    def slo(
        self,
        *,
        ttft: float | None = None,
        tpot: float | None = None,
        e2e: float | None = None,
        itl: float | None = None,
    ) -> pd.Series:
        """Return how well the run meets limits on its latencies.

        Refused and unfinished requests are misses. As in ``vllm bench serve``, a request of one
        output token meets any limit on TPOT.

        Parameters
        ----------
        ttft, tpot, e2e : float, optional
            Limits on a request, in seconds; a latency equal to its limit meets it.
        itl : float, optional
            Limit on the time between two tokens, in seconds; needs ``record=("tokens",)``. Gaps
            are pooled over requests, so this limit has a share of its own and does not enter
            ``attainment`` and ``goodput``.

        Returns
        -------
        Series
            The share that meets each limit given (of all requests; for ``itl``, of all gaps),
            ``attainment``, the share of all requests that are completed and meet every limit, and
            ``goodput``, how many those are per second of makespan.

        Raises
        ------
        ConfigError
            If no limit on requests is given, or one is not a positive number.
        """
        import pandas as pd

        limits = {"ttft": ttft, "tpot": tpot, "e2e": e2e}
        limits = {name: _limit(name, value) for name, value in limits.items() if value is not None}
        if not limits:
            raise ConfigError("slo() needs a limit in seconds: give ttft, tpot or e2e.")
        is_completed = self.requests["completed_at"].notna()
        is_good = is_completed
        shares = {}
        for name, limit in limits.items():
            meets = self.requests[name] <= limit
            if name == "tpot":
                meets |= is_completed & (num_output_tokens(self.requests) <= 1)
            shares[name] = float(meets.mean())
            is_good = is_good & meets
        if itl is not None:
            shares["itl"] = self._share_of_gaps(_limit("itl", itl))
        shares["attainment"] = float(is_good.mean())
        shares["goodput"] = ratio(int(is_good.sum()), self.figures["makespan"])
        return pd.Series(shares, name="slo", dtype=np.float64)

    def uncertainty(self) -> pd.DataFrame:
        """Return the band of each latency, of a run by `simulate_with_uncertainty`.

        Returns
        -------
        DataFrame
            Rows by latency and statistic, such as ``("ttft", "p50")``; columns ``low``, ``value``
            (as in `summary`) and ``high``, in seconds. The share of machines in the band is
            ``info["uncertainty"]["level"]``.
        """
        if "uncertainty" not in self.info or "measured_from" in self.info:
            raise NotAvailableError(
                "there is no band of uncertainty, or it is that of the run with its warm-up: it "
                "comes from simulate_with_uncertainty."
            )
        return band(self)

    interval = interval

    def after(self, warm_up: float) -> Result:
        """Return the result without its warm-up.

        Requests count from their arrival, rows of the other tables from their instant
        (``scheduled_at``, ``started_at``, ``time``). The tables ``replicas`` and ``operators`` are
        not split by time: they, and the figures taken from them, stay those of the whole run.

        Parameters
        ----------
        warm_up : float
            Instant in seconds; what happens at it or later is kept.
        """
        undivided = [name for name in ("replicas", "operators") if name in self.tables]
        tables: dict[str, Columns] = {name: self._table(name) for name in undivided}
        for name, instant in _INSTANTS.items():
            if name in self.tables:
                table = self._table(name)
                tables[name] = table[table[instant] >= warm_up].reset_index(drop=True)
        return Result(tables, config=self.config, info=self.info | {"measured_from": warm_up})

    def summary_text(self) -> str:
        """Return the summary and the figures as plain text, as the command line prints them."""
        return as_text(self)

    def _repr_html_(self) -> str:
        """Return the same as two html tables."""
        return as_html(self)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        table_format: str = "csv",
        overwrite: bool = False,
    ) -> None:
        """Write every table, the summary, the configuration and the information as files.

        Parameters
        ----------
        directory : path
            Made if needed.
        table_format : str
            ``"csv"`` or ``"parquet"``, smaller and faster, which needs pyarrow.
        overwrite : bool
            Replace an earlier result that is there; other files beside it are left alone.

        Raises
        ------
        ConfigError
            If there is no such format, or pyarrow is not installed.
        VidurError
            If the directory holds a saved result and `overwrite` is not set, holds something that
            is none, or cannot be written.
        """
        write_result(
            directory,
            {name: self._table(name) for name in self.tables},
            self.summary(),
            figures=self.figures,
            config=self.config,
            info=self.info,
            table_format=table_format,
            overwrite=overwrite,
        )

    def _table(self, name: str) -> pd.DataFrame:
        """Return a table, made into a DataFrame when it is first asked for."""
        if name not in self._frames:
            if name not in self._columns:
                measured_by = self.info.get("measured_by")
                raise NotAvailableError(
                    f"{name} are not known of a measurement by {measured_by}."
                    if measured_by
                    else f"{name} were not recorded; pass record=({name!r},) to simulate."
                )
            made = frame(name, self._columns[name])
            self._frames[name] = with_latencies(made) if name == "requests" else made
            self._columns[name] = {}  # the DataFrame replaces the columns
        return self._frames[name]

    def _share_of_gaps(self, limit: float) -> float:
        counts = self.tokens["num_tokens"]
        within = counts[self.tokens["inter_token_latency"] <= limit]
        return ratio(int(within.sum()), int(counts.sum()))


class Plot:
    """The functions of `plots`, applied to one result.

    ``dir(result.plot)`` lists them; ``result.plot.cdf(...)`` is ``plots.cdf(result, ...)``.
    """

    def __init__(self, result: Result) -> None:
        self._result = result

    def __dir__(self) -> list[str]:
        return sorted(plots.__all__)

    def __getattr__(self, name: str) -> Callable[..., Axes]:
        if name in plots.__all__:
            return MethodType(getattr(plots, name), self._result)
        # An AttributeError, which is what copying and display hooks expect of a missing name.
        raise NotAvailableError(str(unknown_name("plot", name, plots.__all__)))


def _limit(name: str, value: float) -> float:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (is_number and value > 0):
        raise ConfigError(f"slo() limit {name} = {value!r}: expected a positive number of seconds.")
    return float(value)
