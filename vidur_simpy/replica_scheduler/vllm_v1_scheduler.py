"""The scheduler of vLLM V1: plans steps, preempts, admits, and hands out their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.prefix_cache import Hit, PrefixCache
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import queue_of
from vidur_simpy.replica_scheduler.vllm_v1_blocks import RequestBlocks
from vidur_simpy.replica_scheduler.vllm_v1_lockstep import Lockstep, RequestState
from vidur_simpy.replica_scheduler.vllm_v1_release import release_of
from vidur_simpy.replica_scheduler.vllm_v1_steps import Patience, Plan, Step
from vidur_simpy.replica_scheduler.vllm_v1_walk import Walk
from vidur_simpy.sums import Numbers

if TYPE_CHECKING:
    from vidur_simpy.replica_scheduler.vllm_v1 import VllmV1

__all__ = ["VllmV1Scheduler"]

_admission = attrgetter("admission")


class VllmV1Scheduler:
    """The vLLM V1 scheduler of one replica.

    A step is planned at once if tokens and blocks suffice for everybody who runs, since then their
    order decides nothing. Otherwise they are walked one by one, as vLLM does it in every step.

    Attributes
    ----------
    waiting : WaitingQueue
        Requests not admitted, or preempted; the head goes first.
    running : dict of RequestState to None
        In order of admission.
    prefills : dict of RequestState to None
        Those of them whose prompt is not planned to its end; in the same order.
    lockstep : Lockstep
        Those of them that compute a token in every step.
    in_flight : deque of Step
        Steps planned whose outputs are not there yet.
    blocks : RequestBlocks
    max_running_batches : int
        Steps that may be in flight.
    truncates_outputs : bool
        True: a request that passes `max_model_len` ends early, and need not be refused.
    """

    truncates_outputs = True

    def __init__(self, policy: VllmV1, resources: ReplicaResources) -> None:
        self.policy = policy
        self.release = release = release_of(policy.vllm_version)
        self.pool = pool = resources.pool
        self.max_model_len = resources.max_model_len
        self.max_running_batches = 2 if policy.async_scheduling else 1
        self.waiting = queue_of(policy.policy, resources)
        self.running: dict[RequestState, None] = {}
        self.prefills: dict[RequestState, None] = {}
        self.lockstep = Lockstep(pool.block_size)
        self.in_flight: deque[Step] = deque()
        cache = PrefixCache(pool, reuses_blank_first=release.reuses_blank_blocks_first)
        self.blocks = RequestBlocks(pool, cache if policy.enable_prefix_caching else None)
        self._max_num_batched_tokens = policy.max_num_batched_tokens
        self._max_num_running = policy.max_num_active_seqs or policy.max_num_seqs
        self._has_cap = policy.long_prefill_token_threshold > 0
        self._reserves_full_isl = policy.scheduler_reserve_full_isl and release.has_admission_gate
        self._num_watermark_blocks = int(policy.watermark * pool.num_blocks)
        self._states: dict[Request, RequestState] = {}
        self._num_admissions = 0
        self._waits_for_outputs = False
        self._admits_nobody = False
        self._hopeless: RequestState | None = None
        self._patience = Patience()

    @property
    def num_waiting(self) -> int:
        """Requests in `waiting`."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Requests in `running`."""
        return len(self.running)

    @property
    def figures(self) -> dict[str, float]:
        """What the prefix cache did, as columns of the table of replicas."""
        return self.blocks.figures

    def refusal(self, request: Request) -> str:
        """Return why the request can never run here; an empty string if it can."""
        if request.num_prefill_tokens >= self.max_model_len:
            return (
                f"its prompt of {request.num_prefill_tokens} tokens leaves no room for an output "
                f"token within max_model_len = {self.max_model_len}"
            )
        return ""

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._states[request] = RequestState(request, self.max_model_len)
        self.waiting.append(request)
        self._admits_nobody = False

    # -- a step ------------------------------------------------------------------------------

    def schedule(self, now: float) -> Step | None:
        """Plan the next step; None if there is nothing to compute.

        A step without tokens takes no time. The next one is planned at once or, as in vLLM, when
        the step in flight has ended.

        Raises
        ------
        SimulationError
            If requests evict one another for ever.
        """
        while (self.running or self.waiting) and not self._waits_for_outputs:
            step = self._plan_step(now)
            if step is not None:
                step.is_ahead = bool(self.in_flight)
                self.in_flight.append(step)
                return step
            self._waits_for_outputs = bool(self.in_flight)
        return None

    def _plan_step(self, now: float) -> Step | None:
        """Plan what runs, then who is admitted; None if that comes to no tokens."""
        cap = self._long_prefill_cap() if self._has_cap else self.max_model_len
        plan = Plan(self._max_num_batched_tokens, cap)
        if not self._serve_everybody(plan):
            Walk(self, plan).run()
        if self.waiting and not plan.has_preempted:
            self._admit(plan, now)
        self._admits_nobody = not plan.has_preempted
        step = self._form(plan)
        if step is not None and step.yields_tokens:
            self._patience.renew()
        else:
            self._patience.wear(now, self.running, self.waiting)
        return step

    def _long_prefill_cap(self) -> int:
        """Return the most tokens that one request may get in this step."""
        cap = self.policy.long_prefill_token_threshold
        num_requests = len(self.running) + len(self.waiting)
        if num_requests <= 1 and self.release.spares_a_lone_request_the_cap:
            return self.max_model_len
        if self.policy.long_prefill_token_threshold_adaptive:
            return max(cap, self._max_num_batched_tokens // num_requests)
        return cap

    def _form(self, plan: Plan) -> Step | None:
        lockstep = self.lockstep
        if not plan.chunks and lockstep.num_members == len(plan.skipped):
            return None
        num_decodes, context, ending = lockstep.plan(plan.skipped)
        chunks: Sequence[PrefillChunk] = ()
        if plan.chunks:
            chunks = [self._chunk(state, count, ending) for state, count in plan.chunks.items()]
        step = Step(lockstep.num_planned, chunks, num_decodes, context, self.running)
        step.skipped = plan.skipped
        if ending:
            # Blocks are freed in the order of the plan; that decides which are reused first.
            ending.sort(key=_admission)
            step.ending = ending
        return step

    def _chunk(
        self, state: RequestState, num_tokens: int, ending: list[RequestState]
    ) -> PrefillChunk:
        """Count tokens of a prompt as computed; behind the last of them a request is in lockstep.

        If there is only one token more to come, it is `ending` instead.
        """
        request = state.request
        num_computed = request.num_scheduled_tokens = request.num_scheduled_tokens + num_tokens
        if num_computed == request.prefill_target:
            del self.prefills[state]
            if num_computed == state.end - 1:
                ending.append(state)
            else:
                self.lockstep.add(state)
        return PrefillChunk(request, num_tokens, num_computed)

    # -- runs of steps -----------------------------------------------------------------------

    def steady_steps(self, step: Step) -> int:
        """Return how many steps after those planned will be their decodes, if nobody arrives.

        None while a prompt goes on, somebody ends or has to be walked, or may be admitted.
        """
        if self.prefills or len(self.in_flight) < self.max_running_batches:
            return 0
        if self.waiting and not self._waits_in_vain():
            return 0
        for planned in self.in_flight:
            if not planned.is_steady(self.lockstep.num_members):
                return 0
        return self.lockstep.num_steady_steps(self.pool.num_free)

    def _waits_in_vain(self) -> bool:
        """Whether nobody can be admitted until somebody finishes.

        Who did not get in beside these decodes will not beside the next: tokens and places stay as
        they are, and a cached block that is reused is one less to start from, and one less free.
        """
        if len(self.running) >= self._max_num_running:
            return True
        return self.waiting.is_steady and self._admits_nobody

    def skip_steps(self, step: Step, execution_times: Numbers, now: float) -> Numbers:
        """Take steady steps, the last of which ends at `now`; return the blocks that they take."""
        num_blocks = self.lockstep.skip(execution_times, now)
        for planned in self.in_flight:
            planned.number += len(num_blocks)
            planned.is_ahead = len(self.in_flight) > 1
        if self.blocks.cache is not None:
            # Cached blocks may be reused for them. The caller reserves them.
            total = sum(num_blocks) if isinstance(num_blocks, list) else int(np.sum(num_blocks))
            self.blocks.take(total)
            self.pool.free(total)
        return num_blocks

    # -- those who run -----------------------------------------------------------------------

    def _serve_everybody(self, plan: Plan) -> bool:
        """Plan what everybody wants, if tokens and blocks suffice. O(what changes).

        Exact, because then all get the same in any order; only the last may get less.
        """
        lockstep = self.lockstep
        left = plan.budget - lockstep.num_members
        if left < 0:
            return False
        num_blocks = num_blocks_in_lockstep = lockstep.num_blocks_needed
        wanted = []
        for state in self.prefills:
            num_tokens = min(state.num_left, plan.cap)
            if num_tokens > left:
                if state is not next(reversed(self.running)):
                    return False
                num_tokens = left
            if num_tokens:
                left -= num_tokens
                num_blocks += self.num_blocks_for(state, num_tokens)
                wanted.append((state, num_tokens))
        if num_blocks > self.pool.num_free:
            return False
        plan.budget -= lockstep.num_members
        for state, num_tokens in wanted:
            self.give_chunk(state, num_tokens, plan)
        if num_blocks_in_lockstep:
            self.blocks.take(num_blocks_in_lockstep)
        return True

    def put_back(self, victim: RequestState) -> None:
        """Send a request back to `waiting` whose blocks are free; it has to start again."""
        self._hopeless = None
        del self.running[victim]
        self.prefills.pop(victim, None)
        if victim.joined_at is not None:
            self.lockstep.remove(victim)
        victim.request.restart()
        self.waiting.appendleft(victim.request)

    # -- those who wait ----------------------------------------------------------------------

    def _admit(self, plan: Plan, now: float) -> None:
        """Admit waiting requests from the head on, while tokens, places and blocks last."""
        waiting = self.waiting
        waiting.order(now)
        position = 0
        while position < len(waiting) and plan.budget > 0:
            if len(self.running) >= self._max_num_running:
                return
            state = self._states[waiting[position]]
            if state is self._hopeless:
                return
            hit = self.blocks.longest_hit(state)
            num_cached_tokens = hit.num_blocks * self.pool.block_size
            num_tokens = min(state.request.prefill_target - num_cached_tokens, plan.cap)
            if num_tokens > plan.budget:
                if not self.policy.enable_chunked_prefill:
                    if self.release.stops_at_a_prompt_above_the_budget:
                        return
                    position += 1
                    continue
                num_tokens = plan.budget
            if not self._fits(state, hit, num_cached_tokens + num_tokens):
                # Nor will it before blocks are freed or a prompt goes on: no need to look again.
                self._hopeless = state if self._reserves_full_isl else None
                return
            del waiting[position]
            self.running[state] = self.prefills[state] = None
            state.admission = self._num_admissions
            self._num_admissions += 1
            self.blocks.hold(state, hit)
            self.give_chunk(state, num_tokens, plan)

    def _fits(self, state: RequestState, hit: Hit, num_tokens: int) -> bool:
        """Whether blocks for the first tokens, or for all that are known, are free."""
        if self._reserves_full_isl:
            num_tokens = max(num_tokens, state.request.prefill_target)
        num_blocks = self.pool.blocks_of(num_tokens) - hit.num_blocks + hit.num_unheld
        if self.running:
            num_blocks += self._num_watermark_blocks
        return num_blocks <= self.pool.num_free

    # -- tokens and their blocks -------------------------------------------------------------

    def num_computed(self, state: RequestState) -> int:
        """Tokens of a running request that are computed, or will be by the steps planned."""
        if state.joined_at is not None:
            return self.lockstep.num_computed(state)
        return state.request.num_scheduled_tokens if state.num_left else state.end - 1

    def num_blocks_for(self, state: RequestState, num_tokens: int) -> int:
        """Blocks that further tokens of a running request take."""
        block_size, num_computed = self.pool.block_size, self.num_computed(state)
        return -(-(num_computed + num_tokens) // block_size) - -(-num_computed // block_size)

    def give_chunk(self, state: RequestState, num_tokens: int, plan: Plan) -> None:
        """Plan tokens of a prompt, with their blocks; it can be found that far from now on."""
        plan.chunks[state] = num_tokens
        plan.budget -= num_tokens
        self.blocks.grow(state, num_tokens)
        self._hopeless = None

    # -- outputs -----------------------------------------------------------------------------

    def end_first_stage(self, batch: Batch) -> None:
        """Do nothing: a step has no second stage."""

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Give every request that the step sampled its token; let go of those that end."""
        step = self.in_flight.popleft()
        assert step is batch, "steps end in the order in which they were planned"
        self._waits_for_outputs = False
        self.lockstep.end_step(now, step.execution_time)
        if step.skipped:
            self._leave_out(step)
        for chunk in step.prefills:
            if chunk.num_restarts == chunk.request.num_restarts:
                self._end_chunk(chunk, now)
        if not (step.ending or step.late):
            return ()
        self._admits_nobody = False
        completed = [self._finish(state) for state in step.ending]
        completed += [state.request for state in step.late if self._deliver_late(state, step, now)]
        return completed

    def _leave_out(self, step: Step) -> None:
        """Do not count a step for the members of the lockstep that it skipped."""
        for state in step.skipped:
            if state.request.decode_set is self.lockstep:
                self.lockstep.leave_out(state.request, step.execution_time)

    def _end_chunk(self, chunk: PrefillChunk, now: float) -> None:
        request = chunk.request
        request.end_chunk(chunk.num_tokens)
        if request.is_prefill_complete:
            self.lockstep.join(request)
            if request.first_token_at is None:
                request.first_token_at = now

    def _finish(self, state: RequestState) -> Request:
        request = state.request
        self.blocks.finish(state, state.end - 1)
        self._hopeless = None
        self.lockstep.leave(request)
        del self.running[state], self._states[request]
        return request

    def _deliver_late(self, state: RequestState, step: Step, now: float) -> bool:
        """Give a request that waits again the token that was in flight; whether it was the last."""
        request = state.request
        step.deliver_late(request, now)
        self._hopeless = None
        if request.prefill_target < state.end:
            return False
        self.waiting.remove(request)
        del self._states[request]
        return True
