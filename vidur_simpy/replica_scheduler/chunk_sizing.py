"""How many prompt tokens make a batch last a given time, and how long a prefill takes that way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request

__all__ = ["MOST_TRIED", "Draft", "GrowingBatch", "PrefillTimes", "chunk_of", "tokens_for_time"]

MOST_TRIED = 1024  # tokens the search looks at
CHUNK_MULTIPLE = 32
LOWEST, HIGHEST = 0.9, 1.1  # shares of the target time that are near enough
TABLE_STEP = 256  # tokens between two rows of the table of prefill times


class GrowingBatch(Batch):
    """A batch that is being formed: chunks join it one by one, or on trial."""

    __slots__ = ("_chunks",)

    def __init__(self, decodes: DecodeSet | None = None) -> None:
        self._chunks: list[PrefillChunk] = []
        super().__init__(decodes, self._chunks)

    def push(self, chunk: PrefillChunk) -> None:
        """Add a chunk."""
        self._chunks.append(chunk)
        self._count(chunk, 1)

    def pop(self) -> None:
        """Take the last chunk out again."""
        self._count(self._chunks.pop(), -1)

    def _count(self, chunk: PrefillChunk, sign: int) -> None:
        num_tokens = chunk.num_tokens
        self.num_prefill_tokens += sign * num_tokens
        self.num_tokens += sign * num_tokens
        self.total_context += sign * chunk.context
        pairs = num_tokens * chunk.context - num_tokens * (num_tokens - 1) // 2
        self.num_attention_pairs += sign * pairs


class Draft:
    """A batch that is being formed, with its predicted time.

    Parameters
    ----------
    decodes : DecodeSet or None
        Who decodes in it.
    predict : callable
        Predicts the seconds that a batch takes.
    long_threshold : int
        Tokens beyond which a request is a long one.
    long_decodes : iterable of Request
        Decoding requests that may be long, of any batch.

    Attributes
    ----------
    num_requests : int
        Requests in it.
    """

    def __init__(
        self,
        decodes: DecodeSet | None,
        predict: Callable[[Batch], float],
        long_threshold: int,
        long_decodes: Iterable[Request] = (),
    ) -> None:
        self.num_requests = 0 if decodes is None else len(decodes.members)
        self._decodes = decodes
        self._batch = GrowingBatch(decodes)
        self._predict = predict
        self._predicted = 0.0
        self._threshold = long_threshold
        self._long_decodes = long_decodes

    def num_tokens_beside(self, request: Request) -> int:
        """Tokens that are computed beside those of a request that would join."""
        return self._batch.num_tokens

    def predicted_beside(self, request: Request) -> float:
        """Predicted seconds of the batch as it was when last a chunk of several tokens joined.

        Decodes count from then on.
        """
        return self._predicted

    def has_long_beside(self, request: Request) -> bool:
        """Whether a long request is in the batch, one that decodes included."""
        threshold, decodes = self._threshold, self._decodes
        return any(
            chunk.context - chunk.num_tokens > threshold for chunk in self._batch.prefills
        ) or any(
            other.num_processed_tokens > threshold
            for other in self._long_decodes
            if decodes is not None and other.decode_set is decodes
        )

    def time_with(self, request: Request, num_tokens: int) -> float:
        """Predict the seconds of the batch with so many tokens of a request."""
        batch = self._batch
        context = request.num_scheduled_tokens + num_tokens
        batch.push(PrefillChunk(request, num_tokens, context))
        time = self._predict(batch)
        batch.pop()
        return time

    def add(self, request: Request, num_tokens: int, time: float) -> None:
        """Add a chunk of a request; `time` is what was predicted for the batch with it."""
        self._batch.push(chunk_of(request, num_tokens))
        self.num_requests += 1
        if num_tokens != 1:
            self._predicted = time

    def finish(self) -> Batch:
        """Return the batch."""
        return self._batch


def chunk_of(request: Request, num_tokens: int) -> PrefillChunk:
    """Give the next tokens of a request's prompt to a batch."""
    chunk = request.schedule_chunk(num_tokens)
    # With sequence-pipeline parallelism earlier chunks may still be in the pipeline.
    chunk.context = request.num_scheduled_tokens
    return chunk


def tokens_for_time(
    num_left: int, target_time: float, time_of: Callable[[int], float]
) -> tuple[int, float]:
    """Search how many tokens of a prompt bring a batch near its target time.

    Vidur's search by halving an interval is kept with its quirks: it tries multiples of 32, never
    the ends of the interval, so that it takes at most 992 tokens, and most prompts end with a
    short chunk.

    Parameters
    ----------
    num_left : int
        Tokens of the prompt that are not computed, >= 1.
    target_time : float
        Seconds that the batch should take; 10 % less or more is near enough.
    time_of : callable
        Predicts the seconds of the batch with so many tokens of the prompt.

    Returns
    -------
    num_tokens : int
        Those that come nearest, of the numbers tried; at least 1.
    time : float
        What was predicted for them, in seconds.

    Examples
    --------
    A batch that takes 4 ms and 20 us a token should take 12 ms:

    >>> num_tokens, _ = tokens_for_time(2000, 0.012, lambda num_tokens: 0.004 + 2e-5 * num_tokens)
    >>> num_tokens
    384
    """
    low, high = 0, min(num_left, MOST_TRIED)
    best, best_time = 0, 0.0
    tried = set()
    while low <= high:
        middle = (low + high) // 2
        if middle < num_left:
            middle = middle // CHUNK_MULTIPLE * CHUNK_MULTIPLE or min(num_left, CHUNK_MULTIPLE)
        if middle in tried:
            break
        tried.add(middle)
        time = time_of(middle)
        if LOWEST * target_time <= time <= HIGHEST * target_time:
            return middle, time
        if best == 0 or abs(time - target_time) < abs(best_time - target_time):
            best, best_time = middle, time
        if time < LOWEST * target_time:
            low = middle
        else:
            high = middle
    return best, best_time


class PrefillTimes:
    """The predicted time of prefilling a prompt alone, in chunks, for lengths in steps of 256.

    Rows are computed when they are first asked for. All long prompts begin with the same chunks:
    these are computed once, and each row adds its own last ones.

    Parameters
    ----------
    next_chunk : callable
        ``next_chunk(num_left, num_done) -> (num_tokens, seconds)``, for a lone request.
    horizon : int
        Tokens from which on `next_chunk` no longer depends on how many are left.

    Examples
    --------
    >>> times = PrefillTimes(lambda num_left, num_done: (min(num_left, 512), 0.25), horizon=512)
    >>> times.between(0, 1000), times.between(512, 1000)
    (0.5, 0.25)
    """

    def __init__(
        self, next_chunk: Callable[[int, int], tuple[int, float]], horizon: int = MOST_TRIED
    ) -> None:
        self._next_chunk = next_chunk
        self._horizon = horizon
        self._rows = [0.0]
        self._shared = (0, 0.0)  # tokens and seconds of the chunks that all further rows begin with

    def between(self, num_done: int, num_tokens: int) -> float:
        """Return the seconds from `num_done` tokens to the end of a prompt of `num_tokens`.

        The end is rounded up to a row, the beginning down, as in Vidur.
        """
        last = -(-num_tokens // TABLE_STEP)
        while len(self._rows) <= last:
            self._append_row()
        return self._rows[last] - self._rows[num_done // TABLE_STEP]

    def _append_row(self) -> None:
        length = len(self._rows) * TABLE_STEP
        done, seconds = self._shared
        while length - done >= self._horizon:
            done, seconds = self._step(length, done, seconds)
            self._shared = done, seconds
        while done < length:
            done, seconds = self._step(length, done, seconds)
        self._rows.append(seconds)

    def _step(self, length: int, done: int, seconds: float) -> tuple[int, float]:
        num_tokens, chunk_seconds = self._next_chunk(length - done, done)
        return done + num_tokens, seconds + chunk_seconds
