"""Mnemosyne: prompts of any length in chunks that keep a batch's time, urgent requests first."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from vidur_simpy.errors import ConfigError
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.mnemosyne_scheduler import (
    KVParallelMnemosyneScheduler,
    MnemosyneScheduler,
)
from vidur_simpy.replica_scheduler.ordering import checked
from vidur_simpy.validation import configuration

__all__ = ["Mnemosyne"]

USUAL_BATCH_TIME = 0.05


def _checked(ordering: Any) -> Any:
    return checked(ordering, further=("st",))


@configuration
class Mnemosyne:
    """All decodes, then pieces of prompts in the order given, up to a predicted batch time.

    Attributes
    ----------
    ordering : {"fcfs", "edf", "lrs", "st"}, another name of an ordering, or a key function
        Whose prompt goes on first: the first arrival, the earliest deadline, the least remaining
        slack, or as that, with long prompts sharing the batch's time with short ones (space
        sharing).
    max_num_seqs : int
        Most requests that hold KV-cache blocks.
    chunk_size : int or None
        Tokens of an iteration, for chunks of a fixed size.
    target_batch_time : float or None
        Seconds that a batch with prompts should take, for chunks sized by the predicted time;
        0.05 if neither this nor `chunk_size` is given.
    deadline_multiplier, min_deadline : float
        A request without deadline gets one that many times its predicted prefill time, and at
        least that many seconds, after its arrival (orderings edf, lrs and st).
    long_request_threshold : int
        Tokens from which on a request is a long one (ordering st).
    kv_parallel_size : int
        Groups that share the KV cache of a long request; each has `num_blocks` blocks.
    max_num_tokens_per_kvp_group : int or None
        Tokens of one request that a group holds at most, a multiple of the block size; needed
        with several groups.

    Raises
    ------
    ConfigError
        A setting that is out of range, or does not go with another.

    Notes
    -----
    Agrawal et al., "Mnemosyne: Parallelization Strategies for Efficiently Serving Multi-Million
    Context Length LLM Inference Requests Without Approximations", 2024, as Vidur has it, whose
    quirks that decide are kept: a batch's predicted time ignores the decodes until the first
    prompt has joined; at most ten requests of a queue are passed over; a long decode counts as a
    long request and keeps long prompts out; a prompt that has its memory keeps it, and its place,
    while more urgent ones arrive; a decode waits for a free block even when its step takes none.
    Unlike in Vidur `deadline_multiplier` has an effect, and ten requests that need memory cannot
    stop a replica on which nothing runs.

    With one group a step costs what has changed; with several it costs every request in the batch.

    Examples
    --------
    >>> Mnemosyne(ordering="edf").target_batch_time
    0.05
    >>> Mnemosyne(chunk_size=512, target_batch_time=0.05)
    Traceback (most recent call last):
    ...
    vidur_simpy.errors.ConfigError: Mnemosyne: chunk_size = 512 and target_batch_time = 0.05: \
expected exactly one of them.
    """

    ordering: Annotated[Any, AfterValidator(_checked)] = "fcfs"
    max_num_seqs: int = Field(default=128, ge=1)
    chunk_size: int | None = Field(default=None, ge=1)
    target_batch_time: float | None = Field(default=None, gt=0)
    deadline_multiplier: float = Field(default=1.5, gt=0)
    min_deadline: float = Field(default=0.5, gt=0)
    long_request_threshold: int = Field(default=256 * 1024, ge=1)
    kv_parallel_size: int = Field(default=1, ge=1)
    max_num_tokens_per_kvp_group: int | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if self.chunk_size is None and self.target_batch_time is None:
            object.__setattr__(self, "target_batch_time", USUAL_BATCH_TIME)
        if self.chunk_size is not None and self.target_batch_time is not None:
            raise ConfigError(
                f"Mnemosyne: chunk_size = {self.chunk_size} and target_batch_time = "
                f"{self.target_batch_time}: expected exactly one of them."
            )
        if self.chunk_size is not None and self.ordering == "st":
            raise ConfigError(
                "Mnemosyne: the ordering 'st' shares the time of a batch: expected "
                "target_batch_time instead of chunk_size."
            )
        if self.kv_parallel_size > 1 and self.max_num_tokens_per_kvp_group is None:
            raise ConfigError(
                f"Mnemosyne: kv_parallel_size = {self.kv_parallel_size} needs "
                f"max_num_tokens_per_kvp_group, a multiple of the block size."
            )

    def for_replica(self, resources: ReplicaResources) -> MnemosyneScheduler:
        """Make the scheduler of one replica."""
        if self.kv_parallel_size > 1:
            return KVParallelMnemosyneScheduler(self, resources)
        return MnemosyneScheduler(self, resources)
