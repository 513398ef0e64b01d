"""FasterTransformer: request-level batching; a batch runs to its end."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, Request
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.orca import ReservingBatching
from vidur_simpy.replica_scheduler.ordering import Ordering
from vidur_simpy.validation import configuration

__all__ = ["FasterTransformer", "FasterTransformerScheduler"]


@configuration
class FasterTransformer:
    """Batches are formed once and decode together until their last request is complete.

    Attributes
    ----------
    max_num_seqs : int
        Most requests in one batch.
    ordering : str or callable
        Who goes first of those that wait: ``fcfs``, ``edf``, ``lrs``, ``sjf``, ``spt``,
        ``priority``, or a function of ``(request)`` or ``(request, now)``.

    Notes
    -----
    A completed request frees its blocks at once, where Vidur leaks those of requests that end
    before the last of their batch.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    ordering: Ordering = "fcfs"

    def for_replica(self, resources: ReplicaResources) -> FasterTransformerScheduler:
        """Make the scheduler of one replica."""
        return FasterTransformerScheduler(resources, self.max_num_seqs, self.ordering)


class FasterTransformerScheduler(ReservingBatching):
    """The FasterTransformer scheduler of one replica: `running` holds one set per batch."""

    # While nobody comes or goes its decodes go on alone.
    steady_steps = ReservingBatching.steady_steps

    def schedule(self, now: float) -> Batch | None:
        """Go on with the batch that has waited longest; if there is none, form a new one."""
        if self.running:
            decodes = self.running.pop(0)
            assert isinstance(decodes, DecodeSet)
            return Batch(decodes)
        chunks = self.admit_prompts(0, now)
        return Batch(None, chunks) if chunks else None

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Count the tokens; what is incomplete stays together behind the other batches."""
        others, self.running = self.running, []
        completed = super().end(batch, now)
        decodes, _, _ = self._gather()
        self.running = others if decodes is None else [*others, decodes]
        return completed
