"""The running requests of a step one by one, as vLLM plans them: some get less, or have to go."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from vidur_simpy.replica_scheduler.vllm_v1_lockstep import RequestState
from vidur_simpy.replica_scheduler.vllm_v1_steps import Plan

if TYPE_CHECKING:
    from vidur_simpy.replica_scheduler.vllm_v1_scheduler import VllmV1Scheduler

__all__ = ["Walk"]

_unimportance = attrgetter("request.priority", "request.arrived_at")


class Walk:
    """A scan of `running`, in order of admission. O(running).

    Parameters
    ----------
    scheduler : VllmV1Scheduler
    plan : Plan
        What is planned of the step; it gets the chunks, the steps and who is skipped.
    """

    def __init__(self, scheduler: VllmV1Scheduler, plan: Plan) -> None:
        self._scheduler = scheduler
        self._plan = plan
        self._order = list(scheduler.running)
        self._position = 0

    def run(self) -> None:
        """Plan for one request after the other while tokens are left."""
        scheduler, plan = self._scheduler, self._plan
        while self._position < len(self._order) and plan.budget > 0:
            state = self._order[self._position]
            wanted = state.num_left if state.joined_at is None else 1
            num_tokens = min(wanted, plan.cap, plan.budget)
            if num_tokens:
                if not self._make_room(state, num_tokens):
                    break  # nobody behind it is looked at
                if state.joined_at is None:
                    scheduler.give_chunk(state, num_tokens, plan)
                else:
                    self._give_step(state)
            self._position += 1
        plan.skipped = [
            state
            for state in self._order
            if state.joined_at is not None and state not in plan.steps
        ]

    def _make_room(self, state: RequestState, num_tokens: int) -> bool:
        """Preempt until the blocks of further tokens are free; False if `state` itself went."""
        scheduler = self._scheduler
        while scheduler.num_blocks_for(state, num_tokens) > scheduler.pool.num_free:
            victim = self._order[-1]
            if scheduler.policy.policy == "priority":
                victim = max(self._order, key=_unimportance)  # of equals, the first
            self._preempt(victim, self._take_back(victim))
            if victim is state:
                return False
        return True

    def _give_step(self, state: RequestState) -> None:
        """Plan the next token of a member of the lockstep."""
        self._plan.steps.add(state)
        self._plan.budget -= 1
        self._scheduler.blocks.take(self._scheduler.num_blocks_for(state, 1))

    def _preempt(self, victim: RequestState, num_tokens: int) -> None:
        """Free a request's blocks, `num_tokens` just planned included, and let it wait.

        A token that a step in flight samples is still delivered.
        """
        scheduler = self._scheduler
        num_in_cache = scheduler.num_computed(victim) + num_tokens
        num_findable = num_in_cache
        if scheduler.in_flight and self._yields_a_token(victim):
            step = scheduler.in_flight[-1]
            step.give_late(victim)
            # What a token fills is entered when it is planned again, or was known when planned.
            was_known = not step.is_ahead or victim.skipped_at == step.number - 1
            if num_tokens or not was_known:
                num_findable = max(num_findable - 1, victim.request.prefill_target)
        scheduler.blocks.suspend(victim, num_in_cache, num_findable)
        scheduler.put_back(victim)

    def _yields_a_token(self, state: RequestState) -> bool:
        """Whether the step planned last samples a token of a running request."""
        return not state.num_left and state.skipped_at != self._scheduler.lockstep.num_planned

    def _take_back(self, victim: RequestState) -> int:
        """Take a request out of the plan; return the tokens that it had been given."""
        plan, release = self._plan, self._scheduler.release
        position = self._order.index(victim)
        del self._order[position]
        plan.has_preempted = True
        num_tokens = plan.take_back(victim)
        is_refunded = num_tokens > 0 and release.refunds_planned_victims
        if is_refunded:
            plan.budget += num_tokens
        if position < self._position and (is_refunded or release.moves_back_for_any_victim):
            self._position -= 1
        return num_tokens
