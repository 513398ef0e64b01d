"""When each output token of a request came, from the batches that were recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidur_simpy.summary import num_output_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["gaps_between_tokens"]


def gaps_between_tokens(result: Result) -> list[NDArray[np.float64] | None]:
    """Return the times between the output tokens of each request, in seconds.

    A decode yields a token at the end of its batch, and so does the last chunk of a prefill; the
    batches say who was in them.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("batches",)``; without, no gaps are known.

    Returns
    -------
    list of ndarray or None
        One for each row of ``result.requests``: output tokens - 1 gaps, or None where they are
        not known: the request is not completed, or what its batches tell contradicts its row (as
        it may with a prefix cache if it was restarted right behind its prefill).
    """
    requests = result.requests
    if "batches" not in result.tables:
        return [None] * len(requests)
    steps = _steps(result)
    ids = requests["request_id"].to_numpy()
    rows = zip(
        np.searchsorted(steps.request_id, ids, side="left").tolist(),
        np.searchsorted(steps.request_id, ids, side="right").tolist(),
        requests["num_prefill_tokens"].tolist(),
        num_output_tokens(requests).tolist(),
        requests["first_token_at"].tolist(),
        requests["completed_at"].tolist(),
        strict=True,
    )
    gaps: list[NDArray[np.float64] | None] = []
    for begin, end, prompt, num_tokens, *ends in rows:
        own = steps.take(slice(begin, end))
        gaps.append(None)
        for yields in (_followed_by_decode, _counted):
            times = own.time[yields(own, prompt)]
            if len(times) == num_tokens and [times[0], times[-1]] == ends:
                gaps[-1] = np.diff(times)
                break
    return gaps


class _Steps(NamedTuple):
    """What batches did for requests: a row per request and batch, by request, then by time."""

    request_id: NDArray[np.int64]
    time: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    is_decode: NDArray[np.bool_]

    def take(self, rows: slice | NDArray[np.int64]) -> _Steps:
        """Return some of the rows."""
        return _Steps(
            self.request_id[rows], self.time[rows], self.num_tokens[rows], self.is_decode[rows]
        )


def _steps(result: Result) -> _Steps:
    batches = result.batches
    batches = batches[batches["completed_at"].notna()]
    sizes = batches["request_ids"].map(len).to_numpy(dtype=np.int64)
    total = int(sizes.sum())
    request_id, num_tokens = (
        np.fromiter((item for row in batches[name] for item in row), dtype=np.int64, count=total)
        for name in ("request_ids", "num_tokens")
    )
    time = np.repeat(batches["completed_at"].to_numpy(), sizes)
    # In a batch the decodes, of one token each, come before the prefill chunks.
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    num_decodes = np.repeat(batches["num_decode_tokens"].to_numpy(), sizes)
    is_decode = np.arange(total) - first < num_decodes
    return _Steps(request_id, time, num_tokens, is_decode).take(np.lexsort((time, request_id)))


def _followed_by_decode(steps: _Steps, prompt: int) -> NDArray[np.bool_]:
    """Return which steps yield a token, if the last chunk of a prefill comes before a decode."""
    is_followed_by_chunk = np.append(~steps.is_decode[1:], False)[: len(steps.time)]
    yields: NDArray[np.bool_] = steps.is_decode | ~is_followed_by_chunk
    return yields


def _counted(steps: _Steps, prompt: int) -> NDArray[np.bool_]:
    """Return which steps yield a token, from the tokens that each prefill has to compute.

    Slower, but right also if a request was restarted between its prefill and its first decode.
    """
    yields = steps.is_decode.copy()
    target = prompt  # and, after a restart, the output so far
    chunks: list[int] = []
    pairs = zip(steps.num_tokens.tolist(), steps.is_decode.tolist(), strict=True)
    for index, (num_tokens, is_decode) in enumerate(pairs):
        if is_decode:
            target += 1
            chunks = []
            continue
        chunks.append(num_tokens)
        while sum(chunks) > target:  # a restart within the prefill
            del chunks[0]
        if sum(chunks) == target:
            yields[index] = True
            target += 1
            chunks = []
    return yields
