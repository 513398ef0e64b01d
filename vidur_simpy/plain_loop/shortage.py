"""Who gives way in the plain loop when blocks run short."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from vidur_simpy.plain_loop.cohorts import Partial
from vidur_simpy.plain_loop.completions import Member

__all__ = ["Restart", "give_way"]


class Restart(NamedTuple):
    """What a request keeps when it is restarted; it waits as a `Row` with what is left to do.

    Attributes
    ----------
    scheduled_at : float
        In seconds, as all times here.
    first_token_at : float or None
    execution_time, preempted_time, last_stage_end : float
    num_restarts : int
    """

    scheduled_at: float
    first_token_at: float | None
    execution_time: float
    preempted_time: float
    last_stage_end: float
    num_restarts: int


def give_way(
    running: Iterable[Member | Partial], free: int, iteration: int, block_size: int
) -> tuple[list[Member | Partial], int, int]:
    """Let each request that decodes take its block, the last in order giving way for it.

    As `ContinuousBatching.take_decodes`, one request after the other.

    Parameters
    ----------
    running : iterable of Member and Partial
        All that are admitted, in order.
    free : int
        Blocks that nobody holds.
    iteration : int
        Steps of the decode set that have ended.
    block_size : int

    Returns
    -------
    victims : list of Member and Partial
        In the order in which they gave way.
    free, least : int
        Blocks that are free in the end, and the fewest that were.
    """
    queue = deque(running)
    victims: list[Member | Partial] = []
    least = free
    while queue:
        entry = queue.popleft()
        if isinstance(entry, Partial):
            continue
        while free < 1:
            victim = queue.pop() if queue else entry
            victims.append(victim)
            free += -(-_num_tokens_held(victim, iteration) // block_size)
            if victim is entry:
                break
        else:
            # Its last block is full: the step takes another.
            free -= _num_tokens_held(entry, iteration) % block_size == 0
            least = min(least, free)
    return victims, free, least


def _num_tokens_held(entry: Member | Partial, iteration: int) -> int:
    """Return the tokens with a slot between two batches; the newest of a decode has none yet."""
    if isinstance(entry, Partial):
        return entry.row[1]
    _, prompt, output, *_, last = entry
    return prompt + output - (last - iteration) - 1
