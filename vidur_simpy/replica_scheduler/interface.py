"""What a replica gives its scheduler, and what it asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vidur_simpy.entities import Batch, Request
from vidur_simpy.kv_cache import BlockPool

__all__ = ["ReplicaResources", "ReplicaScheduler", "ReplicaSchedulerPolicy"]


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """What one replica has to run requests with.

    Attributes
    ----------
    pool : BlockPool
        Its KV-cache blocks.
    max_model_len : int
        Longest prompt and output together, in tokens.
    pipeline_parallel_size : int
        Number of pipeline stages.
    sequence_pipeline_parallel : bool
        Whether the next chunk of a prompt may enter the pipeline behind the one before it.
    stage_time : callable
        ``stage_time(batch, stage_id)`` in seconds, for schedulers that predict.
    """

    pool: BlockPool
    max_model_len: int
    pipeline_parallel_size: int = 1
    sequence_pipeline_parallel: bool = False
    stage_time: Callable[[Batch, int], float] | None = None


class ReplicaScheduler(Protocol):
    """Decides which requests of one replica run next. It knows no SimPy: time is an argument.

    It may also have `max_running_batches` (batches between formation and end, if not one per
    pipeline stage), `truncates_outputs` (True if a request that passes `max_model_len` ends there
    and need not be refused) and `figures` (further columns of the table of replicas). With
    ``steady_steps(batch)``, defined beside its `schedule`, it says how many batches after this one
    will be the same decodes unless a request arrives, and ``skip_steps(batch, execution_times,
    now)`` takes so many steps at once and returns the blocks that the step after each takes.
    """

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first batch, or for their next after a restart."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that hold KV-cache blocks."""
        ...

    def refusal(self, request: Request) -> str:
        """Return why the request can never run here; an empty string if it can."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request that was routed here."""
        ...

    def schedule(self, now: float) -> Batch | None:
        """Form the next batch and reserve its memory; None if there is nothing to run."""
        ...

    def end_first_stage(self, batch: Batch) -> None:
        """Take note that the first pipeline stage is done with the batch."""
        ...

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Count the batch's tokens, free what is no longer needed, return what is complete."""
        ...


class ReplicaSchedulerPolicy(Protocol):
    """A configuration from which each replica's scheduler is made."""

    def for_replica(self, resources: ReplicaResources) -> ReplicaScheduler:
        """Make the scheduler of one replica."""
        ...
