"""vLLM V1: one token budget for all, blocks as they are needed, prefixes shared."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pydantic import Field

from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import CapacityError, ConfigError, SimulationError
from vidur_simpy.prefix_cache import Block, BlockKeys, PrefixCache, Prefixes, num_unheld
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Ordering, queue_of
from vidur_simpy.replica_scheduler.vllm_v1_release import Release, release_of
from vidur_simpy.replica_scheduler.vllm_v1_steps import Lockstep, Plan, RequestState, Step
from vidur_simpy.validation import configuration

__all__ = ["VllmV1", "VllmV1Scheduler"]


@configuration
class VllmV1:
    """Running requests first, then waiting ones, each a part of the token budget.

    All names and defaults are vLLM's, except that `async_scheduling` is off unless asked for:
    vLLM has had it on by default since 0.15. The block size and the number of blocks
    (vLLM's ``num_gpu_blocks``) are those of the cluster's :class:`KVCache`, whose own watermark has
    no effect here.

    Attributes
    ----------
    max_num_seqs : int
        Most requests that run at a time. vLLM's server sets 256, on devices of 70 GiB or more 1024.
    max_num_batched_tokens : int
        Most tokens of a step. vLLM's server sets 8192 on devices of 70 GiB or more.
    policy : {"fcfs", "priority"}, another name of an ordering, or a key function
        Who is admitted next. Under ``"priority"`` also who gives way when blocks run short: the
        least urgent running request, otherwise the one admitted last.
    enable_prefix_caching : bool
        Reuse the blocks of equal prefixes, which requests with ``hash_ids`` may share. A request
        that was preempted finds its own blocks again.
    enable_chunked_prefill : bool
        Let a prompt that exceeds the budget be computed in several steps.
    long_prefill_token_threshold : int
        Most tokens of one request in a step; 0 is no limit.
    long_prefill_token_threshold_adaptive : bool
        Raise that limit to an equal share of the budget.
    max_num_active_seqs : int or None
        A lower limit in place of `max_num_seqs`.
    watermark : float
        Share of the blocks that admission leaves free, unless nothing runs.
    scheduler_reserve_full_isl : bool
        Admit a request only if blocks for all its known tokens are free. None are set aside.
    async_scheduling : bool
        Plan a step while the one before it is computed, without its tokens.
    vllm_version : str
        Release whose rules to follow, of those in ``vllm_v1_release.VLLM_VERSIONS``.

    Raises
    ------
    ConfigError
        A setting that is unknown, out of range, or that the release does not have.

    Notes
    -----
    Decides as the scheduler of vLLM does, for a decoder with full attention, on one pipeline stage,
    without speculative decoding, adapters or KV transfer. A request whose prompt and output pass
    `max_model_len` ends there, with fewer output tokens.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    policy: Ordering = "fcfs"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    long_prefill_token_threshold_adaptive: bool = False
    max_num_active_seqs: int | None = Field(default=None, ge=1)
    watermark: float = Field(default=0.0, ge=0, lt=1)
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = False
    vllm_version: str = "0.32.0"

    def __post_init__(self) -> None:
        release = release_of(self.vllm_version)
        for name, is_known in (
            ("watermark", release.has_watermark),
            ("long_prefill_token_threshold_adaptive", release.has_adaptive_cap),
            ("max_num_active_seqs", release.has_max_num_active_seqs),
        ):
            if getattr(self, name) and not is_known:
                raise ConfigError(
                    f"VllmV1.{name} = {getattr(self, name)!r}: vLLM {self.vllm_version} does not "
                    f"have it; expected a later vllm_version."
                )

    def for_replica(self, resources: ReplicaResources) -> VllmV1Scheduler:
        """Make the scheduler of one replica.

        Raises
        ------
        ConfigError, CapacityError
            A replica on which vLLM would not start, or of several pipeline stages.
        """
        return VllmV1Scheduler(self, resources)


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
    cache : PrefixCache or None
        The blocks by content, with prefix caching.
    max_running_batches : int
        Steps that may be in flight.
    truncates_outputs : bool
        True: a request that passes `max_model_len` ends early, and need not be refused.
    """

    truncates_outputs = True

    def __init__(self, policy: VllmV1, resources: ReplicaResources) -> None:
        _check(policy, resources)
        self.policy = policy
        self.release: Release = release_of(policy.vllm_version)
        self.pool = resources.pool
        self.pool.reserve(1)  # vLLM's null block, which it never hands out
        self.max_model_len = resources.max_model_len
        self.waiting = queue_of(policy.policy, resources)
        self.running: dict[RequestState, None] = {}
        self.prefills: dict[RequestState, None] = {}
        self.lockstep = Lockstep(self.pool.block_size)
        self.in_flight: deque[Step] = deque()
        self.max_running_batches = 2 if policy.async_scheduling else 1
        self.cache: PrefixCache | None = None
        if policy.enable_prefix_caching:
            self.cache = PrefixCache(
                self.pool, reuses_blank_first=self.release.reuses_blank_blocks_first
            )
        self._gates_whole_sequences = (
            policy.scheduler_reserve_full_isl and self.release.gates_whole_sequences
        )
        self._num_watermark_blocks = int(policy.watermark * self.pool.num_blocks)
        self._prefixes = Prefixes()
        self._states: dict[Request, RequestState] = {}
        self._num_admissions = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._waits_for_outputs = False
        self._refused: RequestState | None = None
        self._num_fruitless = 0
        self._patience = 100

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
        if self.cache is None:
            return {}
        queried, hit = self._num_queried_tokens, self._num_hit_tokens
        return {
            "num_cached_tokens": hit,
            "prefix_cache_hit_rate": hit / queried if queried else 0.0,
            "num_evicted_blocks": self.cache.num_evicted_blocks,
        }

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

    # -- a step ------------------------------------------------------------------------------

    def schedule(self, now: float) -> Step | None:
        """Plan the next step; None if there is nothing to compute.

        A step without tokens takes no time: the next one is planned at once, or, as vLLM does it,
        when the step in flight has ended.
        """
        while (self.running or self.waiting) and not self._waits_for_outputs:
            step = self._plan_step(now)
            if step is not None:
                self.in_flight.append(step)
                return step
            self._waits_for_outputs = bool(self.in_flight)
        return None

    def _plan_step(self, now: float) -> Step | None:
        """Plan what runs, then who is admitted; None if that comes to no tokens."""
        plan = Plan(self.policy.max_num_batched_tokens, self._long_prefill_cap())
        if not self._serve_everybody(plan):
            self._walk_running(plan)
        if not plan.preempted:
            self._admit(plan, now)
        step = self._form(plan)
        self._lose_patience(step, now)
        return step

    def _long_prefill_cap(self) -> int:
        """Return the most tokens that one request may get in this step."""
        cap = self.policy.long_prefill_token_threshold
        num_requests = len(self.running) + len(self.waiting)
        is_spared = num_requests <= 1 and self.release.spares_a_lone_request_the_cap
        if not cap or is_spared:
            return self.max_model_len
        if self.policy.long_prefill_token_threshold_adaptive:
            return max(cap, self.policy.max_num_batched_tokens // num_requests)
        return cap

    def _form(self, plan: Plan) -> Step | None:
        chunks = [item for item in plan.num_tokens.items() if item[0].joined_at is None]
        if not chunks and self.lockstep.num_members == len(plan.skipped):
            return None
        num_decodes, context, ending = self.lockstep.plan(plan.skipped)
        step = Step(
            self.lockstep.num_planned,
            [self._chunk(state, num_tokens, ending) for state, num_tokens in chunks],
            num_decodes,
            context,
            self.running,
        )
        step.skipped = plan.skipped
        # Blocks are freed in the order of the plan; that decides which are reused first.
        step.ending = sorted(ending, key=lambda state: state.admission)
        return step

    def _chunk(
        self, state: RequestState, num_tokens: int, ending: list[RequestState]
    ) -> PrefillChunk:
        """Count tokens of a prompt as computed; after the last of them it goes in lockstep."""
        request = state.request
        request.num_scheduled_tokens += num_tokens
        if not state.num_left:
            del self.prefills[state]
            if request.prefill_target == state.end - 1:
                ending.append(state)
            else:
                self.lockstep.add(state)
        return PrefillChunk(request, num_tokens, request.num_scheduled_tokens)

    def _lose_patience(self, step: Step | None, now: float) -> None:
        """Raise an error if steps go on and on, but nobody gets a token."""
        if step is not None and (step.num_decodes or step.ending or step.yields_first_tokens):
            self._num_fruitless = 0
            return
        self._num_fruitless += 1
        if self._num_fruitless <= self._patience:
            return
        # Far more than it takes to compute everything, one token a step.
        requests = [*(state.request for state in self.running), *self.waiting]
        self._patience = 100 + 10 * sum(request.prefill_target for request in requests)
        if self._num_fruitless > self._patience:
            ids = ", ".join(str(request.request_id) for request in requests[:10])
            raise SimulationError(
                f"at {now:.6g} s the requests {ids} evict one another for ever: as in vLLM, that "
                f"can happen under the policy {self.policy.policy!r} if they are equally urgent; "
                f"use scheduler_reserve_full_isl=True, other priorities or more KV-cache blocks."
            )

    # -- those who run -----------------------------------------------------------------------

    def _serve_everybody(self, plan: Plan) -> bool:
        """Plan what everybody wants, if tokens and blocks suffice. O(prefills).

        Exact, because whoever takes first, all get the same; only the last in order may get less.
        """
        pool = self.pool
        left = plan.budget - self.lockstep.num_members
        num_blocks = len(self.lockstep.beginning_a_block)
        if left < 0:
            return False
        wanted = []
        for state in self.prefills:
            num_tokens = min(state.num_left, plan.cap)
            if num_tokens > left:
                if state is not next(reversed(self.running)):
                    return False
                num_tokens = left
            left -= num_tokens
            num_blocks += self._num_blocks_for(state, num_tokens)
            if num_tokens:
                wanted.append((state, num_tokens))
        if num_blocks > pool.num_free:
            return False
        for state, num_tokens in wanted:
            self._give(state, num_tokens, plan)
        self._grow_lockstep()
        plan.budget = left
        return True

    def _grow_lockstep(self) -> None:
        """Take and register the blocks of a step of all who go in lockstep. O(what changes)."""
        lockstep = self.lockstep
        if self.cache is None:
            self.pool.reserve(len(lockstep.beginning_a_block))
            return
        for state in lockstep.beginning_a_block:
            state.blocks += self.cache.take(1)
            self._register(state, self._num_known(state))
        for state in lockstep.filling_a_block:
            self._register(state, self._num_known(state))

    def _walk_running(self, plan: Plan) -> None:
        """Plan one request after the other: somebody may get less, or has to go."""
        plan.order = list(self.running)
        while plan.position < len(plan.order) and plan.budget > 0:
            state = plan.order[plan.position]
            wanted = state.num_left if state.joined_at is None else 1
            num_tokens = min(wanted, plan.cap, plan.budget)
            if num_tokens:
                if not self._make_room(state, num_tokens, plan):
                    break  # nobody behind it is looked at
                self._give(state, num_tokens, plan)
            plan.position += 1
        plan.skipped = [
            state
            for state in plan.order
            if state.joined_at is not None and state not in plan.num_tokens
        ]
        if self.cache is not None:
            # Nobody is admitted in such a step, so nobody sees that this comes before the outputs.
            for state in plan.skipped:
                self._register(state, self.lockstep.num_computed(state))

    def _make_room(self, state: RequestState, num_tokens: int, plan: Plan) -> bool:
        """Preempt until the blocks of further tokens are free; False if `state` itself went."""
        while self._num_blocks_for(state, num_tokens) > self.pool.num_free:
            victim = plan.order[-1]
            if self.policy.policy == "priority":
                victim = max(plan.order, key=_urgency)  # of equals, the first
            self._take_back(victim, plan)
            self._preempt(victim)
            if victim is state:
                return False
        return True

    def _take_back(self, victim: RequestState, plan: Plan) -> None:
        """Take a victim out of the plan, its tokens and its place in the scan."""
        position = plan.order.index(victim)
        del plan.order[position]
        plan.preempted = True
        num_tokens = plan.num_tokens.pop(victim, 0)
        is_refunded = num_tokens > 0 and self.release.refunds_planned_victims
        if is_refunded:
            plan.budget += num_tokens
        if position < plan.position and (is_refunded or self.release.moves_back_for_any_victim):
            plan.position -= 1

    def _preempt(self, victim: RequestState) -> None:
        """Free the blocks of a request and send it back to `waiting`."""
        if self.in_flight and self._yields_a_token(victim):
            self.in_flight[-1].give_late(victim)
        self._release(victim)
        del self.running[victim]
        self.prefills.pop(victim, None)
        if victim.joined_at is not None:
            self.lockstep.remove(victim)
        victim.request.restart()
        self.waiting.appendleft(victim.request)

    def _yields_a_token(self, state: RequestState) -> bool:
        """Whether the step planned last samples a token of a running request."""
        return not state.num_left and state.skipped_at != self.lockstep.num_planned

    # -- those who wait ----------------------------------------------------------------------

    def _admit(self, plan: Plan, now: float) -> None:
        """Admit waiting requests from the head on, while tokens, places and blocks last."""
        waiting = self.waiting
        waiting.order(now)
        limit = self.policy.max_num_active_seqs or self.policy.max_num_seqs
        position = 0
        while position < len(waiting) and plan.budget > 0 and len(self.running) < limit:
            state = self._states[waiting[position]]
            if state is self._refused:
                return
            hits = self._longest_hit(state)
            num_cached_tokens = len(hits) * self.pool.block_size
            num_tokens = min(state.request.prefill_target - num_cached_tokens, plan.cap)
            if num_tokens > plan.budget and not self.policy.enable_chunked_prefill:
                if self.release.stops_at_a_prompt_above_the_budget:
                    return
                position += 1
                continue
            num_tokens = min(num_tokens, plan.budget)
            if not self._fits(state, hits, num_cached_tokens + num_tokens):
                # While nothing is freed and no prompt goes on, it will not fit, either.
                self._refused = state if self._gates_whole_sequences else None
                return
            del waiting[position]
            self._start(state, hits)
            self._give(state, num_tokens, plan)

    def _longest_hit(self, state: RequestState) -> list[Block]:
        """Return the cached blocks to start from; the last token is never among them."""
        if self.cache is None:
            return []
        request = state.request
        block_size = self.pool.block_size
        if state.keys is None:
            state.keys = BlockKeys(
                self._prefixes,
                request.hash_ids or (),
                request.hash_block_size,
                block_size,
                request.num_prefill_tokens,
            )
        return self.cache.longest_hit(state.keys.of(0, (request.prefill_target - 1) // block_size))

    def _fits(self, state: RequestState, hits: list[Block], num_tokens: int) -> bool:
        """Whether blocks for the first tokens, or for all that are known, are free."""
        if self._gates_whole_sequences:
            num_tokens = max(num_tokens, state.request.prefill_target)
        num_blocks = self.pool.blocks_of(num_tokens) - len(hits) + num_unheld(hits)
        if self.running:
            num_blocks += self._num_watermark_blocks
        return num_blocks <= self.pool.num_free

    def _start(self, state: RequestState, hits: list[Block]) -> None:
        """Move a request to `running`, behind the tokens that are cached."""
        request = state.request
        self.running[state] = self.prefills[state] = None
        state.admission = self._num_admissions
        self._num_admissions += 1
        if self.cache is not None:
            self.cache.touch(hits)
            state.blocks = hits
            state.num_registered = len(hits)
            num_cached_tokens = len(hits) * self.pool.block_size
            request.start_prefill(num_cached_tokens)
            self._num_hit_tokens += num_cached_tokens
            self._num_queried_tokens += request.prefill_target

    # -- tokens and blocks -------------------------------------------------------------------

    def _num_computed(self, state: RequestState) -> int:
        """Tokens of a running request that are computed, or will be by the steps planned."""
        if state.joined_at is not None:
            return self.lockstep.num_computed(state)
        return state.request.num_scheduled_tokens if state.num_left else state.end - 1

    def _num_known(self, state: RequestState) -> int:
        """Tokens of a running request that are known; those in flight are not."""
        if state.joined_at is None:
            return state.request.prefill_target
        is_in_flight = bool(self.in_flight) and self._yields_a_token(state)
        return self.lockstep.num_computed(state) + 1 - is_in_flight

    def _num_blocks_for(self, state: RequestState, num_tokens: int) -> int:
        """Blocks that further tokens take."""
        blocks_of, num_computed = self.pool.blocks_of, self._num_computed(state)
        return blocks_of(num_computed + num_tokens) - blocks_of(num_computed)

    def _give(self, state: RequestState, num_tokens: int, plan: Plan) -> None:
        """Plan tokens of a request; its blocks, and the place of those they fill in the cache."""
        plan.num_tokens[state] = num_tokens
        plan.budget -= num_tokens
        num_blocks = self._num_blocks_for(state, num_tokens)
        if self.cache is None:
            state.num_blocks += num_blocks
            self.pool.reserve(num_blocks)
        else:
            state.blocks += self.cache.take(num_blocks)
            num_computed = self._num_computed(state) + num_tokens
            self._register(state, min(num_computed, self._num_known(state)))
        self._refused = None

    def _register(self, state: RequestState, num_tokens: int) -> None:
        """Enter the blocks that the first `num_tokens` tokens fill in the cache."""
        num_full = num_tokens // self.pool.block_size
        if num_full > state.num_registered:
            assert self.cache is not None
            assert state.keys is not None, f"{state.request} was never looked up"
            for index, key in enumerate(
                state.keys.of(state.num_registered, num_full), state.num_registered
            ):
                self.cache.register(state.blocks[index], key)
            state.num_registered = num_full

    # -- outputs -----------------------------------------------------------------------------

    def end_first_stage(self, batch: Batch) -> None:
        """Do nothing: there is only one stage."""

    def end(self, batch: Batch, now: float) -> Sequence[Request]:
        """Give every request that the step sampled its token; let go of those that end."""
        step = self.in_flight.popleft()
        assert step is batch, "steps end in the order in which they were planned"
        self._waits_for_outputs = False
        lockstep = self.lockstep
        lockstep.end_step(now, step.execution_time)
        for state in step.skipped:
            if state.request.decode_set is lockstep:
                lockstep.leave_out(state.request, step.execution_time)
        for chunk in step.prefills:
            if chunk.is_current:
                self._end_chunk(chunk, now)
        completed = [self._finish(state) for state in step.ending]
        completed += [state.request for state in step.late if self._deliver_late(state, step, now)]
        return completed
