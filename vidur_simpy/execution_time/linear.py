"""Execution time as a straight line: so much a batch, a token, a token of context."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from vidur_simpy.sums import MANY
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
        return LinearStageTime(self, deployment.pipeline_parallel_size)


class LinearStageTime:
    """The line of one replica: call it with a batch and a stage for the seconds."""

    is_alike_on_all_stages = True

    def __init__(self, line: Linear, num_stages: int) -> None:
        self._base = line.base
        self._per_token = line.per_token
        self._per_context_token = line.per_context_token
        self._num_stages = num_stages

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage takes for a batch."""
        return (
            self._base
            + self._per_token * batch.num_tokens
            + self._per_context_token * batch.total_context
        ) / self._num_stages

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float] | NDArray[np.float64]:
        """Return the seconds of each of the next iterations of the same decodes."""
        last = decode_context + num_decodes * num_iterations
        start = self._base + self._per_token * num_decodes
        slope, num_stages = self._per_context_token, self._num_stages
        if num_iterations <= MANY:
            contexts = range(decode_context, last, num_decodes)
            return [(start + slope * context) / num_stages for context in contexts]
        times = np.arange(float(decode_context), last, num_decodes)  # no cast, nothing copied
        times *= slope
        times += start
        if num_stages != 1:
            times /= num_stages
        return times

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by term of the line; together they are its time."""
        return {
            "base": self._base / self._num_stages,
            "tokens": self._per_token * batch.num_tokens / self._num_stages,
            "context": self._per_context_token * batch.total_context / self._num_stages,
        }
