"""The methods of a result that write the files of other tools: benchmark reports and traces."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vidur_simpy.result import Result

__all__ = ["Exports"]


class Exports:
    """The methods of a `Result` that write the files of other tools.

    Each writes one file, compressed with gzip if its name ends in ``.gz``; the file is there
    complete or not at all. A `VidurError` says if it is there already and `overwrite` is not set,
    or if it cannot be written.
    """

    def to_vllm_bench(
        self,
        path: str | os.PathLike[str],
        *,
        metric_percentiles: Sequence[float] = (99,),
        slo: Mapping[str, float] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the JSON that ``vllm bench serve --save-detailed`` saves.

        `load_vllm_bench` reads it. Entries and definitions are those of the tool: latencies and
        lengths per request in seconds and tokens, statistics in milliseconds over the requests
        that were served. The others have an error and zeros. Nothing is made up: the times
        between tokens (``itls``) are empty lists unless batches were recorded, from which they
        are exact. The statistics of the ITL are exact with batches or tokens recorded, the latter
        over all requests; otherwise only ``mean_itl_ms`` is known and the others are null, as is
        ``max_output_tokens_per_s`` without batches.

        Parameters
        ----------
        path : path
            The file to write.
        metric_percentiles : sequence of float
            Percentiles to write of each metric, 0 to 100.
        slo : mapping of str to float, optional
            Limits as `Result.slo` takes them, in seconds, for ``request_goodput``; null without.
        overwrite : bool
            Replace a file that is there.

        Raises
        ------
        ConfigError
            If a percentile or a limit is out of range.
        VidurError
            If the file is there, or cannot be written.
        """
        from vidur_simpy.exchange.bench_files import write_vllm_bench

        result = cast("Result", self)
        write_vllm_bench(
            result, path, metric_percentiles=metric_percentiles, slo=slo, overwrite=overwrite
        )

    def to_aiperf_csv(
        self,
        path: str | os.PathLike[str],
        *,
        slo: Mapping[str, float] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the two tables of AIPerf's ``profile_export_aiperf.csv``.

        Names, units (milliseconds) and statistics are AIPerf's, whose inter-token latency is one
        value per request: the TPOT here. Its inter-chunk latency, which is the ITL here, and its
        time to second token are there if batches were recorded.

        Parameters
        ----------
        path : path
            The file to write.
        slo : mapping of str to float, optional
            Limits as `Result.slo` takes them, in seconds, for AIPerf's goodput.
        overwrite : bool
            Replace a file that is there.

        Raises
        ------
        ConfigError
            If a limit is out of range.
        VidurError
            If the file is there, or cannot be written.
        """
        from vidur_simpy.exchange.bench_files import write_aiperf_csv

        write_aiperf_csv(cast("Result", self), path, slo=slo, overwrite=overwrite)

    def to_chrome_trace(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a trace for Perfetto (ui.perfetto.dev) or Chrome (about:tracing).

        A replica is a process and a pipeline stage a thread. A batch is a slice on each stage,
        with its tokens, and its requests if batches were recorded, as arguments; arrows follow it
        along the stages. Counters show requests running and waiting and the share of KV cache in
        use, as `Result.timeline` has them. The life of each request is an asynchronous slice on
        its replica, with its wait, prefill and decode; refused requests are instants of the
        router. Times are rounded to nanoseconds.

        Parameters
        ----------
        path : path
            The file to write; viewers read ``.json`` and ``.json.gz``.
        overwrite : bool
            Replace a file that is there.

        Raises
        ------
        NotAvailableError
            If stages were not recorded.
        VidurError
            If the file is there, or cannot be written.
        """
        from vidur_simpy.exchange.trace_export import write_chrome_trace

        write_chrome_trace(cast("Result", self), path, overwrite=overwrite)

    def to_event_trace(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the table ``events`` as a JSON array, an object per event and line.

        Each has ``time`` (seconds) and ``event_type``, and of ``replica_id``, ``stage_id``,
        ``batch_index`` and ``request_id`` those that the event has.

        Parameters
        ----------
        path : path
            The file to write.
        overwrite : bool
            Replace a file that is there.

        Raises
        ------
        NotAvailableError
            If events were not recorded.
        VidurError
            If the file is there, or cannot be written.
        """
        from vidur_simpy.exchange.trace_export import write_event_trace

        write_event_trace(cast("Result", self), path, overwrite=overwrite)
