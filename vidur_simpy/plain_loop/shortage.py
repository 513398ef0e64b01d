"""Who gives way in the plain loop when blocks run short."""

from __future__ import annotations

from collections import deque
from typing import Any, TypeAlias

from vidur_simpy.plain_loop.cohorts import Cohort, Entry, Prompt
from vidur_simpy.plain_loop.completions import Member

__all__ = ["leave_scarce", "take_scarce"]

One: TypeAlias = Member | Prompt


def _give_way(
    queue: deque[One], free: int, iteration: int, block_size: int, most: int
) -> tuple[list[Prompt], list[One], int, int]:
    """Let each request that decodes take its block, the last in order giving way for it.

    As `ContinuousBatching.take_decodes`, one request after the other.

    Parameters
    ----------
    queue : deque of Member and Prompt
        What is between two batches, in order. Those are left in it that `most` keep from being
        reached.
    free : int
        Blocks that nobody holds.
    iteration : int
        Steps of the decode set that have ended.
    block_size : int
    most : int
        Most decodes of a batch.

    Returns
    -------
    prefills : list of Prompt
        The unfinished prompts met on the way.
    victims : list of Member and Prompt
        In the order in which they gave way.
    free, least : int
        Blocks that are free in the end, and the fewest that were.
    """
    prefills: list[Prompt] = []
    victims: list[One] = []
    least, num_decodes = free, 0
    while queue and num_decodes < most:
        entry = queue.popleft()
        if not isinstance(entry, tuple):
            prefills.append(entry)
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
            num_decodes += 1
    return prefills, victims, free, least


def leave_scarce(
    cohort: Cohort, prompt: Prompt | None, position: int, free: int, most: int
) -> tuple[list[One], int, int]:
    """Let the last requests leave a cohort, or give up their prompt, for the blocks of the others.

    Parameters
    ----------
    cohort : Cohort
    prompt : Prompt or None
        The one that goes on, if there is one.
    position : int
        How many decodes stand ahead of it.
    free : int
        Blocks that nobody holds.
    most : int
        Most decodes of a batch.

    Returns
    -------
    victims : list of Member and Prompt
        In the order in which they gave way.
    free, least : int
        Blocks that are free in the end, and the fewest that were.
    """
    queue: deque[One] = deque(cohort.members.values())
    if prompt is not None:
        queue.insert(position, prompt)
    _, victims, free, least = _give_way(queue, free, cohort.iteration, len(cohort.phases), most)
    left = [cohort.leave(each) if isinstance(each, tuple) else each for each in victims]
    return left, free, least


def take_scarce(
    running: list[Entry], most: int, free: int, block_size: int
) -> tuple[
    Cohort | None,
    list[Prompt],
    list[Entry],
    list[Prompt | Member],
    int,
    int,
]:
    """Take a batch's decodes when blocks are scarce; as `ContinuousBatching.take_decodes`.

    Parameters
    ----------
    running : list of Cohort, Prompt and Member
        What is between two batches, in order.
    most : int
        Most decodes of a batch.
    free : int
        Blocks that nobody holds.
    block_size : int

    Returns
    -------
    cohort : Cohort or None
    prompts : list of Prompt
        The unfinished prompts met on the way.
    left : list of Prompt and Member
        What is for a later batch.
    victims : list of Prompt and Member
        Who gave way, in this order.
    free, least : int
        Blocks that are free in the end, and the fewest that were.
    """
    cohort: Cohort | None = None
    prompts: list[Prompt] = []
    ahead: list[int] = []  # of each of them
    for entry in running:
        if isinstance(entry, Prompt):
            prompts.append(entry)
            ahead.append(0 if cohort is None else len(cohort.members))
        elif isinstance(entry, Cohort):
            if cohort is None:
                cohort = entry
            else:
                cohort.absorb(entry, len(entry.members))
        else:
            if cohort is None:
                cohort = Cohort(block_size)
            cohort.join(entry)
    if cohort is None:
        return None, prompts, [], [], free, free
    needed = cohort.phases[cohort.iteration % block_size]
    if len(cohort.members) + bool(prompts) <= most and free > needed:
        return cohort, prompts, [], [], free - needed, free - needed
    queue: deque[Any] = deque(cohort.members.values())
    for prompt, position in zip(reversed(prompts), reversed(ahead), strict=True):
        queue.insert(position, prompt)
    reached: Any
    victims: Any
    reached, victims, free, least = _give_way(queue, free, cohort.iteration, block_size, most)
    victims = [cohort.leave(each) if isinstance(each, tuple) else each for each in victims]
    left: list[Any] = [cohort.leave(each) if isinstance(each, tuple) else each for each in queue]
    return cohort if cohort.members else None, reached, left, victims, free, least


def _num_tokens_held(entry: One, iteration: int) -> int:
    """Return the tokens with a slot between two batches; the newest of a decode has none yet."""
    if not isinstance(entry, tuple):
        return entry.row[1]
    _, prompt, output, *_, last = entry
    return prompt + output - (last - iteration) - 1
