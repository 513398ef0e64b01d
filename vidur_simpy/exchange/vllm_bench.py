"""What ``vllm bench serve`` measured, read from its result file."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import TraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["VllmBench", "read_vllm_bench"]

# The lists that --save-detailed adds and that are needed, with the smallest value each may have.
_NEEDED = {"input_lens": 0, "output_lens": 0, "ttfts": 0.0, "start_times": -np.inf}


@dataclass(frozen=True, eq=False)
class VllmBench:
    """What ``vllm bench serve`` measured, request by request, in the order of sending.

    Attributes
    ----------
    input_lens, output_lens : ndarray of int, shape (n,)
        Prompt and output tokens; no output tokens if the request failed.
    start_times : ndarray of float, shape (n,)
        When each request was sent, in seconds of the client's clock.
    ttfts, latencies : ndarray of float, shape (n,)
        Seconds from there to the first and to the last token.
    itls : list of ndarray of float
        Times between the tokens of each request, in seconds; empty where they are not known.
    server_queue_times : ndarray of float, shape (n,)
        Wait in the server as the server says, in seconds; NaN where it does not.
    errors : list of str
        Why each request failed; empty if it did not.
    summary : dict
        Every other entry of the file, such as ``duration`` (seconds) and ``p99_ttft_ms``.
    """

    input_lens: NDArray[np.int64]
    output_lens: NDArray[np.int64]
    start_times: NDArray[np.float64]
    ttfts: NDArray[np.float64]
    latencies: NDArray[np.float64]
    itls: list[NDArray[np.float64]]
    server_queue_times: NDArray[np.float64]
    errors: list[str]
    summary: dict[str, Any]

    @property
    def is_completed(self) -> NDArray[np.bool_]:
        """Whether each request was served, shape (n,)."""
        return np.array([not error for error in self.errors], dtype=bool)

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return the columns of the tables of a `Result`; its clock starts with the first request.

        The server is replica 0. ``scheduled_at`` is NaN where the server did not say how long
        a request waited; failed requests are refused ones, with their error as the reason.
        """
        arrived_at = self.start_times - self.start_times.min()
        is_completed = self.is_completed
        num_requests = len(arrived_at)
        requests = {
            "request_id": np.arange(num_requests),
            "replica_id": np.zeros(num_requests, dtype=np.int64),
            "arrived_at": arrived_at,
            "scheduled_at": arrived_at + self.server_queue_times,
            "first_token_at": np.where(is_completed, arrived_at + self.ttfts, np.nan),
            "completed_at": np.where(is_completed, arrived_at + self.latencies, np.nan),
            "num_prefill_tokens": self.input_lens,
            "num_decode_tokens": self.output_lens,
            "num_restarts": np.zeros(num_requests, dtype=np.int64),
            "refusal": self.errors,
        }
        replicas = {"replica_id": [0], "num_requests": [num_requests]}
        tables: dict[str, dict[str, Any]] = {"requests": requests, "replicas": replicas}
        tables["timeline"] = {}
        if any(len(gaps) for gaps in self.itls):
            tables["tokens"] = self._tokens(arrived_at)
        return tables

    def _tokens(self, arrived_at: NDArray[np.float64]) -> dict[str, Any]:
        """Return a row for each gap between two tokens of requests that were served, by time."""
        served = np.flatnonzero(self.is_completed)
        first_token_at = arrived_at + self.ttfts
        times = np.concatenate(
            [np.zeros(0), *(first_token_at[i] + np.cumsum(self.itls[i]) for i in served)]
        )
        order = np.argsort(times, kind="stable")
        return {
            "time": times[order],
            "replica_id": np.zeros(len(times), dtype=np.int64),
            "inter_token_latency": np.concatenate([np.zeros(0), *(self.itls[i] for i in served)])[
                order
            ],
            "num_tokens": np.ones(len(times), dtype=np.int64),
        }


def read_vllm_bench(path: str | os.PathLike[str]) -> VllmBench:
    """Return what ``vllm bench serve --save-result --save-detailed`` wrote.

    Files of versions that did not save ``latencies`` are read, too: a latency is the TTFT and the
    times between tokens.

    Parameters
    ----------
    path : path
        A file with one result; compressed if it ends in ``.gz``.

    Raises
    ------
    TraceError
        If there is no such file, it is not such a result, or a list has an unusable value; the
        message names the entry.
    """
    entries = _entries(Path(path))
    place = f"{os.fspath(path)!r}"
    for name in _NEEDED:
        if name not in entries:
            raise TraceError(
                f"{place} has no {name!r}: expected what vllm bench serve saves with "
                "--save-result --save-detailed (older versions have no start_times)."
            )
    columns = {name: _numbers(place, entries, name, least) for name, least in _NEEDED.items()}
    num_requests = len(columns["start_times"])
    if num_requests == 0:
        raise TraceError(f"{place} holds no requests.")
    itls = [_row(place, index, row) for index, row in enumerate(_list(place, entries, "itls"))]
    if "latencies" not in entries and itls:
        sums = [gaps.sum() for gaps in itls]
        entries["latencies"] = (columns["ttfts"][: len(sums)] + sums).tolist()
    columns["latencies"] = _numbers(place, entries, "latencies", 0.0)
    is_failed = columns["output_lens"] == 0
    waits = _list(place, entries, "server_queue_times") or [None] * num_requests
    known = [np.nan if wait is None else wait for wait in waits]
    columns["server_queue_times"] = _numbers(
        place, {"server_queue_times": known}, "server_queue_times", 0.0, may_lack=True
    )
    errors = _list(place, entries, "errors") or [""] * num_requests
    itls = itls or [np.zeros(0)] * num_requests
    lists: dict[str, Any] = {**columns, "errors": errors, "itls": itls}
    for name, values in lists.items():
        if len(values) != num_requests:
            raise TraceError(
                f"{place}: {name!r} has {len(values)} values, 'start_times' has {num_requests}: "
                "expected one per request."
            )
    errors = [
        str(error) if error else ("failed" if failed else "")
        for error, failed in zip(errors, is_failed, strict=True)
    ]
    order = np.argsort(columns["start_times"], kind="stable")
    return VllmBench(
        input_lens=columns["input_lens"][order].astype(np.int64),
        output_lens=columns["output_lens"][order].astype(np.int64),
        start_times=columns["start_times"][order],
        ttfts=columns["ttfts"][order],
        latencies=columns["latencies"][order],
        itls=[itls[index] for index in order],
        server_queue_times=columns["server_queue_times"][order],
        errors=[errors[index] for index in order],
        summary={name: value for name, value in entries.items() if not isinstance(value, list)},
    )


def _entries(path: Path) -> dict[str, Any]:
    """Return the one JSON object that a file holds."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        entries = json.loads(content.decode("utf-8"))
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"cannot read {str(path)!r}: {error}.") from error
    except ValueError as error:
        hint = "; --append-result puts several results in a file, keep one of its lines"
        several = hint if "Extra data" in str(error) else ""
        raise TraceError(f"{str(path)!r} is not one JSON object: {error}{several}.") from error
    if not isinstance(entries, dict):
        raise TraceError(
            f"{str(path)!r} holds a {type(entries).__name__}: expected the JSON object that "
            "vllm bench serve writes."
        )
    return entries


def _numbers(
    place: str,
    entries: Mapping[str, Any],
    name: str,
    least: float,
    *,
    may_lack: bool = False,
) -> NDArray[np.float64]:
    """Return a list of the file, whose values are finite (or lack) and not below the least one."""
    try:
        values = np.asarray(entries[name], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.zeros((0, 0))
    if values.ndim != 1:
        raise TraceError(f"{place}: expected {name!r} to be a list of numbers.")
    is_usable = (np.isfinite(values) & (values >= least)) | (may_lack & np.isnan(values))
    unusable = np.flatnonzero(~is_usable)
    if len(unusable):
        index = int(unusable[0])
        raise TraceError(
            f"{place}: {name!r}[{index}] = {values[index]}: expected a finite number"
            + (", 0 or more." if least == 0 else ".")
        )
    return values


def _list(place: str, entries: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list that a file may have; empty if it does not."""
    values = entries.get(name) or []
    if not isinstance(values, list):
        raise TraceError(f"{place}: expected {name!r} to be a list, one value per request.")
    return values


def _row(place: str, index: int, row: Any) -> NDArray[np.float64]:
    return _numbers(place, {f"itls[{index}]": row}, f"itls[{index}]", 0.0)
