"""What an execution-time model is: a protocol, or a plain function of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from vidur_simpy.errors import ConfigError
from vidur_simpy.validation import takes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk

__all__ = [
    "BatchCounts",
    "ExecutionTime",
    "HasDecodeTimes",
    "HasOperators",
    "StageTime",
    "stage_time_of",
]


class BatchCounts(Protocol):
    """What an execution-time model may read of a batch."""

    @property
    def num_decodes(self) -> int:
        """Requests that decode, one token each."""

    @property
    def decode_context(self) -> int:
        """Tokens in the KV cache once this step is done, summed over the decoding requests."""

    @property
    def prefills(self) -> Sequence[PrefillChunk]:
        """Prefill chunks: `num_tokens` computed, and `context` in the KV cache afterwards."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step: the decodes and all chunks."""

    @property
    def total_context(self) -> int:
        """Sum of `decode_context` and of the context of every chunk."""

    @property
    def num_attention_pairs(self) -> int:
        """Tokens attended to, summed over the tokens of the step (causal)."""


StageTime: TypeAlias = Callable[[BatchCounts, int], float]
"""Seconds that pipeline stage `stage_id`, counted from 0, takes for a batch.

It may have methods besides: those of `HasDecodeTimes` and of `HasOperators`; and an attribute
`is_alike_on_all_stages`, true if the stages take equal times, so that it is called for one only.
"""


@runtime_checkable
class HasDecodeTimes(Protocol):
    """Stage times that can be asked for a run of decode steps at once."""

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float] | NDArray[np.float64]:
        """Return the seconds of each of the next iterations of the same decodes.

        The `i`-th, from 0, equals to the last bit what a call gives for a batch of `num_decodes`
        decodes alone with ``decode_context + i * num_decodes`` tokens of context, because each
        step adds a token to each: only then does a run taken at once end when its steps do.

        Parameters
        ----------
        num_decodes, num_iterations : int
            At least 1.
        decode_context : int
            `BatchCounts.decode_context` of the first iteration.
        stage_id : int
            Pipeline stage, counted from 0.

        Returns
        -------
        list of float or ndarray, shape (num_iterations,)
            Whichever is faster.
        """


@runtime_checkable
class HasOperators(Protocol):
    """Stage times that can be broken down by operator."""

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""


@runtime_checkable
class ExecutionTime(Protocol):
    """A model of execution times, before it is told on what."""

    def for_replica(self, deployment: Deployment) -> StageTime:
        """Return the stage times of one replica; raise a ConfigError if it cannot."""


def stage_time_of(
    execution_time: ExecutionTime | Callable[..., float], deployment: Deployment
) -> StageTime:
    """Return the stage times of a replica under a model, or under a plain function.

    Parameters
    ----------
    execution_time : ExecutionTime or callable
        A function may take ``(batch)`` or ``(batch, stage_id)``; its seconds are the time of each
        stage. A second parameter with a default is passed only if it is called ``stage_id``.
    deployment : Deployment
        The replica; a function does not see it.

    Raises
    ------
    ConfigError
        If it is neither, or the model cannot serve this deployment.

    Examples
    --------
    >>> from vidur_simpy.deployment import Deployment
    >>> from vidur_simpy.hardware import Device, Model
    >>> deployment = Deployment(Model.from_name("llama-3.1-8b"), Device.from_name("h100"))
    >>> stage_time = stage_time_of(lambda batch: 0.25, deployment)
    >>> stage_time(None, 0)
    0.25
    """
    if isinstance(execution_time, ExecutionTime) and not isinstance(execution_time, type):
        return execution_time.for_replica(deployment)
    if not callable(execution_time) or isinstance(execution_time, type):
        raise ConfigError(
            f"execution_time {execution_time!r}: expected a model with for_replica(deployment), "
            "such as Linear() or Roofline(), or a function of (batch) or (batch, stage_id)."
        )
    function = execution_time
    if _takes_stage_id(function):
        return function
    return lambda batch, stage_id: function(batch)


def _takes_stage_id(function: Callable[..., Any]) -> bool:
    """Whether to call a function with a stage besides the batch."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return False
    if takes(function, "batch") and "stage_id" not in signature.parameters:
        return False
    if takes(function, "batch", "stage_id"):
        return True
    name = getattr(function, "__name__", repr(function))
    raise ConfigError(
        f"execution_time {name}{signature}: expected a function of (batch) or (batch, stage_id)."
    )
