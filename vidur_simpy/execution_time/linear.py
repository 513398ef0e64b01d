"""Execution time as a straight line: so much a batch, a token, a token of context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time import BatchCounts, StageTime

__all__ = ["Linear"]


@configuration
class Linear:
    """Stage times that grow linearly with the tokens of a batch and with their context.

    Each stage takes ``(base + per_token * num_tokens + per_context_token * total_context) /
    pipeline_parallel_size``, whatever the model and the device. It is evaluated in this order on
    integer sums, so that equal batches take equal times to the last bit.

    Parameters
    ----------
    base : float
        Seconds per batch.
    per_token : float
        Seconds per token computed.
    per_context_token : float
        Seconds per token in the KV cache of the batch's requests once the step is done.

    Examples
    --------
    >>> Linear(per_token=1e-5)
    Linear(base=0.004, per_token=1e-05, per_context_token=5e-08)
    """

    base: float = Field(default=0.004, ge=0)
    per_token: float = Field(default=2e-5, ge=0)
    per_context_token: float = Field(default=5e-8, ge=0)

    def for_replica(self, deployment: Deployment) -> StageTime:
        """Return the stage times of a replica, of which only the number of stages counts."""
        base, per_token, per_context_token = self.base, self.per_token, self.per_context_token
        num_stages = deployment.pipeline_parallel_size

        def stage_time(batch: BatchCounts, stage_id: int) -> float:
            tokens, context = batch.num_tokens, batch.total_context
            return (base + per_token * tokens + per_context_token * context) / num_stages

        return stage_time
