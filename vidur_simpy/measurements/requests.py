"""Requests that a server completed, with when it did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidur_simpy.errors import ConfigError, TraceError
from vidur_simpy.measurements.columns import UNITS, find, needed, runs, times, whole
from vidur_simpy.workload.requests import RequestArrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.exchange.vllm_bench import VllmBench
    from vidur_simpy.workload.tables import Table

__all__ = ["OUTPUT", "MeasuredRequests", "measured_requests", "requests_of"]

# Quantity -> names it goes by, first choice first; instants and latencies also take a unit.
ARRIVAL = ("arrived_at", "submit", "queued_ts", "start_time", "arrival_time")
PROMPT = ("num_prefill_tokens", "num_prompt_tokens", "input_toks", "input_len", "prompt_tokens")
OUTPUT = ("num_output_tokens", "num_decode_tokens", "output_toks", "output_len", "output_tokens")
FIRST_TOKEN_INSTANT = ("first_token_at", "first_token_ts", "first_token_time")
FIRST_TOKEN_LATENCY = ("ttft", "time_to_first_token")
END_INSTANT = ("completed_at", "finished_at", "last_token_ts", "finish_time")
END_LATENCY = ("e2e", "e2el", "latency", "request_latency")


@dataclass(frozen=True, eq=False, repr=False)
class MeasuredRequests:
    """Requests that a server completed, with when it did; as a workload, they arrive again.

    Attributes
    ----------
    source : str
        The file.
    arrived_at : ndarray of float, shape (n,)
        Seconds since the first arrival of the run; ascending within each.
    num_prefill_tokens, num_decode_tokens : ndarray of int, shape (n,)
        Prompt and output.
    ttft, e2e : ndarray of float, shape (n,)
        Seconds from arrival to the first token, and to the last.
    runs : ndarray of int, shape (n,)
        The run that each belongs to, from 0; ascending.
    num_failed : int
        Requests left out because they failed.
    model : str
        What the server was asked for; empty if not known.
    """

    source: str
    arrived_at: NDArray[np.float64]
    num_prefill_tokens: NDArray[np.int64]
    num_decode_tokens: NDArray[np.int64]
    ttft: NDArray[np.float64]
    e2e: NDArray[np.float64]
    runs: NDArray[np.intp]
    num_failed: int = 0
    model: str = ""

    def __len__(self) -> int:
        return len(self.arrived_at)

    def __repr__(self) -> str:
        return f"<MeasuredRequests: {len(self)} from {self.source}>"

    @property
    def tpot(self) -> NDArray[np.float64]:
        """Seconds per output token after the first; NaN where there is none."""
        num_later = self.num_decode_tokens - 1.0
        return (self.e2e - self.ttft) / np.where(num_later > 0, num_later, np.nan)

    def split(self) -> Iterator[MeasuredRequests]:
        """Return each run on its own."""
        for run in np.unique(self.runs):
            yield self._take(np.flatnonzero(self.runs == run))

    def requests(
        self,
        rng_arrivals: np.random.Generator | None = None,
        rng_lengths: np.random.Generator | None = None,
        max_model_len: int | None = None,
    ) -> RequestArrays:
        """Return the requests as they arrived, for a simulation; nothing is drawn.

        Parameters
        ----------
        rng_arrivals, rng_lengths, max_model_len : optional
            What a workload is given; not used.

        Raises
        ------
        ConfigError
            If these are several runs.
        """
        num_runs = len(np.unique(self.runs))
        if num_runs > 1:
            raise ConfigError(
                f"{self.source} holds {num_runs} runs, each with its own clock: simulate one after "
                "the other, as in [simulate(cluster, run) for run in measured.split()]."
            )
        return RequestArrays(self.arrived_at, self.num_prefill_tokens, self.num_decode_tokens)

    def _take(self, rows: NDArray[np.intp]) -> MeasuredRequests:
        return MeasuredRequests(
            self.source,
            self.arrived_at[rows],
            self.num_prefill_tokens[rows],
            self.num_decode_tokens[rows],
            self.ttft[rows],
            self.e2e[rows],
            self.runs[rows],
            self.num_failed,
            self.model,
        )


def measured_requests(bench: VllmBench, source: str = "vllm bench serve") -> MeasuredRequests:
    """Return the requests that ``vllm bench serve`` saw completed.

    Raises
    ------
    TraceError
        If none is, one has no length, ends before its first token, or the file's own mean TTFT in
        milliseconds tells that the times are not seconds.
    """
    _check_unit(bench, source)
    start, is_completed = bench.start_times, bench.is_completed
    instants = _Instants(
        start,
        np.where(is_completed, start + bench.ttfts, np.nan),
        np.where(is_completed, start + bench.latencies, np.nan),
    )
    places = [f"{source}, request {index}" for index in range(len(bench.start_times))]
    runs = np.zeros(len(places), np.intp)
    model = str(bench.summary.get("model_id") or "")
    return _made(source, places, instants, bench.input_lens, bench.output_lens, runs, model)


def _check_unit(bench: VllmBench, source: str) -> None:
    """Compare the TTFTs with their mean, which the tool writes in milliseconds."""
    mean_ms, completed = bench.summary.get("mean_ttft_ms"), bench.ttfts[bench.is_completed]
    if not isinstance(mean_ms, int | float) or not mean_ms > 0 or not len(completed):
        return
    mean = float(completed.mean())
    if not 0.5 < mean / (mean_ms / 1e3) < 2:
        raise TraceError(
            f"{source}: the mean of ttfts is {mean:.4g}, mean_ttft_ms is {mean_ms:.4g}: expected "
            f"ttfts in seconds, with a mean of {mean_ms / 1e3:.4g}."
        )


def requests_of(table: Table) -> MeasuredRequests:
    """Return the requests of a table; the package says which columns.

    Raises
    ------
    TraceError
        A column that is missing, or an unusable value, with its line.
    """
    arrived_at = times(table, *needed(table, ARRIVAL, UNITS))
    return _made(
        str(table.path),
        [f"{table.path}, line {line}" for line in table.lines],
        _Instants(
            arrived_at,
            _instants(table, FIRST_TOKEN_INSTANT, FIRST_TOKEN_LATENCY, arrived_at),
            _instants(table, END_INSTANT, END_LATENCY, arrived_at),
        ),
        _lengths(table, PROMPT),
        _lengths(table, OUTPUT),
        runs(table),
    )


def _lengths(table: Table, names: tuple[str, ...]) -> NDArray[np.int64]:
    column = needed(table, names)[0]
    return np.array(table.parsed(column, whole, "a whole number of tokens"), np.int64)


def _instants(
    table: Table,
    instants: tuple[str, ...],
    latencies: tuple[str, ...],
    arrived_at: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the column of instants, else that of latencies after the arrivals."""
    if found := find(table, instants, UNITS):
        return times(table, *found)
    if found := find(table, latencies, UNITS):
        return arrived_at + times(table, *found)
    needed(table, (*instants, *latencies))
    raise AssertionError("unreachable: the column is missing")


class _Instants(NamedTuple):
    """When each request arrived, had its first token and its last; NaN for what never was."""

    arrived_at: NDArray[np.float64]
    first_token_at: NDArray[np.float64]
    completed_at: NDArray[np.float64]


def _made(
    source: str,
    places: Sequence[str],
    instants: _Instants,
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    runs: NDArray[np.intp],
    model: str = "",
) -> MeasuredRequests:
    """Check the requests, leave out those that failed and sort them by arrival."""
    arrived_at, first, end = instants
    is_done = ~np.isnan(first) & ~np.isnan(end)
    # Clocks that count from 1970 resolve a few tenths of a microsecond.
    early = is_done & ((first < arrived_at - 1e-6) | (end < first - 1e-6))
    short = is_done & ((prompt < 1) | (output < 1))
    for bad, what in (
        (np.isnan(arrived_at), "every request to arrive"),
        (early, "the first token and then the end, after the arrival"),
        (short, "a prompt and an output of at least 1 token"),
    ):
        if bad.any():
            row = int(bad.argmax())
            raise TraceError(
                f"{places[row]}: {prompt[row]} + {output[row]} tokens, arrival {arrived_at[row]:g} "
                f"s, first token {first[row]:g} s, end {end[row]:g} s: expected {what}."
            )
    if not is_done.any():
        raise TraceError(f"{source} holds no request that was completed.")
    starts = np.full(runs.max() + 1, math.inf)
    np.minimum.at(starts, runs, arrived_at)
    rows = np.lexsort((arrived_at, runs))
    rows = rows[is_done[rows]]
    return MeasuredRequests(
        source,
        (arrived_at - starts[runs])[rows],
        prompt[rows],
        output[rows],
        np.maximum(first - arrived_at, 0.0)[rows],
        np.maximum(end - arrived_at, 0.0)[rows],
        runs[rows],
        int((~is_done).sum()),
        model,
    )
