"""What a replica's devices send each other, and how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidur_simpy.precision import BF16_BYTES

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time.factors import RooflineFactors

__all__ = ["Links"]

LARGE_ALL_REDUCE_BYTES = 8 * 2**20
"""From this on vLLM hands an all-reduce over to NCCL."""

SEND_LATENCY = 10e-6
"""Seconds to start sending a batch's hidden states to the next stage; assumed, not measured."""


class Links:
    """What a replica's devices send each other over their scale-up links."""

    def __init__(self, deployment: Deployment, factors: RooflineFactors) -> None:
        self._factors = factors
        self._width = deployment.tensor_parallel_size
        self._num_replicas = deployment.data_parallel_size
        self._expert_devices = deployment.expert_devices
        self._is_expert_parallel = deployment.enable_expert_parallel
        self._experts_per_token = deployment.model.experts_per_token
        self._token_bytes = deployment.model.hidden_size * BF16_BYTES
        self._link = deployment.device.scaleup_bidir_gbps * 1e9 / 2

    def all_reduce_time(self, num_tokens: int) -> float:
        """Return the time to sum the hidden states over the tensor parallel devices.

        In a ring of ``n`` devices, each sends ``2 * (n - 1) / n`` of the message one way.
        """
        if self._width == 1:
            return 0.0
        message = num_tokens * self._token_bytes
        start = self._factors.large_all_reduce_time if message >= LARGE_ALL_REDUCE_BYTES else 0.0
        sent = 2 * (self._width - 1) / self._width * message
        return start + self._collective_time(self._width, sent)

    def all_to_all_time(self, num_tokens: int) -> float:
        """Return the time to bring hidden states to their experts and the results back.

        Needed where replicas share experts; the tensor parallel devices of one replica have all
        its tokens anyway. With whole experts on ``n`` devices, a token goes once to each other
        device that holds one of its ``k`` experts: ``(n - 1) * (1 - (1 - 1 / n)**k)`` on average.
        With cut experts it goes to all other replicas.
        """
        if self._num_replicas == 1:
            return 0.0
        n = self._expert_devices
        copies: float = self._num_replicas - 1
        if self._is_expert_parallel:
            copies = (n - 1) * (1 - (1 - 1 / n) ** self._experts_per_token)
        sent = num_tokens / self._width * copies * self._token_bytes
        return 2 * self._collective_time(n, sent)

    def send_time(self, num_tokens: int) -> float:
        """Return the time to send the hidden states to the next pipeline stage."""
        return SEND_LATENCY + num_tokens * self._token_bytes / self._link

    def _collective_time(self, num_devices: int, sent_bytes: float) -> float:
        """Return the time in which each of so many devices sends so many bytes to others."""
        factors, pairs = self._factors, num_devices / 2
        latency = factors.all_reduce_time * pairs**factors.all_reduce_time_growth
        share = factors.all_reduce_link * pairs**factors.all_reduce_link_growth
        return float(latency + sent_bytes / (self._link * share))
