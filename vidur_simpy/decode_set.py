"""Requests that step together, one token each, at a cost of what changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from vidur_simpy.entities import Request, by_arrival
from vidur_simpy.sums import Numbers, added, repeated

__all__ = ["DecodeSet", "SharedSteps"]


class SharedSteps:
    """Steps that requests take together, so that a step costs nothing per request.

    What a request had when it joined stays with it; what came since is read from here.

    Attributes
    ----------
    iteration : int
        Steps that have ended.
    execution_time : float
        Their times, summed, in seconds.
    last_end : float
        When the last of them ended, in seconds.
    """

    __slots__ = ("execution_time", "iteration", "last_end")

    def __init__(self) -> None:
        self.iteration = 0
        self.execution_time = 0.0
        self.last_end = 0.0

    def join(self, request: Request) -> None:
        """Let a request take part from the next step on."""
        request.decode_set = self
        request._joined_at_iteration = self.iteration
        request._joined_at_execution_time = self.execution_time

    def leave(self, request: Request) -> None:
        """Take a request out; it gets the tokens and times of its steps."""
        request.execution_time, request.preempted_time = self.times_of(request)
        steps = self.iteration - request._joined_at_iteration
        if steps:
            request.last_stage_end = self.last_end
        request.decode_set = None
        request._processed += steps

    def leave_out(self, request: Request, execution_time: float) -> None:
        """Do not count the last step, of `execution_time` seconds, for a request that joined."""
        request._joined_at_iteration += 1
        request._joined_at_execution_time += execution_time

    def add_times(self, execution_times: Numbers, now: float) -> None:
        """Count steps that took `execution_times` seconds, the last of which ended at `now`."""
        self.iteration += len(execution_times)
        self.execution_time = added(self.execution_time, execution_times)
        self.last_end = now

    def times_of(self, request: Request) -> tuple[float, float]:
        """Return a request's execution time and preempted time up to the last step, in seconds."""
        if self.iteration == request._joined_at_iteration:
            return request.execution_time, request.preempted_time
        assert request.last_stage_end is not None
        executed = self.execution_time - request._joined_at_execution_time
        waited = self.last_end - request.last_stage_end - executed
        if waited > 0.0:
            return request.execution_time + executed, request.preempted_time + waited
        return request.execution_time + executed, request.preempted_time


class DecodeSet(SharedSteps):
    """Requests that decode together: one token each per iteration, at O(what changed) a step.

    A request's future is known when it joins: the iteration of its last token, and the iterations
    in which its context crosses a KV-cache block. Both are written down once, in buckets keyed by
    iteration, and the sums are kept; a step moves the shared counter and touches only the
    requests that finish.

    Parameters
    ----------
    block_size : int
        Tokens per KV-cache block.

    Attributes
    ----------
    members : dict of Request to None
        The requests, in batch order.
    iteration : int
        Steps taken since the set was made.
    num_processed_tokens : int
        Sum over the members.
    """

    __slots__ = (
        "_block_phases",
        "_finishes",
        "_finishing",
        "block_size",
        "is_sorted",
        "latest_arrival",
        "members",
        "num_processed_tokens",
    )

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.members: dict[Request, None] = {}
        self.num_processed_tokens = 0
        self.latest_arrival = float("-inf")
        self.is_sorted = True
        self._finishing: dict[int, list[Request]] = {}
        self._finishes: list[int] = []
        self._block_phases = [0] * block_size

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_blocks_needed(self) -> int:
        """Blocks that the next step takes: one for each member whose last block is full."""
        return self._block_phases[self.iteration % self.block_size]

    @property
    def num_steps_to_finish(self) -> int:
        """Steps until some member has its last token."""
        finishes = self._finishes
        while finishes[0] not in self._finishing:
            heappop(finishes)
        return finishes[0] - self.iteration

    def num_steady_steps(self, num_free: int) -> int:
        """Further steps after the one under way that nobody finishes before and blocks suffice for.

        A lower bound; `num_free` are the blocks free now.
        """
        steps = self.num_steps_to_finish - 1
        # In `block_size` steps each member takes a block; one has to stay free.
        return min(steps, self.block_size * max(0, (num_free - 1) // len(self.members)))

    def skip(self, execution_times: Numbers, now: float) -> Numbers:
        """Take steps in which nobody finishes; return the blocks that the step after each takes.

        Parameters
        ----------
        execution_times : sequence of float
            Time of each step, in seconds.
        now : float
            End of the last one, in seconds.
        """
        num_steps, first = len(execution_times), self.iteration + 1
        self.add_times(execution_times, now)
        self.num_processed_tokens += num_steps * len(self.members)
        return repeated(self._block_phases, first, num_steps)

    def join(self, request: Request) -> None:
        """Add a request whose prefill is complete."""
        SharedSteps.join(self, request)
        processed, iteration = request._processed, self.iteration
        self.members[request] = None
        self.num_processed_tokens += processed
        last_iteration = iteration + request.num_tokens - processed
        finishing = self._finishing.get(last_iteration)
        if finishing is None:
            self._finishing[last_iteration] = [request]
            heappush(self._finishes, last_iteration)
        else:
            finishing.append(request)
        self._block_phases[(1 - processed + iteration) % self.block_size] += 1
        arrived_at = request.arrived_at
        assert arrived_at is not None
        if arrived_at < self.latest_arrival:
            self.is_sorted = False
        else:
            self.latest_arrival = arrived_at

    def leave(self, request: Request) -> None:
        """Take a member out before its last token."""
        joined_at, processed = request._joined_at_iteration, request._processed
        self._finishing[joined_at + request.num_tokens - processed].remove(request)
        self._block_phases[(1 - processed + joined_at) % self.block_size] -= 1
        del self.members[request]
        SharedSteps.leave(self, request)
        self.num_processed_tokens -= request._processed

    def absorb(self, others: Iterable[Request]) -> None:
        """Add `others` in their order; those that decode in another set leave it."""
        for request in others:
            if request.decode_set is not None:
                request.decode_set.leave(request)
            self.join(request)

    def sort_by_arrival(self) -> None:
        """Put the members in order of arrival; those of one instant keep their order."""
        if not self.is_sorted:
            self.members = dict.fromkeys(sorted(self.members, key=by_arrival))
            self.is_sorted = True

    def advance(self, now: float, execution_time: float) -> Sequence[Request]:
        """Take one step of every member that ended at `now`; return those that are complete.

        Parameters
        ----------
        now : float
            End of the last stage, in seconds.
        execution_time : float
            Time of the step, summed over the pipeline stages, in seconds.
        """
        self.iteration += 1
        self.num_processed_tokens += len(self.members)
        self.execution_time += execution_time
        self.last_end = now
        return self._finish() if self.iteration in self._finishing else ()

    def _finish(self) -> list[Request]:
        """Take out the members that have their last token; there are some."""
        iteration, block_size = self.iteration, self.block_size
        finished = self._finishing.pop(iteration)
        for request in finished:
            joined_at = request._joined_at_iteration
            self._block_phases[(1 - request._processed + joined_at) % block_size] -= 1
            del self.members[request]
            request.execution_time, request.preempted_time = self.times_of(request)
            request.last_stage_end = self.last_end
            request.decode_set = None
            request._processed += iteration - joined_at
            self.num_processed_tokens -= request._processed
        finishes = self._finishes
        while finishes and finishes[0] <= self.iteration:
            heappop(finishes)
        return finished
