"""What a user measured, requests or iterations, from any of three kinds of file.

==================  ===================================================================
file                what tells it
==================  ===================================================================
vllm bench          the JSON of ``vllm bench serve --save-result --save-detailed``
iterations          columns of durations, and of what was in each batch
requests            columns of arrivals, lengths, first tokens and ends
==================  ===================================================================

Tables are comma-separated values under a header or a JSON object per line, plain or gzipped. Times
are seconds, unless a column's name ends in ``_ms``, ``_us`` or ``_ns`` (``_s`` says so). A column
``segment`` or ``run`` tells several runs in one file apart, each with a clock of its own.

Requests need an arrival (``arrived_at``, ``submit``, ``queued_ts``, ``start_time`` or
``arrival_time``), the lengths (``num_prefill_tokens`` or ``num_prompt_tokens``,
``num_decode_tokens`` or ``num_output_tokens``, ...), a first token (``first_token_at`` or the
latency ``ttft``) and an end (``completed_at`` or the latency ``e2e``). Where the last two are
empty, the request failed and is left out.

Iterations need a ``duration`` (or ``period``, else ``busy``), and a plan in one of two forms:

* ``num_decodes, decode_context, prefills``: how many requests decoded, the tokens in their KV
  cache afterwards (one sum, or one number each), and a ``tokens:context`` for every prefill chunk,
  where context counts what the KV cache has of that request afterwards. All numbers in a cell are
  separated by spaces;
* ``scheduled``: every request of the batch by its name, ``name:tokens`` for a prefill chunk and
  ``name`` alone for a decode. Contexts follow from the rows before, so nothing may be missing, be
  preempted or come from a prefix cache; a column ``kv_tokens``, their sum, is checked.

Iterations without a duration are left out.
"""

from __future__ import annotations

import json
from pathlib import Path

from vidur_simpy.errors import TraceError
from vidur_simpy.exchange.vllm_bench import read_vllm_bench
from vidur_simpy.measurements.columns import UNITS, find
from vidur_simpy.measurements.iterations import (
    DURATION,
    Chunk,
    Iteration,
    MeasuredIterations,
    iterations_of,
)
from vidur_simpy.measurements.requests import (
    OUTPUT,
    MeasuredRequests,
    measured_requests,
    requests_of,
)
from vidur_simpy.workload.tables import read_table

__all__ = [
    "Chunk",
    "Iteration",
    "MeasuredIterations",
    "MeasuredRequests",
    "measured_requests",
    "read_measurement",
]


def read_measurement(path: str | Path) -> MeasuredRequests | MeasuredIterations:
    """Read what was measured; the kind of file is told from its content.

    Parameters
    ----------
    path : str or Path
        Any of the files that :mod:`vidur_simpy.measurements` describes.

    Raises
    ------
    TraceError
        A file that is missing or of no known kind, or an unusable value; the message names the
        line and what was expected.
    """
    path = Path(path)
    if _is_vllm_bench(path):
        return measured_requests(read_vllm_bench(path), str(path))
    table = read_table(path)
    if find(table, DURATION, UNITS):
        return iterations_of(table)
    if find(table, OUTPUT):
        return requests_of(table)
    raise TraceError(
        f"{path} has the columns {', '.join(table.cells)}; expected those of iterations (a "
        "duration, with scheduled or num_decodes, decode_context and prefills) or of requests "
        "(arrived_at, num_prefill_tokens, num_decode_tokens, first_token_at, completed_at)."
    )


def _is_vllm_bench(path: Path) -> bool:
    """Whether a file is one JSON object with lists, where a table has a row per line."""
    if not path.is_file() or path.suffix in (".json", ".gz"):
        return path.suffix == ".json" and path.is_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and any(isinstance(value, list) for value in content.values())
