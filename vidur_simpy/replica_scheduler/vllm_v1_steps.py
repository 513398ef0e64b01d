"""The steps of the vLLM V1 scheduler: in the making, planned, and fruitless ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import SimulationError
from vidur_simpy.replica_scheduler.vllm_v1_lockstep import RequestState

__all__ = ["Patience", "Plan", "Step"]

NOBODY: Sequence[RequestState] = ()


class Plan:
    """A step in the making.

    Attributes
    ----------
    budget : int
        Tokens that are left to give.
    cap : int
        Most tokens that one request may get.
    chunks : dict of RequestState to int
        The prompt tokens that were given, in order.
    steps : set of RequestState
        Members of the lockstep that were given theirs, if the requests had to be walked.
    skipped : sequence of RequestState
        Members of the lockstep that got nothing.
    has_preempted : bool
        Whether somebody had to go.
    """

    __slots__ = ("budget", "cap", "chunks", "has_preempted", "skipped", "steps")

    def __init__(self, budget: int, cap: int) -> None:
        self.budget = budget
        self.cap = cap
        self.chunks: dict[RequestState, int] = {}
        self.steps: set[RequestState] = set()
        self.skipped = NOBODY
        self.has_preempted = False

    def take_back(self, victim: RequestState) -> int:
        """Take a preempted request out; return the tokens that it had been given."""
        if victim in self.steps:
            self.steps.remove(victim)
            return 1
        return self.chunks.pop(victim, 0)


class Patience:
    """Notices that steps go on and on, but nobody gets a token."""

    __slots__ = ("_num_fruitless",)

    def __init__(self) -> None:
        self._num_fruitless = 0

    def renew(self) -> None:
        """Take note of a step that yields tokens."""
        self._num_fruitless = 0

    def wear(self, now: float, running: Iterable[RequestState], waiting: Iterable[Request]) -> None:
        """Take note of a step that yields none to these requests.

        Raises
        ------
        SimulationError
            After far more such steps than it takes to compute everything token by token.
        """
        self._num_fruitless += 1
        if self._num_fruitless % 100:
            return
        requests = [*(state.request for state in running), *waiting]
        if self._num_fruitless > 100 + 10 * sum(request.prefill_target for request in requests):
            ids = ", ".join(str(request.request_id) for request in requests[:10])
            raise SimulationError(
                f"at {now:.6g} s no request gets on: {ids} evict one another for ever, as in vLLM "
                f"requests of equal priority and arrival may; expected other priorities, more "
                f"KV-cache blocks or scheduler_reserve_full_isl."
            )


class Step(Batch):
    """A planned step: some chunks, and everybody in the lockstep who was not skipped.

    Attributes
    ----------
    number : int
        Its number in the lockstep.
    is_ahead : bool
        Whether another one was in flight when it was planned.
    ending : sequence of RequestState
        Requests whose last token this step samples.
    skipped : sequence of RequestState
        Members of the lockstep that take no part.
    late : sequence of RequestState
        Requests preempted while this step, which samples a token of theirs, was in flight.
    """

    __slots__ = ("_running", "ending", "is_ahead", "late", "number", "skipped")

    ending: Sequence[RequestState]
    skipped: Sequence[RequestState]
    late: Sequence[RequestState]

    def __init__(
        self,
        number: int,
        chunks: Sequence[PrefillChunk],
        num_decodes: int,
        decode_context: int,
        running: Collection[RequestState],
    ) -> None:
        super().__init__(None, chunks)
        if num_decodes:
            self.num_decodes = num_decodes
            self.decode_context = decode_context
            self.num_tokens += num_decodes
            self.total_context += decode_context
            self.num_attention_pairs += decode_context
        self.number = number
        self.is_ahead = False
        self.ending = self.skipped = self.late = NOBODY
        self._running = running

    @property
    def yields_tokens(self) -> bool:
        """Whether anybody gets an output token of it."""
        return self.num_decodes > 0 or any(
            chunk.context == chunk.request.prefill_target for chunk in self.prefills
        )

    def is_steady(self, num_members: int) -> bool:
        """Whether it decodes for all members of the lockstep, of whom nobody comes or goes."""
        is_disturbed = self.prefills or self.ending or self.skipped or self.late
        return self.num_decodes == num_members and not is_disturbed

    def give_late(self, state: RequestState) -> None:
        """Note that a request it samples a token of was preempted."""
        self.late = [*self.late, state]
        if state in self.ending:
            self.ending = [other for other in self.ending if other is not state]

    def deliver_late(self, request: Request, now: float) -> None:
        """Give a request that was preempted its token of this step, which ended at `now`."""
        request.prefill_target += 1
        if request.first_token_at is None:
            request.first_token_at = now
        if request.last_stage_end is not None and request.last_stage_end < now:
            request.preempted_time += self.stage_started_at - request.last_stage_end
            request.execution_time += self.execution_time
            request.last_stage_end = now

    def decoding(self) -> list[Request]:
        """Return the requests that decode, in the order of the plan. O(running)."""
        in_chunks = {chunk.request for chunk in self.prefills}
        return [
            state.request
            for state in self._running
            if state.request not in in_chunks and self._takes_in(state)
        ]

    def prefilled(self) -> list[Request]:
        """Return the requests whose prefill it completed, preempted ones included."""
        in_chunks = {chunk.request for chunk in self.prefills}
        late = [state.request for state in self.late if state.request in in_chunks]
        return super().prefilled() + late

    def requests(self) -> list[tuple[Request, int]]:
        """Return all requests in the order of the plan, with their tokens. O(running).

        Right until the next step is planned.
        """
        num_tokens = {chunk.request: chunk.num_tokens for chunk in self.prefills}
        num_tokens |= dict.fromkeys(self.decoding(), 1)
        order = (state.request for state in self._running)
        return [(request, num_tokens[request]) for request in order if request in num_tokens]

    def _takes_in(self, state: RequestState) -> bool:
        is_member = state.joined_at is not None and state.skipped_at != self.number
        return is_member or state in self.ending
