"""Iterations of the same decodes that are known beforehand, taken at once."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import cache
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vidur_simpy.fast_forward import LONGEST_RUN, SHORTEST_RUN
from vidur_simpy.sums import Numbers, repeated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidur_simpy.processes import Replica

__all__ = ["DecodeRun", "State"]

# Fewer iterations are stepped.
_WORTH_IT = 3


State: TypeAlias = tuple[int, int, int, float, float, list[int], int, int, int]
"""A replica when the first iteration of a run has begun: the requests that decode, and their tokens
in the KV cache once the iteration is done; the steps of the decode set before; the times of the
steps of the decode set and of those of the stage before, in seconds; the blocks that each step
takes, by its number modulo the block size; blocks in use, requests running and waiting."""


class DecodeRun:
    """The run of iterations under way on one replica, if `num_steps` is not 0.

    While it lasts the requests that decode stay the same and nobody is admitted. What each step
    adds is settled at its end, with the additions in the order of stepping.

    Attributes
    ----------
    num_steps : int
        Iterations that are to be taken.
    ends_at : float
        When the last of them ends, in seconds.
    arrivals : list of float
        When requests came meanwhile that have to wait, in seconds.
    under_way : (float, float)
        Start and time of the iteration under way when it was stopped, in seconds.
    """

    __slots__ = (
        "_decode_times",
        "_durations",
        "_ends",
        "_limit",
        "_num_blocks",
        "_state",
        "_sums",
        "_timeline",
        "arrivals",
        "ends_at",
        "num_steps",
        "under_way",
    )

    def __init__(self, replica: Replica) -> None:
        stage_time: Any = replica.stages[0].stage_time
        self._decode_times = stage_time.decode_times
        self._num_blocks = replica.pool.num_blocks
        self._timeline = replica.timeline
        self._limit = SHORTEST_RUN
        self._ends: Numbers = ()
        self.num_steps = 0
        self.ends_at = inf
        self.arrivals: list[float] = []
        self.under_way = (0.0, 0.0)

    def plan(self, now: float, num_steps: int, state: State) -> bool:
        """Plan at most `num_steps` iterations from `now` (seconds) on; return if it is worth it."""
        num_steps = min(num_steps, self._limit)
        if num_steps < _WORTH_IT:
            return False
        num_decodes, context, _, executed, busy, _, _, _, _ = state
        try:
            durations = self._decode_times(num_decodes, context, num_steps, 0)
        except Exception:  # which stepping runs into, too, in time
            return False
        sums: tuple[list[float], ...] | NDArray[np.float64]
        ends: Numbers
        if isinstance(durations, np.ndarray):
            sums = np.empty((3, num_steps + 1))
            sums[:, 0] = now, executed, busy
            sums[:, 1:] = durations
            sums = np.add.accumulate(sums, axis=1)
            ends = sums[0, 1:]
            shortest = durations[durations.argmin()]  # faster than min()
        else:
            sums = (
                list(accumulate(durations, initial=now)),
                list(accumulate(durations, initial=executed)),
                list(accumulate(durations, initial=busy)),
            )
            ends = sums[0][1:]
            shortest = min(durations)
        ends_at = float(ends[-1])
        if not (shortest >= 0.0 and ends_at < inf):
            return False  # stepping says what is wrong
        self._durations, self._ends, self._sums, self._state = durations, ends, sums, state
        self.ends_at, self.num_steps = ends_at, num_steps
        self.arrivals.clear()
        return True

    def cut(self, now: float) -> None:
        """Let it end with the iteration that is under way at `now` (seconds)."""
        num_steps = 1 + bisect_left(self._ends, now, 0, self.num_steps - 1)
        self._limit = max(SHORTEST_RUN, 2 * num_steps)
        if num_steps < self.num_steps:
            self.ends_at = float(self._ends[num_steps - 1])
            self.num_steps = num_steps

    def end(self, num_steps: int, usage: float) -> tuple[int, float, float, float]:
        """Take so many of its iterations.

        Returns
        -------
        num_blocks : int
            Taken in all by the iterations after the first one.
        executed, busy : float
            As in `State`, now.
        usage : float
            The integral of the blocks in use over time, of which the value before was given.
        """
        if num_steps == self._limit:
            self._limit = min(2 * num_steps, LONGEST_RUN)
        self.num_steps = 0
        _, _, iteration, _, _, phases, used_before, _, _ = self._state
        sums, ends = self._sums, self._ends
        used: Numbers
        if isinstance(sums, np.ndarray):
            first = iteration % len(phases)
            used = np.array(phases)[_rounds(len(phases))[first : first + num_steps]]
            used[0] = used_before
            used = np.add.accumulate(used)
            times = sums[0, : num_steps + 1]
            held = used * (times[1:] - times[:-1])
            held[0] += usage
            usage = float(np.add.accumulate(held)[-1])
            _, executed, busy = sums[:, num_steps].tolist()
        else:
            needed = repeated(phases, iteration + 1, num_steps - 1)
            used = list(accumulate(needed, initial=used_before))
            start = sums[0][0]
            for end, blocks in zip(ends[:num_steps], used, strict=True):
                usage += blocks * (end - start)
                start = end
            executed, busy = sums[1][num_steps], sums[2][num_steps]
        if num_steps > 1 and ends[num_steps - 2] >= self._timeline.next_at:
            *_, num_running, num_waiting = self._state
            self._timeline.sample_run(
                ends[: num_steps - 1],
                num_running,
                num_waiting,
                used[1:],
                self._num_blocks,
                self.arrivals,
            )
        return int(used[-1]) - used_before, executed, busy, usage

    def stop(self, now: float, usage: float) -> tuple[int, int, float, float, float]:
        """Take the iterations that ended before `now`, and forget about those after the next.

        Returns
        -------
        num_steps : int
            How many they were; the next one's start and time are then `under_way`.
        num_blocks, executed, busy, usage
            As of `end`, with the blocks of the next one.
        """
        num_ended = bisect_left(self._ends, now, 0, self.num_steps - 1)
        _, _, iteration, executed, busy, phases, used, num_running, _ = self._state
        started_at = float(self._sums[0][num_ended])
        self.under_way = (started_at, float(self._durations[num_ended]))
        self.num_steps = num_blocks = 0
        if num_ended:
            num_blocks, executed, busy, usage = self.end(num_ended, usage)
            num_blocks += phases[(iteration + num_ended) % len(phases)]
            if started_at >= self._timeline.next_at:
                in_use = (used + num_blocks) / self._num_blocks
                num_waiting = self._state[-1] + bisect_right(self.arrivals, started_at)
                self._timeline.sample(started_at, num_running, num_waiting, in_use)
        return num_ended, num_blocks, executed, busy, usage


@cache
def _rounds(block_size: int) -> NDArray[np.int64]:
    """Return the position of many iterations among those of a block, from the start of one."""
    return np.arange(LONGEST_RUN + block_size) % block_size
