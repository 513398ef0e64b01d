"""The paged KV cache of a replica: blocks reserved, grown and freed."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from vidur_simpy.errors import SimulationError
from vidur_simpy.sums import Numbers, added, running_sums
from vidur_simpy.validation import configuration

__all__ = ["BlockPool", "KVCache"]


@configuration
class KVCache:
    """Configuration of the paged KV cache of each replica.

    Attributes
    ----------
    block_size : int
        Tokens per block.
    num_blocks : int or None
        Blocks per replica; planned from the device's memory if None. Given, it is taken as it is:
        whether they fit beside the weights is not asked.
    watermark : float
        Share of the blocks that admission of a new request leaves free, 0 to 1 (vLLM V0).
    gpu_memory_utilization : float
        Share of the device's memory that may be used, for planning.
    """

    block_size: int = Field(default=16, ge=1)
    num_blocks: int | None = Field(default=None, ge=1)
    watermark: float = Field(default=0.01, ge=0, lt=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)


class BlockPool:
    """The blocks of one replica.

    Parameters
    ----------
    num_blocks : int
        Blocks in all.
    block_size : int
        Tokens per block.
    watermark : float
        Share of the blocks that admission leaves free.

    Attributes
    ----------
    num_free : int
        Blocks nobody holds.
    num_free_least : int
        The fewest that were free so far.
    num_watermark_blocks : int
        ``int(watermark * num_blocks)``.

    Examples
    --------
    >>> pool = BlockPool(num_blocks=100, block_size=16, watermark=0.01)
    >>> pool.blocks_of(33)
    3
    >>> pool.reserve(3)
    >>> pool.usage
    0.03
    """

    __slots__ = (
        "_usage_integral",
        "_usage_since",
        "block_size",
        "num_blocks",
        "num_free",
        "num_free_least",
        "num_watermark_blocks",
    )

    def __init__(self, num_blocks: int, block_size: int, watermark: float = 0.0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_watermark_blocks = int(watermark * num_blocks)
        self.num_free = num_blocks
        self.num_free_least = num_blocks
        self._usage_integral = 0.0
        self._usage_since = 0.0

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return (self.num_blocks - self.num_free) / self.num_blocks

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def reserve(self, num_blocks: int) -> None:
        """Take blocks for a request; the policy has made sure that they are there."""
        self.num_free -= num_blocks
        if self.num_free < self.num_free_least:
            self.num_free_least = self.num_free

    def free(self, num_blocks: int) -> None:
        """Give blocks back."""
        self.num_free += num_blocks

    def validate(self) -> None:
        """Check that no more blocks are reserved than there are, nor freed than were reserved.

        Raises
        ------
        SimulationError
            A replica scheduler reserved more than the pool holds.
        """
        if not 0 <= self.num_free <= self.num_blocks:
            raise SimulationError(
                f"the KV cache has {self.num_blocks} blocks, but the replica scheduler holds "
                f"{self.num_blocks - self.num_free}; expected 0 to {self.num_blocks}."
            )

    def tick(self, now: float) -> None:
        """Note the use of the blocks up to `now`, before it changes."""
        self._usage_integral += (self.num_blocks - self.num_free) * (now - self._usage_since)
        self._usage_since = now

    def take_over(self, num_free: int, num_free_least: int, integral: float, now: float) -> None:
        """Go on from what was counted elsewhere.

        Parameters
        ----------
        num_free, num_free_least : int
            Blocks nobody holds, and the fewest that were free.
        integral : float
            Blocks in use, integrated over the seconds up to `now`.
        now : float
            In seconds.
        """
        self.num_free, self.num_free_least = num_free, num_free_least
        self._usage_integral, self._usage_since = integral, now

    def skip(self, num_blocks: Numbers, started_at: float, ends: Numbers) -> Numbers:
        """Note the use during iterations, and reserve what the ones that follow take.

        Parameters
        ----------
        num_blocks : sequence of int
            Blocks reserved at the end of each iteration.
        started_at : float
            When the first one started, in seconds.
        ends : sequence of float
            Ends of the iterations, in seconds.

        Returns
        -------
        sequence of int
            Blocks in use from each end on.
        """
        used_before = self.num_blocks - self.num_free
        used = running_sums(used_before, num_blocks)
        if isinstance(used, np.ndarray):
            starts = np.concatenate(([started_at], ends[:-1]))
            held = np.concatenate(([used_before], used[:-1])) * (ends - starts)
            self._usage_integral = added(self._usage_integral, held)
        else:
            start, blocks = started_at, float(used_before)
            for end, blocks_after in zip(ends, used, strict=True):
                self._usage_integral += blocks * (end - start)
                start, blocks = end, blocks_after
        self._usage_integral, self._usage_since = float(self._usage_integral), float(ends[-1])
        self.reserve(int(used[-1]) - used_before)
        return used

    def mean_usage(self, now: float) -> float:
        """Time-weighted mean share of the blocks in use from 0 to `now` seconds."""
        if now <= 0.0:
            return 0.0
        rest = (self.num_blocks - self.num_free) * (now - self._usage_since)
        return (self._usage_integral + rest) / (self.num_blocks * now)
