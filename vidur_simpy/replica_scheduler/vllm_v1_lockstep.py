"""What the vLLM V1 scheduler keeps of its requests, so that a step costs what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from vidur_simpy.decode_set import SharedSteps
from vidur_simpy.entities import Request
from vidur_simpy.prefix_cache import Holder
from vidur_simpy.sums import Numbers, repeated

__all__ = ["Lockstep", "RequestState"]


class RequestState:
    """One request inside the scheduler.

    vLLM knows neither prefill nor decode: a request has tokens that are known and tokens that are
    computed, and wants the difference. While prompt tokens are left, ``request.prefill_target``
    are known and ``request.num_scheduled_tokens`` computed, or about to be; from then on each step
    computes one token, and a :class:`Lockstep` counts.

    Attributes
    ----------
    request : Request
    end : int
        Prompt and output tokens together at which it ends.
    admission : int
        Number of its latest admission; `running` is in this order.
    joined_at : int or None
        Step of the lockstep from which its computed tokens are counted; None outside of it.
    skipped_at : int
        Last step of the lockstep that it was left out of.
    holder : Holder or None
        Its blocks in the prefix cache, from the first on; the rest are counted.
    """

    __slots__ = (
        "admission",
        "end",
        "holder",
        "joined_at",
        "request",
        "skipped_at",
    )

    def __init__(self, request: Request, max_model_len: int) -> None:
        self.request = request
        self.end = min(request.num_tokens, max_model_len)
        self.admission = -1
        self.joined_at: int | None = None
        self.skipped_at = -1
        self.holder: Holder | None = None

    @property
    def num_left(self) -> int:
        """Prompt tokens that no step was planned for; 0 once it yields output."""
        return self.request.prefill_target - self.request.num_scheduled_tokens


class Lockstep(SharedSteps):
    """Requests that compute one token in every step.

    Steps are numbered from 1 when they are planned; `iteration` counts those that have ended, and
    lags behind by what is in flight. A request's future is written down when it is added: the step
    that samples its last token, and the steps that begin a new block.

    Parameters
    ----------
    block_size : int
        Tokens per KV-cache block.

    Attributes
    ----------
    num_planned : int
        Number of the step planned last.
    num_members : int
    context : int
        Computed tokens, summed over the members.
    """

    __slots__ = (
        "_block_size",
        "_ending",
        "_ends",
        "_phases",
        "context",
        "num_members",
        "num_planned",
    )

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.num_planned = 0
        self.num_members = 0
        self.context = 0
        self._block_size = block_size
        self._ending: dict[int, dict[RequestState, None]] = {}
        self._ends: list[int] = []
        self._phases = [0] * block_size

    @property
    def num_blocks_needed(self) -> int:
        """Blocks that the next step takes: one for each member whose last block is full."""
        return self._phases[self.num_planned % self._block_size]

    def num_computed(self, state: RequestState) -> int:
        """Tokens of a member that are computed, or will be by the steps planned."""
        assert state.joined_at is not None, f"{state.request} is no member"
        return state.request.prefill_target + self.num_planned - state.joined_at

    def add(self, state: RequestState) -> None:
        """Add a request all of whose known tokens are planned; the next step is its first."""
        state.joined_at = self.num_planned
        self._enter(state)

    def remove(self, state: RequestState) -> None:
        """Take a member out before its last step."""
        self._exit(state)
        state.joined_at = None

    def plan(self, skipped: Sequence[RequestState]) -> tuple[int, int, list[RequestState]]:
        """Plan a step for all members but those `skipped`. O(what changes).

        Returns
        -------
        num_decodes : int
            Members that take part.
        context : int
            Their tokens in the KV cache once the step is done.
        ending : list of RequestState
            Those whose last token the step samples. They are members no longer.
        """
        for state in skipped:
            self._exit(state)
        num_decodes = self.num_members
        number = self.num_planned = self.num_planned + 1
        context = self.context = self.context + num_decodes
        ending = list(self._ending.get(number, ()))
        for state in ending:
            self.remove(state)
        while self._ends and self._ends[0] <= number:
            heappop(self._ends)
        for state in skipped:
            assert state.joined_at is not None, f"{state.request} is no member"
            state.joined_at += 1
            state.skipped_at = number
            self._enter(state)
        return num_decodes, context, ending

    def _enter(self, state: RequestState) -> None:
        origin = self._origin(state)
        last_step = origin + state.end - 1
        bucket = self._ending.get(last_step)
        if bucket is None:
            self._ending[last_step] = {state: None}
            heappush(self._ends, last_step)
        else:
            bucket[state] = None
        self._phases[origin % self._block_size] += 1
        self.num_members += 1
        self.context += self.num_planned - origin

    def _exit(self, state: RequestState) -> None:
        origin = self._origin(state)
        last_step = origin + state.end - 1
        bucket = self._ending[last_step]
        del bucket[state]
        if not bucket:
            del self._ending[last_step]
        self._phases[origin % self._block_size] -= 1
        self.num_members -= 1
        self.context -= self.num_planned - origin

    @staticmethod
    def _origin(state: RequestState) -> int:
        """Return the step after which nothing of a member was computed, as it were.

        A step begins a block for it if it is so many whole blocks later.
        """
        assert state.joined_at is not None, f"{state.request} is no member"
        return state.joined_at - state.request.prefill_target

    def num_steady_steps(self, num_free: int) -> int:
        """Further steps after the one planned last that nobody ends with and blocks suffice for.

        A lower bound; `num_free` are the blocks free now.
        """
        if not self.num_members:
            return 0
        ends = self._ends
        while ends[0] not in self._ending:
            heappop(ends)
        # In as many steps as a block has tokens each member takes a block.
        most = self._block_size * (num_free // self.num_members)
        return min(ends[0] - 1 - self.num_planned, most)

    def skip(self, execution_times: Numbers, now: float) -> Numbers:
        """End the step planned last and as many more as there are times, all steady.

        Parameters
        ----------
        execution_times : sequence of float
            Time of each step, in seconds.
        now : float
            End of the last one, in seconds.

        Returns
        -------
        sequence of int
            Blocks that the step after each of them takes.
        """
        num_steps, first = len(execution_times), self.num_planned
        self.add_times(execution_times, now)
        self.num_planned += num_steps
        self.context += num_steps * self.num_members
        return repeated(self._phases, first, num_steps)

    def end_step(self, now: float, execution_time: float) -> None:
        """Count a step that ended at `now` and took `execution_time`, both in seconds."""
        self.iteration += 1
        self.execution_time += execution_time
        self.last_end = now
