"""When each output token of a request came, from the batches that were recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.series import Steps, steps_of
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
    steps = steps_of(result)
    steps = steps.take(~np.isnan(steps.time)).by_request()
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


def _followed_by_decode(steps: Steps, prompt: int) -> NDArray[np.bool_]:
    """Return which steps yield a token, if the last chunk of a prefill comes before a decode."""
    is_followed_by_chunk = np.append(~steps.is_decode[1:], False)[: len(steps.time)]
    yields: NDArray[np.bool_] = steps.is_decode | ~is_followed_by_chunk
    return yields


def _counted(steps: Steps, prompt: int) -> NDArray[np.bool_]:
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
