"""Into how many parts a model can be split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vidur_simpy.errors import ConfigError

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment

__all__ = ["check_size", "data_parallel_sizes", "divisors", "tensor_parallel_sizes"]


def divisors(number: int) -> list[int]:
    """Return the sizes that split so many parts evenly, in ascending order.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [size for size in range(1, number + 1) if number % size == 0]


def tensor_parallel_sizes(deployment: Deployment) -> list[int]:
    """Return sizes that split heads and MLPs, and split the KV heads or hold each equally often."""
    model, dp = deployment.model, deployment.data_parallel_size
    shared = model.num_shared_experts * model.moe_intermediate_size
    widths = (model.intermediate_size, shared, deployment.expert_parts // dp)
    num_kv_heads = model.num_kv_heads
    return [
        size
        for size in divisors(model.num_heads)
        if num_kv_heads % size == 0 or size % num_kv_heads == 0
        if not any(width % size for width in widths)
    ]


def data_parallel_sizes(deployment: Deployment) -> list[int]:
    """Return sizes that split the experts; 1 if there are none."""
    return divisors(deployment.expert_parts) or [1]


def check_size(deployment: Deployment, field: str, parts: str, sizes: Iterable[int]) -> None:
    """Refuse a size that is none of those that split such parts of the model.

    Raises
    ------
    ConfigError
        With the sizes that do, nearest first.
    """
    given = getattr(deployment, field)
    if given not in (valid := list(sizes)):
        valid.sort(key=lambda size: (abs(size - given), size))
        raise ConfigError(
            f"Deployment.{field} = {given} does not split the {parts} of "
            f"{deployment.model.name}: expected one of {', '.join(map(str, valid))}."
        )
