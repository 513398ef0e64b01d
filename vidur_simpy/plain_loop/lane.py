"""What the lanes of the plain loop share: one replica each, and what is said to it and by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from math import inf
from typing import TYPE_CHECKING

from vidur_simpy.plain_loop.cohorts import Prompt
from vidur_simpy.plain_loop.completions import Completions, Member, Restart, Row
from vidur_simpy.plain_loop.runs import DecodeRun

if TYPE_CHECKING:
    from vidur_simpy.entities import Request
    from vidur_simpy.processes import Replica

__all__ = ["END_ONLY", "STUCK", "Lane"]

# What is sent to a lane instead of the present instant: end the batch under way, and wait, since
# requests that arrive right now come before the next one is formed.
END_ONLY = -1.0

# What a lane answers instead of the instant at which its batch ends: the processes have to go on.
STUCK = -2.0


class Lane(ABC):
    """The batches of one replica: a generator whose local variables are its hot numbers.

    Parameters
    ----------
    replica : Replica
        Whose state it leaves behind when it is closed.
    completions : Completions
        Where it puts who is complete.
    horizon : list of float
        Holds the instant up to which it may go on by itself, in seconds.
    make : callable
        Makes the request of a row.

    Attributes
    ----------
    send : callable
        ``send(now)`` ends the batches that end at this instant, in seconds, forms the next and
        returns when there is something to do again: infinity if never, unless a request arrives.
        What is due before the horizon is not returned; it is done.
    waiting : deque of Row
        Not admitted yet, in order of arrival.
    run : DecodeRun
        The run of decodes under way, if there is one.
    is_open : bool
        Whether a batch is under way, and yet another one would be formed for a new request.
    arrived_at : float
        When the last request came, in seconds.
    """

    def __init__(
        self,
        replica: Replica,
        completions: Completions,
        horizon: list[float],
        make: Callable[[int], Request],
    ) -> None:
        self.replica = replica
        self.waiting: deque[Row] = deque()
        self.run = DecodeRun(replica)
        self.is_open = False
        self.arrived_at = -inf
        self._make = make
        self._completions = completions
        self._horizon = horizon
        self._restarts: dict[int, Restart] = {}  # by row
        self._batches = self._execute()
        next(self._batches)
        self.send = self._batches.send

    @abstractmethod
    def _execute(self) -> Generator[float, float, None]:
        """Execute batches; closed, leave everything to the processes of the replica."""

    def close(self) -> None:
        """Leave everything to the processes of the replica."""
        self._batches.close()

    def note_arrival(self, now: float) -> bool:
        """Have the run under way heed a request that arrives `now`; return if it ends earlier."""
        run = self.run
        if self.waiting:
            # Who waits already cannot be admitted, so that who comes behind cannot.
            run.arrivals.append(now)
            return False
        num_steps = run.num_steps
        run.cut(now)
        return run.num_steps < num_steps

    def _restart(self, victim: Prompt | Member) -> Row:
        """Return as what somebody waits who gave way, and note what it keeps."""
        row: Row
        if isinstance(victim, tuple):
            number, prompt, output, arrived_at, scheduled_at, first_token_at, *_, num_left = victim
            row = (number, prompt + output - num_left, num_left, arrived_at)
            times = victim[6:9]
        else:
            row, first_token_at = victim.row, None
            times = (victim.execution_time, victim.preempted_time, victim.last_stage_end)
            scheduled_at = victim.scheduled_at
        before = self._restarts.get(row[0])
        num_restarts = 1
        if before is not None:
            if before.first_token_at is not None:
                first_token_at = before.first_token_at
            num_restarts += before.num_restarts
        self._restarts[row[0]] = Restart(scheduled_at, first_token_at, *times, num_restarts)
        self._completions.num_restarts[row[0]] = num_restarts
        return row

    def _num_restarts(self, live: Iterable[int]) -> int:
        """Return the restarts of the requests that are complete; `live` are the rows of others."""
        others = set(live)
        return sum(
            restart.num_restarts for row, restart in self._restarts.items() if row not in others
        )

    def _note(
        self,
        *,
        free: int,
        least: int,
        usage: float,
        usage_since: float,
        num_batches: int,
        num_prefill_tokens: int,
        num_decode_tokens: int,
        num_pairs: int,
        num_context: int,
        num_completed: int,
    ) -> None:
        """Write the sums of all batches that have ended to the replica and its blocks."""
        replica = self.replica
        replica.pool.take_over(free, least, usage, usage_since)
        replica.num_batches = replica.num_batches_formed = num_batches
        replica.num_prefill_tokens = num_prefill_tokens
        replica.num_decode_tokens = num_decode_tokens
        replica.num_attention_pairs, replica.num_context_tokens = num_pairs, num_context
        replica.num_outstanding = self._completions.num_outstanding[replica.replica_id]
        replica.num_requests = replica.num_outstanding + num_completed
