"""Iterations of a server: what was in each batch, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidur_simpy.errors import TraceError
from vidur_simpy.measurements.columns import UNITS, find, length, needed, runs, times, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.workload.tables import Table

__all__ = ["DURATION", "Chunk", "Iteration", "MeasuredIterations", "iterations_of"]

DURATION = ("duration", "period", "busy")


class Chunk(NamedTuple):
    """A prefill chunk: tokens computed, and of its request in the KV cache afterwards."""

    num_tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class Iteration:
    """The batch of one iteration by its counts, as execution-time models read it."""

    num_decodes: int
    decode_context: int
    prefills: tuple[Chunk, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.num_decodes + sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def total_context(self) -> int:
        """Tokens in the KV cache afterwards."""
        return self.decode_context + sum(chunk.context for chunk in self.prefills)

    @property
    def num_attention_pairs(self) -> int:
        """Tokens attended to, summed over the tokens computed."""
        pairs = (n * context - n * (n - 1) // 2 for n, context in self.prefills)
        return self.decode_context + sum(pairs)


@dataclass(frozen=True, eq=False, repr=False)
class MeasuredIterations:
    """Iterations of a server, with how long each took.

    Attributes
    ----------
    source : str
        The file.
    iterations : sequence of Iteration
        In the order of the file.
    durations : ndarray of float, shape (n,)
        Seconds, > 0.
    runs : ndarray of int, shape (n,)
        The run that each belongs to, from 0.
    """

    source: str
    iterations: Sequence[Iteration]
    durations: NDArray[np.float64]
    runs: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.durations)

    def __repr__(self) -> str:
        return f"<MeasuredIterations: {len(self)} from {self.source}>"


def iterations_of(table: Table) -> MeasuredIterations:
    """Return the iterations of a table; the package says which columns.

    Raises
    ------
    TraceError
        A column that is missing, or an unusable value, with its line.
    """
    found = next(found for name in DURATION if (found := find(table, (name,), UNITS)))
    durations = times(table, *found)
    iterations = _scheduled(table) if "scheduled" in table.cells else _counted(table)
    for row in np.flatnonzero(durations == 0).tolist():
        raise TraceError(f"{table.path}, line {table.lines[row]}: {found[0]} = 0, expected more.")
    kept = np.flatnonzero(~np.isnan(durations))
    if not len(kept):
        raise TraceError(f"{table.path} has no {found[0]} in any row, expected seconds.")
    return MeasuredIterations(
        str(table.path), [iterations[row] for row in kept], durations[kept], runs(table)[kept]
    )


def _counted(table: Table) -> list[Iteration]:
    """Return the plans that are given as counts."""
    numbers = "whole numbers with spaces between them"
    counts = table.parsed(
        needed(table, ("num_decodes", "decodes"))[0], whole, "a whole number >= 0"
    )
    names = ("decode_context", "decode_contexts", "contexts")
    contexts = table.parsed(needed(table, names)[0], _numbers, numbers)
    prefills = table.parsed(
        needed(table, ("prefills", "chunks"))[0], _chunks, "tokens:context for each prefill chunk"
    )
    iterations = []
    for row, line in enumerate(table.lines):
        iteration = Iteration(counts[row], sum(contexts[row]), prefills[row])
        if iteration.decode_context < iteration.num_decodes or not iteration.num_tokens:
            raise TraceError(
                f"{table.path}, line {line}: {counts[row]} decodes with a context of "
                f"{iteration.decode_context} and {len(prefills[row])} prefill chunks, expected at "
                "least one token of context per decode and one request."
            )
        iterations.append(iteration)
    return iterations


def _scheduled(table: Table) -> list[Iteration]:
    """Return the plans that name requests; see the module for the form."""
    plans = table.parsed("scheduled", _plan, "name:tokens of prefills and names of decodes")
    sums = table.parsed("kv_tokens", whole, "tokens") if "kv_tokens" in table.cells else None
    contexts: dict[tuple[int, str], int] = {}
    iterations = []
    for row, (run, plan) in enumerate(zip(runs(table).tolist(), plans, strict=True)):
        decode_contexts, chunks = [], []
        for name, num_tokens in plan:
            before = contexts.get((run, name), 0)
            contexts[run, name] = context = before + (num_tokens or 1)
            if num_tokens or not before:
                chunks.append(Chunk(num_tokens or 1, context))
            else:
                decode_contexts.append(context)
        iteration = Iteration(len(decode_contexts), sum(decode_contexts), tuple(chunks))
        if sums is not None and iteration.total_context != sums[row]:
            raise TraceError(
                f"{table.path}, line {table.lines[row]}: kv_tokens = {sums[row]}, the tokens "
                f"scheduled so far make {iteration.total_context}: expected no preemptions, cached "
                "prefixes or missing rows; else give num_decodes, decode_context and prefills."
            )
        iterations.append(iteration)
    return iterations


def _numbers(cell: Any) -> list[int]:
    return [whole(part) for part in str(cell).split()] if cell is not None else []


def _chunks(cell: Any) -> tuple[Chunk, ...]:
    chunks = []
    for part in str(cell or "").split():
        num_tokens, context = (length(number) for number in part.split(":"))
        if num_tokens > context:
            raise ValueError
        chunks.append(Chunk(num_tokens, context))
    return tuple(chunks)


def _plan(cell: Any) -> list[tuple[str, int]]:
    """Return the names and the tokens of their chunks; 0 tokens stand for a decode."""
    plan = []
    for part in str(cell).split():
        name, colon, num_tokens = part.rpartition(":")
        plan.append((name, length(num_tokens)) if colon else (part, 0))
    if not plan:
        raise ValueError
    return plan
