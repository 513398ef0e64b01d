"""What moves through the cluster: requests, and the batches that carry them.

A request has a prompt to prefill and output tokens to decode; the end of its prefill yields the
first output token, so a request of ``P`` prompt and ``D`` output tokens needs ``D - 1`` decode
steps. Requests that decode together do so as one :class:`DecodeSet`, which is touched when a
request joins or leaves and costs nothing per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from vidur_simpy.errors import ConfigError, SimulationError

if TYPE_CHECKING:
    import simpy

    from vidur_simpy.decode_set import DecodeSet, SharedSteps

__all__ = ["Batch", "PrefillChunk", "Request", "by_arrival"]


class Request:
    """One prompt and the output it will get.

    Parameters
    ----------
    num_prefill_tokens : int
        Prompt length, >= 1.
    num_decode_tokens : int
        Output length, >= 1; the first output token is the yield of the prefill.
    arrived_at : float, optional
        Instant of arrival in seconds; when submitted without one, it arrives at once.
    request_id : int, optional
        Given by the simulation if it has none.
    priority, deadline, session_id, hash_ids : optional
        Carried along for the policies that look at them.
    hash_block_size : int
        Prompt tokens behind one of the `hash_ids`.

    Attributes
    ----------
    num_tokens : int
        Prompt and output together.
    num_processed_tokens : int
        Tokens whose step is done, the free token of a finished prefill included.
    replica_id : int or None
        Where it was routed.
    scheduled_at, first_token_at, completed_at : float or None
        Instants in seconds; None until they happen.
    num_restarts : int
        Preemptions so far.
    is_prefill_complete : bool
        Whether its prompt is computed, and it decodes.
    decode_set : SharedSteps or None
        What it steps with while it decodes.
    execution_time, preempted_time : float
        Seconds in batches, and between them, up to when it joined its `decode_set`; of one that
        decodes ask ``request.decode_set.times_of(request)``.
    last_stage_end : float or None
        End of its last stage in seconds, likewise.
    prefill_target : int
        Tokens the present prefill has to compute: the prompt, and after a restart also the
        output that was lost.
    num_scheduled_tokens : int
        Tokens of the present prefill that were given to a batch or found in the prefix cache.
    num_cached_tokens : int or None
        Tokens found in the prefix cache when it was first admitted, where there is one.
    deadline_time : float or None
        Seconds from arrival to deadline, where the replica scheduler set the deadline.
    refusal : str
        Why the request was refused at arrival; empty if it was not.
    done : simpy.Event or None
        Happens with the request as value when it is completed or refused, if submitted.

    Raises
    ------
    ConfigError
        If a length is no whole number or below one, or `hash_ids` do not fit the prompt.
    """

    __slots__ = (
        "_joined_at_execution_time",
        "_joined_at_iteration",
        "_processed",
        "arrived_at",
        "completed_at",
        "deadline",
        "deadline_time",
        "decode_set",
        "done",
        "execution_time",
        "first_token_at",
        "hash_block_size",
        "hash_ids",
        "is_prefill_complete",
        "last_stage_end",
        "num_cached_tokens",
        "num_decode_tokens",
        "num_prefill_tokens",
        "num_restarts",
        "num_scheduled_tokens",
        "num_tokens",
        "preempted_time",
        "prefill_target",
        "priority",
        "refusal",
        "replica_id",
        "request_id",
        "scheduled_at",
        "session_id",
    )

    def __init__(
        self,
        num_prefill_tokens: int,
        num_decode_tokens: int,
        arrived_at: float | None = None,
        *,
        request_id: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        session_id: Any = None,
        hash_ids: Sequence[int] | None = None,
        hash_block_size: int = 512,
    ) -> None:
        self.request_id = request_id
        self.arrived_at = arrived_at
        if not (type(num_prefill_tokens) is int and num_prefill_tokens >= 1):
            num_prefill_tokens = _num_tokens("num_prefill_tokens", num_prefill_tokens)
        if not (type(num_decode_tokens) is int and num_decode_tokens >= 1):
            num_decode_tokens = _num_tokens("num_decode_tokens", num_decode_tokens)
        self.num_prefill_tokens = num_prefill_tokens
        self.num_decode_tokens = num_decode_tokens
        self.num_tokens = num_prefill_tokens + num_decode_tokens
        self.priority = priority
        self.deadline = deadline
        self.deadline_time: float | None = None
        self.session_id = session_id
        self.hash_ids = hash_ids
        self.hash_block_size = hash_block_size
        if hash_ids is not None or hash_block_size != 512:
            self.hash_block_size = _num_tokens("hash_block_size", hash_block_size)
            self._check_hash_ids()
        self.replica_id: int | None = None
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.completed_at: float | None = None
        self.refusal = ""
        self.done: simpy.Event | None = None
        self.num_restarts = 0
        self.prefill_target = num_prefill_tokens
        self.num_scheduled_tokens = 0
        self.num_cached_tokens: int | None = None
        self.is_prefill_complete = False
        self.decode_set: SharedSteps | None = None
        self.execution_time = 0.0
        self.preempted_time = 0.0
        self.last_stage_end: float | None = None
        self._processed = 0
        self._joined_at_iteration = 0
        self._joined_at_execution_time = 0.0

    def __repr__(self) -> str:
        return (
            f"<Request {self.request_id}: {self.num_processed_tokens} of "
            f"{self.num_prefill_tokens} + {self.num_decode_tokens} tokens>"
        )

    @property
    def num_processed_tokens(self) -> int:
        """Tokens whose step is done; while it decodes, counted by its set."""
        if self.decode_set is None:
            return self._processed
        return self._processed + self.decode_set.iteration - self._joined_at_iteration

    @property
    def num_output_tokens(self) -> int:
        """Output tokens it got so far; at the end `num_decode_tokens`, unless it ended early."""
        return max(self.num_processed_tokens, self.prefill_target) - self.num_prefill_tokens

    def start_prefill(self, num_cached_tokens: int) -> None:
        """Begin a prefill behind the `num_cached_tokens` that the prefix cache has."""
        self._processed = self.num_scheduled_tokens = num_cached_tokens
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_cached_tokens

    def schedule_chunk(self, num_tokens: int) -> PrefillChunk:
        """Give the next `num_tokens` of the prefill to a batch.

        Raises
        ------
        SimulationError
            If there are not so many left, or less than one is given.
        """
        num_left = self.prefill_target - self.num_scheduled_tokens
        if not 0 < num_tokens <= num_left:
            raise SimulationError(
                f"a chunk of {num_tokens!r} tokens for {self}: expected "
                + (f"1 to {num_left}." if num_left else "none, its prompt is scheduled.")
            )
        self.num_scheduled_tokens += num_tokens
        return PrefillChunk(self, num_tokens, self._processed + num_tokens)

    def end_chunk(self, num_tokens: int) -> bool:
        """Count a prefill chunk of `num_tokens` that has ended; the last yields an output token.

        Returns whether that was the last token of all.
        """
        self._processed += num_tokens
        if self._processed == self.prefill_target:
            self.is_prefill_complete = True
            self._processed += 1
        return self._processed == self.num_tokens

    def restart(self) -> None:
        """Forget the KV cache: the prompt, and the output so far, is to be prefilled again.

        A prefill that was not complete keeps its target, so that what is left of the prompt is
        never taken for output.
        """
        if self.decode_set is not None:
            self.decode_set.leave(self)
        if self.is_prefill_complete:
            self.prefill_target = self._processed
        self._processed = 0
        self.num_scheduled_tokens = 0
        self.is_prefill_complete = False
        self.num_restarts += 1

    def _check_hash_ids(self) -> None:
        if self.hash_ids is None:
            return
        needed = -(-self.num_prefill_tokens // self.hash_block_size)
        if len(self.hash_ids) != needed:
            raise ConfigError(
                f"Request.hash_ids has {len(self.hash_ids)} ids: expected {needed} for a prompt of "
                f"{self.num_prefill_tokens} tokens (hash_block_size = {self.hash_block_size})."
            )


def _num_tokens(name: str, given: int) -> int:
    """Return a length as an int, if it is one."""
    try:
        num_tokens = index(given)
    except TypeError:  # a text, a float, NaN
        num_tokens = 0
    if num_tokens < 1:
        raise ConfigError(f"Request.{name} = {given!r}: expected a whole number, at least 1.")
    return num_tokens


class PrefillChunk:
    """A piece of one prompt in a batch; :meth:`Request.schedule_chunk` makes it.

    Attributes
    ----------
    request : Request
    num_tokens : int
        Prompt tokens computed in this batch, >= 1.
    context : int
        Tokens of the request in its KV cache once the chunk is done.
    num_restarts : int
        Restarts of the request when the chunk was formed; a chunk still in the pipeline when its
        request is restarted no longer counts.
    """

    __slots__ = ("context", "num_restarts", "num_tokens", "request")

    def __init__(self, request: Request, num_tokens: int, context: int) -> None:
        self.request = request
        self.num_tokens = num_tokens
        self.context = context
        self.num_restarts = request.num_restarts

    @property
    def is_current(self) -> bool:
        """Whether the request was not restarted since the chunk was formed."""
        return self.num_restarts == self.request.num_restarts


def by_arrival(request: Request) -> float:
    """Return the instant of arrival, as a key to sort by."""
    assert request.arrived_at is not None
    return request.arrived_at


class Batch:
    """What one replica computes in one iteration: some decode steps and some prefill chunks.

    Execution-time models see it as counts; lists of requests are made only when recorded.

    Attributes
    ----------
    decodes : DecodeSet or None
        The requests that decode, one token each.
    prefills : sequence of PrefillChunk
        The prefill chunks, after the decodes in batch order.
    num_decodes, num_prefill_tokens, num_tokens : int
        Decoding requests, prompt tokens, and their sum: the tokens of the iteration.
    decode_context, total_context : int
        Tokens in the KV cache once the step is done, summed over the decodes, over all requests.
    num_attention_pairs : int
        Query-key pairs: each token of the iteration with each token it sees (causal).
    replica_id, batch_index : int
        Set by the replica; the index counts its batches from 0.
    scheduled_at, stage_started_at : float
        When it was formed, and when its present stage began it, in seconds.
    execution_time : float
        Time of the stages done so far, in seconds.
    """

    __slots__ = (
        "batch_index",
        "decode_context",
        "decodes",
        "execution_time",
        "num_attention_pairs",
        "num_decodes",
        "num_prefill_tokens",
        "num_tokens",
        "prefills",
        "replica_id",
        "scheduled_at",
        "stage_started_at",
        "total_context",
    )

    def __init__(
        self, decodes: DecodeSet | None = None, prefills: Sequence[PrefillChunk] = ()
    ) -> None:
        self.decodes = decodes
        self.prefills = prefills
        num_decodes = context = 0
        if decodes is not None:
            num_decodes = len(decodes.members)
            context = decodes.num_processed_tokens + num_decodes
        self.num_decodes = num_decodes
        self.decode_context = pairs = context
        num_prefill_tokens = 0
        try:
            for chunk in prefills:
                num_tokens, chunk_context = chunk.num_tokens, chunk.context
                num_prefill_tokens += num_tokens
                context += chunk_context
                # The last token of a chunk sees its whole context, the first the fewest.
                pairs += num_tokens * chunk_context - num_tokens * (num_tokens - 1) // 2
        except AttributeError:
            raise ConfigError(
                f"Batch.prefills = {prefills!r:.80}: expected chunks, as "
                "request.schedule_chunk(num_tokens) makes them."
            ) from None
        self.num_prefill_tokens = num_prefill_tokens
        self.num_tokens = num_decodes + num_prefill_tokens
        self.total_context = context
        self.num_attention_pairs = pairs
        self.replica_id = self.batch_index = -1
        self.scheduled_at = self.stage_started_at = self.execution_time = 0.0

    def __repr__(self) -> str:
        return (
            f"<Batch {self.batch_index} of replica {self.replica_id}: {self.num_decodes} decodes, "
            f"{self.num_prefill_tokens} prompt tokens>"
        )

    @property
    def num_requests(self) -> int:
        """Requests in the batch."""
        return self.num_decodes + len(self.prefills)

    def decoding(self) -> list[Request]:
        """Return the requests that decode, in order. O(batch)."""
        return list(self.decodes.members) if self.decodes else []

    def prefilled(self) -> list[Request]:
        """Return the requests whose prefill it completed, once it has ended."""
        return [
            chunk.request
            for chunk in self.prefills
            if chunk.is_current and chunk.request.is_prefill_complete
        ]

    def requests(self) -> list[tuple[Request, int]]:
        """Return its requests in order, each with its tokens in this batch. O(batch)."""
        decodes = [(request, 1) for request in self.decoding()]
        return decodes + [(chunk.request, chunk.num_tokens) for chunk in self.prefills]
