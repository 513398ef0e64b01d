"""Results and records that were saved, and what a server's benchmark measured."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.exchange.vllm_bench import read_vllm_bench
from vidur_simpy.frames import frame
from vidur_simpy.record_columns import read_records, recorded_columns_of
from vidur_simpy.request_log import request_columns
from vidur_simpy.result import Result
from vidur_simpy.storage import read_result
from vidur_simpy.summary import with_latencies

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load_records", "load_result", "load_vllm_bench"]


def load_result(directory: str | os.PathLike[str]) -> Result:
    """Return a result that `Result.save` wrote; needs no simulator.

    Parameters
    ----------
    directory : path
        As it was given to `Result.save`.

    Raises
    ------
    VidurError
        If there is no saved result, or it is damaged; the message names the file.
    """
    tables, config, info = read_result(directory)
    return Result(tables, config=config, info=info)


def load_records(directory: str | os.PathLike[str], table: str) -> pd.DataFrame:
    """Return a table of a run with ``record_to=directory``, also of one that was killed.

    Parameters
    ----------
    directory : path
    table : str
        ``"requests"`` or a table that was recorded. Of a killed run, its first rows: all but at
        most the last 4,096 that were complete; of the requests, those that were done first.

    Raises
    ------
    VidurError
        If there are no such records, or they are damaged; the message names the file.
    """
    parts = read_records(directory, table)
    if table == "requests":
        return with_latencies(frame(table, request_columns(parts)))
    return frame(table, recorded_columns_of(table, parts))


def load_vllm_bench(path: str | os.PathLike[str]) -> Result:
    """Return what ``vllm bench serve`` measured as a result, to draw and compare like any other.

    Parameters
    ----------
    path : path
        What the tool saved with ``--save-result --save-detailed``, or `Result.to_vllm_bench`.

    Returns
    -------
    Result
        With the table ``tokens`` where the file has the times between tokens. The server is
        replica 0, its clock starts with the first request; ``scheduled_at`` is NaN unless the
        server said how long requests waited, failed requests are refused ones. The file's other
        entries, such as ``duration`` in seconds, are ``info["benchmark"]``.

    Raises
    ------
    TraceError
        If there is no such file, it is no such result, or has no list per request.

    Notes
    -----
    ``makespan``, and with it each throughput, is from the first arrival to the last completion;
    the tool's ``duration`` may begin earlier.
    """
    bench = read_vllm_bench(path)
    tables = bench.tables()
    end = tables["requests"]["completed_at"]
    info = {
        "simulated_time": float(np.nanmax(end, initial=0.0)),
        "measured_by": "vllm bench serve",
        "benchmark": bench.summary,
    }
    return Result(tables, config=None, info=info)
